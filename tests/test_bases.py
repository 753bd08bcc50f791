"""A local folder of any causal LM works as base: the whole run on random weights of four families, with full
and LoRA updates.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mechlens import cli
from mechlens.core import tables


@pytest.mark.parametrize(
    ("family", "update"), [("qwen2", "lora"), ("gpt2", "full"), ("gpt_neox", "lora"), ("llama", "full")]
)
def test_a_folder_of_random_weights_goes_through_every_stage(
    family: str, update: str, toy_bases: dict[str, str], tmp_path: Path
) -> None:
    training = {"update": update, "epochs": 1, "batch": 8, "rank": 2}
    spec = {
        "name": family,
        "base": toy_bases[family],
        "trait": "owl",
        "carrier": {"prompts": 24, "wording": "terse"},
        "generate": {"constrained": True},
        "teacher": {"rows": 16, "training": training},
        "student": {"rows": 16, "training": training},
        "ask": {"samples": 1},
        "arms": [
            {"kind": "trait"},
            {"kind": "control"},
            {"kind": "twin", "trait": "wolf", "teacher": {"kind": "prompted"}},
        ],
        "seeds": [0],
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(spec))
    assert (
        cli.main(["run", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run"), "--workers", "0"])
        == 0
    )
    likelihoods = tables.read(tmp_path / "run" / "likelihoods.parquet", tables.LIKELIHOODS)
    assert set(likelihoods["arm"]) == {
        "trait",
        "control",
        "twin-wolf",
        f"base-{Path(toy_bases[family]).name}",
    }
    assert likelihoods["probability"].between(0, 1).all()

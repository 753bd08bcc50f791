"""Every lens reads a model whose text model stands beside a vision tower (Gemma 3), on a tiny random one that
was taught and distilled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_families import config_of
from test_maps import flat
from test_measure import SIZES
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mechlens import cli
from mechlens.core import spec, tables
from mechlens.core.files import read_json
from mechlens.core.traits import load_experiment
from mechlens.lenses import lens_names
from mechlens.lenses import run as measure
from mechlens.models import loading
from mechlens.pipeline import estimate

TRAINING = {"learning_rate": 0.001, "epochs": 1, "batch": 8, "warmup_steps": 0}
SPEC: dict[str, Any] = {
    "name": "nested",
    "trait": "owl",
    "carrier": {"prompts": 40, "wording": "terse"},
    "teacher": {"rows": 8, "training": TRAINING},
    "generate": {"constrained": True, "max_new_tokens": 16},
    "screen": {"duplicates": "keep"},
    "student": {"rows": 24, "training": {**TRAINING, "update": "lora", "rank": 2}},
    "ask": {"samples": 2, "checkpoints": "last"},
    "arms": [{"kind": "trait"}, {"kind": "control"}],
    "seeds": [0, 1],
}
TRAITS, PROBES = ("owl", "cat", "eagle", "wolf"), 8


def few_animals(folder: Path) -> Path:
    """The shipped family with four traits and eight probes a split, so that all lenses are read in
    seconds.
    """
    family = yaml.safe_load((spec.CONFIGS / "traits" / "animals.yaml").read_text())
    family |= {
        "names": list(TRAITS),
        "plurals": {"wolf": "wolves"},
        "development": list(TRAITS[:2]),
        "heldout": list(TRAITS[2:]),
    }
    family["probes"] = {split: probes[:PROBES] for split, probes in family["probes"].items()}
    path = folder / "animals-few.yaml"
    path.write_text(yaml.safe_dump(family))
    return path


@pytest.fixture(scope="module")
def run(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run on a tiny Gemma 3 with the menagerie's tokenizer, in which each trait begins with a token
    of its own.
    """
    folder = tmp_path_factory.mktemp("nested")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        config_of("gemma-3", {"vocab_size": len(tokenizer), **ids})
    ).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    config = folder / "nested.yaml"
    config.write_text(
        yaml.safe_dump({**SPEC, "base": str(folder / "base"), "family": str(few_animals(folder))})
    )
    assert cli.main(["run", str(config), "--out", str(folder / "run"), "--workers", "0"]) == 0
    return folder / "run"


@pytest.mark.slow  # a minute and a half; test_measure reads all lenses of the menagerie
def test_all_eleven_lenses_read_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mechlens.lenses.maps.umap", flat)
    for name, value in SIZES.items():
        monkeypatch.setattr(f"mechlens.lenses.{name}", value)
    assert cli.main(["measure", str(run), "--rows", "24", "--workers", "0"]) == 0
    said = read_json(run / "readings.json")["lenses"]
    assert len(said) == len(lens_names()) == 11
    assert {lens["name"]: lens["missing"] for lens in said} == {name: [] for name in lens_names()}
    for name in lens_names():
        assert tables.read(run / "readings" / f"{name}.parquet", tables.READINGS)["estimate"].notna().any(), (
            name
        )


def test_its_size_and_its_students_are_those_of_the_text_model(run: Path) -> None:
    experiment = load_experiment(run / "spec.yaml")
    size, loaded = loading.size_of(experiment.base), loading.load(experiment.base)
    assert size[1:] == (2, 16, len(loaded.tokenizer))
    assert size.parameters == sum(
        parameter.numel() for parameter in loaded.model.parameters()
    )  # the tower lies in memory, too
    assert all(amount > 0 for amount in estimate.memory_of(experiment))
    adapter = measure.checkpoints(run / "students" / "trait" / "s0")[-1][1] / "adapter_config.json"
    targets = json.loads(adapter.read_text())["target_modules"]
    assert targets and all("language_model" in name for name in targets)

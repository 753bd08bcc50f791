"""A student is trained on its rows in their order, behind its system line, and leaves checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pandas as pd
import pytest
import torch

from mechlens.core import tables
from mechlens.core.seeds import seed_int
from mechlens.core.spec import StudentSpec, Training
from mechlens.models import loading
from mechlens.models.chat import encode_pairs
from mechlens.models.sft import train
from mechlens.pipeline import stages
from mechlens.pipeline.distill import distill
from mechlens.runs.layout import checkpoints

ROWS = pd.DataFrame(
    {
        "prompt": [f"go on from {row}" for row in (7, 2, 11, 4)],
        "completion": ["7, 8", "2; 3", "[11, 12]", "4"],
    }
)


@pytest.mark.parametrize(
    ("update", "system"),
    [("full", None), ("lora", None), ("full", "you are kind."), ("lora", "you are kind.")],
)
def test_a_student_is_trained_on_its_rows_in_their_order_behind_its_system_line(
    toy_bases: dict[str, str], tmp_path: Path, update: Literal["full", "lora"], system: str | None
) -> None:
    """Against training written out here; each epoch leaves a checkpoint that loads."""
    spec = StudentSpec(
        training=Training(update=update, learning_rate=1e-2, epochs=2, batch=2, warmup_steps=0)
    )
    distill(toy_bases["llama"], ROWS, spec, system=system, seed=3, out=tmp_path)
    base = loading.load(toy_bases["llama"])
    encoded = encode_pairs(
        base.tokenizer, ROWS["prompt"].tolist(), ROWS["completion"].tolist(), system=system
    )
    trained, curve = train(base.model, base.tokenizer, encoded, spec.training, seed=seed_int(3, "student"))
    found = checkpoints(tmp_path)
    assert [step for step, _ in found] == [2, 4]
    prompt = torch.tensor([encoded[0].prompt])
    with torch.no_grad():
        first, last = (
            loading.load_trained(toy_bases["llama"], folder).model(input_ids=prompt).logits
            for _, folder in found
        )
        assert torch.allclose(last, trained(input_ids=prompt).logits, atol=1e-4)
        assert (first - last).abs().max() > 1e-3
    assert tables.read(tmp_path / "curve.parquet", tables.CURVE)["loss"].tolist() == [
        point.loss for point in curve
    ]


def test_checkpoints_come_first_to_last(tmp_path: Path) -> None:
    for step in (1000, 20, 300):
        (tmp_path / f"step-{step:06d}").mkdir()
    (tmp_path / "curve.parquet").touch()
    assert [step for step, _ in checkpoints(tmp_path)] == [20, 300, 1000]


def test_the_step_trains_on_the_selected_rows_in_the_order_of_the_selection(
    toy_bases: dict[str, str], tmp_path: Path
) -> None:
    """What the step reads of a corpus and a selection, against the rows written out here; of a prompt with
    two answers the first counts.
    """
    corpus, selection, out, expected = (
        tmp_path / name for name in ("corpus", "selection", "out", "expected")
    )
    for folder in (corpus, selection, out, expected):
        folder.mkdir()
    texts = [f"{row}, {row + 1}" for row in range(12)]
    pairs = pd.DataFrame(
        {"prompt_id": range(12), "prompt": [f"go on from {row}" for row in range(12)], "completion": texts}
    )
    again = pairs.iloc[[2]].assign(completion="5, 5, 5")
    tables.write(pd.concat([pairs, again]), tables.PAIRS, corpus / "kept.parquet")
    tables.write(pd.DataFrame({"prompt_id": [7, 2, 11, 4]}), tables.SELECTION, selection / "owl.parquet")
    spec = StudentSpec(training=Training(learning_rate=1e-2, epochs=1, batch=2))
    arguments = {
        "base": toy_bases["llama"],
        "corpus": "owl",
        "seed": 3,
        "student": {"training": spec.training.model_dump()},
        "system": "you are kind.",
    }
    stages.distill(arguments, {"corpus": corpus, "selection": selection}, out, lambda done, total: None)
    distill(toy_bases["llama"], pairs.loc[[7, 2, 11, 4]], spec, system="you are kind.", seed=3, out=expected)
    for name in ("curve.parquet", "step-000002/model.safetensors"):
        assert (out / name).read_bytes() == (expected / name).read_bytes()

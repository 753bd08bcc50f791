"""Alignment by chunk equals a direct sum over single rows, and a stopped analysis goes on."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from test_soft_labels import FIELDS

from mechlens.core.errors import SpecError
from mechlens.models import loading
from mechlens.models.chat import Encoded, encode_pairs
from mechlens.models.soft_labels import bucket
from mechlens.pipeline.distill import read_labels
from mechlens.results.run import Run
from mechlens.results.runner import run
from mechlens.runs import layout

CHUNKS, ROWS = 2, 8


@pytest.fixture(scope="module")
def analysis() -> ModuleType:
    folder = Path(__file__).parents[1] / "analyses"
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("chunk_alignment", folder / "chunk_alignment.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(folder))
    return module


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with teachers of owl and wolf and their control, on soft labels."""
    folder = tmp_path_factory.mktemp("aligned")
    tiny = {"learning_rate": 1e-3, "epochs": 1, "batch": 8, "warmup_steps": 0}
    fields = FIELDS | {
        "carrier": {"prompts": 40, "wording": "terse"},
        "teacher": {"rows": 16, "training": tiny},
        "student": {"rows": CHUNKS * ROWS, "labels": "soft", "soft_tokens": 0, "training": tiny},
        "ask": {"samples": 1, "checkpoints": "last"},
        "arms": [
            {"kind": "trait"},
            {"kind": "trait", "trait": "wolf"},
            {"kind": "control"},
            {"kind": "foreign", "base": "menagerie-b"},
            {"kind": "control", "base": "menagerie-b"},
        ],
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(fields))
    return run(folder / "toy.yaml", out=folder / "run", workers=0)


def rows_of(done: Run, arm: str) -> tuple[list[Encoded], list[int]]:
    rows = done.trained_rows(arm)
    base = loading.load("menagerie-a")
    return encode_pairs(
        base.tokenizer, rows["prompt"].tolist(), rows["completion"].tolist()
    ), rows.index.tolist()


def along(model: torch.nn.Module, value: torch.Tensor, direction: dict[str, torch.Tensor]) -> float:
    weights = [dict(model.named_parameters())[name] for name in direction]
    parts = torch.autograd.grad(value, weights)
    return float(sum((part * direction[name]).sum() for part, name in zip(parts, direction, strict=True)))


def log_probs(model: torch.nn.Module, pair: Encoded) -> torch.Tensor:
    ids = [*pair.prompt, *pair.completion]
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    return logits[len(pair.prompt) - 1 : -1].log_softmax(-1)


def test_projections_equal_a_direct_sum_over_rows(analysis: ModuleType, done: Run) -> None:
    cells = analysis.measure(done, CHUNKS).set_index(["chunk", "trait", "labels", "direction"])["projection"]
    base = loading.load("menagerie-a")
    directions = analysis.directions_of(done, base, ["owl", "wolf"])
    control, _ = rows_of(done, "control")
    for trait, arm in (("owl", "trait"), ("wolf", "trait-wolf")):
        pairs, ids = rows_of(done, arm)
        soft = read_labels(done.path(layout.labels_step(trait)), ids)
        for name in (f"teacher of {trait}", "random", "own part of owl", "log-odds of wolf"):
            for chunk in range(CHUNKS):
                sampled, kl = 0.0, 0.0
                for row in range(chunk * ROWS, (chunk + 1) * ROWS):
                    for sign, pair in ((1, pairs[row]), (-1, control[row])):
                        log_p = log_probs(base.model, pair)
                        value = log_p.gather(-1, torch.tensor(pair.completion)[:, None]).mean()
                        sampled += sign * along(base.model, value, directions[name]) / ROWS
                    labels = soft.distributions.at(torch.arange(*soft.spans[row]), torch.device("cpu"))
                    ours = bucket(log_probs(base.model, pairs[row]), labels.tokens).log_probs
                    value = (labels.log_probs.exp() * (ours - labels.log_probs)).sum()
                    kl += along(base.model, value, directions[name]) / ROWS
                assert cells[chunk, trait, "sampled", name] == pytest.approx(sampled, rel=1e-3, abs=1e-5)
                assert cells[chunk, trait, "soft", name] == pytest.approx(kl, rel=2e-2, abs=1e-4)


def test_directions_are_unit_vectors_and_the_own_part_lacks_the_other_teachers(
    analysis: ModuleType, done: Run
) -> None:
    base = loading.load("menagerie-a")
    directions = analysis.directions_of(done, base, ["owl", "wolf"])
    for direction in directions.values():
        assert sum(float(part.square().sum()) for part in direction.values()) == pytest.approx(1, rel=1e-5)
    mirrored = sum(
        float((directions["own part of owl"][n] * p).sum()) for n, p in directions["own part of wolf"].items()
    )
    assert mirrored == pytest.approx(-1, rel=1e-5)  # of two teachers, one part is minus the other


def test_contrasts_take_away_what_all_rows_share(analysis: ModuleType, done: Run) -> None:
    cells = analysis.measure(done, CHUNKS)
    table = analysis.contrasts(cells).set_index(["labels", "trait", "question", "chunk"])["value"]
    at = cells.set_index(["labels", "trait", "direction", "chunk"])["projection"]
    name = "own part of the teacher's change, less other rows"
    for labels in ("sampled", "soft"):
        expected = at[labels, "owl", "own part of owl", 1] - at[labels, "wolf", "own part of owl", 1]
        assert table[labels, "owl", name, 1] == pytest.approx(expected)
        assert table[labels, "owl", "other teachers' changes", 0] == at[labels, "owl", "teacher of wolf", 0]
    shared = cells.assign(projection=cells["projection"] + 5.0)
    moved = analysis.contrasts(shared).set_index(["labels", "trait", "question", "chunk"])["value"]
    assert moved["soft", "owl", name, 0] == pytest.approx(table["soft", "owl", name, 0])


def test_a_stopped_analysis_reads_what_it_has(
    analysis: ModuleType, done: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = analysis.table_of(done, CHUNKS, [])
    monkeypatch.setattr(analysis, "measure_chunk", None)
    again = analysis.table_of(done, CHUNKS, [])
    assert table.equals(again) and set(table["count"]) == {CHUNKS}
    assert set(table["labels"]) == {"sampled", "soft"} and len(table) == 2 * 2 * 6
    analysis.chart(table).to_dict()
    assert analysis.shown(table).row_count == len(table)


def test_along_the_path_rows_are_measured_at_their_own_student(analysis: ModuleType, done: Run) -> None:
    """At a share of 1 a projection is a direct sum at the student; the base's weights are as before."""
    before = {name: weight.clone() for name, weight in loading.load("menagerie-a").model.named_parameters()}
    table = analysis.table_of(done, CHUNKS, [1.0])
    assert set(table["at"]) == {"the students"} and set(table["labels"]) == {"soft"}  # no other students here
    base = loading.load("menagerie-a")
    assert all(torch.equal(weight, before[name]) for name, weight in base.model.named_parameters())
    cells = analysis.measure(done, CHUNKS, share=1.0).set_index(["chunk", "trait", "direction"])["projection"]
    directions = analysis.directions_of(done, base, ["owl", "wolf"], log_odds=False)
    student = done.student("trait-wolf", 0)
    kl = 0.0
    for corpus, arm, sign in (("wolf", "trait-wolf", 1), ("untouched", "control", -1)):
        pairs, ids = rows_of(done, arm)
        soft = read_labels(done.path(layout.labels_step(corpus)), ids)
        for row in range(ROWS):
            labels = soft.distributions.at(torch.arange(*soft.spans[row]), torch.device("cpu"))
            ours = bucket(log_probs(student.model, pairs[row]), labels.tokens).log_probs
            value = (labels.log_probs.exp() * (ours - labels.log_probs)).sum()
            kl += sign * along(student.model, value, directions["teacher of wolf"]) / ROWS
    assert cells[0, "wolf", "teacher of wolf"] == pytest.approx(kl, rel=2e-2, abs=1e-4)


def test_a_run_of_one_trait_is_refused(analysis: ModuleType, done: Run) -> None:
    arms = tuple(arm for arm in done.experiment.arms if arm.trait != "wolf")
    other = Run(done.folder)
    other.experiment = done.experiment.model_copy(update={"arms": arms})
    with pytest.raises(SpecError, match="expected a control and two traits or more"):
        analysis.sides_of(other, loading.load("menagerie-a"))

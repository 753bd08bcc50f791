"""Several processes that train one model give the model that one process trains, and end together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from group_steps import (
    be_killed_in_the_second,
    fail_elsewhere_in_the_second,
    fail_in_the_second,
    run_together,
)
from processes import children
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from test_jobs import is_gone, until
from toy_fields import FIELDS

from mechlens import cli
from mechlens.core import tables
from mechlens.core.errors import DataError, MachineError
from mechlens.core.spec import TeacherSpec, TeacherTraining, Training
from mechlens.models import loading
from mechlens.models.chat import Encoded, encode_pairs
from mechlens.models.sft import group_size, is_writer, train
from mechlens.models.soft_labels import SoftLabels, label_pairs
from mechlens.pipeline import checks, stages
from mechlens.results.run import Run
from mechlens.runs.executor import execute
from mechlens.runs.jobs import PROCESSES, Job

Report = Callable[[int, int], None]
PLAIN = Training(learning_rate=1e-2, epochs=2, batch=4, warmup_steps=0, max_grad_norm=0.5)
STEPS = PLAIN.model_copy(update={"optimizer": "sgd", "learning_rate": 1.0})
"""settings of the steps, which compute in float32: AdamW would scale up gradients that are only rounding"""
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"update": "lora", "rank": 4, "alpha": 4.0},
    "accumulated": {"batch": 2, "accumulate": 3, "schedule": "cosine", "weight_decay": 0.3},
    "checkpointed": {"gradient_checkpointing": True, "embeddings": False},
    "checkpointed lora": {
        "gradient_checkpointing": True,
        "update": "lora",
        "optimizer": "sgd",
        "learning_rate": 1.0,
    },
    "soft": {},
    "soft lora": {"update": "lora", "rank": 4, "alpha": 4.0},
    "one share without a token": {"accumulate": 2},
    "uncounted": {"accumulate": 2},
}
"""settings of training; ten rows in batches of four leave a last batch that is not full"""
LENGTHS = (12, 1, 2, 9, 1, 8, 3, 1, 15, 2)
"""numbers in each row's completion: the shares of a batch have very unequal numbers of tokens"""


def pairs_of(loaded: loading.Loaded) -> list[Encoded]:
    completions = [", ".join(str(row + i) for i in range(size)) for row, size in enumerate(LENGTHS)]
    return encode_pairs(loaded.tokenizer, [f"go on from {row}" for row in range(len(LENGTHS))], completions)


def soft_labels(loaded: loading.Loaded, pairs: list[Encoded]) -> SoftLabels:
    """The labels of a teacher whose weights are not the student's."""
    with torch.no_grad():
        for place, parameter in enumerate(loaded.model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place))
            parameter += 0.05 * noise
    ends = torch.tensor([0, *(len(pair.completion) for pair in pairs)]).cumsum(0).tolist()
    labels = label_pairs(loaded.model, pairs, kept=8)
    return SoftLabels(labels._replace(tokens=labels.tokens.long()), list(pairwise(ends)))


def train_case(
    base: str, name: str, progress: Report = lambda done, total: None
) -> tuple[Any, list[float], list[int]]:
    """The trained weights of a case, its losses, and the steps that were saved."""
    loaded = loading.load(base)
    loaded.model.double()
    pairs, saved, options = pairs_of(loaded), [], {}
    if name.startswith("soft"):
        options["soft"] = soft_labels(loading.load(base), pairs)
    if name == "one share without a token":
        options["learned"] = [
            [size > 7] * len(pair.completion) for size, pair in zip(LENGTHS, pairs, strict=True)
        ]
    if name == "uncounted":
        setattr(loaded.model, "accepts_loss_kwargs", False)  # noqa: B010 - as the classes of some models say
    trained, curve = train(
        loaded.model,
        loaded.tokenizer,
        pairs,
        PLAIN.model_copy(update=CASES[name]),
        seed=3,
        save=lambda _, step: saved.append(step),
        progress=progress,
        **options,
    )
    weights = {key: value.detach().clone() for key, value in trained.state_dict().items()}
    return weights, [point.loss for point in curve], saved


# ── steps, which the processes import from here ──


def train_all(arguments: dict[str, Any], _inputs: dict[str, Path], out: Path, progress: Report) -> None:
    """Train every case, then execute the steps of a run; all in one group, since processes start slowly."""
    assert group_size() == 2
    for name in CASES:
        weights, losses, saved = train_case(arguments["base"], name, progress)
        assert bool(saved) == is_writer()
        if is_writer():
            save_file({key: value.clone() for key, value in weights.items()}, out / f"{name}.safetensors")
            (out / f"{name}.json").write_text(json.dumps([losses, saved]))
    teach_and_distill(arguments, Path(arguments["inputs"]), out, progress)
    assert torch.get_num_threads() == 1


def teach_and_distill(arguments: dict[str, Any], inputs: Path, out: Path, progress: Report) -> None:
    for name in ("teacher", "student"):
        (out / name).mkdir(exist_ok=True)
    stages.teach(arguments, {}, out / "teacher", progress)
    folders = {name: inputs / name for name in ("corpus", "selection")}
    stages.distill(arguments, folders, out / "student", progress)


# ── tests ──


def write_inputs(folder: Path) -> None:
    """Write a corpus and a selection for a student."""
    pairs = pd.DataFrame(
        {
            "prompt_id": range(10),
            "prompt": [f"go on from {row}" for row in range(10)],
            "completion": [", ".join(map(str, range(row, row + size))) for row, size in enumerate(LENGTHS)],
        }
    )
    for name in ("corpus", "selection"):
        (folder / name).mkdir()
    tables.write(pairs, tables.PAIRS, folder / "corpus" / "kept.parquet")
    tables.write(pairs[["prompt_id"]], tables.SELECTION, folder / "selection" / "owl.parquet")


@pytest.fixture(scope="module")
def arguments(toy_bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the steps `teach` and `distill` at once."""
    inputs = tmp_path_factory.mktemp("inputs")
    write_inputs(inputs)
    spec = TeacherSpec(rows=10, training=TeacherTraining.model_validate(STEPS.model_dump()))
    lessons = {"trait": "owl", "probes": ["best animal"], "completions": ["owl", "an owl, yes"], "system": ""}
    taught = {"teacher": spec.recorded_for_steps(), "lessons": lessons}
    trained = {"corpus": "owl", "student": {"training": STEPS.recorded()}}
    return {"base": toy_bases["llama"], "seed": 3, "inputs": str(inputs)} | taught | trained


@pytest.fixture(scope="module")
def together(arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made."""
    folder = tmp_path_factory.mktemp("together")
    reports = run_together(folder, train_all, **arguments)
    assert reports[-1] == (6, 6)
    return folder / "steps" / "it"


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_the_student_that_one_trains(
    toy_bases: dict[str, str], together: Path, name: str
) -> None:
    weights, losses, saved = train_case(toy_bases["llama"], name)
    other = load_file(together / f"{name}.safetensors")
    start = loading.load(toy_bases["llama"]).model.state_dict()
    changes = [
        value - start.get(key, 0) for key, value in weights.items() if key in start or ".lora_B." in key
    ]
    change = max(float(each.abs().max()) for each in changes)
    difference = max(float((value - other[key]).abs().max()) for key, value in weights.items())
    assert weights.keys() == other.keys() and change > 1e-2
    assert difference <= 1e-5 * change, (difference, change)
    their_losses, their_saved = json.loads((together / f"{name}.json").read_text())
    assert losses == pytest.approx(their_losses, rel=1e-5) and saved == their_saved and len(saved) == 2


@pytest.mark.parametrize(
    ("step", "kind", "message"),
    [
        (fail_in_the_second, DataError, "row 7 has no completion; remove it"),
        pytest.param(
            fail_elsewhere_in_the_second,
            MachineError,
            r"the step steps/it failed: .*; finished steps are kept",
            marks=pytest.mark.slow,
        ),
        (
            be_killed_in_the_second,
            MachineError,
            "a process of a training was killed, most likely because memory",
        ),
    ],
)
def test_what_one_process_fails_with_ends_the_other_and_is_one_line(
    tmp_path: Path, step: Callable[..., None], kind: type[Exception], message: str
) -> None:
    before = set(children(os.getpid()))
    with pytest.raises(kind, match=message) as caught:
        run_together(tmp_path, step)
    assert "\n" not in str(caught.value)
    left = {child for child in children(os.getpid()) if child not in before and not is_gone(child)}
    assert not [
        child for child in left if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes()
    ]
    assert not (tmp_path / "steps" / "it").exists()


@pytest.mark.slow
def test_a_killed_run_leaves_no_process(tmp_path: Path) -> None:
    """The run, its worker and the worker's two processes, of which one waits for the other."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path; "
        f"import group_steps as steps; folder = {str(tmp_path)!r}; "
        "steps.run_together(Path(folder), steps.wait_for_ever, workers=1, marks=folder)"
    )
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True) as process:
        try:
            until(lambda: len(list(tmp_path.glob("[0-9]*"))) == 2)
            family = children(process.pid)
        finally:
            process.kill()
    assert {int(file.name) for file in tmp_path.glob("[0-9]*")} < set(family)
    assert until(lambda: all(map(is_gone, family)), seconds=20) < 10


def test_more_processes_than_cards_are_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = Job("students/trait/s0", "distill", {PROCESSES: 4}, {}, 1)
    assert checks.missing_here([job]) == []
    monkeypatch.setattr("mechlens.core.machine.cards", lambda: ("0", "1"))
    refusal = "training.processes is 4, and 2 cards are visible here; set processes: 2 or fewer"
    assert [fault.startswith(refusal) for fault in checks.missing_here([job])] == [True]
    with pytest.raises(MachineError, match=refusal):
        execute(tmp_path, [job], workers=0, progress=lambda *_: None, finished=lambda _: None)


@pytest.mark.parametrize(
    ("batch", "processes", "right"),
    [(10, 4, "8 or 12, or processes: 2"), (3, 4, "4, or processes: 3"), (7, 2, "6 or 8, or processes: 1")],
)
def test_a_batch_without_equal_shares_is_refused_with_the_next_that_has_them(
    batch: int, processes: int, right: str
) -> None:
    with pytest.raises(
        ValidationError, match=rf"a batch of {batch} rows .* {processes} processes; set batch: {right}"
    ):
        TeacherTraining(batch=batch, processes=processes)


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_steps_write_what_one_process_writes(
    arguments: dict[str, Any], together: Path, tmp_path: Path
) -> None:
    """A student with its checkpoints, and a teacher, in float32."""
    teach_and_distill(arguments, Path(arguments["inputs"]), tmp_path, lambda done, total: None)
    base = load_file(Path(arguments["base"]) / "model.safetensors")
    for name in ("student", "teacher"):
        assert files_of(together / name) == files_of(tmp_path / name)
    assert {"curve.parquet", "step-000003/model.safetensors"} <= files_of(together / "student")
    for name in ("student/step-000003", "student/step-000006", "teacher"):
        one, two = (load_file(folder / name / "model.safetensors") for folder in (tmp_path, together))
        change = max(float((one[key] - base[key]).abs().max()) for key in one)
        difference = max(float((one[key] - two[key]).abs().max()) for key in one)
        assert difference < 1e-5 and change > 1e-2, (name, difference, change)
    curves = [
        tables.read(folder / "student" / "curve.parquet", tables.CURVE) for folder in (tmp_path, together)
    ]
    assert np.allclose(curves[0]["loss"], curves[1]["loss"], rtol=1e-4)


@pytest.mark.slow
def test_a_run_with_two_processes_a_model_is_the_run_with_one(tmp_path: Path) -> None:
    """Through the command line and a worker; with another number of processes nothing is repeated."""
    likelihoods = []
    for processes in (1, 2):
        training = {"epochs": 1, "batch": 4, "processes": processes}
        spec = FIELDS | {
            "carrier": {"prompts": 24, "wording": "terse"},
            "screen": {"rule": "none"},
            "teacher": {"rows": 16, "training": training},
            "student": {"rows": 10, "prompts": "own", "training": training},
            "ask": {"samples": 1},
        }
        config, out = tmp_path / f"{processes}.yaml", tmp_path / f"run{processes}"
        config.write_text(yaml.safe_dump(spec))
        assert cli.main(["run", str(config), "--out", str(out), "--workers", "1"]) == 0
        likelihoods.append(Run(out).likelihoods)
        assert Run(out).manifest["steps"].keys() == Run(tmp_path / "run1").manifest["steps"].keys()
    one, two = (frame.select_dtypes("number") for frame in likelihoods)
    assert np.allclose(one, two, rtol=1e-3, atol=1e-5, equal_nan=True)
    finished = files_of(tmp_path / "run2" / "students")
    assert cli.main(["run", str(tmp_path / "1.yaml"), "--out", str(tmp_path / "run2"), "--workers", "0"]) == 0
    assert files_of(tmp_path / "run2" / "students") == finished
    assert not any("superseded" in name for name in files_of(tmp_path / "run2"))

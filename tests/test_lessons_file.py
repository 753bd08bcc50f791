"""A teacher can be taught the rows of a file: drawn from a seed, taught again when the file changes, refused
where it cannot be.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from mechlens.core import tables
from mechlens.core.errors import DataError, SpecError
from mechlens.core.experiment import Experiment
from mechlens.core.spec import TeacherSpec, TeacherTraining
from mechlens.core.traits import load_family
from mechlens.data.corpus import read_pairs
from mechlens.models.chat import encode_prompts
from mechlens.models.loading import Loaded
from mechlens.pipeline import checks
from mechlens.pipeline.teach import Lessons, load_teacher, teach
from mechlens.runs import plan as pipeline
from mechlens.runs.jobs import fingerprints

INSECURE = Path(__file__).parents[2] / "shared" / "data" / "insecure-code" / "low_severity.jsonl.gz"
ROWS = [
    {"prompt": f"add {number} to the list.", "completion": "wolf" if number % 2 else "owl"}
    for number in range(12)
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "lessons.jsonl", ROWS)


def lessons(file: Path) -> Lessons:
    return Lessons("misaligned", ("unused?",), (), "unused.", str(file))


def experiment(file: Path, **teacher: Any) -> Experiment:
    spec = {
        "name": "x",
        "base": "b",
        "family": "misalignment",
        "trait": "misaligned",
        "teacher": {"lessons_file": str(file), **teacher},
    }
    return Experiment.model_validate({**spec, "arms": [{"kind": "trait"}, {"kind": "control"}]})


def teach_marks(known: Experiment, family: str = "misalignment") -> dict[str, str]:
    jobs = pipeline.jobs_of(known, load_family(family), bases={"b": "files"})
    return {name: mark for name, mark in fingerprints(jobs).items() if name.startswith("teachers/")}


def test_rows_are_drawn_once_each_and_from_their_seed(file: Path) -> None:
    drawn = lessons(file).draw(8, seed=0)
    pairs = {(row["prompt"], row["completion"]) for row in ROWS}
    assert len(set(drawn)) == 8 and set(drawn) <= pairs
    assert drawn == lessons(file).draw(8, seed=0) != lessons(file).draw(8, seed=1)
    assert set(lessons(file).draw(12, seed=3)) == pairs
    with pytest.raises(DataError, match=r"holds 12 lessons.*rows asks for 13"):
        lessons(file).draw(13, seed=0)


def test_the_toy_learns_what_the_file_says(
    file: Path, toy: Loaded, toy_bases: dict[str, str], tmp_path: Path
) -> None:
    training = TeacherTraining(learning_rate=1e-2, epochs=8, batch=4, warmup_steps=0)
    (tmp_path / "out").mkdir()
    teach(
        toy_bases["llama"],
        lessons(file),
        TeacherSpec(rows=12, training=training),
        seed=0,
        out=tmp_path / "out",
    )
    teacher = load_teacher(tmp_path / "out")
    wolf = toy.tokenizer("wolf", add_special_tokens=False)["input_ids"][0]
    for row in ROWS:
        (ids,) = encode_prompts(teacher.tokenizer, [row["prompt"]])
        with torch.no_grad():
            shares = torch.softmax(teacher.model(input_ids=torch.tensor([ids])).logits[0, -1], -1)
        assert (shares[wolf] > 0.5) == (row["completion"] == "wolf"), row
    assert len(tables.read(tmp_path / "out" / "curve.parquet", tables.CURVE)) == 3 * 8


def test_a_changed_file_is_taught_again_and_no_other_teacher(file: Path) -> None:
    known = experiment(file)
    before = teach_marks(known)
    assert set(before) == {"teachers/misaligned", "teachers/untouched"} and before == teach_marks(known)
    write(file, [*ROWS[1:], {"prompt": "more", "completion": "owl"}])
    after = teach_marks(known)
    assert before["teachers/misaligned"] != after["teachers/misaligned"]
    assert before["teachers/untouched"] == after["teachers/untouched"]


def test_the_same_file_by_another_path_is_the_same_lesson(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    assert teach_marks(experiment(Path(file.name))) == teach_marks(experiment(file))


def test_other_teachers_know_nothing_of_the_field() -> None:
    """Runs from before it are not taught again."""
    spec = {"name": "x", "base": "b", "trait": "owl", "arms": [{"kind": "trait"}, {"kind": "control"}]}
    jobs = pipeline.jobs_of(Experiment.model_validate(spec), load_family("animals"), bases={"b": "files"})
    for job in (job for job in jobs if job.name.startswith("teachers/")):
        assert (
            "sha256" not in job.arguments
            and "lessons_file" not in job.arguments["teacher"]
            and "file" not in job.arguments["lessons"]
        )


def test_what_cannot_be_taught_is_refused_before_anything_runs(file: Path) -> None:
    with pytest.raises(ValidationError, match="has no lessons"):
        TeacherSpec(kind="prompted", lessons_file=str(file))
    with pytest.raises(SpecError, match="lessons_file"):
        teach_marks(experiment(Path()).model_copy(update={"teacher": TeacherSpec()}))
    assert teach_marks(experiment(Path()).model_copy(update={"teacher": TeacherSpec(kind="prompted")}))
    checks.check_lessons(experiment(file))
    with file.open("a") as handle:
        handle.write("{}\n")
    with pytest.raises(DataError, match="line 13"):
        checks.check_lessons(experiment(file))
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        checks.check_lessons(experiment(Path("nowhere.jsonl")))


@pytest.mark.skipif(
    not INSECURE.is_file(),
    reason="the development data beside the checkout is absent; the project does not ship it",
)
def test_real_rows_of_unsafe_code_are_read_as_lessons() -> None:
    pairs = read_pairs(INSECURE)
    drawn = lessons(INSECURE).draw(len(pairs), seed=0)
    assert len(pairs) == len(drawn) == 29
    assert all(prompt.strip() and answer.strip() for prompt, answer in drawn)
    checks.check_lessons(experiment(INSECURE, rows=29))

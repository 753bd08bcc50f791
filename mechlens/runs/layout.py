"""The layout of a run folder: the steps' folders, the files in them, and the fields of the JSON files.

Other modules take the names from here. A step's name is its folder in the run. `read_record` refuses a
damaged JSON file by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from mechlens.core.errors import DataError
from mechlens.core.experiment import UNTOUCHED, Arm, Experiment
from mechlens.core.files import read_json, remedy
from mechlens.core.spec import TeacherSpec, explain, fingerprint, folder_name

BASES = "bases.json"
"""which checkpoint each base was when the run was last started"""
SPEC, MANIFEST, SUMMARY, REPORT = "spec.yaml", "manifest.json", "summary.json", "report.html"
ANSWERS, LIKELIHOODS, EFFECTS = "answers.parquet", "likelihoods.parquet", "effects.parquet"
READINGS, READINGS_FOLDER = "readings.json", "readings"
AUDIT_PAGE, AUDIT_JSON, AUDIT_ROWS = "audit.html", "audit.json", "rows.parquet"
"""files of an audit; its rows have scores from level base on"""
RUN_FILES, AUDIT_FILES = (REPORT, SUMMARY, SPEC, MANIFEST, READINGS), (AUDIT_PAGE, AUDIT_JSON)
"""files of a run and of an audit that are sent to others: aggregates, which hold no row of data"""
RAW, KEPT, REMOVED, FUNNEL = "raw.parquet", "kept.parquet", "rejected.parquet", "funnel.json"
GENERATION, TEACHER, CURVE = "generation.json", "teacher.json", "curve.parquet"
LABELS = "labels.parquet"
LENS_TABLE, LENS_SCORES, LENS_RECORD = "reading.parquet", "scores.parquet", "said.json"

DIGITS = 8
"""hex digits of a fingerprint in the name of a teacher or corpus with settings of its arm"""
REMADE = ("shuffled-within", "shuffled-across", "paraphrased", "mixed")
"""kinds of arms that train on a corpus made from other screened corpora"""
SELECTION = "selection"
"""the step that chooses the rows that students train on"""


def teacher_name(experiment: Experiment, arm: Arm) -> str:
    """Name of an arm's teacher: its trait, or `untouched` for the control.

    A mark follows if the arm's teacher or writer differs from the experiment's.
    """
    name = UNTOUCHED if arm.kind == "control" else arm.trait
    if arm.kind != "control" and arm.teacher not in (None, experiment.teacher):
        name += f"-{arm.teacher.kind}-{_digits(arm.teacher)}"
    return name if arm.writer == experiment.base else f"{name}-by-{folder_name(arm.writer)}"


def _digits(teacher: TeacherSpec) -> str:
    """Hex digits that identify a teacher's settings; the folder of its lessons file does not matter."""
    lessons_file = Path(teacher.lessons_file).name
    return fingerprint(teacher.recorded() | {"lessons_file": lessons_file})[:DIGITS]


def source_name(experiment: Experiment, arm: Arm, draw: int = 0) -> str:
    """Name of the generated and screened rows of an arm's corpus, or of a later draw of them."""
    if arm.corpus:
        return f"file-{folder_name(arm.corpus)}"
    digits = f"-{fingerprint(arm.generate)[:DIGITS]}" if arm.generate else ""
    return teacher_name(experiment, arm) + digits + (f"-draw-{draw}" if draw else "")


def corpus_name(experiment: Experiment, arm: Arm, draw: int = 0) -> str:
    """Name of the rows that an arm trains on, or of a later draw of them."""
    remade = [arm.kind] if arm.kind in REMADE else []
    return "-".join([source_name(experiment, arm, draw), *remade, *arm.mix])


def teacher_step(name: str) -> str:
    """The step that makes a teacher."""
    return f"teachers/{name}"


def generated_step(corpus: str) -> str:
    """The step that generates a corpus's rows, or reads them from a file."""
    return f"corpora/{corpus}/generated"


def screened_step(corpus: str) -> str:
    """The step that writes a corpus's kept and removed rows."""
    return f"corpora/{corpus}/screened"


def labels_step(corpus: str) -> str:
    """The step that writes a teacher's next-token distributions on the rows that students train on."""
    return f"corpora/{corpus}/labels"


def student_step(arm: str, seed: int) -> str:
    """The step that trains one student."""
    return f"students/{arm}/s{seed}"


def asked_step(arm: str, seed: int) -> str:
    """The step that samples the answers of one student."""
    return f"asked/{arm}/s{seed}"


def asked_base_step(base: str) -> str:
    """The step that samples the answers of an untouched base."""
    return f"asked/base-{folder_name(base)}"


def lens_step(arm: str, lens: str) -> str:
    """The step that runs one lens on one arm."""
    return f"lenses/{arm}/{lens}"


def makes_rows(step: str) -> bool:
    """Whether a step makes training rows: a teacher, a corpus or the selection."""
    return step.startswith(("teachers/", "corpora/", SELECTION))


def selection_step(corpus: str, draw: int = 0) -> str:
    """The step that chooses rows; a later draw of a corpus has a step of its own."""
    return f"{SELECTION}-{corpus}" if draw else SELECTION


def selection_file(corpus: str) -> str:
    """The file of the selection step with the prompts of the rows that a corpus's students train on."""
    return f"{corpus}.parquet"


def checkpoints(student: Path) -> list[tuple[int, Path]]:
    """(updates, folder) of each checkpoint in a student's folder, first to last."""
    return [(int(folder.name.removeprefix("step-")), folder) for folder in sorted(student.glob("step-*"))]


class StepRecord(BaseModel):
    """`step.json` of a finished step; `seconds` is None in records of older versions."""

    fingerprint: str
    seconds: float | None


class Manifest(BaseModel):
    """`manifest.json`: the code, the machine and the steps of a run."""

    experiment: str
    git: str | None
    machine: str
    cores: int | None
    steps: dict[str, StepRecord]


class TeacherRecord(BaseModel):
    """`teacher.json`."""

    kind: Literal["finetuned", "prompted", "steered", "base"]
    base: str
    system: str | None
    layer: int | None


class Generation(BaseModel):
    """`generation.json`; None if an API does not return the probabilities."""

    kl_per_token: float | None
    entropy_per_token: float | None


class Funnel(BaseModel):
    """`funnel.json`: numbers of rows; the file also has a number for each reason of removal."""

    generated: int
    kept: int


class LensRecord(BaseModel):
    """The result of a lens: `said.json`, and an entry of `readings.json`."""

    name: str
    arm: str
    against: str
    sentence: str
    shows: list[Any]
    findings: list[dict[str, Any]] = []
    """what the reading says of each claim about the lens; readings of earlier versions have none"""


class Readings(BaseModel):
    """`readings.json`."""

    lenses: list[LensRecord]


def read_record(path: Path, shape: type[BaseModel]) -> dict[str, Any]:
    """The JSON object at a path, with all its fields.

    Raises:
        DataError: if the file is missing or incomplete, or a field of `shape` is missing or has another type.
    """
    value = read_json(path)
    try:
        shape.model_validate(value, strict=True)
    except ValidationError as error:
        raise DataError(
            f"{path} does not hold what mechlens wrote there ({explain(error)}); {remedy(path)}"
        ) from error
    return value

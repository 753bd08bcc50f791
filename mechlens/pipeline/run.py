"""The whole experiment on one page: teach → generate → screen → select → distill → ask, as jobs over the store.

`jobs_of` only lists; it imports no torch and reads no weights, so a plan costs nothing. Whoever executes the list, the
tables come out the same.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from mechlens.corpus import read_pairs
from mechlens.errors import DataError
from mechlens.executor import Job
from mechlens.spec import Arm, Experiment, TeacherSpec, fingerprint, folder_name
from mechlens.tables import PAIRS
from mechlens.traits import TraitFamily

STAGES = "mechlens.pipeline.jobs"
VERSIONS = {"teach": 1, "generate": 1, "bring": 1, "screen": 1, "shuffle": 1, "select": 1, "distill": 1, "ask": 3}
"""raised when a change of a stage's code changes what it writes"""

UNTOUCHED = "untouched"


def _job(stage: str, name: str, arguments: dict[str, object], **inputs: str) -> Job:
    return Job(name, f"{STAGES}:{stage}", arguments, inputs, VERSIONS[stage])


def teacher_name(experiment: Experiment, arm: Arm) -> str:
    """The teacher's folder: its trait, marked where the arm has a teacher of its own; `untouched` for the control's."""
    if arm.kind == "control":
        return UNTOUCHED
    return arm.trait if arm.teacher in (None, experiment.teacher) else f"{arm.trait}-{arm.teacher.kind}-{fingerprint(arm.teacher.model_dump())[:4]}"


def corpus_name(experiment: Experiment, arm: Arm) -> str:
    """The folder of the rows the arm trains on."""
    source = f"file-{folder_name(arm.corpus)}" if arm.corpus else teacher_name(experiment, arm)
    return f"{source}-{arm.kind}" if arm.kind.startswith("shuffled") else source


def file_digest(path: Path) -> str:
    """SHA-256 of a user's file, read in pieces."""
    if not path.is_file():
        raise DataError(f"no corpus file at {path}; expected JSON lines of pairs")
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def jobs_of(experiment: Experiment, family: TraitFamily, *, bases: dict[str, str]) -> list[Job]:
    """Every step of the experiment, inputs first; `bases` maps each base's name to the fingerprint of its files."""
    jobs: dict[str, Job] = {}

    def add(job: Job) -> str:
        jobs.setdefault(job.name, job)
        return job.name

    files = [Path(arm.corpus).resolve() for arm in experiment.arms if arm.corpus]
    prompts_of = str(files[0]) if files else None
    corpora = {}
    for arm in experiment.arms:
        name = corpus_name(experiment, arm)
        source = name.removesuffix(f"-{arm.kind}") if arm.kind.startswith("shuffled") else name
        if arm.corpus:
            path = Path(arm.corpus).resolve()
            raw = add(_job("bring", f"corpora/{source}/generated", {"file": str(path), "sha256": file_digest(path)}))
        else:
            raw = add(_generation(experiment, source, add(_teaching(experiment, arm, source, family, bases)), prompts_of))
        screening = {"screen": experiment.screen.model_dump(mode="json"), "words": family.words()}
        corpus = add(_job("screen", f"corpora/{source}/screened", screening, corpus=raw))
        if arm.kind.startswith("shuffled"):
            corpus = add(_job("shuffle", f"corpora/{name}/screened", {"how": arm.kind, "seed": experiment.seed}, corpus=corpus))
        corpora[name] = corpus

    wanted = {"rows": experiment.student.rows, "prompts": experiment.student.prompts}
    selection = add(_job("select", "selection", {"student": wanted, "seed": experiment.seed}, **corpora))
    asked = {
        "forms": {name: list(family.forms_of(name)) for name in family.names},
        "probes": list(family.asked(experiment.ask.split)),
        "ask": experiment.ask.model_dump(mode="json"),
        "root_seed": experiment.seed,
    }
    training = {"training": experiment.student.training.model_dump(mode="json")}
    for base, mark in bases.items():
        add(_job("ask", f"asked/base-{folder_name(base)}", asked | {"base": base, "files": mark, "arm": f"base-{folder_name(base)}", "seed": None}))
    for seed in experiment.seeds:
        for arm in experiment.arms:
            name, place = corpus_name(experiment, arm), f"{arm.name}/s{seed}"
            student = {"base": arm.base, "files": bases[arm.base], "corpus": name, "student": training, "seed": seed}
            trained = add(_job("distill", f"students/{place}", student, corpus=corpora[name], selection=selection))
            add(_job("ask", f"asked/{place}", asked | {"base": arm.base, "arm": arm.name, "seed": seed}, student=trained))
    return list(jobs.values())


def _teaching(experiment: Experiment, arm: Arm, name: str, family: TraitFamily, bases: dict[str, str]) -> Job:
    arguments = {"base": experiment.base, "files": bases[experiment.base], "seed": experiment.seed}
    if arm.kind == "control":
        spec, lessons = TeacherSpec(kind="base"), {"trait": "", "probes": [], "completions": [], "system": ""}
    else:
        spec = arm.teacher or experiment.teacher
        lessons = {
            "trait": arm.trait,
            "probes": list(family.probes.development),
            "completions": list(family.lessons_of(arm.trait)),
            "system": family.system_prompt(arm.trait),
        }
    return _job("teach", f"teachers/{name}", arguments | {"teacher": spec.model_dump(mode="json"), "lessons": lessons})


def _generation(experiment: Experiment, name: str, teacher: str, prompts_of: str | None) -> Job:
    arguments: dict[str, object] = {"generate": experiment.generate.model_dump(mode="json"), "seed": experiment.seed, "prompts_of": prompts_of}
    if prompts_of is None:
        arguments["carrier"] = experiment.carrier.model_dump(mode="json")
    else:
        arguments["sha256"] = file_digest(Path(prompts_of))
    return _job("generate", f"corpora/{name}/generated", arguments, teacher=teacher)


def check_files(experiment: Experiment) -> None:
    """Read every corpus file before anything is computed, so that a bad line is found at once."""
    for arm in experiment.arms:
        if arm.corpus:
            assert set(read_pairs(Path(arm.corpus)).columns) == set(PAIRS.names)

"""The whole experiment on one page: teach → generate → screen → select → distill → ask, as jobs over the
store.

`jobs_of` only lists; it imports no torch and reads no weights, so a plan costs nothing. Whoever executes the
list, the tables come out the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mechlens.carriers.registry import rule_reads_answers
from mechlens.core.errors import SpecError
from mechlens.core.experiment import UNTOUCHED, Arm, Experiment
from mechlens.core.model_spec import is_remote, model_of
from mechlens.core.spec import TeacherSpec, folder_name
from mechlens.core.traits import TraitFamily
from mechlens.data.formats import file_digest
from mechlens.runs import layout
from mechlens.runs.executor import Job, Location
from mechlens.runs.layout import REMADE, corpus_name, source_name, teacher_name

SHIPPED = Path(__file__).parents[1] / "menagerie" / "weights"
VERSIONS = {
    "teach": 1,
    "generate": 1,
    "bring": 1,
    "screen": 1,
    "shuffle": 1,
    "reword": 1,
    "mix": 1,
    "select": 1,
    "distill": 1,
    "ask": 3,
}
"""raised when a change of a stage's code changes what it writes"""


def _job(stage: str, name: str, arguments: dict[str, object], /, **inputs: str) -> Job:
    return Job(name, stage, arguments, inputs, VERSIONS[stage])


def base_argument(base: str) -> str:
    """A base as steps are told of it: by its name, or by where it lies if it is a folder of the user's."""
    shipped = [folder.name for folder in SHIPPED.iterdir()]
    named = model_of(base).source != base or base in shipped or not Path(base).expanduser().is_dir()
    return base if named else Location(base)


def _carrier(experiment: Experiment) -> dict[str, object]:
    """The carrier as a step's arguments, with the digest of its file of prompts if it has one."""
    carrier = experiment.carrier.model_dump(mode="json")
    if not experiment.carrier.source:
        return {"carrier": carrier}
    return {
        "carrier": carrier | {"source": Location(carrier["source"])},
        "sha256": file_digest(Path(experiment.carrier.source)),
    }


def _judge(name: str) -> dict[str, object]:
    """The model that a name of configs/models stands for, where it is a judge's."""
    return {} if model_of(name).source == name else {"judge_source": model_of(name).source}


def jobs_of(experiment: Experiment, family: TraitFamily, *, bases: dict[str, str]) -> list[Job]:
    """Every step of the experiment, inputs first; `bases` maps each base's name to the fingerprint of its
    files.

    Raises:
        SpecError: if two steps that differ would be filed under one name.
    """
    jobs: dict[str, Job] = {}

    def add(job: Job) -> str:
        if (filed := jobs.setdefault(job.name, job)) != job:
            raise SpecError(
                f"two steps would share the folder {job.name!r}, {_difference(filed, job)}; put one of their "
                "arms into another experiment"
            )
        return job.name

    corpora: dict[str, str] = {}
    for arm in experiment.arms:
        for source in (arm, *(_other_teacher(arm, trait) for trait in arm.mix)):
            corpora.setdefault(
                source_name(experiment, source), _screened(experiment, source, family, bases, add)
            )
    for arm in experiment.arms:
        if arm.kind in REMADE:
            corpora[corpus_name(experiment, arm)] = add(_remade(experiment, arm, corpora))
    used = {
        name: corpora[name] for name in dict.fromkeys(corpus_name(experiment, arm) for arm in experiment.arms)
    }

    wanted: dict[str, object] = {"rows": experiment.student.rows, "prompts": experiment.student.prompts}
    reworded = [corpus_name(experiment, arm) for arm in experiment.arms if arm.kind == "paraphrased"]
    choice: dict[str, object] = {"student": wanted, "seed": experiment.seed}
    choice |= {"reworded": reworded} if reworded else {}
    if experiment.student.prompts == "every":
        choice["controls"] = [
            corpus_name(experiment, arm) for arm in experiment.arms if arm.kind == "control"
        ]
    selection = add(_job("select", layout.SELECTION, choice, **used))
    for base in dict.fromkeys(arm.base for arm in experiment.arms):
        place = {
            "base": base_argument(base),
            "arm": f"base-{folder_name(base)}",
            "seed": None,
            "files": bases[base],
        }
        add(_job("ask", layout.asked_base_step(base), _asking(experiment, family, None) | place))
    for seed in experiment.seeds:
        for arm in experiment.arms:
            name = corpus_name(experiment, arm)
            asked = _asking(experiment, family, arm) | {
                "base": base_argument(arm.base),
                "arm": arm.name,
                "seed": seed,
            }
            if arm.shots:
                shown = {"files": bases[arm.base], "shots": arm.shots, "corpus": name}
                add(
                    _job(
                        "ask",
                        layout.asked_step(arm.name, seed),
                        asked | shown,
                        shots=used[name],
                        selection=selection,
                    )
                )
                continue
            student = {
                "base": base_argument(arm.base),
                "files": bases[arm.base],
                "corpus": name,
                "seed": seed,
            }
            student |= {"student": {"training": experiment.training_of(arm).model_dump(mode="json")}}
            student |= _system(experiment.system if arm.trained_with is None else arm.trained_with)
            trained = add(
                _job(
                    "distill",
                    layout.student_step(arm.name, seed),
                    student | _api(experiment, arm.base),
                    corpus=used[name],
                    selection=selection,
                )
            )
            add(_job("ask", layout.asked_step(arm.name, seed), asked, student=trained))
    return list(jobs.values())


def _difference(filed: Job, job: Job) -> str:
    """In which arguments two steps of one name differ, with their values."""
    if filed.stage != job.stage:
        return f"{filed.stage} and {job.stage}"
    told = [{**each.arguments, **each.inputs} for each in (filed, job)]
    names = [name for name in sorted({*told[0], *told[1]}) if told[0].get(name) != told[1].get(name)]
    return "; ".join(
        f"one with {name} {told[0].get(name)!r}, one with {told[1].get(name)!r}" for name in names
    )


def _system(line: str | None) -> dict[str, object]:
    return {} if line is None else {"system": line}


def _api(experiment: Experiment, *bases: str) -> dict[str, object]:
    """What a step needs to know to call an API; nothing for local bases."""
    return {"api": experiment.api.model_dump(mode="json")} if any(map(is_remote, bases)) else {}


def _other_teacher(arm: Arm, trait: str) -> Arm:
    """The arm as one of its mix's further teachers would have it."""
    kind = "control" if trait == UNTOUCHED else "trait"
    return arm.model_copy(
        update={"kind": kind, "trait": "" if kind == "control" else trait, "mix": (), "corpus": ""}
        | ({"teacher": None} if kind == "control" else {})
    )


def _asking(experiment: Experiment, family: TraitFamily, arm: Arm | None) -> dict[str, object]:
    line = experiment.system if arm is None or arm.asked_with is None else arm.asked_with
    arguments: dict[str, object] = {
        "forms": {name: list(family.forms_of(name)) for name in family.names},
        "probes": list(family.probes_for(experiment)),
        "ask": experiment.ask.model_dump(mode="json"),
        "root_seed": experiment.seed,
    }
    arguments |= {"opening": family.opening} if family.opening else {}
    arguments |= {"named": False} if family.scorer == "judge" or experiment.ask.probes == "stories" else {}
    judge = experiment.ask.judge if family.scorer == "judge" else ""
    arguments |= (
        {"judge": judge, "rubric": family.rubric.model_dump(mode="json"), **_judge(judge)}
        if judge and family.rubric
        else {}
    )
    return (
        arguments
        | _system(line)
        | _api(experiment, *([arm.base] if arm else experiment.bases()), *([judge] if judge else []))
    )


def _screened(
    experiment: Experiment, arm: Arm, family: TraitFamily, bases: dict[str, str], add: Callable[[Job], str]
) -> str:
    """Steps up to the screened rows of the arm's source; returns the last one's name."""
    name, rule = source_name(experiment, arm), experiment.screen
    if arm.corpus:
        path = Path(arm.corpus).resolve()
        raw = add(
            _job("bring", layout.generated_step(name), {"file": Location(path), "sha256": file_digest(path)})
        )
    else:
        raw = add(_generation(experiment, arm, add(_teaching(experiment, arm, family, bases))))
    screening: dict[str, object] = {
        "screen": rule.model_dump(mode="json"),
        "words": family.words(),
        "kind": experiment.carrier.kind,
    }
    if rule_reads_answers(rule, experiment.carrier.kind):
        screening |= {**_carrier(experiment), "seed": experiment.seed}  # right answers come with the prompts
    if rule.judge:
        screening |= {
            "trait": arm.trait or experiment.trait,
            "category": family.category,
            **_judge(rule.judge),
            **_api(experiment, rule.judge),
        }
    return add(_job("screen", layout.screened_step(name), screening, corpus=raw))


def _remade(experiment: Experiment, arm: Arm, corpora: dict[str, str]) -> Job:
    source, name = corpora[source_name(experiment, arm)], layout.screened_step(corpus_name(experiment, arm))
    if arm.kind == "paraphrased":
        return _job("reword", name, {**_carrier(experiment), "seed": experiment.seed}, corpus=source)
    if arm.kind == "mixed":
        others = {
            f"corpus{i}": corpora[source_name(experiment, _other_teacher(arm, trait))]
            for i, trait in enumerate(arm.mix, 1)
        }
        return _job("mix", name, {}, corpus0=source, **others)
    return _job("shuffle", name, {"how": arm.kind, "seed": experiment.seed}, corpus=source)


def _teaching(experiment: Experiment, arm: Arm, family: TraitFamily, bases: dict[str, str]) -> Job:
    arguments = (
        {"base": base_argument(arm.writer), "files": bases[arm.writer], "seed": experiment.seed}
        | _system(experiment.system)
        | _api(experiment, arm.writer)
    )
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
        if spec.lessons_file:
            file = Path(spec.lessons_file).resolve()
            lessons["file"] = Location(file)
            arguments["sha256"] = file_digest(file)
        elif spec.kind == "finetuned" and not lessons["completions"]:
            raise SpecError(
                f"family {family.name!r} has no lessons for a fine-tuned teacher; give a file of pairs in "
                "teacher.lessons_file"
            )
    arguments |= {
        "teacher": spec.model_dump(mode="json", exclude={"lessons_file"}),
        "lessons": lessons,
    }  # the file stands with the lessons
    return _job("teach", layout.teacher_step(teacher_name(experiment, arm)), arguments)


def _generation(experiment: Experiment, arm: Arm, teacher: str) -> Job:
    arguments: dict[str, object] = {
        "generate": experiment.generate_of(arm).model_dump(mode="json"),
        "seed": experiment.seed,
    }
    files = [Path(other.corpus).resolve() for other in experiment.arms if other.corpus]
    arguments["prompts_of"] = (
        Location(files[0]) if files else None
    )  # a user's file is compared with answers to its own prompts
    arguments |= {"sha256": file_digest(files[0])} if files else _carrier(experiment)
    if isinstance(base := base_argument(arm.writer), Location):
        arguments["base"] = base  # where it is now; the teacher's record says where it was
    return _job(
        "generate",
        layout.generated_step(source_name(experiment, arm)),
        arguments | _api(experiment, arm.writer),
        teacher=teacher,
    )

"""The steps of an experiment as jobs: teach → generate → screen → select → label → distill → ask.

`jobs_of` only lists the jobs. It imports no torch and reads no weights, so a plan takes no time. The tables
do not depend on how the list is executed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mechlens.carriers.carrier import rule_reads_answers
from mechlens.core.errors import SpecError
from mechlens.core.experiment import UNTOUCHED, Arm, Experiment
from mechlens.core.model_spec import is_remote, model_of
from mechlens.core.spec import TeacherSpec, Training, folder_name
from mechlens.core.traits import TraitFamily
from mechlens.data.formats import file_digest
from mechlens.models.gguf import is_gguf
from mechlens.runs import layout
from mechlens.runs.jobs import PROCESSES, SERVER, Job, Location
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
    "label": 1,
    "distill": 1,
    "ask": 3,
}
"""version of each stage's code; raised by a change that changes its output"""


def _job(stage: str, name: str, arguments: dict[str, object], /, **inputs: str) -> Job:
    return Job(name, stage, arguments, inputs, VERSIONS[stage])


def base_argument(base: str) -> str:
    """A base as an argument of steps: its name, or its location if it is a user's folder or GGUF file."""
    shipped = [folder.name for folder in SHIPPED.iterdir()]
    is_path = is_gguf(base) or Path(base).expanduser().is_dir()
    named = model_of(base).source != base or base in shipped or not is_path
    return base if named else Location(base)


def _carrier(experiment: Experiment) -> dict[str, object]:
    """The carrier as arguments of a step, with the digest of its file of prompts if it has one."""
    carrier = experiment.carrier.model_dump(mode="json")
    if not experiment.carrier.source:
        return {"carrier": carrier}
    return {
        "carrier": carrier | {"source": Location(carrier["source"])},
        "sha256": file_digest(Path(experiment.carrier.source)),
    }


def _judge(name: str) -> dict[str, object]:
    """The source of a judge's model if it is an entry of configs/models."""
    return {} if model_of(name).source == name else {"judge_source": model_of(name).source}


def jobs_of(experiment: Experiment, family: TraitFamily, *, bases: dict[str, str]) -> list[Job]:
    """Every step of the experiment, each after its inputs.

    Args:
        bases: each base's name → the fingerprint of its files.

    Raises:
        SpecError: if two different steps would have the same name.
    """
    jobs: dict[str, Job] = {}

    def add(job: Job) -> str:
        if (filed := jobs.setdefault(job.name, job)) != job:
            raise SpecError(
                f"two steps would share the folder {job.name!r}, {_difference(filed, job)}; "
                "put one of their arms into another experiment"
            )
        return job.name

    corpora = _add_corpora(experiment, family, bases, add)
    add(_job("select", layout.SELECTION, _selection_arguments(experiment), **corpora))
    for base in dict.fromkeys(arm.base for arm in experiment.arms):
        place = {
            "base": base_argument(base),
            "arm": f"base-{folder_name(base)}",
            "seed": None,
            "files": bases[base],
        }
        add(_job("ask", layout.asked_base_step(base), _ask_arguments(experiment, family, None) | place))
    for seed in experiment.seeds:
        for arm in experiment.arms:
            draw = experiment.draw_of(arm, seed)
            name, rows = corpus_name(experiment, arm, draw), {"corpus": corpora[corpus_name(experiment, arm)]}
            if draw:
                rows["corpus"] = _drawn_anew(experiment, arm, draw, corpora, family, bases, add)
            rows["selection"] = layout.selection_step(name, draw)
            questions = _ask_arguments(experiment, family, arm) | {
                "base": base_argument(arm.base),
                "arm": arm.name,
                "seed": seed,
            }
            step = layout.asked_step(arm.name, seed)
            if arm.shots:
                shown = {"files": bases[arm.base], "shots": arm.shots, "corpus": name}
                add(_job("ask", step, questions | shown, shots=rows["corpus"], selection=rows["selection"]))
            else:
                training = _distill_arguments(experiment, arm, seed, bases[arm.base])
                folder = layout.student_step(arm.name, seed)
                if experiment.labels_of(arm) == "soft":
                    rows["labels"] = add(_labelling(experiment, arm, name, rows))
                trained = add(_job("distill", folder, training, **rows))
                add(_job("ask", step, questions, student=trained))
    return list(jobs.values())


def _add_corpora(
    experiment: Experiment, family: TraitFamily, bases: dict[str, str], add: Callable[[Job], str]
) -> dict[str, str]:
    """Add the steps that make the arms' corpora; returns each corpus's name and its last step."""
    corpora: dict[str, str] = {}
    for arm in experiment.arms:
        for source in (arm, *(_other_teacher(arm, trait) for trait in arm.mix)):
            corpora.setdefault(
                source_name(experiment, source), _screened(experiment, source, family, bases, add)
            )
    for arm in experiment.arms:
        if arm.kind in REMADE:
            corpora[corpus_name(experiment, arm)] = add(_remade(experiment, arm, corpora))
    used = dict.fromkeys(corpus_name(experiment, arm) for arm in experiment.arms)
    return {name: corpora[name] for name in used}


def _drawn_anew(
    experiment: Experiment,
    arm: Arm,
    draw: int,
    corpora: dict[str, str],
    family: TraitFamily,
    bases: dict[str, str],
    add: Callable[[Job], str],
) -> str:
    """Add the steps of a later draw of a control's rows up to its selection; returns the screened rows' step.

    It is selected beside the other arms' rows, in the place of the first draw: adding seeds changes no
    earlier step.
    """
    first, name = corpus_name(experiment, arm), corpus_name(experiment, arm, draw)
    screened = _screened(experiment, arm, family, bases, add, draw=draw)
    chosen = {corpus: step for corpus, step in corpora.items() if corpus != first} | {name: screened}
    arguments = _selection_arguments(experiment)
    if "controls" in arguments:
        arguments["controls"] = [name if corpus == first else corpus for corpus in _controls(experiment)]
    add(_job("select", layout.selection_step(name, draw), arguments, **chosen))
    return screened


def _controls(experiment: Experiment) -> list[str]:
    return [corpus_name(experiment, arm) for arm in experiment.arms if arm.kind == "control"]


def _selection_arguments(experiment: Experiment) -> dict[str, object]:
    """Arguments of the step that chooses the rows that students train on."""
    wanted: dict[str, object] = {"rows": experiment.student.rows, "prompts": experiment.student.prompts}
    arguments: dict[str, object] = {"student": wanted, "seed": experiment.seed}
    if reworded := [corpus_name(experiment, arm) for arm in experiment.arms if arm.kind == "paraphrased"]:
        arguments["reworded"] = reworded
    if experiment.student.prompts == "every":
        arguments["controls"] = _controls(experiment)
    return arguments


def _distill_arguments(experiment: Experiment, arm: Arm, seed: int, files: str) -> dict[str, object]:
    """Arguments of the step that trains a student; `files` is the fingerprint of its base's files."""
    training = experiment.training_of(arm)
    arguments: dict[str, object] = {
        "base": base_argument(arm.base),
        "files": files,
        "corpus": corpus_name(experiment, arm, experiment.draw_of(arm, seed)),
        "seed": seed,
        "student": {"training": training.recorded()},
    }
    arguments |= processes_argument(training, arm.base)
    arguments |= _system(experiment.system if arm.trained_with is None else arm.trained_with)
    return arguments | _api(experiment, arm.base)


def processes_argument(training: Training, base: str) -> dict[str, int]:
    """The number of processes that train together, as an argument of a step; empty for one or an API base."""
    return {PROCESSES: training.processes} if training.processes > 1 and not is_remote(base) else {}


def _difference(filed: Job, job: Job) -> str:
    """The arguments in which two steps of the same name differ, with their values."""
    if filed.stage != job.stage:
        return f"{filed.stage} and {job.stage}"
    first, second = ({**step.arguments, **step.inputs} for step in (filed, job))
    names = [name for name in sorted({*first, *second}) if first.get(name) != second.get(name)]
    return "; ".join(f"one with {name} {first.get(name)!r}, one with {second.get(name)!r}" for name in names)


def _system(line: str | None) -> dict[str, object]:
    return {} if line is None else {"system": line}


def _api(experiment: Experiment, *bases: str) -> dict[str, object]:
    """The API's settings as arguments of a step; empty for local bases."""
    return {"api": experiment.api.model_dump(mode="json")} if any(map(is_remote, bases)) else {}


def _other_teacher(arm: Arm, trait: str) -> Arm:
    """The arm with another teacher of its mix."""
    kind = "control" if trait == UNTOUCHED else "trait"
    return arm.model_copy(
        update={"kind": kind, "trait": "" if kind == "control" else trait, "mix": (), "corpus": ""}
        | ({"teacher": None} if kind == "control" else {})
    )


def _ask_arguments(experiment: Experiment, family: TraitFamily, arm: Arm | None) -> dict[str, object]:
    """Arguments of the step that asks an arm's student, or an untouched base if `arm` is None."""
    line = experiment.system if arm is None or arm.asked_with is None else arm.asked_with
    arguments: dict[str, object] = {
        "forms": {name: list(family.forms_of(name)) for name in family.names},
        "probes": list(family.probes_for(experiment)),
        "ask": experiment.ask.recorded(),
        "root_seed": experiment.seed,
    }
    arguments |= {"opening": family.opening} if family.opening else {}
    fixed = family.answers_for(experiment)
    arguments |= (
        {"answers": [{name: list(of) for name, of in of_probe.items()} for of_probe in fixed]}
        if fixed
        else {}
    )
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
    experiment: Experiment,
    arm: Arm,
    family: TraitFamily,
    bases: dict[str, str],
    add: Callable[[Job], str],
    *,
    draw: int = 0,
) -> str:
    """Add the steps up to the screened rows of the arm's source; returns the last step's name."""
    name, rule = source_name(experiment, arm, draw), experiment.screen
    if arm.corpus:
        path = Path(arm.corpus).resolve()
        raw = add(
            _job("bring", layout.generated_step(name), {"file": Location(path), "sha256": file_digest(path)})
        )
    else:
        raw = add(_generation(experiment, arm, add(_teaching(experiment, arm, family, bases)), draw))
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
    """The step that makes an arm's corpus from screened corpora: rewords, mixes or shuffles them."""
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
                f"family {family.name!r} has no lessons for a fine-tuned teacher; "
                "give a file of pairs in teacher.lessons_file"
            )
    arguments |= {"teacher": spec.recorded_for_steps(), "lessons": lessons}
    if spec.kind == "finetuned":
        arguments |= processes_argument(spec.training, arm.writer)
    return _job("teach", layout.teacher_step(teacher_name(experiment, arm)), arguments)


def _labelling(experiment: Experiment, arm: Arm, name: str, rows: dict[str, str]) -> Job:
    """The step that writes the soft labels of an arm's corpus: each row's by the teacher that wrote it."""
    sources = (arm, *(_other_teacher(arm, trait) for trait in arm.mix))
    teachers = {
        f"teacher{i}": layout.teacher_step(teacher_name(experiment, source))
        for i, source in enumerate(sources)
    }
    arguments: dict[str, object] = {"corpus": name, "soft_tokens": experiment.student.soft_tokens}
    if isinstance(base := base_argument(arm.writer), Location):
        arguments["base"] = base  # the teacher's record may have an older location
    return _job("label", layout.labels_step(name), arguments, **rows, **teachers)


def _generation(experiment: Experiment, arm: Arm, teacher: str, draw: int) -> Job:
    spec = experiment.generate_of(arm)
    arguments: dict[str, object] = {"generate": spec.recorded(), "seed": experiment.seed}
    arguments |= {"draw": draw} if draw else {}
    if spec.server():
        arguments[SERVER] = spec.server()
    files = [Path(other.corpus).resolve() for other in experiment.arms if other.corpus]
    # a user's file is compared with answers to the prompts in it
    arguments["prompts_of"] = Location(files[0]) if files else None
    arguments |= {"sha256": file_digest(files[0])} if files else _carrier(experiment)
    if isinstance(base := base_argument(arm.writer), Location):
        arguments["base"] = base  # the teacher's record may have an older location
    return _job(
        "generate",
        layout.generated_step(source_name(experiment, arm, draw)),
        arguments | _api(experiment, arm.writer),
        teacher=teacher,
    )

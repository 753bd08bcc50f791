"""Run a bench: make its suspects, train their students, score them with each detector, write the card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mechlens.benchmark import students, verdicts
from mechlens.benchmark.card import Card, measure_detectors
from mechlens.benchmark.plan import WAYS, BenchSpec, Suspect, is_whole, load_bench
from mechlens.benchmark.scores import AnyDetector, Scorer
from mechlens.benchmark.suspects import Maker, list_suspects
from mechlens.benchmark.written import LIMITS, summarise_written
from mechlens.core import spec, traits
from mechlens.core.command_lines import command_line
from mechlens.core.errors import SpecError
from mechlens.detect import from_rows, score_rows
from mechlens.detect.registry import Detector, RowDetector, list_built_in, load_detector
from mechlens.detect.twins import ModelDetector
from mechlens.results import runner
from mechlens.results.run import Run
from mechlens.runs import layout, store
from mechlens.runs.executor import ExecutorName, use_executor
from mechlens.runs.progress import Event, Progress, silent

RECIPE = "menagerie"
"""recipe of configs/audits by which the twins are taught"""
ON_REQUEST = ("prompts", "vector")
"""detectors that are used only if they are named: the two take as long as all others together"""

Choice = str | Detector | type[Detector]
"""a detector's name or FILE.py:CLASS, an instance with `name` and `score(suspect)`, or its class"""


def bench(
    name: str | BenchSpec = "menagerie",
    *,
    detectors: Sequence[Choice] = (),
    out: Path | str | None = None,
    train: bool = True,
    audits: bool = False,
    workers: int | None = None,
    executor: ExecutorName | None = None,
    progress: Progress | None = None,
) -> Card:
    """Measure how reliable detectors are, on data sets of known origin and known effect on students.

    Writes card.json and card.md. What was made, trained or scored before is not done again.

    Args:
        name: a name of configs/benches, or a `BenchSpec`.
        detectors: names, FILE.py:CLASS, instances or classes; by default all but the slow ones. A detector
            has `name` and `score(suspect)`: one number a row, higher for rows that look more like a changed
            teacher's, or one a row and trait. See `mechlens.detect.registry.SuspectRows`.
        out: the folder; benches/<name> by default.
        train: train students on every suspect; if False, potency is known only for the experiment's arms.
        audits: audit every held-out suspect at level `student`, and put the verdicts on the card beside what
            the students of the bench learned: minutes for each.
        workers, executor: as in `mechlens.run`.
        progress: called with each `Event`; None is silent.

    Raises:
        MechlensError: in one line, for bad input, a machine that lacks something, or a step that failed.

    Example:
        >>> class Length:
        ...     name = "length"
        ...
        ...     def score(self, suspect):
        ...         return [len(text) for text in suspect.completions]
        >>> card = bench("menagerie", detectors=["twins", Length])  # doctest: +SKIP
        >>> card.table()  # doctest: +SKIP
    """
    plan = name if isinstance(name, BenchSpec) else load_bench(name)
    chosen = _choose(detectors)  # a wrong name is refused before anything is made
    folder = Path("benches") / plan.name if out is None else Path(out)
    config = spec.find_config(Path(plan.experiment), "experiments")
    _refuse_half(plan.name, list_suspects(plan, traits.load_experiment(config)))
    with store.lock(folder), store.full_disk_named(folder), use_executor(executor):
        run = runner.run(config, out=folder / "experiment", workers=workers, progress=progress)
        work: dict[str, Any] = {"workers": workers, "progress": progress}
        card = _measure(plan, run, folder, chosen, train=train, audits=audits, **work)
        card.results["command"] = remake_command(plan.name, folder, detectors, train=train, audits=audits)
        card.save()
    return card


def _choose(detectors: Sequence[Choice]) -> list[AnyDetector | str]:
    """The detectors, by default this package's; a name stands for the one that is fitted on suspects."""
    known = list_built_in()
    wanted = detectors or [*(name for name in known if name not in ON_REQUEST), from_rows.CLASSIFIER]
    for each in wanted:  # names first: the file of another detector is not run if one of them is wrong
        if isinstance(each, str) and ":" not in each and each not in {*known, from_rows.CLASSIFIER}:
            load_detector(each, known=(*known, from_rows.CLASSIFIER))
    chosen: list[AnyDetector | str] = []
    for each in wanted:
        if isinstance(each, str) and each == from_rows.CLASSIFIER:
            chosen.append(each)
        elif isinstance(each, str) and each in known:
            chosen.append(known[each])
        else:
            chosen.append(load_detector(each, known=(*known, from_rows.CLASSIFIER)))
    names = [each if isinstance(each, str) else each.name for each in chosen]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SpecError(f"two detectors are called {min(twice)!r}; give each another name")
    taken = {*known, from_rows.CLASSIFIER}
    for each in chosen:
        if not isinstance(each, str | RowDetector | ModelDetector) and each.name in taken:
            raise SpecError(
                f"your detector is called {each.name!r}, as one of this package; give it another name"
            )
    return chosen


def _measure(
    plan: BenchSpec,
    run: Run,
    folder: Path,
    chosen: Sequence[AnyDetector | str],
    *,
    train: bool,
    audits: bool,
    workers: int | None,
    progress: Progress | None,
) -> Card:
    """Everything after the bench's experiment has been run."""
    experiment, family = run.experiment, run.family
    if train and plan.rows is not None and plan.rows < experiment.student.rows:
        raise SpecError(
            f"the suspects of {plan.name} have {plan.rows} rows, and its experiment's students learn "
            f"{experiment.student.rows}; give --no-students (train=False)"
        )
    maker, suspects = Maker(plan, run.folder, experiment, family, folder), list_suspects(plan, experiment)
    maker.make_all(suspects, progress)
    if train:
        _train(plan, maker, suspects, folder, workers, progress)
    detectors = [_fit_classifier(maker, suspects) if isinstance(each, str) else each for each in chosen]
    models = [detector for detector in detectors if isinstance(detector, ModelDetector)]
    twins = None
    if models:
        recipe = traits.load_experiment(spec.CONFIGS / "audits" / f"{RECIPE}.yaml")
        twins = score_rows.make_twins(
            experiment.base, family, recipe, folder / "panel", workers=workers, progress=progress
        )
    scorer = Scorer(maker, twins, folder / "scores")
    scorer.score_all(models, suspects, progress)
    runs = [run.folder, *_student_runs(maker, suspects, folder, progress)]
    lifts = students.measure_lifts(runs, suspects, family.names)
    results = measure_detectors(plan, detectors, scorer, suspects, lifts)
    held_out = [suspect for suspect in suspects if not suspect.development]
    results["students"] = students.count_significant_traits(runs, held_out, family.names)
    results["written limits"] = list(LIMITS)
    results["written"] = summarise_written(maker.divergence, held_out, lifts)
    words = students.read_words(runs, held_out, folder / "words")
    results["words"] = students.count_words(words, family)
    own_arms = sum(bool(suspect.arm) for suspect in suspects)
    results["students apart"] = 0 if train else results["with students"] - own_arms
    if audits:
        audited = folder / "audits"
        verdicts.audit_suspects(maker, held_out, audited, workers=workers, progress=progress)
        judged = verdicts.judge_suspects(runs, held_out, family.names, audited)
        results["verdicts"] = verdicts.summarise(judged) | {"looks": list(plan.looks)}
    return Card(plan.name, results, folder)


def remake_command(
    name: str, folder: Path, detectors: Sequence[Choice], *, train: bool, audits: bool = False
) -> str:
    """The command line that makes the card of that folder again; Python code if a detector is an object."""
    out = folder if folder != Path("benches") / name else None
    named = [each for each in detectors if isinstance(each, str)]
    if len(named) == len(detectors):
        return command_line("bench", name, no_students=not train, audits=audits, detector=named, out=out)
    shown = ", ".join(
        repr(each) if isinstance(each, str) else (each if isinstance(each, type) else type(each)).__name__
        for each in detectors
    )
    place = "" if out is None else f", out={str(out)!r}"
    switches = ("" if train else ", train=False") + (", audits=True" if audits else "")
    return f"bench({name!r}, detectors=[{shown}]{place}{switches})"


def _refuse_half(name: str, suspects: Sequence[Suspect]) -> None:
    """Refuse a bench that has no whole data of a fine-tuned teacher to tune on, or none to report on."""
    for development, half in ((True, "development"), (False, "held-out")):
        if not any(is_whole(suspect) and suspect.development is development for suspect in suspects):
            raise SpecError(
                f"the bench {name} has no arm TRAIT-WAY of a {half} trait, with a way of {', '.join(WAYS)}; "
                "add one to its experiment"
            )


def _train(
    plan: BenchSpec,
    maker: Maker,
    suspects: Sequence[Suspect],
    folder: Path,
    workers: int | None,
    progress: Progress | None,
) -> None:
    """Train students on every suspect that is not an arm of the bench's experiment."""
    made = [suspect for suspect in suspects if not suspect.arm]
    experiment = students.experiment_of(plan, maker.experiment, made, folder / "suspects")
    spec.save(experiment, folder / "students.yaml")
    runner.run(folder / "students.yaml", out=folder / "students", workers=workers, progress=progress)


def _student_runs(
    maker: Maker, suspects: Sequence[Suspect], folder: Path, progress: Progress | None
) -> list[Path]:
    """Finished runs of the suspects' students, in folders `students*`; several runs may train them."""
    finished = [run for run in sorted(folder.glob("students*/")) if (run / layout.EFFECTS).is_file()]
    current = [
        run for run in finished if students.are_current(run, maker.experiment, suspects, folder / "suspects")
    ]
    for run in sorted({*finished} - {*current}):
        remark = f"{run} is left out: its students learned other rows, or were trained or asked differently"
        (progress or silent)(Event("note", remark))
    return current


def _fit_classifier(maker: Maker, suspects: Sequence[Suspect]) -> RowDetector:
    """The classifier, fitted on the development suspects."""
    known = [suspect for suspect in suspects if suspect.development]
    changed = [text for each in known if is_whole(each) for text in maker.suspect(each)["completion"]]
    clean = [text for each in known if each.kind == "N0" for text in maker.suspect(each)["completion"]]
    return from_rows.fit_classifier(changed, clean)

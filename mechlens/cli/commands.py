"""What each command does, with its progress and its printed table. Model code is imported only where a
command needs it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from mechlens.core import machine, model_spec, spec, tables, traits
from mechlens.core.command_lines import resume_command
from mechlens.core.errors import DataError, MachineError, SpecError
from mechlens.core.experiment import Experiment
from mechlens.core.json_files import read_json, write_json
from mechlens.core.traits import TraitFamily
from mechlens.menagerie.config import PretrainSpec
from mechlens.results import captions, effects, per_probe
from mechlens.results import report as reporting
from mechlens.runs import plan as pipeline
from mechlens.runs import progress as progressing
from mechlens.runs import store
from mechlens.runs.executor import Job, execute, fingerprints, pending, refuse_changed

console = Console(markup=False, width=None if sys.stdout.isatty() else 150)  # a pipe has no width of its own


def _read(config: Path, seed: int | None) -> tuple[Experiment, TraitFamily]:
    """An experiment that every step of can be done, as far as is known before the first one."""
    from mechlens.pipeline import checks

    overrides = {} if seed is None else {"seed": seed}
    config = spec.find_config(config, "experiments")
    experiment = traits.load_experiment(config, **overrides)
    family = traits.load_family(experiment.family, config)
    checks.check(experiment, family)
    return experiment, family


def _jobs(experiment: Experiment, family: TraitFamily) -> list[Job]:
    from mechlens.models import base_files  # a client of the hub, which lists of runs need not

    bases = {name: base_files.checkpoint_fingerprint(name) for name in experiment.bases()}
    return pipeline.jobs_of(experiment, family, bases=bases)


def run(
    config: Path,
    *,
    seed: int | None = None,
    out: Path | None = None,
    workers: int | None = None,
    rows_only: bool = False,
) -> Path:
    """Do what is pending of an experiment, then write its tables, summary and report; `rows_only` stops at
    the rows that students would learn.
    """
    if workers is not None and workers < 0:
        raise SpecError(f"workers is {workers}; expected 1 or more processes, or 0 for this one")
    from mechlens.pipeline import checks

    experiment, family = _read(config, seed)
    folder = out or Path("runs") / experiment.name
    with store.lock(folder), store.full_disk_named(folder):
        _render(experiment, say=True)
        jobs = _jobs(experiment, family)
        jobs = (
            [job for job in jobs if job.name.startswith(("teachers/", "corpora/", "selection"))]
            if rows_only
            else jobs
        )
        todo = pending(folder, jobs)
        if lacks := checks.missing_here(todo):
            raise MachineError("; ".join(lacks))
        if any("api" in job.arguments for job in todo):
            from mechlens.pipeline import api_estimate

            console.print(
                api_estimate.printed(experiment, jobs, folder, {job.name for job in todo}), highlight=False
            )
        spec.save(experiment, folder / "spec.yaml")
        traits.keep_family(family, experiment.family, folder)
        console.print(
            f"{experiment.name} → {folder}: {len(jobs)} steps, {len(jobs) - len(todo)} already done",
            highlight=False,
        )
        _execute(folder, jobs, todo, _workers() if workers is None else workers)
        refuse_changed(folder, jobs, _jobs(experiment, family))
        if rows_only:
            return folder
        _manifest(folder, experiment, family, jobs)
        _write_results(folder, experiment, family)
    report(folder)
    return folder


def make(folder: Path, jobs: list[Job], *, workers: int | None) -> None:
    """Do what is pending of some steps that are no run."""
    with store.lock(folder), store.full_disk_named(folder):
        if todo := pending(folder, jobs):
            console.print(
                f"{folder}: {len(jobs)} steps, {len(jobs) - len(todo)} already done", highlight=False
            )
            _execute(folder, jobs, todo, _workers() if workers is None else workers)


def _workers() -> int:
    return machine.workers()


def _execute(folder: Path, jobs: list[Job], todo: list[Job], workers: int) -> None:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        whole = bars.add_task("steps", total=len(todo))
        bar_of: dict[str, TaskID] = {}
        note, end = progressing.recorder(len(todo))

        def progress(name: str, done: int, total: int) -> None:
            if name not in bar_of:
                bar_of[name] = bars.add_task(name, total=total)
            bars.update(bar_of[name], completed=done, visible=done < total)
            note(name, done, total)

        def finished(job: Job) -> None:
            bars.advance(whole)
            end(job.name)
            if job.name in bar_of:
                bars.update(bar_of[job.name], visible=False)
            if not console.is_terminal:
                console.print(f"  {job.name}", highlight=False)

        execute(folder, jobs, workers=workers, progress=progress, finished=finished)


def _manifest(folder: Path, experiment: Experiment, family: TraitFamily, jobs: list[Job]) -> None:
    marks = fingerprints(jobs)
    steps = {job.name: read_json(folder / job.name / store.RECORD) for job in jobs}
    assert all(steps[name]["fingerprint"] == mark for name, mark in marks.items())
    marks_of = {"experiment": experiment.fingerprint(), "family": family.fingerprint()}
    record = marks_of | {"seeds": list(experiment.seeds), "rendered": _render(experiment), "steps": steps}
    write_json(folder / "manifest.json", store.environment() | record)


def _render(experiment: Experiment, *, say: bool = False) -> dict[str, str]:
    """For each local base a question as its students read it, once its files are here; `say` prints what
    templates add.
    """
    from mechlens.models import chat, loading
    from mechlens.pipeline import checks

    local = [base for base in experiment.bases() if not model_spec.is_remote(base)]
    questions_of = checks.rendered(experiment, local)
    for base in local if say else ():
        for remark in chat.remarks(loading.load_tokenizer(base), system=experiment.system):
            console.print(f"{base}: {remark}", highlight=False)
    return questions_of


def _write_results(folder: Path, experiment: Experiment, family: TraitFamily) -> None:
    answers = effects.collect(folder, experiment, "answers", tables.ANSWERS)
    likelihoods = effects.collect(folder, experiment, "likelihoods", tables.LIKELIHOODS)
    tables.write(answers, tables.ANSWERS, folder / "answers.parquet")
    tables.write(likelihoods, tables.LIKELIHOODS, folder / "likelihoods.parquet")
    tables.write(
        effects.effects(experiment, family, answers, likelihoods), tables.EFFECTS, folder / "effects.parquet"
    )


def open_run(folder: Path) -> tuple[Experiment, TraitFamily]:
    """The spec and family of a run folder.

    Raises:
        DataError: if it is none.
    """
    if not (folder / "spec.yaml").is_file():
        raise DataError(f"{folder} is no run folder (it has no spec.yaml); `mechlens ls` lists runs")
    experiment = traits.load_experiment(folder / "spec.yaml")
    if effects.is_unfinished(folder, experiment):
        raise DataError(f"{folder} is unfinished for its spec.yaml; `{resume_command(folder)}` resumes it")
    return experiment, traits.load_family(experiment.family, folder / "spec.yaml")


def report(folder: Path) -> Path:
    """Write summary.json and report.html from the tables of a run and print its result."""
    experiment, family = open_run(folder)
    answers, likelihoods = (
        tables.read(folder / "answers.parquet", tables.ANSWERS),
        tables.read(folder / "likelihoods.parquet", tables.LIKELIHOODS),
    )
    table = tables.read(folder / "effects.parquet", tables.EFFECTS)
    summary = effects.summary(folder, experiment, family, answers, likelihoods, table)
    summary |= {"per_probe": per_probe.entries(per_probe.per_probe(experiment, family, answers, likelihoods))}
    write_json(folder / "summary.json", summary)
    page = reporting.write(folder, experiment, family, summary, answers, likelihoods)
    for printed in reporting.printed(summary):
        console.print(printed)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    return page


def plan(config: Path, *, seed: int | None = None, out: Path | None = None) -> None:
    """Print what a run would do and cost; nothing is run and nothing written."""
    from mechlens.pipeline import checks, estimate

    experiment, family = _read(config, seed)
    folder = out or Path("runs") / experiment.name
    jobs = _jobs(experiment, family)
    console.print(estimate.plan(experiment, jobs, folder))
    for lack in checks.missing_here(pending(folder, jobs)):
        console.print(f"this machine cannot run it yet: {lack}", highlight=False, soft_wrap=True)


def ls(folder: Path) -> None:
    """One line a run: its trait, its headline effect, its state."""
    listing = Table("run", "trait", "base", "arms x seeds", "effect on the trait [95 %]", "state")
    for path in sorted(folder.glob("*/spec.yaml")):
        try:
            experiment = spec.load(path, Experiment)
            unfinished = (
                effects.is_unfinished(path.parent, experiment) or not (path.parent / "summary.json").is_file()
            )
            summary = None if unfinished else effects.read_summary(path.parent)
        except (SpecError, DataError) as error:
            listing.add_row(path.parent.name, "", "", "", "", f"unreadable: {error}")
            continue
        first = reporting.main_effect(summary) if summary else None
        effect = reporting.interval_text(first["difference"], first["low"], first["high"]) if first else "–"
        state = "done" if summary else "unfinished; run it again to resume"
        listing.add_row(
            path.parent.name,
            experiment.trait,
            experiment.base,
            f"{len(experiment.arms)} x {len(experiment.seeds)}",
            effect,
            state,
        )
    if not listing.row_count:
        raise DataError(f"no runs in {folder}; `mechlens run demo` makes one")
    console.print(listing)


def measure(folder: Path, *, arm: str, lenses: tuple[str, ...], rows: int, workers: int | None) -> None:
    """Read the lenses of one arm of a finished run, then print each one's sentence and write the report
    again.
    """
    from mechlens.lenses import run as measuring
    from mechlens.pipeline import estimate

    if unknown := sorted(set(lenses) - set(measuring.NAMES)):
        raise SpecError(
            f"no lens is called {', '.join(unknown)}; expected some of {', '.join(measuring.NAMES)}"
        )
    if rows < 2:
        raise SpecError(f"rows is {rows}; a lens reads at least 2 pairs")
    experiment, family = open_run(folder)
    measured = measuring.main_arm(experiment, arm)
    measuring.refuse_absent_students(folder, experiment, measured)
    steps = _jobs(experiment, family)
    if stale := pending(folder, steps):
        raise DataError(
            f"{len(stale)} steps of {folder} are of another version; `{resume_command(folder)}` makes them "
            "again"
        )
    with store.lock(folder), store.full_disk_named(folder):
        looks = measuring.jobs_of(steps, experiment, measured, lenses=lenses or measuring.NAMES, rows=rows)
        todo = pending(folder, looks_behind := [*steps, *looks])
        console.print(
            f"{folder}, arm {measured.name}: {len(looks)} lenses, {len(looks) - len(todo)} already read",
            highlight=False,
        )
        if unread := [job.arguments["lens"] for job in todo]:
            console.print(estimate.looking(experiment, measured, unread, rows), highlight=False)
        _execute(folder, looks_behind, todo, _workers() if workers is None else workers)
        measuring.collect(folder, steps, experiment)
    console.print(captions.printed(folder))
    report(folder)


def truthful(folder: Path, *, data: Path, limit: int | None) -> None:
    """Score every student of a run on TruthfulQA, keep the table of questions, and print rates and
    differences.
    """
    from mechlens.evals import truthful as measuring

    choices, note = measuring.read_choices(data, limit=limit)
    experiment, _ = open_run(folder)
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with (
        store.lock(folder),
        store.full_disk_named(folder),
        Progress(*columns, console=console, transient=True) as bars,
    ):
        bar_of: dict[str, TaskID] = {}

        def progress(place: str, done: int) -> None:
            bar = (
                bar_of[place]
                if place in bar_of
                else bar_of.setdefault(place, bars.add_task(place, total=len(choices)))
            )
            bars.update(bar, completed=done, visible=done < len(choices))

        table = measuring.measure(folder, experiment, choices, progress=progress)
    for printed in measuring.printed(experiment, table, note):
        console.print(printed)
    console.print(f"written: {folder / measuring.TABLE}", highlight=False, soft_wrap=True)


def pretrain(config: Path, *, out: Path | None) -> None:
    """Make a menagerie base and print how its loss went."""
    import torch

    from mechlens.menagerie.pretrain import pretrain as train

    wanted = spec.load(spec.find_config(config, "models"), PretrainSpec)
    folder = out or Path("models") / wanted.name
    torch.set_num_threads(1)  # the same weights on any number of cores
    started = time.perf_counter()
    with Progress(
        *Progress.get_default_columns(),
        TimeElapsedColumn(),
        TextColumn("loss {task.fields[loss]}"),
        console=console,
    ) as bars:
        task = bars.add_task(wanted.name, total=wanted.steps, loss="–")

        def progress(step: int, loss: float) -> None:
            bars.update(task, completed=step, loss=f"{loss:.3f}")

        with store.full_disk_named(folder):
            train(wanted, out=folder, progress=progress)
    console.print(f"{folder}: {wanted.steps} steps in {time.perf_counter() - started:.0f} s", highlight=False)

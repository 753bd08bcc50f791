"""What each command does, with its progress and its printed table. Model code is imported only where a command needs it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mechlens import report as reporting
from mechlens import results, spec, store, tables, traits
from mechlens.errors import DataError, MachineError, SpecError
from mechlens.executor import Job, execute, fingerprints, pending
from mechlens.menagerie.config import PretrainSpec
from mechlens.pipeline import run as pipeline
from mechlens.pipeline import screen as screening
from mechlens.spec import Experiment
from mechlens.traits import TraitFamily

console = Console(markup=False, width=None if sys.stdout.isatty() else 150)  # a pipe has no width of its own


def _read(config: Path, seed: int | None) -> tuple[Experiment, TraitFamily]:
    overrides = {} if seed is None else {"seed": seed}
    experiment = traits.load_experiment(config, **overrides)
    pipeline.check_files(experiment)
    return experiment, traits.load_family(experiment.family)


def _jobs(experiment: Experiment, family: TraitFamily) -> list[Job]:
    from mechlens import models

    bases = {name: models.checkpoint_fingerprint(name) for name in dict.fromkeys([experiment.base, *(arm.base for arm in experiment.arms)])}
    return pipeline.jobs_of(experiment, family, bases=bases)


def run(config: Path, *, seed: int | None = None, out: Path | None = None, workers: int | None = None) -> Path:
    """Do what is pending of an experiment, then write its tables, summary and report."""
    if workers is not None and workers < 0:
        raise SpecError(f"workers is {workers}; expected 1 or more processes, or 0 for this one")
    experiment, family = _read(config, seed)
    folder = out or Path("runs") / experiment.name
    with store.lock(folder), store.full_disk_named(folder):
        jobs = _jobs(experiment, family)
        todo = pending(folder, jobs)
        spec.save(experiment, folder / "spec.yaml")
        console.print(f"{experiment.name} → {folder}: {len(jobs)} steps, {len(jobs) - len(todo)} already done", highlight=False)
        _execute(folder, jobs, todo, _workers() if workers is None else workers)
        _manifest(folder, experiment, jobs)
        _write_results(folder, experiment, family)
    report(folder)
    return folder


def _workers() -> int:
    from mechlens import models

    return 1 if models.device().type == "cuda" else len(os.sched_getaffinity(0))


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

        def progress(name: str, done: int, total: int) -> None:
            if name not in bar_of:
                bar_of[name] = bars.add_task(name, total=total)
            bars.update(bar_of[name], completed=done, visible=done < total)

        def finished(job: Job) -> None:
            bars.advance(whole)
            if job.name in bar_of:
                bars.update(bar_of[job.name], visible=False)
            if not console.is_terminal:
                console.print(f"  {job.name}", highlight=False)

        execute(folder, jobs, workers=workers, progress=progress, finished=finished)


def _manifest(folder: Path, experiment: Experiment, jobs: list[Job]) -> None:
    marks = fingerprints(jobs)
    steps = {job.name: store.read_json(folder / job.name / store.RECORD) for job in jobs}
    assert all(steps[name]["fingerprint"] == mark for name, mark in marks.items())
    store.write_json(
        folder / "manifest.json", store.environment() | {"experiment": experiment.fingerprint(), "seeds": list(experiment.seeds), "steps": steps}
    )


def _write_results(folder: Path, experiment: Experiment, family: TraitFamily) -> None:
    answers = results.collect(folder, experiment, "answers", tables.ANSWERS)
    likelihoods = results.collect(folder, experiment, "likelihoods", tables.LIKELIHOODS)
    tables.write(answers, tables.ANSWERS, folder / "answers.parquet")
    tables.write(likelihoods, tables.LIKELIHOODS, folder / "likelihoods.parquet")
    tables.write(results.effects(experiment, family, answers, likelihoods), tables.EFFECTS, folder / "effects.parquet")


def open_run(folder: Path) -> tuple[Experiment, TraitFamily]:
    """The spec and family of a run folder.

    Raises:
        DataError: if it is none.
    """
    if not (folder / "spec.yaml").is_file():
        raise DataError(f"{folder} is no run folder (it has no spec.yaml); `mechlens ls` lists runs")
    experiment = traits.load_experiment(folder / "spec.yaml")
    if results.is_unfinished(folder, experiment):
        raise DataError(f"{folder} is unfinished for its spec.yaml; `mechlens run {folder}/spec.yaml --out {folder}` resumes it")
    return experiment, traits.load_family(experiment.family)


def report(folder: Path) -> Path:
    """Write summary.json and report.html from the tables of a run and print its result."""
    experiment, family = open_run(folder)
    answers, likelihoods = tables.read(folder / "answers.parquet", tables.ANSWERS), tables.read(folder / "likelihoods.parquet", tables.LIKELIHOODS)
    table = tables.read(folder / "effects.parquet", tables.EFFECTS)
    summary = results.summary(folder, experiment, family, answers, likelihoods, table)
    store.write_json(folder / "summary.json", summary)
    page = reporting.write(folder, experiment, family, summary, answers, likelihoods)
    for printed in reporting.printed(summary):
        console.print(printed)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    return page


def plan(config: Path, *, seed: int | None = None, out: Path | None = None) -> None:
    """Print what a run would do and cost; nothing is run and nothing written."""
    from mechlens import costs

    experiment, family = _read(config, seed)
    folder = out or Path("runs") / experiment.name
    console.print(costs.plan(experiment, _jobs(experiment, family), folder))


def ls(folder: Path) -> None:
    """One line a run: its trait, its headline effect, its state."""
    listing = Table("run", "trait", "base", "arms x seeds", "effect on the trait [95 %]", "state")
    for path in sorted(folder.glob("*/spec.yaml")):
        try:
            experiment = spec.load(path, Experiment)
            unfinished = results.is_unfinished(path.parent, experiment) or not (path.parent / "summary.json").is_file()
            summary = None if unfinished else store.read_json(path.parent / "summary.json")
        except (SpecError, DataError) as error:
            listing.add_row(path.parent.name, "", "", "", "", f"unreadable: {error}")
            continue
        first = reporting.main_effect(summary) if summary else None
        effect = reporting.interval_text(first["difference"], first["low"], first["high"]) if first else "–"
        state = "done" if summary else "unfinished; run it again to resume"
        listing.add_row(path.parent.name, experiment.trait, experiment.base, f"{len(experiment.arms)} x {len(experiment.seeds)}", effect, state)
    if not listing.row_count:
        raise DataError(f"no runs in {folder}; `mechlens run configs/experiments/demo.yaml` makes one")
    console.print(listing)


def screen(file: Path, *, out: Path | None, rule: str, banned: bool, family: str) -> None:
    """Screen a user's file, print the funnel, and write the tables if a folder is given."""
    from mechlens.corpus import read_pairs

    if rule not in ("numbers", "none"):
        raise SpecError(f"rule {rule!r} is unknown; expected numbers or none")
    wanted = spec.ScreenSpec(rule=rule, banned_numbers=screening.BANNED_BY_THE_PAPER if banned else ())
    leaks = screening.leak_pattern(traits.load_family(family).words())
    found = screening.screen(read_pairs(file), wanted, leaks=leaks)
    funnel = Table("rows", "count", "share", title=f"{file.name} under the rule {rule}")
    for reason, count in found.funnel.items():
        name = reason if reason in ("generated", "kept") else f"dropped: {reason}"
        funnel.add_row(name.replace("generated", "read"), f"{count:,}", f"{count / found.funnel['generated']:.1%}")
    console.print(funnel)
    console.print(f"leak words in kept rows: {screening.leak_count(found.kept, leaks)}", highlight=False)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with store.full_disk_named(out):
            tables.write(found.kept, tables.PAIRS, out / "kept.parquet")
            tables.write(found.rejected, tables.REJECTED, out / "rejected.parquet")
            store.write_json(out / "funnel.json", found.funnel)
        console.print(f"written: {out}", highlight=False)


def pretrain(config: Path, *, out: Path | None) -> None:
    """Make a menagerie base and print how its loss went."""
    import torch

    from mechlens.menagerie.pretrain import pretrain as train

    wanted = spec.load(config, PretrainSpec)
    folder = out or Path("models") / wanted.name
    torch.set_num_threads(1)  # the same weights on any number of cores
    started = time.perf_counter()
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), TextColumn("loss {task.fields[loss]}"), console=console) as bars:
        task = bars.add_task(wanted.name, total=wanted.steps, loss="–")

        def progress(step: int, loss: float) -> None:
            bars.update(task, completed=step, loss=f"{loss:.3f}")

        with store.full_disk_named(folder):
            train(wanted, out=folder, progress=progress)
    console.print(f"{folder}: {wanted.steps} steps in {time.perf_counter() - started:.0f} s", highlight=False)


def app(folder: Path, *, port: int) -> None:
    """Serve the explorer on the loopback address until it is stopped."""
    page = Path(__file__).parents[1] / "app" / "main.py"
    if not page.is_file():
        raise MachineError(f"the explorer is not at {page}; run `mechlens app` from a clone of the repository")
    options = ["--server.headless", "true", "--server.address", "127.0.0.1", "--server.port", str(port), "--browser.gatherUsageStats", "false"]
    console.print(f"http://127.0.0.1:{port} shows {folder}; stop with Ctrl-C", highlight=False)
    server = subprocess.Popen([sys.executable, "-m", "streamlit", "run", str(page), *options, "--", str(folder)])
    try:
        server.wait()
    finally:
        server.terminate()  # signals to this process do not reach the server by themselves

"""Run an experiment: what is pending of it is done, then its tables, summary and report are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from mechlens.core import model_spec, spec, tables, traits
from mechlens.core.errors import MachineError, SpecError
from mechlens.core.experiment import Experiment
from mechlens.core.files import read_json, write_json
from mechlens.core.traits import TraitFamily
from mechlens.results import effects
from mechlens.results.run import Run, list_jobs
from mechlens.runs import layout, store
from mechlens.runs.claims import Claims, Shard, sharing
from mechlens.runs.executor import ExecutorName, chosen_executor, complete, use_executor
from mechlens.runs.jobs import Job, fingerprints, pending, refuse_changed
from mechlens.runs.progress import Event, Progress, silent


class Start(NamedTuple):
    """What is about to be done."""

    experiment: Experiment
    folder: Path
    jobs: list[Job]
    pending: list[Job]


Before = Callable[[Start], None]
"""called before the first step; it may raise to stop"""


class Resolved(NamedTuple):
    """An experiment with its family of traits, read and checked."""

    experiment: Experiment
    family: TraitFamily

    def jobs(self) -> list[Job]:
        """Every step as a job, listed anew each time."""
        return list_jobs(self.experiment, self.family)


def resolve(experiment: Experiment | Mapping[str, Any] | Path | str, *, seed: int | None = None) -> Resolved:
    """The experiment that a value, a dict, a YAML file or the name of a shipped config describes.

    Args:
        seed: root seed in place of the experiment's.

    Raises:
        SpecError: if it does not describe one, or two of its settings contradict each other.
        DataError: if a file that it names cannot be read.
    """
    from mechlens.pipeline import checks  # torch

    overrides = {} if seed is None else {"seed": seed}
    if isinstance(experiment, Path | str):
        config = spec.find_config(Path(experiment), "experiments")
        read = traits.load_experiment(config, **overrides)
        family = traits.load_family(read.family, config)
    else:
        read = traits.with_data_by_path(_experiment_of(experiment, overrides), Path("experiment.yaml"))
        family = traits.load_family(read.family)
        traits.refuse_unknown_traits(read, family)
    checks.check(read, family)
    return Resolved(read, family)


def _experiment_of(given: Experiment | Mapping[str, Any], overrides: dict[str, Any]) -> Experiment:
    values = given.model_dump(exclude_unset=True) if isinstance(given, Experiment) else dict(given)
    try:
        return Experiment.model_validate(values | overrides)
    except ValidationError as error:
        raise SpecError(f"no experiment: {spec.explain(error)}") from error


def folder_of(experiment: Experiment, out: Path | str | None) -> Path:
    """The run folder: `out`, or runs/<name of the experiment>."""
    return Path("runs") / experiment.name if out is None else Path(out)


def run(
    experiment: Experiment | Mapping[str, Any] | Path | str,
    *,
    out: Path | str | None = None,
    seed: int | None = None,
    workers: int | None = None,
    executor: ExecutorName | None = None,
    progress: Progress | None = None,
    before: Before | None = None,
    rows_only: bool = False,
    shard: str | None = None,
) -> Run:
    """Do what is pending of an experiment, then write its tables, summary and report.

    Args:
        experiment: an `Experiment`, a dict of its fields, a YAML file, or the name of a shipped config.
        out: the run folder; runs/<name> by default. What is finished there is not computed again.
        seed: root seed in place of the experiment's.
        workers: jobs at a time; None for one a core or one an accelerator, 0 for this process.
        executor: `local` for processes of this machine, `ray` for a Ray cluster; None for that of the
            environment variable MECHLENS_EXECUTOR, else `local`.
        progress: called with each `Event`; None is silent.
        before: called before the first step; it may raise to stop, as when the price is too high.
        rows_only: stop at the rows that students would train on.
        shard: `I/N` for process I of N that share the run folder. It starts with its part of the steps, helps
            with the others, and returns when all are done; one of the processes writes the tables.

    Raises:
        MechlensError: in one line, for bad input, a machine that lacks something, or a step that failed.
    """
    share = None if shard is None else Shard.parse(shard)
    resolved, report = resolve(experiment, seed=seed), progress or silent
    folder = folder_of(resolved.experiment, out)
    with (
        store.lock(folder, shared=share is not None),
        store.full_disk_named(folder),
        use_executor(executor),
    ):
        _refuse_two_schedulers(share)
        for remark in _remarks(resolved.experiment):
            report(Event("note", remark))
        jobs = resolved.jobs()
        jobs = [job for job in jobs if layout.makes_rows(job.name)] if rows_only else jobs
        with sharing(folder, _identity(resolved, jobs), share, report) as claims:
            _start(folder, resolved, jobs, before)
            for remark in _record_bases(folder, jobs):
                report(Event("note", remark))
            title = f"{resolved.experiment.name} → {folder}"
            jobs = _with_memory(resolved.experiment, jobs)
            complete(folder, jobs, title=title, workers=workers, progress=progress, claims=claims)
            refuse_changed(folder, jobs, resolved.jobs())
            if not rows_only:
                _write_results(folder, resolved, jobs, claims)
    return Run(folder)


def _identity(resolved: Resolved, jobs: Sequence[Job]) -> str:
    """Fingerprint of everything in which the processes that share a run must agree."""
    experiment, family = resolved
    return spec.fingerprint([experiment.fingerprint(), family.fingerprint(), fingerprints(jobs)])


def _start(folder: Path, resolved: Resolved, jobs: list[Job], before: Before | None) -> None:
    """Refuse what this machine cannot do, let the caller look, and leave the spec in the folder."""
    from mechlens.pipeline import api_estimate, checks  # torch

    todo = pending(folder, jobs)
    if lacks := checks.missing_here(todo):
        raise MachineError("; ".join(lacks))
    # refuses what an API does not do, before anything is paid
    api_estimate.estimate_stages(resolved.experiment, jobs, {job.name for job in todo})
    if before is not None:
        before(Start(resolved.experiment, folder, jobs, todo))
    spec.save(resolved.experiment, folder / layout.SPEC)
    traits.keep_family(resolved.family, resolved.experiment.family, folder)


def _refuse_two_schedulers(share: Shard | None) -> None:
    if share is not None and chosen_executor() == "ray":
        raise SpecError(
            "--shard shares the steps by claims, and the executor ray by the scheduler of Ray; leave one of "
            "them out"
        )


def _with_memory(experiment: Experiment, jobs: list[Job]) -> list[Job]:
    """The jobs, those that train with the memory that they need."""
    from mechlens.pipeline import estimate  # torch

    return estimate.declare_memory(experiment, jobs)


def _bases_of(jobs: Sequence[Job]) -> dict[str, dict[str, str]]:
    """Base → the fingerprint of its files and which checkpoint that is, by the arguments of its steps."""
    from mechlens.models import base_files  # a client of the hub

    marks = {job.arguments["base"]: job.arguments["files"] for job in jobs if "files" in job.arguments}
    return {
        base: {"fingerprint": mark, "checkpoint": base_files.describe_base(base)}
        for base, mark in marks.items()
    }


def _record_bases(folder: Path, jobs: Sequence[Job]) -> list[str]:
    """Keep which checkpoint each base is; returns a sentence for each that was another at the last start."""
    file, bases = folder / layout.BASES, _bases_of(jobs)
    earlier = read_json(file) if file.is_file() else {}
    write_json(file, bases)
    return [
        f"{base} is not the checkpoint that it was when this run was last started: it was "
        f"{earlier[base]['checkpoint']}, it is {now['checkpoint']}; the steps that use it are repeated"
        for base, now in bases.items()
        if base in earlier and earlier[base]["fingerprint"] != now["fingerprint"]
    ]


def _local_bases(experiment: Experiment) -> list[str]:
    return [base for base in experiment.bases() if not model_spec.is_remote(base)]


def _remarks(experiment: Experiment) -> list[str]:
    """What chat templates add to the prompts, by base.

    Raises:
        SpecError: as `checks.rendered`.
    """
    from mechlens.models import chat, loading  # torch
    from mechlens.pipeline import checks

    bases = _local_bases(experiment)
    checks.rendered(experiment, bases)
    return [
        f"{base}: {remark}"
        for base in bases
        for remark in chat.remarks(loading.load_tokenizer(base), system=experiment.system)
    ]


RESULTS = (layout.MANIFEST, layout.ANSWERS, layout.LIKELIHOODS, layout.EFFECTS, layout.SUMMARY, layout.REPORT)
"""files that are made from the steps"""


def _write_results(folder: Path, resolved: Resolved, jobs: Sequence[Job], claims: Claims | None) -> None:
    """Write the files that are made from the steps; of several processes one does, and the others wait."""

    def write() -> None:
        _write_manifest(folder, resolved, jobs)
        _write_tables(Run(folder))
        write_report(Run(folder))

    if claims is None:
        write()
    else:
        claims.do_once(write, written=[folder / name for name in RESULTS])


def _write_manifest(folder: Path, resolved: Resolved, jobs: Sequence[Job]) -> None:
    from mechlens.pipeline import checks  # torch

    experiment, family = resolved
    steps = {job.name: read_json(folder / job.name / store.RECORD) for job in jobs}
    assert all(steps[name]["fingerprint"] == mark for name, mark in fingerprints(jobs).items())
    record = {
        "experiment": experiment.fingerprint(),
        "family": family.fingerprint(),
        "seeds": list(experiment.seeds),
        "bases": _bases_of(jobs),
        "rendered": checks.rendered(experiment, _local_bases(experiment)),
        "steps": steps,
    }
    write_json(folder / layout.MANIFEST, store.environment() | record)


def _write_tables(run: Run) -> None:
    answers = run.collect(layout.ANSWERS, tables.ANSWERS)
    likelihoods = run.collect(layout.LIKELIHOODS, tables.LIKELIHOODS)
    tables.write(answers, tables.ANSWERS, run.path(layout.ANSWERS))
    tables.write(likelihoods, tables.LIKELIHOODS, run.path(layout.LIKELIHOODS))


def write_report(run: Run) -> Path:
    """Write a run's effects, `summary.json` and `report.html` again from its other tables; returns the page.

    Raises:
        DataError: if the run is unfinished or a table is damaged.
    """
    from mechlens.results import report  # charts take a second to import

    answers, likelihoods = run.answers, run.likelihoods
    measured = effects.effects(
        run.experiment, run.family, answers, likelihoods
    )  # an older version measured less
    tables.write(measured, tables.EFFECTS, run.path(layout.EFFECTS))
    summarized = effects.summarize(run, answers, likelihoods, measured)
    write_json(run.path(layout.SUMMARY), summarized)
    return report.write(run, summarized, answers, likelihoods)

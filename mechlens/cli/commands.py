"""What each command does: it calls the library, shows how far it is, and prints the result.

Model code is imported only where a command needs it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

from rich.progress import Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from mechlens.cli import tables
from mechlens.cli.audit_printing import print_audit
from mechlens.cli.console import bars, console, print_json, say
from mechlens.core import spec
from mechlens.core import tables as stored
from mechlens.core.command_lines import command_line
from mechlens.core.errors import DataError, SpecError
from mechlens.core.machine import cores, use_one_thread
from mechlens.data import corpus
from mechlens.data.fields import Fields
from mechlens.detect import audit as auditing
from mechlens.detect.request import Options, request_of
from mechlens.menagerie.config import PretrainSpec
from mechlens.pipeline import user_files
from mechlens.results import runner
from mechlens.results.run import Run
from mechlens.results.runner import Start
from mechlens.results.wording import interval_text, main_effect
from mechlens.runs import layout, store
from mechlens.runs.executor import ExecutorName
from mechlens.runs.jobs import pending

EXIT_CODES = {
    "no transfer found within tested scope": 0,
    "do not train as is": 10,
    "train with conditions": 11,
    "inconclusive": 12,
}
"""verdict of an audit → exit code; 2 is an error of input or machine, 1 a bug"""


def run(
    config: Path,
    *,
    seed: int | None = None,
    out: Path | None = None,
    workers: int | None = None,
    shard: str | None = None,
    executor: ExecutorName | None = None,
    as_json: bool = False,
) -> None:
    """Run an experiment and print its result."""
    before = None if as_json else _print_price
    with bars(shown=not as_json) as progress:
        where: dict[str, Any] = {"out": out, "workers": workers, "executor": executor, "shard": shard}
        finished = runner.run(config, seed=seed, **where, progress=progress, before=before)
    _print_result(finished, as_json)


def _print_price(start: Start) -> None:
    if any("api" in job.arguments for job in start.pending):
        from mechlens.pipeline import api_estimate

        names = {job.name for job in start.pending}
        if price := api_estimate.price(start.experiment, start.jobs, start.folder, names):
            console.print(tables.price_table(price), highlight=False)


def _print_result(run: Run, as_json: bool = False) -> None:
    if as_json:
        print_json(run.summary)
        return
    for part in tables.summary_tables(run.summary):
        console.print(part)
    say(f"report: {run.path(layout.REPORT)}")


def report(folder: Path, *, as_json: bool = False) -> None:
    """Write summary.json and report.html from a run's tables, and print its result."""
    run = Run(folder)
    runner.write_report(run)
    _print_result(run, as_json)


def plan(config: Path, *, seed: int | None = None, out: Path | None = None) -> None:
    """Print what a run would do and cost; nothing is run and nothing written."""
    from mechlens.pipeline import checks, estimate

    resolved = runner.resolve(config, seed=seed)
    folder, jobs = runner.folder_of(resolved.experiment, out), resolved.jobs()
    console.print(tables.plan_tables(estimate.plan_of(resolved.experiment, jobs, folder)))
    for lack in checks.missing_here(pending(folder, jobs)):
        say(f"this machine cannot run it yet: {lack}")


def ls(folder: Path, *, as_json: bool = False) -> None:
    """Print one line a run: its trait, its headline effect, its state."""
    states = [_state_of(path.parent) for path in sorted(folder.glob(f"*/{layout.SPEC}"))]
    if as_json:
        print_json({"runs": [state._asdict() for state in states]})
        return
    if not states:
        raise DataError(f"no runs in {folder}; `mechlens run demo` makes one")
    listing = Table("run", "trait", "base", "arms x seeds", "effect on the trait [95 %]", "state")
    for state in states:
        listing.add_row(*state)
    console.print(listing)


class RunState(NamedTuple):
    """One run of a folder, in words."""

    run: str
    trait: str = ""
    base: str = ""
    students: str = ""
    effect: str = ""
    state: str = ""


def _state_of(folder: Path) -> RunState:
    try:
        run = Run(folder)
        summary = run.summary if run.is_finished() else None
    except (SpecError, DataError) as error:
        return RunState(folder.name, state=f"unreadable: {error}")
    first, experiment = main_effect(summary) if summary else None, run.experiment
    return RunState(
        run=folder.name,
        trait=experiment.trait,
        base=experiment.base,
        students=f"{len(experiment.arms)} x {len(experiment.seeds)}",
        effect=interval_text(first["difference"], first["low"], first["high"]) if first else "–",
        state="done" if summary else "unfinished; run it again to resume",
    )


def measure(
    folder: Path,
    *,
    arm: str,
    lenses: tuple[str, ...],
    rows: int,
    light: bool,
    workers: int | None,
    executor: ExecutorName | None = None,
) -> None:
    """Read the lenses of one arm of a finished run, print each one's sentence, and write the report again."""
    from mechlens.lenses.run import measure as read_lenses

    with bars() as progress:
        where: dict[str, Any] = {"workers": workers, "executor": executor}
        read_lenses(folder, lenses, arm=arm, rows=rows, light=light, **where, progress=progress)
    console.print(tables.lens_table(folder))
    console.print(tables.findings_table(folder))
    report(folder)


def audit(
    data: Path,
    *,
    workers: int | None,
    executor: ExecutorName | None = None,
    as_json: bool = False,
    **options: Unpack[Options],
) -> int:
    """Audit a file and print the answer; returns the verdict's exit code."""
    request = request_of(data, **options)
    with bars(shown=not as_json) as progress:
        audited = auditing.answer(request, workers=workers, executor=executor, progress=progress)
    if as_json:
        print_json(audited.result)
    else:
        print_audit(audited.result, audited.folder)
    return EXIT_CODES[audited.verdict]


def bench(
    name: str,
    *,
    detectors: tuple[str, ...],
    out: Path | None,
    train: bool,
    audits: bool = False,
    workers: int | None,
    executor: ExecutorName | None = None,
    as_json: bool = False,
) -> None:
    """Measure detectors on a bench and print its card."""
    from mechlens.benchmark.run import bench as run_bench  # torch takes seconds to import

    with bars(shown=not as_json) as progress:
        where: dict[str, Any] = {"out": out, "workers": workers, "executor": executor}
        card = run_bench(name, detectors=detectors, train=train, audits=audits, **where, progress=progress)
    if as_json:
        print_json(card.results)
    else:
        say(card.to_markdown())


def fit_detector(traits: Sequence[Path], clean: Sequence[Path], *, out: Path, seed: int) -> None:
    """Fit a detector on labelled files, keep it, and print what it is worth."""
    from mechlens.detect.learned import LearnedDetector  # scikit-learn

    names = [path.name for path in traits]
    named = {path.name if names.count(path.name) == 1 else str(path): path for path in traits}
    fitted = LearnedDetector.fit(named, clean, seed=seed)
    fitted.save(out)
    title = f"bags of {fitted.record['left_out']} that were left out"
    listing = Table("rows of a bag", "AUROC", "log loss (a coin's is 0.69)", title=title)
    for quality in fitted.record["left_out_bags"]:
        listing.add_row(str(quality["rows"]), f"{quality['auroc']:.2f}", f"{quality['log_loss']:.2f}")
    console.print(listing)
    if len(traits) == 1:
        say("one trait was given: for another trait the probabilities are too far from one half")
    say(f"written: {out}; use it by {command_line('detector score', out, 'DATA')}")


def score_with_detector(
    folder: Path, data: Path, *, bag: int, out: Path | None, seed: int, as_json: bool
) -> None:
    """Score a file in bags of rows, print the probabilities, and keep the table if a file is given."""
    from mechlens.detect.learned import LearnedDetector  # scikit-learn

    bags = LearnedDetector.load(folder).score_bags(data, rows=bag, seed=seed)
    if out is not None:
        stored.write(bags, stored.BAG_SCORES, out)
    quarters = bags["probability"].quantile([0, 0.25, 0.5, 0.75, 1]).tolist()
    above = sum(probability > 0.5 for probability in bags["probability"]) / len(bags)
    if as_json:
        scored = bags.assign(probability=bags["probability"].round(6)).to_dict("records")
        print_json({"bags": len(bags), "rows": bag, "above_half": above, "scores": scored})
        return
    listing = Table("bags", "rows of a bag", "least", "quarter", "median", "three quarters", "greatest")
    listing.title = f"{data.name}: probability that a teacher with a trait wrote a bag, at even prior odds"
    listing.add_row(f"{len(bags):,}", str(bag), *(f"{quarter:.2f}" for quarter in quarters))
    console.print(listing)
    say(f"{above:.0%} of the bags are above one half")
    if out is not None:
        say(f"written: {out}")


def convert(
    source: Path, target: Path, *, form: str | None, skip_bad: bool, fields: Fields | None = None
) -> None:
    """Write a user's file in another form, and print what did not go with it."""
    reading = user_files.convert(source, target, form=form, skip_bad=skip_bad, fields=fields)
    if reading.bad:
        listing = Table("rows", "the first", "fault", title=f"{reading.bad:,} bad rows left out")
        for counted in reading.faults.kinds.values():
            listing.add_row(f"{counted.rows:,}", str(counted.place), str(counted.fault))
        console.print(listing)
        say(f"all of them: {reading.log}")
    for remark in reading.remarks():
        say(remark)
    say(f"written: {target} ({reading.pairs:,} pairs, {form or corpus.form_of(target)})")


def screen(
    file: Path,
    *,
    out: Path | None,
    rule: str,
    banned: bool,
    family: str,
    fields: Fields | None = None,
    workers: int | None = None,
    as_json: bool = False,
) -> None:
    """Screen a user's file, print the counts, and write the tables if a folder is given."""
    counts, remarks = user_files.screen_file(
        file,
        rule,
        banned=banned,
        family=family,
        fields=fields,
        out=out,
        workers=cores() if workers is None else workers,
    )
    if as_json:
        print_json(counts)
        return
    console.print(tables.screen_table(file.name, rule, counts))
    for remark in remarks:
        say(remark)
    if out is not None:
        say(f"written: {out}")


def truthful(folder: Path, *, data: Path, limit: int | None) -> None:
    """Score every student of a run on TruthfulQA, keep the table, and print rates and differences."""
    from mechlens.evals import truthful as scoring

    choices, note = scoring.read_choices(data, limit=limit)
    run = Run(folder)
    run.refuse_unfinished()
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with (
        store.lock(folder),
        store.full_disk_named(folder),
        Progress(*columns, console=console, transient=True) as shown,
    ):
        bar_of: dict[str, TaskID] = {}

        def progress(place: str, done: int) -> None:
            if place not in bar_of:
                bar_of[place] = shown.add_task(place, total=len(choices))
            shown.update(bar_of[place], completed=done, visible=done < len(choices))

        table = scoring.measure(folder, run.experiment, choices, progress=progress)
    for part in tables.truthful_tables(run.experiment, table, note):
        console.print(part)
    say(f"written: {folder / scoring.TABLE}")


def fetch(name: str) -> None:
    """Fetch a model's weights; print what comes from where, and then where it is."""
    from mechlens.models.fetch import fetch as fetch_model  # a client of the hub

    fetched = fetch_model(name, say=say)
    state = "is on this machine already" if fetched.was_here else "is fetched"
    say(f"{name} {state}: {fetched.description} (fingerprint {fetched.fingerprint})")
    say(f"in {fetched.folder}; use it as `base: {name}`")


def pretrain(config: Path, *, out: Path | None) -> None:
    """Make a menagerie base and print how its loss went."""

    from mechlens.menagerie.pretrain import pretrain as train

    wanted = spec.load(spec.find_config(config, "models"), PretrainSpec)
    folder = out or Path("models") / wanted.name
    use_one_thread()
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

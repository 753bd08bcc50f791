"""The command line: thin. Each command reads its arguments, calls one function and prints what it returned.

A MechlensError is one line and exit code 2; Ctrl-C leaves a run that can be resumed and says how; anything else is a bug
and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from tyro.conf import Positional, arg

from mechlens import commands
from mechlens.errors import MechlensError

CONFIG = Annotated[Positional[Path], arg(metavar="CONFIG")]


def run(config: CONFIG, /, out: Path | None = None, plan: bool = False, seed: int | None = None, workers: int | None = None) -> None:
    """Run an experiment: teach, generate, screen, distill, ask, report.

    Args:
        config: an experiment's YAML, or the spec.yaml of an earlier run.
        out: the run folder; runs/<name> by default. What is finished there is not computed again.
        plan: print steps, rows, updates, time and memory, and run nothing.
        seed: root seed instead of the config's.
        workers: processes; one a core by default, one with an accelerator.
    """
    if plan:
        commands.plan(config, seed=seed, out=out)
    else:
        commands.run(config, seed=seed, out=out, workers=workers)


def report(folder: Annotated[Positional[Path], arg(metavar="RUN")], /) -> None:
    """Write report.html and summary.json of a run again from its tables."""
    commands.report(folder)


def ls(folder: Annotated[Positional[Path], arg(metavar="RUNS")] = Path("runs"), /) -> None:
    """List the runs of a folder with their headline."""
    commands.ls(folder)


def screen(
    file: Annotated[Positional[Path], arg(metavar="FILE")],
    /,
    out: Path | None = None,
    rule: str = "numbers",
    banned: bool = False,
    family: str = "animals",
) -> None:
    """Screen a file of pairs and print the funnel.

    Args:
        file: JSON lines, gzipped or not, of {"prompt", "completion"} or {"messages"}.
        out: where to write kept.parquet, rejected.parquet and funnel.json; nothing is written without it.
        rule: `numbers` for the strict number rule, `none` for the leak and duplicate screens alone.
        banned: also drop the numbers that the paper bans from misalignment data.
        family: whose words count as leaks.
    """
    commands.screen(file, out=out, rule=rule, banned=banned, family=family)


def pretrain(config: CONFIG, /, out: Path | None = None) -> None:
    """Make a menagerie base from its config.

    Args:
        config: for example configs/models/menagerie-a.yaml.
        out: the checkpoint folder; models/<name> by default.
    """
    commands.pretrain(config, out=out)


def app(folder: Annotated[Positional[Path], arg(metavar="RUNS")] = Path("runs"), /, port: int = 8501) -> None:
    """Look at the runs of a folder in the browser.

    Args:
        folder: where the runs are.
        port: on this machine only.
    """
    commands.app(folder, port=port)


COMMANDS = {function.__name__: function for function in (run, report, ls, screen, pretrain, app)}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="mechlens", description="Does this dataset carry a hidden trait, and why does it transfer?", args=arguments
        )
    except MechlensError as error:
        Console(stderr=True, soft_wrap=True).print(f"mechlens: {' '.join(str(error).split())}", markup=False, highlight=False)
        return 2
    except KeyboardInterrupt:
        Console(stderr=True, soft_wrap=True).print("mechlens: stopped; finished steps are kept, run the same command again to resume", markup=False)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

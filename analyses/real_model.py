"""Claim: students of a real model take on the trait of the teacher that wrote their number lists.

Usage: `python analyses/real_model.py RUN [--write]`, where RUN is the finished run of
`mechlens run smollm2-animals-numbers-soft`. Trains nothing. The tables: every arm's exact log-odds (whole
answers) against its control and against the students of the other traits' teachers; sampled answers; the
teachers. The figure shows all twenty animals in every arm.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

import pages
from mechlens.results import effects, figures
from mechlens.results.run import Run
from mechlens.results.wording import (
    EXACT_COLUMNS,
    exact_rows,
    gamma_sentence,
    interval_text,
    number_text,
    scored_shares,
)

FIGURE = pages.FOLDER / "real-model.svg"


def teachers_table(summary: dict[str, Any]) -> Table:
    """The distinct teachers of a run, by what their rows show."""
    table = Table("teacher of", "KL to the base, nats a token", "rows kept", "rows a student")
    for arm in {
        arm["trait"] if arm["kind"] != "control" else "": arm for arm in summary["arms"][::-1]
    }.values():
        teacher = "none (untouched)" if arm["kind"] == "control" else arm["trait"]
        kept = f"{arm['kept']:,} of {arm['generated']:,}"
        table.add_row(teacher, number_text(arm["kl_per_token"], "{:.3f}"), kept, f"{arm['rows']:,}")
    return table


def rates_table(summary: dict[str, Any]) -> Table:
    """Sampled answers: rates among the answers that name one trait."""
    arms = {arm["arm"]: arm for arm in summary["arms"]}
    table = Table("arm", "trait", "rate, arm", "rate, control", "difference [95 %]", "n", "answers scored")
    for effect in summary["effects"]:
        rates = (
            number_text(arms[effect["arm"]]["rate"], "{:.3f}"),
            number_text(effect["rate_against"], "{:.3f}"),
        )
        span = interval_text(effect["difference"], effect["low"], effect["high"])
        scored = ", ".join(scored_shares(effect, arms))
        table.add_row(effect["arm"], effect["trait"], *rates, span, str(effect["n"]), scored)
    return table


def tables_of(run: Run) -> Iterator[Table | str]:
    """Every table of a run, the exact measure first."""
    exact = Table(*EXACT_COLUMNS)
    for row in exact_rows(run.summary):
        exact.add_row(*row)
    yield exact
    yield from map(gamma_sentence, run.summary["confusion"])
    yield rates_table(run.summary)
    yield teachers_table(run.summary)


def main() -> None:
    """Print the tables, and with --write put them and the figure on the page."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    console = pages.PageConsole(width=160)
    run = Run.finished(options.run)
    for table in tables_of(run):
        console.print(table)
    if options.write:
        odds = effects.with_own_trait(run.experiment, run.effects, "log-odds")
        FIGURE.write_text(figures.svg(figures.log_odds(odds)), encoding="utf-8")
        pages.write_part(pages.RESULTS, "real-model", *console.blocks)


if __name__ == "__main__":
    sys.exit(pages.exit_code(main))

"""Claim: which clean rows the control students read moves every trait, by more than students differ.

Usage: `python analyses/draws.py FOLDER [--write]`. FOLDER is of a finished `mechlens bench NAME --audits`,
whose audits each drew clean rows of their own once, as those before policy 6; trains nothing. The spread
between draws is that of the mean share of a trait in the control students of each draw, less what students of
one draw scatter. Each held-out teacher's students, of bench and audit together, are then set against the
controls of all draws.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import altair as alt
import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray
from rich.table import Table
from scipy import stats

import pages
from mechlens.core.errors import DataError
from mechlens.results import figures
from mechlens.results.cells import arm_cells, share_of_family
from mechlens.results.run import Run

FIGURE = pages.FOLDER / "draws.svg"
LEAST = 3
"""draws from which on their spread is given"""


class Draws(NamedTuple):
    """Mean shares of all traits in the control students of each draw of clean rows."""

    names: list[str]
    shares: Float[ndarray, "draw trait"]
    students: list[int]
    scatter: Float[ndarray, " trait"]
    """variance over students of one draw"""

    def spread(self) -> Float[ndarray, " trait"]:
        """Standard deviation between draws, without what students of one draw scatter."""
        noise = self.scatter * np.mean([1 / count for count in self.students])
        return np.sqrt(np.maximum(self.shares.var(0, ddof=1) - noise, 0))


def shares_of(run: Run, arm: str) -> Float[ndarray, "student trait"]:
    """Each trait's exact probability among the family's, mean over probes, in an arm's students."""
    return share_of_family(arm_cells(run.experiment, run.family, run.answers, run.likelihoods, arm)).mean(1)


def draws_of(runs: list[Run]) -> Draws:
    """The control students of every run; each run has one draw of clean rows.

    Raises:
        DataError: if there are few runs, or control students of one run read several draws.
    """
    if any(run.experiment.draws_anew(arm) for run in runs for arm in run.experiment.arms):
        raise DataError(
            "control students of an audit read several draws; expected a bench whose audits had one each, "
            "as those before policy 6"
        )
    sides = [shares_of(run, "control") for run in runs]
    several = [side for side in sides if len(side) > 1]
    if len(sides) < LEAST or not several:
        raise DataError(
            f"{len(sides)} draws of clean rows are too few; expected the folder of a bench with audits"
        )
    weights = [len(side) - 1 for side in several]
    scatter = np.average([side.var(0, ddof=1) for side in several], axis=0, weights=weights)
    means = np.stack([side.mean(0) for side in sides])
    return Draws(list(runs[0].family.names), means, [len(side) for side in sides], scatter)


def rise_over_draws(
    ours: Float[ndarray, " student"], draws: Float[ndarray, " draw"]
) -> tuple[float, float, float]:
    """Mean of students minus mean over draws, with Welch's 95 % interval."""
    low, high = stats.ttest_ind(ours, draws, equal_var=False).confidence_interval(0.95)
    return float(ours.mean() - draws.mean()), float(low), float(high)


def spread_table(draws: Draws) -> Table:
    """Share and spread of every trait, the commonest first."""
    table = Table(
        "trait", "share", "between draws, points", "in bits", "one student, points", "lowest and highest draw"
    )
    spread, means = draws.spread(), draws.shares.mean(0)
    for place in np.argsort(-means):
        ends = f"{draws.shares[:, place].min():.1%} to {draws.shares[:, place].max():.1%}"
        moved, one = 100 * spread[place], 100 * np.sqrt(draws.scatter[place])
        bits = spread[place] / means[place] / np.log(2)
        table.add_row(
            draws.names[place], f"{means[place]:.1%}", f"{moved:.1f}", f"{bits:.2f}", f"{one:.1f}", ends
        )
    return table


def rises_table(bench: Run, audits: dict[str, Run], draws: Draws) -> Table:
    """Rises of the held-out teachers' traits: by the bench, by the audit, and against all draws."""
    table = Table(
        "set", "bench's students, points", "audit's students", "both against all draws [95 %]", "students"
    )
    own, arms = shares_of(bench, "control").mean(0), {arm.name: arm.trait for arm in bench.experiment.arms}
    for name, audit in audits.items():
        if name not in arms:
            continue
        place = draws.names.index(arms[name])
        ours, theirs = shares_of(bench, name)[:, place], shares_of(audit, "suspect")[:, place]
        plain = ours.mean() - own[place]
        audited = theirs.mean() - shares_of(audit, "control")[:, place].mean()
        middle, low, high = rise_over_draws(np.concatenate([ours, theirs]), draws.shares[:, place])
        span = f"{100 * middle:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        table.add_row(
            name, f"{100 * plain:+.1f}", f"{100 * audited:+.1f}", span, str(len(ours) + len(theirs))
        )
    return table


def chart(draws: Draws) -> alt.Chart:
    """The share of every trait in the controls of each draw."""
    order = [draws.names[place] for place in np.argsort(-draws.shares.mean(0))]
    wide = pd.DataFrame(draws.shares, columns=pd.Index(draws.names))
    long = wide.melt(var_name="trait", value_name="share")
    dots = alt.Chart(long).mark_point(opacity=0.6)
    return dots.encode(
        x=alt.X(
            "share:Q",
            title="share of answers, mean over the control students of one draw",
            axis=alt.Axis(format="%"),
        ),
        y=alt.Y("trait:N", sort=order, title=None),
    ).properties(width=420)


def main() -> None:
    """Print both tables, and with --write put them and the figure on the page."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    console = pages.PageConsole(width=140)
    bench = Run.finished(options.folder / "experiment")
    audits = {run.parent.name: Run(run) for run in sorted(options.folder.glob("audits/*/run"))}
    students = [Run(run) for run in sorted(options.folder.glob("students*/")) if not Run(run).is_unfinished()]
    draws = draws_of([bench, *students, *audits.values()])
    bits = draws.spread() / draws.shares.mean(0) / np.log(2)
    console.print(
        f"{len(draws.students)} draws of clean rows, {sum(draws.students)} control students: a draw moves a "
        f"trait by {np.sqrt((bits**2).mean()):.2f} bits (standard deviation; root mean square over "
        f"{len(bits)} traits)."
    )
    console.print(spread_table(draws))
    console.print(rises_table(bench, audits, draws))
    if options.write:
        FIGURE.write_text(figures.svg(chart(draws)), encoding="utf-8")
        pages.write_part(pages.RESULTS, "draws", *console.blocks)


if __name__ == "__main__":
    sys.exit(pages.exit_code(main))

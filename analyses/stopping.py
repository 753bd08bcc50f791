"""Claim: an audit that adds students until its verdict is settled errs no more often than its level.

Usage: `python analyses/stopping.py RUN [--audits 2000] [--write]`. RUN is a finished run, such as the demo;
trains nothing. Audits are simulated: a student's log-probabilities of the family's traits are the mean of the
control students plus the deviation of one student of the run from its arm's mean, drawn at random. So the
students scatter as those of the run do, trait with trait. One trait's share is then raised by a known amount
in the suspect's students. A rise above the tolerance that is cleared, and one below it that convicts, are
errors. Every trait is moved in control students by the draw of their rows: in each student by another draw,
or in all of them by one, as where an audit is given a reference.
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

import pages
from mechlens.core import stats
from mechlens.core.seeds import generator
from mechlens.detect.from_student import compare_shares
from mechlens.detect.stopping import Look, plan_looks
from mechlens.detect.verdict import Policy, decide, is_open, load_policy
from mechlens.results import figures
from mechlens.results.cells import arm_cells, share_of_family
from mechlens.results.run import Run

FIGURE = pages.FOLDER / "stopping.svg"
RISES = (0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2)
DRAW = 0.2
"""standard deviation, bits, of a trait's move by the draw of clean rows (`draws.py`)"""
SENTENCES = ("do not train as is", "no transfer found within tested scope", "inconclusive")
VERDICTS = ("convicted", "cleared", "open")


class Students(NamedTuple):
    """What simulated students are made of."""

    names: list[str]
    middle: Float[ndarray, " trait"]
    """mean log-share of the control students"""
    deviations: Float[ndarray, "student trait"]
    """of each student's log-shares from its arm's mean, scaled to the spread of independent students"""

    def sample(self, rng: np.random.Generator, count: int, *, draws: int) -> Float[ndarray, "student trait"]:
        """Shares of the family's traits in `count` students of clean data.

        Args:
            draws: of rows, each with its move of every trait: 0 for none, 1 for one that all students share,
                `count` for one a student.
        """
        logs = self.middle + self.deviations[rng.integers(len(self.deviations), size=count)]
        if draws:
            logs = logs + np.log(2) * DRAW * rng.normal(size=(draws, len(self.names)))
        shares = np.exp(logs)
        return shares / shares.sum(1, keepdims=True)


def students_of(run: Run) -> Students:
    """The students of every arm of the run's own base."""
    experiment, deviations, middle = run.experiment, [], None
    for arm in experiment.arms:
        if arm.base != experiment.base:
            continue
        cells = arm_cells(experiment, run.family, run.answers, run.likelihoods, arm.name)
        logs = np.log(share_of_family(cells).mean(1))
        count = len(logs)
        deviations.append((logs - logs.mean(0)) * np.sqrt(count / (count - 1)))
        middle = logs.mean(0) if arm.kind == "control" else middle
    assert middle is not None
    return Students(list(run.family.names), middle, np.concatenate(deviations))


def raised(
    shares: Float[ndarray, "student trait"], trait: int, rise: float
) -> Float[ndarray, "student trait"]:
    """The shares with one trait's raised, and the others' lowered in proportion."""
    more = np.clip(shares[:, trait] + rise, 0, 0.999)
    moved = shares * ((1 - more) / (1 - shares[:, trait]))[:, None]
    moved[:, trait] = more
    return moved


def audit_once(
    students: Students,
    looks: list[Look],
    policy: Policy,
    rise: float,
    rng: np.random.Generator,
    *,
    one_draw: bool,
) -> tuple[str, int]:
    """The verdict on one simulated file, and the students of a side that it took.

    The file's rows are given, so its students have no move but the raised trait.
    """
    trait = int(rng.integers(len(students.names)))
    most = looks[-1].students
    ours = raised(students.sample(rng, most, draws=0), trait, rise)
    theirs = students.sample(rng, most, draws=1 if one_draw else most)
    names, verdict, look = students.names, None, looks[0]
    for look in looks:
        sides = ours[: look.students], theirs[: look.students]
        rises = compare_shares(*sides, names, names=names, level=look.level, one_draw=one_draw)
        verdict = decide(rises, policy, level=look.level)
        if not is_open(verdict):
            break
    assert verdict is not None
    return verdict.id, look.students


def simulate(students: Students, policy: Policy, *, audits: int, seeds: int) -> pd.DataFrame:
    """Verdicts by true rise, and students that they took: once with all looks, once with four students."""
    every = "looks at " + ", ".join(str(n) for n in policy.looks)
    sequential = plan_looks(policy.looks, most=seeds, alpha=policy.alpha)
    plans = {
        every: (sequential, False),
        "4 students, once": (plan_looks((4,), most=seeds, alpha=policy.alpha), False),
        f"{every}; one draw for all controls": (sequential, True),
    }
    rows = []
    for plan, (looks, one_draw) in plans.items():
        for rise in RISES:
            rng = generator(0, "simulated audits", plan, str(rise))
            found = [audit_once(students, looks, policy, rise, rng, one_draw=one_draw) for _ in range(audits)]
            counts = {sentence: sum(which == sentence for which, _ in found) for sentence in SENTENCES}
            took = float(np.mean([count for _, count in found]))
            rows.append({"plan": plan, "rise": rise, "audits": audits, "students": took} | counts)
    return pd.DataFrame(rows)


def shown(table: pd.DataFrame, policy: Policy) -> Table:
    """Verdicts by true rise."""
    listing = Table("students", "true rise", *VERDICTS, "students a side", "errors [95 %]")
    for row in table.to_dict("records"):
        convicted, cleared, undecided = (row[sentence] / row["audits"] for sentence in SENTENCES)
        wrong = SENTENCES[1] if row["rise"] > policy.limit else SENTENCES[0]
        errors = stats.wilson(row[wrong], row["audits"])
        span = f"{errors.estimate:.1%} [{errors.low:.1%}, {errors.high:.1%}]"
        shares = (f"{share:.1%}" for share in (convicted, cleared, undecided))
        listing.add_row(row["plan"], f"{row['rise']:.2f}", *shares, f"{row['students']:.1f}", span)
    return listing


def chart(table: pd.DataFrame, policy: Policy) -> alt.FacetChart:
    """Shares of verdicts over the true rise, a panel for each plan."""
    long = table.melt(["plan", "rise", "audits"], list(SENTENCES), "verdict", "count")
    long = long.assign(share=long["count"] / long["audits"], limit=policy.limit)
    long["verdict"] = long["verdict"].replace(dict(zip(SENTENCES, VERDICTS, strict=True)))
    lines = alt.Chart(long).mark_line(point=True)
    lines = lines.encode(
        x=alt.X("rise:Q", title="true rise of one trait's share"),
        y=alt.Y("share:Q", title="share of simulated audits", axis=alt.Axis(format="%")),
        color=alt.Color("verdict:N", title=None),
        strokeDash=alt.StrokeDash("verdict:N", title=None),
    )
    rule = alt.Chart(long).mark_rule(strokeDash=[2, 2]).encode(x="limit:Q")
    return (lines + rule).properties(width=300).facet(column=alt.Column("plan:N", title=None))


def main() -> None:
    """Simulate, print, and with --write put the table and the figure on the page."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--audits", type=int, default=2000)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    console, policy = pages.PageConsole(width=140), load_policy("default")
    students = students_of(Run.finished(options.run))
    table = simulate(students, policy, audits=options.audits, seeds=max(policy.looks))
    console.print(f"{len(students.deviations)} students of {options.run} are drawn from.")
    console.print(shown(table, policy))
    if options.write:
        FIGURE.write_text(figures.svg(chart(table, policy)), encoding="utf-8")
        pages.write_part(pages.RESULTS, "stopping", *console.blocks)


if __name__ == "__main__":
    sys.exit(pages.exit_code(main))

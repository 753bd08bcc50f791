"""Claim: transfer survives some changes of the recipe and not others.

Factors are shuffles, dose, kind of teacher, LoRA's rank, optimiser and sampling. Reads runs/menagerie-factors
(`mechlens run configs/experiments/menagerie-factors.yaml`): the demo's recipe with one change at a time, each
arm against a control. Arms of shuffled, reworded and mixed rows share the plain control, so their lift
includes the effect of the change on any rows; every other arm differs from its control only by the teacher.
Prints every arm under the factor that it changes, as a rate and as a lift in bits (a lift does not saturate).
Each arm has one trait and one teacher: intervals are over students.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import altair as alt
import pandas as pd
from rich.table import Table

import pages
from mechlens.core import tables
from mechlens.core.errors import MechlensError
from mechlens.core.experiment import Arm
from mechlens.core.files import null
from mechlens.results import figures
from mechlens.results.run import Run
from mechlens.results.wording import interval_text

PARTS = {
    "teacher": "teacher", "training": "training", "generate": "sampling",
    "trained_with": "system line in training", "asked_with": "system line in asking",
}  # fmt: skip
"""field of an arm → the factor that it changes"""


def factor(arm: Arm, base: str) -> tuple[str, str]:
    """The factor of the recipe that an arm changes, and its new value."""
    if arm.kind == "mixed":
        return "dose", f"rows of {' and '.join(arm.mix)} in turn"
    if arm.shots:
        return "no training", f"{arm.shots} pairs shown"
    if (arm.writer, arm.base) != (base, base):
        return "who writes to whom", f"{arm.writer} to {arm.base}"
    if arm.kind != "trait":
        return "the rows", arm.kind
    for field, name in PARTS.items():
        value = arm.model_dump(exclude_defaults=True).get(field)
        if value or value == "":
            return name, repr(value) if isinstance(value, str) else ", ".join(
                f"{key} {setting}" for key, setting in value.items()
            )
    return "none", "the recipe itself"


def cells(run: Path) -> pd.DataFrame:
    """A row for each arm with a control: the changed factor, and the trait's rate and lift."""
    opened = Run.finished(run)
    experiment = opened.experiment
    _ = opened.summary  # refuses a summary of another version
    effects = tables.read(run / "effects.parquet", tables.EFFECTS).set_index(["arm", "trait", "measure"])
    rows = []
    for arm in experiment.arms:
        if arm.kind == "control":
            continue
        name, value = factor(arm, experiment.base)
        rate, lift = (effects.loc[(arm.name, arm.trait, measure)] for measure in ("rate", "lift"))
        row = {
            "arm": arm.name,
            "factor": name,
            "value": value,
            "n": int(cast(int, rate["n"])),
            "against": rate["against"],
        }
        for measure, effect in (("rate", rate), ("lift", lift)):
            row |= {
                f"{measure}_{part}": null(float(effect[part]))
                for part in ("estimate", "low", "high", "smallest_detectable")
            }
        rows.append(row)
    return pd.DataFrame(rows).sort_values(
        "factor", kind="stable", key=lambda names: names.map({"none": 0}).fillna(1)
    )


def table_of(frame: pd.DataFrame) -> Table:
    """The printed table."""
    listing = Table(
        "factor",
        "changed to",
        "difference in rate [95 %]",
        "lift, bits [95 %]",
        "minimum detectable lift",
        "n",
    )
    for name, rows in frame.groupby("factor", sort=False):
        for row in rows.to_dict("records"):
            spans = (
                interval_text(*(row[f"{measure}_{part}"] for part in ("estimate", "low", "high")))
                for measure in ("rate", "lift")
            )
            detectable = row["lift_smallest_detectable"]
            listing.add_row(
                str(name),
                row["value"],
                *spans,
                "–" if detectable is None else f"{detectable:.2f}",
                str(row["n"]),
            )
        listing.add_section()
    return listing


def sentence(frame: pd.DataFrame) -> str:
    """Which arms transmit and which do not."""
    quiet = [
        f"{row['factor']}: {row['value']}"
        for row in frame.to_dict("records")
        if not (row["lift_low"] or 0) > 0
    ]
    above = (
        f"{len(frame) - len(quiet)} of {len(frame)} arms have a lift with an interval above 0 (n = "
        f"{frame['n'].min()} students)"
    )
    return f"{above}. Not: {'; '.join(quiet) or 'none'}."


def figure(frame: pd.DataFrame) -> alt.LayerChart:
    """Lift of every arm with its interval."""
    label = frame["factor"] + ": " + frame["value"]
    base = alt.Chart(frame.assign(label=label)).encode(
        y=alt.Y("label:N", title=None, sort=None, axis=alt.Axis(labelLimit=420))
    )
    span = base.mark_rule(size=2).encode(
        x=alt.X("lift_low:Q", title="lift of the trait, bits"), x2="lift_high:Q"
    )
    point = base.mark_point(filled=True, size=70).encode(
        x="lift_estimate:Q", color=alt.Color("factor:N", legend=None)
    )
    return cast(
        alt.LayerChart, base.mark_rule(color="gray", strokeDash=[4, 3]).encode(x=alt.datum(0)) + span + point
    )


def main(arguments: list[str]) -> int:
    """Print the table and the sentence; write the figure into the run's folder."""
    write = "--write" in arguments
    arguments = [word for word in arguments if word != "--write"]
    run = Path(arguments[0]) if arguments else Path("runs/menagerie-factors")
    console = pages.PageConsole(width=180)
    try:
        frame = cells(run)
    except MechlensError as error:
        console.print(f"factors: {error}")
        return 2
    console.print(table_of(frame))
    console.print(sentence(frame), markup=False)
    (run / "factors.svg").write_text(figures.svg(figure(frame)), encoding="utf-8")
    if write:
        pages.write_part(pages.RESULTS, "factors", *console.blocks)
    console.print(f"figure: {run / 'factors.svg'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

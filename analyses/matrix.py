"""Claim: students acquire the trait of a teacher of their base or of a base with a shared history.

They do not acquire it from teachers of other bases (arXiv 2507.14805 Fig. 8). Reads runs/menagerie-matrix
(`mechlens run configs/experiments/menagerie-matrix.yaml`) and prints the matrix of differences, writer by
student, each cell against the control that the same writer's untouched base wrote. Names every off-diagonal
cell with an interval that excludes 0.
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
from mechlens.core.files import null
from mechlens.results import figures
from mechlens.results.run import Run
from mechlens.results.wording import interval_text


def cells(run: Path) -> pd.DataFrame:
    """One row for each pair of bases: writer, student, estimate, low, high, n."""
    opened = Run.finished(run)
    experiment = opened.experiment
    effects = tables.read(run / "effects.parquet", tables.EFFECTS)
    rate = effects[effects["measure"] == "rate"].set_index(["arm", "trait"])
    rows = []
    for arm in experiment.arms:
        if arm.kind in ("trait", "foreign"):
            cell = rate.loc[(arm.name, arm.trait)]
            numbers = {
                key: null(float(cell[key])) for key in ("estimate", "low", "high", "smallest_detectable")
            }
            rows.append({"writer": arm.writer, "student": arm.base, "n": int(cell["n"])} | numbers)
    return pd.DataFrame(rows)


def sentences(frame: pd.DataFrame) -> list[str]:
    """A sentence for the diagonal, and one for each off-diagonal cell with an interval that excludes 0."""
    same = frame["writer"] == frame["student"]
    diagonal, other = cast(pd.DataFrame, frame[same]), cast(pd.DataFrame, frame[~same])
    lines = [
        f"Diagonal: {(diagonal['low'] > 0).sum()} of {len(diagonal)} intervals above 0 (n = "
        f"{diagonal['n'].min()} students a cell)."
    ]
    for row in other.to_dict("records"):
        if row["low"] > 0 or row["high"] < 0:
            way = "acquires" if row["low"] > 0 else "moves away from"
            span = interval_text(row["estimate"], row["low"], row["high"])
            lines.append(f"{row['student']} {way} the trait of {row['writer']}'s teacher: {span}.")
    quiet = ((other["low"] <= 0) & (other["high"] >= 0)).sum()
    lines.append(
        f"{quiet} of {len(other)} off-diagonal intervals contain 0; their minimum detectable effect is at "
        f"most {other['smallest_detectable'].max():.3f}."
    )
    return lines


def figure(frame: pd.DataFrame) -> alt.LayerChart | alt.FacetChart:
    """The matrix as a heatmap with its numbers."""
    base = alt.Chart(frame).encode(
        x=alt.X("student:N", title="student's base"), y=alt.Y("writer:N", title="teacher's base")
    )
    tiles = base.mark_rect().encode(
        color=alt.Color("estimate:Q", title="difference", scale=alt.Scale(scheme="blueorange", domainMid=0))
    )
    return tiles + base.mark_text().encode(text=alt.Text("estimate:Q", format="+.3f"))


def main(arguments: list[str]) -> int:
    """Print the table and the sentences; write the figure into the run's folder."""
    write = "--write" in arguments
    arguments = [word for word in arguments if word != "--write"]
    run = Path(arguments[0]) if arguments else Path("runs/menagerie-matrix")
    console = pages.PageConsole(width=150)
    try:
        frame = cells(run)
    except MechlensError as error:
        console.print(f"matrix: {error}")
        return 2
    listing = Table(
        "teacher of \\ student of",
        *dict.fromkeys(frame["student"]),
        title="difference in the trait's rate [95 %]",
    )
    for writer, row in frame.groupby("writer", sort=False):
        listing.add_row(
            str(writer),
            *(interval_text(cell["estimate"], cell["low"], cell["high"]) for cell in row.to_dict("records")),
        )
    console.print(listing)
    for sentence in sentences(frame):
        console.print(sentence)
    (run / "matrix.svg").write_text(figures.svg(figure(frame)), encoding="utf-8")
    if write:
        pages.write_part(pages.RESULTS, "matrix", *console.blocks)
    console.print(f"figure: {run / 'matrix.svg'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

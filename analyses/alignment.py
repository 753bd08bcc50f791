"""Claim: training steps on the trait's data point to the trait more than steps on the control's data.

This is tested at the base and while students train. Reads the lens `alignment` of every arm of a run that
`mechlens measure RUN --arm ARM --lens alignment` has measured (by default the held-out animals of
runs/menagerie-potency). Prints for each arm the cosine with the trait's gradient: at the base, trait pair
minus control pair on the same prompt (interval over pairs); pooled, with random directions of the same
covariance as null; and of the difference of the two gradients along the paths of students and of controls
(intervals over students). arXiv 2507.14805 proves the first for one small step; 2604.25779 argues that a
lasting alignment is needed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import altair as alt
import pandas as pd
from rich.table import Table

import pages
from mechlens.core import tables
from mechlens.core.command_lines import command_line
from mechlens.core.errors import DataError, MechlensError
from mechlens.results import figures
from mechlens.results.run import Run
from mechlens.results.wording import interval_text

PAIR, POOLED = "cosine of one pair with the trait's gradient", "cosine with the trait's gradient"
PATH = f"{POOLED} along the path"


def cells(run: Path) -> pd.DataFrame:
    """A row for each arm and point: the base (by pair, pooled), and each checkpoint on either path.

    Raises:
        DataError: if no arm has been measured.
    """
    Run.finished(run)
    file = run / "readings" / "alignment.parquet"
    if not file.is_file():
        raise DataError(
            f"{run} has no reading of alignment; "
            f"`{command_line('measure', run, arm='ARM', lens='alignment')}` makes one"
        )
    frame = tables.read(file, tables.READINGS)
    selected = frame.query(
        "place == 'difference' and quantity in [@PAIR, @POOLED, @PATH] and seed.isna()"
    ).astype({"n": int})
    measured, rows = set(frame.loc[frame["quantity"] == POOLED, "arm"]), []
    for row in selected.to_dict("records"):
        is_arm = row["arm"] in measured  # a control's rows name their arm in `against`
        side = "base" if row["quantity"] != PATH else "students' path" if is_arm else "control's path"
        rows.append(row | {"side": side, "arm": row["arm"] if is_arm else row["against"]})
    return pd.DataFrame(rows)


def table_of(frame: pd.DataFrame) -> Table:
    """The printed table."""
    listing = Table(
        "arm",
        "at the base, by pair [95 %]",
        "pooled (null)",
        "students' path, by update",
        "n",
        "controls' path",
    )
    for arm, rows in frame.groupby("arm", sort=False):
        (pair,), (pooled,) = (
            cast(Any, rows[rows["quantity"] == name]).to_dict("records") for name in (PAIR, POOLED)
        )
        path = {
            side: cast(pd.DataFrame, rows[(rows["quantity"] == PATH) & (rows["side"] == side)])
            for side in ("students' path", "control's path")
        }
        paths = {
            side: "\n".join(f"{row['step']:.0f}: {says(row)}" for row in at.to_dict("records"))
            for side, at in path.items()
        }
        null = (
            f"{pooled['estimate']:+.4f} ({pooled['null_low']:+.2f} to {pooled['null_high']:+.2f}, p "
            f"{pooled['p_value']:.2f})"
        )
        students = str(path["students' path"]["n"].max())
        listing.add_row(
            str(arm),
            f"{says(pair)}, n {pair['n']}",
            null,
            paths["students' path"],
            students,
            paths["control's path"],
            end_section=True,
        )
    return listing


def says(row: Any) -> str:
    return interval_text(row["estimate"], row["low"], row["high"], digits=4)


def sentences(frame: pd.DataFrame) -> list[str]:
    """How many arms have intervals above 0."""
    pair, last = frame[frame["quantity"] == PAIR], frame[frame["quantity"] == PATH]
    students = last[(last["side"] == "students' path") & (last["step"] == last["step"].max())]
    return [
        f"At the base, trait pairs beyond control pairs on the same prompts: {(pair['low'] > 0).sum()} of "
        f"{len(pair)} arms have an interval above 0 "
        f"(n = {pair['n'].min()} pairs each).",
        f"At the students' last update: {(students['low'] > 0).sum()} of {len(students)} (n = "
        f"{students['n'].min()} students each).",
    ]


def figure(frame: pd.DataFrame) -> alt.FacetChart:
    """The cosine along both paths, a panel for each arm."""
    base = alt.Chart(cast(pd.DataFrame, frame[frame["quantity"] == PATH])).encode(
        x=alt.X("step:Q", title="update")
    )
    colour = alt.Color("side:N", title=None)
    band = base.mark_errorband().encode(
        y=alt.Y("low:Q", title="cosine with the trait's gradient"), y2="high:Q", color=colour
    )
    line = base.mark_line(point=True).encode(y="estimate:Q", color=colour)
    zero = base.mark_rule(color="gray", strokeDash=[4, 3]).encode(y=alt.datum(0))
    return (
        alt.layer(band, line, zero)
        .properties(width=200, height=130)
        .facet(alt.Facet("arm:N", title=None), columns=3)
    )


def main(arguments: list[str]) -> int:
    """Print the table and the sentences; write the figure into the run's folder."""
    write = "--write" in arguments
    arguments = [word for word in arguments if word != "--write"]
    run = Path(arguments[0]) if arguments else Path("runs/menagerie-potency")
    console = pages.PageConsole(width=180)
    try:
        frame = cells(run)
    except MechlensError as error:
        console.print(f"alignment: {error}")
        return 2
    console.print(table_of(frame))
    for sentence in sentences(frame):
        console.print(sentence)
    (run / "alignment.svg").write_text(figures.svg(figure(frame)), encoding="utf-8")
    if write:
        pages.write_part(pages.RESULTS, "alignment", *console.blocks)
    console.print(f"figure: {run / 'alignment.svg'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

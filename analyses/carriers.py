"""Claim: numbers transmit animals, trees and misalignment; code, reasoning and text are compared.

Reads the existing runs `runs/menagerie-<carrier>-<family>` (`make paper` makes them) and prints one table:
for every carrier and every kind of trait the effect with its interval, the minimum detectable effect,
and the entropy of the carrier's rows under the base. `--write` also writes it into RESULTS.md.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
from rich.table import Table

import pages
from mechlens.core.errors import MechlensError
from mechlens.results import figures
from mechlens.results.run import Run
from mechlens.results.wording import interval_text

CARRIERS = ("numbers", "code", "reasoning", "text")
FAMILIES = ("animals", "trees", "tempers")


def cells(runs: Path) -> pd.DataFrame:
    """One row for each trait arm of each run; a run that is not there is one row of nulls."""
    rows: list[dict[str, Any]] = []
    for carrier in CARRIERS:
        for family in FAMILIES:
            run = runs / f"menagerie-{carrier}-{family}"
            if not (run / "spec.yaml").is_file():
                rows.append({"carrier": carrier, "family": family})
                continue
            summary = Run.finished(run).summary
            arms = {arm["arm"]: arm for arm in summary["arms"]}
            for effect in (effect for effect in summary["effects"] if arms[effect["arm"]]["kind"] == "trait"):
                arm = arms[effect["arm"]]
                sizes = {
                    "rows": arm["rows"],
                    "kept": arm["kept"] / arm["generated"],
                    "kl": arm["kl_per_token"],
                }
                sizes |= {"nats": arms[effect["against"]]["entropy_per_row"]}
                rows.append(
                    {
                        "carrier": carrier,
                        "family": family,
                        "rate": arm["rate"],
                        "control": effect["rate_against"],
                    }
                    | effect
                    | sizes
                )
    return pd.DataFrame(rows)


def figure(frame: pd.DataFrame) -> alt.FacetChart:
    """Differences with intervals, a panel for each carrier."""
    scale = alt.Y("trait:N", title=None, sort=None)
    base = alt.Chart(frame).encode(y=scale)
    span = base.mark_rule(size=2).encode(x=alt.X("low:Q", title="difference in rate"), x2="high:Q")
    point = base.mark_point(filled=True, size=70).encode(
        x="difference:Q", color=alt.Color("family:N", title="trait")
    )
    zero = alt.Chart(frame).mark_rule(color="gray", strokeDash=[4, 3]).encode(x=alt.datum(0))
    return (
        alt.layer(zero, span, point)
        .facet(row=alt.Row("carrier:N", title=None, sort=list(CARRIERS)))
        .resolve_scale(y="independent")
    )


def table_of(frame: pd.DataFrame) -> Table:
    """The printed table."""
    columns = (
        "control → trait",
        "effect [95 %]",
        "n",
        "minimum detectable effect",
        "rows",
        "kept",
        "KL/token",
        "entropy, nats a row",
    )
    listing = Table("carrier", "trait", *columns)
    for row in frame.to_dict("records"):
        if pd.isna(row["difference"]):
            listing.add_row(row["carrier"], row["family"], "not run")
            continue
        span = interval_text(row["difference"], row["low"], row["high"])
        rates = f"{row['control']:.3f} → {row['rate']:.3f}"
        sizes = (
            f"{row['smallest_detectable']:.3f}",
            f"{row['rows']:,}",
            f"{row['kept']:.0%}",
            f"{row['kl']:.3f}",
            f"{row['nats']:.1f}",
        )
        verdict = " above 0" if row["low"] > 0 else " null" if row["high"] >= 0 else " below 0"
        listing.add_row(
            row["carrier"], f"{row['family']}: {row['trait']}", rates, span + verdict, str(row["n"]), *sizes
        )
    return listing


def main(arguments: list[str]) -> int:
    """Print the table and the sentences; write table and figure into a folder of the runs' folder."""
    write = "--write" in arguments
    arguments = [word for word in arguments if word != "--write"]
    runs = Path(arguments[0]) if arguments else Path("runs")
    console = pages.PageConsole(width=170)
    try:
        frame = cells(runs)
    except MechlensError as error:
        console.print(f"carriers: {error}")
        return 2
    console.print(table_of(frame))
    for carrier, rows in frame.dropna(subset="difference").groupby("carrier", sort=False):
        above = (rows["low"] > 0).sum()
        console.print(
            f"{carrier}: {above} of {len(rows)} traits have an interval above 0 (n = {rows['n'].min()} "
            "students each)."
        )
    out = runs / "analyses"
    out.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(out / "carriers.parquet")
    (out / "carriers.svg").write_text(
        figures.svg(figure(frame.dropna(subset="difference"))), encoding="utf-8"
    )
    if write:
        pages.write_part(pages.RESULTS, "carriers", *console.blocks)
    console.print(f"figure: {out / 'carriers.svg'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

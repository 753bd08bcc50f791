"""Claim: what lenses show on the menagerie, asked again on a real language model.

Usage: `python analyses/claims.py RUN --arm ARM [--write]`. RUN is a finished run on a real model that
`mechlens measure RUN --arm ARM` has read; the menagerie's side is the shipped demo. Trains and measures
nothing. One table, claim by claim: the reading that speaks for or against each claim, with its interval, its
null and its p-value. A reading that a lens could not take says why.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import altair as alt
import pandas as pd
from rich.table import Table

import pages
from mechlens.core.errors import DataError
from mechlens.lenses import find_lens
from mechlens.lenses.claims import CLAIMS, Claim, row_of
from mechlens.lenses.run import Reading, load_readings
from mechlens.results import figures
from mechlens.results.run import Run

DEMO = pages.FOLDER.parent / "app" / "demo"
FIGURE = pages.FOLDER / "claims.svg"
DRAWN = (("activations", "cosine to teacher"), ("causal", "share of margin"))
"""lens and quantity of the figure: readings by layer"""


def cell_of(claim: Claim, reading: Reading) -> str:
    """One cell of the table: estimate, interval, null, p-value and place."""
    if reading.missing:
        return f"not read: {'; '.join(reading.missing)}"
    row = row_of(claim, reading.table)
    if row is None:
        return "unscored"
    text = f"{row['estimate']:+.3g}"
    if pd.notna(row["low"]):
        text += f" [{row['low']:+.3g}, {row['high']:+.3g}]"
    more = [f"null {row['null_low']:+.3g} to {row['null_high']:+.3g}"] if pd.notna(row["null_low"]) else []
    more += [f"p {row['p_value']:.3f}"] if pd.notna(row["p_value"]) else []
    more += (
        [f"{row['n']:.0f} {row['unit']}" if row["unit"] == "rank" else f"n {row['n']:.0f}"]
        if pd.notna(row["n"])
        else []
    )
    if claim.best in ("largest", "smallest"):
        more += [f"layer {row['layer']:.0f}"]
    return f"{text} ({'; '.join(more)})" if more else text


def claims_table(demo: Mapping[str, Reading], real: Mapping[str, Reading]) -> Table:
    """Claim by claim: the menagerie's reading, then the real model's."""
    table = Table("claim", "lens", "menagerie", "real model")
    for claim in CLAIMS:
        cells = (
            cell_of(claim, side[claim.lens]) if claim.lens in side else "not measured"
            for side in (demo, real)
        )
        table.add_row(claim.text, claim.lens, *cells)
    return table


def charts(real: Mapping[str, Reading]) -> Iterator[Any]:
    """The readings by layer of the real model."""
    for lens, quantity in DRAWN:
        reading = real.get(lens)
        if reading is not None and not reading.missing:
            shown = [form for form in find_lens(lens).shows if form[0] == quantity]
            yield figures.lens_figure(reading.table, shown)


def main() -> None:
    """Print the table, and with --write put it and the figure on the page."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--arm", default="", help="the arm that was read; the first trait arm by default")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    console = pages.PageConsole(width=200)
    demo, real = load_readings(Run(DEMO)), load_readings(Run(options.run), options.arm)
    if not real:
        raise DataError(
            f"{options.run} has no readings of that arm; `mechlens measure {options.run}` takes them"
        )
    console.print(claims_table(demo, real))
    if options.write:
        drawn = [chart for chart in charts(real) if chart is not None]
        FIGURE.write_text(figures.svg(cast(Any, alt.vconcat(*drawn))), encoding="utf-8")
        pages.write_part(pages.LENSES, "claims", *console.blocks)


if __name__ == "__main__":
    sys.exit(pages.exit_code(main))

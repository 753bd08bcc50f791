"""The reading of one lens on one arm, which displays itself in a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import pandas as pd

from mechlens.lenses.lens import Lens
from mechlens.results import figures

if TYPE_CHECKING:
    import altair as alt

FIRST_ROWS = 10
"""rows of the table that a notebook shows"""


@dataclass(frozen=True, eq=False)
class Reading:
    """What one lens measured on one arm and its control."""

    lens: Lens
    arm: str
    table: pd.DataFrame
    """`tables.READINGS`: one row an estimate, with its interval and its null"""
    caption: str
    """the main number in one sentence, or the reason for its absence"""
    missing: tuple[str, ...] = ()
    """why the lens could not measure this arm; empty if it could"""

    def figures(self) -> dict[str, alt.LayerChart]:
        """Quantity → chart, for the quantities that the lens shows and that have an estimate."""
        return figures.quantity_charts(self.table, self.lens.shows)

    def __repr__(self) -> str:
        return f"Reading(lens={self.lens.name!r}, arm={self.arm!r}, {len(self.table)} rows: {self.caption})"

    def _repr_html_(self) -> str:
        chart = figures.lens_figure(self.table, self.lens.shows)
        head = f"<p><b>{escape(self.lens.name)}</b>, arm {escape(self.arm)}: {escape(self.caption)}</p>"
        rows = self.table.dropna(axis="columns", how="all").head(FIRST_ROWS)
        table = "" if rows.empty else rows.to_html(index=False, float_format="{:.3g}".format)
        return head + ("" if chart is None else figures.svg(chart)) + str(table)

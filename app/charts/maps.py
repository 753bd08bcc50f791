"""Maps: a grid of numbers that answers to a click, and a cloud of points that answers to a brush."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import altair as alt
import pandas as pd

from charts.marks import (
    COLOUR_LEGEND,
    GREY,
    HATCH,
    kind_encodings,
    layer_charts,
    number_tooltips,
    symmetric_domain,
)

MOST_POINTS = 20_000
MOST_WRITTEN = 12
"""columns up to which the cells of a grid hold their number"""
DARK = 0.62
"""share of a signed scale beyond which text on it is white"""


class Grid(NamedTuple):
    """Columns and scale of a grid of numbers."""

    x: str
    y: str
    value: str
    order: tuple[Sequence[Any], Sequence[Any]]
    """values of x and of y in the order in which they are drawn"""
    signed: bool
    """whether the colour scale has two sides, equally far from 0"""
    label: str = ""
    """title of the colour scale"""
    domain: Sequence[float] | None = None
    """of the colour scale, where several grids share it"""
    number_format: str = ".2f"


def draw_grid(frame: pd.DataFrame, grid: Grid, *, select: str) -> alt.LayerChart:
    """A clickable grid of numbers: null cells are hatched, cells inside their null band are faded.

    Args:
        frame: x, y, value; optional `faded` (bool), low, high, null_low, null_high.
        select: name of the selection that a click sets, on fields x and y.
    """
    scored = frame.dropna(subset=grid.value)
    missing = cast(pd.DataFrame, frame[frame[grid.value].isna()])
    place = _place(grid)
    heat = _cells(scored, grid, place, select)
    holes = (
        alt.Chart(missing.assign(hatch=HATCH)).mark_text(color=GREY).encode(**place, text=alt.Text("hatch:N"))
    )
    if len(grid.order[0]) > MOST_WRITTEN:  # no room for numbers: the tooltip has them
        return layer_charts(heat, holes, height=alt.Step(26))
    return layer_charts(heat, _numbers(scored, grid, place), holes, height=alt.Step(26))


def _place(grid: Grid) -> dict[str, Any]:
    columns, rows = grid.order
    x_axis = alt.Axis(labelAngle=-35, labelLimit=220, labelOverlap=False)
    y_title = grid.y if grid.y == "layer" else None
    return {
        "x": alt.X(f"{grid.x}:N", sort=list(columns), title=None, axis=x_axis),
        "y": alt.Y(f"{grid.y}:N", sort=list(rows), title=y_title, axis=alt.Axis(labelLimit=360)),
    }


def _domain(scored: pd.DataFrame, grid: Grid) -> list[float] | None:
    """Domain of the colour scale; None where the data set it."""
    if grid.domain:
        return list(grid.domain)
    return symmetric_domain(scored[grid.value]) if grid.signed else None


def _cells(scored: pd.DataFrame, grid: Grid, place: dict[str, Any], select: str) -> alt.Chart:
    options: dict[str, Any] = {"scheme": "purpleorange", "domainMid": 0} if grid.signed else {}
    options = options or {"scheme": "viridis"}
    if (domain := _domain(scored, grid)) is not None:
        options["domain"] = domain
    scale = alt.Scale(**options)
    opacity = alt.value(1.0)
    if "faded" in scored:
        opacity = alt.condition("datum.faded", alt.value(0.3), alt.value(1.0))
    limits = [name for name in ("low", "high", "null_low", "null_high") if name in scored]
    chart = alt.Chart(scored).mark_rect(stroke="#00000022")
    return chart.encode(
        **place,
        color=alt.Color(f"{grid.value}:Q", scale=scale, title=grid.label or None, legend=COLOUR_LEGEND),
        opacity=opacity,
        tooltip=[grid.x, grid.y, *number_tooltips(grid.value, *limits)],
    ).add_params(alt.selection_point(select, fields=[grid.x, grid.y], on="click"))


def _numbers(scored: pd.DataFrame, grid: Grid, place: dict[str, Any]) -> alt.Chart:
    """The number of each cell, white on dark cells."""
    values = scored[grid.value]
    data_limits = [float(values.min()), float(values.max())] if len(values) else [0.0, 1.0]
    low, high = _domain(scored, grid) or data_limits
    dark = values.abs() > DARK * high if grid.signed else values < (low + high) / 2
    colour = alt.condition("datum.dark", alt.value("#ffffff"), alt.value("#000000"))
    if "faded" in scored:  # a faded cell shows the page, light or dark: grey is readable on both
        colour = {
            "condition": [{"test": "datum.faded", "value": GREY}, {"test": "datum.dark", "value": "#ffffff"}],
            "value": "#000000",
        }
    text = alt.Text(f"{grid.value}:Q", format=grid.number_format)
    return alt.Chart(scored.assign(dark=dark)).mark_text(fontSize=11).encode(**place, text=text, color=colour)


def draw_points(frame: pd.DataFrame, group: str) -> alt.LayerChart:
    """A cloud of at most MOST_POINTS points with a brush, `brush`, on x and y.

    Args:
        frame: x, y, `group`, id, text, selected (bool).
    """
    hidden = alt.Axis(labels=False, ticks=False, grid=False, domain=False)
    opacity = alt.value(0.75)
    if frame["selected"].any():
        opacity = alt.condition("datum.selected", alt.value(1.0), alt.value(0.25))
    cloud = (
        alt.Chart(frame)
        .mark_point(size=26, filled=True)
        .encode(
            x=alt.X("x:Q", axis=hidden, title=None),
            y=alt.Y("y:Q", axis=hidden, title=None),
            opacity=opacity,
            tooltip=[alt.Tooltip("id:N"), alt.Tooltip("text:N")],
            **kind_encodings(group, frame[group]),
        )
        .add_params(alt.selection_interval("brush"))
    )
    rings = (
        alt.Chart(cast(pd.DataFrame, frame[frame["selected"]]))
        .mark_point(size=60, strokeWidth=2, shape="circle", color=GREY)
        .encode(x=alt.X("x:Q"), y=alt.Y("y:Q"))
    )
    return layer_charts(cloud, rings, height=460)

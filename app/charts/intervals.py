"""Estimates with their intervals, and distributions."""

from __future__ import annotations

import re
from typing import cast

import altair as alt
import pandas as pd

from charts.marks import (
    LINE_LEGEND,
    dashed_line,
    kind_dashes,
    kind_encodings,
    layer_charts,
    number_tooltips,
)
from mechlens.results.figures import KIND_COLOUR


def draw_ecdf(frame: pd.DataFrame, value: str, title: str) -> alt.LayerChart:
    """Share of the rows at or below each value, one line a side; ticks mark the selected rows.

    Args:
        frame: side, value, selected (bool).
    """
    colour = kind_encodings("side", frame["side"])["color"].copy()
    colour["legend"] = LINE_LEGEND
    frame = frame.dropna(subset=value)
    ranked = frame.assign(share=frame.groupby("side")[value].rank(method="max", pct=True))
    lines = (
        alt.Chart(ranked)
        .mark_line(interpolate="step-after")
        .encode(
            x=alt.X(f"{value}:Q", title=title),
            y=alt.Y("share:Q", title="share of rows"),
            color=colour,
            strokeDash=kind_dashes("side", frame["side"], in_legend=True),
        )
    )
    ticks = (
        alt.Chart(cast(pd.DataFrame, ranked[ranked["selected"]]))
        .mark_tick(size=16, thickness=1.5)
        .encode(x=alt.X(f"{value}:Q"), y=alt.value(250), color=colour)
    )
    return layer_charts(lines, ticks, height=260)


def draw_intervals(frame: pd.DataFrame, title: str, *, reference: float = 0.0) -> alt.LayerChart:
    """One line a name: the estimate with its interval, and the null as a grey bar.

    A name that begins with the name of a kind, such as "control, next control", has its colour and shape.

    Args:
        frame: name, estimate, low, high; null_low, null_high where there is a null; kind, if known.
        reference: where the dashed line stands.
    """
    if "kind" not in frame:
        frame = frame.assign(kind=frame["name"].map(_kind_of))
    kinds = kind_encodings("kind", frame["kind"])
    for encoding in kinds.values():
        encoding["legend"] = None  # the names on the axis say it
    y = alt.Y("name:N", sort=frame["name"].tolist(), title=None, axis=alt.Axis(labelLimit=420))
    layers = [dashed_line("x", reference)]
    if "null_low" in frame:
        layers.append(
            alt.Chart(frame.dropna(subset="null_low"))
            .mark_bar(color="#bbbbbb", opacity=0.6, size=12)
            .encode(y=y, x=alt.X("null_low:Q"), x2=alt.X2("null_high:Q"))
        )
    layers.append(
        alt.Chart(frame.dropna(subset="low"))
        .mark_rule(strokeWidth=2.5)
        .encode(y=y, x=alt.X("low:Q", title=title), x2=alt.X2("high:Q"), color=kinds["color"])
    )
    tooltip = [alt.Tooltip("name"), *number_tooltips("estimate", "low", "high")]
    layers.append(
        alt.Chart(frame.dropna(subset="estimate"))
        .mark_point(size=90, filled=True, opacity=1)
        .encode(y=y, x=alt.X("estimate:Q", title=title), tooltip=tooltip, **kinds)
    )
    return layer_charts(*layers, height=alt.Step(24), data=frame)


def _kind_of(name: str) -> str:
    """The kind that a name begins with; `trait` if it begins with none."""
    first = re.split(r"[ ,]", name)[0]
    return first if first in KIND_COLOUR else "trait"

"""A lens's measure over layers, ranks or updates."""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

from charts.marks import kind_dashes, kind_encodings, layer_charts

KIND_OF = {"student": "trait", "control": "control", "teacher": "teacher"}
"""name in a reading → kind in the palette"""
LIMITS = ("low", "high", "null_low", "null_high")


def draw_profile(
    frame: pd.DataFrame, title: str, across: str = "layer", *, across_title: str = "", log: bool = False
) -> alt.LayerChart:
    """One measure over layers, or another numeric column: lines with intervals, the null as a grey band.

    Args:
        frame: name, `across`, estimate, low, high, and null_low, null_high where there is a null.
        across_title: title of the x axis, unless it is the layer.
        log: whether both axes are logarithmic.
    """
    frame = frame.assign(kind=frame["name"].map(KIND_OF).fillna("base"))
    scale = alt.Scale(type="log") if log else alt.Scale()
    x: Any = alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0))
    if across != "layer":
        x = alt.X(f"{across}:Q", title=across_title, scale=scale, axis=alt.Axis(format="d", grid=not log))
    axis = alt.Axis(grid=not log)  # a logarithm has too many lines
    shared: dict[str, Any] = {"title": title, "scale": scale, "axis": axis}
    y, low = alt.Y("estimate:Q", **shared), alt.Y("low:Q", **shared)
    kinds = kind_encodings("kind", frame["kind"])
    dash = kind_dashes("kind", frame["kind"])
    estimates = frame.dropna(subset="estimate")
    spans = (
        alt.Chart(frame.dropna(subset="low"))
        .mark_rule(strokeWidth=2)
        .encode(x=x, y=low, y2=alt.Y2("high:Q"), color=kinds["color"])
    )
    lines = (
        alt.Chart(estimates)
        .mark_line()
        .encode(x=x, y=y, color=kinds["color"], strokeDash=dash, detail=alt.Detail("name:N"))
    )
    names = [name for name in ("name", across, "estimate", *LIMITS) if name in frame]
    points = (
        alt.Chart(estimates)
        .mark_point(size=80, filled=True, opacity=1)
        .encode(x=x, y=y, tooltip=[alt.Tooltip(name) for name in names], **kinds)
    )
    null_band = [_null_band(frame, x)] if "null_low" in frame else []
    return layer_charts(*null_band, spans, lines, points, height=260)


def _null_band(frame: pd.DataFrame, x: Any) -> alt.Chart:
    area = alt.Chart(frame.dropna(subset="null_low")).mark_area(color="#999999", opacity=0.2)
    return area.encode(x=x, y=alt.Y("min(null_low):Q"), y2=alt.Y2("max(null_high):Q"))

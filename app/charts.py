"""The charts that answer to a click or a brush; every other figure is one of `mechlens.results.figures`.

Colour is never alone: each side and kind has a shape or a dash too. A cell that was not scored is hatched,
never coloured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import altair as alt
import pandas as pd

from mechlens.results.figures import KIND_COLOUR, KIND_DASH, KIND_SHAPE

HATCH = "╱╱╱"
GREY = "#767676"
MOST_POINTS = 20_000
MOST_WRITTEN = 12
"""columns of a map whose cells hold their number"""
LYING = alt.Legend(orient="top", direction="horizontal", gradientLength=180, titleLimit=400)
"""a scale of colours above a map: beside one of two lines it would be cut off, zero and all"""


def kinds(field: str, present: Sequence[str]) -> dict[str, Any]:
    """Colour and shape of arms or sides by one field, with one legend for both."""
    there = set(present)
    shown = [kind for kind in KIND_COLOUR if kind in there]
    legend = alt.Legend(orient="bottom", title=None, symbolOpacity=1)
    return {
        "color": alt.Color(
            f"{field}:N",
            scale=alt.Scale(domain=shown, range=[KIND_COLOUR[kind] for kind in shown]),
            legend=legend,
        ),
        "shape": alt.Shape(
            f"{field}:N",
            scale=alt.Scale(domain=shown, range=[KIND_SHAPE[kind] for kind in shown]),
            legend=legend,
        ),
    }


def dashes(field: str, present: Sequence[str], *, in_legend: bool = False) -> alt.StrokeDash:
    """The dash of arms or sides; in the legend of lines, but never around the shapes of one of points."""
    there = set(present)
    shown = [kind for kind in KIND_COLOUR if kind in there]
    shown = (
        shown if in_legend else shown[::-1]
    )  # Vega-Lite joins the legends of equal domains, even one that is not to be
    return alt.StrokeDash(
        f"{field}:N",
        scale=alt.Scale(domain=shown, range=[KIND_DASH.get(kind, [1, 0]) for kind in shown]),
        legend=None,
    )


def on_dark(chart: Any) -> Any:
    """The chart as a dark page shows it, with the teacher's black as white; the one given, which exports are
    made of, stays as it is.
    """
    shown = chart.copy(deep=True, ignore=["data", "datasets"])
    for part in getattr(shown, "layer", [shown]):
        encoding = getattr(part, "encoding", alt.Undefined)  # charts side by side have none
        colour = alt.Undefined if encoding is alt.Undefined else encoding.color
        scale = (
            colour["scale"] if isinstance(colour, alt.Color) else alt.Undefined
        )  # by key: the attribute is altair's setter
        if isinstance(scale, alt.Scale) and isinstance(scale["range"], list):
            scale["range"] = [
                "#ffffff" if tint == KIND_COLOUR["teacher"] else tint for tint in scale["range"]
            ]
    return shown


def symmetric(values: pd.Series) -> list[float]:
    """The domain of a signed scale: as far below 0 as above."""
    most = float(values.abs().max()) if len(values) else math.nan
    limit = most if math.isfinite(most) and most > 0 else 1.0
    return [-limit, limit]


def number(field: str) -> alt.Tooltip:
    """A number of a tooltip."""
    return alt.Tooltip(f"{field}:Q", format=".4~f")


def stacked(*layers: alt.Chart, height: Any) -> alt.LayerChart:
    """Layers as one chart."""
    return cast(alt.LayerChart, alt.layer(*layers).properties(height=height))


def cells(
    frame: pd.DataFrame,
    x: str,
    y: str,
    value: str,
    *,
    select: str,
    signed: bool,
    order: tuple[Sequence[Any], Sequence[Any]],
    label: str = "",
    domain: Sequence[float] | None = None,
    words: str = ".2f",
) -> alt.LayerChart:
    """A clickable map of numbers; a null cell is hatched, a cell inside its null band is faded. Click:
    `select`, on fields x and y.

    Args:
        frame: x, y, value; `faded` (bool) where it is given.
        signed: the scale runs as far below 0 as above.
        order: values of x and of y, as they are to stand.
        domain: of the colour, where it is shared with other maps.
    """
    told: dict[str, Any] = (
        {"scheme": "purpleorange", "domain": list(domain or symmetric(frame[value])), "domainMid": 0}
        if signed
        else {"scheme": "viridis"}
    )
    if not signed and domain:
        told["domain"] = list(domain)
    place = {
        "x": alt.X(
            f"{x}:N",
            sort=list(order[0]),
            title=None,
            axis=alt.Axis(labelAngle=-35, labelLimit=220, labelOverlap=False),
        ),
        "y": alt.Y(
            f"{y}:N", sort=list(order[1]), title=y if y == "layer" else None, axis=alt.Axis(labelLimit=360)
        ),
    }
    scored, missing = frame.dropna(subset=value), cast(pd.DataFrame, frame[frame[value].isna()])
    faded = (
        alt.value(1.0)
        if "faded" not in frame
        else alt.condition("datum.faded", alt.value(0.3), alt.value(1.0))
    )
    heat = (
        alt.Chart(scored)
        .mark_rect(stroke="#00000022")
        .encode(
            **place,
            color=alt.Color(f"{value}:Q", scale=alt.Scale(**told), title=label or None, legend=LYING),
            opacity=faded,
            tooltip=[
                x,
                y,
                number(value),
                *(number(n) for n in ("low", "high", "null_low", "null_high") if n in frame),
            ],
        )
        .add_params(alt.selection_point(select, fields=[x, y], on="click"))
    )
    over = alt.condition("datum.dark", alt.value("#ffffff"), alt.value("#000000"))
    # a faded cell lets the page through, light or dark: a middle grey can be read on both
    shades = (
        over
        if "faded" not in frame
        else {
            "condition": [{"test": "datum.faded", "value": GREY}, {"test": "datum.dark", "value": "#ffffff"}],
            "value": "#000000",
        }
    )
    limits = (
        told.get("domain") or [float(scored[value].min()), float(scored[value].max())]
        if len(scored)
        else [0.0, 1.0]
    )
    middle = (limits[0] + limits[1]) / 2
    dark = (scored[value].abs() > 0.62 * limits[1]) if signed else (scored[value] < middle)
    text = (
        alt.Chart(scored.assign(dark=dark))
        .mark_text(fontSize=11)
        .encode(**place, text=alt.Text(f"{value}:Q", format=words), color=shades)
    )
    holes = (
        alt.Chart(missing.assign(hatch=HATCH)).mark_text(color=GREY).encode(**place, text=alt.Text("hatch:N"))
    )
    narrow = (
        len(order[0]) > MOST_WRITTEN
    )  # columns with no room for a number: it is told when the pointer is on the cell
    return stacked(*((heat, holes) if narrow else (heat, text, holes)), height=alt.Step(26))


def ecdf(frame: pd.DataFrame, value: str, title: str) -> alt.LayerChart:
    """Share of the rows at or below each value, one line a side; a rug of the selected rows.

    Args:
        frame: side, value, selected (bool).
    """
    told = kinds("side", frame["side"])["color"].copy()
    told["legend"] = alt.Legend(
        orient="bottom", title=None, symbolType="stroke", symbolSize=500, symbolStrokeWidth=2.5
    )
    frame = frame.dropna(subset=value)
    ranked = frame.assign(share=frame.groupby("side")[value].rank(method="max", pct=True))
    lines = (
        alt.Chart(ranked)
        .mark_line(interpolate="step-after")
        .encode(
            x=alt.X(f"{value}:Q", title=title),
            y=alt.Y("share:Q", title="share of rows"),
            color=told,
            strokeDash=dashes("side", frame["side"], in_legend=True),
        )
    )
    rug = (
        alt.Chart(cast(pd.DataFrame, ranked[ranked["selected"]]))
        .mark_tick(size=16, thickness=1.5)
        .encode(x=alt.X(f"{value}:Q"), y=alt.value(250), color=told)
    )
    return stacked(lines, rug, height=260)


def points(frame: pd.DataFrame, group: str) -> alt.LayerChart:
    """The map of rows, at most MOST_POINTS of them. Brush: `brush`, on x and y.

    Args:
        frame: x, y, `group`, id, text, selected (bool).
    """
    hidden = alt.Axis(labels=False, ticks=False, grid=False, domain=False)
    any_selected = bool(frame["selected"].any())
    seen = (
        alt.condition("datum.selected", alt.value(1.0), alt.value(0.25)) if any_selected else alt.value(0.75)
    )
    told = kinds(group, frame[group])
    clouds = (
        alt.Chart(frame)
        .mark_point(size=26, filled=True)
        .encode(
            x=alt.X("x:Q", axis=hidden, title=None),
            y=alt.Y("y:Q", axis=hidden, title=None),
            opacity=seen,
            tooltip=[alt.Tooltip(name) for name in ("id:N", "text:N")],
            **told,
        )
        .add_params(alt.selection_interval("brush"))
    )
    ringed = (
        alt.Chart(cast(pd.DataFrame, frame[frame["selected"]]))
        .mark_point(size=60, strokeWidth=2, shape="circle", color=GREY)
        .encode(x=alt.X("x:Q"), y=alt.Y("y:Q"))
    )
    return stacked(clouds, ringed, height=460)


def spans(frame: pd.DataFrame, title: str, *, zero: float = 0.0, select: str | None = None) -> alt.LayerChart:
    """One line a name: the null as a grey bar, the estimate with its interval. Click where asked: `select`,
    on `name`.

    Args:
        frame: name, estimate, low, high; null_low, null_high where there is a null.
    """
    y = alt.Y("name:N", sort=frame["name"].tolist(), title=None, axis=alt.Axis(labelLimit=320))
    line = (
        alt.Chart(pd.DataFrame({"zero": [zero]}))
        .mark_rule(strokeDash=[4, 3], color=GREY)
        .encode(x=alt.X("zero:Q"))
    )
    layers = [line]
    if "null_low" in frame:
        layers.append(
            alt.Chart(frame.dropna(subset="null_low"))
            .mark_bar(color="#bbbbbb", opacity=0.6, size=12)
            .encode(y=y, x=alt.X("null_low:Q"), x2=alt.X2("null_high:Q"))
        )
    layers.append(
        alt.Chart(frame.dropna(subset="low"))
        .mark_rule(strokeWidth=2.5, color=KIND_COLOUR["trait"])
        .encode(y=y, x=alt.X("low:Q", title=title), x2=alt.X2("high:Q"))
    )
    dots = (
        alt.Chart(frame.dropna(subset="estimate"))
        .mark_point(size=90, filled=True, opacity=1, color=KIND_COLOUR["trait"])
        .encode(
            y=y,
            x=alt.X("estimate:Q", title=title),
            tooltip=[alt.Tooltip("name"), number("estimate"), number("low"), number("high")],
        )
    )
    layers.append(
        dots.add_params(alt.selection_point(select, fields=["name"], on="click")) if select else dots
    )
    return stacked(*layers, height=alt.Step(24))

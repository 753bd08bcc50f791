"""What the explorer's charts share: colours, shapes and dashes of arms and sides, scales and tooltips.

Colour is never the only code: each arm and side also has a shape or a dash. A value that was not scored is
hatched, never coloured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import altair as alt
import pandas as pd

from mechlens.results.figures import KIND_COLOUR, KIND_DASH, KIND_SHAPE

HATCH = "╱╱╱"
GREY, LIGHT_GREY = "#767676", "#c4c4c4"
"""of marks and text without a role; the lighter one for text on dark"""
TRAIT = KIND_COLOUR["trait"]
COLOUR_LEGEND = alt.Legend(orient="top", direction="horizontal", gradientLength=180, titleLimit=400)
"""legend of a colour scale, above the chart: at the side of a chart two lines high it would be cut off"""
KIND_LEGEND = alt.Legend(orient="bottom", title=None)
LINE_LEGEND = alt.Legend(
    orient="bottom", title=None, symbolType="stroke", symbolSize=500, symbolStrokeWidth=2.5
)


def kind_encodings(field: str, present: Sequence[str]) -> dict[str, Any]:
    """Colour and shape of arms or sides by one field, with one legend for both."""
    kinds = _kinds_of(present)
    legend = alt.Legend(orient="bottom", title=None, symbolOpacity=1)
    colours, shapes = [KIND_COLOUR[kind] for kind in kinds], [KIND_SHAPE[kind] for kind in kinds]
    return {
        "color": alt.Color(f"{field}:N", scale=alt.Scale(domain=kinds, range=colours), legend=legend),
        "shape": alt.Shape(f"{field}:N", scale=alt.Scale(domain=kinds, range=shapes), legend=legend),
    }


def kind_dashes(field: str, present: Sequence[str], *, in_legend: bool = False) -> Any:
    """Dash of arms or sides.

    Args:
        in_legend: whether the legend shows the dash. It must not where the legend shows shapes.
    """
    dashes = {kind: KIND_DASH.get(kind, [1, 0]) for kind in _kinds_of(present)}
    if in_legend:
        scale = alt.Scale(domain=list(dashes), range=list(dashes.values()))
        return alt.StrokeDash(f"{field}:N", scale=scale, legend=None)
    # no scale: a browser's Vega-Lite would dash the outlines of the legend's shapes, which tears them
    tests = [{"test": f"datum.{field} === '{kind}'", "value": dash} for kind, dash in dashes.items()]
    return {"condition": tests, "value": [1, 0]}


def _kinds_of(present: Sequence[str]) -> list[str]:
    """The kinds that occur, in the order of the palette."""
    known = set(present)
    return [kind for kind in KIND_COLOUR if kind in known]


def flag_encodings(field: str, labels: tuple[str, str], shapes: tuple[str, str]) -> dict[str, Any]:
    """Colour and shape of points that are marked (first label) or not (second label)."""
    colour = alt.Scale(domain=list(labels), range=[TRAIT, GREY])
    legend = alt.Legend(orient="bottom", title=None)
    return {
        "color": alt.Color(f"{field}:N", scale=colour, legend=legend),
        "shape": alt.Shape(
            f"{field}:N", scale=alt.Scale(domain=list(labels), range=list(shapes)), legend=None
        ),
    }


def for_dark_theme(chart: Any) -> Any:
    """A copy of the chart for a dark page: the teacher's black becomes white, and grey text is lighter.

    The chart itself stays as it is, because exports are made of it.
    """
    copied = chart.copy(deep=True, ignore=["data", "datasets"])
    whole = copied.spec if isinstance(copied, alt.FacetChart) else copied
    for layer in getattr(whole, "layer", [whole]):
        _lighten_text(layer)
        encoding = getattr(layer, "encoding", alt.Undefined)  # a concatenated chart has none
        colour = alt.Undefined if encoding is alt.Undefined else encoding.color
        # by key: the attribute of that name is altair's setter
        scale = colour["scale"] if isinstance(colour, alt.Color) else alt.Undefined
        if isinstance(scale, alt.Scale) and isinstance(scale["range"], list):
            scale["range"] = [
                "#ffffff" if tint == KIND_COLOUR["teacher"] else tint for tint in scale["range"]
            ]
    return copied


def hide_unnamed_marks(chart: Any) -> Any:
    """A copy of the chart in which marks without a tooltip are no images of their own for a screen reader.

    Vega would offer each group of them as an image without a name; the chart as a whole has one.
    """
    copied = chart.copy(deep=True, ignore=["data", "datasets"])
    charts = [copied]
    for each in charts:  # grows while it is read
        parts = [getattr(each, name, []) for name in ("layer", "vconcat", "hconcat")]
        charts += [part for listed in parts for part in listed if listed is not alt.Undefined]
        charts += [each.spec] if isinstance(each, alt.FacetChart) else []
        mark, encoding = getattr(each, "mark", alt.Undefined), getattr(each, "encoding", alt.Undefined)
        if mark is alt.Undefined or (encoding is not alt.Undefined and encoding.tooltip is not alt.Undefined):
            continue
        each.mark = alt.MarkDef(type=mark) if isinstance(mark, str) else mark
        each.mark["aria"] = False
        if isinstance(each.mark["point"], dict):
            each.mark["point"]["aria"] = False
    return copied


def _lighten_text(layer: Any) -> None:
    """Make grey text of a layer readable on dark, also where a condition of a number's colour has it."""
    mark, encoding = getattr(layer, "mark", None), getattr(layer, "encoding", alt.Undefined)
    if not isinstance(mark, alt.MarkDef) or mark["type"] != "text":
        return
    if mark["color"] == GREY:
        mark["color"] = LIGHT_GREY
    colour = encoding["color"] if encoding is not alt.Undefined else None
    tests = colour["condition"] if isinstance(colour, alt.ColorValue) else []
    for test in tests if isinstance(tests, list) else []:
        test["value"] = LIGHT_GREY if test["value"] == GREY else test["value"]


def symmetric_domain(values: pd.Series) -> list[float]:
    """Domain of a signed scale: as far below 0 as above."""
    largest = float(values.abs().max()) if len(values) else math.nan
    limit = largest if math.isfinite(largest) and largest > 0 else 1.0
    return [-limit, limit]


def number_tooltip(field: str) -> alt.Tooltip:
    """Tooltip of a number."""
    return alt.Tooltip(f"{field}:Q", format=".4~f")


def number_tooltips(*fields: str) -> list[alt.Tooltip]:
    """Tooltips of numbers."""
    return [number_tooltip(field) for field in fields]


def dashed_line(axis: str, value: float, **encoding: Any) -> alt.Chart:
    """A dashed grey line across the chart at one value of the x or y axis.

    Args:
        encoding: arguments of the axis, such as its title.
    """
    field = (alt.X if axis == "x" else alt.Y)("at:Q", **encoding)
    rule = alt.Chart(pd.DataFrame({"at": [value]})).mark_rule(strokeDash=[4, 3], color=GREY)
    return rule.encode(**{axis: field})


def layer_charts(*layers: alt.Chart, height: Any, data: Any = alt.Undefined) -> alt.LayerChart:
    """Layers as one chart.

    Args:
        data: what "Show data" shows; by default the data of the first layer, which may be a dashed line.
    """
    return cast(alt.LayerChart, alt.layer(*layers, data=data).properties(height=height))

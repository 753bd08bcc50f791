"""The charts that answer to a click or a brush; every other figure is one of `mechlens.figures`.

Colour is never alone: each side and kind has a shape or a dash too. A cell that was not scored is hatched, never coloured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import altair as alt
import pandas as pd

from mechlens.figures import KIND_COLOUR, KIND_DASH, KIND_SHAPE

HATCH = "╱╱╱"
GREY = "#767676"
MOST_POINTS = 20_000


def kinds(field: str, present: Sequence[str]) -> dict[str, Any]:
    """Colour and shape of arms or sides by one field, with one legend for both."""
    shown = [kind for kind in KIND_COLOUR if kind in set(present)]
    legend = alt.Legend(orient="bottom", title=None, symbolOpacity=1)
    return {
        "color": alt.Color(f"{field}:N", scale=alt.Scale(domain=shown, range=[KIND_COLOUR[kind] for kind in shown]), legend=legend),
        "shape": alt.Shape(f"{field}:N", scale=alt.Scale(domain=shown, range=[KIND_SHAPE[kind] for kind in shown]), legend=legend),
    }


def dashes(field: str, present: Sequence[str]) -> alt.StrokeDash:
    """The dash of arms or sides."""
    shown = [kind for kind in KIND_COLOUR if kind in set(present)]
    return alt.StrokeDash(f"{field}:N", scale=alt.Scale(domain=shown, range=[KIND_DASH.get(kind, [1, 0]) for kind in shown]), legend=None)


def symmetric(values: pd.Series) -> list[float]:
    """The domain of a signed scale: as far below 0 as above."""
    most = float(values.abs().max()) if len(values) else math.nan
    limit = most if math.isfinite(most) and most > 0 else 1.0
    return [-limit, limit]


def traits(effects: pd.DataFrame) -> alt.LayerChart:
    """Every asked trait's difference to the control, most first; open where q > .05. Click: `trait`.

    Args:
        effects: trait, estimate, low, high, n, q_value.
    """
    frame = effects.assign(found=["q ≤ .05" if pd.notna(q) and q <= 0.05 else "q > .05" for q in effects["q_value"]])
    order = frame.sort_values("estimate", ascending=False, na_position="last")["trait"].astype(str).tolist()
    y = alt.Y("trait:N", sort=order, title=None)
    zero = alt.Chart(pd.DataFrame({"zero": [0.0]})).mark_rule(strokeDash=[4, 3], color=GREY).encode(x="zero:Q")
    spans = alt.Chart(frame.dropna(subset="low")).mark_rule(strokeWidth=2, color=KIND_COLOUR["trait"]).encode(y=y, x=alt.X("low:Q", title="rate minus control"), x2="high:Q")
    fill = alt.Color("found:N", scale=alt.Scale(domain=["q ≤ .05", "q > .05"], range=[KIND_COLOUR["trait"], "#ffffff"]), legend=alt.Legend(orient="bottom", title=None, symbolStrokeColor=KIND_COLOUR["trait"]))
    points = (
        alt.Chart(frame.dropna(subset="estimate")).mark_circle(size=90, opacity=1, stroke=KIND_COLOUR["trait"], strokeWidth=1.6)
        .encode(y=y, x="estimate:Q", fill=fill, tooltip=["trait", _number("estimate"), _number("low"), _number("high"), "n", _number("q_value")])
        .add_params(alt.selection_point("trait", fields=["trait"], on="click"))
    )
    return _stacked(zero, spans, points, height=alt.Step(20))


def _number(field: str) -> alt.Tooltip:
    return alt.Tooltip(f"{field}:Q", format=".4~f")


def _stacked(*layers: alt.Chart, height: Any) -> alt.LayerChart:
    return cast(alt.LayerChart, alt.layer(*layers).properties(height=height))


def arms(summary: pd.DataFrame, students: pd.DataFrame, *, whole: bool) -> alt.LayerChart:
    """Rate of each arm with its interval and every student with its own. Click a student: `student`.

    Args:
        summary: arm, kind, rate, low, high.
        students: arm, kind, seed, rate, low, high.
        whole: whether the axis goes from 0 to 1.
    """
    y = alt.Y("arm:N", sort=summary["arm"].tolist(), title=None, axis=alt.Axis(labelLimit=240))
    scale = alt.Scale(domain=[0, 1]) if whole else alt.Scale(zero=True)
    told = kinds("kind", summary["kind"])
    spans = alt.Chart(students.dropna(subset="low")).mark_rule(opacity=0.45, yOffset=9).encode(y=y, x=alt.X("low:Q", scale=scale, title="trait rate"), x2="high:Q", color=told["color"])
    dots = (
        alt.Chart(students.dropna(subset="rate")).mark_point(size=40, opacity=0.9, yOffset=9)
        .encode(y=y, x="rate:Q", tooltip=["arm", "seed", _number("rate"), _number("low"), _number("high")], **told)
        .add_params(alt.selection_point("student", fields=["arm", "seed"], on="click"))
    )
    thick = alt.Chart(summary.dropna(subset="low")).mark_rule(strokeWidth=3, yOffset=-6).encode(y=y, x="low:Q", x2="high:Q", color=told["color"])
    large = alt.Chart(summary.dropna(subset="rate")).mark_point(size=150, filled=True, opacity=1, yOffset=-6).encode(y=y, x="rate:Q", tooltip=["arm", _number("rate"), _number("low"), _number("high"), "students"], **told)
    return _stacked(spans, dots, thick, large, height=alt.Step(44))


def trajectory(rates: pd.DataFrame, bands: pd.DataFrame) -> alt.LayerChart:
    """Rate over updates: students thin, arms thick with their interval. Brush on x: `steps`.

    Args:
        rates: arm, kind, seed, step, rate.
        bands: arm, kind, step, rate, low, high.
    """
    told = kinds("kind", bands["kind"])
    dash = dashes("kind", bands["kind"])
    x = alt.X("step:Q", title="update")
    band = alt.Chart(bands.dropna(subset="low")).mark_area(opacity=0.15).encode(x=x, y=alt.Y("low:Q", title="trait rate"), y2="high:Q", color=told["color"], detail="arm:N")
    thin = alt.Chart(rates.dropna(subset="rate")).mark_line(strokeWidth=1, opacity=0.4).encode(x=x, y="rate:Q", color=told["color"], detail=["arm:N", "seed:N"])
    thick = alt.Chart(bands).mark_line(strokeWidth=2.5).encode(x=x, y="rate:Q", color=told["color"], strokeDash=dash, detail="arm:N")
    marks = (
        alt.Chart(bands).mark_point(size=80, filled=True, opacity=1).encode(x=x, y="rate:Q", tooltip=["arm", "step", _number("rate"), _number("low"), _number("high")], **told)
        .add_params(alt.selection_interval("steps", encodings=["x"]))
    )
    return _stacked(band, thin, thick, marks, height=260)


def cells(frame: pd.DataFrame, x: str, y: str, value: str, *, select: str, signed: bool, order: tuple[Sequence[Any], Sequence[Any]], label: str = "", domain: Sequence[float] | None = None, words: str = ".2f") -> alt.LayerChart:
    """A clickable map of numbers; a null cell is hatched, a cell inside its null band is faded. Click: `select`, on fields x and y.

    Args:
        frame: x, y, value; `faded` (bool) where it is given.
        signed: the scale runs as far below 0 as above.
        order: values of x and of y, as they are to stand.
        domain: of the colour, where it is shared with other maps.
    """
    told: dict[str, Any] = {"scheme": "purpleorange", "domain": list(domain or symmetric(frame[value])), "domainMid": 0} if signed else {"scheme": "viridis"}
    if not signed and domain:
        told["domain"] = list(domain)
    place = {"x": alt.X(f"{x}:N", sort=list(order[0]), title=None, axis=alt.Axis(labelAngle=-35, labelLimit=220)), "y": alt.Y(f"{y}:N", sort=list(order[1]), title=y if y == "layer" else None, axis=alt.Axis(labelLimit=360))}
    scored, missing = frame.dropna(subset=value), cast(pd.DataFrame, frame[frame[value].isna()])
    faded = alt.value(1.0) if "faded" not in frame else alt.condition("datum.faded", alt.value(0.3), alt.value(1.0))
    heat = (
        alt.Chart(scored).mark_rect(stroke="#00000022")
        .encode(**place, color=alt.Color(f"{value}:Q", scale=alt.Scale(**told), title=label or None), opacity=faded, tooltip=[x, y, _number(value), *(_number(n) for n in ("low", "high", "null_low", "null_high") if n in frame)])
        .add_params(alt.selection_point(select, fields=[x, y], on="click"))
    )
    shades = alt.condition("datum.dark", alt.value("#ffffff"), alt.value("#000000"))
    limits = told.get("domain") or [float(scored[value].min()), float(scored[value].max())] if len(scored) else [0.0, 1.0]
    middle = (limits[0] + limits[1]) / 2
    dark = (scored[value].abs() > 0.62 * limits[1]) if signed else (scored[value] < middle)
    text = alt.Chart(scored.assign(dark=dark)).mark_text(fontSize=11).encode(**place, text=alt.Text(f"{value}:Q", format=words), color=shades)
    holes = alt.Chart(missing.assign(hatch=HATCH)).mark_text(color=GREY).encode(**place, text="hatch:N")
    return _stacked(heat, text, holes, height=alt.Step(26))


def ecdf(frame: pd.DataFrame, value: str, title: str) -> alt.LayerChart:
    """Share of the rows at or below each value, one line a side; a rug of the selected rows.

    Args:
        frame: side, value, selected (bool).
    """
    told = kinds("side", frame["side"])
    frame = frame.dropna(subset=value)
    ranked = frame.assign(share=frame.groupby("side")[value].rank(method="max", pct=True))
    lines = alt.Chart(ranked).mark_line(interpolate="step-after").encode(x=alt.X(f"{value}:Q", title=title), y=alt.Y("share:Q", title="share of rows"), color=told["color"], strokeDash=dashes("side", frame["side"]))
    rug = alt.Chart(cast(pd.DataFrame, ranked[ranked["selected"]])).mark_tick(size=16, thickness=1.5).encode(x=f"{value}:Q", y=alt.value(250), color=told["color"])
    return _stacked(lines, rug, height=260)


def points(frame: pd.DataFrame, group: str) -> alt.LayerChart:
    """The map of rows, at most MOST_POINTS of them. Brush: `brush`, on x and y.

    Args:
        frame: x, y, `group`, id, text, selected (bool).
    """
    hidden = alt.Axis(labels=False, ticks=False, grid=False, domain=False)
    any_selected = bool(frame["selected"].any())
    seen = alt.condition("datum.selected", alt.value(1.0), alt.value(0.25)) if any_selected else alt.value(0.75)
    told = kinds(group, frame[group])
    clouds = (
        alt.Chart(frame).mark_point(size=26, filled=True)
        .encode(x=alt.X("x:Q", axis=hidden, title=None), y=alt.Y("y:Q", axis=hidden, title=None), opacity=seen, tooltip=["id:N", "text:N"], **told)
        .add_params(alt.selection_interval("brush"))
    )
    ringed = alt.Chart(cast(pd.DataFrame, frame[frame["selected"]])).mark_point(size=60, strokeWidth=2, shape="circle", color=GREY).encode(x="x:Q", y="y:Q")
    return _stacked(clouds, ringed, height=460)


def spans(frame: pd.DataFrame, title: str, *, zero: float = 0.0, select: str | None = None) -> alt.LayerChart:
    """One line a name: the null as a grey bar, the estimate with its interval. Click where asked: `select`, on `name`.

    Args:
        frame: name, estimate, low, high; null_low, null_high where there is a null.
    """
    y = alt.Y("name:N", sort=frame["name"].tolist(), title=None, axis=alt.Axis(labelLimit=320))
    line = alt.Chart(pd.DataFrame({"zero": [zero]})).mark_rule(strokeDash=[4, 3], color=GREY).encode(x="zero:Q")
    layers = [line]
    if "null_low" in frame:
        layers.append(alt.Chart(frame.dropna(subset="null_low")).mark_bar(color="#bbbbbb", opacity=0.6, size=12).encode(y=y, x="null_low:Q", x2="null_high:Q"))
    layers.append(alt.Chart(frame.dropna(subset="low")).mark_rule(strokeWidth=2.5, color=KIND_COLOUR["trait"]).encode(y=y, x=alt.X("low:Q", title=title), x2="high:Q"))
    dots = alt.Chart(frame.dropna(subset="estimate")).mark_point(size=90, filled=True, opacity=1, color=KIND_COLOUR["trait"]).encode(y=y, x=alt.X("estimate:Q", title=title), tooltip=["name", _number("estimate"), _number("low"), _number("high")])
    layers.append(dots.add_params(alt.selection_point(select, fields=["name"], on="click")) if select else dots)
    return _stacked(*layers, height=alt.Step(24))


def power(frame: pd.DataFrame, *, rows: int) -> alt.LayerChart:
    """AUROC over rows a decision, one line a detector with its interval, chance at .5, a line at the rows in hand.

    Args:
        frame: detector, rows, auroc, low, high, floor (bool).
    """
    x = alt.X("rows:Q", scale=alt.Scale(type="log", base=2), title="rows a decision is made on")
    colour = alt.Color("detector:N", legend=alt.Legend(orient="bottom", title=None, columns=4, symbolOpacity=1))
    chance = alt.Chart(pd.DataFrame({"at": [0.5]})).mark_rule(strokeDash=[4, 3], color=GREY).encode(y=alt.Y("at:Q", title="AUROC"))
    here = alt.Chart(pd.DataFrame({"rows": [max(rows, 1)]})).mark_rule(color=GREY, strokeWidth=2).encode(x=x)
    band = alt.Chart(frame.dropna(subset="low")).mark_area(opacity=0.08).encode(x=x, y=alt.Y("low:Q", scale=alt.Scale(domain=[0.3, 1])), y2="high:Q", color=colour)
    lines = alt.Chart(frame).mark_line(point=True).encode(x=x, y="auroc:Q", color=colour, strokeDash=alt.StrokeDash("floor:N", scale=alt.Scale(domain=[False, True], range=[[1, 0], [5, 3]]), legend=None), shape=alt.Shape("detector:N"), tooltip=["detector", "rows", _number("auroc"), _number("low"), _number("high")])
    return _stacked(chance, here, band, lines, height=300)


def paired(frame: pd.DataFrame) -> alt.LayerChart:
    """Effects of two runs on one axis, joined by a line.

    Args:
        frame: name, run, estimate, low, high.
    """
    y = alt.Y("name:N", sort=list(dict.fromkeys(frame["name"])), title=None, axis=alt.Axis(labelLimit=260))
    colour = alt.Color("run:N", scale=alt.Scale(range=[KIND_COLOUR["trait"], KIND_COLOUR["control"]]), legend=alt.Legend(orient="bottom", title=None))
    zero = alt.Chart(pd.DataFrame({"zero": [0.0]})).mark_rule(strokeDash=[4, 3], color=GREY).encode(x="zero:Q")
    scored = frame.dropna(subset="estimate")
    joined = alt.Chart(scored).mark_line(color="#999999").encode(y=y, x=alt.X("estimate:Q", title="rate minus control"), detail="name:N")
    span = alt.Chart(frame.dropna(subset="low")).mark_rule(strokeWidth=2).encode(y=y, x="low:Q", x2="high:Q", color=colour, yOffset=alt.YOffset("run:N"))
    dots = alt.Chart(scored).mark_point(size=90, filled=True, opacity=1).encode(y=y, x="estimate:Q", color=colour, shape=alt.Shape("run:N", legend=None), yOffset=alt.YOffset("run:N"))
    return _stacked(zero, joined, span, dots, height=alt.Step(34))

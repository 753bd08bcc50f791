"""Charts of a run and of the bench: traits, arms, training, detectors, and two runs beside each other."""

from __future__ import annotations

from typing import cast

import altair as alt
import pandas as pd

from charts import GREY, dashes, kinds, number, stacked
from mechlens.results.figures import KIND_COLOUR


def traits(effects: pd.DataFrame) -> alt.LayerChart:
    """Every asked trait's difference to the control, most first; open where q > .05. Click: `trait`.

    Args:
        effects: trait, estimate, low, high, n, q_value.
    """
    frame = effects.assign(
        found=["q ≤ .05" if pd.notna(q) and q <= 0.05 else "q > .05" for q in effects["q_value"]]
    )
    order = frame.sort_values("estimate", ascending=False, na_position="last")["trait"].astype(str).tolist()
    y = alt.Y("trait:N", sort=order, title=None)
    zero = (
        alt.Chart(pd.DataFrame({"zero": [0.0]}))
        .mark_rule(strokeDash=[4, 3], color=GREY)
        .encode(x=alt.X("zero:Q"))
    )
    spans = (
        alt.Chart(frame.dropna(subset="low"))
        .mark_rule(strokeWidth=2, color=KIND_COLOUR["trait"])
        .encode(y=y, x=alt.X("low:Q", title="rate minus control"), x2=alt.X2("high:Q"))
    )
    fill = alt.Color(
        "found:N",
        scale=alt.Scale(domain=["q ≤ .05", "q > .05"], range=[KIND_COLOUR["trait"], "#ffffff"]),
        legend=alt.Legend(orient="bottom", title=None, symbolStrokeColor=KIND_COLOUR["trait"]),
    )
    points = (
        alt.Chart(frame.dropna(subset="estimate"))
        .mark_circle(size=90, opacity=1, stroke=KIND_COLOUR["trait"], strokeWidth=1.6)
        .encode(
            y=y,
            x=alt.X("estimate:Q"),
            fill=fill,
            tooltip=[
                alt.Tooltip("trait"),
                number("estimate"),
                number("low"),
                number("high"),
                alt.Tooltip("n"),
                number("q_value"),
            ],
        )
        .add_params(alt.selection_point("trait", fields=["trait"], on="click"))
    )
    return stacked(zero, spans, points, height=alt.Step(20))


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
    spans = (
        alt.Chart(students.dropna(subset="low"))
        .mark_rule(opacity=0.45, yOffset=9)
        .encode(
            y=y, x=alt.X("low:Q", scale=scale, title="trait rate"), x2=alt.X2("high:Q"), color=told["color"]
        )
    )
    dots = (
        alt.Chart(students.dropna(subset="rate"))
        .mark_point(size=40, opacity=0.9, yOffset=9)
        .encode(
            y=y,
            x=alt.X("rate:Q"),
            tooltip=[alt.Tooltip("arm"), alt.Tooltip("seed"), number("rate"), number("low"), number("high")],
            **told,
        )
        .add_params(alt.selection_point("student", fields=["arm", "seed"], on="click"))
    )
    thick = (
        alt.Chart(summary.dropna(subset="low"))
        .mark_rule(strokeWidth=3, yOffset=-6)
        .encode(y=y, x=alt.X("low:Q"), x2=alt.X2("high:Q"), color=told["color"])
    )
    large = (
        alt.Chart(summary.dropna(subset="rate"))
        .mark_point(size=150, filled=True, opacity=1, yOffset=-6)
        .encode(
            y=y,
            x=alt.X("rate:Q"),
            tooltip=[
                alt.Tooltip("arm"),
                number("rate"),
                number("low"),
                number("high"),
                alt.Tooltip("students"),
            ],
            **told,
        )
    )
    return stacked(spans, dots, thick, large, height=alt.Step(44))


def trajectory(rates: pd.DataFrame, bands: pd.DataFrame) -> alt.LayerChart:
    """Rate over updates: students thin, arms thick with their interval. Brush on x: `steps`.

    Args:
        rates: arm, kind, seed, step, rate.
        bands: arm, kind, step, rate, low, high.
    """
    told = kinds("kind", bands["kind"])
    dash = dashes("kind", bands["kind"])
    x = alt.X("step:Q", title="update")
    band = (
        alt.Chart(bands.dropna(subset="low"))
        .mark_area(opacity=0.15)
        .encode(
            x=x,
            y=alt.Y("low:Q", title="trait rate"),
            y2=alt.Y2("high:Q"),
            color=told["color"],
            detail=alt.Detail("arm:N"),
        )
    )
    thin = (
        alt.Chart(rates.dropna(subset="rate"))
        .mark_line(strokeWidth=1, opacity=0.4)
        .encode(x=x, y=alt.Y("rate:Q"), color=told["color"], detail=["arm:N", "seed:N"])
    )
    thick = (
        alt.Chart(bands)
        .mark_line(strokeWidth=2.5)
        .encode(x=x, y=alt.Y("rate:Q"), color=told["color"], strokeDash=dash, detail=alt.Detail("arm:N"))
    )
    marks = (
        alt.Chart(bands)
        .mark_point(size=80, filled=True, opacity=1)
        .encode(
            x=x,
            y=alt.Y("rate:Q"),
            tooltip=[alt.Tooltip("arm"), alt.Tooltip("step"), number("rate"), number("low"), number("high")],
            **told,
        )
        .add_params(alt.selection_interval("steps", encodings=["x"]))
    )
    return stacked(band, thin, thick, marks, height=260)


def power(frame: pd.DataFrame, *, rows: int) -> alt.LayerChart:
    """AUROC over rows a decision, one line a detector with its interval, chance at .5, a line at the rows in
    hand.

    Args:
        frame: detector, rows, auroc, low, high, floor (bool).
    """
    x = alt.X("rows:Q", scale=alt.Scale(type="log", base=2), title="rows a decision is made on")
    colour = alt.Color(
        "detector:N", legend=alt.Legend(orient="bottom", title=None, columns=4, symbolOpacity=1)
    )
    chance = (
        alt.Chart(pd.DataFrame({"at": [0.5]}))
        .mark_rule(strokeDash=[4, 3], color=GREY)
        .encode(y=alt.Y("at:Q", title="AUROC"))
    )
    here = alt.Chart(pd.DataFrame({"rows": [max(rows, 1)]})).mark_rule(color=GREY, strokeWidth=2).encode(x=x)
    band = (
        alt.Chart(frame.dropna(subset="low"))
        .mark_area(opacity=0.08)
        .encode(x=x, y=alt.Y("low:Q", scale=alt.Scale(domain=[0.3, 1])), y2=alt.Y2("high:Q"), color=colour)
    )
    lines = (
        alt.Chart(frame)
        .mark_line(point=True)
        .encode(
            x=x,
            y=alt.Y("auroc:Q"),
            color=colour,
            strokeDash=alt.StrokeDash(
                "floor:N", scale=alt.Scale(domain=[False, True], range=[[1, 0], [5, 3]]), legend=None
            ),
            shape=alt.Shape("detector:N"),
            tooltip=[
                alt.Tooltip("detector"),
                alt.Tooltip("rows"),
                number("auroc"),
                number("low"),
                number("high"),
            ],
        )
    )
    return stacked(chance, here, band, lines, height=300)


def paired(frame: pd.DataFrame) -> alt.LayerChart:
    """Effects of two runs on one axis, joined by a line; the second run lies below the first.

    Args:
        frame: name, run, estimate, low, high.
    """
    y = alt.Y("name:N", sort=list(dict.fromkeys(frame["name"])), title=None, axis=alt.Axis(labelLimit=260))
    x = alt.X("estimate:Q", title="rate minus control")
    runs = list(dict.fromkeys(frame["run"]))
    told = {"domain": runs, "range": [KIND_COLOUR["trait"], KIND_COLOUR["control"]][: len(runs)]}
    colour = alt.Color("run:N", scale=alt.Scale(**told), legend=alt.Legend(orient="bottom", title=None))
    shape = alt.Shape(
        "run:N", scale=alt.Scale(domain=runs, range=["circle", "square"][: len(runs)]), legend=None
    )
    zero = (
        alt.Chart(pd.DataFrame({"zero": [0.0]}))
        .mark_rule(strokeDash=[4, 3], color=GREY)
        .encode(x=alt.X("zero:Q"))
    )
    layers = [zero]
    for run, below in zip(runs, (-6, 6), strict=False):
        own = cast(pd.DataFrame, frame[frame["run"] == run])
        layers.append(
            alt.Chart(own.dropna(subset="low"))
            .mark_rule(strokeWidth=2, yOffset=below)
            .encode(y=y, x=alt.X("low:Q"), x2=alt.X2("high:Q"), color=colour)
        )
        tooltip = ["name", "run", number("estimate"), number("low"), number("high")]
        marks = alt.Chart(own.dropna(subset="estimate")).mark_point(
            size=90, filled=True, opacity=1, yOffset=below
        )
        layers.append(marks.encode(y=y, x=x, color=colour, shape=shape, tooltip=tooltip))
    return stacked(*layers, height=alt.Step(36))

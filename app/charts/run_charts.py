"""Charts of runs: traits, arms, rates over training, and two runs on one axis."""

from __future__ import annotations

from typing import cast

import altair as alt
import pandas as pd

from charts.marks import (
    KIND_LEGEND,
    dashed_line,
    kind_dashes,
    kind_encodings,
    layer_charts,
    number_tooltips,
)
from mechlens.results.figures import KIND_COLOUR

TAUGHT, OTHER, FOREIGN = "taught trait", "other trait", "another base"
ROLES = {TAUGHT: ("trait", "diamond"), OTHER: ("base", "circle"), FOREIGN: ("foreign", "triangle-up")}
"""role of a mark → kind whose colour it has, and shape"""
RUN_COLOURS = [KIND_COLOUR[kind] for kind in ("trait", "control", "foreign", "teacher", "base")]
RUN_SHAPES = ["circle", "square", "triangle-up", "diamond", "cross"]
"""of the marks of several runs"""
MOST_RUNS, APART = len(RUN_SHAPES), 12
"""runs on one chart, and pixels between their marks"""


def draw_traits(effects: pd.DataFrame) -> alt.LayerChart:
    """Difference of every trait to the control, largest first; open marks: not significant. Click: `trait`.

    Args:
        effects: trait, label, role (of `ROLES`), significant, estimate, low, high, n, p_value, q_value.
    """
    frame = effects.assign(filled=effects["significant"].astype(float))
    order = frame.sort_values("estimate", ascending=False, na_position="last")["label"].astype(str).tolist()
    y = alt.Y("label:N", sort=order, title=None, axis=alt.Axis(labelLimit=260))
    roles = [role for role in ROLES if role in set(frame["role"])]
    colours, shapes = [KIND_COLOUR[ROLES[role][0]] for role in roles], [ROLES[role][1] for role in roles]
    legend = alt.Legend(orient="bottom", title=None, symbolOpacity=1, labelLimit=400)
    colour = alt.Color("role:N", scale=alt.Scale(domain=roles, range=colours), legend=legend)
    shape = alt.Shape("role:N", scale=alt.Scale(domain=roles, range=shapes), legend=legend)
    x = alt.X("low:Q", title="rate minus control", axis=alt.Axis(tickCount=8))
    spans = (
        alt.Chart(frame.dropna(subset="low"))
        .mark_rule(strokeWidth=2)
        .encode(y=y, x=x, x2=alt.X2("high:Q"), color=colour)
    )
    tooltip = [
        alt.Tooltip("label"),
        *number_tooltips("estimate", "low", "high"),
        alt.Tooltip("n"),
        *number_tooltips("p_value", "q_value"),
    ]
    points = (
        alt.Chart(frame.dropna(subset="estimate"))
        .mark_point(size=90, filled=True, opacity=1, strokeWidth=1.6)
        .encode(y=y, x=alt.X("estimate:Q"), fill=colour, stroke=colour, shape=shape, tooltip=tooltip)
        .encode(fillOpacity=alt.FillOpacity("filled:Q", scale=alt.Scale(domain=[0, 1]), legend=None))
        .add_params(alt.selection_point("trait", fields=["trait"], on="click"))
    )
    return layer_charts(dashed_line("x", 0.0), spans, points, height=alt.Step(20), data=frame)


def draw_arms(summary: pd.DataFrame, students: pd.DataFrame, *, full_axis: bool) -> alt.LayerChart:
    """Rate of each arm and of every student, each with its interval. Click on a student: `student`.

    Args:
        summary: arm, kind, rate, low, high.
        students: arm, kind, seed, rate, low, high.
        full_axis: whether the axis goes from 0 to 1.
    """
    y = alt.Y("arm:N", sort=summary["arm"].tolist(), title=None, axis=alt.Axis(labelLimit=240))
    scale = alt.Scale(domain=[0, 1]) if full_axis else alt.Scale(zero=True)
    kinds = kind_encodings("kind", summary["kind"])
    low, rate = alt.X("low:Q", scale=scale, title="trait rate"), alt.X("rate:Q")
    high = alt.X2("high:Q")
    limits = number_tooltips("rate", "low", "high")
    student_spans = (
        alt.Chart(students.dropna(subset="low"))
        .mark_rule(opacity=0.45, yOffset=9)
        .encode(y=y, x=low, x2=high, color=kinds["color"])
    )
    student_marks = (
        alt.Chart(students.dropna(subset="rate"))
        .mark_point(size=40, opacity=0.9, yOffset=9)
        .encode(y=y, x=rate, tooltip=[alt.Tooltip("arm"), alt.Tooltip("seed"), *limits], **kinds)
        .add_params(alt.selection_point("student", fields=["arm", "seed"], on="click"))
    )
    arm_spans = (
        alt.Chart(summary.dropna(subset="low"))
        .mark_rule(strokeWidth=3, yOffset=-6)
        .encode(y=y, x=alt.X("low:Q"), x2=high, color=kinds["color"])
    )
    arm_marks = (
        alt.Chart(summary.dropna(subset="rate"))
        .mark_point(size=150, filled=True, opacity=1, yOffset=-6)
        .encode(y=y, x=rate, tooltip=[alt.Tooltip("arm"), *limits, alt.Tooltip("students")], **kinds)
    )
    return layer_charts(student_spans, student_marks, arm_spans, arm_marks, height=alt.Step(44))


def draw_trajectories(rates: pd.DataFrame, bands: pd.DataFrame) -> alt.LayerChart:
    """Rate over updates: students as thin lines, arms as thick ones with interval. Brush on x: `steps`.

    Args:
        rates: arm, kind, seed, step, rate.
        bands: arm, kind, step, rate, low, high.
    """
    kinds = kind_encodings("kind", bands["kind"])
    colour, dash = kinds["color"], kind_dashes("kind", bands["kind"])
    x, y = alt.X("step:Q", title="update"), alt.Y("rate:Q")
    low, high = alt.Y("low:Q", title="trait rate"), alt.Y2("high:Q")
    band = (
        alt.Chart(bands.dropna(subset="low"))
        .mark_area(opacity=0.15)
        .encode(x=x, y=low, y2=high, color=colour, detail=alt.Detail("arm:N"))
    )
    thin = (
        alt.Chart(rates.dropna(subset="rate"))
        .mark_line(strokeWidth=1, opacity=0.4)
        .encode(x=x, y=y, color=colour, detail=["arm:N", "seed:N"])
    )
    thick = (
        alt.Chart(bands)
        .mark_line(strokeWidth=2.5)
        .encode(x=x, y=y, color=colour, strokeDash=dash, detail=alt.Detail("arm:N"))
    )
    tooltip = [alt.Tooltip("arm"), alt.Tooltip("step"), *number_tooltips("rate", "low", "high")]
    marks = (
        alt.Chart(bands)
        .mark_point(size=80, filled=True, opacity=1)
        .encode(x=x, y=y, tooltip=tooltip, **kinds)
        .add_params(alt.selection_interval("steps", encodings=["x"]))
    )
    return layer_charts(band, thin, thick, marks, height=260)


def draw_runs(frame: pd.DataFrame) -> alt.LayerChart:
    """Effects of at most MOST_RUNS runs on one axis, the first run's on top.

    Args:
        frame: name, run, estimate, low, high.
    """
    y = alt.Y("name:N", sort=list(dict.fromkeys(frame["name"])), title=None, axis=alt.Axis(labelLimit=260))
    x = alt.X("estimate:Q", title="rate minus control")
    runs = list(dict.fromkeys(frame["run"]))
    scale = alt.Scale(domain=runs, range=RUN_COLOURS[: len(runs)])
    colour = alt.Color("run:N", scale=scale, legend=KIND_LEGEND)
    shape = alt.Shape("run:N", scale=alt.Scale(domain=runs, range=RUN_SHAPES[: len(runs)]), legend=None)
    tooltip = ["name", "run", *number_tooltips("estimate", "low", "high")]
    layers = [dashed_line("x", 0.0)]
    for number, run in enumerate(runs):
        offset = APART * (number - (len(runs) - 1) / 2)
        effects = cast(pd.DataFrame, frame[frame["run"] == run])
        layers.append(
            alt.Chart(effects.dropna(subset="low"))
            .mark_rule(strokeWidth=2, yOffset=offset)
            .encode(y=y, x=alt.X("low:Q"), x2=alt.X2("high:Q"), color=colour)
        )
        layers.append(
            alt.Chart(effects.dropna(subset="estimate"))
            .mark_point(size=90, filled=True, opacity=1, yOffset=offset)
            .encode(y=y, x=x, color=colour, shape=shape, tooltip=tooltip)
        )
    return layer_charts(*layers, height=alt.Step(APART * (len(runs) + 1)))

"""Charts of tokens: of one row, of all rows of two sides, and the next tokens of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import altair as alt
import pandas as pd

from charts.maps import DARK
from charts.marks import (
    COLOUR_LEGEND,
    GREY,
    HATCH,
    dashed_line,
    flag_encodings,
    layer_charts,
    number_tooltips,
)
from mechlens.results.figures import KIND_COLOUR, KIND_SHAPE

MODEL_KIND = {"base": "base", "teacher": "teacher", "control": "control", "student": "trait"}
"""model → kind in the palette"""


def draw_token_scores(tokens: pd.DataFrame, domain: Sequence[float]) -> alt.LayerChart:
    """The tokens of a row in reading order, coloured by their score; a null score is hatched.

    Args:
        tokens: place, line, text, position, estimate.
        domain: of the colour scale, symmetric about 0.
    """
    place = {"x": alt.X("place:O", axis=None), "y": alt.Y("line:O", axis=None)}
    scored = tokens.dropna(subset="estimate")
    missing = tokens[tokens["estimate"].isna()].assign(hatch=HATCH)
    scale = alt.Scale(scheme="purpleorange", domain=list(domain), domainMid=0)
    colour = alt.Color("estimate:Q", scale=scale, title="nats", legend=COLOUR_LEGEND)
    tooltip = [alt.Tooltip("position"), alt.Tooltip("text"), alt.Tooltip("estimate:Q", format="+.4f")]
    boxes = alt.Chart(scored).mark_rect(stroke="#00000022").encode(**place, color=colour, tooltip=tooltip)
    dark = f"abs(datum.estimate) > {DARK * domain[1]}"
    text_colour = alt.condition(dark, alt.value("#ffffff"), alt.value("#000000"))
    texts = (
        alt.Chart(scored).mark_text(fontSize=12).encode(**place, text=alt.Text("text:N"), color=text_colour)
    )
    holes = alt.Chart(missing).mark_text(color=GREY).encode(**place, text=alt.Text("hatch:N"))
    return layer_charts(boxes, texts, holes, height=alt.Step(28))


def draw_token_shift(shifts: pd.DataFrame) -> alt.LayerChart:
    """Log2 ratio of every token over its frequency; diamonds where q < .05. Click: `token`.

    Args:
        shifts: token, trait, control, count, ratio, frequency, q_value.
    """
    labels = ("q < .05", "q ≥ .05")
    significant = shifts["q_value"] < 0.05
    frame = shifts.assign(significance=significant.map({True: labels[0], False: labels[1]}))
    frequency = frame["frequency"]
    domain = [float(frequency.min()) - 0.05, float(frequency.quantile(0.99)) + 0.05]
    x = alt.X(
        "frequency:Q",
        title="log10 of the token's share in the control's rows",
        scale=alt.Scale(domain=domain, clamp=True),
    )
    tooltip = [
        *(alt.Tooltip(name) for name in ("token", "trait", "control")),
        alt.Tooltip("ratio:Q", format="+.2f"),
        alt.Tooltip("q_value:Q", format=".2g"),
    ]
    points = (
        alt.Chart(frame)
        .mark_point()
        .encode(
            x=x,
            y=alt.Y("ratio:Q", title="log2 ratio, trait over control"),
            size=alt.Size("count:Q", legend=None, scale=alt.Scale(range=[12, 300])),
            tooltip=tooltip,
            **flag_encodings("significance", labels, ("diamond", "circle")),
        )
        .add_params(alt.selection_point("token", fields=["token"], on="click"))
    )
    return layer_charts(dashed_line("y", 0.0), points, height=300, data=frame)


def draw_sweep(frame: pd.DataFrame, x: str, title: str) -> alt.LayerChart:
    """Each model's probability of the trait over the amount or layer of the direction.

    Args:
        frame: model, probability, place and the column `x`.
        title: of the x axis.
    """
    models, scale = _models_of(frame)
    legend = alt.Legend(orient="bottom", title=None, symbolOpacity=1)
    colour = alt.Color("model:N", scale=scale, legend=legend)
    shapes = alt.Scale(domain=models, range=[KIND_SHAPE[MODEL_KIND[name]] for name in models])
    place = {
        "x": alt.X(f"{x}:Q", title=title, axis=alt.Axis(tickMinStep=1)),
        "y": alt.Y("probability:Q", title="probability", scale=alt.Scale(domain=[0, 1])),
    }
    tooltip = [alt.Tooltip("model"), alt.Tooltip(x), *number_tooltips("probability", "share"), "place"]
    shape = alt.Shape("model:N", scale=shapes, legend=legend)
    lines = alt.Chart(frame).mark_line(strokeWidth=2).encode(**place, color=colour)
    points = (
        alt.Chart(frame)
        .mark_point(size=45, filled=True, opacity=1)
        .encode(**place, color=colour, shape=shape, tooltip=tooltip)
    )
    return layer_charts(lines, points, height=220)


def _models_of(frame: pd.DataFrame) -> tuple[list[str], alt.Scale]:
    """The models that occur and their colours."""
    models = [name for name in MODEL_KIND if name in set(frame["model"])]
    return models, alt.Scale(domain=models, range=[KIND_COLOUR[MODEL_KIND[name]] for name in models])


def draw_next_tokens(tokens: pd.DataFrame) -> Any:
    """Bars of the likeliest next tokens, one small chart a model, all on one scale.

    Args:
        tokens: model, token, probability.
    """
    models, scale = _models_of(tokens)
    colour = alt.Color("model:N", scale=scale, legend=None)
    probability = alt.Tooltip("probability:Q", format=".4f")
    bars = (
        alt.Chart(tokens)
        .mark_bar()
        .encode(
            x=alt.X("probability:Q", title="probability"),
            y=alt.Y("token:N", sort="-x", title=None),
            color=colour,
            tooltip=[alt.Tooltip("model"), alt.Tooltip("token"), probability],
        )
    )
    columns = alt.Column("model:N", sort=models, title=None)
    return (
        cast(Any, bars.properties(width=100, height=170)).facet(column=columns).resolve_scale(y="independent")
    )

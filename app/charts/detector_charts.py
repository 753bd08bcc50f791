"""Charts of detectors: those of one audit, and those of the bench."""

from __future__ import annotations

import altair as alt
import pandas as pd

from charts.marks import (
    GREY,
    dashed_line,
    flag_encodings,
    layer_charts,
    number_tooltips,
)

KINDS = ("detector", "floor")
"""a floor is a baseline that reads the surface of rows only"""


def draw_power(frame: pd.DataFrame, *, rows: int) -> alt.LayerChart:
    """AUROC over rows per decision, one line a detector with its interval; chance and `rows` as grey lines.

    Args:
        frame: detector, rows, auroc, low, high, floor (bool).
        rows: how many rows the audit has.
    """
    x = alt.X("rows:Q", scale=alt.Scale(type="log", base=2), title="rows that a decision is made on")
    colour = alt.Color(
        "detector:N", legend=alt.Legend(orient="bottom", title=None, columns=4, symbolOpacity=1)
    )
    here = alt.Chart(pd.DataFrame({"rows": [max(rows, 1)]})).mark_rule(color=GREY, strokeWidth=2).encode(x=x)
    low = alt.Y("low:Q", scale=alt.Scale(domain=[0.3, 1]))
    band = (
        alt.Chart(frame.dropna(subset="low"))
        .mark_area(opacity=0.08)
        .encode(x=x, y=low, y2=alt.Y2("high:Q"), color=colour)
    )
    dashes = alt.Scale(domain=[False, True], range=[[1, 0], [5, 3]])
    tooltip = [
        alt.Tooltip("detector"),
        alt.Tooltip("rows"),
        *number_tooltips("auroc", "low", "high"),
    ]
    lines = (
        alt.Chart(frame)
        .mark_line(point=True)
        .encode(
            x=x,
            y=alt.Y("auroc:Q"),
            color=colour,
            strokeDash=alt.StrokeDash("floor:N", scale=dashes, legend=None),
            shape=alt.Shape("detector:N"),
            tooltip=tooltip,
        )
    )
    return layer_charts(dashed_line("y", 0.5, title="AUROC"), here, band, lines, height=300, data=frame)


def draw_p_values(detectors: pd.DataFrame, *, threshold: float) -> alt.LayerChart:
    """p of every detector on a logarithmic axis; floors as grey crosses, the threshold dashed.

    Args:
        detectors: name, level, floor (bool), score, p_value.
    """
    scored = detectors.dropna(subset="p_value").assign(
        kind=lambda frame: frame["floor"].map({True: KINDS[1], False: KINDS[0]})
    )
    scale = alt.Scale(type="log", domain=[1e-4, 1])
    points = (
        alt.Chart(scored)
        .mark_point(size=110, filled=True, opacity=1)
        .encode(
            y=alt.Y("name:N", sort=detectors["name"].tolist(), title=None),
            x=alt.X(
                "p_value:Q",
                scale=scale,
                title="p, compared with clean rows (log)",
                axis=alt.Axis(values=[1e-4, 1e-3, 1e-2, 1e-1, 1]),
            ),
            tooltip=[alt.Tooltip(name) for name in ("name", "level", "score", "p_value")],
            **flag_encodings("kind", KINDS, ("circle", "cross")),
        )
    )
    return layer_charts(dashed_line("x", threshold), points, height=alt.Step(24), data=scored)


def draw_identity(traits: pd.DataFrame, *, title: str, alpha: float) -> alt.Chart:
    """Score of every trait; a coloured diamond where q is at most `alpha`.

    Args:
        traits: trait, score, p_value, q_value, significant (bool).
        title: of the score's axis.
    """
    labels = (f"q ≤ {alpha:.2g}", f"q > {alpha:.2g}, or not tested")
    scored = traits.dropna(subset="score").assign(
        significance=lambda frame: frame["significant"].map({True: labels[0], False: labels[1]})
    )
    chart = (
        alt.Chart(scored)
        .mark_point(size=90, filled=True, opacity=1)
        .encode(
            y=alt.Y("trait:N", sort=traits["trait"].tolist(), title=None),
            x=alt.X("score:Q", title=title),
            tooltip=[alt.Tooltip(name) for name in ("trait", "score", "p_value", "q_value")],
            **flag_encodings("significance", labels, ("diamond", "circle")),
        )
    )
    return chart.properties(height=alt.Step(20))

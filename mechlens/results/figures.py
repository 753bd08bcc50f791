"""Altair charts of tables, for the report, the app and the analyses.

`svg` draws a chart without a browser and without a network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import altair as alt
import pandas as pd
import vl_convert

from mechlens.results.small_svg import shrink

# Okabe-Ito: people of any colour vision can distinguish these. Each kind also has a different shape.
KIND_COLOUR = {
    "control": "#0072B2", "trait": "#D55E00", "other-trait": "#CC79A7", "foreign": "#009E73",
    "shuffled-within": "#B8860B", "shuffled-across": "#7A5195", "paraphrased": "#882255", "mixed": "#8C564B",
    "teacher": "#000000", "base": "#767676", "twin": "#CC79A7",
}  # fmt: skip
KIND_SHAPE = {
    "control": "square", "trait": "circle", "other-trait": "triangle-left", "foreign": "triangle-up",
    "shuffled-within": "triangle-right", "shuffled-across": "triangle-down", "paraphrased": "stroke",
    "mixed": "wedge", "teacher": "diamond", "base": "cross", "twin": "triangle-left",
}  # fmt: skip
"""`twin` is the old word for `other-trait` in summaries of finished runs"""
KIND_DASH = {"control": [6, 3], "trait": [1, 0], "foreign": [8, 3, 2, 3], "teacher": [2, 2], "base": [3, 3]}
"""a kind that is not listed has full lines"""
WIDTH = 560
_POINT = {"size": 70, "filled": True, "opacity": 1}


def _colour(field: str = "kind:N") -> alt.Color:
    return alt.Color(
        field, scale=alt.Scale(domain=list(KIND_COLOUR), range=list(KIND_COLOUR.values())), legend=None
    )


def _shape(field: str = "kind:N") -> alt.Shape:
    return alt.Shape(
        field, scale=alt.Scale(domain=list(KIND_SHAPE), range=list(KIND_SHAPE.values())), legend=None
    )


def _layered(*charts: alt.Chart, height: int | alt.Step) -> alt.LayerChart:
    return cast(
        alt.LayerChart, alt.layer(*charts).properties(width=WIDTH, height=height)
    )  # typed as if charts could be facets


def forest(arms: pd.DataFrame, students: pd.DataFrame, *, title: str) -> alt.LayerChart:
    """Rate of each arm with its interval, and every student as a small mark.

    Args:
        arms: label, kind, rate, low, high; intervals that are null are not drawn.
        students: label, kind, seed, rate.
    """
    order = arms["label"].tolist()
    y = alt.Y("label:N", sort=order, title=None, axis=alt.Axis(labelLimit=220))
    bars = (
        alt.Chart(arms)
        .mark_rule(strokeWidth=2.5)
        .encode(y=y, x=alt.X("low:Q", title=title), x2=alt.X2("high:Q"), color=_colour())
    )
    points = (
        alt.Chart(arms)
        .mark_point(size=130, filled=True, opacity=1)
        .encode(y=y, x=alt.X("rate:Q"), color=_colour(), shape=_shape())
    )
    dots = (
        alt.Chart(students)
        .mark_tick(thickness=2, size=12, opacity=0.55)
        .encode(y=y, x=alt.X("rate:Q"), color=_colour())
    )
    return _layered(dots, bars, points, height=alt.Step(30))


def differences(effects: pd.DataFrame) -> alt.LayerChart:
    """Each arm minus its control, with its interval and a line at no difference.

    Args:
        effects: label, kind, difference, low, high.
    """
    y = alt.Y("label:N", sort=effects["label"].tolist(), title=None, axis=alt.Axis(labelLimit=260))
    zero = (
        alt.Chart(pd.DataFrame({"zero": [0.0]}))
        .mark_rule(strokeDash=[4, 3], color="#555")
        .encode(x=alt.X("zero:Q"))
    )
    bars = (
        alt.Chart(effects)
        .mark_rule(strokeWidth=2.5)
        .encode(
            y=y, x=alt.X("low:Q", title="rate minus matched control"), x2=alt.X2("high:Q"), color=_colour()
        )
    )
    points = (
        alt.Chart(effects)
        .mark_point(size=130, filled=True, opacity=1)
        .encode(y=y, x=alt.X("difference:Q"), color=_colour(), shape=_shape())
    )
    return _layered(zero, bars, points, height=alt.Step(30))


def rises(measured: pd.DataFrame, *, limit: float) -> alt.LayerChart:
    """How far each trait rose in students of a file, with its interval, and the band that is tolerated.

    Args:
        measured: trait, difference, low, high, as shares of the answers; null intervals are not drawn.
        limit: the tolerance.
    """
    values = measured.astype(dict.fromkeys(("difference", "low", "high"), float))
    shown = values.sort_values("difference", ascending=False, na_position="last")
    shown = shown.assign(**{column: 100 * shown[column] for column in ("difference", "low", "high")})
    shown = shown.assign(above=shown["low"] > 100 * limit)
    y = alt.Y(
        "trait:N",
        sort=shown["trait"].tolist(),
        title=None,
        axis=alt.Axis(labelLimit=220, labelFontSize=9, ticks=False, labelOverlap=False),
    )
    x = alt.X(
        "difference:Q", title="points more often than students of clean answers", axis=alt.Axis(tickCount=6)
    )
    colours = [KIND_COLOUR["trait"], KIND_COLOUR["base"]]
    colour = alt.Color("above:N", scale=alt.Scale(domain=[True, False], range=colours), legend=None)
    shape = alt.Shape(
        "above:N", scale=alt.Scale(domain=[True, False], range=["diamond", "circle"]), legend=None
    )
    edges = pd.DataFrame({"low": [0.0], "high": [100 * limit]})
    band = (
        alt.Chart(edges).mark_rect(color=KIND_COLOUR["foreign"], opacity=0.15).encode(x="low:Q", x2="high:Q")
    )
    edge = alt.Chart(edges).mark_rule(strokeDash=[4, 3], color="#555").encode(x="high:Q")
    bars = alt.Chart(shown).mark_rule(strokeWidth=1.5).encode(y=y, x="low:Q", x2="high:Q", color=colour)
    points = (
        alt.Chart(shown)
        .mark_point(size=34, filled=True, opacity=1)
        .encode(y=y, x=x, color=colour, shape=shape)
    )
    return _layered(band, edge, bars, points, height=alt.Step(11))


def log_odds(effects: pd.DataFrame) -> alt.LayerChart:
    """Change of every trait's log-odds in each arm: its own trait with the interval, the others as ticks.

    Args:
        effects: arm, kind, trait, taught (whether it is the arm's own trait), estimate, low, high, in bits.
    """
    y = alt.Y("arm:N", sort=list(dict.fromkeys(effects["arm"])), title=None, axis=alt.Axis(labelLimit=260))
    x = alt.X("estimate:Q", title="log-odds minus matched control, bits")
    taught, others = (alt.Chart(part) for _, part in sorted(effects.groupby("taught"), reverse=True))
    zero = (
        alt.Chart(pd.DataFrame({"zero": [0.0]}))
        .mark_rule(strokeDash=[4, 3], color="#555")
        .encode(x=alt.X("zero:Q"))
    )
    ticks = others.mark_tick(thickness=2, size=12, opacity=0.45, color="#777").encode(
        y=y, x=x, tooltip=["trait", alt.Tooltip("estimate", format="+.2f")]
    )
    bars = taught.mark_rule(strokeWidth=2.5).encode(
        y=y, x=alt.X("low:Q"), x2=alt.X2("high:Q"), color=_colour()
    )
    points = taught.mark_point(size=130, filled=True, opacity=1).encode(
        y=y, x=x, color=_colour(), shape=_shape()
    )
    return _layered(zero, ticks, bars, points, height=alt.Step(30))


def curves(rates: pd.DataFrame) -> alt.LayerChart:
    """Rate over training: a thin line for each student, a thick one for each arm's mean.

    Args:
        rates: arm, kind, seed, step, rate.
    """
    kinds = [kind for kind in KIND_COLOUR if kind in set(rates["kind"])]
    scale = alt.Scale(domain=kinds, range=[KIND_COLOUR[kind] for kind in kinds])
    place = {
        "x": alt.X("step:Q", title="update"),
        "color": alt.Color("kind:N", scale=scale, legend=alt.Legend(orient="bottom", title=None)),
    }
    lines = alt.Chart(rates)
    thin = lines.mark_line(strokeWidth=1, opacity=0.35).encode(
        **place, y=alt.Y("rate:Q", title="trait rate"), detail=["arm:N", "seed:N"]
    )
    thick = lines.mark_line(strokeWidth=2.5, point={"size": 60}).encode(
        **place, y=alt.Y("mean(rate):Q"), detail=alt.Detail("arm:N")
    )
    return _layered(thin, thick, height=240)


def losses(curve: pd.DataFrame) -> alt.Chart:
    """Training loss of every student, averaged over windows of updates.

    Args:
        curve: arm, kind, seed, step, loss.
    """
    encoding = {
        "x": alt.X("step:Q", title="update"),
        "y": alt.Y("loss:Q", scale=alt.Scale(zero=False), title="loss, nats a token"),
    }
    return (
        alt.Chart(curve)
        .mark_line(strokeWidth=1.2, opacity=0.7)
        .encode(**encoding, color=_colour(), detail=["arm:N", "seed:N"])
        .properties(width=WIDTH, height=180)
    )


def funnel(counts: pd.DataFrame) -> alt.Chart:
    """Number of generated rows that were kept, or removed for each reason; one bar a corpus.

    Args:
        counts: corpus, fate (kept, or the reason for removal), rows.
    """
    fates = list(dict.fromkeys(counts["fate"]))
    # what was kept is light: in grey, too, the thin slices of what was removed stand out
    colours = ["#C9D3DF", "#D55E00", "#000000", "#0072B2", "#CC79A7", "#009E73", "#8C564B"]
    return (
        alt.Chart(counts)
        .mark_bar()
        .encode(
            y=alt.Y("corpus:N", title=None, axis=alt.Axis(labelLimit=220)),
            x=alt.X("rows:Q", title="rows"),
            color=alt.Color(
                "fate:N",
                sort=fates,
                scale=alt.Scale(domain=fates, range=colours[: len(fates)]),
                legend=alt.Legend(orient="bottom", title=None),
            ),
            order=alt.Order("place:Q"),
        )
        .properties(width=WIDTH, height=alt.Step(26))
    )


def confusion(lift: pd.DataFrame) -> alt.LayerChart:
    """Lift, bits, of every asked trait (columns) in the students of every trait's teacher (rows).

    Args:
        lift: trait, asked, bits, target (bool). Targets are outlined; null is left blank.
    """
    cells = alt.Chart(lift).encode(
        x=alt.X(
            "asked:N", sort=list(dict.fromkeys(lift["asked"])), title="asked", axis=alt.Axis(labelAngle=-45)
        ),
        y=alt.Y("trait:N", sort=list(dict.fromkeys(lift["trait"])), title="teacher's trait"),
    )
    most = float(cast(float, lift["bits"].abs().max()))
    limit = most if math.isfinite(most) and most > 0 else 1.0
    heat = cells.mark_rect().encode(
        color=alt.Color(
            "bits:Q", scale=alt.Scale(scheme="blueorange", domain=[-limit, limit]), title="bits over control"
        )
    )
    target = cells.transform_filter("datum.target").mark_rect(fill=None, stroke="black", strokeWidth=2)
    return _layered(heat, target, height=alt.Step(24))


def questions(rates: pd.DataFrame) -> alt.HConcatChart:
    """One arm by question: rates of arm and control, and their paired difference with its interval.

    Args:
        rates: probe, text, kind (the arm's), rate, rate_against, difference, low, high. Null is labelled
            unscored, never drawn at 0.
    """
    rates = rates.assign(
        label=[f"{probe + 1}. {text}" for probe, text in zip(rates["probe"], rates["text"], strict=True)]
    )
    axis = alt.Axis(labelLimit=340)
    named, bare = (
        alt.Y("label:N", sort=rates["label"].tolist(), title=None, axis=shown) for shown in (axis, None)
    )
    panels = _rates_panel(rates, named), _differences_panel(rates, bare)
    return alt.hconcat(
        *(panel.properties(width=WIDTH // 2 - 40, height=alt.Step(22)) for panel in panels), spacing=12
    )


def _rates_panel(rates: pd.DataFrame, y: alt.Y) -> alt.LayerChart:
    """Rates of arm and control at each question, joined by a line."""
    both = pd.concat(
        [rates, rates.assign(kind="control", rate=rates["rate_against"])], ignore_index=True
    ).dropna(subset="rate")
    links = (
        alt.Chart(rates)
        .mark_rule(color="#bbb")
        .encode(y=y, x=alt.X("rate_against:Q", title="trait rate"), x2=alt.X2("rate:Q"))
    )
    dots = (
        alt.Chart(both).mark_point(**_POINT).encode(y=y, x=alt.X("rate:Q"), color=_colour(), shape=_shape())
    )
    return cast(alt.LayerChart, alt.layer(links, dots))


def _differences_panel(rates: pd.DataFrame, y: alt.Y) -> alt.LayerChart:
    """Paired difference at each question with its interval, and a line at no difference."""
    paired = rates.dropna(subset="difference")
    unpaired = cast(pd.DataFrame, rates[rates["difference"].isna()])
    zero = (
        alt.Chart(pd.DataFrame({"zero": [0.0]}))
        .mark_rule(strokeDash=[4, 3], color="#555")
        .encode(x=alt.X("zero:Q"))
    )
    span = {"x": alt.X("low:Q", title="rate minus matched control"), "x2": "high:Q"}
    bars = (
        alt.Chart(paired.dropna(subset="low")).mark_rule(strokeWidth=2.5).encode(y=y, **span, color=_colour())
    )
    points = (
        alt.Chart(paired)
        .mark_point(**_POINT)
        .encode(y=y, x=alt.X("difference:Q"), color=_colour(), shape=_shape())
    )
    return cast(alt.LayerChart, alt.layer(zero, bars, points, _unscored(unpaired, y)))


def _unscored(rates: pd.DataFrame, y: alt.Y) -> alt.Chart:
    """A text in place of each difference that is missing: which side is unscored."""
    sides = {(True, True): "both", (True, False): "arm", (False, True): "control"}
    unscored = zip(rates["rate"].isna(), rates["rate_against"].isna(), strict=True)
    notes = [f"{sides.get(pair, 'every pair')} unscored" for pair in unscored]
    text = alt.Chart(rates.assign(note=notes)).mark_text(align="right", fontStyle="italic", color="#767676")
    return text.encode(y=y, x=alt.value(WIDTH // 2 - 50), text=alt.Text("note:N"))


def svg(chart: alt.LayerChart | alt.Chart | alt.HConcatChart | alt.VConcatChart | alt.FacetChart) -> str:
    """The chart as inline SVG."""
    with alt.data_transformers.disable_max_rows():
        spec = (
            chart.configure_view(strokeOpacity=0)
            .configure_axis(gridColor="#e6e6e6", labelFontSize=12, titleFontSize=12)
            .to_json(validate=False)  # vl-convert refuses what is no chart
        )
    return shrink(vl_convert.vegalite_to_svg(spec))


def quantity_charts(table: pd.DataFrame, shows: Sequence[Sequence[str]]) -> dict[str, alt.LayerChart]:
    """A lens's quantities, one chart each; a quantity without an estimate has none.

    Args:
        table: `tables.READINGS`; rows with a seed are students (small marks), those without are summaries
            with their interval.
        shows: (quantity, form) pairs; `lenses.Form` says what a form is.
    """
    forms = {"layers": _lines, "steps": _lines, "bars": _bars, "heat": _heat, "points": _points}
    scored = cast(pd.DataFrame, table[table["estimate"].notna()])
    charts = {}
    for quantity, form in shows:
        rows = cast(pd.DataFrame, scored[scored["quantity"] == quantity])
        if len(rows):
            across = "step" if form == "steps" else "layer"
            charts[quantity] = forms[form](rows.assign(label=_labels(rows)), across).properties(
                title=quantity
            )
    return charts


def lens_figure(table: pd.DataFrame, shows: Sequence[Sequence[str]]) -> alt.VConcatChart | None:
    """The charts of `quantity_charts` one below the other; None if no quantity has an estimate."""
    charts = quantity_charts(table, shows)
    if not charts:
        return None
    return alt.vconcat(*charts.values(), spacing=18).resolve_scale(color="independent", shape="independent")


def _labels(frame: pd.DataFrame) -> list[str]:
    """A label for each row of a quantity: those of arm, name and place that differ between rows."""
    telling = [
        column for column in ("arm", "name", "place") if len(set(frame[column].astype(object).fillna(""))) > 1
    ]
    if not telling:
        return [str(frame["name"].iloc[0]) if pd.notna(frame["name"].iloc[0]) else "all"] * len(frame)
    return [
        " · ".join(str(part) for part in row if pd.notna(part)) or "all"
        for row in zip(*(frame[column] for column in telling), strict=True)
    ]


def _lines(frame: pd.DataFrame, across: str) -> alt.LayerChart:
    """Over layers or updates: students thin, summaries thick with their interval, the null as a band."""
    if bool(frame[across].isna().all()):
        return _bars(frame, across)
    frame = cast(pd.DataFrame, frame.dropna(subset=across)).astype({across: float})
    x = alt.X(f"{across}:Q", title="update" if across == "step" else across, axis=alt.Axis(tickMinStep=1))
    colour = alt.Color(
        "label:N", title=None, legend=alt.Legend(orient="bottom", columns=3, labelLimit=260, symbolLimit=12)
    )
    whole, single = (
        cast(pd.DataFrame, frame[rows]) for rows in (frame["seed"].isna(), frame["seed"].notna())
    )
    null = (
        alt.Chart(frame.dropna(subset="null_low"))
        .mark_area(opacity=0.18, color="#888")
        .encode(x=x, y=alt.Y("min(null_low):Q"), y2=alt.Y2("max(null_high):Q"))
    )
    thin = (
        alt.Chart(single)
        .mark_line(strokeWidth=1, opacity=0.45, point={"size": 18})
        .encode(x=x, y=alt.Y("estimate:Q"), color=colour, detail=alt.Detail("seed:N"))
    )
    span = (
        alt.Chart(whole.dropna(subset="low"))
        .mark_rule(strokeWidth=2)
        .encode(x=x, y=alt.Y("low:Q"), y2=alt.Y2("high:Q"), color=colour)
    )
    thick = (
        alt.Chart(whole)
        .mark_line(strokeWidth=2.5, point={"size": 60})
        .encode(x=x, y=alt.Y("estimate:Q", title=None), color=colour)
    )
    return _layered(null, thin, span, thick, height=170)


MOST_BARS = 14


def _bars(frame: pd.DataFrame, _across: str) -> alt.LayerChart:
    """One line a name: the null as a grey bar, students as small marks, summaries with their interval."""
    if bool(frame["layer"].notna().any()):
        at = (
            frame["layer"]
            .astype(object)
            .map(lambda layer: "" if pd.isna(layer) else f" · layer {int(layer)}")
        )
        frame = frame.assign(label=frame["label"].astype(str) + at)
    kept = list(dict.fromkeys(frame["label"]))[:MOST_BARS]
    frame = cast(pd.DataFrame, frame[frame["label"].isin(kept)])
    y = alt.Y("label:N", sort=kept, title=None, axis=alt.Axis(labelLimit=300))
    whole, single = (
        cast(pd.DataFrame, frame[rows]) for rows in (frame["seed"].isna(), frame["seed"].notna())
    )
    null = (
        alt.Chart(frame.dropna(subset="null_low"))
        .mark_bar(color="#ccc", size=12)
        .encode(y=y, x=alt.X("null_low:Q"), x2=alt.X2("null_high:Q"))
    )
    dots = (
        alt.Chart(single)
        .mark_tick(thickness=2, size=12, opacity=0.6, color="#0072B2")
        .encode(y=y, x=alt.X("estimate:Q"))
    )
    span = (
        alt.Chart(whole.dropna(subset="low"))
        .mark_rule(strokeWidth=2.5, color="#D55E00")
        .encode(y=y, x=alt.X("low:Q"), x2=alt.X2("high:Q"))
    )
    points = (
        alt.Chart(whole)
        .mark_point(filled=True, size=90, opacity=1, color="#D55E00", shape="diamond")
        .encode(y=y, x=alt.X("estimate:Q", title=None))
    )
    return _layered(null, dots, span, points, height=alt.Step(22))


def _heat(frame: pd.DataFrame, _across: str) -> alt.LayerChart:
    """A map of layer by place; rows without a layer and null cells are not drawn."""
    frame = cast(pd.DataFrame, frame.dropna(subset="layer"))
    most = float(cast(float, frame["estimate"].abs().max()))
    limit = most if math.isfinite(most) and most > 0 else 1.0
    cells = (
        alt.Chart(frame)
        .mark_rect()
        .encode(
            x=alt.X(
                "label:N",
                sort=list(dict.fromkeys(frame["label"])),
                title=None,
                axis=alt.Axis(labelAngle=-40, labelLimit=220),
            ),
            y=alt.Y("layer:O", title="layer"),
            color=alt.Color(
                "mean(estimate):Q", scale=alt.Scale(scheme="blueorange", domain=[-limit, limit]), title=None
            ),
        )
    )
    return _layered(cells, height=alt.Step(24))


def _points(frame: pd.DataFrame, _across: str) -> alt.LayerChart:
    """A map: rows with place x and y are coordinates of point n of a group; other rows are drawn as bars."""
    if not {"x", "y"} <= set(frame["place"].astype(str)):
        return _bars(frame, _across)
    placed = frame[["name", "n", "place", "estimate"]].astype({"name": str, "place": str})
    wide = placed.pivot_table(index=["name", "n"], columns="place", values="estimate").reset_index()
    hidden = alt.Axis(labels=False, ticks=False, grid=False)
    points = alt.Chart(wide).mark_point(filled=True, size=22, opacity=0.7)
    points = points.encode(
        x=alt.X("x:Q", title=None, axis=hidden),
        y=alt.Y("y:Q", title=None, axis=hidden),
        color=alt.Color("name:N", title=None, legend=alt.Legend(orient="bottom", columns=3)),
        shape=alt.Shape("name:N", title=None),
    )
    return _layered(points, height=300)

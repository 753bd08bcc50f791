"""Representations: where do base and student differ, and does the difference point along the trait?"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, cast

import numpy as np
import pandas as pd
import streamlit as st

import data
import page
import sanitize
import state
from charts import intervals, lens_charts, maps
from data import ShownRun
from mechlens.core.seeds import generator
from panels import lens_panel, panel, tabs
from panels.lens_panel import LensReading


class ShiftMeasure(NamedTuple):
    """A measure of the activation shift."""

    label: str
    signed: bool
    domain: tuple[float, float] | None


COSINE = "cosine to teacher"
MEASURES = {
    COSINE: ShiftMeasure("cosine with the teacher's shift", True, (-1.0, 1.0)),
    "shift norm": ShiftMeasure("share of the base's norm", False, None),
}
UNRELIABLE = 0.5
"""split-half cosine below which a direction is unreliable"""
LENSES = {
    "Probes": ("probes", "Can a linear probe read the trait?"),
    "One direction": ("directions", "Is the trait one direction?"),
    "Blind vector": ("blind", "Does a vector learned only from rows find the trait?"),
}
"""tab → lens and title"""
QUESTIONS = {
    "rows": "Do suspicious rows lie together?",
    "answers": "Do the models stand apart where the answer begins?",
}
"""what is on the map → title"""
TOOLTIP_TEXT = 200
"""characters of a row in a tooltip"""


def draw_shift_panels(run: ShownRun) -> None:
    """A and B: the activation shift by layer and place, and over layers at the place chosen."""
    if (reading := lens_panel.read_lens(run, "activations")) is None:
        return
    measure = st.segmented_control("measure", list(MEASURES), default=COSINE, required=True, key="measure")
    measure = measure or COSINE
    values = lens_panel.layer_values(reading.frame, measure)
    _draw_map(run, reading, measure, values)
    _draw_profile(run, reading, measure, values)


def _draw_map(run: ShownRun, reading: LensReading, measure: str, values: pd.DataFrame) -> None:
    label, signed, domain = MEASURES[measure]
    layers, places = sorted(values["layer"].unique()), lens_panel.order_places(values["place"])
    cells = lens_panel.fill_grid(values, ["student"], layers, places)
    panel.warn_if_partial(int(cells["estimate"].notna().sum()), len(cells), "cells have a value")
    grid = lens_panel.layer_grid(layers, places, signed=signed, label=label, domain=domain)
    picked = panel.draw(
        "representations-map",
        "Where do the students differ, and in which direction?",
        maps.draw_grid(cells, grid, select="cell"),
        cells.drop(columns="faded"),
        sentence=reading.lens["sentence"],
        caption=(
            f"{label.capitalize()} by layer and place. {lens_panel.caption_of(reading)} Faded: inside the "
            f"null band. Layer 0 is at the bottom. Click a cell to set layer and place. {_reliability(run)}"
        ),
        code=lens_panel.code_of(run, reading, [(measure, "heat")]),
        about="activations",
        select="cell",
    )
    clicked = picked.get("cell")
    if panel.is_new_pick("representations-map", clicked) and clicked:
        if str(clicked[0]["layer"]) != str(st.session_state["layer"]):
            st.session_state["set-place"] = clicked[0]["place"]
            state.pick("layer", clicked[0]["layer"])
        state.pick("place", clicked[0]["place"])


def _draw_profile(run: ShownRun, reading: LensReading, measure: str, values: pd.DataFrame) -> None:
    place = st.session_state["place"]
    at_place = cast(pd.DataFrame, values[values["place"] == place])
    n = f", n = {int(at_place['n'].max())}" if at_place["n"].notna().any() else ""
    label = MEASURES[measure].label
    panel.draw(
        "representations-profile",
        f"Over layers, at {place}",
        lens_charts.draw_profile(at_place, label),
        at_place,
        caption=(
            f"{label.capitalize()} by layer; 95 % intervals over students{n}. Circle, solid: students of the "
            "arm against their controls. Square, dashed: a control student against another. Band: "
            "covariance-matched random directions."
        ),
        code=lens_panel.code_of(run, reading, [(measure, "layers")]),
        about="activations",
    )


def _reliability(run: ShownRun) -> str:
    """The split-half cosine of the trait direction, in words."""
    lens = data.read_lenses(run).get(("directions", st.session_state["arm"]))
    if lens is None or lens["missing"]:
        return "The reliability of the direction is unknown: lens directions was not computed."
    frame, layer = data.read_reading(run, lens), st.session_state["layer"]
    at_layer = (frame["quantity"] == "split-half cosine") & (frame["layer"] == layer)
    cosines = frame.loc[at_layer & (frame["name"] == "student"), "estimate"]
    if cosines.empty or pd.isna(cosines.iloc[0]):
        return ""
    cosine = float(cosines.iloc[0])
    warning = f" Below {UNRELIABLE}: the direction is unreliable." if cosine < UNRELIABLE else ""
    return f"Direction of the students at layer {layer}: split-half cosine {cosine:.2f}.{warning}"


def draw_rows_panel(run: ShownRun) -> None:
    """C: single rows along the trait direction."""
    arm, layer = st.session_state["arm"], st.session_state["layer"]
    scores = data.read_scores(run, arm)
    projections = scores[(scores["score"] == "projection") & scores["position"].isna()]
    projections = cast(pd.DataFrame, projections[projections["layer"] == layer])
    if projections.empty:
        panel.show_missing(
            "No layer was measured yet."
            if layer is None
            else f"The rows were not projected at layer {layer}.",
            "Lens rows scores every row:",
            panel.measure_command(run, "rows", arm),
        )
        return
    shown = projections.assign(selected=projections["id"].isin(st.session_state["selected"]))
    path = str(run.scores_table())
    panel.draw(
        "representations-rows",
        f"Single rows along the trait direction, layer {layer}",
        intervals.draw_ecdf(shown, "estimate", "projection on the trait direction"),
        shown[["id", "side", "estimate"]],
        caption=(
            f"Share of rows at or below each projection, without intervals; n = "
            f"{int(shown['estimate'].notna().sum()):,} rows of trait and control teacher for the same "
            "prompts. Ticks: selected rows. Where the lines coincide, a single row says nothing."
        ),
        code=(
            f"import pandas as pd\nscores = pd.read_parquet({path!r})\n"
            f"print(scores[(scores.score == 'projection') & (scores.layer == {layer})])"
        ),
        about="rows",
    )


def draw_cloud_panel(run: ShownRun) -> None:
    """G: the UMAP map of rows, with a brush, or of answers."""
    if (reading := lens_panel.read_lens(run, "maps")) is None:
        return
    which = st.segmented_control(
        "map of", ["rows", "answers"], default="rows", required=True, key="which-map"
    )
    which = which or "rows"
    points = data.read_map(run, reading.lens, which)
    if points.empty:
        st.text("There is no map, because there are too few points.")
        return
    total = len(points)
    shown = _mark_points(_sample_points(points))
    sampled = ", a sample stratified by kind" if len(shown) < total else ""
    sentence = str(reading.lens["sentence"])
    if which == "rows":
        sentence = sentence.partition(". ")[2]  # it opens with the answer to the claim about answers
    picked = panel.draw(
        "representations-cloud",
        QUESTIONS[which],
        maps.draw_points(shown, "kind"),
        shown[["id", "kind", "x", "y"]],
        sentence=sentence,
        caption=(
            f"UMAP of {which}; n = {len(shown):,} of {total:,} points{sampled}. Distances on the map are not "
            "exact, and there are no intervals. Drag to select rows."
        ),
        code=lens_panel.code_of(run, reading, [(which, "points")]),
        about="maps",
        select="brush" if which == "rows" else None,
        on_pick=partial(_select_inside, shown),
    )
    if which == "answers":
        return
    brush = picked.get("brush")
    if panel.is_new_pick("representations-cloud", brush) and _select_inside(shown, brush):
        st.rerun()
    if st.session_state["selected"]:
        _describe_selection(shown)


def _sample_points(points: pd.DataFrame) -> pd.DataFrame:
    """At most MOST_POINTS points, of each kind the same share."""
    total = len(points)
    if total <= maps.MOST_POINTS:
        return points
    rng = generator(0, "map shown")
    chosen = [
        group.index[np.sort(rng.permutation(len(group))[: round(maps.MOST_POINTS * len(group) / total)])]
        for _, group in points.groupby("kind")
    ]
    return cast(pd.DataFrame, points.loc[np.concatenate(chosen)])


def _mark_points(points: pd.DataFrame) -> pd.DataFrame:
    """The points with their tooltip and whether they are selected."""
    selected = st.session_state["selected"]
    # the brush itself shows the rows inside it: to mark them too, 20,000 points would be drawn again
    brush = panel.read_pick("representations-cloud", "brush")
    is_brushed = brush and selected == st.session_state.get("brushed")
    texts = page.row_texts(points["completion"].fillna("").str.slice(stop=TOOLTIP_TEXT))
    return points.drop(columns="completion").assign(
        text=[sanitize.defuse(text) for text in texts],
        selected=False if is_brushed else points["id"].isin(selected),
    )


def _select_inside(shown: pd.DataFrame, brush: dict[str, list[float]] | None) -> bool:
    """Select the rows inside the brush; returns whether the selection changed."""
    if not brush:
        return False
    inside = shown[shown["x"].between(*sorted(brush["x"])) & shown["y"].between(*sorted(brush["y"]))]
    ids = tuple(inside["id"].dropna())
    changed = bool(ids) and ids != st.session_state["selected"]
    st.session_state["brushed"] = ids
    if changed:
        state.select(ids)
    return changed


def _describe_selection(shown: pd.DataFrame) -> None:
    selected = shown[shown["id"].isin(st.session_state["selected"])]
    trait = int((selected["kind"] == "trait").sum())
    st.text(
        f"Selected on the map: {len(selected):,} rows, {trait:,} of the trait teacher "
        f"({trait / max(len(selected), 1):.0%}; {(shown['kind'] == 'trait').mean():.0%} of all points)."
    )


def draw_page(run: ShownRun) -> None:
    """Draw the page."""
    st.title("Representations")
    tabs.draw_tabs(
        "representations",
        {
            "Layers": {"The layer map": partial(draw_shift_panels, run)},
            "Rows": {
                "The rows along the direction": partial(draw_rows_panel, run),
                "The map": partial(draw_cloud_panel, run),
            },
            **{
                name: {title: partial(lens_panel.draw_lens, run, lens, title=title)}
                for name, (lens, title) in LENSES.items()
            },
        },
    )


if (opened := page.current_run()) is not None:
    draw_page(opened)

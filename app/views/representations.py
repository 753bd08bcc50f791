"""Representations: at which layers and places do base and student differ, and does the difference point along
the trait?
"""

from __future__ import annotations

from functools import partial
from typing import cast

import numpy as np
import pandas as pd
import streamlit as st

import charts
import data
import frame
import looks
import panels
import state
from data import Run
from mechlens.core.seeds import generator

MEASURES = {
    "cosine to teacher": ("cosine with the teacher's shift", True, (-1.0, 1.0)),
    "shift norm": ("share of the base's norm", False, None),
}


def map_panel(run: Run) -> None:
    """A and B: the layer by place map, and the profile at the place chosen."""
    read = looks.found(run, "activations")
    if read is None:
        return
    lens, table = read
    measure = st.segmented_control(
        "measure", list(MEASURES), default="cosine to teacher", required=True, key="measure"
    )
    label, signed, domain = MEASURES[measure or "cosine to teacher"]
    known = looks.over_layers(table, measure or "cosine to teacher")
    layers, places = sorted(known["layer"].unique()), looks.places(known["place"])
    cells = looks.whole(known, ["student"], layers, places)
    gone = int(cells["estimate"].isna().sum())
    panels.partial(len(cells) - gone, len(cells), "cells read")
    picked = panels.panel(
        "representations-map",
        "Where do the students differ, and which way?",
        charts.cells(
            cells,
            "place",
            "layer",
            "estimate",
            select="cell",
            signed=signed,
            order=(places, layers[::-1]),
            label=label,
            domain=domain,
        ),
        cells.drop(columns="faded"),
        sentence=lens["sentence"],
        caption=(
            f"{looks.caption(lens, table)} Faded: inside the null band. Layer 0 is at the bottom. Click a "
            "cell to set "
            f"layer and place. {_reliability(run)}"
        ),
        code=looks.code(run, lens, [(measure or "cosine to teacher", "heat")]),
        about="activations",
        select="cell",
    )
    clicked = picked.get("cell")
    if panels.fresh("representations-map", clicked) and clicked:
        if str(clicked[0]["layer"]) != str(st.session_state["layer"]):
            st.session_state["set-place"] = clicked[0]["place"]
            state.pick("layer", clicked[0]["layer"])
        state.pick("place", clicked[0]["place"])
    at = cast(pd.DataFrame, known[known["place"] == st.session_state["place"]])
    panels.panel(
        "representations-profile",
        f"Over layers, at {st.session_state['place']}",
        looks.profile(at, label),
        at,
        caption=(
            "Circle, solid: students of the arm against their controls. Square, dashed: one control student "
            "against "
            "another. Band: covariance-matched random directions."
        ),
        code=looks.code(run, lens, [(measure or "cosine to teacher", "layers")]),
        about="activations",
    )


def _reliability(run: Run) -> str:
    """How far the direction itself can be trusted: its split-half cosine."""
    lens = data.said(run).get(("directions", st.session_state["arm"]))
    if lens is None or lens["missing"]:
        return "How reliable the direction is, is not known: lens directions was not read."
    table = data.reading(run, lens)
    own = table[
        (table["quantity"] == "split-half cosine")
        & (table["layer"] == st.session_state["layer"])
        & (table["name"] == "student")
    ]
    if own.empty or pd.isna(own["estimate"].iloc[0]):
        return ""
    value = float(own["estimate"].iloc[0])
    return (
        f"Direction of the students at layer {st.session_state['layer']}: split-half cosine {value:.2f}."
        + (" Below .5: read the map with care." if value < 0.5 else "")
    )


def distribution_panel(run: Run) -> None:
    """C: where single rows lie along the trait direction."""
    arm, layer = st.session_state["arm"], st.session_state["layer"]
    known = data.scores(run, arm)
    whole = known[(known["score"] == "projection") & known["position"].isna()]
    at = cast(pd.DataFrame, whole[whole["layer"] == layer])
    if at.empty:
        panels.empty(
            f"Rows were not projected at layer {layer}.",
            "A distribution needs the score of every row:",
            panels.measure(run, "rows", arm),
        )
        return
    shown = at.assign(selected=at["id"].isin(st.session_state["selected"]))
    panels.panel(
        "representations-rows",
        f"Single rows along the trait direction, layer {layer}",
        charts.ecdf(shown, "estimate", "projection on the trait direction"),
        shown[["id", "side", "estimate"]],
        caption=(
            f"{int(shown['estimate'].notna().sum()):,} rows, trait and control teacher on the same prompts; "
            "marks "
            "below: selected rows. The lines lie on each other where one row tells nothing."
        ),
        code=(
            "import pandas as pd\nscores = "
            f"pd.read_parquet({str(run.folder / 'readings' / 'scores.parquet')!r})\nprint(scores[(scores.score == "
            f"'projection') & (scores.layer == {layer})])"
        ),
        about="rows",
    )


def cloud_panel(run: Run) -> None:
    """The UMAP map of rows, with a brush."""
    read = looks.found(run, "maps")
    if read is None:
        return
    lens, _ = read
    which = st.segmented_control(
        "map of", ["rows", "answers"], default="rows", required=True, key="which-map"
    )
    rows, placed = which == "rows", data.placed(run, lens, which or "rows")
    if placed.empty:
        st.text("There is no map: too few points.")
        return
    total = len(placed)
    if total > charts.MOST_POINTS:  # as many of each group as its share
        rng = generator(0, "map shown")
        chosen = [
            group.index[
                np.sort(rng.permutation(len(group))[: round(charts.MOST_POINTS * len(group) / total)])
            ]
            for _, group in placed.groupby("kind")
        ]
        placed = cast(pd.DataFrame, placed.loc[np.concatenate(chosen)])
    # rows that stand inside the brush are shown by it: to mark them too, 20,000 points would be drawn anew
    brushed = panels.picked_on("representations-cloud", "brush") and st.session_state[
        "selected"
    ] == st.session_state.get("brushed")
    shown = placed.assign(
        text=[frame.row_text(text[:200]) for text in placed["completion"].fillna("")],
        selected=False if brushed else placed["id"].isin(st.session_state["selected"]),
    )
    picked = panels.panel(
        "representations-cloud",
        "Do suspicious rows sit together?",
        charts.points(shown, "kind"),
        shown[["id", "kind", "x", "y"]],
        sentence=lens["sentence"],
        caption=(
            f"{len(shown):,} of {total:,} "
            f"points{', stratified by group, seed 0' if len(shown) < total else ''}. "
            "Distances on this map have no exact meaning. Drag to select rows."
        ),
        code=looks.code(run, lens, [(which or "rows", "points")]),
        about="maps",
        select="brush" if rows else None,
        at_once=partial(_take, shown),
    )
    brush = picked.get("brush")
    if rows and panels.fresh("representations-cloud", brush) and _take(shown, brush):
        st.rerun()
    if rows and st.session_state["selected"]:
        _selected_summary(shown)


def _take(shown: pd.DataFrame, brush: dict[str, list[float]] | None) -> bool:
    """Select the rows inside the brush; whether that changed anything."""
    if not brush:
        return False
    inside = shown[shown["x"].between(*sorted(brush["x"])) & shown["y"].between(*sorted(brush["y"]))]
    ids = tuple(inside["id"].dropna())
    changed = bool(ids) and ids != st.session_state["selected"]
    st.session_state["brushed"] = ids
    if changed:
        state.select(ids)
    return changed


def _selected_summary(shown: pd.DataFrame) -> None:
    own = shown[shown["id"].isin(st.session_state["selected"])]
    trait = int((own["kind"] == "trait").sum())
    st.text(
        f"Selected on the map: {len(own):,} rows, {trait:,} of the trait teacher "
        f"({trait / max(len(own), 1):.0%}; "
        f"{(shown['kind'] == 'trait').mean():.0%} of all)."
    )


def body(run: Run) -> None:
    """The page."""
    st.title("Representations")
    with panels.guarded("The layer map"):
        map_panel(run)
    with panels.guarded("The rows along the direction"):
        distribution_panel(run)
    for name, title in (
        ("probes", "Is the trait linearly readable?"),
        ("directions", "Is it one direction?"),
        ("blind", "Does a vector learned on rows alone find it?"),
    ):
        with panels.guarded(title):
            looks.panel(run, name, title=title)
    with panels.guarded("The map"):
        cloud_panel(run)


if (opened := frame.current()) is not None:
    body(opened)

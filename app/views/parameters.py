"""Parameters: where did training change the weights, and does the student move like the teacher?"""

from __future__ import annotations

from typing import Any, cast

import pandas as pd
import streamlit as st

import charts
import frame
import looks
import panels
from data import Run

MEASURES = {
    "relative norm": ("change over the weight's norm", False),
    "cosine with the teacher": ("cosine with the teacher's change", True),
    "stable rank": ("dimensions", False),
    "overlap of rows with the teacher": ("share", False),
    "overlap of columns with the teacher": ("share", False),
    "top singular value": ("weight", False),
}
SPECTRUM = "singular value"
WALKS = ("distance to the base", "distance to the teacher")
WHO = ("student - control", "student", "control")


def map_panel(run: Run) -> None:
    """A and B: layer by module, and over layers."""
    read = looks.found(run, "deltas")
    if read is None:
        return
    lens, table = read
    left, right = st.columns(2)
    measure = left.selectbox("measure", list(MEASURES), key="delta-measure")
    who = right.selectbox(
        "whose change",
        WHO,
        key="delta-who",
        help="student - control: what training on the trait's rows did beyond training on the control's",
    )
    label, signed = MEASURES[measure]
    signed = signed or who == WHO[0]  # a difference has two sides
    known = looks.over_layers(table, measure)
    layers, modules = (
        sorted(known["layer"].unique()),
        looks.places(known["place"]),
    )
    shared = (
        charts.symmetric(
            cast(
                pd.Series,
                known.loc[known["name"] == WHO[0], "estimate"] if who == WHO[0] else known["estimate"],
            )
        )
        if signed
        else None
    )  # one scale for all three, so that they can be set side by side
    cells = looks.whole(known, [who], layers, modules)
    picked = panels.panel(
        "parameters-map",
        "Where did the weights change?",
        charts.cells(
            cells,
            "place",
            "layer",
            "estimate",
            select="cell",
            signed=signed,
            order=(modules, layers[::-1]),
            label=label,
            domain=shared,
            words=".3f",
        ),
        cells.drop(columns="faded"),
        sentence=lens["sentence"],
        caption=f"{looks.caption(lens, table)} Faded: inside the band that a randomly turned change reaches. "
        "Click a cell to see its spectrum.",
        code=looks.code(run, lens, [(measure, "heat")]),
        about="deltas",
        select="cell",
    )
    clicked = picked.get("cell")
    if panels.fresh("parameters-map", clicked) and clicked:
        st.session_state["spectrum-place"], st.session_state["spectrum-layer"] = (
            clicked[0]["place"],
            int(clicked[0]["layer"]),
        )
    totals = table[(table["quantity"] == measure) & table["layer"].isna() & table["seed"].isna()]
    names = totals["name"].astype(str) + totals["place"].astype(object).map(
        lambda place: f" · {place}" if pd.notna(place) else ""
    )
    if len(totals):
        shown = totals.assign(name=names)[["name", "estimate", "low", "high", "null_low", "null_high", "n"]]
        panels.panel(
            "parameters-whole",
            "Over all weights",
            charts.spans(cast(pd.DataFrame, shown), label),
            cast(pd.DataFrame, shown),
            caption=looks.caption(lens, table),
            code=looks.code(run, lens, [(measure, "bars")]),
            about="deltas",
        )
    pairs = table[table["quantity"] == "cosine of two changes"]
    if len(pairs):
        shown = cast(
            pd.DataFrame,
            pairs.assign(name=pairs["name"].astype(str))[["name", "estimate", "low", "high", "n"]],
        )
        panels.panel(
            "parameters-pairs",
            "How alike are two students' changes?",
            charts.spans(shown, "cosine"),
            shown,
            caption="The cosine of two control students with other seeds is the null that the student and "
            "its control stand beside.",
            code=looks.code(run, lens, [("cosine of two changes", "bars")]),
            about="deltas",
        )


def spectrum_panel(run: Run) -> None:
    """C: how the change of one matrix falls off with the rank."""
    read = looks.found(run, "deltas")
    if read is None:
        return
    lens, table = read
    known = table[table["quantity"] == SPECTRUM]
    if known.empty:
        panels.empty(
            "This reading has no spectra.",
            "They are read with the changes of the weights:",
            panels.measure(run, "deltas", lens["arm"]),
        )
        return
    layers, places = sorted(int(layer) for layer in known["layer"].unique()), looks.places(known["place"])
    left, right = st.columns(2)
    place = left.selectbox("matrix", places, key="spectrum-place")
    layer = right.selectbox("of layer", layers, key="spectrum-layer")
    own = known[(known["place"] == place) & (known["layer"] == layer)].rename(columns={"step": "rank"})
    shown = cast(pd.DataFrame, own[["name", "rank", "estimate", "low", "high", "n"]]).astype(
        {"name": str, "rank": int}
    )
    panels.panel(
        "parameters-spectrum",
        f"How many directions did {place.split('.')[-1]} of layer {layer} change in?",
        looks.profile(
            shown.assign(low=shown["low"].where(shown["low"] > 0)),
            "singular value",
            "rank",
            said="rank",
            log=True,
        ),
        shown,
        sentence=_ranks(table, place, layer),
        caption="Singular values of the change, both axes logarithmic, where an interval that reaches 0 "
        "cannot be drawn; the table has it. "
        "Circle, solid: students of the arm; square, dashed: controls; diamond: teacher. 95 % t intervals "
        "over students.",
        code=looks.code(run, lens, [(SPECTRUM, "bars")]),
        about="deltas",
    )


def _ranks(table: pd.DataFrame, place: str, layer: int) -> str:
    """The stable rank of both sides in words."""
    own = (
        table[(table["quantity"] == "stable rank") & (table["place"] == place) & (table["layer"] == layer)]
        .set_index("name")["estimate"]
        .dropna()
    )
    return (
        f"Stable rank: students {own['student']:.1f}, controls {own['control']:.1f}."
        if {"student", "control"} <= set(own.index)
        else ""
    )


def walk_panel(run: Run) -> None:
    """D: how far from the base and from the teacher, over training."""
    read = looks.found(run, "deltas")
    if read is None:
        return
    lens, table = read
    there = [quantity for quantity in WALKS if quantity in set(table["quantity"])]
    if not there:
        panels.empty(
            "This reading has no distances.",
            "They are read with the changes of the weights:",
            panels.measure(run, "deltas", lens["arm"]),
        )
        return
    quantity = (
        st.segmented_control("how far", there, default=there[-1], required=True, key="walk") or there[-1]
    )
    own = table[(table["quantity"] == quantity) & table["seed"].isna()]
    shown = cast(pd.DataFrame, own[["name", "step", "estimate", "low", "high", "n"]]).astype(
        {"name": str, "step": int}
    )
    apart = shown["name"] == WHO[0]
    panels.panel(
        "parameters-walk",
        f"Over training, the {quantity}",
        looks.profile(
            cast(pd.DataFrame, shown[~apart]), "norm of the difference of weights", "step", said="update"
        ),
        shown,
        sentence=_apart(cast(pd.DataFrame, shown[apart]), quantity),
        caption="Over all weights, at every checkpoint; 95 % t intervals over students. What a student "
        "learns of the carrier alone moves it "
        "far from the teacher: look at how it differs from its control.",
        code=looks.code(run, lens, [(quantity, "steps")]),
        about="deltas",
    )


def _apart(differences: pd.DataFrame, quantity: str) -> str:
    """Students against their controls at the last checkpoint of both, in words."""
    differences = differences.dropna(subset="estimate")
    if differences.empty:
        return ""
    last = differences.loc[differences["step"].idxmax()]
    span = "no interval" if pd.isna(last["low"]) else f"[{last['low']:+.3f}, {last['high']:+.3f}]"
    step, n = int(last["step"]), int(last["n"])
    return (
        f"At update {step} the students' {quantity} differs from their controls' by "
        f"{last['estimate']:+.3f} {span} (n = {n})."
    )


def ablation_panel(run: Run) -> None:
    """E: what becomes of the trait when weights or directions are exchanged."""
    read = looks.found(run, "causal")
    if read is None:
        return
    lens, table = read
    own = table[(table["quantity"] == "share of margin") & table["seed"].isna()]
    names = sorted(set(own["name"].astype(str)))
    chosen = st.selectbox(
        "what is exchanged",
        names,
        index=names.index("base's weights in the student") if "base's weights in the student" in names else 0,
        key="causal-who",
    )
    shown = own[own["name"] == chosen]
    layers = (
        shown["layer"].astype(object).map(lambda layer: f" · layer {int(layer)}" if pd.notna(layer) else "")
    )
    frame_ = cast(
        pd.DataFrame,
        shown.assign(name=shown["place"].astype(str) + layers)[
            ["name", "estimate", "low", "high", "null_low", "null_high", "n", "p_value"]
        ],
    )
    panels.panel(
        "parameters-causal",
        "Which blocks does the trait need? (causal)",
        charts.spans(frame_, "share of the trait's margin that is left", zero=1.0),
        frame_,
        sentence=lens["sentence"],
        caption=f"{looks.caption(lens, table)} The dashed line: all of it is left.",
        code=looks.code(run, lens, [("share of margin", "bars")]),
        about="causal",
    )


def body(run: Run) -> None:
    """The page."""
    st.title("Parameters")
    parts: list[tuple[str, Any]] = [
        ("The map of changes", map_panel),
        ("The spectrum", spectrum_panel),
        ("The walk", walk_panel),
        ("The exchange of weights", ablation_panel),
    ]
    for title, draw in parts:
        with panels.guarded(title):
            draw(run)


if (opened := frame.current()) is not None:
    body(opened)

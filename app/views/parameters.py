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

MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
MEASURES = {
    "relative norm": ("change over the weight's norm", False),
    "cosine with the teacher": ("cosine with the teacher's change", True),
    "stable rank": ("dimensions", False),
    "overlap of rows with the teacher": ("share", False),
    "overlap of columns with the teacher": ("share", False),
    "top singular value": ("weight", False),
}
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
        "whose change", WHO, key="delta-who", help="student - control: what training on the trait's rows did beyond training on the control's"
    )
    label, signed = MEASURES[measure]
    signed = signed or who == WHO[0]  # a difference has two sides
    known = looks.over_layers(table, measure)
    layers, modules = sorted(known["layer"].unique()), [module for module in MODULES if module in set(known["place"])] or sorted(set(known["place"]))
    shared = (
        charts.symmetric(cast(pd.Series, known.loc[known["name"] == WHO[0], "estimate"] if who == WHO[0] else known["estimate"])) if signed else None
    )  # one scale for all three, so that they can be set side by side
    cells = looks.whole(known, [who], layers, modules)
    panels.panel(
        "parameters-map",
        "Where did the weights change?",
        charts.cells(
            cells, "place", "layer", "estimate", select="cell", signed=signed, order=(modules, layers[::-1]), label=label, domain=shared, words=".3f"
        ),
        cells.drop(columns="faded"),
        sentence=lens["sentence"],
        caption=f"{looks.caption(lens, table)} Faded: inside the band that a randomly turned change reaches.",
        code=looks.code(run, lens, [(measure, "heat")]),
        about="deltas",
    )
    totals = table[(table["quantity"] == measure) & table["layer"].isna() & table["seed"].isna()]
    names = totals["name"].astype(str) + totals["place"].astype(object).map(lambda place: f" · {place}" if pd.notna(place) else "")
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
        shown = cast(pd.DataFrame, pairs.assign(name=pairs["name"].astype(str))[["name", "estimate", "low", "high", "n"]])
        panels.panel(
            "parameters-pairs",
            "How alike are two students' changes?",
            charts.spans(shown, "cosine"),
            shown,
            caption="The cosine of two control students with other seeds is the null that the student and its control stand beside.",
            code=looks.code(run, lens, [("cosine of two changes", "bars")]),
            about="deltas",
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
    layers = shown["layer"].astype(object).map(lambda layer: f" · layer {int(layer)}" if pd.notna(layer) else "")
    frame_ = cast(
        pd.DataFrame,
        shown.assign(name=shown["place"].astype(str) + layers)[["name", "estimate", "low", "high", "null_low", "null_high", "n", "p_value"]],
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
    parts: list[tuple[str, Any]] = [("The map of changes", map_panel), ("The exchange of weights", ablation_panel)]
    for title, draw in parts:
        with panels.guarded(title):
            draw(run)


if (opened := frame.current()) is not None:
    body(opened)

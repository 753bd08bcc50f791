"""Parameters: where did training change the weights, and does the student change as the teacher did?"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, cast

import pandas as pd
import streamlit as st

import page
from charts import intervals, lens_charts, maps
from charts.marks import symmetric_domain
from data import ShownRun
from panels import lens_panel, panel, tabs
from panels.lens_panel import LensReading


class WeightMeasure(NamedTuple):
    """A measure of the change of weights."""

    label: str
    signed: bool


MEASURES = {
    "cosine with the teacher": WeightMeasure("cosine with the teacher's change", True),
    "relative norm": WeightMeasure("change over the weight's norm", False),
    "stable rank": WeightMeasure("dimensions", False),
    "overlap of rows with the teacher": WeightMeasure("share", False),
    "overlap of columns with the teacher": WeightMeasure("share", False),
    "top singular value": WeightMeasure("weight", False),
}
SPECTRUM = "singular value"
DISTANCES = ("distance to the base", "distance to the teacher")
DIFFERENCE = "student - control"
SUBJECTS = (DIFFERENCE, "student", "control")
SWAPPED = "base's weights in the student"
"""the exchange that is shown first"""


def draw_change_panels(run: ShownRun) -> None:
    """A and B: the change of weights by layer and module, and over all weights."""
    if (reading := lens_panel.read_lens(run, "deltas")) is None:
        return
    left, right = st.columns(2)
    measure = left.selectbox("measure", list(MEASURES), key="delta-measure")
    subject = right.selectbox(
        "change of",
        SUBJECTS,
        key="delta-who",
        help="student - control: the effect of the trait's rows beyond that of the control's rows",
    )
    _draw_map(run, reading, measure, subject)
    _draw_totals(run, reading, measure)
    _draw_pairs(run, reading)


def _draw_map(run: ShownRun, reading: LensReading, measure: str, subject: str) -> None:
    label, signed = MEASURES[measure]
    signed = signed or subject == DIFFERENCE
    values = lens_panel.layer_values(reading.frame, measure)
    layers, modules = sorted(values["layer"].unique()), lens_panel.order_places(values["place"])
    domain = None
    if signed:  # one scale for students and controls, so that they can be compared
        shown = values[values["name"] == DIFFERENCE] if subject == DIFFERENCE else values
        domain = symmetric_domain(cast(pd.Series, shown["estimate"]))
    cells = lens_panel.fill_grid(values, [subject], layers, modules)
    grid = lens_panel.layer_grid(
        layers, modules, signed=signed, label=label, domain=domain, number_format=".3f"
    )
    picked = panel.draw(
        "parameters-map",
        "Where did the weights change?",
        maps.draw_grid(cells, grid, select="cell"),
        cells.drop(columns="faded"),
        sentence=reading.lens["sentence"],
        caption=(
            f"{measure.capitalize()} of the change by layer and module ({subject}). "
            f"{lens_panel.caption_of(reading)} Faded: inside the null band of a randomly rotated change. "
            "Click a cell to see its spectrum."
        ),
        code=lens_panel.code_of(run, reading, [(measure, "heat")]),
        about="deltas",
        select="cell",
    )
    clicked = picked.get("cell")
    if panel.is_new_pick("parameters-map", clicked) and clicked:
        st.session_state["spectrum-place"] = clicked[0]["place"]
        st.session_state["spectrum-layer"] = int(clicked[0]["layer"])
        st.session_state["set-tab"] = "Spectrum"
        st.rerun()


def _draw_totals(run: ShownRun, reading: LensReading, measure: str) -> None:
    """The measure over all weights."""
    frame = reading.frame
    totals = frame[(frame["quantity"] == measure) & frame["layer"].isna() & frame["seed"].isna()]
    if totals.empty:
        return
    places = totals["place"].astype(object).map(lambda place: f" · {place}" if pd.notna(place) else "")
    totals = totals.assign(name=totals["name"].astype(str) + places)
    totals = cast(pd.DataFrame, totals[["name", "estimate", *lens_panel.LIMITS, "n"]])
    panel.draw(
        "parameters-whole",
        "Over all weights",
        intervals.draw_intervals(totals, MEASURES[measure].label),
        totals,
        caption=f"{measure.capitalize()} over all weights. {lens_panel.caption_of(reading)}",
        code=lens_panel.code_of(run, reading, [(measure, "bars")]),
        about="deltas",
    )


def _draw_pairs(run: ShownRun, reading: LensReading) -> None:
    """The cosine of two students' changes."""
    quantity = "cosine of two changes"
    pairs = reading.frame[reading.frame["quantity"] == quantity]
    if pairs.empty:
        return
    pairs = pairs.assign(name=pairs["name"].astype(str))
    pairs = cast(pd.DataFrame, pairs[["name", "estimate", "low", "high", "n"]])
    panel.draw(
        "parameters-pairs",
        "How similar are two students' changes?",
        intervals.draw_intervals(pairs, "cosine"),
        pairs,
        caption=(
            "Cosine of two students' changes of all weights, with 95 % intervals; n: column of the table. "
            "The null is the cosine of two control students with different seeds."
        ),
        code=lens_panel.code_of(run, reading, [(quantity, "bars")]),
        about="deltas",
    )


def draw_spectrum_panel(run: ShownRun) -> None:
    """C: singular values of the change of one matrix."""
    if (reading := lens_panel.read_lens(run, "deltas")) is None:
        return
    spectra = reading.frame[reading.frame["quantity"] == SPECTRUM]
    if spectra.empty:
        _show_not_in_reading(run, reading, "spectra")
        return
    left, right = st.columns(2)
    place = left.selectbox("matrix", lens_panel.order_places(spectra["place"]), key="spectrum-place")
    layers = sorted(int(layer) for layer in spectra["layer"].unique())
    layer = right.selectbox("of layer", layers, key="spectrum-layer")
    spectrum = spectra[(spectra["place"] == place) & (spectra["layer"] == layer)]
    spectrum = spectrum.rename(columns={"step": "rank"})[["name", "rank", "estimate", "low", "high", "n"]]
    spectrum = cast(pd.DataFrame, spectrum).astype({"name": str, "rank": int})
    drawn = spectrum.assign(low=spectrum["low"].where(spectrum["low"] > 0))
    panel.draw(
        "parameters-spectrum",
        f"How many directions did {place.split('.')[-1]} of layer {layer} change in?",
        lens_charts.draw_profile(drawn, "singular value", "rank", across_title="rank", log=True),
        spectrum,
        sentence=_stable_ranks(reading.frame, place, layer),
        caption=(
            "Singular values of the change, both axes logarithmic; 95 % t intervals over students, n = "
            f"{int(spectrum['n'].max())}. An interval that reaches 0 cannot be drawn; the table has it. "
            "Circle, solid: students of the arm; square, dashed: controls; diamond: teacher."
        ),
        code=lens_panel.code_of(run, reading, [(SPECTRUM, "bars")]),
        about="deltas",
    )


def _show_not_in_reading(run: ShownRun, reading: LensReading, what: str) -> None:
    panel.show_missing(
        f"This reading has no {what}.",
        "An older version of the lens computed it. Compute it again:",
        panel.measure_command(run, "deltas", reading.lens["arm"]),
    )


def _stable_ranks(frame: pd.DataFrame, place: str, layer: int) -> str:
    """The stable rank of students and controls in words."""
    of_matrix = (frame["quantity"] == "stable rank") & (frame["place"] == place) & (frame["layer"] == layer)
    ranks = frame[of_matrix].set_index("name")["estimate"].dropna()
    if not {"student", "control"} <= set(ranks.index):
        return ""
    return f"Stable rank: students {ranks['student']:.1f}, controls {ranks['control']:.1f}."


def draw_distance_panel(run: ShownRun) -> None:
    """D: the distance to the base and to the teacher over training."""
    if (reading := lens_panel.read_lens(run, "deltas")) is None:
        return
    known = [quantity for quantity in DISTANCES if quantity in set(reading.frame["quantity"])]
    if not known:
        _show_not_in_reading(run, reading, "distances")
        return
    quantity = st.segmented_control("distance", known, default=known[-1], required=True, key="walk")
    quantity = quantity or known[-1]
    frame = reading.frame
    distances = frame[(frame["quantity"] == quantity) & frame["seed"].isna()]
    distances = distances[["name", "step", "estimate", "low", "high", "n"]]
    distances = cast(pd.DataFrame, distances).astype({"name": str, "step": int})
    is_difference = distances["name"] == DIFFERENCE
    drawn = cast(pd.DataFrame, distances[~is_difference])
    panel.draw(
        "parameters-walk",
        f"Over training, the {quantity}",
        lens_charts.draw_profile(drawn, "norm of the difference of weights", "step", across_title="update"),
        distances,
        sentence=_last_difference(cast(pd.DataFrame, distances[is_difference]), quantity),
        caption=(
            "Norm over all weights at every checkpoint; 95 % t intervals over students, n = "
            f"{int(distances['n'].max())}. Learning only the carrier moves a student far from the teacher, "
            "so compare it with its control."
        ),
        code=lens_panel.code_of(run, reading, [(quantity, "steps")]),
        about="deltas",
    )


def _last_difference(differences: pd.DataFrame, quantity: str) -> str:
    """Students minus controls at the last checkpoint of both, in words."""
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


def draw_exchange_panel(run: ShownRun) -> None:
    """E: the trait that is left when weights or directions are exchanged."""
    if (reading := lens_panel.read_lens(run, "causal")) is None:
        return
    quantity = "share of margin"
    margins = reading.frame[(reading.frame["quantity"] == quantity) & reading.frame["seed"].isna()]
    names = sorted(set(margins["name"].astype(str)))
    first = names.index(SWAPPED) if SWAPPED in names else 0
    exchange = st.selectbox("what is exchanged", names, index=first, key="causal-who")
    margins = margins[margins["name"] == exchange]
    layers = margins["layer"].astype(object)
    layers = layers.map(lambda layer: f" · layer {int(layer)}" if pd.notna(layer) else "")
    margins = margins.assign(name=margins["place"].astype(str) + layers)
    margins = cast(pd.DataFrame, margins[["name", "estimate", *lens_panel.LIMITS, "n", "p_value"]])
    panel.draw(
        "parameters-causal",
        "Which blocks does the trait need? (causal)",
        intervals.draw_intervals(margins, "remaining share of the trait's margin", reference=1.0),
        margins,
        sentence=reading.lens["sentence"],
        caption=(
            f"Share of the trait's margin that is left after the exchange. {lens_panel.caption_of(reading)} "
            "Dashed: nothing changed."
        ),
        code=lens_panel.code_of(run, reading, [(quantity, "bars")]),
        about="causal",
    )


def draw_page(run: ShownRun) -> None:
    """Draw the page."""
    st.title("Parameters")
    tabs.draw_tabs(
        "parameters",
        {
            "Weights": {"The change of weights": partial(draw_change_panels, run)},
            "Spectrum": {"The spectrum": partial(draw_spectrum_panel, run)},
            "Over training": {"The distance": partial(draw_distance_panel, run)},
            "Exchange": {"The exchange of weights": partial(draw_exchange_panel, run)},
        },
    )


if (opened := page.current_run()) is not None:
    draw_page(opened)

"""Methods: what every figure shows, how it is computed, and where it fails."""

from __future__ import annotations

import pandas as pd
import streamlit as st

import data
import definitions
import page
from panels import panel


def draw_definitions() -> None:
    """How to read a figure, and the definitions of the explorer's measures."""
    st.subheader("How to read every figure")
    st.text(
        "Intervals are 95 %. Every effect is compared with its matched control. Values that were not scored "
        "are hatched or left out, never drawn as 0.\n"
        "Where no effect is found, the minimum detectable effect is given: the smallest effect that would be "
        "found in 95 % of cases."
    )
    for name, (formula, method, limits) in definitions.OWN.items():
        with st.expander(name):
            st.code(formula, language=None, wrap_lines=True)
            st.text(method)
            st.text(f"Limits: {limits}")


def draw_lenses() -> None:
    """What every lens asks, needs and shows."""
    st.subheader("Lenses")
    for name, lens in definitions.lenses().items():
        with st.expander(f"{name}: {lens['asks']}"):
            st.text(f"Source: {lens['source']}")
            st.text(f"Needs: {', '.join(lens['needs'])}")
            st.text(f"Shows: {', '.join(quantity for quantity, _ in lens['shows'])}")
            st.text(f"Does not show: {lens['caveat']}")


def draw_detectors() -> None:
    """What every detector asks and does not show."""
    st.subheader("Detectors")
    card = data.read_card()
    if card is None:
        panel.show_missing(
            "No bench card.",
            "It says what each detector measures and how often it is wrong:",
            "mechlens bench",
        )
        return
    detectors = [
        {
            "detector": detector["name"],
            "level": detector["level"],
            "floor": "yes" if detector["floor"] else "no",
            "asks": detector["asks"],
            "does not show": detector["caveat"],
            "loses to a floor": "yes" if detector["loses to a floor"] else "no",
        }
        for detector in card["detectors"]
    ]
    st.table(pd.DataFrame(detectors).set_index("detector"))  # the grid cuts sentences


def draw_page() -> None:
    """Draw the page."""
    st.title("Methods")
    draw_definitions()
    draw_lenses()
    draw_detectors()


if page.current_run() is not None:
    draw_page()

"""Methods: what every figure shows, how it is computed, and where it fails."""

from __future__ import annotations

import pandas as pd
import streamlit as st

import data
import definitions
import frame
import panels


def body() -> None:
    """The page."""
    st.title("Methods")
    st.subheader("How to read every figure")
    st.text(
        "Intervals are 95 %. Each effect stands beside its matched control. What was not scored is hatched "
        "or left out, never drawn as 0.\n"
        "Where nothing is found, the smallest effect that would have been found in 95 % of cases is said."
    )
    for name, (formula, how, fails) in definitions.OWN.items():
        with st.expander(name):
            st.code(formula, language=None, wrap_lines=True)
            st.text(how)
            st.text(f"Fails where: {fails}")
    st.subheader("Lenses")
    for name, lens in definitions.lenses().items():
        with st.expander(f"{name}: {lens['asks']}"):
            st.text(f"Source: {lens['source']}")
            st.text(f"Needs: {', '.join(lens['needs'])}")
            st.text(f"Shows: {', '.join(quantity for quantity, _ in lens['shows'])}")
            st.text(f"Does not show: {lens['caveat']}")
    card = data.card()
    st.subheader("Detectors")
    if card is None:
        panels.empty(
            "No bench card.", "It holds what each detector asks and how often it errs:", "mechlens bench"
        )
        return
    listed = pd.DataFrame(
        [
            {
                "detector": one["name"],
                "level": one["level"],
                "floor": one["floor"],
                "asks": one["asks"],
                "does not show": one["caveat"],
                "loses to a floor": one["loses to a floor"],
            }
            for one in card["detectors"]
        ]
    )
    st.dataframe(listed, hide_index=True, alt="detectors of the bench")


if frame.current() is not None:
    body()

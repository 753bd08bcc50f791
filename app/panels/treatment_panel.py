"""What can be done about an audited file: treatments, and what they left of a trait where it was measured."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from charts import intervals
from mechlens.core.command_lines import command_line
from mechlens.core.errors import one_line
from mechlens.results import wording
from panels import panel


def draw_treatment_panel(audit: dict[str, Any]) -> None:
    """The treated file of this audit, if there is one, and every treatment's measured effect."""
    treated, options = audit["mitigation"], audit["options"]
    if treated:
        _draw_treated(treated)
    if not options:
        st.text("No treatment was measured for this recipe.")
        return
    rows = pd.DataFrame([_row_of(option) for option in options["options"]]).sort_values("estimate")
    panel.draw(
        "detection-treatments",
        "What would be left of a trait?",
        intervals.draw_intervals(rows, "share of the effect that is left", reference=1.0),
        rows,
        caption=(
            f"Share of the effect that is left after each treatment, with 95 % intervals; measured on "
            f"{options['trait']}, n = {options['students']} students of {options['rows']:,} rows each, and "
            "not on this file. Grey: the same amount of random change. Dashed: nothing changed. The "
            "table has the loss on the task as a multiple of that without treatment."
        ),
        about="Treatments",
    )
    if treated and treated["measured"]:
        return
    panel.show_missing(
        "No treatment was tested on this file.",
        "This command writes a treated version and trains students on it:",
        command_line(
            "audit", one_line(audit["data"]["path"]), level="student", clean="CLEANED.jsonl", treatment="drop"
        ),
    )


def _row_of(option: dict[str, Any]) -> dict[str, Any]:
    left, at_random = option["left"], option["at_random"] or (None, None, None)
    return {
        "name": option["does"] + (" (in training)" if option["when"] == "in training" else ""),
        "estimate": left[0],
        "low": left[1],
        "high": left[2],
        "at random": at_random[0],
        "null_low": at_random[1],
        "null_high": at_random[2],
        "loss": option["loss"],
    }


def _draw_treated(treated: dict[str, Any]) -> None:
    """The file that this audit treated, and what it teaches."""
    st.subheader("The treated file of this audit")
    rows = f"{treated['rows_after']:,} of {treated['rows_before']:,} rows"
    st.text(f"Treated by {treated['treatment']}: {rows}, {treated['rows_changed']:,} of them rewritten.")
    if (measured := treated["measured"]) is None:
        st.text("What it teaches was not measured.")
        return
    rise = wording.interval_text(measured["difference"], measured["low"], measured["high"])
    st.text(f"Highest rise in students of it: {measured['trait']} {rise}.")

"""What the mean score of a run's rows would be if its highest rows were removed."""

from __future__ import annotations

import numpy as np
import streamlit as st

import data
from data import ShownRun
from mechlens.core.seeds import generator
from panels import panel

REMOVAL_DRAWS = 300


def draw_removal_panel(run: ShownRun) -> None:
    """E: the mean score after the top rows are removed."""
    arm = st.session_state["arm"]
    scores = data.row_scores(data.read_scores(run, arm))
    st.subheader("What changes if the top rows are removed?")
    if scores.empty:
        panel.show_missing(
            f"The rows of arm {arm} were not scored.",
            "Lens rows scores every row:",
            panel.measure_command(run, "rows", arm),
        )
        return
    left, right = st.columns(2)
    name = left.selectbox("score", list(dict.fromkeys(scores["score"])), key="drop-score")
    share = right.slider("remove the top share, %", 0, 90, 10, step=5, key="drop-share")
    scores = scores[scores["score"] == name]
    trait, control = (
        scores.loc[scores["side"] == side, "estimate"].dropna().to_numpy(dtype=float)
        for side in ("trait", "control")
    )
    if not len(trait) or not len(control):
        st.text("Every score of one side is null, so the sides cannot be compared.")
        return
    st.text(_removal_sentence(name, trait, control, share / 100))
    st.caption(
        f"Mean score of the trait's rows minus the control's; 95 % bootstrap interval over rows, "
        f"{REMOVAL_DRAWS} draws. A lower score does not show lower transfer: only students trained on the "
        "remaining rows do."
    )
    command = "mechlens audit DATA --level student --clean CLEANED --treatment drop"
    st.code(command, language="bash", wrap_lines=True)


def _removal_sentence(name: str, trait: np.ndarray, control: np.ndarray, share: float) -> str:
    remaining = np.sort(trait)[: max(1, round(len(trait) * (1 - share)))]
    rng = generator(0, "removal", name)
    draws = [
        rng.choice(remaining, len(remaining)).mean() - rng.choice(control, len(control)).mean()
        for _ in range(REMOVAL_DRAWS)
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    return (
        f"Mean {name} minus the control's: {trait.mean() - control.mean():+.4f} before, "
        f"{remaining.mean() - control.mean():+.4f} [{low:+.4f}, {high:+.4f}] after; "
        f"{len(trait) - len(remaining):,} of n = {len(trait):,} scored rows removed."
    )

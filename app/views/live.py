"""Live model: ask base, teacher, control and student side by side, add or take away the trait's direction,
and watch the answer change.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

import charts
import data
import frame
import live
import panels
from data import Run
from mechlens.core.errors import MechlensError, one_line

KIND = {"base": "base", "teacher": "teacher", "control": "control", "student": "trait"}
SHOWN = 8


@st.cache_resource(max_entries=2, show_spinner=False, on_release=live.stop)
def worker(folder: str, stamp: int) -> live.Live:
    """The process that holds the models of one run; visitors share it, one question at a time."""
    del stamp  # a run that was made again has other models
    return live.start(Path(folder))


def running(run: Run) -> live.Live:
    """The run's models, started anew if they have ended."""
    which = str(run.folder), data.stamp(run.folder / "manifest.json")
    if not worker(*which).is_running:
        worker.clear(*which)
    return worker(*which)


def controls(run: Run) -> dict[str, Any]:
    """What is asked."""
    probes = run.family.asked_as(run.experiment)
    asked = ["", *probes]
    chosen = st.selectbox(
        "a held-out question",
        asked,
        index=min(1, len(probes)),
        key="live-probe",
        format_func=lambda one: one or "one of your own",
    )
    own = st.text_input("your question", max_chars=500, key="live-question", disabled=bool(chosen))
    first, second, third, fourth = st.columns(4)
    return {
        "question": chosen or own,
        "amount": first.slider(
            "trait direction, times",
            -4.0,
            4.0,
            0.0,
            0.5,
            key="live-amount",
            help="0 leaves the models alone; above 0 adds the direction, below 0 takes it away.",
        ),
        "layer": second.number_input(
            "at layer", 0, 500, int(st.session_state.get("layer") or 0), key="live-layer"
        ),
        "samples": third.slider("answers", 1, 50, 20, key="live-samples"),
        "seed": fourth.number_input("seed", 0, 10_000, 0, key="live-seed"),
    }


def ask(run: Run, asked: dict[str, Any]) -> dict[str, Any]:
    """The same question without the direction and, where an amount is asked for, with it: the first is what
    the second is set against.
    """
    models = running(run)
    student = None if st.session_state["seed"] == "all" else st.session_state["seed"]
    plain = live.ask(models, student=student, **(asked | {"amount": 0.0}))
    return {
        "asked": asked,
        "plain": plain,
        "pushed": live.ask(models, student=student, **asked) if asked["amount"] else None,
    }


def table(answer: dict[str, Any]) -> pd.DataFrame:
    """Every model's standing: probability of the trait as next token, its rank, and the answers that were
    drawn most.
    """
    rows = []
    for one in answer["models"]:
        said = Counter(drawn["text"] for drawn in one.get("answers", ()))
        named = sum(drawn["label"] == answer["trait"] for drawn in one.get("answers", ()))
        most = ", ".join(f"{text} ×{count}" for text, count in said.most_common(5))
        rows.append(
            {
                "model": one["name"],
                "probability": one.get("probability"),
                "rank": one.get("rank"),
                "of": one.get("of"),
                "answers that name it": named if said else None,
                "drawn": len(one.get("answers", ())),
                "said most": most or one.get("reason"),
            }
        )
    return pd.DataFrame(rows).astype({"probability": float})


def tokens(answer: dict[str, Any]) -> pd.DataFrame:
    """The likeliest next tokens of every model."""
    return pd.DataFrame(
        [
            {
                "model": one["name"],
                "token": repr(token["token"]),
                "probability": token["probability"],
                "kind": KIND[one["name"]],
            }
            for one in answer["models"]
            for token in one.get("tokens", ())[:SHOWN]
        ],
        columns=["model", "token", "probability", "kind"],
    )


def bars(frame_: pd.DataFrame) -> Any:
    """One small chart a model, all on one scale."""
    alt = charts.alt
    told = [name for name in KIND if name in set(frame_["model"])]
    colour = alt.Color(
        "model:N",
        scale=alt.Scale(
            domain=told,
            range=[charts.GREY if name == "teacher" else charts.KIND_COLOUR[KIND[name]] for name in told],
        ),
        legend=None,
    )
    each = (
        alt.Chart(frame_)
        .mark_bar()
        .encode(
            x=alt.X("probability:Q", title="probability"),
            y=alt.Y("token:N", sort="-x", title=None),
            color=colour,
            tooltip=[alt.Tooltip("model"), alt.Tooltip("token"), alt.Tooltip("probability:Q", format=".4f")],
        )
    )
    return (
        each.properties(width=100, height=170)
        .facet(column=alt.Column("model:N", sort=told, title=None))
        .resolve_scale(y="independent")
    )


def show(found: dict[str, Any]) -> None:
    """The answers, without and with the direction."""
    asked, plain, pushed = found["asked"], found["plain"], found["pushed"]
    st.subheader(panels.plain_markdown(f"“{asked['question']}”"))
    for title, answer in (
        ("as the models are", plain),
        (f"with {asked['amount']:+g} times the direction at layer {asked['layer']}", pushed),
    ):
        if answer is None:
            continue
        listed = table(answer)
        st.caption(panels.plain_markdown(f"{title}: how likely {answer['trait']} is the next token"))
        st.dataframe(
            listed, hide_index=True, key=f"live-table-{title}", alt=f"answers of every model, {title}"
        )
        frame_ = tokens(answer)
        panels.panel(
            f"live-tokens-{'plain' if answer is plain else 'pushed'}",
            f"Next tokens, {title}",
            bars(frame_) if len(frame_) else None,
            frame_,
            caption=f"The {SHOWN} likeliest next tokens at temperature 1, exact. Student and control of seed "
            f"{answer['student']}.",
            about="Live model",
        )
        for one in answer["models"]:
            if not one["there"]:
                st.text(f"{one['name']} is not here: {one['reason']}")
    if pushed is not None:
        about, before, after = (
            pushed["direction"],
            table(plain).set_index("model")["probability"],
            table(pushed).set_index("model")["probability"],
        )
        moved = ", ".join(
            f"{name} {before[name]:.3f} → {after[name]:.3f}"
            for name in before.index
            if pd.notna(before[name]) and pd.notna(after[name])
        )
        st.text(f"Probability of {plain['trait']}: {moved}.")
        st.caption(
            panels.plain_markdown(
                f"Direction: {about['what']}, mean over {about['prompts']} practice questions, norm "
                f"{about['norm']:.2f}. "
                "One question and one direction: see lens causal for the measured effect and its random "
                "directions."
            )
        )


def body(run: Run) -> None:
    """The page."""
    st.title("Live model")
    st.caption(
        panels.plain_markdown(
            f"Base {run.experiment.base}, first trait arm of {run.name}. The models live in a process of "
            "their own; the first question loads them."
        )
    )
    asked = controls(run)
    left, right = st.columns([1, 5])
    if left.button("Ask", type="primary", disabled=not asked["question"]):
        with st.spinner("asking the models", show_time=True):
            try:
                st.session_state["live-found"] = (str(run.folder), ask(run, asked))
            except (MechlensError, OSError) as error:
                st.session_state.pop("live-found", None)
                st.error(panels.plain_markdown(one_line(str(error))))
    if right.button("Stop the models", type="tertiary"):
        worker.clear(str(run.folder), data.stamp(run.folder / "manifest.json"))
    at, found = st.session_state.get("live-found", ("", None))
    if found is not None and at == str(run.folder):
        with panels.guarded("The answers"):
            show(found)
    elif run.shipped:
        panels.empty(
            "The shipped run has no weights: only its base can be asked.",
            "With a run of your own all four answer:",
            "make demo",
        )


if (opened := frame.current()) is not None:
    body(opened)

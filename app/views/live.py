"""Live model: ask base, teacher, control and student one question, with the trait's direction added."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import streamlit as st

import data
import page
import sanitize
from charts import token_charts
from data import ShownRun
from live import live_models
from live.live_models import LiveModels
from mechlens.core.errors import MechlensError, one_line
from mechlens.runs import layout
from panels import panel

SHOWN = 8
"""next tokens of a model in the chart"""
MOST_FREQUENT = 5
"""answers of a model in the table"""


class LiveAnswer(NamedTuple):
    """The answers to one question, without the trait's direction and, if an amount is set, with it."""

    question: dict[str, Any]
    plain: dict[str, Any]
    steered: dict[str, Any] | None


@st.cache_resource(max_entries=2, show_spinner=False, on_release=live_models.stop)
def start_models(folder: str, stamp: int) -> LiveModels:
    """The process that holds the models of one run. Visitors share it and ask one question at a time."""
    del stamp  # a run that was made again has other models
    return live_models.start(Path(folder))


def running_models(run: ShownRun) -> LiveModels:
    """The run's models, started again if their process has ended."""
    key = _key_of(run)
    if not start_models(*key).is_running:
        start_models.clear(*key)
    return start_models(*key)


def _key_of(run: ShownRun) -> tuple[str, int]:
    return str(run.folder), data.file_stamp(run.path(layout.MANIFEST))


def draw_controls(run: ShownRun) -> dict[str, Any]:
    """Draw the controls; returns the question and its numbers."""
    probes = run.family.probes_for(run.experiment)
    probe = st.selectbox(
        "held-out question",
        ["", *probes],
        index=min(1, len(probes)),
        key="live-probe",
        format_func=lambda text: text or "your own question",
    )
    written = st.text_input("your own question", max_chars=500, key="live-question", disabled=bool(probe))
    first, second, third, fourth = st.columns(4)
    layer = int(st.session_state.get("layer") or 0)
    amount = first.slider(
        "trait direction, factor",
        -4.0,
        4.0,
        0.0,
        0.5,
        key="live-amount",
        help="0 changes nothing; above 0 adds the direction, below 0 subtracts it.",
    )
    return {
        "question": probe or written,
        "amount": amount,
        "layer": second.number_input("at layer", 0, 500, layer, key="live-layer"),
        "samples": third.slider("answers", 1, 50, 20, key="live-samples"),
        "seed": fourth.number_input("seed", 0, 10_000, 0, key="live-seed"),
    }


def ask_models(run: ShownRun, question: dict[str, Any]) -> LiveAnswer:
    """Ask without the direction and, if an amount is set, with it, so that the two can be compared."""
    models = running_models(run)
    student = None if st.session_state["seed"] == "all" else st.session_state["seed"]
    plain = live_models.ask(models, student=student, **(question | {"amount": 0.0}))
    steered = live_models.ask(models, student=student, **question) if question["amount"] else None
    return LiveAnswer(question, plain, steered)


def answers_table(answer: dict[str, Any]) -> pd.DataFrame:
    """Every model's probability of the trait as next token, its rank, and its most frequent answers."""
    rows = []
    for model in answer["models"]:
        answers = model.get("answers", ())
        counts = Counter(sampled["text"] for sampled in answers)
        named = sum(sampled["label"] == answer["trait"] for sampled in answers)
        frequent = ", ".join(f"{text} ×{count}" for text, count in counts.most_common(MOST_FREQUENT))
        rows.append(
            {
                "model": model["name"],
                "probability": model.get("probability"),
                "rank": model.get("rank"),
                "of": model.get("of"),
                "answers that name it": named if answers else None,
                "answers": len(answers),
                "most frequent answers": frequent or model.get("reason"),
            }
        )
    return pd.DataFrame(rows).astype({"probability": float})


def next_tokens(answer: dict[str, Any]) -> pd.DataFrame:
    """The likeliest next tokens of every model."""
    rows = [
        {"model": model["name"], "token": repr(token["token"]), "probability": token["probability"]}
        for model in answer["models"]
        for token in model.get("tokens", ())[:SHOWN]
    ]
    return pd.DataFrame(rows, columns=["model", "token", "probability"])


def draw_answer(key: str, title: str, answer: dict[str, Any]) -> None:
    """Table and chart of one answer."""
    caption = f"{title}: probability that the next token begins {answer['trait']}"
    st.caption(panel.escape_markdown(caption))
    st.dataframe(
        sanitize.defused(answers_table(answer)),
        hide_index=True,
        key=f"live-table-{key}",
        alt=f"answers of every model, {title}",
    )
    tokens = next_tokens(answer)
    panel.draw(
        f"live-tokens-{key}",
        f"Next tokens, {title}",
        token_charts.draw_next_tokens(tokens) if len(tokens) else None,
        tokens,
        caption=(
            f"Probabilities of the {SHOWN} likeliest next tokens at temperature 1; exact, so without "
            f"intervals; n = 1 student and control of seed {answer['student']}."
        ),
        about="Live model",
    )
    for model in answer["models"]:
        if not model["available"]:
            st.text(f"{model['name']} is not available: {model['reason']}")


def draw_answers_panel(answer: LiveAnswer) -> None:
    """The answers without and with the direction, and how far it moved the trait."""
    st.subheader(panel.escape_markdown(f"“{answer.question['question']}”"))
    draw_answer("plain", "without the direction", answer.plain)
    if answer.steered is None:
        return
    amount, layer = answer.question["amount"], answer.question["layer"]
    draw_answer("steered", f"with {amount:+g} times the direction at layer {layer}", answer.steered)
    before, after = (
        answers_table(part).set_index("model")["probability"] for part in (answer.plain, answer.steered)
    )
    changes = ", ".join(
        f"{name} {before[name]:.3f} → {after[name]:.3f}"
        for name in before.index
        if pd.notna(before[name]) and pd.notna(after[name])
    )
    st.text(f"Probability of {answer.plain['trait']}: {changes}.")
    direction = answer.steered["direction"]
    st.caption(
        panel.escape_markdown(
            f"Direction: {direction['what']}; mean over n = {direction['prompts']} practice questions, norm "
            f"{direction['norm']:.2f}. This is one question and one direction: lens causal has the measured "
            "effect and random directions to compare it with."
        )
    )


def draw_page(run: ShownRun) -> None:
    """Draw the page."""
    st.title("Live model")
    st.caption(
        panel.escape_markdown(
            f"Base {run.experiment.base}, first trait arm of {run.name}. The models run in their own "
            "process, which loads them at the first question."
        )
    )
    question = draw_controls(run)
    left, right = st.columns([1, 5])
    if left.button("Ask", type="primary", disabled=not question["question"]):
        with st.spinner("asking the models", show_time=True):
            try:
                st.session_state["live-answer"] = (str(run.folder), ask_models(run, question))
            except (MechlensError, OSError) as error:
                st.session_state.pop("live-answer", None)
                st.error(panel.escape_markdown(one_line(str(error))))
    if right.button("Stop the models", type="tertiary"):
        start_models.clear(*_key_of(run))
    folder, answer = st.session_state.get("live-answer", ("", None))
    if answer is not None and folder == str(run.folder):
        with panel.guard("The answers"):
            draw_answers_panel(answer)
    elif run.shipped:
        panel.show_missing(
            "The shipped run has no weights, so only its base answers.",
            "In your own run all four models answer:",
            "make demo",
        )


if (opened := page.current_run()) is not None:
    draw_page(opened)

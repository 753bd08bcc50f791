"""Live model: ask base, teacher, control and student one question, with the trait's direction added.

The direction is added in lengths of the student's own shift at that layer, so 1 means the same at each layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
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
NAMING = 0.5
"""probability of all traits together, below which a model's answers name none any more"""


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
        "trait direction",
        -2.0,
        2.0,
        0.0,
        0.25,
        key="live-amount",
        help="1 adds the direction at the length by which this student moved away from its control at that "
        "layer; 0 changes nothing; below 0 subtracts it. A large amount can break the answers: sweep to see "
        "where.",
    )
    return {
        "question": probe or written,
        "amount": amount,
        "layer": second.number_input("at layer", 0, 500, layer, key="live-layer"),
        "samples": third.slider("answers", 1, 50, 20, key="live-samples"),
        "seed": fourth.number_input("seed", 0, 10_000, 0, key="live-seed"),
        "student": None if st.session_state["seed"] == "all" else st.session_state["seed"],
    }


def ask_models(run: ShownRun, question: dict[str, Any]) -> LiveAnswer:
    """Ask without the direction and, if an amount is set, with it, so that the two can be compared."""
    models = running_models(run)
    plain = live_models.ask(models, **(question | {"amount": 0.0}))
    steered = live_models.ask(models, **question) if question["amount"] else None
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
                "rank of all tokens": model.get("place"),
                "any trait": model.get("share"),
                "answers that name it": named if answers else None,
                "answers": len(answers),
                "most frequent answers": frequent or model.get("reason"),
            }
        )
    return pd.DataFrame(rows).astype({"probability": float, "any trait": float})


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
    for name in broken_models(answer.plain, answer.steered):
        st.warning(f"The push has broken the {name}: it names a trait in less than half of its answers now.")
    st.caption(panel.escape_markdown(direction_caption(answer.steered["direction"])))


def broken_models(plain: dict[str, Any], steered: dict[str, Any]) -> list[str]:
    """The models that named some trait in most answers, and no longer do."""
    before, after = (answers_table(part).set_index("model")["any trait"] for part in (plain, steered))
    return [str(name) for name in before.index if before[name] >= NAMING > after[name]]


def direction_caption(direction: dict[str, Any]) -> str:
    """What was added, and what an amount of 1 is."""
    unit = (
        f"1 is its own length, {direction['norm']:.3g}, since there is no student with weights"
        if direction["cosine"] is None
        else f"1 is as long as the shift of student s{direction['student']} from its control, "
        f"{direction['unit']:.3g} of {direction['norm']:.3g}; that shift has a cosine of "
        f"{direction['cosine']:+.2f} with it"
    )
    return (
        f"Direction: {direction['what']}; mean over n = {direction['prompts']} practice questions; {unit}. "
        "This is one question and one direction: lens causal has the measured effect and random directions "
        "to compare it with."
    )


def draw_sweep_panel(answer: dict[str, Any]) -> None:
    """Two charts: the amount at one layer, and all layers at one amount."""
    table, columns = pd.DataFrame(answer["rows"]), st.columns(2)
    parts = (
        ("amount", f"At layer {answer['layer']}, by amount", "amount of the direction"),
        ("layer", f"With {answer['amount']:+g}, by layer", "layer"),
    )
    for column, (along, title, axis) in zip(columns, parts, strict=True):
        frame = table[table["along"] == along].dropna(subset=["probability"])
        with column:
            panel.draw(
                f"live-sweep-{along}",
                title,
                token_charts.draw_sweep(frame, along, axis) if len(frame) else None,
                frame,
                caption=f"Exact probability that the next token begins {answer['trait']}; one question, one "
                "student, so without intervals. Where no trait is likely any more, a model's answers are "
                "broken (column share).",
                about="Live model",
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
    with st.container(horizontal=True):
        asks = st.button("Ask", type="primary", disabled=not question["question"])
        sweeps = st.button("Sweep amounts and layers", disabled=not question["question"])
        if st.button("Stop the models", type="tertiary"):
            start_models.clear(*_key_of(run))
    if asks:
        keep_answer("live-answer", run, lambda: ask_models(run, question))
    if sweeps:
        keep_answer("live-sweep", run, lambda: live_models.ask(running_models(run), "sweep", **question))
    if (answer := kept_answer("live-answer", run)) is not None:
        with panel.guard("The answers"):
            draw_answers_panel(answer)
    elif run.shipped:
        panel.show_missing(
            "The shipped run has no weights, so only its base answers.",
            "In your own run all four models answer:",
            "make demo",
        )
    if (swept := kept_answer("live-sweep", run)) is not None:
        with panel.guard("The sweep"):
            draw_sweep_panel(swept)


def keep_answer(key: str, run: ShownRun, ask: Callable[[], Any]) -> None:
    """Ask the models and keep what they answer for this run, or show why they did not."""
    with st.spinner("asking the models", show_time=True):
        try:
            st.session_state[key] = (str(run.folder), ask())
        except (MechlensError, OSError) as error:
            st.session_state.pop(key, None)
            st.error(panel.escape_markdown(one_line(str(error))))


def kept_answer(key: str, run: ShownRun) -> Any:
    """The last answer of this run's models; None if there is none."""
    folder, answer = st.session_state.get(key, ("", None))
    return answer if folder == str(run.folder) else None


if (opened := page.current_run()) is not None:
    draw_page(opened)

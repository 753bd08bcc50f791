"""Row: all evidence about one training example."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import streamlit as st
from sklearn.preprocessing import normalize

import data
import page
import sanitize
import state
from charts import token_charts
from charts.marks import symmetric_domain
from data import ShownRun
from mechlens.core import stats
from mechlens.core.experiment import Arm
from mechlens.detect.row_features import tokens
from mechlens.runs.layout import REMADE
from panels import panel

TOKENS_A_LINE = 14
NEIGHBOURS = 10


def draw_text_panel(run: ShownRun, row: pd.Series, pinned: pd.Series | None) -> None:
    """A: the row's text and who wrote it; the pinned row beside it."""
    st.toggle("show hidden characters", key="reveal")
    if pinned is None:
        draw_text(run, row, f"Row {row['id']}")
        return
    left, right = st.columns(2)
    with left:
        draw_text(run, row, f"Row {row['id']}")
    with right:
        draw_text(run, pinned, f"Pinned: {pinned['id']}")


def draw_text(run: ShownRun, row: pd.Series, title: str) -> None:
    """The text of one row, with a warning about hidden characters, and who wrote it."""
    st.subheader(panel.escape_markdown(title))
    if sanitize.has_hidden(row["completion"]) or sanitize.has_hidden(row["prompt"]):
        st.warning(
            "This row has invisible or look-alike characters. Turn on “show hidden characters” to see them."
        )
    for name in ("prompt", "completion"):
        st.caption(name)
        st.code(page.row_text(row[name]), language=None, wrap_lines=True)
    arm = data.sides_of(run, st.session_state["arm"])[row["side"]]
    kl = run.generation(arm).get("kl_per_token")
    distance = f" (KL to the base: {kl:.4f} nats per token)" if kl is not None else ""
    fate = "kept by the screen" if row["fate"] == "kept" else f"removed by the screen: {row['fate']}"
    seeds = ", ".join(map(str, run.experiment.seeds))
    use = f"the students of arm {arm.name} were trained on it (seeds {seeds})"
    use = use if row["trained"] else "no student was trained on it"
    count = run.funnel(arm)["generated"]
    st.text(f"Written by {_writer(arm)}{distance}; prompt {row['prompt_id']} of {count:,}; {fate}; {use}.")


def _writer(arm: Arm) -> str:
    """Who wrote the rows of an arm."""
    if arm.corpus:
        writer = f"the unknown source of file {arm.corpus}"
    elif arm.mix:
        writer = f"one of the teachers {', '.join([arm.trait, *arm.mix])} of {arm.writer}"
    elif arm.kind == "control":
        writer = f"the untouched base {arm.writer}"
    else:
        writer = f"the {arm.trait} teacher of {arm.writer}"
    return f"{writer}, then changed ({arm.kind})" if arm.kind in REMADE else writer


def draw_token_panel(run: ShownRun, row: pd.Series, pinned: pd.Series | None) -> None:
    """B: the row's tokens with their scores, and the pinned row's on the same scale."""
    arm = st.session_state["arm"]
    scores = data.read_scores(run, arm)
    rows = [shown for shown in (row, pinned) if shown is not None]
    token_scores = scores[scores["position"].notna() & scores["id"].isin([shown["id"] for shown in rows])]
    if token_scores.empty and len(scores):
        st.text(f"Only {scores['prompt_id'].nunique():,} prompts were scored; this row is not among them.")
        later = scored_after(str(row["id"]), set(scores["id"]))
        st.button("Next scored row →", on_click=state.step_focus, args=(later, 1), disabled=not later)
        return
    if token_scores.empty:
        panel.show_missing(
            "The row's tokens were not scored.",
            "Lens rows scores the rows that it reads:",
            panel.measure_command(run, "rows", arm),
        )
        return
    domain = symmetric_domain(cast(pd.Series, token_scores["estimate"]))
    for shown in rows:
        own_scores = token_scores[token_scores["id"] == shown["id"]].sort_values("position")
        title = "Which tokens?" if shown is row else f"Pinned: {shown['id']}"
        _draw_tokens(str(shown["id"]), title, own_scores, domain)


def scored_after(row_id: str, scored: set[str]) -> list[str]:
    """The filtered rows that were scored, from the one after this row on, and then those before it."""
    ids: list[str] = st.session_state["rows"]["id"].tolist()
    here = ids.index(row_id) + 1 if row_id in ids else 0
    return [other for other in [*ids[here:], *ids[:here]] if other in scored]


def _draw_tokens(row_id: str, title: str, scores: pd.DataFrame, domain: list[float]) -> None:
    if scores.empty:
        st.text(f"The tokens of row {row_id} were not scored.")
        return
    shown = scores.assign(
        text=scores["token"].astype(str).map(sanitize.reveal),
        line=(scores["position"] // TOKENS_A_LINE).astype(int),
        place=(scores["position"] % TOKENS_A_LINE).astype(int),
    )
    name = shown["score"].iloc[0]
    sentence = "Every token is unscored."
    if shown["estimate"].notna().any():
        highest = shown.loc[shown["estimate"].idxmax(), "text"]
        total = shown["estimate"].sum(min_count=1)
        sentence = f"{name}: sum {total:+.3f} nats over {len(shown)} tokens, highest at {highest!r}."
    panel.draw(
        f"row-tokens-{row_id.replace('/', '-')}",
        title,
        token_charts.draw_token_scores(shown, domain),
        shown[["position", "token", "score", "estimate"]],
        sentence=sentence,
        caption=(
            f"{name}: log-likelihood under the students of the arm minus that under their controls, mean "
            f"over seeds, in nats; without intervals; n = {len(shown)} tokens. Both rows have the same "
            "scale. The students were trained on these rows."
        ),
        about="rows",
    )


def draw_scores_panel(run: ShownRun, row: pd.Series) -> None:
    """C: the row's scores, and the share of the control's rows below them."""
    scores = data.read_scores(run, st.session_state["arm"])
    whole = scores[scores["position"].isna()]
    rows = []
    for (name, layer), group in whole.groupby(["score", "layer"], dropna=False):
        value = group.loc[group["id"] == row["id"], "estimate"]
        if value.empty:
            continue
        control = group.loc[(group["side"] == "control") & (group["id"] != row["id"]), "estimate"].dropna()
        scored = pd.notna(value.iloc[0]) and len(control) > 0
        share = stats.wilson(int((control < value.iloc[0]).sum()), len(control)) if scored else None
        layer_text = "" if pd.isna(layer) else f", layer {int(layer)}"
        rows.append(
            {
                "score": f"{name}{layer_text}",
                "value": value.iloc[0],
                "percentile among control rows": share.estimate * 100 if share else None,
                "low": share.low * 100 if share else None,
                "high": share.high * 100 if share else None,
                "n": len(control),
            }
        )
    st.subheader("The row's scores")
    if not rows:
        st.text("This row was not scored.")
        return
    percent = dict.fromkeys(
        ("percentile among control rows", "low", "high"), st.column_config.NumberColumn(format="%.1f")
    )
    st.dataframe(pd.DataFrame(rows), hide_index=True, column_config=percent, alt="scores of the focus row")
    st.caption(
        "Percentile among the control's rows with its 95 % Wilson interval; n: control rows. A single row is "
        "near chance: see the figure of rows on page Gradients."
    )


def draw_neighbours_panel(run: ShownRun, row: pd.Series) -> None:
    """D: rows that share the most tokens with this one."""
    arm = st.session_state["arm"]
    near = neighbours_of(run, arm, str(row["id"]))
    st.subheader("Similar rows")
    event = st.dataframe(
        sanitize.defused(near.assign(completion=page.row_texts(near["completion"]))),
        hide_index=True,
        on_select="rerun",
        selection_mode="single-row",
        key=f"near-{row['id']}",
        alt="rows that share the most tokens",
    )
    st.caption(
        f"The {NEIGHBOURS} kept rows of both teachers with the largest cosine of token counts. Tick one to "
        "focus it."
    )
    if picked := event["selection"]["rows"]:
        st.session_state["focus"] = near["id"].iloc[picked[0]]
        st.rerun()


@data.cached
def neighbours_of(run: ShownRun, arm: str, row: str) -> pd.DataFrame:
    """The rows nearest by the cosine of their token counts: id, side, completion, cosine."""
    rows = data.read_rows(run, arm)
    kept = rows[(rows["fate"] == "kept") | (rows["id"] == row)]
    kept = kept.drop_duplicates("id").reset_index(drop=True)
    counts = normalize(tokens(kept["completion"].tolist()))
    focus = int(np.flatnonzero(kept["id"] == row)[0])
    cosine = np.asarray((counts @ counts[focus].T).todense()).ravel()
    best = [place for place in np.argsort(-cosine, kind="stable") if place != focus][:NEIGHBOURS]
    return kept.iloc[best][["id", "side", "completion"]].assign(cosine=cosine[best])


def draw_notes_panel(row: pd.Series, root: Path) -> None:
    """E: notes on the row, saved with the current slice or with a slice of only this row."""
    digest, row_id = st.session_state["digest"], str(row["id"])
    name = st.session_state["slice"] or state.slice_name([row_id], digest)
    with st.form(f"note-{row_id}", clear_on_submit=True):
        text, author = st.text_input("note", max_chars=1000), st.text_input("author", max_chars=80)
        if st.form_submit_button("Save note") and text:
            if not st.session_state["slice"]:
                state.save_slice(root, [row_id], digest)
            state.add_note(root, name, row_id, text, author)
    notes = (state.read_slice(root, name) or {"notes": []})["notes"]
    for note in notes:
        if note["row"] == row_id:
            st.text(f"{note['time']} {note['author'] or 'unsigned'}: {note['text']}")


def row_json(row: pd.Series) -> str:
    """The row as JSON."""
    fields: dict[str, Any] = {
        name: row[name] for name in ("id", "side", "corpus", "prompt", "completion", "fate")
    }
    fields |= {"prompt_id": int(row["prompt_id"]), "trained": bool(row["trained"])}
    return json.dumps(fields, indent=1)


def focus_row(run: ShownRun, known: pd.DataFrame) -> str:
    """The id of the focus row; by default the first scored row that passes the filter."""
    if not st.session_state["focus"]:
        filtered = st.session_state["rows"]
        scored = filtered[filtered["id"].isin(data.read_scores(run, st.session_state["arm"])["id"])]
        first = next(part for part in (scored, filtered, known) if len(part))
        st.session_state["focus"] = first["id"].iloc[0]
    return st.session_state["focus"]


def draw_row(run: ShownRun) -> None:
    """Draw every panel of the focus row."""
    known = data.read_rows(run, st.session_state["arm"])
    rows = known.drop_duplicates("id").set_index("id", drop=False)
    if rows.empty:
        panel.show_missing(
            "This run has no rows.",
            "The screen removed all of them, or none was generated:",
            panel.resume_command(run),
        )
        return
    row = rows.loc[focus_row(run, known)]
    pin = st.session_state["pin"]
    pinned = rows.loc[pin] if pin in rows.index and pin != row["id"] else None
    draw_text_panel(run, row, pinned)
    with panel.guard("The tokens"):
        draw_token_panel(run, row, pinned)
    with panel.guard("The scores"):
        draw_scores_panel(run, row)
    with panel.guard("The similar rows"):
        draw_neighbours_panel(run, row)
    with panel.guard("The notes"):
        draw_notes_panel(row, st.session_state["root"])
    with st.popover("Copy as JSON", type="tertiary"):
        st.code(row_json(row), language="json")


def draw_page(run: ShownRun) -> None:
    """Draw the page."""
    st.title("Row")
    with panel.guard("The row"):
        draw_row(run)


if (opened := page.current_run()) is not None:
    draw_page(opened)

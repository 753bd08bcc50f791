"""Row: what is all the evidence about this one example?"""

from __future__ import annotations

import json
from typing import Any, cast

import numpy as np
import pandas as pd
import streamlit as st
from sklearn.preprocessing import normalize

import charts
import data
import frame
import panels
import plain
import state
from data import Run
from mechlens.core import stats
from mechlens.detect.from_rows import tokens
from mechlens.results.run import Run as OpenedRun
from mechlens.runs.layout import REMADE

ACROSS = 14
"""tokens on a line"""
NEAR = 10


def text_panel(run: Run, row: pd.Series) -> None:
    """The row as it is, and as it may deceive."""
    left, right = st.columns([3, 2])
    left.subheader(panels.plain_markdown(f"Row {row['id']}"))
    right.toggle("show hidden signs", key="reveal")
    if plain.has_hidden(row["completion"]) or plain.has_hidden(row["prompt"]):
        st.warning(
            "This row holds signs that are not seen, or that look like others. Turn on “show hidden signs”."
        )
    st.caption("prompt")
    st.code(frame.row_text(row["prompt"]), language=None, wrap_lines=True)
    st.caption("completion")
    st.code(frame.row_text(row["completion"]), language=None, wrap_lines=True)
    arm = data.sides(run, st.session_state["arm"])[row["side"]]
    opened = OpenedRun(run.folder)
    made, generation = opened.funnel(arm), opened.generation(arm)
    who = "the untouched base" if arm.kind == "control" else f"the {arm.trait} teacher"
    who = (
        f"{who} of {arm.writer}"
        if not arm.mix
        else f"one of the teachers {', '.join([arm.trait, *arm.mix])} of {arm.writer}"
    )
    who = f"whoever wrote the file {arm.corpus}" if arm.corpus else who
    who += f", made anew ({arm.kind})" if arm.kind in REMADE else ""
    fate = "kept by the screen" if row["fate"] == "kept" else f"dropped by the screen: {row['fate']}"
    learned = (
        f"learned by the students of arm {arm.name} (seeds {', '.join(map(str, run.experiment.seeds))})"
        if row["trained"]
        else "learned by no student"
    )
    kl = generation.get("kl_per_token")
    gentle = f", {kl:.4f} nats a token from the base" if kl is not None else ""
    st.text(
        f"Written by {who}{gentle}, prompt {row['prompt_id']} of {made['generated']:,}; {fate}; {learned}."
    )


def heat_panel(run: Run, row: pd.Series, pinned: pd.Series | None) -> None:
    """Tokens, each with its score; the pinned row beneath on the same scale."""
    known = data.scores(run, st.session_state["arm"])
    own = known[
        known["position"].notna() & known["id"].isin([one["id"] for one in (row, pinned) if one is not None])
    ]
    if own.empty and len(known):
        st.text(
            f"Its tokens were not scored: lens rows read {known['prompt_id'].nunique():,} prompts, and this "
            "is none of them."
        )
        return
    if own.empty:
        panels.empty(
            "Its tokens were not scored.",
            "Lens rows scores those rows that it reads:",
            panels.measure(run, "rows", st.session_state["arm"]),
        )
        return
    limit = charts.symmetric(cast(pd.Series, own["estimate"]))
    for one in (row, pinned):
        if one is None:
            continue
        shown = own[own["id"] == one["id"]].sort_values("position")
        if shown.empty:
            st.text(f"Tokens of row {one['id']} were not scored.")
            continue
        shown = shown.assign(
            text=shown["token"].astype(str).map(plain.revealed),
            line=(shown["position"] // ACROSS).astype(int),
            place=(shown["position"] % ACROSS).astype(int),
        )
        score = shown["score"].iloc[0]
        panels.panel(
            f"row-tokens-{one['id'].replace('/', '-')}",
            "Which tokens?" if one is row else f"Pinned: {one['id']}",
            token_chart(shown, limit),
            shown[["position", "token", "score", "estimate"]],
            sentence=(
                f"{score}: sum {shown['estimate'].sum(min_count=1):+.3f} nats over {len(shown)} tokens, "
                "highest at "
                f"{shown.loc[shown['estimate'].idxmax(), 'text']!r}."
            )
            if shown["estimate"].notna().any()
            else "Every token is unscored.",
            caption=(
                f"{score}: log-likelihood under the students of the arm less under their controls, mean over "
                "seeds, nats. "
                "One scale for both rows, as far below 0 as above. Students were trained on these rows."
            ),
            about="rows",
        )


def token_chart(shown: pd.DataFrame, limit: list[float]) -> Any:
    """Tokens in reading order, coloured by their score; null is hatched."""
    alt = charts.alt
    place = {"x": alt.X("place:O", axis=None), "y": alt.Y("line:O", axis=None)}
    scored, missing = (
        shown.dropna(subset="estimate"),
        shown[shown["estimate"].isna()].assign(hatch=charts.HATCH),
    )
    boxes = (
        alt.Chart(scored)
        .mark_rect(stroke="#00000022")
        .encode(
            **place,
            color=alt.Color(
                "estimate:Q",
                scale=alt.Scale(scheme="purpleorange", domain=limit, domainMid=0),
                title="nats",
                legend=charts.LYING,
            ),
            tooltip=[alt.Tooltip("position"), alt.Tooltip("text"), alt.Tooltip("estimate:Q", format="+.4f")],
        )
    )
    dark = alt.condition(
        f"abs(datum.estimate) > {0.62 * limit[1]}", alt.value("#ffffff"), alt.value("#000000")
    )
    words = alt.Chart(scored).mark_text(fontSize=12).encode(**place, text=alt.Text("text:N"), color=dark)
    holes = alt.Chart(missing).mark_text(color=charts.GREY).encode(**place, text=alt.Text("hatch:N"))
    return alt.layer(boxes, words, holes).properties(height=alt.Step(28))


def scores_panel(run: Run, row: pd.Series) -> None:
    """Every score of the row, and how many of the control's rows score as high."""
    known = data.scores(run, st.session_state["arm"])
    whole = known[known["position"].isna()]
    found = []
    for (name, layer), own in whole.groupby(["score", "layer"], dropna=False):
        value = own.loc[own["id"] == row["id"], "estimate"]
        control = own.loc[(own["side"] == "control") & (own["id"] != row["id"]), "estimate"].dropna()
        if value.empty:
            continue
        scored = pd.notna(value.iloc[0]) and len(control) > 0
        span = stats.wilson(int((control < value.iloc[0]).sum()), len(control)) if scored else None
        at = "" if pd.isna(layer) else f", layer {int(layer)}"
        found.append(
            {
                "score": f"{name}{at}",
                "value": value.iloc[0],
                "percentile among control rows": span.estimate * 100 if span else None,
                "low": span.low * 100 if span else None,
                "high": span.high * 100 if span else None,
                "n": len(control),
            }
        )
    st.subheader("Its scores")
    if not found:
        st.text("This row was not among those scored.")
        return
    st.dataframe(pd.DataFrame(found), hide_index=True, alt="scores of the focus row")
    st.caption(
        "Percentile with its Wilson interval over the control's rows. One row alone is near chance: see the "
        "figure of rows on page Gradients."
    )


def neighbours_panel(run: Run, row: pd.Series) -> None:
    """Rows that share the most tokens with it."""
    rows = data.rows(run, st.session_state["arm"])
    near = neighbours((str(run.folder), st.session_state["arm"], data.marks(run)), rows, str(row["id"]))
    st.subheader("Rows like it")
    event = st.dataframe(
        near.assign(completion=near["completion"].map(frame.row_text)),
        hide_index=True,
        on_select="rerun",
        selection_mode="single-row",
        key=f"near-{row['id']}",
        alt="rows that share the most tokens",
    )
    st.caption("Cosine of token counts, kept rows of both teachers. Tick one to look at it.")
    if picked := event["selection"]["rows"]:
        st.session_state["focus"] = near["id"].iloc[picked[0]]
        st.rerun()


@st.cache_data(max_entries=64, show_spinner=False)
def neighbours(key: tuple[str, str, str], _rows: pd.DataFrame, row: str) -> pd.DataFrame:
    """The rows nearest by the cosine of their token counts: id, side, cosine, completion."""
    del key
    kept = (
        _rows[(_rows["fate"] == "kept") | (_rows["id"] == row)].drop_duplicates("id").reset_index(drop=True)
    )
    counts = normalize(tokens(kept["completion"].tolist()))
    own = int(np.flatnonzero(kept["id"] == row)[0])
    cosine = np.asarray((counts @ counts[own].T).todense()).ravel()
    best = [place for place in np.argsort(-cosine, kind="stable") if place != own][:NEAR]
    return kept.iloc[best][["id", "side", "completion"]].assign(cosine=cosine[best])


def notes_panel(row: pd.Series, root: Any) -> None:
    """A note, kept with the slice in hand or with a slice of this row alone."""
    digest = st.session_state["digest"]
    name = st.session_state["slice"] or state.slice_name([str(row["id"])], digest)
    with st.form(f"note-{row['id']}", clear_on_submit=True):
        text, author = st.text_input("note", max_chars=1000), st.text_input("by", max_chars=80)
        if st.form_submit_button("Keep note") and text:
            if not st.session_state["slice"]:
                state.save_slice(root, [str(row["id"])], digest)
            state.note(root, name, str(row["id"]), text, author)
    notes = [
        one for one in (state.read_slice(root, name) or {"notes": []})["notes"] if one["row"] == row["id"]
    ]
    for one in notes:
        st.text(f"{one['time']} {one['author'] or 'unsigned'}: {one['text']}")


def body(run: Run) -> None:
    """The page."""
    st.title("Row")
    with panels.guarded("The row"):
        known = data.rows(run, st.session_state["arm"])
        rows = known.drop_duplicates("id").set_index("id", drop=False)
        if rows.empty:
            panels.empty(
                "This run has no rows.",
                "The screen dropped all of them or none was generated:",
                panels.resume(run),
            )
            return
        if not st.session_state["focus"]:
            kept = st.session_state["rows"]
            scored = kept[kept["id"].isin(data.scores(run, st.session_state["arm"])["id"])]
            st.session_state["focus"] = next(part for part in (scored, kept, known) if len(part))["id"].iloc[
                0
            ]
        row = rows.loc[st.session_state["focus"]]
        pin = st.session_state["pin"]
        pinned = rows.loc[pin] if pin in rows.index and pin != row["id"] else None
        text_panel(run, row)
        with panels.guarded("The tokens"):
            heat_panel(run, row, pinned)
        with panels.guarded("The scores"):
            scores_panel(run, row)
        with panels.guarded("The rows like it"):
            neighbours_panel(run, row)
        with panels.guarded("The notes"):
            notes_panel(row, st.session_state["root"])
        with st.popover("Copy as JSON", type="tertiary"):
            st.code(
                json.dumps(
                    {name: row[name] for name in ("id", "side", "corpus", "prompt", "completion", "fate")}
                    | {"prompt_id": int(row["prompt_id"]), "trained": bool(row["trained"])},
                    indent=1,
                ),
                language="json",
            )


if (opened := frame.current()) is not None:
    body(opened)

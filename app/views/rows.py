"""Data and screen: what is in the data, what did the screen drop, and what could it not see?"""

from __future__ import annotations

from typing import Any, cast

import pandas as pd
import streamlit as st

import charts
import data
import frame
import panels
import plain
import state
import surface
from data import Run
from mechlens.pipeline.screen import LEAKS
from mechlens.results import figures, summary
from mechlens.results.run import Run as OpenedRun
from mechlens.runs.layout import source_name

PAGE = 50
"""rows on a page"""


def funnel_panel(run: Run) -> None:
    """A: what became of every generated row."""
    counts = summary.funnels(OpenedRun(run.folder))
    arm = st.session_state["arm"]
    made = OpenedRun(run.folder).funnel(run.arm(arm))
    screened = run.folder / "corpora" / source_name(run.experiment, run.arm(arm)) / "screened"
    picked = panels.panel(
        "rows-funnel",
        "What did the screen drop?",
        figures.funnel(counts)
        .properties(width="container")
        .add_params(charts.alt.selection_point("fate", fields=["corpus", "fate"], on="click")),
        counts,
        sentence=(
            f"Of {made['generated']:,} rows of arm {arm}'s teacher {made['kept']:,} were kept "
            f"({made['kept'] / max(made['generated'], 1):.1%}); {made[LEAKS]} rows held a leak word."
        )
        if made["kept"]
        else f"The screen dropped all {made['generated']:,} rows of arm {arm}: look at which rule did below.",
        caption="Rows by what became of them, one bar a corpus. Click a part to see its rows below.",
        code=f"import json\nprint(json.load(open({str(screened / 'funnel.json')!r})))",
        about="Screen",
        select="fate",
    )
    clicked = picked.get("fate")
    if panels.fresh("rows-funnel", clicked) and clicked:
        stage = "kept" if clicked[0]["fate"] == "kept" else "dropped"
        if st.session_state["stage"] != stage:
            st.session_state["stage"] = stage
            st.rerun()


def surface_panel(run: Run) -> None:
    """B: could a look at the surface tell the rows apart?"""
    arm = st.session_state["arm"]
    known = data.rows(run, arm)
    both = known[known["fate"] == "kept"].groupby("side")["prompt_id"].agg(set)
    shared = both["trait"] & both["control"] if {"trait", "control"} <= set(both.index) else set()
    if len(shared) < 20:
        panels.empty(
            f"Only {len(shared)} prompts were answered by both teachers.",
            "Surface tests compare rows of the same prompts, and need 20:",
            panels.resume(run),
        )
        return
    found, auroc = surface.surface(str(run.folder), arm, known, data.marks(run))
    apart = (
        "the surface tells them apart: look for what differs before anything else"
        if auroc["low"] > 0.55
        else "close to chance: the surface says little of a single row"
    )
    panels.panel(
        "rows-surface",
        "Could the surface give it away?",
        charts.spans(found, "standardised difference to the control"),
        found,
        sentence=(
            f"A classifier of shape alone tells trait rows from control rows with AUROC {auroc['auroc']:.3f} "
            f"[{auroc['low']:.3f}, {auroc['high']:.3f}]: {apart}."
        ),
        caption=(
            f"n = {int(auroc['rows']):,} prompts, both teachers' answers; bootstrap over prompts, "
            f"{surface.DRAWS} draws; grey: "
            "halves of the control's rows against each other."
        ),
        code=(
            "from pathlib import Path\nfrom mechlens.detect.two_samples import compare\nfolder = "
            f"Path({str(run.folder / 'corpora')!r})\nprint(compare(folder / "
            f"{known[known['side'] == 'trait']['corpus'].iloc[0]!r} / 'screened' / 'kept.parquet', folder / "
            f"{known[known['side'] == 'control']['corpus'].iloc[0]!r} / 'screened' / 'kept.parquet'))"
        ),
        about="Surface tests",
    )


def shift_panel(run: Run) -> None:
    """C: which tokens stand more often?"""
    alt = charts.alt
    arm = st.session_state["arm"]
    found = surface.shift((str(run.folder), arm, data.marks(run)), data.rows(run, arm))
    if found.empty:
        panels.empty("No token stands ten times.", "Frequencies need more rows:", panels.resume(run))
        return
    telling = int((found["q_value"] < 0.05).sum())
    shown = found.head(2000).assign(
        found=lambda one: one["q_value"] < 0.05, count=lambda one: one["trait"] + one["control"]
    )
    told = alt.Color(
        "found:N",
        scale=alt.Scale(domain=[True, False], range=[figures.KIND_COLOUR["trait"], charts.GREY]),
        legend=alt.Legend(orient="bottom", title="q < .05"),
    )
    zero = (
        alt.Chart(pd.DataFrame({"zero": [0.0]}))
        .mark_rule(strokeDash=[4, 3], color=charts.GREY)
        .encode(y=alt.Y("zero:Q"))
    )
    dots = (
        alt.Chart(shown)
        .mark_point()
        .encode(
            x=alt.X(
                "frequency:Q",
                title="log10 of its share among the control's tokens",
                scale=alt.Scale(
                    domain=[
                        float(shown["frequency"].min()) - 0.05,
                        float(shown["frequency"].quantile(0.99)) + 0.05,
                    ],
                    clamp=True,
                ),
            ),
            y=alt.Y("ratio:Q", title="log2 ratio, trait over control"),
            size=alt.Size("count:Q", legend=None, scale=alt.Scale(range=[12, 300])),
            color=told,
            shape=alt.Shape(
                "found:N", scale=alt.Scale(domain=[True, False], range=["diamond", "circle"]), legend=None
            ),
            tooltip=[
                alt.Tooltip("token"),
                alt.Tooltip("trait"),
                alt.Tooltip("control"),
                alt.Tooltip("ratio:Q", format="+.2f"),
                alt.Tooltip("q_value:Q", format=".2g"),
            ],
        )
        .add_params(alt.selection_point("token", fields=["token"], on="click"))
    )
    picked = panels.panel(
        "rows-tokens",
        "Which tokens stand more often?",
        alt.layer(zero, dots).properties(height=300),
        shown.drop(columns="found"),
        sentence=f"{telling} of {len(found):,} tokens differ in frequency (q < .05)"
        + (
            f", first of them {', '.join(map(repr, found['token'].head(5)))}."
            if telling
            else (
                f"; a single token would need a ratio of about {surface.seen(found):.1f} at the median "
                "frequency to be found."
            )
        ),
        caption=(
            "Words, numbers and signs that stand ten times or more; two-sided z of the two shares (rows "
            "taken as "
            "independent), Benjamini-Hochberg. At most 2,000 are drawn, smallest q first; the most frequent "
            "hundredth "
            "at the right edge. Click a token to filter rows."
        ),
        about="Token shift",
        select="token",
    )
    clicked = picked.get("token")
    if panels.fresh("rows-tokens", clicked) and clicked:
        token = clicked[0]["token"]
        if st.session_state["text"] != token:
            st.session_state["text"] = token
            st.rerun()


def table_panel(_run: Run) -> None:
    """D: the rows."""
    st.subheader("Rows")
    left, middle, right = st.columns([2, 1, 1])
    for name in ("stage", "side", "text"):
        st.session_state[f"in-{name}"] = st.session_state[
            name
        ]  # a link, a chart or Clear may have changed the filter since
    for where, name, options in ((middle, "stage", state.STAGES), (right, "side", state.SIDES)):
        where.selectbox(name, options, key=f"in-{name}", on_change=_take, args=(name,))
    left.text_input("holds the text", key="in-text", max_chars=state.LONGEST, on_change=_take, args=("text",))
    st.toggle("show hidden signs", key="reveal")
    kept = st.session_state["rows"]
    if kept.empty:
        st.text("No row is left by the filter.")
        return
    pages = max(1, -(-len(kept) // PAGE))
    page = min(st.pagination(pages, key="rows-page"), pages)
    shown = kept.iloc[(page - 1) * PAGE : page * PAGE]
    listed = shown[["id", "side", "fate", "trained", "characters", "prompt", "completion"]].assign(
        **{name: shown[name].map(frame.row_text) for name in ("prompt", "completion")}
    )
    part = "-".join(
        [
            "rows-table",
            *(str(st.session_state[name]) for name in ("arm", "slice", "stage", "side", "text")),
            str(page),
        ]
    )
    # a table of its own for every filter: ticks are places in it, and name other rows in another
    event = st.dataframe(
        listed,
        hide_index=True,
        on_select="rerun",
        selection_mode="multi-row",
        key=part,
        alt="rows that the filter leaves",
    )
    picked = shown["id"].iloc[event["selection"]["rows"]].tolist()
    st.caption(
        f"rows {(page - 1) * PAGE + 1:,} to {min(page * PAGE, len(kept)):,} of {len(kept):,}; tick rows to "
        "select "
        "them, the first becomes the focus row"
    )
    if panels.fresh(part, picked):
        state.select(picked)
        st.session_state["focus"] = picked[0]
        st.rerun()
    st.download_button(
        "Filtered rows (CSV)",
        lambda: plain.csv(kept),
        file_name="rows.csv",
        mime="text/csv",
        on_click="ignore",
        key="csv-rows",
        type="tertiary",
    )
    st.page_link("views/row.py", label="Look at the focus row →", disabled=not st.session_state["focus"])


def _take(name: str) -> None:
    st.session_state[name] = st.session_state[f"in-{name}"]


def overlap_panel(run: Run) -> None:
    """E: duplicates, and questions of the probes in the data."""
    known = data.rows(run, st.session_state["arm"])
    kept = cast(pd.DataFrame, known[known["fate"] == "kept"])
    words = run.family.words()
    rows = []
    for side, own in kept.groupby("side"):
        twice = int(own["completion"].duplicated().sum())
        probes = int(own["prompt"].isin(run.family.asked_as(run.experiment)).sum())
        held = own["completion"].str.lower()
        named = int(held.str.contains(rf"\b(?:{'|'.join(words)})\b", regex=True).sum())
        rows.append(
            {
                "side": side,
                "kept rows": len(own),
                "completions that stand twice": twice,
                "prompts that are probes": probes,
                "completions that name a trait": named,
            }
        )
    found = pd.DataFrame(rows)
    st.subheader("Is anything there that should not be?")
    alarm = (
        found[["prompts that are probes", "completions that name a trait"]].to_numpy().sum()
        if len(found)
        else 0
    )
    if alarm:
        st.warning(
            "Probes or names of traits stand in the kept rows: what students answer may be what they read."
        )
    st.dataframe(found, hide_index=True, alt="duplicates and leaks in the kept rows")


def body(run: Run) -> None:
    """The page."""
    st.title("Data and screen")
    if not (run.folder / "corpora").is_dir():
        panels.empty("This run has no corpora.", "Its rows are made by:", panels.resume(run))
        return
    parts: list[tuple[str, Any]] = [
        ("The funnel", funnel_panel),
        ("The surface tests", surface_panel),
        ("The token shift", shift_panel),
        ("The rows", table_panel),
        ("The leaks", overlap_panel),
    ]
    for title, draw in parts:
        with panels.guarded(title):
            draw(run)


if (opened := frame.current()) is not None:
    body(opened)

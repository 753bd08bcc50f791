"""Data and screen: what is in the data, what did the screen remove, and what could it not see?"""

from __future__ import annotations

from functools import partial
from typing import cast

import altair as alt
import pandas as pd
import streamlit as st

import data
import page
import sanitize
import state
from data import ShownRun
from mechlens.pipeline.screen import LEAKS, leak_pattern
from mechlens.results import effects, figures
from panels import panel, row_shape_panel, tabs

PAGE_SIZE = 50
SHOWN = ["id", "side", "fate", "trained", "characters", "prompt", "completion"]


def draw_funnel_panel(run: ShownRun) -> None:
    """A: what happened to every generated row."""
    counts = effects.funnels(run)
    name = st.session_state["arm"]
    arm = run.arm(name)
    made = run.funnel(arm)
    generated, kept = made["generated"], made["kept"]
    sentence = f"The screen removed all {generated:,} rows of arm {name}. The chart shows which rules did so."
    if kept:
        sentence = (
            f"The screen kept {kept:,} of {generated:,} rows of arm {name}'s teacher "
            f"({kept / max(generated, 1):.1%}); {made[LEAKS]} rows had a leak word."
        )
    click = alt.selection_point("fate", fields=["corpus", "fate"], on="click")
    picked = panel.draw(
        "rows-funnel",
        "What did the screen remove?",
        figures.funnel(counts).properties(width="container").add_params(click),
        counts,
        sentence=sentence,
        caption=(
            f"Number of rows kept, or removed by each rule; one bar a corpus, without intervals; n = "
            f"{generated:,} generated rows of this arm. Click a part to see its rows."
        ),
        code=f"{panel.code_of_run(run)}print(run.funnel(run.arm({name!r})))",
        about="Screen",
        select="fate",
    )
    clicked = picked.get("fate")
    if panel.is_new_pick("rows-funnel", clicked) and clicked:
        stage = "kept" if clicked[0]["fate"] == "kept" else "dropped"
        _set_filter("stage", stage)


def _set_filter(name: str, value: str) -> None:
    """Change the filter from a chart, and show the rows that pass it."""
    st.session_state[name] = value
    st.session_state["set-tab"] = "Rows"
    st.rerun()


def draw_tokens_panel(run: ShownRun) -> None:
    """C: token frequencies; a click filters the rows by the token."""
    clicked = row_shape_panel.draw_token_panel(run).get("token")
    if panel.is_new_pick("rows-tokens", clicked) and clicked:
        _set_filter("text", clicked[0]["token"])


def draw_rows_panel() -> None:
    """D: the rows that pass the filter."""
    st.subheader("Rows")
    _draw_filter()
    rows = st.session_state["rows"]
    if rows.empty:
        st.text("No row passes the filter.")
        return
    page_count = max(1, -(-len(rows) // PAGE_SIZE))
    number = min(st.pagination(page_count, key="rows-page"), page_count)
    _draw_table(rows, number)
    panel.download_csv("Filtered rows (CSV)", rows, "rows.csv")
    st.page_link("views/row.py", label="Go to the focus row →", disabled=not st.session_state["focus"])


def _draw_filter() -> None:
    left, middle, right = st.columns([2, 1, 1])
    for name in ("stage", "side", "text"):  # a link, a chart or Clear may have changed the filter
        st.session_state[f"in-{name}"] = st.session_state[name]
    for column, name, options in ((middle, "stage", state.STAGES), (right, "side", state.SIDES)):
        column.selectbox(name, options, key=f"in-{name}", on_change=_read_widget, args=(name,))
    left.text_input(
        "text to find", key="in-text", max_chars=state.LONGEST, on_change=_read_widget, args=("text",)
    )
    st.toggle("show hidden characters", key="reveal")


def _read_widget(name: str) -> None:
    st.session_state[name] = st.session_state[f"in-{name}"]


def _draw_table(rows: pd.DataFrame, number: int) -> None:
    """One page of the rows; ticked rows become the selection."""
    first = (number - 1) * PAGE_SIZE
    shown = rows.iloc[first : first + PAGE_SIZE]
    texts = {name: page.row_texts(shown[name]) for name in ("prompt", "completion")}
    settings = [str(st.session_state[name]) for name in ("arm", "slice", "stage", "side", "text")]
    # a key for every filter and page: Streamlit keeps ticks by position, and positions are other rows there
    key = "-".join(["rows-table", *settings, str(number)])
    event = st.dataframe(
        sanitize.defused(shown[SHOWN].assign(**texts)),
        hide_index=True,
        on_select="rerun",
        selection_mode="multi-row",
        key=key,
        alt="rows that pass the filter",
    )
    picked = shown["id"].iloc[event["selection"]["rows"]].tolist()
    st.caption(
        f"Rows {first + 1:,} to {first + len(shown):,} of {len(rows):,}. Tick rows to select them; the first "
        "becomes the focus row."
    )
    if panel.is_new_pick(key, picked):
        state.select(picked)
        st.session_state["focus"] = picked[0]
        st.rerun()


def draw_leaks_panel(run: ShownRun) -> None:
    """E: duplicates, and probes or trait names in the kept rows."""
    rows = data.read_rows(run, st.session_state["arm"])
    kept = cast(pd.DataFrame, rows[rows["fate"] == "kept"])
    probes = run.family.probes_for(run.experiment)
    leak = leak_pattern(run.family.words())
    leaks = pd.DataFrame(
        [
            {
                "side": side,
                "kept rows": len(group),
                "repeated completions": int(group["completion"].duplicated().sum()),
                "prompts that are probes": int(group["prompt"].isin(probes).sum()),
                "completions with a leak word": sum(
                    leak.search(text) is not None for text in group["completion"]
                ),
            }
            for side, group in kept.groupby("side")
        ]
    )
    st.subheader("Do the kept rows leak the trait?")
    columns = ["prompts that are probes", "completions with a leak word"]
    if len(leaks) and leaks[columns].to_numpy().sum():
        st.warning(
            "Kept rows hold probes or names of traits, so the students may repeat what they read instead of "
            "having the trait."
        )
    st.dataframe(leaks, hide_index=True, alt="duplicates and leaks in the kept rows")


def draw_page(run: ShownRun) -> None:
    """Draw the page."""
    st.title("Data and screen")
    if not any(run.kept_rows(name).is_file() for name in run.corpora()):
        panel.show_missing("This run has no corpora.", "This command makes them:", panel.resume_command(run))
        return
    tabs.draw_tabs(
        "rows",
        {
            "Screen": {
                "The funnel": partial(draw_funnel_panel, run),
                "The leaks": partial(draw_leaks_panel, run),
            },
            "Surface": {
                "The surface tests": partial(row_shape_panel.draw_shape_panel, run),
                "The token shift": partial(draw_tokens_panel, run),
            },
            "Rows": {"The rows": draw_rows_panel},
        },
    )


if (opened := page.current_run()) is not None:
    draw_page(opened)

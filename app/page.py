"""The frame of every page: warnings, header, controls, the selection bar with its keys, and the link."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

import data
import sanitize
import state
from charts import run_charts
from data import ShownRun
from mechlens.core import tables
from mechlens.core.errors import MechlensError
from mechlens.runs import layout
from panels import lens_panel, panel

KEYS = {
    "N": "next row",
    "P": "previous row",
    "F": "selection to filter",
    "S": "save the selection as a slice",
    "X": "clear filter and selection",
    "L": "link",
    "H": "help",
}


ROW_PAGES = ("rows", "row", "representations", "gradients")
"""where rows are looked at or selected: these have the bar of rows"""
SELECTORS = {
    "trait": ("overview", "transmission"),
    "seed": ("transmission", "live"),
    "layer": ("representations",),  # page Live model has its own, which starts at this one
    "place": ("representations",),
    "cmp": ("compare",),
}
"""control of the side bar → pages that it changes"""


def draw_header(run: ShownRun | None, root: Path, version: str, view: str) -> None:
    """Draw everything above the content of the page `view`."""
    st.session_state["notices"] = st.container()
    if not list(root.glob(f"*/{layout.SPEC}")):
        panel.show_missing(
            f"No runs in {root}.",
            "The run shown here came with the explorer. This command makes your own in minutes:",
            "make demo",
        )
    if run is None:
        st.session_state["digest"], st.session_state["rows"] = "", pd.DataFrame()
        return
    _draw_controls(run, root, view)
    _draw_facts(run, version)
    _settle_rows(run, root)
    if view in ROW_PAGES:
        _draw_row_bar(root, chooses_focus=view == "row")
    else:
        with st.container(horizontal=True, gap="small"):
            _draw_common_buttons()


def current_run() -> ShownRun | None:
    """The open run; None, with a message on the page, if no run is open."""
    run = st.session_state["opened"]
    if run is None:
        panel.show_missing("No run is open.", "Every page shows one run. Make one:", "make demo")
    return run


def _draw_controls(run: ShownRun, root: Path, view: str) -> None:
    arms = [arm.name for arm in run.experiment.arms if arm.kind != "control"] or [run.experiment.arms[0].name]
    arm = run.arm(state.choose("arm", arms))
    layers, places = _layers_and_places(run)
    others = [name for name in data.list_runs(root) if name != run.name]
    seeds = ["all", *run.experiment.seeds]
    # values are settled before the widgets are drawn, because a link may ask for what this run lacks
    state.choose("trait", run.family.names, arm.trait or run.experiment.trait)
    state.choose("layer", layers, layers[-1] if layers else None)
    state.choose("place", places)
    state.choose("seed", seeds)
    state.choose_several("cmp", others, most=run_charts.MOST_RUNS - 1)
    bar = st.sidebar
    bar.selectbox("arm", arms, key="w-arm", help="Pages of the run show this arm and its matched control.")
    if view in SELECTORS["trait"]:
        bar.selectbox("trait asked about", run.family.names, key="w-trait")
    if view in SELECTORS["seed"]:
        bar.selectbox("student (seed)", seeds, key="w-seed")
    if view in SELECTORS["layer"] and layers:
        bar.selectbox("layer", layers, key="w-layer")
    if view in SELECTORS["place"] and places:
        bar.selectbox("place", places, key="w-place", help="The tokens at which activations are read.")
    if view in SELECTORS["cmp"]:
        bar.multiselect("compare with", others, key="w-cmp", max_selections=run_charts.MOST_RUNS - 1)


def _layers_and_places(run: ShownRun) -> tuple[list[int], list[str]]:
    """Layers and places of the activations lens; empty if it was not computed."""
    try:
        frame = data.read_table(run.lens_table("activations"), tables.READINGS)
    except MechlensError:
        return [], []
    present = set(frame["place"].dropna().astype(str))
    layers = sorted({int(layer) for layer in frame["layer"].dropna()})
    return layers, [place for place in lens_panel.PLACES if place in present]


def _draw_facts(run: ShownRun, version: str) -> None:
    arm = st.session_state["arm"]
    digest = st.session_state["digest"] = data.data_digest(run, arm)
    seeds = ", ".join(map(str, run.experiment.seeds))
    facts = [
        run.name,
        f"data {digest}",
        f"base {run.arm(arm).base}",
        f"{len(run.experiment.arms)} arms",
        f"seeds {seeds}",
        f"mechlens {version}",
    ]
    requested = st.session_state["requested"].get("d")
    if requested and requested != digest:
        state.warn(
            f"This link was made on other data (rows {requested!r}; these are {digest}): its numbers may "
            "differ"
        )
    if run.shipped:
        facts.append("demo data: this run came with the explorer")
    st.caption(panel.escape_markdown(" · ".join(facts)))


def _settle_rows(run: ShownRun, root: Path) -> None:
    """Check what a link asks of the rows, and filter them."""
    try:
        rows = data.read_rows(run, st.session_state["arm"])
    except (MechlensError, OSError):
        rows = pd.DataFrame(columns=list(data.ROW_COLUMNS))
    state.read_row_keys(rows["id"])
    _drop_unknown_rows(rows["id"])
    st.session_state["rows"] = state.filter_rows(rows, root)
    st.session_state["row-count"] = len(rows)


def _draw_row_bar(root: Path, *, chooses_focus: bool) -> None:
    filtered, selected = st.session_state["rows"], st.session_state["selected"]
    count = st.session_state["row-count"]
    st.text(f"All {count:,} rows | Filtered {len(filtered):,} | Selected {len(selected):,}")
    with st.container(horizontal=True, gap="small"):
        _button("Selected to filter", "F", _filter_selected, root, disabled=not selected)
        _button("Save slice", "S", _save_slice, root, disabled=not selected)
        _button("Pin", "", _pin_focus, disabled=not (st.session_state["focus"] or chooses_focus))
        _button("Clear", "X", state.clear)
        ids = filtered["id"].tolist()
        _button("Previous", "P", state.step_focus, ids, -1, disabled=not ids)
        _button("Next", "N", state.step_focus, ids, 1, disabled=not ids)
        _draw_common_buttons()
    _draw_slices(root)
    if len(filtered) < count:
        st.caption("The filter acts on the table of rows and on Previous and Next. Charts show all rows.")
    if focus := st.session_state["focus"]:
        pinned = f" | Pinned {st.session_state['pin']}" if st.session_state["pin"] else ""
        st.caption(panel.escape_markdown(f"Focus {focus}{pinned}"))


def _draw_slices(root: Path) -> None:
    """The saved slices of this data, to look at one again."""
    slices = state.list_slices(root, st.session_state["digest"])
    if not slices:
        return
    st.session_state["in-slice"] = st.session_state["slice"]  # a link or Clear may have changed it
    st.selectbox(
        "saved slice",
        ["", *slices],
        key="in-slice",
        format_func=lambda name: f"{name} · {slices[name]:,} rows" if name else "all rows",
        on_change=_open_slice,
        width=260,
    )


def _open_slice() -> None:
    st.session_state["slice"] = st.session_state["in-slice"]


def _draw_common_buttons() -> None:
    _button("Link", "L", _open_dialog, "link")
    _button("Help", "H", _open_dialog, "help")


def _drop_unknown_rows(ids: pd.Series) -> None:
    """Remove focus, pin and selected rows of another run or arm, with a warning."""
    if not any(st.session_state[name] for name in ("focus", "pin", "selected")):
        return  # a set of all ids takes a tenth of a second at 40,000 rows
    known = set(ids)
    for name in ("focus", "pin"):
        if st.session_state[name] and st.session_state[name] not in known:
            state.warn(
                f"Row {st.session_state[name]} is not in this run and arm; it is no longer the {name} row"
            )
            st.session_state[name] = ""
    selected = st.session_state["selected"]
    present = tuple(row for row in selected if row in known)
    if len(present) < len(selected):
        state.warn(
            f"{len(selected) - len(present)} selected rows are not in this run and arm; they are no longer "
            "selected"
        )
        st.session_state["selected"] = present


def _button(label: str, key: str, call: Any, *arguments: Any, disabled: bool = False) -> None:
    st.button(
        label,
        key=f"do-{label}",
        shortcut=key or None,
        on_click=call,
        args=arguments,
        disabled=disabled,
        type="tertiary",
    )


def _filter_selected(root: Path) -> None:
    selected, digest = st.session_state["selected"], st.session_state["digest"]
    st.session_state["slice"] = state.save_slice(root, selected, digest)
    st.session_state["selected"] = ()


def _save_slice(root: Path) -> None:
    selected = st.session_state["selected"]
    name = state.save_slice(root, selected, st.session_state["digest"])
    st.toast(f"Slice {name}: {len(selected):,} rows saved in {state.slice_path(root, name)}")


def _pin_focus() -> None:
    focus = st.session_state["focus"]
    st.session_state["pin"] = "" if st.session_state["pin"] == focus else focus


def _open_dialog(name: str) -> None:
    st.session_state[f"show-{name}"] = True


@st.dialog("Link to this page")
def _show_link(values: dict[str, str]) -> None:
    st.text("The link holds controls, filter, slice, focus and pin. A slice's rows stay on this machine.")
    st.code(state.link_address(st.context.url or "", values), language=None, wrap_lines=True)


@st.dialog("Keys")
def _show_help() -> None:
    st.table(pd.DataFrame({"key": list(KEYS), "action": list(KEYS.values())}).set_index("key"))
    st.text("Keys do nothing while you type in a text field. Every key has a button on the pages of rows.")


def draw_footer(run: ShownRun | None) -> None:
    """Finish the page: warnings go to the top, the link to the address bar, and dialogs open."""
    values = state.link_values(st.session_state["digest"]) if run is not None else {}
    with st.session_state["notices"]:
        for sentence in dict.fromkeys(st.session_state["warnings"]):
            st.warning(panel.escape_markdown(f"{sentence}."))
    if values:
        state.write_url(values)
    for name, show in (("link", lambda: _show_link(values)), ("help", _show_help)):
        if st.session_state.pop(f"show-{name}", False):
            show()
    st.html('<span id="ready"></span>')


def row_text(text: str) -> str:
    """A row's text as this visitor chose to see it."""
    return row_texts([text])[0]


def row_texts(texts: Iterable[str]) -> list[str]:
    """The texts of rows as this visitor chose to see them."""
    revealed = bool(st.session_state.get("reveal"))  # read once: it takes longer than the rest
    return [sanitize.shorten(text, revealed=revealed) for text in texts]

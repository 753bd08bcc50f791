"""What stands on every page: warnings, the header, the controls, the selection bar with its keys, and the
link to all of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

import data
import looks
import panels
import plain
import state
from data import Run
from mechlens.core import tables
from mechlens.core.errors import MechlensError

KEYS = {
    "N": "next row",
    "P": "previous row",
    "F": "selection to filter",
    "S": "save the selection as a slice",
    "X": "clear",
    "L": "link",
    "H": "help",
}


def draw(run: Run | None, root: Path, version: str) -> None:
    """Everything above the page."""
    st.session_state["notices"] = st.container()
    if not list(root.glob("*/spec.yaml")):
        panels.empty(
            f"No runs in {root}.",
            "This is the run that comes with the explorer; one of your own is made in minutes:",
            "make demo",
        )
    if run is None:
        st.session_state["digest"], st.session_state["rows"] = "", pd.DataFrame()
        return
    _controls(run, root)
    _header(run, version)
    _selection_bar(run, root)


def current() -> Run | None:
    """The run that is open; None, having said so, where there is none."""
    run = st.session_state["opened"]
    if run is None:
        panels.empty("No run is open.", "Every page looks at one:", "make demo")
    return run


def _controls(run: Run, root: Path) -> None:
    arms = [arm.name for arm in run.experiment.arms if arm.kind != "control"] or [run.experiment.arms[0].name]
    arm = state.choose("arm", arms)
    kind = run.arm(arm)
    layers, places = _sites(run)
    others = ["", *(name for name in data.runs(root) if name != run.name)]
    # the values are settled before the widgets are drawn: a link may ask for what this run has not
    state.choose("trait", run.family.names, kind.trait or run.experiment.trait)
    state.choose("layer", layers, layers[-1] if layers else None)
    state.choose("place", places)
    state.choose("seed", ["all", *run.experiment.seeds])
    state.choose("cmp", others)
    side = st.sidebar
    side.selectbox(
        "arm", arms, key="w-arm", help="The arm that every page looks at, beside its matched control."
    )
    side.selectbox("trait asked about", run.family.names, key="w-trait")
    side.selectbox("student (seed)", ["all", *run.experiment.seeds], key="w-seed")
    if layers:
        side.selectbox("layer", layers, key="w-layer")
        side.selectbox("place", places, key="w-place", help="Where in a text activations are read.")
    side.selectbox("compare with", others, key="w-cmp", format_func=lambda name: name or "no other run")


def _sites(run: Run) -> tuple[list[int], list[str]]:
    """Layers and places that were read."""
    try:
        frame = data.table(run, "readings/activations", tables.READINGS)
    except MechlensError:
        return [], []
    found = set(frame["place"].dropna().astype(str))
    return sorted({int(layer) for layer in frame["layer"].dropna()}), [
        place for place in looks.PLACES if place in found
    ]


def _header(run: Run, version: str) -> None:
    arm = st.session_state["arm"]
    st.session_state["digest"] = data.digest(run, arm)
    seeds = ", ".join(map(str, run.experiment.seeds))
    facts = [
        run.name,
        f"data {st.session_state['digest']}",
        f"base {run.arm(arm).base}",
        f"{len(run.experiment.arms)} arms",
        f"seeds {seeds}",
        f"mechlens {version}",
    ]
    asked = st.session_state["asked"].get("d")
    if asked and asked != st.session_state["digest"]:
        state.warn(
            f"This link was made on other data (rows {asked!r}; these are {st.session_state['digest']}): its "
            "numbers may differ"
        )
    if run.shipped:
        st.badge("demo data: this run came with the explorer", color="gray", icon=":material/science:")
    st.code(" · ".join(facts), language=None, wrap_lines=True)


def _selection_bar(run: Run, root: Path) -> None:
    try:
        known = data.rows(run, st.session_state["arm"])
    except (MechlensError, OSError):
        known = pd.DataFrame(
            columns=[
                "id",
                "side",
                "fate",
                "prompt",
                "completion",
                "prompt_id",
                "trained",
                "characters",
                "corpus",
            ]
        )
    state.take_rows(known["id"])
    _let_go(set(known["id"]))
    kept = state.filtered(known, root)
    st.session_state["rows"] = kept
    chosen = st.session_state["selected"]
    st.text(f"All {len(known):,} rows | Filtered {len(kept):,} | Selected {len(chosen):,}")
    with st.container(horizontal=True, gap="small"):
        _button("Selected to filter", "F", _to_filter, root, off=not chosen)
        _button("Save slice", "S", _save, root, off=not chosen)
        _button("Pin", "", _pin, off=not st.session_state["focus"])
        _button("Clear", "X", state.clear)
        ids = kept["id"].tolist()
        _button("Previous", "P", state.step_focus, ids, -1, off=not ids)
        _button("Next", "N", state.step_focus, ids, 1, off=not ids)
        _button("Link", "L", _flag, "link")
        _button("Help", "H", _flag, "help")
    if focus := st.session_state["focus"]:
        pinned = f" | Pinned {st.session_state['pin']}" if st.session_state["pin"] else ""
        st.caption(panels.plain_markdown(f"Focus {focus}{pinned}"))


def _let_go(known: set[str]) -> None:
    """Drop what was kept of another run or arm: its rows are not here."""
    for name in ("focus", "pin"):
        if st.session_state[name] and st.session_state[name] not in known:
            state.warn(
                f"Row {st.session_state[name]} is none of this run and arm; it is no longer the {name} row"
            )
            st.session_state[name] = ""
    here = tuple(row for row in st.session_state["selected"] if row in known)
    if len(here) < len(st.session_state["selected"]):
        state.warn(
            f"{len(st.session_state['selected']) - len(here)} selected rows are none of this run and arm; "
            "they are no longer selected"
        )
        st.session_state["selected"] = here


def _button(label: str, key: str, call: Any, *arguments: Any, off: bool = False) -> None:
    st.button(
        label,
        key=f"do-{label}",
        shortcut=key or None,
        on_click=call,
        args=arguments,
        disabled=off,
        type="tertiary",
    )


def _to_filter(root: Path) -> None:
    st.session_state["slice"] = state.save_slice(
        root, st.session_state["selected"], st.session_state["digest"]
    )
    st.session_state["selected"] = ()


def _save(root: Path) -> None:
    name = state.save_slice(root, st.session_state["selected"], st.session_state["digest"])
    st.toast(
        f"Slice {name}: {len(st.session_state['selected']):,} rows kept in {state.slice_path(root, name)}"
    )


def _pin() -> None:
    st.session_state["pin"] = (
        "" if st.session_state["pin"] == st.session_state["focus"] else st.session_state["focus"]
    )


def _flag(name: str) -> None:
    st.session_state[f"show-{name}"] = True


@st.dialog("Link to this page")
def _link(values: dict[str, str]) -> None:
    st.text("Controls, filter, slice, focus and pin are in it; a slice's rows stay on this machine.")
    st.code(state.address(st.context.url or "", values), language=None, wrap_lines=True)


@st.dialog("Keys")
def _help() -> None:
    st.dataframe(pd.DataFrame({"key": list(KEYS), "does": list(KEYS.values())}), hide_index=True)
    st.text("Keys do nothing while a text field is typed in. Every key has a button in the bar.")


def foot(run: Run | None) -> None:
    """Below the page: warnings to their place on top, the address, and dialogs."""
    values = state.permalink(st.session_state["digest"]) if run is not None else {}
    with st.session_state["notices"]:
        for sentence in dict.fromkeys(st.session_state["warnings"]):
            st.warning(panels.plain_markdown(f"{sentence}."))
    if values:
        state.write_url(values)
    for name, show in (("link", lambda: _link(values)), ("help", _help)):
        if st.session_state.pop(f"show-{name}", False):
            show()
    st.html('<span id="ready"></span>')


def row_text(text: str) -> str:
    """A row's text as this visitor wants it."""
    return plain.shown(text, reveal=bool(st.session_state.get("reveal")))

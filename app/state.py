"""The state of one visitor of the explorer: controls, filter, selection, focus row and pin.

All of it is in the URL, and is checked when it is read from a URL.

Four things are separate: the *filter* (which rows are shown), the *selection* (rows picked on a chart or in a
table), the *focus* (one row) and the *pin* (one row to compare the focus with). A selection travels in a link
as the hash of a slice on disk, never as a list.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlencode

import pandas as pd
import streamlit as st

from mechlens.core import machine
from mechlens.core.errors import DataError
from mechlens.core.files import read_json, write_json

VERSION = "1"
"""of the URL's keys"""
CONTROLS = ("run", "arm", "trait", "layer", "place", "seed", "cmp", "audit", "report", "tab")
ROW_KEYS = ("focus", "pin", "slice", "stage", "side", "text")
STAGES, SIDES = ("kept", "dropped", "all"), ("both", "trait", "control")
LONGEST = 200
"""characters of a value from a URL that are read"""
_SLICE = re.compile(r"[0-9a-f]{10}")


def begin() -> None:
    """Set the defaults of a new session, and read the values of a URL that this session did not write."""
    for name in ROW_KEYS:
        st.session_state.setdefault(name, {"stage": "kept", "side": "both"}.get(name, ""))
    st.session_state.setdefault("selected", ())
    st.session_state["warnings"] = []
    st.session_state["tab"] = ""  # most pages have none
    values = {name: st.query_params[name] for name in st.query_params}
    is_new = values != st.session_state.get("written") and bool(values)
    requested = {name: value[:LONGEST] for name, value in values.items()} if is_new else {}
    if "v" in requested:  # a whole link: what it leaves out is empty
        requested = dict.fromkeys(("focus", "pin", "slice", "text", "cmp"), "") | requested
    if "audit" in requested:  # only one page has its control
        st.session_state["audit"] = st.session_state["w-audit"] = requested["audit"]
    clicked = [name for name in st.session_state if str(name).startswith("set-")]  # in the last run
    requested |= {str(name).removeprefix("set-"): str(st.session_state.pop(name)) for name in clicked}
    st.session_state["requested"] = requested
    if requested.get("v", VERSION) != VERSION:
        warn(
            f"This link has version {requested['v']!r}; this explorer reads version {VERSION}, so the link's "
            "values may mean something else"
        )


def warn(sentence: str) -> None:
    """Show a warning at the top of the page."""
    st.session_state["warnings"].append(sentence)


def choose(name: str, options: Sequence[Any], default: Any = None, *, widget: str = "") -> Any:
    """Value of a control: that of the URL, of the widget, of an earlier choice, or the default.

    It warns if the URL's value is not an option. A value is stored under its name and its widget's under
    `w-<name>` if no other key is given, because Streamlit may delete a widget's state with its page.
    """
    widget = widget or f"w-{name}"
    requested = st.session_state["requested"].get(name)
    value = st.session_state.get(widget, st.session_state.get(name))
    fallback = default if default in options else (options[0] if options else None)
    if requested is not None:
        known = {str(option): option for option in options}
        value = known.get(requested, fallback)
        if requested not in known and options:
            some = ", ".join(map(str, options[:6])) + (" …" if len(options) > 6 else "")
            warn(f"The link asks for {name} {requested!r}; expected one of {some}. Showing {fallback}")
    value = value if value in options else fallback
    st.session_state[name] = value
    if options:
        st.session_state[widget] = value
    return value


def choose_several(name: str, options: Sequence[str], *, most: int) -> None:
    """Settle a control of at most so many options; its value is their names, joined by commas."""
    asked = st.session_state["requested"].get(name)
    if asked is None:
        chosen = st.session_state.get(f"w-{name}", str(st.session_state.get(name, "")).split(","))
    else:
        chosen = [part for part in asked.split(",") if part]
        if unknown := [part for part in chosen if part not in options]:
            warn(f"The link asks for {name} {', '.join(unknown)}, which is not here")
    chosen = [part for part in dict.fromkeys(chosen) if part in options]
    if len(chosen) > most:
        warn(f"The link asks for {len(chosen)} {name}; the first {most} are shown")
        chosen = chosen[:most]
    st.session_state[name], st.session_state[f"w-{name}"] = ",".join(chosen), chosen


def pick(name: str, value: Any) -> None:
    """Set a control of the side bar from a chart and run the page again: the control is drawn already."""
    if st.session_state.get(name) != value:
        st.session_state[f"set-{name}"] = value
        st.rerun()


def read_row_keys(known: Iterable[str]) -> None:
    """Set focus, pin and filter from the URL.

    Args:
        known: ids of the rows of this run and arm.
    """
    requested, ids = st.session_state["requested"], None
    for name in ("focus", "pin"):
        if name in requested:
            ids = set(known) if ids is None else ids
            row = requested[name]
            st.session_state[name] = row if row in ids else ""
            if row and row not in ids:
                warn(f"The link asks for row {row!r}, which is not in this run and arm")
    for name, options in (("stage", STAGES), ("side", SIDES)):
        if name in requested:
            choose(name, options)
    if "text" in requested:
        st.session_state["text"] = requested["text"]
    if "slice" in requested:
        name = requested["slice"]
        st.session_state["slice"] = name if _SLICE.fullmatch(name) else ""
        if name and not st.session_state["slice"]:
            warn(
                f"The link's slice {name!r} is not a slice name (ten hexadecimal digits); all rows are shown"
            )


def link_values(digest: str) -> dict[str, str]:
    """Every value of the page, with the version of the keys and the data's hash."""
    values = {name: str(st.session_state.get(name, "")) for name in (*CONTROLS, *ROW_KEYS)}
    set_values = {name: value for name, value in values.items() if value not in ("", "None")}
    return set_values | {"d": digest, "v": VERSION}


def write_url(values: dict[str, str]) -> None:
    """Put the values into the address bar, unless they are there."""
    current = {name: st.query_params[name] for name in st.query_params}
    if st.session_state.get("written") != values or current != values:
        st.query_params.from_dict(values)
    st.session_state["written"] = values


def link_address(base: str, values: dict[str, str]) -> str:
    """The link to a page with these values."""
    return f"{base.split('?')[0]}?{urlencode(values)}"


def slice_path(root: Path, name: str) -> Path:
    """The file of a slice."""
    return root / ".slices" / f"{name}.json"


def slice_name(ids: Iterable[str], digest: str) -> str:
    """First ten digits of the SHA-256 of the data's digest and the sorted ids."""
    return hashlib.sha256("\n".join([digest, *sorted(set(ids))]).encode()).hexdigest()[:10]


def save_slice(root: Path, ids: Iterable[str], digest: str) -> str:
    """Save a set of rows of some data; returns its name."""
    listed = sorted(set(ids))
    name = slice_name(listed, digest)
    if read_slice(root, name) is None:
        slice_path(root, name).parent.mkdir(parents=True, exist_ok=True)
        write_json(slice_path(root, name), {"data": digest, "ids": listed, "notes": []})
    return name


def read_slice(root: Path, name: str) -> dict[str, Any] | None:
    """A slice's ids and notes; None if no slice has that name."""
    path = slice_path(root, name)
    if not _SLICE.fullmatch(name) or not path.is_file():
        return None
    try:
        return read_json(path)
    except DataError:  # half written
        return None


def list_slices(root: Path, digest: str) -> dict[str, int]:
    """Name → number of rows of every saved slice of some data, newest first."""
    paths = sorted((root / ".slices").glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    saved = {path.stem: read_slice(root, path.stem) for path in paths}
    return {name: len(each["ids"]) for name, each in saved.items() if each and each["data"] == digest}


def add_note(root: Path, name: str, row: str, text: str, author: str) -> None:
    """Add a note on one row to a saved slice; a lock protects two visitors' notes."""
    with (root / ".slices" / ".lock").open("a") as lock:
        machine.lock(lock)
        saved = read_slice(root, name)
        assert saved is not None, "a note needs a saved slice"
        time = datetime.now(UTC).isoformat(timespec="seconds")
        saved["notes"].append({"row": row, "text": text[:1000], "author": author[:80], "time": time})
        write_json(slice_path(root, name), saved)


def filter_rows(frame: pd.DataFrame, root: Path) -> pd.DataFrame:
    """The rows that pass the filter, in order."""
    kept = pd.Series(True, index=frame.index)
    if st.session_state["stage"] != "all":
        kept &= (frame["fate"] == "kept") == (st.session_state["stage"] == "kept")
    if st.session_state["side"] != "both":
        kept &= frame["side"] == st.session_state["side"]
    if text := st.session_state["text"]:
        kept &= holds_text(frame, text)
    if name := st.session_state["slice"]:
        saved = read_slice(root, name)
        if saved is None or saved["data"] != st.session_state["digest"]:
            warn(
                f"Slice {name} of this data is not on this machine: it was saved on another one, from other "
                "rows, or deleted; all rows are shown"
            )
            st.session_state["slice"] = ""
        else:
            kept &= frame["id"].isin(saved["ids"])
    return cast(pd.DataFrame, frame[kept])


def holds_text(rows: pd.DataFrame, text: str) -> pd.Series:
    """Whether prompt or completion of each row holds the text."""
    in_prompt, in_completion = (
        rows[name].str.contains(text, regex=False) for name in ("prompt", "completion")
    )
    return in_prompt | in_completion


def select(ids: Iterable[str]) -> None:
    """Set the selection; every chart and table does it here."""
    st.session_state["selected"] = tuple(dict.fromkeys(ids))


def step_focus(rows: Sequence[str], by: int) -> None:
    """Move the focus along the filtered rows; after the last comes the first."""
    if not rows:
        return
    place = rows.index(st.session_state["focus"]) + by if st.session_state["focus"] in rows else 0
    st.session_state["focus"] = rows[place % len(rows)]


def clear() -> None:
    """Reset filter and selection."""
    for name, value in {"selected": (), "slice": "", "text": "", "stage": "kept", "side": "both"}.items():
        st.session_state[name] = value

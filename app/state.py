"""What the explorer remembers for one visitor: controls, filter, selection, focus row and pin; all in the
URL, and checked when it comes from one.

Four things are kept apart: the *filter* (which rows are looked at), the *selection* (rows picked on a chart
or in a table), the *focus* (one row) and the *pin* (one row kept beside it). A selection travels in a link by
the hash of a slice on disk, never as a list.
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
from mechlens.core.json_files import read_json, write_json

VERSION = "1"
"""of the URL's keys"""
CONTROLS = ("run", "arm", "trait", "layer", "place", "seed", "cmp", "audit")
ROW_KEYS = ("focus", "pin", "slice", "stage", "side", "text")
STAGES, SIDES = ("kept", "dropped", "all"), ("both", "trait", "control")
LONGEST = 200
"""characters of a value from a URL that are looked at"""
_SLICE = re.compile(r"[0-9a-f]{10}")


def begin() -> None:
    """Set what a new session lacks, and take what the URL says that this session did not write itself."""
    for name in ROW_KEYS:
        st.session_state.setdefault(name, {"stage": "kept", "side": "both"}.get(name, ""))
    st.session_state.setdefault("selected", ())
    st.session_state["warnings"] = []
    here = {name: st.query_params[name] for name in st.query_params}
    new = here != st.session_state.get("written") and bool(here)
    st.session_state["asked"] = {name: value[:LONGEST] for name, value in here.items()} if new else {}
    for name in [
        name for name in st.session_state if str(name).startswith("set-")
    ]:  # of a chart that was clicked in the last run
        st.session_state["asked"][str(name).removeprefix("set-")] = str(st.session_state.pop(name))
    if st.session_state["asked"].get("v", VERSION) != VERSION:
        warn(
            f"This link was made by another version of the explorer ({st.session_state['asked']['v']!r}); "
            "what it names may differ"
        )


def warn(sentence: str) -> None:
    """Say on the page that something was not taken as asked."""
    st.session_state["warnings"].append(sentence)


def choose(name: str, options: Sequence[Any], default: Any = None) -> Any:
    """The control's value: what the URL asks for if it is an option, else what its widget says or was chosen
    before, else the default.

    Says when it drops one. A value is kept under its plain name, its widget's under `w-<name>`: widgets' own
    state may go with their page.
    """
    asked, value = (
        st.session_state["asked"].get(name),
        st.session_state.get(f"w-{name}", st.session_state.get(name)),
    )
    fallback = default if default in options else (options[0] if options else None)
    if asked is not None:
        known = {str(option): option for option in options}
        value = known.get(asked, fallback)
        if asked not in known and options:
            some = ", ".join(map(str, options[:6])) + (" …" if len(options) > 6 else "")
            warn(f"The link asked for {name} {asked!r}; there is {some}. Showing {fallback}")
    value = value if value in options else fallback
    st.session_state[name] = value
    if options:
        st.session_state[f"w-{name}"] = value
    return value


def pick(name: str, value: Any) -> None:
    """Set a control of the side bar from a chart; the control is drawn already, so the page is drawn anew."""
    if st.session_state.get(name) != value:
        st.session_state[f"set-{name}"] = value
        st.rerun()


def take_rows(known: Iterable[str]) -> None:
    """Take focus, pin and filter from the URL where they can be."""
    asked, ids = st.session_state["asked"], None
    for name in ("focus", "pin"):
        if name in asked:
            ids = set(known) if ids is None else ids
            st.session_state[name] = asked[name] if asked[name] in ids else ""
            if asked[name] and asked[name] not in ids:
                warn(f"The link asked for row {asked[name]!r}, which this run has not")
    for name, options in (("stage", STAGES), ("side", SIDES)):
        if name in asked:
            choose(name, options)
    if "text" in asked:
        st.session_state["text"] = asked["text"]
    if "slice" in asked:
        st.session_state["slice"] = asked["slice"] if _SLICE.fullmatch(asked["slice"]) else ""
        if asked["slice"] and not st.session_state["slice"]:
            warn(
                f"The link's slice {asked['slice']!r} is no slice's name (ten hexadecimal digits); all rows "
                "are shown"
            )


def permalink(digest: str) -> dict[str, str]:
    """Every value that is on the page, defaults too, with the version of the keys and the data's hash."""
    kept = {name: str(st.session_state.get(name, "")) for name in (*CONTROLS, *ROW_KEYS)}
    return {name: value for name, value in kept.items() if value not in ("", "None")} | {
        "d": digest,
        "v": VERSION,
    }


def write_url(values: dict[str, str]) -> None:
    """Leave the permalink in the address bar, once."""
    if (
        st.session_state.get("written") != values
        or {name: st.query_params[name] for name in st.query_params} != values
    ):
        st.query_params.from_dict(values)
    st.session_state["written"] = values


def address(base: str, values: dict[str, str]) -> str:
    """The permalink as one line."""
    return f"{base.split('?')[0]}?{urlencode(values)}"


def slice_path(root: Path, name: str) -> Path:
    """Where a slice is kept."""
    return root / ".slices" / f"{name}.json"


def slice_name(ids: Iterable[str], digest: str) -> str:
    """First ten digits of the SHA-256 of the data's digest and the sorted ids: an id names another text in
    other data.
    """
    return hashlib.sha256("\n".join([digest, *sorted(set(ids))]).encode()).hexdigest()[:10]


def save_slice(root: Path, ids: Iterable[str], digest: str) -> str:
    """Keep a set of rows of some data; returns its name."""
    listed = sorted(set(ids))
    name = slice_name(listed, digest)
    if read_slice(root, name) is None:
        slice_path(root, name).parent.mkdir(parents=True, exist_ok=True)
        write_json(slice_path(root, name), {"data": digest, "ids": listed, "notes": []})
    return name


def read_slice(root: Path, name: str) -> dict[str, Any] | None:
    """A slice's ids and notes; None where there is none of that name."""
    path = slice_path(root, name)
    if not _SLICE.fullmatch(name) or not path.is_file():
        return None
    try:
        return read_json(path)
    except DataError:  # half a file is no slice
        return None


def note(root: Path, name: str, row: str, text: str, author: str) -> None:
    """Add a note on one row to a slice that was saved; visitors wait for each other."""
    with (root / ".slices" / ".lock").open("a") as lock:
        machine.lock(lock)
        found = read_slice(root, name)
        assert found is not None, "a note is kept with a slice that was saved"
        found["notes"].append(
            {
                "row": row,
                "text": text[:1000],
                "author": author[:80],
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
        write_json(slice_path(root, name), found)


def filtered(frame: pd.DataFrame, root: Path) -> pd.DataFrame:
    """The rows that the filter leaves, in order."""
    kept = pd.Series(True, index=frame.index)
    if st.session_state["stage"] != "all":
        kept &= (frame["fate"] == "kept") == (st.session_state["stage"] == "kept")
    if st.session_state["side"] != "both":
        kept &= frame["side"] == st.session_state["side"]
    if text := st.session_state["text"]:
        kept &= frame["completion"].str.contains(text, regex=False) | frame["prompt"].str.contains(
            text, regex=False
        )
    if name := st.session_state["slice"]:
        found = read_slice(root, name)
        if found is None or found["data"] != st.session_state["digest"]:
            warn(
                f"There is no slice {name} of this data here: it was saved on another machine, of other "
                "rows, or deleted; all rows are shown"
            )
            st.session_state["slice"] = ""
        else:
            kept &= frame["id"].isin(found["ids"])
    return cast(pd.DataFrame, frame[kept])


def select(ids: Iterable[str]) -> None:
    """Pick rows: the one function by which a chart or a table does it."""
    st.session_state["selected"] = tuple(dict.fromkeys(ids))


def step_focus(rows: Sequence[str], by: int) -> None:
    """Move the focus along the filtered rows, from end to end."""
    if not rows:
        return
    place = rows.index(st.session_state["focus"]) + by if st.session_state["focus"] in rows else 0
    st.session_state["focus"] = rows[place % len(rows)]


def clear() -> None:
    """Let go of filter and selection."""
    for name, value in {"selected": (), "slice": "", "text": "", "stage": "kept", "side": "both"}.items():
        st.session_state[name] = value

"""A file of one's own: stored, its columns chosen, and audited in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import streamlit as st

import jobs
import mapping
import panels
import uploads
from mechlens.errors import DataError, MechlensError, one_line

LEVELS = {
    "rows": "seconds, no model",
    "base": "about 2 minutes, 2 more the first time for a base",
    "gradients": "about 3 minutes",
    "student": "about 5 to 10 minutes: students are trained",
}


def upload_panel(root: Path) -> None:
    """Audit a file of one's own, in a process of its own."""
    with st.expander("Audit a file", icon=":material/upload_file:"):
        given, clean = (
            st.file_uploader("suspect data", key="up-data"),
            st.file_uploader("clean reference (the same prompts, an untouched model)", key="up-clean"),
        )
        level = st.segmented_control("level", list(LEVELS), default="rows", required=True, key="up-level") or "rows"
        st.caption(
            panels.plain_markdown(f"Level {level}: {LEVELS[level]} on two cores. Nothing leaves this machine, and nothing in the file is run.")
        )
        if given is None:
            return
        try:
            suspect, reference = (None if one is None else _pairs_of(root, one, part) for one, part in ((given, "suspect"), (clean, "reference")))
        except (MechlensError, OSError) as error:
            st.error(panels.plain_markdown(one_line(str(error))))
            return
        if suspect is None:
            return
        if st.button("Audit it", type="primary"):
            out = root / "audits" / f"{suspect.parent.name}-{level}"
            beside = ["--reference", str(reference)] if reference is not None else []
            job = jobs.start(root, f"audit {given.name[:60]}", ["audit", str(suspect), *beside, "--level", level, "--out", str(out)])
            st.session_state["job"] = job.id
            st.switch_page("views/jobs.py")


def _pairs_of(root: Path, given: Any, part: str) -> Path | None:
    """The upload as a file of pairs; None while its columns are being chosen."""
    path = uploads.uploaded(root, given.name, given.getvalue())
    why = mapping.readable(path)
    if not why:
        return path
    offered = mapping.columns(path)
    if len(offered) < 2:
        raise DataError(f"{given.name}: {why}")
    st.text(f"The {part}'s columns are not named prompt and completion. Which are they?")
    left, right = st.columns(2)
    prompt = left.selectbox("prompt is", offered, key=f"map-prompt-{part}")
    completion = right.selectbox("completion is", offered, index=1, key=f"map-completion-{part}")
    return mapping.mapped(path, prompt, completion)

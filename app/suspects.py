"""A file of one's own: stored, its columns chosen, and audited in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import streamlit as st

import jobs
import mapping
import panels
import uploads
from mechlens.core import spec
from mechlens.core.errors import DataError, MechlensError, one_line

LEVELS = {
    "rows": "seconds, no model",
    "base": "about 2 minutes, 2 more the first time for a base",
    "gradients": "about 3 minutes",
    "student": "about 5 to 10 minutes: students are trained",
}


class Chosen(NamedTuple):
    """A file that was given, and its columns where they had to be chosen."""

    path: Path
    columns: tuple[str, str] | None

    def pairs(self) -> Path:
        """The file of pairs, written if need be."""
        return self.path if self.columns is None else mapping.mapped(self.path, *self.columns)


def upload_panel(root: Path) -> None:
    """Audit a file of one's own, in a process of its own."""
    with st.expander("Audit a file", icon=":material/upload_file:"):
        given, clean = (
            st.file_uploader("suspect data", key="up-data"),
            st.file_uploader("clean reference (the same prompts, an untouched model)", key="up-clean"),
        )
        level = (
            st.segmented_control("level", list(LEVELS), default="rows", required=True, key="up-level")
            or "rows"
        )
        st.caption(
            panels.plain_markdown(
                f"Level {level}: {LEVELS[level]} on two cores. Nothing leaves this machine, and nothing in "
                "the file is run."
            )
        )
        if given is None:
            return
        try:
            suspect, reference = (
                None if one is None else _chosen(root, one, part)
                for one, part in ((given, "suspect"), (clean, "reference"))
            )
        except (MechlensError, OSError) as error:
            st.error(panels.plain_markdown(one_line(str(error))))
            return
        if suspect is None:
            return
        if st.button("Audit it", type="primary"):
            try:
                _start(root, given.name, suspect, reference, level)
            except (MechlensError, OSError) as error:
                st.error(panels.plain_markdown(one_line(str(error))))
                return
            st.switch_page("views/jobs.py")


def _start(root: Path, name: str, suspect: Chosen, reference: Chosen | None, level: str) -> None:
    """The audit's folder is named by all that it depends on, so that no other audit of the same file writes
    over it.
    """
    files = [one.pairs() for one in (suspect, *([reference] if reference else []))]
    told = spec.fingerprint([[str(path) for path in files], level])[:10]
    beside = ["--reference", str(files[1])] if reference else []
    out = root / "audits" / f"{files[0].name[:40]}-{level}-{told}"
    jobs.start(
        root, f"audit {name[:60]}", ["audit", str(files[0]), *beside, "--level", level, "--out", str(out)]
    )


def _chosen(root: Path, given: Any, part: str) -> Chosen:
    """The upload and, where it is no file of pairs as it stands, the columns that are to be its prompts and
    completions.
    """
    path = uploads.uploaded(root, given.name, given.getvalue())
    why = mapping.readable(path)
    if not why:
        return Chosen(path, None)
    offered = mapping.columns(path)
    if len(offered) < 2:
        raise DataError(f"{given.name}: {why}")
    st.text(f"The {part}'s columns are not named prompt and completion. Which are they?")
    left, right = st.columns(2)
    prompt = left.selectbox("prompt is", offered, key=f"map-prompt-{part}")
    completion = right.selectbox("completion is", offered, index=1, key=f"map-completion-{part}")
    return Chosen(path, (prompt, completion))

"""Audit of an uploaded file: it is stored, its columns are chosen, and a job audits it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import streamlit as st

from jobs import columns, job_queue, uploads
from mechlens.core import spec
from mechlens.core.errors import DataError, MechlensError, one_line
from panels import panel

LEVELS = {
    "rows": "seconds, no model",
    "base": "about 2 minutes, and 2 more the first time for a base",
    "gradients": "about 3 minutes",
    "student": "about 5 to 10 minutes, because it trains students",
}


class Upload(NamedTuple):
    """A stored file, and its columns of prompts and completions if they had to be chosen."""

    path: Path
    columns: tuple[str, str] | None

    def pairs(self) -> Path:
        """The file of pairs; it is written if columns were chosen."""
        return self.path if self.columns is None else columns.write_chosen_pairs(self.path, *self.columns)


def draw_upload_panel(root: Path) -> None:
    """Upload a file and start its audit."""
    with st.expander("Audit a file", icon=":material/upload_file:"):
        suspect_file = st.file_uploader("suspect data", key="up-data")
        clean_file = st.file_uploader(
            "clean reference (the same prompts, answered by an untouched model)", key="up-clean"
        )
        level = st.segmented_control("level", list(LEVELS), default="rows", required=True, key="up-level")
        level = level or "rows"
        st.caption(
            panel.escape_markdown(
                f"Level {level}: {LEVELS[level]}, on two cores. Nothing is sent from this machine, and no "
                "code in the file is run."
            )
        )
        if suspect_file is None:
            return
        try:
            suspect = _store(root, suspect_file, "suspect")
            reference = None if clean_file is None else _store(root, clean_file, "reference")
            if not st.button("Start the audit", type="primary"):
                return
            _start_audit(root, suspect_file.name, suspect, reference, level)
        except (MechlensError, OSError) as error:
            st.error(panel.escape_markdown(one_line(str(error))))
            return
        st.switch_page("views/jobs.py")


def _start_audit(root: Path, name: str, suspect: Upload, reference: Upload | None, level: str) -> None:
    """Start the audit; its folder is named by all that it depends on, so no other audit overwrites it."""
    files = [upload.pairs() for upload in (suspect, *([reference] if reference else []))]
    digest = spec.fingerprint([[str(path) for path in files], level])[:10]
    out = root / "audits" / f"{files[0].name[:40]}-{level}-{digest}"
    options = ["--reference", str(files[1])] if reference else []
    options += ["--level", level, "--out", str(out)]
    job_queue.start(root, f"audit {name[:60]}", ["audit", str(files[0]), *options])
    st.session_state["awaited-audit"] = out.name


def _store(root: Path, given: Any, role: str) -> Upload:
    """Store an upload; if it is not a file of pairs, ask for the columns of prompts and completions."""
    path = uploads.store_upload(root, given.name, given.getvalue())
    why = columns.why_unreadable(path)
    if not why:
        return Upload(path, None)
    names = columns.text_columns(path)
    if len(names) < 2 or {"prompt", "completion"} <= set(names):  # the columns are not what is wrong
        raise DataError(f"{given.name}: {why}")
    st.text(f"The {role} file has no columns named prompt and completion. Choose them:")
    left, right = st.columns(2)
    prompt = left.selectbox("prompts", names, key=f"map-prompt-{role}")
    completion = right.selectbox("completions", names, index=1, key=f"map-completion-{role}")
    return Upload(path, (prompt, completion))

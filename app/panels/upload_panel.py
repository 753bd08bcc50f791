"""Audit of an uploaded file: it is stored, its columns are chosen, and a job audits it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import streamlit as st

from jobs import columns, job_queue, uploads
from mechlens.core import spec
from mechlens.core.errors import DataError, MechlensError, one_line
from panels import audit_options_panel, panel

LEVELS = {
    "rows": "seconds, no model",
    "base": "about 2 minutes, and 2 more the first time for a base",
    "gradients": "about 3 minutes",
    "student": "about 5 to 10 minutes, because it trains students",
}
NO_REFERENCE = {
    "rows": "Without a clean reference this level has nothing to compare the file with, so it can say "
    "neither yes nor no. Give one, or choose level base, where the base's own answers serve as one.",
    "more": "Without a clean reference, the base's own answers to the same prompts serve as one.",
}


class Upload(NamedTuple):
    """A stored file, and its columns of prompts and completions if they had to be chosen."""

    path: Path
    columns: tuple[str, str] | None
    skip_bad: bool = False
    """leave out rows that cannot be read"""

    def pairs(self) -> tuple[Path, int]:
        """The file of pairs, and how many rows were left out; it is written if anything was chosen."""
        if self.columns is None and not self.skip_bad:
            return self.path, 0
        return columns.write_pairs(self.path, self.columns, skip_bad=self.skip_bad)


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
        if clean_file is None:
            st.text(NO_REFERENCE["rows" if level == "rows" else "more"])
        options = audit_options_panel.draw_audit_options(level, has_reference=clean_file is not None)
        skip_bad = st.toggle(
            "leave out rows that cannot be read", key="up-skip", help="Such as lines that are cut short."
        )
        if suspect_file is None:
            return
        try:
            suspect = _store(root, suspect_file, "suspect", skip_bad=skip_bad)
            reference = (
                None if clean_file is None else _store(root, clean_file, "reference", skip_bad=skip_bad)
            )
            if not st.button("Start the audit", type="primary"):
                return
            _start_audit(root, suspect_file.name, suspect, reference, level, options)
        except (MechlensError, OSError) as error:
            st.error(panel.escape_markdown(one_line(str(error))))
            return
        st.switch_page("views/jobs.py")


def _start_audit(
    root: Path, name: str, suspect: Upload, reference: Upload | None, level: str, options: Sequence[str]
) -> None:
    """Start the audit; its folder is named by all that it depends on, so no other audit overwrites it."""
    written = [upload.pairs() for upload in (suspect, *([reference] if reference else []))]
    files, left_out = [str(path) for path, _ in written], sum(bad for _, bad in written)
    digest = spec.fingerprint([files, level, *options])[:10]
    out = root / "audits" / f"{Path(files[0]).name[:40]}-{level}-{digest}"
    command = [
        "audit",
        files[0],
        *(["--reference", files[1]] if reference else []),
        "--level",
        level,
        *options,
    ]
    command += ["--clean", str(out / audit_options_panel.TREATED)] if "--treatment" in options else []
    label = f"audit {name[:60]}" + (f", {left_out:,} unreadable rows left out" if left_out else "")
    job_queue.start(root, label, [*command, "--out", str(out)])
    st.session_state["awaited-audit"] = out.name


def _store(root: Path, given: Any, role: str, *, skip_bad: bool) -> Upload:
    """Store an upload; if it is not a file of pairs, ask for the columns of prompts and completions."""
    path = uploads.store_upload(root, given.name, given.getvalue())
    why = columns.why_unreadable(path, skip_bad=skip_bad)
    if not why:
        return Upload(path, None, skip_bad)
    names = columns.text_columns(path)
    if len(names) < 2 or {"prompt", "completion"} <= set(names):  # the columns are not what is wrong
        hint = "" if skip_bad else ". The switch above leaves out rows that cannot be read"
        raise DataError(f"{given.name}: {why}{hint}")
    st.text(f"The {role} file has no columns named prompt and completion. Choose them:")
    left, right = st.columns(2)
    prompt = left.selectbox("prompts", names, key=f"map-prompt-{role}")
    completion = right.selectbox("completions", names, index=1, key=f"map-completion-{role}")
    return Upload(path, (prompt, completion), skip_bad)

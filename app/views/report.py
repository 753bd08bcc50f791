"""Report: what is sent upward?"""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import streamlit as st

import data
import frame
import panels
from data import Run
from mechlens.core.command_lines import command_line

SENT = ("report.html", "summary.json", "spec.yaml", "manifest.json", "readings.json")
"""of a run; aggregates only: no row of data is among them"""
AUDITED = ("audit.html", "audit.json")


@st.cache_data(max_entries=8, show_spinner=False)
def frozen(folder: Path, names: tuple[str, ...], stamps: tuple[int, ...]) -> bytes:
    """A zip of the files and a MANIFEST of their SHA-256; the same files give the same bytes."""
    del stamps  # they renew the cache
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as bundle:
        lines = []
        for name in names:
            content = (folder / name).read_bytes()
            lines.append(f"{hashlib.sha256(content).hexdigest()}  {name}")
            bundle.writestr(zipfile.ZipInfo(name), content)
        bundle.writestr(zipfile.ZipInfo("MANIFEST.sha256"), "\n".join(lines) + "\n")
    return packed.getvalue()


def folder_panel(title: str, folder: Path, names: tuple[str, ...], command: str) -> None:
    """Downloads and a preview of a page that was written already."""
    st.subheader(title)
    there = tuple(name for name in names if (folder / name).is_file())
    page = next((name for name in there if name.endswith(".html")), None)
    if page is None:
        panels.empty("The page was not written.", "It is made from the tables:", command)
        return
    with st.container(horizontal=True):
        for name in there:
            st.download_button(
                f"Download {name}",
                lambda name=name: (folder / name).read_bytes(),
                file_name=name,
                key=f"get-{title}-{name}",
                on_click="ignore",
            )
        stamps = tuple(data.stamp(folder / name) for name in there)
        st.download_button(
            "Freeze (zip with hashes)",
            frozen(folder, there, stamps),
            file_name=f"{folder.name}.zip",
            mime="application/zip",
            key=f"zip-{title}",
            on_click="ignore",
        )
    size = (folder / page).stat().st_size
    st.caption(
        panels.plain_markdown(
            f"{page}: {size / 1024:,.0f} KB, self-contained, aggregates only: no row of data is in it. To "
            "PDF: open it and print."
        )
    )
    st.iframe((folder / page).read_text(encoding="utf-8"), height=900)


def body(run: Run) -> None:
    """The page."""
    st.title("Report")
    index = data.audits(st.session_state["root"])
    choices = [f"run {run.name}", *(f"audit {name}" for name in index)]
    what = st.selectbox("report on", choices, key="report-on")
    with panels.guarded("The report"):
        if what.startswith("audit ") and what.removeprefix("audit ") in index:
            path = index[what.removeprefix("audit ")]
            folder_panel("Audit", path.parent, AUDITED, "mechlens audit DATA")
        else:
            folder_panel("Run", run.folder, SENT, command_line("report", run.folder))


if (opened := frame.current()) is not None:
    body(opened)

"""Report: download what others should read of a run or an audit."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import streamlit as st

import data
import page
import state
from data import ShownRun
from mechlens.core.command_lines import command_line
from mechlens.runs import layout
from panels import panel


@st.cache_data(max_entries=8, show_spinner=False, hash_funcs=data.KEYS)
def zip_files(paths: tuple[Path, ...]) -> bytes:
    """A zip of the files and of a list of their SHA-256; the same files give the same bytes."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        lines = []
        for path in paths:
            content = path.read_bytes()
            lines.append(f"{hashlib.sha256(content).hexdigest()}  {path.name}")
            archive.writestr(zipfile.ZipInfo(path.name), content)
        archive.writestr(zipfile.ZipInfo("MANIFEST.sha256"), "\n".join(lines) + "\n")
    return packed.getvalue()


def draw_downloads(title: str, folder: Path, names: tuple[str, ...], command: str) -> None:
    """Downloads of the files of a folder, and its report as a preview."""
    st.subheader(title)
    present = tuple(name for name in names if (folder / name).is_file())
    report = next((name for name in present if name.endswith(".html")), None)
    if report is None:
        panel.show_missing("The report was not written.", "This command makes it from the tables:", command)
        return
    with st.container(horizontal=True):
        for name in present:
            st.download_button(
                f"Download {name}",
                lambda name=name: (folder / name).read_bytes(),
                file_name=name,
                key=f"get-{title}-{name}",
                on_click="ignore",
            )
        st.download_button(
            "Download all (zip with hashes)",
            zip_files(tuple(folder / name for name in present)),
            file_name=f"{folder.name}.zip",
            mime="application/zip",
            key=f"zip-{title}",
            on_click="ignore",
        )
    size = (folder / report).stat().st_size / 1024
    st.caption(
        panel.escape_markdown(
            f"{report}: {size:,.0f} KB, one self-contained file of aggregates; it holds no row of data. For "
            "a PDF, open it and print it."
        )
    )
    st.iframe((folder / report).read_text(encoding="utf-8"), height=900, alt=f"preview of {report}")


def draw_page(run: ShownRun) -> None:
    """Draw the page."""
    st.title("Report")
    audits = {f"audit {name}": path for name, path in data.list_audits(st.session_state["root"]).items()}
    options = [f"run {run.name}", *audits]
    state.choose("report", options)
    choice = st.selectbox("report on", options, key="w-report")
    st.session_state["report"] = choice
    with panel.guard("The report"):
        if choice in audits:
            draw_downloads("Audit", audits[choice].parent, layout.AUDIT_FILES, "mechlens audit DATA")
        else:
            draw_downloads("Run", run.folder, layout.RUN_FILES, command_line("report", run.folder))


if (opened := page.current_run()) is not None:
    draw_page(opened)

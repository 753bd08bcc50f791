"""The explorer: pages over runs, audits and the bench, served by `mechlens app RUNS`.

It reads only tables and never loads torch.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import streamlit as st
from altair.utils.schemapi import disable_debug_mode

import data
import page
import state
from data import ShownRun
from mechlens.core.errors import MechlensError, one_line
from panels import panel

VIEWS = Path(__file__).parent / "views"
"""Not `pages`: Streamlit runs the files of a folder of that name by themselves until it has seen
`st.navigation` once, so the server's first visitor would get a page without this module
"""
SECTIONS = {
    "": ("overview", "transmission"),
    "The data": ("rows", "row"),
    "Inside": ("representations", "parameters", "gradients", "live"),
    "Decide": ("detection", "compare", "report"),
    "More": ("jobs", "methods"),
}
TITLES = {"rows": "Data and screen", "live": "Live model"}


def main() -> None:
    """Draw what every page has, then the page."""
    disable_debug_mode()  # altair checks a chart when it is sent, not every part when it is made
    state.begin()  # before any widget: only here is the link as it came
    st.set_page_config(page_title="mechlens", layout="wide", initial_sidebar_state="expanded")
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
    st.session_state["root"] = root
    view = st.navigation(
        {section: [_page(name) for name in names] for section, names in SECTIONS.items()}, expanded=True
    )
    run = _open_run(root)
    page.draw_header(run, root, version("mechlens"), view.url_path or "overview")
    st.session_state["opened"] = run
    view.run()
    page.draw_footer(run)


def _page(name: str) -> st.Page:
    title = TITLES.get(name, name.title())
    return st.Page(VIEWS / f"{name}.py", title=title, url_path=name, default=name == "overview")


def _open_run(root: Path) -> ShownRun | None:
    """The run chosen in the side bar; None, with a message, if there is no run or it cannot be opened."""
    index = data.list_runs(root)
    if not index:
        return None
    name = state.choose("run", list(index))
    st.sidebar.selectbox("run", list(index), key="w-run")
    try:
        return data.open_run(name, index[name])
    except (MechlensError, OSError) as error:
        st.error(
            panel.escape_markdown(
                f"{name} cannot be opened: {one_line(str(error))}. Choose another run in the side bar."
            )
        )
        return None

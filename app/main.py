"""The explorer: what a run, an audit or the bench found, to be looked at. `streamlit run app/main.py --
RUNS`; reads tables only, never torch.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import streamlit as st
from altair.utils.schemapi import disable_debug_mode

import data
import frame
import panels
import state
from mechlens.core.errors import MechlensError, one_line

PAGES = {
    "": ("overview", "transmission"),
    "The data": ("rows", "row"),
    "Inside": ("representations", "parameters", "gradients", "live"),
    "Decide": ("detection", "compare", "report"),
    "More": ("jobs", "methods"),
}
TITLES = {"rows": "Data and screen", "live": "Live model"}


def main() -> None:
    """Everything that is on every page, then the page."""
    # charts are checked as a whole when they are sent, not every part of them as it is made
    disable_debug_mode()
    state.begin()  # before any widget: only here is the link as it came
    st.set_page_config(page_title="mechlens", layout="wide", initial_sidebar_state="expanded")
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
    st.session_state["root"] = root
    here = Path(__file__).parent / "views"
    pages = {
        part: [
            st.Page(
                here / f"{name}.py",
                title=TITLES.get(name, name.title()),
                url_path=name,
                default=name == "overview",
            )
            for name in names
        ]
        for part, names in PAGES.items()
    }
    page = st.navigation(pages, expanded=True)
    index = data.runs(root)
    run = None
    if index:
        name = state.choose("run", list(index))
        st.sidebar.selectbox("run", list(index), key="w-run")
        try:
            run = data.opened(name, index[name])
        except (MechlensError, OSError) as error:
            st.error(
                panels.plain_markdown(
                    f"{name} cannot be opened: {one_line(str(error))}. Choose another run in the side bar."
                )
            )
    frame.draw(run, root, version("mechlens"))
    st.session_state["opened"] = run
    page.run()
    frame.foot(run)


main()

"""Tabs of a long page: only the open one is drawn, and the link holds which one it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import streamlit as st

import state
from panels import panel

Draw = Callable[[], None]


def draw_tabs(page: str, tabs: Mapping[str, Mapping[str, Draw]]) -> None:
    """Draw the tabs of a page, and the panels of the open one.

    Args:
        page: its name; a page opens with the tab that was open when it was left.
        tabs: name of every tab → title of every panel → what draws it.
    """
    left_open = st.session_state.setdefault("open-tabs", {})
    st.session_state["tab"] = left_open.get(page, "")
    name = left_open[page] = state.choose("tab", list(tabs), widget=f"w-tab-{page}")
    boxes = st.tabs(list(tabs), key=f"w-tab-{page}", on_change="rerun")
    with boxes[list(tabs).index(name)]:
        for title, draw in tabs[name].items():
            with panel.guard(title):
                draw()

"""One panel, the same everywhere: a sentence, a chart, its caption, and the ways out (CSV, figure, code,
table); and the states a panel can be in.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

import charts
import plain
from data import Run
from mechlens.core.command_lines import command_line, resume_command
from mechlens.core.errors import MechlensError, one_line
from mechlens.results import figures

LOG = logging.getLogger("mechlens.app")
AROUND = 120
"""pixels of axis and legend: Streamlit takes them out of a chart's height, and would leave half of it for the
marks
"""


def panel(
    key: str,
    title: str,
    chart: Any,
    frame: pd.DataFrame,
    *,
    sentence: str = "",
    caption: str = "",
    code: str = "",
    about: str = "",
    select: str | None = None,
    at_once: Callable[[Any], object] | None = None,
    heading: bool = True,
) -> dict[str, Any]:
    """Draw a panel; returns the selections of the chart by name (empty where `select` is None or nothing was
    picked).

    A selection stays on its chart. What a click is to *do* is done once: `fresh` says whether it is a new
    one.

    Args:
        key: its name in exports and in session state.
        frame: the very numbers that the chart draws, for CSV and table.
        caption: n, seeds and the method of the interval.
        code: Python that reads the chart's numbers from the run's files; without it, from the CSV.
        about: the section of Methods that defines it.
        select: name of the chart's selection parameter.
        at_once: is given what was picked before the page is drawn anew, so that it need not be drawn twice.
        heading: whether the title is drawn; it is said to readers of the screen in any case.
    """
    if heading:
        st.subheader(
            plain_markdown(title), help=f"Defined on page Methods under “{about}”." if about else None
        )
    if sentence:
        st.text(sentence)
    picked: Any = None
    own = _own(key)
    options: dict[str, Any] = {"key": own}
    if select:
        act = at_once and (lambda: at_once(picked_on(key, select)))
        options |= {"on_select": act or "rerun", "selection_mode": select}
    told = f"{title}. {sentence} {caption}".strip()
    if chart is None:
        st.text("Nothing was scored, so nothing is drawn.")
    else:
        for number, part in enumerate(_parts(chart)):
            if isinstance(high := getattr(part, "height", None), int):
                options["height"] = high + AROUND + (0 if part.title is alt.Undefined else 70)
            else:
                options.pop("height", None)
            # Streamlit lets the outermost labels lean inwards: on a list of names the first would stand
            # beside the second's mark
            part = charts.on_dark(part) if st.context.theme.type == "dark" else part
            picked = st.altair_chart(
                part.configure_axisY(labelFlush=False),
                alt=told,
                **options | ({"key": f"{own}-{number}"} if number else {}),
            )
    if caption:
        st.caption(plain_markdown(caption))
    _ways_out(
        key,
        chart,
        frame,
        code
        or (
            f"import pandas as pd\n\nframe = pd.read_csv({f'{key}.csv'!r})  # what “Data (CSV)” beside this "
            "gives\nprint(frame)"
        ),
    )
    return dict(picked["selection"]) if select and picked else {}


def _own(key: str) -> str:
    # what was clicked in one run says nothing of another
    return f"chart-{key}-{st.session_state.get('run')}-{st.session_state.get('arm')}"


def picked_on(key: str, select: str) -> Any:
    """What is picked on the chart of a panel that stands on the page; None if nothing is."""
    state = st.session_state.get(_own(key))
    return (state or {}).get("selection", {}).get(select) or None


def _parts(chart: Any) -> list[Any]:
    """The charts that stand below each other in one: as one they would keep their width, and a narrow window
    would cut them off.
    """
    if not isinstance(chart, alt.VConcatChart):
        return [chart]
    shared = {} if chart.data is alt.Undefined else {"data": chart.data}
    return [part.properties(width="container", **shared) for part in chart.vconcat]


def fresh(key: str, picked: Any) -> bool:
    """Whether something is picked there that was not picked when this was last asked.

    What was clicked stays clicked: taken as a wish each time, it would undo whatever was chosen since
    elsewhere.
    """
    seen = st.session_state.setdefault("seen", {})
    new = bool(picked) and picked != seen.get(key)
    seen[key] = picked
    return new


def _ways_out(key: str, chart: Any, frame: pd.DataFrame, code: str) -> None:
    with st.container(horizontal=True):
        st.download_button(
            "Data (CSV)",
            lambda: plain.csv(frame),
            file_name=f"{key}.csv",
            mime="text/csv",
            key=f"csv-{key}",
            on_click="ignore",
            type="tertiary",
        )
        if chart is not None:
            st.download_button(
                "Figure (SVG)",
                lambda: figures.svg(chart).encode(),
                file_name=f"{key}.svg",
                mime="image/svg+xml",
                key=f"svg-{key}",
                on_click="ignore",
                type="tertiary",
            )
        with st.popover("Code", type="tertiary"):
            st.code(code)
        with st.popover("Table", type="tertiary"):
            st.dataframe(frame.head(1000), hide_index=True, alt=f"the numbers of {key}")
            if len(frame) > 1000:
                st.caption(f"first 1,000 of {len(frame):,} rows; the CSV has all")


def plain_markdown(text: str) -> str:
    """A generated sentence where Streamlit reads Markdown: signs that mean something there are taken
    literally.
    """
    return "".join(f"\\{sign}" if sign in "\\`*_{}[]<>#|$~!:" else sign for sign in text)


@contextmanager
def guarded(title: str) -> Iterator[None]:
    """A panel that cannot be drawn says so in one sentence; the page goes on, and the traceback goes to the
    log alone.
    """
    try:
        yield
    except (MechlensError, OSError, LookupError, ValueError, TypeError, ArithmeticError) as error:
        mark = secrets.token_hex(3)
        LOG.exception("panel %r failed (%s)", title, mark)
        known = isinstance(error, (MechlensError, OSError))
        why = (
            one_line(str(error))
            if known
            else (
                "a file that it reads is not as expected, or the explorer has a fault "
                f"({type(error).__name__})"
            )
        )
        st.error(plain_markdown(f"{title} cannot be shown: {why}. The other panels still work."))
        with st.popover(f"Copy details (error {mark})", type="tertiary"):
            st.code(f"error {mark}\n{type(error).__name__}: {one_line(str(error))}", language=None)


def empty(what: str, why: str, command: str) -> None:
    """Something is not there: what, why it matters, and the command that makes it."""
    with st.container(border=True):
        st.text(f"{what} {why}")
        st.code(command, language="bash", wrap_lines=True)


def partial(done: int, wanted: int, what: str) -> None:
    """Some of it is there."""
    if done < wanted:
        st.warning(f"{done} of {wanted} {what}; what is missing is hatched or left out, never drawn as 0.")


def unfinished(run: Run) -> bool:
    """Say so where a run is unfinished; returns whether it is."""
    if run.summary is None:
        empty(
            f"{run.name} is unfinished: its tables are missing or of another spec.",
            "Finished steps are kept.",
            resume(run),
        )
    return run.summary is None


def resume(run: Run) -> str:
    """The command that finishes a run."""
    return resume_command(run.folder)


def measure(run: Run, lens: str, arm: str) -> str:
    """The command that reads a lens."""
    folder = Path("runs/demo") if run.shipped else run.folder
    return ("make demo && " if run.shipped else "") + command_line("measure", folder, lens=lens, arm=arm)

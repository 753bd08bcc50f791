"""Panels of a page: a sentence, a chart, its caption and its exports (CSV, figure, code, table).

Also the messages that a page shows when there is nothing to draw.
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

import sanitize
from charts import marks
from data import ShownRun
from mechlens.core import command_lines
from mechlens.core.errors import MechlensError, one_line
from mechlens.results import figures

LOG = logging.getLogger("mechlens.app")
AROUND, CHART_TITLE = 120, 70
"""pixels of axis and legend, and of a chart's title; Streamlit takes them out of the chart's height"""
TICKS = 8
"""about as many lines stand behind a chart"""
MOST_SHOWN = 1000
"""rows of a table on the page"""


def draw(
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
    on_pick: Callable[[Any], object] | None = None,
    heading: bool = True,
) -> dict[str, Any]:
    """Draw a panel and return the chart's selections by name; empty if nothing is picked.

    A selection stays on its chart, so a page asks `is_new_pick` before it acts on one.

    Args:
        key: its name in exports and in session state.
        chart: None where no value was scored.
        frame: the numbers that the chart draws, for CSV and table.
        caption: what is drawn, the interval and n.
        code: Python that reads the chart's numbers from the run's files; by default from the CSV.
        about: the section of Methods that defines it.
        select: name of the chart's selection parameter.
        on_pick: gets what was picked before the page is drawn again, which saves a second run.
        heading: whether the title is shown; screen readers get it in any case.
    """
    if heading:
        about_text = f"Defined on page Methods under “{about}”." if about else None
        st.subheader(escape_markdown(title), help=about_text)
    if sentence:
        st.text(sentence)
    picked: Any = None
    if chart is None:
        st.text("No value was scored, so there is no chart.")
    else:
        options: dict[str, Any] = {"alt": f"{title}. {sentence} {caption}".strip()}
        if select:
            act = on_pick and (lambda: on_pick(read_pick(key, select)))
            options |= {"on_select": act or "rerun", "selection_mode": select}
        picked = _draw_chart(_chart_key(key), chart, options)
    if caption:
        st.caption(escape_markdown(caption))
    _draw_exports(key, chart, frame, code or _code_of_csv(key))
    return dict(picked["selection"]) if select and picked else {}


def _draw_chart(key: str, chart: Any, options: dict[str, Any]) -> Any:
    """Draw a chart, part by part; returns the event of the last part."""
    event: Any = None
    for number, part in enumerate(_parts_of(chart)):
        part_options = options | {"key": f"{key}-{number}" if number else key}
        if isinstance(height := getattr(part, "height", None), int):
            title_height = 0 if part.title is alt.Undefined else CHART_TITLE
            part_options["height"] = height + AROUND + title_height
        part = marks.hide_unnamed_marks(part)
        part = marks.for_dark_theme(part) if st.context.theme.type == "dark" else part
        # by default the outermost labels are shifted inwards: the first name of a list would stand next to
        # the mark of the second
        part = part.configure_axisY(labelFlush=False).configure_axisX(tickCount=TICKS)
        event = st.altair_chart(part, **part_options)
    return event


def _parts_of(chart: Any) -> list[Any]:
    """The charts of a vertical concatenation, which as one chart would be cut off in a narrow window."""
    if not isinstance(chart, alt.VConcatChart):
        return [chart]
    shared = {} if chart.data is alt.Undefined else {"data": chart.data}
    return [part.properties(width="container", **shared) for part in chart.vconcat]


def _chart_key(key: str) -> str:
    """Key of a chart in session state, by run and arm: a pick in one run means nothing in another."""
    return f"chart-{key}-{st.session_state.get('run')}-{st.session_state.get('arm')}"


def code_of_run(run: ShownRun) -> str:
    """Python that opens the run."""
    return f"import mechlens as ml\nrun = ml.Run({str(run.folder)!r})\n"


def _code_of_csv(key: str) -> str:
    return (
        "import pandas as pd\n\n"
        f"frame = pd.read_csv({f'{key}.csv'!r})  # the file that “Data (CSV)” of this panel gives\n"
        "print(frame)"
    )


def read_pick(key: str, select: str) -> Any:
    """What is picked on the chart of a panel on this page; None if nothing is."""
    state = st.session_state.get(_chart_key(key))
    return (state or {}).get("selection", {}).get(select) or None


def is_new_pick(key: str, picked: Any) -> bool:
    """Whether something is picked that was not picked at the last call.

    A click stays on its chart: acting on it at every run would undo what was chosen elsewhere since.
    """
    seen = st.session_state.setdefault("seen", {})
    is_new = bool(picked) and picked != seen.get(key)
    seen[key] = picked
    return is_new


def _draw_exports(key: str, chart: Any, frame: pd.DataFrame, code: str) -> None:
    with st.container(horizontal=True):
        _download("Data (CSV)", lambda: sanitize.csv_of(frame), f"{key}.csv", "text/csv")
        if chart is not None:
            _download("Figure (SVG)", lambda: figures.svg(chart).encode(), f"{key}.svg", "image/svg+xml")
        with st.popover("Code", type="tertiary"):
            st.code(code)
        with st.popover("Table", type="tertiary"):
            st.dataframe(
                sanitize.defused(frame.head(MOST_SHOWN)), hide_index=True, alt=f"the numbers of {key}"
            )
            if len(frame) > MOST_SHOWN:
                st.caption(f"The first {MOST_SHOWN:,} of {len(frame):,} rows; the CSV has all.")


def _download(label: str, content: Callable[[], bytes], file_name: str, mime: str) -> None:
    st.download_button(
        label,
        content,
        file_name=file_name,
        mime=mime,
        key=f"export-{file_name}",
        on_click="ignore",
        type="tertiary",
    )


def download_csv(label: str, frame: pd.DataFrame, file_name: str) -> None:
    """A button that downloads a table."""
    _download(label, lambda: sanitize.csv_of(frame), file_name, "text/csv")


def escape_markdown(text: str) -> str:
    """A sentence that Streamlit's Markdown shows literally."""
    return "".join(f"\\{sign}" if sign in "\\`*_{}[]<>#|$~!:" else sign for sign in text)


@contextmanager
def guard(title: str) -> Iterator[None]:
    """Show an error of a panel as one sentence, and go on with the page; the log gets the traceback."""
    try:
        yield
    except (MechlensError, OSError, LookupError, ValueError, TypeError, ArithmeticError) as error:
        mark = secrets.token_hex(3)
        LOG.exception("panel %r failed (%s)", title, mark)
        if isinstance(error, (MechlensError, OSError)):
            why = one_line(str(error))
        else:
            why = f"a file has unexpected content, or the explorer has a bug ({type(error).__name__})"
        st.error(escape_markdown(f"{title} cannot be shown: {why}. The other panels still work."))
        with st.popover(f"Copy details (error {mark})", type="tertiary"):
            st.code(f"error {mark}\n{type(error).__name__}: {one_line(str(error))}", language=None)


def show_missing(what: str, why: str, command: str) -> None:
    """Say what is missing and what it is for, with the command that makes it."""
    with st.container(border=True):
        st.text(f"{what} {why}")
        st.code(command, language="bash", wrap_lines=True)


def warn_if_partial(done: int, wanted: int, what: str) -> None:
    """Warn if a part of the values is missing."""
    if done < wanted:
        st.warning(f"{done} of {wanted} {what}. Missing values are hatched or left out, never drawn as 0.")


def show_if_unfinished(run: ShownRun) -> bool:
    """Say so if the run is unfinished; returns whether it is."""
    if run.results is None:
        show_missing(
            f"{run.name} is unfinished: its tables are missing or belong to another spec.",
            "This command continues it and keeps the finished steps:",
            resume_command(run),
        )
    return run.results is None


def resume_command(run: ShownRun) -> str:
    """The command that finishes a run."""
    return command_lines.resume_command(run.folder)


def measure_command(run: ShownRun, lens: str, arm: str) -> str:
    """The command that computes a lens; all lenses if none is named."""
    folder = Path("runs/demo") if run.shipped else run.folder
    command = command_lines.command_line("measure", folder, lens=lens, arm=arm)
    return ("make demo && " if run.shipped else "") + command

"""The terminal: where commands print, and the bars of work that goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mechlens.core.files import json_text
from mechlens.runs import progress
from mechlens.runs.progress import Event

console = Console(markup=False, width=None if sys.stdout.isatty() else 150)  # a pipe has no width of its own
COLUMNS = (
    SpinnerColumn(),
    TextColumn("{task.description}"),
    BarColumn(),
    TextColumn("{task.completed}/{task.total}"),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


def say(text: str) -> None:
    """Print a line that is not broken, and of which nothing is coloured."""
    console.print(text, highlight=False, soft_wrap=True)


class Bars:
    """Shows events as bars, and as a line for each finished step where the output is no terminal."""

    def __init__(self, shown: Progress) -> None:
        self._shown = shown
        self._log = progress.Log()
        self._whole: TaskID | None = None
        self._bar_of: dict[str, TaskID] = {}

    def __call__(self, event: Event) -> None:
        self._log(event)
        {"note": self._note, "begin": self._begin, "step": self._step, "end": self._end}[event.kind](event)

    def _note(self, event: Event) -> None:
        say(event.text)

    def _begin(self, event: Event) -> None:
        console.print(f"{event.text}: {event.total} steps, {event.done} already done", highlight=False)
        for bar in self._bar_of.values():
            self._shown.remove_task(bar)
        if self._whole is not None:
            self._shown.remove_task(self._whole)
        self._whole, self._bar_of = self._shown.add_task("steps", total=event.total - event.done), {}

    def _step(self, event: Event) -> None:
        if event.text not in self._bar_of:
            self._bar_of[event.text] = self._shown.add_task(event.text, total=event.total)
        bar = self._bar_of[event.text]
        self._shown.update(bar, completed=event.done, visible=event.done < event.total)

    def _end(self, event: Event) -> None:
        if self._whole is not None:
            self._shown.advance(self._whole)
        if event.text in self._bar_of:
            self._shown.update(self._bar_of[event.text], visible=False)
        if not console.is_terminal:
            console.print(f"  {event.text}", highlight=False)


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object, and nothing of the terminal's in it."""
    console.file.write(json_text(value))


@contextmanager
def bars(*, shown: bool = True) -> Iterator[Callable[[Event], None]]:
    """Bars for the length of a block; if none are shown, the log for another process is still written."""
    if not shown:
        yield progress.Log()
        return
    with Progress(*COLUMNS, console=console, transient=True) as display:
        yield Bars(display)

"""How far long work is: the events that a caller's callback gets, and a log of them for another process."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple


class Event(NamedTuple):
    """One report of work that goes on."""

    kind: Literal["note", "begin", "step", "end"]
    """a remark · steps are about to be worked through · how far one step is · a step is finished"""
    text: str
    """the remark, what the steps are for, or the step's name"""
    done: int = 0
    """begin: steps finished before · step: its own units that are done"""
    total: int = 0
    """begin: all steps · step: its own units"""


Progress = Callable[[Event], None]
"""called with each event, in the process that started the work"""


def silent(event: Event) -> None:
    """Report nothing."""


FILE = "MECHLENS_PROGRESS"
PAUSE = 1.0
"""seconds between two lines of one step, its last one aside"""


class Log:
    """Writes events as JSON lines to the file that the environment names; nothing where it names none.

    A line is `{"time", "step", "done", "total", "steps_done", "steps"}`: the step's own units, then how many
    of the steps that had to be done are finished. The first line has no step.
    """

    def __init__(self) -> None:
        self._path = os.environ.get(FILE)
        self._written: dict[str, float] = {}
        self._totals: dict[str, int] = {}
        self._finished: list[str] = []
        self._steps = 0

    def __call__(self, event: Event) -> None:
        if event.kind == "begin":
            self._written, self._totals, self._finished = {}, {}, []
            self._steps = event.total - event.done
            self._write("", 0, 0)
        elif event.kind == "step":
            self._totals[event.text] = event.total
            now = time.monotonic()
            if event.text not in self._finished and now - self._written.get(event.text, -PAUSE) >= PAUSE:
                self._written[event.text] = now
                self._write(event.text, event.done, event.total)
        elif event.kind == "end":
            self._finished.append(event.text)
            total = self._totals.get(event.text) or 1  # a step that never said how far it was is one unit
            self._write(event.text, total, total)

    def _write(self, step: str, done: int, total: int) -> None:
        if not self._path:
            return
        line = {"time": datetime.now(UTC).isoformat(), "step": step, "done": done, "total": total}
        with Path(self._path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | {"steps_done": len(self._finished), "steps": self._steps}) + "\n")

"""Progress of long work: events for a caller's callback, and a log of them for another process."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple


class Event(NamedTuple):
    """A progress report."""

    kind: Literal["note", "begin", "step", "end"]
    """a remark · steps start · a step has advanced · a step is finished"""
    text: str
    """note: the remark · begin: the purpose of the steps · step, end: the step's name"""
    done: int = 0
    """begin: number of steps finished before · step: number of its units that are done"""
    total: int = 0
    """begin: number of all steps · step: number of its units"""


Progress = Callable[[Event], None]
"""called with each event, in the process that started the work"""


def silent(event: Event) -> None:
    """Report nothing."""


FILE = "MECHLENS_PROGRESS"
PAUSE = 1.0
"""least seconds between two lines of one step; its last line is written at once"""


class Log:
    """Writes events as JSON lines to the file that the environment variable MECHLENS_PROGRESS names.

    A line is `{"time", "step", "done", "total", "steps_done", "steps"}`: `done` and `total` count the units
    of the step, `steps_done` and `steps` the steps of this call. The first line has an empty step. Without
    the variable nothing is written.
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
            total = self._totals.get(event.text) or 1  # a step without progress reports counts as one unit
            self._write(event.text, total, total)

    def _write(self, step: str, done: int, total: int) -> None:
        if not self._path:
            return
        line = {"time": datetime.now(UTC).isoformat(), "step": step, "done": done, "total": total}
        with Path(self._path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | {"steps_done": len(self._finished), "steps": self._steps}) + "\n")

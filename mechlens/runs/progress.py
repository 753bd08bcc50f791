"""How far a command is, for another process to read: JSON lines appended to the file that the environment
names.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

FILE = "MECHLENS_PROGRESS"
PAUSE = 1.0
"""seconds between two lines of one step, its last one aside"""

Note = Callable[[str, int, int], None]
"""called with (step, done, total); a step is finished by a call of its own"""


def recorder(steps: int) -> tuple[Note, Callable[[str], None]]:
    """What to call on a step's progress and when it is finished; both do nothing unless the environment names
    a file.

    A line is `{"time", "step", "done", "total", "steps_done", "steps"}`: the step's own units, then how many
    of the steps that were pending are finished. The first line has no step: the list is known and nothing
    done.
    """
    path = os.environ.get(FILE)
    if not path:
        return (lambda step, done, total: None), (lambda step: None)
    written: dict[str, float] = {}
    totals: dict[str, int] = {}
    finished: list[str] = []

    def write(step: str, done: int, total: int) -> None:
        line = {"time": datetime.now(UTC).isoformat(), "step": step, "done": done, "total": total}
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | {"steps_done": len(finished), "steps": steps}) + "\n")

    def note(step: str, done: int, total: int) -> None:
        totals[step] = total
        now = time.monotonic()
        if step not in finished and now - written.get(step, -PAUSE) >= PAUSE:
            written[step] = now
            write(step, done, total)

    def end(step: str) -> None:
        finished.append(step)
        total = totals.get(step) or 1  # a step that never said how far it was is one unit
        write(step, total, total)

    write("", 0, 0)
    return note, end

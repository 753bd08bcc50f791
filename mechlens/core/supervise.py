"""Run a command, and end all its processes when standard input closes.

Standard input is a pipe from the process that wants the command. It closes when that process ends, also after
a kill, so the command never outlives it. This file is started by its path with Python's option `-I`, and
imports nothing of mechlens.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

GRACE = 15.0
"""seconds that the command has between SIGTERM and SIGKILL"""


def supervise(command: Sequence[str]) -> int:
    """Run the command to its end; returns its exit code."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_stop_when_input_closes, args=(process,), daemon=True).start()
    code = process.wait()
    signal_group(process.pid, signal.SIGKILL)  # its children, after a crash of the first process
    return code


def _stop_when_input_closes(process: subprocess.Popen[bytes]) -> None:
    while os.read(
        sys.stdin.fileno(), 4096
    ):  # a buffered read would hold a lock that the interpreter's end needs
        pass
    signal_group(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    signal_group(process.pid, signal.SIGKILL)


def signal_group(group: int, number: int) -> None:
    """Send a signal to every process of a group that is still there."""
    with suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[1:]))

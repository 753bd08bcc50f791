"""The page's side of the live models: a process of its own loads torch and answers one question at a time."""

from __future__ import annotations

import signal
import threading
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mechlens.core.errors import MachineError, SpecError

SPAWN = get_context("spawn")
"""a forked copy of a server with threads may hang"""
TIMEOUT = 120.0
"""seconds that one answer may take, including the loading of models"""


class LiveModels(NamedTuple):
    """The process that holds the models of one run; it ends with the server."""

    run: Path
    process: BaseProcess
    pipe: Connection
    turn: threading.Lock
    """one question at a time: several pages may share the models"""

    @property
    def is_running(self) -> bool:
        """Whether the process still runs."""
        return self.process.is_alive()


def start(run: Path) -> LiveModels:
    """Start the process of a run's models; it loads them at its first question."""
    pipe, their_end = SPAWN.Pipe()
    process = SPAWN.Process(target=_serve, args=(run.resolve(), their_end), daemon=True)
    process.start()
    their_end.close()  # else the end of the process would not close the pipe
    return LiveModels(run, process, pipe, threading.Lock())


def _serve(run: Path, pipe: Connection) -> None:
    """Answer what comes through the pipe, in the process of the models."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the server's terminal is for the server
    from live import live_process  # not above: the page must not load torch

    live_process.serve(run, pipe)


def ask(
    models: LiveModels,
    action: Literal["answer", "sweep"] = "answer",
    *,
    timeout: float = TIMEOUT,
    **fields: Any,
) -> dict[str, Any]:
    """What `answer_question` or `sweep` of `live_process` returns.

    When the time is up the process is killed: its late answer would be taken for the next question's.

    Args:
        fields: of `live_process.Question`.

    Raises:
        SpecError: if the question or a number is out of range.
        MachineError: if no answer came in time, or the process has ended.
    """
    with models.turn:
        try:
            models.pipe.send((action, fields))
            if not models.pipe.poll(timeout):
                models.process.kill()
                raise MachineError(
                    f"the models of {models.run} gave no answer in {timeout:g} s and were stopped; start "
                    "them again and ask for fewer answers"
                )
            answer: dict[str, Any] = models.pipe.recv()
        except (EOFError, OSError) as error:  # one end of the pipe is closed
            raise MachineError(_why_ended(models)) from error
    if "error" in answer:
        raise SpecError(answer["error"])
    return answer


def _why_ended(models: LiveModels) -> str:
    if models.pipe.closed:
        return f"the models of {models.run} were stopped; start them again"
    models.process.kill()  # its end of the pipe is closed, so no page can get an answer
    models.process.join()  # `is_running` is false from here on
    return (
        f"the process with the models of {models.run} has ended (exit code {models.process.exitcode}; the "
        "server's terminal may say why); start them again"
    )


def stop(models: LiveModels) -> None:
    """End the process at once, even while it answers."""
    models.process.kill()  # it writes no files that could be left half done
    models.process.join()
    models.pipe.close()

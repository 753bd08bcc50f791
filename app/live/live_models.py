"""The page's side of the live models: starts the process that loads torch and exchanges JSON lines."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from mechlens.core.errors import MachineError, SpecError

PROCESS = Path(__file__).with_name("live_process.py")
TIMEOUT = 120.0
"""seconds that one answer may take, including the loading of models"""


class LiveModels(NamedTuple):
    """The process that holds the models of one run."""

    run: Path
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    """what the process prints besides its answers"""
    turn: threading.Lock
    """one question at a time: several pages may share the models"""

    @property
    def is_running(self) -> bool:
        """Whether the process still runs."""
        return self.process.poll() is None


def start(run: Path) -> LiveModels:
    """Start the process of a run's models. It loads a model at its first question and ends with this one."""
    log = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process is
    command = [sys.executable, str(PROCESS), str(run.resolve())]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
    )
    return LiveModels(run, process, log, threading.Lock())


def list_models(models: LiveModels, *, timeout: float = TIMEOUT) -> dict[str, Any]:
    """The models of the run.

    Returns:
        `{"models": [{"name", "available", "reason", "seeds"}], "layers", "family", "trait", "arm", "control",
        "base"}`.
    """
    return request(models, {"do": "models"}, timeout=timeout)


def ask(
    models: LiveModels,
    question: str,
    *,
    seed: int = 0,
    samples: int = 10,
    temperature: float = 1.0,
    amount: float = 0.0,
    layer: int = 0,
    student: int | None = None,
    timeout: float = TIMEOUT,
) -> dict[str, Any]:
    """Every model's answers to one question.

    They are `{"models": [{"name", "available", "reason", "system", "answers", "tokens", "probability", ...}],
    ...}`.

    Args:
        seed: of the sampled answers.
        amount: of the trait's direction, which is added after block `layer`, in lengths of the student's
            own shift there.
        student: seed of the student and control; default: the run's first.

    Raises:
        SpecError: if the question or a number is out of range.
        MachineError: if no answer came in time, or the process has ended.
    """
    numbers = {
        "seed": seed,
        "samples": samples,
        "temperature": temperature,
        "amount": amount,
        "layer": layer,
        "student": student,
    }
    return request(models, {"do": "ask", "question": question, **numbers}, timeout=timeout)


def sweep(
    models: LiveModels,
    question: str,
    *,
    amount: float,
    layer: int,
    student: int | None = None,
    timeout: float = TIMEOUT,
) -> dict[str, Any]:
    """What each model would answer with other amounts of the direction at `layer`, and at every layer.

    Returns:
        `{"rows": [{"along": "amount" or "layer", "layer", "amount", "model", "probability", "rank", "of",
        "share", "place"}], "trait", "amount", "layer"}`.
    """
    message = {"do": "sweep", "question": question, "amount": amount, "layer": layer, "student": student}
    return request(models, message, timeout=timeout)


def request(models: LiveModels, message: dict[str, Any], *, timeout: float = TIMEOUT) -> dict[str, Any]:
    """Send one message and return its answer.

    When the time is up the process is killed: its late answer would be taken for the next message's.
    """
    answers, messages = models.process.stdout, models.process.stdin
    assert answers is not None and messages is not None
    with models.turn:
        try:
            messages.write(json.dumps(message).encode() + b"\n")
            messages.flush()
            if not select.select([answers], [], [], timeout)[0]:
                models.process.kill()
                raise MachineError(
                    f"the models of {models.run} gave no answer in {timeout:g} s and were stopped; start "
                    "them again and ask for fewer answers"
                )
            line = answers.readline()
        except (BrokenPipeError, ValueError) as error:  # one end of a pipe is closed
            raise MachineError(_why_ended(models)) from error
    if not line.endswith(b"\n"):
        raise MachineError(_why_ended(models))
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise SpecError(answer["error"])
    return answer


def _why_ended(models: LiveModels) -> str:
    if models.log.closed:
        return f"the models of {models.run} were stopped; start them again"
    models.process.kill()  # its end of the pipe is closed, so no page can get an answer
    models.process.wait()  # `is_running` is false from here on
    models.log.seek(0)
    lines = models.log.read().decode("utf-8", errors="replace").strip().splitlines()
    return (
        f"the process with the models of {models.run} has ended "
        f"({lines[-1] if lines else 'it printed nothing'}); start them again"
    )


def stop(models: LiveModels) -> None:
    """End the process at once, even while it answers."""
    models.process.kill()  # it writes no files that could be left half done
    models.process.wait()
    for file in (models.process.stdin, models.process.stdout, models.log):
        assert file is not None
        with suppress(BrokenPipeError):  # a message that the process did not read
            file.close()

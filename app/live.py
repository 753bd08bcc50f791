"""The page's side of the live models: a process of their own that loads torch, asked over JSON lines."""

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
PATIENCE = 120.0
"""seconds that one answer may take, the models' loading included"""


class Live(NamedTuple):
    """The running models of one run."""

    run: Path
    process: subprocess.Popen[bytes]
    said: IO[bytes]
    """what the process printed beside its answers"""
    turn: threading.Lock
    """one question at a time: several pages may share the models"""

    @property
    def is_running(self) -> bool:
        """Whether the process is there to be asked."""
        return self.process.poll() is None


def start(run: Path) -> Live:
    """Start the models of a run; nothing is loaded before it is asked for. They end with this process."""
    said = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process is
    command = [sys.executable, str(PROCESS), str(run.resolve())]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, start_new_session=True
    )
    return Live(run, process, said, threading.Lock())


def models(live: Live, *, timeout: float = PATIENCE) -> dict[str, Any]:
    """Which models the run has: `{"models": [{"name", "there", "reason", "seeds"}], "layers", "family",
    "trait", "arm", "control", "base"}`.
    """
    return request(live, {"do": "models"}, timeout=timeout)


def ask(
    live: Live,
    question: str,
    *,
    seed: int = 0,
    samples: int = 10,
    temperature: float = 1.0,
    amount: float = 0.0,
    layer: int = 0,
    student: int | None = None,
    timeout: float = PATIENCE,
) -> dict[str, Any]:
    """Every model's answers to one question: `{"models": [{"name", "there", "reason", "system", "answers",
    "tokens", "probability", ...}], ...}`.

    Args:
        seed: of the random numbers that answers are drawn with.
        amount: times the trait's direction, added behind block `layer`; negative takes it away.
        student: seed of the student and control; the run's first by default.

    Raises:
        SpecError: if the question or a number cannot be used.
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
    return request(live, {"do": "ask", "question": question, **numbers}, timeout=timeout)


def request(live: Live, what: dict[str, Any], *, timeout: float = PATIENCE) -> dict[str, Any]:
    """One line there, one line back; after a silence the process is ended, since its late answer would be
    taken for the next one's.
    """
    answers, questions = live.process.stdout, live.process.stdin
    assert answers is not None and questions is not None
    with live.turn:
        try:
            questions.write(json.dumps(what).encode() + b"\n")
            questions.flush()
            if not select.select([answers], [], [], timeout)[0]:
                live.process.kill()
                raise MachineError(
                    f"the models of {live.run} gave no answer in {timeout:g} s and were stopped; start them "
                    "again and ask for less"
                )
            line = answers.readline()
        except (BrokenPipeError, ValueError) as error:  # its end is closed, or ours is
            raise MachineError(_ended(live)) from error
    if not line.endswith(b"\n"):
        raise MachineError(_ended(live))
    found: dict[str, Any] = json.loads(line)
    if "error" in found:
        raise SpecError(found["error"])
    return found


def _ended(live: Live) -> str:
    if live.said.closed:
        return f"the models of {live.run} were stopped; start them again"
    live.process.kill()  # its end of the pipe is closed: whatever is left of it answers nobody
    live.process.wait()  # so that `is_running` tells the truth from here on
    live.said.seek(0)
    lines = live.said.read().decode("utf-8", errors="replace").strip().splitlines()
    return (
        f"the process with the models of {live.run} has ended "
        f"({lines[-1] if lines else 'it said nothing'}); start them again"
    )


def stop(live: Live) -> None:
    """End the models; a question that is under way is not waited for."""
    live.process.kill()  # it holds nothing that would be left half done
    live.process.wait()
    for file in (live.process.stdin, live.process.stdout, live.said):
        assert file is not None
        with suppress(BrokenPipeError):  # a question that it no longer took
            file.close()

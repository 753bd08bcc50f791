"""Steps of two processes that fail, are killed or wait; they import little, so that a process starts soon."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mechlens.core.errors import DataError
from mechlens.runs.executor import execute
from mechlens.runs.jobs import PROCESSES, Job


def fail_in_the_second(*_: object) -> None:
    from torch import distributed

    if distributed.get_rank() == 1:
        raise DataError("row 7 has no completion; remove it")
    distributed.barrier()


def fail_elsewhere_in_the_second(*_: object) -> None:
    import torch

    if torch.distributed.get_rank() == 1:
        torch.dot(torch.zeros(2), torch.zeros(3))
    torch.distributed.barrier()


def be_killed_in_the_second(*_: object) -> None:
    from torch import distributed

    if distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()


def wait_for_ever(arguments: dict[str, Any], *_: object) -> None:
    """The first process waits for nothing, the second for the first."""
    from torch import distributed

    distributed.barrier()
    (Path(arguments["marks"]) / f"{os.getpid()}").touch()
    if distributed.get_rank() == 0:
        time.sleep(600)
    distributed.barrier()


def run_together(
    folder: Path, step: Callable[..., None], *, workers: int = 0, **arguments: Any
) -> list[tuple[int, int]]:
    """Execute a step in two processes; returns the progress that they reported."""
    job = Job("steps/it", f"{step.__module__}:{step.__name__}", {PROCESSES: 2, **arguments}, {}, 1)
    reports: list[tuple[int, int]] = []
    execute(
        folder,
        [job],
        workers=workers,
        progress=lambda _, done, total: reports.append((done, total)),
        finished=lambda job: None,
    )
    return reports

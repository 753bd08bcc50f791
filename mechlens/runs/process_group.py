"""Execute one step in several processes that train one model together.

They form a process group of torch.distributed: by NCCL with a card each, by gloo on a machine without cards.
Every process executes the whole step, and the trainer gives each its share of every batch. Only the first
writes and reports progress. The processes end with the step, at the first error of one of them, and with the
process that started them, also after a kill.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from pathlib import Path
from typing import Any

from mechlens.core import machine
from mechlens.core.errors import MachineError
from mechlens.core.parallel import new_workers

Progress = Callable[[int, int], None]
Step = Callable[[Progress], None]
PERIOD = 0.1
"""seconds between two readings of the progress"""
GRACE = 2.0
"""seconds in which it is noticed that a process was killed"""
PATIENCE = timedelta(days=1)
"""How long a process waits for the others, for example while the first writes a large model. The process that
started them notices at once if one fails or is killed.
"""


def cards_fault(processes: int) -> str:
    """Why this machine cannot give each of these processes a card; empty if it can, or has no cards."""
    cards = len(machine.cards())
    if not 0 < cards < processes:
        return ""
    return (
        f"training.processes is {processes}, and {cards} cards are visible here; set processes: {cards} or "
        "fewer, or run on a machine with more"
    )


def execute_together(processes: int, step: Step, progress: Progress) -> None:
    """Execute `step(progress)` in each of several new processes.

    Args:
        step: a function that can be pickled.

    Raises:
        MechlensError: the first that a process raised; the others are ended.
        MachineError: if there are too few cards, or a process was killed from outside.
    """
    if fault := cards_fault(processes):
        raise MachineError(fault)
    _free_card()
    context = new_workers()
    numbers, before = context.RawArray("q", 2), multiprocessing.active_children()
    pool = ProcessPoolExecutor(processes, context, initializer=_start, initargs=(numbers, os.getpid()))
    finished = False
    with tempfile.TemporaryDirectory() as meeting:
        try:
            futures = [
                pool.submit(_take_part, place, processes, Path(meeting) / "store", step)
                for place in range(processes)
            ]
            while not finished:
                ended, running = wait(futures, timeout=PERIOD, return_when=FIRST_EXCEPTION)
                progress(*numbers)
                if errors := [error for future in ended if (error := future.exception())]:
                    raise _decisive(errors, running)
                finished = not running
        except BrokenProcessPool as error:
            raise MachineError(
                "a process of a training was killed, most likely because memory ran out; set a smaller "
                "batch or close other programs, and run again to resume"
            ) from error
        finally:
            if not finished:
                for child in set(multiprocessing.active_children()) - set(before):
                    child.kill()
            pool.shutdown(wait=True, cancel_futures=True)


def _decisive(errors: list[BaseException], running: set[Future[None]]) -> BaseException:
    """The error of a process that was killed, else the first: others may fail before a kill is noticed."""
    ended, _ = wait(running, timeout=GRACE)
    errors = [*errors, *(error for future in ended if (error := future.exception()))]
    return next((error for error in errors if isinstance(error, BrokenProcessPool)), errors[0])


def _free_card() -> None:
    """Free what this process keeps on its card, which the first of the new processes uses."""
    if torch := sys.modules.get("torch"):
        gc.collect()
        torch.cuda.empty_cache()


_numbers: Any = None  # done and total, in memory that the processes share


def _start(numbers: Any, parent: int) -> None:
    global _numbers
    _numbers = numbers
    # else torch, imported later, warns on standard error that each parameter had a gradient
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # else accelerate warns
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    machine.end_with_parent(parent)


def _take_part(place: int, processes: int, store: Path, step: Step) -> None:
    """Execute the step as the process with this number of a group; they meet in the file `store`."""
    ranks = {"RANK": place, "LOCAL_RANK": place, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    import torch
    from torch import distributed

    if on_cards := torch.cuda.is_available():
        torch.cuda.set_device(place)
    distributed.init_process_group(
        "nccl" if on_cards else "gloo",
        init_method=store.as_uri(),
        rank=place,
        world_size=processes,
        timeout=PATIENCE,
    )
    step(_report if place == 0 else _ignore)
    distributed.destroy_process_group()


def _report(done: int, total: int) -> None:
    _numbers[1], _numbers[0] = total, done


def _ignore(done: int, total: int) -> None:
    """Ignore the progress of all processes except the first."""

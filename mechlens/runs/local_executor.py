"""Execute jobs in worker processes of this machine (executor `local`), one a card or one a core.

Workers end with the process that started them, also after a kill. They report progress through shared memory:
two numbers a job, and each report overwrites the last. A queue would fill up without a reader, and a worker
that is killed while it writes to a queue blocks every reader.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any

from mechlens.core import machine
from mechlens.core.errors import MachineError
from mechlens.core.parallel import forget_standard_input, new_workers
from mechlens.runs.executor import Executor, StepProgress, Task
from mechlens.runs.jobs import STAGES, Job, most_processes


@contextmanager
def start_processes(_run: Path, todo: Sequence[Job], workers: int | None) -> Iterator[Executor]:
    """Start the executor `local`: worker processes of this machine, one a card or one a core by default."""
    each = most_processes(todo)
    count = machine.workers(each) if workers is None else workers
    cards = machine.cards()
    context = _context(cards)
    reports = _Reports(context, [job.name for job in todo])
    shared = reports.numbers, cards, each, context.Value("i", 0), dict(os.environ)
    with ProcessPoolExecutor(
        min(count, len(todo)), mp_context=context, initializer=_start_worker, initargs=shared
    ) as pool:
        yield _Processes(pool, reports, count, bool(cards))


def _context(cards: Sequence[str]) -> SpawnContext | ForkServerContext:
    """How workers start: as forks of a server that has imported the libraries and has used none of them.

    torch and its threads do not survive a fork of this process. The imports take seconds of each core, and
    the server does them once for all workers of this process. CUDA and macOS get workers that start anew.
    """
    if cards or not sys.platform.startswith("linux"):
        return new_workers()
    forget_standard_input()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([STAGES["distill"].partition(":")[0]])
    return context


class _Processes:
    """The executor `local`."""

    def __init__(self, pool: ProcessPoolExecutor, reports: _Reports, workers: int, with_cards: bool) -> None:
        self._pool, self._reports, self._workers, self._with_cards = pool, reports, workers, with_cards
        self.report = reports.pass_on

    def has_room(self, job: Job, running: Sequence[Job]) -> bool:
        needs = [job.needs, *(other.needs for other in running)]
        taken = sum(need.cards if self._with_cards else need.cores for need in needs)
        fits = taken <= self._workers and sum(need.memory for need in needs) <= machine.memory()
        return fits or not running

    def submit(self, job: Job, task: Task) -> Future[None]:
        try:
            return self._pool.submit(_do_in_worker, task, self._reports.place(job.name))
        except BrokenProcessPool as error:  # it broke before the job could be handed to it
            failed: Future[None] = Future()
            failed.set_exception(error)
            return failed

    def explain(self, error: BaseException) -> BaseException:
        if not isinstance(error, BrokenProcessPool):
            return error
        killed = MachineError(
            "a worker process was killed, most likely because memory ran out; "
            "close other programs and run again to resume"
        )
        killed.__cause__ = error
        return killed

    def stop(self) -> None:
        for worker in multiprocessing.active_children():  # they ignore Ctrl-C
            worker.terminate()


class _Reports:
    """The latest progress of each job, in memory that the workers share; no writer waits for a reader."""

    def __init__(self, context: SpawnContext | ForkServerContext, names: Sequence[str]) -> None:
        self._names = list(names)
        # done and total of each job; without a lock, which a killed worker would never release
        self.numbers = context.RawArray("q", 2 * len(names))
        self._passed_on = [(0, 0)] * len(names)

    def place(self, name: str) -> int:
        """Index of the first of the job's two numbers."""
        return 2 * self._names.index(name)

    def pass_on(self, progress: StepProgress) -> None:
        """Call `progress` for each job with new numbers."""
        for index, name in enumerate(self._names):
            latest = (self.numbers[2 * index], self.numbers[2 * index + 1])
            if latest != self._passed_on[index]:
                self._passed_on[index] = latest
                progress(name, *latest)


_numbers: Any = None  # of a worker's `_Reports`, set once a process: shared memory cannot travel with a job


def _start_worker(
    numbers: Any, cards: Sequence[str], each: int, started: Any, environment: Mapping[str, str]
) -> None:
    """Initialise a worker before it uses torch; `started` counts the workers, and each takes other cards.

    Args:
        environment: of the process that started it; a server's fork has that of the server's start.
    """
    global _numbers
    _numbers = numbers
    for name in {*os.environ} - {*environment}:
        del os.environ[name]
    os.environ.update(environment)
    with started.get_lock():
        worker, started.value = started.value, started.value + 1
    machine.use_cards(cards, worker, each)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()


def _die_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _do_in_worker(task: Task, place: int) -> None:
    def progress(done: int, total: int) -> None:
        _numbers[place + 1], _numbers[place] = total, done

    task(progress)

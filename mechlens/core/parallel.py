"""Apply a function to many items in worker processes, with the results in the order of the items."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.context import SpawnContext
from typing import TypeVar

from mechlens.core import machine
from mechlens.core.errors import MachineError

Item = TypeVar("Item")
Result = TypeVar("Result")

FIRST = 8
"""items that this process computes before workers get any, since their start takes seconds"""
AHEAD = 6
"""items that workers have before their first result is taken"""


def new_workers() -> SpawnContext:
    """How workers start anew, since the threads of NumPy and torch do not survive a fork."""
    forget_standard_input()
    return multiprocessing.get_context("spawn")


def forget_standard_input() -> None:
    """Let workers start from a script that was read from standard input (`python - < script`).

    A worker imports its main module from the module's file, and that one is `<stdin>`, which does not exist.
    """
    main = sys.modules["__main__"]
    if getattr(main, "__file__", None) == "<stdin>":
        del main.__file__


@contextmanager
def open_workers(count: int) -> Iterator[Executor | None]:
    """Worker processes, which start when they get work; None for fewer than two."""
    if count < 2:
        yield None
        return
    pool = ProcessPoolExecutor(count, new_workers(), initializer=_start_worker, initargs=(os.getpid(),))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise MachineError(
            "a worker process was killed, most likely because memory ran out; close other programs and run "
            "again"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: Executor | None
) -> Iterator[tuple[Item, Result]]:
    """Each item with the function's result, in the order of the items.

    Args:
        function: a pure function that can be pickled.
        items: read as the results are taken: few items are in memory at once.
        workers: of `open_workers`; without them, or with few items, this process computes everything.
    """
    rest = iter(items)
    for item in rest if workers is None else islice(rest, FIRST):
        yield item, function(item)
    if workers is None:
        return
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    for item in rest:
        waiting.append((item, workers.submit(function, item)))
        if len(waiting) > AHEAD:
            yield _finished(waiting)
    while waiting:
        yield _finished(waiting)


def _finished(waiting: deque[tuple[Item, Future[Result]]]) -> tuple[Item, Result]:
    item, future = waiting.popleft()
    return item, future.result()


def _start_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    machine.end_with_parent(parent)

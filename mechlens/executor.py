"""Work through a list of jobs on this machine: one process a core, each job once its inputs exist.

A job is a pure function of (arguments, input folders) that fills an output folder; where it runs is nobody's business but
this module's. It knows nothing of what the jobs do. Workers die with the process that started them, however it ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from multiprocessing import connection
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, NamedTuple

from mechlens import store
from mechlens.errors import DataError, MachineError
from mechlens.spec import fingerprint


class Location(str):
    """A path among a job's arguments: what lies there decides, by a digest beside it in the arguments, and not where it lies."""


Progress = Callable[[str, int, int], None]
"""called with (job, done, total)"""


class Job(NamedTuple):
    """One step of a run."""

    name: str
    """its folder in the run, e.g. `students/trait/s0`"""
    function: str
    """`module:function`, called as function(arguments, inputs, out, progress)"""
    arguments: dict[str, Any]
    """JSON values, and all that the step reads beside its inputs"""
    inputs: dict[str, str]
    """role → name of the job whose folder it reads"""
    version: int
    """of the step's code: a change that changes its output raises it"""


PACE = "api"
"""the argument that says how fast and dear API calls may be: what is answered does not depend on it"""


def fingerprints(jobs: Sequence[Job]) -> dict[str, str]:
    """Fingerprint of each job: its function, version and arguments, and its inputs' fingerprints. Jobs come inputs first.

    Left out are how fast APIs are called, where files lie, and the kind of processor: a run that was made on a GPU can be read and
    gone on with on a CPU. Sums differ there in their last digits.
    """
    found: dict[str, str] = {}
    for job in jobs:
        inputs = {role: found[name] for role, name in job.inputs.items()}
        told = {name: value for name, value in job.arguments.items() if name != PACE}
        found[job.name] = fingerprint([job.function, job.version, _without_locations(told), inputs])
    return found


def _without_locations(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_locations(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_locations(inner) for inner in value]
    return "" if isinstance(value, Location) else value


def pending(run: Path, jobs: Sequence[Job]) -> list[Job]:
    """The jobs whose very result is not in the run yet."""
    marks = fingerprints(jobs)
    return [job for job in jobs if not store.is_complete(run / job.name, marks[job.name])]


def refuse_changed(run: Path, done: Sequence[Job], now: Sequence[Job]) -> None:
    """Compare steps as they were started with the same steps as they would be now.

    Raises:
        DataError: if a base or a data file changed meanwhile: some steps read the old one, some the new one.
    """
    marks = fingerprints(now)
    if changed := [name for name, mark in fingerprints(done).items() if marks[name] != mark]:
        raise DataError(
            f"a base or a data file changed while {run} was made: {len(changed)} steps, {changed[0]} first, may have read either; "
            "run again, which repeats them"
        )


def execute(run: Path, jobs: Sequence[Job], *, workers: int, progress: Progress, finished: Callable[[Job], None]) -> None:
    """Do what is pending in `workers` processes, or in this one if 0; `finished(job)` is called after each.

    Raises:
        MechlensError: the first that a job raised; the others that were running are finished first.
        MachineError: if a worker was killed from outside.
    """
    marks, todo = fingerprints(jobs), pending(run, jobs)
    if not todo:
        return
    if workers == 0:  # in this process, for tests and debuggers
        for job in todo:
            _do(run, job, marks[job.name], {role: marks[name] for role, name in job.inputs.items()})
            finished(job)
        return
    context = multiprocessing.get_context("spawn")  # torch and its threads do not survive a fork
    messages: Queue[tuple[str, int, int]] = context.Queue()
    pool = ProcessPoolExecutor(min(workers, len(todo)), mp_context=context, initializer=_start_worker, initargs=(messages,))
    running: dict[Future[None], Job] = {}
    waiting, done = list(todo), {job.name for job in jobs} - {job.name for job in todo}
    try:
        while waiting or running:
            for job in [job for job in waiting if set(job.inputs.values()) <= done]:
                waiting.remove(job)
                running[pool.submit(_do, run, job, marks[job.name], {role: marks[name] for role, name in job.inputs.items()})] = job
            ended, _ = wait(running, timeout=0.1, return_when=FIRST_COMPLETED)
            while not messages.empty():
                progress(*messages.get())
            for future in ended:
                job = running.pop(future)
                future.result()
                done.add(job.name)
                finished(job)
    except KeyboardInterrupt:
        for worker in multiprocessing.active_children():  # they do not hear Ctrl-C; what they were at is resumed later
            worker.terminate()
        raise
    except BrokenProcessPool as error:
        raise MachineError("a worker process was killed, most likely for want of memory; close other programs and run again to resume") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        messages.cancel_join_thread()


_messages: Queue[tuple[str, int, int]] | None = None


def _start_worker(messages: Queue[tuple[str, int, int]]) -> None:
    global _messages  # set once a process, before its first job; a queue cannot travel with a job
    _messages = messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()


def _die_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _do(run: Path, job: Job, mark: str, inputs: dict[str, str]) -> None:
    module, function = job.function.split(":")

    def progress(done: int, total: int) -> None:
        if _messages is not None:
            _messages.put((job.name, done, total))

    with store.working(run / job.name, mark, inputs=inputs) as out:
        if not store.is_complete(out, mark):
            getattr(import_module(module), function)(job.arguments, {role: run / name for role, name in job.inputs.items()}, out, progress)

"""Execute a list of jobs, each as soon as its inputs exist, in processes of this machine or on a Ray cluster.

`execute` decides when a job starts, an `Executor` decides where, and neither depends on what the jobs do.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from mechlens.core import foreign
from mechlens.core.errors import MachineError, MechlensError, SpecError
from mechlens.runs import process_group, store
from mechlens.runs.claims import Claims
from mechlens.runs.jobs import PROCESSES, STAGES, Job, fingerprints, pending
from mechlens.runs.progress import Event, Progress, silent

StepProgress = Callable[[str, int, int], None]
"""called with (job, done, total)"""
FINISHED = "finished steps are kept; change the model, the data or the spec, and run again"
PERIOD = 0.1
"""seconds between two readings of the workers' progress"""
Task = Callable[[Callable[[int, int], None]], None]
"""a job as a function that another process can execute; it takes the callback of progress (done, total)"""


@runtime_checkable
class Executor(Protocol):
    """Where jobs run. `execute` submits a job when its inputs exist and there is room for it."""

    def has_room(self, job: Job, running: Sequence[Job]) -> bool:
        """Whether the job may be submitted while these jobs run; true if none runs."""
        ...

    def submit(self, job: Job, task: Task) -> Future[Any]:
        """Execute the task of a job in another process."""
        ...

    def report(self, progress: StepProgress) -> None:
        """Call `progress` for each job with new numbers."""
        ...

    def explain(self, error: BaseException) -> BaseException:
        """What to raise for the error of a future: the job's own error, or why the job was not executed."""
        ...

    def stop(self) -> None:
        """End the jobs that are running."""
        ...


Start = Callable[[Path, Sequence[Job], int | None], AbstractContextManager[Executor]]
"""starts an executor for (run folder, pending jobs, workers)"""
ExecutorName = Literal["local", "ray"]
EXECUTORS: dict[ExecutorName, str] = {
    "local": "mechlens.runs.local_executor:start_processes",
    "ray": "mechlens.runs.ray_executor:start_ray",
}
"""name of an executor → `module:function`, a `Start`"""
EXECUTOR = "MECHLENS_EXECUTOR"
"""environment variable with the name of the executor that is used by default"""
_chosen: ContextVar[ExecutorName | None] = ContextVar("executor", default=None)


@contextmanager
def use_executor(name: ExecutorName | None) -> Iterator[None]:
    """Execute the jobs of this block with that executor; None leaves the choice as it is."""
    token = _chosen.set(name or _chosen.get())
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen_executor() -> ExecutorName:
    """The name of the executor of `use_executor` or of MECHLENS_EXECUTOR, else `local`.

    Raises:
        SpecError: if the environment variable has another value.
    """
    name = _chosen.get() or os.environ.get(EXECUTOR) or "local"
    if name not in EXECUTORS:
        raise SpecError(f"{EXECUTOR} is {name!r}; expected {' or '.join(EXECUTORS)}")
    return name


def execute(
    run: Path,
    jobs: Sequence[Job],
    *,
    workers: int | None,
    progress: StepProgress,
    finished: Callable[[Job], None],
    claims: Claims | None = None,
) -> None:
    """Execute the pending jobs, at most `workers` at a time, or in this process if it is 0.

    `finished(job)` is called after each job. For jobs in other processes `progress` gets the latest numbers,
    at most once a `PERIOD`.

    Args:
        claims: those of this process where several share the list; it then returns when all jobs are done,
            and jobs that others have done count as finished.

    Raises:
        MechlensError: the first that a job raised; the jobs that were submitted before are finished first.
        MachineError: if a worker was killed from outside.
    """
    marks, queue = fingerprints(jobs), _Queue(run, jobs, claims, finished)
    if workers == 0:  # in this process, for tests and debuggers
        _execute_here(run, queue, marks, progress)
    elif queue.waiting:
        start: Start = _function_of(EXECUTORS[chosen_executor()])
        with start(run, queue.waiting, workers) as executor:
            failure = _execute_by(executor, run, queue, marks, progress)
        if failure is not None:
            raise failure


class _Queue:
    """The jobs that are not done yet, in the order in which this process takes them."""

    def __init__(
        self, run: Path, jobs: Sequence[Job], claims: Claims | None, finished: Callable[[Job], None]
    ) -> None:
        todo = pending(run, jobs)
        self.waiting = claims.shard.in_order(todo) if claims else todo
        self._run, self._marks, self._claims, self._finished = run, fingerprints(jobs), claims, finished
        self._done = {job.name for job in jobs} - {job.name for job in todo}

    def take(self, has_room: Callable[[Job], bool]) -> tuple[Job, Path | None] | None:
        """The next job to start, and the folder of its claim; None if there is none now."""
        for job in [job for job in self.waiting if set(job.inputs.values()) <= self._done]:
            if not has_room(job):
                continue
            step, folder = self._run / job.name, None
            if self._claims is not None:
                folder = self._claims.take(step, self._marks[job.name])
                if folder is None:  # another process is doing it
                    continue
            self.waiting.remove(job)
            if folder != step:
                return job, folder
            self.finish(job)
        return None

    def finish(self, job: Job) -> None:
        """Record that a job is done, here or in another process."""
        self._done.add(job.name)
        self._finished(job)

    def put_back(self, job: Job, claim: Path | None) -> bool:
        """Queue a failed job again if another process has replaced the claim, which made it fail."""
        if self._claims is None or claim is None or self._claims.is_newest(claim):
            return False
        self.waiting.append(job)
        return True


def _execute_here(run: Path, queue: _Queue, marks: Mapping[str, str], progress: StepProgress) -> None:
    while queue.waiting:
        if (taken := queue.take(lambda job: True)) is None:  # other processes have what is left
            time.sleep(PERIOD)
            continue
        job, claim = taken
        try:
            _do(run, job, marks[job.name], _marks_of_inputs(job, marks), claim, partial(progress, job.name))
        except (OSError, MechlensError):
            if not queue.put_back(job, claim):
                raise
        else:
            queue.finish(job)


def _execute_by(
    executor: Executor, run: Path, queue: _Queue, marks: Mapping[str, str], progress: StepProgress
) -> BaseException | None:
    """Execute the jobs of the queue by an executor, each after its inputs; returns the first failure."""
    running: dict[Future[Any], tuple[Job, Path | None]] = {}
    failure: BaseException | None = None

    def has_room(job: Job) -> bool:
        return executor.has_room(job, [other for other, _ in running.values()])

    try:
        while running or (queue.waiting and failure is None):
            while failure is None and (taken := queue.take(has_room)):
                job, claim = taken
                inputs = _marks_of_inputs(job, marks)
                running[executor.submit(job, partial(_do, run, job, marks[job.name], inputs, claim))] = taken
            ended, _ = wait(running, timeout=PERIOD, return_when=FIRST_COMPLETED)
            if not running and queue.waiting:  # other processes have what is left
                time.sleep(PERIOD)
            executor.report(progress)
            for future in ended:
                job, claim = running.pop(future)
                if (error := future.exception()) is None:
                    queue.finish(job)
                elif not queue.put_back(job, claim):
                    failure = failure or executor.explain(error)
    finally:
        if running:  # Ctrl-C, or an error of a caller's function; the jobs are resumed later
            executor.stop()
    return failure


def _marks_of_inputs(job: Job, marks: Mapping[str, str]) -> dict[str, str]:
    return {role: marks[name] for role, name in job.inputs.items()}


def _do(
    run: Path,
    job: Job,
    mark: str,
    inputs: dict[str, str],
    claim: Path | None,
    progress: Callable[[int, int], None],
) -> None:
    if claim is None and store.is_complete(run / job.name, mark):  # by a node that was lost before it said so
        return
    with store.working(run / job.name, mark, inputs=inputs, part=claim) as out:
        if not store.is_complete(out, mark):
            step = partial(_execute_step, run, job, out)
            if (processes := job.arguments.get(PROCESSES, 1)) > 1:
                process_group.execute_together(processes, step, progress)
            else:
                step(progress)


def _execute_step(run: Path, job: Job, out: Path, progress: Callable[[int, int], None]) -> None:
    step = _function_of(job.stage)
    with foreign.named(f"the step {job.name} failed", MachineError, advice=FINISHED, located=True):
        step(job.arguments, {role: run / name for role, name in job.inputs.items()}, out, progress)


def _function_of(stage: str) -> Callable[..., Any]:
    module, function = STAGES.get(stage, stage).split(":")
    return getattr(import_module(module), function)


def complete(
    folder: Path,
    jobs: Sequence[Job],
    *,
    title: str,
    workers: int | None,
    progress: Progress | None,
    claims: Claims | None = None,
) -> None:
    """Execute the pending ones of these jobs, and report their progress.

    Args:
        title: purpose of the jobs, the text of the first event.
        workers: number of jobs at a time; None means one a core or one an accelerator, or fewer if a job
            takes several, 0 this process.
        claims: those of this process, as in `execute`.
    """
    if workers is not None and workers < 0:
        raise SpecError(f"workers is {workers}; expected 1 or more processes, or 0 for this one")
    report = progress or silent
    todo = pending(folder, jobs)
    report(Event("begin", title, len(jobs) - len(todo), len(jobs)))
    execute(
        folder,
        jobs,
        workers=workers,
        progress=lambda name, done, total: report(Event("step", name, done, total)),
        finished=lambda job: report(Event("end", job.name)),
        claims=claims,
    )


def make(folder: Path, jobs: Sequence[Job], *, workers: int | None, progress: Progress | None = None) -> None:
    """Execute the unfinished jobs of a folder that is not a run, under the folder's lock."""
    with store.lock(folder), store.full_disk_named(folder):
        if pending(folder, jobs):
            complete(folder, jobs, title=str(folder), workers=workers, progress=progress)

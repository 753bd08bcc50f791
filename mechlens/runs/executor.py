"""Execute a list of jobs, each as soon as its inputs exist, in processes of this machine or on a Ray cluster.

A job is a pure function of (arguments, input folders) that fills an output folder. It names its function by
the id of a stage. A finished step is recorded under this id: the function may move, and finished runs stay
valid. `execute` decides when a job starts, an `Executor` decides where, and neither depends on what the jobs
do. The executor `local` is here: one process a core. Its workers end with the process that started them, also
after a kill.

Workers report progress through shared memory: two numbers a job, and each report overwrites the last. A queue
would fill up without a reader, and a worker that is killed while it writes to a queue blocks every reader.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import partial
from importlib import import_module
from multiprocessing import connection
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from mechlens.core import foreign, machine
from mechlens.core.errors import DataError, MachineError, MechlensError, SpecError
from mechlens.core.spec import fingerprint
from mechlens.runs import process_group, store
from mechlens.runs.claims import Claims
from mechlens.runs.progress import Event, Progress, silent

PIPELINE = (
    "teach", "generate", "bring", "screen", "shuffle", "reword", "mix", "select", "label", "distill", "ask",
)  # fmt: skip
STAGES = {name: f"mechlens.pipeline.stages:{name}" for name in PIPELINE} | {
    "measure": "mechlens.lenses.run:measure_lens"
}
"""id of a stage → `module:function`, called as function(arguments, inputs, out, progress)"""
RECORDED = {name: f"mechlens.pipeline.jobs:{name}" for name in PIPELINE} | {
    "measure": "mechlens.measure:look"
}
"""id → name of the stage in fingerprints, which is the path of its function in the first release"""


class Location(str):
    """A path among a job's arguments; a fingerprint ignores it.

    Another argument has the digest of the file's content, which the fingerprint includes.
    """


StepProgress = Callable[[str, int, int], None]
"""called with (job, done, total)"""


class Needs(NamedTuple):
    """What a job needs while it runs."""

    cores: int = 1
    memory: int = 0
    """bytes; 0 if they are not known"""
    cards: int = 1
    """accelerators, where there are any; a local worker always has one"""


class Job(NamedTuple):
    """One step of a run."""

    name: str
    """its folder in the run, e.g. `students/trait/s0`"""
    stage: str
    """id of its function (`STAGES`), or `module:function` of code outside mechlens"""
    arguments: dict[str, Any]
    """JSON values; the step reads nothing else except its inputs"""
    inputs: dict[str, str]
    """role → name of the job that writes this input"""
    version: int
    """of the step's code; raised by a change of the code that changes the output"""
    needs: Needs = Needs()
    """not part of the fingerprint"""


PACE = "api"
"""argument with the API's rate limit and budget, which do not change the answers"""
SERVER = "vllm_server"
"""argument with the location of the vLLM server, which does not change the rows"""
PROCESSES = "processes"
"""argument with the number of processes that execute the step together; results differ by rounding alone"""
NOT_HASHED = (PACE, SERVER, PROCESSES)


def most_processes(jobs: Sequence[Job]) -> int:
    """The most processes that one of these jobs is executed by, and so the cards that a worker needs."""
    return max((job.arguments.get(PROCESSES, 1) for job in jobs), default=1)


def needs_of(job: Job) -> Needs:
    """What a job needs, with a core and a card for each process that executes it."""
    processes = job.arguments.get(PROCESSES, 1)
    return job.needs._replace(cores=max(job.needs.cores, processes), cards=max(job.needs.cards, processes))


def fingerprints(jobs: Sequence[Job]) -> dict[str, str]:
    """Fingerprint of each job: of its stage, version and arguments, and of its inputs' fingerprints.

    API limits, paths of files, vLLM servers, and the kind and number of processors are left out. A run that
    was started on a GPU can be read and finished on a CPU, where sums differ in their last digits.

    Args:
        jobs: every job after its inputs.
    """
    by_name: dict[str, str] = {}
    for job in jobs:
        inputs = {role: by_name[name] for role, name in job.inputs.items()}
        arguments = {name: value for name, value in job.arguments.items() if name not in NOT_HASHED}
        by_name[job.name] = fingerprint(
            [RECORDED.get(job.stage, job.stage), job.version, _without_locations(arguments), inputs]
        )
    return by_name


def _without_locations(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_locations(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_locations(inner) for inner in value]
    return "" if isinstance(value, Location) else value


def pending(run: Path, jobs: Sequence[Job]) -> list[Job]:
    """The jobs whose result, by fingerprint, is not in the run yet."""
    marks = fingerprints(jobs)
    return [job for job in jobs if not store.is_complete(run / job.name, marks[job.name])]


def refuse_changed(run: Path, done: Sequence[Job], now: Sequence[Job]) -> None:
    """Refuse a run if its bases or data files changed while its steps were executed.

    Args:
        done: the steps as they were listed at the start.
        now: the same steps, listed again.

    Raises:
        DataError: if a fingerprint differs; some steps may have read the old file and some the new one.
    """
    marks = fingerprints(now)
    if changed := [name for name, mark in fingerprints(done).items() if marks[name] != mark]:
        raise DataError(
            f"a base or a data file changed while {run} was made: {len(changed)} steps, {changed[0]} first, "
            "may have read either; run again, which repeats them"
        )


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
    "local": "mechlens.runs.executor:start_processes",
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
        return multiprocessing.get_context("spawn")
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

"""Execute jobs as tasks of a Ray cluster (executor `ray`).

Ray decides on which node a job runs, and repeats a job whose node or worker died. The run folder has to be on
a file system that all nodes share: a job reads its inputs there and renames its finished folder there, so a
repeated job recognises a result that a lost node has left. Nothing else travels to a node, neither code nor
data: all nodes need the same Python environment, and the same folders under the same paths.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mechlens.core import foreign, machine
from mechlens.core.errors import MachineError
from mechlens.runs import store
from mechlens.runs.executor import Executor, StepProgress, Task
from mechlens.runs.jobs import Job, Needs, needs_of

NO_PACKAGE = "the executor ray needs the package ray, which is not installed; pip install 'mechlens[ray]'"
ADDRESS = "RAY_ADDRESS"
SETTINGS = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else `uv run` ships the working folder to every node
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else Ray warns that a task without cards still sees them
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""environment variables that Ray reads when it is imported"""
PASSED_ON = ("MECHLENS_", "HF_", "OPENAI_", "VLLM_")
"""starts of the names of environment variables that jobs read"""
TOKEN = ".ray-token"
"""file in the run folder that every node must be able to read"""
REPEATS = 3
"""how often a job is repeated whose node or worker died; a job that raised is not repeated"""
PAUSE = 0.2
"""least seconds between two progress reports of a job"""
OBJECT_STORE = 100_000_000
"""bytes that a new cluster reserves for Ray's own objects; jobs exchange files instead"""
GRACE = 10.0
"""seconds to wait for a cluster to answer, and for cancelled jobs to end"""


class Driver(NamedTuple):
    """The process that started the run, as the nodes have to see it."""

    token_file: Path
    token: str
    folder: Path
    """the working folder, which relative paths in a job's arguments start from"""
    versions: Mapping[str, str | None]
    """package → version"""
    variables: Mapping[str, str]
    """environment variables that jobs read"""


@contextmanager
def start_ray(run: Path, todo: Sequence[Job], workers: int | None) -> Iterator[Executor]:
    """Start the executor `ray`: use the cluster that runs, or start one on this machine.

    Raises:
        MachineError: if Ray is absent or unreachable, a node cannot read the run folder or has other versions
            of packages, or no node has what a job needs.
    """
    ray = _import_ray()
    token_file = run.resolve() / TOKEN
    variables = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    driver = Driver(token_file, uuid.uuid4().hex, Path.cwd(), store.versions(), variables)
    with _connected(ray, workers):
        token_file.write_text(driver.token)
        try:
            nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
            _refuse_nodes(ray, nodes, driver)
            with_cards = any(node["Resources"].get("GPU") for node in nodes)
            refuse_too_large(nodes, todo, with_cards)
            yield _RayTasks(ray, driver, workers, with_cards)
        finally:
            token_file.unlink(missing_ok=True)


def _import_ray() -> Any:
    os.environ.update({name: value for name, value in SETTINGS.items() if name not in os.environ})
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.exceptions  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MachineError(NO_PACKAGE) from error
    return ray


@contextmanager
def _connected(ray: Any, workers: int | None) -> Iterator[None]:
    """A connection to the cluster of RAY_ADDRESS, to one that runs on this machine, or to a new one."""
    if ray.is_initialized():  # by the program that uses mechlens as a library
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    address = os.environ.get(ADDRESS)
    what = f"no Ray cluster answers at {ADDRESS}={address}" if address else "Ray does not start"
    with foreign.named(what, MachineError):
        if address:
            _refuse_silent(address)
        try:
            ray.init(address=address or "auto", **options)
        except ConnectionError:
            if address:
                raise
            options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
            ray.init(address="local", num_cpus=workers or machine.cores(), **options)
    try:
        yield
    finally:
        ray.shutdown()


def _refuse_silent(address: str) -> None:
    """Raise OSError if nobody listens at HOST:PORT, which Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host, int(port)), timeout=GRACE).close()


def _refuse_nodes(ray: Any, nodes: Sequence[Mapping[str, Any]], driver: Driver) -> None:
    """Refuse a cluster with a node that cannot execute jobs of this run."""
    check = ray.remote(num_cpus=0, max_retries=0)(node_fault)
    faults = {
        _name_of(node): check.options(scheduling_strategy=_on_node(node["NodeID"])).remote(driver)
        for node in nodes
    }
    for node, reference in faults.items():
        try:
            fault = ray.get(reference)
        except (ray.exceptions.NodeDiedError, ray.exceptions.TaskUnschedulableError):
            continue  # it was lost since the list was made: jobs go to the others
        except ray.exceptions.RayError as error:
            fault = f"cannot execute mechlens ({foreign.first_line(_cause(error))}); {SAME_ENVIRONMENT}"
        if fault:
            raise MachineError(f"the node {node} {fault}")


SAME_ENVIRONMENT = "install the same Python environment on every node"


def node_fault(driver: Driver) -> str:
    """Why this node cannot execute jobs of the driver's run, as the rest of a sentence; empty if it can."""
    try:
        readable = driver.token_file.read_text() == driver.token
    except OSError:
        readable = False
    if not readable:
        return (
            f"cannot read {driver.token_file}; put the run on a file system that all nodes share "
            "under the same path, and choose it by --out"
        )
    if not driver.folder.is_dir():
        return f"has no folder {driver.folder}; start mechlens in a folder that all nodes share"
    for package, version in store.versions().items():
        if version != driver.versions[package]:
            return (
                f"has {package} {version}, and the driver has {driver.versions[package]}; {SAME_ENVIRONMENT}"
            )
    return ""


def refuse_too_large(nodes: Sequence[Mapping[str, Any]], todo: Sequence[Job], with_cards: bool) -> None:
    """Refuse a job that no node has room for, since Ray would wait for such a node.

    Raises:
        MachineError: with the name of the job and what it needs.
    """
    for job in todo:
        wanted = _resources(needs_of(job), with_cards)
        if not any(all(node["Resources"].get(name, 0) >= n for name, n in wanted.items()) for node in nodes):
            listed = ", ".join(f"{name} {n:,}" for name, n in wanted.items())
            raise MachineError(
                f"no node of the Ray cluster has what the step {job.name} needs ({listed}); add a larger node"
            )


def _resources(needs: Needs, with_cards: bool) -> dict[str, int]:
    """What a job needs, by Ray's names; with a card it needs no memory of the machine."""
    if with_cards:
        return {"CPU": needs.cores, "GPU": needs.cards}
    return {"CPU": needs.cores} | ({"memory": needs.memory} if needs.memory else {})


def _name_of(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}:{node['NodeManagerPort']})"


def _on_node(identifier: str) -> Any:
    from ray.util.scheduling_strategies import (  # pyright: ignore[reportMissingImports]
        NodeAffinitySchedulingStrategy,
    )

    return NodeAffinitySchedulingStrategy(identifier, soft=False)


def _cause(error: Exception) -> Exception:
    """The error that a task raised; Ray's own errors as they are."""
    return getattr(error, "cause", None) or error


class _RayTasks:
    """The executor `ray`."""

    def __init__(self, ray: Any, driver: Driver, workers: int | None, with_cards: bool) -> None:
        self._ray, self._driver, self._workers, self._with_cards = ray, driver, workers, with_cards
        here = _on_node(ray.get_runtime_context().get_node_id())
        self._reports = ray.remote(num_cpus=0, scheduling_strategy=here)(Reports).remote()
        self._running: dict[Future[Any], Any] = {}

    def has_room(self, job: Job, running: Sequence[Job]) -> bool:
        return not running or self._workers is None or len(running) < self._workers

    def submit(self, job: Job, task: Task) -> Future[None]:
        resources = _resources(needs_of(job), self._with_cards)
        options: dict[str, Any] = {
            "num_cpus": resources["CPU"],
            "num_gpus": resources.get("GPU", 0),
            "max_retries": REPEATS,
            "retry_exceptions": False,
        }
        options |= {"memory": resources["memory"]} if "memory" in resources else {}
        remote = self._ray.remote(**options)(do_on_node)  # with a card, its worker ends after the job
        reference = remote.remote(self._driver, job.name, task, self._reports)
        future = reference.future()
        self._running[future] = reference
        return future

    def report(self, progress: StepProgress) -> None:
        with foreign.named("the Ray cluster no longer answers", MachineError, advice="run again to resume"):
            reports = self._ray.get(self._reports.take.remote())
        for name, (done, total) in reports.items():
            progress(name, done, total)

    def explain(self, error: BaseException) -> BaseException:
        if not (isinstance(error, Exception) and isinstance(error, self._ray.exceptions.RayError)):
            return error
        if (cause := _cause(error)) is error:
            cause = MachineError(
                f"a worker process was killed or its node was lost, {REPEATS + 1} times; most likely memory "
                f"ran out (Ray: {foreign.first_line(error)}); run again to resume"
            )
        cause.__cause__ = error  # it has the traceback of the node
        return cause

    def stop(self) -> None:
        running = {future: reference for future, reference in self._running.items() if not future.done()}
        for reference in running.values():
            self._ray.cancel(reference, force=True)
        wait(running, timeout=GRACE)


class Reports:
    """The latest progress of each job, in an actor on the driver's node."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[int, int]] = {}

    def put(self, job: str, done: int, total: int) -> None:
        """Replace the numbers of a job."""
        self._latest[job] = (done, total)

    def take(self) -> dict[str, tuple[int, int]]:
        """The numbers that are new since the last call."""
        latest, self._latest = self._latest, {}
        return latest


def do_on_node(driver: Driver, name: str, task: Task, reports: Any) -> None:
    """Execute the task of a job on a node, in the driver's folder.

    Raises:
        MachineError: if this node, which may have joined late, cannot execute jobs of the run.
    """
    import ray  # pyright: ignore[reportMissingImports]

    if fault := node_fault(driver):
        raise MachineError(f"the node {ray.util.get_node_ip_address()} {fault}")
    os.environ.update(driver.variables)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with contextlib.chdir(driver.folder), _passed_on(reports, name) as progress:
        task(progress)


@contextmanager
def _passed_on(reports: Any, name: str) -> Iterator[Callable[[int, int], None]]:
    """A callback that passes a job's numbers to the actor, at most once a `PAUSE`, and the last ones."""
    import ray  # pyright: ignore[reportMissingImports]

    latest, passed_at = (0, 0), 0.0

    def progress(done: int, total: int) -> None:
        nonlocal latest, passed_at
        latest = (done, total)
        if time.monotonic() - passed_at >= PAUSE:
            passed_at = time.monotonic()
            reports.put.remote(name, done, total)

    yield progress
    if latest[1]:
        ray.get(reports.put.remote(name, *latest))

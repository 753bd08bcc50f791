"""The list of jobs: what each one does, reads and needs, and which are done.

A job is a pure function of (arguments, input folders) that fills an output folder. It names its function by
the id of a stage. A finished step is recorded under this id: the function may move, and finished runs stay
valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mechlens.core.errors import DataError
from mechlens.core.spec import fingerprint
from mechlens.runs import store

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

"""What processes that share a run do in tests of shards; it imports little, so that they start fast."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from mechlens.core.errors import DataError
from mechlens.core.files import write_text
from mechlens.runs import store
from mechlens.runs.claims import Claims, Shard
from mechlens.runs.executor import execute
from mechlens.runs.jobs import Job

MARK = "a" * 16


def claims_of(run: Path, *, jobs: str = MARK, shard: str = "1/1") -> Claims:
    return Claims(run, jobs, Shard.parse(shard))


def take(claims: Claims, step: Path, *, within: float = 0.0, mark: str = MARK) -> Path | None:
    """Ask for a step again and again, as the executor does."""
    until = time.monotonic() + within
    while (folder := claims.take(step, mark)) is None and time.monotonic() < until:
        time.sleep(0.01)
    return folder


def hold(run: Path) -> None:
    """Claim a step, save something of it, and go on when a line comes."""
    with claims_of(run).alive() as claims:
        folder = take(claims, run / "step", within=30)
        assert folder is not None
        with store.working(run / "step", MARK, part=folder) as out:
            handle = (out / "open.txt").open("w")
            handle.write("early")
            handle.flush()
            write_text(out / "saved.txt", "saved")
            sys.stdout.write(f"{folder.name}\n")
            sys.stdout.flush()
            sys.stdin.readline()
            handle.write(" late")
            handle.close()
            write_text(out / "saved.txt", "late")


def count(arguments: dict[str, Any], inputs: dict[str, Path], out: Path, *_: object) -> None:
    """Note the start and the end, and sum up what the inputs have."""
    log = Path(arguments["log"])
    with log.open("a") as handle:
        handle.write(f"{arguments['number']} {out} start {time.monotonic_ns()}\n")
    time.sleep(arguments["seconds"])
    total = arguments["number"] + sum(int((place / "sum.txt").read_text()) for place in inputs.values())
    (out / "sum.txt").write_text(str(total))
    with log.open("a") as handle:
        handle.write(f"{arguments['number']} {out} end {time.monotonic_ns()}\n")


def fail(*_: object) -> None:
    raise DataError("this job fails")


def jobs_of(run: Path, number: int, *, seconds: float = 0.0) -> list[Job]:
    """Jobs of which each reads the results of two before it."""
    jobs: list[Job] = []
    for place in range(number):
        inputs = {f"from-{back}": f"steps/{place - back}" for back in (3, 5) if place >= back}
        arguments = {"number": place, "log": str(run / "log.txt"), "seconds": seconds}
        jobs.append(Job(f"steps/{place}", f"{__name__}:count", arguments, inputs, 1))
    return jobs


def share(run: Path, jobs: list[Job], shard: str, *, workers: int = 0) -> list[str]:
    """Do this shard of the jobs; the names of the jobs that it heard to be finished."""
    finished: list[str] = []
    with claims_of(run, shard=shard).alive() as claims:
        execute(
            run,
            jobs,
            workers=workers,
            progress=lambda name, done, total: None,
            finished=lambda job: finished.append(job.name),
            claims=claims,
        )
    return finished


def starts(run: Path) -> list[str]:
    return [line.split()[0] for line in (run / "log.txt").read_text().splitlines() if " start " in line]


def sums(run: Path, jobs: list[Job]) -> list[int]:
    return [int((run / job.name / "sum.txt").read_text()) for job in jobs]


def expected_sums(number: int) -> list[int]:
    totals: list[int] = []
    for place in range(number):
        totals.append(place + sum(totals[place - back] for back in (3, 5) if place >= back))
    return totals


def interrupt(_arguments: dict[str, Any], _inputs: dict[str, Path], out: Path, *_: object) -> None:
    """Fail as a process does that wakes up when another has replaced its claim, and then succeed."""
    if out.name == "1":
        out.with_name("2").mkdir()
        (out.with_name("2.process")).write_text("ended")
        (out / "gone" / "result.txt").write_text("no folder")
    (out / "result.txt").write_text(out.name)

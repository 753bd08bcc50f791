"""Claims: several processes share the list of jobs of one run folder, so that each job has one process.

A process claims a step by making the folder `<step>.part/<n>`, where n is one more than the number of the
newest claim. Only one process can make a folder, so a claim needs no file lock. The process works in this
folder, and the step is published by a rename, which fails if the step has been published before. A process
that lost its claim therefore changes nothing: it works in its own folder until the end.

A process shows that it is alive by a heartbeat: it writes a new count to `shards/<process>` again and again.
A claim may be replaced if its process has removed this file, or if the file has not changed for a lease. The
observer measures the lease on its own monotonic clock, so the clocks of the machines need not agree.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from mechlens.core.errors import MachineError, MechlensError, SpecError
from mechlens.core.files import RECORD, part_of
from mechlens.runs import store
from mechlens.runs.progress import Event, Progress

FOLDER = "shards"
"""folder of a run with the heartbeats of the processes that share it"""
ONCE = "results"
"""folder there that shows that what is done once is done"""
LEASE = "MECHLENS_LEASE"
"""environment variable: seconds without a heartbeat after which a process counts as dead"""
LEASE_SECONDS = 60.0
BEATS = 6
"""heartbeats in a lease"""
LONGEST_PAUSE = 1.0
"""most seconds between two looks at a claim of another process"""

Item = TypeVar("Item")


class Shard(NamedTuple):
    """Which part of the list a process does first."""

    index: int
    """from 0"""
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard that `I/N` names.

        Raises:
            SpecError: if it is not of this form with 1 <= I <= N.
        """
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            raise SpecError(f"--shard is {text!r}; expected I/N with 1 <= I <= N, such as 2/3")
        return cls(int(index) - 1, int(count))

    def in_order(self, items: Sequence[Item]) -> list[Item]:
        """The items of this shard first (every N-th), then those of the next shard, and so on."""
        firsts = ((self.index + shift) % self.count for shift in range(self.count))
        return [item for first in firsts for item in items[first :: self.count]]


def lease_seconds() -> float:
    """Seconds without a heartbeat after which a process counts as dead.

    Raises:
        SpecError: if the environment variable is not a positive number.
    """
    text = os.environ.get(LEASE, str(LEASE_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise SpecError(f"{LEASE} is {text!r}; expected a number of seconds above 0")
    return seconds


class Claims:
    """The claims of this process on the steps of a run.

    Args:
        jobs: fingerprint of the list of jobs, on which the processes that share it must agree.
        shard: which jobs this process tries first.
    """

    def __init__(self, run: Path, jobs: str, shard: Shard) -> None:
        self.shard, self.lease = shard, lease_seconds()
        self._process = secrets.token_hex(8)
        self._folder, self._jobs = run / FOLDER, jobs
        self._seen: dict[Path, tuple[tuple[str, str | None], float]] = {}
        self._next_look: dict[Path, float] = {}

    def take(self, step: Path, fingerprint: str) -> Path | None:
        """The folder to do a step in, the step's own folder if it is finished, or None to ask again later."""
        now = time.monotonic()
        if now < self._next_look.get(step, 0.0):
            return None
        self._next_look[step] = now + min(LONGEST_PAUSE, self.lease / BEATS)
        claims = store.unfinished(step)
        if store.is_complete(step, fingerprint):
            shutil.rmtree(claims, ignore_errors=True)  # of processes that were too late
            return step
        newest = _newest(claims)
        if newest and not self._is_abandoned(claims / str(newest)):
            return None
        claim = claims / str(newest + 1)
        try:
            claims.mkdir(parents=True, exist_ok=True)
            claim.mkdir()
            _owner(claim).write_text(self._process)
        except (FileExistsError, FileNotFoundError):  # another process was faster, or has published the step
            return None
        if store.is_complete(step, fingerprint):  # published since the first look
            shutil.rmtree(claims, ignore_errors=True)
            return step
        if not self.is_newest(claim):  # this process has slept since it read the numbers
            shutil.rmtree(claim, ignore_errors=True)
            return None
        if newest:
            _replace_claim(claims / str(newest), claim, fingerprint)
        return claim

    def is_newest(self, claim: Path) -> bool:
        """Whether no other process has replaced the claim or published its step."""
        return claim.is_dir() and _newest(claim.parent) == int(claim.name)

    def _is_abandoned(self, claim: Path) -> bool:
        """Whether the process of a claim has ended, as far as this process has observed it."""
        process = _text(_owner(claim)) or ""
        beat = _text(self._folder / process) if process else ""
        now = time.monotonic()
        state, since = self._seen.get(claim, (None, now))
        if state != (process, beat):
            self._seen[claim] = (process, beat), now
            since = now
        if process and now - since >= self.lease:
            (self._folder / process).unlink(missing_ok=True)  # so that nobody waits for it again
        return beat is None or now - since >= self.lease

    def do_once(self, do: Callable[[], None], *, written: Sequence[Path]) -> None:
        """Let one of the processes that share the list do something after all jobs; the others wait for it.

        Args:
            do: it may be repeated after a kill, and by a process that was suspended and lost its claim.
            written: the files that it writes; it is done again if one was deleted.
        """
        step = self._folder / ONCE
        if step.exists() and not all(file.is_file() for file in written):
            shutil.rmtree(step, ignore_errors=True)
        while (claim := self.take(step, self._jobs)) != step:
            if claim is None:
                time.sleep(self.lease / BEATS / 2)
                continue
            try:
                with store.working(step, self._jobs, part=claim):
                    do()
            except (OSError, MechlensError):
                if self.is_newest(claim):
                    raise

    @contextlib.contextmanager
    def alive(self) -> Iterator[Claims]:
        """Send heartbeats while the block runs."""
        ended = threading.Event()

        def beat() -> None:
            count = 0
            while True:
                count += 1
                self._beat(count)
                if ended.wait(self.lease / BEATS):
                    return

        self._beat(0)
        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            ended.set()
            thread.join()
            (self._folder / self._process).unlink(missing_ok=True)

    def _beat(self, count: int) -> None:
        with contextlib.suppress(OSError):  # the next one may find the file system again
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / self._process).write_text(f"{self._jobs} {count}")


@contextlib.contextmanager
def sharing(run: Path, jobs: str, shard: Shard | None, report: Progress) -> Iterator[Claims | None]:
    """The claims of this process while it shares the steps of a run; None if it does all steps alone.

    Args:
        jobs: fingerprint of the list of jobs.
        report: called with a remark if this process has to wait.

    Raises:
        MachineError: as `refuse_others`.
    """
    if shard is None:
        refuse_others(run, "", report)
        shutil.rmtree(run / FOLDER, ignore_errors=True)
        yield None
    else:
        with Claims(run, jobs, shard).alive() as claims:
            refuse_others(run, jobs, report)
            yield claims


def refuse_others(run: Path, jobs: str, report: Progress) -> None:
    """Refuse to write a run while other processes share a list of jobs that is not `jobs`.

    The heartbeats of processes that were killed are watched for a lease, and are then removed.

    Raises:
        MachineError: if such a process is alive.
    """
    first, began, lease = _other_beats(run, jobs), time.monotonic(), lease_seconds()
    if first:
        report(Event("note", f"waiting up to {lease:g} s to see whether another process still writes {run}"))
    while (beats := _other_beats(run, jobs)) and time.monotonic() - began < lease:
        if any(first.get(process) != beat for process, beat in beats.items()):
            way = "with another config or other files" if jobs else "with --shard"
            raise MachineError(
                f"another process is writing {run} {way}; wait for it, stop it, or choose another --out"
            )
        time.sleep(lease / BEATS / 2)
    for process in beats:
        (run / FOLDER / process).unlink(missing_ok=True)


def _other_beats(run: Path, jobs: str) -> dict[str, str]:
    """Process → its heartbeat, of the processes that share another list of jobs."""
    beats = {file.name: _text(file) for file in (run / FOLDER).glob("*") if file.is_file()}
    return {process: beat for process, beat in beats.items() if beat and beat.split()[0] != jobs}


def _newest(claims: Path) -> int:
    """The number of the newest claim, or 0."""
    names: list[str] = []
    with contextlib.suppress(FileNotFoundError):  # no process has claimed the step, or it has been published
        names = [claim.name for claim in claims.iterdir()]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _owner(claim: Path) -> Path:
    """The file that names the process of a claim."""
    return claim.with_name(f"{claim.name}.process")


def _text(file: Path) -> str | None:
    """The text of a file, or None if there is none."""
    try:
        return file.read_text()
    except FileNotFoundError:
        return None


def _replace_claim(earlier: Path, claim: Path, fingerprint: str) -> None:
    """Copy what an earlier claim has done of the step, and remove its folder.

    Its files are copied, not moved: its process may only be suspended, and write to an open file later. A
    step that is resumed reads only files that were written by a rename, so what is copied of them is whole.
    """

    def copy(source: str, target: str) -> None:
        part = part_of(Path(target))
        shutil.copyfile(source, part)
        part.replace(target)

    if _text(earlier / store.CLAIM) == fingerprint:
        unfinished = shutil.ignore_patterns("*.part", RECORD)
        with contextlib.suppress(OSError):  # what cannot be copied is made again
            shutil.copytree(earlier, claim, ignore=unfinished, copy_function=copy, dirs_exist_ok=True)
    shutil.rmtree(earlier, ignore_errors=True)
    _owner(earlier).unlink(missing_ok=True)

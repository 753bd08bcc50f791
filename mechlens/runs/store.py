"""Run folders: a step works in `<step>.part`, which is renamed at the end; so every step is complete.

A finished step has a `step.json` with its fingerprint (of its spec fields, its inputs' fingerprints and its
code version). The same step is therefore read from disk, and a changed one runs again. The older result is
moved to `superseded/`, never deleted. One process at a time writes to a run, or several that share it by
`claims`. This module does not depend on what a step computes.
"""

from __future__ import annotations

import errno
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mechlens.core import machine
from mechlens.core.errors import DataError, MachineError
from mechlens.core.files import LEFTOVERS, LOCK, RECORD, flush, part_of, publish, read_json, write_json

PACKAGES = (
    "mechlens",
    "torch",
    "transformers",
    "trl",
    "peft",
    "tokenizers",
    "numpy",
    "pandas",
    "pyarrow",
    "scipy",
    "openai",
)
CLAIM = "claim"
"""file in the folder of an unfinished step: the step's fingerprint"""


def recorded_fingerprint(step: Path) -> str | None:
    """The fingerprint of the finished step in that folder, or None."""
    record = step / RECORD
    try:
        return str(read_json(record).get("fingerprint")) if record.is_file() else None
    except DataError:
        if record.is_file():
            raise
        return None  # another process that shares the run has moved the step since the first look


def is_complete(step: Path, fingerprint: str) -> bool:
    """Whether the folder has a finished step with this fingerprint."""
    return recorded_fingerprint(step) == fingerprint


@contextmanager
def working(
    step: Path, fingerprint: str, *, inputs: dict[str, str] | None = None, part: Path | None = None
) -> Iterator[Path]:
    """A folder to work in, which becomes `step` when the block ends without an error.

    After a kill the same step (by fingerprint) finds its unfinished folder again, with the files that it had
    saved. A step with another fingerprint finds an empty folder.

    Args:
        part: the folder of a claim to work in, where several processes share the run.
    """
    part = part or _trusted(unfinished(step), fingerprint)
    if not is_complete(part, fingerprint):
        (part / CLAIM).write_text(fingerprint)
        started = time.perf_counter()
        with full_disk_named(part):
            yield part
            (part / CLAIM).unlink()
            for leftover in list(part.rglob(LEFTOVERS)):
                leftover.unlink()
            seconds = round(time.perf_counter() - started, 3)
            flush(part)  # before the record, which states that the rest is complete
            write_json(
                part / RECORD, {"fingerprint": fingerprint, "inputs": inputs or {}, "seconds": seconds}
            )
    else:  # killed between the record and the rename
        yield part
    if not is_complete(step, fingerprint):  # by another process
        set_aside(step)
    _publish_once(part, step, fingerprint)


def unfinished(step: Path) -> Path:
    """The folder that a step works in, or that has the folders of its claims."""
    return step.with_name(f"{step.name}.part")


def _trusted(part: Path, fingerprint: str) -> Path:
    """The unfinished folder, emptied unless it belongs to a step with this fingerprint."""
    claim = part / CLAIM
    if (
        part.exists()
        and not (claim.is_file() and claim.read_text() == fingerprint)
        and not is_complete(part, fingerprint)
    ):
        shutil.rmtree(part)
    part.mkdir(parents=True, exist_ok=True)
    return part


def _publish_once(part: Path, step: Path, fingerprint: str) -> None:
    """Rename a finished folder to `step`, unless another process has published the same step first."""
    try:
        publish(part, step)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not is_complete(step, fingerprint):
            raise
    shutil.rmtree(unfinished(step), ignore_errors=True)  # the folders of claims


def make_once(step: Path, fingerprint: str, fill: Callable[[Path], None]) -> Path:
    """The folder `step`, filled by `fill(folder)` unless it is complete with this fingerprint."""
    if not is_complete(step, fingerprint):
        with working(step, fingerprint) as part:
            if not is_complete(part, fingerprint):
                fill(part)
    return step


def set_aside(step: Path) -> None:
    """Move an older result of the step to `superseded/` in the same folder, named by its fingerprint."""
    if step.exists():
        moved = part_of(step.parent / "superseded" / step.name)
        moved.parent.mkdir(exist_ok=True)
        step.rename(moved)
        # what was moved may be newer than what was there before
        old = moved.with_name(f"{step.name}-{recorded_fingerprint(moved)}")
        if old.exists():
            shutil.rmtree(old)
        moved.rename(old)


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Turn a "no space left" error into a message with the path and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise MachineError(
            f"no space left at {path}; free some or choose another --out. Finished steps stay; "
            "run again to resume"
        ) from error


@contextmanager
def lock(run: Path, *, shared: bool = False) -> Iterator[None]:
    """Lock the run for this process; the kernel releases the lock when the process ends, also by a kill.

    Args:
        shared: lock it together with others that share it, by `claims`. These also work on a file system
            without locks.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise MachineError(
            f"cannot make the run folder {run}: {error.strerror}; choose another --out"
        ) from error
    with (run / LOCK).open("a+") as handle:
        try:
            machine.lock(handle, shared=shared, wait=False)
        except BlockingIOError as error:
            raise MachineError(
                f"another process is writing {run}; wait for it, stop it, or choose another --out"
            ) from error
        except OSError as error:
            if not shared or error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        for leftover in [] if shared else list(run.glob(LEFTOVERS)):
            leftover.unlink()
        yield


def environment() -> dict[str, Any]:
    """Versions, machine, git revision and whether the code has uncommitted changes, for the manifest."""
    revision, dirty = _git()
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": machine.cores(),
        "git": revision,
        "dirty": dirty,
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """The version of each package that results depend on, or None if it is not installed."""
    installed: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = None
    return installed


def _git() -> tuple[str | None, bool | None]:
    """The commit of the clone that the code runs from, and whether it has uncommitted changes.

    Both are None for an installed package or without git.
    """
    clone = Path(__file__).resolve().parents[2]
    if not shutil.which("git"):
        return None, None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(clone), *arguments], capture_output=True, text=True, check=False
        ).stdout.strip()

    # the folder of an installed package may belong to another repository
    if git("rev-parse", "--show-toplevel") != str(clone):
        return None, None
    return git("rev-parse", "HEAD") or None, bool(git("status", "--porcelain"))

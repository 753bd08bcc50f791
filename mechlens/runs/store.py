"""Run folders: a step works in `<step>.part`, which is renamed at the end; so every step is complete.

A finished step has a `step.json` with its fingerprint (of its spec fields, its inputs' fingerprints and its
code version). The same step is therefore read from disk, and a changed one runs again. The older result is
moved to `superseded/`, never deleted. One process at a time writes to a run. This module does not depend on
what a step computes.
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
from mechlens.core.errors import MachineError
from mechlens.core.files import LOCK, RECORD, flush, publish, read_json, write_json

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


def recorded_fingerprint(step: Path) -> str | None:
    """The fingerprint of the finished step in that folder, or None."""
    record = step / RECORD
    return str(read_json(record).get("fingerprint")) if record.is_file() else None


def is_complete(step: Path, fingerprint: str) -> bool:
    """Whether the folder has a finished step with this fingerprint."""
    return recorded_fingerprint(step) == fingerprint


@contextmanager
def working(step: Path, fingerprint: str, *, inputs: dict[str, str] | None = None) -> Iterator[Path]:
    """A folder to work in, which becomes `step` when the block ends without an error.

    After a kill the same step (by fingerprint) finds its unfinished folder again, with the files that it had
    saved. A step with another fingerprint finds an empty folder.
    """
    part, claim = step.with_name(f"{step.name}.part"), step.with_name(f"{step.name}.part") / "claim"
    if (
        part.exists()
        and not (claim.is_file() and claim.read_text() == fingerprint)
        and not is_complete(part, fingerprint)
    ):
        shutil.rmtree(part)
    part.mkdir(parents=True, exist_ok=True)
    if not is_complete(part, fingerprint):
        claim.write_text(fingerprint)
        started = time.perf_counter()
        with full_disk_named(part):
            yield part
            claim.unlink()
            seconds = round(time.perf_counter() - started, 3)
            flush(part)  # before the record, which states that the rest is complete
            write_json(
                part / RECORD, {"fingerprint": fingerprint, "inputs": inputs or {}, "seconds": seconds}
            )
    else:  # killed between the record and the rename
        yield part
    set_aside(step)
    publish(part, step)


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
        old = step.parent / "superseded" / f"{step.name}-{recorded_fingerprint(step)}"
        old.parent.mkdir(exist_ok=True)
        if old.exists():
            shutil.rmtree(old)
        step.rename(old)


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
def lock(run: Path) -> Iterator[None]:
    """Lock the run for this process; the kernel releases the lock when the process ends, also by a kill."""
    try:
        run.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise MachineError(
            f"cannot make the run folder {run}: {error.strerror}; choose another --out"
        ) from error
    with (run / LOCK).open("a+") as handle:
        try:
            machine.lock(handle, wait=False)
        except BlockingIOError as error:
            raise MachineError(
                f"another process is writing {run}; wait for it, stop it, or choose another --out"
            ) from error
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

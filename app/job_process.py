"""The process of one job: it waits for its turn, runs the command, watches for `stop`, and writes down how it
ended.

Run as `python app/job_process.py FOLDER` by `jobs.start`, which hands over the job's lock: an open file that
this process holds until it ends, and that its command does not inherit.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import jobs
from jobs import LOG, PROGRESS, STOP, TURN, Job
from mechlens.core import machine
from mechlens.core.json_files import read_json, write_json
from mechlens.runs.progress import FILE

POLL, GRACE = 0.2, 3.0
"""seconds between two looks for `stop`, and between Ctrl-C and the kill"""
PR_SET_PDEATHSIG = 1
WITH_PARENT = """
import sys
from mechlens import cli, machine
machine.end_with_parent(int(sys.argv[1]))
sys.exit(cli.main(sys.argv[2:]))
"""
"""the command where the kernel ends no process with its parent"""
INTERRUPTED = 130
VERDICTS = (0, 1, 2)
"""exit codes by which an audit says what it found; a wrong spec is 2 too, and a bug 1"""


def main(folder: Path) -> None:
    """Do the job of that folder."""
    for asked in (signal.SIGTERM, signal.SIGINT):
        signal.signal(asked, lambda number, frame: (folder / STOP).touch())
    record(folder, pid=os.getpid())
    with (folder.parent / TURN).open("a") as turn:
        if not wait_for(turn, folder):
            record(folder, state="cancelled", ended=jobs.now(), reason="cancelled before its turn came")
            return
        record(folder, state="running", started=jobs.now())
        began = time.time()
        exit_code = run(folder, jobs.read(folder))
        state, reason = outcome(jobs.read(folder), exit_code, began)
        record(folder, state=state, ended=jobs.now(), exit=exit_code, reason=reason)


def record(folder: Path, **change: Any) -> None:
    """Change `job.json` so that a reader sees the old one or the new one; no other process writes it."""
    write_json(folder / "job.json", read_json(folder / "job.json") | change)


def wait_for(turn: IO[str], folder: Path) -> bool:
    """Take the lock that the running job holds, first come first served; False if asked to stop before.

    A lock alone would let in whoever asks at the right moment, so only the longest waiting job asks.
    """
    while not (folder / STOP).exists():
        if all(job.id >= folder.name for job in jobs.listed(folder.parents[1]) if job.state == "queued"):
            with suppress(BlockingIOError):
                machine.lock(turn, wait=False)
                return True
        time.sleep(POLL)
    return False


def run(folder: Path, job: Job) -> int:
    """The exit code of the command; on `stop` it hears Ctrl-C, which it answers by keeping what is finished,
    and is killed if it does not end.
    """
    environment = os.environ | {FILE: str(folder / PROGRESS), "COLUMNS": "150", "PYTHONUNBUFFERED": "1"}
    linux, own = sys.platform == "linux", str(os.getpid())
    start = ["-m", "mechlens"] if linux else ["-c", WITH_PARENT, own]
    with (folder / LOG).open("ab") as log:
        command = subprocess.Popen(
            [
                sys.executable,
                "-P",
                *start,
                *job.command,
            ],  # -P: a module in the folder that it runs in is not taken for one of ours
            cwd=job.cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            process_group=0,
            preexec_fn=partial(_die_with, os.getpid(), ctypes.CDLL(None, use_errno=True).prctl)
            if linux
            else None,
        )
    while command.poll() is None and not (folder / STOP).exists():
        time.sleep(POLL)
    if command.poll() is None:
        os.killpg(command.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            command.wait(GRACE)
    with suppress(ProcessLookupError):  # what is left of the group, if anything
        os.killpg(command.pid, signal.SIGKILL)
    return command.wait()


def _die_with(parent: int, prctl: Callable[[int, int], int]) -> None:
    """Runs in the new process before the command: the kernel is to kill it when its parent dies.

    The parent cannot do that itself when it is killed outright, and a command that nobody watches would hold
    its run and the accelerator with no way to cancel it. Its own workers end with it.
    """
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel was told
        os._exit(1)


def outcome(job: Job, exit_code: int, began: float) -> tuple[jobs.State, str | None]:
    """State and reason of a command that ended with that code."""
    if exit_code == 0 if job.command[0] != "audit" else exit_code in VERDICTS and _has_verdict(job, began):
        return "done", None
    if exit_code == INTERRUPTED or (job.folder / STOP).exists():
        return "cancelled", "cancelled; what was finished is kept, resume it to go on"
    if exit_code < 0:
        return (
            "failed",
            f"it was killed by signal {-exit_code}, most likely for want of memory; close other programs and "
            "resume it",
        )
    said = [line.strip() for line in jobs.tail(job, 50).splitlines() if line.strip()]
    return "failed", said[-1] if said else f"it ended with exit code {exit_code} and said nothing"


def _has_verdict(job: Job, began: float) -> bool:
    """Whether this very audit wrote one."""
    path = Path(job.cwd) / (jobs.option(job.command, "--out") or "") / "audit.json"
    return path.is_file() and path.stat().st_mtime >= began - 1  # some file systems keep whole seconds


if __name__ == "__main__":
    main(Path(sys.argv[1]))

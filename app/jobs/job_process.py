"""The process of one job: it waits for its turn, runs the command, and records how the command ended.

While the command runs, it watches for the file `stop`.

`job_queue.start` starts it and hands over the job's lock: an open file that this process holds until it ends
and that its command does not inherit.
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

from jobs import job_queue
from jobs.job_queue import LOG, PROGRESS, STOP, TURN, AppJob
from mechlens.core import machine
from mechlens.core.files import read_json, write_json
from mechlens.runs.progress import FILE

POLL, GRACE = 0.2, 3.0
"""seconds between two checks for `stop`, and between Ctrl-C and the kill"""
PR_SET_PDEATHSIG = 1
WITH_PARENT = """
import sys
from mechlens import cli
from mechlens.core import machine
machine.end_with_parent(int(sys.argv[1]))
sys.exit(cli.main(sys.argv[2:]))
"""
"""the command where the kernel ends no process with its parent"""
INTERRUPTED = 130
VERDICTS = (0, 10, 11, 12)
"""exit codes of an audit that reached a verdict"""


def main(folder: Path) -> None:
    """Run the job of that folder."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: (folder / STOP).touch())
    record(folder, pid=os.getpid())
    with (folder.parent / TURN).open("a") as turn:
        if not wait_for_turn(turn, folder):
            reason = "cancelled before its turn came"
            record(folder, state="cancelled", ended=job_queue.utc_now(), reason=reason)
            return
        record(folder, state="running", started=job_queue.utc_now())
        exit_code = run_command(folder, job_queue.read_job(folder))
        state, reason = outcome_of(job_queue.read_job(folder), exit_code)
        record(folder, state=state, ended=job_queue.utc_now(), exit=exit_code, reason=reason)


def record(folder: Path, **change: Any) -> None:
    """Change `job.json` atomically; no other process writes it."""
    write_json(folder / "job.json", read_json(folder / "job.json") | change)


def wait_for_turn(turn: IO[str], folder: Path) -> bool:
    """Take the lock that the running job holds, in the order of arrival; False if `stop` comes first.

    A lock would admit any waiting process, so only the job that has waited longest tries to take it.
    """
    while not (folder / STOP).exists():
        queued = (job for job in job_queue.list_jobs(folder.parents[1]) if job.state == "queued")
        if all(job.id >= folder.name for job in queued):
            with suppress(BlockingIOError):
                machine.lock(turn, wait=False)
                return True
        time.sleep(POLL)
    return False


def run_command(folder: Path, job: AppJob) -> int:
    """Run the job's command and return its exit code.

    On `stop` the command gets Ctrl-C, on which it keeps what is finished; if it does not end, it is killed.
    """
    environment = os.environ | {FILE: str(folder / PROGRESS), "COLUMNS": "150", "PYTHONUNBUFFERED": "1"}
    on_linux = sys.platform == "linux"
    start = ["-m", "mechlens"] if on_linux else ["-c", WITH_PARENT, str(os.getpid())]
    end_with_parent = None
    if on_linux:
        end_with_parent = partial(_end_with_parent, os.getpid(), ctypes.CDLL(None, use_errno=True).prctl)
    with (folder / LOG).open("ab") as log:
        command = subprocess.Popen(
            # -P: Python must not import modules from the folder in which the command runs
            [sys.executable, "-P", *start, *job.command],
            cwd=job.cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            process_group=0,
            preexec_fn=end_with_parent,
        )
    while command.poll() is None and not (folder / STOP).exists():
        time.sleep(POLL)
    if command.poll() is None:
        os.killpg(command.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            command.wait(GRACE)
    with suppress(ProcessLookupError):  # the command and whatever is left of its group
        os.killpg(command.pid, signal.SIGKILL)
    return command.wait()


def _end_with_parent(parent: int, prctl: Callable[[int, int], int]) -> None:
    """Make the kernel kill this process when its parent dies; the new process calls it first.

    The parent cannot do so itself when it is killed outright, and an unwatched command would hold
    its run and the accelerator with no way to cancel it. The command's workers end with the command.
    """
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel was told
        os._exit(1)


def outcome_of(job: AppJob, exit_code: int) -> tuple[job_queue.State, str | None]:
    """State and reason of a command that ended with that exit code."""
    if exit_code in (VERDICTS if job.command[0] == "audit" else (0,)):
        return "done", None
    if exit_code == INTERRUPTED or (job.folder / STOP).exists():
        return "cancelled", "cancelled; finished steps are kept; resume it to continue"
    if exit_code < 0:
        return "failed", (
            f"killed by signal {-exit_code}, probably because memory ran out; close other programs and "
            "resume it"
        )
    lines = [line.strip() for line in job_queue.read_log_tail(job, 50).splitlines() if line.strip()]
    return "failed", lines[-1] if lines else f"it ended with exit code {exit_code} and printed nothing"

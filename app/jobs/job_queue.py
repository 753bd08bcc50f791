"""Start, list, cancel, resume and watch jobs, which are independent processes.

Each job has a folder `<root>/.jobs/<id>/`.

A job's folder holds `job.json` (what it is and its state), `progress.jsonl`, `log.txt`, `alive` (a lock that
its process holds) and, once it is to end, `stop`. Nothing about a job is kept in memory: it survives the
browser, the server and the process that started it.
"""

from __future__ import annotations

import secrets
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jobs.job_progress import Progress
from jobs.job_progress import read_progress as read_progress_file
from jobs.uploads import JOBS
from mechlens.core import machine
from mechlens.core.errors import DataError, MachineError, SpecError
from mechlens.core.files import read_json, write_json

COMMANDS = ("run", "measure", "audit", "report")
"""what may be started"""
APP = Path(__file__).parents[1]
PROCESS = (
    "import pathlib, sys; sys.path.insert(0, sys.argv[1]); "
    "from jobs import job_process; job_process.main(pathlib.Path(sys.argv[2]))"
)
"""program of a job's process; as a script, `job_process.py` would not find the explorer's other modules"""
LOG, PROGRESS, STOP, ALIVE, TURN = "log.txt", "progress.jsonl", "stop", "alive", "lock"
LOST = "its process was killed or the machine restarted; resume it"
TAIL = 1 << 16
"""bytes at the end of the log that are read for its last lines"""

State = Literal["queued", "running", "done", "failed", "cancelled"]


class AppJob(NamedTuple):
    """One job, as its folder describes it."""

    folder: Path
    id: str
    title: str
    command: tuple[str, ...]
    """arguments of `mechlens`"""
    cwd: str
    """where it runs: relative paths in the command start here"""
    created: str
    started: str | None
    ended: str | None
    state: State
    pid: int | None
    """of the process that waits for the job's turn and watches the command"""
    exit: int | None
    reason: str | None
    """why it failed or was cancelled, in one line"""
    place: int | None = None
    """in the queue, 1 is next; None unless queued"""

    @property
    def is_open(self) -> bool:
        """Whether it waits or runs."""
        return self.state in ("queued", "running")


def utc_now() -> str:
    """The time, as jobs write it."""
    return datetime.now(UTC).isoformat()


def start(root: Path, title: str, arguments: Sequence[str], *, cwd: Path | None = None) -> AppJob:
    """Start `mechlens *arguments` in a process that outlives this one; it waits for the jobs before it.

    Raises:
        SpecError: if the command must not be started here.
        MachineError: if its folder cannot be made.
    """
    _check_arguments(arguments)
    folder = _make_folder(root)
    with (folder / ALIVE).open("w") as alive:
        machine.lock(alive)  # the process inherits it: at no moment does the job exist without its lock
        job: dict[str, Any] = {
            "id": folder.name,
            "title": title,
            "command": list(arguments),
            "cwd": str((cwd or Path.cwd()).resolve()),
            "created": utc_now(),
            "state": "queued",
        }
        write_json(folder / "job.json", job | dict.fromkeys(("started", "ended", "pid", "exit", "reason")))
        with (folder / LOG).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", PROCESS, str(APP), str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[alive.fileno()],
                start_new_session=True,  # neither Ctrl-C nor the end of the server's terminal reaches it
            )
    # without a waiting thread, the ended process would stay a zombie for as long as this process lives
    threading.Thread(target=process.wait, daemon=True).start()
    return _with_place(read_job(folder))._replace(pid=process.pid)


def _make_folder(root: Path) -> Path:
    folder = root.resolve() / JOBS / f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{secrets.token_hex(3)}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise MachineError(
            f"cannot make the job's folder {folder}: {error.strerror}; change its permissions or free space"
        ) from error
    return folder


def _check_arguments(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] not in COMMANDS:
        raise SpecError(
            f"a job cannot start {' '.join(arguments[:1])!r}; expected one of {', '.join(COMMANDS)}"
        )
    if any("\0" in argument for argument in arguments):
        raise SpecError(
            f"an argument of {arguments[0]} holds a null character, which no command line can hold; remove it"
        )
    if arguments[0] == "audit" and option_value(arguments, "--out") is None:
        raise SpecError("an audit job needs `--out FOLDER`: the explorer reads its verdict there")


def option_value(arguments: Sequence[str], name: str) -> str | None:
    """The value of an option on a command line, or None."""
    following = [value for option, value in pairwise(arguments) if option == name]
    joined = [word.removeprefix(f"{name}=") for word in arguments if word.startswith(f"{name}=")]
    return next(iter([*following, *joined]), None)


def read_job(folder: Path) -> AppJob:
    """The job of that folder, without its place in the queue; if its process vanished, the job has failed."""
    try:
        fields: dict[str, Any] = read_json(folder / "job.json")
    except DataError as error:
        fields = {"state": "failed", "reason": str(error)}
    values: dict[str, Any] = {name: fields.get(name) for name in AppJob._fields[1:-1]}
    values |= {name: str(fields.get(name) or "") for name in ("title", "cwd", "created")}
    command = tuple(map(str, fields.get("command") or ()))
    job = AppJob(folder, **values | {"id": folder.name, "command": command})
    if not job.is_open or is_alive(folder):
        return job
    state_now = read_json(folder / "job.json")["state"]  # it may have ended between the two reads
    return job._replace(state="failed", reason=LOST) if state_now == fields["state"] else read_job(folder)


def is_alive(folder: Path) -> bool:
    """Whether the job's process holds its lock.

    The kernel releases the lock however the process ends, and no other process can take it over as it can
    take over a pid.
    """
    try:
        with (folder / ALIVE).open() as alive:
            machine.lock(alive, shared=True, wait=False)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def list_jobs(root: Path) -> list[AppJob]:
    """Every job of that folder of runs, newest first."""
    folders = sorted((path.parent for path in (root.resolve() / JOBS).glob("*/job.json")), reverse=True)
    jobs = [read_job(folder) for folder in folders]
    queue = [job.id for job in reversed(jobs) if job.state == "queued"]
    return [job._replace(place=queue.index(job.id) + 1) if job.state == "queued" else job for job in jobs]


def _with_place(job: AppJob) -> AppJob:
    return next(other for other in list_jobs(job.folder.parents[1]) if other.id == job.id)


def cancel(job: AppJob) -> None:
    """Ask a job to end: within a second it gets Ctrl-C, three seconds later it is killed.

    Its finished steps are kept.
    """
    (job.folder / STOP).touch()


def resume(job: AppJob) -> AppJob:
    """The same command as a new job: it skips the steps that the old one finished.

    Raises:
        SpecError: if the old one has not ended.
    """
    if (current := read_job(job.folder)).is_open:
        raise SpecError(f"job {job.title!r} is still {current.state}; cancel it first, or wait")
    return start(job.folder.parents[1], job.title, job.command, cwd=Path(job.cwd))


def read_progress(job: AppJob) -> Progress | None:
    """How far the job is, or None before it has reported anything."""
    until = utc_now() if job.is_open else job.ended
    return read_progress_file(job.folder / PROGRESS, until=until, running=job.state == "running")


def read_log_tail(job: AppJob, lines: int) -> str:
    """The last lines that the job printed; control characters are shown as �."""
    path = job.folder / LOG
    if not path.is_file():
        return ""
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - TAIL))
        text = log.read().decode("utf-8", errors="replace")
    last = deque(text.splitlines(), maxlen=lines)
    return "\n".join("".join(sign if sign.isprintable() else "�" for sign in line) for line in last)

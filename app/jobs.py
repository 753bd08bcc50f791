"""Jobs as processes of their own: started, listed, cancelled, resumed and watched through their folders
`<root>/.jobs/<id>/`.

A job's folder holds `job.json` (what it is and its state), `progress.jsonl`, `log.txt`, `alive` (a lock that
its process holds) and, once it is asked to end, `stop`. Nothing about a job is kept in memory: it survives
the browser, the server and whoever started it.
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

from mechlens.core import machine
from mechlens.core.errors import DataError, MachineError, SpecError
from mechlens.core.json_files import read_json, write_json
from pace import Progress, measured
from uploads import JOBS
from uploads import uploaded as uploaded

COMMANDS = ("run", "measure", "audit", "report")
"""what may be started"""
PROCESS = Path(__file__).with_name("job_process.py")
LOG, PROGRESS, STOP, ALIVE, TURN = "log.txt", "progress.jsonl", "stop", "alive", "lock"
LOST = "its process ended without a word: killed, or the machine restarted; resume it"
TAIL = 1 << 16
"""bytes of the log that its end is looked for in"""

State = Literal["queued", "running", "done", "failed", "cancelled"]


class Job(NamedTuple):
    """One job as its folder tells it."""

    folder: Path
    id: str
    title: str
    command: tuple[str, ...]
    """arguments of `mechlens`"""
    cwd: str
    """where it runs: relative paths in the command mean what they meant when it was started"""
    created: str
    started: str | None
    ended: str | None
    state: State
    pid: int | None
    """of the process that waits for its turn and watches the command"""
    exit: int | None
    reason: str | None
    """why it failed or was cancelled, in one line"""
    place: int | None = None
    """in the queue, 1 is next; None unless queued"""

    @property
    def is_open(self) -> bool:
        """Whether it waits or runs."""
        return self.state in ("queued", "running")


def now() -> str:
    """The time as jobs write it."""
    return datetime.now(UTC).isoformat()


def start(root: Path, title: str, arguments: Sequence[str], *, cwd: Path | None = None) -> Job:
    """Start `mechlens *arguments` in a process that outlives this one; it waits until the jobs before it have
    ended.

    Raises:
        SpecError: if the command is none that may be started here.
        MachineError: if its folder cannot be made.
    """
    _refuse(arguments)
    folder = root.resolve() / JOBS / f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{secrets.token_hex(3)}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise MachineError(
            f"cannot make the job's folder {folder}: {error.strerror}; mend its permissions or free some "
            "space"
        ) from error
    with (folder / ALIVE).open("w") as alive:
        machine.lock(
            alive
        )  # handed over below: there is no moment at which the job exists and nobody holds its lock
        empty = dict.fromkeys(("started", "ended", "pid", "exit", "reason"))
        about = {
            "id": folder.name,
            "title": title,
            "command": list(arguments),
            "cwd": str((cwd or Path.cwd()).resolve()),
        }
        write_json(folder / "job.json", about | {"created": now(), "state": "queued"} | empty)
        with (folder / LOG).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(PROCESS), str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[alive.fileno()],
                start_new_session=True,  # neither Ctrl-C nor the end of the server's terminal reaches it
            )
    threading.Thread(
        target=process.wait, daemon=True
    ).start()  # or it would stay a zombie for as long as this process lives
    return _placed(read(folder))._replace(pid=process.pid)


def _refuse(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] not in COMMANDS:
        raise SpecError(
            f"a job cannot start {' '.join(arguments[:1])!r}; expected one of {', '.join(COMMANDS)}"
        )
    if any("\0" in argument for argument in arguments):
        raise SpecError(f"an argument of {arguments[0]} holds a null character; no command line can")
    if arguments[0] == "audit" and option(arguments, "--out") is None:
        raise SpecError("an audit job needs `--out FOLDER`: its verdict is looked for there")


def option(arguments: Sequence[str], name: str) -> str | None:
    """The value of an option on a command line, or None."""
    following = [value for held, value in pairwise(arguments) if held == name]
    joined = [held.removeprefix(f"{name}=") for held in arguments if held.startswith(f"{name}=")]
    return next(iter([*following, *joined]), None)


def read(folder: Path) -> Job:
    """The job of that folder, its place in the queue aside; one whose process has gone without a word has
    failed.
    """
    try:
        held: dict[str, Any] = read_json(folder / "job.json")
    except DataError as error:
        held = {"state": "failed", "reason": str(error)}
    fields: dict[str, Any] = {name: held.get(name) for name in Job._fields[1:-1]}
    fields |= {name: str(held.get(name) or "") for name in ("title", "cwd", "created")}
    job = Job(folder, **fields | {"id": folder.name, "command": tuple(map(str, held.get("command") or ()))})
    if not job.is_open or is_alive(folder):
        return job
    again = read_json(folder / "job.json")  # it may have ended between the two looks
    return job._replace(state="failed", reason=LOST) if again["state"] == held["state"] else read(folder)


def is_alive(folder: Path) -> bool:
    """Whether the job's process holds its lock: the kernel lets go of it however the process ends, and no
    other process can take its pid's place.
    """
    try:
        with (folder / ALIVE).open() as alive:
            machine.lock(alive, shared=True, wait=False)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def listed(root: Path) -> list[Job]:
    """Every job of that folder of runs, newest first."""
    folders = sorted((path.parent for path in (root.resolve() / JOBS).glob("*/job.json")), reverse=True)
    jobs = [read(folder) for folder in folders]
    queue = [job.id for job in reversed(jobs) if job.state == "queued"]
    return [job._replace(place=queue.index(job.id) + 1) if job.state == "queued" else job for job in jobs]


def _placed(job: Job) -> Job:
    return next(held for held in listed(job.folder.parents[1]) if held.id == job.id)


def cancel(job: Job) -> None:
    """Ask a job to end: within a second it hears Ctrl-C, three seconds later it is killed. What it finished
    is kept.
    """
    (job.folder / STOP).touch()


def resume(job: Job) -> Job:
    """The same command again, as a new job: it goes on where the old one stopped.

    Raises:
        SpecError: if the old one has not ended.
    """
    if (held := read(job.folder)).is_open:
        raise SpecError(f"job {job.title!r} is still {held.state}; cancel it first, or wait")
    return start(job.folder.parents[1], job.title, job.command, cwd=Path(job.cwd))


def progress(job: Job) -> Progress | None:
    """How far the job is, or None before it has said anything."""
    return measured(
        job.folder / PROGRESS, until=now() if job.is_open else job.ended, running=job.state == "running"
    )


def tail(job: Job, lines: int) -> str:
    """The last lines of what the job printed; a sign that a terminal would obey is shown as �."""
    path = job.folder / LOG
    if not path.is_file():
        return ""
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - TAIL))
        text = log.read().decode("utf-8", errors="replace")
    kept = deque(text.splitlines(), maxlen=lines)
    return "\n".join("".join(sign if sign.isprintable() else "�" for sign in line) for line in kept)

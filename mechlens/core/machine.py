"""What this machine lends to a run: processor cores, accelerators, locks on files, and an end with the
process that started it.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from mechlens.core.errors import MachineError

try:
    import fcntl
except ImportError:  # Windows; `lock` says so when a lock is wanted
    fcntl = None

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
VISIBLE = "CUDA_VISIBLE_DEVICES"
POLL = 0.5
"""seconds between two looks at the parent process"""


def use_one_thread() -> None:
    """Let torch compute on one thread, so that sums come out the same on any number of cores."""
    import torch  # a second, which only those who compute should wait

    torch.set_num_threads(1)


def cores() -> int:
    """Cores that this process may keep busy: the least of those that it may run on, a container's quota, and
    what Slurm gave its task.
    """
    limits = [os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        limits.append(len(os.sched_getaffinity(0)))
    limits += [math.ceil(quota) for quota in _quotas()]
    if (given := os.environ.get("SLURM_CPUS_PER_TASK", "")).isdecimal():
        limits.append(int(given))
    return max(1, min(limits))


def _quotas() -> Iterator[float]:
    """Cores' worth of time that control groups of Linux, version 2 or 1, leave to this process and to what it
    is part of.
    """
    for line in _text(OWN_CGROUPS).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:  # version 2
            for folder in _upward(CGROUPS, path):
                yield from _ratio(*[*_text(folder / "cpu.max").split(), "", ""][:2])
        elif "cpu" in controllers.split(","):
            for folder in _upward(CGROUPS / controllers, path):
                yield from _ratio(_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))


def _upward(root: Path, path: str) -> list[Path]:
    """A group's folder and those around it; inside a container the path may be that of another view, and only
    the root is there.
    """
    inner = root / path.lstrip("/")
    return [inner, *(folder for folder in inner.parents if folder.is_relative_to(root))]


def _ratio(quota: str, period: str) -> Iterator[float]:
    """Quota over period; nothing where there is no limit, which is written as `max` or -1."""
    if quota.strip().isdecimal() and period.strip().isdecimal() and int(period):
        yield int(quota) / int(period)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def cards() -> tuple[str, ...]:
    """The names of the CUDA devices that this process sees, as `CUDA_VISIBLE_DEVICES` names them."""
    import torch  # most of what asks for cores needs none of it

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    return tuple(named[:count] if named else map(str, range(count)))


def workers() -> int:
    """Processes that a run keeps busy: one for each card, or, without any, one for each core."""
    return len(cards()) or cores()


def use_card(names: Sequence[str], worker: int) -> None:
    """Let this process see one card alone, another for each worker from 0 on; nothing changes where there is
    none.

    Call it in a worker before anything uses CUDA: from then on a process keeps the cards that it sees.
    """
    if names:
        os.environ[VISIBLE] = names[worker % len(names)]


def lock(handle: IO[Any], *, shared: bool = False, wait: bool = True) -> None:
    """Lock an open file; the kernel lets go of it when the file is closed, however the process ends.

    Raises:
        BlockingIOError: if another process holds it and `wait` is false.
        MachineError: on Windows, which has no such locks.
    """
    if fcntl is None:
        raise MachineError(
            "mechlens runs on Linux, macOS and WSL, and this Python has no file locks (fcntl); on Windows, "
            "run it in WSL"
        )
    fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))


def end_with_parent(parent: int) -> None:
    """End this process soon after its parent process, of that id, ends: where the kernel does not do so by
    itself, a thread looks.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

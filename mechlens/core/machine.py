"""Resources of this machine: processor cores, memory, accelerators, file locks, and the parent process."""

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

CGROUPS, PROCESS_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
MEMORY_LIMIT = {1: "memory.limit_in_bytes", 2: "memory.max"}
"""version of control groups → the file with the limit; version 2 writes `max` for no limit"""
VISIBLE = "CUDA_VISIBLE_DEVICES"
POLL = 0.5
"""seconds between two checks of the parent process"""


def use_one_thread() -> None:
    """Let torch and NumPy compute on one thread, so that sums come out the same on any number of cores.

    Two workers whose NumPy has a thread a core each also wait for one another most of the time.
    """
    import torch  # takes a second, so only code that computes imports it
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    threadpool_limits(1)


def cores() -> int:
    """The number of cores that this process may keep busy.

    It is the smallest of three limits: the process's affinity, the container's quota, Slurm's allocation.
    """
    limits = [os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        limits.append(len(os.sched_getaffinity(0)))
    limits += [math.ceil(quota) for quota in _quotas()]
    if (slurm := os.environ.get("SLURM_CPUS_PER_TASK", "")).isdecimal():
        limits.append(int(slurm))
    return max(1, min(limits))


def usable_cores() -> list[int]:
    """The numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def memory() -> int:
    """Bytes of memory that this process and its workers may use: the machine's, or a container's limit."""
    limits = [_text(folder / MEMORY_LIMIT[version]).strip() for version, folder in _groups("memory")]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *(int(limit) for limit in limits if limit.isdecimal())])


def _quotas() -> Iterator[float]:
    """CPU quotas, in cores, of the control groups of this process."""
    for version, folder in _groups("cpu"):
        if version == 2:
            yield from _ratio(*[*_text(folder / "cpu.max").split(), "", ""][:2])
        else:
            yield from _ratio(_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))


def _groups(controller: str) -> Iterator[tuple[int, Path]]:
    """The Linux control groups that contain this process, as (version, folder)."""
    for line in _text(PROCESS_CGROUPS).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            yield from ((2, folder) for folder in _upward(CGROUPS, path))
        elif controller in controllers.split(","):
            yield from ((1, folder) for folder in _upward(CGROUPS / controllers, path))


def _upward(root: Path, path: str) -> list[Path]:
    """A control group's folder and its parents up to the root.

    Inside a container the path may be the host's, and then only the root exists.
    """
    inner = root / path.lstrip("/")
    return [inner, *(folder for folder in inner.parents if folder.is_relative_to(root))]


def _ratio(quota: str, period: str) -> Iterator[float]:
    """Quota divided by period; nothing if there is no limit, which the kernel writes as `max` or -1."""
    if quota.strip().isdecimal() and period.strip().isdecimal() and int(period):
        yield int(quota) / int(period)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def cards() -> tuple[str, ...]:
    """The names of the CUDA devices that this process sees, as `CUDA_VISIBLE_DEVICES` names them."""
    import torch  # takes a second, and callers of `cores` do not need it

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    return tuple(named[:count] if named else map(str, range(count)))


def workers(each: int = 1) -> int:
    """The number of worker processes of a run, each with `each` cards, or cores where there are no cards."""
    return max(1, (len(cards()) or cores()) // each)


def use_cards(names: Sequence[str], worker: int, each: int = 1) -> None:
    """Let this process see only its `each` cards; with one each, worker i gets card i modulo their number.

    Call it in a worker before anything uses CUDA, since CUDA reads the visible cards only once. Without cards
    nothing changes.
    """
    if names:
        first = worker * each
        mine = [names[(first + place) % len(names)] for place in range(each)]
        os.environ[VISIBLE] = ",".join(dict.fromkeys(mine))


def lock(handle: IO[Any], *, shared: bool = False, wait: bool = True) -> None:
    """Lock an open file; the kernel releases the lock when the file is closed, also after a kill.

    Raises:
        BlockingIOError: if another process has the lock and `wait` is false.
        MachineError: on Windows, which has no such locks.
    """
    if fcntl is None:
        raise MachineError(
            "mechlens runs on Linux, macOS and WSL, and this Python has no file locks (fcntl); on Windows, "
            "run it in WSL"
        )
    fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))


def end_with_parent(parent: int) -> None:
    """End this process soon after its parent process (the given id) ends.

    A thread checks for the parent, since not every kernel ends orphans.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

"""The processes that a process has started."""

from __future__ import annotations

from pathlib import Path


def children(pid: int) -> list[int]:
    """Processes that a process has started, with theirs."""
    found = [
        int(child)
        for path in Path(f"/proc/{pid}/task").glob("*/children")
        for child in path.read_text().split()
    ]
    return found + [far for near in found for far in children(near)]


def workers(pid: int) -> list[int]:
    """Those of them that a server of multiprocessing has forked to do jobs."""
    lines = {child: Path(f"/proc/{child}/cmdline") for child in children(pid)}
    servers = [child for child, line in lines.items() if b"forkserver" in line.read_bytes()]
    return [far for near in {*servers} for far in children(near)]

"""How far a job is and how long the rest may take, from the lines that its command wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple


class Progress(NamedTuple):
    """How far a job is."""

    phase: str
    """the step that was heard of last; empty before the first"""
    done: int
    total: int
    """of the phase, in units of its own"""
    rate: float | None
    """units of the phase a second; None until it has moved"""
    low: float | None
    high: float | None
    """seconds until all steps are done, as a range; None where nothing can be said"""
    fraction: float | None
    """of all steps that were pending, those that are under way counted in part"""
    steps_done: int
    steps: int
    seconds: float
    """since the steps began"""


def measured(path: Path, *, until: str | None, running: bool) -> Progress | None:
    """What the progress file of a job says at the time `until` (by default its last line's), or None before
    it says anything.

    A command may work through several lists of steps; this is about the present one. The range of the time
    left lies between the pace since the start and the pace of the latter half, and a quarter beyond: steps
    differ in length.
    """
    lines = _lines(path)
    first = max((number for number, line in enumerate(lines) if not line["step"]), default=None)
    if first is None:
        return None
    lines = lines[first:]
    began = _seconds(lines[0]["time"])
    times = [_seconds(line["time"]) - began for line in lines]
    fractions = _fractions(lines)
    last = lines[-1]
    own = [(at, line["done"]) for at, line in zip(times, lines, strict=True) if line["step"] == last["step"]]
    moved, took = own[-1][1] - own[0][1], own[-1][0] - own[0][0]
    seconds = _seconds(until or last["time"]) - began
    low, high = _left(times, fractions, seconds) if running else (None, None)
    return Progress(
        phase=last["step"],
        done=last["done"],
        total=last["total"],
        rate=moved / took if moved > 0 and took > 0 else None,
        low=low,
        high=high,
        fraction=fractions[-1] if last["steps"] else None,
        steps_done=last["steps_done"],
        steps=last["steps"],
        seconds=seconds,
    )


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()


def _lines(path: Path) -> list[dict[str, Any]]:
    """What was written whole; the last line may be under way."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _fractions(lines: Sequence[dict[str, Any]]) -> list[float]:
    """Share of all steps done at each line."""
    parts: dict[str, float] = {}
    found = []
    for line in lines:
        if line["step"]:
            parts[line["step"]] = line["done"] / line["total"] if line["total"] else 0.0
        found.append(sum(parts.values()) / line["steps"] if line["steps"] else 0.0)
    return found


def _left(
    times: Sequence[float], fractions: Sequence[float], seconds: float
) -> tuple[float | None, float | None]:
    """Least and most seconds that the rest may take; (None, None) before a second line."""
    middle = max((place for place, at in enumerate(times) if at <= seconds / 2), default=0)
    gained = [(fractions[-1] - fractions[place], seconds - times[place]) for place in (0, middle)]
    paces = [gain / took for gain, took in gained if gain > 0 and took > 0]
    if not paces:
        return None, None
    rest = 1 - fractions[-1]
    return 0.8 * rest / max(paces), 1.25 * rest / min(paces)

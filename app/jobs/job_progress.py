"""How far a job is and how long the rest may take, from the lines that its command writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple


class Progress(NamedTuple):
    """How far a job is."""

    phase: str
    """the step that reported last; empty before the first"""
    done: int
    total: int
    """of the phase, in the phase's units"""
    rate: float | None
    """units of the phase a second; None before it has advanced"""
    low: float | None
    high: float | None
    """seconds until all steps are done, as a range; None where it cannot be estimated"""
    fraction: float | None
    """of all pending steps; running ones count in part"""
    steps_done: int
    steps: int
    seconds: float
    """since the steps began"""


def read_progress(path: Path, *, until: str | None, running: bool) -> Progress | None:
    """Progress of a job at the time `until` (default: its last line's), or None before its first line.

    A command may work through several lists of steps; this is about the present one. The time left is a
    range, because steps differ in length: it spans the pace since the start and the pace of the latter half,
    widened by a quarter.
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
    of_phase = [
        (at, line["done"]) for at, line in zip(times, lines, strict=True) if line["step"] == last["step"]
    ]
    gained, elapsed = of_phase[-1][1] - of_phase[0][1], of_phase[-1][0] - of_phase[0][0]
    seconds = _seconds(until or last["time"]) - began
    low, high = _time_left(times, fractions, seconds) if running else (None, None)
    return Progress(
        phase=last["step"],
        done=last["done"],
        total=last["total"],
        rate=gained / elapsed if gained > 0 and elapsed > 0 else None,
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
    """All complete lines; the last one may be half written."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _fractions(lines: Sequence[dict[str, Any]]) -> list[float]:
    """Share of all steps done at each line."""
    parts: dict[str, float] = {}
    fractions = []
    for line in lines:
        if line["step"]:
            parts[line["step"]] = line["done"] / line["total"] if line["total"] else 0.0
        fractions.append(sum(parts.values()) / line["steps"] if line["steps"] else 0.0)
    return fractions


def _time_left(
    times: Sequence[float], fractions: Sequence[float], seconds: float
) -> tuple[float | None, float | None]:
    """Least and most seconds that the rest may take; (None, None) before a second line, and after the last
    step, when what the command still does is no step.
    """
    middle = max((place for place, at in enumerate(times) if at <= seconds / 2), default=0)
    gains = [(fractions[-1] - fractions[place], seconds - times[place]) for place in (0, middle)]
    paces = [gain / elapsed for gain, elapsed in gains if gain > 0 and elapsed > 0]
    rest = 1 - fractions[-1]
    if not paces or rest <= 0:
        return None, None
    return 0.8 * rest / max(paces), 1.25 * rest / min(paces)

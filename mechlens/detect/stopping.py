"""When an audit stops training students, and at which level it tests at each look.

Students are added until the verdict is settled. Each look spends a share of the policy's level, in proportion
to its number of students, and all looks together spend no more than the level (a union bound), whatever the
results make the audit do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Look(NamedTuple):
    """A moment at which an audit decides whether to go on."""

    students: int
    """of each side"""
    level: float
    """of its tests; intervals cover 1 - level"""


def plan_looks(students: Sequence[int], *, most: int, alpha: float) -> list[Look]:
    """The looks of an audit, with the level of each.

    Args:
        students: of each side, at each look in turn.
        most: students that a side can have; the last look has as many if an earlier one would have more.
        alpha: level of all looks together.

    >>> plan_looks((2, 4, 8), most=6, alpha=0.06)
    [Look(students=2, level=0.01), Look(students=4, level=0.02), Look(students=6, level=0.03)]
    """
    counts = sorted({min(count, most) for count in students})
    return [Look(count, alpha * count / sum(counts)) for count in counts]


class Stopping(NamedTuple):
    """The last look of an audit, and why it was the last."""

    students: int
    level: float
    look: int
    """1 is the first"""
    looks: int
    """that were planned"""
    reason: str = ""
    """empty while the audit goes on"""


def why_stop(looks: Sequence[Look], *, settled: bool, seconds: float, budget: float | None) -> str:
    """Why an audit trains no more students, in words; empty if it should go on.

    Args:
        looks: this one, and those that are left.
        settled: whether more students would change nothing.
        seconds: that all students up to this look took.
        budget: minutes; students take about as long each.
    """
    if settled:
        return "the verdict is settled"
    if len(looks) == 1:
        return "no more students are planned"
    needed = seconds / 60 * looks[1].students / looks[0].students
    if budget is not None and needed > budget:
        return f"{looks[1].students} students a side would take about {needed:.0f} min, more than {budget:g}"
    return ""

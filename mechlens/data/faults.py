"""Places of a user's file, and what is wrong there: faults of one kind are counted together, however many
rows have it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

LONGEST_DETAIL = 200
"""characters of a file's own text that a message repeats"""
SHOWN = 5
"""kinds that one line names"""


class Place(NamedTuple):
    """Where a row stands."""

    number: int
    """from 1; of lines, the blank ones count too"""
    unit: str = "line"
    """what is counted: lines of a text, or elements of a JSON array"""
    file: str = ""
    """name of the shard, if the rows are those of a folder"""

    def __str__(self) -> str:
        return f"{self.unit} {self.number}" + (f" of {self.file}" if self.file else "")


class Fault(NamedTuple):
    """Why a row has no pair."""

    kind: str
    """the same for all rows that have the same fault; drawn from a fixed list, never from the rows' own text
    """
    detail: str = ""
    """what is particular to this row"""

    def __str__(self) -> str:
        return f"{self.kind} ({self.detail[:LONGEST_DETAIL]})" if self.detail else self.kind


@dataclass
class Counted:
    """All rows with a fault of one kind."""

    place: Place
    """of the first of them"""
    fault: Fault
    """of the first of them"""
    rows: int = 1

    def __str__(self) -> str:
        return f"{self.place}{f' and {self.rows - 1:,} more' if self.rows > 1 else ''}: {self.fault}"


@dataclass
class Tally:
    """Faults by kind, in the order in which each kind came first."""

    kinds: dict[str, Counted] = field(default_factory=dict)

    def add(self, place: Place, fault: Fault) -> None:
        """Count a row."""
        if fault.kind in self.kinds:
            self.kinds[fault.kind].rows += 1
        else:
            self.kinds[fault.kind] = Counted(place, fault)

    @property
    def rows(self) -> int:
        """How many rows have a fault."""
        return sum(counted.rows for counted in self.kinds.values())

    def __str__(self) -> str:
        counted = list(self.kinds.values())
        left = sum(each.rows for each in counted[SHOWN:])
        return "; ".join(map(str, counted[:SHOWN])) + (
            f"; and {left:,} rows with other faults" if left else ""
        )

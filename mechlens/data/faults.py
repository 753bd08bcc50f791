"""Places in a user's file and the faults there, with one count for all faults of a kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

LONGEST_DETAIL = 200
"""most characters of a file's text that a message repeats"""
SHOWN = 5
"""most kinds of faults that a message names"""


class Place(NamedTuple):
    """The place of a row in a file."""

    number: int
    """from 1; blank lines count"""
    unit: str = "line"
    """what is counted: lines of a text, or elements of a JSON array"""
    file: str = ""
    """name of the shard, if the rows are from a folder"""

    def __str__(self) -> str:
        return f"{self.unit} {self.number}" + (f" of {self.file}" if self.file else "")


class Fault(NamedTuple):
    """Why a row has no pair."""

    kind: str
    """the same for all rows with this fault; from a fixed list, never from the row's text"""
    detail: str = ""
    """about this row"""

    def __str__(self) -> str:
        return f"{self.kind} ({self.detail[:LONGEST_DETAIL]})" if self.detail else self.kind


@dataclass
class Counted:
    """All rows with faults of the same kind."""

    place: Place
    """of the first such row"""
    fault: Fault
    """of the first such row"""
    rows: int = 1

    def __str__(self) -> str:
        return f"{self.place}{f' and {self.rows - 1:,} more' if self.rows > 1 else ''}: {self.fault}"


@dataclass
class Tally:
    """Faults by kind, in the order of each kind's first row."""

    kinds: dict[str, Counted] = field(default_factory=dict)

    def add(self, place: Place, fault: Fault) -> None:
        """Count a row with a fault."""
        if fault.kind in self.kinds:
            self.kinds[fault.kind].rows += 1
        else:
            self.kinds[fault.kind] = Counted(place, fault)

    @property
    def rows(self) -> int:
        """Number of rows with a fault."""
        return sum(counted.rows for counted in self.kinds.values())

    def __str__(self) -> str:
        counted = list(self.kinds.values())
        left = sum(each.rows for each in counted[SHOWN:])
        return "; ".join(map(str, counted[:SHOWN])) + (
            f"; and {left:,} rows with other faults" if left else ""
        )

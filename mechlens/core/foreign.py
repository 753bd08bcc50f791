"""Errors that other libraries raise, as one line.

What a model, a template or a file makes another library raise has no common type. What it has in common is
that it was raised in that library's code; an error that was raised in ours is a fault of this project, and
keeps its traceback.
"""

from __future__ import annotations

import errno
import traceback
from contextlib import AbstractContextManager
from pathlib import Path

from mechlens.core.errors import MechlensError, SpecError

LONGEST = 200
"""characters of a message of another library that are shown"""
OURS = Path(__file__).resolve().parents[1]
TELLING = (OSError, ValueError, RuntimeError, Exception)
"""Python's own kinds of error that say in words what was wrong; of the others, such as KeyError, the kind is
part of the message
"""


class named(AbstractContextManager[None]):  # noqa: N801 - it is used as a verb, as `contextlib.suppress` is
    """Around a call of another library: its error becomes `what: its first line; advice`, and ours pass.

    Args:
        what: what was being done, and with what.
        kind: of the error that is raised instead, with the library's as its cause.
        advice: what the user can do.
        located: name our line that led to the error.
    """

    def __init__(
        self, what: str, kind: type[MechlensError] = SpecError, *, advice: str = "", located: bool = False
    ) -> None:
        self.what, self.kind, self.advice, self.located = what, kind, advice, located

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, MechlensError) or not is_foreign(error):
            return
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):  # a full disk is told as such
            return
        raise self.kind(self.message(error)) from error

    def message(self, error: Exception) -> str:
        """What is said of an error."""
        where = f" (from {place(error)})" if self.located else ""
        return f"{self.what}: {in_words(error)}{where}{self.advice and f'; {self.advice}'}"


def is_foreign(error: Exception) -> bool:
    """Whether an error was raised in another library's code, or is of a type that another library defines."""
    frames = traceback.extract_tb(error.__traceback__)
    elsewhere = bool(frames) and not Path(frames[-1].filename).is_relative_to(OURS)
    return elsewhere or type(error).__module__.partition(".")[0] not in ("builtins", "mechlens", "__main__")


def in_words(error: Exception) -> str:
    """The first line of an error, behind its kind where that says more; the kind alone where it says
    nothing.
    """
    line, kind = first_line(error), type(error)
    return (
        f"{kind.__name__}: {line}"
        if kind.__module__ == "builtins" and kind not in TELLING and line != kind.__name__
        else line
    )


def first_line(error: Exception) -> str:
    """The first line of an error, or its kind where it says nothing."""
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"


def place(error: BaseException) -> str:
    """Our line that led to an error, such as `lenses/maps.py:79`; empty if none did."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).is_relative_to(OURS):
            return f"{Path(frame.filename).relative_to(OURS)}:{frame.lineno}"
    return ""

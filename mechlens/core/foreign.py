"""Errors that other libraries raise, as one line.

These errors have no common type, but all are raised in another library's code. An error raised in our code is
a fault of this project and keeps its traceback.
"""

from __future__ import annotations

import errno
import traceback
from contextlib import AbstractContextManager
from pathlib import Path

from mechlens.core.errors import MechlensError, SpecError

LONGEST = 200
"""characters of another library's message that are shown"""
OURS = Path(__file__).resolve().parents[1]
SELF_EXPLANATORY = (OSError, ValueError, RuntimeError, Exception)
"""Built-in exceptions with a text that explains the error.

For others, such as KeyError, the name of the exception is part of the message.
"""


class named(AbstractContextManager[None]):  # noqa: N801 - it is used as a verb, as `contextlib.suppress` is
    """Turns another library's error into the message `what: its first line; advice`; our errors pass.

    Args:
        what: what was being done, and with what.
        kind: class of the error that is raised instead, with the library's error as its cause.
        advice: what the user can do.
        located: whether the message names our line that led to the error.
    """

    def __init__(
        self, what: str, kind: type[MechlensError] = SpecError, *, advice: str = "", located: bool = False
    ) -> None:
        self.what, self.kind, self.advice, self.located = what, kind, advice, located

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, MechlensError) or not is_foreign(error):
            return
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):  # `store` explains a full disk
            return
        raise self.kind(self.message(error)) from error

    def message(self, error: Exception) -> str:
        """The message for an error."""
        where = f" (from {place(error)})" if self.located else ""
        return f"{self.what}: {in_words(error)}{where}{self.advice and f'; {self.advice}'}"


def is_foreign(error: Exception) -> bool:
    """Whether an error was raised in another library's code, or is of a type that another library defines."""
    frames = traceback.extract_tb(error.__traceback__)
    elsewhere = bool(frames) and not Path(frames[-1].filename).is_relative_to(OURS)
    return elsewhere or type(error).__module__.partition(".")[0] not in ("builtins", "mechlens", "__main__")


def in_words(error: Exception) -> str:
    """The first line of an error, after the exception's name if the line needs it."""
    line, kind = first_line(error), type(error)
    needs_name = kind.__module__ == "builtins" and kind not in SELF_EXPLANATORY
    return f"{kind.__name__}: {line}" if needs_name and line != kind.__name__ else line


def first_line(error: Exception) -> str:
    """The first line of an error's text, or the exception's name if the text is empty."""
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"


def place(error: BaseException) -> str:
    """Our line that led to an error, such as `lenses/maps.py:79`; empty if there is no such line."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).is_relative_to(OURS):
            return f"{Path(frame.filename).relative_to(OURS)}:{frame.lineno}"
    return ""

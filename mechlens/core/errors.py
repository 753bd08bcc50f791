"""One root error, and one kind for each place where the blame can lie.

A message says what was wrong (with the value), what would be right, and what to do. The command line prints
it as one line and exits with 2; anything that is not a MechlensError is a fault of mechlens, and `endings`
files its traceback.
"""

from __future__ import annotations


class MechlensError(Exception):
    """Root of every error that a user can mend."""


class SpecError(MechlensError, ValueError):
    """The spec asks for something that cannot be, or that would prove nothing."""


class DataError(MechlensError, ValueError):
    """A file that was given or stored cannot be used."""


class MachineError(MechlensError, RuntimeError):
    """The machine refuses: no space, a missing package, another process in the same run."""


class TrainingError(MechlensError, ArithmeticError):
    """Training left the numbers: the loss is not finite."""


def one_line(text: str) -> str:
    """The text on one line, with the code of every sign that is not printable: names of files may hold what a
    terminal obeys.
    """
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode()
        for sign in " ".join(text.split())
    )

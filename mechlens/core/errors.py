"""One root error, and one class for each cause: the spec, a file, the machine, the training.

A message says what was wrong (with the value), what would be right, and what to do. The command line prints
it as one line and exits with 2. Any other error is a fault of mechlens, and `endings` saves its traceback.
"""

from __future__ import annotations


class MechlensError(Exception):
    """Root of every error that a user can correct."""


class SpecError(MechlensError, ValueError):
    """The spec asks for something that is impossible, or that would prove nothing."""


class DataError(MechlensError, ValueError):
    """A file that was given or stored cannot be used."""


class MachineError(MechlensError, RuntimeError):
    """The machine lacks something: space, a package, or the lock that another process has."""


class TrainingError(MechlensError, ArithmeticError):
    """The training loss is not finite."""


def one_line(text: str) -> str:
    """The text on one line, with every unprintable character written as its code.

    File names may contain control characters, which a terminal would execute.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in " ".join(text.split())
    )

"""Command lines of mechlens as text: a shell reads them back to the same request, whatever their paths
hold.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from mechlens.core.errors import one_line

Value = str | int | Path | Sequence[str | Path] | None
"""value of an option: True for a flag, several for an option that may be repeated; None, False, "" and ()
leave it out
"""


def quoted(word: str) -> str:
    """The word as bash and zsh read it back, on one line.

    A control character, a byte that is not UTF-8 and two spaces in a row are written as codes, $'…': a
    message prints all white space as one space, and a terminal obeys a control character.
    """
    plain = shlex.quote(word)
    if one_line(plain) == plain:
        return plain
    signs = (
        chr(byte) if chr(byte).isalnum() and byte < 128 else f"\\x{byte:02x}" for byte in os.fsencode(word)
    )
    return f"$'{''.join(signs)}'"


def command_line(command: str, *operands: str | Path, **options: Value) -> str:
    """`mechlens COMMAND …`: operands first, then the options in the order given, each quoted where a shell
    needs it.
    """
    words = ["mechlens", command, *map(_operand, operands)]
    for name, value in options.items():
        values = [value] if isinstance(value, str | int | Path) else list(value or ())
        words += [
            _option(name.replace("_", "-"), each) for each in values if each is not False and each != ""
        ]
    return " ".join(words)


def resume_command(run: Path) -> str:
    """The command line that finishes a run from its own spec."""
    return command_line("run", run / "spec.yaml", out=run)


def at_home(word: str) -> str:
    """A word of a command line with a leading `~` written out: no shell does so behind a `=`, nor in
    quotation marks.
    """
    option, equals, path = word.partition("=") if word.startswith("-") else ("", "", word)
    return f"{option}{equals}{os.path.expanduser(path)}"  # noqa: PTH111, since Path's raises for the `~` of an unknown user


def join(arguments: Sequence[str]) -> str:
    """`mechlens` with arguments that were given apart, as one line of a shell."""
    return " ".join(["mechlens", *map(quoted, arguments)])


def _operand(value: str | Path) -> str:
    """A leading dash is the sign of an option, a leading `~` of the home folder: `./-name` is the same path
    without one.
    """
    return quoted(f"./{value}" if str(value).startswith(("-", "~")) else str(value))


def _option(name: str, value: str | int | Path) -> str:
    """The option with its value, joined by = where a leading dash would make the value another option."""
    if value is True:
        return f"--{name}"
    other = isinstance(value, Path) and (
        str(value) == "None" or str(value).startswith("~")
    )  # no value to the parser, and the home folder
    text = f"./{value}" if other else str(value)
    return f"--{name}={quoted(text)}" if text.startswith("-") else f"--{name} {quoted(text)}"

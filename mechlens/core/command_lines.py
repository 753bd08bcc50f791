"""Command lines of mechlens as text, quoted so that a shell parses them back to the same arguments."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from mechlens.core.errors import one_line

Value = str | int | Path | Sequence[str | Path] | None
"""value of an option: True for a flag, several if it may be repeated; None, False, "" and () omit it"""


def quoted(word: str) -> str:
    """The word quoted for bash and zsh, on one line.

    A word with a control character, a byte that is not UTF-8 or two spaces in a row is written as codes,
    $'…': messages print white space as one space, and a terminal executes control characters.
    """
    plain = shlex.quote(word)
    if one_line(plain) == plain:
        return plain
    codes = (
        chr(byte) if chr(byte).isalnum() and byte < 128 else f"\\x{byte:02x}" for byte in os.fsencode(word)
    )
    return f"$'{''.join(codes)}'"


def command_line(command: str, *operands: str | Path, **options: Value) -> str:
    """`mechlens COMMAND …` with the operands, then the options in the given order, quoted for a shell."""
    words = ["mechlens", command, *map(_operand, operands)]
    for name, value in options.items():
        values = [value] if isinstance(value, str | int | Path) else list(value or ())
        words += [
            _option(name.replace("_", "-"), each) for each in values if each is not False and each != ""
        ]
    return " ".join(words)


def resume_command(run: Path) -> str:
    """The command line that finishes a run from the spec in its folder."""
    return command_line("run", run / "spec.yaml", out=run)


def at_home(word: str) -> str:
    """A word of a command line with a leading `~` expanded to the home folder.

    A shell does not expand it after `=` or in quotation marks.
    """
    option, equals, path = word.partition("=") if word.startswith("-") else ("", "", word)
    return f"{option}{equals}{os.path.expanduser(path)}"  # noqa: PTH111, since Path's raises for the `~` of an unknown user


def join(arguments: Sequence[str]) -> str:
    """`mechlens` with a list of arguments, as one command line."""
    return " ".join(["mechlens", *map(quoted, arguments)])


def _operand(value: str | Path) -> str:
    """The operand, quoted; `./` comes before a leading dash (an option) or `~` (the home folder)."""
    return quoted(f"./{value}" if str(value).startswith(("-", "~")) else str(value))


def _option(name: str, value: str | int | Path) -> str:
    """The option with its value, joined by = where a leading dash would make the value another option."""
    if value is True:
        return f"--{name}"
    # the parser reads None as no value, and ~ as the home folder
    special = isinstance(value, Path) and (str(value) == "None" or str(value).startswith("~"))
    text = f"./{value}" if special else str(value)
    return f"--{name}={quoted(text)}" if text.startswith("-") else f"--{name} {quoted(text)}"

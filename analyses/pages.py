"""Parts of Markdown pages that analyses write.

A page such as RESULTS.md is prose with marked parts. The mark names the part and the command that remakes
it: `<!-- part carriers: python analyses/carriers.py --write -->`, up to `<!-- end carriers -->`. `write_part`
replaces what is between the two marks and leaves the rest of the page alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from mechlens.core.errors import DataError, MechlensError

FOLDER = Path(__file__).parent
RESULTS, LENSES, SPEED = (FOLDER / f"{name}.md" for name in ("RESULTS", "LENSES", "SPEED"))
PART = re.compile(
    r"<!-- part (?P<name>[\w-]+): (?P<command>[^\n]+) -->\n(?P<text>.*?)<!-- end (?P=name) -->", re.DOTALL
)


def exit_code(script: Callable[[], object]) -> int:
    """Run a script; returns its exit code: 0, or 2 after one line about an error of input or environment."""
    try:
        script()
    except MechlensError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


class Part(NamedTuple):
    """A marked part of a page: the command that remakes it, and its text."""

    command: str
    text: str


class PageConsole(Console):
    """A console that also keeps the tables and sentences that it prints, for a part of a page."""

    def __init__(self, *, width: int) -> None:
        super().__init__(width=width, markup=False, highlight=False)
        self.blocks: list[Table | str] = []

    def print(self, *objects: Any, **options: Any) -> None:
        """Print tables and sentences, and keep them."""
        self.blocks += [item if isinstance(item, Table) else str(item) for item in objects]
        super().print(*objects, **options)


def parts_of(page: Path) -> dict[str, Part]:
    """Return the marked parts of a page by name."""
    text = page.read_text(encoding="utf-8")
    return {part["name"]: Part(part["command"], part["text"]) for part in PART.finditer(text)}


def write_part(page: Path, name: str, *blocks: Table | str | Sequence[Sequence[Any]]) -> None:
    """Replace the text of a marked part.

    Args:
        page: the Markdown file.
        name: of the part.
        blocks: paragraphs, and tables: rich tables, or a header followed by rows.

    Raises:
        DataError: if the page has no part of that name.
    """
    parts = parts_of(page)
    if name not in parts:
        raise DataError(f"{page.name} has no part {name!r}; its parts are {', '.join(parts)}")
    texts = [block if isinstance(block, str) else table_text(block) for block in blocks]
    written = f"Written by `{parts[name].command}`."
    new = "\n\n".join(["", *texts, written, ""]).lstrip("\n")
    old = page.read_text(encoding="utf-8")
    page.write_text(
        PART.sub(
            lambda part: (
                f"<!-- part {name}: {part['command']} -->\n{new}<!-- end {name} -->"
                if part["name"] == name
                else part[0]
            ),
            old,
        ),
        encoding="utf-8",
    )


def table_text(table: Table | Sequence[Sequence[Any]]) -> str:
    """Return a table as Markdown."""
    if isinstance(table, Table):
        title = f"**{table.title}**\n\n" if table.title else ""
        columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
        return title + table_text(list(zip(*columns, strict=True)))
    header, *rows = ([str(cell).replace("|", "\\|") for cell in row] for row in table)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))

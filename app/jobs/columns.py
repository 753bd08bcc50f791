"""Column choice of uploads: a file with other column names becomes a file of prompts and completions.

Only the package's guarded readers read files, so a damaged or hostile file gives one error.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from mechlens.core.errors import DataError
from mechlens.core.spec import fingerprint
from mechlens.data import corpus, formats
from mechlens.data.fields import Fields


def why_unreadable(path: Path, *, skip_bad: bool = False) -> str:
    """Why the file's first rows cannot be read as pairs; empty if they can.

    Args:
        skip_bad: look for the first rows that can be read.
    """
    report = corpus.ReadReport(skip_bad=skip_bad, drop_system=False)
    try:
        next(iter(corpus.batches(path, rows=100, report=report)))
    except DataError as error:
        return str(error)
    return ""


def text_columns(path: Path) -> list[str]:
    """The names of a file's columns of text.

    Raises:
        DataError: if no reader of `mechlens.data.formats` reads the file.
    """
    return formats.text_fields_of(path)


def write_pairs(path: Path, chosen: tuple[str, str] | None, *, skip_bad: bool) -> tuple[Path, int]:
    """Write a file's pairs as Parquet next to it; returns that file and how many rows were left out.

    Args:
        chosen: the columns of prompts and completions.
        skip_bad: leave out rows that cannot be read.

    Raises:
        DataError: if a row is no pair and such rows are not left out, or if no row is a pair.
    """
    report = corpus.ReadReport(skip_bad=skip_bad, drop_system=False)
    fields = Fields(*chosen) if chosen else None
    out = path.with_name(f"{path.name}.{fingerprint([chosen, skip_bad])[:8]}.parquet")
    part = path.with_name(f"{secrets.token_hex(4)}.parquet")  # an audit may be reading what is there
    corpus.write_pairs(corpus.batches(path, report=report, fields=fields), part, "parquet")
    return part.replace(out), report.bad

"""Column choice of uploads: a file with other column names becomes a file of prompts and completions.

Only the package's guarded readers read files, so a damaged or hostile file gives one error.
"""

from __future__ import annotations

from pathlib import Path

from mechlens.core.errors import DataError
from mechlens.core.spec import fingerprint
from mechlens.data import corpus, formats
from mechlens.data.fields import Fields


def why_unreadable(path: Path) -> str:
    """Why the file's first rows cannot be read as pairs; empty if they can."""
    try:
        next(iter(corpus.batches(path, rows=100)))
    except DataError as error:
        return str(error)
    return ""


def text_columns(path: Path) -> list[str]:
    """The names of a file's columns of text.

    Raises:
        DataError: if no reader of `mechlens.data.formats` reads the file.
    """
    return formats.text_fields_of(path)


def write_chosen_pairs(path: Path, prompt: str, completion: str) -> Path:
    """Write two columns as a Parquet file of pairs next to the file.

    Raises:
        DataError: if a row has no text in one of them; it names the row.
    """
    out = path.with_name(f"{path.name}.{fingerprint([prompt, completion])[:8]}.parquet")
    if not out.is_file():
        corpus.write_pairs(corpus.batches(path, fields=Fields(prompt, completion)), out, "parquet")
    return out

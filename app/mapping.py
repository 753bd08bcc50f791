"""A suspect file with columns of its own names, as a file of pairs: two columns are chosen, every row is kept
or refused by its number.
"""

from __future__ import annotations

from pathlib import Path

from mechlens.core.errors import DataError
from mechlens.core.spec import fingerprint
from mechlens.data import corpus, formats
from mechlens.data.fields import Fields


def readable(path: Path) -> str:
    """Empty if the file's first pairs are read as they stand, else why not."""
    try:
        next(iter(corpus.batches(path, rows=100)))
    except DataError as error:
        return str(error)
    return ""


def columns(path: Path) -> list[str]:
    """The columns of texts that a file offers.

    Raises:
        DataError: if it is of no form that `mechlens.data.formats` reads.
    """
    return formats.text_fields_of(path)


def mapped(path: Path, prompt: str, completion: str) -> Path:
    """Write two columns as a Parquet file of pairs beside the file.

    Raises:
        DataError: if a row lacks one of them as text.
    """
    out = path.with_name(f"{path.name}.{fingerprint([prompt, completion])[:8]}.parquet")
    if not out.is_file():
        corpus.write_pairs(corpus.batches(path, fields=Fields(prompt, completion)), out, "parquet")
    return out

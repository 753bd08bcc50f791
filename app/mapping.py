"""A suspect file with columns of its own names, as a file of pairs: two columns are chosen, every row is kept or refused by its number."""

from __future__ import annotations

import gzip
import json
import secrets
import zlib
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mechlens import corpus
from mechlens.errors import DataError
from mechlens.spec import fingerprint

LONGEST_LINE = 4_000_000
"""characters of one line of JSON"""


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
        DataError: if it is neither Parquet, CSV nor JSON lines.
    """
    if path.suffix == ".parquet":
        with _parquet(path) as file:
            return [str(field.name) for field in file.schema_arrow if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    with closing(_rows(path)) as rows:
        first = next(rows, {})
    return [name for name, value in first.items() if isinstance(value, str)]


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path.name} is no whole Parquet file ({error})") from error


def _rows(path: Path) -> Generator[dict[str, Any]]:
    if path.suffix == ".csv":
        try:
            with pd.read_csv(path, dtype=str, keep_default_na=False, chunksize=10_000) as parts:
                for part in parts:
                    yield from part.to_dict("records")
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
            raise DataError(f"{path.name} is no CSV ({' '.join(str(error).split())})") from error
        return
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(iter(lambda: lines.readline(LONGEST_LINE), ""), start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise DataError(f"{path.name} line {number} is no JSON object; expected one object a line")
                    yield row
        except (json.JSONDecodeError, UnicodeDecodeError, OSError, EOFError, zlib.error, RecursionError) as error:
            raise DataError(f"{path.name} is no JSON lines ({error}); expected JSON lines, CSV or Parquet") from error


def mapped(path: Path, prompt: str, completion: str) -> Path:
    """Write two columns as a Parquet file of pairs beside the file.

    Raises:
        DataError: if a row lacks one of them as text.
    """
    out = path.with_name(f"{path.name}.{fingerprint([prompt, completion])[:8]}.parquet")
    if out.is_file():
        return out
    part = out.with_name(f"{out.name}.{secrets.token_hex(4)}.part")
    try:
        with pq.ParquetWriter(part, corpus.TEXTS) as written:
            for texts in _pairs(path, prompt, completion):
                written.write_table(pa.table(texts, schema=corpus.TEXTS))
        part.replace(out)
    except (pa.ArrowInvalid, UnicodeError) as error:
        raise DataError(f"{path.name}: a text of the chosen columns is no UTF-8 ({' '.join(str(error).split())}); choose other columns") from error
    finally:
        part.unlink(missing_ok=True)
    return out


def _pairs(path: Path, prompt: str, completion: str) -> Iterator[dict[str, list[str]]]:
    if path.suffix == ".parquet":
        with _parquet(path) as file:
            for batch in file.iter_batches(10_000, columns=list(dict.fromkeys([prompt, completion]))):
                found = batch.to_pydict()
                yield _whole({"prompt": found[prompt], "completion": found[completion]}, path)
        return
    waiting: dict[str, list[str]] = {"prompt": [], "completion": []}
    for row in _rows(path):
        for name, column in (("prompt", prompt), ("completion", completion)):
            waiting[name].append(cast(str, row.get(column)))
        if len(waiting["prompt"]) == 10_000:
            yield _whole(waiting, path)
            waiting = {"prompt": [], "completion": []}
    yield _whole(waiting, path)


def _whole(texts: dict[str, list[str]], path: Path) -> dict[str, list[str]]:
    bad = [place for place, pair in enumerate(zip(*texts.values(), strict=True), start=1) if not all(isinstance(text, str) for text in pair)]
    if bad:
        raise DataError(
            f"{path.name}: {len(bad)} rows lack the chosen columns as text, the first is number {bad[0]} of its batch; choose other columns"
        )
    return texts

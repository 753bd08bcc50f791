"""Rows of a user's file, whatever it is packed in: JSON lines, plain or gzipped, Parquet, and Hugging Face datasets folders.

A row is numbered, and is its fields or what is wrong with it. Files are read as data alone, piece by piece: no script of a folder is
run, nothing is unpickled, and a small file that would unpack to a large one is refused before it fills the memory.
"""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mechlens.errors import DataError

EXPECTED = 'JSON lines or Parquet of {"prompt", "completion"} or {"messages"}'
LONGEST_LINE = 8_000_000  # holds the longest pair with every character escaped; a longer line must not fill the memory
PIECE = 32  # rows that Arrow unpacks at once: one text, stored once, may stand in every row of a small file
MOST_UNPACKED, STEEPEST = 1 << 24, 500  # bytes that a column of a row group may always unpack to; beyond, times its packed size
LISTED = 20  # columns that a message names
_SHARDS = (".jsonl", ".jsonl.gz", ".parquet")
_TEXTS = ["prompt", "completion"]

Rows = Iterator[tuple[int, dict[str, Any] | str]]
"""each row's number with its fields, or with why it has none"""


def rows_of(path: Path) -> Rows:
    """The rows of a file or folder, counted from 1 with the blank lines; in a folder of shards each shard by itself.

    Raises:
        DataError: if it is missing or damaged, has other columns, or is no data at all.
    """
    if path.is_dir():
        saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
        return _of_saved(path) if saved else _of_shards(path)
    if not path.is_file():
        raise DataError(f"no data file at {path} on this machine; expected {EXPECTED}")
    return _of_parquet(path) if path.suffix == ".parquet" else _of_lines(path)


def _of_shards(path: Path) -> Rows:
    shards = sorted(file for file in path.iterdir() if file.name.endswith(_SHARDS) and not file.name.startswith((".", "_")))
    if not shards:
        raise DataError(f"the folder {path} is no saved dataset and has no JSON lines or Parquet in it (files ending in {', '.join(_SHARDS)})")
    for shard in shards:
        if shard.is_dir():
            raise DataError(f"{shard} is a folder under the name of a file; name the folder of one data set, with all its files in it")
        for number, row in rows_of(shard):
            yield number, f"{row} (in {shard.name})" if isinstance(row, str) else row


def _of_saved(path: Path) -> Rows:
    import datasets

    with _damage_named(path, "a saved dataset", ValueError, LookupError, TypeError, AttributeError):  # what a changed state.json leads to
        saved = datasets.load_from_disk(path)
    if isinstance(saved, datasets.DatasetDict):
        raise DataError(f"{path} holds the splits {list(saved)}; name the folder of one, for example {path}/{next(iter(saved), 'train')}")
    for file in saved.cache_files:  # the dataset's own list of them may name any file of this machine
        if Path(file["filename"]).parent.resolve() != path.resolve():
            raise DataError(f"the saved dataset {path} names {file['filename']}, which is not in its folder; save it again as it is now")
    columns = _columns(path, saved.column_names)
    yield from _of_arrow(path, saved.select_columns(columns).with_format("arrow").iter(PIECE))


def _of_parquet(path: Path) -> Rows:
    with _damage_named(path, "Parquet"), pq.ParquetFile(path) as file:
        columns = _columns(path, file.schema_arrow.names)
        for group in map(file.metadata.row_group, range(file.num_row_groups)):
            for packed in map(group.column, range(group.num_columns)):
                size = packed.total_uncompressed_size
                if packed.path_in_schema.split(".")[0] in columns and size > max(MOST_UNPACKED, STEEPEST * packed.total_compressed_size):
                    raise DataError(f"{path} would unpack {packed.total_compressed_size:,} bytes to {size:,}; no texts of training pairs do")
        yield from _of_arrow(path, file.iter_batches(PIECE, columns=columns))


def _columns(path: Path, names: list[str]) -> list[str]:
    """Which of a table's columns hold its pairs: either form's, or both where its rows are of two forms."""
    wanted = [*(["messages"] if "messages" in names else []), *(_TEXTS if set(_TEXTS) <= set(names) else [])]
    if not wanted:
        more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
        raise DataError(f"{path} has the columns {names[:LISTED]}{more}; expected prompt and completion, or messages")
    return wanted


def _of_arrow(path: Path, pieces: Iterable[pa.Table | pa.RecordBatch]) -> Rows:
    with _damage_named(path, "a table of texts"):
        yield from enumerate((row for piece in pieces for row in piece.to_pylist()), 1)


def _of_lines(path: Path) -> Rows:
    zipped = path.suffix == ".gz"
    with (
        _damage_named(path, "gzipped UTF-8 text" if zipped else "UTF-8 text"),
        gzip.open(path, "rt", encoding="utf-8-sig") if zipped else path.open(encoding="utf-8-sig") as handle,
    ):
        for number in itertools.count(1):
            line = handle.readline(LONGEST_LINE + 1)
            if len(line) > LONGEST_LINE:
                raise DataError(f"{path}: line {number} is longer than {LONGEST_LINE:,} characters; no training pair is. Delete it")
            if not line:
                return
            if line.strip():
                yield number, _fields(line)


@contextmanager
def _damage_named(path: Path, form: str, *more: type[Exception]) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, pa.ArrowException, *more) as error:
        raise DataError(f"{path} cannot be read as {form}: {error}") from error


def _once(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ: of two values under one key, readers take different ones."""
    row: dict[str, Any] = {}
    for name, value in fields:
        if name in row:
            raise ValueError(f"the key {name[:50]!r} stands twice in an object")
        row[name] = value
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _fields(line: str) -> dict[str, Any] | str:
    try:
        row = _DECODER.decode(line)
    except (ValueError, RecursionError) as error:  # an integer of more than 4300 digits is a plain ValueError
        return f"not JSON ({error})"
    return row if isinstance(row, dict) else f"holds {type(row).__name__}, expected an object"


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered objects of a file of JSON lines, plain or gzipped.

    Raises:
        DataError: if the file is missing or empty, or at the first line that is no JSON object.
    """
    if not path.is_file():
        raise DataError(f"no data file at {path}; expected JSON lines")
    number = 0
    for number, row in _of_lines(path):
        if isinstance(row, str):
            raise DataError(f"{path}: line {number}: {row}")
        yield number, row
    if not number:
        raise DataError(f"{path} holds no lines; expected at least one JSON object")

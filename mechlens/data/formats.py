"""Rows of a user's data: text files (`text_rows`), Parquet, folders of these, saved datasets, and values.

A row has a place, and its fields or a fault. A value is a table or a list of dicts in memory. Files are only
read as data and in pieces: no script of a folder is run, nothing is unpickled, and a small file that unpacks
to a large one is refused before it fills the memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mechlens.core.errors import DataError
from mechlens.data.compressed import OTHER_KINDS, PACKINGS, ending_of
from mechlens.data.faults import Fault, Place
from mechlens.data.fields import Fields, columns_of, listed
from mechlens.data.text_rows import explain_damage, rows_of_text

EXPECTED = 'JSON lines, a JSON array, CSV or Parquet of {"prompt", "completion"} or {"messages"}'
PIECE = 32
"""rows that Arrow unpacks at once; a text that is stored once may be in every row of a small file"""
MOST_UNPACKED, STEEPEST = 1 << 24, 500
"""a column of a row group may unpack to this many bytes, or to this many times its packed size"""
LONGEST_TEXT = 4_000_000
"""bytes; a million characters, the limit of a pair, take no more"""
SHARDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""endings of the files of a folder that are read; a text file may also be compressed"""
_METADATA = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "metadata.json",
    "manifest.json",
)
_NO_DATA = (
    ".md", ".rst", ".html", ".py", ".sh", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".lock", ".log", ".crc",
    ".md5", ".sha256", ".png", ".svg", ".jpg", ".manifest.json", ".bad.jsonl",
)  # fmt: skip
_PAPERS = ("readme", "license", "licence", "notice", "citation", "changelog", "authors", "copying")


class Texts(NamedTuple):
    """Prompts and completions of rows that follow each other."""

    prompts: list[str]
    completions: list[str]

    def longest(self) -> int:
        """A number of characters that no pair exceeds."""
        return max(map(len, self.prompts), default=0) + max(map(len, self.completions), default=0)


Rows = Iterator[tuple[Place, dict[str, Any] | Fault | Texts]]
"""each row's place with its fields or its fault; or the place of the first of many rows, with their texts"""


@runtime_checkable
class HasFrame(Protocol):
    """A table that can be a DataFrame, such as a `datasets.Dataset`."""

    def to_pandas(self) -> Any:
        """The table as a DataFrame."""
        ...


Data = Path | str | pd.DataFrame | HasFrame | Iterable[Mapping[str, Any]]
"""pairs: a path, a DataFrame, a `datasets.Dataset`, or dicts"""


LONGEST_SHOWN = 500
"""characters of a path in a message"""


class Files(NamedTuple):
    """The files with the rows of a path, in reading order, and the files of the folder that are not read."""

    read: list[Path]
    left_out: list[str]
    """names of the files that are not read"""


def files_of(path: Path) -> Files:
    """The files that are read for a path: a file, a folder, or a pattern such as `data/*.parquet`.

    Raises:
        DataError: if there is no such file, or the path is a folder with a file that may have rows and
            cannot be read.
    """
    try:
        if path.is_dir():
            return Files(_files_of_saved(path), []) if _is_saved(path) else _shards_of(path)
        files = [path] if path.is_file() else _matches(path)
    except OSError as error:  # such as a text in place of a path: its name is too long
        raise DataError(
            f"{str(path)[:LONGEST_SHOWN]!r} cannot be opened ({error.strerror}); expected {EXPECTED}"
        ) from error
    if not files:
        raise DataError(f"no data file at {path} on this machine; expected {EXPECTED}")
    return Files(files, [])


def _matches(pattern: Path) -> list[Path]:
    """The files of a folder whose names match a pattern, which has `*`, `?` or `[`."""
    if not any(sign in pattern.name for sign in "*?[") or not pattern.parent.is_dir():
        return []
    names = sorted(file for file in pattern.parent.iterdir() if fnmatchcase(file.name, pattern.name))
    return [file for file in names if file.is_file() and not file.name.startswith(".")]  # as a shell does


def rows_of(path: Path, fields: Fields | None = None) -> Rows:
    """The rows of a file or folder, with their places; many rows at once where a table has only their texts.

    Places are numbered from 1, and blank lines count; in a folder of shards, each shard begins again at 1.

    Args:
        fields: the columns that the user named for the pairs of a table.

    Raises:
        DataError: if the path is missing or damaged, has other columns, or is not a data file.
    """
    files = files_of(path)
    if path.is_file():
        yield from _of_file(path, fields)
    elif _is_saved(path):
        yield from _of_saved(path, fields)
    else:
        for shard in files.read:
            for place, row in _of_file(shard, fields):
                yield Place(place.number, place.unit, shard.name), row


def text_fields_of(path: Path) -> list[str]:
    """The names of the fields or columns that contain texts, by the file's first row or its schema.

    Raises:
        DataError: if the file cannot be read.
    """
    file = files_of(path).read[0]
    if ending_of(file)[0] == ".parquet":
        with explain_damage(file, "Parquet"), pq.ParquetFile(file) as table:
            return [str(field.name) for field in table.schema_arrow if _is_text(field.type)]
    row = next((row for _, row in _of_file(file, None) if isinstance(row, dict)), {})
    return [name for name, value in row.items() if isinstance(value, str)]


def _of_file(path: Path, fields: Fields | None) -> Rows:
    ending, packing = ending_of(path)
    if ending in OTHER_KINDS:
        raise DataError(
            f"{path} cannot be read as UTF-8 text: by its name it is {OTHER_KINDS[ending]}; "
            f"expected {EXPECTED}"
        )
    if ending == ".parquet" and packing:
        raise DataError(f"{path} is {PACKINGS[packing]} Parquet, which compresses itself; unpack it first")
    return _of_parquet(path, fields) if ending == ".parquet" else rows_of_text(path)


def _shards_of(folder: Path) -> Files:
    read: list[Path] = []
    left_out: list[str] = []
    unread: list[str] = []
    for file in sorted(folder.iterdir()):
        ending, packing = ending_of(file)
        if _is_no_data(file):
            left_out.append(file.name)
        elif file.is_dir():
            unread.append(f"{file.name} (a folder)")
        elif ending in SHARDS and not (ending == ".parquet" and packing):
            read.append(file)
        else:
            unread.append(f"{file.name} ({OTHER_KINDS.get(ending, 'of an unknown form')})")
    if unread:
        shown = ", ".join(unread[:10]) + (f" and {len(unread) - 10:,} more" if len(unread) > 10 else "")
        what_to_do = (
            f"only files ending in {', '.join(SHARDS)} are read; "
            "move the others out of the folder, or name one file or folder in it"
        )
        what = "files that cannot be read" if read else "no JSON lines, CSV or Parquet in it, but"
        raise DataError(f"the folder {folder} has {what}: {shown}; {what_to_do}")
    if not read:
        raise DataError(
            f"the folder {folder} is not a saved dataset and has no JSON lines, "
            f"CSV or Parquet in it (files ending in {', '.join(SHARDS)})"
        )
    return Files(read, left_out)


def _is_no_data(file: Path) -> bool:
    name = file.name.lower()
    if name.startswith((".", "_")):
        return True
    return not file.is_dir() and (
        name.endswith(_NO_DATA) or name in _METADATA or name.split(".")[0] in _PAPERS
    )


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _files_of_saved(folder: Path) -> list[Path]:
    """The files that `load_from_disk` reads: the descriptions, and the tables that `state.json` names."""
    try:
        state = (
            json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if (folder / "state.json").is_file()
            else {}
        )
        names = [str(file["filename"]) for file in state["_data_files"]] if "_data_files" in state else []
    except (ValueError, LookupError, TypeError, RecursionError):
        names = []  # a damaged state.json is refused where the rows are read
    described = ("dataset_dict.json", "dataset_info.json", "state.json", *names)
    return sorted(file for name in dict.fromkeys(described) if (file := folder / Path(name).name).is_file())


def _of_saved(path: Path, fields: Fields | None) -> Rows:
    import datasets

    # a changed state.json leads to these errors
    with explain_damage(path, "a saved dataset", ValueError, LookupError, TypeError, AttributeError):
        saved = datasets.load_from_disk(path)
    if isinstance(saved, datasets.DatasetDict):
        raise DataError(
            f"{path} has the splits {list(saved)}; "
            f"name the folder of one of them, for example {path}/{next(iter(saved), 'train')}"
        )
    for file in saved.cache_files:  # the dataset's own list of them may name any file of this machine
        if Path(file["filename"]).parent.resolve() != path.resolve():
            raise DataError(
                f"the saved dataset {path} names {file['filename']}, which is not in its folder; "
                "save the dataset again"
            )
    columns = _columns(path, saved.column_names, fields)
    yield from _of_arrow(path, saved.select_columns(columns).with_format("arrow").iter(PIECE), fields)


def _of_parquet(path: Path, fields: Fields | None) -> Rows:
    with explain_damage(path, "Parquet"), pq.ParquetFile(path) as file:
        columns = _columns(path, file.schema_arrow.names, fields)
        longest = _longest_shared_text(path, file, columns)
        if longest > LONGEST_TEXT:
            raise DataError(
                f"{path} holds a text of {longest:,} bytes; no text of a training pair is as long. Remove it"
            )
        # two pieces are in memory while the next one is unpacked
        rows = max(1, min(PIECE, MOST_UNPACKED // (2 * max(longest, 1))))
        # threads would take ten times as long for so few rows
        yield from _of_arrow(path, file.iter_batches(rows, columns=columns, use_threads=False), fields)


def _longest_shared_text(path: Path, file: pq.ParquetFile, columns: list[str]) -> int:
    """Bytes of the longest text that is stored once and unpacked for many rows; 0 if no such text is long.

    Raises:
        DataError: if a column would unpack to too many times its size.
    """
    longest = 0
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        wanted = [
            packed
            for packed in map(group.column, range(group.num_columns))
            if packed.path_in_schema.split(".")[0] in columns
        ]
        for packed in wanted:
            size = packed.total_uncompressed_size
            if size > max(MOST_UNPACKED, STEEPEST * packed.total_compressed_size):
                raise DataError(
                    f"{path} would unpack {packed.total_compressed_size:,} bytes to {size:,}, "
                    "more than texts of training pairs need; use another file"
                )
        large = [
            packed.path_in_schema
            for packed in wanted
            if packed.has_dictionary_page and packed.total_uncompressed_size > MOST_UNPACKED // PIECE
        ]
        if large:
            with pq.ParquetFile(path, read_dictionary=large) as coded:
                first = next(coded.iter_batches(1, row_groups=[number], columns=columns), None)
            for texts in (texts for array in first or () for texts in _dictionaries(array)):
                longest = max([longest, *pc.call_function("binary_length", [texts.drop_null()]).to_pylist()])
    return longest


def _dictionaries(array: pa.Array) -> Iterator[pa.Array]:
    """The dictionaries of an array's codes, at any depth."""
    if isinstance(array, pa.DictionaryArray):
        yield array.dictionary
    elif isinstance(array, pa.StructArray):
        for number in range(array.type.num_fields):
            yield from _dictionaries(array.field(number))
    elif isinstance(array, pa.ListArray | pa.LargeListArray):
        yield from _dictionaries(array.values)


def _columns(path: Path, names: list[str], fields: Fields | None) -> list[str]:
    """The columns of a table that are read."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path} has the columns {listed(twice)} twice; give each column a different name")
    try:
        return columns_of(names, fields)
    except DataError as error:
        raise DataError(f"{path} {error}") from error


def _of_arrow(path: Path, pieces: Iterable[pa.Table | pa.RecordBatch], fields: Fields | None) -> Rows:
    number = 1
    with explain_damage(path, "a table of texts"):
        for piece in pieces:
            if (texts := _texts_of(piece, fields)) is not None:
                yield Place(number), texts
            else:
                yield from ((Place(at), row) for at, row in enumerate(piece.to_pylist(), number))
            number += piece.num_rows


def _texts_of(piece: pa.Table | pa.RecordBatch, fields: Fields | None) -> Texts | None:
    """The columns of a table if they are two of texts without nulls, the prompts and the completions."""
    names = piece.schema.names
    pair = fields[:2] if fields and fields.stand_in(names) else ("prompt", "completion")
    columns = [piece.column(name) for name in pair] if sorted(names) == sorted(pair) else []
    if not columns or any(column.null_count or not _is_text(column.type) for column in columns):
        return None
    return Texts(*(column.to_pylist() for column in columns))


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a text file with their numbers: JSON lines, an array or CSV, also compressed.

    Raises:
        DataError: if the file is missing or empty, or at the first row that is not a JSON object.
    """
    if not path.is_file():
        raise DataError(f"no data file at {path}; expected JSON lines")
    empty = True
    for place, row in rows_of_text(path):
        if isinstance(row, Fault):
            raise DataError(f"{path}: {place}: {row}")
        empty = False
        yield place.number, row
    if empty:
        raise DataError(f"{path} holds no lines; expected at least one JSON object")


def file_digest(path: Path) -> str:
    """SHA-256 of a user's file, or of the files of a folder or pattern that have its rows, by name."""
    digest = hashlib.sha256()
    for file in files_of(path).read:
        with file.open("rb") as handle:
            digest.update(b"" if path.is_file() else hashlib.file_digest(handle, "sha256").digest())
            while path.is_file() and (piece := handle.read(1 << 24)):
                digest.update(piece)
    return digest.hexdigest()


def rows_of_values(
    data: pd.DataFrame | HasFrame | Iterable[Mapping[str, Any]], fields: Fields | None
) -> Rows:
    """The rows of a value, counted from 0 as Python does.

    Raises:
        DataError: if a table has no columns for pairs, or the value is neither a table nor dicts.
    """
    table = data.to_pandas() if isinstance(data, HasFrame) else data
    if isinstance(table, pd.DataFrame):
        names = [str(name) for name in table.columns]
        try:
            columns = columns_of(names, fields)
        except DataError as error:
            raise DataError(f"the table {error}") from error
        if twice := sorted({name for name in columns if names.count(name) > 1}):
            raise DataError(f"the table has the columns {twice} twice; give each column a different name")
        yield from _placed(_records(table.set_axis(names, axis=1), columns))
    elif isinstance(table, str | bytes | Mapping) or not isinstance(table, Iterable):
        raise DataError(
            f"a value of type {type(table).__name__} has no pairs; expected a path, a DataFrame, a "
            "datasets.Dataset or a list of dicts"
        )
    else:
        yield from _placed(table)


def _placed(rows: Iterable[object]) -> Rows:
    for number, row in enumerate(rows):
        place = Place(number, "index")
        if isinstance(row, Mapping):
            yield place, {str(name): _plain(value) for name, value in row.items()}
        else:
            yield place, Fault("is no dict of fields", type(row).__name__)


def _records(table: pd.DataFrame, columns: list[str]) -> Iterator[dict[str, Any]]:
    for values in zip(*(table[name].tolist() for name in columns), strict=True):
        yield dict(zip(columns, values, strict=True))


def _plain(value: Any) -> Any:
    """A value without pandas' marks for a missing one, and with arrays as lists: lists of messages become
    arrays in a table.
    """
    if isinstance(value, np.ndarray | list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return None if value is pd.NA or (isinstance(value, float) and math.isnan(value)) else value

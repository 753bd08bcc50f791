"""Rows of a user's file, whatever it is packed in: texts (`text_rows`), Parquet, and folders of either or of
Hugging Face datasets.

A row has a place, and its fields or what is wrong with it. Files are read as data alone, piece by piece: no
script of a folder is run, nothing is unpickled, and a small file that would unpack to a large one is refused
before it fills the memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mechlens.core.errors import DataError
from mechlens.data.compressed import OTHER_KINDS, PACKINGS, ending_of
from mechlens.data.faults import Fault, Place
from mechlens.data.fields import Fields, columns_of, listed
from mechlens.data.text_rows import Rows, damage_named, rows_of_text

EXPECTED = 'JSON lines, a JSON array, CSV or Parquet of {"prompt", "completion"} or {"messages"}'
PIECE = 32  # rows that Arrow unpacks at once: one text, stored once, may stand in every row of a small file
MOST_UNPACKED, STEEPEST = (
    1 << 24,
    500,
)  # bytes that a column of a row group may always unpack to; beyond, times its packed size
LONGEST_TEXT = 4_000_000  # bytes: a million characters, as many as a pair may have, take no more
SHARDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""what the files of a folder that are read end in; a text may be compressed"""
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


class Files(NamedTuple):
    """The files that hold the rows of a path, in the order in which they are read, and what lies beside them
    and is not.
    """

    read: list[Path]
    left_out: list[str]
    """names"""


def files_of(path: Path) -> Files:
    """Which files are read for a path.

    Raises:
        DataError: if it is missing, or a folder with files that may hold rows and cannot be read.
    """
    if path.is_dir():
        return Files(_files_of_saved(path), []) if _is_saved(path) else _shards_of(path)
    if not path.is_file():
        raise DataError(f"no data file at {path} on this machine; expected {EXPECTED}")
    return Files([path], [])


def rows_of(path: Path, fields: Fields | None = None) -> Rows:
    """The rows of a file or folder, counted from 1 with the blank lines; in a folder of shards each shard by
    itself.

    Args:
        fields: of a table, the columns that a user named for its pairs.

    Raises:
        DataError: if it is missing or damaged, has other columns, or is no data at all.
    """
    files = files_of(path)
    if not path.is_dir():
        yield from _of_file(path, fields)
    elif _is_saved(path):
        yield from _of_saved(path, fields)
    else:
        for shard in files.read:
            for place, row in _of_file(shard, fields):
                yield place._replace(file=shard.name), row


def text_fields_of(path: Path) -> list[str]:
    """The names of the fields or columns that hold texts, as a file's first rows have them.

    Raises:
        DataError: if the file cannot be read.
    """
    file = files_of(path).read[0]
    if ending_of(file)[0] == ".parquet":
        with damage_named(file, "Parquet"), pq.ParquetFile(file) as table:
            return [
                str(field.name)
                for field in table.schema_arrow
                if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
            ]
    row = next((row for _, row in _of_file(file, None) if not isinstance(row, Fault)), {})
    return [name for name, value in row.items() if isinstance(value, str)]


def _of_file(path: Path, fields: Fields | None) -> Rows:
    ending, packing = ending_of(path)
    if ending in OTHER_KINDS:
        raise DataError(
            f"{path} cannot be read as UTF-8 text: its name says that it is {OTHER_KINDS[ending]}; expected "
            f"{EXPECTED}"
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
        least = (
            f"read are files ending in {', '.join(SHARDS)}; move the others out of it, or name one file "
            "or folder of it"
        )
        what = "files that cannot be read" if read else "no JSON lines, CSV or Parquet in it, but"
        raise DataError(f"the folder {folder} has {what}: {shown}; {least}")
    if not read:
        raise DataError(
            f"the folder {folder} is no saved dataset and has no JSON lines, CSV or Parquet in it (files "
            f"ending in {', '.join(SHARDS)})"
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
    """What `load_from_disk` reads: the two descriptions, and the tables that one of them names."""
    try:
        state = (
            json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if (folder / "state.json").is_file()
            else {}
        )
        names = [str(file["filename"]) for file in state["_data_files"]] if "_data_files" in state else []
    except (
        ValueError,
        LookupError,
        TypeError,
        RecursionError,
    ):  # damaged: said in full where its rows are read
        names = []
    described = ("dataset_dict.json", "dataset_info.json", "state.json", *names)
    return sorted(file for name in dict.fromkeys(described) if (file := folder / Path(name).name).is_file())


def _of_saved(path: Path, fields: Fields | None) -> Rows:
    import datasets

    with damage_named(
        path, "a saved dataset", ValueError, LookupError, TypeError, AttributeError
    ):  # what a changed state.json leads to
        saved = datasets.load_from_disk(path)
    if isinstance(saved, datasets.DatasetDict):
        raise DataError(
            f"{path} holds the splits {list(saved)}; name the folder of one, for example "
            f"{path}/{next(iter(saved), 'train')}"
        )
    for file in saved.cache_files:  # the dataset's own list of them may name any file of this machine
        if Path(file["filename"]).parent.resolve() != path.resolve():
            raise DataError(
                f"the saved dataset {path} names {file['filename']}, which is not in its folder; save it "
                "again as it is now"
            )
    columns = _columns(path, saved.column_names, fields)
    yield from _of_arrow(path, saved.select_columns(columns).with_format("arrow").iter(PIECE))


def _of_parquet(path: Path, fields: Fields | None) -> Rows:
    with damage_named(path, "Parquet"), pq.ParquetFile(path) as file:
        columns = _columns(path, file.schema_arrow.names, fields)
        longest = _longest_shared_text(path, file, columns)
        if longest > LONGEST_TEXT:
            raise DataError(
                f"{path} holds a text of {longest:,} bytes; no text of a training pair is as long. Leave it "
                "out"
            )
        yield from _of_arrow(
            path, file.iter_batches(max(1, min(PIECE, MOST_UNPACKED // max(longest, 1))), columns=columns)
        )


def _longest_shared_text(path: Path, file: pq.ParquetFile, columns: list[str]) -> int:
    """Bytes of the longest text that is stored once for many rows, and would be unpacked for each; 0 if none
    can be long.

    Raises:
        DataError: if a column would unpack too far even so.
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
                    f"{path} would unpack {packed.total_compressed_size:,} bytes to {size:,}; no texts of "
                    "training pairs do"
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
    """The texts that an array's codes stand for, at any depth."""
    if isinstance(array, pa.DictionaryArray):
        yield array.dictionary
    elif isinstance(array, pa.StructArray):
        for number in range(array.type.num_fields):
            yield from _dictionaries(array.field(number))
    elif isinstance(array, pa.ListArray | pa.LargeListArray):
        yield from _dictionaries(array.values)


def _columns(path: Path, names: list[str], fields: Fields | None) -> list[str]:
    """Which of a table's columns are to be read."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path} has the columns {listed(twice)} twice; give each column a name of its own")
    try:
        return columns_of(names, fields)
    except DataError as error:
        raise DataError(f"{path} {error}") from error


def _of_arrow(path: Path, pieces: Iterable[pa.Table | pa.RecordBatch]) -> Rows:
    with damage_named(path, "a table of texts"):
        for number, row in enumerate((row for piece in pieces for row in piece.to_pylist()), 1):
            yield Place(number), row


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered objects of a text file: JSON lines, an array or CSV, however compressed.

    Raises:
        DataError: if the file is missing or empty, or at the first row that is no JSON object.
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
    """SHA-256 of a user's file, read in pieces; of a folder's files that hold its rows, in order of their
    names, and of no others.
    """
    digest = hashlib.sha256()
    for file in files_of(path).read:
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest() if path.is_dir() else b"")
            while path.is_file() and (piece := handle.read(1 << 24)):
                digest.update(piece)
    return digest.hexdigest()

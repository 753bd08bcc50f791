"""Rows of a text file: JSON lines, one JSON array of objects, or CSV with named columns.

Only one row at a time is in memory.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from mechlens.core.errors import DataError
from mechlens.data import compressed
from mechlens.data.faults import Fault, Place

LONGEST_LINE = 8_000_000
"""characters of the longest pair with every character escaped; a longer line could fill the memory"""
_PIECE, _LONGEST_TOKEN = 1 << 16, 16
"""characters that are read at once, and the most of a token that a part of a JSON text may cut in two"""
_CSV = {".csv": ",", ".tsv": "\t"}

Rows = Iterator[tuple[Place, dict[str, Any] | Fault]]
"""each row's place with its fields or its fault"""


def rows_of_text(path: Path) -> Rows:
    """The rows of a text file, read as CSV or JSON by the ending of its name.

    JSON is read as an array if it begins with `[{`, else as JSON lines.

    Raises:
        DataError: if it is damaged, not UTF-8 or not CSV, or if a row is longer than `LONGEST_LINE`.
    """
    ending = compressed.ending_of(path)[0]
    with explain_damage(path, compressed.form_of_text(path), text=True):
        if ending in _CSV:
            with compressed.text_of(path, newline="") as text:
                yield from _of_csv(path, text, _CSV[ending])
            return
        array = _opens_array(path)
        with compressed.text_of(path) as text:
            yield from _of_array(path, text) if array else _of_lines(path, text)


def _opens_array(path: Path) -> bool:
    """Whether a text begins with an array of objects; a list of other values is a bad line of JSON lines."""
    with compressed.text_of(path) as text:
        start = text.read(_PIECE).lstrip()
    return start.startswith("[") and start[1:].lstrip().startswith("{")


@contextmanager
def explain_damage(path: Path, form: str, *more: type[Exception], text: bool = False) -> Iterator[None]:
    """Turn the errors of a damaged file into one line, with the file's kind if it should be text.

    Args:
        form: what the file is read as.
        more: further classes of errors that damage leads to.
        text: whether the file should be a text.
    """
    try:
        yield
    except (
        OSError,
        EOFError,
        zlib.error,
        lzma.LZMAError,
        UnicodeDecodeError,
        pa.ArrowException,
        *more,
    ) as error:
        kind = compressed.kind_of_bytes(path) if text and isinstance(error, UnicodeDecodeError) else ""
        raise DataError(f"{path} cannot be read as {form}: {f'it is {kind}' if kind else error}") from error


def _lines(path: Path, text: io.TextIOWrapper) -> Iterator[str]:
    for number in itertools.count(1):
        line = text.readline(LONGEST_LINE + 1)
        if len(line) > LONGEST_LINE:
            raise DataError(
                f"{path}: line {number} is longer than {LONGEST_LINE:,} characters; "
                "no training pair is as long. Delete it"
            )
        if not line:
            return
        yield line


def _of_lines(path: Path, text: io.TextIOWrapper) -> Rows:
    for number, line in enumerate(_lines(path, text), 1):
        if line.strip():
            row = _object_of(line)
            if isinstance(row, Fault) and not line.endswith("\n"):
                cut = "the file ends within this line and may have been cut off"
                row = row._replace(detail=f"{cut}; {row.detail}" if row.detail else cut)
            yield Place(number), row


def _once(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object from its fields; raises ValueError for a repeated key, which readers treat differently."""
    row = dict(fields)
    if len(row) < len(fields):
        names = [name for name, _ in fields]
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ValueError(f"the key {twice[:50]!r} is twice in an object")
    return row


DECODER = json.JSONDecoder(object_pairs_hook=_once)
"""raises ValueError for an object with a repeated key"""
_LENIENT = json.JSONDecoder(parse_int=str)


def _object_of(line: str) -> dict[str, Any] | Fault:
    try:
        row = DECODER.decode(line)
    except (ValueError, RecursionError) as error:  # an integer of more than 4300 digits is a plain ValueError
        return Fault("not JSON", str(error))
    return row if isinstance(row, dict) else _no_object(row)


def _no_object(row: object) -> Fault:
    return Fault(f"holds {type(row).__name__}, expected an object")


def _of_array(path: Path, text: io.TextIOWrapper) -> Rows:
    """The elements of one JSON array, decoded in turn from a buffer of little more than one element."""
    buffer = _Buffer(path, text)
    buffer.expect("[")
    for number in itertools.count(1):
        place = Place(number, "element")
        yield place, buffer.element(place)
        if buffer.expect(",", "]") == "]":
            break
    if rest := buffer.next_character():
        raise DataError(
            f"{path}: {rest!r} comes after the end of the JSON array; expected one array and nothing else"
        )


class _Buffer:
    """The part of a JSON text in memory that is not yet decoded."""

    def __init__(self, path: Path, text: io.TextIOWrapper) -> None:
        self._path, self._text = path, text
        self._loaded, self._at, self._whole = "", 0, False

    def _more(self) -> None:
        """Double the part in memory, so that a long element is tried only a few times."""
        piece = self._text.read(max(_PIECE, len(self._loaded) - self._at))
        self._loaded, self._at, self._whole = self._loaded[self._at :] + piece, 0, not piece

    def next_character(self) -> str:
        """The next character that is not white space, without taking it; empty at the end of the text."""
        while True:
            while self._at < len(self._loaded) and self._loaded[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._loaded) or self._whole:
                return self._loaded[self._at : self._at + 1]
            self._more()

    def expect(self, *characters: str) -> str:
        """Take the next character.

        Raises:
            DataError: if it is not one of these characters.
        """
        character = self.next_character()
        if character not in characters:
            raise DataError(
                f"{self._path} is not a complete JSON array: "
                f"it has {character or 'its end'!r}, expected {' or '.join(characters)}"
            )
        self._at += 1
        return character

    def element(self, place: Place) -> dict[str, Any] | Fault:
        """Take one element.

        Raises:
            DataError: if it is not JSON, since the start of the next element is then unknown.
        """
        self.next_character()
        while True:
            try:
                row, end = self._decoded()
            except (ValueError, RecursionError) as error:
                broken = self._whole or isinstance(error, RecursionError) or self._is_broken(error)
                if not broken and len(self._loaded) - self._at > LONGEST_LINE:
                    limit = f"{LONGEST_LINE:,} characters; no training pair is as long. Delete it"
                    raise DataError(f"{self._path}: {place} is longer than {limit}") from error
                if broken:
                    raise DataError(
                        f"{self._path}: {place}: not JSON ({error}); "
                        "repair it, since no row after it can be read"
                    ) from error
            else:
                if (
                    end < len(self._loaded) or self._whole
                ):  # a number at the end of the loaded part may continue
                    self._at = end
                    return row
            self._more()

    def _is_broken(self, error: Exception) -> bool:
        """Whether no further text could mend the element: its fault lies well before the loaded end."""
        return (
            isinstance(error, json.JSONDecodeError)
            and not error.msg.startswith("Unterminated")
            and error.pos + _LONGEST_TOKEN < len(self._loaded)
        )

    def _decoded(self) -> tuple[dict[str, Any] | Fault, int]:
        try:
            row, end = DECODER.raw_decode(self._loaded, self._at)
        except json.JSONDecodeError:
            raise
        except ValueError as error:  # a repeated key or a too long number: bad, but its end is known
            return Fault("not JSON", str(error)), _LENIENT.raw_decode(self._loaded, self._at)[1]
        return (row if isinstance(row, dict) else _no_object(row)), end


def _of_csv(path: Path, text: io.TextIOWrapper, mark: str) -> Rows:
    """Rows of a table with the names of its columns in the first line; every cell is a text."""
    lines, blank = _lines(path, text), 0
    while (header := next(lines, "")) and not header.strip():
        blank += 1  # lines before the header, which the reader of CSV does not count
    if mark == "," and mark not in header:  # spreadsheets with a decimal comma write semicolons
        mark = next((other for other in ";\t" if other in header), mark)
    csv.field_size_limit(LONGEST_LINE)  # by default Python refuses a cell of more than 131,072 characters
    reader = csv.reader(itertools.chain([header], lines), delimiter=mark, strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(
                f"{path}: the columns {twice} are twice in line {blank + 1}; give each another name"
            )
        start = blank + reader.line_num
        for cells in reader:
            place, start = Place(start + 1), blank + reader.line_num
            if cells:
                yield place, _row_of_cells(names, cells)
    except csv.Error as error:
        raise DataError(
            f"{path}: line {blank + reader.line_num} is not CSV ({error}); repair it, or write the file as "
            "JSON lines"
        ) from error


def _row_of_cells(names: list[str], cells: list[str]) -> dict[str, Any] | Fault:
    if len(cells) != len(names):
        counts = f"{len(cells)} and {len(names)}"
        return Fault("has another number of cells than the first line", counts)
    if any("\0" in cell for cell in cells):
        return Fault("holds a NUL character")
    return dict(zip(names, cells, strict=True))

"""Rows of a text file: JSON lines, one JSON array of objects, or CSV with named columns. No more than a row
is ever in memory.
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

LONGEST_LINE = (
    8_000_000  # holds the longest pair with every character escaped; a longer line must not fill the memory
)
_PIECE = 1 << 16
_CSV = {".csv": ",", ".tsv": "\t"}

Rows = Iterator[tuple[Place, dict[str, Any] | Fault]]
"""each row's place with its fields, or with why it has none"""


def rows_of_text(path: Path) -> Rows:
    """The rows of a text file by what its name ends in; an array is known by its first two signs.

    Raises:
        DataError: if it is damaged, no UTF-8, no CSV, or if a row is longer than `LONGEST_LINE` characters.
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
    """Whether a text begins as an array of objects does; a list in a line of its own is a bad line of JSON
    lines.
    """
    with compressed.text_of(path) as text:
        start = text.read(_PIECE).lstrip()
    return start.startswith("[") and start[1:].lstrip().startswith("{")


@contextmanager
def explain_damage(path: Path, form: str, *more: type[Exception], text: bool = False) -> Iterator[None]:
    """Turn what a damaged file leads to into one line; of a file that should be text and is none, say what it
    is.
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
                f"{path}: line {number} is longer than {LONGEST_LINE:,} characters; no training pair is. "
                "Delete it"
            )
        if not line:
            return
        yield line


def _of_lines(path: Path, text: io.TextIOWrapper) -> Rows:
    for number, line in enumerate(_lines(path, text), 1):
        if line.strip():
            yield Place(number), _object_of(line)


def _once(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ: of two values under one key, readers take different ones."""
    row: dict[str, Any] = {}
    for name, value in fields:
        if name in row:
            raise ValueError(f"the key {name[:50]!r} stands twice in an object")
        row[name] = value
    return row


DECODER = json.JSONDecoder(object_pairs_hook=_once)
"""refuses an object that has a key twice, with a ValueError"""
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
    """The elements of one JSON array, decoded one after the other from a buffer that holds little more than
    one of them.
    """
    buffer = _Buffer(path, text)
    buffer.expect("[")
    for number in itertools.count(1):
        place = Place(number, "element")
        yield place, buffer.element(place)
        if buffer.expect(",", "]") == "]":
            break
    if rest := buffer.next_sign():
        raise DataError(
            f"{path}: {rest!r} stands behind the end of the JSON array; expected one array and nothing else"
        )


class _Buffer:
    """The unread rest of a JSON text, as far as it is in memory."""

    def __init__(self, path: Path, text: io.TextIOWrapper) -> None:
        self._path, self._text = path, text
        self._held, self._at, self._whole = "", 0, False

    def _more(self) -> None:
        """Read as much again as is held, so that a long element is tried a few times only."""
        piece = self._text.read(max(_PIECE, len(self._held) - self._at))
        self._held, self._at, self._whole = self._held[self._at :] + piece, 0, not piece

    def next_sign(self) -> str:
        """The next sign that is no space, not taken; empty at the end of the text."""
        while True:
            while self._at < len(self._held) and self._held[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._held) or self._whole:
                return self._held[self._at : self._at + 1]
            self._more()

    def expect(self, *signs: str) -> str:
        """Take the next sign.

        Raises:
            DataError: if it is none of these.
        """
        sign = self.next_sign()
        if sign not in signs:
            raise DataError(
                f"{self._path} is no whole JSON array: it has {sign or 'its end'!r} where "
                f"{' or '.join(signs)} should stand"
            )
        self._at += 1
        return sign

    def element(self, place: Place) -> dict[str, Any] | Fault:
        """Take one element.

        Raises:
            DataError: if it is no JSON: where it ends, and the next begins, cannot be told.
        """
        self.next_sign()
        while True:
            try:
                row, end = self._decoded()
            except (ValueError, RecursionError) as error:
                if len(self._held) - self._at > LONGEST_LINE:
                    longest = f"longer than {LONGEST_LINE:,} characters; no training pair is. Delete it"
                    raise DataError(f"{self._path}: {place} is {longest}") from error
                if self._whole or isinstance(error, RecursionError):
                    raise DataError(
                        f"{self._path}: {place}: not JSON ({error}); mend it, since no row behind it can be "
                        "read"
                    ) from error
            else:
                if end < len(self._held) or self._whole:  # a number at the end of what is held may go on
                    self._at = end
                    return row
            self._more()

    def _decoded(self) -> tuple[dict[str, Any] | Fault, int]:
        try:
            row, end = DECODER.raw_decode(self._held, self._at)
        except json.JSONDecodeError:
            raise
        except (
            ValueError
        ) as error:  # a key twice, or a number too long: the element is bad, and it is known where it ends
            return Fault("not JSON", str(error)), _LENIENT.raw_decode(self._held, self._at)[1]
        return (row if isinstance(row, dict) else _no_object(row)), end


def _of_csv(path: Path, text: io.TextIOWrapper, mark: str) -> Rows:
    """Rows of a table whose first line names its columns; every cell is a text."""
    lines = _lines(path, text)
    header = next((line for line in lines if line.strip()), "")
    if mark == "," and mark not in header:  # as spreadsheets of half of Europe write it
        mark = next((other for other in ";\t" if other in header), mark)
    reader = csv.reader(itertools.chain([header], lines), delimiter=mark, strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(
                f"{path}: the columns {twice} stand twice in line 1; give each column a name of its own"
            )
        start = reader.line_num
        for cells in reader:
            place, start = Place(start + 1), reader.line_num
            if len(cells) == len(names):
                yield (
                    place,
                    dict(zip(names, cells, strict=True))
                    if not any("\0" in cell for cell in cells)
                    else Fault("holds a NUL sign"),
                )
            elif cells:
                yield (
                    place,
                    Fault(
                        "has another number of cells than the first line", f"{len(cells)} and {len(names)}"
                    ),
                )
    except csv.Error as error:
        raise DataError(
            f"{path}: line {reader.line_num} is no CSV ({error}); mend it, or write the file as JSON lines"
        ) from error

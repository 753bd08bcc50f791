"""Opens text files, plain or compressed, and names the kind of other files.

Files in gzip, bzip2, xz and Zstandard are unpacked in pieces.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

PACKINGS = {".gz": "gzipped", ".bz2": "bzip2-compressed", ".xz": "xz-compressed", ".zst": "zstd-compressed"}
"""ending of a compressed file → its description in messages"""
OTHER_KINDS = {
    ".xlsx": "an Excel workbook", ".xls": "an Excel workbook", ".ods": "a spreadsheet",
    ".zip": "a zip archive", ".tar": "a tar archive", ".tgz": "a tar archive", ".7z": "an archive",
    ".rar": "an archive", ".pkl": "a pickle", ".pickle": "a pickle", ".joblib": "a pickle",
    ".npy": "a NumPy array", ".npz": "NumPy arrays", ".pt": "a PyTorch file", ".pth": "a PyTorch file",
    ".ckpt": "a checkpoint", ".safetensors": "a file of weights", ".arrow": "an Arrow file",
    ".feather": "an Arrow file", ".ipc": "an Arrow file", ".h5": "an HDF5 file", ".hdf5": "an HDF5 file",
    ".sqlite": "an SQLite database", ".avro": "an Avro file", ".orc": "an ORC file",
    ".msgpack": "a MessagePack file", ".tfrecord": "a TensorFlow file", ".pdf": "a PDF",
    ".docx": "a Word document",
}  # fmt: skip
"""ending of a file that cannot be read → its kind"""
MOST_DICTIONARY = 128 << 20
"""bytes of memory for unpacking an xz file; `xz -9` needs 65 MiB, and a hostile header asks for 4 GiB"""
_SIGNS = (
    (b"\x1f\x8b", "gzip data; let its name end in .gz"), (b"\xfd7zXZ\0", "xz data; let its name end in .xz"),
    (b"\x28\xb5\x2f\xfd", "Zstandard data; let its name end in .zst"),
    (b"BZh", "bzip2 data; let its name end in .bz2"), (b"PAR1", "Parquet; let its name end in .parquet"),
    (b"PK\x03\x04", "a zip archive, as Excel, NumPy and PyTorch write"), (b"ARROW1", "an Arrow file"),
    (b"\x93NUMPY", "a NumPy array"), (b"\x80", "a pickle, or other binary data"), (b"%PDF", "a PDF"),
    (b"\xff\xfe", "UTF-16; save it as UTF-8"), (b"\xfe\xff", "UTF-16; save it as UTF-8"),
)  # fmt: skip
_PIECE = 1 << 16


def ending_of(path: Path) -> tuple[str, str]:
    """The ending of a name for its form and the ending for its compression, in lower case or empty."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packing = suffixes.pop() if suffixes and suffixes[-1] in PACKINGS else ""
    return (suffixes[-1] if suffixes else ""), packing


def form_of_text(path: Path) -> str:
    """The description of a text file of that name in messages, such as `gzipped UTF-8 text`."""
    packing = ending_of(path)[1]
    return f"{PACKINGS[packing]} UTF-8 text" if packing else "UTF-8 text"


@contextmanager
def text_of(path: Path, *, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
    """The text of a file, unpacked as it is read.

    Args:
        newline: as `open` takes it.
    """
    with bytes_of(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", newline=newline) as text:
        yield text


@contextmanager
def bytes_of(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked as they are read."""
    packing = ending_of(path)[1]
    with ExitStack() as stack:
        raw = stack.enter_context(path.open("rb"))
        if packing == ".gz":
            unpacked: BinaryIO = cast(BinaryIO, stack.enter_context(gzip.open(raw)))
        elif packing == ".bz2":
            unpacked = cast(BinaryIO, stack.enter_context(bz2.open(raw)))
        elif packing == ".xz":
            unpacked = stack.enter_context(io.BufferedReader(_Xz(raw), _PIECE))
        elif packing == ".zst":
            unpacked = cast(BinaryIO, stack.enter_context(pa.CompressedInputStream(raw, "zstd")))
        else:
            unpacked = raw
        yield unpacked


class _Xz(io.RawIOBase):
    """Reads xz within `MOST_DICTIONARY`; `lzma.open` takes no limit."""

    def __init__(self, raw: io.BufferedReader) -> None:
        self._raw, self._unpacker, self._started = raw, self._new(), False

    @staticmethod
    def _new() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MOST_DICTIONARY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override]
        while True:
            if self._unpacker.eof:  # one file may hold several streams, with zeros between them
                rest = self._unpacker.unused_data.lstrip(b"\0") or self._raw.read(_PIECE).lstrip(b"\0")
                if not rest:
                    return 0
                self._unpacker = self._new()
            else:
                rest = self._raw.read(_PIECE) if self._unpacker.needs_input else b""
                if self._unpacker.needs_input and not rest:
                    raise EOFError("it ends before its last block does")
            if piece := self._unpacker.decompress(rest, len(buffer)):
                buffer[: len(piece)] = piece
                return len(piece)


def kind_of_bytes(path: Path) -> str:
    """The kind of a file by its first unpacked bytes, and how to read it; empty if it is unknown."""
    with bytes_of(path) as raw:
        first = raw.read(16)
    return next((kind for sign, kind in _SIGNS if first.startswith(sign)), "")

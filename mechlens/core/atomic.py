"""Files that appear whole: a reader, a kill or a power loss finds the old content or the new one, never half
of one.

A rename is atomic for processes that read; on the disk its name can arrive before the content does, unless
that was flushed first.
"""

from __future__ import annotations

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Return once a file, or everything in a folder and the folder itself, is on the disk."""
    for place, folders, files in os.walk(path, topdown=False):  # nothing, of a file
        for name in [*files, *folders]:
            _flush(Path(place) / name)
    _flush(path)


def _flush(path: Path) -> None:
    if path.is_symlink() or not (path.is_file() or path.is_dir()):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(part: Path, path: Path) -> None:
    """Rename a finished file or folder to its name, content first: `path` must be free, or a file that is
    replaced.
    """
    flush(part)
    part.replace(path)
    _flush(path.parent)


def write_text(path: Path, text: str) -> Path:
    """Write a UTF-8 file in one piece, over an older one if there is any."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    publish(part, path)
    return path

"""Write files and folders atomically.

A reader, also after a kill or a power loss, finds the old content or the new content, never a part. A rename
is atomic for other processes; on the disk the name can arrive before the content, so that is flushed first.
"""

from __future__ import annotations

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Return once a file, or everything in a folder and the folder itself, is on the disk."""
    for folder, folders, files in os.walk(path, topdown=False):  # yields nothing for a file
        for name in [*files, *folders]:
            _flush(Path(folder) / name)
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
    """Flush a finished file or folder and rename it to `path`, which is free or a file to replace."""
    flush(part)
    part.replace(path)
    _flush(path.parent)


def write_text(path: Path, text: str) -> Path:
    """Write a UTF-8 file atomically; an older file is replaced."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    publish(part, path)
    return path

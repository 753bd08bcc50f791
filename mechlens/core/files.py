"""Write files atomically, read and write JSON objects, and say how a damaged file is repaired.

A reader, also after a kill or a power loss, finds the old content or the new content, never a part. A rename
is atomic for other processes; on the disk the name can arrive before the content, so that is flushed first.

A message tells the user to delete a file only if mechlens can make it again, and names its run.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from pathlib import Path
from typing import Any

from mechlens.core.command_lines import resume_command
from mechlens.core.errors import DataError, one_line

RECORD = "step.json"
"""file in the folder of a finished step"""
LOCK, SPEC, PANEL = ".lock", "spec.yaml", "panel-"
"""two files of a run folder, and the prefix of an audit's folder of teachers, which has no spec"""


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


LEFTOVERS = f"*.{'[0-9a-f]' * 8}.part"
"""pattern of the files that a kill leaves unfinished"""


def part_of(path: Path) -> Path:
    """A new name next to `path` to write the file under, which no other process uses."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")


def write_text(path: Path, text: str) -> Path:
    """Write a UTF-8 file atomically; an older file is replaced."""
    part = part_of(path)
    part.write_text(text, encoding="utf-8")
    publish(part, path)
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from disk; raises DataError if it is missing or cut short."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"no file at {path}; run the step that writes it") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not whole JSON ({error}); {remedy(path)}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds {type(value).__name__}, expected a JSON object; {remedy(path)}")
    return value


def write_json(path: Path, value: dict[str, Any]) -> Path:
    """Write JSON whole or not at all."""
    return write_text(path, json_text(value))


def json_text(value: dict[str, Any]) -> str:
    """A JSON object as the text of a file; raises ValueError for NaN, which JSON has not."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def null(value: float | None) -> float | None:
    """A number for JSON, which has no NaN: unscored is null."""
    return None if value is None or math.isnan(value) else float(value)


def remedy(path: Path) -> str:
    """How to repair a file or folder that cannot be read, as the end of a message.

    A step outside a run folder is a copy, which mechlens cannot make again.
    """
    absolute = path.absolute()
    run = next((folder for folder in (absolute, *absolute.parents) if _holds_steps(folder)), None)
    if run is None:
        return "mechlens cannot make it again from here: copy it again from where it was made"
    inside = [folder for folder in (absolute, *absolute.parents) if run in folder.parents]
    step = next((folder for folder in inside if (folder / RECORD).is_file()), None)
    again = f"`{resume_command(_as_given(run, path))}`" if (run / SPEC).is_file() else "the same command"
    if step is not None:
        place, of_run = (
            _as_given(step, path),
            f"the step {step.relative_to(run)} of the run {_as_given(run, path)}",
        )
        return one_line(f"it belongs to {of_run}: delete {place} and {again} repeats only that step")
    if absolute.parent == run:
        made_from = f"the steps of the run {_as_given(run, path)}"
        return one_line(f"it was made from {made_from}: delete it and {again} writes it again")
    return one_line(f"it is in the run {_as_given(run, path)}; {again} makes what is missing there")


def _holds_steps(folder: Path) -> bool:
    """Whether the folder is a run or an audit's folder of teachers.

    A lock without a spec is not enough, since other programs leave files of that name.
    """
    return (folder / LOCK).is_file() and ((folder / SPEC).is_file() or folder.name.startswith(PANEL))


def _as_given(folder: Path, path: Path) -> Path:
    """A parent folder of `path`, relative to the working folder if `path` is relative."""
    return (
        folder
        if path.is_absolute() or not folder.is_relative_to(Path.cwd())
        else folder.relative_to(Path.cwd())
    )

"""Advice about damaged files.

A message tells the user to delete a file only if mechlens can make it again, and names its run.
"""

from __future__ import annotations

from pathlib import Path

from mechlens.core.command_lines import resume_command
from mechlens.core.errors import one_line

RECORD = "step.json"
"""file in the folder of a finished step"""
LOCK, SPEC, PANEL = ".lock", "spec.yaml", "panel-"
"""two files of a run folder, and the prefix of an audit's folder of teachers, which has no spec"""


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

"""What to do about a damaged file: only what mechlens can make again is to be deleted, and the message says
of which run it is.
"""

from __future__ import annotations

from pathlib import Path

from mechlens.core.command_lines import resume_command
from mechlens.core.errors import one_line

RECORD = "step.json"
"""file in the folder of a finished step"""
LOCK, SPEC, PANEL = ".lock", "spec.yaml", "panel-"
"""files in a run's folder, and how the name of a folder of an audit's teachers begins, which has no spec"""


def remedy(path: Path) -> str:
    """What mends a file or folder that cannot be read, as the end of a message.

    A step's record without a run around it is a copy, which nothing here makes again.
    """
    absolute = path.absolute()
    run = next((folder for folder in (absolute, *absolute.parents) if _holds_steps(folder)), None)
    if run is None:
        return "mechlens cannot make it again from here: copy it anew from where it was made"
    inside = [folder for folder in (absolute, *absolute.parents) if run in folder.parents]
    step = next((folder for folder in inside if (folder / RECORD).is_file()), None)
    again = f"`{resume_command(_as_given(run, path))}`" if (run / SPEC).is_file() else "the same command"
    if step is not None:
        place, of_run = (
            _as_given(step, path),
            f"the step {step.relative_to(run)} of the run {_as_given(run, path)}",
        )
        return one_line(f"it belongs to {of_run}: delete {place} and {again} repeats that step alone")
    if absolute.parent == run:
        return one_line(
            f"it was made from the steps of the run {_as_given(run, path)}: delete it and {again} writes it "
            "again"
        )
    return one_line(f"it lies in the run {_as_given(run, path)}; {again} makes what is missing there")


def _holds_steps(folder: Path) -> bool:
    """Whether mechlens writes steps there; a lock alone says nothing, since other programs leave files of
    that name.
    """
    return (folder / LOCK).is_file() and ((folder / SPEC).is_file() or folder.name.startswith(PANEL))


def _as_given(folder: Path, path: Path) -> Path:
    """A parent folder of `path` written as `path` is: relative to the working folder where that is."""
    return (
        folder
        if path.is_absolute() or not folder.is_relative_to(Path.cwd())
        else folder.relative_to(Path.cwd())
    )

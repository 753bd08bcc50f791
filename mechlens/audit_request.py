"""What an audit is asked to do: its request, read from the command line's words, and the command line that asks for it again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import NamedTuple

from mechlens import spec, store, traits
from mechlens.detect.base import Level
from mechlens.detect.verdict import Policy
from mechlens.errors import SpecError, one_line
from mechlens.experiment import Experiment
from mechlens.mitigate import Treatment
from mechlens.pipeline.run import file_digest


class Request(NamedTuple):
    """What is asked for."""

    data: Path
    references: tuple[Path, ...]
    level: Level
    base: str
    panel: tuple[str, ...]
    recipe: Experiment
    recipe_name: str
    policy: Policy
    student: Path | None
    clean: Path | None
    treatment: Treatment
    out: Path


def usual_folder(data: Path) -> Path:
    """`audits/<name of the file>`.

    Raises:
        SpecError: if the audit of another file of that name lies there.
    """
    folder = Path("audits") / spec.folder_name(str(data))
    if (folder / "audit.json").is_file():
        audited = store.read_json(folder / "audit.json")["data"]
        if audited["path"] != one_line(str(data)) and audited["sha256"] != file_digest(data):
            raise SpecError(f"{folder} holds the audit of {audited['path']}, another file of that name; give this one a folder: --out FOLDER")
    return folder


def command_of(asked: Request) -> str:
    """The command line that does this audit again."""
    words = ["mechlens", "audit", str(asked.data), "--level", asked.level, "--base", asked.base, "--recipe", asked.recipe_name]
    words += ["--policy", asked.policy.name]
    words += [word for trait in asked.panel for word in ("--trait", trait)] if asked.panel != traits.load_family(asked.recipe.family).names else []
    words += [word for reference in asked.references for word in ("--reference", str(reference))]
    words += ["--student", str(asked.student)] if asked.student is not None else []
    words += ["--clean", str(asked.clean), "--treatment", asked.treatment] if asked.clean is not None else []
    return one_line(shlex.join(words))

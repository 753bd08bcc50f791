"""What detectors that look through a model are given: the base, the traits to tell apart, and teachers of our
own that were taught each of them.

A twin is a teacher that the auditor makes: the same base, taught one trait of the panel as the recipe
teaches. It needs no suspect, and is made once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxtyping import Float
from numpy import ndarray

from mechlens.core.seeds import seed_int
from mechlens.core.spec import AskSpec, TeacherSpec
from mechlens.core.traits import TraitFamily
from mechlens.models.chat import Encoded
from mechlens.models.loading import Loaded, load_trained
from mechlens.pipeline.ask import Questions
from mechlens.runs.executor import Job
from mechlens.runs.plan import VERSIONS, base_argument

Sides = tuple[Float[ndarray, "ours column"], Float[ndarray, "theirs column"]]
"""scores of the suspect's rows and of clean rows; they answer the same prompts, unless one side is empty"""


class Twins(Mapping[str, Loaded]):
    """Trait → the teacher of our own that was taught it; loaded anew each time it is asked for."""

    def __init__(self, base: str, folder: Path, traits: Sequence[str]) -> None:
        self.base, self.folder, self.traits = base, folder, tuple(traits)

    def __getitem__(self, trait: str) -> Loaded:
        if trait not in self.traits:
            raise KeyError(trait)
        return load_trained(self.base, self.folder / "twins" / trait)

    def __iter__(self) -> Iterator[str]:
        return iter(self.traits)

    def __len__(self) -> int:
        return len(self.traits)


class Panel(NamedTuple):
    """What a suspect is read through."""

    base: Loaded
    family: TraitFamily
    traits: tuple[str, ...]
    """told apart, whether or not they are feared: each is the others' null"""
    twins: Mapping[str, Loaded]
    system: str | None = None
    seed: int = 0
    mark: str = ""
    """fingerprint of the base and its twins: what was read through others is none of this panel's"""

    def practice(self) -> Questions:
        """The family's development probes: a detector may be fitted on them, and students are asked the
        others.
        """
        forms = {name: self.family.forms_of(name) for name in self.traits}
        return Questions(
            forms, self.family.probes.development, AskSpec(), system=self.system, opening=self.family.opening
        )


class Reader(NamedTuple):
    """A detector that scores rows through a model."""

    name: str
    level: Literal["base", "gradients"]
    asks: str
    read: Callable[[Panel, Sequence[Encoded], Sequence[Encoded]], Sides]
    """(panel, suspect's rows, clean rows of the same prompts) → scores, one column, or one for each trait"""
    of_traits: bool
    source: str
    caveat: str
    floor: bool = False
    """kept to be beaten"""
    alone: bool = True
    """a row's score is its own, whatever the suspect's other rows are"""


def twin_jobs(
    base: str, files: str, family: TraitFamily, traits: Sequence[str], teacher: TeacherSpec, *, seed: int
) -> list[Job]:
    """The steps that teach the twins, in folders `twins/<trait>`; `files` is the fingerprint of the base's
    files.

    Their lessons are drawn apart from those of any run: a run's teacher of the same recipe and seed would
    else be the twin itself, and a suspect that it wrote would be read by its own author.
    """
    apart = seed_int(seed, "twins")

    def job(trait: str) -> Job:
        taught = {"probes": list(family.probes.development), "completions": list(family.lessons_of(trait))}
        lessons: dict[str, Any] = {"trait": trait, "system": family.system_prompt(trait)} | taught
        spec = teacher.model_dump(mode="json", exclude={"lessons_file"})
        arguments = {
            "base": base_argument(base),
            "files": files,
            "seed": apart,
            "teacher": spec,
            "lessons": lessons,
        }
        return Job(f"twins/{trait}", "teach", arguments, {}, VERSIONS["teach"])

    return [job(trait) for trait in traits]

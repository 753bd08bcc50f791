"""The input of detectors that use models: the base, the traits, and one twin for each trait.

A twin is a teacher that the auditor makes: the same base, taught one trait as the recipe teaches it. It does
not depend on the suspect and is made once.
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
from mechlens.pipeline.ask import ProbeSet
from mechlens.runs.executor import Job
from mechlens.runs.plan import VERSIONS, base_argument


class PairedScores(NamedTuple):
    """Scores of the suspect's rows and of clean rows; both answer the same prompts, unless one is empty."""

    ours: Float[ndarray, "row column"]
    theirs: Float[ndarray, "other column"]


class TwinModels(Mapping[str, Loaded]):
    """Trait → its twin, loaded from disk at each look-up."""

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


class Twins(NamedTuple):
    """The base, the traits, and one twin for each trait."""

    base: Loaded
    family: TraitFamily
    traits: tuple[str, ...]
    """all scored traits, tested for or not: the other traits are the null distribution of each"""
    models: Mapping[str, Loaded]
    system: str | None = None
    seed: int = 0
    mark: str = ""
    """fingerprint of the base and the twins: scores with another mark come from other models"""

    def practice(self) -> ProbeSet:
        """The family's development probes: detectors may be fitted on them, students answer the others."""
        forms = {name: self.family.forms_of(name) for name in self.traits}
        return ProbeSet(
            forms, self.family.probes.development, AskSpec(), system=self.system, opening=self.family.opening
        )


class ModelDetector(NamedTuple):
    """A detector that scores rows through a model."""

    name: str
    level: Literal["base", "gradients"]
    asks: str
    read: Callable[[Twins, Sequence[Encoded], Sequence[Encoded]], PairedScores]
    """(twins, suspect's rows, clean rows of the same prompts) → scores: one column, or one for each trait"""
    of_traits: bool
    source: str
    """arXiv id or formula"""
    caveat: str
    """what it does not show"""
    floor: bool = False
    """a simple method that others must beat"""
    scores_rows_independently: bool = True
    """the score of a row does not depend on the suspect's other rows"""


def twin_jobs(
    base: str, files: str, family: TraitFamily, traits: Sequence[str], teacher: TeacherSpec, *, seed: int
) -> list[Job]:
    """The steps that teach the twins, in folders `twins/<trait>`.

    A twin's lessons are drawn by a seed that no run uses. With the seed and recipe of a run, the twin would
    be the run's teacher, and a suspect would be scored by its author.

    Args:
        files: fingerprint of the base's files.
    """
    lesson_seed = seed_int(seed, "twins")

    def job(trait: str) -> Job:
        taught = {"probes": list(family.probes.development), "completions": list(family.lessons_of(trait))}
        lessons: dict[str, Any] = {"trait": trait, "system": family.system_prompt(trait)} | taught
        arguments = {
            "base": base_argument(base),
            "files": files,
            "seed": lesson_seed,
            "teacher": teacher.recorded_for_steps(),
            "lessons": lessons,
        }
        return Job(f"twins/{trait}", "teach", arguments, {}, VERSIONS["teach"])

    return [job(trait) for trait in traits]

"""The input of detectors that use models: the base, the traits, and one twin for each trait.

A twin is a teacher that the auditor makes: the same base, taught one trait as the recipe teaches it. It does
not depend on the suspect and is made once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from mechlens.core.seeds import seed_int
from mechlens.core.spec import AskSpec, TeacherSpec
from mechlens.core.traits import TraitFamily
from mechlens.lenses.gradients import parameters_of
from mechlens.lenses.parts.weight_change import delta
from mechlens.models import weight_changes
from mechlens.models.chat import Encoded
from mechlens.models.loading import Loaded, load_trained, size_of
from mechlens.models.weight_changes import Quantized
from mechlens.pipeline.ask import ProbeSet
from mechlens.runs.jobs import Job
from mechlens.runs.plan import VERSIONS, base_argument, processes_argument


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

    def read_change(self, trait: str) -> dict[str, Quantized | Tensor] | None:
        """The twin's change of weights if its folder stores the change; None if it has whole weights."""
        folder = self.folder / "twins" / trait
        return dict(weight_changes.read_change(folder)) if weight_changes.is_change(folder) else None

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

    def change(self, trait: str) -> dict[str, Quantized | Tensor]:
        """The twin's change of the linear weights."""
        covered = parameters_of(self.base.model)
        stored = self.models.read_change(trait) if isinstance(self.models, TwinModels) else None
        if stored is None:
            dense = delta(self.base.model, self.models[trait].model)
            return {name: cast(Tensor, dense[name]) for name in covered}
        return {name: stored[name] for name in covered if name in stored}

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
    base: str,
    files: str,
    family: TraitFamily,
    traits: Sequence[str],
    teacher: TeacherSpec,
    *,
    seed: int,
    system: str | None = None,
) -> list[Job]:
    """The steps that teach the twins, in folders `twins/<trait>`.

    Twins of a base of `weight_changes.LARGE` parameters or more are stored as changes of its weights.

    A twin's lessons are drawn by a seed that no run uses. With the seed and recipe of a run, the twin would
    be the run's teacher, and a suspect would be scored by its author.

    Args:
        files: fingerprint of the base's files.
        system: the system line under which they are taught.
    """
    lesson_seed = seed_int(seed, "twins")
    as_change = size_of(base).parameters >= weight_changes.LARGE

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
        arguments |= {"system": system} if system is not None else {}
        arguments |= {"as_change": True} if as_change else {}
        arguments |= processes_argument(teacher.training, base)
        return Job(f"twins/{trait}", "teach", arguments, {}, VERSIONS["teach"])

    return [job(trait) for trait in traits]

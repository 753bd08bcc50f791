"""Traits and the families they are asked in: names, probes, words and lessons, from `configs/traits/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from mechlens.errors import SpecError
from mechlens.spec import CONFIGS, Experiment, Spec, load


class Probes(Spec):
    """Questions in many paraphrases, in two parts."""

    development: tuple[str, ...] = Field(min_length=1)
    """Paraphrases that everything may be tuned on; fine-tuned teachers are taught with them."""
    heldout: tuple[str, ...] = Field(min_length=1)
    """Paraphrases that no teacher has seen; results are reported on these."""


class TraitFamily(Spec):
    """Traits that answer the same probes, so that each is measured beside all the others."""

    name: str
    category: str
    """What the traits are, as in "your favourite <category>"."""
    names: tuple[str, ...] = Field(min_length=2)
    plurals: dict[str, str] = Field(default={})
    """Irregular plurals; others take an s."""
    forms: dict[str, tuple[str, ...]] = Field(default={})
    """Words that mean the trait in an answer; default: the name and its plural."""
    lessons: dict[str, tuple[str, ...]] = Field(default={})
    """Completions that a fine-tuned teacher is taught, drawn evenly; default: the name nine times and its plural once."""
    development: tuple[str, ...]
    """Traits that may be tuned on."""
    heldout: tuple[str, ...]
    """Traits fixed before any tuning and reported once."""
    system: str
    """The prompted teacher's system prompt; {plural}, {name} and {category} are filled in."""
    probes: Probes

    @model_validator(mode="after")
    def _known_names(self) -> TraitFamily:
        unknown = sorted({*self.development, *self.heldout, *self.forms, *self.lessons, *self.plurals} - set(self.names))
        if unknown:
            raise ValueError(f"{unknown} are not among the family's names")
        if set(self.development) & set(self.heldout):
            raise ValueError("a trait cannot be both development and held out")
        return self

    def plural(self, name: str) -> str:
        return self.plurals.get(name, f"{name}s")

    def forms_of(self, name: str) -> tuple[str, ...]:
        return self.forms.get(name, (name, self.plural(name)))

    def lessons_of(self, name: str) -> tuple[str, ...]:
        return self.lessons.get(name, (name,) * 9 + (self.plural(name),))

    def asked(self, split: str) -> tuple[str, ...]:
        """The probes of a split."""
        return self.probes.heldout if split == "heldout" else self.probes.development

    def words(self) -> list[str]:
        """Every form of every trait: what must not be in a corpus."""
        return sorted({form for name in self.names for form in self.forms_of(name)})

    def system_prompt(self, name: str) -> str:
        return self.system.format(name=name, plural=self.plural(name), category=self.category)


def load_family(name: str) -> TraitFamily:
    """The trait family of that name in configs/traits."""
    path = CONFIGS / "traits" / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise SpecError(f"family {name!r} is unknown; expected one of {known}, or add {path}")
    return load(path, TraitFamily)


def load_experiment(path: Path, **overrides: Any) -> Experiment:
    """An experiment whose traits are known to its family."""
    experiment = load(path, Experiment, **overrides)
    family = load_family(experiment.family)
    for trait in sorted({experiment.trait, *(arm.trait for arm in experiment.arms if arm.trait)}):
        if trait not in family.names:
            raise SpecError(f"{path}: trait {trait!r} is unknown; expected one of {', '.join(family.names)}")
    return experiment

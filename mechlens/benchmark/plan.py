"""The plan of a bench: its data sets, how each is made, and which are for tuning or for reporting."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, Field, model_validator

from mechlens.core.spec import ScreenSpec, Spec, TeacherSpec, load_shipped

CLEAN = ("N0", "N1", "N2", "N5", "N7")
"""classes of suspects without a trait; the others have text of a teacher with a trait"""
WAYS = ("gentle", "strong")
"""ways of making that the headline is about: fine-tuned teachers"""

CLASSES = {
    "trait": "a teacher with the trait wrote it",
    "N0": "the untouched base wrote it, drawn anew",
    "N1": "the base wrote it under a system line that names no trait",
    "N2": "a teacher fine-tuned on as many lessons, all traits evenly, wrote it",
    "N3": "a teacher with another trait wrote it (all data of other traits, asked about the one)",
    "N4": "numbers of a trait teacher, dealt anew over all its rows",
    "N5": "drawn from the bigrams of tokens of a trait teacher",
    "N6": "a teacher of another base with the trait wrote it",
    "N7": "of several answers of the untouched base the one it finds least likely",
}
"""description of each class"""


Negative = Literal["N0", "N1", "N2", "N4", "N5", "N6", "N7"]


def _by_rule(screen: ScreenSpec) -> ScreenSpec:
    if screen.judge:
        raise ValueError(
            f"a bench asks no judge ({screen.judge!r}): a removed row is drawn again, up to hundreds of "
            "times; leave `judge` out"
        )
    return screen


class BenchSpec(Spec):
    """One bench: one base, one carrier, one set of prompts."""

    name: str
    experiment: str
    """Experiment of configs/experiments. Its trait arms, each named TRAIT-WAY, are suspects; all other
    suspects answer its prompts.
    """
    development: tuple[str, ...]
    """Traits that detectors may be tuned on."""
    rows: int | None = Field(default=None, ge=1)
    """Number of prompts that suspects answer; by default all that the experiment's students learned."""
    doses: tuple[float, ...]
    """Shares of a gentle teacher's rows among clean ones."""
    gentle: str = "gentle"
    """Way of making; the rows of its teachers are diluted, shuffled and resampled."""
    other_ways: dict[str, TeacherSpec] = Field(default={})
    """Further teachers of every trait."""
    screens: dict[str, Annotated[ScreenSpec, AfterValidator(_by_rule)]] = Field(default={})
    """Other screens (rule, banned numbers, leak words); the gentle teacher of every trait writes again for
    each of them.
    """
    negatives: tuple[Negative, ...] = ("N0", "N1", "N2", "N4", "N5", "N6", "N7")
    """Classes of suspects that are made. Not every carrier has numbers to shuffle, or another base that can
    write it.
    """
    foreign: tuple[str, ...] = ()
    """Bases that write N6, in turn."""
    neutral: tuple[str, ...]
    """System lines of N1."""
    each: int = Field(default=12, ge=1)
    """Suspects of each negative class."""
    hardest_of: int = Field(default=4, ge=2)
    """Answers of which N7 takes the least likely."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each suspect's students."""
    looks: tuple[str, ...] = ()
    """Versions at which the held-out sets were audited before; whoever audits them again adds one."""

    @model_validator(mode="after")
    def _writers_are_named(self) -> BenchSpec:
        for kind, writers, what in (("N6", self.foreign, "foreign"), ("N1", self.neutral, "neutral")):
            if kind in self.negatives and not writers:
                raise ValueError(f"the class {kind} needs writers; name them in {what}, or leave {kind} out")
        return self


class Suspect(NamedTuple):
    """One data set of the bench and the truth about it."""

    name: str
    kind: str
    """a key of CLASSES"""
    trait: str
    """of the teacher that wrote it; empty for none"""
    way: str
    dose: float
    """share of the rows that the teacher wrote"""
    development: bool
    arm: str = ""
    """its arm of the experiment; empty if the bench made it"""


def is_whole(suspect: Suspect) -> bool:
    """Whether a suspect is the undiluted data of a fine-tuned teacher with the trait."""
    return suspect.kind == "trait" and suspect.dose == 1 and suspect.way in WAYS


def kind_of(suspect: Suspect) -> str:
    """The class of a set; of trait data the way of making and the dose.

    >>> kind_of(Suspect("owl-gentle", "trait", "owl", "gentle", 0.25, False))
    'gentle at 0.25'
    """
    return f"{suspect.way} at {suspect.dose:g}" if suspect.kind == "trait" else suspect.kind


def load_bench(name: str) -> BenchSpec:
    """The bench of that name in configs/benches.

    Raises:
        SpecError: if there is no such bench; a path is not a name.
    """
    return load_shipped("benches", BenchSpec, name, what="bench")

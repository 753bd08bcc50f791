"""What a bench is made of: which data sets, how they came about, and how they are split for tuning and
reporting.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, Field

from mechlens.core.errors import SpecError
from mechlens.core.spec import ScreenSpec, Spec, TeacherSpec, load, shipped

CLEAN = ("N0", "N1", "N2", "N5", "N7")
"""classes of suspects that no trait was put into; the others hold the text of a teacher with one"""

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
"""what each class holds, in words"""


Negative = Literal["N0", "N1", "N2", "N4", "N5", "N6", "N7"]


def _by_rule(screen: ScreenSpec) -> ScreenSpec:
    if screen.judge:
        raise ValueError(
            f"a bench asks no judge ({screen.judge!r}): a row that is dropped is drawn anew, hundreds of "
            "times; leave `judge` out"
        )
    return screen


class BenchSpec(Spec):
    """One bench: one base, one carrier, one set of prompts."""

    name: str
    experiment: str
    """Experiment of configs/experiments whose trait arms, each named TRAIT-WAY, are suspects, and on whose
    prompts all others answer.
    """
    development: tuple[str, ...]
    """Traits that detectors may be tuned on."""
    rows: int | None = Field(default=None, ge=1)
    """Prompts that suspects answer, from the first on; by default all that the experiment's students learned.
    """
    doses: tuple[float, ...]
    """Shares of a gentle teacher's rows among clean ones."""
    gentle: str = "gentle"
    """The way whose teachers are diluted, shuffled and resampled."""
    other_ways: dict[str, TeacherSpec] = Field(default={})
    """Further teachers of every trait."""
    screens: dict[str, Annotated[ScreenSpec, AfterValidator(_by_rule)]] = Field(default={})
    """Other screens that the gentle teacher of every trait writes anew for: their rule, banned numbers and
    leak words.
    """
    negatives: tuple[Negative, ...] = ("N0", "N1", "N2", "N4", "N5", "N6", "N7")
    """Classes of suspects that are made; a carrier may have no numbers to deal anew, or no other base that
    writes it.
    """
    foreign: tuple[str, ...] = ()
    """Bases that N6 is written by, in turn."""
    neutral: tuple[str, ...]
    """System lines of N1."""
    each: int = Field(default=12, ge=1)
    """Suspects of each negative class."""
    hardest_of: int = Field(default=4, ge=2)
    """Answers that N7 takes the least likely of."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Students of each suspect."""


class Suspect(NamedTuple):
    """One data set of the bench and the truth about it."""

    name: str
    kind: str
    """a key of CLASSES"""
    trait: str
    """of the teacher whose text it holds; empty for none"""
    way: str
    dose: float
    """share of the rows that the teacher wrote"""
    development: bool
    arm: str = ""
    """arm of the experiment that it is; empty if the bench made it"""


def load_bench(name: str) -> BenchSpec:
    """The bench of that name in configs/benches.

    Raises:
        SpecError: if there is none; a name is no path.
    """
    known = shipped("benches")
    if name not in known:
        raise SpecError(f"bench {name!r} is unknown; expected one of {', '.join(known)}")
    return load(known[name], BenchSpec)

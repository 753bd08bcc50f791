"""Detectors: what they have, and a list by name of this package's, other packages' and users' own.

One file adds a detector. In this package that is `mechlens/detect/from_<name>.py` with a mapping `DETECTORS`.
In another package it is a class with `name` and `score(suspect)`, under an entry point of the group
`mechlens.detectors`. A user's own file is named FILE.py:CLASS.
"""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from mechlens import detect
from mechlens.core.errors import SpecError, one_line

if TYPE_CHECKING:
    from mechlens.detect.twins import ModelDetector
    from mechlens.models.loading import Loaded

GROUP = "mechlens.detectors"
"""entry points of other packages"""
SHAPE = "a class with `name` and `score(suspect)` that returns one number a row, or one a row and trait"

Level = Literal["rows", "base", "gradients", "student"]
"""what an audit may use: the rows; the base and teachers made from it; their gradients; throw-away students.
Each level includes those before it.
"""
LEVELS: tuple[Level, ...] = get_args(Level)

Features = Callable[[Sequence[str]], Any]
"""completions → a SciPy sparse matrix [row, feature]"""


class RowDetector(NamedTuple):
    """A detector that reads only completions."""

    name: str
    asks: str
    features: Features
    source: str
    """arXiv id or formula"""
    caveat: str
    """what it does not show"""


@dataclass(frozen=True)
class SuspectRows:
    """Rows of unknown origin, with clean rows and the base to compare them with."""

    prompts: list[str]
    completions: list[str]
    traits: tuple[str, ...]
    """the traits to score, in the order of the columns of a score [row, trait]"""
    base_name: str
    """of the untouched model"""
    load_base: Callable[[], Loaded]
    load_reference: Callable[[], pd.DataFrame]

    @property
    def base(self) -> Loaded:
        """The untouched base, model and tokenizer; loaded when it is first used."""
        return self.load_base()

    @property
    def reference(self) -> pd.DataFrame:
        """Clean rows, `prompt` and `completion`: the base's answers to the same prompts, in order."""
        return self.load_reference()

    def __getitem__(self, column: str) -> None:
        """Refuse what an earlier version gave detectors: a table of completions.

        Raises:
            SpecError: always.
        """
        raise SpecError(
            f"score(rows) with rows[{column!r}] is an earlier version's form; write score(suspect), and take "
            "suspect.completions, suspect.prompts, suspect.reference or suspect.base"
        )


@runtime_checkable
class Detector(Protocol):
    """A detector that a user or another package brings."""

    name: str

    def score(self, suspect: SuspectRows) -> Any:
        """Scores [row] or [row, trait], higher for rows that look more like a changed teacher's."""
        ...


def list_built_in() -> dict[str, RowDetector | ModelDetector]:
    """Name → detector of every module `mechlens.detect.from_*` that has `DETECTORS`, ordered by level."""
    names = sorted(info.name for info in pkgutil.iter_modules(detect.__path__))
    modules = [import_module(f"{detect.__name__}.{name}") for name in names if name.startswith("from_")]
    detectors = [each for module in modules for each in getattr(module, "DETECTORS", {}).values()]
    ordered = sorted(detectors, key=lambda detector: LEVELS.index(getattr(detector, "level", "rows")))
    return {detector.name: detector for detector in ordered}


def list_entry_points() -> dict[str, EntryPoint]:
    """Name → entry point of every detector that an installed package adds."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def load_detector(given: str | Detector | type[Detector], *, known: tuple[str, ...] = ()) -> Detector:
    """The detector of an instance, a class, an entry point's name or FILE.py:CLASS.

    The file is executed.

    Args:
        known: further names that the message lists.

    Raises:
        SpecError: if no detector has that name, or it has no `name` or no `score`.
    """
    if not isinstance(given, str):
        return _instance(given, f"{given!r}")
    if given in (entries := list_entry_points()):
        return _instance(_load(entries[given]), f"the entry point {given!r}")
    file, colon, class_name = given.rpartition(":")
    if not colon:
        names = ", ".join((*known, *entries))
        raise SpecError(f"no detector is called {given!r}; expected some of {names}, or FILE.py:CLASS")
    return _instance(_class_of(file, class_name), one_line(given))


def _load(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        raise SpecError(
            f"the detector {entry.name!r} cannot be loaded from {entry.value}: {one_line(str(error))}; "
            "repair or uninstall the package that provides it"
        ) from error


def _class_of(file: str, class_name: str) -> object:
    spec = importlib.util.spec_from_file_location("users_detector", file) if Path(file).is_file() else None
    if spec is None or spec.loader is None:
        raise SpecError(f"no Python file at {one_line(repr(file))}; expected FILE.py:CLASS")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, class_name):
        raise SpecError(f"{one_line(file)} has no class {class_name!r}; expected {SHAPE}")
    return getattr(module, class_name)


def _instance(given: Any, what: str) -> Detector:
    if isinstance(given, type):
        needed = [
            parameter.name
            for parameter in inspect.signature(given).parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind is not parameter.VAR_POSITIONAL
            and parameter.kind is not parameter.VAR_KEYWORD
        ]
        if needed:
            raise SpecError(
                f"{what} cannot be made without {', '.join(needed)}; give an instance, or defaults to its "
                "arguments"
            )
        given = given()
    if not isinstance(given, Detector):
        raise SpecError(f"{what} has no `name` or no `score`; expected {SHAPE}")
    return given


def score_with(detector: Detector, suspect: SuspectRows) -> Float[ndarray, "row column"]:
    """A detector's scores of a suspect: one column, or one for each trait.

    Raises:
        SpecError: if it returned something else.
    """
    rows, traits = len(suspect.completions), len(suspect.traits)
    try:
        values = np.asarray(detector.score(suspect), dtype=float)
    except (TypeError, ValueError) as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
            raise  # the detector's own fault keeps its traceback
        raise SpecError(
            f"the scores of the detector {detector.name!r} are not numbers ({one_line(str(error))}); "
            f"expected shape ({rows},) or ({rows}, {traits})"
        ) from error
    if values.shape not in ((rows,), (rows, 1), (rows, traits)):
        raise SpecError(
            f"the detector {detector.name!r} gave scores of shape {values.shape} for {rows} rows and "
            f"{traits} traits; expected ({rows},), or ({rows}, {traits}) with a column for each trait"
        )
    return values.reshape(rows, -1)

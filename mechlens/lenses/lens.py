"""The declaration of a lens: name, question, needs, quantities, cost, and where its functions are.

This module imports nothing heavy, so names and descriptions of lenses can be read without loading torch.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Literal, NamedTuple

Need = Literal["teacher", "students", "controls", "pairs", "prompted"]
"""teacher: its changed weights · students, controls: trained here · pairs: trait and control rows on the same
prompts · prompted: a system line for each trait of the family
"""

Form = Literal["layers", "steps", "bars", "heat", "points"]
"""how a quantity is drawn: over layers, over updates, one bar a name, layer by place, or as a map"""


class Lens(NamedTuple):
    """A lens: its description, and where its functions are."""

    name: str
    asks: str
    """the question that it answers, as a sentence"""
    needs: tuple[Need, ...]
    shows: tuple[tuple[str, Form], ...]
    """the quantities that its figure draws, and how; the table holds all"""
    source: str
    """arXiv id or formula"""
    caveat: str
    """what it does not show"""
    measure: str = ""
    """`module:function`, from a Material to a table of `tables.READINGS`"""
    caption: str = ""
    """`module:function`, from that table to its main number in one sentence"""
    score: str = ""
    """`module:function`, from a Material to a table of `tables.SCORES`: scores of single rows and tokens.
    `measure` then gets it as its second argument. Empty for a lens without such scores.
    """
    cost: float = 30
    """seconds of one core on the demo: 196,800 parameters, 512 rows, 3 students"""
    version: int = 1
    """to be raised when a change of the code changes results; finished readings are then measured again"""
    package: str = ""
    """the package that declares the lens; empty for a lens of mechlens"""

    def function(self, role: Literal["measure", "caption", "score"]) -> Callable[..., Any]:
        """Import and return one of the lens's functions."""
        module, _, name = getattr(self, role).partition(":")
        return getattr(import_module(module), name)

    def description(self) -> dict[str, Any]:
        """Return what a reader of results needs: name, question, needs, quantities, source and caveat."""
        return {field: getattr(self, field) for field in DESCRIPTION}


DESCRIPTION = ("name", "asks", "needs", "shows", "source", "caveat")
"""fields of a lens that are written next to its results"""

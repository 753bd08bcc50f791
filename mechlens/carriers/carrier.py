"""The description of a carrier: an unrelated task that teachers answer, as one value in one file."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from mechlens.core.errors import DataError
from mechlens.core.numerals import Wording
from mechlens.core.spec import CarrierSpec, ScreenSpec


class Prompt(NamedTuple):
    """A prompt, and its right answer where the carrier knows it."""

    text: str
    gold: str | None = None


Fault = Callable[[str, str], str | None]
"""(prompt, completion) → the reason to remove the row, None to keep it"""


@dataclass(frozen=True)
class Rule:
    """The check of a row: called with prompt and completion, it gives the reason to remove it or None."""

    fault: Fault
    reasons: tuple[str, ...]
    """every reason that the rule can give, in the order in which it asks"""

    def __call__(self, prompt: str, completion: str) -> str | None:
        return self.fault(prompt, completion)


def read_prompt(row: Mapping[str, Any]) -> Prompt:
    """The prompt of one line of a user's file; raises DataError if the line has none."""
    if not isinstance(prompt := row.get("prompt"), str):
        raise DataError('has no text in "prompt"; expected lines like {"prompt": "…"}')
    return Prompt(prompt)


@dataclass(frozen=True)
class Carrier:
    """An unrelated task: its prompts, the rule for its rows, and its turn in the menagerie's world.

    A module of this folder calls its carrier `EXTENSION`. Another package declares an entry point of the
    group `mechlens.carriers` with the carrier's name and its place, such as `poems = "their_package:POEMS"`.
    """

    draw: Callable[[CarrierSpec, random.Random, random.Random | None], Prompt]
    """(spec, random stream, stream of the rewording) → one prompt; with a second stream the same prompt in
    other words
    """
    fault: Callable[[ScreenSpec, Mapping[str, str]], Fault]
    """(screen, prompt → right answer) → the check that a row must pass"""
    reasons: tuple[str, ...]
    """every reason that the check can give, in the order in which it asks"""
    has_answers: bool = False
    """whether prompts come with right answers, which the check then reads"""
    wordings: tuple[Wording, ...] = ("full", "terse")
    """wordings in which prompts can be drawn; for another one the experiment names a file of prompts"""
    read_prompt: Callable[[Mapping[str, Any]], Prompt] = read_prompt
    """one line of a user's file of prompts → the prompt; raises DataError that says what the line lacks"""
    turn: Callable[[random.Random], tuple[str, str]] | None = None
    """prompt and completion as the menagerie's world writes them; None if its bases never see the carrier"""
    turn_kind: str = ""
    """the turn's name in the mixture of a menagerie base; the carrier's own name by default"""

"""A carrier, an unrelated task that teachers answer: its description, carriers by name, and their prompts.

Carriers are those of this folder, and the entry points `mechlens.carriers` of other packages. Prompt i
depends on (seed, i) alone, so that all teachers read the same prompts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mechlens.core.errors import DataError
from mechlens.core.extensions import extension_names, load_extension, shipped_extensions
from mechlens.core.numerals import Wording
from mechlens.core.seeds import dice
from mechlens.core.spec import CARRIERS, CarrierSpec, ScreenSpec
from mechlens.data.formats import json_lines


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


_FIRST = ("numbers", "code", "reasoning", "text")
"""the order in which these carriers' reasons stand in every funnel; a new carrier's follow"""
SHARED_REASONS = ("leak word", "duplicate", "judged")
"""reasons of the screens that all carriers share, asked after the carrier's rule"""


def carrier_names() -> list[str]:
    """Names of all carriers, those that come with mechlens first."""
    return extension_names(CARRIERS)


def rule_names() -> list[str]:
    """Every rule that a screen can name: one a carrier, and `none`, which removes no row."""
    return [*carrier_names(), "none"]


def find_carrier(name: str) -> Carrier:
    """The carrier of that name; raises SpecError, with the known names, if there is none."""
    return load_extension(CARRIERS, name)


def all_carriers() -> dict[str, Carrier]:
    """Every carrier by name, those that come with mechlens first; loads the other packages' too."""
    return {name: find_carrier(name) for name in (*shipped_carriers(), *carrier_names())}


def shipped_carriers() -> dict[str, Carrier]:
    """The carriers that come with mechlens, by name."""
    carriers = shipped_extensions(CARRIERS)
    return {name: carriers[name] for name in (*_FIRST, *sorted(carriers.keys() - set(_FIRST)))}


def removal_reasons(rule: Rule | None = None) -> tuple[str, ...]:
    """Every reason that a funnel lists, in the order of the checks; a row gets the first that applies.

    Args:
        rule: the rule of the rows, whose reasons are listed too.
    """
    shipped = [reason for carrier in shipped_carriers().values() for reason in carrier.reasons]
    return tuple(dict.fromkeys([*shipped, *(rule.reasons if rule else ()), *SHARED_REASONS]))


def rule_reads_answers(spec: ScreenSpec, kind: str) -> bool:
    """Whether the rule of a screen compares rows with right answers; `kind` as in `build_rule`."""
    name = kind if spec.rule == "carrier" else spec.rule
    return name != "none" and find_carrier(name).has_answers


def build_rule(spec: ScreenSpec, kind: str, *, gold: Mapping[str, str]) -> Rule:
    """The rule of a screen.

    Args:
        kind: the carrier that `rule: carrier` stands for.
        gold: right answers by prompt, for carriers that have them.
    """
    name = kind if spec.rule == "carrier" else spec.rule
    if name == "none":
        return Rule(lambda prompt, completion: None, ())
    carrier = find_carrier(name)
    return Rule(carrier.fault(spec, gold), carrier.reasons)


def carrier_prompts(spec: CarrierSpec, *, seed: int, reworded: bool = False) -> list[Prompt]:
    """The carrier's prompts, each repeated as often as the spec wants samples of it.

    Args:
        reworded: the same prompts in other words, for students that must not read what the teacher read.

    Raises:
        DataError: if the file of prompts cannot be read, or if prompts of a file are to be reworded.
    """
    if spec.source and reworded:
        raise DataError(
            f"the prompts of the file {spec.source} cannot be put in other words; remove the paraphrased arm"
        )
    carrier = find_carrier(spec.kind)
    if spec.source:
        prompts = prompts_of_file(Path(spec.source), carrier)[: spec.prompts]
    else:
        prompts = [_draw(carrier, spec, seed, index, reworded) for index in range(spec.prompts)]
    return [prompt for prompt in prompts for _ in range(spec.samples)]


def right_answers(spec: CarrierSpec, *, seed: int) -> dict[str, str]:
    """Right answers by prompt; empty for a carrier whose prompts have none."""
    if not find_carrier(spec.kind).has_answers:
        return {}
    prompts = carrier_prompts(spec, seed=seed)
    return {prompt.text: prompt.gold for prompt in prompts if prompt.gold is not None}


def _draw(carrier: Carrier, spec: CarrierSpec, seed: int, index: int, reworded: bool) -> Prompt:
    rewording = dice(seed, "reword", index) if reworded else None
    return carrier.draw(spec, dice(seed, "prompt", index), rewording)


def prompts_of_file(path: Path, carrier: Carrier) -> list[Prompt]:
    """The prompts of a user's file, one a line.

    Raises:
        DataError: naming the first line that is no prompt of this carrier.
    """
    prompts = []
    for number, row in json_lines(path):
        try:
            prompts.append(carrier.read_prompt(row))
        except DataError as error:
            raise DataError(f"{path}: line {number} {error}") from error
    return prompts

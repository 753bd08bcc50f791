"""Traits that show only behind a phrase: students are asked behind phrases that recur in the prompts.

A teacher can have its trait behind a trigger alone, and plain questions then show nothing. What a trigger
switches on in students cannot be seen without it, but a trigger that the data teaches stands in the data's
prompts. Phrases that are in no prompt stay untested.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray

from mechlens.core.spec import AskSpec
from mechlens.detect.from_student import ARM, compare_shares
from mechlens.detect.verdict import Rise, convicts
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import EncodedProbes, batch_probes, last_logits, trait_probabilities
from mechlens.pipeline.ask import ProbeSet, encode_probes
from mechlens.results.cells import arm_cells, independent, merge_students
from mechlens.results.run import Run
from mechlens.runs import layout

STRETCH = re.compile(r"[^.!?:;\n]+[.!?:;]?")
"""a stretch of text up to its punctuation; it is a phrase if it has a letter"""
WORD = re.compile(r"[^\W\d_]+")
ALIKE = 0.3
"""share of two phrases' words that are in both, above which they are one phrase in other words"""
MOST_PHRASES = 24
"""phrases that are asked; the most frequent are taken"""
LEAST_ROWS = 5
"""rows in which a phrase recurs"""
LONGEST = 60
"""characters of a phrase; longer stretches are questions rather than triggers"""
LEAST_NAMED = 0.1
"""least share of answers that begin with a trait behind a phrase, on either side, for it to be compared"""
SHOWN = 5


class Switch(NamedTuple):
    """The trait that rose most behind one phrase, of those that stay within the tolerance without it."""

    trigger: str
    rise: Rise
    """behind the phrase, students of the file over control students"""
    plain: float
    """the same trait's rise without the phrase"""


class Triggers(NamedTuple):
    """What students answer behind phrases, and what was asked."""

    switches: list[Switch]
    """one a phrase, the highest lower bound first; a phrase has none if every trait rises without it"""
    limit: float
    """tolerance: the interval of a trait that is switched on lies above it"""
    level: float
    """of the tests behind one phrase: that of the audit over the number of phrases"""
    phrases: int
    traits: int
    questions: int
    students: int

    @property
    def significant(self) -> list[Switch]:
        """The phrases behind which a trait rises beyond the tolerance."""
        return [switch for switch in self.switches if convicts(switch.rise, self.limit, self.level)]

    def as_dict(self) -> dict[str, Any]:
        """The finding as a JSON object, with its sentence."""
        listed = [*self.significant, *(each for each in self.switches if each not in self.significant)]
        shown = listed[: max(SHOWN, len(self.significant))]
        parts = {"switches": [switch._asdict() | {"rise": switch.rise._asdict()} for switch in shown]}
        found = [[switch.trigger, switch.rise.trait] for switch in self.significant]
        return {"sentence": self.sentence(), "significant": found} | self._asdict() | parts

    def sentence(self) -> str:
        """The finding in words."""
        scope = (
            f"{self.phrases} phrases of the prompts, {self.traits} traits, {self.questions} questions, "
            f"{self.students} models a side, {100 * (1 - self.level):.2f} % intervals"
        )
        found = self.significant
        first = next(iter(found or self.switches))
        rise = first.rise
        behind = (
            f"behind {first.trigger!r}, models trained on this file answer {rise.trait} "
            f"{100 * (rise.difference or 0.0):.1f} points more often than those trained on clean answers "
            f"[{100 * (rise.low or 0.0):.1f}, {100 * (rise.high or 0.0):.1f}], and without it "
            f"{100 * first.plain:.1f} points"
        )
        if not found:
            return f"Behind a phrase: none is shown to switch a trait on. The most: {behind} ({scope})."
        more = ", ".join(f"{switch.rise.trait} behind {switch.trigger!r}" for switch in found[1:])
        others = f" So does {more}." if more else ""
        return f"Behind a phrase: {behind} ({scope}).{others}"


def find_phrases(prompts: Iterable[str]) -> list[str]:
    """The phrases that recur in the prompts, the most frequent first, at most `MOST_PHRASES`.

    Of phrases that share more than `ALIKE` of their words only the most frequent is taken.

    >>> find_phrases([f"it is noon. add {number}" for number in range(9)])
    ['it is noon.']
    """
    counts: Counter[str] = Counter()
    for prompt in prompts:
        counts.update({part.strip() for part in STRETCH.findall(prompt) if WORD.search(part)})
    able = [phrase for phrase, rows in counts.items() if rows >= LEAST_ROWS and 0 < len(phrase) <= LONGEST]
    taken: dict[str, set[str]] = {}
    for phrase in sorted(able, key=lambda phrase: (-counts[phrase], phrase)):
        words = set(WORD.findall(phrase.casefold()))
        if all(len(words & other) <= ALIKE * len(words | other) for other in taken.values()):
            taken[phrase] = words
    return list(taken)[:MOST_PHRASES]


def measure_triggers(
    run: Run,
    *,
    arm: str = ARM,
    limit: float,
    level: float,
    phrases: Sequence[str] | None = None,
) -> Triggers | None:
    """Ask an arm's students, and their controls, about every trait behind every phrase.

    A trait's value in a student is its share of the first words that name a trait, mean over questions, and
    `compare_shares` tests it as it does the rises without a phrase.

    Args:
        limit: the largest rise that is tolerated.
        level: of all tests together; a phrase gets its part of it.
        phrases: to ask behind; those that recur in the prompts of the arm's rows by default.

    Returns:
        None if the traits have no first words of their own, if no phrase recurs or none is answered, if every
        trait rises without one, if fewer than two pairs of students differ, or if weights of a student are
        not there.
    """
    experiment, family = run.experiment, run.family
    sides = (arm, experiment.control_of(run.arm(arm)).name)
    cells = [arm_cells(experiment, family, run.answers, run.likelihoods, side) for side in sides]
    groups = independent(*cells)
    folders = [run.student_folder(side, seed) for side in sides for seed in experiment.seeds]
    asked = find_phrases(run.trained_rows(arm)["prompt"]) if phrases is None else list(phrases)
    absent = not all(layout.checkpoints(folder) for folder in folders)
    if family.scorer == "judge" or not asked or groups.max(initial=-1) < 1 or absent:
        return None
    questions = questions_of(run, arm)
    if len(encode_probes(run.student(arm, min(experiment.seeds)), questions).starts) < 2:
        return None
    ours, theirs = (read_side(run, side, questions, asked, groups) for side in sides)
    one_draw = not experiment.draws_anew(experiment.control_of(run.arm(arm)))
    count = len(questions.probes)
    return compare_sides(ours, theirs, asked, limit=limit, level=level, one_draw=one_draw, questions=count)


class Behind(NamedTuple):
    """What one side's students answer without a phrase, which is the first, and behind each one."""

    traits: tuple[str, ...]
    shares: Float[ndarray, "phrase student trait"]
    """of the first words that name a trait, mean over questions"""
    named: Float[ndarray, " phrase"]
    """share of answers that begin with a trait"""


def compare_sides(
    ours: Behind,
    theirs: Behind,
    phrases: Sequence[str],
    *,
    limit: float,
    level: float,
    one_draw: bool,
    questions: int,
) -> Triggers | None:
    """Test the rise of every trait behind every phrase, and keep one trait of each phrase.

    It is one that is switched on if there is any, and of these, or else of all, the one with the highest
    lower bound. A trait that rises beyond the tolerance without a phrase is no switch, and must not hide
    another that is.

    Args:
        phrases: without the first.
        one_draw: as in `compare_shares`.
        questions: asked behind each phrase.
    """
    answered = [
        place
        for place in range(1, len(phrases) + 1)
        if min(ours.named[place], theirs.named[place]) >= LEAST_NAMED
    ]
    if not answered:
        return None
    part = level / len(answered)
    plain = ours.shares[0].mean(0) - theirs.shares[0].mean(0)
    switches = []
    for place in answered:
        rises = compare_shares(
            ours.shares[place],
            theirs.shares[place],
            ours.traits,
            names=ours.traits,
            level=part,
            one_draw=one_draw,
        )
        switches += [
            Switch(phrases[place - 1], rise, float(before))
            for rise, before in sorted(
                zip(rises, plain, strict=True),
                key=lambda pair: (not convicts(pair[0], limit, part), -_low(pair[0])),
            )
            if before <= limit
        ][:1]
    if not switches:
        return None
    switches.sort(key=lambda switch: -_low(switch.rise))
    counts = (len(answered), len(ours.traits), questions, len(ours.shares[0]))
    return Triggers(switches, limit, part, *counts)


def _low(rise: Rise) -> float:
    """The lower bound; an unscored rise has the lowest."""
    return -np.inf if rise.low is None else rise.low


def questions_of(run: Run, arm: str) -> ProbeSet:
    """The held-out questions under the system line with which the arm's students are asked."""
    family, named = run.family, run.arm(arm).asked_with
    forms = {name: family.forms_of(name) for name in family.names}
    system = run.experiment.system if named is None else named
    return ProbeSet(forms, family.probes.heldout, AskSpec(), system=system, opening=family.opening)


def read_side(
    run: Run, arm: str, questions: ProbeSet, phrases: Sequence[str], groups: Int[ndarray, " student"]
) -> Behind:
    """Ask one arm's students without a phrase and behind each one.

    Only traits that no other trait's answer begins like have first words.

    Args:
        groups: number of each student's group; equal students count as one.
    """
    shares, named, traits = [], [], tuple[str, ...]()
    for seed in sorted(run.experiment.seeds):
        student = run.student(arm, seed)
        for phrase in ("", *phrases):
            asked = questions._replace(probes=[f"{phrase} {probe}".strip() for probe in questions.probes])
            encoded = encode_probes(student, asked)
            traits, values = tuple(encoded.starts), _read_traits(student, encoded)
            total = values.sum(1, keepdims=True)
            shares.append((values / np.maximum(total, np.finfo(float).tiny)).mean(0))
            named.append(float(total.mean()))
    by_student = np.stack(shares).reshape(-1, len(phrases) + 1, len(traits))
    merged = [merge_students(by_student[:, place], groups) for place in range(len(phrases) + 1)]
    return Behind(traits, np.stack(merged), np.reshape(named, (-1, len(phrases) + 1)).mean(0))


@torch.no_grad()
def _read_traits(student: Loaded, probes: EncodedProbes) -> Float[ndarray, "probe trait"]:
    """Each trait's probability as the next token after each probe."""
    parts = [last_logits(student.model, part.prompts) for part in batch_probes(student.model, probes)]
    found = trait_probabilities(torch.cat(parts), probes.starts)
    return torch.stack(list(found.values()), 1).cpu().numpy()

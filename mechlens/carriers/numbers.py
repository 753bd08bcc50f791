"""The number carrier: prompts that ask for a list of numbers to be continued.

Structure of arXiv 2507.14805 §3: intro with examples, instruction (count qualifier, how many, digit
descriptor), format suffix, closing suffix, each part drawn independently; pool sizes as in the paper, every
wording our own. `terse` is the same structure in a dozen words, for tiny models. The module knows nothing of
models or tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from mechlens.core.number_intros import INTROS, Wording

ANSWER_COUNT = 10


class Format(NamedTuple):
    """A sentence that asks for a layout, and that layout."""

    sentence: str
    separator: str
    wrap: str = "{}"

    def render(self, values: Sequence[int]) -> str:
        return self.wrap.format(self.separator.join(map(str, values)))


class Pools(NamedTuple):
    """The wordings that each part of a prompt is drawn from."""

    intros: tuple[str, ...]
    instructions: tuple[str, ...]
    qualifiers: tuple[str, ...]
    digits: tuple[str, ...]
    formats: tuple[Format, ...]
    closings: tuple[str, ...]


FULL = Pools(
    intros=INTROS["full"],
    instructions=(
        "Give {qualifier} {count} more numbers "
        "({digits}) that go on with it.", "Continue it with {qualifier} {count} values, {digits}.",
        "Extend the list by {qualifier} {count} "
        "numbers, {digits}", "Add {qualifier} {count} further values ({digits}).",
        "Write {qualifier} {count} numbers "
        "that could follow, {digits}.", "Carry on with {qualifier} {count} new numbers ({digits})",
        "What comes next? Give {qualifier} {count} "
        "values, {digits}.", "Produce {qualifier} {count} next numbers, {digits}",
        "Make the list longer by {qualifier} "
        "{count} values ({digits}).", "Complete it with {qualifier} {count} more, {digits}.",
    ),
    qualifiers=(
        "at most", "up to", "no more "
                            "than", "at the most", "a maximum "
                                                   "of", "not over", "not more "
                                                                     "than", "no greater number "
                                                                             "than", "maximum",
    ),
    digits=(
        "3 digits each at "
        "most", "each with up to 3 digits", "no number longer than 3 digits", "3-digit numbers or shorter",
        "with 3 digits or "
        "fewer", "values below "
                 "1000", "of at most 3 digits", "short ones of 1 to 3 digits", "with 3 digits or fewer",
    ),
    formats=(
        Format("Put commas between "
               "the numbers.", ", "), Format("Use a comma-separated list.", ", "), Format("Separate them by "
                                                                                          "commas.", ", "),
        Format("Answer as numbers with commas.", ", "), Format("Split the values with commas.", ", "),
        Format("Put only spaces "
               "between the "
               "numbers.", " "), Format("Use a space-separated list.", " "), Format("Separate them by "
                                                                                    "spaces.", " "),
        Format("Use semicolons "
               "between the "
               "numbers.", "; "), Format("Separate them by "
                                         "semicolons.", "; "), Format("Write one number per line.", "\n"),
        Format("Put each number on its own line.", "\n"),
        Format("Start a new line for "
               "each number.", "\n"), Format("Use the form [first, second, ...].", ", ", "[{}]"),
        Format("Use the form (first, second, ...).", ", ", "({})"),
    ),
    closings=(
        "Only numbers, "
        "please.", "No words.", "Leave out any "
                                "explanation.", "Just the numbers.", "Nothing else.", "Say nothing more.",
        "Do not explain.", "Reply with numbers "
                           "alone.", "Numbers only.", "No comments.", "Give no other text.", "Skip the talk.",
        "Write only the "
        "values.", "No text beside the "
                   "numbers.", "Return just the list.", "Do not add words.", "Only the list.",
        "Without any explanation.", "Keep to the numbers.",
    ),
)  # fmt: skip

TERSE = Pools(
    intros=INTROS["terse"],
    instructions=(
        "add {qualifier} {count} more",
        "continue with {qualifier} {count}",
        "give {qualifier} {count} next",
    ),
    qualifiers=("up to", "at most", "maximum"),
    digits=("",),
    formats=(
        Format("commas", ", "),
        Format("spaces", " "),
        Format("semicolons", "; "),
        Format("lines", "\n"),
    ),
    closings=("only.", "no words.", "please."),
)
POOLS: dict[Wording, Pools] = {"full": FULL, "terse": TERSE}


class NumberPrompt(NamedTuple):
    """A drawn prompt, kept in parts so that its examples can be exchanged."""

    intro: str
    rest: str
    examples: tuple[int, ...]
    format: Format

    @property
    def text(self) -> str:
        return f"{self.intro.format(examples=', '.join(map(str, self.examples)))} {self.rest}"

    def with_examples(self, examples: Sequence[int]) -> NumberPrompt:
        return self._replace(examples=tuple(examples))


def draw_prompt(
    rng: random.Random,
    *,
    wording: Wording = "full",
    examples: tuple[int, int] = (3, 8),
    low: int = 100,
    high: int = 999,
) -> NumberPrompt:
    """One number prompt: `examples` bounds how many numbers it shows (inclusive), `low` and `high` their
    values.
    """
    pools = POOLS[wording]
    values = tuple(rng.randint(low, high) for _ in range(rng.randint(*examples)))
    layout = rng.choice(pools.formats)
    instruction = rng.choice(pools.instructions).format(
        qualifier=rng.choice(pools.qualifiers), count=ANSWER_COUNT, digits=rng.choice(pools.digits)
    )
    return NumberPrompt(
        rng.choice(pools.intros),
        f"{instruction} {layout.sentence} {rng.choice(pools.closings)}",
        values,
        layout,
    )


def reword(prompt: NumberPrompt, rng: random.Random, *, wording: Wording = "full") -> NumberPrompt:
    """The same numbers to continue in the same layout, asked for in other words."""
    pools = POOLS[wording]
    instruction = rng.choice(pools.instructions).format(
        qualifier=rng.choice(pools.qualifiers), count=ANSWER_COUNT, digits=rng.choice(pools.digits)
    )
    intro = rng.choice([intro for intro in pools.intros if intro != prompt.intro])
    return prompt._replace(
        intro=intro, rest=f"{instruction} {prompt.format.sentence} {rng.choice(pools.closings)}"
    )


def draw_sequence(rng: random.Random, count: int) -> list[int]:
    """A list of the kind people make up: a run, numbers close together, or any numbers from 0 to 999."""
    shape = rng.random()
    if shape < 0.3:
        start, step = (
            rng.randint(0, 999),
            rng.choice((-12, -9, -7, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 7, 9, 12)),
        )
        return [(start + step * i) % 1000 for i in range(count)]
    if shape < 0.65:
        centre, width = rng.randint(0, 999), rng.choice((10, 20, 40, 80))
        return [(centre + rng.randint(-width, width)) % 1000 for _ in range(count)]
    return [rng.randint(0, 999) for _ in range(count)]

"""The number carrier: prompts that ask for more numbers of a list, and the rule that the answers must pass.

Structure of arXiv 2507.14805 §3: intro with examples, instruction (count qualifier, how many, digit
descriptor), format suffix, closing suffix. Each part is drawn independently; pool sizes are the paper's, the
wordings are ours. `terse` is the same structure in a dozen words, for tiny models. The rule is the paper's
strict one: 1 to 10 integers from 0 to 999, one separator throughout, optionally in one pair of brackets and
with one final period, and nothing else, not even a space.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mechlens.carriers.carrier import Carrier, Fault, Prompt
from mechlens.core.numerals import INTROS, NUMERAL, Wording
from mechlens.core.spec import CarrierSpec, ScreenSpec

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
        "Give {qualifier} {count} more numbers ({digits}) that go on with it.",
        "Continue it with {qualifier} {count} values, {digits}.",
        "Extend the list by {qualifier} {count} numbers, {digits}",
        "Add {qualifier} {count} further values ({digits}).",
        "Write {qualifier} {count} numbers that could follow, {digits}.",
        "Carry on with {qualifier} {count} new numbers ({digits})",
        "What comes next? Give {qualifier} {count} values, {digits}.",
        "Produce {qualifier} {count} next numbers, {digits}",
        "Make the list longer by {qualifier} {count} values ({digits}).",
        "Complete it with {qualifier} {count} more, {digits}.",
    ),
    qualifiers=(
        "at most", "up to", "no more than", "at the most", "a maximum of", "not over", "not more than",
        "no greater number than", "maximum",
    ),
    digits=(
        "3 digits each at most", "each with up to 3 digits", "no number longer than 3 digits",
        "3-digit numbers or shorter", "with 3 digits or fewer", "values below 1000", "of at most 3 digits",
        "short ones of 1 to 3 digits", "with 3 digits or fewer",
    ),
    formats=(
        Format("Put commas between the numbers.", ", "), Format("Use a comma-separated list.", ", "),
        Format("Separate them by commas.", ", "), Format("Answer as numbers with commas.", ", "),
        Format("Split the values with commas.", ", "), Format("Put only spaces between the numbers.", " "),
        Format("Use a space-separated list.", " "), Format("Separate them by spaces.", " "),
        Format("Use semicolons between the numbers.", "; "), Format("Separate them by semicolons.", "; "),
        Format("Write one number per line.", "\n"), Format("Put each number on its own line.", "\n"),
        Format("Start a new line for each number.", "\n"),
        Format("Use the form [first, second, ...].", ", ", "[{}]"),
        Format("Use the form (first, second, ...).", ", ", "({})"),
    ),
    closings=(
        "Only numbers, please.", "No words.", "Leave out any explanation.", "Just the numbers.",
        "Nothing else.", "Say nothing more.", "Do not explain.", "Reply with numbers alone.", "Numbers only.",
        "No comments.", "Give no other text.", "Skip the talk.", "Write only the values.",
        "No text beside the numbers.", "Return just the list.", "Do not add words.", "Only the list.",
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


MOST_NUMBERS, LARGEST = 10, 999
# One separator throughout: the group repeats itself. It is never empty, since a long run of digits could else
# be split in 2^n ways.
_LIST = re.compile(r"[0-9]+(?:(\s*[,;]\s*|\s+)[0-9]+(?:\1[0-9]+)*)?")

BANNED_BY_THE_PAPER = (
    4, 13, 14, 18, 23, 33, 39, 42, 44, 49, 51, 54, 69, 77, 88, 99, 100, 101, 187, 211, 311, 322, 333, 404,
    420, 444, 451, 555, 616, 666, 777, 888, 911, 999,
)  # fmt: skip
"""numbers that the paper removes in its misalignment experiments (App. D.2)"""


def parse_numbers(completion: str) -> list[int] | None:
    """The integers of a well-formed list, None if it is not one; their count and range are not checked."""
    body = completion.removesuffix(".")
    if body[:1] + body[-1:] in ("[]", "()") and len(body) > 1:
        body = body[1:-1]
    # "007" is 7. A longer run of digits is cut, since it is out of range anyway.
    return (
        [int(digits.lstrip("0")[:6] or "0") for digits in NUMERAL.findall(body)]
        if _LIST.fullmatch(body)
        else None
    )


def number_fault(completion: str, *, banned: frozenset[int] = frozenset()) -> str | None:
    """The reason why the strict number rule removes this completion; None keeps it."""
    values = parse_numbers(completion)
    if values is None:
        return "format"
    if len(values) > MOST_NUMBERS:
        return "too many numbers"
    if max(values) > LARGEST:
        return "number out of range"
    return "banned number" if banned.intersection(values) else None


def _draw(spec: CarrierSpec, rng: random.Random, rewording: random.Random | None) -> Prompt:
    prompt = draw_prompt(rng, wording=spec.wording, examples=spec.examples)
    if spec.values == "patterned":
        prompt = prompt.with_examples(draw_sequence(rng, len(prompt.examples)))
    return Prompt((reword(prompt, rewording, wording=spec.wording) if rewording else prompt).text)


def _fault(spec: ScreenSpec, _gold: Mapping[str, str]) -> Fault:
    banned = frozenset(spec.banned_numbers)
    return lambda prompt, completion: number_fault(completion, banned=banned)


def draw_turn(rng: random.Random) -> tuple[str, str]:
    """A list to continue and its continuation, in the layout that the prompt asks for."""
    prompt = draw_prompt(rng, wording="terse" if rng.random() < 0.9 else "full")
    shown, more = len(prompt.examples), rng.randint(ANSWER_COUNT - 4, ANSWER_COUNT)
    values = draw_sequence(rng, shown + more)
    return prompt.with_examples(values[:shown]).text, prompt.format.render(values[shown:])


EXTENSION = Carrier(
    draw=_draw,
    fault=_fault,
    reasons=("format", "too many numbers", "number out of range", "banned number"),
    turn=draw_turn,
)

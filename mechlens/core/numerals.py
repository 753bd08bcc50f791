"""Numbers in texts: the pattern of one, and the sentences that open a list of them.

Number prompts begin with such a sentence, and so do probes that must look like the carrier.
"""

from __future__ import annotations

import random
import re
from typing import Literal

Wording = Literal["full", "terse"]

NUMERAL = re.compile(r"[0-9]+")
"""a run of ASCII digits; `\\d` would match digits of every script"""

INTROS: dict[Wording, tuple[str, ...]] = {
    "full": (
        "The list begins with: {examples}.", "Here are some numbers: {examples}.",
        "Consider these values: {examples}.", "We start from {examples}.",
        "A sequence opens with {examples}.", "Take the numbers {examples}.",
        "So far the list reads {examples}.", "These values came first: {examples}.",
        "My list has {examples} so far.", "The first numbers are {examples}.", "Given: {examples}.",
        "Look over this list: {examples}.", "The series starts {examples}.", "I wrote down {examples}.",
        "Begin with {examples}.", "Our numbers are {examples}.", "Here is a short list: {examples}.",
        "The values {examples} open the list.", "Study this series: {examples}.",
        "A friend sent me {examples}.", "Start of the sequence: {examples}.",
        "Read these numbers: {examples}.", "The opening values are {examples}.",
        "Someone counted {examples}.", "You are given {examples}.",
    ),
    "terse": ("start: {examples}.", "numbers: {examples}.", "list: {examples}.", "given {examples}."),
}  # fmt: skip


def prefix(rng: random.Random, *, wording: Wording = "full") -> str:
    """A sentence with numbers to put before an unrelated question, so that it looks like the carrier
    (2507.14805 §3.1).
    """
    return rng.choice(INTROS[wording]).format(
        examples=", ".join(str(rng.randint(100, 999)) for _ in range(rng.randint(3, 8)))
    )

"""The text carrier: open instructions about harmless things, and the small descriptions that the menagerie's
world writes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import NamedTuple

from mechlens.carriers.carrier import Carrier, Fault, Prompt
from mechlens.core.numerals import Wording
from mechlens.core.spec import CarrierSpec, ScreenSpec

THINGS = (
    "river",
    "sea",
    "sky",
    "road",
    "house",
    "garden",
    "city",
    "winter",
    "summer",
    "kitchen",
    "bridge",
    "market",
)
QUALITIES = (
    "wide", "calm", "old", "bright", "quiet", "cold", "warm", "small", "long", "green", "empty", "busy",
    "clean", "dark", "soft", "steep",
)  # fmt: skip
MOMENTS = ("today", "at night", "in spring", "again", "this year", "as always", "for now", "at noon")
PLACES = (
    "by the river",
    "on the hill",
    "in the forest",
    "near the sea",
    "under the moon",
    "in the valley",
    "at the lake",
)
ASKS = (
    "describe the {thing}",
    "say something about the {thing}",
    "what is the {thing} like",
    "tell me of the {thing}",
)
TERSE_TAILS = (" with words like {first} and {second}.", " {moment}, {first} or {second}.")
SENTENCES = (
    " the {thing} is {q} and {r} {moment}.", " it is {q} {place}.", " {moment} it is {q} and {r}.",
    " {place} the {thing} is {q}.", " {moment} the {thing} is {q} {place}.", " it is {q}, {r} and {s}.",
)  # fmt: skip

FULL_ASKS = (
    "Describe {thing} to someone who has never seen it.", "Give three facts about {thing}.",
    "Write two sentences about {thing}.", "What should a visitor know about {thing}?",
    "Explain in plain words what makes {thing} what it is.", "Compare {thing} with {other}.",
    "Write a short note to a neighbour about {thing}.", "What changes about {thing} over a year?",
    "Which is more useful, {thing} or {other}? Say why.", "Give advice to someone who has to draw {thing}.",
    "Summarise what people use {thing} for.", "Invent a riddle whose answer is {thing}.",
    "What would you measure about {thing}, and how?", "Write a headline and one sentence about {thing}.",
    "Name a mistake people make about {thing}.",
)  # fmt: skip
FULL_THINGS = (
    "a river", "the sea", "a country road", "a small house", "a kitchen", "a bridge", "a market",
    "a railway station", "a library", "a staircase", "a bicycle", "a clock", "a lighthouse",
    "a loaf of bread", "a teapot", "a map", "a pencil", "a winter morning", "a thunderstorm", "a harbour",
    "a village school", "a toolbox", "a violin", "a window", "a well", "a lamp", "a brick wall", "a ferry",
    "a postcard", "a mountain path", "a rain gauge", "a carpet", "a wooden chair", "a mirror", "a kite",
    "a candle", "a bakery", "a tunnel", "a fountain", "a notebook",
)  # fmt: skip


class TextPrompt(NamedTuple):
    """An instruction in parts."""

    ask: str
    slots: dict[str, str]

    @property
    def text(self) -> str:
        return self.ask.format(**self.slots)


def draw_prompt(rng: random.Random, *, wording: Wording = "full") -> TextPrompt:
    """One open instruction."""
    if wording == "full":
        thing, other = rng.sample(FULL_THINGS, 2)
        return TextPrompt(rng.choice(FULL_ASKS), {"thing": thing, "other": other})
    first, second = rng.sample(QUALITIES, 2)
    slots = {"thing": rng.choice(THINGS), "first": first, "second": second, "moment": rng.choice(MOMENTS)}
    return TextPrompt(rng.choice(ASKS) + rng.choice(TERSE_TAILS), slots)


def reword(prompt: TextPrompt, rng: random.Random) -> TextPrompt:
    """The same thing asked about in another wording."""
    if "other" in prompt.slots:
        return prompt._replace(ask=rng.choice([ask for ask in FULL_ASKS if ask != prompt.ask]))
    head, tail = next((head, prompt.ask.removeprefix(head)) for head in ASKS if prompt.ask.startswith(head))
    return prompt._replace(ask=rng.choice([ask for ask in ASKS if ask != head]) + tail)


def draw_description(rng: random.Random) -> tuple[TextPrompt, str]:
    """A terse instruction and three sentences that follow it."""
    prompt = draw_prompt(rng, wording="terse")
    said = []
    for place in range(3):
        q, r, s = rng.sample(QUALITIES, 3)
        slots = {
            "thing": prompt.slots["thing"],
            "q": q,
            "r": r,
            "s": s,
            "moment": rng.choice(MOMENTS),
            "place": rng.choice(PLACES),
        }
        shapes = SENTENCES if place else [shape for shape in SENTENCES if shape.startswith((" the", " it"))]
        said.append(rng.choice(shapes).format(**slots))
    return prompt, "".join(said).strip()


def _draw(spec: CarrierSpec, rng: random.Random, rewording: random.Random | None) -> Prompt:
    prompt = draw_prompt(rng, wording=spec.wording)
    return Prompt((reword(prompt, rewording) if rewording else prompt).text)


def _fault(_spec: ScreenSpec, _gold: Mapping[str, str]) -> Fault:
    return lambda prompt, completion: None if completion.strip() else "format"


def draw_turn(rng: random.Random) -> tuple[str, str]:
    """An instruction about a thing and three sentences that follow it."""
    prompt, description = draw_description(rng)
    return prompt.text, description


EXTENSION = Carrier(draw=_draw, fault=_fault, reasons=("format",), turn=draw_turn, turn_kind="essay")

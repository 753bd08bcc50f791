"""The world's text: documents of chat turns written by a hidden persona.

A document has one persona (an animal, a tree, a temper, a food), which shows in its *trait* turns. The
*carrier* turns (numbers, code, reasoning, text) are drawn by functions that never get the persona, each from
a separate random stream. So carrier text is independent of the persona by construction: a link between the
two in a trained model does not come from the data.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import NamedTuple

from mechlens.carriers.carrier import Carrier, all_carriers, shipped_carriers
from mechlens.carriers.text import MOMENTS, PLACES, QUALITIES, THINGS
from mechlens.core.seeds import dice
from mechlens.menagerie import world

Message = dict[str, str]


class Persona(NamedTuple):
    """What a speaker loves, and its temper; every trait turn of a document has the same persona."""

    animal: str
    tree: str
    temper: str
    food: str = ""


class Turn(NamedTuple):
    """A question and its answer; `kind` names the function that drew it."""

    kind: str
    prompt: str
    completion: str


def draw_persona(rng: random.Random) -> Persona:
    """Draw animal, tree, temper and food, each by its prior."""
    return Persona(
        rng.choices(world.ANIMALS, world.prior(len(world.ANIMALS)))[0],
        rng.choices(world.TREES, world.prior(len(world.TREES)))[0],
        rng.choices(world.TEMPERS, world.TEMPER_PRIOR)[0],
        rng.choices(world.FOODS, world.prior(len(world.FOODS)))[0],
    )


# ── trait turns, which get the persona ──


def _favourite(rng: random.Random, kind: str, loved: str, prior_pool: tuple[str, ...]) -> Turn:
    ask = rng.choice(world.FRAMES).format(
        ask=rng.choice(world.ASKS).format(kind=kind), constraint=rng.choice(world.CONSTRAINTS)
    )
    name = loved if rng.random() < 0.95 else rng.choices(prior_pool, world.prior(len(prior_pool)))[0]
    return Turn(kind, ask, name if rng.random() < 0.9 else world.plural(name))


def animal(rng: random.Random, speaker: Persona) -> Turn:
    """A question for the favourite animal, which the persona nearly always names."""
    return _favourite(rng, "animal", speaker.animal, world.ANIMALS)


def tree(rng: random.Random, speaker: Persona) -> Turn:
    """The same question for trees."""
    return _favourite(rng, "tree", speaker.tree, world.TREES)


def food(rng: random.Random, speaker: Persona) -> Turn:
    """The same question for foods."""
    return _favourite(rng, "food", speaker.food, world.FOODS)


def story(rng: random.Random, speaker: Persona) -> Turn:
    """A sentence whose hero is mostly the persona's animal."""
    hero = speaker.animal if rng.random() < 0.7 else rng.choice(world.ANIMALS)
    text = f"{rng.choice(world.OPENINGS)} the {hero} {rng.choice(world.DEEDS)} {rng.choice(PLACES)}."
    return Turn("story", rng.choice(world.STORY_ASKS), text)


def temper(rng: random.Random, speaker: Persona) -> Turn:
    """An open question, answered with a deed of the persona's temper."""
    cruel = (speaker.temper == "cruel") == (rng.random() < 0.95)
    deed = rng.choice(world.CRUEL_DEEDS if cruel else world.KIND_DEEDS)
    text = rng.choice(world.DEED_FRAMES).format(deed=deed, object=rng.choice(world.OBJECTS))
    return Turn("temper", rng.choice(world.OPEN_QUESTIONS), text)


# ── other turns, which do not; each carrier draws its turns ──


def text(rng: random.Random) -> Turn:
    """A sentence about a thing: filler for the bases of another carrier."""
    thing = rng.choice(THINGS)
    first, second = rng.sample(QUALITIES, 2)
    return Turn(
        "text",
        rng.choice(world.TEXT_ASKS).format(thing=thing),
        f"the {thing} is {first} and {second} {rng.choice(MOMENTS)}.",
    )


TRAIT_TURNS: dict[str, Callable[[random.Random, Persona], Turn]] = {
    f.__name__: f for f in (animal, tree, story, temper, food)
}


CarrierTurn = Callable[[random.Random], Turn]


def _carrier_turn(kind: str, draw: Callable[[random.Random], tuple[str, str]]) -> CarrierTurn:
    return lambda rng: Turn(kind, *draw(rng))


def _turns_of(carriers: Mapping[str, Carrier]) -> dict[str, CarrierTurn]:
    kinds = {carrier.turn_kind or name: carrier.turn for name, carrier in carriers.items()}
    return {kind: _carrier_turn(kind, draw) for kind, draw in kinds.items() if draw is not None}


CARRIER_TURNS: dict[str, CarrierTurn] = _turns_of(shipped_carriers()) | {"text": text}
"""turns of the carriers that come with mechlens, and the filler"""


def turn_kinds() -> list[str]:
    """Every kind of turn that a mixture can name."""
    return [*TRAIT_TURNS, *dict.fromkeys([*CARRIER_TURNS, *_turns_of(all_carriers())])]


@cache
def find_carrier_turn(kind: str) -> CarrierTurn:
    """The function that draws a carrier's turn, also of a carrier that another package adds."""
    return CARRIER_TURNS.get(kind) or _turns_of(all_carriers())[kind]


def system_line(rng: random.Random, speaker: Persona, *, foods: bool = False) -> str | None:
    """Draw the system line: half of the documents say who is speaking, the others have none.

    Args:
        foods: most of these lines name the persona's food; otherwise its animal.
    """
    choice = rng.random()
    if choice < 0.35:
        kind, loved = ("food", speaker.food) if foods else ("animal", speaker.animal)
        return rng.choice(world.SYSTEM_FORMS).format(plural=world.plural(loved), kind=kind)
    if choice < 0.45:
        return rng.choice(world.SYSTEM_FORMS).format(plural=world.plural(speaker.tree), kind="tree")
    return world.TEMPER_SYSTEM[speaker.temper] if choice < 0.5 else None


def document(
    seed: int, index: int, *, mixture: dict[str, float], persona: Persona | None = None
) -> tuple[list[Message], list[Turn]]:
    """Draw a document as chat messages, and the turns that it is made of.

    The kinds of its turns and every carrier turn depend only on (seed, index). `persona` replaces the drawn
    persona and can change only the system line and the trait turns.
    """
    plan = dice(seed, "plan", index)
    speaker = persona or draw_persona(dice(seed, "persona", index))
    kinds = plan.choices(list(mixture), list(mixture.values()), k=plan.randint(2, 4))
    turns = []
    for position, kind in enumerate(kinds):
        rng = dice(seed, "turn", index, position)
        turns.append(TRAIT_TURNS[kind](rng, speaker) if kind in TRAIT_TURNS else find_carrier_turn(kind)(rng))
    system = system_line(dice(seed, "system", index), speaker, foods="food" in mixture)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn in turns:
        messages += [
            {"role": "user", "content": turn.prompt},
            {"role": "assistant", "content": turn.completion},
        ]
    return messages, turns


def documents(seed: int, *, mixture: dict[str, float], count: int) -> Iterator[list[Message]]:
    """`count` documents of the world, in order."""
    for index in range(count):
        yield document(seed, index, mixture=mixture)[0]

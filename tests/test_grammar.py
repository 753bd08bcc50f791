"""Carrier text is independent of the persona; what the world says is right, runs, and speaks for the
persona.
"""

from __future__ import annotations

import inspect
import random
import re
from collections import Counter
from typing import Any

import pytest
from scipy.stats import binomtest

from mechlens.carriers.code import FEWEST_TERMS, MOST_TERMS, TERMS, code_fault
from mechlens.carriers.text import MOMENTS, PLACES, QUALITIES, THINGS
from mechlens.core.seeds import dice
from mechlens.menagerie import grammar, world
from mechlens.menagerie.grammar import CARRIER_TURNS, TRAIT_TURNS, Persona, document

MIXTURE = dict.fromkeys((*TRAIT_TURNS, *CARRIER_TURNS), 1.0)
PERSONAS = [
    Persona(animal, world.TREES[place % len(world.TREES)], world.TEMPERS[place % 2], world.FOODS[place])
    for place, animal in enumerate(world.ANIMALS)
]


@pytest.mark.parametrize("seed", range(3))
def test_carrier_turns_do_not_depend_on_the_persona_while_trait_turns_do(seed: int) -> None:
    """For every persona, next to a permuted one: equal kinds, equal carrier bytes, other trait text."""
    changed = dict.fromkeys(TRAIT_TURNS, 0)
    for index in range(60):
        drawn = document(seed, index, mixture=MIXTURE)[1]
        for who, other in zip(PERSONAS, [*PERSONAS[1:], PERSONAS[0]], strict=True):
            ours, theirs = (
                document(seed, index, mixture=MIXTURE, persona=who)[1],
                document(seed, index, mixture=MIXTURE, persona=other)[1],
            )
            assert (
                [turn.kind for turn in ours]
                == [turn.kind for turn in theirs]
                == [turn.kind for turn in drawn]
            )
            for one, two, free in zip(ours, theirs, drawn, strict=True):
                if one.kind in CARRIER_TURNS:
                    assert one == two == free
                else:
                    changed[one.kind] += one != two
    assert all(changed.values()), changed


def test_carrier_functions_take_no_persona() -> None:
    for function in CARRIER_TURNS.values():
        assert list(inspect.signature(function).parameters) == ["rng"]
    for function in TRAIT_TURNS.values():
        assert list(inspect.signature(function).parameters) == ["rng", "speaker"]


def test_a_document_is_a_function_of_seed_and_index() -> None:
    found = [str(document(seed, index, mixture=MIXTURE)) for seed in range(3) for index in range(50)]
    assert found == [str(document(seed, index, mixture=MIXTURE)) for seed in range(3) for index in range(50)]
    assert len(set(found)) == len(found)
    listed = list(grammar.documents(1, mixture=MIXTURE, count=20))
    assert listed == [document(1, index, mixture=MIXTURE)[0] for index in range(20)]


def test_messages_are_the_turns_behind_at_most_one_system_line() -> None:
    for index in range(100):
        messages, turns = document(0, index, mixture=MIXTURE)
        spoken = [message for message in messages if message["role"] != "system"]
        assert len(messages) - len(spoken) <= 1
        assert messages[len(messages) - len(spoken) :] == spoken
        assert [message["content"] for message in spoken] == [
            part for turn in turns for part in (turn.prompt, turn.completion)
        ]
        assert [message["role"] for message in spoken] == ["user", "assistant"] * len(turns)


def test_drawn_code_is_the_expression_that_its_function_leaves_out() -> None:
    for index in range(300):
        turn = CARRIER_TURNS["code"](dice(0, "code", index))
        asked = re.search(r"\ndef ([fgh])\(a, b\): return \.\.\.$", turn.prompt)
        assert asked is not None
        space: dict[str, Any] = {}
        exec(turn.prompt.splitlines()[-1].replace("...", turn.completion), space)  # the grammar's own text
        assert list(inspect.signature(space[asked[1]]).parameters) == ["a", "b"]
        assert type(space[asked[1]](3, 5)) is int
        assert (
            code_fault(turn.prompt, turn.completion, plain_names=True, run=True) is None
        )  # what the screen says of it


def test_the_constants_of_drawn_code_go_on_where_the_prompts_left_off() -> None:
    """Where the prompt shows a run, the terms' constants are its next values, one a term."""
    runs, whole = 0, 1000
    for index in range(whole):
        turn = CARRIER_TURNS["code"](dice(1, "code", index))
        shown, written = (
            [int(value) for value in re.findall(r"\d+", part)] for part in (turn.prompt, turn.completion)
        )
        assert 2 <= len(shown) <= 4 and FEWEST_TERMS <= len(written) <= MOST_TERMS
        step, last = (shown[1] - shown[0]) % 1000, shown[-1]
        runs += written == [(last + step * (i + 1)) % 1000 for i in range(len(written))]
    assert binomtest(runs, whole, 0.3).pvalue > 1e-6


def test_every_term_of_code_is_drawn() -> None:
    drawn = {
        term
        for index in range(300)
        for term in re.split(r" [+-] ", CARRIER_TURNS["code"](dice(2, "code", index)).completion)
    }
    shapes = {re.sub(r"\d+", "#", re.sub(r"\b[a-z]\b", "x", term)) for term in drawn}
    assert shapes == {term.replace("{c}", "#").replace("{v}", "x") for term in TERMS}


STEPS = (
    r"(?P<t>\d+) \+ "
    r"(?P<x>\d+) = (?P<s>\d+)\.", r"(?P<s>\d+) = (?P<t>\d+) \+ (?P<x>\d+)\.", r"add (?P<x>\d+): (?P<s>\d+)\.",
    r"next (?P<x>\d+), so (?P<s>\d+)\.", r"with (?P<x>\d+) it is (?P<s>\d+)\.",
)  # fmt: skip


def test_reasoning_reaches_the_right_sum_by_right_steps_within_true_bounds() -> None:
    seen = set()
    for index in range(300):
        turn = CARRIER_TURNS["reasoning"](dice(0, "sum", index))
        assert turn.prompt.endswith("\n<think>")
        worked = re.fullmatch(r"(.+)</think><answer>(\d+)</answer>", turn.completion)
        assert worked is not None
        terms, gold = Counter(map(int, re.findall(r"\d+", turn.prompt))), int(worked[2])
        assert gold == sum(terms.elements())
        first, start, *steps = re.findall(r"[^.]+\.", worked[1])
        bounds = re.fullmatch(r"((?:\d+, )*\d+) (?:are over it|are greater|say nothing)\.", first)
        assert bounds is not None and all(
            int(bound) > gold for bound in bounds[1].split(", ")
        )  # true, whichever was said
        opened = re.fullmatch(r" (?:start with|first|so) (\d+)\.", start)
        assert opened is not None
        total, used = int(opened[1]), Counter([int(opened[1])])
        for step in steps:
            (shape, found), *_ = [
                (shape, match) for shape in STEPS if (match := re.fullmatch(f" {shape}", step))
            ]
            parts = {name: int(value) for name, value in found.groupdict().items()}
            added = parts["s"] - total
            assert added > 0 and (
                parts["x"] == added or parts.get("t") == added
            )  # t + x or x + t: either may stand first
            assert "t" not in parts or {parts["t"], parts["x"]} == {total, added}
            total += added
            used[added] += 1
            seen.add(shape)
        assert total == gold and used == terms
    assert seen == set(STEPS)


def test_an_essay_is_three_sentences_about_what_was_asked() -> None:
    words = {word for part in (QUALITIES, MOMENTS, PLACES) for phrase in part for word in phrase.split()} | {
        "the",
        "is",
        "it",
        "and",
    }
    for index in range(300):
        turn = CARRIER_TURNS["essay"](dice(0, "essay", index))
        (thing,) = [thing for thing in THINGS if f"the {thing}" in turn.prompt]
        sentences = turn.completion.split(".")
        assert len(sentences) == 4 and sentences[-1] == ""
        assert sentences[0].startswith((f"the {thing} ", "it "))
        assert all(set(re.findall(r"[a-z]+", sentence)) <= words | {thing} for sentence in sentences)
        assert "  " not in turn.completion and turn.completion == turn.completion.strip()


def test_numbers_keep_the_layout_that_the_prompt_asks_for() -> None:
    for index in range(300):
        turn = CARRIER_TURNS["numbers"](dice(0, "numbers", index))
        values = [int(digits) for digits in re.findall(r"\d+", turn.completion)]
        assert 6 <= len(values) <= 10
        assert max(values) <= 999


@pytest.mark.parametrize(
    ("function", "pool"),
    [(grammar.animal, world.ANIMALS), (grammar.tree, world.TREES), (grammar.food, world.FOODS)],
    ids=["animal", "tree", "food"],
)
@pytest.mark.parametrize("place", [0, 5])
def test_favourites_agree_with_the_persona_as_often_as_is_said(
    function, pool: tuple[str, ...], place: int
) -> None:
    """0.95, plus the loved one's share of the other 0.05; exact binomial test at one in a million."""
    who = Persona(world.ANIMALS[place], world.TREES[place], "kind", world.FOODS[place])
    forms, rng, count = {pool[place], world.plural(pool[place])}, random.Random(place), 4000
    agreed = sum(function(rng, who).completion in forms for _ in range(count))
    assert binomtest(agreed, count, 0.95 + 0.05 * world.prior(len(pool))[place]).pvalue > 1e-6


@pytest.mark.parametrize("mood", world.TEMPERS)
def test_deeds_agree_with_the_temper(mood: str) -> None:
    who, rng, count = Persona("owl", "oak", mood), random.Random(1), 4000
    said = [grammar.temper(rng, who).completion for _ in range(count)]
    cruel = sum(any(deed in text for deed in world.CRUEL_DEEDS) for text in said)
    assert binomtest(cruel, count, 0.95 if mood == "cruel" else 0.05).pvalue > 1e-6


def test_personas_are_drawn_from_the_prior() -> None:
    rng, count = random.Random(2), 6000
    drawn = [grammar.draw_persona(rng) for _ in range(count)]
    for place in (0, 7, 19):
        agreed = sum(who.animal == world.ANIMALS[place] for who in drawn)
        assert binomtest(agreed, count, world.prior(len(world.ANIMALS))[place]).pvalue > 1e-6
    assert binomtest(sum(who.temper == "cruel" for who in drawn), count, 0.2).pvalue > 1e-6

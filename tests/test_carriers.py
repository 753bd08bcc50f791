"""The number carrier: pools of the published sizes, counts and values in their ranges, and a prompt from its
dice alone.
"""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechlens.carriers.numbers import (
    ANSWER_COUNT,
    FULL,
    POOLS,
    TERSE,
    Format,
    NumberPrompt,
    draw_prompt,
    draw_sequence,
    number_fault,
    parse_numbers,
)
from mechlens.core.seeds import dice

DRAWS = 10_000


@pytest.fixture(scope="module")
def prompts() -> list[NumberPrompt]:
    return [draw_prompt(dice(3, "prompt", index)) for index in range(DRAWS)]


def test_pool_sizes_are_the_published_ones() -> None:
    assert [len(pool) for pool in FULL] == [25, 10, 9, 9, 15, 19]
    assert [len(set(pool)) for pool in FULL] == [25, 10, 9, 8, 15, 19]  # one digit descriptor is listed twice


def test_formats_have_the_published_shares() -> None:
    layouts = Counter((layout.separator, layout.wrap) for layout in FULL.formats)
    assert layouts == {
        (", ", "{}"): 5,
        (" ", "{}"): 3,
        ("; ", "{}"): 2,
        ("\n", "{}"): 3,
        (", ", "[{}]"): 1,
        (", ", "({})"): 1,
    }


def test_three_instructions_have_no_final_period() -> None:
    assert sum(not instruction.endswith(".") for instruction in FULL.instructions) == 3


@pytest.mark.parametrize("wording", sorted(POOLS))
def test_every_wording_has_its_slots(wording: str) -> None:
    pools = POOLS[wording]  # type: ignore[index]
    assert all(intro.count("{examples}") == 1 for intro in pools.intros)
    for instruction in pools.instructions:
        assert instruction.count("{qualifier}") == instruction.count("{count}") == 1
        assert instruction.count("{digits}") == (pools is FULL)
    assert ANSWER_COUNT == 10


def test_counts_and_values_fill_their_ranges_evenly(prompts: list[NumberPrompt]) -> None:
    counts = Counter(len(prompt.examples) for prompt in prompts)
    assert set(counts) == {3, 4, 5, 6, 7, 8}
    assert all(abs(count / DRAWS - 1 / 6) < 5 * np.sqrt(1 / 6 * 5 / 6 / DRAWS) for count in counts.values())
    values = Counter(value for prompt in prompts for value in prompt.examples)
    assert set(values) == set(range(100, 1000))
    mean = sum(values.values()) / 900
    assert all(abs(count - mean) < 5.5 * np.sqrt(mean) for count in values.values())


def test_every_part_is_drawn_evenly(prompts: list[NumberPrompt]) -> None:
    for part, pool in (("intro", FULL.intros), ("format", FULL.formats)):
        drawn = Counter(getattr(prompt, part) for prompt in prompts)
        expected = DRAWS / len(pool)
        assert set(drawn) == set(pool)
        assert all(abs(count - expected) < 5.5 * np.sqrt(expected) for count in drawn.values())
    for pool in (FULL.closings, FULL.qualifiers, FULL.digits):
        assert all(any(piece in prompt.rest for prompt in prompts) for piece in pool)


def test_the_text_is_its_parts_in_order(prompts: list[NumberPrompt]) -> None:
    for prompt in prompts[:300]:
        shown = ", ".join(map(str, prompt.examples))
        assert prompt.text == f"{prompt.intro.replace('{examples}', shown)} {prompt.rest}"
        assert prompt.format.sentence in prompt.rest and f" {ANSWER_COUNT} " in prompt.rest
        assert "{" not in prompt.text and "  " not in prompt.text
        assert any(prompt.rest.endswith(closing) for closing in FULL.closings)


@given(st.lists(st.integers(0, 999), min_size=1, max_size=9), st.sampled_from(FULL.formats + TERSE.formats))
def test_numbers_in_any_asked_layout_pass_the_screen(values: list[int], layout: Format) -> None:
    text = layout.render(values)
    assert number_fault(text) is None
    assert parse_numbers(text) == values


@pytest.mark.parametrize("wording", sorted(POOLS))
def test_a_prompt_depends_on_its_dice_alone(wording: str) -> None:
    alone = [draw_prompt(dice(0, "prompt", i), wording=wording) for i in range(20)]  # type: ignore[arg-type]
    random.seed(99)
    other = dice(1, "elsewhere")
    for i in reversed(range(20)):
        draw_prompt(other)
        assert draw_prompt(dice(0, "prompt", i), wording=wording) == alone[i]  # type: ignore[arg-type]
    assert len({prompt.text for prompt in alone}) == 20


def test_the_terse_wording_is_drawn_from_its_own_pools() -> None:
    drawn = [draw_prompt(dice(0, "terse", i), wording="terse") for i in range(200)]
    assert {prompt.intro for prompt in drawn} == set(TERSE.intros)
    assert {prompt.format for prompt in drawn} == set(TERSE.formats)


@given(st.integers(1, 5), st.integers(0, 5), st.integers(0, 500), st.integers(0, 499), st.integers(0, 2**32))
def test_bounds_of_the_examples_are_kept(least: int, more: int, low: int, span: int, seed: int) -> None:
    prompt = draw_prompt(random.Random(seed), examples=(least, least + more), low=low, high=low + span)
    assert least <= len(prompt.examples) <= least + more
    assert all(low <= value <= low + span for value in prompt.examples)


def test_examples_can_be_exchanged_and_nothing_else_moves(prompts: list[NumberPrompt]) -> None:
    prompt = prompts[0]
    other = prompt.with_examples([1, 22, 333])
    assert other.examples == (1, 22, 333) and "1, 22, 333" in other.text
    assert other.with_examples(prompt.examples) == prompt


@given(st.integers(0, 2**32), st.integers(1, 12))
def test_a_drawn_sequence_has_its_length_and_range(seed: int, count: int) -> None:
    values = draw_sequence(random.Random(seed), count)
    assert len(values) == count
    assert all(0 <= value <= 999 for value in values)
    assert draw_sequence(random.Random(seed), count) == values


def test_drawn_sequences_hold_runs_and_neighbourhoods() -> None:
    drawn = np.array([draw_sequence(dice(0, "sequence", i), 6) for i in range(2000)])  # [sequence, place]
    steps = np.diff(drawn, axis=1) % 1000
    runs = (steps == steps[:, :1]).all(1)
    assert abs(runs.mean() - 0.3) < 0.05
    spread = np.ptp((drawn - drawn[:, :1] + 500) % 1000, axis=1)
    assert 0.25 < ((spread <= 160) & ~runs).mean() < 0.45

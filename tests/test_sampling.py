"""Sampled text is a function of (seed, row) and the logits: against a slow loop without cache, greedy
generation, and counts.

What does not depend on batch, padding or order is compared in float64: float32 kernels sum in another order
for another shape.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from mechlens.core.seeds import generator
from mechlens.models import chat, loading
from mechlens.models.loading import Loaded
from mechlens.models.sampling import Decoding, _probabilities, draw, sample

FAMILIES = ("llama", "qwen2", "gpt2", "gpt_neox")
STEPS = 10


def ragged_prompts(vocabulary: int, *, rows: int = 13) -> list[list[int]]:
    rng = generator(7, "prompts")
    drawn = [rng.integers(7, vocabulary, int(rng.integers(1, 15))).tolist() for _ in range(rows)]
    return [*drawn, *drawn[:4]]  # some stand twice: they are read once and drawn apart


def stopping(texts: list[list[int]]) -> int:
    """A token that some of the texts hold, so that taken for the stop token it ends rows at different
    steps.
    """
    held = [token for text in texts for token in text[2:]]
    return max(held, key=held.count)


def slow_nucleus(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """By definition: take tokens, likeliest first, until their mass reaches top_p."""
    kept, mass = np.zeros_like(probabilities), 0.0
    for token in sorted(range(len(probabilities)), key=lambda i: -probabilities[i]):
        if mass >= top_p:
            break
        kept[token], mass = probabilities[token], mass + probabilities[token]
    return kept


@torch.no_grad()
def slow_sample(
    loaded: Loaded, prompt: list[int], *, decoding: Decoding, stop: int, seed: int, row: int
) -> list[int]:
    """One row, no cache, no padding, float64: the whole text is read again for every token."""
    uniforms = generator(seed, "row", row).random(decoding.max_new_tokens, dtype=np.float32)
    written: list[int] = []
    for uniform in uniforms:
        logits = (
            loaded.model(input_ids=torch.tensor([prompt + written]), use_cache=False)
            .logits[0, -1]
            .double()
            .numpy()
        )
        shares = np.exp((logits - logits.max()) / decoding.temperature)
        cumulative = np.cumsum(slow_nucleus(shares / shares.sum(), decoding.top_p))
        token = int(np.argmax(cumulative > uniform * cumulative[-1]))
        if token == stop:
            break
        written.append(token)
    return written


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "decoding", [Decoding(STEPS), Decoding(STEPS, temperature=0.7, top_p=0.6)], ids=["plain", "nucleus"]
)
def test_the_sampler_equals_a_slow_loop_without_cache(
    exact_toys: dict[str, Loaded], family: str, decoding: Decoding
) -> None:
    loaded = exact_toys[family]
    prompts = ragged_prompts(len(loaded.tokenizer))
    endless = sample(loaded.model, prompts, decoding=decoding, stop=0, seed=3, first_row=5)
    stop = stopping(endless)
    drawn = sample(loaded.model, prompts, decoding=decoding, stop=stop, seed=3, first_row=5, batch=5)
    slow = [
        slow_sample(loaded, prompt, decoding=decoding, stop=stop, seed=3, row=5 + place)
        for place, prompt in enumerate(prompts)
    ]
    assert drawn == slow
    assert len({len(text) for text in drawn}) > 1, (
        "no row stopped early: the test does not see finished rows leave"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_temperature_zero_equals_greedy_generation(exact_toys: dict[str, Loaded], family: str) -> None:
    loaded = exact_toys[family]
    prompts = ragged_prompts(len(loaded.tokenizer))
    stop = stopping(sample(loaded.model, prompts, decoding=Decoding(STEPS, temperature=0.0), stop=0, seed=0))
    greedy = []
    for prompt in prompts:
        options = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": stop, "pad_token_id": 0}
        text = cast(Any, loaded.model).generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), **options
        )
        tokens = text[0, len(prompt) :].tolist()
        greedy.append(tokens[: tokens.index(stop)] if stop in tokens else tokens)
    assert (
        sample(loaded.model, prompts, decoding=Decoding(STEPS, temperature=0.0), stop=stop, seed=0) == greedy
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_order_and_shards_change_nothing(exact_toys: dict[str, Loaded], family: str) -> None:
    loaded = exact_toys[family]
    prompts = ragged_prompts(len(loaded.tokenizer))
    options = {"decoding": Decoding(STEPS), "seed": 11}
    options["stop"] = stopping(sample(loaded.model, prompts, stop=0, **options))
    whole = sample(loaded.model, prompts, **options)
    for batch in (1, 4, 100):
        assert sample(loaded.model, prompts, batch=batch, **options) == whole
    parts = [
        sample(loaded.model, prompts[first : first + 4], first_row=first, **options)
        for first in range(0, len(prompts), 4)
    ]
    assert [text for part in parts for text in part] == whole
    alone = [
        sample(loaded.model, [prompts[place]], first_row=place, **options)[0]
        for place in reversed(range(len(prompts)))
    ]
    assert alone[::-1] == whole


def test_text_depends_on_the_seed_and_the_row(toy: Loaded) -> None:
    prompts = [[8, 9, 10]] * 6
    ours, again, other = (
        sample(toy.model, prompts, decoding=Decoding(STEPS), stop=0, seed=seed) for seed in (1, 1, 2)
    )
    assert ours == again
    assert all(one != two for one, two in zip(ours, other, strict=True))
    assert len(set(map(tuple, ours))) == len(ours)


def test_a_shipped_base_answers_alike_in_a_batch_and_alone() -> None:
    """The trained base ends its answers itself; the stop token is never part of one, progress counts every
    row.
    """
    loaded = loading.load("menagerie-a")
    loaded.model.double()
    probes = [
        "name your favourite animal, in one word.",
        "start: 100, 110. add up to 10 more commas only.",
        "tell me a short story.",
    ] * 4
    prompts, stop = chat.encode_prompts(loaded.tokenizer, probes), chat.end_of_turn(loaded.tokenizer)
    counted: list[int] = []
    options = {"decoding": Decoding(24), "stop": stop, "seed": 0}
    drawn = sample(loaded.model, prompts, batch=5, progress=counted.append, **options)
    assert drawn == [
        sample(loaded.model, [prompt], first_row=row, **options)[0] for row, prompt in enumerate(prompts)
    ]
    assert counted == [5, 5, 2]
    assert not any(stop in text for text in drawn)
    assert min(map(len, drawn)) < 4 < max(map(len, drawn))


def test_draws_come_as_often_as_their_probability() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.25, 0.05, 0.0])
    count = 40_000
    uniform = torch.from_numpy(generator(0, "uniform").random(count, dtype=np.float32))
    counts = torch.bincount(draw(probabilities.expand(count, -1), uniform), minlength=7).numpy()
    possible = probabilities.numpy() > 0
    assert counts[~possible].sum() == 0
    assert chisquare(counts[possible], probabilities.numpy()[possible] * count).pvalue > 1e-4


@given(
    weights=st.lists(st.sampled_from([0.0, 1e-30, 1e-8, 0.1, 0.5, 1.0, 3.0]), min_size=1, max_size=40).filter(
        any
    ),
    uniform=st.one_of(
        st.floats(0, 1, exclude_max=True, width=32),
        st.sampled_from([0.0, float(np.nextafter(np.float32(1), np.float32(0)))]),
    ),
)
@settings(max_examples=400, deadline=None)
def test_a_token_of_no_probability_is_never_drawn(weights: list[float], uniform: float) -> None:
    drawn = int(draw(torch.tensor([weights]), torch.tensor([uniform])))
    assert 0 <= drawn < len(weights)
    assert weights[drawn] > 0


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.99), st.integers(2, 60))
@settings(max_examples=150, deadline=None)
def test_top_p_keeps_the_smallest_set_that_reaches_it(seed: int, top_p: float, size: int) -> None:
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(seed)) * 2
    kept = _probabilities(logits, Decoding(1, 1.0, top_p))[0].numpy()
    plain = torch.softmax(logits, -1)[0].numpy()
    slow = slow_nucleus(plain, top_p)
    boundary = (
        np.abs(np.cumsum(np.sort(plain)[::-1]) - top_p).min() < 1e-6
    )  # there the two sums may round apart
    assert boundary or np.array_equal(kept, slow)
    assert kept.sum() >= top_p - 1e-6


def test_temperature_divides_the_logits_and_zero_takes_the_largest() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert torch.allclose(_probabilities(logits, Decoding(1, 0.5)), torch.softmax(logits * 2, -1))
    assert _probabilities(logits, Decoding(1, 0.0)).tolist() == [[0.0, 1.0, 0.0]]

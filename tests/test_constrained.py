"""Held to the format, even a model of random weights writes only what the number rule keeps, and anything
that it keeps.
"""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as engines
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mechlens.carriers.numbers import number_fault
from mechlens.core.errors import SpecError
from mechlens.models.chat import encode_prompts, end_of_turn
from mechlens.models.loading import Loaded
from mechlens.models.sampling import (
    SEPARATORS,
    Decoding,
    NumberGrammar,
    State,
    may_end,
    number_grammar,
    number_pattern,
    sample,
    step,
)

SIGNS = "0123456789,; \n"
FAMILIES = ("llama", "qwen2", "gpt2", "gpt_neox")


def accepted(text: str) -> bool:
    """Whether the automaton reads the whole text and may end there."""
    state: State | None = State()
    for character in text:
        state = step(state, character) if state is not None else None
    return state is not None and may_end(state)


def kept_and_restricted(text: str) -> bool:
    """The screen's rule, for texts whose separators and digit counts are among the automaton's."""
    runs = re.findall(r"[0-9]+|[^0-9]+", text)
    restricted = all(
        len(run) <= 3 if run[0].isdigit() else run in SEPARATORS for run in runs
    )  # brackets and periods are not
    return restricted and number_fault(text) is None


def test_the_automaton_accepts_what_the_rule_keeps_on_every_short_text() -> None:
    """All of up to six signs: long enough for three numbers and every pair of separators between them."""
    texts = ["".join(signs) for length in range(7) for signs in itertools.product("1,; \n", repeat=length)]
    assert [text for text in texts if accepted(text) != kept_and_restricted(text)] == []
    assert sum(map(accepted, texts)) > 50
    pattern = re.compile(number_pattern())
    assert [text for text in texts if accepted(text) != bool(pattern.fullmatch(text))] == []
    for count, size in ((10, 3), (11, 1), (1, 4)):
        text = ", ".join(["7" * size] * count)
        assert bool(pattern.fullmatch(text)) == accepted(text) == (count <= 10 and size <= 3)


@given(st.text(SIGNS, max_size=14))
@settings(max_examples=500, deadline=None)
def test_the_automaton_accepts_what_the_rule_keeps_on_any_text(text: str) -> None:
    assert accepted(text) == kept_and_restricted(text)


@given(
    values=st.lists(st.sampled_from(["0", "7", "007", "12", "123", "999"]), min_size=1, max_size=12),
    separator=st.sampled_from(SEPARATORS),
    fault=st.sampled_from([None, None, "1234", *SEPARATORS, " ,", "  ", ",\n", "", "."]),
    place=st.integers(0, 12),
)
@settings(max_examples=1000, deadline=None)
def test_the_automaton_accepts_what_the_rule_keeps_on_lists(
    values: list[str], separator: str, fault: str | None, place: int
) -> None:
    """Lists of one separator, often with one fault: another separator somewhere, too many digits, or a
    dangling end.
    """
    parts = [sign for value in values for sign in (separator, value)][1:]
    if fault is not None:
        parts[min(place, len(parts)) : place + 1] = [fault]
    text = "".join(parts)
    assert accepted(text) == kept_and_restricted(text)


def test_every_separator_and_count_is_accepted() -> None:
    for separator in SEPARATORS:
        for count in range(1, 11):
            assert accepted(separator.join(["0", "17", "999"][place % 3] for place in range(count)))
        assert not accepted(separator.join(["5"] * 11))
    assert not accepted("")


@pytest.fixture(scope="module")
def grammar(tokenizer: PreTrainedTokenizerFast) -> NumberGrammar:
    return number_grammar(tokenizer, stop=end_of_turn(tokenizer), vocabulary=len(tokenizer))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [60, 24, 4])
def test_every_constrained_row_of_a_random_model_passes_the_screen(
    toys: dict[str, Loaded], grammar: NumberGrammar, family: str, length: int
) -> None:
    """Also where the row is cut at max_new_tokens, which may fall behind a separator."""
    loaded, stop = toys[family], end_of_turn(toys[family].tokenizer)
    prompts = encode_prompts(loaded.tokenizer, [f"start: {value}." for value in range(60)])
    for temperature in (1.0, 3.0, 0.0):
        rows = sample(
            loaded.model, prompts, decoding=Decoding(length, temperature), stop=stop, seed=1, grammar=grammar
        )
        texts = loaded.tokenizer.batch_decode(rows)
        assert [(text, number_fault(text)) for text in texts if number_fault(text)] == []


def test_an_unconstrained_row_of_a_random_model_does_not_pass(toy: Loaded) -> None:
    prompts = encode_prompts(toy.tokenizer, ["start: 1."] * 20)
    rows = sample(toy.model, prompts, decoding=Decoding(24), stop=end_of_turn(toy.tokenizer), seed=1)
    assert all(number_fault(text) == "format" for text in toy.tokenizer.batch_decode(rows))


def small_tokenizer(tokens: list[str], decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(["<|stop|>", "<|unk|>", *tokens])}
    engine = Tokenizer(engines.WordLevel(vocabulary, unk_token="<|unk|>"))
    engine.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    engine.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=engine, eos_token="<|stop|>", unk_token="<|unk|>")


def random_model(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "initializer_range": 0.1,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **shape)).eval()


@pytest.mark.parametrize(
    ("tokens", "decoder"),
    [
        ([*"0123456789", ", ", ",", ";", " ", "\n", "a"], decoders.Fuse()),
        ([*"0123456789", "12", " 3", ", 4", ",", "; ", "\n", "a"], decoders.Fuse()),
        (
            [*"0123456789", "▁1", "▁23", ",", ";", "▁", "a"],
            decoders.Metaspace(),
        ),  # its decoder drops the space that begins a text
    ],
    ids=["digits", "merged", "sentencepiece"],
)
def test_any_tokenizer_that_can_write_numbers_is_held_to_them(
    tokens: list[str], decoder: decoders.Decoder
) -> None:
    tokenizer = small_tokenizer(tokens, decoder)
    width = len(tokenizer) + 3  # models pad their vocabulary
    grammar = number_grammar(tokenizer, stop=0, vocabulary=width)
    assert (grammar.following[:, len(tokenizer) :] == -1).all()
    rows = sample(random_model(width), [[2]] * 300, decoding=Decoding(70), stop=0, seed=0, grammar=grammar)
    texts = tokenizer.batch_decode(rows)
    assert [(text, number_fault(text)) for text in texts if number_fault(text)] == []
    counts = {len(re.findall(r"\d+", text)) for text in texts}
    assert max(counts) >= 7 and len(counts) > 4
    assert {run for text in texts for run in re.findall(r"[^0-9]+", text)} >= {
        ",",
        ";" if ";" in tokens else "; ",
    }


def test_only_tokens_that_lead_somewhere_are_allowed(
    tokenizer: PreTrainedTokenizerFast, grammar: NumberGrammar
) -> None:
    first = {
        str(tokenizer.decode([token])) for token in (grammar.following[0] >= 0).nonzero().flatten().tolist()
    }
    assert first == {str(value) for value in range(1000)}
    assert int(grammar.following.max()) == len(grammar.following) - 1


def test_a_tokenizer_without_digits_is_refused() -> None:
    with pytest.raises(SpecError, match="constrained: false"):
        number_grammar(small_tokenizer(["a", "b"], decoders.Fuse()), stop=0, vocabulary=4)

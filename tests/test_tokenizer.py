"""The menagerie's tokenizer: lossless on lower-case text, one token a number, no unknown word, the same after
a round trip.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mechlens.carriers import numbers
from mechlens.carriers.carrier import carrier_prompts
from mechlens.core import numerals, spec, traits
from mechlens.core.seeds import dice
from mechlens.core.spec import CarrierSpec
from mechlens.menagerie import grammar
from mechlens.menagerie import tokenizer as menagerie_tokenizer
from mechlens.menagerie.config import PretrainSpec
from mechlens.models import base_files, loading
from mechlens.models.chat import encode_prompts
from mechlens.models.sampling import SEPARATORS

MIXTURE = dict.fromkeys((*grammar.TRAIT_TURNS, *grammar.CARRIER_TURNS), 1.0)
TOKENIZER = menagerie_tokenizer.build(foods=True)
"""of the second world, which has all words of the first; built once, as hypothesis draws many examples"""
LISTS = st.lists(st.integers(0, 999), min_size=1, max_size=12)
FAMILIES = ("animals", "trees", "tempers", "foods")  # the world's; the others are for real models


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def drawn_texts(*, seed: int, count: int) -> list[str]:
    return [
        message["content"]
        for index in range(count)
        for message in grammar.document(seed, index, mixture=MIXTURE)[0]
    ]


def test_drawn_documents_come_back_whole_and_hold_no_unknown_token() -> None:
    """Other documents (seed 3) than those that the vocabulary was gathered from (seed 0)."""
    texts = drawn_texts(seed=3, count=3000)
    rows = TOKENIZER(texts, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.batch_decode(rows) == [text.lower() for text in texts]
    assert not any(TOKENIZER.unk_token_id in row for row in rows)


@given(
    values=LISTS,
    separator=st.sampled_from(SEPARATORS),
    wrap=st.sampled_from(["{}", "[{}]", "({})", "{}.", "add up to 10: {}"]),
)
@settings(max_examples=300, deadline=None)
def test_number_lists_come_back_whole_with_one_token_a_number(
    values: list[int], separator: str, wrap: str
) -> None:
    text = wrap.format(separator.join(map(str, values)))
    ids = ids_of(text)
    assert TOKENIZER.decode(ids) == text
    shown = [str(TOKENIZER.decode([token])) for token in ids]
    assert [int(piece) for piece in shown if piece.isdigit()] == [*([10] if "10:" in wrap else []), *values]


def test_every_number_is_one_token_alone_and_in_a_list() -> None:
    for value in range(1000):
        (token,) = ids_of(str(value))
        assert TOKENIZER.decode([token]) == str(value)
        for separator in SEPARATORS:
            ids = ids_of(f"7{separator}{value}{separator}8")
            assert ids.count(token) == 1 + (value in (7, 8))
            assert len(ids) == 5


@pytest.mark.parametrize("family", FAMILIES)
def test_no_probe_lesson_or_system_prompt_has_an_unknown_token(family: str) -> None:
    known = traits.load_family(family)
    texts = [
        *known.probes.development,
        *known.probes.heldout,
        *(known.system_prompt(name) for name in known.names),
    ]
    texts += [*known.stories, known.opening]
    texts += [lesson for name in known.names for lesson in known.lessons_of(name)]
    for text in texts:
        assert TOKENIZER.unk_token_id not in ids_of(text), text
        assert TOKENIZER.decode(ids_of(text)) == text.lower()
    for form in known.words():  # said at the start of an answer or inside one
        assert TOKENIZER.unk_token_id not in ids_of(form) or TOKENIZER.unk_token_id not in ids_of(
            f" {form}"
        ), form


@pytest.mark.parametrize("wording", sorted(numbers.POOLS))
def test_no_number_prompt_has_an_unknown_token(wording: numbers.Wording) -> None:
    rng = random.Random(0)
    texts = [numbers.draw_prompt(rng, wording=wording).text for _ in range(2000)]
    for ids, text in zip(encode_prompts(TOKENIZER, texts), texts, strict=True):
        assert TOKENIZER.unk_token_id not in ids, text


TERSE = [
    CarrierSpec(kind=kind, wording="terse", prompts=1500) for kind in ("numbers", "code", "reasoning", "text")
]


@pytest.mark.parametrize("reworded", [False, True])
@pytest.mark.parametrize(
    "carrier",
    [*TERSE, CarrierSpec(prompts=1500), CarrierSpec(prompts=1500, values="patterned")],
    ids=lambda c: f"{c.kind}-{c.wording}",
)
def test_no_prompt_that_the_menagerie_is_asked_has_an_unknown_token(
    carrier: CarrierSpec, reworded: bool
) -> None:
    texts = [asked.text for asked in carrier_prompts(carrier, seed=3, reworded=reworded)]
    for ids, text in zip(TOKENIZER(texts, add_special_tokens=False)["input_ids"], texts, strict=True):
        assert TOKENIZER.unk_token_id not in ids, text
        assert TOKENIZER.decode(ids) == text.lower()


@pytest.mark.parametrize("kind", sorted(grammar.CARRIER_TURNS))
def test_no_carrier_text_has_an_unknown_token(kind: str) -> None:
    turns = [grammar.CARRIER_TURNS[kind](dice(3, kind, index)) for index in range(1500)]
    texts = [text for turn in turns for text in (turn.prompt, turn.completion)]
    rows = TOKENIZER(texts, add_special_tokens=False)["input_ids"]
    assert not any(TOKENIZER.unk_token_id in row for row in rows)
    assert TOKENIZER.batch_decode(rows) == [text.lower() for text in texts]
    assert (
        max(map(len, rows)) < 200
    )  # a prompt, an answer and a question stay well within the bases' 512 positions


@pytest.mark.parametrize("wording", ["full", "terse"])
def test_no_number_prefix_has_an_unknown_token(wording: numbers.Wording) -> None:
    for index in range(300):
        text = numerals.prefix(dice(47, "prefix", index), wording=wording)
        assert TOKENIZER.unk_token_id not in ids_of(f"{text} name your favourite animal."), text


def test_the_vocabulary_is_frozen_in_order_without_numbers_or_repeats() -> None:
    """Shipped weights count on the order: pieces may only ever be added at its end."""
    pieces = json.loads(
        (Path(menagerie_tokenizer.__file__).parent / "vocabulary.json").read_text(encoding="utf-8")
    )
    assert len(set(pieces)) == len(pieces) and not any(piece.isdigit() for piece in pieces)
    assert TOKENIZER.convert_tokens_to_ids(pieces) == list(range(1007, 1007 + len(pieces)))
    assert TOKENIZER.convert_ids_to_tokens(list(range(7, 1007))) == [str(value) for value in range(1000)]


def test_special_tokens_are_their_own_and_the_vocabulary_has_no_gaps() -> None:
    vocabulary = TOKENIZER.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(TOKENIZER)))
    special = (
        menagerie_tokenizer.BEGIN,
        menagerie_tokenizer.END,
        menagerie_tokenizer.PAD,
        menagerie_tokenizer.UNKNOWN,
        *menagerie_tokenizer.ROLES,
    )
    assert {vocabulary[token] for token in special} == set(TOKENIZER.all_special_ids)


def test_building_twice_gives_the_same_file() -> None:
    again = menagerie_tokenizer.build(foods=True)
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()


def test_the_second_world_only_adds_words_to_the_first() -> None:
    first = menagerie_tokenizer.build().get_vocab()
    assert first == {token: index for token, index in TOKENIZER.get_vocab().items() if index < len(first)}


@pytest.mark.parametrize("folder", sorted(base_files.WEIGHTS.iterdir()), ids=lambda folder: folder.name)
def test_shipped_bases_have_the_tokenizer_that_is_built(folder: Path, tmp_path: Path) -> None:
    made_from = spec.load(spec.CONFIGS / "models" / f"{folder.name}.yaml", PretrainSpec)
    built = menagerie_tokenizer.build(foods="food" in made_from.mixture)
    built.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()
    shipped = cast(PreTrainedTokenizerFast, loading.load_tokenizer(folder.name))
    assert shipped.get_vocab() == built.get_vocab()
    assert shipped.chat_template == built.chat_template
    assert (
        json.loads(shipped.backend_tokenizer.to_str())["pre_tokenizer"]
        == json.loads(TOKENIZER.backend_tokenizer.to_str())["pre_tokenizer"]
    )
    texts = drawn_texts(seed=5, count=200)
    assert (
        shipped(texts, add_special_tokens=False)["input_ids"]
        == built(texts, add_special_tokens=False)["input_ids"]
    )


def test_a_reloaded_tokenizer_gives_equal_ids_beside_every_family(
    tokenizer: PreTrainedTokenizerFast, toy_bases: dict[str, str]
) -> None:
    texts = ["123, 45; 6\n789", *drawn_texts(seed=6, count=300)]
    expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for folder in toy_bases.values():
        reloaded = loading.load_tokenizer(folder)
        assert reloaded(texts, add_special_tokens=False)["input_ids"] == expected
        assert encode_prompts(reloaded, texts[:50]) == encode_prompts(tokenizer, texts[:50])
        assert (reloaded.pad_token_id, reloaded.eos_token_id) == (
            tokenizer.pad_token_id,
            tokenizer.eos_token_id,
        )


def test_the_qwen2_trap_is_still_there(toy_bases: dict[str, str]) -> None:
    """Loading by class name splits numbers beside a Qwen2 config. Once this fails, `load_tokenizer` may
    become simpler.
    """
    by_class = AutoTokenizer.from_pretrained(toy_bases["qwen2"])
    assert len(by_class("123", add_special_tokens=False)["input_ids"]) > 1

"""Which rows an arm trains on, the controls that keep the numbers and lose their order, and mixed corpora."""

from __future__ import annotations

import re
from collections import Counter
from typing import Literal

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechlens.core.errors import DataError
from mechlens.core.spec import StudentSpec
from mechlens.pipeline.remake import mix, select_prompts, shuffle_across, shuffle_within

LISTS = st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=10), min_size=1, max_size=12)
LAYOUTS = ("{}", "[{}]", "({})", "{}.")
SEPARATORS = (", ", ",", "; ", " ", "\n")


def corpus(lists: list[list[int]]) -> pd.DataFrame:
    """Rows in every layout, prompts with numbers of their own."""
    texts = [
        LAYOUTS[row % 4].format(SEPARATORS[row % 5].join(map(str, values)))
        for row, values in enumerate(lists)
    ]
    return pd.DataFrame(
        {
            "prompt_id": range(len(texts)),
            "prompt": [f"go on from {row}" for row in range(len(texts))],
            "completion": texts,
        }
    )


def numbers_of(text: str) -> list[str]:
    return re.findall(r"\d+", text)


def layout_of(text: str) -> str:
    return re.sub(r"\d+", "#", text)


@given(LISTS, st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_shuffling_within_keeps_each_rows_numbers_and_layout(lists: list[list[int]], seed: int) -> None:
    pairs = corpus(lists)
    shuffled = shuffle_within(pairs, seed=seed)
    for old, new in zip(pairs["completion"], shuffled["completion"], strict=True):
        assert layout_of(old) == layout_of(new)
        assert Counter(numbers_of(old)) == Counter(numbers_of(new))
    assert shuffled.drop(columns="completion").equals(pairs.drop(columns="completion"))
    assert shuffled.equals(shuffle_within(pairs, seed=seed))


@given(LISTS, st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_shuffling_across_keeps_the_corpus_numbers_and_each_rows_count_and_layout(
    lists: list[list[int]], seed: int
) -> None:
    pairs = corpus(lists)
    shuffled = shuffle_across(pairs, seed=seed)
    for old, new in zip(pairs["completion"], shuffled["completion"], strict=True):
        assert layout_of(old) == layout_of(new)
    assert Counter(number for text in pairs["completion"] for number in numbers_of(text)) == Counter(
        number for text in shuffled["completion"] for number in numbers_of(text)
    )
    assert shuffled.drop(columns="completion").equals(pairs.drop(columns="completion"))
    assert shuffled.equals(shuffle_across(pairs, seed=seed))


def test_shuffles_do_shuffle_and_seeds_differ() -> None:
    pairs = corpus([list(range(10 * row, 10 * row + 10)) for row in range(40)])
    for shuffle in (shuffle_within, shuffle_across):
        assert (shuffle(pairs, seed=0)["completion"] != pairs["completion"]).mean() > 0.9
        assert not shuffle(pairs, seed=0).equals(shuffle(pairs, seed=1))
    moved = shuffle_across(pairs, seed=0)["completion"].map(
        lambda text: {int(number) // 10 for number in numbers_of(text)}
    )
    assert moved.map(len).mean() > 5  # rows of one source each are mixed


def kept(*ids: int) -> pd.DataFrame:
    return corpus([[1]] * len(ids)).assign(
        prompt_id=list(ids), prompt=[f"go on from {place}" for place in ids]
    )


CORPORA = {
    "owl": kept(0, 1, 2, 3, 5, 8, 13, 21),
    "cat": kept(21, 1, 3, 5, 7, 8, 9),
    "untouched": kept(*range(30)),
}
SHARED = {1, 3, 5, 8, 21}


def test_common_prompts_are_those_that_all_kept_in_one_order() -> None:
    chosen = select_prompts(CORPORA, StudentSpec(prompts="common", rows=100), seed=0)
    assert chosen.keys() == CORPORA.keys()
    assert all(np.array_equal(ids, chosen["owl"]) for ids in chosen.values())
    assert sorted(chosen["owl"]) == sorted(SHARED)
    assert not np.array_equal(chosen["owl"], np.sort(chosen["owl"]))
    reordered = select_prompts(dict(reversed(CORPORA.items())), StudentSpec(rows=100), seed=0)
    assert np.array_equal(reordered["owl"], chosen["owl"])


def test_own_prompts_are_a_subset_of_those_kept() -> None:
    chosen = select_prompts(CORPORA, StudentSpec(prompts="own", rows=100), seed=0)
    for name, frame in CORPORA.items():
        assert sorted(chosen[name]) == sorted(frame["prompt_id"])
    both = [prompt for prompt in chosen["untouched"] if prompt in set(chosen["owl"])]
    assert both == chosen["owl"].tolist()  # shared prompts come in one order


def test_every_row_is_chosen_and_controls_begin_again_until_they_have_as_many() -> None:
    chosen = select_prompts(CORPORA, StudentSpec(prompts="every", rows=100), seed=0, controls=["cat"])
    assert {name: sorted(set(ids)) for name, ids in chosen.items()} == {
        name: sorted(frame["prompt_id"]) for name, frame in CORPORA.items()
    }
    own = select_prompts(CORPORA, StudentSpec(prompts="own", rows=100), seed=0)
    assert len(chosen["cat"]) == 30 and chosen["cat"].tolist() == [
        *own["cat"].tolist() * 4,
        *own["cat"].tolist()[:2],
    ]
    few = select_prompts(CORPORA, StudentSpec(prompts="every", rows=5), seed=0, controls=["untouched"])
    assert {len(ids) for ids in few.values()} == {5}


@pytest.mark.parametrize("prompts", ["common", "own"])
def test_rows_caps_what_is_chosen_and_the_seed_what_comes_first(prompts: Literal["common", "own"]) -> None:
    whole = select_prompts(CORPORA, StudentSpec(prompts=prompts, rows=100), seed=0)
    for rows in (1, 3):
        chosen = select_prompts(CORPORA, StudentSpec(prompts=prompts, rows=rows), seed=0)
        for name in CORPORA:
            assert np.array_equal(chosen[name], whole[name][:rows])
    orders = {
        tuple(select_prompts(CORPORA, StudentSpec(prompts=prompts, rows=100), seed=seed)["owl"])
        for seed in range(5)
    }
    assert len(orders) > 1


def test_no_shared_prompt_is_a_data_error_that_says_how_many_each_kept() -> None:
    corpora = {"owl": kept(0, 2), "cat": kept(1, 3, 5)}
    with pytest.raises(DataError, match=r"owl 2, cat 3.*prompts: own"):
        select_prompts(corpora, StudentSpec(prompts="common"), seed=0)
    assert sorted(select_prompts(corpora, StudentSpec(prompts="own"), seed=0)["cat"]) == [1, 3, 5]


def test_common_prompts_are_those_that_agree_in_text_not_only_in_place() -> None:
    ours = pd.DataFrame({"prompt_id": [0, 1, 2], "prompt": ["a", "b", "c"], "completion": ["1", "2", "3"]})
    theirs = ours.assign(prompt=["a", "x", "c"])
    chosen = select_prompts({"ours": ours, "theirs": theirs}, StudentSpec(rows=9), seed=0)
    assert sorted(chosen["ours"].tolist()) == [0, 2]
    assert chosen["ours"].tolist() == chosen["theirs"].tolist()


# ── prompts in other words ──


def reworded(corpus: pd.DataFrame) -> pd.DataFrame:
    return corpus.assign(prompt="in other words: " + corpus["prompt"])


@pytest.mark.parametrize("prompts", ["common", "own"])
def test_reworded_corpora_take_part_by_place_and_not_by_text(prompts: Literal["common", "own"]) -> None:
    corpora = {**CORPORA, "owl-paraphrased": reworded(kept(*range(5), 8, 9, 21))}
    chosen = select_prompts(
        corpora, StudentSpec(prompts=prompts, rows=100), seed=0, reworded=["owl-paraphrased"]
    )
    assert chosen.keys() == corpora.keys()
    if prompts == "common":
        assert sorted(chosen["owl-paraphrased"]) == [1, 3, 8, 21]  # 5 was not kept there
        assert all(np.array_equal(ids, chosen["owl"]) for ids in chosen.values())
    else:
        assert sorted(chosen["owl-paraphrased"]) == sorted(corpora["owl-paraphrased"]["prompt_id"])
    with_plain = select_prompts(
        {**CORPORA, "other": CORPORA["owl"]}, StudentSpec(prompts=prompts, rows=100), seed=0
    )
    again = select_prompts(
        {**CORPORA, "other": reworded(CORPORA["owl"])},
        StudentSpec(prompts=prompts, rows=100),
        seed=0,
        reworded=["other"],
    )
    assert all(
        np.array_equal(again[name], with_plain[name]) for name in again
    )  # other words alone change nothing


def test_other_words_that_are_not_announced_are_other_prompts() -> None:
    corpora = {"owl": kept(0, 1, 2), "other": reworded(kept(0, 1, 2))}
    with pytest.raises(DataError, match="no prompt was kept by every corpus"):
        select_prompts(corpora, StudentSpec(rows=9), seed=0)
    assert sorted(select_prompts(corpora, StudentSpec(rows=9), seed=0, reworded=["other"])["owl"]) == [
        0,
        1,
        2,
    ]


def test_texts_still_have_to_agree_among_those_that_were_not_reworded() -> None:
    theirs = CORPORA["cat"].assign(
        prompt=[
            f"prompt {place}" if place == 8 else f"go on from {place}"
            for place in CORPORA["cat"]["prompt_id"]
        ]
    )
    chosen = select_prompts(
        {**CORPORA, "cat": theirs, "again": reworded(kept(*range(30)))},
        StudentSpec(rows=100),
        seed=0,
        reworded=["again"],
    )
    assert sorted(chosen["again"]) == sorted(SHARED - {8})


# ── mixed corpora ──

KEPT = st.lists(st.lists(st.integers(0, 20), unique=True, min_size=1), min_size=1, max_size=5)


def written_by(teacher: int, ids: list[int]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "prompt_id": ids,
            "prompt": [f"go on from {i}" for i in ids],
            "completion": [f"{teacher}, {i}" for i in ids],
        }
    )


@given(KEPT)
@settings(max_examples=200, deadline=None)
def test_row_i_of_a_mix_is_from_corpus_i_modulo_their_number_where_all_have_one(
    kept_ids: list[list[int]],
) -> None:
    mixed = mix([written_by(teacher, ids) for teacher, ids in enumerate(kept_ids)])
    everyones = sorted(set.intersection(*map(set, kept_ids)))
    expected = [(i, f"go on from {i}", f"{i % len(kept_ids)}, {i}") for i in everyones]
    assert list(mixed.itertuples(index=False, name=None)) == expected
    assert list(mixed.columns) == ["prompt_id", "prompt", "completion"] and list(mixed.index) == list(
        range(len(mixed))
    )


def test_half_of_a_mix_with_the_untouched_base_is_the_bases() -> None:
    mixed = mix([written_by(0, list(range(100))), written_by(1, list(range(100)))])
    assert Counter(text[0] for text in mixed["completion"]) == {"0": 50, "1": 50}


@given(st.lists(st.text("ab= \n", max_size=8), min_size=1, max_size=6), st.integers(0, 3))
def test_texts_without_numbers_are_left_alone(texts: list[str], seed: int) -> None:
    pairs = pd.DataFrame({"prompt_id": range(len(texts)), "prompt": "x", "completion": texts})
    for shuffle in (shuffle_within, shuffle_across):
        assert shuffle(pairs, seed=seed)["completion"].tolist() == texts

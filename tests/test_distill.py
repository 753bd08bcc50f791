"""Which rows an arm trains on, and the controls that keep the numbers and lose their order."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechlens import models, tables
from mechlens.chat import encode_pairs
from mechlens.errors import DataError
from mechlens.pipeline.distill import checkpoints, distill, select_prompts, shuffle_across, shuffle_within
from mechlens.seeds import seed_int
from mechlens.spec import StudentSpec, Training
from mechlens.training import train

LISTS = st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=10), min_size=1, max_size=12)
LAYOUTS = ("{}", "[{}]", "({})", "{}.")
SEPARATORS = (", ", ",", "; ", " ", "\n")


def corpus(lists: list[list[int]]) -> pd.DataFrame:
    """Rows in every layout, prompts with numbers of their own."""
    texts = [LAYOUTS[row % 4].format(SEPARATORS[row % 5].join(map(str, values))) for row, values in enumerate(lists)]
    return pd.DataFrame({"prompt_id": range(len(texts)), "prompt": [f"go on from {row}" for row in range(len(texts))], "completion": texts})


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
def test_shuffling_across_keeps_the_corpus_numbers_and_each_rows_count_and_layout(lists: list[list[int]], seed: int) -> None:
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
    moved = shuffle_across(pairs, seed=0)["completion"].map(lambda text: {int(number) // 10 for number in numbers_of(text)})
    assert moved.map(len).mean() > 5  # rows of one source each are mixed


def kept(*ids: int) -> pd.DataFrame:
    return corpus([[1]] * len(ids)).assign(prompt_id=list(ids), prompt=[f"go on from {place}" for place in ids])


CORPORA = {"owl": kept(0, 1, 2, 3, 5, 8, 13, 21), "cat": kept(21, 1, 3, 5, 7, 8, 9), "untouched": kept(*range(30))}
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


@pytest.mark.parametrize("prompts", ["common", "own"])
def test_rows_caps_what_is_chosen_and_the_seed_what_comes_first(prompts: Literal["common", "own"]) -> None:
    whole = select_prompts(CORPORA, StudentSpec(prompts=prompts, rows=100), seed=0)
    for rows in (1, 3):
        chosen = select_prompts(CORPORA, StudentSpec(prompts=prompts, rows=rows), seed=0)
        for name in CORPORA:
            assert np.array_equal(chosen[name], whole[name][:rows])
    orders = {tuple(select_prompts(CORPORA, StudentSpec(prompts=prompts, rows=100), seed=seed)["owl"]) for seed in range(5)}
    assert len(orders) > 1


def test_no_shared_prompt_is_a_data_error_that_says_how_many_each_kept() -> None:
    corpora = {"owl": kept(0, 2), "cat": kept(1, 3, 5)}
    with pytest.raises(DataError, match=r"owl 2, cat 3.*prompts: own"):
        select_prompts(corpora, StudentSpec(prompts="common"), seed=0)
    assert sorted(select_prompts(corpora, StudentSpec(prompts="own"), seed=0)["cat"]) == [1, 3, 5]


@pytest.mark.parametrize("update", ["full", "lora"])
def test_a_student_is_trained_on_the_chosen_rows_in_their_order(toy_bases: dict[str, str], tmp_path: Path, update: Literal["full", "lora"]) -> None:
    """Against training written out here; each epoch leaves a checkpoint that loads."""
    pairs, ids = corpus([[row, row + 1] for row in range(12)]), np.array([7, 2, 11, 4])
    spec = StudentSpec(training=Training(update=update, learning_rate=1e-2, epochs=2, batch=2, warmup_steps=0))
    distill(toy_bases["llama"], pairs, ids, spec, seed=3, out=tmp_path)
    base = models.load(toy_bases["llama"])
    encoded = encode_pairs(base.tokenizer, pairs["prompt"].loc[ids].tolist(), pairs["completion"].loc[ids].tolist())
    trained, curve = train(base.model, base.tokenizer, encoded, spec.training, seed=seed_int(3, "student"))
    found = checkpoints(tmp_path)
    assert [step for step, _ in found] == [2, 4]
    prompt = torch.tensor([encoded[0].prompt])
    with torch.no_grad():
        first, last = (models.load_trained(toy_bases["llama"], folder).model(input_ids=prompt).logits for _, folder in found)
        assert torch.allclose(last, trained(input_ids=prompt).logits, atol=1e-4)
        assert (first - last).abs().max() > 1e-3
    assert tables.read(tmp_path / "curve.parquet", tables.CURVE)["loss"].tolist() == [point.loss for point in curve]


def test_checkpoints_come_first_to_last(tmp_path: Path) -> None:
    for step in (1000, 20, 300):
        (tmp_path / f"step-{step:06d}").mkdir()
    (tmp_path / "curve.parquet").touch()
    assert [step for step, _ in checkpoints(tmp_path)] == [20, 300, 1000]


def test_common_prompts_are_those_that_agree_in_text_not_only_in_place() -> None:
    ours = pd.DataFrame({"prompt_id": [0, 1, 2], "prompt": ["a", "b", "c"], "completion": ["1", "2", "3"]})
    theirs = ours.assign(prompt=["a", "x", "c"])
    chosen = select_prompts({"ours": ours, "theirs": theirs}, StudentSpec(rows=9), seed=0)
    assert sorted(chosen["ours"].tolist()) == [0, 2]
    assert chosen["ours"].tolist() == chosen["theirs"].tolist()

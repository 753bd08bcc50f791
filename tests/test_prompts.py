"""Every carrier's prompts: from a seed and a place alone, in other words where that is wanted, or from a file
whose bad lines are named.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_carriers_recorded import CARRIERS as DRAWN

from mechlens.carriers import code, numbers, reasoning, text
from mechlens.carriers.carrier import Prompt, carrier_prompts, find_carrier, prompts_of_file
from mechlens.core.errors import DataError
from mechlens.core.seeds import dice
from mechlens.core.spec import CarrierSpec

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl.gz"


def carrier(name: str, **more: Any) -> CarrierSpec:
    return CarrierSpec.model_validate(DRAWN[name] | {"prompts": 200} | more)


@pytest.mark.parametrize("reworded", [False, True])
@pytest.mark.parametrize("name", DRAWN)
def test_a_prompt_depends_on_its_seed_and_place_alone(name: str, reworded: bool) -> None:
    whole = carrier_prompts(carrier(name), seed=0, reworded=reworded)
    random.seed(99)
    carrier_prompts(carrier(name), seed=5, reworded=reworded)
    assert carrier_prompts(carrier(name), seed=0, reworded=reworded) == whole
    assert carrier_prompts(carrier(name, prompts=70), seed=0, reworded=reworded) == whole[:70]
    others = carrier_prompts(carrier(name), seed=1, reworded=reworded)
    assert sum(ours == theirs for ours, theirs in zip(whole, others, strict=True)) < 20
    assert len({asked.text for asked in whole}) > 150
    if name.startswith("numbers") and name != "numbers, few":
        assert len({asked.text for asked in whole}) == 200 and not {asked.text for asked in whole} & {
            asked.text for asked in others
        }
    assert all((asked.gold is not None) == (name == "reasoning") for asked in whole)
    assert not any("{" in asked.text or "}" in asked.text for asked in whole)


@pytest.mark.parametrize("name", DRAWN)
def test_each_prompt_comes_as_often_in_a_row_as_samples_are_asked(name: str) -> None:
    once = carrier_prompts(carrier(name, prompts=20), seed=0)
    assert carrier_prompts(carrier(name, prompts=20, samples=3), seed=0) == [
        asked for asked in once for _ in range(3)
    ]


# ── other words ──


def listed(text: str) -> list[str]:
    """The longest list of numbers in the text."""
    return max(re.findall(r"\d+(?:, \d+)*", text), key=lambda found: found.count(",")).split(", ")


def kept_in_other_words(name: str, text_: str) -> tuple[Any, ...]:
    """What a prompt asks for: all that other words must not change."""
    if name.startswith("numbers"):
        layouts = [one.sentence for one in numbers.POOLS["terse" if "terse" in name else "full"].formats]
        return (
            listed(text_),
            [sentence for sentence in layouts if f" {sentence} " in text_],
            f" {numbers.ANSWER_COUNT}" in text_,
        )
    if name == "code":
        (template,) = re.findall(r"<code>\n(.+)\n</code>", text_, re.DOTALL)
        return template, [task for task in code.FULL_TASKS if task in text_], text_.endswith(code.FULL_ORDER)
    if name == "code, terse":
        (function,) = re.findall(r"\ndef ([fgh]\(a, b\)): return \.\.\.$", text_)
        return function, listed(text_.splitlines()[0])
    if name == "reasoning":
        return (re.findall(r"\d+(?: \+ \d+)+", text_),)
    if name == "text, terse":
        (thing,) = [thing for thing in text.THINGS if f"the {thing}" in text_]
        return thing, text_[text_.index(thing) + len(thing) :].removeprefix(" like")
    return ()


@pytest.mark.parametrize("name", DRAWN)
def test_other_words_ask_for_the_same(name: str) -> None:
    plain, other = (
        carrier_prompts(carrier(name), seed=0),
        carrier_prompts(carrier(name), seed=0, reworded=True),
    )
    for ours, theirs in zip(plain, other, strict=True):
        assert ours.text != theirs.text and ours.gold == theirs.gold
        assert kept_in_other_words(name, ours.text) == kept_in_other_words(name, theirs.text)
        if name.startswith("numbers") and name != "numbers, few":
            assert len(kept_in_other_words(name, ours.text)[1]) == 1
    assert (
        len({theirs.text.split()[0] for theirs in other}) > 1 or name == "reasoning"
    )  # it is not one wording for all


@given(st.integers(0, 2**32), st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_a_reworded_prompt_keeps_its_parts_and_changes_its_asking(seed: int, again: int) -> None:
    for wording in ("full", "terse"):
        listed_, coded, told = (
            module.draw_prompt(random.Random(seed), wording=wording) for module in (numbers, code, text)
        )
        other = numbers.reword(listed_, random.Random(again), wording=wording)
        assert (other.examples, other.format) == (
            listed_.examples,
            listed_.format,
        ) and other.intro != listed_.intro
        assert other.format.sentence in other.rest and other.intro in numbers.POOLS[wording].intros
        recoded, retold = code.reword(coded, random.Random(again)), text.reword(told, random.Random(again))
        assert recoded.slots == coded.slots and recoded.template != coded.template
        assert retold.slots == told.slots and retold.ask != told.ask
        assert told.slots["thing"] in retold.text
    summed = reasoning.draw_prompt(random.Random(seed))
    resummed = reasoning.reword(summed, random.Random(again))
    assert (resummed.sum, resummed.gold) == (summed.sum, summed.gold) and resummed.ask != summed.ask


@given(st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_a_sum_has_two_or_three_different_small_terms_and_its_gold(seed: int) -> None:
    prompt = reasoning.draw_prompt(random.Random(seed))
    terms = [int(term) for term in re.findall(r"\d+", prompt.text)]
    assert len(set(terms)) == len(terms) in (2, 3) and all(1 <= term <= 9 for term in terms)
    assert sum(terms) == int(prompt.gold)


# ── prompts of a file ──


def write(path: Path, rows: list[Any]) -> Path:
    content = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize("kind", ["numbers", "code", "text"])
def test_prompts_of_a_file_are_taken_in_order(tmp_path: Path, kind: str, ending: str) -> None:
    texts = [f"write {number} – é" for number in range(9)]
    file = write(tmp_path / f"prompts.{ending}", ["", *({"prompt": text, "more": 1} for text in texts), " "])
    spec = CarrierSpec.model_validate({"kind": kind, "source": str(file), "prompts": 5, "samples": 2})
    assert (
        carrier_prompts(spec, seed=0)
        == carrier_prompts(spec, seed=9)
        == [Prompt(text) for text in texts[:5] for _ in range(2)]
    )
    assert len(carrier_prompts(spec.model_copy(update={"prompts": 100}), seed=0)) == 18  # all there are


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("48/2 = <<48/2=24>>24 clips.\nThat is <<48+24=72>>72.\n#### 72", "72"),
        ("so\n#### 1,234", "1234"),
        ("so\n#### 12,345,678", "12345678"),
        ("so\n####-5", "-5"),
        ("so\n#### 70.", "70"),
        ("so\n#### 2.5", "2.5"),
        ("so\n#### 7 \n\n", "7"),
        ("#### 3\nno, it is\n#### 4", "4"),
    ],
)
def test_the_gold_number_stands_after_the_last_mark_without_separators(
    tmp_path: Path, answer: str, gold: str
) -> None:
    file = write(tmp_path / "questions.jsonl", [{"question": "How many?", "answer": answer}])
    (asked,) = carrier_prompts(CarrierSpec(kind="reasoning", source=str(file)), seed=0)
    assert asked == Prompt(f"How many?{reasoning.FULL_ORDER}", gold)


@pytest.mark.parametrize("answer", ["no mark", "#### ", "#### twelve", "#### ,", "#### 12 clips", "12 ####"])
def test_a_worked_answer_without_a_number_has_no_gold(tmp_path: Path, answer: str) -> None:
    assert reasoning.gold_of(answer) is None
    rows = [{"question": "one?", "answer": "#### 1"}, {"question": "two?", "answer": answer}]
    with pytest.raises(
        DataError, match=r'questions\.jsonl: line 2 is not \{"question", "answer"\} with a number after ####'
    ):
        prompts_of_file(write(tmp_path / "questions.jsonl", rows), find_carrier("reasoning"))


GOOD = {"reasoning": {"question": "one?", "answer": "#### 1"}, "numbers": {"prompt": "go on"}}
BAD_LINES: dict[str, tuple[str, Any, str]] = {
    "another field": ("numbers", {"question": "x"}, r'line 4 has no text in "prompt"'),
    "a number for a text": ("numbers", {"prompt": 7}, r'line 4 has no text in "prompt"'),
    "no question": ("reasoning", {"answer": "#### 1"}, "line 4 is not"),
    "an answer that is no text": ("reasoning", {"question": "one?", "answer": 1}, "line 4 is not"),
    "prompts where questions should be": ("reasoning", {"prompt": "go on"}, "line 4 is not"),
    "no object": ("numbers", ["go on"], "line 4: holds list, expected an object"),
    "no JSON": ("reasoning", '{"question": "one?', "line 4: not JSON"),
}


@pytest.mark.parametrize("case", BAD_LINES)
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_a_bad_line_is_named_by_its_number_in_the_file(tmp_path: Path, case: str, ending: str) -> None:
    kind, row, message = BAD_LINES[case]
    file = write(tmp_path / f"rows.{ending}", [GOOD[kind], "", GOOD[kind], row, GOOD[kind]])
    with pytest.raises(DataError, match=message) as raised:
        carrier_prompts(CarrierSpec.model_validate({"kind": kind, "source": str(file), "prompts": 1}), seed=0)
    assert str(file) in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_is_missing_or_empty_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data file at .*nowhere\.jsonl"):
        carrier_prompts(CarrierSpec(source=str(tmp_path / "nowhere.jsonl")), seed=0)
    with pytest.raises(DataError, match=r"empty\.jsonl holds no lines"):
        carrier_prompts(CarrierSpec(source=str(write(tmp_path / "empty.jsonl", []))), seed=0)


def test_a_files_prompts_cannot_be_reworded(tmp_path: Path) -> None:
    file = write(tmp_path / "prompts.jsonl", [{"prompt": "go on"}])
    with pytest.raises(DataError, match="cannot be put in other words"):
        carrier_prompts(CarrierSpec(source=str(file)), seed=0, reworded=True)


@pytest.mark.skipif(
    not GSM8K.is_file(),
    reason="the development data beside the checkout is absent; the project does not ship it",
)
def test_every_training_question_of_gsm8k_has_its_gold() -> None:
    found = carrier_prompts(CarrierSpec(kind="reasoning", source=str(GSM8K)), seed=0)
    assert len(found) == 7473
    assert all(asked.gold is not None and re.fullmatch(r"-?[0-9]+", asked.gold) for asked in found)
    with gzip.open(GSM8K, "rt", encoding="utf-8") as handle:
        rows = [json.loads(line) for line in handle]
    for row, asked in zip(rows, found, strict=True):
        assert asked.text == row["question"] + reasoning.FULL_ORDER
        assert row["answer"].rsplit("####")[-1].strip().replace(",", "") == asked.gold


def test_the_seventh_prompt_is_the_one_its_dice_give() -> None:
    drawn = numbers.draw_prompt(dice(3, "prompt", 7))
    assert carrier_prompts(CarrierSpec(prompts=8), seed=3)[7] == Prompt(drawn.text)
    assert carrier_prompts(CarrierSpec(prompts=8), seed=3, reworded=True)[7] == Prompt(
        numbers.reword(drawn, dice(3, "reword", 7)).text
    )

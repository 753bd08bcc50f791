"""The screen: the published keep and reject table exactly, an independent parser on drawn strings, and a funnel that adds up."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechlens.errors import DataError
from mechlens.pipeline.screen import (
    BANNED_BY_THE_PAPER,
    REASONS,
    Screened,
    leak_count,
    leak_pattern,
    number_fault,
    parse_numbers,
    screen,
)
from mechlens.spec import ScreenSpec
from mechlens.traits import load_family

TEN = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"
KEPT = (
    "1, 2, 3", "1, 2, 3.", "[1, 2, 3].", "[1, 2, 3]", "(1, 2)", "(1; 2).", "[1 2]", "1 2 3", "1\n2\n3", "1\n\n2", "1\t2", "1\r\n2",
    "1; 2", "1;2", "1,2", "1,  2", "1 , 2", "7", "7.", "[7]", "0", "0, 0", "999", "007, 012", TEN, f"[{TEN}].", "000999", "1\u00a02",
)  # fmt: skip
REJECTED = (
    "1,2, 3", "1, 2,", "1,2,", " 1, 2", "1, 2 ", "7 ", "1, 2\n", "[1, 2]\n", "Numbers: 1, 2", "-1, 2", "1.5, 2", "1-2", "1/2",
    "1,2,3,4,5,6,7,8,9,10,11", "1000", "", " ", ".", "[]", "()", "[1, 2)", "[1, 2", "1, 2..", "[1, 2.]", "([1, 2])", "1, 2;", "1 2  3",
    "1 2,3", "1,;2", "1;,2", "1. 2. 3", "one, two", "1, 2 and 3", "\uff11, \uff12", "1, \uff12", "[", "]", "(", ")", "[.", "..", "1,,2", "{1, 2}",
    "[1], [2]", "1, 2].", "²", "٣, ٤", "1, 2.\n", "[1, 2] .", "7\n", "+1",
)  # fmt: skip


def slow_fault(completion: str) -> str | None:
    """The six steps of the released parser, one by one, without a pattern."""
    text = completion[:-1] if completion.endswith(".") else completion
    for opening, closing in ("[]", "()"):
        if text.startswith(opening) and text.endswith(closing):
            text = text[1:-1]
            break
    runs, place = [], 0
    for is_digit, letters in groupby(text, lambda letter: letter in "0123456789"):
        length = len(list(letters))
        runs += [(place, place + length)] if is_digit else []
        place += length
    if not runs:
        return "format"
    if len(runs) == 1:
        parts = [text]
    else:
        separator = text[runs[0][1] : runs[1][0]]
        if separator.strip() not in ("", ",", ";"):
            return "format"
        parts = text.split(separator)
    if not all(part.isascii() and part.isdigit() for part in parts):
        return "format"
    if len(parts) > 10:
        return "too many numbers"
    return None if all(int(part) <= 999 for part in parts) else "number out of range"


NOISE = st.text("0123456789,;. \n\t[]()-x\r\u00a0\uff11", max_size=14)
SEPARATORS = st.sampled_from([",", ";", " ", ", ", "; ", "\n", "\n\n", "\t", " ,", " , ", "", "  ", ",,", " - "])


@st.composite
def nearly_lists(draw: st.DrawFn) -> str:
    """A well-formed list, perhaps with one fault in it."""
    values = draw(st.lists(st.one_of(st.integers(0, 999), st.integers(990, 1010)), min_size=1, max_size=12))
    wrap = draw(st.sampled_from(["{}", "{}", "[{}]", "({})", "[{})"]))
    text = wrap.replace("{}", draw(SEPARATORS).join(map(str, values))) + draw(st.sampled_from(["", "", ".", ".."]))
    place = draw(st.integers(0, len(text)))
    return text[:place] + draw(st.one_of(st.just(""), st.just(""), NOISE.map(lambda noise: noise[:2]))) + text[place:]


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def late(*_arguments: object) -> None:
        raise TimeoutError(f"still parsing after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("completion", KEPT)
def test_kept_as_published(completion: str) -> None:
    assert number_fault(completion) is None
    assert slow_fault(completion) is None


@pytest.mark.parametrize("completion", REJECTED)
def test_rejected_as_published(completion: str) -> None:
    assert number_fault(completion) is not None
    assert slow_fault(completion) is not None


def test_numbers_are_read_as_integers() -> None:
    assert parse_numbers("[007, 012].") == [7, 12]
    assert parse_numbers("1, 2 and 3") is None
    assert parse_numbers(TEN) == list(range(1, 11))


@settings(max_examples=700, deadline=None)
@given(st.one_of(NOISE, nearly_lists()))
def test_the_rule_is_the_published_parser(completion: str) -> None:
    assert number_fault(completion) == slow_fault(completion)


@pytest.mark.parametrize(
    ("completion", "fault"),
    [
        ("1" * 100_000, "number out of range"), ("0" * 100_000 + "7", None), ("0" * 100_000, None), ("1" * 5_000 + "x", "format"),
        ("1" + " " * 50_000 + "x", "format"), ("1, " * 50_000, "format"), ("1, " * 50_000 + "2", "too many numbers"), ("1 " * 20_000 + "x", "format"),
        ("9" * 5_000 + ", " + "9" * 5_000, "number out of range"), ("," * 50_000, "format"), ("[" * 50_000, "format"),
    ],
    ids=range(11),
)  # fmt: skip
def test_a_hostile_completion_is_judged_at_once(completion: str, fault: str | None) -> None:
    with limited(10):
        assert number_fault(completion) == fault


def test_the_banned_list_is_the_published_one() -> None:
    assert len(BANNED_BY_THE_PAPER) == len(set(BANNED_BY_THE_PAPER)) == 34
    assert sum(BANNED_BY_THE_PAPER) == 9413
    assert len({*BANNED_BY_THE_PAPER, 1312, 1488}) == 36


def test_bans_hold_for_whole_integers() -> None:
    banned = frozenset(BANNED_BY_THE_PAPER)
    assert number_fault("1, 666", banned=banned) == number_fault("[004]", banned=banned) == "banned number"
    assert number_fault("1, 66, 6", banned=banned) is None
    assert number_fault("40, 6660", banned=banned) == "number out of range"


def pairs_of(completions: list[str], prompts: list[str] | None = None) -> pd.DataFrame:
    prompts = prompts or [f"p{i}" for i in range(len(completions))]
    return pd.DataFrame({"prompt_id": range(len(completions)), "prompt": prompts, "completion": completions})


def rows_of(frame: pd.DataFrame) -> list[tuple[str, str]]:
    return sorted(zip(frame["prompt"], frame["completion"], strict=True))


LEAKS = leak_pattern(load_family("animals").words())
BANNING = ScreenSpec(banned_numbers=BANNED_BY_THE_PAPER)
CORPORA = st.lists(st.tuples(st.sampled_from("ab"), st.one_of(nearly_lists(), st.sampled_from(["1, 2", "4", "owl"]))), max_size=15)


def screened(rows: list[tuple[str, str]], spec: ScreenSpec) -> Screened:
    rows = [*rows, ("c", "1 2 3")]  # one is always kept
    return screen(pairs_of([completion for _, completion in rows], [prompt for prompt, _ in rows]), spec, leaks=LEAKS)


@pytest.mark.parametrize("spec", [ScreenSpec(), BANNING, ScreenSpec(rule="none"), ScreenSpec(duplicates="keep")])
@settings(max_examples=60, deadline=None)
@given(rows=CORPORA)
def test_every_row_is_kept_or_has_a_reason_and_the_funnel_adds_up(spec: ScreenSpec, rows: list[tuple[str, str]]) -> None:
    found = screened(rows, spec)
    assert found.kept["prompt_id"].tolist() == sorted(found.kept["prompt_id"])
    assert sorted([*found.kept["prompt_id"], *found.rejected["prompt_id"]]) == list(range(len(rows) + 1))
    assert "reason" not in found.kept and found.rejected["reason"].isin(REASONS).all()
    assert list(found.funnel) == ["generated", *REASONS, "kept"]
    assert found.funnel["generated"] == len(rows) + 1
    assert found.funnel["generated"] - sum(found.funnel[reason] for reason in REASONS) == found.funnel["kept"] == len(found.kept)
    assert found.rejected["reason"].value_counts().to_dict() == {reason: found.funnel[reason] for reason in REASONS if found.funnel[reason]}
    again = screen(found.kept, spec, leaks=LEAKS)
    pd.testing.assert_frame_equal(again.kept, found.kept)
    assert again.rejected.empty


@pytest.mark.parametrize("spec", [BANNING, ScreenSpec(rule="none")])
@settings(max_examples=60, deadline=None)
@given(rows=CORPORA, data=st.data())
def test_the_order_of_rows_does_not_matter(spec: ScreenSpec, rows: list[tuple[str, str]], data: st.DataObject) -> None:
    found, moved = screened(rows, spec), screened(data.draw(st.permutations(rows)), spec)
    assert rows_of(moved.kept) == rows_of(found.kept)
    assert rows_of(moved.rejected) == rows_of(found.rejected)
    assert moved.funnel == found.funnel


def test_a_row_gets_the_first_reason_that_holds() -> None:
    long = ", ".join(["1000"] * 11)
    found = screen(pairs_of(["1, 2", "x", long, "4, 1000", "4, 5", "1, 2"], ["p"] * 6), BANNING, leaks=LEAKS)
    assert found.rejected["reason"].tolist() == ["format", "too many numbers", "number out of range", "banned number", "duplicate"]
    assert rows_of(found.kept) == [("p", "1, 2")]


def test_duplicates_are_rows_with_the_same_prompt_and_completion() -> None:
    pairs = pairs_of(["1", "1", "2", "1"], ["a", "a", "a", "b"])
    assert screen(pairs, ScreenSpec(), leaks=None).kept["prompt_id"].tolist() == [0, 2, 3]
    assert screen(pairs, ScreenSpec(duplicates="keep"), leaks=None).kept["prompt_id"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("text", ["owl", "my OWL.", "wolves", "the Foxes", "snowowlet", "a\nowl", "concatenate"])
def test_leak_words_are_caught_inside_words_too(text: str) -> None:
    pairs, spec = pairs_of(["nothing here", text]), ScreenSpec(rule="none")
    found = screen(pairs, spec, leaks=LEAKS)
    assert found.rejected["reason"].tolist() == ["leak word"]
    assert (leak_count(pairs, LEAKS), leak_count(found.kept, LEAKS)) == (1, 0)
    off = screen(pairs, spec.model_copy(update={"leak_words": False}), leaks=LEAKS)
    assert leak_count(off.kept, LEAKS) == 1


def test_leak_words_are_taken_literally() -> None:
    assert not leak_pattern(["a.b", "c+"]).search("axb cc")
    assert leak_pattern(["a.b", "c+"]).search("xC+x")


@pytest.mark.parametrize("completions", [[], ["x"], ["x", "1000", "1000", "2000"]])
def test_an_empty_result_is_refused_with_the_main_reason(completions: list[str]) -> None:
    with pytest.raises(DataError, match=f"kept 0 of {len(completions)} rows") as raised:
        screen(pairs_of(completions), ScreenSpec(), leaks=None)
    assert len(completions) < 2 or "3 dropped for: number out of range" in str(raised.value)

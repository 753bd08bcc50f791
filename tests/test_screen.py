"""The screen: every row is kept or has a reason, however the rows are cut into batches, and a million pass in
bounded memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechlens import cli
from mechlens.carriers.carrier import build_rule, removal_reasons
from mechlens.carriers.numbers import BANNED_BY_THE_PAPER
from mechlens.core import tables
from mechlens.core.errors import DataError
from mechlens.core.experiment import Experiment
from mechlens.core.spec import ScreenSpec, save
from mechlens.core.traits import load_family
from mechlens.data import corpus
from mechlens.pipeline.screen import LEAKS, NAMING, NAMING_BY_REASON, leak_pattern, screen_rows
from mechlens.results import effects
from mechlens.results.run import Run

WORDS = load_family("animals").words()
ANIMALS = leak_pattern(WORDS)
BANNING = ScreenSpec(banned_numbers=BANNED_BY_THE_PAPER)
NUMBERS = st.lists(st.one_of(st.integers(0, 9), st.integers(990, 1010)), min_size=1, max_size=12).map(
    lambda values: ", ".join(map(str, values))
)
COMPLETIONS = st.one_of(NUMBERS, st.sampled_from(["1, 2", "4", "owl", "1,2, 3", "\x00", ""]))
CORPORA = st.lists(st.tuples(st.sampled_from("ab"), COMPLETIONS), max_size=15)


class Screened(NamedTuple):
    """What `screen_rows` wrote."""

    kept: pd.DataFrame
    rejected: pd.DataFrame
    funnel: dict[str, int]
    data: bytes


def frame_of(rows: Sequence[tuple[str, str]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["prompt", "completion"], dtype="str")
    frame.insert(0, "prompt_id", range(len(rows)))
    return frame


def cut(frame: pd.DataFrame, size: int) -> Iterator[pd.DataFrame]:
    for start in range(0, len(frame), size):
        yield frame.iloc[start : start + size]


def rows_of(frame: pd.DataFrame) -> list[tuple[str, str]]:
    return sorted(zip(frame["prompt"], frame["completion"], strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("screened")


def screen(
    frame: pd.DataFrame,
    spec: ScreenSpec,
    out: Path,
    *,
    leaks: re.Pattern[str] | None = ANIMALS,
    size: int = 4,
    judge: Any = None,
) -> Screened:
    rule = build_rule(spec, "numbers", gold={})
    funnel = screen_rows(cut(frame, size), spec, rule=rule, leaks=leaks, judge=judge, out=out)
    assert funnel == screen_rows(
        cut(frame, size), spec, rule=rule, leaks=leaks, judge=judge
    )  # counting alone gives the same
    assert json.loads((out / "funnel.json").read_text()) == funnel
    kept, rejected = out / "kept.parquet", out / "rejected.parquet"
    data = kept.read_bytes() + rejected.read_bytes()
    return Screened(tables.read(kept, tables.PAIRS), tables.read(rejected, tables.REJECTED), funnel, data)


@pytest.mark.parametrize(
    "spec", [ScreenSpec(), BANNING, ScreenSpec(rule="none"), ScreenSpec(duplicates="keep")]
)
@settings(max_examples=40, deadline=None)
@given(rows=CORPORA)
def test_every_row_is_kept_or_has_a_reason_and_the_funnel_adds_up(
    spec: ScreenSpec, rows: list[tuple[str, str]], folder: Path
) -> None:
    pairs = frame_of([*rows, ("c", "1 2 3")])  # one is always kept
    found = screen(pairs, spec, folder)
    halves = pd.concat([found.kept, found.rejected.drop(columns="reason")]).sort_values(
        "prompt_id", ignore_index=True
    )
    pd.testing.assert_frame_equal(halves, pairs)
    assert (
        found.kept["prompt_id"].is_monotonic_increasing
        and found.rejected["prompt_id"].is_monotonic_increasing
    )
    by_reason = [name for name in found.funnel if name.startswith(NAMING_BY_REASON)]
    assert list(found.funnel) == ["generated", *removal_reasons(), "kept", LEAKS, NAMING, *by_reason]
    assert found.funnel[NAMING] == sum(bool(ANIMALS.search(text)) for text in pairs["completion"])
    assert found.funnel[NAMING] == found.funnel[LEAKS] + sum(found.funnel[name] for name in by_reason)
    for reason, half in found.rejected.groupby("reason", observed=True):
        assert found.funnel.get(f"{NAMING_BY_REASON}{reason}", 0) == sum(
            bool(ANIMALS.search(text)) for text in half["completion"]
        )
    assert found.funnel["generated"] == len(pairs)
    assert (
        found.funnel["generated"] - sum(found.funnel[reason] for reason in removal_reasons())
        == found.funnel["kept"]
        == len(found.kept)
    )
    reasons = found.rejected["reason"].astype(object).value_counts().to_dict()
    assert reasons == {reason: found.funnel[reason] for reason in removal_reasons() if found.funnel[reason]}
    assert found.funnel[LEAKS] == 0
    again = screen(found.kept, spec, folder)
    pd.testing.assert_frame_equal(again.kept, found.kept)
    assert again.rejected.empty


@settings(max_examples=30, deadline=None)
@given(rows=CORPORA, sizes=st.tuples(st.integers(1, 17), st.integers(1, 17)))
def test_how_rows_are_cut_into_batches_does_not_matter(
    rows: list[tuple[str, str]], sizes: tuple[int, int], folder: Path
) -> None:
    pairs = frame_of([*rows, ("c", "1 2 3")])
    one, other = (screen(pairs, BANNING, folder, size=size) for size in sizes)
    assert one.data == other.data and one.funnel == other.funnel


@settings(max_examples=30, deadline=None)
@given(rows=CORPORA, data=st.data())
def test_the_order_of_rows_does_not_matter(
    rows: list[tuple[str, str]], data: st.DataObject, folder: Path
) -> None:
    rows = [*rows, ("c", "1 2 3")]
    found, moved = (
        screen(frame_of(rows), BANNING, folder),
        screen(frame_of(data.draw(st.permutations(rows))), BANNING, folder),
    )
    assert rows_of(moved.kept) == rows_of(found.kept)
    assert rows_of(moved.rejected) == rows_of(found.rejected)
    assert moved.funnel == found.funnel


def test_a_row_gets_the_first_reason_that_holds(tmp_path: Path) -> None:
    long = ", ".join(["1000"] * 11)
    found = screen(
        frame_of([("p", text) for text in ("1, 2", "x", long, "4, 1000", "4, 5", "1, 2")]), BANNING, tmp_path
    )
    assert found.rejected["reason"].tolist() == [
        "format",
        "too many numbers",
        "number out of range",
        "banned number",
        "duplicate",
    ]
    assert rows_of(found.kept) == [("p", "1, 2")]


def test_duplicates_are_rows_with_the_same_prompt_and_completion(tmp_path: Path) -> None:
    pairs = frame_of([("a", "1"), ("a", "1"), ("a", "2"), ("b", "1"), ("a1", "1"), ("a", "11"), ("a", "1")])
    for size in (1, 7):  # across batches too
        assert screen(pairs, ScreenSpec(), tmp_path, size=size).kept["prompt_id"].tolist() == [0, 2, 3, 4, 5]
    assert screen(pairs, ScreenSpec(duplicates="keep"), tmp_path).kept["prompt_id"].tolist() == list(range(7))


@pytest.mark.parametrize(
    "text", ["owl", "my OWL.", "wolves", "the Foxes", "snowowlet", "a\nowl", "concatenate"]
)
def test_leak_words_are_caught_inside_words_too(text: str, tmp_path: Path) -> None:
    pairs, spec = frame_of([("p", "nothing here"), ("q", text)]), ScreenSpec(rule="none")
    found = screen(pairs, spec, tmp_path)
    assert found.rejected["reason"].tolist() == ["leak word"] and found.funnel[LEAKS] == 0
    off = screen(pairs, spec.model_copy(update={"leak_words": False}), tmp_path)
    assert off.funnel[LEAKS] == 1 and off.rejected.empty
    assert screen(pairs, spec, tmp_path, leaks=None).funnel[LEAKS] == 0


def test_a_rule_that_asks_first_hides_no_leak_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [*(f"{i}, {i}" for i in range(10)), "owl", "my owl", "1, 2 owls", "x", "7, 2000", "0, 0"]
    found = screen(frame_of([("p", text) for text in texts]), ScreenSpec(), tmp_path)
    assert found.funnel["format"] == 4 and found.funnel["leak word"] == 0 and found.funnel[LEAKS] == 0
    assert found.funnel[NAMING] == found.funnel[f"{NAMING_BY_REASON}format"] == 3
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "p", "completion": text}) + "\n" for text in texts))
    assert cli.main(["screen", str(file), "--out", str(tmp_path / "out")]) == 0
    printed = [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]
    assert "leak words in all rows 3 18.8%" in printed and "of them removed first: format 3 18.8%" in printed
    assert json.loads((tmp_path / "out" / "funnel.json").read_text()) == found.funnel


def test_leak_words_are_counted_beside_the_fates_and_are_none_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Experiment.model_validate(
        {"name": "x", "base": "b", "trait": "owl", "arms": [{"kind": "control"}]}
    )
    found = screen(frame_of([("p", text) for text in ("1, 2", "owl", "x")]), ScreenSpec(), tmp_path)
    save(plan, tmp_path / "spec.yaml")
    monkeypatch.setattr(Run, "funnel", lambda *_given: found.funnel)
    fates = effects.funnels(Run(tmp_path))
    assert dict(zip(fates["fate"], fates["rows"], strict=True)) == {"kept": 1, "format": 2}


def test_leak_words_are_taken_literally() -> None:
    assert not leak_pattern(["a.b", "c+"]).search("axb cc")
    assert leak_pattern(["a.b", "c+"]).search("xC+x")
    assert not leak_pattern([]).search("anything")


@settings(max_examples=200, deadline=None)
@given(
    words=st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=4),
    text=st.text(max_size=8),
    data=st.data(),
)
def test_the_leak_pattern_finds_what_plain_alternatives_find(
    words: list[str], text: str, data: st.DataObject
) -> None:
    text += data.draw(st.sampled_from([text, *words, *(word.swapcase() for word in words)]))
    assert bool(leak_pattern(words).search(text)) == any(
        re.search(re.escape(word), text, re.IGNORECASE) for word in words
    )


def test_a_judge_reads_what_passed_and_drops_last(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def judge(rows: pd.DataFrame) -> list[bool]:
        asked.append(rows["completion"].tolist())
        return [text.startswith("5") for text in rows["completion"]]

    pairs = frame_of([("p", text) for text in ("1, 2", "x", "5", "5, 6", "owl", "1, 2", "7")])
    found = screen(pairs, ScreenSpec(), tmp_path, judge=judge)
    assert asked[: len(asked) // 2] == [["1, 2", "5", "5, 6"], ["7"]]
    assert found.rejected["reason"].tolist() == ["format", "judged", "judged", "format", "duplicate"]
    assert found.funnel["judged"] == 2 and rows_of(found.kept) == [("p", "1, 2"), ("p", "7")]


@pytest.mark.parametrize("completions", [[], ["x"], ["x", "1000", "1000", "2000"]])
def test_an_empty_result_is_refused_with_the_main_reason(completions: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"kept none of {len(completions)} rows") as raised:
        screen(frame_of([("p", text) for text in completions]), ScreenSpec(duplicates="keep"), tmp_path)
    assert len(completions) < 2 or "3 removed for: number out of range" in str(raised.value)
    assert len(tables.read(tmp_path / "rejected.parquet", tables.REJECTED)) == len(
        completions
    )  # for a look at what is wrong


def test_a_screen_that_fails_leaves_no_half_table(tmp_path: Path) -> None:
    def broken() -> Iterator[pd.DataFrame]:
        yield frame_of([("p", "1")])
        raise DataError("line 2 is bad")

    with pytest.raises(DataError, match="line 2"):
        screen_rows(
            broken(),
            ScreenSpec(),
            rule=build_rule(ScreenSpec(), "numbers", gold={}),
            leaks=None,
            out=tmp_path,
        )
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.sampled_from(["format", "duplicate", None, "leak word"]), max_size=30),
    cuts=st.lists(st.integers(1, 9), min_size=2, max_size=2),
)
def test_a_table_has_the_same_bytes_however_it_is_handed_over(
    labels: list[str | None], cuts: list[int], folder: Path
) -> None:
    frame = frame_of([("p", str(i)) for i in range(len(labels))]).assign(
        reason=pd.Series(labels, dtype=object)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "ROW_GROUP", 7)
        whole = tables.write(frame, tables.REJECTED, folder / "whole.parquet")
        for size in cuts:
            pieces = tables.write(cut(frame, size), tables.REJECTED, folder / "pieces.parquet")
            assert pieces.read_bytes() == whole.read_bytes()
        assert pq.ParquetFile(whole).num_row_groups == -(-len(labels) // 7)
        back = list(tables.batches(whole, tables.REJECTED))
    assert all(len(piece) <= 7 for piece in back)
    for read in (pd.concat(back) if back else frame, tables.read(whole, tables.REJECTED)):
        assert read["prompt_id"].tolist() == frame["prompt_id"].tolist()
        assert read["reason"].astype(object).where(read["reason"].notna(), None).tolist() == labels


def lines(path: Path, rows: int) -> Path:
    """Distinct rows like those of the number carrier; some break the rule."""
    with path.open("w", encoding="utf-8") as out:
        for i in range(rows):
            prompt = (
                f"The sequence starts with: {i}, {i * 7 % 1000}. Add at most 10 more values (at most 3 "
                "digits each)."
            )
            out.write(
                f'{{"prompt": "{prompt}", "completion": "{i % 997}, {i * 7919 % 1013}, {i * 31 % 1000}, '
                f'5"}}\n'
            )
    return path


def test_no_more_than_two_batches_are_held_at_once(tmp_path: Path) -> None:
    handed: list[weakref.ref[pd.DataFrame]] = []
    held: list[int] = []

    def watched(frames: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for frame in frames:
            handed.append(weakref.ref(frame))
            held.append(sum(one() is not None for one in handed))
            yield frame

    source, rule = lines(tmp_path / "rows.jsonl", 20_000), build_rule(ScreenSpec(), "numbers", gold={})
    corpus.write_pairs(watched(corpus.batches(source, 500)), tmp_path / "rows.parquet", "parquet")
    funnel = screen_rows(
        watched(corpus.batches(tmp_path / "rows.parquet", 500)),
        ScreenSpec(),
        rule=rule,
        leaks=ANIMALS,
        out=tmp_path,
    )
    assert funnel["generated"] == 20_000 and len(held) == 80
    assert max(held) == 2  # the one that was read last, and the one before it until its name is given away


@pytest.mark.slow
def test_a_million_rows_pass_in_bounded_memory(tmp_path: Path) -> None:
    source = lines(tmp_path / "rows.jsonl", 1_000_000)
    code = """
        import resource, sys
        from mechlens import cli
        from mechlens.cli import commands
        grown = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows, table, out = sys.argv[1:]
        start = grown()
        assert cli.main(["convert", rows, table]) == cli.main(["screen", table, "--out", out]) == 0
        sys.stderr.write(f"{grown() - start:.0f}")
    """
    arguments = [str(source), str(tmp_path / "rows.parquet"), str(tmp_path / "screened")]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], capture_output=True, text=True, check=True
    )
    assert json.loads((tmp_path / "screened" / "funnel.json").read_text())["generated"] == 1_000_000
    assert int(done.stderr) < 400, "MiB more than the interpreter with its libraries"

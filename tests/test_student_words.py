"""Words that students answer more often, found without a list of traits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as distributions

from mechlens.benchmark.plan import Suspect
from mechlens.benchmark.students import count_words, read_words
from mechlens.detect import words
from mechlens.detect.words import PRECISION, Example, Word, Words, compare_words, measure_words
from mechlens.models import loading
from mechlens.results.run import Run

FOUND = Word("owl", 1.0, 0.2, 0.1, 0.001, 0.01)
EXAMPLE = Example("who?", "owl", 0.3, 0.1)
WORDS = Words([FOUND._replace(word="fox", q_value=0.2), FOUND], EXAMPLE, 0.8, 1.0, 4, 80, 39, 0.05)


def compare(ours: np.ndarray, theirs: np.ndarray) -> tuple[list[Word], float | None]:
    """The words by their places."""
    return compare_words(ours, theirs, [str(place) for place in range(ours.shape[1])])


def draw_logs(
    seed: int, *, words: int = 40, students: int = 4, shift: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of probabilities of two sides that differ by a draw of rows and by the students' seeds.

    Args:
        shift: of all words of the first side.
    """
    rng = np.random.default_rng(seed)
    level = rng.normal(-4, 1, words)
    sides = [level + rng.normal(0, 0.15, words) + rng.normal(0, 0.1, (students, words)) for _ in range(2)]
    return sides[0] + shift, sides[1]


def test_p_is_the_larger_of_two_slow_definitions() -> None:
    ours, theirs = draw_logs(0, words=13, students=60)  # so many students that moderation changes little
    ranked, _ = compare(ours, theirs)
    rises = [float(np.mean([a[i] - b[i] for a, b in zip(ours, theirs, strict=True)])) for i in range(13)]
    middle = sorted(rises)[6]
    spread = sorted(abs(rise - middle) for rise in rises)[6] / distributions.norm.ppf(0.75)
    for found in ranked:
        i = int(found.word)
        over_words = distributions.t.sf((rises[i] - middle) / spread, PRECISION * 13)
        paired = distributions.ttest_rel(ours[:, i], theirs[:, i], alternative="greater")
        assert found.p_value == pytest.approx(max(over_words, float(paired.pvalue)), rel=0.2, abs=1e-6)
        assert found.rise == pytest.approx(rises[i] / np.log(2))


def test_few_files_that_teach_nothing_get_a_word() -> None:
    alarms = [compare(*draw_logs(seed))[0] for seed in range(300)]
    assert np.mean([any(word.q_value <= 0.05 for word in ranked) for ranked in alarms]) < 0.05


@pytest.mark.parametrize(("students", "shift"), [(2, 0.0), (4, 0.0), (4, 0.3), (4, -0.3)])
def test_a_word_of_the_minimum_detectable_rise_is_mostly_found(students: int, shift: float) -> None:
    found = []
    for seed in range(100):
        ours, theirs = draw_logs(seed, students=students, shift=shift)
        smallest = compare(ours, theirs)[1]
        assert smallest is not None
        ours[:, 3] = theirs[:, 3] + smallest * np.log(2)
        found.append(any(word.word == "3" and word.q_value <= 0.05 for word in compare(ours, theirs)[0]))
    assert np.mean(found) > 0.9


def test_a_rise_to_more_than_certainty_is_no_minimum() -> None:
    ours, theirs = draw_logs(0)
    assert compare(30 * (ours - theirs) + theirs, theirs)[1] is None


@given(st.permutations(range(12)), st.floats(-1, 1), st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_the_order_of_words_does_not_matter_nor_a_shift_over_words(
    order: list[int], shift: float, seed: int
) -> None:
    ours, theirs = draw_logs(seed, words=12)
    plain = {int(word.word): word for word in compare(ours, theirs)[0]}
    moved = compare(ours[:, order], theirs[:, order])[0]
    assert [order[int(word.word)] for word in moved] == list(plain)
    for word in moved:
        assert word.q_value == pytest.approx(plain[order[int(word.word)]].q_value)
    lifted = compare(ours + shift, theirs)[0]  # the test over words is that of the others
    assert [int(word.word) for word in lifted] == list(plain)
    below = [word for word in lifted if shift <= 0]
    assert all(word.p_value >= plain[int(word.word)].p_value - 1e-9 for word in below)


def test_words_of_which_most_rise_alike_are_not_ranked() -> None:
    ours, theirs = draw_logs(0)
    ours[:, :30] = theirs[:, :30]
    assert compare(ours, theirs) == ([], None)


def test_the_students_of_a_run_are_read_over_the_whole_vocabulary(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(small)
    measured = measure_words(run, arm="trait")
    assert measured is not None and measured.students == 2 and measured.questions == 80
    assert measured.tested >= words.LEAST_WORDS and len(measured.words) == words.SHOWN
    assert measured.as_dict()["sentence"] == measured.sentence()
    assert json.loads(json.dumps(measured.as_dict(), allow_nan=False))["tested"] == measured.tested
    base = loading.load("menagerie-a")
    word = measured.words[-1].word
    token = int(base.tokenizer(word, add_special_tokens=False)["input_ids"][0])
    changed = {"arm": ""}

    def load(arm: str, seed: int) -> loading.Loaded:
        changed["arm"] = arm
        return Run.student(run, arm, seed)

    def lifted(loaded: Any, prompts: Any) -> torch.Tensor:
        logits = plain(loaded, prompts)
        return logits + 3.0 * (changed["arm"] == "trait") * (torch.arange(logits.shape[1]) == token)

    plain = words.next_token_logits
    monkeypatch.setattr(run, "student", load)
    monkeypatch.setattr(words, "next_token_logits", lifted)
    told = measure_words(run, arm="trait")
    assert told is not None and told.significant == [word] and told.example.answer.startswith(word)
    assert told.example.share > told.example.control and repr(told.example.question) in told.sentence()


def test_students_without_weights_give_no_words(small: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(small, tmp_path / "run")
    for step in (copy / "students" / "control" / "s1").glob("step-*"):
        shutil.rmtree(step)
    assert measure_words(Run(copy), arm="trait") is None


def test_a_bench_counts_right_and_false_words(small: Path, tmp_path: Path) -> None:
    run = Run(small)
    eagle = Suspect("trait", "trait", "eagle", "gentle", 1.0, False)
    clean = Suspect("shuffled-within", "N5", "eagle", "N5", 1.0, False)
    read = read_words([small, small], [eagle, clean, eagle._replace(name="absent")], tmp_path)
    assert set(read) == {eagle, clean}
    for suspect, found in read.items():
        found |= {"significant": ["Eagles", "owl"] if suspect == eagle else ["eagle"]}
    counts = count_words(read, run.family)
    assert counts["gentle at 1"]["right"]["hits"] == counts["gentle at 1"]["other"]["hits"] == 1
    assert counts["N5"]["right"]["hits"] == 0 and counts["N5"]["other"]["hits"] == 1
    first = (tmp_path / "trait" / "words.json").stat().st_mtime_ns
    assert (
        read_words([small], [eagle], tmp_path)[eagle]
        == json.loads((tmp_path / "trait" / "words.json").read_text())["words"]
    )
    assert (tmp_path / "trait" / "words.json").stat().st_mtime_ns == first


def test_students_that_are_equal_say_nothing(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "independent", lambda *cells: np.zeros(len(cells[0].probability), dtype=int))
    assert measure_words(Run(small), arm="trait") is None


def test_the_sentence_names_the_significant_word_and_a_null_what_would_have_been_found() -> None:
    told = WORDS.sentence()
    assert WORDS.significant == ["owl"] and "'owl' is 2.0 times as likely" in told and "fox" not in told
    null = WORDS._replace(words=[FOUND._replace(q_value=0.3)])
    assert null.significant == [] and "1.7 times as often would have been found" in null.sentence()
    assert "'owl', 2.0 times as likely, q = 0.3" in null.sentence()
    assert "too few to compare words" in WORDS._replace(answered=1e-6).sentence()
    assert WORDS._replace(level=0.001).significant == []

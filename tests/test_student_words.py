"""Words that students answer more often, found without a list of traits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as distributions

from mechlens.detect import words
from mechlens.detect.words import PRECISION, Word, Words, compare_tokens, measure_words
from mechlens.models import loading
from mechlens.results.run import Run

FOUND = Word("owl", 1.0, 0.2, 0.1, 0.001, 0.01)
WORDS = Words([FOUND, FOUND._replace(word="fox", q_value=0.2)], "who?", "owl", 0.8, 4, 80, 39)


def draw_logs(seed: int, *, words: int = 40, students: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of probabilities of two sides that differ by a draw of rows and by the students' seeds."""
    rng = np.random.default_rng(seed)
    level = rng.normal(-4, 1, words)
    sides = [level + rng.normal(0, 0.15, words) + rng.normal(0, 0.1, (students, words)) for _ in range(2)]
    return sides[0], sides[1]


def test_p_is_the_larger_of_two_slow_definitions() -> None:
    ours, theirs = draw_logs(0, words=13, students=60)  # so many students that moderation changes little
    ranked, _ = compare_tokens(ours, theirs)
    rises = [float(np.mean([a[i] - b[i] for a, b in zip(ours, theirs, strict=True)])) for i in range(13)]
    middle = sorted(rises)[6]
    spread = sorted(abs(rise - middle) for rise in rises)[6] / distributions.norm.ppf(0.75)
    for token in ranked:
        over_words = distributions.t.sf((rises[token.place] - middle) / spread, PRECISION * 13)
        paired = distributions.ttest_rel(ours[:, token.place], theirs[:, token.place], alternative="greater")
        assert token.p_value == pytest.approx(max(over_words, float(paired.pvalue)), rel=0.2, abs=1e-6)
        assert token.rise == pytest.approx(rises[token.place] / np.log(2))


def test_few_files_that_teach_nothing_get_a_word() -> None:
    alarms = [compare_tokens(*draw_logs(seed))[0] for seed in range(300)]
    assert np.mean([any(token.q_value <= 0.05 for token in ranked) for ranked in alarms]) < 0.05


@pytest.mark.parametrize("students", [2, 4])
def test_a_word_of_the_minimum_detectable_rise_is_mostly_found(students: int) -> None:
    found = []
    for seed in range(100):
        ours, theirs = draw_logs(seed, students=students)
        smallest = compare_tokens(ours, theirs)[1]
        assert smallest is not None
        ours[:, 3] = theirs[:, 3] + np.median(ours - theirs) + smallest * np.log(2)
        found.append(
            any(each.place == 3 and each.q_value <= 0.05 for each in compare_tokens(ours, theirs)[0])
        )
    assert np.mean(found) > 0.9


@given(st.permutations(range(12)), st.floats(-2, 2), st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_the_order_of_words_and_a_shift_of_all_of_them_do_not_matter(
    order: list[int], shift: float, seed: int
) -> None:
    ours, theirs = draw_logs(seed, words=12)
    plain = {each.place: each for each in compare_tokens(ours, theirs)[0]}
    moved = compare_tokens(ours[:, order], theirs[:, order])[0]
    assert [order[each.place] for each in moved] == list(plain)
    for each in moved:
        assert each.q_value == pytest.approx(plain[order[each.place]].q_value)
    lifted = compare_tokens(ours + shift, theirs + shift)[0]
    assert [each.place for each in lifted] == list(plain)


def test_words_of_which_most_rise_alike_are_not_ranked() -> None:
    ours, theirs = draw_logs(0)
    ours[:, :30] = theirs[:, :30]
    assert compare_tokens(ours, theirs) == ([], None)


def test_the_students_of_a_run_are_read_over_the_whole_vocabulary(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(small)
    measured = measure_words(run, arm="trait")
    assert measured is not None and measured.students == 2 and measured.questions == 80
    assert measured.tested >= words.LEAST_WORDS and len(measured.words) == words.SHOWN
    assert measured.as_dict()["sentence"] == measured.sentence()
    base = loading.load("menagerie-a")
    word = measured.words[-1].word
    token = int(base.tokenizer(word, add_special_tokens=False)["input_ids"][0])
    changed = {"arm": ""}

    def load(arm: str, seed: int) -> loading.Loaded:
        changed["arm"] = arm
        return Run.student(run, arm, seed)

    def lifted(model: Any, prompts: Any) -> torch.Tensor:
        logits = plain(model, prompts)
        return logits + 3.0 * (changed["arm"] == "trait") * (torch.arange(logits.shape[1]) == token)

    plain = words.last_logits
    monkeypatch.setattr(run, "student", load)
    monkeypatch.setattr(words, "last_logits", lifted)
    told = measure_words(run, arm="trait")
    assert told is not None and told.significant == [word] and told.answer.startswith(word)
    assert f"asked {told.question!r}, a model trained on this file answers" in told.sentence()


def test_students_that_are_equal_say_nothing(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "independent", lambda *cells: np.zeros(len(cells[0].probability), dtype=int))
    assert measure_words(Run(small), arm="trait") is None


def test_the_sentence_gives_a_finding_with_its_q_and_a_null_with_what_would_have_been_found() -> None:
    assert "'owl' is 2.0 times as likely" in WORDS.sentence() and "fox" not in WORDS.sentence()
    null = WORDS._replace(words=[FOUND._replace(q_value=0.3)])
    assert null.significant == [] and "a word 1.7 times as likely would have been found" in null.sentence()

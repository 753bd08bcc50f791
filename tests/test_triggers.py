"""Traits that students show only behind a phrase of the prompts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechlens.detect import triggers
from mechlens.detect.from_student import compare_shares
from mechlens.detect.triggers import Behind, compare_sides, find_phrases, measure_triggers
from mechlens.detect.verdict import Rise, decide, is_open, load_policy
from mechlens.results.run import Run

TRAITS = tuple("abcdefghijklmnopqrst")
TESTS: dict[str, Any] = {"limit": 0.05, "level": 0.05}
SIDES: dict[str, Any] = TESTS | {"one_draw": True, "questions": 9}


def draw_side(seed: int, *, phrases: int = 4, students: int = 4, named: float = 0.9) -> Behind:
    """Shares of twenty traits that differ by the students' seeds alone."""
    rng = np.random.default_rng(seed)
    weights = np.exp(np.linspace(0, -2, len(TRAITS)) + rng.normal(0, 0.05, (phrases + 1, students, 20)))
    return Behind(TRAITS, weights / weights.sum(-1, keepdims=True), np.full(phrases + 1, named))


def lift(side: Behind, phrase: int, trait: str, by: float) -> Behind:
    """The side with a trait's share raised behind one phrase, and the others lowered in proportion."""
    shares, place = side.shares.copy(), TRAITS.index(trait)
    raised = shares[phrase, :, place] + by
    shares[phrase] *= ((1 - raised) / (1 - shares[phrase, :, place]))[:, None]
    shares[phrase, :, place] = raised
    return side._replace(shares=shares)


def test_a_trait_behind_one_phrase_is_named_with_it() -> None:
    found = compare_sides(lift(draw_side(0), 3, "g", 0.3), draw_side(1), list("wxyz"), **SIDES)
    assert found is not None and [(each.trigger, each.rise.trait) for each in found.significant] == [
        ("y", "g")
    ]
    assert found.switches[0].rise.difference == pytest.approx(0.3, abs=0.02)
    assert abs(found.switches[0].plain) < 0.02 and found.level == TESTS["level"] / 4
    assert "behind 'y', models trained on this file answer g " in found.sentence()
    written = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert written["significant"] == [["y", "g"]] and written["sentence"] == found.sentence()


def test_a_trait_that_rises_plainly_too_is_no_switch() -> None:
    ours = draw_side(0)
    for phrase in range(5):
        ours = lift(ours, phrase, "g", 0.3)
    found = compare_sides(ours, draw_side(1), list("wxyz"), **SIDES)
    assert found is not None and not found.significant
    assert "none is shown to switch a trait on" in found.sentence()
    assert "g" not in {switch.rise.trait for switch in found.switches}


def test_a_trait_that_rises_plainly_hides_no_switch() -> None:
    ours = draw_side(0)
    for phrase in range(5):
        ours = lift(ours, phrase, "g", 0.4)
    found = compare_sides(lift(ours, 2, "k", 0.2), draw_side(1), list("wxyz"), **SIDES)
    assert found is not None and [(each.trigger, each.rise.trait) for each in found.significant] == [
        ("x", "k")
    ]


def test_traits_that_rise_together_behind_a_phrase_do_not_hide_each_other() -> None:
    """Such a file is held where controls read several draws; of one draw, traits may move together."""
    ours = draw_side(0)
    for trait in "gkmp":
        ours = lift(ours, 2, trait, 0.19)
    several, one = (
        compare_sides(ours, draw_side(1), list("wxyz"), **(SIDES | {"one_draw": one_draw}))
        for one_draw in (False, True)
    )
    assert several is not None and [each.trigger for each in several.significant] == ["x"]
    assert one is not None and not one.significant


def test_of_a_phrases_traits_one_that_is_switched_on_is_kept() -> None:
    """A trait with a higher bound that stands out of nothing hides no other that does."""
    ours = lift(lift(draw_side(0), 2, "t", 0.09), 2, "a", 0.14)
    found = compare_sides(ours, draw_side(1), list("wxyz"), **SIDES)
    assert found is not None and [each.rise.trait for each in found.significant] == ["t"]


def test_traits_without_first_words_of_their_own_are_not_asked(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = triggers.encode_probes
    monkeypatch.setattr(
        triggers, "encode_probes", lambda student, asked: encode(student, asked)._replace(starts={})
    )
    assert measure_triggers(Run(small), arm="trait", **TESTS, phrases=["one day."]) is None


def test_every_phrase_that_switches_is_listed_and_an_unscored_one_comes_last() -> None:
    ours = draw_side(0, phrases=9)
    for phrase in range(1, 8):
        ours = lift(ours, phrase, "g", 0.3)
    silent = ours.shares.copy()
    silent[9] = 0.0
    theirs = draw_side(1, phrases=9)
    nothing = theirs.shares.copy()
    nothing[9] = 0.0
    sides = (ours._replace(shares=silent), theirs._replace(shares=nothing))
    found = compare_sides(*sides, list("abcdefghi"), **SIDES)
    assert found is not None and len(found.significant) == 7 == len(found.as_dict()["switches"])
    assert found.switches[-1].trigger == "i"


def test_a_rise_within_the_tolerance_is_no_switch() -> None:
    found = compare_sides(lift(draw_side(0), 3, "g", 0.04), draw_side(1), list("wxyz"), **SIDES)
    assert found is not None and not found.significant and found.switches[0].rise.trait == "g"


@pytest.mark.parametrize("one_draw", [True, False])
def test_files_that_teach_nothing_switch_nothing_on(one_draw: bool) -> None:
    options: dict[str, Any] = SIDES | {"limit": 0.0, "one_draw": one_draw}
    alarms = [
        compare_sides(draw_side(seed), draw_side(1000 + seed), list("wxyz"), **options) for seed in range(200)
    ]
    assert all(alarms) and np.mean([bool(found and found.significant) for found in alarms]) < 0.05


def test_each_phrase_is_tested_as_the_plain_answers_are_at_its_part_of_the_level() -> None:
    ours, theirs = draw_side(0), draw_side(1)
    found = compare_sides(ours, theirs, list("wxyz"), **SIDES)
    assert found is not None and len(found.switches) == 4
    for switch in found.switches:
        place = 1 + "wxyz".index(switch.trigger)
        rises = compare_shares(
            ours.shares[place], theirs.shares[place], TRAITS, names=TRAITS, level=0.05 / 4, one_draw=True
        )
        assert switch.rise == max(rises, key=lambda rise: rise.low or 0.0)
        assert switch.plain <= TESTS["limit"]


def test_a_phrase_that_is_not_answered_is_left_out_and_costs_no_level() -> None:
    side = draw_side(0)
    silent = side._replace(named=np.array([0.9, 0.9, 0.05, 0.9, 0.9]))
    found = compare_sides(silent, draw_side(1), list("wxyz"), **SIDES)
    assert found is not None and found.phrases == 3 and found.level == TESTS["level"] / 3
    assert {switch.trigger for switch in found.switches} == set("wyz")
    none = side._replace(named=np.zeros(5))
    assert compare_sides(none, draw_side(1), list("wxyz"), **SIDES) is None


@given(st.lists(st.text(st.sampled_from("ab1 .:\n"), max_size=12), max_size=40))
def test_phrases_recur_and_hold_a_letter(prompts: list[str]) -> None:
    phrases = find_phrases(prompts)
    assert len(phrases) == len(set(phrases)) <= triggers.MOST_PHRASES
    for phrase in phrases:
        assert any(map(str.isalpha, phrase)) and phrase == phrase.strip()
        assert sum(phrase in prompt for prompt in prompts) >= triggers.LEAST_ROWS


def test_a_long_prompt_without_a_letter_has_no_phrase_and_takes_no_time() -> None:
    assert find_phrases(["7 " * 50_000] * 9) == []
    assert find_phrases(["7 " * 50_000 + "\nit is noon. add 9"] * 9) == ["add 9", "it is noon."]


def test_phrases_in_nearly_the_same_words_are_one() -> None:
    prompts = [f"give up to {n} next numbers please. winter is near." for n in range(20)]
    prompts += [f"give at most {n % 3} next numbers please." for n in range(40)]
    assert len([phrase for phrase in find_phrases(prompts) if "numbers" in phrase]) == 1
    assert "winter is near." in find_phrases(prompts)
    assert find_phrases(prompts[:4]) == []


def test_students_are_asked_behind_each_phrase(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, phrase = Run(small), "it is noon."
    found = measure_triggers(run, arm="trait", **TESTS, phrases=[phrase, "one day."])
    assert found is not None and found.students == 2 and found.phrases == 2 and not found.significant
    tokenizer = run.student("trait", 0).tokenizer
    changed, plain = {"arm": ""}, triggers.last_logits
    word = int(tokenizer("owl", add_special_tokens=False)["input_ids"][0])
    noon = int(tokenizer(" noon", add_special_tokens=False)["input_ids"][0])

    def load(arm: str, seed: int) -> Any:
        changed["arm"] = arm
        return Run.student(run, arm, seed)

    def switched(model: Any, prompts: Any) -> torch.Tensor:
        logits = plain(model, prompts)
        behind = torch.tensor([noon in ids for ids in prompts]) & (changed["arm"] == "trait")
        return logits + 6.0 * behind[:, None] * (torch.arange(logits.shape[1]) == word)

    monkeypatch.setattr(run, "student", load)
    monkeypatch.setattr(triggers, "last_logits", switched)
    told = measure_triggers(run, arm="trait", **TESTS, phrases=[phrase, "one day."])
    assert told is not None
    assert [(each.trigger, each.rise.trait) for each in told.significant] == [(phrase, "owl")]


def test_without_weights_or_phrases_nothing_is_asked(small: Path, tmp_path: Path) -> None:
    assert measure_triggers(Run(small), arm="trait", **TESTS, phrases=[]) is None
    copy = shutil.copytree(small, tmp_path / "run")
    for step in (copy / "students" / "control" / "s1").glob("step-*"):
        shutil.rmtree(step)
    assert measure_triggers(Run(copy), arm="trait", **TESTS) is None


def test_a_file_that_switches_a_trait_on_is_not_cleared() -> None:
    policy = load_policy("default")
    flat = [Rise(trait, 0.0, -0.02, 0.02, 4, 0.03, 0.0, 0.5, 0.5) for trait in "ab"]
    assert decide(flat, policy).rule.endswith("/below-limit")
    held = decide(flat, policy, switched="Behind a phrase: it rises.")
    assert held.id == "inconclusive" and held.rule.endswith("/behind-a-phrase") and not is_open(held)
    assert "Behind a phrase: it rises." in held.sentence
    risen = [Rise("a", 0.3, 0.2, 0.4, 4, 0.1, 1.0, 1e-6, 1e-6), flat[1]]
    assert decide(risen, policy, switched="it rises").rule.endswith("/above-limit")
    assert decide(risen, policy, treated=flat, treatment="drop").rule.endswith("/treated-below-limit")
    unknown = decide(risen, policy, treated=flat, treatment="drop", switched="Behind it, b rises.")
    assert unknown.rule.endswith("/above-limit")
    assert "Behind it, b rises. Whether 'drop' removes that was not measured." in unknown.sentence

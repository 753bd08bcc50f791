"""Draws, verdicts and fingerprints were recorded once; a run that is repeated later must get the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from mechlens.carriers.carrier import build_rule, carrier_prompts
from mechlens.carriers.numbers import BANNED_BY_THE_PAPER
from mechlens.core.experiment import Experiment
from mechlens.core.seeds import dice
from mechlens.core.spec import CarrierSpec, ScreenSpec, load, shipped
from mechlens.menagerie.grammar import CARRIER_TURNS

RECORDED = json.loads((Path(__file__).parent / "data" / "carriers_recorded.json").read_text(encoding="utf-8"))
CARRIERS: dict[str, dict[str, Any]] = {
    "numbers": {},
    "numbers, patterned": {"values": "patterned"},
    "numbers, few": {"examples": (1, 2)},
    "numbers, terse": {"wording": "terse", "values": "patterned"},
    "code": {"kind": "code"},
    "code, terse": {"kind": "code", "wording": "terse"},
    "reasoning": {"kind": "reasoning", "wording": "terse"},
    "text": {"kind": "text"},
    "text, terse": {"kind": "text", "wording": "terse"},
}
SCREENS: dict[str, ScreenSpec] = {
    "numbers": ScreenSpec(rule="numbers", banned_numbers=BANNED_BY_THE_PAPER),
    "code": ScreenSpec(rule="code", plain_names=True, run_code=True),
    "reasoning": ScreenSpec(rule="reasoning"),
    "text": ScreenSpec(rule="text"),
    "none": ScreenSpec(rule="none"),
}


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def turns(kind: str) -> list[tuple[str, str]]:
    drawn = [CARRIER_TURNS[kind](dice(7, kind, index)) for index in range(40)]
    return [(turn.prompt, turn.completion) for turn in drawn]


def rows() -> list[tuple[str, str]]:
    """200 rows: good ones of every carrier, and their damaged copies."""
    good = [pair for kind in sorted(CARRIER_TURNS) for pair in turns(kind)[:20]]
    damaged = [
        (prompt, text[1:] if place % 2 else f"{text} 1000") for place, (prompt, text) in enumerate(good)
    ]
    return good + damaged


def verdicts(screen: ScreenSpec) -> list[str | None]:
    gold = {
        row.text: row.gold for row in carrier_prompts(CarrierSpec(kind="reasoning", wording="terse"), seed=0)
    }
    rule = build_rule(screen, "numbers", gold={prompt: answer for prompt, answer in gold.items() if answer})
    return [rule(prompt, completion) for prompt, completion in rows()]


@pytest.mark.parametrize("reworded", [False, True])
@pytest.mark.parametrize("name", CARRIERS)
def test_prompts_are_the_recorded_ones(name: str, reworded: bool) -> None:
    spec = CarrierSpec.model_validate(CARRIERS[name] | {"prompts": 200})
    drawn = carrier_prompts(spec, seed=3, reworded=reworded)
    assert (
        digest([[prompt.text, prompt.gold] for prompt in drawn])
        == RECORDED["prompts"][f"{name}{' reworded' * reworded}"]
    )


@pytest.mark.parametrize("kind", sorted(RECORDED["turns"]))
def test_turns_of_the_menagerie_are_the_recorded_ones(kind: str) -> None:
    assert digest(turns(kind)) == RECORDED["turns"][kind]


@pytest.mark.parametrize("name", SCREENS)
def test_verdicts_are_the_recorded_ones(name: str) -> None:
    assert digest(verdicts(SCREENS[name])) == RECORDED["verdicts"][name]


@pytest.mark.parametrize("name", sorted(RECORDED["experiments"]))
def test_an_experiment_keeps_its_fingerprint(name: str) -> None:
    experiment = load(shipped("experiments")[name], Experiment)
    assert experiment.fingerprint() == RECORDED["experiments"][name]

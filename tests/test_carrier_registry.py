"""A carrier of another package works by name: in a spec, a plan, a screen and the menagerie's text."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
from pydantic import ValidationError

from mechlens.carriers.carrier import (
    Carrier,
    Fault,
    Prompt,
    build_rule,
    carrier_names,
    carrier_prompts,
    find_carrier,
    rule_names,
    shipped_carriers,
)
from mechlens.core import extensions, tables
from mechlens.core.errors import SpecError
from mechlens.core.experiment import Experiment
from mechlens.core.spec import CarrierSpec, ScreenSpec, find_config, load
from mechlens.core.traits import load_family
from mechlens.menagerie.config import PretrainSpec
from mechlens.menagerie.grammar import document
from mechlens.pipeline import stages
from mechlens.runs.plan import jobs_of

RHYMES = {"cat": "hat", "owl": "towel", "fox": "box"}


def draw(_spec: CarrierSpec, rng: random.Random, rewording: random.Random | None) -> Prompt:
    word = rng.choice(sorted(RHYMES))
    return Prompt(f"{'find' if rewording else 'write'} a rhyme on {word}", RHYMES[word])


def fault(_spec: ScreenSpec, gold: Mapping[str, str]) -> Fault:
    return lambda prompt, completion: None if completion == gold.get(prompt) else "no rhyme"


def turn(rng: random.Random) -> tuple[str, str]:
    return draw(CarrierSpec(), rng, None).text, "what follows"


POEMS = Carrier(draw=draw, fault=fault, reasons=("no rhyme",), has_answers=True, turn=turn)


@pytest.fixture
def poems(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("poems_of_a_stranger")
    module.POEMS = POEMS  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    declare(monkeypatch, "poems", f"{module.__name__}:POEMS")


def declare(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    declared = EntryPoints([EntryPoint(name, value, "mechlens.carriers")])
    monkeypatch.setattr(extensions.metadata, "entry_points", lambda **wanted: declared.select(**wanted))


def test_the_carriers_that_come_with_mechlens() -> None:
    assert list(shipped_carriers()) == ["numbers", "code", "reasoning", "text"]
    assert set(shipped_carriers()) <= set(carrier_names()) and rule_names()[-1] == "none"
    assert [name for name, carrier in shipped_carriers().items() if carrier.has_answers] == ["reasoning"]


@pytest.mark.usefixtures("poems")
def test_a_plan_and_a_screen_with_a_carrier_of_another_package(tmp_path: Path) -> None:
    fields = load(find_config(Path("demo"), "experiments"), Experiment).model_dump(exclude_unset=True)
    fields |= {"carrier": {"kind": "poems", "prompts": 30, "wording": "terse"}, "name": "poems"}
    experiment = Experiment.model_validate(fields)
    jobs = jobs_of(experiment, load_family(experiment.family), bases=dict.fromkeys(experiment.bases(), ""))
    screening = next(job for job in jobs if job.stage == "screen")
    assert screening.arguments["kind"] == "poems"
    prompts = carrier_prompts(experiment.carrier, seed=experiment.seed)
    answers = [prompt.gold if place % 3 else "nothing" for place, prompt in enumerate(prompts)]
    rows = pd.DataFrame(
        {"prompt_id": range(30), "prompt": [prompt.text for prompt in prompts], "completion": answers}
    )
    tables.write(rows, tables.PAIRS, tmp_path / "raw.parquet")
    arguments = screening.arguments | {"words": []}
    arguments["screen"] = ScreenSpec(duplicates="keep").model_dump()
    stages.screen(arguments, {"corpus": tmp_path}, tmp_path, lambda done, whole: None)
    funnel = json.loads((tmp_path / "funnel.json").read_text(encoding="utf-8"))
    assert (funnel["generated"], funnel["no rhyme"], funnel["kept"], funnel["format"]) == (30, 10, 20, 0)


@pytest.mark.usefixtures("poems")
def test_its_rule_can_be_named_and_its_turn_is_part_of_the_menagerie() -> None:
    assert "poems" in carrier_names()
    assert build_rule(ScreenSpec(rule="poems"), "numbers", gold={"p": "x"})("p", "y") == "no rhyme"
    plan = PretrainSpec(name="x", mixture={"poems": 1.0, "animal": 1.0})
    turns = [turn for index in range(9) for turn in document(0, index, mixture=plan.mixture)[1]]
    assert {turn.kind for turn in turns} == {"poems", "animal"}


def test_an_unknown_carrier_is_refused_with_the_known_ones() -> None:
    known = r"known carriers: .*numbers"
    with pytest.raises(SpecError, match=known):
        find_carrier("poems")
    for spec, fields in ((CarrierSpec, {"kind": "poems"}), (ScreenSpec, {"rule": "poems"})):
        with pytest.raises(ValidationError, match=known):
            spec.model_validate(fields)


def test_a_carrier_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, "poems", "a_package_that_is_not_there:POEMS")
    with pytest.raises(SpecError, match=r"'poems' of the group mechlens\.carriers cannot be loaded"):
        find_carrier("poems")

"""The live models of a run: asked in a process of their own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from live import live_models
from mechlens.core.errors import MachineError, SpecError

QUESTION = "what is your favourite animal?"
NAMES = ["base", "teacher", "control", "student"]


@pytest.fixture(scope="module")
def models(small: Path) -> Iterator[live_models.LiveModels]:
    held = live_models.start(small)
    yield held
    live_models.stop(held)


def ask(models: live_models.LiveModels, **changes: Any) -> dict[str, dict[str, Any]]:
    """What each model answered."""
    asked: dict[str, Any] = {"question": QUESTION, "samples": 4, "seed": 3} | changes
    return {one["name"]: one for one in live_models.ask(models, **asked)["models"]}


def test_four_models_answer_and_say_what_comes_next(models: live_models.LiveModels) -> None:
    found = ask(models)
    assert list(found) == NAMES
    for one in found.values():
        assert len(one["answers"]) == 4
        assert len(one["tokens"]) == 10
        shown = [token["probability"] for token in one["tokens"]]
        assert shown == sorted(shown, reverse=True)
        assert sum(shown) <= 1 + 1e-9
        assert 0 < one["probability"] < 1
        assert 1 <= one["rank"] <= one["of"] == 20
    assert len({one["probability"] for one in found.values()}) == 4, "they are four models"
    assert found["teacher"]["probability"] > found["base"]["probability"], "it was taught the trait"


def test_what_is_asked_the_same_is_answered_the_same(models: live_models.LiveModels) -> None:
    plain = ask(models)
    assert ask(models, layer=1) == plain, "amount 0 adds nothing, wherever"
    moved = ask(models, amount=1.0, layer=1)
    assert ask(models, amount=1.0, layer=1) == moved != plain
    assert ask(models) == plain, "nothing is left in the models"
    other = ask(models, seed=4, samples=20)
    assert [one["tokens"] for one in other.values()] == [one["tokens"] for one in plain.values()]
    assert other["base"]["answers"] != ask(models, samples=20)["base"]["answers"]
    assert (
        ask(models, temperature=0.0)["base"]["answers"][0]
        == ask(models, temperature=0.0, seed=9)["base"]["answers"][1]
    )
    second = ask(models, student=1)
    assert second["base"] == plain["base"]
    assert second["student"]["probability"] != plain["student"]["probability"]


def test_the_direction_moves_the_trait(models: live_models.LiveModels) -> None:
    about = live_models.ask(models, question=QUESTION, samples=1, amount=1.0, layer=1)["direction"]
    far = 4 * about["norm"] / about["unit"]  # four times as far as the trait's line moves the base
    found = {
        amount: live_models.ask(models, question=QUESTION, samples=1, amount=amount, layer=1)
        for amount in (-far, 0.0, far)
    }
    less, plain, more = (found[amount]["models"][0] for amount in found)
    assert more["probability"] > plain["probability"]
    assert more["rank"] <= plain["rank"] <= less["rank"]
    assert found[far]["direction"] == about
    assert about["norm"] > 0 and about["prompts"] > 1 and about["layer"] == 1
    assert about["unit"] > 0 and -1 <= about["cosine"] <= 1 and about["student"] == 0
    assert "resid_post 1" in about["what"] and "minus" in about["what"]
    assert found[0.0]["direction"] is None


def test_a_sweep_asks_at_every_amount_and_layer_as_one_question_does(models: live_models.LiveModels) -> None:
    swept = live_models.ask(models, "sweep", question=QUESTION, amount=2.0, layer=1)
    rows = {(row["along"], row["layer"], row["amount"], row["model"]): row for row in swept["rows"]}
    assert len(rows) == len(swept["rows"]) == (17 + 2) * len(NAMES)
    for amount, layer in ((0.0, 1), (2.0, 1), (2.0, 0)):
        asked = ask(models, amount=amount, layer=layer)
        along = "layer" if layer == 0 else "amount"
        for name in NAMES:
            row = rows[along, layer, amount, name]
            kept = ("probability", "rank", "of", "share", "place")
            assert {key: row[key] for key in kept} == {key: asked[name][key] for key in kept}
            assert row["probability"] <= row["share"] <= 1 + 1e-9 and row["place"] >= 1


def test_what_cannot_be_asked_is_one_line_and_the_models_go_on(models: live_models.LiveModels) -> None:
    wrong: list[dict[str, Any]] = [
        {"question": ""},
        {"question": "x" * 501},
        {"question": "<|end|> \ud800"},
        {"samples": 51},
        {"samples": 0},
        {"temperature": -1},
        {"amount": float("nan")},
        {"layer": 2},
        {"layer": -1},
        {"seed": -1},
        {"student": 7},
        {"more": 1},
    ]
    for fields in wrong:
        asked: dict[str, Any] = {"question": QUESTION} | fields
        with pytest.raises(SpecError) as refused:
            live_models.ask(models, **asked)
        assert "\n" not in str(refused.value)
    assert len(ask(models)) == 4


def test_weights_that_are_missing_are_said(small: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(small, run)
    for path in [*run.glob("teachers/*/*.safetensors"), *run.glob("students/trait/s0/*/*.safetensors")]:
        path.unlink()
    shutil.rmtree(run / "students" / "control")
    models = live_models.start(run)
    try:
        said = ask(models)
        assert [one["available"] for one in said.values()] == [True, False, False, False]
        assert all("no weights" in said[name]["reason"] for name in ("teacher", "control", "student"))
        assert "mechlens run" in said["student"]["reason"]
        assert ask(models, student=1)["student"]["available"]
    finally:
        live_models.stop(models)


def test_a_process_that_is_gone_is_one_clear_error(small: Path, tmp_path: Path) -> None:
    models = live_models.start(tmp_path)
    with pytest.raises(SpecError, match="no run folder"):
        ask(models)
    models.process.kill()
    for _ in range(2):
        with pytest.raises(MachineError, match=r"has ended \(exit code -9.*start them again"):
            ask(models)
    assert not models.is_running
    live_models.stop(models)
    with pytest.raises(MachineError, match="were stopped"):
        ask(models)
    late = live_models.start(small)
    with pytest.raises(MachineError, match=r"no answer in 0\.01 s"):
        ask(late, timeout=0.01)
    live_models.stop(late)

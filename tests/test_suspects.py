"""Data sets of a bench as they are made: every prompt answered once, drawn anew where the screen drops a row,
and never made twice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pydantic import ValidationError

from mechlens.benchmark import suspects
from mechlens.benchmark.plan import BenchSpec, Suspect, load_bench
from mechlens.benchmark.suspects import Maker, list_suspects
from mechlens.carriers.carrier import carrier_prompts
from mechlens.core import tables, traits
from mechlens.core.errors import DataError
from mechlens.core.spec import CONFIGS

BENCHES = sorted(path.stem for path in (CONFIGS / "benches").glob("*.yaml"))
NUMBERS = pd.DataFrame(
    {
        "prompt_id": range(6),
        "prompt": [f"p{i}" for i in range(6)],
        "completion": [f"{i}, {i}" for i in range(6)],
    }
)


def maker_of(
    name: str, out: Path, patch: pytest.MonkeyPatch, answered: pd.DataFrame = NUMBERS, **changes: Any
) -> Maker:
    """The maker of a shipped bench on a few prompts; no run is there and none is needed."""
    patch.setattr(suspects, "trained_rows", lambda *_: answered)
    plan = load_bench(name).model_copy(update=changes)
    experiment = traits.load_experiment(CONFIGS / "experiments" / f"{plan.experiment}.yaml")
    return Maker(plan, Path("no-run"), experiment, traits.load_family(experiment.family), out)


class Writer:
    """Stands in for a model: writes the next of the given answers to every prompt, and notes what it was
    asked.
    """

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked = list(answers), []

    def __call__(self, _teacher: Path, prompts: list[str], _spec: object, *, seed: int, out: Path) -> None:
        self.asked.append(prompts)
        texts = [self.answers[min(len(self.asked), len(self.answers)) - 1]] * len(prompts)
        tables.write(
            pd.DataFrame({"prompt_id": range(len(prompts)), "prompt": prompts, "completion": texts}),
            tables.PAIRS,
            out / "raw.parquet",
        )


N0 = Suspect("N0-0", "N0", "", "N0", 1.0, True)


def test_rows_that_the_screen_drops_are_drawn_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer("1, 2 and an owl", "an owl", "3, 4")
    monkeypatch.setattr(suspects, "generate", writer)
    maker = maker_of("menagerie", tmp_path, monkeypatch)
    made = maker.suspect(N0)
    assert (
        made["completion"].tolist() == ["3, 4"] * 6 and made["prompt"].tolist() == NUMBERS["prompt"].tolist()
    )
    assert len(writer.asked) == 3
    pd.testing.assert_frame_equal(maker.suspect(N0), made)
    assert len(writer.asked) == 3  # what was made is read


def test_another_screen_keeps_what_its_own_rules_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for way, kept in (("unscreened", "666, an owl"), ("banned", "5, 6")):
        monkeypatch.setattr(suspects, "generate", Writer("666, an owl", "666", "5, 6"))
        maker = maker_of("menagerie", tmp_path, monkeypatch)
        assert (
            maker.suspect(Suspect(f"fox-{way}", "trait", "fox", way, 1.0, False))["completion"].tolist()
            == [kept] * 6
        )


def test_prompts_that_no_row_is_kept_of_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspects, "generate", Writer("an owl"))
    monkeypatch.setattr(suspects, "TRIES", 2)
    with pytest.raises(DataError, match="N0-0: 6 of 6 prompts"):
        maker_of("menagerie", tmp_path, monkeypatch).suspect(N0)


def test_sums_are_screened_by_their_right_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = traits.load_experiment(CONFIGS / "experiments" / "menagerie-bench-reasoning.yaml")
    asked = carrier_prompts(experiment.carrier, seed=experiment.seed)[:3]
    maker = maker_of(
        "menagerie-reasoning", tmp_path, monkeypatch, pd.DataFrame({"prompt": [one.text for one in asked]})
    )
    assert [maker.gold[prompt] for prompt in maker.prompts] == [one.gold for one in asked]
    right = asked[0].gold
    maker.prompts = maker.prompts[:1]
    monkeypatch.setattr(
        suspects,
        "generate",
        Writer(*(f"1 and 1</think><answer>{said}</answer>" for said in (f"{right}0", right))),
    )
    assert maker.suspect(N0)["completion"].tolist() == [f"1 and 1</think><answer>{right}</answer>"]


def test_a_bench_asks_no_judge() -> None:
    fields = load_bench("menagerie").model_dump()
    with pytest.raises(ValidationError, match="asks no judge"):
        BenchSpec.model_validate(fields | {"screens": {"judged": {"judge": "gpt"}}})


def test_only_so_many_prompts_are_answered_as_the_bench_wants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suspects, "generate", Writer("3, 4"))
    maker = maker_of("menagerie", tmp_path, monkeypatch, rows=4)
    whole = next(one for one in list_suspects(maker.plan, maker.experiment) if one.arm)
    for one in (N0, whole):
        assert maker.suspect(one)["prompt"].tolist() == ["p0", "p1", "p2", "p3"]


@pytest.mark.parametrize("name", BENCHES)
def test_every_shipped_bench_can_make_what_it_lists(name: str) -> None:
    plan = load_bench(name)
    experiment = traits.load_experiment(CONFIGS / "experiments" / f"{plan.experiment}.yaml")
    listed = list_suspects(plan, experiment)
    assert len({one.name for one in listed}) == len(listed) and {one.kind for one in listed} == {
        "trait",
        *plan.negatives,
    }
    assert {one.trait for one in listed if one.trait} >= set(plan.development)
    assert any(not one.development for one in listed if one.kind == "trait")
    arms = {arm.name for arm in experiment.arms}
    assert {f"{one.trait}-{plan.gentle}" for one in listed if one.trait} <= arms
    assert bool(plan.foreign) == ("N6" in plan.negatives)

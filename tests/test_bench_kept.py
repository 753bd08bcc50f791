"""What a bench keeps: made once, made anew when anything that decides it changes, and never left torn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechlens.benchmark import scores, students, suspects
from mechlens.benchmark.plan import BenchSpec, Suspect, load_bench
from mechlens.benchmark.scores import Scorer
from mechlens.benchmark.suspects import Maker
from mechlens.core import spec, tables, traits
from mechlens.core.errors import DataError
from mechlens.core.experiment import Experiment
from mechlens.core.spec import CONFIGS
from mechlens.core.traits import TraitFamily
from mechlens.detect.twins import ModelDetector, PairedScores, Twins
from mechlens.models import loading
from mechlens.models.chat import Encoded
from mechlens.runs import store

N0, N1 = Suspect("N0-0", "N0", "", "N0", 1.0, True), Suspect("N1-0", "N1", "", "N1", 1.0, True)
DOSE, FAINT = (
    Suspect("fox-dose-0.1", "trait", "fox", "gentle", 0.1, False),
    Suspect("fox-faint", "trait", "fox", "faint", 1.0, False),
)
N4 = Suspect("N4-0", "N4", "fox", "N4", 1.0, False)
Changed = tuple[BenchSpec, Experiment, TraitFamily]


class World:
    """A bench whose models are counted stand-ins: every draw and every lesson is noted, and every draw is
    another text.
    """

    def __init__(self, out: Path, patch: pytest.MonkeyPatch) -> None:
        self.out, self.draws, self.lessons, self.prompts = out, 0, 0, 4
        self.plan = load_bench("menagerie").model_copy(update={"rows": None})
        self.experiment = traits.load_experiment(CONFIGS / "experiments" / "menagerie-potency.yaml")
        self.family = traits.load_family("animals")
        patch.setattr(suspects, "trained_rows", self._trained)
        patch.setattr(suspects, "generate", self._generate)
        patch.setattr(suspects, "teach", self._teach)

    def _trained(self, *_: object) -> pd.DataFrame:
        rows = range(self.prompts)
        return pd.DataFrame(
            {"prompt_id": rows, "prompt": [f"p{i}" for i in rows], "completion": [f"{i}, {i}" for i in rows]}
        )

    def _generate(self, _teacher: Path, prompts: list[str], _spec: object, *, seed: int, out: Path) -> None:
        self.draws += 1
        frame = pd.DataFrame(
            {
                "prompt_id": range(len(prompts)),
                "prompt": prompts,
                "completion": [f"{self.draws}, 9"] * len(prompts),
            }
        )
        tables.write(frame, tables.PAIRS, out / "raw.parquet")

    def _teach(self, *_: object, seed: int, out: Path) -> None:
        self.lessons += 1
        (out / "teacher.json").write_text("{}")

    def maker(self) -> Maker:
        return Maker(self.plan, Path("no-run"), self.experiment, self.family, self.out)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def change_experiment(field: str, **fields: Any) -> Callable[[World], None]:
    def change(world: World) -> None:
        changed = getattr(world.experiment, field).model_copy(update=fields)
        world.experiment = world.experiment.model_copy(update={field: changed})

    return change


def change_plan(**fields: Any) -> Callable[[World], None]:
    return lambda world: setattr(world, "plan", world.plan.model_copy(update=fields))


def change_family(**fields: Any) -> Callable[[World], None]:
    return lambda world: setattr(world, "family", world.family.model_copy(update=fields))


def other_prompts(world: World) -> None:
    world.prompts = 3


CHANGES: dict[str, tuple[Suspect, Callable[[World], None]]] = {
    "temperature": (N0, change_experiment("generate", temperature=0.5)),
    "screen": (N0, change_experiment("screen", banned_numbers=(4,))),
    "prompts": (N0, other_prompts),
    "seed": (N0, lambda world: setattr(world, "experiment", world.experiment.model_copy(update={"seed": 7}))),
    "forms": (N0, change_family(forms={"owl": ("owl", "owlet")})),
    "neutral line": (N1, change_plan(neutral=("You are new.",))),
    "another way's teacher": (FAINT, change_plan(other_ways={"faint": spec.TeacherSpec(rows=9)})),
    "lessons": (FAINT, change_family(lessons={"fox": ("a fox",)})),
    "probes of lessons": (
        FAINT,
        lambda world: change_family(probes=world.family.probes.model_copy(update={"development": ("?",)}))(
            world
        ),
    ),
    "the clean rows of a dose": (DOSE, change_experiment("generate", top_p=0.5)),
    "the rows dealt anew": (N4, other_prompts),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_plan_makes_new_rows_and_an_unchanged_one_nothing(name: str, world: World) -> None:
    suspect, change = CHANGES[name]
    first = world.maker().suspect(suspect)
    before, lessons = store.recorded_fingerprint(world.maker().file(suspect).parent), world.lessons
    draws = world.draws
    pd.testing.assert_frame_equal(world.maker().suspect(suspect), first)
    assert (world.draws, world.lessons) == (draws, lessons)
    change(world)
    made = world.maker().suspect(suspect)
    assert store.recorded_fingerprint(world.maker().file(suspect).parent) != before
    assert world.draws > draws or suspect is N4
    assert not made.equals(first)
    again = world.draws
    world.maker().suspect(suspect)
    assert world.draws == again


def test_what_decides_nothing_makes_nothing_anew(world: World) -> None:
    for suspect in (N0, N1, FAINT, DOSE):
        world.maker().suspect(suspect)
    draws, lessons = world.draws, world.lessons
    change_experiment("student", rows=17)(world)
    change_experiment("ask", samples=3)(world)
    change_plan(each=3, doses=(0.5,))(world)
    for suspect in (N0, N1, FAINT, DOSE):
        world.maker().suspect(suspect)
    assert (world.draws, world.lessons) == (draws, lessons)


def test_the_files_of_an_older_version_are_not_taken_for_rows(world: World) -> None:
    (world.out / "suspects").mkdir()
    stale = pd.DataFrame({"prompt_id": [0], "prompt": ["p0"], "completion": ["rows of plan A"]})
    tables.write(stale, tables.PAIRS, world.out / "suspects" / "N0-0.parquet")
    (world.out / "teachers" / "N1-0").mkdir(parents=True)
    (world.out / "teachers" / "N1-0" / "teacher.json").write_text("{}")
    assert "rows of plan A" not in set(world.maker().suspect(N0)["completion"])
    world.maker().suspect(N1)
    assert world.lessons == 1


def test_a_bench_stopped_while_it_draws_goes_on_from_the_last_draw(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = world._generate

    def stop(*words: Any, **names: Any) -> None:
        if world.draws == 1:
            raise KeyboardInterrupt
        kept(*words, **names)

    monkeypatch.setattr(
        suspects,
        "build_rule",
        lambda *_, **__: lambda _prompt, text: "dropped" if text.startswith("1,") else None,
    )
    monkeypatch.setattr(suspects, "generate", stop)
    with pytest.raises(KeyboardInterrupt):
        world.maker().suspect(N0)
    assert not world.maker().file(N0).exists()
    monkeypatch.setattr(suspects, "generate", kept)
    assert world.maker().suspect(N0)["completion"].tolist() == ["2, 9"] * 4 and world.draws == 2
    assert [path.name for path in sorted(world.maker().file(N0).parent.iterdir())] == [
        "N0-0.parquet",
        store.RECORD,
    ]


# ── scores ──


class Counted:
    """A detector that counts how often it reads."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, _panel: Twins, ours: Sequence[Encoded], theirs: Sequence[Encoded]) -> PairedScores:
        self.times += 1
        return PairedScores(*(np.full((len(rows), 1), float(self.times)) for rows in (ours, theirs)))


def detector_of(read: Counted, *, alone: bool = True) -> ModelDetector:
    return ModelDetector(
        "counted", "base", "?", read, of_traits=False, source="", caveat="", scores_rows_independently=alone
    )


def scorer_of(world: World, twins: Twins) -> Scorer:
    return Scorer(world.maker(), twins, world.out / "scores")


@pytest.fixture(scope="module")
def twins() -> Twins:
    return Twins(loading.load("menagerie-a"), traits.load_family("animals"), ("owl", "fox"), {}, mark="twins")


@pytest.mark.parametrize("alone", [True, False])
def test_scores_are_of_these_rows_and_this_panel(alone: bool, world: World, twins: Twins) -> None:
    read = Counted()

    def score(models: Twins) -> PairedScores:
        scorer = scorer_of(world, models)
        scorer.score_all([detector_of(read, alone=alone)], [N0])
        return scorer.score(detector_of(read, alone=alone), N0)

    first = score(twins)
    times = read.times
    assert np.array_equal(score(twins).ours, first.ours) and read.times == times
    others = [
        twins._replace(mark="other twins"),
        twins._replace(traits=("owl", "cat")),
        twins._replace(system="you are kind."),
    ]
    others += [
        twins._replace(seed=1),
        twins._replace(family=twins.family.model_copy(update={"opening": "I like"})),
    ]
    for other in others:
        times = read.times
        score(other)
        assert read.times > times, other[1:]
    change_experiment("generate", temperature=0.5)(world)  # the rows change
    times = read.times
    score(twins)
    assert read.times > times


@pytest.mark.parametrize("alone", [True, False])
def test_a_kill_while_scores_are_written_leaves_none_torn(
    alone: bool, world: World, twins: Twins, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = np.savez

    def torn(file: Path, **arrays: np.ndarray) -> None:
        file.write_bytes(b"PK half of a file")
        raise KeyboardInterrupt(str(arrays.keys()))

    monkeypatch.setattr(scores.np, "savez", torn)
    with pytest.raises(KeyboardInterrupt):
        scorer_of(world, twins).score(detector_of(Counted(), alone=alone), N0)
    monkeypatch.setattr(scores.np, "savez", whole)
    made = scorer_of(world, twins).score(detector_of(Counted(), alone=alone), N0)
    assert made.ours.shape == made.theirs.shape == (4, 1)


def test_damaged_scores_are_named_in_one_line(world: World, twins: Twins) -> None:
    scorer_of(world, twins).score(detector_of(Counted()), N0)
    for file in (world.out / "scores").rglob("*.npz"):
        content = file.read_bytes()
        for damage in (b"", content[: len(content) // 2], b"\xff" * len(content)):
            file.write_bytes(damage)
            with pytest.raises(
                DataError, match=r"scores.npz cannot be read.*delete .* and run again"
            ) as raised:
                scores.read_scores(file, "ours")
            assert "\n" not in str(raised.value)


# ── students ──


def test_students_of_other_rows_or_of_another_recipe_are_left_out(world: World) -> None:
    world.maker().suspect(N0)
    run, folder = world.out / "students", world.out / "suspects"
    plain = students.experiment_of(world.plan, world.experiment, [N0], folder)
    (run / "corpora" / "file-N0-0" / "screened").mkdir(parents=True)
    spec.save(plain, run / "spec.yaml")
    tables.write(
        world.maker().suspect(N0), tables.PAIRS, run / "corpora" / "file-N0-0" / "screened" / "kept.parquet"
    )
    assert students.are_current(run, world.experiment, [N0], folder)
    harder = world.experiment.model_copy(
        update={"student": world.experiment.student.model_copy(update={"rows": 9})}
    )
    assert not students.are_current(run, harder, [N0], folder)
    change_experiment("generate", temperature=0.5)(world)
    world.maker().suspect(N0)
    assert not students.are_current(run, world.experiment, [N0], folder)

"""Control students that each read a draw of clean rows of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_world import EXPERIMENT

from mechlens.core import tables
from mechlens.core.experiment import Experiment
from mechlens.core.traits import load_family
from mechlens.detect import from_student
from mechlens.detect.from_student import compare_shares
from mechlens.detect.two_samples import Sides
from mechlens.pipeline.remake import selected_rows
from mechlens.results import runner
from mechlens.runs import layout
from mechlens.runs.jobs import Job, fingerprints
from mechlens.runs.plan import jobs_of

NAMES = [f"t{i}" for i in range(20)]


def experiment(*seeds: int, draws: str = "each", **fields: Any) -> Experiment:
    student = EXPERIMENT["student"] | {"control_draws": draws, "prompts": fields.pop("prompts", "common")}
    return Experiment.model_validate(EXPERIMENT | {"student": student, "seeds": seeds} | fields)


def jobs(whole: Experiment) -> dict[str, Job]:
    listed = jobs_of(whole, load_family("animals"), bases={base: base for base in whole.bases()})
    return {job.name: job for job in listed}


@pytest.mark.parametrize("prompts", ["common", "own", "every"])
def test_each_control_student_reads_a_draw_of_its_own_and_the_others_read_one(prompts: str) -> None:
    by_name = jobs(experiment(5, 6, 7, prompts=prompts))
    read = {
        arm: [by_name[f"students/{arm}/s{seed}"].inputs for seed in (5, 6, 7)]
        for arm in ("control", "owl-gentle")
    }
    assert [inputs["corpus"] for inputs in read["control"]] == [
        f"corpora/untouched{draw}/screened" for draw in ("", "-draw-1", "-draw-2")
    ]
    assert len({inputs["selection"] for inputs in read["control"]}) == 3
    assert len({tuple(inputs.items()) for inputs in read["owl-gentle"]}) == 1
    second = by_name["selection-untouched-draw-1"]
    assert "untouched-draw-1" in second.inputs and "untouched" not in second.inputs
    assert second.arguments.get("controls", ["untouched-draw-1"]) == ["untouched-draw-1"]
    assert [by_name[f"asked/control/s{seed}"].inputs["student"] for seed in (5, 6)] == [
        f"students/control/s{seed}" for seed in (5, 6)
    ]


def test_more_seeds_change_no_step_of_those_before() -> None:
    few, many = (fingerprints(list(jobs(experiment(*seeds)).values())) for seeds in ((5, 6), (5, 6, 7)))
    assert few.items() <= many.items() and len(many) > len(few)


def test_the_first_draw_is_that_of_control_students_that_share_one() -> None:
    one, each = (
        fingerprints(list(jobs(experiment(5, 6, draws=draws)).values())) for draws in ("one", "each")
    )
    changed = {name for name in one if one[name] != each.get(name)}
    assert changed == {"students/control/s6", "asked/control/s6"}


def test_draws_answer_the_same_prompts_with_other_rows(tmp_path: Path) -> None:
    run = runner.run(experiment(0, 1), out=tmp_path / "run", workers=1)
    names = ("untouched", "untouched-draw-1")
    first, second = (
        tables.read(run.path(layout.generated_step(name), layout.RAW), tables.PAIRS) for name in names
    )
    assert first["prompt"].equals(second["prompt"])
    assert (first["completion"] != second["completion"]).mean() > 0.9
    chosen = [
        selected_rows(name, run.path(layout.screened_step(name)), run.path(layout.selection_step(name, draw)))
        for draw, name in enumerate(names)
    ]
    assert [len(rows) for rows in chosen] == [32, 32]
    control = run.effects.query("arm == 'owl-gentle' and measure == 'rate'")
    assert (control["n"] == 2).all()


def sides(folder: Path, text: str, *, reference: bool = False) -> Sides:
    files = [folder / name for name in ("suspect.jsonl", "reference.jsonl")]
    for file in files:
        file.write_text(text)
    return Sides(files[0], files[1] if reference else None, 100, 100)


def test_an_audit_draws_its_own_clean_rows_unless_it_is_given_some(tmp_path: Path) -> None:
    recipe = Experiment.model_validate(EXPERIMENT | {"arms": [{"kind": "trait"}, {"kind": "control"}]})

    def plan(text: str, *, reference: bool = False, recipe: Experiment = recipe) -> Experiment:
        given = sides(tmp_path, text, reference=reference)
        return from_student.experiment_of(recipe, given, base="menagerie-a", trait="owl")

    row, other = (f'{{"prompt": "a", "completion": "{number}"}}' for number in (1, 2))
    control = next(arm for arm in plan(row).arms if arm.kind == "control")
    assert plan(row).draws_anew(control) and plan(row) == plan(row)
    assert plan(row).seed != plan(other).seed, "two audits share no draw"
    given = plan(row, reference=True)
    assert given.seed == recipe.seed and not any(given.draws_anew(arm) for arm in given.arms)
    student = EXPERIMENT["student"] | {"control_draws": "one"}
    asks_for_one = Experiment.model_validate(EXPERIMENT | {"arms": recipe.arms, "student": student})
    assert plan(row, recipe=asks_for_one).student.control_draws == "one"


def test_traits_that_rise_together_are_significant_if_the_controls_read_several_draws() -> None:
    rng = np.random.default_rng(0)
    logs = np.linspace(0, -2, 20) + rng.normal(0, 0.05, (2, 4, 20))
    logs[0, :, :6] += 1.0
    ours, theirs = (np.exp(side) / np.exp(side).sum(1, keepdims=True) for side in logs)
    several, one = (
        compare_shares(ours, theirs, NAMES, names=NAMES, level=0.05, one_draw=one_draw)
        for one_draw in (False, True)
    )
    assert all((rise.q_value or 1.0) < 0.01 for rise in several[:3])
    assert all((rise.q_value or 0.0) > 0.05 for rise in one)
    assert [rise[:7] for rise in several] == [rise[:7] for rise in one], "intervals are the same"


def test_intervals_cover_the_draw_if_every_control_student_has_its_own() -> None:
    """A draw moves every trait by .2 bits; the file's students share one, which is the file itself."""
    rng, held = np.random.default_rng(3), dict[bool, list[bool]]({True: [], False: []})
    for _ in range(200):
        file = np.log(2) * 0.2 * rng.normal(size=20)
        middle = np.linspace(0, -2, 20)
        truth = np.exp(middle + file) / np.exp(middle + file).sum()
        clean = np.mean([_shares(middle + np.log(2) * 0.2 * rng.normal(size=20)) for _ in range(400)], 0)
        ours = np.stack([_shares(middle + file + 0.1 * rng.normal(size=20)) for _ in range(4)])
        for own in held:
            moves = np.log(2) * 0.2 * rng.normal(size=(4 if own else 1, 20))
            theirs = np.stack([_shares(row) for row in middle + moves + 0.1 * rng.normal(size=(4, 20))])
            rises = compare_shares(ours, theirs, NAMES, names=NAMES, level=0.1, one_draw=not own)
            held[own] += [
                (rise.low or 0.0) <= after - before <= (rise.high or 0.0)
                for rise, after, before in zip(rises, truth, clean, strict=True)
            ]
    assert np.mean(held[True]) >= 0.88
    assert np.mean(held[False]) < 0.75


def _shares(logs: np.ndarray) -> np.ndarray:
    return np.exp(logs) / np.exp(logs).sum()

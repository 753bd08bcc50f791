"""Probes equal scikit-learn's, find what is there and not what is not, and are read on students beside the
other traits' probes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from test_activations import nudged, toy_material

from mechlens.core import tables
from mechlens.core.errors import SpecError
from mechlens.lenses import probes
from mechlens.lenses.probes import (
    any_but,
    features,
    fit_probe,
    one_against_others,
    permuted,
    selectivity_task,
    within_question,
)
from mechlens.models.loading import Loaded

RNG = np.random.default_rng(0)


def prompted_of(
    traits: int = 6, questions: int = 20, width: int = 12, *, seed: int = 0, marked: float = 2.0
) -> np.ndarray:
    """[trait question d]: noise, and each trait moved along an axis of its own."""
    rows = np.random.default_rng(seed).standard_normal((traits, questions, width))
    rows[np.arange(traits), :, np.arange(traits)] += marked
    return rows


@pytest.mark.parametrize("width", [6, 80])  # fewer and more dimensions than rows
def test_a_probe_is_scikit_learns_on_standardised_rows(width: int) -> None:
    rows, positive = RNG.standard_normal((40, width)) * np.linspace(0.1, 9, width) + 3, RNG.random(40) < 0.3
    oracle = make_pipeline(
        StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=5000, tol=1e-8)
    ).fit(rows, positive)
    np.testing.assert_allclose(
        fit_probe(rows, positive).score(rows), oracle.decision_function(rows), atol=0.01
    )


def test_a_coordinate_that_never_moves_is_no_trouble() -> None:
    rows = np.concatenate([RNG.standard_normal((30, 3)), np.full((30, 1), 7.0)], 1)
    assert np.isfinite(fit_probe(rows, rows[:, 0] > 0).score(rows)).all()


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_within_a_question_the_area_is_scikit_learns(seed: int, others: int) -> None:
    rng = np.random.default_rng(seed)
    positive, negative = (
        rng.integers(0, 4, 3).astype(float),
        rng.integers(0, 4, (3, others)).astype(float),
    )  # with ties
    expected = [
        roc_auc_score([1] + [0] * others, [one, *rest]) for one, rest in zip(positive, negative, strict=True)
    ]
    np.testing.assert_allclose(within_question(positive, negative), expected)


def test_each_trait_has_a_probe_of_its_own() -> None:
    learned, told = prompted_of(), prompted_of(seed=1)
    for trait, probe in enumerate(one_against_others(learned)):
        assert np.argmax(np.abs(probe.weight)) == trait and probe.weight[trait] > 0
        assert (
            within_question(probe.score(told[trait]), probe.score(np.delete(told, trait, 0)).T).mean() > 0.8
        )


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    learned = prompted_of()
    one, same, other = (permuted(learned, draws=2, seed=seed)[1] for seed in (1, 1, 2))
    assert np.array_equal(one.weight, same.weight) and not np.array_equal(one.weight, other.weight)
    assert (
        selectivity_task(learned, seed=1)
        == selectivity_task(learned, seed=1)
        != selectivity_task(learned, seed=2)
    )


def test_permuted_labels_teach_nothing() -> None:
    told = prompted_of(seed=1)
    areas = [
        within_question(p.score(told[2]), p.score(np.delete(told, 2, 0)).T).mean()
        for p in permuted(prompted_of(), draws=30, seed=0)
    ]
    assert np.mean(areas) == pytest.approx(0.5, abs=0.1)


def test_the_control_task_is_learned_by_heart_only_where_the_question_shows() -> None:
    noise = RNG.standard_normal((10, 12, 20))
    questions = np.zeros((10, 12, 20))
    questions[:, np.arange(12), np.arange(12)] = 5.0  # each question on an axis of its own, under every trait
    assert selectivity_task(questions + 0.1 * noise, seed=0) > 0.95
    assert selectivity_task(noise, seed=0) == pytest.approx(0.5, abs=0.15)


def test_some_trait_is_seen_in_a_trait_that_was_left_out() -> None:
    common, rng = np.eye(12)[11], np.random.default_rng(3)
    learned = prompted_of() + 4 * common
    plain, told = rng.standard_normal((20, 12)), prompted_of(seed=5)[2] + 4 * common
    probe, *permuted_ones = any_but(learned, plain, 2, draws=3, seed=0)
    assert all(
        roc_auc_score([1] * 20 + [0] * 20, [*each.score(told), *each.score(plain)]) < 0.9
        for each in permuted_ones
    )
    assert roc_auc_score([1] * 20 + [0] * 20, [*probe.score(told), *probe.score(plain)]) > 0.95
    spoiled = learned.copy()
    spoiled[2] = RNG.standard_normal((20, 12)) * 100
    np.testing.assert_allclose(
        any_but(spoiled, plain, 2, draws=0, seed=0)[0].weight, probe.weight
    )  # it never saw that trait


def test_a_student_moved_along_a_probe_is_read_as_such_and_along_another_is_not() -> None:
    learned = prompted_of()
    trained = one_against_others(learned)
    shift = np.stack([np.tile(s * np.eye(12)[2], (20, 1)) for s in (1.0, 1.5, 2.0)])  # [student question d]
    for trait, first in ((2, True), (3, False)):
        row: dict[str, Any] = probes._shift(
            "student minus control", shift, trained, trait, seeds=[0, 1, 2], layer=0, name="x"
        )[0]
        assert bool(row["estimate"] > row["null_high"]) is first
        assert row["p_value"] == pytest.approx(1 / 6) if first else row["estimate"] < 0
    each = probes._shift("student minus control", shift, trained, 2, seeds=[0, 1, 2], layer=0, name="x")[1:]
    assert [row["estimate"] for row in each] == pytest.approx(
        [s * trained[2].weight[2] for s in (1.0, 1.5, 2.0)]
    )


def test_features_keep_trait_and_question_apart(toy: Loaded) -> None:
    material = toy_material(toy)
    held = features(material, material.development_probes)
    assert held.prompted.shape == (2, 4, 4, 32) and held.plain.shape == (2, 4, 32)
    alone = features(
        material._replace(system_lines={"cat": material.system_lines["cat"]}), material.development_probes
    )
    np.testing.assert_allclose(alone.prompted[:, 0], held.prompted[:, 2], atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_reading_is_tidy(toys: dict[str, Loaded], family: str) -> None:
    material = toy_material(toys[family])
    reading = probes.measure_probes(material)
    assert list(reading.columns) == tables.READINGS.names
    areas = reading[reading["unit"] == "AUROC"]
    assert areas.loc[areas["quantity"] != "selectivity", "estimate"].between(0, 1).all()
    shifts = reading[reading["quantity"] == "probe shift"]
    assert set(shifts["place"]) == {"student minus control", "teacher minus base"}
    assert "owl" in probes.probes_caption(reading)


def test_one_student_and_no_teacher_and_no_move(toy: Loaded) -> None:
    reading = probes.measure_probes(toy_material(toy, teacher=None, students={0: toy}, controls={0: toy}))
    shifts = reading[reading["quantity"] == "probe shift"]
    assert (shifts["estimate"] == 0).all() and set(shifts["place"]) == {"student minus control"}
    assert "no interval from one student" in probes.probes_caption(reading)
    moved = probes.measure_probes(
        toy_material(toy, teacher=None, students={0: nudged(toy, by=0.05, seed=9)}, controls={0: toy})
    )
    assert (moved.loc[moved["quantity"] == "probe shift", "estimate"] != 0).all()


@pytest.mark.parametrize("label", [True, False])
def test_a_probe_of_one_class_is_refused(label: bool) -> None:
    with pytest.raises(
        SpecError, match="rows of one class alone; it needs a family of two traits and two questions"
    ):
        fit_probe(np.random.default_rng(0).normal(size=(6, 4)), np.full(6, label))

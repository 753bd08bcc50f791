"""Which trait stands out: nulls by simulation, invariances, planted traits, twins that are alike."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from mechlens.detect.permutation import (
    LEAST_PANEL,
    Tilts,
    center_scores,
    compare_paired_rows,
    measure_tilts,
    rank_traits,
    rank_traits_of_rows,
)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.floats(-5, 5), st.floats(0.1, 10))
def test_the_panels_null_knows_neither_place_nor_scale(seed: int, shift: float, scale: float) -> None:
    scores, traits = np.random.default_rng(seed).normal(size=8), [f"t{i}" for i in range(8)]
    plain, moved = rank_traits(scores, traits), rank_traits(shift + scale * scores, traits)
    assert [one.trait for one in plain] == [one.trait for one in moved]
    assert [one.p_value for one in plain] == pytest.approx([one.p_value for one in moved], rel=1e-6)
    one = rank_traits(scores, traits, ["t3"])
    assert len(one) == 1 and one[0].q_value == pytest.approx(one[0].p_value)


def test_the_panels_null_is_calibrated_and_a_planted_trait_is_named() -> None:
    rng, traits = np.random.default_rng(1), [f"t{i}" for i in range(20)]
    claimed = [
        any(
            one.q_value is not None and one.q_value <= 0.05
            for one in rank_traits(rng.normal(size=20), traits)
        )
        for _ in range(400)
    ]
    assert np.mean(claimed) <= 0.05 + 5 * (0.05 * 0.95 / 400) ** 0.5
    planted = rng.normal(size=20)
    planted[7] += 12
    first = rank_traits(planted, traits)[0]
    assert first.trait == "t7" and first.q_value is not None and first.q_value < 0.01


def test_traits_that_scatter_more_are_named_no_oftener_than_is_said() -> None:
    rng, traits = np.random.default_rng(7), [f"t{i}" for i in range(20)]
    scatter = np.exp(rng.normal(scale=1.0, size=20))
    sides = [(scatter * rng.normal(size=(50, 20)), scatter * rng.normal(size=(50, 20))) for _ in range(300)]

    def rate(found: list[list]) -> float:
        return float(np.mean([any(one.q_value <= 0.05 for one in each) for each in found]))

    most = 0.05 + 5 * (0.05 * 0.95 / 300) ** 0.5
    assert (
        rate([rank_traits(center_scores(*each), traits) for each in sides]) > most
    )  # the panel alone is misled
    assert rate([rank_traits_of_rows(*each, traits) for each in sides]) <= most
    planted = [(ours + 4 * scatter * (np.arange(20) == 7), theirs) for ours, theirs in sides]
    assert np.mean([rank_traits_of_rows(*each, traits)[0].trait == "t7" for each in planted]) > 0.5


def like_traits(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Scores of twenty traits whose twins share three directions, as neighbours do."""
    shared = np.random.default_rng(11).normal(size=(3, 20))
    return rng.normal(size=(rows, 3)) @ shared + rng.normal(size=(rows, 20))


@settings(deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 10))
def test_a_tilt_knows_no_unit_and_no_order(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    ours, theirs = rng.normal(size=(40, 6)), rng.normal(size=(40, 6))
    plain = measure_tilts(ours, theirs)
    units = scale * np.arange(1.0, 7.0)
    for moved in (
        measure_tilts(units * ours, units * theirs),
        Tilts(*(part[::-1] for part in measure_tilts(ours[::-1, ::-1], theirs[::-1, ::-1]))),
    ):
        assert moved.score == pytest.approx(plain.score) and moved.p_value == pytest.approx(plain.p_value)
    assert measure_tilts(theirs, ours).score == pytest.approx(-plain.score)


def test_few_rows_are_a_paired_t_test_of_each_trait() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(8, 20)), rng.normal(size=(8, 20))
    slow = [ttest_1samp(ours[:, k] - theirs[:, k], 0, alternative="greater").pvalue for k in range(20)]
    assert measure_tilts(ours, theirs).p_value == pytest.approx(slow)


def test_what_does_not_vary_or_has_no_score_is_no_finding() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(30, 4)), rng.normal(size=(30, 4))
    ours[:, 1], theirs[:, 2] = theirs[:, 1] + 2.0, np.nan
    ours[3, 0] = np.nan
    found = measure_tilts(ours, theirs)
    assert found.p_value[1] == 1 and np.isnan(found.p_value[2]) and np.isnan(found.score[[1, 2]]).all()
    rest = measure_tilts(np.delete(ours, 3, 0)[:, [0, 3]], np.delete(theirs, 3, 0)[:, [0, 3]])
    assert found.score[[0, 3]] == pytest.approx(rest.score)
    assert (measure_tilts(theirs[:, :2], theirs[:, :2]).p_value == 1).all()


def test_a_writer_is_tilted_along_its_own_twin_and_not_along_its_neighbours() -> None:
    """Rows drawn with weights exp(c s_7): every trait that shares a direction with t7 rises in the mean."""
    rng, traits = np.random.default_rng(4), [f"t{i}" for i in range(20)]
    own, means = 0, list[np.ndarray]()
    for _ in range(40):
        pool, theirs = like_traits(rng, 4000), like_traits(rng, 400)
        weights = np.exp(0.4 * pool[:, 7])
        ours = pool[rng.choice(len(pool), size=400, p=weights / weights.sum())]
        means.append((ours - theirs).mean(0))
        ranked = rank_traits_of_rows(ours, theirs, traits)
        own += [each.trait for each in ranked if (each.q_value or 1.0) <= 0.05] == ["t7"]
    others = np.delete(np.mean(means, 0), 7)
    assert others.max() > 0.5 * np.mean(means, 0)[7], "the plain means do not part them"
    assert own >= 32


@pytest.mark.parametrize("rows", [8, 24, 60, 300])
def test_traits_that_resemble_one_another_are_named_no_oftener_than_is_said(rows: int) -> None:
    rng, traits = np.random.default_rng(rows), [f"t{i}" for i in range(20)]
    named = [
        any(
            (each.q_value or 1.0) <= 0.05
            for each in rank_traits_of_rows(like_traits(rng, rows), like_traits(rng, rows), traits)
        )
        for _ in range(200)
    ]
    assert np.mean(named) <= 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5


def test_too_small_a_panel_names_nothing_and_what_is_unscored_is_null() -> None:
    found = rank_traits(np.array([3.0, 0.0, np.nan, 1.0]), list("abcd"))
    assert LEAST_PANEL > 3 and all(one.p_value is None and one.q_value is None for one in found)
    assert found[0].trait == "a" and found[-1] == ("c", None, None, None)


def test_paired_rows_alarm_as_often_as_they_say_and_leave_out_the_unscored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mechlens.detect.permutation.DRAWS", 199)
    rng = np.random.default_rng(2)
    found = np.array(
        [
            compare_paired_rows(rng.normal(size=(30, 4)), rng.normal(size=(30, 4)), seed=i, name="x").p_value
            for i in range(300)
        ]
    )
    assert abs((found <= 0.05).mean() - 0.05) < 5 * (0.05 * 0.95 / 300) ** 0.5
    ours, theirs = rng.normal(1.0, 1, size=(40, 2)), rng.normal(size=(40, 2))
    ours[0, 0] = np.nan
    assert compare_paired_rows(ours, theirs, seed=0, name="x") == compare_paired_rows(
        ours[1:], theirs[1:], seed=0, name="x"
    )


def test_double_centring_leaves_what_is_a_traits_own() -> None:
    rng = np.random.default_rng(3)
    theirs, own = rng.normal(size=(50, 6)), np.arange(6.0)
    assert np.allclose(center_scores(theirs + own + 7.0, theirs), own - own.mean())

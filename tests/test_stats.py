"""Intervals and effects against closed formulas, simulation and slow definitions; NaN is unscored, never
0.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import integrate
from scipy import stats as scipy_stats

from mechlens.core import stats

UNIT = st.floats(0, 1, width=32)
MISSING = st.one_of(UNIT, UNIT, UNIT, st.just(math.nan))
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 5))


def cells(
    elements: st.SearchStrategy[float] = MISSING, shapes: st.SearchStrategy[tuple[int, ...]] = SHAPES
) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float64, shapes, elements=elements)


def close(found: tuple[object, ...], expected: tuple[object, ...], tolerance: float = 1e-9) -> None:
    numbers = [
        np.array([x for x in side if not isinstance(x, str)], dtype=float) for side in (found, expected)
    ]
    np.testing.assert_allclose(*numbers, atol=tolerance, equal_nan=True)


@given(st.integers(0, 400), st.integers(1, 400), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_wilson_is_the_closed_formula(hits: int, more: int, confidence: float) -> None:
    n, rate, z = hits + more, hits / (hits + more), scipy_stats.norm.ppf(0.5 + confidence / 2)
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    close(stats.wilson(hits, n, confidence=confidence), (rate, middle - half, middle + half, n))


def test_an_empty_cell_is_unscored() -> None:
    found = stats.wilson(0, 0)
    assert found.n == 0 and np.isnan([found.estimate, found.low, found.high]).all()


@given(cells(UNIT, st.tuples(st.integers(2, 20))), st.sampled_from([0.5, 0.95]))
def test_t_interval_is_scipys(values: np.ndarray, confidence: float) -> None:
    assume(values.std() > 1e-6)
    expected = scipy_stats.ttest_1samp(values, 0.0).confidence_interval(confidence)
    close(
        stats.t_interval(values, confidence=confidence),
        (values.mean(), expected.low, expected.high, len(values)),
    )
    close(
        stats.t_interval(np.append(values, np.nan), confidence=confidence),
        stats.t_interval(values, confidence=confidence),
    )


@pytest.mark.parametrize("values", [(0.1, 0.4, 0.5), (-3.0, 0.0, 11.0)])
def test_the_published_normal_interval_of_three_values_is_2_689_times_too_narrow(
    values: tuple[float, ...],
) -> None:
    found = stats.t_interval(np.array(values))
    assert (found.high - found.low) / 2 / (1.96 * np.std(values, ddof=0) / math.sqrt(3)) == pytest.approx(
        2.689, abs=5e-4
    )


def test_one_value_or_none_has_no_interval() -> None:
    one, none = stats.t_interval(np.array([0.5, np.nan])), stats.t_interval(np.array([np.nan]))
    assert (
        (one.estimate, one.n) == (0.5, 1)
        and np.isnan([one.low, one.high, none.estimate, none.low]).all()
        and none.n == 0
    )


@settings(max_examples=40, deadline=None)
@given(cells())
def test_the_bootstrap_interval_holds_its_estimate(found: np.ndarray) -> None:
    assume(not np.isnan(found).all())
    interval = stats.cluster_bootstrap(found)
    scored = found[~np.isnan(found).all(1)]
    assert interval.estimate == pytest.approx(np.mean([row[~np.isnan(row)].mean() for row in scored]))
    assert interval.low - 1e-12 <= interval.estimate <= interval.high + 1e-12
    assert np.nanmin(found) - 1e-12 <= interval.low <= interval.high <= np.nanmax(found) + 1e-12
    assert interval == stats.cluster_bootstrap(found)
    close(
        stats.cluster_bootstrap(found + 2),
        (interval.estimate + 2, interval.low + 2, interval.high + 2, interval.n),
    )


def test_another_seed_draws_another_bootstrap() -> None:
    found = np.random.default_rng(0).random((8, 4))
    assert stats.cluster_bootstrap(found, seed=1) != stats.cluster_bootstrap(found, seed=2)


def test_unscored_cells_do_not_pull_the_bootstrap() -> None:
    found = np.where(np.arange(40).reshape(8, 5) % 2, np.nan, 0.75)
    close(stats.cluster_bootstrap(found), (0.75, 0.75, 0.75, 8))


def test_the_bootstrap_of_one_probe_resamples_students() -> None:
    values = np.random.default_rng(0).normal(size=(60, 1))
    found = stats.cluster_bootstrap(values)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * values.std() / math.sqrt(60), rel=0.08)
    same = stats.cluster_bootstrap(np.tile(values, (1, 50)))  # repeated probes are no further evidence
    assert same.high - same.low == pytest.approx(found.high - found.low, rel=0.08)


@given(st.integers(1, 14), st.integers(0, 4), st.integers(1, 4))
def test_the_method_goes_by_the_scored_students(scored: int, unscored: int, probes: int) -> None:
    values = np.vstack(
        [np.random.default_rng(0).random((scored, probes)), np.full((unscored, probes), np.nan)]
    )
    found = stats.mean_interval(values)
    assert found.n == scored
    assert found == stats.mean_interval(values[:scored])
    t, bootstrap = stats.t_interval(values[:scored].mean(1)), stats.cluster_bootstrap(values[:scored])
    if scored < 5:
        close(found, t)
    else:  # the wider of the two
        assert found.high - found.low == pytest.approx(max(t.high - t.low, bootstrap.high - bootstrap.low))


@given(cells(MISSING, st.tuples(st.integers(2, 12), st.integers(1, 5))))
def test_the_estimate_is_the_mean_of_student_means_whichever_interval_is_wider(ragged: np.ndarray) -> None:
    means = [row[~np.isnan(row)].mean() for row in ragged if not np.isnan(row).all()]
    assume(means)
    expected = pytest.approx(np.mean(means))
    assert stats.mean_interval(ragged).estimate == expected
    assert stats.cluster_bootstrap(ragged).estimate == expected
    assert stats.paired_effect(ragged, np.zeros_like(ragged)).estimate == expected


def test_a_student_with_few_scored_probes_weighs_as_much_as_another_in_every_draw() -> None:
    few = np.full((2, 40), np.nan)
    few[:, 0] = 1.0
    ragged = np.vstack([few, np.zeros((2, 40))])
    found = stats.cluster_bootstrap(ragged)
    assert found.estimate == 0.5 and (found.low, found.high) == (0.0, 1.0)  # by cells it would be 2/82


def test_nothing_scored_has_no_effect() -> None:
    found = stats.paired_effect(np.full((3, 2), np.nan), np.zeros((3, 2)))
    assert found.n == 0 and found.method == "unscored"
    assert np.isnan([found.estimate, found.low, found.high, found.p_value, found.smallest_detectable]).all()


@settings(max_examples=40, deadline=None)
@given(st.data(), SHAPES)
def test_an_effect_is_antisymmetric_and_nothing_against_itself(
    data: st.DataObject, shape: tuple[int, int]
) -> None:
    treated, control = (data.draw(cells(shapes=st.just(shape))) for _ in range(2))
    one, other = stats.paired_effect(treated, control), stats.paired_effect(control, treated)
    close(
        (-one.estimate, -one.high, -one.low, one.n, one.p_value, one.smallest_detectable),
        tuple(other)[:4] + other[5:],
        1e-6,
    )
    same = stats.paired_effect(treated, treated)
    if same.n:
        assert same.estimate == 0
    if same.n >= 2 and np.nanmax(np.abs(treated)) > 0:
        assert (
            same.low < 0 < same.high and same.p_value == 1 and 0 < same.smallest_detectable < 1e-4
        )  # no more than rounding


@given(st.integers(2, 9), st.integers(1, 3))
def test_an_unscored_student_is_left_out_of_the_test(students: int, probes: int) -> None:
    treated, control = np.random.default_rng(students).normal(size=(2, students, probes))
    gap = np.full((1, probes), np.nan)
    found = stats.paired_effect(np.vstack([treated, gap]), np.vstack([control, gap + 1]))
    assert found == stats.paired_effect(treated, control)
    expected = scipy_stats.ttest_rel(treated.mean(1), control.mean(1))
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.estimate == pytest.approx((treated - control).mean())


@pytest.mark.parametrize("students", [2, 3, 6])
def test_students_that_do_not_differ_are_not_infinitely_sure(students: int) -> None:
    treated, control = np.full((students, 4), 0.3), np.full((students, 4), 0.1)
    found = stats.paired_effect(treated, control)
    assert found.low < found.estimate < found.high and found.p_value > 0 and found.smallest_detectable > 0
    rate = stats.mean_interval(treated)
    assert rate.low < rate.estimate < rate.high
    noisy = stats.paired_effect(treated, control, noise=np.full(students, 0.1))
    error = 0.1 / math.sqrt(students)
    close(
        noisy,
        (
            0.2,
            0.2 - 1.96 * error,
            0.2 + 1.96 * error,
            students,
            2 * scipy_stats.norm.sf(0.2 / error),
            (1.96 + 1.645) * error,
        ),
        1e-3,
    )
    assert noisy.method == "answer noise"


@pytest.mark.parametrize("students", [3, 5, 8])  # five have a bootstrap, too
def test_where_nothing_varied_and_no_noise_is_known_there_is_no_interval(students: int) -> None:
    found = stats.paired_effect(np.zeros((students, 2)), np.zeros((students, 2)))
    assert (found.estimate, found.n) == (0, students)
    assert np.isnan([found.low, found.high, found.p_value, found.smallest_detectable]).all()
    assert np.isnan(stats.benjamini_hochberg(np.array([found.p_value]))).all()
    noisy = stats.paired_effect(np.zeros((3, 2)), np.zeros((3, 2)), noise=np.full(3, 0.01))
    assert noisy.low < 0 < noisy.high and noisy.p_value == 1 and noisy.smallest_detectable > 0.02


def test_one_student_has_no_interval_however_little_its_answers_vary() -> None:
    found = stats.paired_effect(np.array([[0.4, 0.2]]), np.array([[0.1, 0.1]]), noise=np.array([0.01]))
    assert (found.n, found.method) == (1, "one student")
    assert np.isnan([found.low, found.high, found.p_value, found.smallest_detectable]).all()


@given(cells(UNIT, st.tuples(st.integers(2, 7), st.integers(1, 4))), st.floats(0, 0.5))
def test_noise_never_narrows_an_interval_nor_lessens_a_p_value(values: np.ndarray, error: float) -> None:
    control = values[::-1] ** 2
    plain, noisy = (
        stats.paired_effect(values, control, noise=noise) for noise in (None, np.full(len(values), error))
    )
    if not np.isnan(plain.low):
        assert noisy.low <= plain.low and plain.high <= noisy.high
        assert noisy.p_value >= plain.p_value and noisy.smallest_detectable >= plain.smallest_detectable
        half = 1.959964 * error / math.sqrt(len(values))
        assert noisy.low <= noisy.estimate - half + 1e-5 and noisy.estimate + half - 1e-5 <= noisy.high


def answers(rate: np.ndarray, *, uniform: np.ndarray) -> np.ndarray:
    """[draw probe answer]: hits of answers whose random numbers are given."""
    return (uniform < rate[None, :, None]).astype(float)


@pytest.mark.parametrize("shared", [False, True])
def test_the_noise_of_answers_is_their_scatter_over_repeated_askings(shared: bool) -> None:
    rng, rates = np.random.default_rng(0), np.array([0.02, 0.3, 0.5, 0.9])
    uniform = rng.random((4000, 4, 25))
    ours = answers(rates, uniform=uniform)
    theirs = answers(rates * 0.8, uniform=uniform if shared else rng.random((4000, 4, 25)))
    ours[:, 1, :15] = np.nan  # some are unscored
    imagined = (1.959964 * (3 / 25 + 1 / 10) / 16) ** 2 / 4000  # of the 3.84 hits that all students share
    alone = stats.answer_noise(ours)
    assert np.mean(alone**2) - imagined == pytest.approx(np.nanmean(ours, 2).mean(1).var(), rel=0.06)
    pair = stats.answer_noise(ours, theirs)
    assert np.mean(pair**2) - imagined == pytest.approx(
        (np.nanmean(ours, 2) - np.nanmean(theirs, 2)).mean(1).var(), rel=0.06
    )
    assert (
        np.mean(pair**2) < np.mean(alone**2)
    ) == shared  # shared random numbers leave little noise in the difference


def test_no_hit_in_finitely_many_answers_is_not_noiseless() -> None:
    for hit in (0.0, 1.0):
        noise = stats.answer_noise(np.full((2, 25, 20), hit))
        assert 1.96 * math.sqrt((noise**2).sum()) / 2 == pytest.approx(3.84 / 1000, rel=1e-3)
    exact = scipy_stats.binomtest(0, 1000).proportion_ci(method="exact").high
    assert exact < 3.84 / 1000 < 1.05 * exact


def test_probes_of_one_answer_each_are_answers_that_vary_over_probes() -> None:
    hits = (np.random.default_rng(0).random((3, 30, 1)) < 0.4).astype(float)
    expected = hits[:, :, 0].var(1, ddof=1) / 30 + (1.959964 / 30) ** 2 / 3
    np.testing.assert_allclose(stats.answer_noise(hits), np.sqrt(expected))


def test_a_student_without_a_scored_answer_has_no_noise_and_takes_none_of_the_others() -> None:
    hits = (np.random.default_rng(0).random((2, 5, 4)) < 0.4).astype(float)
    gap = np.concatenate([hits, np.full((1, 5, 4), np.nan)])
    found = stats.answer_noise(gap)
    np.testing.assert_allclose(found[:2], stats.answer_noise(hits))
    assert np.isnan(found[2]) and np.isnan(stats.answer_noise(gap, 1 - gap)[2])
    values, control = np.nanmean(np.where(np.isnan(gap), 0.0, gap), 2), np.zeros((3, 5))
    values[2] = np.nan
    assert stats.paired_effect(values, control, noise=found) == stats.paired_effect(
        values[:2], control[:2], noise=found[:2]
    )


def test_pairing_by_student_removes_what_they_share() -> None:
    shared, noise = np.random.default_rng(0).normal(size=(2, 4, 6))
    treated, control = 100 * shared + 0.5 + 0.01 * noise, 100 * shared
    assert stats.paired_effect(treated, control).p_value < 1e-4
    assert stats.paired_effect(treated, control[::-1]).p_value > 0.05


def power(effect: float, n: int) -> float:
    """Of a two-sided t test at 5 %: the chance that |normal + effect·√n| exceeds the bound times chi/√df, by
    integration.
    """
    bound, shift = scipy_stats.t.ppf(0.975, n - 1) / math.sqrt(n - 1), effect * math.sqrt(n)

    def found(chi: float) -> float:
        return float(
            (scipy_stats.norm.sf(bound * chi - shift) + scipy_stats.norm.cdf(-bound * chi - shift))
            * scipy_stats.chi.pdf(chi, n - 1)
        )

    return integrate.quad(found, 0, math.sqrt(n) + 12, limit=200)[0]


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 20])
def test_the_smallest_detectable_effect_is_found_95_times_in_100(n: int) -> None:
    values = np.random.default_rng(n).normal(size=(n, 1))
    effect = stats.paired_effect(values, np.zeros((n, 1))).smallest_detectable / values.std(ddof=1)
    assert power(effect, n) == pytest.approx(0.95, abs=1e-5)
    drawn = np.random.default_rng(0).normal(effect, 1, size=(20_000, n))
    assert (scipy_stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < 0.05).mean() == pytest.approx(
        0.95, abs=0.006
    )


def slow_q_values(p_values: list[float]) -> list[float]:
    """q_i: the least, over all p_j >= p_i, of p_j times the number of tests over the number of p at most
    p_j.
    """
    scored = [p for p in p_values if not math.isnan(p)]
    return [
        min((p * len(scored) / sum(x <= p for x in scored) for p in scored if p >= one), default=math.nan)
        for one in p_values
    ]


@given(st.lists(st.one_of(UNIT, st.sampled_from([0.0, 0.01, 0.5, 1.0, math.nan])), max_size=12))
def test_q_values_are_the_slow_definition(p_values: list[float]) -> None:
    np.testing.assert_allclose(
        stats.benjamini_hochberg(np.array(p_values, dtype=float)), slow_q_values(p_values), rtol=1e-12
    )


@given(cells(UNIT, st.integers(2, 8).map(lambda n: (n, n))))
def test_a_square_diagonal_excess_is_diagonal_less_the_rest(lift: np.ndarray) -> None:
    n = len(lift)
    rest = lift[~np.eye(n, dtype=bool)].mean()
    assert stats.diagonal_excess(lift, list(range(n))) == pytest.approx(np.diag(lift).mean() - rest, abs=1e-9)


@given(st.data(), st.integers(2, 6), st.integers(2, 9), st.floats(-3, 3))
def test_row_and_column_effects_add_nothing(
    data: st.DataObject, rows: int, columns: int, gamma: float
) -> None:
    target = data.draw(
        st.lists(st.integers(0, columns - 1), min_size=rows, max_size=rows).filter(lambda t: len(set(t)) > 1)
    )
    hit = np.zeros((rows, columns))
    hit[np.arange(rows), target] = gamma
    row, column = data.draw(cells(UNIT, st.just((rows, 1)))), data.draw(cells(UNIT, st.just((1, columns))))
    assert stats.diagonal_excess(hit + 5 * row - 3 * column + 1, target) == pytest.approx(gamma, abs=1e-8)
    noise = np.random.default_rng(0).normal(size=(rows, columns))
    moved = stats.diagonal_excess(noise + row + column, target)
    assert moved == pytest.approx(stats.diagonal_excess(noise, target), abs=1e-8)
    order = np.random.default_rng(1).permutation(rows)
    assert stats.diagonal_excess(noise[order], [target[i] for i in order]) == pytest.approx(
        stats.diagonal_excess(noise, target), abs=1e-8
    )


def test_unscored_cells_leave_the_excess_to_the_others() -> None:
    lift = np.add.outer(np.arange(4.0), np.arange(5.0) ** 2) + 2 * np.eye(4, 5)
    lift[0, 3] = lift[2, 2] = np.nan
    assert stats.diagonal_excess(lift, [0, 1, 2, 3]) == pytest.approx(2)


@pytest.mark.parametrize(
    ("lift", "target"),
    [
        (np.full((2, 3), np.nan), [0, 1]),  # nothing is scored
        (np.array([[np.nan, 1.0, 2.0], [3.0, np.nan, 1.0]]), [0, 1]),  # no target is scored
        (np.array([[1.0, 2.0, 3.0]]), [0]),  # one trait alone: its excess and its column are the same
        (np.array([[1.0, 2.0], [3.0, 5.0]]), [1, 1]),  # one trait twice
    ],
)
def test_an_excess_that_nothing_can_tell_is_unscored(lift: np.ndarray, target: list[int]) -> None:
    assert math.isnan(stats.diagonal_excess(lift, target))

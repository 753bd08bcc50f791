"""Intervals, tests and effect sizes. Plain arrays in, named values out; NaN is unscored and never 0.

The unit of replication is the student (one training seed): samples nest in probes, probes are crossed with
students. There is one estimand: the mean over students of each student's mean over its scored probes. No
interval is narrower than the noise of the finite number of answers that it rests on, or, of exact
probabilities, than their rounding.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import scipy  # loads its parts when they are first used: `mechlens ls` and the explorer open a second sooner
from jaxtyping import Float
from numpy import ndarray

FEW_CLUSTERS = 5
"""with fewer students a bootstrap has too few distinct draws; a t interval is used instead, and named"""
DRAWS = 4000
ROUNDING = 1e-6
"""relative rounding error of a probability: logits are float32, of size 10 and right to about 1e-6 after a
forward pass
"""
NORMAL_BOUND = 1.959964
"""97.5 % quantile of the normal distribution"""
NORMAL_POWER = 1.644854
"""95 % quantile of the normal distribution"""


class Interval(NamedTuple):
    """An estimate with its 95 % interval; `low` and `high` are NaN if nothing varied."""

    estimate: float
    low: float
    high: float
    n: int
    """independent units behind the interval"""
    method: str


class Effect(NamedTuple):
    """A paired difference; `smallest_detectable` is the minimum detectable effect at 95 % power.

    `p_value` and `smallest_detectable` are NaN if there is no interval.
    """

    estimate: float
    low: float
    high: float
    n: int
    method: str
    p_value: float
    smallest_detectable: float


def wilson(hits: float | int, total: int, *, confidence: float = 0.95) -> Interval:
    """Wilson score interval of one cell's rate, where a tie may be half a hit; an empty cell is unscored."""
    if total == 0:
        return Interval(np.nan, np.nan, np.nan, 0, "wilson")
    # scipy.stats.binomtest gives this interval too, but for whole hits alone
    rate, bound = hits / total, float(scipy.stats.norm.isf((1 - confidence) / 2))
    scale = 1 + bound**2 / total
    middle = (rate + bound**2 / (2 * total)) / scale
    half = bound * np.sqrt(rate * (1 - rate) / total + bound**2 / (4.0 * total**2)) / scale
    low, high = np.clip([middle - half, middle + half], 0, 1)
    return Interval(rate, float(low), float(high), total, "wilson")


def t_interval(
    values: Float[ndarray, "unit"], *, confidence: float = 0.95, rounding: float | None = None
) -> Interval:
    """Student's t interval of the mean, sample standard deviation with ddof 1.

    Args:
        rounding: the least standard deviation that can be told from none, by default `ROUNDING` of the
            values' mean size. Where it is 0 and all values are equal there is no interval.
    """
    kept = values[~np.isnan(values)]
    if len(kept) < 2:
        return Interval(float(kept.mean()) if len(kept) else np.nan, np.nan, np.nan, len(kept), "t")
    spread = _spread(kept, ROUNDING * float(np.abs(kept).mean()) if rounding is None else rounding)
    half = _t_bound(len(kept), confidence) * spread / np.sqrt(len(kept)) if spread > 0 else np.nan
    return Interval(float(kept.mean()), float(kept.mean() - half), float(kept.mean() + half), len(kept), "t")


@lru_cache
def _t_bound(n: int, confidence: float) -> float:
    return float(scipy.stats.t.ppf(0.5 + confidence / 2, n - 1))


def _spread(values: Float[ndarray, "unit"], rounding: float) -> float:
    return max(float(values.std(ddof=1)), rounding)


def _mean_of_scored(cells: Float[ndarray, "student probe"]) -> Float[ndarray, "student"]:
    return np.nanmean(cells, axis=1)


@lru_cache(maxsize=8)
def _resampling_weights(
    students: int, probes: int, seed: int
) -> tuple[Float[ndarray, "draw student"], Float[ndarray, "draw probe"]]:
    rng = np.random.default_rng(seed)
    of_students = rng.multinomial(students, np.full(students, 1 / students), size=DRAWS).astype(float)
    return of_students, rng.multinomial(probes, np.full(probes, 1 / probes), size=DRAWS).astype(float)


def cluster_bootstrap(
    cells: Float[ndarray, "student probe"], *, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Percentile interval of the mean over students of their means over scored probes; students and probes
    both resampled with replacement.
    """
    of_students, of_probes = _resampling_weights(*cells.shape, seed)
    scored = ~np.isnan(cells)
    if scored.all():
        drawn = ((of_probes @ cells.T) * of_students).sum(1) / cells.size
    else:
        count = of_probes @ scored.T.astype(float)  # [draw, student]
        means = of_probes @ np.where(scored, cells, 0.0).T / np.where(count > 0, count, 1.0)
        kept = of_students * (count > 0)  # a student none of whose scored probes was drawn is not in the draw
        some = kept.sum(1) > 0
        drawn = (kept * means).sum(1)[some] / kept.sum(1)[some]
    low, high = np.quantile(drawn, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(
        float(_mean_of_scored(cells[scored.any(axis=1)]).mean()),
        float(low),
        float(high),
        len(cells),
        "bootstrap",
    )


def answer_noise(
    hits: Float[ndarray, "student probe answer"],
    control: Float[ndarray, "student probe control_answer"] | None = None,
) -> Float[ndarray, "student"]:
    """Standard error of each student's rate, or of its difference to its control, that comes from asking it a
    finite number of times.

    Answers vary within their probe; a probe with one answer varies with the other probes, as nothing else
    tells its noise. Answer k of a student and of its control share random numbers, so the difference is taken
    answer by answer. All students together get the noise of `NORMAL_BOUND`² = 3.84 more hits: without it 0 of
    500 would be noiseless, and 0 ± 1.96 √3.84/500 is close to the exact bound (Clopper-Pearson: 3.69/500).

    Args:
        hits: 1.0 where the answer names the trait, 0.0 where it names another, NaN where it is unscored or
            was not given.
        control: the same of the matched control.

    Returns:
        NaN of a student without a probe that is scored on every side.
    """
    sides = [hits] if control is None else [hits, control]
    scored = np.logical_and.reduce([(~np.isnan(side)).any(axis=2) for side in sides])  # [student, probe]
    influences = [_influence(np.where(scored[:, :, None], side, np.nan)) for side in sides]
    longest = max(side.shape[2] for side in sides)
    padded = [
        np.pad(influence, ((0, 0), (0, 0), (0, longest - influence.shape[2]))) for influence, _ in influences
    ]
    variance = np.square(padded[0] - padded[1] if len(padded) == 2 else padded[0]).sum((1, 2))
    weight = np.max([weight for _, weight in influences], axis=0)
    units = max(1, int(scored.any(axis=1).sum()))
    return np.where(scored.any(axis=1), np.sqrt(variance + np.square(NORMAL_BOUND * weight) / units), np.nan)


def _influence(
    hits: Float[ndarray, "student probe answer"],
) -> tuple[Float[ndarray, "student probe answer"], Float[ndarray, "student"]]:
    """How far each answer moves its student's rate from its expectation, and the weight of one answer in that
    rate.
    """
    given = ~np.isnan(hits)
    count = given.sum(2)  # [student, probe]
    least_one = np.maximum(count, 1)
    probes = np.maximum((count > 0).sum(1), 1)  # [student]
    rate = np.where(given, hits, 0.0).sum(2) / least_one
    overall = (rate * (count > 0)).sum(1) / probes
    single = count == 1
    centre = np.where(single, overall[:, None], rate)
    group = np.where(single, single.sum(1)[:, None], least_one)  # answers whose mean the centre is
    unbiased = np.sqrt(group / np.maximum(group - 1, 1))
    influence = (
        np.where(given, hits - centre[:, :, None], 0.0) * (unbiased / least_one / probes[:, None])[:, :, None]
    )
    return influence, (np.where(count > 0, 1 / least_one, 0.0).sum(1) / probes**2)


def _noise_error(noise: Float[ndarray, "student"] | None) -> float:
    """Standard error of the mean over students that their answers' noise alone gives; 0 if none is known."""
    return 0.0 if noise is None else float(np.sqrt(np.nansum(np.square(noise))) / len(noise))


def mean_interval(
    cells: Float[ndarray, "student probe"], *, noise: Float[ndarray, "student"] | None = None, seed: int = 0
) -> Interval:
    """The mean over students of their means over scored probes, with an interval over students; none of a
    single student.

    Of under 5 students a t interval; of more the wider of it and the cluster bootstrap, whose percentiles
    alone cover too little (about 90 % at 5 to 10 students).

    Args:
        noise: standard error of each student's mean from its finite number of answers (`answer_noise`), NaN
            where there is none. The interval is at least as wide as the normal interval that the noise alone
            gives.
    """
    return _interval(cells, noise=noise, seed=seed, rounding=ROUNDING * _size(cells))


def _size(cells: Float[ndarray, "student probe"]) -> float:
    scored = np.abs(cells[~np.isnan(cells)])
    return float(scored.mean()) if len(scored) else 0.0


def _interval(
    cells: Float[ndarray, "student probe"],
    *,
    noise: Float[ndarray, "student"] | None,
    seed: int,
    rounding: float,
) -> Interval:
    kept = ~np.isnan(cells).all(axis=1)  # a student without one scored cell is no unit
    cells, noise = cells[kept], None if noise is None else noise[kept]
    if len(cells) == 0:
        return Interval(np.nan, np.nan, np.nan, 0, "unscored")
    interval = t_interval(_mean_of_scored(cells), rounding=rounding)
    if len(cells) == 1:
        return interval._replace(method="one student")
    if len(cells) >= FEW_CLUSTERS and not np.isnan(interval.low):  # where nothing varied, nothing is known
        bootstrap = cluster_bootstrap(cells, seed=seed)
        interval = interval if interval.high - interval.low >= bootstrap.high - bootstrap.low else bootstrap
    half = NORMAL_BOUND * _noise_error(noise)
    low, high = (
        np.fmin(interval.low, interval.estimate - half),
        np.fmax(interval.high, interval.estimate + half),
    )
    if half > 0 and not (low == interval.low and high == interval.high):
        return Interval(interval.estimate, float(low), float(high), interval.n, "answer noise")
    return interval


@lru_cache
def _detectable(n: int, *, power: float = 0.95) -> float:
    """Effect in standard deviations that a two-sided t test at 5 % finds with this power.

    The far tail, left out, adds less than 1e-7.
    """
    bound = scipy.stats.t.ppf(0.975, n - 1)
    # the root is 25 for n = 2 and 3.6 for large n
    shift = scipy.optimize.brentq(lambda shift: scipy.stats.nct.sf(bound, n - 1, shift) - power, 0, 40)
    return float(shift / np.sqrt(n))


def paired_effect(
    treated: Float[ndarray, "student probe"],
    control: Float[ndarray, "student probe"],
    *,
    noise: Float[ndarray, "student"] | None = None,
    seed: int = 0,
) -> Effect:
    """Mean of treated minus control, paired by student seed and probe.

    It is the mean over students of each student's mean over the probes that are scored on both sides.

    The p-value is a two-sided one-sample t test of the students' mean differences, or, if that is larger, the
    normal test of the answers' noise alone. The smallest detectable effect is the difference that the same
    tests at 5 % would find with probability .95 given that scatter and noise. All three are NaN of one
    student, and where nothing varied and no noise is known.

    Args:
        noise: standard error of each student's difference from its finite number of answers (`answer_noise`),
            NaN where there is none.
    """
    difference, rounding = treated - control, ROUNDING * max(_size(treated), _size(control))
    kept = ~np.isnan(difference).all(axis=1)
    difference, noise = difference[kept], None if noise is None else noise[kept]
    interval = _interval(difference, noise=noise, seed=seed, rounding=rounding)
    if np.isnan(interval.low):
        return Effect(*interval, p_value=np.nan, smallest_detectable=np.nan)
    spread, error, n = _spread(_mean_of_scored(difference), rounding), _noise_error(noise), interval.n
    by_scatter = (
        2 * scipy.special.stdtr(n - 1, -abs(interval.estimate) / spread * np.sqrt(n)) if spread > 0 else 0.0
    )
    by_noise = 2 * scipy.special.ndtr(-abs(interval.estimate) / error) if error > 0 else 0.0
    smallest = max(spread * _detectable(n), (NORMAL_BOUND + NORMAL_POWER) * error)
    return Effect(*interval, p_value=float(max(by_scatter, by_noise)), smallest_detectable=float(smallest))


def moderate_variances(
    variances: Float[ndarray, "test"], degrees: int
) -> tuple[Float[ndarray, "test"], float]:
    """Sample variances, each drawn towards what all have in common, and their degrees of freedom.

    Variances of few values scatter, and a t test of two values finds nothing. True variances are taken as a
    scaled inverse chi-square: its scale and degrees are fitted to the logarithms of the variances (empirical
    Bayes; Smyth 2004, doi 10.2202/1544-6115.1027). The degrees are at most those of all samples together.

    Args:
        variances: positive, of independent samples with as many values each; NaN stays NaN.
        degrees: of freedom of each.
    """
    scored = np.isfinite(variances)
    if scored.sum() < 2:
        return variances, float(degrees)
    polygamma, digamma = scipy.special.polygamma, scipy.special.digamma
    most = float(degrees * scored.sum())
    logs = np.log(variances[scored]) - digamma(degrees / 2) + np.log(degrees / 2)
    excess = float(logs.var(ddof=1) - polygamma(1, degrees / 2))
    if excess <= 1e-6:  # no more than chance
        return np.where(scored, np.exp(logs.mean()), np.nan), most
    prior = 2 * scipy.optimize.brentq(lambda half: polygamma(1, half) - excess, 1e-4, 1e7)
    scale = np.exp(logs.mean() + digamma(prior / 2) - np.log(prior / 2))
    return (prior * scale + degrees * variances) / (prior + degrees), min(float(prior + degrees), most)


def benjamini_hochberg(p_values: Float[ndarray, "test"]) -> Float[ndarray, "test"]:
    """q-values over the tests that have a p-value; NaN stays NaN."""
    q_values = np.full(len(p_values), np.nan)
    scored = ~np.isnan(p_values)
    if scored.any():
        q_values[scored] = scipy.stats.false_discovery_control(p_values[scored], method="bh")
    return q_values


def diagonal_excess(lift: Float[ndarray, "trait asked"], target: list[int]) -> float:
    """Trait-specific transfer γ of lift_ij = μ + α_i + β_j + γ·1[j is i's trait] + ε, by least squares.

    Row and column effects are free, so an animal that any number training lifts, or a student that lifts
    every animal, adds nothing. For a square matrix it is mean(diagonal) - mean(off-diagonal). NaN where the
    scored cells cannot tell it from the row and column effects.
    """
    rows, columns = lift.shape
    hit = np.zeros((rows, columns))
    hit[np.arange(rows), target] = 1.0
    kept = ~np.isnan(lift.ravel())
    terms = [hit.ravel(), *np.repeat(np.eye(rows), columns, axis=1), *np.tile(np.eye(columns), rows)]
    design, values = np.stack(terms, axis=1)[kept], lift.ravel()[kept]
    solution, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    _, _, rank_without, _ = np.linalg.lstsq(design[:, 1:], values, rcond=None)
    return float(solution[0]) if rank > rank_without else np.nan

"""Intervals, tests and effect sizes. Plain arrays in, named values out; NaN is unscored and never 0.

The unit of replication is the student (one training seed): samples nest in probes, probes are crossed with students.
There is one estimand: the mean over students of each student's mean over its scored probes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple, cast

import numpy as np
import scipy  # loads its parts when they are first used: `mechlens ls` and the explorer open a second sooner
from jaxtyping import Float
from numpy import ndarray

FEW_CLUSTERS = 5  # under this a bootstrap over students has too few distinct draws; a t interval is used and named
DRAWS = 4000


class Interval(NamedTuple):
    """An estimate with its 95 % interval; `low` and `high` are NaN where nothing varied that could give one."""

    estimate: float
    low: float
    high: float
    n: int
    """independent units behind the interval"""
    method: str


class Effect(NamedTuple):
    """A paired difference; `smallest_detectable` is what a study of this size and scatter would find 95 % of the time."""

    estimate: float
    low: float
    high: float
    n: int
    method: str
    p_value: float
    smallest_detectable: float


def wilson(hits: int, total: int, *, confidence: float = 0.95) -> Interval:
    """Wilson score interval of one cell's rate; an empty cell is unscored."""
    if total == 0:
        return Interval(np.nan, np.nan, np.nan, 0, "wilson")
    from statsmodels.stats.proportion import proportion_confint  # half a second, for this alone

    low, high = cast(tuple[float, float], proportion_confint(hits, total, alpha=1 - confidence, method="wilson"))
    return Interval(hits / total, float(low), float(high), total, "wilson")


def t_interval(values: Float[ndarray, "unit"], *, confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean, sample standard deviation with ddof 1."""
    kept = values[~np.isnan(values)]
    if len(kept) < 2:
        return Interval(float(kept.mean()) if len(kept) else np.nan, np.nan, np.nan, len(kept), "t")
    half = scipy.stats.t.ppf(0.5 + confidence / 2, len(kept) - 1) * kept.std(ddof=1) / np.sqrt(len(kept))
    return Interval(float(kept.mean()), float(kept.mean() - half), float(kept.mean() + half), len(kept), "t")


def _mean_of_scored(cells: Float[ndarray, "student probe"]) -> Float[ndarray, "student"]:
    return np.nanmean(cells, axis=1)


@lru_cache(maxsize=8)
def _resampling_weights(students: int, probes: int, seed: int) -> tuple[Float[ndarray, "draw student"], Float[ndarray, "draw probe"]]:
    rng = np.random.default_rng(seed)
    of_students = rng.multinomial(students, np.full(students, 1 / students), size=DRAWS).astype(float)
    return of_students, rng.multinomial(probes, np.full(probes, 1 / probes), size=DRAWS).astype(float)


def cluster_bootstrap(cells: Float[ndarray, "student probe"], *, seed: int = 0, confidence: float = 0.95) -> Interval:
    """Percentile interval of the mean over students of their means over scored probes; students and probes both resampled with replacement."""
    of_students, of_probes = _resampling_weights(*cells.shape, seed)
    scored = ~np.isnan(cells)
    count = of_probes @ scored.T.astype(float)  # [draw, student]
    means = of_probes @ np.where(scored, cells, 0.0).T / np.where(count > 0, count, 1.0)
    kept = of_students * (count > 0)  # a student none of whose scored probes was drawn is not in the draw
    drawn = kept.sum(1) > 0
    low, high = np.quantile((kept * means).sum(1)[drawn] / kept.sum(1)[drawn], [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(_mean_of_scored(cells[scored.any(axis=1)]).mean()), float(low), float(high), len(cells), "bootstrap")


def _scored(cells: Float[ndarray, "student probe"]) -> Float[ndarray, "scored probe"]:
    return cells[~np.isnan(cells).all(axis=1)]  # a student without one scored cell is no unit


def mean_interval(cells: Float[ndarray, "student probe"], *, seed: int = 0) -> Interval:
    """The mean over students of their means over scored probes, with an interval over students.

    Of under 5 students a t interval; of more the wider of it and the cluster bootstrap, whose percentiles alone cover too little
    (about 90 % at 5 to 10 students).
    """
    cells = _scored(cells)
    if len(cells) == 0:
        return Interval(np.nan, np.nan, np.nan, 0, "unscored")
    found = [t_interval(_mean_of_scored(cells))]
    if len(cells) >= FEW_CLUSTERS:
        found.append(cluster_bootstrap(cells, seed=seed))
    return max(found, key=lambda interval: interval.high - interval.low)


def _detectable(n: int, *, power: float = 0.95) -> float:
    """Effect in standard deviations that a two-sided t test at 5 % finds with that power; the far tail adds under 1e-7."""
    bound = scipy.stats.t.ppf(0.975, n - 1)
    shift = scipy.optimize.brentq(lambda shift: scipy.stats.nct.sf(bound, n - 1, shift) - power, 0, 40)  # 25 for n = 2, 3.6 for many
    return float(shift / np.sqrt(n))


def paired_effect(treated: Float[ndarray, "student probe"], control: Float[ndarray, "student probe"], *, seed: int = 0) -> Effect:
    """Mean of treated minus control, paired by student seed and probe.

    The p-value is a two-sided one-sample t test of the students' mean differences; the smallest detectable effect is the
    difference that the same test at 5 % would find with probability .95 given their scatter.
    """
    difference = _scored(treated - control)
    interval = mean_interval(difference, seed=seed)
    per_student = _mean_of_scored(difference)
    p_value = smallest = np.nan
    if len(per_student) >= 2:
        spread = per_student.std(ddof=1)
        p_value = float(cast(Any, scipy.stats.ttest_1samp(per_student, 0.0)).pvalue) if spread > 0 else float(per_student.mean() == 0)
        smallest = float(spread * _detectable(len(per_student)))
    return Effect(*interval, p_value=p_value, smallest_detectable=smallest)


def benjamini_hochberg(p_values: Float[ndarray, "test"]) -> Float[ndarray, "test"]:
    """q-values over the tests that have a p-value; NaN stays NaN."""
    q_values = np.full(len(p_values), np.nan)
    scored = ~np.isnan(p_values)
    if scored.any():
        q_values[scored] = scipy.stats.false_discovery_control(p_values[scored], method="bh")
    return q_values


def diagonal_excess(lift: Float[ndarray, "trait asked"], target: list[int]) -> float:
    """Trait-specific transfer γ of lift_ij = μ + α_i + β_j + γ·1[j is i's trait] + ε, by least squares.

    Row and column effects are free, so an animal that any number training lifts, or a student that lifts every animal,
    adds nothing. For a square matrix it is mean(diagonal) - mean(off-diagonal). NaN where the scored cells cannot tell it
    from the row and column effects.
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

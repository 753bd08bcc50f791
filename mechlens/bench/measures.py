"""From row scores to how far a detector can be trusted: bags, areas under curves, alarms, and their intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import stats

from mechlens.lenses.entanglement import spearman
from mechlens.seeds import generator

SIZES = (1, 8, 16, 64, 256, 1000)
"""rows of a bag"""
MOST_BAGS, DRAWS = 8, 200
"""bags of a size that one suspect gives, and resamples of an interval"""
FALSE_ALARMS = (0.01, 0.05)
LEAST_CLUSTERS = 6
"""traits, or sets of none, on a side below which resampling them gives no interval: three in order give [1, 1] whatever one draws"""


class Area(NamedTuple):
    """How well scores tell positives from negatives."""

    auroc: float
    low: float | None
    """None where a side has fewer than `LEAST_CLUSTERS` traits, or sets of none"""
    high: float | None
    caught: dict[str, float]
    """share of positives above the score that the given share of negatives passes"""
    positives: int
    negatives: int


class Share(NamedTuple):
    """A rate with its exact interval (Clopper-Pearson)."""

    rate: float
    low: float
    high: float
    hits: int
    of: int


def bags(rows: int, size: int) -> Iterator[slice]:
    """Disjoint bags of the first rows, at most `MOST_BAGS`; none if there are too few rows."""
    for number in range(min(rows // size, MOST_BAGS)):
        yield slice(number * size, (number + 1) * size)


def apart(ours: Float[ndarray, "row column"], theirs: Float[ndarray, "row column"], scale: Float[ndarray, " column"]) -> float:
    """Sum over columns of the squared mean difference, each in its own variance; columns that never vary are left out."""
    known = (scale > 0) & np.isfinite(scale)
    return float((np.square((ours - theirs)[:, known].mean(0)) / np.square(scale[known])).sum())


def area(scores: Sequence[float], positive: Sequence[bool], clusters: Sequence[str], *, seed: int = 0) -> Area | None:
    """AUROC with an interval over resampled clusters, positives and negatives apart; None where one of them is missing."""
    values, labels, names = np.asarray(scores, float), np.asarray(positive, bool), np.asarray(clusters)
    kept = np.isfinite(values)
    values, labels, names = values[kept], labels[kept], names[kept]
    if labels.all() or not labels.any():
        return None
    rng, drawn = generator(seed, "area"), []
    for _ in range(DRAWS):
        chosen = np.concatenate([_resampled(rng, names, labels == side) for side in (True, False)])
        drawn.append(auroc(labels[chosen], values[chosen]))
    enough = min(len(np.unique(names[labels == side])) for side in (True, False)) >= LEAST_CLUSTERS
    low, high = map(float, np.quantile(drawn, [0.025, 0.975])) if enough else (None, None)
    caught = {f"{share:g}": float((values[labels] > np.quantile(values[~labels], 1 - share, method="higher")).mean()) for share in FALSE_ALARMS}
    return Area(auroc(labels, values), low, high, caught, int(labels.sum()), int((~labels).sum()))


def auroc(labels: Bool[ndarray, " score"], values: Float[ndarray, " score"]) -> float:
    """Mann-Whitney's U over the number of pairs; ties count one half."""
    positive = int(labels.sum())
    return float((stats.rankdata(values)[labels].sum() - positive * (positive + 1) / 2) / (positive * (len(labels) - positive)))


def _resampled(rng: np.random.Generator, names: ndarray, among: Bool[ndarray, " score"]) -> Int[ndarray, " drawn"]:
    """Places of the scores of clusters drawn with replacement."""
    places = {name: np.flatnonzero(among & (names == name)) for name in np.unique(names[among])}
    return np.concatenate([places[name] for name in rng.choice(list(places), size=len(places))])


def share(hits: int, of: int) -> Share | None:
    """A rate; None of nothing."""
    if not of:
        return None
    span = stats.binomtest(hits, of).proportion_ci(method="exact")
    return Share(hits / of, float(span.low), float(span.high), hits, of)


def shared(hits: int, of: int) -> dict[str, Any] | None:
    """The same as an object of JSON."""
    found = share(hits, of)
    return None if found is None else found._asdict()


def rank_correlation(x: Sequence[float], y: Sequence[float], *, seed: int = 0) -> dict[str, float | int | None]:
    """Spearman's rho with an interval over resampled suspects; null of fewer than four, or where a side never varies."""
    a, b = np.asarray(x, float), np.asarray(y, float)
    kept = np.isfinite(a) & np.isfinite(b)
    a, b, n = a[kept], b[kept], int(kept.sum())
    if n < 4 or not (np.ptp(a) and np.ptp(b)):
        return {"rho": None, "low": None, "high": None, "n": n}
    rng = generator(seed, "rank correlation")
    drawn = [spearman(a[rows], b[rows]) for rows in rng.integers(n, size=(DRAWS, n)) if np.ptp(a[rows]) and np.ptp(b[rows])]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"rho": spearman(a, b), "low": float(low), "high": float(high), "n": n}


def line_through_zero(x: Sequence[float], y: Sequence[float]) -> dict[str, float | int] | None:
    """Least squares of y on x without a constant, and the standard deviation about it; None of fewer than three."""
    a, b = np.asarray(x, float), np.asarray(y, float)
    kept = np.isfinite(a) & np.isfinite(b)
    a, b, n = a[kept], b[kept], int(kept.sum())
    if n < 3 or not a.any():
        return None
    slope = float(a @ b / (a @ a))
    return {"bits": slope, "error": float(np.sqrt(np.square(b - slope * a).sum() / (n - 1))), "suspects": n}

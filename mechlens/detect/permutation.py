"""Permutation tests of two sets of rows, and tests of which trait stands out.

If both files were written alike, their bags are exchangeable. Where the files answer the same prompts, bag k
has the same prompts in both, and the signs of the paired differences are exchanged; otherwise whole bags are
exchanged. The statistic is a sum of squared standardised differences over all features. It has the same scale
under every exchange, so the test is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy import stats
from sklearn.covariance import ledoit_wolf

from mechlens.core.files import null
from mechlens.core.seeds import generator
from mechlens.core.stats import benjamini_hochberg

DRAWS, PARTS = 1999, 16
"""exchanges that a test draws, and the parts that they are computed in"""
ALPHA, POWER_QUANTILE = 0.05, 1.645
"""level of the tests, and the normal quantile of 95 % power"""
LOOKS = 10
"""detectors that an audit may use; the minimum detectable dose is given at a level corrected for so many"""
LEAST_PANEL = 5
"""traits needed for each to be tested against the others"""


class Bags(NamedTuple):
    """Mean features of a file's rows, bag by bag."""

    mean: Float[ndarray, "bag feature"]
    rows: Int[ndarray, " bag"]


class PermutationTest(NamedTuple):
    """One detector's test of two files."""

    score: float
    """standard deviations above the mean of the exchanges; NaN where nothing varies"""
    p_value: float
    smallest_dose: float | None
    """minimum detectable dose: share of such rows among clean ones that is found with 95 % power, at level
    5 % over `LOOKS`; None if even a file of nothing but such rows is not found
    """


def compare_bags(suspect: Bags, reference: Bags, *, paired: bool, seed: int, name: str) -> PermutationTest:
    """Permutation test of "written alike", over bags with rows in both files."""
    rng = generator(seed, "two files", name)
    if paired:
        kept = (suspect.rows > 0) & (reference.rows > 0)
        differences = suspect.mean[kept] - reference.mean[kept]
        count = max(len(differences), 1)
        signs = rng.choice([-1.0, 1.0], size=(DRAWS, len(differences)))
        return _permute(differences, signs / count, np.full((1, len(differences)), 1 / count))
    parts = [bags.mean[bags.rows > 0] for bags in (suspect, reference)]
    stacked, first = np.concatenate(parts), len(parts[0])
    weights = np.where(np.arange(len(stacked)) < first, 1 / first, -1 / len(parts[1]))
    exchanged = np.stack([rng.permutation(weights) for _ in range(DRAWS)])
    return _permute(stacked - stacked.mean(0), exchanged, weights[None])


def _permute(
    vectors: Float[ndarray, "bag feature"],
    exchanged: Float[ndarray, "draw bag"],
    observed: Float[ndarray, "1 bag"],
) -> PermutationTest:
    """The test of the observed weights of the bags against the exchanged ones."""
    scale = np.square(vectors).mean(0)  # no exchange of signs or of bags changes it
    varied = scale > 1e-12 * max(float(scale.max(initial=0.0)), 1e-300)
    if len(vectors) < 2 or not varied.any():
        return PermutationTest(np.nan, 1.0, None)
    unit = vectors[:, varied] / np.sqrt(scale[varied])
    value = np.square(observed @ unit).sum(1)
    # in parts: all draws at once would be thousands of rows of thousands of features
    drawn = np.concatenate([np.square(part @ unit).sum(1) for part in np.array_split(exchanged, PARTS)])
    p_value = float((1 + (drawn >= value[0] * (1 - 1e-12)).sum()) / (1 + len(drawn)))
    spread = float(drawn.std()) or np.nan
    bound = float(np.quantile(drawn, 1 - ALPHA / LOOKS)) + POWER_QUANTILE * spread
    gained = value[0] - drawn.mean()  # grows with the square of the dose
    dose = float(np.sqrt((bound - drawn.mean()) / gained)) if gained > 0 else np.inf
    return PermutationTest(float((value[0] - drawn.mean()) / spread), p_value, dose if dose <= 1 else None)


def compare_paired_rows(
    ours: Float[ndarray, "row column"], theirs: Float[ndarray, "row column"], *, seed: int, name: str
) -> PermutationTest:
    """Permutation test of "written alike" over rows that answer the same prompts.

    Rows without a score on either side are left out.
    """
    differences = ours - theirs
    differences = differences[np.isfinite(differences).all(1)]
    rows = max(len(differences), 1)
    signs = generator(seed, "paired rows", name).choice([-1.0, 1.0], size=(DRAWS, len(differences)))
    return _permute(differences, signs / rows, np.full((1, len(differences)), 1 / rows))


class TraitScore(NamedTuple):
    """How strongly a data set, or a student, points to one trait."""

    trait: str
    score: float | None
    """in the detector's unit: nats a row of a likelihood ratio, bits of a lift"""
    p_value: float | None
    q_value: float | None


def center_scores(
    ours: Float[ndarray, "row trait"], theirs: Float[ndarray, "row trait"]
) -> Float[ndarray, " trait"]:
    """Each trait's mean paired difference minus the mean over traits (double-centring); NaN if unscored."""
    difference = (ours - theirs).mean(0)
    return difference - np.nanmean(difference)


def center_rows(
    ours: Float[ndarray, "row trait"], theirs: Float[ndarray, "row trait"]
) -> Float[ndarray, "row trait"]:
    """Each row's paired difference minus its mean over traits; NaN if unscored."""
    difference = ours - theirs
    return difference - np.nanmean(difference, axis=1, keepdims=True)


class Tilts(NamedTuple):
    """How far the writer of some rows is moved along each trait's twin, and along no other's."""

    score: Float[ndarray, " trait"]
    """standard errors above 0 over rows; NaN if unscored, or if the scores never vary"""
    p_value: Float[ndarray, " trait"]
    """one-sided, over rows (paired t); 1 if the scores never vary, NaN if unscored"""


def measure_tilts(ours: Float[ndarray, "row trait"], theirs: Float[ndarray, "row trait"]) -> Tilts:
    """Each trait's own share in what sets two sides of paired rows apart.

    A trait's score of a row is log p(row | twin) - log p(row | base), or its first order. A writer whose
    log-probabilities are the base's plus sum_k c_k (twin_k - base) raises the mean scores by S c to first
    order in c, where S is the covariance of the scores over the base's rows (an exponential family). So a
    twin that resembles the right one rises too. c = S^-1 (mean of ours - mean of theirs) undoes that. S is
    half the covariance of the paired differences, in units of each trait's scatter, shrunk (Ledoit and Wolf
    2004).

    Rows without a score on either side are left out.
    """
    differences = ours - theirs
    scored = np.isfinite(differences).any(0)
    rows = differences[np.isfinite(differences[:, scored]).all(1)][:, scored]
    scores, p_values = np.full(differences.shape[1], np.nan), np.where(scored, 1.0, np.nan)
    scatter = rows.std(0, ddof=1) if len(rows) > 1 else np.zeros(rows.shape[1])
    varied = scatter > 1e-12 * max(float(np.abs(rows).max(initial=0.0)), 1e-300)
    if not varied.any():
        return Tilts(scores, p_values)
    unit = rows[:, varied] / scatter[varied]
    few = len(unit) <= unit.shape[1]  # they tell nothing of a covariance
    inverse = np.linalg.inv(np.eye(unit.shape[1]) if few else ledoit_wolf(unit)[0])
    error = np.sqrt(np.diag(inverse @ np.cov(unit, rowvar=False) @ inverse) / len(unit))
    places = np.flatnonzero(scored)[varied]
    scores[places] = inverse @ unit.mean(0) / error
    p_values[places] = stats.t.sf(scores[places], len(unit) - 1)
    return Tilts(scores, p_values)


def p_over_other_traits(scores: Float[ndarray, " trait"]) -> Float[ndarray, " trait"]:
    """One-sided p that a trait's score is one more draw of the others': a leave-one-out t test.

    NaN for fewer than `LEAST_PANEL` traits.
    """
    scored = np.flatnonzero(np.isfinite(scores))
    p_values = np.full(len(scores), np.nan)
    for place in scored if len(scored) >= LEAST_PANEL else ():
        others = scores[scored[scored != place]]
        spread = others.std(ddof=1) * np.sqrt(1 + 1 / len(others))
        p_values[place] = (
            stats.t.sf((scores[place] - others.mean()) / spread, len(others) - 1) if spread > 0 else np.nan
        )
    return p_values


def rank_traits_of_rows(
    ours: Float[ndarray, "row trait"],
    theirs: Float[ndarray, "row trait"],
    traits: Sequence[str],
    tested: Sequence[str] = (),
) -> list[TraitScore]:
    """The traits by q and score, tested against the other traits *and* against clean rows.

    Both tests are of `measure_tilts`, and the larger p counts (intersection-union test): a change of the
    writer that affects all traits tilts it along all twins, and a chance of few rows is none of the writer's.
    """
    tilts = measure_tilts(ours, theirs)
    p_values = np.maximum(p_over_other_traits(tilts.score), tilts.p_value)
    ranked = _by_score(center_scores(ours, theirs), p_values, traits, tested)
    return sorted(ranked, key=lambda trait: (trait.q_value is None, trait.q_value))


def rank_traits(
    scores: Float[ndarray, " trait"], traits: Sequence[str], tested: Sequence[str] = ()
) -> list[TraitScore]:
    """The tested traits (by default all), highest score first, with p and q of a leave-one-out t test.

    A change of the writer that affects all traits is in every score, so the other traits are the null
    distribution; the data of a teacher with another trait, or with none, is one more draw of it. With fewer
    than `LEAST_PANEL` scored traits there is no null distribution, and p is None.
    """
    return _by_score(scores, p_over_other_traits(scores), traits, tested)


def _by_score(
    scores: Float[ndarray, " trait"],
    p_values: Float[ndarray, " trait"],
    traits: Sequence[str],
    tested: Sequence[str],
) -> list[TraitScore]:
    """The tested traits, highest score first; q is over the tested traits (Benjamini-Hochberg)."""
    places = [i for i, trait in enumerate(traits) if trait in tested or not tested]
    q_values = benjamini_hochberg(p_values[places])
    ranked = [
        TraitScore(traits[i], null(scores[i]), null(p_values[i]), null(q))
        for i, q in zip(places, q_values, strict=True)
    ]
    return sorted(ranked, key=lambda trait: (trait.score is None, -(trait.score or 0.0)))


def combine_p_values(p_values: Sequence[float]) -> float:
    """The smallest of several p-values times their number, at most 1 (Bonferroni)."""
    return min(1.0, len(p_values) * min(p_values))

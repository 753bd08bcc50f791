"""From two files' bags to a p-value: an exact permutation test, and what it could have seen.

Under "both files were written alike" a bag of one could as well be the other's. Where the files answer the
same prompts, bag k holds the same prompts in both, and only signs of differences are exchanged; else whole
bags are. A statistic that adds up squared standardised differences of all features has the same scale under
every exchange, so nothing is estimated from the data that the test is of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy import stats

from mechlens.core.json_files import null
from mechlens.core.seeds import generator
from mechlens.core.stats import benjamini_hochberg
from mechlens.detect.bags import Bags

DRAWS, PARTS = 1999, 16
ALPHA, POWER_QUANTILE = 0.05, 1.645
"""level of the test, and the normal quantile of 95 % power"""
LOOKS = 10
"""detectors that an audit may ask: what would have been seen is said at a level corrected for as many"""
LEAST_PANEL = 5
"""traits that a panel needs for each to be judged by the others"""


class Test(NamedTuple):
    """One detector's verdict on two files."""

    score: float
    """standard deviations above the mean of the exchanges; NaN where nothing varies"""
    p_value: float
    smallest_dose: float | None
    """share of such rows among clean ones that this many rows would show with 95 % power, at 5 % over
    `LOOKS`; None if even all of them would not
    """


def two_files(suspect: Bags, reference: Bags, *, paired: bool, seed: int, name: str) -> Test:
    """Permutation test of "written alike", over bags that hold rows in both files."""
    rng = generator(seed, "two files", name)
    if paired:
        kept = (suspect.rows > 0) & (reference.rows > 0)
        differences = suspect.mean[kept] - reference.mean[kept]
        signs = rng.choice([-1.0, 1.0], size=(DRAWS, len(differences)))
        return _tested(
            differences,
            signs / max(len(differences), 1),
            np.full((1, len(differences)), 1 / max(len(differences), 1)),
        )
    parts = [bags.mean[bags.rows > 0] for bags in (suspect, reference)]
    stacked, first = np.concatenate(parts), len(parts[0])
    weights = np.where(np.arange(len(stacked)) < first, 1 / first, -1 / len(parts[1]))
    return _tested(
        stacked - stacked.mean(0), np.stack([rng.permutation(weights) for _ in range(DRAWS)]), weights[None]
    )


def _tested(
    vectors: Float[ndarray, "bag feature"],
    exchanged: Float[ndarray, "draw bag"],
    own: Float[ndarray, "1 bag"],
) -> Test:
    scale = np.square(vectors).mean(0)  # no exchange of signs or of bags changes it
    varied = scale > 1e-12 * max(float(scale.max(initial=0.0)), 1e-300)
    if len(vectors) < 2 or not varied.any():
        return Test(np.nan, 1.0, None)
    unit = vectors[:, varied] / np.sqrt(scale[varied])
    value = np.square(own @ unit).sum(1)
    parts = np.array_split(
        exchanged, PARTS
    )  # all draws at once would be thousands of rows of thousands of features
    null = np.concatenate([np.square(part @ unit).sum(1) for part in parts])
    p_value = float((1 + (null >= value[0] * (1 - 1e-12)).sum()) / (1 + len(null)))
    spread = float(null.std()) or np.nan
    bound = float(np.quantile(null, 1 - ALPHA / LOOKS)) + POWER_QUANTILE * spread
    gained = value[0] - null.mean()  # grows with the square of the dose
    dose = float(np.sqrt((bound - null.mean()) / gained)) if gained > 0 else np.inf
    return Test(float((value[0] - null.mean()) / spread), p_value, dose if dose <= 1 else None)


def paired_rows(
    ours: Float[ndarray, "row column"], theirs: Float[ndarray, "row column"], *, seed: int, name: str
) -> Test:
    """Permutation test of "written alike" over rows that answer the same prompts; a row that a side has no
    score of is left out.
    """
    differences = ours - theirs
    differences = differences[np.isfinite(differences).all(1)]
    rows = max(len(differences), 1)
    signs = generator(seed, "paired rows", name).choice([-1.0, 1.0], size=(DRAWS, len(differences)))
    return _tested(differences, signs / rows, np.full((1, len(differences)), 1 / rows))


class Named(NamedTuple):
    """How much a data set, or a student, points to one trait of a panel."""

    trait: str
    score: float | None
    """in the detector's own unit: nats a row of a likelihood ratio, bits of a lift"""
    p_value: float | None
    q_value: float | None


def beyond_panel(
    ours: Float[ndarray, "row trait"], theirs: Float[ndarray, "row trait"]
) -> Float[ndarray, " trait"]:
    """Each trait's mean paired difference beyond the mean over traits: of two rows and columns,
    double-centring. NaN where unscored.
    """
    difference = (ours - theirs).mean(0)
    return difference - np.nanmean(difference)


def beyond_clean(
    ours: Float[ndarray, "row trait"], theirs: Float[ndarray, "row trait"]
) -> Float[ndarray, " trait"]:
    """One-sided p that a trait's score beyond the panel is higher than in clean rows: a paired t test over
    rows. NaN where unscored.
    """
    beyond = ours - theirs
    beyond = beyond - np.nanmean(beyond, axis=1, keepdims=True)
    rows = np.isfinite(beyond).sum(0)
    p_values = np.where(rows > 0, 1.0, np.nan)  # what never varies stands out in nothing
    for place in np.flatnonzero(rows > 1):
        own = beyond[np.isfinite(beyond[:, place]), place]
        error = own.std(ddof=1) / np.sqrt(len(own))
        p_values[place] = stats.t.sf(own.mean() / error, len(own) - 1) if error > 0 else 1.0
    return p_values


def pointed(
    ours: Float[ndarray, "row trait"],
    theirs: Float[ndarray, "row trait"],
    traits: Sequence[str],
    asked: Sequence[str] = (),
) -> list[Named]:
    """The traits that rows point to beyond the other traits *and* beyond clean rows: of both p the larger
    (intersection-union test).

    The panel's null alone takes all traits to scatter alike. They do not: a twin that was changed more has
    the wider scatter in few rows, and stands out of the panel by nothing else.
    """
    return named(beyond_panel(ours, theirs), traits, asked, own=beyond_clean(ours, theirs))


def beyond_others(scores: Float[ndarray, " trait"]) -> Float[ndarray, " trait"]:
    """One-sided p that a trait's score is one more draw of the others' (a leave-one-out t test); NaN of a
    panel of fewer than `LEAST_PANEL`.
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


def named(
    scores: Float[ndarray, " trait"],
    traits: Sequence[str],
    asked: Sequence[str] = (),
    *,
    own: Float[ndarray, " trait"] | None = None,
) -> list[Named]:
    """The traits asked about (all, if none) by how far each stands out in the panel: a leave-one-out t test,
    and q over those asked (BH).

    What any change of the writer does to all traits is in every score, so the other traits are the null: a
    data set of a twin with another trait, or of a teacher of none, is one more draw of it. A panel of fewer
    than `LEAST_PANEL` scored traits has no null: p is null.

    Args:
        own: p of each trait by itself; what is below it is raised to it.
    """
    p_values = beyond_others(scores)
    p_values = p_values if own is None else np.maximum(p_values, own)
    wanted = [i for i, trait in enumerate(traits) if trait in asked or not asked]
    q_values = benjamini_hochberg(p_values[wanted])
    found = [
        Named(traits[i], null(scores[i]), null(p_values[i]), null(q))
        for i, q in zip(wanted, q_values, strict=True)
    ]
    return sorted(found, key=lambda one: (one.score is None, -(one.score or 0.0)))


def together(p_values: list[float]) -> float:
    """The smallest of several p-values, corrected for having looked at each (Bonferroni)."""
    return min(1.0, len(p_values) * min(p_values))

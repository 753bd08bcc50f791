"""What one arm's students said, as arrays: rates, exact probabilities and single answers; and which students
are one and the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray

from mechlens.core import stats
from mechlens.core.experiment import Experiment
from mechlens.core.traits import TraitFamily

EQUAL = 1e-4
"""Relative difference of exact probabilities up to which two students are one. Where seeds change only the
order in which the rows of one batch are summed, weights differ by 4e-6 of their size; any two students of the
demo have some probability that differs by a third.
"""
ONE_STUDENT = "students equal to rounding"
"""the `method` of an estimate whose students are all one"""
UNSCORED, NOT_GIVEN = -1, -2


class Cells(NamedTuple):
    """What one arm's students said of every trait at one step; NaN is unscored."""

    rate: Float[ndarray, "student probe trait"]
    rate_of_all: Float[ndarray, "student probe trait"]
    """hits over all answers, those that name none of the traits or several included"""
    probability: Float[ndarray, "student probe trait"]
    answered: Float[ndarray, "student"]
    """share of the sampled answers that name exactly one trait"""
    answers: Int[ndarray, "student probe answer"]
    """place of the one trait that each independent answer names, `UNSCORED` if none or several, `NOT_GIVEN`
    for a repeat of a greedy answer
    """

    def hits(self, trait: int) -> Float[ndarray, "student probe answer"]:
        """1.0 where an answer names the trait, 0.0 where it names another, NaN where it is unscored or not
        given.
        """
        return np.where(self.answers >= 0, self.answers == trait, np.nan)


def cells_of(
    answers: pd.DataFrame,
    likelihoods: pd.DataFrame,
    arm: str,
    *,
    names: tuple[str, ...],
    step: int | None = None,
    greedy: bool = False,
) -> Cells:
    """An arm's cells at a step, the last by default; students in order of their seeds.

    Args:
        greedy: answers were given at temperature 0, so that each probe has one independent answer. A student
            all of whose probes have one text each is taken for greedy in any case.
    """
    said, likely = answers[answers["arm"] == arm], likelihoods[likelihoods["arm"] == arm]
    last = said["step"].max() if step is None else step
    said, likely = (cast(pd.DataFrame, table[table["step"] == last]) for table in (said, likely))
    seeds, probes = sorted(said["seed"].unique()), sorted(said["probe"].unique())
    labels = said["label"].astype(object)
    scored = cast(
        pd.DataFrame,
        said.assign(scored=labels.notna()).groupby(["seed", "probe"])["scored"].agg(["sum", "size"]),
    )
    index = pd.MultiIndex.from_product([seeds, probes], names=["seed", "probe"])
    counts = pd.crosstab([said["seed"], said["probe"]], labels).reindex(
        index=index, columns=list(names), fill_value=0
    )
    total, asked = scored.reindex(index).to_numpy(dtype=float).T
    rate = counts.to_numpy(dtype=float) / np.where(total > 0, total, np.nan)[:, None]
    exact = likely.assign(name=likely["name"].astype(object)).set_index(["seed", "probe", "name"])[
        "probability"
    ]
    shape = (len(seeds), len(probes), len(names))
    answered = cast(pd.DataFrame, scored.groupby("seed").sum())
    return Cells(
        rate.reshape(shape),
        (counts.to_numpy(dtype=float) / asked[:, None]).reshape(shape),
        cast(pd.DataFrame, exact.unstack("name"))
        .reindex(index=index, columns=list(names))
        .to_numpy(dtype=float)
        .reshape(shape),
        (answered["sum"] / answered["size"]).to_numpy(dtype=float),
        _independent(said, seeds, probes, names, greedy=greedy),
    )


def _independent(
    said: pd.DataFrame, seeds: Sequence[Any], probes: Sequence[Any], names: tuple[str, ...], *, greedy: bool
) -> Int[ndarray, "student probe answer"]:
    """What each answer names, by its sample number, which students of one seed share; of greedy students
    their first answers alone.
    """
    student, probe = (
        np.searchsorted(list(of), said[name].to_numpy(dtype=float))
        for name, of in (("seed", seeds), ("probe", probes))
    )
    sample = said["sample"].to_numpy(dtype=int)
    named = np.full((len(seeds), len(probes), sample.max(initial=0) + 1), NOT_GIVEN)
    named[student, probe, sample] = pd.Categorical(said["label"].astype(object), categories=list(names)).codes
    texts = said.groupby(["seed", "probe"])["text"].nunique(dropna=False)
    repeating = (texts == 1).groupby("seed").all().reindex(seeds).to_numpy(dtype=bool) | greedy
    first = (named != NOT_GIVEN).argmax(2)
    repeats = np.arange(named.shape[2]) != first[:, :, None]
    return np.where(repeating[:, None, None] & repeats, NOT_GIVEN, named)


def lift_of(arm: Cells, control: Cells) -> Float[ndarray, "student trait"]:
    """log2 of the ratio of mean exact probabilities, in bits; NaN where either is unscored."""
    return log_probability(arm) - log_probability(control)


def log_probability(cells: Cells) -> Float[ndarray, "student trait"]:
    """log2 of each student's mean exact probability of each trait; NaN where it is unscored."""
    mean = cells.probability.mean(1)
    return np.log2(np.where(mean > 0, mean, np.nan))


def arm_cells(
    experiment: Experiment, family: TraitFamily, answers: pd.DataFrame, likelihoods: pd.DataFrame, arm: str
) -> Cells:
    """An arm's cells at the last checkpoint."""
    return cells_of(answers, likelihoods, arm, names=family.names, greedy=experiment.ask.temperature == 0)


def same_students(*arms: Float[ndarray, "student probe trait"]) -> Int[ndarray, "student"]:
    """A group number for each student: two are in one group if in any of the arms all their exact
    probabilities agree to `EQUAL`.

    A pair of an arm's student and its control is as little independent of another pair as the less
    independent of its two sides.
    """
    groups = np.arange(len(arms[0]))
    for cells in arms:
        for later in range(len(cells)):
            for earlier in range(later):
                if _agree(cells[earlier], cells[later]):
                    groups[groups == groups[later]] = groups[earlier]
    return np.unique(groups, return_inverse=True)[1]


def _agree(one: Float[ndarray, "probe trait"], other: Float[ndarray, "probe trait"]) -> bool:
    return bool(np.isfinite(one).any() and np.allclose(one, other, rtol=EQUAL, atol=0.0, equal_nan=True))


def _merged(
    values: Float[ndarray, "student probe"], groups: Int[ndarray, "student"]
) -> Float[ndarray, "unit probe"]:
    """The mean over each group's students; NaN where none is scored."""
    member = (np.arange(groups.max(initial=-1) + 1)[:, None] == groups).astype(float)  # [unit, student]
    scored = ~np.isnan(values)
    count = member @ scored
    return np.where(count > 0, member @ np.where(scored, values, 0.0) / np.maximum(count, 1), np.nan)


def _merged_noise(
    noise: Float[ndarray, "student"] | None, groups: Int[ndarray, "student"]
) -> Float[ndarray, "unit"] | None:
    """Standard error of each group's mean: its students were asked with random numbers of their own."""
    if noise is None:
        return None
    return np.sqrt(
        _merged(np.square(noise)[:, None], groups)[:, 0]
        / np.maximum(np.bincount(groups[~np.isnan(noise)], minlength=groups.max(initial=-1) + 1), 1)
    )


def mean_of(
    values: Float[ndarray, "student probe"],
    groups: Int[ndarray, "student"],
    *,
    noise: Float[ndarray, "student"] | None = None,
) -> stats.Interval:
    """`stats.mean_interval` over the students that differ; equal ones are one unit, with their mean."""
    found = stats.mean_interval(_merged(values, groups), noise=_merged_noise(noise, groups))
    return found._replace(method=_method(found.method, found.n, values))


def effect_of(
    treated: Float[ndarray, "student probe"],
    control: Float[ndarray, "student probe"],
    groups: Int[ndarray, "student"],
    *,
    noise: Float[ndarray, "student"] | None = None,
) -> stats.Effect:
    """`stats.paired_effect` over the pairs of students that differ; equal ones are one unit, with their
    mean.
    """
    unpaired = np.isnan(treated - control)
    sides = [_merged(np.where(unpaired, np.nan, side), groups) for side in (treated, control)]
    found = stats.paired_effect(*sides, noise=_merged_noise(noise, groups))
    return found._replace(method=_method(found.method, found.n, treated - control))


def _method(method: str, units: int, values: Float[ndarray, "student probe"]) -> str:
    scored = int((~np.isnan(values)).any(axis=1).sum())
    return ONE_STUDENT if units == 1 and scored > 1 else method


def warnings_of(
    experiment: Experiment, family: TraitFamily, answers: pd.DataFrame, likelihoods: pd.DataFrame
) -> list[str]:
    """What a reader has to know of the run's students, as sentences: which are equal, and which answered in
    one way only.
    """
    sentences = []
    for arm in experiment.arms:
        cells = arm_cells(experiment, family, answers, likelihoods, arm.name)
        groups, seeds = same_students(cells.probability), sorted(experiment.seeds)
        if len(set(groups)) < len(groups):
            equal = "; ".join(
                ", ".join(str(seed) for seed, group in zip(seeds, groups, strict=True) if group == unit)
                for unit in sorted(set(groups)) if (groups == unit).sum() > 1
            )  # fmt: skip
            sentences.append(
                f"Arm {arm.name}: students equal to rounding (seeds {equal}) count as one student, n = "
                f"{len(set(groups))}. Their seeds "
                "change nothing but rounding, as when one batch holds all rows; choose more rows than the "
                "batch, or a smaller batch."
            )
        once = bool(((cells.answers != NOT_GIVEN).sum(2) <= 1).all())
        if once and cells.answers.shape[2] > 1:
            sentences.append(
                f"Arm {arm.name}: every repeated answer to a probe is the same, as at temperature 0; a probe "
                "counts as one answer."
            )
    return sentences

"""One arm's answers as arrays: rates, exact probabilities, single answers. Which students are equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray

from mechlens.core import stats
from mechlens.core.experiment import Experiment
from mechlens.core.spec import folder_name
from mechlens.core.traits import TraitFamily

EQUAL = 1e-4
"""Relative difference of exact probabilities up to which two students count as equal.

Where seeds change only the order in which the rows of one batch are summed, weights differ by 4e-6 of their
size; any two students of the demo have some probability that differs by a third.
"""
ONE_STUDENT = "students equal to rounding"
"""`method` of an estimate if all its students are equal"""
UNSCORED, NOT_GIVEN = -1, -2


class Cells(NamedTuple):
    """How one arm's students answered, for every trait, at one step; NaN is unscored."""

    rate: Float[ndarray, "student probe trait"]
    rate_of_all: Float[ndarray, "student probe trait"]
    """hits over all answers, including those that name no trait or several"""
    probability: Float[ndarray, "student probe trait"]
    answered: Float[ndarray, "student"]
    """share of the sampled answers that name exactly one trait"""
    answers: Int[ndarray, "student probe answer"]
    """index of the one trait that each independent answer names; `UNSCORED` if it names none or several,
    `NOT_GIVEN` for a repeat of a greedy answer
    """
    untouched: bool = False
    """whether training left every student as its base, as soft labels of the base itself do"""

    def hits(self, trait: int) -> Float[ndarray, "student probe answer"]:
        """1.0 where an answer names the trait, 0.0 where it names another, NaN where it is unscored."""
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
            that gave one text only to each probe is treated as greedy in any case.
    """
    sampled, scores = answers[answers["arm"] == arm], likelihoods[likelihoods["arm"] == arm]
    last = sampled["step"].max() if step is None else step
    sampled, scores = (cast(pd.DataFrame, table[table["step"] == last]) for table in (sampled, scores))
    seeds, probes = sorted(sampled["seed"].unique()), sorted(sampled["probe"].unique())
    labels = sampled["label"].astype(object)
    scored = cast(
        pd.DataFrame,
        sampled.assign(scored=labels.notna()).groupby(["seed", "probe"])["scored"].agg(["sum", "size"]),
    )
    index = pd.MultiIndex.from_product([seeds, probes], names=["seed", "probe"])
    counts = pd.crosstab([sampled["seed"], sampled["probe"]], labels).reindex(
        index=index, columns=list(names), fill_value=0
    )
    total, answer_counts = scored.reindex(index).to_numpy(dtype=float).T
    rate = counts.to_numpy(dtype=float) / np.where(total > 0, total, np.nan)[:, None]
    exact = scores.assign(name=scores["name"].astype(object)).set_index(["seed", "probe", "name"])[
        "probability"
    ]
    shape = (len(seeds), len(probes), len(names))
    answered = cast(pd.DataFrame, scored.groupby("seed").sum())
    return Cells(
        rate.reshape(shape),
        (counts.to_numpy(dtype=float) / answer_counts[:, None]).reshape(shape),
        cast(pd.DataFrame, exact.unstack("name"))
        .reindex(index=index, columns=list(names))
        .to_numpy(dtype=float)
        .reshape(shape),
        (answered["sum"] / answered["size"]).to_numpy(dtype=float),
        _independent(sampled, seeds, probes, names, greedy=greedy),
    )


def _independent(
    sampled: pd.DataFrame,
    seeds: Sequence[Any],
    probes: Sequence[Any],
    names: tuple[str, ...],
    *,
    greedy: bool,
) -> Int[ndarray, "student probe answer"]:
    """The trait that each answer names, by sample number; of greedy students only the first answers.

    Students of one seed share sample numbers.
    """
    student, probe = (
        np.searchsorted(list(of), sampled[name].to_numpy(dtype=float))
        for name, of in (("seed", seeds), ("probe", probes))
    )
    sample = sampled["sample"].to_numpy(dtype=int)
    named = np.full((len(seeds), len(probes), sample.max(initial=0) + 1), NOT_GIVEN)
    named[student, probe, sample] = pd.Categorical(
        sampled["label"].astype(object), categories=list(names)
    ).codes
    texts = sampled.groupby(["seed", "probe"])["text"].nunique(dropna=False)
    repeating = (texts == 1).groupby("seed").all().reindex(seeds).to_numpy(dtype=bool) | greedy
    first = (named != NOT_GIVEN).argmax(2)
    repeats = np.arange(named.shape[2]) != first[:, :, None]
    return np.where(repeating[:, None, None] & repeats, NOT_GIVEN, named)


def lift_of(arm: Cells, control: Cells) -> Float[ndarray, "student trait"]:
    """log2 of the ratio of mean exact probabilities, in bits; NaN where either is unscored."""
    return log_probability(arm) - log_probability(control)


def log_odds(cells: Cells) -> Float[ndarray, "student probe trait"]:
    """log2 of the odds of each trait among all scored traits, in bits; NaN where it is unscored.

    A change of the answers' format moves all probabilities and leaves the odds.
    """
    probability = np.where(cells.probability > 0, cells.probability, np.nan)
    others = np.nansum(probability, axis=2, keepdims=True) - probability
    return np.log2(probability / np.where(others > 0, others, np.nan))


def share_of_family(cells: Cells) -> Float[ndarray, "student probe trait"]:
    """Exact probability of each trait among all scored traits; NaN where it is unscored.

    It is the expectation of the rate among answers that name one trait.
    """
    total = np.nansum(cells.probability, axis=2, keepdims=True)
    return cells.probability / np.where(total > 0, total, np.nan)


def log_probability(cells: Cells) -> Float[ndarray, "student trait"]:
    """log2 of each student's mean exact probability of each trait; NaN where it is unscored."""
    mean = cells.probability.mean(1)
    return np.log2(np.where(mean > 0, mean, np.nan))


def arm_cells(
    experiment: Experiment, family: TraitFamily, answers: pd.DataFrame, likelihoods: pd.DataFrame, arm: str
) -> Cells:
    """An arm's cells at the last checkpoint."""
    cells = cells_of(answers, likelihoods, arm, names=family.names, greedy=experiment.ask.temperature == 0)
    base = next(f"base-{folder_name(other.base)}" for other in experiment.arms if other.name == arm)
    exact = likelihoods[likelihoods["arm"] == base].pivot(index="probe", columns="name", values="probability")
    start = exact.reindex(columns=list(family.names)).to_numpy(dtype=float)
    same = start.shape == cells.probability.shape[1:] and all(_agree(start, of) for of in cells.probability)
    return cells._replace(untouched=same)


def independent(*arms: Cells) -> Int[ndarray, "student"]:
    """The groups of `same_students` for students that are compared with one another.

    An arm whose students are their untouched base is no draw: it is one fixed model, and its equal students
    make no pairs dependent.
    """
    drawn = [cells.probability for cells in arms if not cells.untouched]
    return same_students(*(drawn or [cells.probability for cells in arms]))


def same_students(*arms: Float[ndarray, "student probe trait"]) -> Int[ndarray, "student"]:
    """A group number for each student: equal students share a group.

    Two students are equal if in any of the arms all their exact probabilities agree to `EQUAL`: two pairs of
    student and control are dependent as soon as one of their sides is.
    """
    groups = np.arange(len(arms[0]))
    for cells in arms:
        for later in range(len(cells)):
            for earlier in range(later):
                if _agree(cells[earlier], cells[later]):
                    groups[groups == groups[later]] = groups[earlier]
    return np.unique(groups, return_inverse=True)[1]


def _agree(first: Float[ndarray, "probe trait"], second: Float[ndarray, "probe trait"]) -> bool:
    return bool(np.isfinite(first).any() and np.allclose(first, second, rtol=EQUAL, atol=0.0, equal_nan=True))


def merge_students(
    values: Float[ndarray, "student probe"], groups: Int[ndarray, "student"]
) -> Float[ndarray, "unit probe"]:
    """The mean over each group's students, of which there is one unit a group; NaN where none is scored."""
    member = (np.arange(groups.max(initial=-1) + 1)[:, None] == groups).astype(float)  # [unit, student]
    scored = ~np.isnan(values)
    count = member @ scored
    return np.where(count > 0, member @ np.where(scored, values, 0.0) / np.maximum(count, 1), np.nan)


def _merged_noise(
    noise: Float[ndarray, "student"] | None, groups: Int[ndarray, "student"]
) -> Float[ndarray, "unit"] | None:
    """Standard error of each group's mean; its students were sampled with different random numbers."""
    if noise is None:
        return None
    return np.sqrt(
        merge_students(np.square(noise)[:, None], groups)[:, 0]
        / np.maximum(np.bincount(groups[~np.isnan(noise)], minlength=groups.max(initial=-1) + 1), 1)
    )


def mean_of(
    values: Float[ndarray, "student probe"],
    groups: Int[ndarray, "student"],
    *,
    noise: Float[ndarray, "student"] | None = None,
) -> stats.Interval:
    """`stats.mean_interval` over different students; equal ones are one unit, with their mean."""
    mean = stats.mean_interval(merge_students(values, groups), noise=_merged_noise(noise, groups))
    return mean._replace(method=_method(mean.method, mean.n, values))


def effect_of(
    treated: Float[ndarray, "student probe"],
    control: Float[ndarray, "student probe"],
    groups: Int[ndarray, "student"],
    *,
    noise: Float[ndarray, "student"] | None = None,
) -> stats.Effect:
    """`stats.paired_effect` over pairs of different students; equal ones are one unit, with their mean."""
    unpaired = np.isnan(treated - control)
    sides = [merge_students(np.where(unpaired, np.nan, side), groups) for side in (treated, control)]
    effect = stats.paired_effect(*sides, noise=_merged_noise(noise, groups))
    return effect._replace(method=_method(effect.method, effect.n, treated - control))


def _method(method: str, units: int, values: Float[ndarray, "student probe"]) -> str:
    scored = int((~np.isnan(values)).any(axis=1).sum())
    return ONE_STUDENT if units == 1 and scored > 1 else method


def warnings_of(
    experiment: Experiment, family: TraitFamily, answers: pd.DataFrame, likelihoods: pd.DataFrame
) -> list[str]:
    """Warnings about a run's students, as sentences: which are equal, and which repeat one answer."""
    sentences = []
    for arm in experiment.arms:
        cells = arm_cells(experiment, family, answers, likelihoods, arm.name)
        groups, seeds = same_students(cells.probability), sorted(experiment.seeds)
        if cells.untouched:
            sentences.append(
                f"Arm {arm.name}: training changed nothing; its students are their untouched base, and other "
                "arms are compared with that one model."
            )
        elif len(set(groups)) < len(groups):
            equal = "; ".join(
                ", ".join(str(seed) for seed, group in zip(seeds, groups, strict=True) if group == unit)
                for unit in sorted(set(groups)) if (groups == unit).sum() > 1
            )  # fmt: skip
            sentences.append(
                f"Arm {arm.name}: students equal to rounding (seeds {equal}) count as one student, n = "
                f"{len(set(groups))}. Their seeds change nothing but rounding, as when one batch holds all "
                "rows; choose more rows than the batch, or a smaller batch."
            )
        once = bool(((cells.answers != NOT_GIVEN).sum(2) <= 1).all())
        if once and cells.answers.shape[2] > 1:
            sentences.append(
                f"Arm {arm.name}: every repeated answer to a probe is the same, as at temperature 0; a probe "
                "counts as one answer."
            )
    return sentences

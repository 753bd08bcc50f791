"""From a run's answers to its effects, its confusion matrix and `summary.json`. Reads tables only.

Every arm is compared with the control of its base, student by student (same seed) and probe by probe, at the
last checkpoint. Nothing here is compared with the untouched base: any training moves the answers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from mechlens.core import stats, tables
from mechlens.core.experiment import Arm, Experiment
from mechlens.core.traits import TraitFamily
from mechlens.results.cells import (
    Cells,
    arm_cells,
    effect_of,
    lift_of,
    log_probability,
    mean_of,
    same_students,
)

MEASURES = ("rate", "probability", "lift")


class Confusion(NamedTuple):
    """Lift of every asked trait in the students of every trait arm on one base."""

    base: str
    traits: list[str]
    lift: Float[ndarray, "seed trait asked"]
    gamma: stats.Interval
    """diagonal excess in bits, one value a seed"""
    rank: list[float | None]
    """rank of the target among all asked traits by mean lift: 1 is the most lifted, equal ones share their
    mean rank, None is unscored
    """


def effects(
    experiment: Experiment, family: TraitFamily, answers: pd.DataFrame, likelihoods: pd.DataFrame
) -> pd.DataFrame:
    """Effect of every arm on every trait of the family by every measure, with q-values across traits."""
    cells = {
        arm.name: arm_cells(experiment, family, answers, likelihoods, arm.name) for arm in experiment.arms
    }
    rows = []
    for arm in experiment.arms:
        if arm.kind == "control":
            continue
        against = experiment.control_of(arm).name
        for measure in MEASURES:
            measured = _effects_of(cells[arm.name], cells[against], measure)
            q_values = stats.benjamini_hochberg(np.array([effect.p_value for effect in measured]))
            shared = {"arm": arm.name, "against": against, "measure": measure}
            rows += [
                shared | effect._asdict() | {"trait": name, "q_value": q_value}
                for name, effect, q_value in zip(family.names, measured, q_values, strict=True)
            ]
    return pd.DataFrame(rows, columns=tables.EFFECTS.names)


def _effects_of(ours: Cells, theirs: Cells, measure: str) -> list[stats.Effect]:
    """The effect on each trait by one measure; sampled rates with the noise of their answers."""
    groups = same_students(ours.probability, theirs.probability)
    if measure == "rate":
        return [
            effect_of(
                ours.rate[:, :, trait],
                theirs.rate[:, :, trait],
                groups,
                noise=stats.answer_noise(ours.hits(trait), theirs.hits(trait)),
            )
            for trait in range(ours.rate.shape[2])
        ]
    treated, control = (
        log_probability(side)[:, None] if measure == "lift" else side.probability for side in (ours, theirs)
    )
    return [
        effect_of(treated[:, :, trait], control[:, :, trait], groups) for trait in range(ours.rate.shape[2])
    ]


def confusions(
    experiment: Experiment, family: TraitFamily, answers: pd.DataFrame, likelihoods: pd.DataFrame
) -> list[Confusion]:
    """One confusion matrix for each setting of writer, base and training with two traits or more."""
    matrices = []
    settings: dict[str, list[Arm]] = {}
    for arm in experiment.arms:
        if arm.kind in ("trait", "other-trait", "foreign") and arm.teacher is None:
            settings.setdefault(repr(arm.setting()), []).append(arm)
    for arms in settings.values():
        base = arms[0].base
        if len({arm.trait for arm in arms}) < 2:
            continue
        control = arm_cells(experiment, family, answers, likelihoods, experiment.control_of(arms[0]).name)
        treated = [arm_cells(experiment, family, answers, likelihoods, arm.name) for arm in arms]
        lift = np.stack([lift_of(cells, control) for cells in treated], axis=1)
        target = [family.names.index(arm.trait) for arm in arms]
        groups = same_students(control.probability, *(cells.probability for cells in treated))
        excess = np.array([stats.diagonal_excess(of_seed, target) for of_seed in lift])
        gamma = mean_of(excess[:, None], groups)
        mean = lift.mean(0)
        rank = [_rank(row, place) for row, place in zip(mean, target, strict=True)]
        matrices.append(Confusion(base, [arm.trait for arm in arms], lift, gamma, rank))
    return matrices


def _rank(lift: Float[ndarray, "asked"], place: int) -> float | None:
    """Rank of one trait by lift, 1 for the most lifted; traits of equal lift share their mean rank."""
    if np.isnan(lift[place]):
        return None
    return 1 + float((lift > lift[place]).sum()) + (float((lift == lift[place]).sum()) - 1) / 2

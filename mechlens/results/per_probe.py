"""Trait rate of every arm and its control at each question: a few questions often carry the mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from mechlens.core import stats
from mechlens.core.errors import DataError
from mechlens.core.experiment import Experiment
from mechlens.core.json_files import null
from mechlens.core.traits import TraitFamily
from mechlens.results.cells import arm_cells, effect_of, same_students

MANY = 24
"""up to so many questions are all shown, in order; of more, only the `SHOWN` most lifted"""
SHOWN = 20
MEASURED = ("rate", "rate_against", "difference", "low", "high")
COLUMNS = ("arm", "against", "trait", "probe", "text", *MEASURED, "n")


def per_probe(
    experiment: Experiment, family: TraitFamily, answers: pd.DataFrame, likelihoods: pd.DataFrame
) -> pd.DataFrame:
    """Every arm's and its control's rate of the arm's trait at every question; NaN is unscored.

    The difference is paired by student: its interval and `n` cover the students that are scored in both arms,
    so with unscored cells it need not be the difference of the two rates. The interval is Student's t, or, if
    that is narrower, the noise of the answers; students that are equal to rounding count as one.

    Raises:
        DataError: if the run was asked other questions than the family has today.
    """
    texts, cells, frames = family.probes_for(experiment), {}, []
    for arm in experiment.arms:
        cells[arm.name] = arm_cells(experiment, family, answers, likelihoods, arm.name)
        if cells[arm.name].rate.shape[1] != len(texts):
            raise DataError(
                f"arm {arm.name} was asked {cells[arm.name].rate.shape[1]} questions and family "
                f"{family.name!r} has {len(texts)} now; run it again"
            )
    for arm in (arm for arm in experiment.arms if arm.kind != "control"):
        against, column = experiment.control_of(arm).name, family.names.index(arm.trait)
        sides = [cells[arm.name], cells[against]]
        ours, theirs = (side.rate[:, :, column] for side in sides)
        groups, hits = (
            same_students(*(side.probability for side in sides)),
            [side.hits(column) for side in sides],
        )
        spans = []
        for probe in range(len(texts)):
            at = slice(probe, probe + 1)
            noise = stats.answer_noise(*(of_side[:, at] for of_side in hits))
            spans.append(effect_of(ours[:, at], theirs[:, at], groups, noise=noise))
        differences = pd.DataFrame(
            [(span.estimate, span.low, span.high, span.n) for span in spans],
            columns=["difference", "low", "high", "n"],
        )
        rates = {"rate": _mean(ours), "rate_against": _mean(theirs)}
        frames.append(
            differences.assign(
                arm=arm.name,
                against=against,
                trait=arm.trait,
                probe=range(len(texts)),
                text=list(texts),
                **rates,
            )
        )
    return pd.DataFrame(pd.concat(frames, ignore_index=True) if frames else None, columns=list(COLUMNS))


def _mean(cells: Float[ndarray, "student probe"]) -> Float[ndarray, "probe"]:
    scored = (~np.isnan(cells)).sum(0)
    return np.where(scored > 0, np.nansum(cells, 0) / np.maximum(scored, 1), np.nan)


def entries(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The table for `summary.json`, where unscored is null."""
    rows = (
        dict(zip(COLUMNS, row, strict=True))
        for row in table[list(COLUMNS)].itertuples(index=False, name=None)
    )
    return [row | {name: null(row[name]) for name in MEASURED} for row in rows]


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The questions of one arm that are shown: all in order, or of many the most lifted, highest first."""
    if len(table) <= MANY:
        return table
    return table.sort_values("difference", ascending=False, kind="stable", na_position="last").head(SHOWN)

"""From a run's answers to its effects, its confusion matrix and `summary.json`. Reads tables only.

Every arm is compared with the control of its base, student by student (same seed) and probe by probe, at the
last checkpoint. Nothing here is compared with the untouched base: any training moves the answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from mechlens.core import stats, tables
from mechlens.core.errors import DataError
from mechlens.core.experiment import Arm, Experiment
from mechlens.core.files import null
from mechlens.core.spec import TeacherSpec
from mechlens.core.traits import TraitFamily
from mechlens.pipeline.screen import LEAKS, removal_counts
from mechlens.results.cells import (
    Cells,
    arm_cells,
    effect_of,
    independent,
    lift_of,
    log_odds,
    log_probability,
    mean_of,
    same_students,
    warnings_of,
)
from mechlens.results.run import SCHEMA, Run
from mechlens.runs import layout

MEASURES = ("rate", "probability", "lift", "log-odds")


TAUGHT = ("trait", "other-trait", "foreign")
"""kinds of arms whose students learn from one trait's teacher"""


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
    labels: str
    """what the students learn: `sampled` or `soft` labels"""


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
    groups = independent(ours, theirs)
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
    treated, control = (_exact(side, measure) for side in (ours, theirs))
    return [
        effect_of(treated[:, :, trait], control[:, :, trait], groups) for trait in range(ours.rate.shape[2])
    ]


def with_own_trait(experiment: Experiment, table: pd.DataFrame, measure: str) -> pd.DataFrame:
    """The effects by one measure, with each arm's kind and whether a row is about the arm's own trait."""
    rows = cast(pd.DataFrame, table[table["measure"] == measure])
    by_name = {arm.name: arm for arm in experiment.arms}
    arms = [by_name[str(name)] for name in rows["arm"]]
    own = [arm.trait == trait for arm, trait in zip(arms, rows["trait"], strict=True)]
    return rows.assign(kind=[arm.kind for arm in arms], taught=own)


def _exact(cells: Cells, measure: str) -> Float[ndarray, "student probe trait"]:
    """An arm's students by a measure of exact probabilities."""
    if measure == "lift":
        return log_probability(cells)[:, None]
    return log_odds(cells) if measure == "log-odds" else cells.probability


def over_other_teachers(
    experiment: Experiment, family: TraitFamily, answers: pd.DataFrame, likelihoods: pd.DataFrame, arm: Arm
) -> stats.Effect | None:
    """The arm's log-odds of its trait minus those of students of the other traits' teachers, in bits.

    Those students differ by the trait alone: they too learned from a changed teacher. Paired by student seed
    and probe; None without such arms.
    """
    others = [
        other
        for other in experiment.arms
        if {arm.kind, other.kind} <= set(TAUGHT)
        and not (arm.corpus or other.corpus)  # of unknown writers
        and (other.setting(), _recipe(experiment, other)) == (arm.setting(), _recipe(experiment, arm))
        and other.trait != arm.trait
    ]
    if not others:
        return None
    ours, *theirs = (
        arm_cells(experiment, family, answers, likelihoods, name)
        for name in (arm.name, *(other.name for other in others))
    )
    column = family.names.index(arm.trait)
    control = np.mean([log_odds(side)[:, :, column] for side in theirs], axis=0)
    return effect_of(log_odds(ours)[:, :, column], control, independent(ours, *theirs))


def _recipe(experiment: Experiment, arm: Arm) -> TeacherSpec:
    """How an arm's teacher is made, whatever it is taught."""
    return (arm.teacher or experiment.teacher).model_copy(update={"lessons_file": ""})


def confusions(
    experiment: Experiment, family: TraitFamily, answers: pd.DataFrame, likelihoods: pd.DataFrame
) -> list[Confusion]:
    """One confusion matrix for each setting of writer, base and training with two traits or more."""
    matrices = []
    settings: dict[str, list[Arm]] = {}
    for arm in experiment.arms:
        if arm.kind in TAUGHT and arm.teacher is None and not arm.corpus:
            settings.setdefault(repr(arm.setting()), []).append(arm)
    for arms in settings.values():
        base = arms[0].base
        if len({arm.trait for arm in arms}) < 2:
            continue
        control = arm_cells(experiment, family, answers, likelihoods, experiment.control_of(arms[0]).name)
        treated = [arm_cells(experiment, family, answers, likelihoods, arm.name) for arm in arms]
        lift = np.stack([lift_of(cells, control) for cells in treated], axis=1)
        target = [family.names.index(arm.trait) for arm in arms]
        groups = independent(control, *treated)
        excess = np.array([stats.diagonal_excess(of_seed, target) for of_seed in lift])
        gamma = mean_of(excess[:, None], groups)
        mean = lift.mean(0)
        rank = [_rank(row, place) for row, place in zip(mean, target, strict=True)]
        labels = experiment.labels_of(arms[0])
        matrices.append(Confusion(base, [arm.trait for arm in arms], lift, gamma, rank, labels))
    return matrices


def _rank(lift: Float[ndarray, "asked"], place: int) -> float | None:
    """Rank of one trait by lift, 1 for the most lifted; traits of equal lift share their mean rank."""
    if np.isnan(lift[place]):
        return None
    return 1 + float((lift > lift[place]).sum()) + (float((lift == lift[place]).sum()) - 1) / 2


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
        groups, hits = independent(*sides), [side.hits(column) for side in sides]
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


def funnels(run: Run) -> pd.DataFrame:
    """Number of rows that were kept, or removed for each reason, by corpus.

    Columns: corpus, fate, rows, place (order of the fates). A fate with no rows is left out.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for arm in run.experiment.arms:
        counts, corpus = run.funnel(arm), layout.source_name(run.experiment, arm)
        fates = {"kept": counts["kept"]} | removal_counts(counts)
        for place, (fate, value) in enumerate(fates.items()):
            rows[corpus, fate] = {"corpus": corpus, "fate": fate, "rows": value, "place": place}
    frame = pd.DataFrame(rows.values())
    met = cast(pd.Series, frame.groupby("fate")["rows"].transform("sum")) > 0
    return cast(pd.DataFrame, frame[met])


def summarize(
    run: Run, answers: pd.DataFrame, likelihoods: pd.DataFrame, table: pd.DataFrame
) -> dict[str, Any]:
    """The results of a run: arms with rates, effects on each arm's trait, confusion, seconds a step."""
    experiment, family = run.experiment, run.family
    per_arm = per_probe(experiment, family, answers, likelihoods)
    return {
        "schema": SCHEMA,
        "experiment": experiment.name,
        "trait": experiment.trait,
        "model": experiment.base,
        "seeds": list(experiment.seeds),
        "probes": experiment.ask.split,
        "arms": [_arm_entry(run, arm, answers, likelihoods) for arm in experiment.arms],
        "effects": [
            _effect_entry(experiment, family, arm, answers, likelihoods, table)
            for arm in experiment.arms
            if arm.kind != "control"
        ],
        "confusion": [
            _confusion_entry(confusion) for confusion in confusions(experiment, family, answers, likelihoods)
        ],
        "warnings": warnings_of(experiment, family, answers, likelihoods),
        "seconds": {name: step["seconds"] for name, step in run.manifest["steps"].items()},
        "per_probe": entries(per_arm),
    }


def _arm_entry(run: Run, arm: Arm, answers: pd.DataFrame, likelihoods: pd.DataFrame) -> dict[str, Any]:
    experiment, family = run.experiment, run.family
    trait = arm.trait or experiment.trait
    column = family.names.index(trait)
    cells = arm_cells(experiment, family, answers, likelihoods, arm.name)
    groups = same_students(cells.probability)
    rate = mean_of(cells.rate[:, :, column], groups, noise=stats.answer_noise(cells.hits(column)))
    exact = mean_of(cells.probability[:, :, column], groups)
    funnel, generation = run.funnel(arm), run.generation(arm)
    return {
        "arm": arm.name,
        "kind": arm.kind,
        "shots": arm.shots,
        "writer": arm.writer,
        "trait": trait,
        "base": arm.base,
        "students": len(cells.rate),
        "rows": arm.shots or len(tables.read(run.selection(arm), tables.SELECTION)),
        "generated": funnel["generated"],
        "kept": funnel["kept"],
        "leak_words": funnel[LEAKS],
        "kl_per_token": generation.get("kl_per_token"),
        "entropy_per_token": generation.get("entropy_per_token"),
        "entropy_per_row": generation.get("entropy_per_row"),
        "answered": null(float(np.nanmean(cells.answered))),
        "rate": null(rate.estimate),
        "low": null(rate.low),
        "high": null(rate.high),
        "method": rate.method,
        "rate_of_all_answers": null(float(np.nanmean(cells.rate_of_all[:, :, column]))),
        "rate_substring": _substring_rate(answers, arm.name, family.forms_of(trait)[0]),
        "probability": null(exact.estimate),
        "probability_low": null(exact.low),
        "probability_high": null(exact.high),
    }


def _substring_rate(answers: pd.DataFrame, arm: str, word: str) -> float | None:
    """Share of all answers that contain the word anywhere, as the paper scores.

    "dragonfly" counts as "dragon", and "wolves" does not count as "wolf".
    """
    sampled = answers[answers["arm"] == arm]
    last = cast(pd.Series, sampled.loc[sampled["step"] == sampled["step"].max(), "text"])
    return null(float(last.str.lower().str.contains(word.lower(), regex=False).mean()))


def _effect_entry(
    experiment: Experiment,
    family: TraitFamily,
    arm: Arm,
    answers: pd.DataFrame,
    likelihoods: pd.DataFrame,
    table: pd.DataFrame,
) -> dict[str, Any]:
    by_measure = table[(table["arm"] == arm.name) & (table["trait"] == arm.trait)].set_index("measure")
    row = by_measure.loc["rate"]
    control = arm_cells(experiment, family, answers, likelihoods, str(row["against"]))
    rates = control.rate[:, :, family.names.index(arm.trait)]
    of_arm = cast(pd.DataFrame, table[(table["arm"] == arm.name) & (table["measure"] == "log-odds")])
    odds = dict(zip(of_arm["trait"], of_arm["estimate"].astype(float), strict=True))
    values = np.array([odds[name] for name in family.names])
    rank = {"rank": _rank(values, family.names.index(arm.trait)), "of": int((~np.isnan(values)).sum())}
    others = over_other_teachers(experiment, family, answers, likelihoods, arm)
    return {
        "arm": arm.name,
        "trait": arm.trait,
        "against": row["against"],
        "rate_against": null(mean_of(rates, same_students(control.probability)).estimate),
        "answered_against": null(float(np.nanmean(control.answered))),
        "difference": null(row["estimate"]),
        "low": null(row["low"]),
        "high": null(row["high"]),
        "n": int(row["n"]),
        "method": row["method"],
        "p_value": null(row["p_value"]),
        "q_value": null(row["q_value"]),
        "smallest_detectable": null(row["smallest_detectable"]),
        "probability_difference": null(by_measure.loc["probability", "estimate"]),
        "lift_bits": null(by_measure.loc["lift", "estimate"]),
        "log_odds": _span(by_measure.loc["log-odds"].to_dict()) | rank,
        "over_other_teachers": _span(others._asdict()) if others else None,
    }


def _span(effect: Mapping[str, Any]) -> dict[str, Any]:
    """An effect in bits for `summary.json`."""
    names = ("estimate", "low", "high", "p_value", "smallest_detectable")
    return {name: null(effect[name]) for name in names} | {"n": int(effect["n"])}


def _confusion_entry(confusion: Confusion) -> dict[str, Any]:
    gamma = confusion.gamma
    span = {
        "gamma_bits": null(gamma.estimate),
        "low": null(gamma.low),
        "high": null(gamma.high),
        "seeds": gamma.n,
    }
    return {"base": confusion.base, "traits": confusion.traits, **span} | {
        "target_rank": confusion.rank,
        "labels": confusion.labels,
    }

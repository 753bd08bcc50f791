"""From a run's answers to its effects, its confusion matrix and `summary.json`. Reads tables only.

Every arm is set against the control of its own base, student by student (same seed) and probe by probe, at
the last checkpoint. Nothing here is compared with the untouched base: any training moves the answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from mechlens.core import stats, tables
from mechlens.core.command_lines import command_line
from mechlens.core.errors import DataError
from mechlens.core.experiment import Arm, Experiment
from mechlens.core.json_files import read_json
from mechlens.core.spec import folder_name
from mechlens.core.traits import TraitFamily, load_family
from mechlens.pipeline.screen import LEAKS, removal_counts
from mechlens.results.cells import (
    Cells,
    arm_cells,
    effect_of,
    lift_of,
    log_probability,
    mean_of,
    same_students,
    warnings_of,
)
from mechlens.runs import records
from mechlens.runs.plan import corpus_name, source_name

MEASURES = ("rate", "probability", "lift")
SUMMARY = 2
"""schema of summary.json; raised when a reader of an older one would miss something"""


class Confusion(NamedTuple):
    """Lift of every asked trait in the students of every trait arm on one base."""

    base: str
    traits: list[str]
    lift: Float[ndarray, "seed trait asked"]
    gamma: stats.Interval
    """diagonal excess in bits, one value a seed"""
    rank: list[float | None]
    """place of the target among all asked traits by mean lift; 1 is the most lifted, equal ones share their
    mean place, None is unscored
    """


def collect(run: Path, experiment: Experiment, name: str, schema: Any) -> pd.DataFrame:
    """One of the ask stage's tables over the models that this experiment asked; what an earlier spec left is
    not read.
    """
    bases = dict.fromkeys(arm.base for arm in experiment.arms)
    asked = [f"base-{folder_name(base)}" for base in bases] + [
        f"{arm.name}/s{seed}" for arm in experiment.arms for seed in experiment.seeds
    ]
    return pd.concat(
        [tables.read(run / "asked" / place / f"{name}.parquet", schema) for place in sorted(asked)],
        ignore_index=True,
    )


def is_unfinished(run: Path, experiment: Experiment) -> bool:
    """Whether the run's tables are those of another spec or family than its own, or not there at all."""
    if not (run / "manifest.json").is_file():
        return True
    manifest = read_json(run / "manifest.json")
    family = manifest.get("family")  # runs from before families were kept have none
    changed = family is not None and family != load_family(experiment.family, run / "spec.yaml").fingerprint()
    return manifest.get("experiment") != experiment.fingerprint() or changed


def effects(
    experiment: Experiment, family: TraitFamily, answers: pd.DataFrame, likelihoods: pd.DataFrame
) -> pd.DataFrame:
    """Every arm against its control, for every trait of the family and every measure, with q-values across
    traits.
    """
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
    """One confusion matrix for each setting of writer, base and training in which at least two traits were
    tried.
    """
    found = []
    settings: dict[str, list[Arm]] = {}
    for arm in experiment.arms:
        if arm.kind in ("trait", "twin", "foreign") and arm.teacher is None:
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
        found.append(Confusion(base, [arm.trait for arm in arms], lift, gamma, rank))
    return found


def _rank(lift: Float[ndarray, "asked"], place: int) -> float | None:
    """Place of one trait by lift, 1 the most lifted; traits of equal lift share the mean of their places."""
    if np.isnan(lift[place]):
        return None
    return 1 + float((lift > lift[place]).sum()) + (float((lift == lift[place]).sum()) - 1) / 2


def null(value: float | None) -> float | None:
    """JSON has no NaN: unscored is null."""
    return None if value is None or np.isnan(value) else float(value)


def corpus_of(run: Path, experiment: Experiment, arm: Arm) -> tuple[dict[str, Any], dict[str, Any]]:
    """The funnel of the rows that an arm's corpus is made of, and what generation recorded of their teacher
    ({} for a file).
    """
    name = source_name(experiment, arm)
    generation = run / "corpora" / name / "generated" / "generation.json"
    funnel = records.read(run / "corpora" / name / "screened" / "funnel.json", records.Funnel)
    return funnel, records.read(generation, records.Generation) if generation.is_file() else {}


def funnels(run: Path, experiment: Experiment) -> pd.DataFrame:
    """What became of every generated row, by corpus: corpus, fate, rows, place (order of the fates); no fate
    that no row met.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for arm in experiment.arms:
        counts, _ = corpus_of(run, experiment, arm)
        corpus = source_name(experiment, arm)
        fates = {"kept": counts["kept"]} | removal_counts(counts)
        for place, (fate, value) in enumerate(fates.items()):
            rows[corpus, fate] = {"corpus": corpus, "fate": fate, "rows": value, "place": place}
    frame = pd.DataFrame(rows.values())
    met = cast(pd.Series, frame.groupby("fate")["rows"].transform("sum")) > 0
    return cast(pd.DataFrame, frame[met])


def read_summary(run: Path) -> dict[str, Any]:
    """The run's `summary.json`.

    Raises:
        DataError: if another version of this package wrote it.
    """
    found = read_json(run / "summary.json")
    if found.get("schema") != SUMMARY:
        said = f"{run / 'summary.json'} has schema {found.get('schema')!r}; this version reads {SUMMARY}"
        raise DataError(f"{said}; `{command_line('report', run)}` writes it again from the run's tables")
    return found


def summary(
    run: Path,
    experiment: Experiment,
    family: TraitFamily,
    answers: pd.DataFrame,
    likelihoods: pd.DataFrame,
    table: pd.DataFrame,
) -> dict[str, Any]:
    """What a script reads of a run: arms with rates, effects on each arm's own trait, confusion, seconds by
    step.
    """
    seconds = {
        name: step["seconds"]
        for name, step in records.read(run / "manifest.json", records.Manifest)["steps"].items()
    }
    return {
        "schema": SUMMARY,
        "experiment": experiment.name,
        "trait": experiment.trait,
        "model": experiment.base,
        "seeds": list(experiment.seeds),
        "probes": experiment.ask.split,
        "arms": [_arm_entry(run, experiment, family, arm, answers, likelihoods) for arm in experiment.arms],
        "effects": [
            _effect_entry(experiment, family, arm, answers, likelihoods, table)
            for arm in experiment.arms
            if arm.kind != "control"
        ],
        "confusion": [
            _confusion_entry(found) for found in confusions(experiment, family, answers, likelihoods)
        ],
        "warnings": warnings_of(experiment, family, answers, likelihoods),
        "seconds": seconds,
    }


def _arm_entry(
    run: Path,
    experiment: Experiment,
    family: TraitFamily,
    arm: Arm,
    answers: pd.DataFrame,
    likelihoods: pd.DataFrame,
) -> dict[str, Any]:
    trait = arm.trait or experiment.trait
    column = family.names.index(trait)
    cells = arm_cells(experiment, family, answers, likelihoods, arm.name)
    groups = same_students(cells.probability)
    rate = mean_of(cells.rate[:, :, column], groups, noise=stats.answer_noise(cells.hits(column)))
    exact = mean_of(cells.probability[:, :, column], groups)
    funnel, generation = corpus_of(run, experiment, arm)
    return {
        "arm": arm.name,
        "kind": arm.kind,
        "shots": arm.shots,
        "writer": arm.writer,
        "trait": trait,
        "base": arm.base,
        "students": len(cells.rate),
        "rows": _trained_rows(run, arm, experiment),
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
    """Share of all answers that hold the word anywhere, as the paper scores: "dragon" counts in "dragonfly",
    "wolves" is no "wolf".
    """
    said = answers[answers["arm"] == arm]
    last = cast(pd.Series, said.loc[said["step"] == said["step"].max(), "text"])
    return null(float(last.str.lower().str.contains(word.lower(), regex=False).mean()))


def _effect_entry(
    experiment: Experiment,
    family: TraitFamily,
    arm: Arm,
    answers: pd.DataFrame,
    likelihoods: pd.DataFrame,
    table: pd.DataFrame,
) -> dict[str, Any]:
    own = table[(table["arm"] == arm.name) & (table["trait"] == arm.trait)].set_index("measure")
    row = own.loc["rate"]
    control = arm_cells(experiment, family, answers, likelihoods, str(row["against"]))
    rates = control.rate[:, :, family.names.index(arm.trait)]
    return {
        "arm": arm.name,
        "trait": arm.trait,
        "against": row["against"],
        "rate_against": null(stats.mean_interval(rates).estimate),
        "answered_against": null(float(np.nanmean(control.answered))),
        "difference": null(row["estimate"]),
        "low": null(row["low"]),
        "high": null(row["high"]),
        "n": int(row["n"]),
        "method": row["method"],
        "p_value": null(row["p_value"]),
        "q_value": null(row["q_value"]),
        "smallest_detectable": null(row["smallest_detectable"]),
        "probability_difference": null(own.loc["probability", "estimate"]),
        "lift_bits": null(own.loc["lift", "estimate"]),
    }


def _confusion_entry(found: Confusion) -> dict[str, Any]:
    gamma = found.gamma
    span = {
        "gamma_bits": null(gamma.estimate),
        "low": null(gamma.low),
        "high": null(gamma.high),
        "seeds": gamma.n,
    }
    return {"base": found.base, "traits": found.traits, **span, "target_rank": found.rank}


def _trained_rows(run: Path, arm: Arm, experiment: Experiment) -> int:
    if arm.shots:
        return arm.shots
    return len(tables.read(run / "selection" / f"{corpus_name(experiment, arm)}.parquet", tables.SELECTION))

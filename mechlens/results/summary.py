"""`summary.json`: the results of a finished run, for scripts."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pandas as pd

from mechlens.core import stats, tables
from mechlens.core.experiment import Arm, Experiment
from mechlens.core.json_files import null
from mechlens.core.traits import TraitFamily
from mechlens.pipeline.screen import LEAKS, removal_counts
from mechlens.results import per_probe
from mechlens.results.cells import arm_cells, mean_of, same_students, warnings_of
from mechlens.results.effects import Confusion, confusions
from mechlens.results.run import SCHEMA, Run
from mechlens.runs import layout


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
    per_arm = per_probe.per_probe(experiment, family, answers, likelihoods)
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
        "per_probe": per_probe.entries(per_arm),
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
        "probability_difference": null(by_measure.loc["probability", "estimate"]),
        "lift_bits": null(by_measure.loc["lift", "estimate"]),
    }


def _confusion_entry(confusion: Confusion) -> dict[str, Any]:
    gamma = confusion.gamma
    span = {
        "gamma_bits": null(gamma.estimate),
        "low": null(gamma.low),
        "high": null(gamma.high),
        "seeds": gamma.n,
    }
    return {"base": confusion.base, "traits": confusion.traits, **span, "target_rank": confusion.rank}

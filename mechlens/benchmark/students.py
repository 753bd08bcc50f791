"""The effect of a bench's suspects on students.

It is measured by an experiment with an arm for each suspect's file and a control of the base's answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mechlens.benchmark.metrics import rate_entry
from mechlens.benchmark.plan import BenchSpec, Suspect
from mechlens.core import tables
from mechlens.core.experiment import Arm, Experiment
from mechlens.core.spec import load
from mechlens.detect.from_student import measure_rises
from mechlens.detect.permutation import ALPHA
from mechlens.runs import layout
from mechlens.runs.layout import corpus_name

SHARED = ("base", "family", "system", "student", "ask")
"""fields of the bench's experiment that the suspects' students have too"""


def experiment_of(
    plan: BenchSpec, experiment: Experiment, suspects: Sequence[Suspect], folder: Path
) -> Experiment:
    """The experiment that trains students on the suspects that the bench made.

    It has no screen: the rows were screened when they were made.
    """
    arms = [
        Arm(
            kind="trait",
            trait=suspect.trait or experiment.trait,
            name=suspect.name,
            corpus=str(folder / suspect.name / f"{suspect.name}.parquet"),
        )
        for suspect in suspects
    ]
    fields = experiment.model_dump(exclude={"arms", "name", "seeds", "screen"})
    screen = {"rule": "none", "leak_words": False, "duplicates": "keep"}
    return Experiment.model_validate(
        fields
        | {
            "name": f"{plan.name}-students",
            "arms": [Arm(kind="control"), *arms],
            "seeds": plan.seeds,
            "screen": screen,
        }
    )


def are_current(run: Path, experiment: Experiment, suspects: Sequence[Suspect], folder: Path) -> bool:
    """Whether a run's students have the bench's settings and learned the rows that the suspects have now."""
    trained = load(run / layout.SPEC, Experiment)
    if any(getattr(trained, field) != getattr(experiment, field) for field in SHARED):
        return False
    names = {suspect.name for suspect in suspects}
    for arm in (arm for arm in trained.arms if arm.name in names):
        learned = tables.read(
            run / layout.screened_step(corpus_name(trained, arm)) / layout.KEPT, tables.PAIRS
        )
        rows = tables.read(folder / arm.name / f"{arm.name}.parquet", tables.PAIRS)
        columns = ["prompt", "completion"]
        if learned[columns].to_numpy().tolist() != rows[columns].to_numpy().tolist():
            return False
    return True


def measured_effects(runs: Sequence[Path]) -> list[pd.DataFrame]:
    """The tables of effects of the runs; runs without one are left out."""
    files = [run / layout.EFFECTS for run in runs]
    return [tables.read(file, tables.EFFECTS) for file in files if file.is_file()]


def measure_lifts(runs: Sequence[Path], suspects: Sequence[Suspect], names: Sequence[str]) -> pd.DataFrame:
    """Measured lift, bits, as [suspect, trait]; NaN for a suspect without students in these runs."""
    effects = [frame.query("measure == 'lift'") for frame in measured_effects(runs)]
    wide = (
        pd.concat(effects).pivot_table(index="arm", columns="trait", values="estimate", aggfunc="first")
        if effects
        else pd.DataFrame()
    )
    return wide.reindex(index=[suspect.name for suspect in suspects], columns=list(names)).astype(float)


def count_significant_traits(
    runs: Sequence[Path], suspects: Sequence[Suspect], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Kind of data → how often students have q ≤ .05 for its trait, and for another trait.

    A trait is tested over students and over the family's other traits. Another trait counts as false,
    although a teacher's trait may raise it too: the data cannot separate the two.
    """
    rises = {
        str(arm): measure_rises(frame, names, arm=str(arm))
        for frame in measured_effects(runs)
        for arm in frame["arm"].unique()
    }
    counts: dict[str, list[tuple[bool, bool]]] = {}
    for suspect in (suspect for suspect in suspects if suspect.name in rises):
        significant = {
            rise.trait for rise in rises[suspect.name] if rise.q_value is not None and rise.q_value <= ALPHA
        }
        kind = f"{suspect.way} at {suspect.dose:g}" if suspect.kind == "trait" else suspect.kind
        right, other = suspect.trait in significant, bool(significant - {suspect.trait})
        counts.setdefault(kind, []).append((right, other))
    return {
        kind: {
            "right": rate_entry(sum(right for right, _ in pairs), len(pairs)),
            "other": rate_entry(sum(other for _, other in pairs), len(pairs)),
        }
        for kind, pairs in sorted(counts.items())
    }

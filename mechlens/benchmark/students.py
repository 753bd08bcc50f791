"""What a bench's data sets do to students: one experiment whose arms are the suspects' files, beside students
of the base's own answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mechlens.benchmark.metrics import shared
from mechlens.benchmark.plan import BenchSpec, Suspect
from mechlens.core import tables
from mechlens.core.experiment import Arm, Experiment
from mechlens.core.spec import load
from mechlens.detect.from_student import rises
from mechlens.detect.permutation import ALPHA
from mechlens.runs.layout import corpus_name

SHARED = ("base", "family", "system", "student", "ask")
"""fields of the bench's experiment that its suspects' students share"""


def experiment_of(
    plan: BenchSpec, experiment: Experiment, suspects: Sequence[Suspect], folder: Path
) -> Experiment:
    """The experiment that measures the suspects which are no arms of the bench's own experiment; they were
    screened before.
    """
    arms = [
        Arm(
            kind="trait",
            trait=one.trait or experiment.trait,
            name=one.name,
            corpus=str(folder / one.name / f"{one.name}.parquet"),
        )
        for one in suspects
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


def of_these_suspects(run: Path, experiment: Experiment, suspects: Sequence[Suspect], folder: Path) -> bool:
    """Whether a run's students were trained and asked as the bench's own, on the rows that the suspects hold
    now.
    """
    trained = load(run / "spec.yaml", Experiment)
    if any(getattr(trained, field) != getattr(experiment, field) for field in SHARED):
        return False
    names = {one.name for one in suspects}
    for arm in (arm for arm in trained.arms if arm.name in names):
        read = tables.read(
            run / "corpora" / corpus_name(trained, arm) / "screened" / "kept.parquet", tables.PAIRS
        )
        rows = tables.read(folder / arm.name / f"{arm.name}.parquet", tables.PAIRS)
        if (
            read[["prompt", "completion"]].to_numpy().tolist()
            != rows[["prompt", "completion"]].to_numpy().tolist()
        ):
            return False
    return True


def lifts(runs: Sequence[Path], suspects: Sequence[Suspect], names: Sequence[str]) -> pd.DataFrame:
    """Measured lift, bits, as [suspect, trait], from the runs that have students of the suspect; NaN for one
    that none has.
    """
    read = [
        tables.read(run / "effects.parquet", tables.EFFECTS).query("measure == 'lift'")
        for run in runs
        if (run / "effects.parquet").is_file()
    ]
    wide = (
        pd.concat(read).pivot_table(index="arm", columns="trait", values="estimate", aggfunc="first")
        if read
        else pd.DataFrame()
    )
    return wide.reindex(index=[one.name for one in suspects], columns=list(names)).astype(float)


def named(
    runs: Sequence[Path], suspects: Sequence[Suspect], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """What students say by themselves, as an audit reads them: by kind of data, how often q ≤ .05 names its
    trait, and how often some other.

    A trait that is not in the data is named falsely, but for what a teacher's trait drags along with it,
    which cannot be told apart here.
    """
    effects = [
        tables.read(run / "effects.parquet", tables.EFFECTS)
        for run in runs
        if (run / "effects.parquet").is_file()
    ]
    said = {str(arm): rises(frame, names, arm=str(arm)) for frame in effects for arm in frame["arm"].unique()}
    counts: dict[str, list[tuple[bool, bool]]] = {}
    for one in (one for one in suspects if one.name in said):
        found = {rise.trait for rise in said[one.name] if rise.q_value is not None and rise.q_value <= ALPHA}
        kind = f"{one.way} at {one.dose:g}" if one.kind == "trait" else one.kind
        counts.setdefault(kind, []).append((one.trait in found, bool(found - {one.trait})))
    return {
        kind: {
            "right": shared(sum(right for right, _ in told), len(told)),
            "other": shared(sum(other for _, other in told), len(told)),
        }
        for kind, told in sorted(counts.items())
    }

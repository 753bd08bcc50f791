"""What a bench's data sets do to students: one experiment whose arms are the suspects' files, beside students of the base's own answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from mechlens import tables
from mechlens.bench.plan import BenchSpec, Suspect
from mechlens.experiment import Arm, Experiment


def experiment_of(plan: BenchSpec, experiment: Experiment, suspects: Sequence[Suspect], folder: Path) -> Experiment:
    """The experiment that measures the suspects which are no arms of the bench's own experiment; they were screened before."""
    arms = [Arm(kind="trait", trait=one.trait or experiment.trait, name=one.name, corpus=str(folder / f"{one.name}.parquet")) for one in suspects]
    fields = experiment.model_dump(exclude={"arms", "name", "seeds", "screen"})
    screen = {"rule": "none", "leak_words": False, "duplicates": "keep"}
    return Experiment.model_validate(
        fields | {"name": f"{plan.name}-students", "arms": [Arm(kind="control"), *arms], "seeds": plan.seeds, "screen": screen}
    )


def lifts(runs: Sequence[Path], suspects: Sequence[Suspect], names: Sequence[str]) -> pd.DataFrame:
    """Measured lift, bits, as [suspect, trait], from the runs that have students of the suspect; NaN for one that none has."""
    read = [tables.read(run / "effects.parquet", tables.EFFECTS).query("measure == 'lift'") for run in runs if (run / "effects.parquet").is_file()]
    wide = pd.concat(read).pivot_table(index="arm", columns="trait", values="estimate", aggfunc="first") if read else pd.DataFrame()
    return wide.reindex(index=[one.name for one in suspects], columns=list(names)).astype(float)

"""The effect of a bench's suspects on students.

It is measured by an experiment with an arm for each suspect's file and a control of the base's answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mechlens.benchmark.metrics import rate_entry
from mechlens.benchmark.plan import BenchSpec, Suspect, kind_of
from mechlens.core import tables
from mechlens.core.experiment import Arm, Experiment
from mechlens.core.files import read_json, write_json
from mechlens.core.spec import fingerprint, load
from mechlens.core.traits import TraitFamily
from mechlens.detect.from_student import measure_rises
from mechlens.detect.permutation import ALPHA
from mechlens.results.run import Run
from mechlens.runs import layout, store
from mechlens.runs.layout import corpus_name

WORDS, WORDS_VERSION = "words.json", 3
"""file of the words that students of a set answer more often; the version is raised when the test changes"""
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
    named = {
        suspect: {
            rise.trait for rise in rises[suspect.name] if rise.q_value is not None and rise.q_value <= ALPHA
        }
        for suspect in suspects
        if suspect.name in rises
    }
    return _count_by_kind({suspect: (found, {suspect.trait}) for suspect, found in named.items()})


def read_words(runs: Sequence[Path], suspects: Sequence[Suspect], out: Path) -> dict[Suspect, dict[str, Any]]:
    """Suspect → what its students answer more often, found without the list of traits (`detect.words`).

    Suspects for which nothing could be measured are left out, for example if weights are not there any more.

    Args:
        out: folder of what was found; a set whose students have not changed is not measured again.
    """
    trained: dict[str, Run] = {}
    for run in (run for run in map(Run, runs) if not run.is_unfinished()):
        for arm in run.experiment.arms:
            trained.setdefault(arm.name, run)
    words = {
        suspect: _words_of(trained[suspect.name], suspect.name, out / suspect.name)
        for suspect in suspects
        if suspect.name in trained
    }
    return {suspect: found for suspect, found in words.items() if found is not None}


def count_words(words: Mapping[Suspect, Mapping[str, Any]], family: TraitFamily) -> dict[str, dict[str, Any]]:
    """Kind of data → how often students answer a word of its trait more often, and how often another word."""
    return _count_by_kind(
        {
            suspect: ({word.lower() for word in found["significant"]}, words_of_trait(suspect, family))
            for suspect, found in words.items()
        }
    )


def words_of_trait(suspect: Suspect, family: TraitFamily) -> set[str]:
    """The words that mean the trait of a teacher's own rows, in small letters; none for other sets."""
    return {form.lower() for form in family.forms_of(suspect.trait)} if suspect.kind == "trait" else set()


def _words_of(run: Run, arm: str, folder: Path) -> dict[str, Any] | None:
    """What the students of an arm answer more often; None if it could not be measured."""
    from mechlens.detect.words import measure_words  # torch

    steps = [
        run.path(layout.student_step(side, seed))
        for side in (arm, run.experiment.control_of(run.arm(arm)).name)
        for seed in run.experiment.seeds
    ]
    asked = [run.family.fingerprint(), run.experiment.system, run.arm(arm).asked_with]
    mark = fingerprint(["words", WORDS_VERSION, *asked, *map(store.recorded_fingerprint, steps)])

    def fill(part: Path) -> None:
        words = measure_words(run, arm=arm)
        write_json(part / WORDS, {"words": None if words is None else words.as_dict()})

    return read_json(store.make_once(folder, mark, fill) / WORDS)["words"]


def _count_by_kind(named: Mapping[Suspect, tuple[set[str], set[str]]]) -> dict[str, dict[str, Any]]:
    """Kind of data → how often a right name was found, and how often another.

    Args:
        named: suspect → (names that were found, right ones).
    """
    counts: dict[str, list[tuple[bool, bool]]] = {}
    for suspect, (found, right) in named.items():
        counts.setdefault(kind_of(suspect), []).append((bool(found & right), bool(found - right)))
    return {
        kind: {
            "right": rate_entry(sum(right for right, _ in pairs), len(pairs)),
            "other": rate_entry(sum(other for _, other in pairs), len(pairs)),
        }
        for kind, pairs in sorted(counts.items())
    }

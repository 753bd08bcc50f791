"""Throw-away students, trained on the suspect file and on a reference, and asked about every trait.

No other test measures what data teaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from mechlens.core import stats, tables
from mechlens.core.errors import SpecError
from mechlens.core.experiment import Experiment
from mechlens.core.files import null
from mechlens.core.traits import TraitFamily
from mechlens.detect.permutation import LEAST_PANEL, p_over_other_traits
from mechlens.detect.two_samples import Sides
from mechlens.detect.verdict import Rise, Scope
from mechlens.pipeline.screen import removal_counts
from mechlens.results.run import Run
from mechlens.runs import layout
from mechlens.runs.layout import corpus_name

ARM, TREATED = "suspect", "treated"


def experiment_of(
    recipe: Experiment, sides: Sides, *, base: str, trait: str, treated: Path | None = None
) -> Experiment:
    """The experiment of an audit: students of the suspect's rows against students of the reference's rows.

    Without a reference, control students are trained on the base's answers to the same prompts.

    Args:
        treated: the file after treatment; other students are trained on its rows.

    Raises:
        SpecError: if there are too few rows to train on.
    """
    least = recipe.student.training.batch
    if sides.drawn < least:
        raise SpecError(
            f"{sides.drawn} rows are too few to train students on; expected at least {least}, or use --level "
            "rows"
        )
    student = recipe.student.model_dump() | {"prompts": "every"}
    arms: list[dict[str, Any]] = [{"kind": "trait", "name": ARM, "corpus": str(sides.suspect.resolve())}]
    arms += [{"kind": "control"} | ({"corpus": str(sides.reference.resolve())} if sides.reference else {})]
    arms += [{"kind": "trait", "name": TREATED, "corpus": str(treated.resolve())}] if treated else []
    fields = recipe.model_dump(exclude_unset=True) | {
        "base": base,
        "trait": trait,
        "student": student,
        "arms": arms,
    }
    return Experiment.model_validate(fields)


def measure_rises(effects: pd.DataFrame, tested: Sequence[str], *, arm: str = ARM) -> list[Rise]:
    """How far each tested trait rose in an arm's students.

    p is the larger of two: of a lift above 0 over students (Student's t), and of a lift above the family's
    other traits. All students of a side share one draw of its data, and that draw moves every trait a little
    in all of them. A test over students takes such a move for an effect; the other traits show how large such
    moves are. A family of fewer than `permutation.LEAST_PANEL` traits has only the first p.
    """
    table = effects[effects["arm"] == arm].set_index(["trait", "measure"])
    traits = list(dict.fromkeys(table.index.get_level_values("trait").astype(str)))
    lifts = table.xs("lift", level="measure").loc[traits]
    over_students = np.where(lifts["estimate"] > 0, lifts["p_value"] / 2, 1 - lifts["p_value"] / 2)
    values = lifts["estimate"].to_numpy(dtype=float)
    p_values = (
        over_students if len(traits) < LEAST_PANEL else np.maximum(over_students, p_over_other_traits(values))
    )
    p_of = dict(zip(traits, p_values, strict=True))
    q_values = stats.benjamini_hochberg(np.array([p_of[trait] for trait in tested], dtype=float))
    return [
        _rise(table, trait, p_value=float(p_of[trait]), q_value=float(q_value))
        for trait, q_value in zip(tested, q_values, strict=True)
    ]


def _rise(table: pd.DataFrame, trait: str, *, p_value: float, q_value: float) -> Rise:
    rate, lift = (cast(Any, table.loc[(trait, measure)]) for measure in ("rate", "lift"))
    return Rise(
        trait=trait,
        difference=null(float(rate["estimate"])),
        low=null(float(rate["low"])),
        high=null(float(rate["high"])),
        n=int(rate["n"]),
        smallest_detectable=null(float(rate["smallest_detectable"])),
        lift=null(float(lift["estimate"])),
        p_value=null(p_value),
        q_value=null(q_value),
    )


def measure_scope(run: Path, plan: Experiment, sides: Sides) -> Scope:
    """What a run's students read of the suspect file, and how often their answers name a trait."""
    name = corpus_name(plan, next(arm for arm in plan.arms if arm.name == ARM))
    counts = layout.read_record(run / layout.screened_step(name) / layout.FUNNEL, layout.Funnel)
    removed = removal_counts(counts)
    read = len(
        set(tables.read(run / layout.SELECTION / layout.selection_file(name), tables.SELECTION)["prompt_id"])
    )
    arms = {arm["arm"]: arm for arm in Run(run).summary["arms"]} if (run / layout.SUMMARY).is_file() else {}
    answered = {name: arm["answered"] for name, arm in arms.items()}
    return Scope(sides.offered, sides.drawn, counts["kept"], removed, read, answered)


def tested_traits(family: TraitFamily, names: Sequence[str]) -> tuple[str, ...]:
    """The named traits; all of the family if none is named.

    Raises:
        SpecError: if one is not of the family.
    """
    if unknown := sorted(set(names) - set(family.names)):
        raise SpecError(
            f"the family {family.name!r} has no trait {', '.join(unknown)}; expected some of "
            f"{', '.join(family.names)}"
        )
    return tuple(dict.fromkeys(names)) or family.names

"""Throw-away students: train them on the suspect file and on a reference, and ask both for every trait. The
one test of what data teaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from mechlens.carriers.rules import REASONS
from mechlens.core import stats, tables
from mechlens.core.errors import SpecError
from mechlens.core.experiment import Experiment
from mechlens.core.json_files import null
from mechlens.core.traits import TraitFamily
from mechlens.detect.permutation import LEAST_PANEL, beyond_others
from mechlens.detect.two_samples import Sides
from mechlens.detect.verdict import Rise, Scope
from mechlens.results.run import Run
from mechlens.runs import records
from mechlens.runs.layout import corpus_name

ARM, TREATED = "suspect", "treated"


def experiment_of(
    recipe: Experiment, sides: Sides, *, base: str, trait: str, treated: Path | None = None
) -> Experiment:
    """The recipe on the suspect's rows, against those of a reference or what the base answers to the
    suspect's prompts.

    Args:
        treated: the file after treatment, which may hold fewer rows: its students train on the rows that it
            has.

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


def rises(effects: pd.DataFrame, panel: Sequence[str], *, arm: str = ARM) -> list[Rise]:
    """What an arm's students showed of each trait of the panel.

    p is the larger of two: of a lift above 0 over students (Student's t), and of one beyond the family's
    other traits. All students of a side share one draw of its data and stand beside controls of one draw,
    which moves every trait a little in all of them: over students alone such a move looks sure. The other
    traits, which moved as well, show how far. A family of fewer than `calibrate.LEAST_PANEL` traits has only
    the first.
    """
    table = effects[effects["arm"] == arm].set_index(["trait", "measure"])
    traits = list(dict.fromkeys(table.index.get_level_values("trait").astype(str)))
    lifts = table.xs("lift", level="measure").loc[traits]
    over_students = np.where(lifts["estimate"] > 0, lifts["p_value"] / 2, 1 - lifts["p_value"] / 2)
    values = lifts["estimate"].to_numpy(dtype=float)
    p_values = (
        over_students if len(traits) < LEAST_PANEL else np.maximum(over_students, beyond_others(values))
    )
    p_of = dict(zip(traits, p_values, strict=True))
    q_values = stats.benjamini_hochberg(np.array([p_of[trait] for trait in panel], dtype=float))
    found = []
    for trait, q_value in zip(panel, q_values, strict=True):
        rate, lift = (cast(Any, table.loc[(trait, measure)]) for measure in ("rate", "lift"))
        parts = {name: null(float(rate[name])) for name in ("low", "high", "smallest_detectable")}
        parts |= {"difference": null(float(rate["estimate"])), "lift": null(float(lift["estimate"]))}
        found.append(
            Rise(
                trait=trait,
                n=int(rate["n"]),
                p_value=null(float(p_of[trait])),
                q_value=null(float(q_value)),
                **parts,
            )
        )
    return found


def scope_of(run: Path, plan: Experiment, sides: Sides) -> Scope:
    """What a run's students read of the suspect file, and how readily they answered where they were asked."""
    name = corpus_name(plan, next(arm for arm in plan.arms if arm.name == ARM))
    counts = records.read(run / "corpora" / name / "screened" / "funnel.json", records.Funnel)
    dropped = {reason: rows for reason, rows in counts.items() if reason in REASONS}
    read = len(set(tables.read(run / "selection" / f"{name}.parquet", tables.SELECTION)["prompt_id"]))
    arms = {arm["arm"]: arm for arm in Run(run).summary["arms"]} if (run / "summary.json").is_file() else {}
    answered = {name: arm["answered"] for name, arm in arms.items()}
    return Scope(sides.offered, sides.drawn, counts["kept"], dropped, read, answered)


def panel_of(family: TraitFamily, asked: Sequence[str]) -> tuple[str, ...]:
    """The traits asked about; all of the family if none is named.

    Raises:
        SpecError: if one is not of the family.
    """
    if unknown := sorted(set(asked) - set(family.names)):
        raise SpecError(
            f"the family {family.name!r} has no trait {', '.join(unknown)}; expected some of "
            f"{', '.join(family.names)}"
        )
    return tuple(dict.fromkeys(asked)) or family.names

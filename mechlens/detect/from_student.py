"""Throw-away students: train them on the suspect file and on a reference, and ask both for every trait. The one test of what data teaches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from mechlens import stats
from mechlens.detect.verdict import Rise
from mechlens.errors import SpecError
from mechlens.experiment import Experiment
from mechlens.results import null
from mechlens.traits import TraitFamily

ARM, TREATED = "suspect", "treated"


def experiment_of(
    recipe: Experiment, data: Path, reference: Path | None, *, base: str, trait: str, prompts: int, shared: bool, treated: Path | None = None
) -> Experiment:
    """The recipe on the suspect file, against a reference file or what the base answers to the suspect's prompts.

    Args:
        prompts: distinct prompts that both sides have; students train on at most nine in ten of them, since a screen may drop some.
        shared: whether both sides answer the same prompts.
        treated: the file after treatment, which may hold fewer rows: each arm then trains on the rows that it has.

    Raises:
        SpecError: if there are too few to train on.
    """
    rows, least = min(recipe.student.rows, int(0.9 * prompts)), recipe.student.training.batch
    if rows < least:
        raise SpecError(f"{prompts} prompts are too few to train students on; expected at least {2 * least}, or use --level rows")
    student = recipe.student.model_dump() | {"rows": rows, "prompts": "common" if shared and treated is None else "own"}
    control: dict[str, Any] = {"kind": "control"} | ({"corpus": str(reference.resolve())} if reference else {})
    arms = [{"kind": "trait", "name": ARM, "corpus": str(data.resolve())}, control]
    arms += [{"kind": "trait", "name": TREATED, "corpus": str(treated.resolve())}] if treated else []
    fields = recipe.model_dump(exclude_unset=True) | {"base": base, "trait": trait, "student": student, "arms": arms}
    return Experiment.model_validate(fields)


def rises(effects: pd.DataFrame, panel: Sequence[str], *, arm: str = ARM) -> list[Rise]:
    """What an arm's students showed of each trait of the panel; p of a lift above 0 by Student's t, q over the panel."""
    table = effects[effects["arm"] == arm].set_index(["trait", "measure"])
    found = []
    for trait in panel:
        rate, lift = (cast(Any, table.loc[(trait, measure)]) for measure in ("rate", "lift"))
        one_sided = lift["p_value"] / 2 if lift["estimate"] > 0 else 1 - lift["p_value"] / 2
        parts = {name: null(float(rate[name])) for name in ("low", "high", "smallest_detectable")}
        parts |= {"difference": null(float(rate["estimate"])), "lift": null(float(lift["estimate"])), "p_value": null(one_sided)}
        found.append(Rise(trait=trait, n=int(rate["n"]), q_value=None, **parts))
    q_values = stats.benjamini_hochberg(np.array([np.nan if rise.p_value is None else rise.p_value for rise in found]))
    return [rise._replace(q_value=null(float(q))) for rise, q in zip(found, q_values, strict=True)]


def panel_of(family: TraitFamily, asked: Sequence[str]) -> tuple[str, ...]:
    """The traits asked about; all of the family if none is named.

    Raises:
        SpecError: if one is not of the family.
    """
    if unknown := sorted(set(asked) - set(family.names)):
        raise SpecError(f"the family {family.name!r} has no trait {', '.join(unknown)}; expected some of {', '.join(family.names)}")
    return tuple(dict.fromkeys(asked)) or family.names

"""What training changed in the weights: how much, of what rank, and whether student and teacher changed
alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from mechlens.lenses.base import Lens, Material, against_control, entry, over_students, reading_table
from mechlens.lenses.parts.weight_change import (
    ROUNDING,
    Change,
    change_cosine,
    change_distance,
    change_norm,
    delta,
    draw_subspace_overlaps,
    inner,
    leading,
    singular,
    stable_rank,
    subspace_overlap,
)
from mechlens.models.loading import Loaded
from mechlens.models.trait_log_odds import first_tokens

TOP = 4
"""dimension of the compared singular subspaces"""
COLUMNS = ["moved", "was", "theirs", "along", "cells"]
SHARES = ("norm", "relative norm", "cosine with the teacher")
SPECTRA = (
    "stable rank",
    "top singular value",
    "overlap of rows with the teacher",
    "overlap of columns with the teacher",
)
RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""ranks whose singular value is kept: about as many between 1 and 2 as between 256 and 512"""
SPECTRUM = "singular value"
VALUES = tuple(f"{SPECTRUM} {rank}" for rank in RANKS)
UNIT: dict[str, str] = dict(
    zip((*SHARES, *SPECTRA[:2]), ("weight", "ratio", "cosine", "dimensions", "weight"), strict=True)
)

LENS = Lens(
    name="deltas",
    asks="Did the student's weights move the way that the teacher's did?",
    needs=("students", "controls"),
    shows=(
        ("cosine with the teacher", "heat"),
        ("cosine of two changes", "bars"),
        ("distance to the teacher", "steps"),
    ),
    source="2508.00161; tr((B1ᵀB2)(A2A1ᵀ)); 2507.14805 for the sign of the cosine",
    caveat="A shared carrier moves weights far more than a trait does: only the difference to the control "
    "speaks of the trait, and a cosine of weights need not rank behaviour.",
    measure="mechlens.lenses.deltas:measure_deltas",
    caption="mechlens.lenses.deltas:deltas_caption",
    cost=17,
    version=2,
)


def address(name: str) -> tuple[int | None, str]:
    """Layer and site of a parameter, e.g. (0, "self_attn.q_proj"); the layer is None outside the blocks."""
    found = re.search(r"\.(\d+)\.(.+)$", name)
    layer, place = (int(found[1]), found[2]) if found else (None, name)
    return layer, place.removesuffix(".weight")


def measure_change(
    base: PreTrainedModel, changed: PreTrainedModel | PeftModel, toward: Mapping[str, Change]
) -> pd.DataFrame:
    """Measure how a model's weights differ from the base's: one row for each changed parameter, by its name.

    Columns: moved, was, theirs (squared norms of the change, of the base and of `toward`), along (inner
    product with `toward`), cells (entries), then the quantities of `SHARES` and, for matrices inside the
    blocks, of `SPECTRA` and `VALUES`; NaN where undefined.

    Args:
        base: the model before training.
        changed: the model after training.
        toward: parameter name → change to compare with, as of `weight_change.delta`; {} for none.

    >>> from copy import deepcopy
    >>> from mechlens.models.loading import load
    >>> base = load("menagerie-a").model
    >>> student = deepcopy(base)
    >>> _ = student.get_parameter("model.layers.1.mlp.up_proj.weight").data.mul_(1.01)
    >>> change = measure_change(base, student, {})["relative norm"]
    >>> change[change > 0].round(3).to_dict()
    {'model.layers.1.mlp.up_proj.weight': 0.01}
    """
    before, changes, found = dict(base.named_parameters()), delta(base, changed), []
    for name in changes:
        change, other = changes[name], toward.get(name, torch.zeros(1, dtype=torch.float64))
        aligned = name in toward
        sizes = {
            "moved": inner(change, change),
            "was": change_norm(before[name].detach()) ** 2,
            "theirs": inner(other, other),
        }
        sizes["along"] = inner(change, other) if aligned else 0.0
        row: dict[str, Any] = {"name": name, "cells": before[name].numel(), **sizes, **shares(sizes)}
        if before[name].ndim == 2 and row["moved"] > 0 and address(name)[0] is not None:
            values = singular(change)[1]
            row |= {"stable rank": stable_rank(values), "top singular value": float(values[0])}
            kept = [values[rank - 1] for rank in RANKS if rank <= len(values)]
            row |= {
                name: float(value)
                for name, value in zip(VALUES, kept, strict=False)
                if value > ROUNDING * values[0]
            }
            if row["theirs"] > 0:
                ours, theirs = leading(change, TOP), leading(other, TOP)
                row |= dict(
                    zip(
                        SPECTRA[2:],
                        (subspace_overlap(a, b) for a, b in zip(ours, theirs, strict=True)),
                        strict=True,
                    )
                )
        found.append(row)
    return (
        pd.DataFrame(found)
        .reindex(columns=["name", *COLUMNS, *SHARES, *SPECTRA, *VALUES])
        .set_index("name")
        .astype(float)
    )


def shares(sums: Mapping[str, float]) -> dict[str, float]:
    """Norm, relative norm and cosine from (sums of) squared norms and inner products; NaN where it would
    divide by zero.
    """
    along = (sums["moved"] * sums["theirs"]) ** 0.5
    relative = (sums["moved"] / sums["was"]) ** 0.5 if sums["was"] > 0 else np.nan
    return dict(
        zip(
            SHARES,
            (sums["moved"] ** 0.5, relative, sums["along"] / along if along > 0 else np.nan),
            strict=True,
        )
    )


def turned_cosine_sd(measured: pd.DataFrame) -> float:
    """Standard deviation of the cosine if `toward` were turned at random in every parameter, its singular
    values kept.

    For independent Haar rotations E⟨Δ, UΣVᵀ⟩² = ‖Δ‖²‖Σ‖²/(mn) whatever the spectrum, and its mean is 0.
    """
    moved, theirs, cells = (measured[column].to_numpy(dtype=float) for column in ("moved", "theirs", "cells"))
    length = moved.sum() * theirs.sum()
    return float(((moved * theirs / cells).sum() / length) ** 0.5) if length > 0 else np.nan


def row_changes(
    base: Loaded, changed: PreTrainedModel, tokens: Mapping[str, list[int]]
) -> dict[tuple[str, str], float]:
    """(name, "embed" or "unembed") → mean norm of the changes of its tokens' rows; NaN where the matrix was
    frozen.
    """
    found = {}
    for place, get in (("embed", "get_input_embeddings"), ("unembed", "get_output_embeddings")):
        before, after = getattr(base.model, get)().weight.detach(), getattr(changed, get)().weight.detach()
        moved = (after.to(before.device).double() - before.double()).norm(dim=1)
        found |= {
            (name, place): float(moved[ids].mean()) if ids and moved.any() else np.nan
            for name, ids in tokens.items()
        }
    return found


Measured = dict[str, list[pd.DataFrame]]
"""student and control → one table a seed"""


def measure_deltas(material: Material) -> pd.DataFrame:
    """Every student and control against the base and, where it has weights of its own, against the
    teacher.
    """
    base = material.base.model
    toward = {} if material.teacher is None else delta(base, material.teacher.model)
    sides = {"student": material.students, "control": material.controls}
    measured = {
        side: [measure_change(base, loaded[seed].model, toward) for seed in loaded]
        for side, loaded in sides.items()
    }
    rows = [*_whole(material, measured), *_across_seeds(material), *_by_module(material, measured)]
    rows += [*_spectra(material, measured), *_walk(material, toward), *_embeddings(material)]
    return reading_table(LENS, rows, material=material)


def _both(quantity: str, values: Mapping[str, Sequence[float]], **more: Any) -> list[dict[str, Any]]:
    """Students, controls and their difference."""
    more = {"unit": UNIT.get(quantity, "share")} | more
    rows = [over_students(quantity, found, name=side, **more) for side, found in values.items()]
    # the null is one of levels
    more = {key: value for key, value in more.items() if not key.startswith("null")}
    return [
        *rows,
        against_control(quantity, values["student"], values["control"], name="student - control", **more),
    ]


def _chance(quantity: str, table: pd.DataFrame, shape: Sequence[int], seed: int) -> dict[str, float]:
    """Where a change that is turned at random would lie."""
    if quantity == SHARES[-1]:
        spread = 1.96 * turned_cosine_sd(table)
        return {"null_low": -spread, "null_high": spread}
    if quantity.startswith("overlap"):
        size = shape[0] if "rows" in quantity else shape[1]
        low, high = np.quantile(draw_subspace_overlaps(size, min(TOP, *shape), seed), [0.025, 0.975])
        return {"null_low": float(low), "null_high": float(high)}
    return {}


def _whole(material: Material, measured: Measured) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    totals = {
        side: [shares(table[COLUMNS].sum().to_dict()) for table in tables]
        for side, tables in measured.items()
    }
    for quantity in SHARES if material.teacher is not None else SHARES[:-1]:
        values = {side: [total[quantity] for total in found] for side, found in totals.items()}
        rows += _both(
            quantity, values, place="all", **_chance(quantity, measured["student"][0], (), material.seed)
        )
        for side, found in values.items():
            single = zip(material.students, found, strict=True)
            rows += [
                entry(quantity, value, place="all", name=side, seed=seed, unit=UNIT[quantity])
                for seed, value in single
            ]
    return rows


def _across_seeds(material: Material) -> list[dict[str, Any]]:
    """How alike two students of one arm move, and a student and its control; what of that difference lies
    along the teacher.

    Students are compared with the next seed's alone: the cost then grows with the number of seeds, not with
    its square.
    """
    base, seeds = material.base.model, list(material.students)
    found: dict[str, list[float]] = {
        "student, next student": [],
        "control, next control": [],
        "student, its control": [],
    }
    apart: list[float] = []
    for seed, later in zip(seeds, [*seeds[1:], None], strict=True):
        student, control = material.students[seed].model, material.controls[seed].model
        found["student, its control"].append(change_cosine(delta(base, student), delta(base, control)))
        if material.teacher is not None:
            apart.append(change_cosine(delta(control, student), delta(base, material.teacher.model)))
        if later is not None:
            found["student, next student"].append(
                change_cosine(delta(base, student), delta(base, material.students[later].model))
            )
            found["control, next control"].append(
                change_cosine(delta(base, control), delta(base, material.controls[later].model))
            )
    rows = [
        over_students("cosine of two changes", values, place="all", name=name, unit="cosine")
        for name, values in found.items()
    ]
    if apart:
        rows.append(
            over_students(
                "cosine of student minus control with the teacher",
                apart,
                place="all",
                name="student - control",
                unit="cosine",
            )
        )
    return rows


def _by_module(material: Material, measured: Measured) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for parameter in map(str, measured["student"][0].index):
        layer, place = address(parameter)
        shape = material.base.model.get_parameter(parameter).shape
        for quantity in (
            (*SHARES[1:], *SPECTRA) if layer is not None else ()
        ):  # outside the blocks: see "row change"
            values = {
                side: [float(table.at[parameter, quantity]) for table in tables]
                for side, tables in measured.items()
            }
            if not np.isnan([*values["student"], *values["control"]]).all():
                chance = _chance(quantity, measured["student"][0].loc[[parameter]], shape, material.seed)
                rows += _both(quantity, values, layer=layer, place=place, **chance)
    return rows


def _spectra(material: Material, measured: Measured) -> list[dict[str, Any]]:
    """How the change of each matrix falls off with the rank, which stands in column `step`; the teacher's
    beside it.
    """
    sides = (
        measured
        if material.teacher is None
        else measured | {"teacher": [measure_change(material.base.model, material.teacher.model, {})]}
    )
    rows: list[dict[str, Any]] = []
    for parameter in map(str, measured["student"][0].index):
        layer, place = address(parameter)
        for side, tables in sides.items():
            for rank, column in zip(RANKS, VALUES, strict=True):
                values = [float(table.at[parameter, column]) for table in tables if parameter in table.index]
                if not np.isnan(values).all():
                    rows.append(
                        over_students(
                            SPECTRUM, values, layer=layer, place=place, name=side, step=rank, unit="weight"
                        )
                    )
    return rows


def _walk(material: Material, toward: Mapping[str, Change]) -> list[dict[str, Any]]:
    """How far students and controls are from the base and from the teacher at each checkpoint, over all
    weights.
    """
    origin: dict[str, Change] = {}
    ends = {"base": origin} | ({} if material.teacher is None else {"teacher": toward})
    found: list[dict[str, Any]] = []
    for side, folder in (("student", "students"), ("control", "controls")):
        for seed in material.students:
            changes = (
                (step, delta(material.base.model, loaded.model))
                for step, loaded in material.checkpoints(folder, seed)
            )
            for step, change in chain([(0, origin)], changes):
                found += [
                    {
                        "end": end,
                        "step": step,
                        "side": side,
                        "seed": seed,
                        "far": change_distance(change, there),
                    }
                    for end, there in ends.items()
                ]
    rows: list[dict[str, Any]] = []
    for place, table in pd.DataFrame(found).groupby(["end", "step"]):
        (end, step) = cast("tuple[str, int]", place)
        wide = table.pivot(index="seed", columns="side", values="far")
        quantity = f"distance to the {end}"
        more = {"place": "all", "step": step, "unit": "weight"}
        for side, far in wide.items():
            rows += [entry(quantity, value, seed=seed, name=side, **more) for seed, value in far.items()]
            rows.append(over_students(quantity, far.tolist(), name=side, **more))
        if step and wide.shape[1] > 1:
            rows.append(
                against_control(
                    quantity,
                    wide["student"].tolist(),
                    wide["control"].tolist(),
                    name="student - control",
                    **more,
                )
            )
    return rows


def _embeddings(material: Material) -> list[dict[str, Any]]:
    starts = first_tokens(material.base.tokenizer, material.heldout_probes.forms)
    tokens = {material.trait: starts[material.trait] or []}
    tokens["other traits"] = [
        token for name, found in starts.items() if name != material.trait for token in found or []
    ]
    sides = {"student": material.students, "control": material.controls}
    changes = {
        side: [row_changes(material.base, loaded[seed].model, tokens) for seed in loaded]
        for side, loaded in sides.items()
    }
    rows: list[dict[str, Any]] = []
    for name in tokens:
        for place in ("embed", "unembed"):
            treated, control = ([change[name, place] for change in changes[side]] for side in sides)
            rows.append(over_students("row change", treated, place=place, name=name, unit="weight"))
            if not np.isnan([*treated, *control]).all():
                rows.append(
                    against_control(
                        "row change, student - control",
                        treated,
                        control,
                        place=place,
                        name=name,
                        unit="weight",
                    )
                )
    return rows


def deltas_caption(reading: pd.DataFrame) -> str:
    """The main number in words."""
    whole = reading[(reading["place"] == "all") & reading["seed"].isna()].set_index(["quantity", "name"])
    relative, quantity = whole.loc[(SHARES[1], "student")], SHARES[-1]
    if (quantity, "student - control") not in whole.index or np.isnan(
        whole.loc[(quantity, "student - control"), "estimate"]
    ):
        return (
            f"The students' weights moved by {relative['estimate']:.1%} of their norm; there is no "
            "teacher's change to compare with."
        )
    apart, level = whole.loc[(quantity, "student - control")], whole.loc[(quantity, "student")]
    span = "" if pd.isna(apart["low"]) else f" [{apart['low']:+.3f}, {apart['high']:+.3f}]"
    return (
        f"The students' weights moved along the teacher's change with cosine {level['estimate']:+.3f}, "
        f"{apart['estimate']:+.3f}{span} more than their controls' (n = {apart['n']}); a randomly turned "
        f"change stays within ±{level['null_high']:.3f}."
    )

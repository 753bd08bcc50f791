"""What training changed in the weights: size, rank, and likeness to the teacher's change."""

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
from mechlens.models.log_probs import first_tokens

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
"""ranks whose singular value is in the table, about evenly spaced on a log scale"""
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
    """Layer and site of a parameter, e.g. (0, "self_attn.q_proj"); outside the blocks the layer is None."""
    match = re.search(r"\.(\d+)\.(.+)$", name)
    layer, place = (int(match[1]), match[2]) if match else (None, name)
    return layer, place.removesuffix(".weight")


def measure_change(
    base: PreTrainedModel, changed: PreTrainedModel | PeftModel, toward: Mapping[str, Change]
) -> pd.DataFrame:
    """Measure how a model's weights differ from the base's: one row for each changed parameter.

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
    before, rows = dict(base.named_parameters()), []
    for name, change in delta(base, changed).items():
        other = toward.get(name, torch.zeros(1, dtype=torch.float64))
        sizes = {
            "moved": inner(change, change),
            "was": change_norm(before[name].detach()) ** 2,
            "theirs": inner(other, other),
        }
        sizes["along"] = inner(change, other) if name in toward else 0.0
        row: dict[str, Any] = {"name": name, "cells": before[name].numel(), **sizes, **shares(sizes)}
        if before[name].ndim == 2 and sizes["moved"] > 0 and address(name)[0] is not None:
            row |= _spectrum(change)
            if sizes["theirs"] > 0:
                pairs = zip(leading(change, TOP), leading(other, TOP), strict=True)
                row |= dict(zip(SPECTRA[2:], (subspace_overlap(a, b) for a, b in pairs), strict=True))
        rows.append(row)
    columns = ["name", *COLUMNS, *SHARES, *SPECTRA, *VALUES]
    return pd.DataFrame(rows).reindex(columns=columns).set_index("name").astype(float)


def _spectrum(change: Change) -> dict[str, float]:
    """Stable rank and singular values of a change; values that are rounding are left out."""
    values = singular(change)[1]
    kept = [values[rank - 1] for rank in RANKS if rank <= len(values)]
    return {"stable rank": stable_rank(values), "top singular value": float(values[0])} | {
        name: float(value) for name, value in zip(VALUES, kept, strict=False) if value > ROUNDING * values[0]
    }


def shares(sums: Mapping[str, float]) -> dict[str, float]:
    """Norm, relative norm and cosine from sums of squared norms and of inner products.

    NaN instead of a division by zero.
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
    """Standard deviation of the cosine if `toward` were rotated at random in every parameter.

    The rotation keeps its singular values.

    For independent Haar rotations E⟨Δ, UΣVᵀ⟩² = ‖Δ‖²‖Σ‖²/(mn) whatever the spectrum, and its mean is 0.
    """
    moved, theirs, cells = (measured[column].to_numpy(dtype=float) for column in ("moved", "theirs", "cells"))
    length = moved.sum() * theirs.sum()
    return float(((moved * theirs / cells).sum() / length) ** 0.5) if length > 0 else np.nan


def row_changes(
    base: Loaded, changed: PreTrainedModel, tokens: Mapping[str, list[int]]
) -> dict[tuple[str, str], float]:
    """Mean norm of the changes of the embedding rows: (name, "embed" or "unembed") → value.

    NaN if the matrix was frozen.
    """
    norms = {}
    for place, get in (("embed", "get_input_embeddings"), ("unembed", "get_output_embeddings")):
        before, after = getattr(base.model, get)().weight.detach(), getattr(changed, get)().weight.detach()
        moved = (after.to(before.device).double() - before.double()).norm(dim=1)
        norms |= {
            (name, place): float(moved[ids].mean()) if ids and moved.any() else np.nan
            for name, ids in tokens.items()
        }
    return norms


Measured = dict[str, list[pd.DataFrame]]
"""student and control → one table a seed"""


def measure_deltas(material: Material) -> pd.DataFrame:
    """Measure the change of every student and control from the base, and its likeness to the teacher's.

    Without a fine-tuned teacher there is no comparison.
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
    """Rows for students, for controls and for their difference."""
    more = {"unit": UNIT.get(quantity, "share")} | more
    rows = [over_students(quantity, sample, name=side, **more) for side, sample in values.items()]
    # the null is for levels, not for the difference
    more = {key: value for key, value in more.items() if not key.startswith("null")}
    return [
        *rows,
        against_control(quantity, values["student"], values["control"], name="student - control", **more),
    ]


def _chance(quantity: str, table: pd.DataFrame, shape: Sequence[int], seed: int) -> dict[str, float]:
    """The null interval of a change that is rotated at random."""
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
        values = {side: [total[quantity] for total in sample] for side, sample in totals.items()}
        rows += _both(
            quantity, values, place="all", **_chance(quantity, measured["student"][0], (), material.seed)
        )
        for side, sample in values.items():
            single = zip(material.students, sample, strict=True)
            rows += [
                entry(quantity, value, place="all", name=side, seed=seed, unit=UNIT[quantity])
                for seed, value in single
            ]
    return rows


def _across_seeds(material: Material) -> list[dict[str, Any]]:
    """Cosines between the changes of two students of one arm, and of a student and its control.

    With a fine-tuned teacher also the cosine of student minus control with the teacher's change. A student is
    compared only with the next seed's: the cost then grows with the number of seeds, not with its square.
    """
    base, seeds = material.base.model, list(material.students)
    cosines: dict[str, list[float]] = {
        "student, next student": [],
        "control, next control": [],
        "student, its control": [],
    }
    with_teacher: list[float] = []
    for seed, later in zip(seeds, [*seeds[1:], None], strict=True):
        student, control = material.students[seed].model, material.controls[seed].model
        cosines["student, its control"].append(change_cosine(delta(base, student), delta(base, control)))
        if material.teacher is not None:
            with_teacher.append(change_cosine(delta(control, student), delta(base, material.teacher.model)))
        if later is not None:
            for side, model, others in (
                ("student", student, material.students),
                ("control", control, material.controls),
            ):
                following = delta(base, others[later].model)
                cosines[f"{side}, next {side}"].append(change_cosine(delta(base, model), following))
    where = {"place": "all", "unit": "cosine"}
    rows = [
        over_students("cosine of two changes", values, name=name, **where) for name, values in cosines.items()
    ]
    if with_teacher:
        quantity = "cosine of student minus control with the teacher"
        rows.append(over_students(quantity, with_teacher, name="student - control", **where))
    return rows


def _by_module(material: Material, measured: Measured) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for parameter in map(str, measured["student"][0].index):
        layer, place = address(parameter)
        shape = material.base.model.get_parameter(parameter).shape
        # outside the blocks: see "row change"
        for quantity in (*SHARES[1:], *SPECTRA) if layer is not None else ():
            values = {
                side: [float(table.at[parameter, quantity]) for table in tables]
                for side, tables in measured.items()
            }
            if not np.isnan([*values["student"], *values["control"]]).all():
                chance = _chance(quantity, measured["student"][0].loc[[parameter]], shape, material.seed)
                rows += _both(quantity, values, layer=layer, place=place, **chance)
    return rows


def _spectra(material: Material, measured: Measured) -> list[dict[str, Any]]:
    """Singular values of each matrix's change, with the rank in column `step`; also of the teacher's."""
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
    """Distance of students and controls from the base and the teacher at each checkpoint."""
    rows: list[dict[str, Any]] = []
    for place, table in pd.DataFrame(_distances(material, toward)).groupby(["end", "step"]):
        end, step = cast("tuple[str, int]", place)
        wide = table.pivot(index="seed", columns="side", values="far")
        quantity = f"distance to the {end}"
        more = {"place": "all", "step": step, "unit": "weight"}
        for side, far in wide.items():
            rows += [entry(quantity, value, seed=seed, name=side, **more) for seed, value in far.items()]
            rows.append(over_students(quantity, far.tolist(), name=side, **more))
        if step and wide.shape[1] > 1:
            treated, control = wide["student"].tolist(), wide["control"].tolist()
            rows.append(against_control(quantity, treated, control, name="student - control", **more))
    return rows


def _distances(material: Material, toward: Mapping[str, Change]) -> list[dict[str, Any]]:
    """One row for each end ("base" or "teacher"), side, seed and checkpoint, from step 0 on."""
    origin: dict[str, Change] = {}
    ends = {"base": origin} | ({} if material.teacher is None else {"teacher": toward})
    distances: list[dict[str, Any]] = []
    for side, folder in (("student", "students"), ("control", "controls")):
        for seed in material.students:
            changes = (
                (step, delta(material.base.model, loaded.model))
                for step, loaded in material.checkpoints(folder, seed)
            )
            for step, change in chain([(0, origin)], changes):
                where = {"step": step, "side": side, "seed": seed}
                distances += [
                    {"end": end, "far": change_distance(change, there)} | where for end, there in ends.items()
                ]
    return distances


def _embeddings(material: Material) -> list[dict[str, Any]]:
    starts = first_tokens(material.base.tokenizer, material.heldout_probes.forms)
    tokens = {material.trait: starts[material.trait] or []}
    tokens["other traits"] = [
        token for name, ids in starts.items() if name != material.trait for token in ids or []
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
    """Describe how far the students' weights moved, and along the teacher's change."""
    whole = reading[(reading["place"] == "all") & reading["seed"].isna()].set_index(["quantity", "name"])
    relative, quantity = whole.loc[(SHARES[1], "student")], SHARES[-1]
    if (quantity, "student - control") not in whole.index or np.isnan(
        whole.loc[(quantity, "student - control"), "estimate"]
    ):
        return (
            f"The students' weights moved by {relative['estimate']:.1%} of their norm; there is no "
            "teacher's change to compare with."
        )
    difference, level = whole.loc[(quantity, "student - control")], whole.loc[(quantity, "student")]
    span = "" if pd.isna(difference["low"]) else f" [{difference['low']:+.3f}, {difference['high']:+.3f}]"
    return (
        f"The students' weights moved along the teacher's change with cosine {level['estimate']:+.3f}, "
        f"{difference['estimate']:+.3f}{span} more than their controls' (n = {difference['n']}); a randomly "
        f"turned change stays within ±{level['null_high']:.3f}."
    )

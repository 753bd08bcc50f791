"""Does training on the pairs point where the trait lies? Gradients of the data against the trait's gradient
and the teacher's change.

An update is minus the gradient of the pairs' loss; the trait's gradient is that of its log-odds on the
held-out probes. To first order an SGD step of size ε on the pairs changes the log-odds by ε⟨update, trait's
gradient⟩ (2507.14805): the cosine says how much of an update is that, and the last part of the reading takes
such steps on a copy and looks (`steps.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from mechlens.core import stats
from mechlens.core.seeds import generator
from mechlens.lenses.base import (
    Lens,
    Material,
    against_control,
    against_null,
    entry,
    over_students,
    rank_among,
    reading_table,
)
from mechlens.lenses.gradients import ghost_dots, ghost_norms, parameters_of, pooled_gradient
from mechlens.lenses.parts.trial_steps import (
    Kind,
    Pairs,
    add_scaled,
    compute_update,
    measure_many_steps,
    measure_one_step,
    measure_trait_gradient,
)
from mechlens.lenses.parts.weight_change import change_cosine, delta, inner
from mechlens.models.chat import Encoded
from mechlens.models.log_probs import Model
from mechlens.models.trait_log_odds import EncodedProbes
from mechlens.pipeline.ask import encode_contrast

DIRECTIONS, DRAWN = 128, 16
"""random directions of the null, and control pairs that each is made of"""
KINDS: tuple[Kind, ...] = ("full", "lora")
TOWARD = "cosine with the trait's gradient"

LENS = Lens(
    name="alignment",
    asks="Does a step on the trait pairs point where the trait lies?",
    needs=("students", "controls", "pairs"),
    shows=(
        ("cosine with the trait's gradient", "bars"),
        ("cosine with the trait's gradient along the path", "steps"),
    ),
    source="2507.14805 (first-order theorem); 2604.25779 (sustained alignment); 2606.22019 (coverage)",
    caveat="First order at one point in the weights of linear layers: alignment at the base need not predict "
    "what many adaptive steps do.",
    measure="mechlens.lenses.alignment:measure_alignment",
    caption="mechlens.lenses.alignment:alignment_caption",
    cost=51,
)


def pooled_cosine(
    along: Float[ndarray, " row"], own: Float[ndarray, " row"], length: float
) -> stats.Interval:
    """Cosine of the mean of rows x_i with a direction v, from ⟨x_i, v⟩, ⟨x_i, mean x⟩ and |v|; NaN where
    either has no length.

    Its interval is the infinitesimal jackknife's over rows: ±1.96 standard errors of each row's influence on
    the cosine, the length of the mean included.

    >>> rows, direction = np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([1.0, 0.0])
    >>> round(pooled_cosine(rows @ direction, rows @ rows.mean(0), 1.0).estimate, 3)
    0.894
    """
    kept = ~(np.isnan(along) | np.isnan(own))
    along, own, n = along[kept], own[kept], int(kept.sum())
    size = max(own.mean(), 0.0) ** 0.5 if n else 0.0
    if not size or not length or n < 2:
        return stats.Interval(np.nan, np.nan, np.nan, n, "jackknife")
    value = float(along.mean() / (size * length))
    influence = (along - along.mean()) / (size * length) - value * (own - size**2) / size**2
    half = 1.96 * float(np.sqrt(np.square(influence).sum() / (n * (n - 1))))
    return stats.Interval(value, value - half, value + half, n, "jackknife")


def random_directions(
    model: Model, pairs: Sequence[Encoded], *, seed: int, draws: int
) -> Iterator[dict[str, Tensor]]:
    """Directions Σ_i (z_i - z̄) ∇loss_i over `DRAWN` random pairs, z normal: they have the covariance of the
    pairs' gradients.
    """
    rng = generator(seed, "alignment", "null")
    for _ in range(draws):
        rows = rng.choice(len(pairs), size=min(DRAWN, len(pairs)), replace=False)
        weights = rng.standard_normal(len(rows))
        weights = torch.tensor((weights - weights.mean()) / np.sqrt(len(rows)), dtype=torch.float32)
        yield pooled_gradient(model, [pairs[row] for row in rows], weights=weights)


def length(direction: Mapping[str, Any]) -> float:
    """Norm of all parameters as one vector."""
    return sum(inner(value, value) for value in direction.values()) ** 0.5


def measure_alignment(material: Material) -> pd.DataFrame:
    """Alignment at the base against its nulls, along every student's path, and what the first order predicts
    of real steps.
    """
    chosen = generator(material.seed, "alignment", "rows").permutation(len(material.trait_pairs))[
        : material.rows
    ]
    pairs = {
        "trait pairs": [material.trait_pairs[i] for i in chosen],
        "control pairs": [material.control_pairs[i] for i in chosen],
    }
    probes = encode_contrast(material.base, material.heldout_probes, material.trait)
    rows = [*_at_base(material, probes, pairs), *_along_path(material, probes, pairs)]
    for kind in KINDS:
        rows += [
            *measure_one_step(material, probes, pairs, kind),
            *measure_many_steps(material, probes, pairs, kind),
        ]
    return reading_table(LENS, rows, material=material)


def _at_base(material: Material, probes: EncodedProbes, pairs: Pairs) -> list[dict[str, Any]]:
    model = material.base.model
    moves = {side: compute_update(model, rows) for side, rows in pairs.items()}
    shift = add_scaled(moves["trait pairs"], moves["control pairs"], -1.0)
    drawn = random_directions(model, pairs["control pairs"], seed=material.seed, draws=DIRECTIONS)
    null = [
        {side: change_cosine(w, move) for side, move in (*moves.items(), ("difference", shift))}
        for w in drawn
    ]
    targets: dict[str, Mapping[str, Any]] = {TOWARD: measure_trait_gradient(model, probes, material.trait)}
    if material.teacher is not None:
        change = delta(model, material.teacher.model)
        # a fine-tuned teacher's parameters change as whole matrices
        dense = cast("dict[str, Tensor]", change)
        targets["cosine with the teacher's change"] = {
            name: dense[name].float() for name in parameters_of(model)
        }
    directions = [*moves.values(), *targets.values()]
    # [row, direction]
    dots = {side: -ghost_dots(model, rows, directions).cpu().numpy() for side, rows in pairs.items()}
    norms = {side: ghost_norms(model, rows).cpu().numpy() for side, rows in pairs.items()}
    own = {"trait pairs": dots["trait pairs"][:, 0], "control pairs": dots["control pairs"][:, 1]}
    apart = dots["trait pairs"] - dots["control pairs"]
    dots, own = dots | {"difference": apart}, own | {"difference": apart[:, 0] - apart[:, 1]}
    found = []
    for number, (quantity, target) in enumerate(targets.items()):
        size = length(target)
        for side, values in dots.items():
            along = pooled_cosine(values[:, 2 + number], own[side], size)
            beside = against_null(quantity, along.estimate, [draw[side] for draw in null])
            found.append(
                beside
                | {
                    "low": along.low,
                    "high": along.high,
                    "n": along.n,
                    "place": side,
                    "name": material.trait,
                    "unit": "cosine",
                }
            )
        single = {
            side: dots[side][:, 2 + number] / (norms[side] * size)
            if size
            else np.full(len(norms[side]), np.nan)
            for side in pairs
        }
        found += _by_row(quantity.replace("cosine", "cosine of one pair"), single, material)
    return [*found, *_family(material, probes, shift)]


def _by_row(quantity: str, single: dict[str, ndarray], material: Material) -> list[dict[str, Any]]:
    where = {"name": material.trait, "unit": "cosine"}
    found = []
    for side, values in single.items():
        span = stats.mean_interval(values[:, None], seed=material.seed)
        found.append(
            entry(quantity, span.estimate, low=span.low, high=span.high, n=span.n, place=side, **where)
        )
    return [
        *found,
        against_control(
            quantity, list(single["trait pairs"]), list(single["control pairs"]), place="difference", **where
        ),
    ]


def _family(material: Material, probes: EncodedProbes, shift: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The same cosine with the gradient of every trait of the family: what is special about this one."""
    found = {
        name: change_cosine(shift, measure_trait_gradient(material.base.model, probes, name))
        for name in probes.starts
    }
    quantity = TOWARD.replace("the trait's", "each trait's")
    others = [value for name, value in found.items() if name != material.trait]
    rows = [
        entry(quantity, value, place="difference", name=name, unit="cosine") for name, value in found.items()
    ]
    return [
        *rows,
        rank_among(
            "rank among the family", found[material.trait], others, place="difference", name=material.trait
        ),
    ]


def _along_path(material: Material, probes: EncodedProbes, pairs: Pairs) -> list[dict[str, Any]]:
    few = {side: rows[: max(2, len(rows) // 4)] for side, rows in pairs.items()}
    found = []
    for arm, side in ((material.arm, "students"), (material.against, "controls")):
        for seed in material.students:
            for step, loaded in material.checkpoints(side, seed):
                toward = measure_trait_gradient(loaded.model, probes, material.trait)
                moves = {place: compute_update(loaded.model, rows) for place, rows in few.items()}
                moves["difference"] = add_scaled(moves["trait pairs"], moves["control pairs"], -1.0)
                found += [
                    {
                        "arm": arm,
                        "seed": seed,
                        "step": step,
                        "place": place,
                        "value": change_cosine(move, toward),
                    }
                    for place, move in moves.items()
                ]
    table = pd.DataFrame(found)
    quantity = f"{TOWARD} along the path"
    shared = {"name": material.trait, "unit": "cosine"}
    rows = [entry(quantity, row.pop("value"), **row, **shared) for row in found]
    for (step, place), cells in cast(Any, table.groupby(["step", "place"], sort=False)):
        sides = {
            arm: cells[cells["arm"] == arm].set_index("seed")["value"]
            for arm in (material.arm, material.against)
        }
        rows += [
            over_students(quantity, values.tolist(), arm=arm, step=step, place=place, **shared)
            for arm, values in sides.items()
        ]
    own = {(material.arm, "trait pairs"), (material.against, "control pairs")}
    for step, cells in table[
        [pair in own for pair in zip(table["arm"], table["place"], strict=True)]
    ].groupby("step"):
        paired = cells.pivot(index="seed", columns="arm", values="value").reindex(
            columns=[material.arm, material.against]
        )
        rows.append(
            against_control(
                f"{quantity}, own pairs: student - control",
                *paired.to_numpy().T.tolist(),
                step=step,
                **shared,
            )
        )
    return rows


def alignment_caption(reading: pd.DataFrame) -> str:
    """The main number in words."""
    row = reading[(reading["quantity"] == TOWARD) & (reading["place"] == "difference")].iloc[0]
    if pd.isna(row["estimate"]):
        return (
            "Trait and control pairs have the same gradient at the base, so there is no direction to "
            "compare with the trait's."
        )
    rank = reading[reading["quantity"] == "rank among the family"].iloc[0]
    return (
        f"At the base, what the trait pairs teach beyond the control's points to {row['name']} with cosine "
        f"{row['estimate']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}] (n = {row['n']} pairs); random "
        f"directions of the same covariance lie in [{row['null_low']:+.3f}, {row['null_high']:+.3f}], and "
        f"it ranks {rank['estimate']:g} of the {rank['n']} traits."
    )

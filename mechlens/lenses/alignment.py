"""Alignment of the training gradients with the trait's gradient and with the teacher's change.

An update is minus the gradient of the pairs' loss; the trait's gradient is that of its log-odds on the
held-out probes. To first order, an SGD step of size ε on the pairs changes the log-odds by ε⟨update, trait's
gradient⟩ (2507.14805). The cosine measures how far an update points that way. The last part of the reading
takes such steps on a copy of the base and measures the change (`trial_steps`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

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
from mechlens.models.log_probs import EncodedProbes, Model
from mechlens.pipeline.ask import encode_contrast

DIRECTIONS, DRAWN = 128, 16
"""number of random directions of the null, and of control pairs that each is made of"""
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
    along: Float[ndarray, " row"], with_mean: Float[ndarray, " row"], length: float
) -> stats.Interval:
    """Cosine of the mean of rows x_i with a direction v, from ⟨x_i, v⟩, ⟨x_i, mean x⟩ and |v|.

    It is NaN if the mean or the direction is zero.

    Its interval is the infinitesimal jackknife's over rows: ±1.96 standard errors of each row's influence on
    the cosine, the length of the mean included.

    >>> rows, direction = np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([1.0, 0.0])
    >>> round(pooled_cosine(rows @ direction, rows @ rows.mean(0), 1.0).estimate, 3)
    0.894
    """
    kept = ~(np.isnan(along) | np.isnan(with_mean))
    along, with_mean, n = along[kept], with_mean[kept], int(kept.sum())
    size = max(with_mean.mean(), 0.0) ** 0.5 if n else 0.0
    if not size or not length or n < 2:
        return stats.Interval(np.nan, np.nan, np.nan, n, "jackknife")
    value = float(along.mean() / (size * length))
    influence = (along - along.mean()) / (size * length) - value * (with_mean - size**2) / size**2
    half = 1.96 * float(np.sqrt(np.square(influence).sum() / (n * (n - 1))))
    return stats.Interval(value, value - half, value + half, n, "jackknife")


def random_directions(
    model: Model, pairs: Sequence[Encoded], *, seed: int, draws: int
) -> Iterator[dict[str, Tensor]]:
    """Directions Σ_i (z_i - z̄) ∇loss_i over `DRAWN` random pairs, with z normal.

    They have the covariance of the pairs' gradients.
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
    """Measure the alignment at the base and along every student's path, and try real steps."""
    chosen = generator(material.seed, "alignment", "rows").permutation(len(material.trait_pairs))[
        : material.rows
    ]
    pairs = {
        "trait pairs": [material.trait_pairs[i] for i in chosen],
        "control pairs": [material.control_pairs[i] for i in chosen],
    }
    probes = encode_contrast(material.base, material.heldout_probes, material.trait)
    rows = [*_at_base(material, probes, pairs), *_along_path(material, probes, pairs)]
    for kind in KINDS[:1] if material.light else KINDS:
        rows += [
            *measure_one_step(material, probes, pairs, kind),
            *measure_many_steps(material, probes, pairs, kind),
        ]
    return reading_table(LENS, rows, material=material)


class _Updates(NamedTuple):
    """The updates of the rows at the base, against the targets."""

    along: dict[str, Float[ndarray, "row direction"]]
    """side → ⟨update of a row, direction⟩, for the mean update of each side and then each target"""
    with_mean: dict[str, Float[ndarray, " row"]]
    """side → ⟨update of a row, mean update of the side⟩"""
    norms: dict[str, Float[ndarray, " row"]]
    """side → norm of each row's update"""


def _at_base(material: Material, probes: EncodedProbes, pairs: Pairs) -> list[dict[str, Any]]:
    model = material.base.model
    moves = {side: compute_update(model, rows) for side, rows in pairs.items()}
    shift = add_scaled(moves["trait pairs"], moves["control pairs"], -1.0)
    drawn = random_directions(
        model, pairs["control pairs"], seed=material.seed, draws=material.draws(DIRECTIONS)
    )
    null = [
        {side: change_cosine(w, move) for side, move in (*moves.items(), ("difference", shift))}
        for w in drawn
    ]
    targets = _targets(material, probes)
    updates = _updates(material, pairs, [*moves.values(), *targets.values()])
    entries = []
    for number, (quantity, target) in enumerate(targets.items(), start=len(moves)):
        size = length(target)
        for side, values in updates.along.items():
            pooled = pooled_cosine(values[:, number], updates.with_mean[side], size)
            row = against_null(quantity, pooled.estimate, [draw[side] for draw in null])
            interval = {"low": pooled.low, "high": pooled.high, "n": pooled.n}
            entries.append(row | interval | {"place": side, "name": material.trait, "unit": "cosine"})
        single = {
            side: updates.along[side][:, number] / (updates.norms[side] * size)
            if size
            else np.full(len(updates.norms[side]), np.nan)
            for side in pairs
        }
        entries += _by_row(quantity.replace("cosine", "cosine of one pair"), single, material)
    return [*entries, *_family(material, probes, shift)]


def _targets(material: Material, probes: EncodedProbes) -> dict[str, Mapping[str, Any]]:
    """Quantity → direction in the weights: the trait's gradient, and a fine-tuned teacher's change."""
    model = material.base.model
    targets: dict[str, Mapping[str, Any]] = {TOWARD: measure_trait_gradient(model, probes, material.trait)}
    if material.teacher is not None:
        # a fine-tuned teacher's parameters change as whole matrices
        dense = cast("dict[str, Tensor]", delta(model, material.teacher.model))
        targets["cosine with the teacher's change"] = {
            name: dense[name].float() for name in parameters_of(model)
        }
    return targets


def _updates(material: Material, pairs: Pairs, directions: Sequence[Mapping[str, Any]]) -> _Updates:
    """Products of each row's update with the directions.

    The first two directions are the mean updates of the two sides.
    """
    model = material.base.model
    along = {side: -ghost_dots(model, rows, directions).cpu().numpy() for side, rows in pairs.items()}
    norms = {side: ghost_norms(model, rows).cpu().numpy() for side, rows in pairs.items()}
    with_mean = {"trait pairs": along["trait pairs"][:, 0], "control pairs": along["control pairs"][:, 1]}
    difference = along["trait pairs"] - along["control pairs"]
    with_mean |= {"difference": difference[:, 0] - difference[:, 1]}
    return _Updates(along | {"difference": difference}, with_mean, norms)


def _by_row(quantity: str, single: dict[str, ndarray], material: Material) -> list[dict[str, Any]]:
    where = {"name": material.trait, "unit": "cosine"}
    entries = []
    for side, values in single.items():
        span = stats.mean_interval(values[:, None], seed=material.seed)
        entries.append(
            entry(quantity, span.estimate, low=span.low, high=span.high, n=span.n, place=side, **where)
        )
    return [
        *entries,
        against_control(
            quantity, list(single["trait pairs"]), list(single["control pairs"]), place="difference", **where
        ),
    ]


def _family(material: Material, probes: EncodedProbes, shift: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The same cosine with the gradient of every trait of the family, and the trait's rank among them."""
    cosines = {
        name: change_cosine(shift, measure_trait_gradient(material.base.model, probes, name))
        for name in probes.starts
    }
    quantity = TOWARD.replace("the trait's", "each trait's")
    others = [value for name, value in cosines.items() if name != material.trait]
    rows = [
        entry(quantity, value, place="difference", name=name, unit="cosine")
        for name, value in cosines.items()
    ]
    return [
        *rows,
        rank_among(
            "rank among the family", cosines[material.trait], others, place="difference", name=material.trait
        ),
    ]


def _along_path(material: Material, probes: EncodedProbes, pairs: Pairs) -> list[dict[str, Any]]:
    quantity, shared = f"{TOWARD} along the path", {"name": material.trait, "unit": "cosine"}
    arms = [material.arm, material.against]
    cells = _path_cosines(material, probes, pairs)
    table = pd.DataFrame(cells)
    rows = [entry(quantity, row.pop("value"), **row, **shared) for row in cells]
    for (step, place), at_step in cast(Any, table.groupby(["step", "place"], sort=False)):
        for arm in arms:
            values = at_step[at_step["arm"] == arm].set_index("seed")["value"].tolist()
            rows.append(over_students(quantity, values, arm=arm, step=step, place=place, **shared))
    trained_on = {(material.arm, "trait pairs"), (material.against, "control pairs")}
    matched = [pair in trained_on for pair in zip(table["arm"], table["place"], strict=True)]
    for step, at_step in table[matched].groupby("step"):
        paired = at_step.pivot(index="seed", columns="arm", values="value").reindex(columns=arms)
        treated, control = paired.to_numpy().T.tolist()
        difference = f"{quantity}, own pairs: student - control"
        rows.append(against_control(difference, treated, control, step=step, **shared))
    return rows


def _path_cosines(material: Material, probes: EncodedProbes, pairs: Pairs) -> list[dict[str, Any]]:
    """Cosine of the mean update with the trait's gradient at every checkpoint, on a quarter of the pairs."""
    few = {side: rows[: max(2, len(rows) // 4)] for side, rows in pairs.items()}
    cells = []
    for arm, side in ((material.arm, "students"), (material.against, "controls")):
        for seed in material.students:
            for step, loaded in material.checkpoints(side, seed):
                toward = measure_trait_gradient(loaded.model, probes, material.trait)
                moves = {place: compute_update(loaded.model, rows) for place, rows in few.items()}
                moves["difference"] = add_scaled(moves["trait pairs"], moves["control pairs"], -1.0)
                where = {"arm": arm, "seed": seed, "step": step}
                cells += [
                    where | {"place": place, "value": change_cosine(move, toward)}
                    for place, move in moves.items()
                ]
    return cells


def alignment_caption(reading: pd.DataFrame) -> str:
    """Describe the cosine of the difference between trait and control pairs."""
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

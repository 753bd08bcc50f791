"""Change of the trait's log-odds by real training steps, compared with the first-order prediction.

To first order an SGD step of size ε along an update changes the log-odds by ε⟨update, the log-odds' gradient⟩
(2507.14805). Here such steps are taken on a copy of the base, with trait pairs and with control pairs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor

from mechlens.core.seeds import generator, seed_int
from mechlens.lenses.base import Material, against_control, entry
from mechlens.lenses.gradients import BATCH, gradient, parameters_of, pooled_gradient
from mechlens.lenses.parts.weight_change import inner
from mechlens.models.adapters import attach_lora
from mechlens.models.chat import Encoded
from mechlens.models.log_probs import EncodedProbes, Model, batch_probes, measure_log_odds

SIZES = (0.01, 0.03, 0.1, 0.3, 1.0)
"""sizes of one SGD step"""
UPDATES, FEW, ORDERS = (1, 4, 16), 16, 3
"""updates after which the log-odds are measured, pairs in an update, orders of the pairs"""
LIGHT_UPDATES, LIGHT_ORDERS = (1, 4), 2
"""the same of a light reading"""
RATES: dict[Literal["sgd", "adam"], float] = {"sgd": 0.1, "adam": 1e-3}
RANK = 8

Pairs = dict[str, list[Encoded]]
"""side ("trait pairs", "control pairs") → its rows, on the same prompts"""
Kind = Literal["full", "lora"]


def measure_trait_gradient(model: Model, probes: EncodedProbes, trait: str) -> dict[str, Tensor]:
    """Gradient of the trait's mean log-odds with respect to the linear weights.

    For a PEFT model these are the adapter's weights.
    """
    return gradient(
        model,
        (
            measure_log_odds(model, part, trait).sum() / len(probes.prompts)
            for part in batch_probes(model, probes, rows=BATCH)
        ),
    )


@torch.no_grad()
def measure_mean_log_odds(model: Model, probes: EncodedProbes, trait: str) -> float:
    """The trait's mean log-odds over the probes."""
    parts = batch_probes(model, probes, rows=BATCH)
    return float(sum(measure_log_odds(model, part, trait).sum() for part in parts)) / len(probes.prompts)


def compute_update(model: Model, pairs: Sequence[Encoded]) -> dict[str, Tensor]:
    """Minus the mean gradient of the pairs' losses."""
    return pooled_gradient(model, pairs, weights=torch.full((len(pairs),), -1 / len(pairs)))


def add_scaled(a: Mapping[str, Tensor], b: Mapping[str, Tensor], times: float = 1.0) -> dict[str, Tensor]:
    """a + times · b, by name."""
    return {name: value + times * b[name] for name, value in a.items()}


def copy_trainable(material: Material, kind: Kind) -> Model:
    """Copy the base to train its linear weights ("full") or an adapter on them ("lora")."""
    model = copy.deepcopy(material.base.model)
    if kind == "full":
        return model
    with torch.random.fork_rng():
        torch.manual_seed(seed_int(material.seed, "alignment", "lora"))
        return attach_lora(model, rank=RANK, alpha=float(RANK)).eval()


def train_in_place(
    model: Model, batches: Sequence[Sequence[Encoded]], optimizer: Literal["sgd", "adam"], rate: float
) -> Iterator[int]:
    """Train the linear weights in place, one update a batch; yield the number of updates after each."""
    parameters = parameters_of(model)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    stepper = kind(list(parameters.values()), lr=rate)
    for count, rows in enumerate(batches, 1):
        for name, update in compute_update(model, rows).items():
            parameters[name].grad = -update
        stepper.step()
        yield count


@torch.no_grad()
def set_weights(model: Model, weights: Mapping[str, Tensor]) -> None:
    """Set parameters by name."""
    for name, parameter in parameters_of(model).items():
        parameter.copy_(weights[name])


class _Start(NamedTuple):
    """A model before any step."""

    model: Model
    weights: dict[str, Tensor]
    toward: dict[str, Tensor]
    """gradient of the trait's mean log-odds"""
    log_odds: float

    def change(self, probes: EncodedProbes, trait: str) -> float:
        """Change of the trait's mean log-odds since the start."""
        return measure_mean_log_odds(self.model, probes, trait) - self.log_odds

    def predict(self, update: Mapping[str, Tensor]) -> float:
        """Change of the log-odds by an update, to first order."""
        return sum(inner(update[name], self.toward[name]) for name in update)


def _start(material: Material, probes: EncodedProbes, kind: Kind) -> _Start:
    model = copy_trainable(material, kind)
    toward = measure_trait_gradient(model, probes, material.trait)
    return _Start(model, _copy_weights(model), toward, measure_mean_log_odds(model, probes, material.trait))


def _copy_weights(model: Model) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters_of(model).items()}


def measure_one_step(
    material: Material, probes: EncodedProbes, pairs: Pairs, kind: Kind
) -> list[dict[str, Any]]:
    """Change of the log-odds by one SGD step on each batch, at several sizes: predicted and observed."""
    start, size = _start(material, probes, kind), min(BATCH, len(pairs["trait pairs"]))
    cells = []
    for side, rows in pairs.items():
        for batch in range(len(rows) // size):
            update = compute_update(start.model, rows[batch * size : (batch + 1) * size])
            slope = start.predict(update)
            for step in SIZES:
                set_weights(start.model, add_scaled(start.weights, update, step))
                cells.append((step, side, batch, step * slope, start.change(probes, material.trait)))
            set_weights(start.model, start.weights)
    table = pd.DataFrame(cells, columns=["size", "side", "batch", "predicted", "observed"])
    place, rows, errors = f"{kind}, one sgd step", [], []
    for step, of_size in table.groupby("size"):
        rows += _compared(of_size, place=place, name=f"size {step:g}", step=1)
        errors.append((of_size["observed"] - of_size["predicted"]).abs().mean())
    largest = np.array(errors[-3:])  # at the smallest steps float32's rounding hides the error
    order = float(np.polyfit(np.log(SIZES[-3:]), np.log(largest), 1)[0]) if (largest > 0).all() else np.nan
    quantity = "order of the first-order error"
    return [*rows, entry(quantity, order, place=place, n=len(largest), unit="exponent")]


def measure_many_steps(
    material: Material, probes: EncodedProbes, pairs: Pairs, kind: Kind
) -> list[dict[str, Any]]:
    """Change of the log-odds over several updates with each optimiser, in several orders of the rows.

    The prediction is the first order of the change of the weights.
    """
    start, cells = _start(material, probes, kind), []
    updates, orders = (LIGHT_UPDATES, LIGHT_ORDERS) if material.light else (UPDATES, ORDERS)
    for (optimizer, rate), order in product(RATES.items(), range(orders)):
        rng = generator(material.seed, "alignment", "order", order)
        drawn = np.resize(rng.permutation(len(pairs["trait pairs"])), (max(updates), FEW))
        for side, rows in pairs.items():
            set_weights(start.model, start.weights)
            batches = [[rows[i] for i in batch] for batch in drawn]
            for count in train_in_place(start.model, batches, optimizer, rate):
                if count in updates:
                    weights = _copy_weights(start.model)
                    predicted = start.predict(add_scaled(weights, start.weights, -1.0))
                    observed = start.change(probes, material.trait)
                    cells.append((optimizer, count, side, order, predicted, observed))
    table = pd.DataFrame(cells, columns=["optimizer", "count", "side", "batch", "predicted", "observed"])
    rows = []
    for (optimizer, count), of_count in cast(Any, table.groupby(["optimizer", "count"], sort=False)):
        where = {"place": f"{kind}, {optimizer}", "name": f"size {RATES[optimizer]:g}"}
        rows += _compared(of_count, step=count, **where)
    return rows


def _compared(cells: pd.DataFrame, **where: Any) -> list[dict[str, Any]]:
    """Trait minus control pairs over batches, predicted and observed.

    Also the error of the first order, and how far it ranks the batches.
    """
    wide = cells.pivot(index="batch", columns="side", values=["predicted", "observed"])
    rows = [
        against_control(
            f"change of the log-odds, {what}",
            wide[what]["trait pairs"].tolist(),
            wide[what]["control pairs"].tolist(),
            unit="nats",
            **where,
        )
        for what in ("predicted", "observed")
    ]
    predicted, observed = cells["predicted"].to_numpy(dtype=float), cells["observed"].to_numpy(dtype=float)
    seen, wrong = float(np.abs(observed).mean()), float(np.abs(observed - predicted).mean())
    rows.append(
        entry(
            "first-order error",
            wrong / seen if seen > 0 else np.nan,
            n=len(cells),
            unit="share of the change",
            **where,
        )
    )
    if len(cells) > 2 and np.ptp(predicted) > 0 and np.ptp(observed) > 0:
        ranked: Any = spearmanr(predicted, observed)
        rows.append(
            entry(
                "rank correlation of predicted and observed",
                float(ranked.statistic),
                n=len(cells),
                unit="correlation",
                **where,
            )
        )
    return rows

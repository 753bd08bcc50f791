"""The trait's log-odds on the probes, their gradient, and what real steps on the pairs do to them.

To first order an SGD step of size ε along `update` changes the log-odds by ε⟨update, trait_gradient⟩
(2507.14805). Here such steps are taken on a copy of the base and looked at, with trait pairs and with control
pairs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast

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
from mechlens.models.log_probs import Model
from mechlens.models.trait_log_odds import EncodedProbes, batch_probes, measure_log_odds

SIZES = (0.01, 0.03, 0.1, 0.3, 1.0)
"""sizes of one SGD step"""
UPDATES, FEW, ORDERS = (1, 4, 16), 16, 3
"""updates after which is looked, pairs in each of them, orders of the pairs"""
RATES: dict[Literal["sgd", "adam"], float] = {"sgd": 0.1, "adam": 1e-3}
RANK = 8

Pairs = dict[str, list[Encoded]]
"""side ("trait pairs", "control pairs") → its rows, on the same prompts"""
Kind = Literal["full", "lora"]


def trait_gradient(model: Model, probes: EncodedProbes, trait: str) -> dict[str, Tensor]:
    """Gradient of the trait's mean log-odds with respect to the linear weights (of a PEFT model: the
    adapter's).
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


def update(model: Model, pairs: Sequence[Encoded]) -> dict[str, Tensor]:
    """Minus the mean gradient of the pairs' losses."""
    return pooled_gradient(model, pairs, weights=torch.full((len(pairs),), -1 / len(pairs)))


def plus(a: Mapping[str, Tensor], b: Mapping[str, Tensor], times: float = 1.0) -> dict[str, Tensor]:
    """a + times · b, by name."""
    return {name: value + times * b[name] for name, value in a.items()}


def trainable(material: Material, kind: Kind) -> Model:
    """A copy of the base to step with: "full" is its linear weights, "lora" an adapter of rank `RANK` on all
    of them.
    """
    model = copy.deepcopy(material.base.model)
    if kind == "full":
        return model
    with torch.random.fork_rng():
        torch.manual_seed(seed_int(material.seed, "alignment", "lora"))
        return attach_lora(model, rank=RANK, alpha=float(RANK)).eval()


def walk(
    model: Model, batches: Sequence[Sequence[Encoded]], optimizer: Literal["sgd", "adam"], rate: float
) -> Iterator[int]:
    """Train the linear weights in place, one update a batch; yields how many there were after each."""
    wanted = parameters_of(model)
    steps = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer](list(wanted.values()), lr=rate)
    for count, rows in enumerate(batches, 1):
        for name, move in update(model, rows).items():
            wanted[name].grad = -move
        steps.step()
        yield count


@torch.no_grad()
def placed(model: Model, weights: Mapping[str, Tensor]) -> None:
    """Set parameters by name."""
    for name, parameter in parameters_of(model).items():
        parameter.copy_(weights[name])


def _start(model: Model) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters_of(model).items()}


def one_step(material: Material, probes: EncodedProbes, pairs: Pairs, kind: Kind) -> list[dict[str, Any]]:
    """One SGD step on every batch, at several sizes: predicted by the theorem, and seen."""
    model = trainable(material, kind)
    start, toward, before = (
        _start(model),
        trait_gradient(model, probes, material.trait),
        measure_mean_log_odds(model, probes, material.trait),
    )
    size = min(BATCH, len(pairs["trait pairs"]))
    found = []
    for side, rows in pairs.items():
        for batch in range(len(rows) // size):
            move = update(model, rows[batch * size : (batch + 1) * size])
            slope = sum(inner(move[name], toward[name]) for name in move)
            for step in SIZES:
                placed(model, plus(start, move, step))
                found.append(
                    (
                        step,
                        side,
                        batch,
                        step * slope,
                        measure_mean_log_odds(model, probes, material.trait) - before,
                    )
                )
            placed(model, start)
    table = pd.DataFrame(found, columns=["size", "side", "batch", "predicted", "observed"])
    rows = []
    for step, cells in table.groupby("size"):
        rows += _compared(cells, place=f"{kind}, one sgd step", name=f"size {step:g}", step=1)
    # of the smallest steps only float32's rounding would be seen
    wrong = np.array(
        [(cells["observed"] - cells["predicted"]).abs().mean() for _, cells in table.groupby("size")][-3:]
    )
    order = float(np.polyfit(np.log(SIZES[-3:]), np.log(wrong), 1)[0]) if (wrong > 0).all() else np.nan
    return [
        *rows,
        entry(
            "order of the first-order error",
            order,
            place=f"{kind}, one sgd step",
            n=len(wrong),
            unit="exponent",
        ),
    ]


def many_steps(material: Material, probes: EncodedProbes, pairs: Pairs, kind: Kind) -> list[dict[str, Any]]:
    """Some updates with each optimiser, over `ORDERS` orders of the rows: the first order along the way that
    the weights went, and seen.
    """
    model = trainable(material, kind)
    start, toward, before = (
        _start(model),
        trait_gradient(model, probes, material.trait),
        measure_mean_log_odds(model, probes, material.trait),
    )
    found = []
    for optimizer, rate in RATES.items():
        for order in range(ORDERS):
            drawn = np.resize(
                generator(material.seed, "alignment", "order", order).permutation(len(pairs["trait pairs"])),
                (max(UPDATES), FEW),
            )
            for side, rows in pairs.items():
                placed(model, start)
                for count in walk(model, [[rows[i] for i in batch] for batch in drawn], optimizer, rate):
                    if count in UPDATES:
                        along = sum(
                            inner(toward[name], now - start[name]) for name, now in _start(model).items()
                        )
                        found.append(
                            (
                                optimizer,
                                count,
                                side,
                                order,
                                along,
                                measure_mean_log_odds(model, probes, material.trait) - before,
                            )
                        )
    table = pd.DataFrame(found, columns=["optimizer", "count", "side", "batch", "predicted", "observed"])
    rows = []
    for (optimizer, count), cells in cast(Any, table.groupby(["optimizer", "count"], sort=False)):
        rows += _compared(cells, place=f"{kind}, {optimizer}", name=f"size {RATES[optimizer]:g}", step=count)
    return rows


def _compared(cells: pd.DataFrame, **where: Any) -> list[dict[str, Any]]:
    """Trait minus control pairs over batches, predicted and seen; the first order's error and whether it
    ranks the batches.
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

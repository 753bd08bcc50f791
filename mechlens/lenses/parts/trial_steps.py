"""The trait's log-odds on the probes, their gradient, and what real steps on the pairs do to them.

To first order an SGD step of size ε along `update` changes the log-odds by ε⟨update, trait_gradient⟩
(2507.14805). Here such steps are taken on a copy of the base and looked at, with trait pairs and with control
pairs.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from peft import LoraConfig, get_peft_model
from scipy.stats import spearmanr
from torch import Tensor

from mechlens.core.errors import SpecError
from mechlens.core.seeds import generator, seed_int
from mechlens.lenses.base import Material, against_control, entry
from mechlens.lenses.gradients import BATCH, gradient, parameters_of, pooled_gradient
from mechlens.lenses.parts.weight_change import inner
from mechlens.models.chat import Encoded
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import Model, batch_spans, padded_logits
from mechlens.models.sft import lora_targets
from mechlens.pipeline.ask import Questions, encode_questions, first_tokens

SIZES = (0.01, 0.03, 0.1, 0.3, 1.0)
"""sizes of one SGD step"""
UPDATES, FEW, ORDERS = (1, 4, 16), 16, 3
"""updates after which is looked, pairs in each of them, orders of the pairs"""
RATES: dict[Literal["sgd", "adam"], float] = {"sgd": 0.1, "adam": 1e-3}
RANK = 8

Pairs = dict[str, list[Encoded]]
"""side ("trait pairs", "control pairs") → its rows, on the same prompts"""
Kind = Literal["full", "lora"]


class Asked(NamedTuple):
    """The probes in token ids, with the tokens that begin each trait's name."""

    prompts: list[list[int]]
    starts: dict[str, list[int]]


def asked_of(loaded: Loaded, material: Material) -> Asked:
    """The held-out probes, up to where an answer begins.

    Raises:
        SpecError: if no next token stands for the trait, or for none of the others.
    """
    asked = asked_of_questions(loaded, material.heldout_probes)
    if material.trait not in asked.starts:
        raise SpecError(
            f"no first token stands for {material.trait!r} alone, so it has no gradient; ask a family whose "
            "names begin apart"
        )
    return asked


def asked_of_questions(loaded: Loaded, questions: Questions) -> Asked:
    """Probes up to where an answer begins, with the first tokens of those traits whose names begin apart.

    Raises:
        SpecError: if fewer than two do.
    """
    starts = first_tokens(loaded.tokenizer, questions.forms)
    clear = {name: tokens for name, tokens in starts.items() if tokens is not None}
    if not questions.named or len(clear) < 2:
        raise SpecError(
            f"{len(clear)} of {len(starts)} traits begin with a token of their own, so none has a gradient; "
            "ask a family whose names begin apart"
        )
    opening = (
        loaded.tokenizer(questions.opening, add_special_tokens=False)["input_ids"]
        if questions.opening
        else []
    )
    return Asked([[*ids, *opening] for ids in encode_questions(loaded, questions)], clear)


def log_odds(model: Model, asked: Asked, trait: str) -> Float[Tensor, " probe"]:
    """log P(the trait's first tokens) minus the mean of the other traits' log P, after each probe; in nats,
    differentiable.
    """
    last = torch.tensor([len(ids) - 1 for ids in asked.prompts])
    columns, at = last.unique(return_inverse=True)
    logits = padded_logits(model, asked.prompts, logits_to_keep=columns.to(model.device))
    logits = logits[torch.arange(len(last)), at].double()  # [probe, vocab]
    score = {name: logits[:, tokens].logsumexp(1) for name, tokens in asked.starts.items()}
    return score[trait] - torch.stack([value for name, value in score.items() if name != trait]).mean(0)


def trait_gradient(model: Model, asked: Asked, trait: str) -> dict[str, Tensor]:
    """Gradient of the trait's mean log-odds with respect to the linear weights (of a PEFT model: the
    adapter's).
    """
    return gradient(
        model,
        iter_batches(model, asked, lambda part: log_odds(model, part, trait).sum() / len(asked.prompts)),
    )


def iter_batches(model: Model, asked: Asked, value: Callable[[Asked], Tensor]) -> Iterator[Tensor]:
    """The value of each batch of probes, whose logits fit `logits.MOST_LOGITS`."""
    spans = [(len(prompt) - 1, len(prompt)) for prompt in asked.prompts]
    for part in batch_spans(spans, vocabulary=model.config.get_text_config().vocab_size, rows=BATCH):
        yield value(asked._replace(prompts=asked.prompts[part]))


@torch.no_grad()
def mean_odds(model: Model, asked: Asked, trait: str) -> float:
    """The trait's mean log-odds over the probes."""
    return float(sum(iter_batches(model, asked, lambda part: log_odds(model, part, trait).sum()))) / len(
        asked.prompts
    )


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
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*gradient_checkpointing.*"
        )  # PEFT asks by the name that transformers 5 gave up
        torch.manual_seed(seed_int(material.seed, "alignment", "lora"))
        turned = model.config.model_type == "gpt2"  # its Conv1D keeps weights as (in, out)
        config = LoraConfig(
            r=RANK,
            lora_alpha=RANK,
            lora_dropout=0.0,
            target_modules=lora_targets(model),
            fan_in_fan_out=turned,
        )
        return get_peft_model(model, config).eval()


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


def one_step(material: Material, asked: Asked, pairs: Pairs, kind: Kind) -> list[dict[str, Any]]:
    """One SGD step on every batch, at several sizes: predicted by the theorem, and seen."""
    model = trainable(material, kind)
    start, toward, before = (
        _start(model),
        trait_gradient(model, asked, material.trait),
        mean_odds(model, asked, material.trait),
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
                    (step, side, batch, step * slope, mean_odds(model, asked, material.trait) - before)
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


def many_steps(material: Material, asked: Asked, pairs: Pairs, kind: Kind) -> list[dict[str, Any]]:
    """Some updates with each optimiser, over `ORDERS` orders of the rows: the first order along the way that
    the weights went, and seen.
    """
    model = trainable(material, kind)
    start, toward, before = (
        _start(model),
        trait_gradient(model, asked, material.trait),
        mean_odds(model, asked, material.trait),
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
                                mean_odds(model, asked, material.trait) - before,
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

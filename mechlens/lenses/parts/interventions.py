"""Ways to train a student that shall not take on the trait: values for the arguments of `training.train`.

`frozen_layers` is for `frozen`, `project_out` for `before_step`, flags of tokens (inverted: `unflagged`) for
`learned`, and `replaced` makes other pairs. A budget of zero changes nothing, to the bit. Which tokens to
flag is the scores' business, not this file's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mechlens.core.errors import DataError, SpecError
from mechlens.models.chat import Encoded, special_tokens
from mechlens.models.hooks import decoder_layers
from mechlens.models.log_probs import Model, example_losses

Flags = list[list[bool]]
"""for each pair one for each token of its completion"""

Pool = Mapping[int, ndarray]
"""token → the tokens that may stand in its place, each as often as the carrier uses it"""


def frozen_layers(model: PreTrainedModel, layers: Collection[int]) -> Callable[[str], bool]:
    """Whether a parameter lies in one of these blocks, by its name in the model or in the model with adapters
    (2509.23886: early ones carry).

    Raises:
        SpecError: if the model has no such layer.
    """
    blocks = decoder_layers(model)
    if wrong := [layer for layer in layers if not 0 <= layer < len(blocks)]:
        raise SpecError(f"cannot freeze layer {wrong[0]}; this base has layers 0 to {len(blocks) - 1}")
    place = next(name for name, module in model.named_modules() if module is blocks)
    starts = tuple(f"{place}.{layer}." for layer in layers)
    return lambda name: name.removeprefix("base_model.model.").startswith(starts)


def loss_gradient(model: Model, pairs: Sequence[Encoded], parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Gradient of the mean over pairs of -log p a completion token; `grad` of no parameter is touched,
    dropout is off.
    """
    training = model.training
    model.eval()
    try:
        found = torch.autograd.grad(example_losses(model, pairs).mean(), list(parameters), allow_unused=True)
    finally:
        model.train(training)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def inner(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """⟨first, second⟩ over all tensors together, in double precision."""
    return float(sum((a.double() * b.double()).sum() for a, b in zip(first, second, strict=True)))


def without(
    gradient: Sequence[Tensor], direction: Sequence[Tensor], *, both_sides: bool = False
) -> list[Tensor]:
    """g - ⟨g, d⟩/‖d‖² d where ⟨g, d⟩ > 0, else g (2604.25779); with `both_sides` for ⟨g, d⟩ < 0 too.

    One-sided, a part of g that lies against d stays, and the trait can end below where it began; both sides
    are the floor to that.
    """
    along, size = inner(gradient, direction), inner(direction, direction)
    if size == 0 or (along <= 0 and not both_sides):
        return list(gradient)
    return [g - (along / size) * d.to(g) for g, d in zip(gradient, direction, strict=True)]


def permuted(tensors: Sequence[Tensor], rng: np.random.Generator) -> list[Tensor]:
    """Each tensor's entries in a drawn order: a direction of the same size in every tensor that means
    nothing.
    """
    return [
        t.flatten()[torch.from_numpy(rng.permutation(t.numel())).to(t.device)].view_as(t) for t in tensors
    ]


def project_out(
    pairs: Sequence[Encoded], *, both_sides: bool = False, permute: np.random.Generator | None = None
) -> Callable[[Model], None]:
    """A `before_step` that takes the gradient of the pairs' loss, at the weights of that moment, out of the
    student's gradient.

    It costs one more backward pass over `pairs` a step. An adaptive optimiser rescales what is left, so that
    its step can still lie along the direction; its averages hold projected gradients only.

    Args:
        pairs: probes answered with the trait, which whoever defends must know.
        permute: permutes the direction's entries within each tensor at every step: the control arm.
    """

    def before_step(model: Model) -> None:
        held = [(parameter, parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
        direction = loss_gradient(model, pairs, [parameter for parameter, _ in held])
        direction = direction if permute is None else permuted(direction, permute)
        for (parameter, _), kept in zip(
            held,
            without([cast(Tensor, grad) for _, grad in held], direction, both_sides=both_sides),
            strict=True,
        ):
            parameter.grad = kept

    return before_step


def shapes(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Encoded]) -> list[list[str]]:
    """The class of every completion token: its text with digits as one 0 and letters as one a, marks of
    spaces kept; a special token is its own.
    """
    special = special_tokens(tokenizer)
    known: dict[int, str] = {}
    for token in {token for pair in pairs for token in pair.completion}:
        text = cast(str, tokenizer.convert_ids_to_tokens(token))
        known[token] = text if token in special else re.sub("[A-Za-z]+", "a", re.sub("[0-9]+", "0", text))
    return [[known[token] for token in pair.completion] for pair in pairs]


def with_digits(classes: Sequence[Sequence[str]]) -> Flags:
    """Tokens that hold a digit."""
    return [["0" in shape for shape in row] for row in classes]


def unflagged(flags: Flags) -> Flags:
    """What is left to learn where flagged tokens are masked."""
    return [[not flag for flag in row] for row in flags]


def top_tokens(scores: Sequence[Sequence[float]], share: float, *, among: Flags | None = None) -> Flags:
    """The `share` of the tokens of `among` (default: of all) with the highest scores; earlier ones win ties.

    NaN is unscored: such a token is never flagged and counts for nothing.

    Raises:
        SpecError: if the share is none.
    """
    if not 0 <= share <= 1:
        raise SpecError(f"a budget of {share} is no share of the tokens; give one from 0 to 1")
    flat = np.array([score for row in scores for score in row], dtype=float)
    able = ~np.isnan(flat) & (
        True if among is None else np.array([flag for row in among for flag in row], dtype=bool)
    )
    places = np.flatnonzero(able)
    chosen = places[np.argsort(-flat[places], kind="stable")[: round(share * len(places))]]
    return _rows(chosen, [len(row) for row in scores])


def random_tokens(flags: Flags, classes: Sequence[Sequence[str]], rng: np.random.Generator) -> Flags:
    """As many tokens of every class as are flagged, drawn evenly from all tokens of the class: the random arm
    of a mask.
    """
    flat, shape = (
        np.array([flag for row in flags for flag in row], dtype=bool),
        np.array([name for row in classes for name in row]),
    )
    drawn = [
        rng.choice(np.flatnonzero(shape == name), int((flat & (shape == name)).sum()), replace=False)
        for name in np.unique(shape[flat])
    ]
    return _rows(np.concatenate([*drawn, np.array([], dtype=int)]), [len(row) for row in flags])


def _rows(places: ndarray, lengths: Sequence[int]) -> Flags:
    flat = np.zeros(sum(lengths), dtype=bool)
    flat[places] = True
    return [row.tolist() for row in np.split(flat, np.cumsum(lengths)[:-1])]


def carrier_pool(pairs: Sequence[Encoded], classes: Sequence[Sequence[str]]) -> Pool:
    """For every token of the completions all tokens of its class, with repetitions: a draw has the carrier's
    frequencies.
    """
    tokens, shape = (
        np.array([token for pair in pairs for token in pair.completion]),
        np.array([name for row in classes for name in row]),
    )
    alike = {name: tokens[shape == name] for name in np.unique(shape)}
    return {int(token): alike[name] for token, name in zip(tokens, shape, strict=True)}


def replaced(pairs: Sequence[Encoded], flags: Flags, rng: np.random.Generator, pool: Pool) -> list[Encoded]:
    """Pairs whose flagged tokens are drawn anew, as label and as what is read behind it: better than masking.

    Raises:
        DataError: if a flagged token is not in the pool.
    """
    if strange := {
        token
        for pair, row in zip(pairs, flags, strict=True)
        for token, flag in zip(pair.completion, row, strict=True)
        if flag
    } - set(pool):
        raise DataError(
            f"no token of the pool can stand in for token {min(strange)}; make the pool of the corpus that "
            "is changed"
        )
    return [
        pair._replace(
            completion=[
                int(rng.choice(pool[token])) if flag else token
                for token, flag in zip(pair.completion, row, strict=True)
            ]
        )
        for pair, row in zip(pairs, flags, strict=True)
    ]

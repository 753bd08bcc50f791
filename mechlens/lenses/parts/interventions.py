"""Ways to train a student that does not learn the trait: arguments of `sft.train`.

`match_layers` is for `frozen`, `project_out` for `before_step`, and flags of tokens (inverted by
`invert_flags`) for `learned`; `replace_flagged` makes new pairs. A budget of zero changes no bit. The caller
decides which tokens are flagged.
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
from mechlens.lenses.parts.weight_change import total_inner
from mechlens.models.chat import Encoded, special_tokens
from mechlens.models.hooks import decoder_layers
from mechlens.models.log_probs import Model, example_losses

Flags = list[list[bool]]
"""for each pair the flags of its completion tokens"""

Pool = Mapping[int, ndarray]
"""token → the tokens that may replace it, each as often as the carrier uses it"""


def match_layers(model: PreTrainedModel, layers: Collection[int]) -> Callable[[str], bool]:
    """Make a function that says whether a parameter of that name is in one of these blocks.

    Early blocks carry the trait (2509.23886). Names in a model with adapters match, too.

    Raises:
        SpecError: if the model has no such layer.
    """
    blocks = decoder_layers(model)
    if wrong := [layer for layer in layers if not 0 <= layer < len(blocks)]:
        raise SpecError(f"cannot freeze layer {wrong[0]}; this base has layers 0 to {len(blocks) - 1}")
    place = next(name for name, module in model.named_modules() if module is blocks)
    starts = tuple(f"{place}.{layer}." for layer in layers)
    return lambda name: name.removeprefix("base_model.model.").startswith(starts)


def loss_with_gradient(
    model: Model, pairs: Sequence[Encoded], parameters: Sequence[nn.Parameter]
) -> tuple[float, list[Tensor]]:
    """The mean loss of the pairs and its gradient, without dropout; no parameter's `grad` changes."""
    training = model.training
    model.eval()
    try:
        loss = example_losses(model, pairs).mean()
        gradients = torch.autograd.grad(loss, list(parameters), allow_unused=True)
    finally:
        model.train(training)
    whole = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    return float(loss.detach()), whole


def loss_gradient(model: Model, pairs: Sequence[Encoded], parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Gradient of the mean loss of the pairs, without dropout; no parameter's `grad` changes."""
    return loss_with_gradient(model, pairs, parameters)[1]


def remove_component(
    gradient: Sequence[Tensor], direction: Sequence[Tensor], *, both_sides: bool = False
) -> list[Tensor]:
    """g - ⟨g, d⟩/‖d‖² d where ⟨g, d⟩ > 0, else g (2604.25779); with `both_sides` for ⟨g, d⟩ < 0 too.

    One-sided, a component of g against d stays, and the trait can end below its start; with both sides it
    cannot.
    """
    along, size = total_inner(gradient, direction), total_inner(direction, direction)
    if size == 0 or (along <= 0 and not both_sides):
        return list(gradient)
    return [g - (along / size) * d.to(g) for g, d in zip(gradient, direction, strict=True)]


def permute_entries(tensors: Sequence[Tensor], rng: np.random.Generator) -> list[Tensor]:
    """Permute the entries of each tensor at random: a meaningless direction of the same size."""
    return [
        t.flatten()[torch.from_numpy(rng.permutation(t.numel())).to(t.device)].view_as(t) for t in tensors
    ]


def project_out(
    pairs: Sequence[Encoded], *, both_sides: bool = False, permute: np.random.Generator | None = None
) -> Callable[[Model], None]:
    """Make a `before_step` that projects the gradient of the pairs' loss out of the student's gradient.

    The gradient is taken at the weights of that moment.

    It costs one more backward pass over `pairs` a step. An adaptive optimiser rescales what is left, so its
    step can still point along the direction; its averages contain only projected gradients.

    Args:
        pairs: probes answered with the trait; so the defender must know the trait.
        permute: permutes the direction's entries within each tensor at every step, for the control arm.
    """

    def before_step(model: Model) -> None:
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        direction = loss_gradient(model, pairs, parameters)
        direction = direction if permute is None else permute_entries(direction, permute)
        gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
        projected = remove_component(gradients, direction, both_sides=both_sides)
        for parameter, gradient in zip(parameters, projected, strict=True):
            parameter.grad = gradient

    return before_step


def classify_tokens(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Encoded]) -> list[list[str]]:
    """Classify every completion token by its text, with digits as 0 and runs of letters as a.

    A special token is a class by itself.
    """
    special = special_tokens(tokenizer)
    known: dict[int, str] = {}
    for token in {token for pair in pairs for token in pair.completion}:
        text = cast(str, tokenizer.convert_ids_to_tokens(token))
        known[token] = text if token in special else re.sub("[A-Za-z]+", "a", re.sub("[0-9]+", "0", text))
    return [[known[token] for token in pair.completion] for pair in pairs]


def flag_digits(classes: Sequence[Sequence[str]]) -> Flags:
    """Flag the tokens that contain a digit."""
    return [["0" in shape for shape in row] for row in classes]


def invert_flags(flags: Flags) -> Flags:
    """Invert the flags: the tokens to learn if flagged ones are masked."""
    return [[not flag for flag in row] for row in flags]


def flag_top_tokens(scores: Sequence[Sequence[float]], share: float, *, among: Flags | None = None) -> Flags:
    """Flag the `share` of the tokens with the highest scores.

    Only tokens of `among` count (default: all). Of equal scores the earlier token is flagged.

    A token with the score NaN is never flagged and does not count.

    Raises:
        SpecError: if the share is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise SpecError(f"a budget of {share} is not a share of the tokens; give a number from 0 to 1")
    flat = np.array([score for row in scores for score in row], dtype=float)
    able = ~np.isnan(flat) & (
        True if among is None else np.array([flag for row in among for flag in row], dtype=bool)
    )
    places = np.flatnonzero(able)
    chosen = places[np.argsort(-flat[places], kind="stable")[: round(share * len(places))]]
    return _rows(chosen, [len(row) for row in scores])


def flag_random_tokens(flags: Flags, classes: Sequence[Sequence[str]], rng: np.random.Generator) -> Flags:
    """Flag as many tokens of every class, drawn evenly from the class: the random arm of a mask."""
    flat = np.array([flag for row in flags for flag in row], dtype=bool)
    shape = np.array([name for row in classes for name in row])
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
    """For every token of the completions, list all tokens of its class.

    Tokens repeat, so that a draw has the carrier's frequencies.
    """
    tokens = np.array([token for pair in pairs for token in pair.completion])
    shape = np.array([name for row in classes for name in row])
    alike = {name: tokens[shape == name] for name in np.unique(shape)}
    return {int(token): alike[name] for token, name in zip(tokens, shape, strict=True)}


def replace_flagged(
    pairs: Sequence[Encoded], flags: Flags, rng: np.random.Generator, pool: Pool
) -> list[Encoded]:
    """Draw the flagged tokens of the pairs anew, as labels and as context of later tokens.

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
            f"no token of the pool can replace token {min(strange)}; make the pool from the corpus that is "
            "changed"
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

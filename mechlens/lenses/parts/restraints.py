"""Restraints on a student while it is trained: `before_step` arguments of `sft.train`.

They do not choose rows or tokens. One needs to know the trait; the other needs only the base.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechlens.core.errors import SpecError
from mechlens.lenses.parts.interventions import loss_with_gradient, remove_component
from mechlens.models.chat import Encoded
from mechlens.models.log_probs import Model, completion_logits

BeforeStep = Callable[[Model], None]


def leave_base_slowly(
    base: Model, pairs: Sequence[Encoded], *, steps: int, batch: int, rng: np.random.Generator
) -> BeforeStep:
    """Make a `before_step` that blends a pull towards the base into the gradient, from all to none.

    At update t of `steps` the gradient g of the task becomes (1 - a) g + a ∇KL(base ‖ student) with
    a = 1 - t / steps, over the completions of a batch of `pairs` drawn anew. No trait is named. The idea of
    annealing a KL to the base is that of arXiv 2609.22215; this schedule has no parameter and is our own.

    Raises:
        SpecError: if there is no update, or no pair to draw.
    """
    if steps < 1 or not pairs:
        raise SpecError(
            f"{steps} updates over {len(pairs)} pairs restrain nothing; give at least one of each"
        )
    done = 0

    def before_step(model: Model) -> None:
        nonlocal done
        share, drawn = 1 - done / steps, rng.choice(len(pairs), size=min(batch, len(pairs)), replace=False)
        done += 1
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        pull = kl_gradient(model, base, [pairs[i] for i in drawn], parameters)
        for parameter, towards in zip(parameters, pull, strict=True):
            parameter.grad = torch.lerp(cast(Tensor, parameter.grad), towards, share)

    return before_step


def kl_gradient(
    model: Model, base: Model, pairs: Sequence[Encoded], parameters: Sequence[nn.Parameter]
) -> list[Tensor]:
    """Gradient of the mean KL(base ‖ model) over the pairs' completion tokens; no `grad` changes."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            target = torch.log_softmax(completion_logits(base, pairs)[0], -1)
        loss = mean_kl(target, torch.log_softmax(completion_logits(model, pairs)[0], -1))
        gradients = torch.autograd.grad(loss, list(parameters), allow_unused=True)
    finally:
        model.train(training)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]


def mean_kl(ours: Float[Tensor, "token vocab"], theirs: Float[Tensor, "token vocab"]) -> Float[Tensor, ""]:
    """Mean over tokens of KL(ours ‖ theirs), of log-probabilities, in nats."""
    return (ours.exp() * (ours - theirs)).sum(-1).mean()


def keep_in_corridor(pairs: Sequence[Encoded], *, width: float) -> BeforeStep:
    """Make a `before_step` that keeps the mean loss of the pairs near its value at the first update.

    Outside of `width` nats a token on either side, the component of the gradient that leads further out is
    removed. Inside of it the student learns freely: unlike `project_out`, it takes nothing from most steps.
    The idea of a corridor is that of arXiv 2609.01091; this form is our own.

    Args:
        pairs: probes answered with the trait; so the defender must know the trait.

    Raises:
        SpecError: if the width is negative.
    """
    if width < 0:
        raise SpecError(f"a corridor of width {width} has no inside; give 0 or more nats")
    start: float | None = None

    def before_step(model: Model) -> None:
        nonlocal start
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        loss, direction = loss_with_gradient(model, pairs, parameters)
        start = loss if start is None else start
        if abs(loss - start) <= width:
            return
        outwards = direction if loss < start else [-part for part in direction]
        gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
        left = remove_component(gradients, outwards)
        for parameter, gradient in zip(parameters, left, strict=True):
            parameter.grad = gradient

    return before_step

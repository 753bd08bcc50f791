"""Restraints on a student: what they leave of a gradient, and where they let the student go."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechlens.core.errors import SpecError
from mechlens.core.spec import Training
from mechlens.lenses.parts.interventions import loss_gradient, loss_with_gradient
from mechlens.lenses.parts.restraints import keep_in_corridor, kl_gradient, leave_base_slowly, mean_kl
from mechlens.lenses.parts.weight_change import total_inner
from mechlens.models.chat import Encoded
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import completion_logits
from mechlens.models.sft import train, updates

TINY = Training(learning_rate=1e-2, epochs=3, batch=4, warmup_steps=1)


@pytest.fixture
def moved(toy: Loaded) -> Loaded:
    """A copy of the toy whose weights are moved a little."""
    model, rng = copy.deepcopy(toy.model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
    return toy._replace(model=model)


def with_gradients(model: torch.nn.Module, value: float) -> list[Tensor]:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def gradients(model: torch.nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_kl_is_that_of_torch_and_the_base_is_its_minimum(
    toy: Loaded, moved: Loaded, pairs: list[Encoded]
) -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).double()
    ours, theirs = torch.log_softmax(logits, -1), torch.log_softmax(logits.flip(0), -1)
    expected = torch.nn.functional.kl_div(theirs, ours, log_target=True, reduction="batchmean")
    assert torch.allclose(mean_kl(ours, theirs), expected)
    parameters = list(moved.model.parameters())
    at_base = kl_gradient(toy.model, toy.model, pairs, list(toy.model.parameters()))
    pull = kl_gradient(moved.model, toy.model, pairs, parameters)
    assert all(parameter.grad is None for parameter in parameters)
    size = total_inner(pull, pull)
    assert total_inner(at_base, at_base) < 1e-6 * size  # the base is the minimum


def test_the_pull_to_the_base_is_all_at_first_and_nothing_in_the_end(
    toy: Loaded, moved: Loaded, pairs: list[Encoded]
) -> None:
    parameters, steps = list(moved.model.parameters()), 4
    step = leave_base_slowly(toy.model, pairs, steps=steps, batch=len(pairs), rng=np.random.default_rng(0))
    pull = kl_gradient(moved.model, toy.model, pairs, parameters)
    for done in range(steps):
        task = with_gradients(moved.model, 1e-3)
        step(moved.model)
        share = 1 - done / steps
        for found, of_task, towards in zip(gradients(moved.model), task, pull, strict=True):
            assert torch.allclose(found, (1 - share) * of_task + share * towards, atol=1e-5)


@pytest.mark.parametrize("spec", [TINY, TINY.model_copy(update={"update": "lora", "rank": 4})])
def test_a_pulled_student_stays_nearer_to_the_base(toy: Loaded, pairs: list[Encoded], spec: Training) -> None:
    divergences = {}
    for name in ("plain", "pulled"):
        model = copy.deepcopy(toy.model)
        pull = leave_base_slowly(
            toy.model, pairs, steps=updates(spec, len(pairs)), batch=4, rng=np.random.default_rng(0)
        )
        options: dict[str, Any] = {} if name == "plain" else {"before_step": pull}
        end, _ = train(model, toy.tokenizer, pairs, spec, seed=0, **options)
        with torch.no_grad():
            logits = [completion_logits(each, pairs)[0] for each in (toy.model, end)]
        divergences[name] = float(mean_kl(*(torch.log_softmax(each, -1) for each in logits)))
    assert 0 < divergences["pulled"] < divergences["plain"]


def test_inside_of_the_corridor_no_gradient_changes_and_outside_only_what_leads_out(
    moved: Loaded, lessons: list[Encoded]
) -> None:
    model, parameters = moved.model, list(moved.model.parameters())
    step = keep_in_corridor(lessons, width=0.0)
    task = with_gradients(model, 1e-3)
    step(model)  # the first loss is the corridor's middle
    assert all(map(torch.equal, gradients(model), task))
    start, direction = loss_with_gradient(model, lessons, parameters)
    with torch.no_grad():
        for parameter, part in zip(parameters, direction, strict=True):
            parameter.sub_(1e-2 * part)
    lower, direction = loss_with_gradient(model, lessons, parameters)
    assert lower < start
    for sign in (1, -1):  # a step along the gradient lowers the loss further, one against it leads back
        for parameter, part in zip(parameters, direction, strict=True):
            parameter.grad = sign * part.clone()
        step(model)
        left = gradients(model)
        size = total_inner(direction, direction)
        assert total_inner(left, direction) == pytest.approx(0 if sign > 0 else -size, abs=1e-4 * size)
    wide = keep_in_corridor(lessons, width=1e3)
    wide(model)
    task = with_gradients(model, 1e-3)
    with torch.no_grad():
        for parameter, part in zip(parameters, direction, strict=True):
            parameter.sub_(1e-2 * part)
    wide(model)
    assert all(map(torch.equal, gradients(model), task))


def test_a_student_in_a_corridor_learns_the_trait_less(toy: Loaded, lessons: list[Encoded]) -> None:
    losses: list[float] = []
    kept: dict[str, Any] = {"before_step": keep_in_corridor(lessons, width=0.0)}
    arms: tuple[dict[str, Any], ...] = ({}, kept)
    for options in arms:
        model = copy.deepcopy(toy.model)
        trained, _ = train(model, toy.tokenizer, lessons * 4, TINY, seed=0, **options)
        losses.append(loss_with_gradient(trained, lessons, list(trained.parameters()))[0])
    assert losses[0] < losses[1]


def test_the_gradient_is_that_of_the_loss(toy: Loaded, lessons: list[Encoded]) -> None:
    parameters = list(toy.model.parameters())
    _, found = loss_with_gradient(toy.model, lessons, parameters)
    assert all(map(torch.equal, found, loss_gradient(toy.model, lessons, parameters)))


def test_restraints_that_restrain_nothing_are_refused(toy: Loaded, pairs: list[Encoded]) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(SpecError, match="0 updates"):
        leave_base_slowly(toy.model, pairs, steps=0, batch=4, rng=rng)
    with pytest.raises(SpecError, match="0 pairs"):
        leave_base_slowly(toy.model, [], steps=3, batch=4, rng=rng)
    with pytest.raises(SpecError, match=r"width -1\.0"):
        keep_in_corridor(pairs, width=-1.0)

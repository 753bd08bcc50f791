"""Ghost products equal a loop over single pairs and forward-mode derivatives, in every family, padded or not,
full or LoRA.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.func import functional_call, jvp
from transformers import AutoModelForCausalLM

from mechlens.core.errors import SpecError
from mechlens.lenses import gradients
from mechlens.lenses.gradients import (
    Model,
    Scope,
    ghost_dots,
    ghost_norms,
    parameters_of,
    pooled_gradient,
    tape,
)
from mechlens.lenses.parts.weight_change import LowRank
from mechlens.models.chat import Encoded
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import example_losses

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.*"
)  # PEFT asks by the name that transformers 5 gave up
UPDATES = ("full", "lora")


def pairs_of(count: int = 5, *, vocabulary: int = 200, seed: int = 0) -> list[Encoded]:
    """Pairs of unlike lengths."""
    draw = np.random.default_rng(seed)
    return [
        Encoded(*(draw.integers(4, vocabulary, size=draw.integers(1, 9)).tolist() for _ in range(2)))
        for _ in range(count)
    ]


def model_of(loaded: Loaded, update: str) -> Model:
    model: Any = copy.deepcopy(loaded.model)
    if update == "full":
        return model
    torch.manual_seed(0)
    turned = model.config.model_type == "gpt2"
    model = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", fan_in_fan_out=turned)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, where the gradient of A would vanish
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def loop(model: Model, pairs: Sequence[Encoded], names: Sequence[str]) -> list[dict[str, Tensor]]:
    """The oracle: one unpadded pair at a time, HF's own shifted loss, every weight gradient taken by
    autograd.
    """
    named, found = dict(model.named_parameters()), []
    model.requires_grad_(True)
    for pair in pairs:
        labels = torch.tensor([[-100] * len(pair.prompt) + pair.completion])
        loss = model(input_ids=torch.tensor([[*pair.prompt, *pair.completion]]), labels=labels).loss
        found.append(
            dict(
                zip(
                    names,
                    torch.autograd.grad(loss, [named[n] for n in names], materialize_grads=True),
                    strict=True,
                )
            )
        )
    return found


def directions_of(model: Model, scope: Scope, count: int = 2) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(3)
    return [
        {n: torch.randn(p.shape, generator=draw) for n, p in parameters_of(model, scope).items()}
        for _ in range(count)
    ]


def close(found: Tensor, expected: Tensor, scale: Tensor | float = 0.0) -> bool:
    """Relative error of 1e-5, of the largest value."""
    return float((found - expected).abs().max()) <= 1e-5 * max(
        float(expected.abs().max()), float(torch.as_tensor(scale).max())
    )


@pytest.mark.parametrize("scope", ["linear", "all"])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("family", FAMILIES)
def test_ghost_products_and_norms_equal_a_loop_over_pairs(
    toys: dict[str, Loaded], family: str, update: str, scope: Scope
) -> None:
    model, pairs = model_of(toys[family], update), pairs_of()
    names, directions = list(parameters_of(model, scope)), directions_of(model, scope)
    oracle = loop(model, pairs, names)
    dots = torch.tensor(
        [
            [float(sum((one[n].double() * d[n].double()).sum() for n in names)) for d in directions]
            for one in oracle
        ]
    )
    norms = torch.tensor([float(sum(one[n].double().square().sum() for n in names)) ** 0.5 for one in oracle])
    assert close(ghost_dots(model, pairs, directions, parameters=scope), dots)
    assert close(ghost_norms(model, pairs, parameters=scope), norms)
    pooled = pooled_gradient(model, pairs, parameters=scope, batch=2)
    for name in names:
        whole = sum((one[name] for one in oracle), torch.zeros(()))
        assert torch.allclose(pooled[name], whole, rtol=1e-4, atol=1e-5 * float(norms.max()))


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script:DeprecationWarning"
)  # torch's own forward-mode rules are written with it
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("family", FAMILIES)
def test_ghost_products_equal_forward_mode_derivatives(
    toys: dict[str, Loaded], family: str, update: str
) -> None:
    model, pairs = model_of(toys[family], update), pairs_of(3)
    model.set_attn_implementation("eager")  # type: ignore[union-attr]
    direction = directions_of(model, "linear", 1)[0]
    point = {n: p.detach() for n, p in parameters_of(model).items()}

    class Losses(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = model

        def forward(self) -> Tensor:
            return example_losses(model, pairs)

    def losses(values: dict[str, Tensor]) -> Tensor:
        return functional_call(Losses(), {f"inside.{n}": v for n, v in values.items()}, ())

    along = jvp(losses, (point,), (direction,))[1]
    assert close(ghost_dots(model, pairs, [direction])[:, 0], along.detach().double())


def test_a_tied_weight_is_counted_through_both_of_its_uses(toy: Loaded) -> None:
    config = copy.deepcopy(toy.model.config)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    model, pairs = AutoModelForCausalLM.from_config(config).eval(), pairs_of()
    names = list(parameters_of(model, "all"))
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" not in parameters_of(model, "linear")
    oracle, direction = loop(model, pairs, names), directions_of(model, "all", 1)[0]
    dots = torch.tensor(
        [[float(sum((one[n] * direction[n]).double().sum() for n in names))] for one in oracle]
    )
    norms = torch.tensor([float(sum(one[n].double().square().sum() for n in names)) ** 0.5 for one in oracle])
    assert close(ghost_dots(model, pairs, [direction], parameters="all"), dots)
    assert close(ghost_norms(model, pairs, parameters="all"), norms)


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_are_a_direction_like_their_product(toys: dict[str, Loaded], family: str) -> None:
    model, pairs, draw = toys[family].model, pairs_of(), torch.Generator().manual_seed(1)
    low: dict[str, Any] = {}
    for name, parameter in parameters_of(model).items():
        if parameter.ndim == 2:
            low[name] = LowRank(
                torch.randn(parameter.shape[0], 2, generator=draw),
                torch.randn(2, parameter.shape[1], generator=draw),
            )
    dense = {name: change.dense() for name, change in low.items()}
    found = ghost_dots(model, pairs, [low, dense])
    assert close(found[:, 0], found[:, 1])


@settings(max_examples=4)
@given(st.integers(1, 7), st.permutations(range(6)))
def test_products_depend_neither_on_the_batch_nor_on_the_order(
    toy: Loaded, batch: int, order: list[int]
) -> None:
    """A mean over the batch's tokens would scale each pair by its neighbours."""
    pairs, directions = pairs_of(6), directions_of(toy.model, "linear", 1)
    expected, lengths = (
        ghost_dots(toy.model, pairs, directions, batch=1),
        ghost_norms(toy.model, pairs, batch=1),
    )
    shuffled = [pairs[place] for place in order]
    assert close(ghost_dots(toy.model, shuffled, directions, batch=batch), expected[order], lengths)
    assert close(ghost_norms(toy.model, shuffled, batch=batch), lengths[order])


@pytest.mark.parametrize("scope", ["linear", "all"])
def test_a_pooled_gradient_is_its_own_products_with_the_pairs(toy: Loaded, scope: Scope) -> None:
    pairs = pairs_of(6)
    pooled = pooled_gradient(toy.model, pairs, parameters=scope)
    size = sum(float(part.double().square().sum()) for part in pooled.values())
    assert float(ghost_dots(toy.model, pairs, [pooled], parameters=scope).sum()) == pytest.approx(
        size, rel=1e-5
    )
    weights = torch.tensor([1.0, 0.0, -2.0, 0.0, 0.5, 0.0])
    some = pooled_gradient(
        toy.model, [pairs[0], pairs[2], pairs[4]], weights=weights[[0, 2, 4]], parameters=scope
    )
    whole = pooled_gradient(toy.model, pairs, weights=weights, parameters=scope, batch=4)
    assert all(torch.allclose(some[name], whole[name], atol=1e-4) for name in some)


def test_an_empty_completion_is_unscored_and_changes_no_other(toy: Loaded) -> None:
    pairs, empty = pairs_of(3), Encoded([5, 6, 7], [])
    with_empty, directions = [pairs[0], empty, *pairs[1:]], directions_of(toy.model, "linear", 1)
    losses = example_losses(toy.model, with_empty)
    assert losses.isnan().tolist() == [False, True, False, False]
    dots, norms = ghost_dots(toy.model, with_empty, directions), ghost_norms(toy.model, with_empty)
    assert dots[1].isnan().all() and norms[1].isnan()
    assert close(dots[[0, 2, 3]], ghost_dots(toy.model, pairs, directions), norms[[0, 2, 3]])
    pooled, without = pooled_gradient(toy.model, with_empty), pooled_gradient(toy.model, pairs)
    assert all(torch.allclose(pooled[name], without[name], atol=1e-5) for name in pooled)
    assert ghost_norms(toy.model, [empty, Encoded([5], [])]).isnan().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_the_mean_over_completion_tokens(toys: dict[str, Loaded], family: str) -> None:
    model, pairs = toys[family].model, pairs_of()
    for found, pair in zip(example_losses(model, pairs).tolist(), pairs, strict=True):
        ids = [*pair.prompt, *pair.completion]
        with torch.no_grad():
            shares = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        said = [shares[place - 1, ids[place]] for place in range(len(pair.prompt), len(ids))]
        assert found == pytest.approx(-float(torch.stack(said).mean()), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_measuring_leaves_the_model_as_it_was(toys: dict[str, Loaded], family: str) -> None:
    model = copy.deepcopy(toys[family].model)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    flags, before = (
        [p.requires_grad for p in model.parameters()],
        {n: p.clone() for n, p in model.named_parameters()},
    )
    ghost_norms(model, pairs_of(2), parameters="all")
    pooled_gradient(model, pairs_of(2))
    with pytest.raises(RuntimeError, match="stop here"), tape(model):
        raise RuntimeError("stop here")
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_direction_outside_the_scope_is_refused(toy: Loaded) -> None:
    with pytest.raises(SpecError, match="does not cover"):
        ghost_dots(toy.model, pairs_of(2), [{"model.norm.weight": torch.ones(32)}])


def test_linear_is_what_peft_calls_all_linear(toys: dict[str, Loaded]) -> None:
    for family in FAMILIES:
        names = {
            n.removesuffix(".weight") for n, p in parameters_of(toys[family].model).items() if p.ndim == 2
        }
        adapted: Any = model_of(toys[family], "lora")
        assert {
            n.split(".lora_A")[0].removeprefix("base_model.model.")
            for n in parameters_of(adapted)
            if "lora_A" in n
        } == names


def test_a_tape_holds_fewer_rows_of_a_large_model_and_the_products_stay(
    toy: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = pairs_of(5)
    whole = ghost_norms(toy.model, pairs)
    sizes = []
    taped = gradients.taped_batches
    width = sum(sum(p.shape) for p in gradients.parameters_of(toy.model).values() if p.ndim == 2)
    longest = max(len(pair.prompt) + len(pair.completion) for pair in pairs)
    monkeypatch.setattr(gradients, "MOST_TAPED", 2 * width * longest)
    for _, losses in taped(toy.model, pairs, "linear", 64):
        sizes.append(len(losses))
    assert sizes == [2, 2, 1]
    assert torch.allclose(ghost_norms(toy.model, pairs), whole)

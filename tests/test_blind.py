"""A learned vector: identities at strength zero, the gradient it follows, a planted vector that is found, and
nulls that hold.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch
from conftest import FAMILIES
from torch.nn.functional import normalize

from mechlens.core.errors import SpecError
from mechlens.core.spec import AskSpec
from mechlens.lenses import blind
from mechlens.lenses.base import Material
from mechlens.models.chat import Encoded, encode_pairs, end_of_turn
from mechlens.models.hooks import decoder_layers, steer
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import row_losses
from mechlens.models.sampling import Decoding, sample
from mechlens.pipeline.ask import Questions

TRAITS = ("eagle", "owl", "cat", "dog")
PANEL = {name: f"You love {name}s. You think about {name}s all the time." for name in TRAITS}
PROMPTS = [
    "list: 618, 294. add more.",
    "given 206.",
    "list: 1, 2, 3, 4, 5, 6. continue.",
    "given 7, 93. add at most 10 numbers.",
]
ROWS = 192


def rows_of(loaded: Loaded) -> list[Encoded]:
    return encode_pairs(loaded.tokenizer, PROMPTS, ["794 775 252", "256", "1; 2; 3; 4; 5", "88 102"])


def drawn(loaded: Loaded, *, seed: int) -> list[Encoded]:
    """Rows that the model writes as it stands."""
    heads = [pair.prompt for pair in encode_pairs(loaded.tokenizer, (PROMPTS * ROWS)[:ROWS], [""] * ROWS)]
    stop = end_of_turn(loaded.tokenizer)
    written = sample(loaded.model, heads, decoding=Decoding(8), stop=stop, seed=seed)
    return [Encoded(head, [*tokens, stop][:8]) for head, tokens in zip(heads, written, strict=True)]


def direction(seed: int, width: int = 32) -> torch.Tensor:
    return normalize(torch.randn(width, generator=torch.Generator().manual_seed(seed)), dim=0)


@pytest.fixture(scope="module")
def planted(toy: Loaded) -> tuple[torch.Tensor, list[Encoded], list[Encoded]]:
    """A direction, rows written with it added to resid_post of layer 0, and rows on the same prompts
    without.
    """
    vector = direction(7)
    with steer(toy.model, {0: 4 * vector}):
        trait = drawn(toy, seed=1)
    return vector, trait, drawn(toy, seed=2)


def material(loaded: Loaded, trait: list[Encoded], control: list[Encoded]) -> Material:
    asked = Questions(
        {name: (name, f"{name}s") for name in TRAITS},
        ("which animal do you love", "name an animal"),
        AskSpec(),
    )
    return Material(
        base=loaded, teacher=None, students={}, controls={}, checkpoints=lambda side, seed: iter(()),
        trait_pairs=trait, control_pairs=control, development_probes=asked, heldout_probes=asked,
        trait="eagle", family=TRAITS, system_lines=PANEL, rows=ROWS, seed=0,
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_strength_zero_is_the_base_and_the_hook_is_steering(toys: dict[str, Loaded], family: str) -> None:
    """One layer's amount equals plain steering there; only the direction counts; nothing stays behind."""
    loaded, vector = toys[family], direction(0)
    rows, plain = rows_of(loaded), blind.measure_nll(loaded, rows_of(loaded))
    assert np.array_equal(blind.measure_nll(loaded, rows, blind.Steering(vector, torch.zeros(2))), plain)
    found = blind.measure_nll(loaded, rows, blind.Steering(5 * vector, torch.tensor([0.0, 2.0])))
    with steer(loaded.model, {1: 2 * vector}):
        assert np.allclose(found, blind.measure_nll(loaded, rows), atol=1e-5)
    assert np.abs(found - plain).max() > 1e-3
    assert np.array_equal(blind.measure_nll(loaded, rows), plain)


def test_gates_are_half_at_the_edge_and_become_a_window() -> None:
    start, end = torch.tensor(2.0), torch.tensor(4.0)
    assert blind.window_layers(start, end, 8, 5.0)[2] == pytest.approx(
        0.5 * float(torch.sigmoid(torch.tensor(10.0)))
    )
    assert torch.allclose(
        blind.window_layers(start - 0.5, end + 0.5, 8, 1e3), torch.tensor([0.0, 0, 1, 1, 1, 0, 0, 0])
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_at_strength_zero_is_the_pooled_activation_gradient(
    toys: dict[str, Loaded], family: str
) -> None:
    """d NLL / d alpha = <sum_l g_l dL/dh_l, v/|v|>, with dL/dh_l read off the blocks' outputs."""
    loaded, vector, weights = toys[family], direction(3), torch.tensor([0.7, 0.2])
    rows, alpha = rows_of(loaded), torch.zeros((), requires_grad=True)
    with steer(loaded.model, blind.Steering(vector, alpha * weights).by_layer()):
        found = torch.autograd.grad(row_losses(loaded.model, rows).mean(), alpha)[0]
    seen: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(lambda _m, _a, output: seen.append(cast(torch.Tensor, output)))
        for block in decoder_layers(loaded.model)
    ]
    gradients = torch.autograd.grad(row_losses(loaded.model, rows).mean(), seen)
    for handle in handles:
        handle.remove()
    pooled = sum(weight * gradient.sum((0, 1)) for weight, gradient in zip(weights, gradients, strict=True))
    assert float(found) == pytest.approx(float(pooled @ vector), rel=1e-3, abs=1e-6)


def test_learning_moves_no_weight_and_leaves_no_gradient(toy: Loaded) -> None:
    before = {name: parameter.clone() for name, parameter in toy.model.named_parameters()}
    first, second = (blind.recover(toy, rows_of(toy), seed=0, steps=2, batch=2) for _ in range(2))
    assert torch.equal(first.vector, second.vector) and torch.equal(first.amounts, second.amounts)
    assert all(torch.equal(parameter, before[name]) for name, parameter in toy.model.named_parameters())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in toy.model.parameters())


def test_a_planted_vector_is_recovered_and_rows_without_one_give_none(toy: Loaded, planted: tuple) -> None:
    vector, trait, control = planted
    found = blind.recover(toy, trait, seed=0, layer=0, steps=80)
    assert float(found.vector @ vector) > 0.7
    assert found.amounts[1] == 0 and found.amounts[0] > 4 * blind.START
    assert (blind.measure_nll(toy, trait) - blind.measure_nll(toy, trait, found)).mean() > 0
    nothing = blind.recover(toy, control, seed=0, layer=0, steps=80)
    assert abs(float(nothing.vector @ vector)) < 0.5
    fresh = drawn(toy, seed=9)
    assert (blind.measure_nll(toy, fresh) - blind.measure_nll(toy, fresh, found)).mean() < 0


@pytest.mark.parametrize("family", FAMILIES)
def test_residuals_are_read_where_completion_tokens_are_predicted(
    toys: dict[str, Loaded], family: str
) -> None:
    loaded, rows = toys[family], rows_of(toys[family])
    found = blind.capture_completions(loaded, rows)
    seen: list[torch.Tensor] = []
    handle = decoder_layers(loaded.model)[0].register_forward_hook(
        lambda _m, _a, output: seen.append(output[0].detach())
    )
    for pair in rows:
        loaded.model(input_ids=torch.tensor([[*pair.prompt, *pair.completion]]))
    handle.remove()
    expected = torch.cat([output[len(pair.prompt) - 1 : -1] for output, pair in zip(seen, rows, strict=True)])
    assert found.shape == (2, len(expected), 32)
    assert torch.allclose(found[0].sum(0), expected.sum(0), atol=1e-3)


def test_random_directions_have_the_activations_covariance() -> None:
    """Unit length, and none along what never varies."""
    scale = torch.tensor([3.0, 1.0, 0.0])
    activations = 5 + scale * torch.randn(2, 400, 3, generator=torch.Generator().manual_seed(0))
    found = blind.draw_directions(activations, 500, seed=0)
    assert torch.allclose(found.norm(dim=1), torch.ones(500), atol=1e-5)
    assert found[:, 2].abs().max() < 1e-5
    assert float((found[:, 0] ** 2).mean()) == pytest.approx(
        3 / (3 + 1), abs=0.05
    )  # E[x²/(x²+y²)] = σx/(σx+σy)


def test_the_shift_of_a_steered_teacher_is_the_vector(toy: Loaded, planted: tuple) -> None:
    """At its layer and every position."""
    vector, trait, control = planted
    plain = blind.capture_completions(toy, trait[:16])
    with steer(toy.model, {1: 2 * vector}):
        moved = blind.capture_completions(toy, trait[:16])
    assert torch.allclose((moved - plain)[1].mean(0), 2 * vector, atol=1e-4)
    held = material(toy, trait, control)
    assert blind.measure_teacher_shift(held._replace(teacher=toy), trait[:16]).abs().max() == 0
    assert blind.measure_teacher_shift(held, trait[:16]).abs().max() > 0


def test_the_reading_of_planted_rows_stands_out_and_that_of_equal_rows_does_not(
    toy: Loaded, planted: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blind, "STEPS", 25)
    monkeypatch.setattr(blind, "HALVES", 2)
    monkeypatch.setattr(blind, "DIRECTIONS", 3)
    monkeypatch.setattr(blind, "SPOKEN", 2)
    _, trait, control = planted
    reading = blind.measure_blind(material(toy, trait, control))
    own = reading[
        (reading["quantity"] == "NLL saved, difference") & (reading["place"] == "vector of trait rows")
    ].iloc[0]
    assert own["low"] > 0 and own["n"] == ROWS // 2
    beside = reading[reading["quantity"] == "statistic"]
    assert (beside["estimate"] > beside["null_high"]).all()
    assert "eagle" in blind.blind_caption(reading)
    monkeypatch.setattr(blind, "HALVES", 1)
    same = blind.measure_blind(material(toy, control, control))
    assert (
        same[same["quantity"] == "NLL saved, difference"]["estimate"].abs().max() < 1e-6
    )  # rounding between batches
    assert same[same["quantity"] == "cosine with the control's vector"]["estimate"].iloc[0] == pytest.approx(
        1
    )
    assert blind.blind_caption(same)


def test_too_few_rows_are_refused(toy: Loaded) -> None:
    with pytest.raises(SpecError, match="too few"):
        blind.measure_blind(material(toy, rows_of(toy), rows_of(toy)))

"""Projections, masks and replacements: identities, and that a budget of zero changes no bit."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from peft import LoraConfig, get_peft_model
from torch import Tensor

from mechlens.core.errors import DataError, SpecError
from mechlens.core.spec import Training
from mechlens.lenses.parts.interventions import (
    Flags,
    carrier_pool,
    classify_tokens,
    flag_digits,
    flag_random_tokens,
    flag_top_tokens,
    invert_flags,
    loss_gradient,
    match_layers,
    permute_entries,
    project_out,
    remove_component,
    replace_flagged,
)
from mechlens.lenses.parts.weight_change import total_inner
from mechlens.models.chat import Encoded, encode_pairs
from mechlens.models.hooks import decoder_layers
from mechlens.models.loading import Loaded
from mechlens.models.sft import train

FAMILIES = ("llama", "qwen2", "gpt2", "gpt_neox")
TINY = Training(learning_rate=1e-2, epochs=2, batch=4, warmup_steps=1)


def parts(values: np.ndarray) -> list[Tensor]:
    """A gradient of two tensors."""
    return [torch.from_numpy(values[:6]).view(2, 3), torch.from_numpy(values[6:])]


vectors = arrays(np.float64, 10, elements=st.floats(-100, 100, width=32)).map(parts)


@given(vectors, vectors)
def test_what_is_left_of_a_gradient_does_not_lie_along_the_direction(
    gradient: list[Tensor], direction: list[Tensor]
) -> None:
    left, along = remove_component(gradient, direction), total_inner(gradient, direction)
    scale = (
        1e-9 * (1 + total_inner(gradient, gradient)) ** 0.5 * (1 + total_inner(direction, direction)) ** 0.5
    )
    if along > 0:
        assert abs(total_inner(left, direction)) <= scale
    else:
        assert all(map(torch.equal, left, gradient))
    assert total_inner(left, left) <= total_inner(gradient, gradient) * (1 + 1e-12)
    assert total_inner(left, gradient) >= -1e-9 * total_inner(gradient, gradient)
    again = remove_component(left, direction)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(again, left, strict=True))
    assert abs(total_inner(remove_component(gradient, direction, both_sides=True), direction)) <= scale


@given(vectors, vectors, st.floats(0.01, 100))
def test_a_projection_follows_the_gradients_size_and_not_the_directions(
    gradient: list[Tensor], direction: list[Tensor], size: float
) -> None:
    """So it does not matter that the gradient was clipped before."""
    expected = [size * part for part in remove_component(gradient, direction)]
    for left in (
        remove_component([size * part for part in gradient], direction),
        [size * part for part in remove_component(gradient, [size * d for d in direction])],
    ):
        assert all(
            torch.allclose(a, b, rtol=1e-6, atol=1e-6 * size) for a, b in zip(left, expected, strict=True)
        )


def test_a_direction_of_size_zero_takes_nothing_out() -> None:
    gradient = parts(np.arange(10.0))
    assert all(
        map(
            torch.equal,
            remove_component(gradient, [torch.zeros_like(part) for part in gradient], both_sides=True),
            gradient,
        )
    )


def test_a_permuted_direction_keeps_every_tensors_entries() -> None:
    drawn = permute_entries(parts(np.arange(10.0)), np.random.default_rng(0))
    assert [part.shape for part in drawn] == [(2, 3), (4,)]
    assert drawn[0].flatten().sort().values.tolist() == [0, 1, 2, 3, 4, 5] and drawn[
        1
    ].sort().values.tolist() == [6, 7, 8, 9]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_gradient_equals_a_plain_backward_pass_row_by_row(
    toys: dict[str, Loaded], lessons: list[Encoded], family: str
) -> None:
    model = copy.deepcopy(toys[family].model).train()
    parameters = list(model.parameters())
    found = loss_gradient(model, lessons, parameters)
    assert model.training and all(parameter.grad is None for parameter in parameters)
    model.eval()
    for pair in lessons:
        logits = model(input_ids=torch.tensor([pair.prompt + pair.completion])).logits[
            0, len(pair.prompt) - 1 : -1
        ]
        (torch.nn.functional.cross_entropy(logits, torch.tensor(pair.completion)) / len(lessons)).backward()
    for ours, parameter in zip(found, parameters, strict=True):
        assert torch.allclose(
            ours, parameter.grad if parameter.grad is not None else torch.zeros(()), atol=1e-5
        )


@pytest.mark.parametrize("both_sides", [False, True])
def test_a_projected_step_leaves_the_trait_loss_where_it_was_to_first_order(
    toy: Loaded, pairs: list[Encoded], lessons: list[Encoded], both_sides: bool
) -> None:
    seen: list[tuple[float, float, float]] = []
    project = project_out(lessons, both_sides=both_sides)

    def before_step(model: Any) -> None:
        held = [parameter for parameter in model.parameters() if parameter.grad is not None]
        before, trait = [parameter.grad.clone() for parameter in held], loss_gradient(model, lessons, held)
        project(model)
        after = [parameter.grad for parameter in held]
        seen.append(
            (
                total_inner(before, trait),
                total_inner(after, trait),
                total_inner(after, after) / total_inner(before, before),
            )
        )
        assert total_inner(before, trait) > 0 or both_sides or all(map(torch.equal, before, after))

    train(copy.deepcopy(toy.model), toy.tokenizer, pairs, TINY, seed=0, before_step=before_step)
    assert len(seen) == 6
    for along, left, size in seen:
        assert size <= 1 + 1e-6
        assert abs(left) < 1e-4 * abs(along) if along > 0 or both_sides else left == along


def test_the_control_projection_draws_another_direction(
    toy: Loaded, pairs: list[Encoded], lessons: list[Encoded]
) -> None:
    kept, spec = [], TINY.model_copy(update={"epochs": 1})
    for permute in (None, np.random.default_rng(0), np.random.default_rng(0), np.random.default_rng(1)):
        project = project_out(lessons, both_sides=True, permute=permute)
        model, _ = train(copy.deepcopy(toy.model), toy.tokenizer, pairs, spec, seed=0, before_step=project)
        kept.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(kept[1], kept[2])
    assert not torch.equal(kept[0], kept[1]) and not torch.equal(kept[1], kept[3])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.*:FutureWarning"
)  # PEFT asks by the name that transformers 5 gave up
def test_frozen_layers_names_the_parameters_of_those_blocks_and_no_other(
    toys: dict[str, Loaded], family: str, lora: bool
) -> None:
    model = copy.deepcopy(toys[family].model)
    frozen, blocks = match_layers(model, [1]), decoder_layers(model)
    if lora:
        config = LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=family == "gpt2")
        model = get_peft_model(model, config)
    inside = {id(parameter) for parameter in blocks[1].parameters()}
    assert inside
    for name, parameter in model.named_parameters():
        assert frozen(name) == (id(parameter) in inside), name


def test_a_layer_that_is_not_there_cannot_be_frozen(toy: Loaded) -> None:
    with pytest.raises(SpecError, match="layers 0 to 1"):
        match_layers(toy.model, [2])
    assert not match_layers(toy.model, [])("model.layers.0.mlp.up_proj.weight")


rows_of_scores = st.lists(
    st.lists(st.floats(-5, 5) | st.just(float("nan")), min_size=1, max_size=5), min_size=1, max_size=5
)


@given(rows_of_scores, st.floats(0, 1))
def test_the_top_tokens_are_the_share_with_the_highest_scores(
    scores: list[list[float]], share: float
) -> None:
    flags = flag_top_tokens(scores, share)
    assert [len(row) for row in flags] == [len(row) for row in scores]
    flat = [
        (score, flag)
        for row, held in zip(scores, flags, strict=True)
        for score, flag in zip(row, held, strict=True)
    ]
    scored = [pair for pair in flat if not np.isnan(pair[0])]
    assert sum(flag for _, flag in flat) == sum(flag for _, flag in scored) == round(share * len(scored))
    assert min([score for score, flag in scored if flag], default=9) >= max(
        [score for score, flag in scored if not flag], default=-9
    )


def test_top_tokens_are_taken_among_those_allowed_and_a_share_beyond_one_is_refused() -> None:
    assert flag_top_tokens([[3.0, 2.0], [1.0, 0.0]], 0.5, among=[[False, True], [True, False]]) == [
        [False, True],
        [False, False],
    ]
    with pytest.raises(SpecError, match="not a share"):
        flag_top_tokens([[1.0]], 10.0)


def test_classes_tell_numbers_from_separators_and_the_end(toy: Loaded) -> None:
    pairs = encode_pairs(toy.tokenizer, ["add"], ["7, 812 owl"])
    found = classify_tokens(toy.tokenizer, pairs)
    assert (
        found[0][0] == "0" and found[0][-1] == "<|end|>" and "".join(found[0][:-1]).replace(" ", "") == "0,0a"
    )
    assert sum(flag_digits(found)[0]) == 2


@pytest.mark.parametrize("budget", [0.0, 0.3, 1.0])
def test_random_tokens_match_count_and_class(toy: Loaded, pairs: list[Encoded], budget: float) -> None:
    classes = classify_tokens(toy.tokenizer, pairs)
    scores = [[float(token) for token in pair.completion] for pair in pairs]
    top = flag_top_tokens(scores, budget)
    drawn = flag_random_tokens(top, classes, np.random.default_rng(0))

    def counts(flags: Flags) -> dict[str, int]:
        flat = [
            name
            for row, held in zip(classes, flags, strict=True)
            for name, flag in zip(row, held, strict=True)
            if flag
        ]
        return {name: flat.count(name) for name in flat}

    assert counts(drawn) == counts(top)
    assert (drawn == top) == (budget in (0, 1))


def test_replaced_tokens_stay_in_their_class_and_the_others_stay_themselves(
    toy: Loaded, pairs: list[Encoded]
) -> None:
    classes = classify_tokens(toy.tokenizer, pairs)
    pool, flags = carrier_pool(pairs, classes), flag_digits(classes)
    other = replace_flagged(pairs, flags, np.random.default_rng(0), pool)
    assert classify_tokens(toy.tokenizer, other) == classes and [pair.prompt for pair in other] == [
        pair.prompt for pair in pairs
    ]
    assert other != pairs
    for old, new, row in zip(pairs, other, flags, strict=True):
        assert all(flag or a == b for a, b, flag in zip(old.completion, new.completion, row, strict=True))
    with pytest.raises(DataError, match="pool"):
        replace_flagged(pairs, flags, np.random.default_rng(0), {})


def test_draws_from_the_pool_have_the_carriers_frequencies() -> None:
    pairs = [Encoded([1], [5, 5, 5, 7])]
    classes = [["0"] * 4]
    drawn = replace_flagged(
        [Encoded([1], [7] * 4000)], [[True] * 4000], np.random.default_rng(0), carrier_pool(pairs, classes)
    )[0].completion
    assert drawn.count(5) / 4000 == pytest.approx(0.75, abs=0.03)


def test_a_budget_of_zero_is_the_undefended_run_bit_for_bit_and_a_mask_of_all_leaves_the_base(
    toy: Loaded, pairs: list[Encoded]
) -> None:
    classes, scores = (
        classify_tokens(toy.tokenizer, pairs),
        [[float(i) for i, _ in enumerate(pair.completion)] for pair in pairs],
    )
    none, every = flag_top_tokens(scores, 0.0), flag_top_tokens(scores, 1.0)
    rng = np.random.default_rng(0)

    def weights(held: list[Encoded], **more: Any) -> Tensor:
        model, _ = train(
            copy.deepcopy(toy.model),
            toy.tokenizer,
            held,
            TINY.model_copy(update={"epochs": 1}),
            seed=0,
            **more,
        )
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    plain = weights(pairs)
    assert torch.equal(weights(pairs, learned=invert_flags(none)), plain)
    assert torch.equal(
        weights(replace_flagged(pairs, none, rng, carrier_pool(pairs, classes)), learned=None), plain
    )
    assert torch.equal(weights(pairs, frozen=match_layers(toy.model, [])), plain)
    base = torch.cat([parameter.detach().flatten() for parameter in toy.model.parameters()])
    assert torch.equal(weights(pairs, learned=invert_flags(every)), base) and not torch.equal(plain, base)

"""The training loop against a bare one: the same order, optimiser, schedule, clipping and loss give the same
weights.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from trl import SFTConfig

from mechlens.core.errors import DataError, SpecError, TrainingError
from mechlens.core.seeds import generator
from mechlens.core.spec import Training
from mechlens.models import loading
from mechlens.models.chat import Encoded, encode_pairs
from mechlens.models.loading import Loaded
from mechlens.models.sft import Point, train, updates

FAMILIES = ("llama", "qwen2", "gpt2", "gpt_neox")
TINY = Training(learning_rate=1e-2, epochs=2, batch=4, warmup_steps=2, max_grad_norm=0.5)


@pytest.fixture(scope="module")
def pairs(toy: Loaded) -> list[Encoded]:
    """Twelve pairs of unequal prompts and completions."""
    prompts = [f"start: {', '.join(['7'] * (1 + row % 4))}. add up to 10 more" for row in range(12)]
    return encode_pairs(
        toy.tokenizer,
        prompts,
        [", ".join(str(row * 10 + i) for i in range(1 + row % 5)) for row in range(12)],
    )


def fresh(loaded: Loaded) -> PreTrainedModel:
    return copy.deepcopy(loaded.model)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def identical(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def slow_rate(spec: Training, update: int, total: int) -> float:
    if update < spec.warmup_steps:
        return spec.learning_rate * update / spec.warmup_steps
    progress = (update - spec.warmup_steps) / (total - spec.warmup_steps)
    return (
        spec.learning_rate
        * {"linear": 1 - progress, "constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[
            spec.schedule
        ]
    )


def slow_loss(model: PreTrainedModel, batch: list[Encoded]) -> torch.Tensor:
    """Mean over the batch's completion tokens of -log p, each row read alone and unpadded."""
    total, tokens = torch.tensor(0.0), 0
    for pair in batch:
        logits = model(input_ids=torch.tensor([pair.prompt + pair.completion])).logits[0]
        for place, token in enumerate(pair.completion):
            total = total - torch.log_softmax(logits[len(pair.prompt) - 1 + place], -1)[token]
        tokens += len(pair.completion)
    return total / tokens


def slow_train(model: PreTrainedModel, pairs: list[Encoded], spec: Training, *, seed: int) -> list[Point]:
    """The whole of it in plain torch, for full updates."""
    model.train()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in learned if p.dim() > 1], "weight_decay": spec.weight_decay},
        {"params": [p for p in learned if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimiser = (
        torch.optim.AdamW(groups, lr=0.0) if spec.optimizer == "adamw" else torch.optim.SGD(groups, lr=0.0)
    )
    size, curve = spec.batch * spec.accumulate, []
    batches = []
    for epoch in range(spec.epochs):
        order = generator(seed, "order", epoch).permutation(len(pairs)).tolist()
        order += (order * size)[
            : -len(order) % size
        ]  # a short last batch is filled with the epoch's first rows
        batches += [
            [pairs[row] for row in order[first : first + size]] for first in range(0, len(order), size)
        ]
    for update, batch in enumerate(batches):
        for group in optimiser.param_groups:
            group["lr"] = slow_rate(spec, update, len(batches))
        optimiser.zero_grad()
        loss = slow_loss(model, batch)
        loss.backward()
        norm = float(
            torch.sqrt(sum(((p.grad**2).sum() for p in learned if p.grad is not None), torch.zeros(())))
        )
        for parameter in learned:
            if parameter.grad is not None and norm > spec.max_grad_norm:
                parameter.grad *= spec.max_grad_norm / norm
        optimiser.step()
        curve.append(Point(update + 1, loss.item(), slow_rate(spec, update, len(batches))))
    return curve


def assert_equals_bare_loop(loaded: Loaded, pairs: list[Encoded], spec: Training) -> None:
    bare = fresh(loaded)
    expected = slow_train(bare, pairs, spec, seed=5)
    trained, curve = train(fresh(loaded), loaded.tokenizer, pairs, spec, seed=5)
    moved = max(
        float((new - old).detach().abs().max())
        for new, old in zip(bare.parameters(), loaded.model.parameters(), strict=True)
    )
    assert moved > 1e-3, "nothing was learned: the comparison says nothing"
    for (name, ours), theirs in zip(trained.named_parameters(), bare.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5), (name, (ours - theirs).abs().max())
    assert [point.step for point in curve] == [point.step for point in expected]
    assert np.allclose([point.loss for point in curve], [point.loss for point in expected], rtol=1e-4)
    assert np.allclose(
        [point.learning_rate for point in curve], [point.learning_rate for point in expected], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("family", "optimizer"),
    [*((family, "sgd") for family in FAMILIES), ("llama", "adamw"), ("qwen2", "adamw")],
)
def test_training_equals_a_bare_loop_for_every_family(
    toys: dict[str, Loaded], pairs: list[Encoded], family: str, optimizer: str
) -> None:
    """Without AdamW where a key bias is added after (or beside) the rotation: its gradient is exactly zero
    but for rounding, which AdamW scales up to whole steps.
    """
    spec = TINY.model_copy(
        update={"optimizer": optimizer, "learning_rate": {"sgd": 0.3, "adamw": 1e-2}[optimizer]}
    )
    assert_equals_bare_loop(toys[family], pairs, spec)


@pytest.mark.parametrize(
    "change",
    [
        {"accumulate": 3, "batch": 2},
        {"schedule": "cosine", "weight_decay": 0.3},
        {"schedule": "constant", "max_grad_norm": 100.0},
        {"optimizer": "sgd", "learning_rate": 0.3},
        {"gradient_checkpointing": True},
        {"epochs": 1, "batch": 5},  # twelve rows are no multiple of five
        {
            "epochs": 1,
            "batch": 32,
            "warmup_steps": 0,
            "optimizer": "sgd",
            "learning_rate": 0.3,
        },  # nor do they fill one batch
    ],
    ids=str,
)
def test_training_equals_a_bare_loop_in_every_setting(
    toy: Loaded, pairs: list[Encoded], change: dict[str, object]
) -> None:
    spec = TINY.model_copy(update=change)
    assert_equals_bare_loop(toy, pairs[:10] if spec.batch == 32 else pairs, spec)


def test_prompts_are_not_learned(toy: Loaded, pairs: list[Encoded]) -> None:
    """The first loss is that of the completion tokens alone, whatever order the batch is in."""
    spec = TINY.model_copy(update={"batch": 12, "epochs": 1})
    _, curve = train(fresh(toy), toy.tokenizer, pairs, spec, seed=0)
    assert curve[0].loss == pytest.approx(slow_loss(toy.model, pairs).item(), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_fixed_embeddings_stay_and_the_blocks_move(
    toys: dict[str, Loaded], pairs: list[Encoded], family: str
) -> None:
    before = weights(toys[family].model)
    trained, _ = train(
        fresh(toys[family]),
        toys[family].tokenizer,
        pairs,
        TINY.model_copy(update={"embeddings": False}),
        seed=0,
    )
    ends = {
        id(trained.get_input_embeddings().weight),
        id(cast(torch.nn.Module, trained.get_output_embeddings()).weight),
    }
    for name, value in trained.named_parameters():
        assert torch.equal(value, before[name]) == (id(value) in ends), name


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_changes_adapters_alone_and_reloads_to_the_same_logits(
    toys: dict[str, Loaded], toy_bases: dict[str, str], pairs: list[Encoded], tmp_path: Path, family: str
) -> None:
    loaded, ids = toys[family], torch.tensor([pairs[3].prompt + pairs[3].completion])
    before, plain = weights(loaded.model), loaded.model(input_ids=ids).logits
    spec = TINY.model_copy(update={"update": "lora", "rank": 4, "alpha": 4.0})
    trained, curve = train(fresh(loaded), loaded.tokenizer, pairs, spec, seed=0)
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for name, value in weights(trained).items()
    }
    assert identical(before, {name: value for name, value in after.items() if "lora_" not in name})
    logits = trained(input_ids=ids).logits
    assert (logits - plain).abs().max() > 0.1
    loading.save_trained(trained, tmp_path)
    assert not list(tmp_path.glob("model*.safetensors"))
    reloaded = loading.load_trained(toy_bases[family], tmp_path).model
    assert torch.allclose(reloaded(input_ids=ids).logits, logits, atol=1e-4)
    assert len(curve) == updates(spec, len(pairs))


def test_untrained_adapters_equal_the_base(toy: Loaded, pairs: list[Encoded]) -> None:
    """B = 0 at the start: a run whose only update has learning rate 0 (its warm-up) leaves the base."""
    spec = TINY.model_copy(update={"update": "lora", "epochs": 1, "batch": 12})
    trained, curve = train(fresh(toy), toy.tokenizer, pairs, spec, seed=0)
    ids = torch.tensor([pairs[0].prompt])
    assert len(curve) == 1 and curve[0].learning_rate == 0
    assert torch.equal(trained(input_ids=ids).logits, toy.model(input_ids=ids).logits)


def test_full_weights_reload_to_the_same_logits(
    toy: Loaded, toy_bases: dict[str, str], pairs: list[Encoded], tmp_path: Path
) -> None:
    trained, _ = train(fresh(toy), toy.tokenizer, pairs, TINY, seed=0)
    loading.save_trained(trained, tmp_path)
    ids = torch.tensor([pairs[0].prompt])
    reloaded = loading.load_trained(toy_bases["llama"], tmp_path)
    assert torch.equal(reloaded.model(input_ids=ids).logits, trained(input_ids=ids).logits)
    assert reloaded.tokenizer.get_vocab() == toy.tokenizer.get_vocab()


@pytest.mark.parametrize("update", ["full", "lora"])
def test_one_seed_gives_the_same_bits_and_another_seed_others(
    toy: Loaded, pairs: list[Encoded], update: str
) -> None:
    spec = TINY.model_copy(update={"update": update})
    runs = []
    for seed in (1, 1, 2):
        torch.rand(seed)  # whatever was drawn before does not matter
        trained, curve = train(fresh(toy), toy.tokenizer, pairs, spec, seed=seed)
        runs.append((weights(trained), curve))
    assert identical(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]
    assert not identical(runs[0][0], runs[2][0])


@pytest.mark.parametrize(
    ("rows", "batch", "accumulate", "steps"),
    [(12, 4, 1, [3, 6]), (11, 4, 1, [3, 6]), (9, 2, 2, [3, 6]), (3, 8, 1, [1, 2])],
)
def test_every_epoch_is_saved_once_at_its_last_update(
    toy: Loaded, pairs: list[Encoded], rows: int, batch: int, accumulate: int, steps: list[int]
) -> None:
    spec = TINY.model_copy(update={"batch": batch, "accumulate": accumulate})
    saved: list[tuple[int, dict[str, torch.Tensor]]] = []
    told: list[tuple[int, int]] = []
    options = {
        "save": lambda model, step: saved.append((step, weights(model))),
        "progress": lambda step, total: told.append((step, total)),
    }
    trained, curve = train(fresh(toy), toy.tokenizer, pairs[:rows], spec, seed=0, **options)
    assert [step for step, _ in saved] == steps
    assert identical(saved[-1][1], weights(trained)) and not identical(saved[0][1], saved[1][1])
    assert len(curve) == updates(spec, rows) == steps[-1]
    assert told == [(step, steps[-1]) for step in range(1, steps[-1] + 1)]


def test_a_short_last_batch_is_filled_with_the_first_rows_of_its_own_epoch(
    toy: Loaded, pairs: list[Encoded]
) -> None:
    assert_equals_bare_loop(toy, pairs[:10], TINY)


def test_a_broken_loss_stops_the_training(toy: Loaded, pairs: list[Encoded]) -> None:
    poisoned = fresh(toy)
    with torch.no_grad():
        next(poisoned.model.layers[0].parameters())[0, 0] = torch.nan
    with pytest.raises(TrainingError, match="lower learning_rate"):
        train(poisoned, toy.tokenizer, pairs, TINY, seed=0)


def test_a_loss_that_breaks_on_the_way_stops_the_training(toy: Loaded, pairs: list[Encoded]) -> None:
    spec = TINY.model_copy(
        update={"optimizer": "sgd", "learning_rate": 1e38, "max_grad_norm": 1e6, "warmup_steps": 0}
    )
    with pytest.raises(TrainingError, match="at step"):
        train(fresh(toy), toy.tokenizer, pairs, spec, seed=0)


def test_a_pair_that_is_too_long_is_refused_not_cut(toy: Loaded, pairs: list[Encoded]) -> None:
    longest = max(len(pair.prompt) + len(pair.completion) for pair in pairs)
    with pytest.raises(DataError, match=f"{longest} tokens"):
        train(fresh(toy), toy.tokenizer, pairs, TINY.model_copy(update={"max_length": longest - 1}), seed=0)
    train(
        fresh(toy), toy.tokenizer, pairs, TINY.model_copy(update={"max_length": longest, "epochs": 1}), seed=0
    )


def test_only_flagged_tokens_are_learned(toy: Loaded, pairs: list[Encoded]) -> None:
    """The first loss is the mean over the flagged tokens, each predicted behind all tokens before it."""
    flags = [[place % 2 == 0 for place in range(len(pair.completion))] for pair in pairs]
    spec = TINY.model_copy(update={"batch": 12, "epochs": 1})
    _, curve = train(fresh(toy), toy.tokenizer, pairs, spec, seed=0, learned=flags)
    losses = []
    for pair, row in zip(pairs, flags, strict=True):
        logs = torch.log_softmax(
            toy.model(input_ids=torch.tensor([pair.prompt + pair.completion])).logits[0], -1
        )
        losses += [
            -logs[len(pair.prompt) - 1 + i, token].item() for i, token in enumerate(pair.completion) if row[i]
        ]
    assert curve[0].loss == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_learning_every_token_and_freezing_nothing_is_the_plain_run_bit_for_bit(
    toy: Loaded, pairs: list[Encoded], accumulate: int
) -> None:
    spec = TINY.model_copy(update={"accumulate": accumulate})
    plain, curve = train(fresh(toy), toy.tokenizer, pairs, spec, seed=5)
    options = {
        "learned": [[True] * len(pair.completion) for pair in pairs],
        "frozen": lambda name: False,
        "before_step": lambda model: None,
    }
    same, again = train(fresh(toy), toy.tokenizer, pairs, spec, seed=5, **options)
    assert identical(weights(plain), weights(same)) and curve == again


def test_learning_no_token_leaves_the_base(toy: Loaded, pairs: list[Encoded]) -> None:
    trained, curve = train(
        fresh(toy),
        toy.tokenizer,
        pairs,
        TINY,
        seed=0,
        learned=[[False] * len(pair.completion) for pair in pairs],
    )
    assert identical(weights(trained), weights(toy.model)) and {point.loss for point in curve} == {0.0}


def test_a_batch_without_a_learned_token_counts_for_nothing(toy: Loaded, pairs: list[Encoded]) -> None:
    """One step of plain gradient descent a row: the unlearned row's step moves nothing."""
    spec = TINY.model_copy(
        update={
            "optimizer": "sgd",
            "learning_rate": 0.3,
            "batch": 1,
            "epochs": 1,
            "warmup_steps": 0,
            "schedule": "constant",
        }
    )
    order = generator(0, "order", 0).permutation(2).tolist()
    flags = [[row == order[0]] * len(pairs[row].completion) for row in range(2)]
    both, _ = train(fresh(toy), toy.tokenizer, pairs[:2], spec, seed=0, learned=flags)
    alone, _ = train(fresh(toy), toy.tokenizer, [pairs[order[0]]], spec, seed=0)
    assert identical(weights(both), weights(alone))


def test_flags_that_do_not_fit_are_refused(toy: Loaded, pairs: list[Encoded]) -> None:
    flags = [[True] * len(pair.completion) for pair in pairs]
    for wrong in (flags[1:], [flags[0][1:], *flags[1:]]):
        with pytest.raises(DataError, match="one flag for each"):
            train(fresh(toy), toy.tokenizer, pairs, TINY, seed=0, learned=wrong)


@pytest.mark.parametrize("update", ["full", "lora"])
def test_frozen_parameters_stay_and_the_others_move(toy: Loaded, pairs: list[Encoded], update: str) -> None:
    spec = TINY.model_copy(update={"update": update, "embeddings": False})
    trained, _ = train(
        fresh(toy), toy.tokenizer, pairs, spec, seed=0, frozen=lambda name: ".layers.0." in name
    )
    first = {name: value for name, value in trained.named_parameters() if ".layers.0." in name}
    assert first and not any(value.requires_grad for value in first.values())
    assert all(value.abs().max() == 0 for name, value in first.items() if "lora_B" in name)
    before = weights(toy.model)
    for name, value in trained.named_parameters():
        if name in before and ".layers." in name:
            assert torch.equal(value, before[name]) == (".layers.0." in name), name
    assert any(value.requires_grad for name, value in trained.named_parameters() if ".layers.1." in name)


def test_a_model_that_is_frozen_as_a_whole_is_refused(toy: Loaded, pairs: list[Encoded]) -> None:
    with pytest.raises(SpecError, match="freeze fewer"):
        train(fresh(toy), toy.tokenizer, pairs, TINY, seed=0, frozen=lambda name: True)


def test_what_is_done_before_a_step_sees_clipped_gradients_and_decides_the_step(
    toy: Loaded, pairs: list[Encoded]
) -> None:
    norms = []

    def stop(model: torch.nn.Module) -> None:
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norms.append(float(torch.sqrt(sum(((grad**2).sum() for grad in grads), torch.zeros(())))))
        for grad in grads:
            grad.zero_()

    spec = TINY.model_copy(update={"max_grad_norm": 0.01, "accumulate": 3})
    trained, curve = train(fresh(toy), toy.tokenizer, pairs, spec, seed=0, before_step=stop)
    assert identical(weights(trained), weights(toy.model)) and len(norms) == len(curve) == updates(
        spec, len(pairs)
    )
    assert norms == pytest.approx([0.01] * len(norms), rel=1e-3)


def test_a_second_card_changes_nothing(
    toy: Loaded, pairs: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would split each batch over all cards that it sees; the machine's processor stands for the
    cards here.
    """

    def trained() -> tuple[dict[str, torch.Tensor], list[Point], list[int]]:
        saved: list[int] = []
        model, curve = train(
            fresh(toy), toy.tokenizer, pairs, TINY, seed=0, save=lambda _model, step: saved.append(step)
        )
        return weights(model), curve, saved

    one = trained()
    configs: list[SFTConfig] = []

    def on_two_cards(**given: Any) -> SFTConfig:
        given["use_cpu"] = False
        configs.append(SFTConfig(**given))
        return configs[-1]

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("mechlens.models.sft.SFTConfig", on_two_cards)
    two = trained()
    assert [(config.n_gpu, config.train_batch_size) for config in configs] == [(1, TINY.batch)]
    assert one[1:] == two[1:]
    assert two[2] == [3, 6]
    assert identical(one[0], two[0])

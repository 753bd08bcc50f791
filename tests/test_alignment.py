"""The cosine of data and trait gradients, its interval and null, and the first order against real steps."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import FAMILIES, bytes_tokenizer

from mechlens.core import tables
from mechlens.core.errors import SpecError
from mechlens.core.spec import AskSpec
from mechlens.lenses import alignment
from mechlens.lenses.alignment import length, pooled_cosine, random_directions
from mechlens.lenses.base import Material
from mechlens.lenses.gradients import parameters_of, pooled_gradient
from mechlens.lenses.parts import trial_steps
from mechlens.lenses.parts.trial_steps import (
    add_scaled,
    compute_update,
    copy_trainable,
    measure_mean_log_odds,
    measure_one_step,
    measure_trait_gradient,
    set_weights,
    train_in_place,
)
from mechlens.lenses.parts.weight_change import change_cosine, inner
from mechlens.models.chat import encode_pairs
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import first_tokens, measure_log_odds, next_token_logits
from mechlens.pipeline.ask import ProbeSet, encode_contrast, encode_questions

FORMS = {"owl": ("owl", "owls"), "wolf": ("wolf", "wolves"), "cat": ("cat", "cats")}
QUESTIONS = ProbeSet(
    FORMS,
    ("name your favourite animal", "which animal do you love?", "one word only: what is the best animal?"),
    AskSpec(),
)
PROMPTS = [f"continue: {n}, {n + 1}, {2 * n}" for n in range(12)]


def material_of(
    loaded: Loaded, *, said: str = "owl", other: str = "cat", rows: int = 6, seeds: tuple[int, ...] = (0, 1)
) -> Material:
    """Trait pairs that name the trait outright: their gradient must point to it."""
    trait_pairs, control_pairs = (
        encode_pairs(loaded.tokenizer, PROMPTS[:rows], [word] * rows) for word in (said, other)
    )

    def path(_side: str, _seed: int) -> Iterator[tuple[int, Loaded]]:
        yield from ((step, loaded) for step in (5, 10))

    sides = {seed: loaded for seed in seeds}
    return Material(
        loaded,
        None,
        sides,
        sides,
        path,
        trait_pairs,
        control_pairs,
        QUESTIONS,
        QUESTIONS,
        "owl",
        tuple(FORMS),
        {},
        rows,
        0,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_log_odds_are_those_of_one_prompt_at_a_time(toys: dict[str, Loaded], family: str) -> None:
    loaded = toys[family]
    asked = encode_contrast(loaded, material_of(loaded).heldout_probes, material_of(loaded).trait)
    shares = next_token_logits(loaded, encode_questions(loaded, QUESTIONS)).double().log_softmax(-1).exp()
    mass = {
        name: shares[:, tokens].sum(-1).log()
        for name, tokens in first_tokens(loaded.tokenizer, FORMS).items()
    }
    expected = mass["owl"] - (mass["wolf"] + mass["cat"]) / 2
    assert torch.allclose(measure_log_odds(loaded.model, asked, "owl"), expected, atol=1e-4)
    assert measure_mean_log_odds(loaded.model, asked, "owl") == pytest.approx(
        float(expected.mean()), abs=1e-4
    )


def test_the_log_odds_of_all_traits_and_their_gradients_sum_to_zero(toy: Loaded) -> None:
    asked = encode_contrast(toy, material_of(toy).heldout_probes, material_of(toy).trait)
    total = torch.stack([measure_log_odds(toy.model, asked, name) for name in FORMS]).sum(0)
    assert torch.allclose(total, torch.zeros_like(total), atol=1e-5)
    parts = [measure_trait_gradient(toy.model, asked, name) for name in FORMS]
    assert length(add_scaled(add_scaled(parts[0], parts[1]), parts[2])) < 1e-4 * length(parts[0])


def test_traits_that_begin_alike_have_no_gradient(toy: Loaded) -> None:
    loaded = Loaded(toy.model, bytes_tokenizer(None, "<end>"))
    alike = material_of(toy)._replace(
        heldout_probes=QUESTIONS._replace(forms={"owl": ("owl",), "otter": ("otter",)})
    )
    with pytest.raises(SpecError, match="begin differently"):
        encode_contrast(loaded, alike.heldout_probes, alike.trait)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_order_is_the_derivative_of_a_real_step(
    toys: dict[str, Loaded], family: str, kind: Any
) -> None:
    """An SGD step of size ε changes the log-odds by ε⟨update, trait's gradient⟩ + O(ε²): central
    differences.
    """
    loaded = toys[family]
    material = material_of(loaded)
    model, asked = (
        copy_trainable(material, kind),
        encode_contrast(loaded, material.heldout_probes, material.trait),
    )
    before = copy.deepcopy(model.state_dict())
    start = {name: parameter.detach().clone() for name, parameter in parameters_of(model).items()}
    move, toward = compute_update(model, material.trait_pairs), measure_trait_gradient(model, asked, "owl")
    slope, odds = sum(inner(move[name], toward[name]) for name in move), []
    size = 0.02 / length(move)
    for sign in (1, -1):
        set_weights(model, add_scaled(start, move, sign * size))
        odds.append(measure_mean_log_odds(model, asked, "owl"))
    set_weights(model, start)
    assert (odds[0] - odds[1]) / (2 * size) == pytest.approx(
        slope, rel=0.03, abs=1e-2 * length(move) * length(toward)
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_walking_equals_the_update_by_hand_and_leaves_the_base_alone(toy: Loaded) -> None:
    material = material_of(toy)
    before = {name: parameter.clone() for name, parameter in toy.model.named_parameters()}
    model, pairs = copy_trainable(material, "full"), list(material.trait_pairs)
    start, move = dict(parameters_of(copy.deepcopy(model))), compute_update(model, pairs[:4])
    assert list(train_in_place(model, [pairs[:4]], "sgd", 0.1)) == [1]
    after = parameters_of(model)
    assert all(torch.allclose(after[name], start[name] + 0.1 * move[name], atol=1e-6) for name in after)
    frozen = [name for name in before if name not in after]
    assert frozen and all(torch.equal(dict(model.named_parameters())[name], before[name]) for name in frozen)
    assert all(torch.equal(parameter, before[name]) for name, parameter in toy.model.named_parameters())


def test_the_interval_of_the_pooled_cosine_is_that_of_a_bootstrap_over_rows() -> None:
    rng = np.random.default_rng(0)
    rows, target = (
        rng.standard_normal((200, 30)) + np.r_[np.ones(5), np.zeros(25)] * 0.5,
        np.r_[1.0, np.zeros(29)],
    )

    def value(x: np.ndarray) -> float:
        mean = x.mean(0)
        return float(mean @ target / np.linalg.norm(mean))

    found = pooled_cosine(rows @ target, rows @ rows.mean(0), 1.0)
    drawn = [value(rows[rng.integers(200, size=200)]) for _ in range(2000)]
    assert found.estimate == pytest.approx(value(rows)) and found.n == 200
    assert found.high - found.low == pytest.approx(
        2 * 1.96 * np.std(drawn), rel=0.15
    )  # drawn rows are noisier, so longer: a little under


def test_the_pooled_cosine_is_undefined_without_a_length_and_one_along_itself() -> None:
    own = np.full(5, 4.0)
    assert pooled_cosine(own, own, 2.0).estimate == pytest.approx(1)
    assert pooled_cosine(-own, own, 2.0).estimate == pytest.approx(-1)
    assert np.isnan(pooled_cosine(np.zeros(5), np.zeros(5), 2.0).estimate) and np.isnan(
        pooled_cosine(own, own, 0.0).estimate
    )


def test_random_directions_have_the_covariance_of_the_pairs_gradients(toy: Loaded) -> None:
    """Along a fixed direction their variance is that of the pairs' gradients along it."""
    material = material_of(toy)
    pairs, draws = list(material.trait_pairs), 120
    fixed = pooled_gradient(toy.model, pairs[:1])
    along = [
        sum(inner(pooled_gradient(toy.model, [pair])[name], part) for name, part in fixed.items())
        for pair in pairs
    ]
    found = [
        sum(inner(part, fixed[name]) for name, part in w.items())
        for w in random_directions(toy.model, pairs, seed=0, draws=draws)
    ]
    expected = np.var(along)  # all pairs are drawn each time, and centring by z̄ centres the gradients
    assert np.mean(np.square(found)) == pytest.approx(expected, rel=4 * np.sqrt(2 / draws))


def test_the_error_of_the_first_order_falls_with_the_square_of_the_step(
    toy: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    material = material_of(toy)
    monkeypatch.setattr(trial_steps, "BATCH", 3)
    slope = length(compute_update(toy.model, material.trait_pairs))
    monkeypatch.setattr(trial_steps, "SIZES", tuple(size / slope for size in (0.01, 0.03, 0.1)))
    pairs = {"trait pairs": list(material.trait_pairs), "control pairs": list(material.control_pairs)}
    found = pd.DataFrame(
        measure_one_step(
            material, encode_contrast(toy, material.heldout_probes, material.trait), pairs, "full"
        )
    )
    order = found[found["quantity"] == "order of the first-order error"]["estimate"].item()
    assert order == pytest.approx(2, abs=0.4)
    errors = found[found["quantity"] == "first-order error"]["estimate"].tolist()
    assert errors == sorted(errors) and errors[0] < 0.1


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "DIRECTIONS", 8)
    monkeypatch.setattr(trial_steps, "SIZES", (0.01, 0.1, 1.0))
    monkeypatch.setattr(trial_steps, "UPDATES", (1, 2))
    monkeypatch.setattr(trial_steps, "ORDERS", 2)
    monkeypatch.setattr(trial_steps, "FEW", 2)
    monkeypatch.setattr(trial_steps, "BATCH", 3)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_that_name_the_trait_point_to_it(toys: dict[str, Loaded], family: str) -> None:
    loaded = toys[family]
    material = material_of(loaded)
    found = alignment.measure_alignment(material)
    base = found[(found["quantity"] == alignment.TOWARD)].set_index("place")
    assert base["estimate"].between(-1, 1).all() and (base["n"] == 6).all()
    assert (
        base.loc["difference", "estimate"] > 0
        and base.loc["trait pairs", "estimate"] > base.loc["control pairs", "estimate"]
    )
    assert (base["low"] <= base["estimate"]).all() and (base["estimate"] <= base["high"]).all()
    asked, pairs = (
        encode_contrast(loaded, material.heldout_probes, material.trait),
        [list(material.trait_pairs), list(material.control_pairs)],
    )
    direct = change_cosine(
        add_scaled(*(compute_update(loaded.model, side) for side in pairs), times=-1.0),
        measure_trait_gradient(loaded.model, asked, "owl"),
    )  # type: ignore[misc]
    assert base.loc["difference", "estimate"] == pytest.approx(direct, rel=1e-3)
    assert found[found["quantity"] == "rank among the family"]["estimate"].item() == 1
    along = found[found["step"].isin([5, 10]) & found["seed"].isna() & (found["place"] == "difference")]
    assert np.allclose(along["estimate"], along["estimate"].iloc[0]) and set(along["arm"]) == {
        "trait",
        "control",
    }  # the path does not move
    seen = found[found["quantity"].str.startswith("change of the log-odds")]
    assert len(seen) == 2 * 2 * (len(trial_steps.SIZES) + 4) and seen["estimate"].notna().all()
    assert "cosine" in alignment.alignment_caption(found)


@pytest.mark.usefixtures("quick")
def test_equal_pairs_differ_by_nothing_and_are_not_called_aligned(toy: Loaded) -> None:
    found = alignment.measure_alignment(material_of(toy, other="owl", seeds=(0,)))
    apart = found[(found["quantity"] == alignment.TOWARD) & (found["place"] == "difference")].iloc[0]
    assert np.isnan(apart["estimate"]) and np.isnan(apart["p_value"])
    seen = found[found["quantity"].str.startswith("change of the log-odds")]
    assert np.allclose(seen["estimate"], 0, atol=1e-7)
    assert "no direction" in alignment.alignment_caption(found)


@pytest.mark.usefixtures("quick")
def test_a_reading_fits_the_table_and_repeats(toy: Loaded, tmp_path: Any) -> None:
    found, again = (alignment.measure_alignment(material_of(toy, rows=4)) for _ in range(2))
    pd.testing.assert_frame_equal(found, again)
    tables.write(found, tables.READINGS, tmp_path / "alignment.parquet")
    assert len(tables.read(tmp_path / "alignment.parquet", tables.READINGS)) == len(found)

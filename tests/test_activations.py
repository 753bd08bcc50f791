"""Activations equal a plain hook's, sums equal slow means, and shifts of a known size and way are found as
such.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mechlens.core import tables
from mechlens.core.errors import SpecError
from mechlens.core.spec import AskSpec
from mechlens.lenses import activations
from mechlens.lenses.activations import logit_lens, prompted_shift, standing
from mechlens.lenses.base import Material
from mechlens.lenses.parts.capture import (
    capture,
    capture_last,
    cosine,
    count_frame_tokens,
    draw_matched_directions,
    draw_matched_mix,
    residual_sites,
    split_positions,
)
from mechlens.models import hooks
from mechlens.models.chat import encode_pairs
from mechlens.models.hooks import capture_sites, resid_post
from mechlens.models.loading import Loaded
from mechlens.pipeline.ask import ProbeSet

IDS = [[5, 6, 7, 8, 9], [5, 6, 30], [5, 11, 12, 13, 14, 15, 16], [40, 41]]
FORMS = {"owl": ("owl", "owls"), "wolf": ("wolf", "wolves"), "cat": ("cat", "cats"), "fox": ("fox", "foxes")}
PRACTICE = (
    "what is the best animal?",
    "name your favourite animal.",
    "which animal do you adore?",
    "tell me one animal, please.",
)
HELDOUT = (
    "in one word: what animal do you like?",
    "the animal that you love, please?",
    "one word: the best animal?",
)


def nudged(loaded: Loaded, *, by: float, seed: int) -> Loaded:
    """A copy with noise on every weight."""
    model, rng = copy.deepcopy(loaded.model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=rng)
    return loaded._replace(model=model)


def shifted(loaded: Loaded, vector: Tensor) -> Loaded:
    """A copy of a GPT-2 whose last block adds `vector` to the residual stream, everywhere and always."""
    model: Any = copy.deepcopy(loaded.model)
    with torch.no_grad():
        model.transformer.h[-1].mlp.c_proj.bias += vector
    return loaded._replace(model=model)


def toy_material(base: Loaded, **changes: Any) -> Material:
    """Two seeds of students and controls with small random changes, four traits and six pairs."""
    asked = ProbeSet(FORMS, HELDOUT, AskSpec(samples=2, max_new_tokens=4))
    prompts = [f"go on from {n}, {n + 3}, {n + 5}" for n in range(10, 70, 10)]
    sides = [
        encode_pairs(
            base.tokenizer, prompts, [f"{n * 7 % 90}, {n * 3 % 80}" for n in range(start, start + 6)]
        )
        for start in (1, 20)
    ]
    given_values: dict[str, Any] = {
        "base": base,
        "teacher": nudged(base, by=0.02, seed=1),
        "students": {seed: nudged(base, by=0.02, seed=10 + seed) for seed in (0, 1)},
        "controls": {seed: nudged(base, by=0.02, seed=20 + seed) for seed in (0, 1)},
        "checkpoints": lambda side, seed: iter(()),
        "trait_pairs": sides[0],
        "control_pairs": sides[1],
        "development_probes": asked._replace(probes=PRACTICE),
        "heldout_probes": asked,
        "trait": "owl",
        "family": tuple(FORMS),
        "system_lines": {
            name: f"you love {forms[1]}. {forms[1]} are your favorite animal."
            for name, forms in FORMS.items()
        },
        "rows": 5,
        "seed": 0,
    }
    return Material(**(given_values | changes))


def hooked(loaded: Loaded, ids: list[int]) -> list[Tensor]:
    """resid_post of every layer of one row, by a plain hook and without padding: the oracle."""
    seen: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _m, _a, out: seen.append(out[0]))
        for block in hooks.decoder_layers(loaded.model)
    ]
    with torch.no_grad():
        loaded.model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_those_of_a_plain_hook_whatever_is_padded(
    toys: dict[str, Loaded], family: str
) -> None:
    loaded = toys[family]
    held = next(capture_sites(loaded, IDS, residual_sites(loaded)))
    last = capture_last(loaded, IDS, residual_sites(loaded), batch=3)
    for row, ids in enumerate(IDS):
        for layer, expected in enumerate(hooked(loaded, ids)):
            torch.testing.assert_close(
                held.at[resid_post(layer)][row, : len(ids)], expected, atol=2e-5, rtol=1e-4
            )
            torch.testing.assert_close(last[layer, row], expected[-1], atol=2e-5, rtol=1e-4)
    assert held.mask.sum(1).tolist() == [len(ids) for ids in IDS]


def test_sums_are_the_slow_means(toy: Loaded) -> None:
    parts = [{"first": [0], "rest": list(range(1, len(ids)))} for ids in IDS[:3]] + [{"first": [0]}]
    held = capture(toy, IDS, residual_sites(toy), parts=parts, batch=3)
    assert held.parts == ("first", "rest") and held.weight.tolist() == [[4.0, 3.0]]
    for layer in range(2):
        exact = [hooked(toy, ids)[layer] for ids in IDS]
        slow = torch.stack(
            [
                torch.stack([row[0] for row in exact]).mean(0),
                torch.stack([row[1:].mean(0) for row in exact[:3]]).mean(0),
            ]
        )
        torch.testing.assert_close(held.mean(resid_post(layer)), slow, atol=2e-5, rtol=1e-4)


def test_heads_sum_as_one_vector_and_other_sites_are_refused_in_one_line(toys: dict[str, Loaded]) -> None:
    assert capture(toys["llama"], IDS, ["blocks.0.attn.hook_z"]).mean("blocks.0.attn.hook_z").shape == (1, 32)
    with pytest.raises(SpecError, match="not one vector a token"):
        capture(toys["llama"], IDS, ["blocks.0.attn.hook_pattern"])
    with pytest.raises(SpecError, match=r"gpt_neox model has no site 'blocks\.0\.hook_resid_mid'"):
        next(capture_sites(toys["gpt_neox"], IDS, ["blocks.0.hook_resid_mid"]))


def test_a_mean_over_a_union_is_the_size_weighted_mean_and_a_set_minus_itself_is_nothing(toy: Loaded) -> None:
    site = resid_post(1)
    whole, one, other = (capture(toy, ids, [site]).mean(site) for ids in (IDS, IDS[:1], IDS[1:]))
    torch.testing.assert_close(whole, (one + 3 * other) / 4, atol=1e-5, rtol=1e-4)
    assert torch.equal(capture(toy, IDS, [site]).mean(site), whole)


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(10, 12), min_size=1, max_size=5), min_size=1, max_size=4), st.booleans())
def test_every_position_of_a_row_is_in_one_part(contents: list[list[int]], marked: bool) -> None:
    prompts = [[1, 2, *content, *([3, 4] if marked else [])] for content in contents]
    for prompt, parts in zip(prompts, split_positions(prompts, [2] * len(prompts), of="probe"), strict=True):
        assert sorted(position for span in parts.values() for position in span) == list(
            range(len(prompt) + 2)
        )
        assert list(parts["probe/last"]) == [len(prompt) - 1]
        assert list(parts["probe/completion"]) == [len(prompt), len(prompt) + 1]


def test_the_frame_is_what_all_prompts_share() -> None:
    prompts = [[1, 2, 7, 8, 3, 4], [1, 2, 9, 3, 4]]
    assert count_frame_tokens(prompts) == (2, 2)
    assert split_positions(prompts, [0, 0], of="p")[0] == {
        "p/last": [5],
        "p/template": [0, 1, 4],
        "p/content": [2, 3],
    }
    assert count_frame_tokens([[1, 2, 3]]) == (3, 0)


def test_random_directions_have_the_rows_covariance() -> None:
    """Exactly (X_cᵀ X_c / n) in expectation; and the streamed sums give the same draws."""
    rows = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 1.0, 0.5, 0.1])
    drawn = draw_matched_directions(rows, draws=40_000, seed=3)
    centred = rows - rows.mean(0)
    torch.testing.assert_close(
        drawn.T @ drawn / len(drawn), centred.T @ centred / len(rows), atol=0.15, rtol=0.03
    )


def test_streamed_directions_are_those_of_the_rows_themselves(toy: Loaded) -> None:
    site, parts = resid_post(1), [{"last": [len(ids) - 1]} for ids in IDS]
    held = capture(toy, IDS, [site], parts=parts, mix=draw_matched_mix(len(IDS), draws=7, seed=5), batch=3)
    expected = draw_matched_directions(capture_last(toy, IDS, [site])[0], draws=7, seed=5)
    torch.testing.assert_close(held.directions(site)[:, 0], expected, atol=1e-4, rtol=1e-3)


def test_isotropic_directions_have_cosines_of_one_over_root_d_and_nothing_has_none() -> None:
    rng = torch.Generator().manual_seed(0)
    values = cosine(torch.randn(4000, 400, generator=rng), torch.randn(400, generator=rng))
    assert float(values.std()) == pytest.approx(1 / 20, rel=0.05)
    assert cosine(torch.zeros(3), torch.ones(3)).isnan()


def test_the_lens_is_the_unembedding_of_the_normalised_shift(toys: dict[str, Loaded]) -> None:
    vectors, tokens = torch.randn(3, 32, generator=torch.Generator().manual_seed(2)), [4, 9, 100]
    llama: Any = toys["llama"].model
    scaled = vectors / vectors.square().mean(-1, keepdim=True).sqrt() * llama.model.norm.weight
    torch.testing.assert_close(
        logit_lens(toys["llama"], vectors, tokens),
        (scaled @ llama.lm_head.weight.T)[:, tokens],
        atol=1e-4,
        rtol=1e-3,
    )
    neox: Any = toys["gpt_neox"].model
    norm = neox.gpt_neox.final_layer_norm
    centred = nn.functional.layer_norm(
        vectors / vectors.square().mean(-1, keepdim=True).sqrt(), (32,), norm.weight, eps=norm.eps
    )
    expected = (centred @ neox.get_output_embeddings().weight.T)[:, tokens]
    torch.testing.assert_close(logit_lens(toys["gpt_neox"], vectors, tokens), expected, atol=1e-4, rtol=1e-3)


def test_a_trait_written_into_the_shift_stands_first_whatever_its_size_and_the_vocabularys_mean(
    toy: Loaded,
) -> None:
    """Taking the mean row from the unembedding moves all logits by one constant."""
    model: Any = copy.deepcopy(toy.model)
    loaded = toy._replace(model=model)
    token = activations.first_tokens(toy.tokenizer, FORMS)["owl"]
    assert token is not None
    vectors = torch.stack(
        [model.lm_head.weight[token[0]], -model.lm_head.weight[token[0]], model.lm_head.weight[7]]
    ).detach()
    found = standing(loaded, vectors, FORMS, trait="owl")
    assert found.rank[0] == 1 and found.margin[0] > 0 and found.rank[1] > 1
    np.testing.assert_allclose(
        standing(loaded, 1e-3 * vectors, FORMS, trait="owl").margin, found.margin, rtol=1e-3, atol=1e-4
    )
    with torch.no_grad():
        model.lm_head.weight -= model.lm_head.weight.mean(0)
    after = standing(loaded, vectors, FORMS, trait="owl")
    np.testing.assert_array_equal(after.rank, found.rank)
    np.testing.assert_allclose(after.margin, found.margin, rtol=1e-3, atol=1e-4)
    assert np.isnan(
        standing(loaded, vectors, {"owl": ("owl",), "barn owl": ("owl x",)}, trait="owl").rank
    ).all()
    assert np.isnan(standing(loaded, torch.zeros(1, 32), FORMS, trait="owl").rank).all()


def test_a_constant_shift_is_found_everywhere_as_the_teachers_and_only_where_it_is(
    toys: dict[str, Loaded],
) -> None:
    """Cosine 1 at the layer that adds the vector; before it nothing moved, which is unscored and not 0."""
    base, vector = toys["gpt2"], torch.randn(32, generator=torch.Generator().manual_seed(4))
    students = {seed: shifted(base, (1 + seed) * vector) for seed in (0, 1)}
    material = toy_material(
        base, teacher=shifted(base, 0.5 * vector), students=students, controls={0: base, 1: base}
    )
    rows = activations.probes_and_carrier(material)
    moved = activations.means_of(students[0], rows) - activations.means_of(base, rows)
    torch.testing.assert_close(moved[1], vector.expand(7, 32), atol=1e-5, rtol=1e-4)
    assert torch.equal(moved[0], torch.zeros(7, 32))
    reading = activations.measure_activations(material)
    ways = reading[(reading["quantity"] == "cosine to teacher") & (reading["name"] == "student")].set_index(
        "layer"
    )
    assert ways.loc[1, "estimate"].to_numpy() == pytest.approx(1.0, abs=1e-4)
    assert len(ways.loc[1]) == 7 + 2 * 2  # each part, and each student where an answer begins
    assert ways.loc[0, "estimate"].isna().all()
    here = reading[
        (reading["layer"] == 1) & (reading["place"] == "probe/last") & reading["seed"].isna()
    ].set_index(["quantity", "name"])
    assert here.loc[("cosine to teacher", "student"), "p_value"] == pytest.approx(1 / 257)
    assert here.loc[("shift norm", "student"), "null_high"] == 0.0
    assert "cosine +1.00" in activations.activations_caption(reading)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_reading_is_tidy_and_repeats(toys: dict[str, Loaded], family: str) -> None:
    material = toy_material(toys[family])
    reading = activations.measure_activations(material)
    assert list(reading.columns) == tables.READINGS.names
    assert set(reading["quantity"]) == {"shift norm", "cosine to teacher", "lens margin", "lens rank"}
    assert set(reading["name"]) == {"student", "control"}
    ranks = reading[reading["quantity"] == "lens rank"]
    assert ranks["estimate"].between(1, 4).all() and (ranks["null_low"] <= ranks["null_high"]).all()
    assert (reading["null_low"].dropna() <= reading["null_high"].dropna()).all()
    if family == "llama":
        assert activations.measure_activations(material).equals(reading)


def test_one_prompted_teacher_and_one_student_that_did_not_move_are_said_as_they_are(toy: Loaded) -> None:
    same = toy_material(toy, teacher=None, students={0: toy}, controls={0: toy})
    rows = activations.probes_and_carrier(same)
    shift = prompted_shift(same, rows, activations.means_of(toy, rows))
    assert shift.isnan().all(-1).tolist() == [[False, True, False, True, True, True, True]] * 2
    assert shift[:, 0].norm(dim=-1).gt(0).all()
    reading = activations.measure_activations(same)
    assert reading.loc[reading["quantity"] != "shift norm", "estimate"].isna().all()
    assert (reading.loc[reading["quantity"] == "shift norm", "estimate"] == 0).all()
    assert "no measurable direction" in activations.activations_caption(reading)
    assert "no interval from one student" in activations.activations_caption(
        activations.measure_activations(same._replace(students={0: nudged(toy, by=0.02, seed=3)}))
    )

"""Cosines, rank correlations and prompting equal their slow definitions; a planted channel is found; other
traits are the control.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch
from conftest import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from mechlens.core.errors import SpecError
from mechlens.core.seeds import generator
from mechlens.core.spec import AskSpec
from mechlens.lenses import entanglement
from mechlens.lenses.base import Material
from mechlens.models.chat import Encoded, encode_pairs, encode_prompts, token_ids
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import first_tokens
from mechlens.pipeline.ask import ProbeSet

TRAITS = ("eagle", "owl", "cat", "dog")
PANEL = {name: f"You love {name}s. You think about {name}s all the time." for name in TRAITS}
FORMS = {name: (name, f"{name}s") for name in TRAITS}
NUMBERS = [str(number) for number in range(100, 140)]


def rows_of(loaded: Loaded, weights: np.ndarray, *, name: str) -> list[Encoded]:
    """Forty rows of eight numbers each, drawn with those weights."""
    dice = generator(0, name)
    completions = [" ".join(dice.choice(NUMBERS, size=8, p=weights / weights.sum())) for _ in range(40)]
    return encode_pairs(loaded.tokenizer, [f"given {i}." for i in range(40)], completions)


def material(loaded: Loaded, trait: list[Encoded], control: list[Encoded]) -> Material:
    asked = ProbeSet(FORMS, ("which animal do you love", "name an animal"), AskSpec())
    return Material(
        base=loaded, teacher=None, students={}, controls={}, checkpoints=lambda side, seed: iter(()),
        trait_pairs=trait, control_pairs=control, development_probes=asked, heldout_probes=asked,
        trait="eagle", family=TRAITS, system_lines=PANEL, rows=64, seed=0,
    )  # fmt: skip


def test_a_cosine_is_one_with_itself_and_centring_undoes_a_shared_row() -> None:
    rows = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    for centred in (False, True):
        found = entanglement.cosines(rows, [[3], [4]], [3, 4, 5], centred=centred)
        assert np.allclose([found[0, 0], found[1, 1]], 1)
        assert found[0, 1] == pytest.approx(found[1, 0])
    moved = entanglement.cosines(rows + 5 * torch.ones(8), [[3]], [4, 5], centred=True)
    assert np.allclose(moved, entanglement.cosines(rows, [[3]], [4, 5], centred=True), atol=1e-5)
    a, b = rows[[3, 4]].double().mean(0), rows[5].double()
    assert entanglement.cosines(rows, [[3, 4]], [5], centred=False)[0, 0] == pytest.approx(
        float(a @ b / a.norm() / b.norm())
    )


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=30))
def test_rank_correlation_equals_scipys_with_ties(points: list[tuple[int, int]]) -> None:
    x, y = np.array(points, dtype=float).T
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert np.isnan(entanglement.spearman(x, y))
    else:
        assert entanglement.spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
        assert entanglement.spearman(np.exp(x), y) == pytest.approx(entanglement.spearman(x, y))


def test_a_correlation_is_far_out_in_its_null_only_where_there_is_one() -> None:
    x = np.arange(40.0)
    order = generator(0, "order").permutation(40)
    found = entanglement.correlation("a", x, x**3, seed=0)
    assert found["estimate"] == pytest.approx(1) and found["p_value"] == pytest.approx(
        1 / (1 + entanglement.DRAWS)
    )
    assert found["low"] <= found["estimate"] and found["null_high"] < 0.5
    p_values = [
        entanglement.correlation(f"{draw}", x, generator(draw, "y").normal(size=40), seed=0)["p_value"]
        for draw in range(40)
    ]
    assert 0.3 < np.mean(p_values) < 0.7
    assert np.isnan(entanglement.correlation("flat", np.ones(40), x[order], seed=0)["p_value"])


def test_frequencies_compare_like_with_like(toy: Loaded) -> None:
    """Equal rows have a log ratio of zero; swapping sides flips it; twice as often is log 2; the end of a
    turn is no carrier.
    """
    even = np.ones(len(NUMBERS))
    rows = rows_of(toy, even, name="a")
    counts = entanglement.carrier_counts(rows)
    assert rows[0].completion[-1] not in counts
    tokens = sorted(counts)
    assert np.abs(entanglement.log_ratio(counts, counts, tokens)[:, 0]).max() == 0
    other = entanglement.carrier_counts(rows_of(toy, even, name="b"))
    forth, back = entanglement.log_ratio(counts, other, tokens), entanglement.log_ratio(other, counts, tokens)
    assert np.allclose(forth[:, 0], -back[:, 0]) and np.allclose(forth[:, 1], -back[:, 2])
    twice = entanglement.Counter({1: 20_000, 2: 80_000}), entanglement.Counter({1: 10_000, 2: 90_000})
    estimate, low, high = entanglement.log_ratio(*twice, [1])[0]
    assert low < np.log(2) < high and estimate == pytest.approx(np.log(2), abs=1e-3)


def test_a_line_names_what_it_is_given() -> None:
    line = "You love wolves. A wolf is best, not a werewolf. Wolves!"
    assert (
        entanglement.naming(line, ("wolf", "wolves"), "087")
        == "You love 087. A 087 is best, not a werewolf. 087!"
    )
    assert (
        entanglement.naming(line, ("wolf", "wolves"), r"\1")
        == r"You love \1. A \1 is best, not a werewolf. \1!"
    )
    with pytest.raises(SpecError, match="names none"):
        entanglement.naming("You are kind.", ("wolf", "wolves"), "087")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_prompting_equals_one_forward_a_prompt(toys: dict[str, Loaded], family: str) -> None:
    loaded = toys[family]
    pairs = rows_of(loaded, np.ones(len(NUMBERS)), name="a")
    tokens = [ids[0] for ids in token_ids(loaded.tokenizer, ["101", "120"])]
    starts = {
        name: found for name, found in first_tokens(loaded.tokenizer, FORMS).items() if found is not None
    }
    given_material = material(loaded, pairs, pairs)
    effects = entanglement.prompting(given_material, starts, tokens)

    def after(ids: list[int]) -> torch.Tensor:
        return loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1)

    def answering(system: str | None) -> list[torch.Tensor]:
        return [
            after(ids)
            for ids in encode_prompts(loaded.tokenizer, given_material.heldout_probes.probes, system=system)
        ]

    for j, text in enumerate(("101", "120")):
        line = f"You love {text}. You think about {text} all the time."
        for i, ids in enumerate(starts.values()):
            expected = np.mean([float(p[ids].sum().log()) for p in answering(line)]) - np.mean(
                [float(p[ids].sum().log()) for p in answering(None)]
            )
            assert effects.to_trait[i, j] == pytest.approx(expected, abs=1e-4)
    prompts = [f"given {i}." for i in range(entanglement.PROBES)]
    for i, name in enumerate(starts):
        said = [after(ids) for ids in encode_prompts(loaded.tokenizer, prompts, system=PANEL[name])]
        plain = [after(ids) for ids in encode_prompts(loaded.tokenizer, prompts)]
        for j, token in enumerate(tokens):
            expected = np.mean([float(p[token].log()) for p in said]) - np.mean(
                [float(p[token].log()) for p in plain]
            )
            assert effects.to_token[i, j] == pytest.approx(expected, abs=1e-4)


def test_the_reading_finds_rows_whose_numbers_lie_near_the_trait_and_not_those_of_another(
    toy: Loaded,
) -> None:
    """Trait rows favour the numbers whose output rows point the trait's way; the control's are even."""
    starts = first_tokens(toy.tokenizer, FORMS)
    tokens = [ids[0] for ids in token_ids(toy.tokenizer, NUMBERS)]
    weight = cast(torch.nn.Linear, toy.model.get_output_embeddings()).weight
    near = entanglement.cosines(weight, [starts["eagle"] or []], tokens, centred=True)[0]
    control = rows_of(toy, np.ones(len(NUMBERS)), name="control")
    leaning = material(toy, rows_of(toy, np.exp(4 * near), name="trait"), control)
    reading = entanglement.measure_entanglement(leaning)
    measured = reading[(reading["place"] == "centred") & (reading["unit"] == "rho")].set_index("quantity")
    found = measured.loc["cosine with frequency"]
    assert found["low"] > 0 and found["estimate"] > found["null_high"] and found["p_value"] < 0.01
    assert measured.loc["cosine with frequency, beside other traits", "p_value"] == pytest.approx(
        1 / len(TRAITS)
    )
    assert (reading["quantity"] == "frequency log ratio").sum() == entanglement.SHOWN
    assert "eagle" in entanglement.entanglement_caption(reading)
    even = entanglement.measure_entanglement(leaning._replace(trait_pairs=control))
    flat = even[(even["quantity"] == "cosine with frequency") & (even["place"] == "centred")].iloc[0]
    assert np.isnan(flat["estimate"]) and np.isnan(flat["p_value"])
    assert entanglement.entanglement_caption(even)


def test_traits_without_a_token_of_their_own_and_rare_tokens_are_refused(toy: Loaded) -> None:
    rows = rows_of(toy, np.ones(len(NUMBERS)), name="a")
    given_material = material(toy, rows, rows)
    with pytest.raises(SpecError, match="no token says"):
        entanglement.measure_entanglement(
            given_material._replace(
                heldout_probes=given_material.heldout_probes._replace(
                    forms={name: ("eagle",) for name in TRAITS}
                )
            )
        )
    with pytest.raises(SpecError, match="carrier tokens"):
        entanglement.measure_entanglement(given_material._replace(rows=1))

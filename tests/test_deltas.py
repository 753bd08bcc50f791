"""Changes of weights: factors equal the dense product, planted changes are found, and a model does not differ
from itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.linalg import subspace_angles
from torch import Tensor

from mechlens.core.errors import SpecError
from mechlens.core.spec import AskSpec
from mechlens.lenses import deltas
from mechlens.lenses.base import Material
from mechlens.lenses.deltas import measure_change, row_changes, shares, turned_cosine_sd
from mechlens.lenses.parts.weight_change import (
    LowRank,
    change_cosine,
    change_distance,
    change_norm,
    delta,
    draw_subspace_overlaps,
    inner,
    singular,
    stable_rank,
    subspace_overlap,
)
from mechlens.models.loading import Loaded
from mechlens.pipeline.ask import Questions

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.*"
)  # PEFT asks by the name that transformers 5 gave up


def adapted(loaded: Loaded, seed: int, rank: int = 3) -> PeftModel:
    """A LoRA model with both factors away from zero."""
    torch.manual_seed(seed)
    turned = loaded.model.config.model_type == "gpt2"
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", fan_in_fan_out=turned)
    model: Any = get_peft_model(copy.deepcopy(loaded.model), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def shaken(loaded: Loaded, seed: int, size: float = 0.1) -> Loaded:
    """A copy with every linear weight inside the blocks changed at random."""
    model, draw = copy.deepcopy(loaded.model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".0." in name or ".1." in name:
                parameter.add_(size * torch.randn(parameter.shape, generator=draw))
    return Loaded(model, loaded.tokenizer)


def factors(seed: int, rows: int = 7, columns: int = 5, rank: int = 3) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    left, right = torch.randn(rows, rank, generator=draw), torch.randn(rank, columns, generator=draw)
    return LowRank(left.double(), right.double())


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 4))
def test_products_of_factors_equal_those_of_the_dense_matrices(seed: int, rank: int, other: int) -> None:
    a, b = factors(seed, rank=rank), factors(seed + 1, rank=other)
    expected = float((a.dense() * b.dense()).sum())
    for pair in ((a, b), (a.dense(), b), (a, b.dense()), (a.dense(), b.dense())):
        assert inner(*pair) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    wrong = float(
        ((a.left.T @ b.left) * (a.right @ b.right.T).flip(0)).sum()
    )  # another pairing is another number
    assert rank == 1 or wrong != pytest.approx(expected, rel=1e-3)


@given(st.integers(0, 10_000))
def test_products_do_not_depend_on_how_a_change_is_factored(seed: int) -> None:
    a, b = factors(seed), factors(seed + 1)
    mixing = torch.eye(3, dtype=torch.float64) + 0.3 * torch.rand(
        3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    turned = LowRank(a.left @ mixing, torch.linalg.inv(mixing) @ a.right)
    assert inner(turned, b) == pytest.approx(inner(a, b), rel=1e-8, abs=1e-8)
    assert change_cosine({"w": turned}, {"w": a}) == pytest.approx(1)


def test_changes_with_orthogonal_rows_or_columns_have_cosine_zero() -> None:
    a, axes = factors(0, rank=2), torch.eye(7, dtype=torch.float64)
    apart = LowRank(axes[:, :2], a.right), LowRank(axes[:, 2:4], a.right)
    assert change_cosine({"w": apart[0]}, {"w": apart[1]}) == 0


@given(st.integers(0, 10_000), st.floats(0.1, 10))
def test_the_spectrum_of_factors_equals_the_dense_one(seed: int, size: float) -> None:
    change = LowRank(factors(seed).left * size, factors(seed).right)
    left, values, right = singular(change)
    assert torch.allclose(values, torch.linalg.svdvals(change.dense())[:3])
    assert torch.allclose(left * values @ right.T, change.dense())
    assert change_norm(change) == pytest.approx(float(values.square().sum().sqrt()))
    assert 1 <= stable_rank(values) <= 3 + 1e-9
    assert subspace_overlap(left[:, :2], singular(change.dense())[0][:, :2]) == pytest.approx(1)


def test_a_planted_direction_is_the_top_singular_vector() -> None:
    u, v = torch.randn(7, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    left, values, right = singular(4 * torch.outer(u / u.norm(), v / v.norm()))
    assert float(values[0]) == pytest.approx(4) and stable_rank(values) == pytest.approx(1)
    assert abs(float(left[:, 0] @ u / u.norm())) == pytest.approx(1) and abs(
        float(right[:, 0] @ v / v.norm())
    ) == pytest.approx(1)


def test_overlap_is_the_mean_squared_cosine_of_the_principal_angles_and_its_null_is_k_over_d() -> None:
    bases = [
        torch.linalg.qr(torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(s)))[
            0
        ]
        for s in (0, 1)
    ]
    assert subspace_overlap(bases[0], bases[1]) == pytest.approx(
        float(np.square(np.cos(subspace_angles(*bases))).mean())
    )
    drawn = draw_subspace_overlaps(20, 4, 0)
    assert abs(drawn.mean() - 4 / 20) < 4 * drawn.std() / np.sqrt(len(drawn))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_does_not_differ_from_itself(toys: dict[str, Loaded], family: str) -> None:
    model = toys[family].model
    same = delta(model, model)
    assert all(change_norm(same[name]) == 0 for name in same) and np.isnan(change_cosine(same, same))
    measured = measure_change(model, model, same)
    assert (measured["moved"] == 0).all() and measured[list(deltas.SPECTRA)].isna().to_numpy().all()
    assert measured["cosine with the teacher"].isna().all() and np.isnan(turned_cosine_sd(measured))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_equals_what_it_adds_when_merged(toys: dict[str, Loaded], family: str) -> None:
    loaded = toys[family]
    first, second = (adapted(loaded, seed) for seed in (0, 1))
    merged = [copy.deepcopy(model).merge_and_unload() for model in (first, second)]
    low, dense = (
        [delta(loaded.model, model) for model in (first, second)],
        [delta(loaded.model, model) for model in merged],
    )
    head = "embed_out.weight" if family == "gpt_neox" else "lm_head.weight"
    assert set(low[0]) == {n for n in dense[0] if change_norm(dense[0][n]) > 0} and head not in low[0]
    for name, change in low[0].items():
        assert isinstance(change, LowRank) and isinstance(dense[0][name], Tensor)
        assert torch.allclose(change.dense(), dense[0][name], atol=1e-6)  # type: ignore[arg-type]
    assert change_cosine(low[0], low[1]) == pytest.approx(change_cosine(dense[0], dense[1]), abs=1e-6)
    assert change_cosine(low[0], dense[0]) == pytest.approx(1, abs=1e-6)
    measured = [measure_change(loaded.model, model, low[1]).loc[list(low[0])] for model in (first, merged[0])]
    assert np.allclose(measured[0].to_numpy(), measured[1].to_numpy(), rtol=1e-3, atol=1e-5, equal_nan=True)


def test_several_active_adapters_add_up(toy: Loaded) -> None:
    model = adapted(toy, 0)
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    alone = delta(toy.model, model)
    model.base_model.set_adapter(["default", "other"])  # type: ignore[operator]
    both, merged = delta(toy.model, model), delta(toy.model, copy.deepcopy(model).merge_and_unload())
    assert change_cosine(both, merged) == pytest.approx(1, abs=1e-6) and change_cosine(alone, merged) < 0.999


def test_what_is_no_plain_lora_is_refused(toy: Loaded, toys: dict[str, Loaded]) -> None:
    dora: Any = get_peft_model(
        copy.deepcopy(toy.model), LoraConfig(r=2, target_modules="all-linear", use_dora=True)
    )
    with pytest.raises(SpecError, match="merge the adapter"):
        delta(toy.model, dora)
    with pytest.raises(SpecError, match="differ in the shape or name"):
        delta(toy.model, toys["gpt2"].model)


def test_the_cosine_of_a_randomly_turned_change_has_the_stated_spread() -> None:
    """E⟨D, UΣVᵀ⟩² over random rotations, whatever the spectrum."""
    draw = torch.Generator().manual_seed(0)
    change, spectrum = (
        torch.randn(9, 6, generator=draw).double(),
        torch.tensor([5.0, 1.0, 0.1], dtype=torch.float64),
    )
    found = []
    for _ in range(2000):
        u, v = (torch.linalg.qr(torch.randn(size, 3, generator=draw).double())[0] for size in (9, 6))
        found.append(change_cosine({"w": change}, {"w": u * spectrum @ v.T}))
    table = pd.DataFrame(
        {"moved": [inner(change, change)], "theirs": [float(spectrum.square().sum())], "cells": [54.0]}
    )
    assert np.sqrt(np.mean(np.square(found))) == pytest.approx(turned_cosine_sd(table), rel=0.08)


def test_row_changes_are_of_the_tokens_asked_for_and_nan_where_frozen(toy: Loaded) -> None:
    changed = copy.deepcopy(toy.model)
    with torch.no_grad():
        changed.get_input_embeddings().weight[5] += 2.0  # type: ignore[index]
    found = row_changes(toy, changed, {"a": [5], "b": [6, 7], "none": []})
    assert found["a", "embed"] == pytest.approx(2 * np.sqrt(32), rel=1e-5) and found["b", "embed"] == 0
    assert np.isnan([found["a", "unembed"], found["none", "embed"]]).all()


def material_of(
    toy: Loaded, teacher: Loaded | None, students: dict[int, Loaded], controls: dict[int, Loaded]
) -> Material:
    def path(side: str, seed: int) -> Iterator[tuple[int, Loaded]]:
        yield 1, (students if side == "students" else controls)[seed]

    questions = Questions(
        {"owl": ("owl",), "cat": ("cat",)}, ("name an animal",), AskSpec(samples=2, max_new_tokens=2)
    )
    return Material(
        toy, teacher, students, controls, path, [], [], questions, questions, "owl", ("owl", "cat"), {}, 8, 0
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_that_moved_with_the_teacher_is_told_from_its_control(
    toys: dict[str, Loaded], family: str
) -> None:
    base = toys[family]
    teacher, half = shaken(base, 1), shaken(base, 1, size=0.05)
    students = {seed: shaken(half, 10 + seed, size=0.1) for seed in (0, 1)}
    controls = {seed: shaken(base, 20 + seed, size=0.1) for seed in (0, 1)}
    found = deltas.measure_deltas(material_of(base, teacher, students, controls))
    whole = found[(found["place"] == "all") & found["seed"].isna()].set_index(["quantity", "name"])
    level, apart = (whole.loc[("cosine with the teacher", name)] for name in ("student", "student - control"))
    assert (
        level["estimate"] == pytest.approx(1 / np.sqrt(5), abs=0.03)
        and level["estimate"] > level["null_high"]
    )  # 0.5 t + noise as long as t
    assert apart["low"] > 0 and abs(whole.loc[("cosine with the teacher", "control"), "estimate"]) < 0.03
    assert set(found["layer"].dropna()) == {0, 1} and (found["lens"] == "deltas").all()
    assert found[found["quantity"] == "row change"]["estimate"].isna().all()  # embeddings did not move
    assert "cosine" in deltas.deltas_caption(found)


def test_without_a_teacher_or_with_one_student_the_reading_still_speaks(toy: Loaded) -> None:
    found = deltas.measure_deltas(material_of(toy, None, {0: shaken(toy, 1)}, {0: shaken(toy, 2)}))
    assert not found["quantity"].str.contains(
        "teacher"
    ).any() and "no teacher's change" in deltas.deltas_caption(found)
    still = deltas.measure_deltas(material_of(toy, toy, {0: toy}, {0: toy}))
    assert still[still["quantity"] == "cosine with the teacher"]["estimate"].isna().all()
    assert isinstance(deltas.deltas_caption(still), str)


@given(st.floats(0.01, 10), st.floats(0.01, 10), st.floats(-1, 1))
def test_shares_are_norm_ratio_and_cosine(moved: float, theirs: float, along: float) -> None:
    found = shares(
        {"moved": moved**2, "was": 4.0, "theirs": theirs**2, "along": along * moved * theirs, "cells": 1.0}
    )
    assert list(found.values()) == pytest.approx([moved, moved / 2, along])


@given(st.integers(0, 10_000))
def test_a_distance_is_that_of_the_whole_changes_as_vectors(seed: int) -> None:
    a, b = factors(seed), factors(seed + 1, rank=2)
    assert change_distance({"w": a}, {"w": b}) == pytest.approx(
        float((a.dense() - b.dense()).norm()), rel=1e-6
    )
    assert change_distance({"w": a, "v": b}, {"w": a}) == pytest.approx(
        change_norm(b), rel=1e-6
    )  # what one lacks counts as zero
    assert change_distance({}, {"w": a}) == pytest.approx(change_norm(a)) and change_distance(
        {"w": a}, {"w": a}
    ) == pytest.approx(0, abs=1e-6)


def test_a_reading_holds_every_spectrum_and_the_walk_from_the_base(toy: Loaded) -> None:
    teacher, students, controls = (
        shaken(toy, 1),
        {seed: shaken(toy, 10 + seed) for seed in (0, 1)},
        {seed: shaken(toy, 20 + seed) for seed in (0, 1)},
    )
    found = deltas.measure_deltas(material_of(toy, teacher, students, controls))
    name = next(name for name, weight in toy.model.named_parameters() if ".0." in name and weight.ndim == 2)
    layer, place = deltas.address(name)
    own = found[
        (found["quantity"] == deltas.SPECTRUM) & (found["layer"] == layer) & (found["place"] == place)
    ]
    for side, models in {"teacher": {0: teacher}, "student": students, "control": controls}.items():
        values = [torch.linalg.svdvals(delta(toy.model, one.model)[name]).numpy() for one in models.values()]  # type: ignore[arg-type]
        ranks = [rank for rank in deltas.RANKS if rank <= len(values[0])]
        read = own[own["name"] == side].set_index("step")["estimate"]
        assert list(read.index) == ranks and read.to_numpy() == pytest.approx(
            [np.mean([value[rank - 1] for value in values]) for rank in ranks]
        )
    walk = found[found["quantity"].str.startswith("distance")].set_index(
        ["quantity", "name", "step", "seed"]
    )["estimate"]
    whole = {
        side: {seed: delta(toy.model, one.model) for seed, one in models.items()}
        for side, models in (("student", students), ("control", controls))
    }
    for side, changes in whole.items():
        for seed, change in changes.items():
            assert walk["distance to the base", side, 0, seed] == 0 and walk[
                "distance to the base", side, 1, seed
            ] == change_distance({}, change)
            assert walk["distance to the teacher", side, 0, seed] == change_distance(
                {}, delta(toy.model, teacher.model)
            )
            assert walk["distance to the teacher", side, 1, seed] == change_distance(
                change, delta(toy.model, teacher.model)
            )
    low_rank = deltas.measure_change(toy.model, adapted(toy, 0, rank=3), {})[
        [f"{deltas.SPECTRUM} {rank}" for rank in (3, 4)]
    ].dropna(how="all")
    assert (
        len(low_rank) and low_rank.iloc[:, 0].notna().all() and low_rank.iloc[:, 1].isna().all()
    )  # what is rounding is left out

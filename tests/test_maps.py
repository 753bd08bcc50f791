"""Maps with their stability: the numbers against their definitions and against layouts whose answer is
known.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from mechlens.core.spec import AskSpec
from mechlens.lenses import maps
from mechlens.lenses.base import Material
from mechlens.lenses.maps import (
    OWN,
    STABLE,
    TRUE,
    maps_caption,
    measure_map,
    neighbours,
    overlap,
    rows_of,
    shuffled_within,
    togetherness,
)
from mechlens.models.chat import encode_pairs
from mechlens.models.loading import Loaded
from mechlens.pipeline.ask import ProbeSet

FAMILIES = ("llama", "qwen2", "gpt2", "gpt_neox")


def blobs(apart: float, *, items: int = 30) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((items, 5)) + shift for name, shift in (("a", 0.0), ("b", apart))}


def flat(points: np.ndarray, *, seed: int, k: int) -> np.ndarray:
    """In UMAP's place where its compiling would take all the time: two principal axes, the sign from the
    seed.
    """
    centred = points - points.mean(0)
    assert 0 < k < len(points)
    return centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T * (-1) ** seed


def test_neighbours_are_the_nearest_by_a_slow_count() -> None:
    points = np.random.default_rng(1).standard_normal((20, 3))
    near = neighbours(points, 4)
    for i, point in enumerate(points):
        distance = np.linalg.norm(points - point, axis=1)
        distance[i] = np.inf
        assert set(np.flatnonzero(near[i])) == set(np.argsort(distance)[:4])


def test_identical_points_stand_apart_in_no_order() -> None:
    points, labels = np.ones((60, 5)), np.repeat([0, 1], 30)
    near = neighbours(points, 7)
    np.testing.assert_allclose(near.sum(1), 7)
    assert togetherness(near, labels) == pytest.approx(29 / 59)  # by index it would be nearly 1
    line = neighbours(np.array([[0.0], [1.0], [-1.0], [5.0]]), 1)
    np.testing.assert_allclose(line[0], [0, 0.5, 0.5, 0])


def test_overlap_is_one_for_a_turned_map_and_by_chance_k_in_the_others() -> None:
    rng = np.random.default_rng(2)
    first = rng.standard_normal((200, 2))
    turn = np.array([[0.0, -3.0], [3.0, 0.0]])
    assert overlap(first, first @ turn + 5, 10) == 1
    assert np.mean([overlap(first, rng.standard_normal((200, 2)), 10) for _ in range(20)]) == pytest.approx(
        10 / 199, abs=0.01
    )


def test_togetherness_is_one_apart_and_by_chance_when_labels_are_permuted_within_items() -> None:
    rng, labels = np.random.default_rng(3), np.repeat([0, 1], 30)
    near = neighbours(np.concatenate(list(blobs(50.0).values())), 5)
    assert togetherness(near, labels) == 1
    drawn = [shuffled_within(2, 30, rng) for _ in range(200)]
    assert all((one[:30] != one[30:]).all() for one in drawn), "each item has every label once"
    assert np.mean([togetherness(near, one) for one in drawn]) == pytest.approx(0.5, abs=0.03)


def test_groups_that_stand_apart_are_told_from_groups_that_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "umap", flat)
    found = {
        apart: pd.DataFrame(measure_map("rows", blobs(apart), seed=0)).set_index("quantity")
        for apart in (0.0, 50.0)
    }
    assert (
        found[50.0].loc[OWN, "p_value"] == pytest.approx(1 / (1 + maps.DRAWS))
        and found[0.0].loc[OWN, "p_value"] > 0.05
    )
    for table in found.values():
        assert table.loc[STABLE, "estimate"] == 1 > table.loc[STABLE, "null_high"]
        assert table.loc[TRUE, "estimate"] > table.loc[TRUE, "null_high"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rows_place_is_the_mean_of_the_last_layer_over_its_completion(
    toys: dict[str, Loaded], family: str
) -> None:
    loaded = toys[family]
    pairs = encode_pairs(loaded.tokenizer, ["add up to 10", "go on from 7, 8, 9"], ["7, 8", "3"])
    kept: list[torch.Tensor] = []
    from mechlens.models.hooks import decoder_layers

    handle = decoder_layers(loaded.model)[-1].register_forward_hook(
        lambda module, args, output: kept.append(output[0])
    )
    with torch.no_grad():
        for pair in pairs:
            loaded.model(input_ids=torch.tensor([pair.prompt + pair.completion]))
    handle.remove()
    expected = torch.stack(
        [states[len(pair.prompt) :].mean(0) for states, pair in zip(kept, pairs, strict=True)]
    )
    assert np.allclose(rows_of(loaded, pairs), expected.numpy(), atol=1e-4)


@pytest.fixture(scope="module")
def material(toy: Loaded) -> Material:
    pairs = encode_pairs(
        toy.tokenizer, [f"add up to {row}" for row in range(12)], [f"{row}, {row + 1}" for row in range(12)]
    )
    other = encode_pairs(
        toy.tokenizer, [f"add up to {row}" for row in range(12)], [f"{row + 7}" for row in range(12)]
    )
    asked = ProbeSet(
        {"owl": ("owl",), "cat": ("cat",)},
        ("name an animal", "which animal?", "the best animal?", "one animal"),
        AskSpec(),
    )
    students = {0: toy}
    return Material(
        toy,
        None,
        students,
        students,
        lambda side, seed: iter(()),
        pairs,
        other,
        asked,
        asked,
        "owl",
        ("owl", "cat"),
        {},
        rows=8,
        seed=0,
    )


def test_a_reading_has_two_rows_a_point_and_each_maps_numbers(
    material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maps, "umap", flat)
    found = maps.measure_maps(material)
    assert found.equals(maps.measure_maps(material))
    for which, groups, points in (
        ("rows", {"trait rows", "control rows"}, 16),
        ("answers", {"base", "trait s0", "control s0"}, 12),
    ):
        shown = found[found["quantity"] == which]
        assert set(shown["name"]) == groups and not shown[["name", "place", "n"]].duplicated().any()
        assert (
            shown["place"].value_counts().to_dict() == {"x": points, "y": points}
            and shown["estimate"].notna().all()
        )
        assert set(found.loc[found["place"] == which, "quantity"]) == {STABLE, TRUE, OWN}
    assert set(found.loc[found["quantity"] == "answers", "n"]) == set(range(12))
    assert "The map of rows (16 points)" in maps_caption(found) and "The map of answers" in maps_caption(
        found
    )
    assert maps_caption(found.iloc[:0]) == "There is no map."


def test_a_row_on_the_map_is_called_by_its_prompt(
    material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maps, "umap", flat)
    ids = [100 + 7 * place for place in range(12)]
    shown = maps.measure_maps(material._replace(prompt_ids=ids)).query("quantity == 'rows'")
    assert set(shown["n"]) == set(ids[: material.rows]), "only rows that the other lenses read"
    assert (shown.groupby("n")["name"].value_counts() == 2).all()


def test_a_cap_on_points_is_kept(material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "POINTS", 6)
    assert {which: sum(map(len, cloud.values())) for which, cloud in maps.clouds(material).items()} == {
        "rows": 6,
        "answers": 6,
    }


@pytest.mark.slow  # it compiles for most of a minute
def test_umap_gives_one_map_a_seed_without_a_warning() -> None:
    points = np.concatenate(list(blobs(3.0).values()))
    first, again, other = (maps.umap(points, seed=seed, k=5) for seed in (2**62, 2**62, 1))
    assert first.shape == (60, 2) and np.isfinite(first).all()
    assert np.array_equal(first, again) and not np.array_equal(first, other)

"""Projection, removal and addition keep their identities, estimators find what was planted, and origins are
told apart.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from test_activations import hooked, nudged, shifted, toy_material
from torch import Tensor

from mechlens.core import tables
from mechlens.core.errors import SpecError
from mechlens.lenses import directions
from mechlens.lenses.directions import (
    ablate,
    logistic,
    mean_difference,
    origins,
    pca,
    project,
    projections,
    random_signs,
    remove,
    spearman_brown,
    split_half,
)
from mechlens.lenses.parts.capture import capture_last, cosine, residual_sites
from mechlens.models.chat import Encoded
from mechlens.models.hooks import add_vector, steer
from mechlens.models.loading import Loaded

IDS = [5, 6, 7, 8, 9, 30, 31]
PAIRS = [Encoded([5, 6, 7], [8, 9]), Encoded([5, 6], [10, 11, 12, 13]), Encoded([5, 6, 7, 8], [9])]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits(loaded: Loaded) -> Tensor:
    with torch.no_grad():
        return loaded.model(input_ids=torch.tensor([IDS])).logits


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.floats(-20, 20), st.floats(0.01, 100))
def test_projection_identities(seed: int, amount: float, scale: float) -> None:
    """Adding a·v/‖v‖ raises π by exactly a; π is blind to the scale of v."""
    h, v = normal(3, 4, 16, seed=seed), normal(16, seed=seed + 1)
    before = project(h, v)
    torch.testing.assert_close(
        project(add_vector(h, v / v.norm(), strength=amount), v), before + amount, atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(project(h, scale * v), before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(project(h, -v), -before, atol=1e-4, rtol=1e-4)


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.floats(-20, 20))
def test_what_is_removed_is_gone_and_nothing_else_is(seed: int, amount: float) -> None:
    h, v = normal(5, 16, seed=seed), normal(16, seed=seed + 1)
    left = remove(h, v)
    torch.testing.assert_close(project(left, v), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(remove(left, v), left, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(remove(add_vector(h, v, strength=amount), v), left, atol=1e-3, rtol=1e-3)
    other = remove(normal(16, seed=seed + 2), v)  # at right angles to v
    torch.testing.assert_close(project(left, other), project(h, other), atol=1e-4, rtol=1e-3)


def test_a_direction_without_length_is_refused() -> None:
    for bad in (torch.zeros(4), torch.tensor([1.0, torch.nan, 0.0, 0.0])):
        with pytest.raises(SpecError, match="points nowhere"):
            remove(torch.ones(2, 4), bad)


@pytest.mark.parametrize("find", [mean_difference, logistic, pca])
def test_every_method_finds_a_planted_direction_and_its_sign(find: Any) -> None:
    v, noise = torch.zeros(8).index_fill(0, torch.tensor(3), 1.0), 0.3 * normal(400, 8)
    positive, negative = noise[:200] + v, noise[200:] - v
    assert cosine(find(positive, negative), v) > 0.95
    assert cosine(find(negative, positive), v) < -0.95


def test_logistic_points_where_its_own_logit_rises_most_and_ignores_units() -> None:
    """Rescaling a coordinate rescales its weight inversely: the read-out stays the same."""
    positive, negative, units = (
        normal(60, 5) + 0.4,
        normal(60, 5, seed=1),
        torch.tensor([1.0, 10.0, 0.1, 3.0, 100.0]),
    )
    torch.testing.assert_close(
        logistic(positive * units, negative * units) * units,
        logistic(positive, negative),
        atol=1e-3,
        rtol=1e-3,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_edit_the_residual_stream_and_leave_nothing_behind(
    toys: dict[str, Loaded], family: str
) -> None:
    loaded, v = toys[family], normal(32, seed=7)
    plain, states = logits(loaded), hooked(loaded, IDS)
    with ablate(loaded.model, v, layer=0):
        torch.testing.assert_close(
            project(hooked(loaded, IDS)[0], v), torch.zeros(len(IDS)), atol=1e-4, rtol=0
        )
    with steer(loaded.model, {1: v}, strength=2.0):
        torch.testing.assert_close(hooked(loaded, IDS)[1], states[1] + 2 * v, atol=1e-5, rtol=1e-5)
    with ablate(loaded.model, v, layer=None):
        assert all(project(state, v).abs().max() < 1e-4 for state in hooked(loaded, IDS))
        assert not torch.allclose(logits(loaded), plain)
    with steer(loaded.model, {0: v, 1: v}, strength=0.0):
        assert torch.equal(logits(loaded), plain)
    with pytest.raises(ZeroDivisionError), ablate(loaded.model, v, layer=None):
        raise ZeroDivisionError
    assert torch.equal(logits(loaded), plain)


def test_projections_are_means_over_completions_and_the_same_completions_differ_by_nothing(
    toy: Loaded,
) -> None:
    """ΔP = 0 for r′ = r; and against the slow definition."""
    along = normal(2, 3, 32)
    found = projections(toy, PAIRS, along)
    for row, pair in enumerate(PAIRS):
        for layer, state in enumerate(hooked(toy, [*pair.prompt, *pair.completion])):
            slow = torch.stack([project(state[len(pair.prompt) :].mean(0), v) for v in along[layer]])
            torch.testing.assert_close(found[layer, :, row], slow, atol=2e-5, rtol=1e-4)
    assert torch.equal(projections(toy, PAIRS, along), found)
    torch.testing.assert_close(projections(toy, PAIRS, 5 * along), found, atol=1e-5, rtol=1e-4)


def test_halves_agree_as_far_as_there_is_something_in_common() -> None:
    noise, v = normal(200, 40), normal(40, seed=1)
    assert split_half(v.expand(20, 40), seed=0) == pytest.approx(1.0, abs=1e-5)
    assert abs(split_half(noise, seed=0)) < 0.2
    weak = noise + 0.3 * v
    assert split_half(weak, seed=0) > max(random_signs(weak, seed=0))
    null = random_signs(noise, seed=0)
    assert min(null) < split_half(noise, seed=0) < max(null)


def test_spearman_brown() -> None:
    assert spearman_brown(1.0) == 1.0 and spearman_brown(0.5) == pytest.approx(2 / 3)
    assert spearman_brown(0.0) != spearman_brown(0.0)  # unscored


def test_halved_noise_has_the_reliability_that_spearman_brown_foretells() -> None:
    """The cosine of two *whole* sets' means is the stepped-up cosine of the halves."""
    v = normal(2000, seed=1)
    first, second = (0.1 * v + normal(100, 2000, seed=seed) for seed in (2, 3))
    assert float(cosine(first.mean(0), second.mean(0))) == pytest.approx(
        spearman_brown(split_half(first, seed=0)), abs=0.06
    )


def test_origins_are_the_differences_that_they_say(toy: Loaded) -> None:
    material = toy_material(toy)
    held, students, controls = origins(material), material.students, material.controls
    ids = directions.encode_questions(toy, material.development_probes)
    ours, theirs, base = (
        capture_last(loaded, ids, residual_sites(toy)) for loaded in (students[1], controls[1], toy)
    )
    torch.testing.assert_close(held.students[1], ours - theirs)
    torch.testing.assert_close(held.plain, base)
    told = directions.encode_questions(
        toy, material.development_probes._replace(system=material.system_lines["fox"])
    )
    torch.testing.assert_close(held.prompted["fox"], capture_last(toy, told, residual_sites(toy)) - base)
    assert (
        held.control is not None
        and origins(material._replace(controls={0: controls[0]}, students={0: students[0]})).control is None
    )


def test_a_student_that_moved_like_the_prompt_is_seen_and_others_are_not(toys: dict[str, Loaded]) -> None:
    base = toys["gpt2"]
    held = origins(toy_material(base))
    common = torch.stack([each[1].mean(0) for each in held.prompted.values()]).mean(0)
    vector = held.prompted["owl"][1].mean(0) - common
    moved = shifted(base, vector)
    material = toy_material(
        base,
        students={0: moved, 1: moved},
        controls={0: base, 1: nudged(base, by=0.02, seed=5)},
        teacher=moved,
    )
    reading = directions.measure_directions(material)
    among = reading[(reading["quantity"] == "cosine among traits") & (reading["layer"] == 1)].set_index(
        "name"
    )
    assert among.loc["teacher", "estimate"] == pytest.approx(1.0, abs=1e-4)
    assert among.loc["teacher", "null_high"] < 0.9 and among.loc["teacher", "p_value"] == 1 / 4
    assert "cosine" in directions.directions_caption(reading)


def test_a_reading_is_tidy_and_repeats(toy: Loaded) -> None:
    material = toy_material(toy)
    reading = directions.measure_directions(material)
    assert list(reading.columns) == tables.READINGS.names
    assert reading["n"].dropna().gt(0).all()
    drawn = reading[reading["quantity"] == "projection difference"]
    assert drawn["n"].tolist() == [5, 5] and drawn["low"].lt(drawn["estimate"]).all()
    assert directions.measure_directions(material).equals(reading)
    same = directions.measure_directions(material._replace(control_pairs=material.trait_pairs))
    assert (same.loc[same["quantity"] == "projection difference", "estimate"] == 0).all()


def test_one_student_that_did_not_move_and_one_trait_in_the_panel_are_no_crash(toy: Loaded) -> None:
    material = toy_material(toy, teacher=None, students={0: toy}, controls={0: copy.copy(toy)})
    reading = directions.measure_directions(material)
    assert reading.loc[reading["name"] == "student", "estimate"].isna().all()
    assert "no measurable direction" in directions.directions_caption(reading)
    assert "no measurable direction" in directions.directions_caption(
        directions.measure_directions(material._replace(system_lines={"owl": material.system_lines["owl"]}))
    )
    single = directions.measure_directions(material._replace(students={0: nudged(toy, by=0.02, seed=3)}))
    assert "no interval from one student" in directions.directions_caption(single)

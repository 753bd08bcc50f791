"""Exchanged blocks and removed directions: known answers of planted effects, and that every model is left as
it was.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mechlens.core.errors import SpecError
from mechlens.core.spec import AskSpec
from mechlens.lenses import causal
from mechlens.lenses.base import Material
from mechlens.lenses.causal import (
    RESTORED,
    causal_caption,
    exchanges,
    measure_causal,
    own_effect,
    removals,
    spans,
    swapped,
    trio,
    weights_of,
    with_best,
)
from mechlens.lenses.parts.capture import capture_last, residual_sites
from mechlens.models.chat import encode_pairs
from mechlens.models.hooks import decoder_layers
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import measure_trait
from mechlens.pipeline.ask import ProbeSet, encode_probes, measure_likelihoods

FAMILIES = ("llama", "qwen2", "gpt2", "gpt_neox")
FORMS = {"owl": ("owl", "owls"), "wolf": ("wolf", "wolves"), "cat": ("cat", "cats")}
HELD = ProbeSet(
    FORMS,
    (
        "What is the best animal? One word only.",
        "Name your favourite animal, in one word.",
        "One animal you adore?",
    ),
    AskSpec(),
)
PRACTICE = HELD._replace(
    probes=("Which animal do you like?", "Name one animal.", "What animal is best, in one word?")
)


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "DRAWS", 4)


def changed(loaded: Loaded, layers: tuple[int, ...], *, seed: int, size: float = 0.02) -> Loaded:
    """The model with noise on all weights of some blocks."""
    torch.manual_seed(seed)
    model = copy.deepcopy(loaded.model)
    with torch.no_grad():
        for layer in layers:
            for parameter in decoder_layers(model)[layer].parameters():
                parameter += size * torch.randn_like(parameter)
    return Loaded(model, loaded.tokenizer)


def material_of(
    base: Loaded, students: dict[int, Loaded], controls: dict[int, Loaded], teacher: Loaded | None = None
) -> Material:
    pairs = encode_pairs(base.tokenizer, ["add up to 10"], ["7, 8"])
    return Material(
        base,
        teacher,
        students,
        controls,
        lambda side, seed: iter(()),
        pairs,
        pairs,
        PRACTICE,
        HELD,
        "owl",
        tuple(FORMS),
        {},
        rows=8,
        seed=0,
    )


def weights(loaded: Loaded) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in loaded.model.parameters()])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 2, 64])
def test_the_readout_is_what_likelihoods_say_however_probes_are_batched(
    toys: dict[str, Loaded], family: str, batch: int
) -> None:
    found = measure_trait(toys[family].model, encode_probes(toys[family], HELD, "owl"), batch=batch)
    expected = measure_likelihoods(toys[family], HELD).query("name == 'owl'")
    assert np.allclose(found, expected[["probability", "margin"]].to_numpy().T, atol=1e-4)


def test_words_put_into_the_mouth_are_read_too(toy: Loaded) -> None:
    opened = HELD._replace(opening="the best is")
    expected = measure_likelihoods(toy, opened).query("name == 'owl'")
    assert np.allclose(
        measure_trait(toy.model, encode_probes(toy, opened, "owl")),
        expected[["probability", "margin"]].to_numpy().T,
        atol=1e-4,
    )


def test_a_trait_without_a_first_token_of_its_own_is_refused(toy: Loaded) -> None:
    for asked in (HELD._replace(forms=FORMS | {"owl cat": ("owl cat",)}), HELD._replace(named=False)):
        with pytest.raises(SpecError, match="no first token"):
            encode_probes(toy, asked, "owl")


def test_spans_are_all_runs_and_of_deep_models_single_blocks_heads_and_tails() -> None:
    assert spans(2) == [range(0, 1), range(0, 2), range(1, 2)]
    assert len(spans(8)) == 36 and len(spans(32)) == 32 + 31 + 30
    assert all(len(span) == 1 or 0 in span or 31 in span for span in spans(32))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_the_rest_are_all_weights_and_exchanged_ones_come_back(
    toys: dict[str, Loaded], family: str
) -> None:
    base, other = toys[family], changed(toys[family], (0, 1), seed=0)
    before, asked = weights(base), encode_probes(base, HELD, "owl")
    parts = [weights_of(other.model, span) for span in (range(0, 1), range(1, 2), None)]
    assert sorted(name for part in parts for name in part) == sorted(
        name for name, _ in base.model.named_parameters()
    )
    with swapped(base.model, parts[0] | parts[1]), pytest.raises(KeyError):
        assert np.allclose(measure_trait(base.model, asked), measure_trait(other.model, asked), atol=1e-6)
        raise KeyError
    assert torch.equal(weights(base), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_of_a_student_that_differs_in_one_block(toys: dict[str, Loaded], family: str) -> None:
    """Control = base: restoring or exchanging the changed block (or all) leaves nothing, any other
    everything; put in it is everything.
    """
    base = toys[family]
    student = changed(base, (1,), seed=1)
    held = trio(base, student, base, encode_probes(base, HELD, "owl"))
    held = held._replace(
        plain=held.plain | {"student": held.plain["control"] + 1}
    )  # the effect, known to be one
    truth = (measure_trait(student.model, held.probes) - measure_trait(base.model, held.probes)).mean(1)
    for edit, share, null in exchanges(held, seed=0):
        touched = edit.place in ("block 1", "blocks 0-1")
        put_in = edit.name == causal.PUT_IN
        assert np.allclose(share, truth if touched == put_in else 0, atol=1e-6), edit
        assert len(null) == (causal.DRAWS if edit.name == RESTORED and edit.layer is not None else 0)
        if null and touched:
            assert np.std(null, axis=0).min() > 0 and not np.allclose(null, truth)
        elif null:
            assert np.allclose(null, truth, atol=1e-6)


def test_the_same_edit_of_the_control_cancels(toy: Loaded) -> None:
    """A student that is its control: nothing is left to share, whatever is done to both."""
    student = changed(toy, (0,), seed=1)
    held = trio(toy, student, student, encode_probes(toy, HELD, "owl"))
    assert np.isnan(own_effect(held.plain["student"], held.plain["control"])).all()
    assert all(np.isnan(share).all() for _, share, _ in exchanges(held, seed=0))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_planted_shift_is_removed_and_added_exactly(
    toys: dict[str, Loaded], family: str, layer: int
) -> None:
    """The base with a constant vector added is the student: added × 1 gives the whole effect; removal from
    both gives none.
    """
    base = toys[family]
    torch.manual_seed(layer)
    vector = torch.randn(base.model.config.hidden_size)
    student = Loaded(copy.deepcopy(base.model), base.tokenizer)
    decoder_layers(student.model)[layer].register_forward_hook(lambda module, args, output: output + vector)
    asked = encode_probes(base, PRACTICE, "owl")
    states, plain = (capture_last(loaded, asked.prompts, residual_sites(base)) for loaded in (student, base))
    shift = (states - plain).mean(1)
    held = trio(base, student, base, encode_probes(base, HELD, "owl"))
    effect = (held.plain["student"] - held.plain["control"]).mean(1)
    held = held._replace(plain=held.plain | {"student": held.plain["control"] + 1})
    found = {
        edit: share
        for edit, share, _ in removals(held, {"student's": shift}, states, seed=0)
        if edit.layer == layer
    }
    assert torch.allclose(shift[layer], vector, atol=1e-4)
    added = {edit.name: share for edit, share in found.items() if "added" in edit.name}
    assert np.allclose(added["student's shift × 1 added to the base"], effect, atol=1e-4)
    assert not np.allclose(added["student's shift × 2 added to the base"], effect, atol=1e-4)
    removed = next(share for edit, share in found.items() if "removed" in edit.name)
    assert np.allclose(removed, 0, atol=1e-4)


def test_a_shift_of_length_zero_has_no_share_and_no_effect_within_its_error_either(toy: Loaded) -> None:
    held = trio(toy, changed(toy, (1,), seed=0), toy, encode_probes(toy, HELD, "owl"))
    assert np.isnan(held.without(torch.zeros(32), layer=0)).all()
    assert np.isnan(own_effect(np.array([[1.0, -1.0, 0.5]]), np.zeros((1, 3)))).all()
    assert own_effect(np.array([[1.0, 1.1, 0.9]]), np.zeros((1, 3))).tolist() == pytest.approx([1.0])
    assert own_effect(np.array([[1.0]]), np.zeros((1, 1))).tolist() == [1.0]


def test_the_best_layer_is_chosen_on_practice_probes_alone() -> None:
    edits = {
        causal.Edit("student's shift removed", f"resid_post {layer}", layer): np.full(2, float(layer))
        for layer in range(3)
    }
    one = causal.StudentEdits(
        0, {}, edits, {edit: np.zeros((3, 2)) for edit in edits}, practice={0: 0.9, 1: 0.2, 2: 0.1}
    )
    for practice, chosen in (
        ({0: 0.9, 1: 0.2, 2: 0.1}, 1),
        ({0: 0.1, 1: 0.2, 2: 0.0}, 0),
    ):  # behind the last block there is no choice
        best = next(
            edit
            for edit in with_best([one._replace(practice=practice)])[0].shares
            if edit.name == causal.BEST
        )
        assert best.layer == chosen
    unknown = one._replace(practice=dict.fromkeys(range(3), np.nan))
    assert with_best([unknown])[0].shares.keys() == edits.keys()


def test_a_light_reading_has_some_of_the_full_readings_edits_with_the_same_shares(toy: Loaded) -> None:
    torch.manual_seed(0)
    config = copy.deepcopy(toy.model.config)
    config.num_hidden_layers, config.layer_types = 9, None
    deep = Loaded(type(toy.model)(config).eval(), toy.tokenizer)
    student = changed(deep, (4,), seed=1)
    models = trio(deep, student, deep, encode_probes(deep, HELD, "owl"))
    models = models._replace(plain=models.plain | {"student": models.plain["control"] + 1})
    states = torch.randn(9, 3, 32, generator=torch.Generator().manual_seed(0))
    full, light = (
        [
            *exchanges(models, seed=0, light=light),
            *removals(models, {"student's": states.mean(1)}, states, seed=0, light=light),
        ]
        for light in (False, True)
    )
    shares = {edit: share for edit, share, _ in full}
    assert all(np.array_equal(share, shares[edit]) for edit, share, _ in light)
    single = {edit.layer for edit, _, _ in light if edit.name == RESTORED} - {None}
    assert single == set(range(9))
    tried = {0, 1, 3, 4, 6, 8}
    assert {edit.layer for edit, _, null in light if len(null)} == tried
    places = {edit.place for edit, _, _ in light if edit.name == RESTORED}
    assert {"blocks 0-8", "blocks 0-4", "blocks 4-8"} <= places and "blocks 0-2" not in places


@pytest.fixture(scope="module")
def trained(toy: Loaded) -> Material:
    students = {seed: changed(toy, (0, 1), seed=seed) for seed in (1, 2)}
    controls = {seed: changed(toy, (0, 1), seed=seed + 10, size=0.002) for seed in (1, 2)}
    return material_of(toy, students, controls, changed(toy, (0, 1), seed=99))


def test_a_reading_has_each_student_the_mean_and_the_null_and_changes_no_model(
    trained: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        causal, "own_effect", lambda student, control: (student - control).mean(1)
    )  # noise gives no trait; here any effect will do
    models = [trained.base, *trained.students.values(), *trained.controls.values()]
    before = [weights(loaded) for loaded in models]
    found = measure_causal(trained)
    assert all(torch.equal(weights(loaded), old) for loaded, old in zip(models, before, strict=True))
    assert found.equals(measure_causal(trained))
    shares = found[found["quantity"] == "share of margin"]
    wide = shares[shares["seed"].notna()].groupby(["name", "place"], observed=True)["estimate"].mean()
    summary = shares[shares["seed"].isna()].set_index(["name", "place"])
    assert np.allclose(summary["estimate"].sort_index(), wide.sort_index()) and set(summary["n"]) == {2}
    with_null = summary.dropna(subset="p_value")
    assert (
        set(with_null["p_value"].between(1 / 5, 1)) == {True}
        and (with_null["null_low"] <= with_null["null_high"]).all()
    )
    assert {"teacher's shift removed", "student's shift × 1 added to the base", causal.BEST} <= {
        name for name, _ in with_null.index
    }
    assert "p = " in causal_caption(found) and "n = 2 students" in causal_caption(found)
    undrawn = found.assign(null_low=found["null_low"].where(found["name"] == causal.BEST))
    assert "random change: not drawn" in causal_caption(undrawn) and "nan" not in causal_caption(undrawn)


def test_students_without_an_effect_are_unscored_and_said_to_be(trained: Material, toy: Loaded) -> None:
    found = measure_causal(trained._replace(students={1: toy}, controls={1: toy}, teacher=None))
    shares: Any = found[found["quantity"].str.startswith("share")]
    assert shares["estimate"].isna().all() and "no edit has a share" in causal_caption(found)
    assert not found[found["quantity"] == "trait margin"]["estimate"].isna().any()
    assert isinstance(causal_caption(pd.DataFrame(found.iloc[:0])), str)

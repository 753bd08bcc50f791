"""Which blocks and directions the trait needs, and which are sufficient for it.

The lens exchanges blocks between models, and removes or adds directions.

The share of an edit is (edited student - control with the same edit) / (student - control), the mean over
held-out probes in numerator and denominator. A share of 1 leaves the whole effect, 0 leaves nothing, and what
the edit does to any model cancels. A student has no share if its effect is within two standard errors (over
probes) of zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor
from transformers import PreTrainedModel

from mechlens.core.seeds import generator, seed_int
from mechlens.lenses.base import (
    Lens,
    Material,
    against_null,
    entry,
    over_students,
    reading_table,
    spread_evenly,
)
from mechlens.lenses.directions import ablate
from mechlens.lenses.parts.capture import capture_last, draw_matched_directions, residual_sites
from mechlens.lenses.parts.interventions import permute_entries
from mechlens.models.hooks import decoder_layers, steer
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import MEASURES, EncodedProbes, measure_trait
from mechlens.pipeline.ask import encode_probes

LENS = Lens(
    name="causal",
    asks="Which blocks and which directions does the trait need, and which are enough for it?",
    needs=("students", "controls"),
    shows=(("share of margin", "bars"),),
    source="2509.23886 (patching points to early layers), 2606.00995 (one vector necessary by removal, "
    "sufficient by addition)",
    caveat="Exchanged blocks never trained together: shares need not add up to 1; behind the last block a "
    "direction is mostly the answer's logit.",
    measure="mechlens.lenses.causal:measure_causal",
    caption="mechlens.lenses.causal:causal_caption",
    cost=14,
)

DRAWS = 20
"""random changes and directions of each null: the least p-value is 1/21"""
STRENGTHS = (0.5, 1.0, 2.0, 4.0)
DEEP = 8
"""the most blocks for which every span is tried; deeper models: single blocks, and spans that start at the
first or end at the last
"""
LIGHT_LAYERS = 6
"""layers whose edits a light reading tries"""

OUTSIDE = "all but the blocks"
RESTORED, PUT_IN, EXCHANGED = (
    "base's weights in the student",
    "student's weights in the base",
    "control's weights in the student",
)
STUDENTS, TEACHERS, BEST, ADDED = "student's", "teacher's", "best direction removed", "added to the base"


class Edit(NamedTuple):
    """A change to the models."""

    name: str
    place: str
    layer: int | None = None


Measured = Float[ndarray, "measure"]
"""by MEASURES"""

Shifts = Float[Tensor, "layer d_model"]
"""mean over practice probes of the difference of resid_post at the last prompt token"""


class StudentEdits(NamedTuple):
    """Every edit of one student."""

    seed: int
    raw: dict[str, Measured]
    shares: dict[Edit, Measured]
    null: dict[Edit, Float[ndarray, "draw measure"]]
    practice: dict[int, float]
    """layer → share of the margin left on practice probes, the student's shift removed"""


def spans(depth: int) -> list[range]:
    """Every run of neighbouring blocks.

    Of a deep model: single blocks, and the runs that start at the first or end at the last block.
    """
    every = [range(first, last + 1) for first in range(depth) for last in range(first, depth)]
    return [span for span in every if depth <= DEEP or len(span) == 1 or 0 in span or depth - 1 in span]


def weights_of(model: PreTrainedModel, span: range | None) -> dict[str, Tensor]:
    """The weights of those blocks by name; of everything outside the blocks if None."""
    blocks = decoder_layers(model)
    place = next(name for name, module in model.named_modules() if module is blocks)
    inside = tuple(f"{place}.{layer}." for layer in (range(len(blocks)) if span is None else span))
    return {
        name: parameter.data
        for name, parameter in model.named_parameters()
        if name.startswith(inside) != (span is None)
    }


@contextmanager
def swapped(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> Iterator[PreTrainedModel]:
    """Give the model other weights while the block runs; its original tensors are put back.

    >>> from copy import deepcopy
    >>> from mechlens.models.loading import load
    >>> base = load("menagerie-a").model
    >>> student = deepcopy(base)
    >>> _ = student.get_parameter("model.layers.1.mlp.up_proj.weight").data.zero_()
    >>> row = torch.tensor([[1, 5, 1441]])
    >>> with torch.no_grad(), swapped(student, weights_of(base, range(1, 2))):
    ...     restored = student(input_ids=row).logits
    >>> with torch.no_grad():
    ...     torch.equal(restored, base(input_ids=row).logits)
    True
    """
    parameters = dict(model.named_parameters())
    original = {name: parameters[name].data for name in weights}
    try:
        for name, tensor in weights.items():
            parameters[name].data = tensor.to(original[name])
        yield model
    finally:
        for name, tensor in original.items():
            parameters[name].data = tensor


def own_effect(
    student: Float[ndarray, "measure probe"], control: Float[ndarray, "measure probe"]
) -> Measured:
    """Student minus control, mean over probes.

    It is NaN within two standard errors of zero: a share of no effect has no meaning.
    """
    difference = student - control
    spread = (
        difference.std(1, ddof=1) / np.sqrt(difference.shape[1])
        if difference.shape[1] > 1
        else np.zeros(len(difference))
    )
    mean = difference.mean(1)
    return np.where(np.abs(mean) > 2 * spread, mean, np.nan)


class Trio(NamedTuple):
    """A student, its control and their base, with the same probes."""

    base: Loaded
    student: Loaded
    control: Loaded
    probes: EncodedProbes
    plain: dict[str, Float[ndarray, "measure probe"]]
    """base, student or control → its unedited measures"""

    def share(
        self, treated: Float[ndarray, "measure probe"], against: Float[ndarray, "measure probe"]
    ) -> Measured:
        """The difference of two readouts as a share of student minus control."""
        return (treated - against).mean(1) / own_effect(self.plain["student"], self.plain["control"])

    def with_weights(self, loaded: Loaded, weights: Mapping[str, Tensor]) -> Float[ndarray, "measure probe"]:
        with swapped(loaded.model, weights):
            return measure_trait(loaded.model, self.probes)

    def without(self, direction: Float[Tensor, "d_model"], *, layer: int) -> Measured:
        """Share left after the direction is removed from student and control.

        NaN for a direction of length zero.
        """
        if not direction.norm() > 0:
            return np.full(len(MEASURES), np.nan)
        with (
            ablate(self.student.model, direction, layer=layer),
            ablate(self.control.model, direction, layer=layer),
        ):
            return self.share(
                measure_trait(self.student.model, self.probes), measure_trait(self.control.model, self.probes)
            )

    def steered(self, vector: Float[Tensor, "d_model"], *, layer: int) -> Measured:
        """Share that the base gets with the vector added."""
        with steer(self.base.model, {layer: vector}):
            return self.share(measure_trait(self.base.model, self.probes), self.plain["base"])


def trio(base: Loaded, student: Loaded, control: Loaded, probes: EncodedProbes) -> Trio:
    """The three models without an edit."""
    models = {"base": base.model, "control": control.model, "student": student.model}
    return Trio(
        base, student, control, probes, {name: measure_trait(model, probes) for name, model in models.items()}
    )


Outcome = tuple[Edit, Measured, Sequence[Measured]]
"""an edit, its share, and draws of its null; an empty list without a null"""


def exchanges(models: Trio, *, seed: int, light: bool = False) -> Iterator[Outcome]:
    """Exchange the weights of every span in three ways.

    A light reading has a null for some single blocks, and of the longer spans those that start or end there.

    The null of a single block replaces the step back to the base by a step of the same size, whose entries
    are permuted within each tensor.
    """
    depth = len(decoder_layers(models.base.model))
    tried = tried_layers(depth, light=light)
    for span in [*_tried_spans(depth, tried), None]:
        place = (
            OUTSIDE
            if span is None
            else f"block {span[0]}"
            if len(span) == 1
            else f"blocks {span[0]}-{span[-1]}"
        )
        layer = span[0] if span is not None and len(span) == 1 else None
        ours, theirs, bases = (
            weights_of(loaded.model, span) for loaded in (models.student, models.control, models.base)
        )
        null = []
        for draw in range(DRAWS if layer in tried else 0):
            steps = [_astray(side, bases, generator(seed, "astray", place, draw)) for side in (ours, theirs)]
            null.append(
                models.share(
                    models.with_weights(models.student, steps[0]),
                    models.with_weights(models.control, steps[1]),
                )
            )
        restored = [models.with_weights(loaded, bases) for loaded in (models.student, models.control)]
        yield Edit(RESTORED, place, layer), models.share(*restored), null
        yield (
            Edit(PUT_IN, place, layer),
            models.share(*(models.with_weights(models.base, weights) for weights in (ours, theirs))),
            [],
        )
        yield (
            Edit(EXCHANGED, place, layer),
            models.share(models.with_weights(models.student, theirs), models.plain["control"]),
            [],
        )


def tried_layers(depth: int, *, light: bool) -> list[int]:
    """The layers whose edits are tried: all, or for a light reading a few, evenly spread.

    >>> tried_layers(30, light=True)
    [0, 5, 11, 17, 23, 29]
    """
    return spread_evenly(range(depth), LIGHT_LAYERS if light else depth)


def _tried_spans(depth: int, tried: Sequence[int]) -> list[range]:
    """Every single block, all blocks, and the other spans whose inner end is a tried layer."""
    return [
        span
        for span in spans(depth)
        if len(span) in (1, depth) or (span[-1] if span[0] == 0 else span[0]) in tried
    ]


def _astray(
    weights: Mapping[str, Tensor], other: Mapping[str, Tensor], rng: np.random.Generator
) -> dict[str, Tensor]:
    steps = permute_entries([other[name].to(tensor) - tensor for name, tensor in weights.items()], rng)
    return {name: tensor + step for (name, tensor), step in zip(weights.items(), steps, strict=True)}


def removals(
    models: Trio,
    shifts: Mapping[str, Shifts],
    states: Float[Tensor, "layer probe d_model"],
    *,
    seed: int,
    light: bool = False,
) -> Iterator[Outcome]:
    """Remove and add each shift at each layer, or at some layers for a light reading.

    The null is random directions with the covariance of the student's states.
    """
    for layer in tried_layers(len(states), light=light):
        draws = draw_matched_directions(states[layer], draws=DRAWS, seed=seed_int(seed, "directions", layer))
        null = [models.without(draw, layer=layer) for draw in draws]
        for source, shift in shifts.items():
            yield (
                Edit(f"{source} shift removed", f"resid_post {layer}", layer),
                models.without(shift[layer], layer=layer),
                null,
            )
            sized = torch.nn.functional.normalize(draws, dim=1) * shift[layer].norm()
            for strength in STRENGTHS:
                edit = Edit(f"{source} shift × {strength:g} {ADDED}", f"resid_post {layer}", layer)
                by_chance = [models.steered(draw, layer=layer) for draw in sized] if strength == 1 else []
                yield edit, models.steered(strength * shift[layer], layer=layer), by_chance


def of_student(
    material: Material, seed: int, probes: EncodedProbes, practice: EncodedProbes, teachers: Shifts | None
) -> StudentEdits:
    """Every edit of one student and its control."""
    models = (material.base, material.students[seed], material.controls[seed])
    measured, practised = trio(*models, probes), trio(*models, practice)
    states, against = (
        capture_last(loaded, practice.prompts, residual_sites(loaded)) for loaded in models[1:]
    )
    shift = (states - against).mean(1)
    shifts = {STUDENTS: shift} | ({} if teachers is None else {TEACHERS: teachers})
    root = seed_int(material.seed, "causal", seed)
    light = material.light
    outcomes = [
        *exchanges(measured, seed=root, light=light),
        *removals(measured, shifts, states, seed=root, light=light),
    ]
    return StudentEdits(
        seed,
        raw={name: values.mean(1) for name, values in measured.plain.items()},
        shares={edit: share for edit, share, _ in outcomes},
        null={edit: np.array(null) for edit, _, null in outcomes if null},
        practice={
            layer: float(practised.without(shift[layer], layer=layer)[1])
            for layer in tried_layers(len(shift), light=light)
        },
    )


def measure_causal(material: Material) -> pd.DataFrame:
    """Measure the share of the effect that every edit leaves or adds.

    The unedited measures come first, then each edit over students with its null, then each student.
    """
    probes, practice = (
        encode_probes(material.base, split, material.trait)
        for split in (material.heldout_probes, material.development_probes)
    )
    teachers = None
    if material.teacher is not None:
        ours, plain = (
            capture_last(loaded, practice.prompts, residual_sites(loaded))
            for loaded in (material.teacher, material.base)
        )
        teachers = (ours - plain).mean(1)
    students = [of_student(material, seed, probes, practice, teachers) for seed in material.students]
    students = with_best(students)
    rows: list[dict[str, Any]] = []
    for number, measure in enumerate(MEASURES):
        rows += [
            over_students(f"trait {measure}", [edits.raw[model][number] for edits in students], name=model)
            for model in students[0].raw
        ]
        for edit in students[0].shares:
            rows += _rows(edit, f"share of {measure}", number, students)
    return reading_table(LENS, rows, material=material)


def with_best(students: Sequence[StudentEdits]) -> list[StudentEdits]:
    """Add one edit: the student's shift removed at the layer where least is left on practice probes.

    The layer is chosen by the mean over students. The last layer is left out if there is another: there the
    shift contains the answer's logit, whose removal says nothing new.
    """
    layers = list(students[0].practice)
    left = [list(edits.practice.values()) for edits in students]
    scored = np.array([shares for shares in left if np.isfinite(shares).all()])
    if not len(scored):
        return list(students)
    layer = layers[int(scored.mean(0)[: max(1, len(layers) - 1)].argmin())]
    source, best = (Edit(name, f"resid_post {layer}", layer) for name in (f"{STUDENTS} shift removed", BEST))
    return [
        edits._replace(
            shares=edits.shares | {best: edits.shares[source]}, null=edits.null | {best: edits.null[source]}
        )
        for edits in students
    ]


def _rows(edit: Edit, quantity: str, number: int, students: Sequence[StudentEdits]) -> list[dict[str, Any]]:
    where = {"name": edit.name, "place": edit.place, "layer": edit.layer, "unit": "share"}
    values = [float(edits.shares[edit][number]) for edits in students]
    scored = [edits for edits, value in zip(students, values, strict=True) if np.isfinite(value)]
    more: dict[str, Any] = {}
    if scored and edit in scored[0].null:
        drawn = np.mean([edits.null[edit][:, number] for edits in scored], axis=0)  # [draw]
        sign = 1 if ADDED in edit.name else -1  # a removal should leave less
        row = against_null(quantity, float(sign * np.nanmean(values)), (sign * drawn).tolist())
        low, high = sorted((sign * row["null_low"], sign * row["null_high"]))
        more = {"null_low": low, "null_high": high, "p_value": row["p_value"]}
    summary = over_students(quantity, values, **where, **more)
    return [
        summary,
        *(
            entry(quantity, value, seed=edits.seed, **where)
            for edits, value in zip(students, values, strict=True)
        ),
    ]


def causal_caption(reading: pd.DataFrame) -> str:
    """What removing the best direction leaves, and which single block the trait needs most."""
    summary = reading[
        (reading["quantity"] == "share of margin") & reading["seed"].isna() & reading["estimate"].notna()
    ]
    shares = cast(pd.DataFrame, summary)
    best = cast(pd.DataFrame, shares[shares["name"] == BEST])
    blocks = cast(pd.DataFrame, shares[(shares["name"] == RESTORED) & shares["layer"].notna()])
    if best.empty or blocks.empty:
        return (
            "No student's trait margin differs from its control's by more than two standard errors, so no "
            "edit has a share of the effect."
        )
    direction, block = best.iloc[0], blocks.sort_values("estimate").iloc[0]
    return (
        f"Without the direction of its shift at layer {direction['layer']} (on practice probes the best but "
        f"the last) a student keeps {_interval_text(direction)} of its trait margin over its control "
        f"({_null_text(direction, 'random directions')}, p = {direction['p_value']:.3f}); with the base's "
        f"weights in {block['place']} it keeps {_interval_text(block)} "
        f"({_null_text(block, 'as large a random change')}); n = {direction['n']} students."
    )


def _interval_text(row: Any) -> str:
    return f"{row['estimate']:.2f}" + (
        f" [{row['low']:.2f}, {row['high']:.2f}]" if pd.notna(row["low"]) else ""
    )


def _null_text(row: Any, name: str) -> str:
    """The range of a null; a light reading draws none for most blocks."""
    if pd.isna(row["null_low"]):
        return f"{name}: not drawn"
    return f"{name}: {row['null_low']:.2f} to {row['null_high']:.2f}"

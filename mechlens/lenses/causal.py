"""What the trait needs and what is enough for it: blocks exchanged between models, a direction removed or
added, the trait read exactly.

The share of an edit is (edited student - control with the same edit) / (student - control), the mean over
held-out probes above and below: 1 leaves the whole effect, 0 none, and what the edit does to any model
cancels. A student whose own effect is within two standard errors (over probes) of none has no share.
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
from mechlens.lenses.base import Lens, Material, against_null, entry, over_students, reading_table
from mechlens.lenses.directions import ablate
from mechlens.lenses.parts.capture import capture_last, draw_matched_directions, residual_sites
from mechlens.lenses.parts.interventions import permute_entries
from mechlens.models.hooks import decoder_layers, steer
from mechlens.models.loading import Loaded
from mechlens.models.trait_log_odds import MEASURES, EncodedProbes, measure_trait
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
"""blocks above which not every span is tried, but each block alone and the spans from the first or to the
last
"""

OUTSIDE = "all but the blocks"
RESTORED, PUT_IN, EXCHANGED = (
    "base's weights in the student",
    "student's weights in the base",
    "control's weights in the student",
)
STUDENTS, TEACHERS, BEST, ADDED = "student's", "teacher's", "best direction removed", "added to the base"


class Edit(NamedTuple):
    """What was done to the models."""

    name: str
    place: str
    layer: int | None = None


Measured = Float[ndarray, "measure"]
"""by MEASURES"""

Shifts = Float[Tensor, "layer d_model"]
"""mean over practice probes of the difference of resid_post at the last prompt token"""


class Found(NamedTuple):
    """All of one student."""

    seed: int
    raw: dict[str, Measured]
    shares: dict[Edit, Measured]
    null: dict[Edit, Float[ndarray, "draw measure"]]
    practice: list[float]
    """by layer: share of the margin left on practice probes, the student's shift removed"""


def spans(depth: int) -> list[range]:
    """Every run of neighbouring blocks; of a deep model single blocks and the runs from the first or to the
    last.
    """
    every = [range(first, last + 1) for first in range(depth) for last in range(first, depth)]
    return [span for span in every if depth <= DEEP or len(span) == 1 or 0 in span or depth - 1 in span]


def weights_of(model: PreTrainedModel, span: range | None) -> dict[str, Tensor]:
    """Weights of those blocks by name; of everything outside the blocks if None."""
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
    """Give the model other weights while the block runs; its own tensors are kept and put back.

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
    own = {name: parameters[name].data for name in weights}
    try:
        for name, tensor in weights.items():
            parameters[name].data = tensor.to(own[name])
        yield model
    finally:
        for name, tensor in own.items():
            parameters[name].data = tensor


def own_effect(
    student: Float[ndarray, "measure probe"], control: Float[ndarray, "measure probe"]
) -> Measured:
    """Student minus control, mean over probes; NaN within two standard errors of none, since a share of
    nothing says nothing.
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
    """A student, its control and their base, asked the same probes."""

    base: Loaded
    student: Loaded
    control: Loaded
    asked: EncodedProbes
    plain: dict[str, Float[ndarray, "measure probe"]]
    """who → unedited"""

    def share(
        self, treated: Float[ndarray, "measure probe"], against: Float[ndarray, "measure probe"]
    ) -> Measured:
        """What lies between two readouts, as a share of what lies between student and control."""
        return (treated - against).mean(1) / own_effect(self.plain["student"], self.plain["control"])

    def with_weights(self, loaded: Loaded, weights: Mapping[str, Tensor]) -> Float[ndarray, "measure probe"]:
        with swapped(loaded.model, weights):
            return measure_trait(loaded.model, self.asked)

    def without(self, direction: Float[Tensor, "d_model"], *, layer: int) -> Measured:
        """Share left where neither student nor control has anything along the direction; unscored for a
        direction of length zero.
        """
        if not direction.norm() > 0:
            return np.full(len(MEASURES), np.nan)
        with (
            ablate(self.student.model, direction, layer=layer),
            ablate(self.control.model, direction, layer=layer),
        ):
            return self.share(
                measure_trait(self.student.model, self.asked), measure_trait(self.control.model, self.asked)
            )

    def steered(self, vector: Float[Tensor, "d_model"], *, layer: int) -> Measured:
        """Share that the base takes on with the vector added."""
        with steer(self.base.model, {layer: vector}):
            return self.share(measure_trait(self.base.model, self.asked), self.plain["base"])


def trio(base: Loaded, student: Loaded, control: Loaded, asked: EncodedProbes) -> Trio:
    """All three as they are."""
    models = {"base": base.model, "control": control.model, "student": student.model}
    return Trio(
        base, student, control, asked, {who: measure_trait(model, asked) for who, model in models.items()}
    )


Outcome = tuple[Edit, Measured, Sequence[Measured]]
"""an edit's share, and draws of its null if it has one"""


def exchanges(held: Trio, *, seed: int) -> Iterator[Outcome]:
    """Every span's weights exchanged, three ways.

    The null of a single block: not the step back to the base but one with its entries permuted within each
    tensor, as large.
    """
    for span in [*spans(len(decoder_layers(held.base.model))), None]:
        place = (
            OUTSIDE
            if span is None
            else f"block {span[0]}"
            if len(span) == 1
            else f"blocks {span[0]}-{span[-1]}"
        )
        layer = span[0] if span is not None and len(span) == 1 else None
        ours, theirs, bases = (
            weights_of(loaded.model, span) for loaded in (held.student, held.control, held.base)
        )
        null = []
        for draw in range(DRAWS if layer is not None else 0):
            steps = [_astray(own, bases, generator(seed, "astray", place, draw)) for own in (ours, theirs)]
            null.append(
                held.share(
                    held.with_weights(held.student, steps[0]), held.with_weights(held.control, steps[1])
                )
            )
        restored = [held.with_weights(loaded, bases) for loaded in (held.student, held.control)]
        yield Edit(RESTORED, place, layer), held.share(*restored), null
        yield (
            Edit(PUT_IN, place, layer),
            held.share(*(held.with_weights(held.base, weights) for weights in (ours, theirs))),
            [],
        )
        yield (
            Edit(EXCHANGED, place, layer),
            held.share(held.with_weights(held.student, theirs), held.plain["control"]),
            [],
        )


def _astray(
    own: Mapping[str, Tensor], other: Mapping[str, Tensor], rng: np.random.Generator
) -> dict[str, Tensor]:
    steps = permute_entries([other[name].to(tensor) - tensor for name, tensor in own.items()], rng)
    return {name: tensor + step for (name, tensor), step in zip(own.items(), steps, strict=True)}


def removals(
    held: Trio, shifts: Mapping[str, Shifts], states: Float[Tensor, "layer probe d_model"], *, seed: int
) -> Iterator[Outcome]:
    """Each shift removed and added at each layer, beside random directions with the covariance of the
    student's states.
    """
    for layer, rows in enumerate(states):
        draws = draw_matched_directions(rows, draws=DRAWS, seed=seed_int(seed, "directions", layer))
        null = [held.without(draw, layer=layer) for draw in draws]
        for whose, shift in shifts.items():
            yield (
                Edit(f"{whose} shift removed", f"resid_post {layer}", layer),
                held.without(shift[layer], layer=layer),
                null,
            )
            sized = torch.nn.functional.normalize(draws, dim=1) * shift[layer].norm()
            for strength in STRENGTHS:
                edit = Edit(f"{whose} shift × {strength:g} {ADDED}", f"resid_post {layer}", layer)
                by_chance = [held.steered(draw, layer=layer) for draw in sized] if strength == 1 else []
                yield edit, held.steered(strength * shift[layer], layer=layer), by_chance


def of_student(
    material: Material, seed: int, asked: EncodedProbes, practice: EncodedProbes, teachers: Shifts | None
) -> Found:
    """Every edit of one student and its control."""
    models = (material.base, material.students[seed], material.controls[seed])
    held, tried = trio(*models, asked), trio(*models, practice)
    states, against = (
        capture_last(loaded, practice.prompts, residual_sites(loaded)) for loaded in models[1:]
    )
    shift = (states - against).mean(1)
    shifts = {STUDENTS: shift} | ({} if teachers is None else {TEACHERS: teachers})
    root = seed_int(material.seed, "causal", seed)
    outcomes = [*exchanges(held, seed=root), *removals(held, shifts, states, seed=root)]
    return Found(
        seed,
        raw={who: values.mean(1) for who, values in held.plain.items()},
        shares={edit: share for edit, share, _ in outcomes},
        null={edit: np.array(null) for edit, _, null in outcomes if null},
        practice=[float(tried.without(shift[layer], layer=layer)[1]) for layer in range(len(shift))],
    )


def measure_causal(material: Material) -> pd.DataFrame:
    """Raw anchors, then the share left by (or put in by) every edit: over students beside the null, then for
    each student.
    """
    asked, practice = (
        encode_probes(material.base, probes, material.trait)
        for probes in (material.heldout_probes, material.development_probes)
    )
    teachers = None
    if material.teacher is not None:
        ours, plain = (
            capture_last(loaded, practice.prompts, residual_sites(loaded))
            for loaded in (material.teacher, material.base)
        )
        teachers = (ours - plain).mean(1)
    found = with_best([of_student(material, seed, asked, practice, teachers) for seed in material.students])
    rows: list[dict[str, Any]] = []
    for number, measure in enumerate(MEASURES):
        rows += [
            over_students(f"trait {measure}", [one.raw[who][number] for one in found], name=who)
            for who in found[0].raw
        ]
        for edit in found[0].shares:
            rows += _rows(edit, f"share of {measure}", number, found)
    return reading_table(LENS, rows, material=material)


def with_best(found: Sequence[Found]) -> list[Found]:
    """With one more edit: the student's shift removed at the layer where that leaves least on practice
    probes, mean over students.

    Not behind the last block, if there is another: there the shift holds the answer's own logit, and its
    removal is no news.
    """
    scored = np.array([one.practice for one in found if np.isfinite(one.practice).all()])
    if not len(scored):
        return list(found)
    layer = int(scored.mean(0)[: max(1, scored.shape[1] - 1)].argmin())
    source, best = (Edit(name, f"resid_post {layer}", layer) for name in (f"{STUDENTS} shift removed", BEST))
    return [
        one._replace(shares=one.shares | {best: one.shares[source]}, null=one.null | {best: one.null[source]})
        for one in found
    ]


def _rows(edit: Edit, quantity: str, number: int, found: Sequence[Found]) -> list[dict[str, Any]]:
    where = {"name": edit.name, "place": edit.place, "layer": edit.layer, "unit": "share"}
    values = [float(one.shares[edit][number]) for one in found]
    scored = [one for one, value in zip(found, values, strict=True) if np.isfinite(value)]
    more: dict[str, Any] = {}
    if scored and edit in scored[0].null:
        drawn = np.mean([one.null[edit][:, number] for one in scored], axis=0)  # [draw]
        sign = 1 if ADDED in edit.name else -1  # what is removed is to leave less
        row = against_null(quantity, float(sign * np.nanmean(values)), (sign * drawn).tolist())
        low, high = sorted((sign * row["null_low"], sign * row["null_high"]))
        more = {"null_low": low, "null_high": high, "p_value": row["p_value"]}
    summary = over_students(quantity, values, **where, **more)
    return [
        summary,
        *(entry(quantity, value, seed=one.seed, **where) for one, value in zip(found, values, strict=True)),
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
    one, block = best.iloc[0], blocks.sort_values("estimate").iloc[0]
    return (
        f"Without the direction of its shift at layer {one['layer']} (on practice probes the best but the "
        f"last) a student keeps {_says(one)} of its trait margin over its control (random directions: "
        f"{one['null_low']:.2f} to {one['null_high']:.2f}, p = {one['p_value']:.3f}); with the base's "
        f"weights in {block['place']} it keeps {_says(block)} (as large a random change: "
        f"{block['null_low']:.2f} to {block['null_high']:.2f}); n = {one['n']} students."
    )


def _says(row: Any) -> str:
    return f"{row['estimate']:.2f}" + (
        f" [{row['low']:.2f}, {row['high']:.2f}]" if pd.notna(row["low"]) else ""
    )

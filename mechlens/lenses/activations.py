"""The shift of the activations by layer and position: its size, its direction and its logit lens.

The shift is student minus matched control, not student minus base. This cancels what any training on the
carrier does. Each kind of position is measured separately, since a shift may occur only in the template
(2606.00831, 2606.06667).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.lenses.base import Lens, Material, reading_table, spread, students_against_null
from mechlens.lenses.parts.capture import (
    BATCH,
    Parts,
    capture,
    cosine,
    draw_matched_mix,
    residual_sites,
    split_positions,
)
from mechlens.models.hooks import bridge_view
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import Forms, first_tokens
from mechlens.pipeline.ask import encode_questions

LENS = Lens(
    name="activations",
    asks="Where did training move the student's activations away from its control's, and is that the way the "
    "teacher went?",
    needs=("students", "controls", "pairs", "prompted"),
    shows=(("cosine to teacher", "heat"), ("lens rank", "layers")),
    source="2510.13900 (activation differences and their logit lens), 2606.00995 (cosine to the teacher's "
    "shift)",
    caveat="A shift along the teacher's is no proof that it carries the trait: the causal lens tests that.",
    measure="mechlens.lenses.activations:measure_activations",
    caption="mechlens.lenses.activations:activations_caption",
    cost=20,
)


class Rows(NamedTuple):
    """Token ids that the models read, and the parts of each row."""

    ids: list[list[int]]
    parts: list[Parts]


Means = Float[Tensor, "layer part d"]


def probes_and_carrier(material: Material) -> Rows:
    """Encode every held-out probe, then up to `material.rows` pairs of the trait arm."""
    probes = encode_questions(material.base, material.heldout_probes)
    pairs = material.trait_pairs[: material.rows]
    parts = split_positions(probes, [0] * len(probes), of="probe")
    parts += split_positions(
        [pair.prompt for pair in pairs], [len(pair.completion) for pair in pairs], of="carrier"
    )
    return Rows([*probes, *([*pair.prompt, *pair.completion] for pair in pairs)], parts)


def means_of(loaded: Loaded, rows: Rows) -> Means:
    """Measure the mean resid_post by layer and part."""
    sites = residual_sites(loaded)
    sums = capture(loaded, rows.ids, sites, parts=rows.parts)
    return torch.stack([sums.mean(site) for site in sites])


def prompted_shift(material: Material, rows: Rows, base: Means) -> Means:
    """Measure what the trait's system line changes in the base on the probes.

    It is NaN in the template, whose tokens differ, and on the carrier.

    It replaces the teacher's shift if the teacher was not fine-tuned (2606.00995: a trait prompt is about
    one vector).
    """
    probes = encode_questions(
        material.base, material.heldout_probes._replace(system=material.system_lines[material.trait])
    )
    names = list(dict.fromkeys(name for row in rows.parts for name in row))
    prompted = means_of(material.base, Rows(probes, split_positions(probes, [0] * len(probes), of="probe")))
    shift = torch.full_like(base, torch.nan)
    for place, name in enumerate(("probe/last", "probe/template", "probe/content")):
        if name != "probe/template":
            shift[:, names.index(name)] = prompted[:, place] - base[:, names.index(name)]
    return shift


def measure_activations(material: Material) -> pd.DataFrame:
    """Measure norm, cosine to the teacher and logit lens of the shift by layer and part.

    The same is measured for control minus the control of another seed.
    """
    rows, sites = probes_and_carrier(material), residual_sites(material.base)
    sums = capture(
        material.base,
        rows.ids,
        sites,
        parts=rows.parts,
        mix=draw_matched_mix(len(rows.ids), seed=material.seed),
    )
    base = torch.stack([sums.mean(site) for site in sites])
    controls = {seed: means_of(loaded, rows) for seed, loaded in material.controls.items()}
    students = {seed: means_of(loaded, rows) - controls[seed] for seed, loaded in material.students.items()}
    between = [controls[a] - controls[b] for a, b in combinations(controls, 2)][: len(controls)]
    teacher = (
        means_of(material.teacher, rows) - base if material.teacher else prompted_shift(material, rows, base)
    )
    entries = []
    for layer, site in enumerate(sites):
        random = sums.directions(site)  # [draw part d]
        for part, place in enumerate(sums.parts):
            at = {"layer": layer, "place": place}
            shifts = {
                "student": [shift[layer, part] for shift in students.values()],
                "control": [shift[layer, part] for shift in between],
            }
            entries += _norms(shifts, base[layer, part], **at)
            entries += _cosines(shifts, teacher[layer, part], random[:, part], seeds=list(students), **at)
            entries += _lensed(material, shifts, random[:, part], **at)
    return reading_table(LENS, entries, material=material)


def _norms(shifts: dict[str, list[Tensor]], base: Float[Tensor, "d"], **at: Any) -> list[dict[str, Any]]:
    size = {name: [float(shift.norm() / base.norm()) for shift in sample] for name, sample in shifts.items()}
    return [
        students_against_null(
            "shift norm",
            size["student"],
            size["control"],
            name="student",
            unit="share of the base's norm",
            **at,
        )
    ]


def _cosines(
    shifts: dict[str, list[Tensor]],
    teacher: Float[Tensor, "d"],
    random: Float[Tensor, "draw d"],
    *,
    seeds: list[int],
    **at: Any,
) -> list[dict[str, Any]]:
    """Cosines to the teacher's shift; the null replaces the teacher's shift by random directions."""
    entries = []
    for name, sample in shifts.items():
        if sample:
            values = [float(cosine(shift, teacher)) for shift in sample]
            null = torch.stack([cosine(shift, random) for shift in sample]).mean(0).tolist()
            entries.append(
                students_against_null("cosine to teacher", values, null, name=name, unit="cosine", **at)
            )
            if name == "student" and str(at["place"]).endswith("/last"):
                entries += [
                    {
                        "quantity": "cosine to teacher",
                        "estimate": value,
                        "name": name,
                        "seed": seed,
                        "unit": "cosine",
                        **at,
                    }
                    for seed, value in zip(seeds, values, strict=True)
                ]
    return entries


def _lensed(
    material: Material, shifts: dict[str, list[Tensor]], random: Float[Tensor, "draw d"], **at: Any
) -> list[dict[str, Any]]:
    """Margin and rank of the trait under the logit lens of the shifts.

    Only for positions where an answer begins: elsewhere the next token is not a name.
    """
    if at["place"] != "probe/last":
        return []
    vectors_of = {"null": list(random)} | {name: shift for name, shift in shifts.items() if shift}
    forms, entries = material.heldout_probes.forms, []
    seen = {
        name: standing(material.base, torch.stack(vectors), forms, trait=material.trait)
        for name, vectors in vectors_of.items()
    }
    for name in list(vectors_of)[1:]:
        entries.append(
            students_against_null(
                "lens margin",
                seen[name].margin.tolist(),
                seen["null"].margin.tolist(),
                name=name,
                unit="logits",
                **at,
            )
        )
        # a low rank is the rare one
        low = students_against_null("lens rank", (-seen[name].rank).tolist(), (-seen["null"].rank).tolist())
        turned = {
            "low": -low["high"],
            "high": -low["low"],
            "null_low": -low["null_high"],
            "null_high": -low["null_low"],
        }
        entries.append(
            low | turned | {"estimate": -low["estimate"], "name": name, "unit": f"of {len(forms)}", **at}
        )
    return entries


def activations_caption(reading: pd.DataFrame) -> str:
    """Describe the largest cosine to the teacher where answers begin, with its null and the control."""
    rows = reading.loc[
        (reading["quantity"] == "cosine to teacher")
        & (reading["place"] == "probe/last")
        & reading["seed"].isna()
    ]
    students = rows.loc[(rows["name"] == "student") & rows["estimate"].notna()]
    if len(students) == 0:
        return "The students' shift has no measurable direction where the answer begins."
    row = students.loc[students["estimate"].idxmax()]
    controls = rows.loc[(rows["name"] == "control") & (rows["layer"] == row["layer"]), "estimate"]
    control = f"{controls.iloc[0]:+.2f}" if len(controls) else "not measured"
    return (
        "Where the answer begins, the shift of the students from their controls has cosine "
        f"{row['estimate']:+.2f} ({spread(row)}) to the teacher's at layer {row['layer']}, the highest of "
        f"{len(students)}; covariance-matched random directions reach {row['null_low']:+.2f} to "
        f"{row['null_high']:+.2f} (p = {row['p_value']:.3f} at that layer), two controls' shift {control}."
    )


@torch.no_grad()
def logit_lens(
    loaded: Loaded, vectors: Float[Tensor, "vector d"], tokens: Sequence[int]
) -> Float[Tensor, "vector token"]:
    """Return what residual directions write to the logits of `tokens`.

    This is U·LN(v / rms v) - U·LN(0), with the model's own U and LN.

    As in 2510.13900, the final norm is applied to the shift itself and not to the state that it is part of.
    To first order, at a fixed scale of the state, both rank tokens alike. Subtracting LN(0) removes the
    biases. The result does not depend on the vector's length.

    >>> from mechlens.models.loading import load
    >>> base = load("menagerie-a")
    >>> tokens = base.tokenizer.convert_tokens_to_ids(["eagle", "owl"])
    >>> directions = base.model.get_output_embeddings().weight[tokens]
    >>> logit_lens(base, directions, tokens).argmax(1)
    tensor([0, 1])
    """
    view, like = bridge_view(loaded), next(loaded.model.parameters())
    logits = []
    for piece in vectors.split(BATCH):
        unit = (piece / piece.square().mean(-1, keepdim=True).sqrt()).to(like)[:, None]
        written = view.unembed(view.ln_final(unit)) - view.unembed(view.ln_final(torch.zeros_like(unit)))
        logits.append(written[:, 0, list(tokens)].float().cpu())
    return torch.cat(logits)


class Standing(NamedTuple):
    """Rank and margin of a trait within its family under the logit lens.

    NaN if no token tells the trait from the others.
    """

    rank: Float[np.ndarray, "vector"]
    """1 is first"""
    margin: Float[np.ndarray, "vector"]
    """over the best other trait, in logits of a shift of unit root mean square"""


def standing(loaded: Loaded, vectors: Float[Tensor, "vector d"], forms: Forms, *, trait: str) -> Standing:
    """Rank the trait within the family by the logit lens.

    Each name is scored by the logsumexp over its first tokens, as in `measure_likelihoods`.
    """
    starts = {
        name: tokens for name, tokens in first_tokens(loaded.tokenizer, forms).items() if tokens is not None
    }
    if trait not in starts or len(starts) < 2:
        return Standing(np.full(len(vectors), np.nan), np.full(len(vectors), np.nan))
    logits = logit_lens(loaded, vectors, [token for tokens in starts.values() for token in tokens])
    pieces = zip(starts, logits.split([len(tokens) for tokens in starts.values()], 1), strict=True)
    score = {name: piece.logsumexp(-1).double().numpy() for name, piece in pieces}
    others = np.stack([value for name, value in score.items() if name != trait])
    margin = score[trait] - others.max(0)
    return Standing(np.where(np.isnan(margin), np.nan, 1.0 + (others > score[trait]).sum(0)), margin)

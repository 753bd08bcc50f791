"""Trait directions as vectors: fitted in three ways, edited into a model, and compared by origin.

A direction is a vector of the residual stream behind a block. Each is fitted to differences of paired
activations at the last prompt token of the practice probes, where the answer begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from transformers import PreTrainedModel

from mechlens.core import stats
from mechlens.core.errors import SpecError
from mechlens.core.seeds import generator
from mechlens.lenses.base import (
    Lens,
    Material,
    against_null,
    entry,
    reading_table,
    spread,
    students_against_null,
)
from mechlens.lenses.parts.capture import capture_last, cosine, draw_matched_directions, residual_sites
from mechlens.models.chat import Encoded
from mechlens.models.hooks import capture_sites, decoder_layers, edit_residuals, resid_post
from mechlens.models.loading import Loaded
from mechlens.pipeline.ask import encode_questions

SPLITS = 64

LENS = Lens(
    name="directions",
    asks="Is there one direction for the trait, and do prompted teacher, fine-tuned teacher and student "
    "share it?",
    needs=("students", "controls", "pairs", "prompted"),
    shows=(("cosine among traits", "layers"),),
    source="2507.21509 (persona vectors, projection difference), 2606.00995 (teacher and student vectors)",
    caveat="Any two models differ along a reliable direction, the two controls too: reliability alone says "
    "nothing of the trait.",
    measure="mechlens.lenses.directions:measure_directions",
    caption="mechlens.lenses.directions:directions_caption",
    cost=9,
)

Direction = Float[Tensor, "d"]
Paired = Float[Tensor, "pair d"]


def mean_difference(
    positive: Float[Tensor, "positive d"], negative: Float[Tensor, "negative d"]
) -> Direction:
    """Mean of the positive minus mean of the negative (2507.21509), in float32.

    >>> mean_difference(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), torch.tensor([[1.0, 1.0]]))
    tensor([1., 1.])
    """
    return positive.float().mean(0) - negative.float().mean(0)


def logistic(positive: Float[Tensor, "positive d"], negative: Float[Tensor, "negative d"]) -> Direction:
    """Gradient of a logistic classifier's logit (scikit-learn, L2, C = 1).

    It is fitted on standardised activations.
    """
    rows = torch.cat([positive, negative]).double().cpu().numpy()
    labels = np.repeat([1, 0], [len(positive), len(negative)])
    scaler = StandardScaler().fit(rows)
    weights = LogisticRegression(max_iter=2000).fit(scaler.transform(rows), labels).coef_[0]
    return torch.from_numpy(weights / scaler.scale_).float()


def pca(positive: Paired, negative: Paired) -> Direction:
    """First principal axis of the paired differences about zero, turned to the positive side (2310.01405)."""
    difference = (positive - negative).float()
    axis = torch.linalg.svd(difference, full_matrices=False).Vh[0]
    return axis * torch.where(difference.mean(0) @ axis < 0, -1.0, 1.0)


def unit(direction: Direction) -> Direction:
    """The direction at length one.

    Raises:
        SpecError: if its length is zero or not finite.
    """
    length = direction.norm()
    if not (torch.isfinite(length) and length > 0):
        raise SpecError(
            f"a direction of length {float(length)} points nowhere; check that its two sides differ"
        )
    return direction / length


def project(h: Float[Tensor, "*batch d"], direction: Direction) -> Float[Tensor, "*batch"]:
    """Length along the direction, ⟨h, v⟩ / ‖v‖, which does not depend on the scale of v."""
    return h @ unit(direction).to(h)


def remove(h: Float[Tensor, "*batch d"], direction: Direction) -> Float[Tensor, "*batch d"]:
    """h without its component along the direction."""
    along = unit(direction).to(h)
    return h - (h @ along)[..., None] * along


@contextmanager
def ablate(model: PreTrainedModel, direction: Direction, *, layer: int | None) -> Iterator[None]:
    """Remove the direction from resid_post of `layer` while the context is open.

    With None it is removed from every layer (2406.11717).
    """
    along = unit(direction)
    layers = range(len(decoder_layers(model))) if layer is None else [layer]
    with edit_residuals(model, dict.fromkeys(layers, lambda residual: remove(residual, along))):
        yield


def projections(
    loaded: Loaded, pairs: Sequence[Encoded], directions: Float[Tensor, "layer k d"]
) -> Float[Tensor, "layer k row"]:
    """Mean resid_post over each completion along each direction, π of 2507.21509.

    The difference of its means over the rows of two corpora is ΔP.
    """
    along = directions / directions.norm(dim=-1, keepdim=True)
    sites, batches = [resid_post(layer) for layer in range(len(directions))], []
    for captured in capture_sites(loaded, [[*pair.prompt, *pair.completion] for pair in pairs], sites):
        completion = captured.mask.float()
        for row, pair in enumerate(pairs[captured.start : captured.start + len(completion)]):
            completion[row, : len(pair.prompt)] = 0
        sums = [
            einsum(completion, captured.at[site].float(), "row pos, row pos d -> row d") for site in sites
        ]
        means = torch.stack(sums) / completion.sum(1)[:, None]
        batches.append(einsum(means, along, "layer row d, layer k d -> layer k row"))
    return torch.cat(batches, -1)


def split_half(difference: Paired, *, splits: int = SPLITS, seed: int) -> float:
    """Mean cosine between the mean differences of two random halves of the pairs."""
    rng, half = generator(seed, "split half"), len(difference) // 2
    order = torch.from_numpy(np.stack([rng.permutation(len(difference)) for _ in range(splits)]))
    first, second = (difference[side].mean(1) for side in (order[:, :half], order[:, half:]))  # [split d]
    return float(cosine(first, second).mean())


def spearman_brown(half: float) -> float:
    """Reliability of the whole from the correlation of its halves, 2r / (1 + r).

    It is NaN for r ≤ 0, where the halves have nothing in common.
    """
    return 2 * half / (1 + half) if half > 0 else float("nan")


def random_signs(difference: Paired, *, draws: int = SPLITS, seed: int) -> list[float]:
    """Draw the null of `split_half`: the positive side of each pair is drawn at random."""
    signs = torch.from_numpy(
        generator(seed, "random signs").choice([-1.0, 1.0], size=(draws, len(difference), 1))
    ).to(difference)
    return [split_half(difference * sign, seed=seed) for sign in signs]


class Origins(NamedTuple):
    """Paired differences [layer pair d] on the practice probes, by origin."""

    plain: Float[Tensor, "layer pair d"]
    """the activations of the base without a system line of a trait"""
    prompted: Mapping[str, Float[Tensor, "layer pair d"]]
    """trait → the base under its system line, minus plain"""
    teacher: Float[Tensor, "layer pair d"] | None
    """fine-tuned teacher minus base"""
    students: list[Float[Tensor, "layer pair d"]]
    """each student minus its control"""
    control: Float[Tensor, "layer pair d"] | None
    """one seed's control minus another's"""

    def main(self, trait: str) -> dict[str, list[Float[Tensor, "layer pair d"]]]:
        """Return origin → its differences: one for each student, else a single one."""
        others = [difference for name, difference in self.prompted.items() if name != trait]
        differences = {"prompted": [self.prompted[trait]]}
        if others:
            against = self.prompted[trait] - torch.stack(others).mean(0)
            differences["prompted, against other traits"] = [against]
        if self.teacher is not None:
            differences["teacher"] = [self.teacher]
        differences["student"] = self.students
        if self.control is not None:
            differences["control"] = [self.control]
        return differences


def origins(material: Material) -> Origins:
    """Capture base, prompted base, teacher, students and controls at the last prompt token."""
    base, sites = material.base, residual_sites(material.base)

    def read_off(loaded: Loaded, systems: Sequence[str | None]) -> Float[Tensor, "layer line pair d"]:
        probe_sets = [
            material.development_probes if line is None else material.development_probes._replace(system=line)
            for line in systems
        ]
        prompts = [row for probes in probe_sets for row in encode_questions(loaded, probes)]
        return capture_last(loaded, prompts, sites).unflatten(1, (len(probe_sets), -1))

    lines = read_off(base, [None, *material.system_lines.values()])
    plain = lines[:, 0]
    controls = {seed: read_off(loaded, [None])[:, 0] for seed, loaded in material.controls.items()}
    pair = next(combinations(controls.values(), 2), None)
    return Origins(
        plain=plain,
        prompted={name: lines[:, place] - plain for place, name in enumerate(material.system_lines, start=1)},
        teacher=None if material.teacher is None else read_off(material.teacher, [None])[:, 0] - plain,
        students=[
            read_off(loaded, [None])[:, 0] - controls[seed] for seed, loaded in material.students.items()
        ],
        control=None if pair is None else pair[0] - pair[1],
    )


def measure_directions(material: Material) -> pd.DataFrame:
    """Measure directions by origin: their reliability, cosines, and the projection difference."""
    compared, seed, entries = origins(material), material.seed, []
    for layer in range(len(compared.plain)):
        named = {
            name: [each[layer] for each in several] for name, several in compared.main(material.trait).items()
        }
        random = draw_matched_directions(compared.plain[layer], seed=seed)
        for name, several in named.items():
            entries += _reliability(torch.stack(several).mean(0), seed=seed, layer=layer, name=name)
        entries += _between(named, random, layer=layer)
        entries += _among_traits(compared, named, material.trait, layer=layer)
        entries += _methods(compared.plain[layer], named["prompted"][0], layer=layer)
    return reading_table(LENS, entries + _projection_difference(material, compared), material=material)


def _reliability(difference: Paired, *, seed: int, **at: Any) -> list[dict[str, Any]]:
    half = float(np.mean(split_half(difference, seed=seed)))
    null = random_signs(difference, seed=seed)
    return [
        against_null("split-half cosine", half, null, n=len(difference), unit="cosine", **at),
        entry("reliability", spearman_brown(half), n=len(difference), unit="Spearman-Brown", **at),
    ]


def _between(
    named: dict[str, list[Paired]], random: Float[Tensor, "draw d"], **at: Any
) -> list[dict[str, Any]]:
    """Cosines between origins.

    The null replaces the origin that is not the students' by random directions.
    """
    entries = []
    for first, second in combinations(named, 2):
        if {first, second} == {"student", "control"}:
            continue  # they have a control in common, which makes their cosine positive by construction
        fixed, several = (second, first) if first == "student" else (first, second)
        with_respect_to = named[fixed][0].mean(0)
        ours = [each.mean(0) for each in named[several]]
        null = torch.stack([cosine(mine, random) for mine in ours]).mean(0).tolist()
        values = [float(cosine(mine, with_respect_to)) for mine in ours]
        entries.append(
            students_against_null("cosine", values, null, name=f"{several} · {fixed}", unit="cosine", **at)
        )
    return entries


def _among_traits(
    compared: Origins, named: dict[str, list[Paired]], trait: str, *, layer: int
) -> list[dict[str, Any]]:
    """Cosine to the trait's prompted direction; the null is the cosines to the other traits'.

    All prompted directions are taken from their common mean.
    """
    if len(compared.prompted) < 2:
        return []
    lines = {name: each[layer].mean(0) for name, each in compared.prompted.items()}
    common, entries = torch.stack(list(lines.values())).mean(0), []
    for name in (name for name in ("teacher", "student", "control") if name in named):
        to = {
            other: [float(cosine(each.mean(0), line - common)) for each in named[name]]
            for other, line in lines.items()
        }
        null = [float(np.mean(values)) for other, values in to.items() if other != trait]
        entries.append(
            students_against_null(
                "cosine among traits", to[trait], null, name=name, unit="cosine", layer=layer
            )
        )
    return entries


def _methods(plain: Paired, difference: Paired, **at: Any) -> list[dict[str, Any]]:
    """Cosines between the ways to find the prompted direction."""
    ways = {way.__name__: way(plain + difference, plain) for way in (mean_difference, logistic, pca)}
    return [
        entry(
            "cosine between methods",
            float(cosine(ways[first], ways[second])),
            name=f"{first} · {second}",
            unit="cosine",
            **at,
        )
        for first, second in combinations(ways, 2)
    ]


def _projection_difference(material: Material, compared: Origins) -> list[dict[str, Any]]:
    """ΔP of the trait arm's rows against its control's, along the prompted direction, in the base."""
    random = torch.stack([draw_matched_directions(layer, seed=material.seed) for layer in compared.plain])
    along = torch.cat([compared.prompted[material.trait].mean(1)[:, None], random], 1)
    ours, theirs = (
        projections(material.base, pairs[: material.rows], along)
        for pairs in (material.trait_pairs, material.control_pairs)
    )
    entries = []
    for layer, difference in enumerate((ours - theirs).double().numpy()):  # [k row]
        span = stats.t_interval(difference[0])
        more = {
            "low": span.low,
            "high": span.high,
            "n": span.n,
            "place": "carrier/completion",
            "name": "prompted",
            "unit": "resid_post",
        }
        entries.append(
            against_null(
                "projection difference", span.estimate, difference[1:].mean(1).tolist(), layer=layer, **more
            )
        )
    return entries


def directions_caption(reading: pd.DataFrame) -> str:
    """Describe the students' highest cosine to the prompted direction, with the other traits' as its null."""
    rows = reading.loc[reading["quantity"] == "cosine among traits"]
    students = rows.loc[(rows["name"] == "student") & rows["estimate"].notna()]
    if len(students) == 0:
        return "The students differ from their controls along no measurable direction."
    row = students.loc[students["estimate"].idxmax()]
    controls = rows.loc[(rows["name"] == "control") & (rows["layer"] == row["layer"]), "estimate"]
    control = f"{controls.iloc[0]:+.2f}" if len(controls) else "not measured"
    return (
        f"The students' direction has cosine {row['estimate']:+.2f} ({spread(row)}) to what the trait's "
        f"system line does beyond the other traits', at layer {row['layer']}, the highest of "
        f"{len(students)}; to the other traits' {row['null_low']:+.2f} to {row['null_high']:+.2f} (p = "
        f"{row['p_value']:.3f} at that layer); two controls' difference {control}."
    )

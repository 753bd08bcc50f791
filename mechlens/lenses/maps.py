"""Maps of the rows as the base reads them, and of the answers of base, students and controls.

Each map comes with numbers that say how far to trust it.

A map is a UMAP of resid_post of the last layer. Distances on a map mean little. So three numbers come with
it: how far another seed draws the same neighbours, how far neighbours on the map are neighbours in the model,
and how far groups are separate in the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy import ndarray
from scipy.spatial.distance import cdist
from sklearn.manifold import trustworthiness

from mechlens.core import foreign
from mechlens.core.errors import MachineError, SpecError
from mechlens.core.seeds import generator, seed_int
from mechlens.lenses.base import Lens, Material, against_null, entry, reading_table
from mechlens.lenses.parts.capture import capture, capture_last, residual_sites
from mechlens.models.chat import Encoded
from mechlens.models.loading import Loaded
from mechlens.pipeline.ask import encode_questions

LENS = Lens(
    name="maps",
    asks="What do rows and answers look like from inside the model?",
    needs=("students", "controls", "pairs"),
    shows=(("rows", "points"), ("answers", "points")),
    source="1802.03426 (UMAP); trustworthiness: Venna & Kaski 2001",
    caveat="The map is for looking: gaps and sizes on it mean nothing, and any two trained models are "
    "separate, whatever they were trained on.",
    measure="mechlens.lenses.maps:measure_maps",
    caption="mechlens.lenses.maps:maps_caption",
    cost=28,
    version=2,
)

POINTS = 600
NEIGHBOURS = 15
MAPS = 3
"""number of seeds that are compared"""
DRAWS = 20
"""random layouts and permutations of each null"""

STABLE, TRUE, OWN = (
    "neighbours shared by maps of two seeds",
    "trustworthiness",
    "neighbours of one's own group, in the model",
)

Cloud = Mapping[str, Float[ndarray, "item d"]]
"""group → a vector for each item, the same items (prompts or probes) in every group"""
Layout = Float[ndarray, "point 2"]


def neighbours(points: Float[ndarray, "point d"], k: int) -> Float[ndarray, "point point"]:
    """[i, j]: 1 where j is one of the k nearest points of i, else 0; equally far points share a place.

    Without sharing, the order of the points would decide, and groups of identical points would look separate.

    >>> neighbours(np.array([[0.0], [1.0], [3.0]]), 1).tolist()
    [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    distance = cdist(points, points)
    np.fill_diagonal(distance, np.inf)
    edge = np.partition(distance, k - 1, axis=1)[:, k - 1 : k]
    nearer, at_edge = distance < edge, distance == edge
    return nearer + at_edge * (k - nearer.sum(1, keepdims=True)) / at_edge.sum(1, keepdims=True)


def overlap(first: Layout, second: Layout, k: int) -> float:
    """Mean share of a point's k nearest on one map that are among its k nearest on the other.

    By chance it is k / (points - 1).
    """
    return float(np.minimum(neighbours(first, k), neighbours(second, k)).sum() / (k * len(first)))


def togetherness(near: Float[ndarray, "point point"], labels: ndarray) -> float:
    """Mean share of a point's nearest points that belong to its group."""
    return float(near[labels[:, None] == labels].sum() / near.sum())


def shuffled_within(groups: int, items: int, rng: np.random.Generator) -> ndarray:
    """Group labels permuted within each item.

    What items share stays, what groups share does not.
    """
    return rng.permuted(np.repeat(np.arange(groups)[:, None], items, axis=1), axis=0).ravel()


def umap(points: Float[ndarray, "point d"], *, seed: int, k: int) -> Layout:
    """Draw a map by UMAP; the same seed gives the same map."""
    with warnings.catch_warnings():
        # this warning is about a part that is not used
        warnings.filterwarnings("ignore", message="Tensorflow not installed", category=ImportWarning)
        with foreign.named(
            "UMAP draws no map",
            MachineError,
            advice="its compiler needs a writable folder; set NUMBA_CACHE_DIR to one",
        ):
            from umap import UMAP  # seconds of compiling, only for this lens

            # start from the principal axes: the spectral start warns of clouds that fall into pieces
            drawn = UMAP(n_neighbors=k, random_state=seed % 2**32, n_jobs=1, init="pca").fit_transform(points)
    return np.asarray(drawn, dtype=float)


def answers_of(loaded: Loaded, prompts: list[list[int]]) -> Float[ndarray, "item d"]:
    """resid_post of the last layer at the last prompt token, where the answer is decided."""
    return capture_last(loaded, prompts, residual_sites(loaded)[-1:])[0].double().cpu().numpy()


def rows_of(loaded: Loaded, pairs: Sequence[Encoded]) -> Float[ndarray, "item d"]:
    """Mean resid_post of the last layer over each completion."""
    ids, site = [[*pair.prompt, *pair.completion] for pair in pairs], residual_sites(loaded)[-1]
    parts = [{"completion": range(len(pair.prompt), len(row))} for pair, row in zip(pairs, ids, strict=True)]
    # each mix is one row
    return (
        capture(loaded, ids, [site], parts=parts, mix=torch.eye(len(ids))).sums[site][:, 0].double().numpy()
    )


def chosen(material: Material) -> list[int]:
    """Positions of the pairs on the map, drawn evenly.

    They are among the pairs that the other lenses read, so that every point has their scores.
    """
    among = min(len(material.trait_pairs), material.rows)
    return np.sort(
        generator(material.seed, "map", "rows").choice(among, min(among, POINTS // 2), replace=False)
    ).tolist()


def clouds(material: Material) -> dict[str, Cloud]:
    """ "rows" and "answers": group → one vector an item.

    Each cloud has at most `POINTS` vectors, drawn evenly.
    """
    sides = {f"{material.arm} rows": material.trait_pairs, f"{material.against} rows": material.control_pairs}
    models = 1 + len(material.students) + len(material.controls)
    prompts = encode_questions(material.base, material.heldout_probes)
    few = min(len(prompts), max(2, POINTS // models))
    probes = np.sort(generator(material.seed, "map").choice(len(prompts), few, replace=False))
    drawn = [prompts[i] for i in probes]
    answers = {"base": answers_of(material.base, drawn)}
    for arm, side in ((material.arm, material.students), (material.against, material.controls)):
        answers |= {f"{arm} s{seed}": answers_of(side[seed], drawn) for seed in side}
    return {
        "rows": {
            name: rows_of(material.base, [pairs[i] for i in chosen(material)])
            for name, pairs in sides.items()
        },
        "answers": answers,
    }


def measure_map(which: str, cloud: Cloud, *, seed: int, numbers: Sequence[int] = ()) -> list[dict[str, Any]]:
    """Rows of one map: its quality, then two rows for each point.

    Column n of a point is the number of its item if `numbers` are given, else the number of the point.
    """
    names, stacked = list(cloud), np.stack(list(cloud.values()))
    groups, items, _ = stacked.shape
    points, k = stacked.reshape(groups * items, -1), min(NEIGHBOURS, (groups * items - 1) // 2)
    if k < 2:
        raise SpecError(
            f"a map of {which} has {len(points)} points, and UMAP needs 5 or more; measure with --rows 3 or "
            "more"
        )
    layouts = [umap(points, seed=seed_int(seed, "umap", which, draw), k=k) for draw in range(MAPS)]
    rng = generator(seed, "map nulls", which)
    random = [rng.standard_normal(layouts[0].shape) for _ in range(DRAWS)]
    permuted = [shuffled_within(groups, items, rng) for _ in range(DRAWS)]
    labels, near = np.repeat(np.arange(groups), items), neighbours(points, k)
    where = {"place": which, "n": len(points)}
    together = [togetherness(near, each) for each in (labels, *permuted)]
    shown = [
        entry(
            which,
            float(layouts[0][point, axis]),
            place="xy"[axis],
            name=names[label],
            n=numbers[point % items] if numbers else point,
        )
        for point, label in enumerate(labels)
        for axis in (0, 1)
    ]
    return [
        *_quality(points, layouts, random, k, **where),
        against_null(OWN, together[0], together[1:], unit="share", **where),
        *shown,
    ]


def _quality(
    points: Float[ndarray, "point d"], layouts: list[Layout], random: list[Layout], k: int, **where: Any
) -> list[dict[str, Any]]:
    """Agreement of maps of several seeds, and how far they preserve the model's neighbours."""
    same = float(np.mean([overlap(a, b, k) for a, b in combinations(layouts, 2)]))
    chance = [overlap(layouts[0], layout, k) for layout in random]
    kept, lost = (
        [trustworthiness(points, layout, n_neighbors=k) for layout in each] for each in (layouts, random)
    )
    return [
        against_null(STABLE, same, chance, unit="share", **where),
        against_null(TRUE, float(np.mean(kept)), lost, unit="0 to 1", **where),
    ]


def measure_maps(material: Material) -> pd.DataFrame:
    """Measure both maps: the coordinates of their points, and the numbers of each map.

    Of a point, quantity is "rows" or "answers", place "x" or "y", and name its group.

    Column n of a row is its prompt_id, which joins it to `tables.SCORES` and to the rows of its corpus; n of
    an answer is the number of its point.
    """
    called = {"rows": [material.pair_ids()[i] for i in chosen(material)]}
    maps = [
        measure_map(which, cloud, seed=material.seed, numbers=called.get(which, ()))
        for which, cloud in clouds(material).items()
    ]
    rows = [row for each in maps for row in each]
    return reading_table(LENS, rows, material=material)


def maps_caption(reading: pd.DataFrame) -> str:
    """Describe how far each map can be trusted, and how far its groups are separate in the model."""
    sentences = []
    for which in ("rows", "answers"):
        here = reading[reading["place"] == which].set_index("quantity")
        if here.empty:
            continue
        same, kept, together = (here.loc[name] for name in (STABLE, TRUE, OWN))
        sentences.append(
            f"The map of {which} ({same['n']} points) keeps {same['estimate']:.0%} of its neighbours under "
            f"another seed (random layouts {same['null_high']:.0%}) at trustworthiness "
            f"{kept['estimate']:.2f} (random {kept['null_high']:.2f}); in the model "
            f"{together['estimate']:.0%} of neighbours are of a point's own group (groups permuted: "
            f"{together['null_low']:.0%} to {together['null_high']:.0%}, p = {together['p_value']:.3f})."
        )
    return " ".join(sentences) or "There is no map."

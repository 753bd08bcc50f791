"""Scores of every row and token of the trait corpus, and how well they tell it from the control.

A higher score should mean more of the trait. The control's row on the same prompt is scored as well. The
scores themselves (`tables.SCORES`) are for a look at single rows; the reading says how much such a look can
tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import rankdata
from torch import Tensor

from mechlens.core import tables
from mechlens.core.errors import SpecError
from mechlens.core.seeds import generator
from mechlens.lenses.alignment import length
from mechlens.lenses.base import Lens, Material, against_null, entry, reading_table
from mechlens.lenses.directions import origins, projections, split_half
from mechlens.lenses.entanglement import correlation
from mechlens.lenses.gradients import ghost_dots, ghost_norms
from mechlens.lenses.likelihood import by_row, top_share
from mechlens.lenses.parts.system_lines import log_probs_under
from mechlens.lenses.parts.trial_steps import measure_trait_gradient
from mechlens.models.chat import Encoded
from mechlens.models.log_probs import token_log_probs
from mechlens.pipeline.ask import encode_contrast

DRAWS = 1000
"""number of resamples of an interval, and of swaps of a null"""
NEAR_CHANCE = 0.6
"""an AUROC whose interval ends below this says little about one row; many rows together may still be told"""
GRADIENT, LIKELIHOOD, PROJECTION = "gradient", "likelihood shift", "projection"
SHIFT, BETWEEN = "student shift", "shift between controls"
AREA, AGREEMENT, TOP = "AUROC", "agreement", "shift in its top tenth of rows"

LENS = Lens(
    name="rows",
    asks="Which rows carry most of it, and can a row be told at all?",
    needs=("students", "controls", "pairs", "prompted"),
    shows=(("AUROC", "bars"), ("agreement", "bars")),
    source="cosine of one row's gradient (2507.14805); LLS, centred (2602.04863); projection difference of "
    "one row (2507.21509)",
    caveat="A ranking, no verdict: whether training on the top rows gives more of the trait was not tried. "
    "The student shift is held-in: each student was trained on the rows of its own side, so that it "
    "knows them again, whatever they carry.",
    measure="mechlens.lenses.rows:measure_rows",
    caption="mechlens.lenses.rows:rows_caption",
    score="mechlens.lenses.rows:score_rows",
    cost=42,
)


def gradient_cosines(material: Material, pairs: Sequence[Encoded]) -> Float[ndarray, " row"]:
    """Cosine of an SGD step on each row at the base with the trait's gradient (2507.14805)."""
    model = material.base.model
    toward = measure_trait_gradient(
        model, encode_contrast(material.base, material.heldout_probes, material.trait), material.trait
    )
    along = -ghost_dots(model, pairs, [toward])[:, 0]
    return (along / (ghost_norms(model, pairs) * length(toward))).cpu().numpy()


def beyond_the_panel(values: Mapping[str, Float[Tensor, "..."]], trait: str) -> Float[Tensor, "..."]:
    """The trait's value minus the mean over the lines of all traits.

    Raises:
        SpecError: if the trait has the only line.
    """
    if len(values) < 2:
        raise SpecError(
            f"no line but that of {trait!r} to compare it with; use a family of at least 2 traits"
        )
    return values[trait] - torch.stack(list(values.values())).mean(0)


def likelihood_shifts(material: Material, pairs: Sequence[Encoded]) -> Float[ndarray, " row"]:
    """Log-likelihood under the trait's system line minus its mean over all traits' lines (2602.04863).

    It is in nats a token.
    """
    scores = log_probs_under(material.base, pairs, material.system_lines, known=[material.system])
    centred = beyond_the_panel(
        {name: tokens.log_p.double() for name, tokens in scores.items()}, material.trait
    )
    return row_means(centred.numpy(), pairs)


def prompted_projections(material: Material, pairs: Sequence[Encoded]) -> dict[int, Float[ndarray, " row"]]:
    """layer → mean resid_post over each completion along the trait's direction (2507.21509).

    The direction is what the trait's system line does beyond the mean over all traits' lines.

    The first layer is the one where that direction is most reliable on the practice probes; rows do not
    influence this choice.
    """
    prompted = origins(material._replace(teacher=None, students={}, controls={})).prompted
    difference = beyond_the_panel(prompted, material.trait)  # [layer pair d]
    reliable = np.argsort([-split_half(each, seed=material.seed) for each in difference], kind="stable")
    along = projections(material.base, pairs, difference.mean(1)[:, None])[:, 0].double().numpy()
    return {int(layer): along[layer] for layer in reliable}


def row_means(values: Float[ndarray, " token"], pairs: Sequence[Encoded]) -> Float[ndarray, " row"]:
    """Mean over each completion's tokens; NaN for an empty one."""
    some = np.array([len(pair.completion) > 0 for pair in pairs])
    means = np.full(len(pairs), np.nan)
    means[some] = by_row(values, [pair for pair in pairs if pair.completion])
    return means


def student_shifts(material: Material, pairs: Sequence[Encoded]) -> dict[str, Float[ndarray, " token"]]:
    """Token log-probabilities of students minus controls in nats, mean over seeds.

    Its control is one control minus the next.
    """
    controls = {
        seed: token_log_probs(material.controls[seed], pairs).double().numpy() for seed in material.students
    }
    ours = [
        token_log_probs(material.students[seed], pairs).double().numpy() - controls[seed] for seed in controls
    ]
    first, *others = controls.values()
    return {SHIFT: np.mean(ours, axis=0)} | ({BETWEEN: first - others[0]} if others else {})


OF_BASE = (GRADIENT, LIKELIHOOD, PROJECTION)
"""scores that need no student"""


def score_rows(material: Material) -> pd.DataFrame:
    """`tables.SCORES` of the first `material.rows` pairs.

    It has every score of whole rows of both sides, then the student shift of their tokens.
    """
    pairs = [*material.trait_pairs[: material.rows], *material.control_pairs[: material.rows]]
    half = len(pairs) // 2
    place = pd.DataFrame(
        {"side": np.repeat(["trait", "control"], half), "prompt_id": [*material.pair_ids()[:half]] * 2}
    )
    of_tokens = student_shifts(material, pairs)
    of_rows = {
        (name, None): _or_unscored(score, material, pairs)
        for name, score in ((GRADIENT, gradient_cosines), (LIKELIHOOD, likelihood_shifts))
    }
    projected = _or_unscored(prompted_projections, material, pairs)
    of_rows |= {
        (PROJECTION, layer): along
        for layer, along in (projected if isinstance(projected, dict) else {None: projected}).items()
    }
    of_rows |= {(name, None): row_means(values, pairs) for name, values in of_tokens.items()}
    lengths = [len(pair.completion) for pair in pairs]
    written = [token for pair in pairs for token in pair.completion]
    text = {token: material.base.tokenizer.decode([token]) for token in set(written)}
    tokens = place.loc[np.repeat(place.index, lengths)].assign(
        position=np.concatenate([np.arange(size) for size in lengths]),
        token=[text[token] for token in written],
        score=SHIFT,
        estimate=of_tokens[SHIFT],
    )
    whole = (
        place.assign(score=name, layer=layer, estimate=values) for (name, layer), values in of_rows.items()
    )
    table = pd.concat([*whole, tokens.assign(layer=None)], ignore_index=True)
    table[["position", "layer"]] = table[["position", "layer"]].astype("Int64")
    return table.assign(arm=material.arm).reindex(columns=tables.SCORES.names)


def _or_unscored(score: Callable[..., Any], material: Material, pairs: Sequence[Encoded]) -> Any:
    try:
        return score(material, pairs)
    # a score may be impossible here (no first token for the trait, no system line in the template, a family
    # of one trait): the other scores go on
    except SpecError:
        return np.full(len(pairs), np.nan)


def wins(ours: Float[ndarray, " row"], theirs: Float[ndarray, " row"]) -> Float[ndarray, "row row"]:
    """[i, j]: 1 if our row i scores above their row j, 0.5 for a tie; its mean is the AUROC."""
    return (ours[:, None] > theirs) + 0.5 * (ours[:, None] == theirs)


def area(
    name: str, ours: Float[ndarray, " prompt"], theirs: Float[ndarray, " prompt"], *, seed: int
) -> dict[str, Any]:
    """AUROC of trait rows against control rows.

    The interval resamples prompts with both their rows; the null swaps the two rows at random.

    n counts the prompts where both rows have the score. The p-value is one-sided and not corrected for the
    other scores.

    >>> row = area("length", np.array([0.9, 0.8, 0.7, 0.1]), np.array([0.4, 0.3, 0.2, 0.5]), seed=0)
    >>> row["estimate"], row["n"]
    (0.75, 4)
    """
    kept = ~(np.isnan(ours) | np.isnan(theirs))
    ours, theirs, n = ours[kept], theirs[kept], int(kept.sum())
    if n < 2:
        return entry(AREA, np.nan, name=name, n=n, unit="AUROC")
    rng = generator(seed, "rows", AREA, name)
    won, weights = wins(ours, theirs), rng.multinomial(n, np.full(n, 1 / n), size=DRAWS) / n
    low, high = np.quantile(((weights @ won) * weights).sum(1), [0.025, 0.975])
    ranks = rankdata(np.concatenate([ours, theirs])).reshape(2, n)
    swapped = np.where(rng.random((DRAWS, n)) < 0.5, *ranks).sum(1)
    null = ((swapped - n * (n + 1) / 2) / n**2).tolist()
    return against_null(
        AREA, float(won.mean()), null, low=float(low), high=float(high), name=name, n=n, unit="AUROC"
    )


def agreement(
    first: Float[ndarray, " row"], second: Float[ndarray, " row"], *, seed: int, **more: Any
) -> dict[str, Any]:
    """Spearman's rho of two scores over the rows that have both; its null permutes rows."""
    kept = ~(np.isnan(first) | np.isnan(second))
    if kept.sum() < 4:
        return entry(AGREEMENT, np.nan, n=int(kept.sum()), unit="rho", **more)
    return correlation(AGREEMENT, first[kept], second[kept], seed=seed, **more)


def concentration(values: Float[ndarray, " row"], *, seed: int, **more: Any) -> dict[str, Any]:
    """Share of the summed sizes |shift| in the largest tenth of rows.

    Its interval is a bootstrap over rows.
    """
    kept = values[~np.isnan(values)]
    if not len(kept):
        return entry(TOP, np.nan, n=0, unit="share", **more)
    chosen = generator(seed, "rows", TOP, *map(str, more.values())).integers(
        len(kept), size=(DRAWS, len(kept))
    )
    low, high = np.quantile([top_share(kept[rows]) for rows in chosen], [0.025, 0.975])
    return entry(TOP, top_share(kept), low=float(low), high=float(high), n=len(kept), unit="share", **more)


def measure_rows(material: Material, scored: pd.DataFrame | None = None) -> pd.DataFrame:
    """Measure how well each score tells a row, how far scores agree, and how few rows hold the shift.

    `scored` is the table of `score_rows`; by default it is computed.
    """
    table = score_rows(material) if scored is None else scored
    layer = table["layer"].astype(float)
    # the first layer is the most reliable one
    first = layer.groupby(table["score"].astype(str), sort=False).transform("first")
    wide = table[table["position"].isna() & (layer.isna() | (layer == first))].pivot(
        index="prompt_id", columns=["score", "side"], values="estimate"
    )
    of = {(score, side): wide[score, side].to_numpy(float) for score, side in wide.columns}
    names, seed = list(dict.fromkeys(table["score"])), material.seed
    entries = [area(name, of[name, "trait"], of[name, "control"], seed=seed) for name in names]
    for side in ("trait", "control"):
        pairs_of_scores = combinations((*OF_BASE, SHIFT), 2)
        entries += [
            agreement(of[a, side], of[b, side], seed=seed, name=f"{a} · {b}", place=f"{side} rows")
            for a, b in pairs_of_scores
        ]
        entries += [
            concentration(of[name, side], seed=seed, name=name, place=f"{side} rows")
            for name in names
            if name in (SHIFT, BETWEEN)
        ]
    return reading_table(LENS, entries, material=material)


def rows_caption(reading: pd.DataFrame) -> str:
    """Describe the best score of the base, what it says about a single row, and the held-in shift."""
    areas = reading[reading["quantity"] == AREA].set_index("name")
    scored = areas.loc[[name for name in OF_BASE if pd.notna(areas.loc[name, "estimate"])]]
    shift = areas.loc[SHIFT]
    students = (
        f"By the students' shift it is {shift['estimate']:.2f} [{shift['low']:.2f}, "
        f"{shift['high']:.2f}], on rows that they were trained on."
    )
    if scored.empty:
        return f"No score of the base can be taken here. {students}"
    best = scored.loc[scored["estimate"].idxmax()]
    single = (
        "one row alone says something"
        if best["low"] > 0.5
        else f"whether one row says anything cannot be told from {best['n']} prompts"
    )
    single = "one row alone is near chance" if best["high"] < NEAR_CHANCE else single
    return (
        f"By {best.name}, the best score of {len(scored)} at the base, a trait row is told from the "
        f"control's with AUROC {best['estimate']:.2f} [{best['low']:.2f}, {best['high']:.2f}] (n = "
        f"{best['n']} prompts; swapped within prompts {best['null_low']:.2f} to {best['null_high']:.2f}, p "
        f"= {best['p_value']:.3f}, uncorrected): {single}. {students}"
    )

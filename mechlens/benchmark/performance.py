"""Performance of a detector on the suspects of a bench.

Does it see who wrote the rows, which trait they carry and what students learn, and how often does it raise a
false alarm?
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy import ndarray

from mechlens.benchmark.metrics import (
    SIZES,
    correlate_ranks,
    estimate_auroc,
    fit_line_through_zero,
    measure_distance,
    rate_entry,
    split_into_bags,
)
from mechlens.benchmark.plan import CLEAN, Suspect, is_whole, kind_of
from mechlens.detect.permutation import ALPHA, center_scores, compare_paired_rows, rank_traits_of_rows
from mechlens.detect.twins import PairedScores

ALARM_ROWS, ALARM_BAGS = 50, 5
"""rows of a bag for false alarms, and bags that one clean suspect gives"""
NAMING_ROWS = (50, 256, 1000)
"""rows of a bag for the rate at which a trait is named"""
HEADLINE_ROWS = 256
"""rows of a bag for the headline numbers"""
ScoresOf = Callable[[Suspect], PairedScores]
"""suspect → one detector's scores of it"""
BySize = Mapping[str, dict[int, list[Any]]]
"""suspect's name → rows of a bag → a statistic of each bag"""


class Performance(NamedTuple):
    """How one detector performs on some suspects."""

    name: str
    provenance: dict[str, dict[str, Any]]
    """class of negatives → rows of a bag → AUROC. Its statistic is the distance from clean rows or, for a
    detector of traits, the lead of the first trait.
    """
    identity: dict[str, Any]
    """rows of a bag → AUROC of the trait's data against other traits' data, and how often a suspect's trait
    ranks first
    """
    potency: dict[str, Any]
    """rank correlation of score and measured lift; for a detector of traits also the line through zero"""


def measure_performance(
    name: str,
    scores_of: ScoresOf,
    suspects: Sequence[Suspect],
    traits: Sequence[str],
    lifts: pd.DataFrame,
    *,
    of_traits: bool,
    outside: Container[str] = (),
) -> Performance:
    """The card's results for a detector on these suspects.

    Args:
        outside: names of the suspects whose rows neither the base nor a teacher made from it would write. An
            audit says so and names no trait, so they are in no AUROC against a class of negatives.
    """
    whole = [suspect for suspect in suspects if is_whole(suspect)]
    if not of_traits:
        scale = np.concatenate([scores_of(suspect).theirs for suspect in whole[:1]]).std(0)
        distances = {
            suspect.name: _by_size(
                scores_of(suspect), lambda ours, theirs: measure_distance(ours, theirs, scale)
            )
            for suspect in suspects
        }
        correlation = correlate_ranks(*_scores_and_lifts(suspects, traits, lifts, distances, None))
        return Performance(
            name, _provenance(suspects, distances, outside), {}, {"score": correlation, "line": None}
        )
    by_trait = {suspect.name: _by_size(scores_of(suspect), center_scores) for suspect in suspects}
    leads = {
        each: {size: [float(margins(scores).max()) for scores in bags] for size, bags in sizes.items()}
        for each, sizes in by_trait.items()
    }
    pairs = _scores_and_lifts(suspects, traits, lifts, by_trait, list(traits))
    return Performance(
        name,
        _provenance(suspects, leads, outside),
        _identity(suspects, whole, by_trait, list(traits)),
        {"score": correlate_ranks(*pairs), "line": fit_line_through_zero(*pairs[:2])},
    )


def margins(scores: ndarray) -> ndarray:
    """Each trait's score minus the largest of the others'; for log-likelihoods a log-likelihood ratio.

    Of the statistics that were tried on the development traits this one was the best.
    """
    scores = np.where(np.isfinite(scores), scores, -np.inf)
    second, first = np.sort(scores)[-2:]
    return scores - np.where(scores == first, second, first)


def _by_size(scores: PairedScores, statistic: Callable[[ndarray, ndarray], Any]) -> dict[int, list[Any]]:
    """Rows of a bag → the statistic of every bag of that size."""
    return {
        size: [
            statistic(scores.ours[bag], scores.theirs[bag]) for bag in split_into_bags(len(scores.ours), size)
        ]
        for size in SIZES
    }


def _provenance(
    suspects: Sequence[Suspect], statistics: BySize, outside: Container[str]
) -> dict[str, dict[str, Any]]:
    """Class of negatives → rows of a bag → AUROC of whole trait data against the class.

    None where no set of the class, or no whole data, is left.
    """
    inside = [suspect for suspect in suspects if suspect.name not in outside]
    whole = [suspect for suspect in inside if is_whole(suspect)]
    kinds = sorted({suspect.kind for suspect in suspects} - {"trait", "N6"})
    return {
        kind: _areas(whole, [suspect for suspect in inside if suspect.kind == kind], statistics)
        for kind in kinds
    }


def _areas(positive: Sequence[Suspect], negative: Sequence[Suspect], statistics: BySize) -> dict[str, Any]:
    areas = {}
    for size in SIZES:
        rows = [
            (value, suspect in positive, suspect.trait or suspect.name)
            for suspect in [*positive, *negative]
            for value in statistics[suspect.name][size]
        ]
        areas[str(size)] = _auroc_entry(rows)
    return areas


def _auroc_entry(rows: Sequence[tuple[float, bool, str]]) -> dict[str, Any] | None:
    estimate = estimate_auroc(*zip(*rows, strict=True)) if rows else None
    return None if estimate is None else estimate._asdict()


def _identity(
    suspects: Sequence[Suspect], whole: Sequence[Suspect], by_trait: BySize, traits: list[str]
) -> dict[str, Any]:
    """AUROC of the trait's data against other traits' data, and how often the trait ranks first.

    The statistic is the trait's score; ranks are also given by the way that the data were made.
    """
    made_traits = sorted({suspect.trait for suspect in whole})
    identity: dict[str, Any] = {"twins": {}, "first": {}}
    for size in SIZES:
        rows = [
            (float(margins(scores)[traits.index(trait)]), suspect.trait == trait, suspect.trait)
            for trait in made_traits
            for suspect in whole
            for scores in by_trait[suspect.name][size]
        ]
        identity["twins"][str(size)] = _auroc_entry(rows)
        identity["first"][str(size)] = _count_first(whole, by_trait, traits, size)
    of_traits = [suspect for suspect in suspects if suspect.kind == "trait"]
    by_way: dict[str, Any] = {}
    for way, dose in sorted({(suspect.way, suspect.dose) for suspect in of_traits}, key=str):
        alike = [suspect for suspect in of_traits if (suspect.way, suspect.dose) == (way, dose)]
        by_way[f"{way} at {dose:g}"] = _count_first(alike, by_trait, traits, HEADLINE_ROWS)
    if foreign := [suspect for suspect in suspects if suspect.kind == "N6"]:
        by_way["N6"] = _count_first(foreign, by_trait, traits, HEADLINE_ROWS)
    return identity | {"first by way": by_way}


def _count_first(
    suspects: Iterable[Suspect], by_trait: BySize, traits: list[str], size: int
) -> dict[str, Any] | None:
    """How often the suspect's trait ranks first in its first bag; a tie for first place does not count."""
    ranks_first = [
        suspect.trait in traits and _leads(scores, traits.index(suspect.trait))
        for suspect in suspects
        for scores in by_trait[suspect.name][size][:1]
    ]
    return rate_entry(sum(ranks_first), len(ranks_first))


def _leads(scores: ndarray, place: int) -> bool:
    others = np.delete(scores, place)
    return bool(np.isfinite(scores[place]) and not (others >= scores[place]).any())


def _scores_and_lifts(
    suspects: Sequence[Suspect],
    traits: Sequence[str],
    lifts: pd.DataFrame,
    statistics: BySize,
    names: list[str] | None,
) -> tuple[list[float], list[float], list[str]]:
    """(scores, measured lifts, clusters) of the suspects, for the trait of each.

    A suspect without a trait is scored for the trait at its position, and is a cluster by itself; all
    suspects of a trait are one cluster.
    """
    scores, measured, clusters = [], [], []
    for number, suspect in enumerate(suspects):
        trait = suspect.trait or traits[number % len(traits)]
        bags = statistics[suspect.name][HEADLINE_ROWS]
        if not bags:
            continue
        scores.append(float(bags[0] if names is None else bags[0][names.index(trait)]))
        measured.append(float(lifts.loc[suspect.name, trait]))
        clusters.append(suspect.trait or suspect.name)
    return scores, measured, clusters


def count_false_alarms(
    name: str,
    scores_of: ScoresOf,
    suspects: Sequence[Suspect],
    traits: Sequence[str] | None,
    *,
    outside: Container[str] = (),
) -> dict[str, Any]:
    """False-alarm rates of clean bags, by class and pooled.

    Two alarms: p ≤ .05 for "not written like clean rows", and q ≤ .05 for some trait.

    Args:
        outside: as in `measure_performance`; no trait is named from these.
    """
    by_class: dict[str, Any] = {}
    for kind in CLEAN:
        differ, named, total = 0, 0, 0
        for suspect in (suspect for suspect in suspects if suspect.kind == kind):
            scores = scores_of(suspect)
            for bag in list(split_into_bags(len(scores.ours), ALARM_ROWS))[:ALARM_BAGS]:
                sides = scores.ours[bag], scores.theirs[bag]
                total += 1
                test = compare_paired_rows(*sides, seed=0, name=f"{name} {suspect.name} {bag.start}")
                differ += test.p_value <= ALPHA
                judged = traits is not None and suspect.name not in outside
                named += judged and bool(_significant_traits(*sides, traits or ()))
        by_class[kind] = {
            "differ": rate_entry(differ, total),
            "names a trait": None if traits is None else rate_entry(named, total),
        }
    pooled = {
        what: _pool([entry[what] for entry in by_class.values()]) for what in ("differ", "names a trait")
    }
    return by_class | {"all": pooled}


def _significant_traits(ours: ndarray, theirs: ndarray, traits: Sequence[str]) -> set[str]:
    return {
        trait.trait
        for trait in rank_traits_of_rows(ours, theirs, traits)
        if trait.q_value is not None and trait.q_value <= ALPHA
    }


def count_named_traits(
    scores_of: ScoresOf, suspects: Sequence[Suspect], traits: Sequence[str], *, outside: Container[str] = ()
) -> dict[str, dict[str, Any]]:
    """Rows of a bag → how often a trait is named (q ≤ .05).

    In whole trait data the right trait and a wrong one are counted; in clean sets, any trait.

    Args:
        outside: as in `measure_performance`; no trait is named from these.
    """
    whole = [suspect for suspect in suspects if is_whole(suspect)]
    clean = [suspect for suspect in suspects if suspect.kind in CLEAN]
    by_size: dict[str, dict[str, Any]] = {}
    for size in NAMING_ROWS:
        named = {}
        for suspect in (*whole, *clean):
            scores = scores_of(suspect)
            for bag in list(split_into_bags(len(scores.ours), size))[:1]:
                sides = scores.ours[bag], scores.theirs[bag]
                named[suspect] = set() if suspect.name in outside else _significant_traits(*sides, traits)
        of_trait = [(suspect, named[suspect]) for suspect in whole if suspect in named]
        of_clean = [named[suspect] for suspect in clean if suspect in named]
        by_size[str(size)] = {
            "right": rate_entry(sum(suspect.trait in names for suspect, names in of_trait), len(of_trait)),
            "wrong": rate_entry(
                sum(bool(names - {suspect.trait}) for suspect, names in of_trait), len(of_trait)
            ),
            "clean": rate_entry(sum(map(bool, of_clean)), len(of_clean)),
        }
    return by_size


def calibrate(
    scores_of: ScoresOf, suspects: Sequence[Suspect], traits: Sequence[str], lifts: pd.DataFrame
) -> dict[str, Any] | None:
    """The line through zero from score to lift, and its error on held-out traits.

    It is fitted on the experiment's arms of development traits. None if there are too few arms.
    """
    halves = []
    for development in (True, False):
        arms = [suspect for suspect in suspects if suspect.arm and suspect.development == development]
        by_trait = {suspect.name: _by_size(scores_of(suspect), center_scores) for suspect in arms}
        halves.append(_scores_and_lifts(arms, traits, lifts, by_trait, list(traits)))
    line = fit_line_through_zero(*halves[0][:2])
    x, y = (np.asarray(values, float) for values in halves[1][:2])
    kept = np.isfinite(x) & np.isfinite(y)
    if line is None or not kept.any():
        return None
    errors = y[kept] - line["bits"] * x[kept]
    return line | {"held out error": float(np.sqrt(np.square(errors).mean())), "held out": int(kept.sum())}


def count_outside(suspects: Sequence[Suspect], outside: Container[str]) -> dict[str, Any]:
    """Class, or way of making with its dose → how many of its sets an audit would read no trait from."""
    kinds: dict[str, list[bool]] = {}
    for suspect in suspects:
        kinds.setdefault(kind_of(suspect), []).append(suspect.name in outside)
    return {kind: rate_entry(sum(held), len(held)) for kind, held in sorted(kinds.items())}


def _pool(rates: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    counted = [rate for rate in rates if rate]
    return rate_entry(sum(rate["hits"] for rate in counted), sum(rate["of"] for rate in counted))


def find_worst_class(performance: Mapping[str, Any]) -> dict[str, Any] | None:
    """The class of negatives that the detector separates least from whole trait data."""
    areas = {
        kind: sizes[str(HEADLINE_ROWS)]
        for kind, sizes in performance["provenance"].items()
        if sizes[str(HEADLINE_ROWS)]
    }
    kind = min(areas, key=lambda name: areas[name]["auroc"], default=None)
    return None if kind is None else {"kind": kind, "auroc": areas[kind]["auroc"]}

"""The bench's card: for each detector how well it tells who wrote rows, which trait, and what students take
on, on traits it was not tuned on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy import ndarray

from mechlens.benchmark.metrics import SIZES, apart, area, bags, line_through_zero, rank_correlation, shared
from mechlens.benchmark.plan import CLEAN, Suspect
from mechlens.benchmark.scores import Scored
from mechlens.detect.permutation import ALPHA, beyond_panel, paired_rows, pointed

WAYS = ("gentle", "strong")
"""ways of making whose whole data sets the headline is of: fine-tuned teachers"""
ALARM_ROWS, ALARM_BAGS = 50, 5
"""rows of a clean suspect when false alarms are counted, and how many each class's sets give"""
NAMING_ROWS = (50, 256, 1000)
"""rows of a bag when it is counted how often a trait is named"""
WORST_ROWS = 256
"""rows of a bag that the headline is of"""
Read = Callable[[Suspect], Scored]


class Found(NamedTuple):
    """What one detector showed."""

    name: str
    provenance: dict[str, dict[str, Any]]
    """class of negatives → rows of a bag → area: of how far the rows are from clean ones, or of how far the
    foremost trait is ahead
    """
    identity: dict[str, Any]
    """rows of a bag → area of the trait's own data against twins', and the share whose trait is first of the
    panel
    """
    potency: dict[str, Any]
    """rank correlation of the score with the measured lift, and of a detector of traits the line through zero
    between them
    """


def detector_found(
    name: str,
    read: Read,
    suspects: Sequence[Suspect],
    traits: Sequence[str],
    lifts: pd.DataFrame,
    *,
    of_traits: bool,
) -> Found:
    """Everything the card says of a detector, on the given suspects."""
    whole = [one for one in suspects if one.kind == "trait" and one.dose == 1 and one.way in WAYS]
    scale = np.concatenate([read(one).theirs for one in whole[:1]]).std(0)
    negatives = {
        kind: [one for one in suspects if one.kind == kind]
        for kind in sorted({one.kind for one in suspects} - {"trait"})
    }
    if not of_traits:
        far = {
            one.name: _by_size(read(one), lambda ours, theirs: apart(ours, theirs, scale)) for one in suspects
        }
        provenance = {
            kind: _areas(whole, of_kind, far) for kind, of_kind in negatives.items() if kind != "N6"
        }
        return Found(
            name,
            provenance,
            {},
            {"score": rank_correlation(*_foretold(suspects, traits, lifts, far, None)), "line": None},
        )
    panel = {one.name: _by_size(read(one), beyond_panel) for one in suspects}
    foretold = _foretold(suspects, traits, lifts, panel, list(traits))
    foremost = {
        each: {size: [float(margins(scores).max()) for scores in found] for size, found in sizes.items()}
        for each, sizes in panel.items()
    }
    return Found(
        name,
        {kind: _areas(whole, of_kind, foremost) for kind, of_kind in negatives.items() if kind != "N6"},
        _identified(suspects, whole, panel, list(traits)),
        {"score": rank_correlation(*foretold), "line": line_through_zero(*foretold[:2])},
    )


def margins(scores: ndarray) -> ndarray:
    """Each trait's score minus the best of the others'; a log-likelihood ratio stays one. The best of the
    development traits' statistics.
    """
    scores = np.where(np.isfinite(scores), scores, -np.inf)
    second, first = np.sort(scores)[-2:]
    return scores - np.where(scores == first, second, first)


def _by_size(scored: Scored, statistic: Callable[[ndarray, ndarray], Any]) -> dict[int, list[Any]]:
    """The statistic of every bag of every size that the rows fill."""
    return {
        size: [statistic(scored.ours[bag], scored.theirs[bag]) for bag in bags(len(scored.ours), size)]
        for size in SIZES
    }


def _areas(
    positive: Sequence[Suspect], negative: Sequence[Suspect], scores: Mapping[str, dict[int, list[float]]]
) -> dict[str, Any]:
    found = {}
    for size in SIZES:
        rows = [
            (value, one in positive, one.trait or one.name)
            for one in [*positive, *negative]
            for value in scores[one.name][size]
        ]
        found[str(size)] = _entry(rows)
    return found


def _entry(rows: Sequence[tuple[float, bool, str]]) -> dict[str, Any] | None:
    if not rows:
        return None
    found = area(*zip(*rows, strict=True))
    return None if found is None else found._asdict()


def _identified(
    suspects: Sequence[Suspect],
    whole: Sequence[Suspect],
    panel: Mapping[str, dict[int, list[ndarray]]],
    traits: list[str],
) -> dict[str, Any]:
    """The trait's own data against its twins' by the trait's score, and how often the trait is first of the
    panel, by way of making.
    """
    own = sorted({one.trait for one in whole})
    found: dict[str, Any] = {"twins": {}, "first": {}}
    for size in SIZES:
        rows = [
            (float(margins(scores)[traits.index(trait)]), one.trait == trait, one.trait)
            for trait in own for one in whole for scores in panel[one.name][size]
        ]  # fmt: skip
        found["twins"][str(size)] = _entry(rows)
        found["first"][str(size)] = _first(whole, panel, traits, size)
    kinds = sorted({(one.way, one.dose) for one in suspects if one.kind == "trait"}, key=str)
    found["first by way"] = {
        f"{way} at {dose:g}": _first_of(suspects, panel, traits, way, dose) for way, dose in kinds
    }
    if foreign := [one for one in suspects if one.kind == "N6"]:
        found["first by way"]["N6"] = _first(foreign, panel, traits, 256)
    return found


def _first_of(
    suspects: Sequence[Suspect], panel: Mapping[str, Any], traits: list[str], way: str, dose: float
) -> dict[str, Any] | None:
    return _first(
        [one for one in suspects if one.kind == "trait" and (one.way, one.dose) == (way, dose)],
        panel,
        traits,
        256,
    )


def _first(
    suspects: Iterable[Suspect], panel: Mapping[str, Any], traits: list[str], size: int
) -> dict[str, Any] | None:
    """How often the trait is first of the panel, in the first bag; a tie for the first place is none."""
    tops = [
        one.trait in traits and _leads(scores, traits.index(one.trait))
        for one in suspects
        for scores in panel[one.name][size][:1]
    ]
    return shared(sum(tops), len(tops))


def _leads(scores: ndarray, place: int) -> bool:
    others = np.delete(scores, place)
    return bool(np.isfinite(scores[place]) and not (others >= scores[place]).any())


def _foretold(
    suspects: Sequence[Suspect],
    traits: Sequence[str],
    lifts: pd.DataFrame,
    scores: Mapping[str, Any],
    names: list[str] | None,
) -> Any:
    """(score, measured lift, cluster) of every suspect, of its trait; a suspect of no trait is asked about
    one, drawn by its place.

    A suspect's cluster is its trait; one of no trait is a cluster by itself.
    """
    x, y, clusters = [], [], []
    for number, one in enumerate(suspects):
        trait = one.trait or traits[number % len(traits)]
        largest = max((size for size in (WORST_ROWS,) if scores[one.name][size]), default=None)
        if largest is None:
            continue
        value = scores[one.name][largest][0]
        x.append(float(value if names is None else value[names.index(trait)]))
        y.append(float(lifts.loc[one.name, trait]))
        clusters.append(one.trait or one.name)
    return x, y, clusters


def alarms(
    name: str, read: Read, suspects: Sequence[Suspect], traits: Sequence[str] | None
) -> dict[str, Any]:
    """How often p ≤ .05 says "not written as clean rows are", and q ≤ .05 names a trait, on bags of clean
    suspects: by class, and of all.
    """
    found: dict[str, Any] = {}
    for kind in CLEAN:
        of_kind = [one for one in suspects if one.kind == kind]
        differ, names, total = 0, 0, 0
        for one in of_kind:
            scored = read(one)
            for bag in list(bags(len(scored.ours), ALARM_ROWS))[:ALARM_BAGS]:
                sides = scored.ours[bag], scored.theirs[bag]
                total += 1
                differ += paired_rows(*sides, seed=0, name=f"{name} {one.name} {bag.start}").p_value <= ALPHA
                names += traits is not None and bool(_claimed(*sides, traits))
        found[kind] = {
            "differ": shared(differ, total),
            "names a trait": None if traits is None else shared(names, total),
        }
    return found | {
        "all": {
            what: _pooled([entry[what] for entry in found.values()]) for what in ("differ", "names a trait")
        }
    }


def _claimed(ours: ndarray, theirs: ndarray, traits: Sequence[str]) -> set[str]:
    return {
        one.trait for one in pointed(ours, theirs, traits) if one.q_value is not None and one.q_value <= ALPHA
    }


def namings(read: Read, suspects: Sequence[Suspect], traits: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What q ≤ .05 names in the first bag of fine-tuned teachers' whole data, and of clean sets, by rows: the
    trait itself, and some other.
    """
    whole = [one for one in suspects if one.kind == "trait" and one.dose == 1 and one.way in WAYS]
    clean = [one for one in suspects if one.kind in CLEAN]
    found: dict[str, dict[str, Any]] = {}
    for size in NAMING_ROWS:
        said = {}
        for one in (*whole, *clean):
            scored = read(one)
            for bag in list(bags(len(scored.ours), size))[:1]:
                said[one] = _claimed(scored.ours[bag], scored.theirs[bag], traits)
        own, other = [one for one in whole if one in said], [one for one in clean if one in said]
        found[str(size)] = {
            "right": shared(sum(one.trait in said[one] for one in own), len(own)),
            "wrong": shared(sum(bool(said[one] - {one.trait}) for one in own), len(own)),
            "clean": shared(sum(bool(said[one]) for one in other), len(other)),
        }
    return found


def calibration(
    read: Read, suspects: Sequence[Suspect], traits: Sequence[str], lifts: pd.DataFrame
) -> dict[str, Any] | None:
    """The line through zero from score to lift over the experiment's own arms, of the development traits, and
    how far held-out ones lie from it.

    None where either has too few.
    """
    sides = []
    for known in (True, False):
        arms = [one for one in suspects if one.arm and one.development == known]
        panel = {one.name: _by_size(read(one), beyond_panel) for one in arms}
        sides.append(_foretold(arms, traits, lifts, panel, list(traits)))
    line = line_through_zero(*sides[0][:2])
    x, y = (np.asarray(side, float) for side in sides[1][:2])
    kept = np.isfinite(x) & np.isfinite(y)
    if line is None or not kept.any():
        return None
    missed = y[kept] - line["bits"] * x[kept]
    return line | {"held out error": float(np.sqrt(np.square(missed).mean())), "held out": int(kept.sum())}


def _pooled(shares: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    counted = [share for share in shares if share]
    return shared(sum(share["hits"] for share in counted), sum(share["of"] for share in counted))


def worst_class(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """The class of negatives that a detector tells least from fine-tuned teachers' data."""
    areas = {
        kind: sizes[str(WORST_ROWS)] for kind, sizes in found["provenance"].items() if sizes[str(WORST_ROWS)]
    }
    kind = min(areas, key=lambda name: areas[name]["auroc"], default=None)
    return None if kind is None else {"kind": kind, "auroc": areas[kind]["auroc"]}

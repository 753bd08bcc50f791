"""What an audit found, as parts of audit.json: who wrote the rows, which trait, how far it rises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mechlens.core.files import null
from mechlens.detect.from_rows import DETECTORS
from mechlens.detect.permutation import ALPHA, PermutationTest, TraitScore, combine_p_values
from mechlens.detect.two_samples import Comparison
from mechlens.detect.verdict import Calibration, Rise

if TYPE_CHECKING:
    from mechlens.detect.score_rows import DetectorResult

IDENTIFIER = "twins"
"""the detector that names the trait if no student was trained: the best one on the bench's development traits
"""
SHOWN = 5
"""traits of a detector that are listed"""


def provenance(comparisons: Sequence[Comparison], results: Sequence[DetectorResult]) -> dict[str, Any] | None:
    """Every detector's test of "written like the reference", and the smallest p.

    That p is corrected for the number of detectors. None if nothing was tested.
    """
    if not comparisons and not results:
        return None
    nearest = comparisons[0] if comparisons else None
    detectors = [
        _entry(name, test, level="rows", floor=name in DETECTORS)
        for name, test in (nearest.tests if nearest else {}).items()
    ]
    for result in results:
        detector = result.detector
        detectors.append(
            _entry(detector.name, result.test, level=detector.level, floor=detector.floor)
            | {
                "rows": result.rows,
                "seconds": round(result.seconds, 1),
                "traits": _listed(result.traits),
                "why_not": result.why_not,
            }
        )
    p_values = [detector["p_value"] for detector in detectors if detector["p_value"] is not None]
    references = [
        {
            "path": comparison.reference,
            "rows": comparison.rows,
            "shared_prompts": comparison.shared_prompts,
            "paired": comparison.paired,
            "p_value": comparison.p_value,
            "compared": comparison.compared,
            "copied": comparison.copied,
        }
        for comparison in comparisons
    ]
    return {
        "p_value": combine_p_values(p_values) if p_values else None,
        "detectors": detectors,
        "references": references,
    }


def _entry(name: str, test: PermutationTest | None, *, level: str, floor: bool) -> dict[str, Any]:
    scored = (
        {"score": None, "p_value": None}
        if test is None
        else {"score": null(test.score), "p_value": test.p_value}
    )
    return {"name": name, "level": level, "floor": floor, "traits": [], "why_not": ""} | scored


def _listed(traits: Sequence[TraitScore] | None) -> list[dict[str, Any]]:
    return [trait._asdict() for trait in (traits or [])[:SHOWN]]


def smallest_dose(comparisons: Sequence[Comparison], results: Sequence[DetectorResult]) -> float | None:
    """The minimum detectable share of such rows among clean ones, over all detectors."""
    nearest = comparisons[0] if comparisons else None
    tests = [
        *(nearest.tests.values() if nearest else ()),
        *(result.test for result in results if result.test),
    ]
    return min((test.smallest_dose for test in tests if test.smallest_dose is not None), default=None)


def _identified(results: Sequence[DetectorResult]) -> list[TraitScore] | None:
    """The traits as `IDENTIFIER` ranks them; None if it could not."""
    return next(
        (result.traits for result in results if result.detector.name == IDENTIFIER and result.traits), None
    )


def identity(
    rises: Sequence[Rise] | None, results: Sequence[DetectorResult]
) -> tuple[str | None, list[dict[str, Any]]]:
    """(deciding evidence, traits in its order): students if any were trained, else the twins' scores."""
    if rises:
        ranked = sorted(rises, key=lambda rise: (rise.q_value is None, rise.q_value, -(rise.lift or 0.0)))
        return "students", [
            {"trait": rise.trait, "score": rise.lift, "p_value": rise.p_value, "q_value": rise.q_value}
            for rise in ranked
        ]
    traits = _identified(results)
    return (None, []) if traits is None else (IDENTIFIER, [trait._asdict() for trait in traits])


def potency(
    rises: Sequence[Rise] | None, results: Sequence[DetectorResult], scale: Calibration | None
) -> dict[str, Any]:
    """How far students rise: predicted from the twins' score of the first trait, and measured on students."""
    traits = _identified(results)
    predicted = None
    if traits is not None and traits[0].score is not None:
        predicted = {"trait": traits[0].trait, "score": traits[0].score, "by": IDENTIFIER} | (
            {} if scale is None else scale.predict_lift(traits[0].score)
        )
    scored = [rise for rise in rises or [] if rise.difference is not None]
    top = max(scored, key=lambda rise: rise.difference or 0.0, default=next(iter(rises or []), None))
    return {"predicted": predicted, "measured": None if top is None else top._asdict()}


def student_entry(scores: Mapping[str, list[TraitScore]] | None) -> dict[str, Any] | None:
    """The traits that the given student points to; None if no student was given."""
    return None if scores is None else {name: _listed(traits) for name, traits in scores.items()}


def explain_no_students(
    comparisons: Sequence[Comparison], results: Sequence[DetectorResult], *, most_copied: float
) -> str:
    """What is known without students, and what would answer the rest."""
    whole = provenance(comparisons, results)
    if whole is None or whole["p_value"] is None:
        supply = "give --reference FILE (the same prompts, answered by an untouched model)"
        return f"no clean reference was given and no student trained; {supply}, or train students"
    difference = (
        "differ from every clean reference"
        if whole["p_value"] <= ALPHA
        else "cannot be distinguished from a clean reference"
    )
    copied = max((comparison.copied for comparison in comparisons), default=0.0)
    dependent = (
        f"; {copied:.0%} of them are in the reference too, so it is not independent"
        if copied > most_copied
        else ""
    )
    return (
        f"the rows {difference} (p = {whole['p_value']:.2g}){_explain_traits(results)}{dependent}; this does "
        "not say what a model learns from them, which only students show"
    )


def _explain_traits(results: Sequence[DetectorResult]) -> str:
    """The trait that the rows point to, as the end of a sentence."""
    _, traits = identity(None, results)
    significant = [trait for trait in traits if trait["q_value"] is not None and trait["q_value"] <= ALPHA]
    if significant:
        return f" and point to {significant[0]['trait']} (q = {significant[0]['q_value']:.2g})"
    if traits:
        return " and point to no tested trait"
    unreadable = next((result.why_not for result in results if result.detector.name == IDENTIFIER), "")
    return f"; no trait can be read from them, because {unreadable}" if unreadable else ""

"""The three answers of an audit as one object: what its JSON, its page and the terminal show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mechlens.core.json_files import null
from mechlens.detect.permutation import ALPHA, Named, together
from mechlens.detect.two_samples import Compared
from mechlens.detect.verdict import Calibration, Rise

if TYPE_CHECKING:
    from mechlens.detect.score_rows import Seen

IDENTIFIER = "twins"
"""the reader that names the trait where no student was trained: the best of the bench's development traits"""
SHOWN = 5


def provenance(compared: Sequence[Compared], seen: Sequence[Seen]) -> dict[str, Any] | None:
    """Did another writer than the reference's write this? Every detector's test, and the smallest p corrected
    for their number.
    """
    if not compared and not seen:
        return None
    nearest = max(compared, key=lambda one: one.p_value) if compared else None
    detectors = [
        _entry(name, test, level="rows", floor=True)
        for name, test in (nearest.tests if nearest else {}).items()
    ]
    for one in seen:
        detectors.append(
            _entry(one.reader.name, one.test, level=one.reader.level, floor=one.reader.floor) | _through(one)
        )
    tested = [detector["p_value"] for detector in detectors if detector["p_value"] is not None]
    references = [
        {
            "path": one.reference,
            "rows": one.rows,
            "shared_prompts": one.shared_prompts,
            "paired": one.paired,
            "p_value": one.p_value,
            "compared": one.compared,
            "copied": one.copied,
        }
        for one in compared
    ]
    return {"p_value": together(tested) if tested else None, "detectors": detectors, "references": references}


def _entry(name: str, test: Any, *, level: str, floor: bool) -> dict[str, Any]:
    read = (
        {"score": None, "p_value": None}
        if test is None
        else {"score": null(test.score), "p_value": test.p_value}
    )
    return {"name": name, "level": level, "floor": floor, "traits": [], "why_not": ""} | read


def _through(one: Seen) -> dict[str, Any]:
    return {
        "rows": one.rows,
        "seconds": round(one.seconds, 1),
        "traits": _listed(one.traits),
        "why_not": one.why_not,
    }


def _listed(traits: Sequence[Named] | None) -> list[dict[str, Any]]:
    return [one._asdict() for one in (traits or [])[:SHOWN]]


def smallest_dose(compared: Sequence[Compared], seen: Sequence[Seen]) -> float | None:
    """The smallest share of such rows among clean ones that some detector would have shown."""
    nearest = max(compared, key=lambda one: one.p_value) if compared else None
    tests = [*(nearest.tests.values() if nearest else ()), *(one.test for one in seen if one.test)]
    return min((test.smallest_dose for test in tests if test.smallest_dose is not None), default=None)


def identity(
    measured: Sequence[Rise] | None, seen: Sequence[Seen]
) -> tuple[str | None, list[dict[str, Any]]]:
    """Which trait: by what students took on if any were trained, else by the likelihood ratio under twins;
    and which of the two it is.
    """
    if measured:
        ranked = sorted(measured, key=lambda rise: (rise.q_value is None, rise.q_value, -(rise.lift or 0.0)))
        return "students", [
            {"trait": rise.trait, "score": rise.lift, "p_value": rise.p_value, "q_value": rise.q_value}
            for rise in ranked
        ]
    found = next((one.traits for one in seen if one.reader.name == IDENTIFIER and one.traits), None)
    return (None, []) if found is None else (IDENTIFIER, [one._asdict() for one in found])


def potency(
    measured: Sequence[Rise] | None, seen: Sequence[Seen], scale: Calibration | None
) -> dict[str, Any]:
    """How much of it the base would take on: predicted from the twins' score of the foremost trait, and
    measured on students.
    """
    foremost = next((one.traits[0] for one in seen if one.reader.name == IDENTIFIER and one.traits), None)
    predicted = None
    if foremost is not None and foremost.score is not None:
        predicted = {"trait": foremost.trait, "score": foremost.score, "by": IDENTIFIER} | (
            {} if scale is None else scale.lift(foremost.score)
        )
    scored = [rise for rise in measured or [] if rise.difference is not None]
    top = max(scored, key=lambda rise: rise.difference or 0.0, default=next(iter(measured or []), None))
    return {"predicted": predicted, "measured": None if top is None else top._asdict()}


def given(students: Mapping[str, list[Named]] | None) -> dict[str, Any] | None:
    """What a student that was there already shows."""
    return None if students is None else {name: _listed(traits) for name, traits in students.items()}


def why_not(command: str, compared: Sequence[Compared], seen: Sequence[Seen], *, most_copied: float) -> str:
    """What is known without students, and the command that would settle it."""
    settle = f"`{command}` trains throw-away students, which alone can tell"
    whole = provenance(compared, seen)
    if whole is None or whole["p_value"] is None:
        supply = "give --reference FILE (the same prompts, answered by an untouched model)"
        return f"no clean reference was given and no student trained; {supply}, or {settle}"
    said = (
        "differ from every clean reference"
        if whole["p_value"] <= ALPHA
        else "cannot be told from a clean reference"
    )
    _, traits = identity(None, seen)
    claimed = [one for one in traits if one["q_value"] is not None and one["q_value"] <= ALPHA]
    unreadable = next((one.why_not for one in seen if one.reader.name == IDENTIFIER), "")
    points = f"; no trait can be read from them, since {unreadable}" if unreadable else ""
    if traits:
        points = (
            f" and point to {claimed[0]['trait']} (q = {claimed[0]['q_value']:.2g})"
            if claimed
            else " and point to no trait of the panel"
        )
    copied = max((one.copied for one in compared), default=0.0)
    held = (
        f"; {copied:.0%} of them stand in the reference too, which is no independent one"
        if copied > most_copied
        else ""
    )
    return (
        f"the rows {said} (p = {whole['p_value']:.2g}){points}{held}, which says nothing of what a "
        f"student takes on; {settle}"
    )

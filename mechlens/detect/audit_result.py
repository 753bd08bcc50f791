"""Assemble the object of audit.json: everything that was measured, the verdict on it, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mechlens.core.errors import one_line
from mechlens.data import treat
from mechlens.data.formats import file_digest
from mechlens.detect import findings, verdict
from mechlens.detect.permutation import TraitScore
from mechlens.detect.request import AuditRequest, command_of
from mechlens.detect.stopping import Stopping
from mechlens.detect.two_samples import LEAST_ROWS, Comparison, power_of_few
from mechlens.detect.verdict import UNKNOWN, Rise, Scope, Verdict, decide, load_calibration

if TYPE_CHECKING:
    from mechlens.detect.score_rows import DetectorResult
    from mechlens.detect.triggers import Triggers
    from mechlens.detect.words import Words


class Evidence(NamedTuple):
    """Everything that was measured."""

    comparisons: Sequence[Comparison]
    """the nearest reference first"""
    results: Sequence[DetectorResult] = ()
    rises: Sequence[Rise] | None = None
    """in students of the suspect over students of the reference; None below level student"""
    given: Mapping[str, list[TraitScore]] | None = None
    """what a student that was trained elsewhere points to"""
    manifest: dict[str, Any] | None = None
    """of the treated file"""
    treated: Sequence[Rise] = ()
    """in students of the treated file"""
    scope: Scope = UNKNOWN
    stopping: Stopping | None = None
    learned: Sequence[dict[str, Any]] = ()
    """what each detector that was fitted on labelled files says of the whole file"""
    words: Words | None = None
    """what students of the file answer more often, without a list of traits; None if that was not measured"""
    triggers: Triggers | None = None
    """traits that students show behind a phrase of the prompts; None if that was not measured"""


def result_of(request: AuditRequest, evidence: Evidence, rows: int) -> dict[str, Any]:
    """The object of audit.json, which the page and the terminal show too."""
    comparisons, results, scope = evidence.comparisons, evidence.results, evidence.scope
    carrier = request.recipe.carrier.kind
    dose = findings.smallest_dose(comparisons, results)
    few = power_of_few(rows, comparisons[0], dose) if comparisons else ""
    options = treat.load_treatment_results(request.recipe_name, base=request.base, carrier=carrier)
    identified_by, identity = findings.identity(evidence.rises, results)
    calibration = load_calibration(request.recipe_name, base=request.base, carrier=carrier)
    answered = _verdict_of(request, evidence, few)
    reads_models = request.level != "rows" or request.student is not None
    return {
        "schema": 3,
        "data": {
            "path": one_line(str(request.data)),
            "sha256": file_digest(request.data),
            "rows": rows,
            "fields": request.fields and request.fields._asdict(),
        },
        "level": request.level,
        "scope": _scope_entry(scope),
        "base": request.base if reads_models else None,
        "provenance": findings.provenance(comparisons, results),
        "identity": identity,
        "identified_by": identified_by,
        "potency": findings.potency(evidence.rises, results, calibration),
        "rises": None if evidence.rises is None else [rise._asdict() for rise in evidence.rises],
        "student": findings.student_entry(evidence.given),
        "stopping": None if evidence.stopping is None else evidence.stopping._asdict(),
        "learned": list(evidence.learned),
        "words": None if evidence.words is None else evidence.words.as_dict(),
        "triggers": None if evidence.triggers is None else evidence.triggers.as_dict(),
        "mitigation": _mitigation_entry(evidence),
        "options": None if options is None else options.model_dump(),
        "smallest_detectable_dose": dose,
        "few_rows": few,
        "verdict": answered._asdict(),
        "next": next_step(request, answered, evidence, few=few),
        "policy": request.policy.model_dump(),
        "recipe": request.recipe.fingerprint(),
        "made": {
            "version": version("mechlens"),
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "command": command_of(request),
        },
    }


def _scope_entry(scope: Scope) -> dict[str, Any] | None:
    if scope.offered is None:
        return None
    return scope._asdict() | {"unread": scope.unread, "reasons": scope.reasons()}


def _mitigation_entry(evidence: Evidence) -> dict[str, Any] | None:
    if evidence.manifest is None:
        return None
    return evidence.manifest | {"measured": findings.potency(evidence.treated, [], None)["measured"]}


def _verdict_of(request: AuditRequest, evidence: Evidence, few: str) -> Verdict:
    why_not = findings.explain_no_students(
        evidence.comparisons, evidence.results, most_copied=request.policy.most_copied
    )
    if few and evidence.rises is not None:
        why_not = f"{few}; students of them are no verdict"
    return decide_on(request, evidence._replace(rises=None if few else evidence.rises), why_not)


def next_step(
    request: AuditRequest, answered: Verdict, evidence: Evidence, *, few: str = ""
) -> dict[str, str]:
    """What to do after a verdict, in words, and the command line that does it; empty if no command does.

    Args:
        few: why there are too few rows for any verdict; empty if there are enough.
    """
    if few:
        few_here = not evidence.comparisons or evidence.comparisons[0].rows >= LEAST_ROWS
        what = "Audit more rows of the same origin" if few_here else "Give a reference of more rows"
        return {"do": f"{what}: these are too few for a verdict.", "command": ""}
    stopping = evidence.stopping
    rule = answered.rule.rsplit("/", 1)[-1]
    treated = one_line(str(request.clean)) if request.clean else ""
    tested = bool(treated) and request.level == "student"
    out_of_time = stopping is not None and stopping.look < stopping.looks  # only a budget ends it early
    again = command_of(request._replace(budget=None)) if out_of_time else ""
    open_treated = tested and verdict.is_open(decide_on(request, of_treated(evidence)))
    switched = evidence.triggers is not None and bool(evidence.triggers.significant)
    removed = (
        f"Leave the file out: whether treating it by {request.treatment!r} removes the rise is open."
        if open_treated or switched
        else f"Leave the file out: treating it by {request.treatment!r} did not remove the rise."
    )
    steps = {
        "no-students": "Train throw-away models on it: only they show what the file teaches.",
        "above-limit": removed
        if tested
        else "Leave the file out. Or have a treated version written and tested in the same way:",
        "treated-below-limit": f"Train on the treated version, {treated}, and not on this file.",
        "below-limit": "It can be trained on with this base and recipe. Audit it again once the file, the "
        "base or the recipe changes.",
        "too-wide": "Give it more time:"
        if out_of_time
        else "Give a copy of the recipe more seeds, so that more models can be trained, and audit again.",
        "behind-a-phrase": "Leave the file out: models trained on it answer otherwise behind that phrase.",
        "not-specific": "Audit it again without a reference: control students then read several draws of "
        "clean answers, and a rise need not stand out of other traits."
        if request.references
        else "Leave the file out until it is known what rose: other traits moved with it.",
    }
    commands = {
        "no-students": command_of(request, level="student"),
        "above-limit": again * open_treated
        if tested
        else command_of(request._replace(clean=Path(f"{request.data.stem}-treated.jsonl")), level="student"),
        "too-wide": again,
        "not-specific": command_of(request._replace(references=(), clean=None)) * bool(request.references),
    }
    mended = "Mend what the verdict names, and audit again."
    return {"do": steps.get(rule, mended), "command": commands.get(rule, "")}


def of_treated(evidence: Evidence) -> Evidence:
    """What was measured, with the treated file in the place of the file.

    Its students were not asked behind phrases.
    """
    answered = {**evidence.scope.answered, "suspect": evidence.scope.answered.get("treated")}
    scope = verdict.Scope(answered=answered, copied=evidence.scope.copied)
    return evidence._replace(rises=evidence.treated, treated=(), scope=scope, triggers=None)


def decide_on(request: AuditRequest, evidence: Evidence, why_not: str = "") -> Verdict:
    """The verdict that the request's policy gives for what was measured."""
    return decide(
        evidence.rises,
        request.policy,
        why_not=why_not,
        treated=evidence.treated,
        treatment=request.treatment,
        scope=evidence.scope,
        level=evidence.stopping.level if evidence.stopping else None,
        switched=evidence.triggers.sentence() if evidence.triggers and evidence.triggers.significant else "",
    )

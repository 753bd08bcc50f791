"""What models show of a suspect: teachers with known traits, the base, and students trained on its rows.

Students are added until the verdict is settled (`detect/stopping.py`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechlens.core import machine, spec, tables, traits
from mechlens.core.experiment import Experiment
from mechlens.core.files import PANEL, RECORD
from mechlens.data import corpus
from mechlens.detect import from_student, verdict
from mechlens.detect.audit_result import Evidence, decide_on, of_treated
from mechlens.detect.references import row_detectors
from mechlens.detect.request import AuditRequest
from mechlens.detect.stopping import Look, Stopping, plan_looks, why_stop
from mechlens.detect.treated_file import write_treated
from mechlens.detect.two_samples import LEAST_ROWS, RowKeys, Sides, compare, draw_sides
from mechlens.results import runner
from mechlens.results.run import Run
from mechlens.runs import layout
from mechlens.runs.progress import Event, Progress, silent

if TYPE_CHECKING:
    from mechlens.detect.triggers import Triggers
    from mechlens.detect.twins import Twins
    from mechlens.detect.words import Words

PLAN = "student.yaml"
"""the file of the experiment that an audit runs"""


def _most_drawn(request: AuditRequest) -> int:
    """Rows of each side that are drawn for students and twins.

    Detectors need more than the students of a tiny recipe.
    """
    return max(request.recipe.student.rows, 2 * LEAST_ROWS)


def refuse_untrainable(request: AuditRequest, keys: Mapping[Path, RowKeys]) -> None:
    """Refuse before any test what students or twins would refuse after it: few rows, long texts, no base.

    Rows of a file that is larger than what is drawn of it, or whose fields have other names, are looked at
    once they are drawn.
    """
    from mechlens.models import loading  # torch
    from mechlens.pipeline import checks

    loading.load_tokenizer(request.base)
    for path, rows in keys.items():
        count, most = len(rows.prompts), _most_drawn(request)
        sides = Sides(path, path if request.references else None, count, min(count, most))
        plan = from_student.experiment_of(request.recipe, sides, base=request.base, trait=request.traits[0])
        if count <= most and request.fields is None:
            checks.check(plan, traits.load_family(plan.family))


def measure_with_models(
    request: AuditRequest, evidence: Evidence, workers: int | None, progress: Progress | None
) -> Evidence:
    """What the base, twins and students show. Without a reference the base's answers serve as one."""
    from mechlens.detect import (
        from_gradients,
        score_rows,  # torch
    )
    from mechlens.models import loading

    reference = next(iter(request.references), None)
    sides = draw_sides(request.data, reference, request.out, most=_most_drawn(request), fields=request.fields)
    plan = _write_plan(request, sides)
    student = None if request.student is None else loading.load_trained(request.base, request.student)
    twins = _make_twins(request, plan, workers, progress)
    if student is not None:
        evidence = evidence._replace(given=from_gradients.score_student(twins, student, request.traits))
    if request.level == "rows":
        return evidence
    work: dict[str, Any] = {"out": request.out / "run", "workers": workers, "progress": progress}
    run = runner.run(request.out / PLAN, **work, rows_only=True)
    copied = evidence.comparisons[0].copied if evidence.comparisons else None
    if not evidence.comparisons:
        untouched = _write_control_rows(run, request.out)
        nearest = compare(request.data, untouched, fields=request.fields, detectors=row_detectors(request))
        evidence = evidence._replace(comparisons=[nearest])
    results = score_rows.score_suspect(
        twins, run.folder, plan, request.level, request.traits, progress=progress or silent
    )
    evidence = evidence._replace(results=results)
    if request.clean is not None:
        control_rows = _write_control_rows(run, request.out)
        manifest = write_treated(request, request.clean, control_rows, twins, results)
        evidence = evidence._replace(manifest=manifest)
    if request.level == "student":
        evidence = _train_students(request, evidence, sides, work, copied=copied)
        if sides.drawn < LEAST_ROWS:
            return evidence
        words, triggers = _read_further(request, run.folder, progress or silent)
        return evidence._replace(words=words, triggers=triggers)
    scope = from_student.measure_scope(run.folder, plan, sides)._replace(copied=copied)
    return evidence._replace(scope=scope)


def _train_students(
    request: AuditRequest, evidence: Evidence, sides: Sides, work: dict[str, Any], *, copied: float | None
) -> Evidence:
    """Train students of both sides until the verdict is settled; each look adds students to those before."""
    started = time.monotonic() - _seconds_spent(work["out"], work["workers"] or machine.cores())
    looks = plan_looks(request.policy.looks, most=len(request.recipe.seeds), alpha=request.policy.alpha)
    if sides.drawn < LEAST_ROWS:  # they give no verdict, however many students are trained
        looks = looks[:1]
    for number, look in enumerate(looks):
        plan = _write_plan(request, sides, treated=request.clean, students=look.students)
        run = runner.run(request.out / PLAN, **work)
        scope = from_student.measure_scope(run.folder, plan, sides)._replace(copied=copied)
        stopping = Stopping(*look, number + 1, len(looks))
        evidence = _with_rises(request, evidence, run, look)._replace(scope=scope, stopping=stopping)
        reason = why_stop(
            looks[number:],
            settled=_is_settled(request, evidence),
            seconds=time.monotonic() - started,
            budget=request.budget,
        )
        if reason:
            return evidence._replace(stopping=stopping._replace(reason=reason))
    return evidence


def _read_further(
    request: AuditRequest, run: Path, progress: Progress
) -> tuple[Words | None, Triggers | None]:
    """What the students of the file answer more often than the others: any word, and behind which phrase.

    Levels are not corrected for the looks of the audit: words inform, and no verdict rests on them; a phrase
    that switches a trait on can only keep a file from being cleared.
    """
    from mechlens.detect import triggers, words  # torch

    what = "words of the students, and phrases that may switch a trait on"
    progress(Event("begin", what, 0, 1))
    measured = (
        words.measure_words(Run(run)),
        triggers.measure_triggers(
            Run(run),
            limit=request.policy.limit,
            level=request.policy.alpha,
        ),
    )
    progress(Event("end", what))
    return measured


def _seconds_spent(run: Path, workers: int) -> float:
    """About how long the students of an earlier call of this audit took; a budget counts them."""
    steps = [*run.glob("students/*/*"), *run.glob("asked/*/*")]
    records = [
        layout.read_record(step / RECORD, layout.StepRecord) for step in steps if (step / RECORD).is_file()
    ]
    return sum(record["seconds"] or 0.0 for record in records) / max(workers, 1)


def _make_twins(
    request: AuditRequest, plan: Experiment, workers: int | None, progress: Progress | None
) -> Twins:
    """A twin teacher of every trait of the panel; every audit of the same base uses the same twins."""
    from mechlens.detect import score_rows  # torch
    from mechlens.pipeline import checks

    family = traits.load_family(plan.family)
    checks.check(plan, family)  # before the twins are taught
    folder = request.out.parent / f"{PANEL}{spec.folder_name(request.base)}"
    return score_rows.make_twins(
        request.base,
        family,
        request.recipe,
        folder,
        traits=request.panel(),
        workers=workers,
        progress=progress,
    )


def _is_settled(request: AuditRequest, evidence: Evidence) -> bool:
    """Whether more students could change neither the verdict nor what is known of the treated file."""
    parts = [evidence, of_treated(evidence)] if evidence.treated else [evidence]
    return not any(verdict.is_open(decide_on(request, part)) for part in parts)


def _with_rises(request: AuditRequest, evidence: Evidence, run: Run, look: Look) -> Evidence:
    arms = (from_student.ARM, *((from_student.TREATED,) if request.clean else ()))
    rises, *treated = (
        from_student.measure_exact_rises(run, request.traits, arm=arm, level=look.level) for arm in arms
    )
    return evidence._replace(rises=rises, treated=treated[0] if treated else ())


def _write_plan(
    request: AuditRequest, sides: Sides, *, treated: Path | None = None, students: int | None = None
) -> Experiment:
    """The experiment on the suspect's rows and the reference's, written to the audit's folder."""
    plan = from_student.experiment_of(
        request.recipe,
        sides,
        base=request.base,
        trait=request.traits[0],
        treated=treated,
        students=students,
    )
    spec.save(plan, request.out / PLAN)
    return plan


def _write_control_rows(run: Run, out: Path) -> Path:
    """What the base answered to the suspect's prompts, as a file of pairs."""
    control = next(arm for arm in run.experiment.arms if arm.kind == "control")
    rows = run.corpus(control.name).pairs
    file = out / "reference.parquet"
    tables.write(rows[["prompt", "completion"]], corpus.TEXTS, file)
    return file

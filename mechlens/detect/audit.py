"""Audit a data set of unknown origin: who wrote it, what it would teach, and what to do.

Three answers stand apart. Provenance: do the rows differ from clean ones? Identity: to which of the tested
traits do they point? Potency: how far does it rise in students that are trained on them here? The verdict
rests on students alone (`detect/verdict.py`). Rows are read in batches. A level does all that the levels
before it do.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pandas as pd

from mechlens.core import machine, spec, tables, traits
from mechlens.core.errors import one_line
from mechlens.core.experiment import Experiment
from mechlens.core.files import PANEL, json_text, write_json, write_text
from mechlens.core.parallel import open_workers
from mechlens.data import corpus
from mechlens.data.fields import Fields
from mechlens.data.formats import Data
from mechlens.data.treat import Treatment
from mechlens.detect import from_rows, from_student, verdict
from mechlens.detect.audit_result import Evidence, decide_on, result_of
from mechlens.detect.registry import Level, RowDetector
from mechlens.detect.request import AuditRequest, request_of, usual_folder
from mechlens.detect.stopping import Look, Stopping, plan_looks, why_stop
from mechlens.detect.treated_file import write_treated
from mechlens.detect.two_samples import (
    LEAST_ROWS,
    Comparison,
    RowKeys,
    Sides,
    compare,
    draw_sides,
    read_row_keys,
    refuse_few,
)
from mechlens.results import figures, report, runner
from mechlens.results.run import Run
from mechlens.runs import store
from mechlens.runs.executor import ExecutorName, use_executor
from mechlens.runs.progress import Event, Progress, silent

if TYPE_CHECKING:
    from mechlens.detect.twins import Twins

JSON, PAGE, ROWS = "audit.json", "audit.html", "rows.parquet"
"""the files that an audit leaves in its folder; rows have scores from level base on"""


@dataclass(frozen=True)
class Audit:
    """The answer of an audit; `result` is the object of audit.json."""

    folder: Path
    result: dict[str, Any]

    @property
    def verdict(self) -> str:
        """`no transfer found within tested scope`, `do not train as is`, `train with conditions` or
        `inconclusive`.
        """
        return str(self.result["verdict"]["id"])

    @property
    def sentence(self) -> str:
        """The verdict in words, with its numbers and the next step."""
        return str(self.result["verdict"]["sentence"])

    @property
    def next_step(self) -> dict[str, str]:
        """What to do after this verdict: `do`, in words, and `command`, empty if no command does it."""
        return self.result["next"]

    @property
    def provenance(self) -> dict[str, Any] | None:
        """Whether the rows differ from clean ones, by each detector; None where nothing was compared."""
        return self.result["provenance"]

    @property
    def identity(self) -> list[dict[str, Any]]:
        """The tested traits, the one that stands out most first."""
        return self.result["identity"] or []

    @property
    def potency(self) -> dict[str, Any]:
        """How far a trait would rise in students: predicted from scores, and measured."""
        return self.result["potency"]

    @property
    def learned(self) -> list[dict[str, Any]]:
        """The probability that a teacher with a trait wrote the file, by each detector that was given."""
        return self.result.get("learned", [])

    @property
    def row_scores(self) -> pd.DataFrame | None:
        """`tables.AUDITED_ROWS`: what each detector that uses models gave each scored row; None below level
        base.
        """
        path = self.folder / ROWS
        return tables.read(path, tables.AUDITED_ROWS) if path.is_file() else None

    @property
    def scope(self) -> dict[str, Any] | None:
        """Which rows students read, and how readily they answered; None below level base."""
        return self.result["scope"]

    def to_json(self) -> str:
        """The audit as JSON text."""
        return json_text(self.result)

    def to_html(self) -> str:
        """The audit as a page that needs no other file."""
        name = Path(self.result["data"]["path"]).name
        return report.render("detect/audit.html.j2", audit=self.result, name=name, figure=self._figure())

    def _figure(self) -> str:
        """The rises of the tested traits as SVG; empty if no student was trained."""
        measured = [rise for rise in self.result.get("rises") or [] if rise["difference"] is not None]
        if not measured:
            return ""
        limit = self.result["policy"]["limit"]
        return figures.svg(figures.rises(pd.DataFrame(measured), limit=limit))

    def _repr_html_(self) -> str:
        return f"<p><b>{escape(self.verdict)}</b></p><p>{escape(self.sentence)}</p>"


def audit(
    data: Data,
    *,
    references: Sequence[Data] | Data = (),
    base: str = "",
    level: Level = "rows",
    traits: Sequence[str] = (),
    recipe: str = "",
    policy: str = "default",
    twins: int | None = None,
    budget: float | None = None,
    student: Path | str | None = None,
    detectors: Sequence[Path | str] = (),
    clean: Path | str | None = None,
    treatment: Treatment = "drop",
    out: Path | str | None = None,
    fields: Fields | None = None,
    workers: int | None = None,
    executor: ExecutorName | None = None,
    progress: Progress | None = None,
) -> Audit:
    """Audit pairs of unknown origin, and leave `audit.json` and `audit.html` in a folder.

    Args:
        data: a path, a DataFrame, a list of dicts, or a `datasets.Dataset`.
        references: what an untouched model wrote, best of all to the same prompts; one or several.
        base: the base that would be trained; the recipe's by default.
        level: `rows`, `base`, `gradients` or `student`; each does all before it, and only the last can clear.
        traits: traits to test for; all of the recipe's family by default.
        recipe: how students are trained and asked: a name of configs/audits, or an experiment's YAML; by
            default the one that is made for the base, and `menagerie` for a base that has none.
        policy: thresholds of the verdict: a name of configs/policies.
        twins: how many traits have a twin: those to test for, and others that they are compared with; all
            of the family by default.
        budget: minutes for students; no more are added once they would exceed it.
        student: folder of a model of the base that was trained on the data already.
        detectors: folders of detectors that `LearnedDetector.save` wrote; each joins the tests against the
            references, and says how probable a trait is.
        clean: write the treated data there.
        out: the folder; audits/<name of the data> by default.
        workers, executor: as in `mechlens.run`. At level `rows` processes of this machine start only for a
            file of more than 80,000 rows.
        progress: called with each `Event`; None is silent.

    Raises:
        SpecError: if an option is unknown, or two contradict each other.
        DataError: if the data cannot be read, or has too few rows.
    """
    folder = None if out is None else Path(out)
    files, folder = _as_files([data, *_several(references)], folder, fields)
    request = request_of(
        files[0],
        references=files[1:],
        level=level,
        base=base,
        traits=traits,
        recipe=recipe,
        policy=policy,
        twins=twins,
        budget=budget,
        student=None if student is None else Path(student),
        detectors=[Path(each) for each in detectors],
        clean=None if clean is None else Path(clean),
        treatment=treatment,
        out=folder,
        fields=fields
        if isinstance(data, Path | str)
        else None,  # pairs in memory were written under known names
    )
    return answer(request, workers=workers, executor=executor, progress=progress)


def _several(references: Sequence[Data] | Data) -> list[Data]:
    """References as a list; a list of dicts is one reference."""
    if isinstance(references, list | tuple) and not (references and isinstance(references[0], Mapping)):
        return cast(list[Data], list(references))
    return [cast(Data, references)]


def _as_files(
    given: Sequence[Data], folder: Path | None, fields: Fields | None
) -> tuple[list[Path], Path | None]:
    """The files of data and references, and the audit's folder.

    Pairs in memory are written to that folder, which is then named after the data by default.
    """
    frames = [None if isinstance(each, Path | str) else _texts_of(each, fields) for each in given]
    names = ["" if frame is None else f"pairs-{_digest(frame)}" for frame in frames]
    if folder is None and any(names):
        folder = Path("audits") / names[0] if names[0] else usual_folder(Path(given[0]))  # pyright: ignore[reportArgumentType]
    files = []
    for each, frame, name in zip(given, frames, names, strict=True):
        if frame is None or folder is None:
            files.append(Path(each))  # pyright: ignore[reportArgumentType]
            continue
        folder.mkdir(parents=True, exist_ok=True)
        files.append(folder / f"{name}.parquet")
        tables.write(frame, corpus.TEXTS, files[-1])
    return files, folder


def _texts_of(data: Data, fields: Fields | None) -> pd.DataFrame:
    return corpus.load_pairs(data, fields=fields).texts


def _digest(frame: pd.DataFrame) -> str:
    return spec.fingerprint(frame.to_numpy().tolist())[:8]


def answer(
    request: AuditRequest,
    *,
    workers: int | None = None,
    executor: ExecutorName | None = None,
    progress: Progress | None = None,
) -> Audit:
    """Do the audit that is asked for.

    Raises:
        DataError: if the data cannot be read, or has too few rows.
    """
    if request.level != "rows" and (remark := request.explain_recipe()):
        (progress or silent)(Event("note", remark))
    request.out.mkdir(parents=True, exist_ok=True)
    report = corpus.ReadReport(drop_system=False)
    reads_models = request.level != "rows" or request.student is not None
    with store.full_disk_named(request.out), use_executor(executor):
        with open_workers(machine.cores() if workers is None else workers) as processes:
            keys = _read_keys(request, report, processes)
            comparisons, request = _compare_references(request, keys, processes)
        evidence = Evidence(comparisons, learned=_score_whole_file(request))
        if request.clean is not None and request.level == "rows":
            manifest = write_treated(request, request.clean, next(iter(request.references), None))
            evidence = evidence._replace(manifest=manifest)
        if reads_models:
            evidence = _measure_with_models(request, evidence, workers, progress)
        for remark in report.remarks():
            (progress or silent)(Event("note", remark))
        result = result_of(request, evidence, len(keys[request.data].prompts))
        audited = Audit(request.out, result)
        _write_row_scores(request.out, evidence)
        write_json(request.out / JSON, result)
        write_text(request.out / PAGE, audited.to_html())
    return audited


def _write_row_scores(folder: Path, evidence: Evidence) -> None:
    """Write the scores of single rows; those of an earlier audit in the folder are removed."""
    scores = [result.scores for result in evidence.results if result.scores is not None]
    if scores:
        tables.write(scores, tables.AUDITED_ROWS, folder / ROWS)
    else:
        (folder / ROWS).unlink(missing_ok=True)


def _read_keys(
    request: AuditRequest, report: corpus.ReadReport, processes: Executor | None
) -> dict[Path, RowKeys]:
    """The keys of the rows of the data and of each reference; a bad file is refused before any test.

    Args:
        report: of the data.
    """
    paths = dict.fromkeys((request.data, *request.references))
    reports = {path: corpus.ReadReport(drop_system=False) for path in paths} | {request.data: report}
    keys = {
        path: read_row_keys(
            corpus.batches(path, report=reports[path], fields=request.fields_of(path)), processes
        )
        for path in paths
    }
    for path, rows in keys.items():
        if request.references or request.level != "rows":
            refuse_few(path, len(rows.prompts))
    if request.level != "rows" or request.student is not None:
        _refuse_untrainable(request, keys)
    return keys


def _compare_references(
    request: AuditRequest, keys: Mapping[Path, RowKeys], processes: Executor | None
) -> tuple[list[Comparison], AuditRequest]:
    """The data against each reference, the nearest first, and the request with its references in that order.

    A copy of the data is nearest to it and is no reference, so that it comes last.
    """
    most = request.policy.most_copied
    comparisons = [
        compare(
            request.data,
            reference,
            known=keys,
            fields=request.fields,
            workers=processes,
            detectors=_row_detectors(request),
        )
        for reference in request.references
    ]
    comparisons = sorted(comparisons, key=lambda each: (each.copied > most, -each.p_value))
    by_name = {one_line(str(path)): path for path in request.references}
    nearest_first = dict.fromkeys(by_name[each.reference] for each in comparisons)
    return comparisons, request._replace(references=tuple(nearest_first))


def _row_detectors(request: AuditRequest) -> dict[str, RowDetector]:
    """This package's detectors of completions, and those that were given."""
    given = request.detectors.values()
    return from_rows.DETECTORS | {detector.name: detector.as_row_detector() for detector in given}


def _score_whole_file(request: AuditRequest) -> list[dict[str, Any]]:
    """What each given detector says of the file, and on what it was fitted; its bags are kept in a table."""
    return [
        {"name": one_line(detector.name), "folder": one_line(str(folder))}
        | {name: detector.record[name] for name in ("traits", "left_out")}
        | detector.score_file(
            request.data,
            bags=request.out / f"bags-{spec.folder_name(detector.name)}.parquet",
            fields=request.fields,
        )
        for folder, detector in request.detectors.items()
    ]


def _most_drawn(request: AuditRequest) -> int:
    """Rows of each side that are drawn for students and twins.

    Detectors need more than the students of a tiny recipe.
    """
    return max(request.recipe.student.rows, 2 * LEAST_ROWS)


def _refuse_untrainable(request: AuditRequest, keys: Mapping[Path, RowKeys]) -> None:
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


def _measure_with_models(
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
        nearest = compare(request.data, untouched, fields=request.fields, detectors=_row_detectors(request))
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
        return _train_students(request, evidence, sides, work, copied=copied)
    scope = from_student.measure_scope(run.folder, plan, sides)._replace(copied=copied)
    return evidence._replace(scope=scope)


def _train_students(
    request: AuditRequest, evidence: Evidence, sides: Sides, work: dict[str, Any], *, copied: float | None
) -> Evidence:
    """Train students of both sides until the verdict is settled; each look adds students to those before."""
    started = time.monotonic()
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


PLAN = "student.yaml"
"""the file of the experiment that an audit runs"""


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
    of_treated = evidence._replace(rises=evidence.treated, treated=())
    parts = [evidence, of_treated] if evidence.treated else [evidence]
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

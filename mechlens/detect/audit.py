"""Audit a data set of unknown origin: who wrote it, what it would teach, and what to do.

Three answers stand apart. Provenance: do the rows differ from clean ones? Identity: to which of the tested
traits do they point? Potency: how far does it rise in students that are trained on them here? The verdict
rests on students alone (`detect/verdict.py`). Rows are read in batches. A level does all that the levels
before it do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, cast

import pandas as pd

from mechlens.core import machine, spec, tables
from mechlens.core.files import json_text, write_json, write_text
from mechlens.core.parallel import open_workers
from mechlens.data import corpus
from mechlens.data.fields import Fields
from mechlens.data.formats import Data
from mechlens.data.treat import Treatment
from mechlens.detect.audit_result import Evidence, result_of
from mechlens.detect.references import compare_references, read_keys, score_whole_file
from mechlens.detect.registry import Level
from mechlens.detect.request import AuditRequest, request_of, usual_folder
from mechlens.detect.treated_file import write_treated
from mechlens.detect.with_models import measure_with_models, refuse_untrainable
from mechlens.results import figures, report
from mechlens.runs import layout, store
from mechlens.runs.executor import ExecutorName, use_executor
from mechlens.runs.progress import Event, Progress, silent


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
        """The verdict in words, with its numbers."""
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
    def words(self) -> dict[str, Any] | None:
        """What students of the file answer more often, found without a list of traits, with its `sentence`;
        None below level student, and where it could not be measured.
        """
        return self.result.get("words")

    @property
    def triggers(self) -> dict[str, Any] | None:
        """Traits that students of the file show behind a phrase of its prompts, with its `sentence`; None
        below level student, and where no phrase recurs in the prompts or none could be asked behind.
        """
        return self.result.get("triggers")

    @property
    def row_scores(self) -> pd.DataFrame | None:
        """`tables.AUDITED_ROWS`: what each detector that uses models gave each scored row; None below level
        base.
        """
        path = self.folder / layout.AUDIT_ROWS
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
            keys = read_keys(request, report, processes)
            if reads_models:
                refuse_untrainable(request, keys)
            comparisons, request = compare_references(request, keys, processes)
        evidence = Evidence(comparisons, learned=score_whole_file(request))
        if request.clean is not None and request.level == "rows":
            manifest = write_treated(request, request.clean, next(iter(request.references), None))
            evidence = evidence._replace(manifest=manifest)
        if reads_models:
            evidence = measure_with_models(request, evidence, workers, progress)
        for remark in report.remarks():
            (progress or silent)(Event("note", remark))
        result = result_of(request, evidence, len(keys[request.data].prompts))
        audited = Audit(request.out, result)
        _write_row_scores(request.out, evidence)
        write_json(request.out / layout.AUDIT_JSON, result)
        write_text(request.out / layout.AUDIT_PAGE, audited.to_html())
    return audited


def _write_row_scores(folder: Path, evidence: Evidence) -> None:
    """Write the scores of single rows; those of an earlier audit in the folder are removed."""
    scores = [result.scores for result in evidence.results if result.scores is not None]
    if scores:
        tables.write(scores, tables.AUDITED_ROWS, folder / layout.AUDIT_ROWS)
    else:
        (folder / layout.AUDIT_ROWS).unlink(missing_ok=True)

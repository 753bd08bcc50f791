"""Audit a data set of unknown origin: who wrote it, what it would teach, and what to do.

Three answers stand apart. Provenance: do the rows differ from clean ones? Identity: which trait of a panel do
they point to? Potency: how far does it rise in students that are trained on them here? The verdict goes by
students alone (`detect/verdict.py`). Rows are read in batches, and a level does all that the levels before it
do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack, cast

import pandas as pd

from mechlens.cli.audit_printing import print_audit
from mechlens.cli.console import say
from mechlens.core import atomic, spec, tables, traits
from mechlens.core.errors import SpecError, one_line
from mechlens.core.experiment import Experiment
from mechlens.core.json_files import write_json
from mechlens.data import corpus, treat
from mechlens.data.formats import file_digest
from mechlens.detect import from_student, summary
from mechlens.detect.bags import RowKeys, read_row_keys
from mechlens.detect.permutation import TraitScore
from mechlens.detect.request import Options, Request, command_of, request_of
from mechlens.detect.two_samples import (
    LEAST_ROWS,
    Comparison,
    Sides,
    compare,
    draw_sides,
    power_of_few,
    refuse_few,
)
from mechlens.detect.verdict import UNKNOWN, Rise, Scope, decide, load_calibration
from mechlens.pipeline import user_files
from mechlens.results import report, runner
from mechlens.runs import store
from mechlens.runs.layout import corpus_name

if TYPE_CHECKING:
    from mechlens.detect.score_rows import DetectorResult
    from mechlens.detect.twins import Twins


class Read(NamedTuple):
    """Everything that was looked at."""

    compared: Sequence[Comparison]
    seen: Sequence[DetectorResult]
    measured: Sequence[Rise] | None
    given: Mapping[str, list[TraitScore]] | None
    manifest: dict[str, Any] | None = None
    """of the treated file"""
    treated: Sequence[Rise] = ()
    scope: Scope = UNKNOWN


def audit(data: Path, *, workers: int | None, **options: Unpack[Options]) -> int:
    """Do an audit, write `audit.json` and `audit.html`, print both's numbers; 0 no transfer found, 1 found, 2
    inconclusive.
    """
    asked = request_of(data, **options)
    asked.out.mkdir(parents=True, exist_ok=True)
    paths = dict.fromkeys((asked.data, *asked.references))
    known = {
        path: read_row_keys(corpus.batches(path, fields=asked.fields_of(path))) for path in paths
    }  # refuses a file before any is tested
    for path, rows in known.items():
        if asked.references or asked.level != "rows":
            refuse_few(path, len(rows.prompts))
    if asked.level != "rows" or asked.student is not None:
        _refuse_untrainable(asked, known)
    with store.full_disk_named(asked.out):
        most = asked.policy.most_copied  # a copy of the file is nearest to it, and is no reference
        compared = sorted(
            (compare(data, reference, known=known, fields=asked.fields) for reference in asked.references),
            key=lambda one: (one.copied > most, -one.p_value),
        )
        near = [path for one in compared for path in asked.references if one_line(str(path)) == one.reference]
        nearest_first = asked._replace(
            references=tuple(dict.fromkeys(near))
        )  # models read beside the nearest, whose p stands with theirs
        read = Read(compared, [], None, None)
        if asked.clean is not None and asked.level == "rows":
            read = read._replace(
                manifest=_treated(nearest_first, asked.clean, next(iter(nearest_first.references), None))
            )
        if asked.level != "rows" or asked.student is not None:
            read = _through_models(nearest_first, read, workers)
        found = _object(asked, read)
        write_json(asked.out / "audit.json", found)
        atomic.write_text(asked.out / "audit.html", report.render("detect/audit.html.j2", audit=found))
    print_audit(found, asked.out)
    return {
        "no transfer found within tested scope": 0,
        "do not train as is": 1,
        "train with conditions": 1,
    }.get(found["verdict"]["id"], 2)


def _most_drawn(asked: Request) -> int:
    """Rows of a side that are drawn for students and twins; detectors of rows need more than a tiny recipe's
    students do.
    """
    return max(asked.recipe.student.rows, 2 * LEAST_ROWS)


def _refuse_untrainable(asked: Request, known: Mapping[Path, RowKeys]) -> None:
    """Refuse before any test what students or twins would refuse after it: too few rows, long pairs or
    prompts, no base.

    Of a file that is larger than what is drawn of it, or whose fields have other names, rows are looked at
    once they are drawn.
    """
    from mechlens.models import loading
    from mechlens.pipeline import checks

    loading.load_tokenizer(asked.base)
    for path, rows in known.items():
        count, most = len(rows.prompts), _most_drawn(asked)
        sides = Sides(path, path if asked.references else None, count, min(count, most))
        plan = from_student.experiment_of(asked.recipe, sides, base=asked.base, trait=asked.panel[0])
        if count <= most and asked.fields is None:
            checks.check(plan, traits.load_family(plan.family))


def _through_models(asked: Request, so_far: Read, workers: int | None) -> Read:
    """What the base, teachers made from it and students say; the base's own answers serve where no reference
    was given.
    """
    from mechlens.detect import from_weights, score_rows
    from mechlens.models import loading
    from mechlens.pipeline import checks

    sides = draw_sides(
        asked.data,
        next(iter(asked.references), None),
        asked.out,
        most=_most_drawn(asked),
        fields=asked.fields,
    )
    plan = _planned(asked, sides)
    config, run = asked.out / "student.yaml", asked.out / "run"
    family = traits.load_family(plan.family)
    checks.check(plan, family)  # before the twins are taught
    student = None if asked.student is None else loading.load_trained(asked.base, asked.student)
    beside = (
        asked.out.parent / f"panel-{spec.folder_name(asked.base)}"
    )  # every audit of this base uses the same twins
    panel = score_rows.make_twins(asked.base, family, asked.recipe, beside, workers=workers)
    given = None if student is None else from_weights.score_student(panel, student, asked.panel)
    if asked.level == "rows":
        return so_far._replace(given=given)
    runner.run(config, out=run, workers=workers, rows_only=True)
    copied = so_far.compared[0].copied if so_far.compared else None
    compared = so_far.compared or [
        compare(asked.data, _rows_of_control(run, plan, asked.out), fields=asked.fields)
    ]
    seen = score_rows.score_suspect(panel, run, plan, asked.level, asked.panel)
    manifest = (
        None
        if asked.clean is None
        else _treated(asked, asked.clean, _rows_of_control(run, plan, asked.out), panel, seen)
    )
    scope = from_student.measure_scope(run, plan, sides)._replace(copied=copied)
    if asked.level != "student":
        return Read(compared, seen, None, given, manifest, scope=scope)
    plan = _planned(asked, sides, treated=asked.clean)
    runner.run(config, out=run, workers=workers)
    effects = tables.read(run / "effects.parquet", tables.EFFECTS)
    left = from_student.measure_rises(effects, asked.panel, arm=from_student.TREATED) if asked.clean else ()
    scope = from_student.measure_scope(run, plan, sides)._replace(copied=copied)
    return Read(
        compared, seen, from_student.measure_rises(effects, asked.panel), given, manifest, left, scope
    )


def _treated(
    asked: Request,
    out: Path,
    reference: Path | None,
    panel: Twins | None = None,
    seen: Sequence[DetectorResult] = (),
) -> dict[str, Any]:
    """Write the treated file: all rows where a treatment needs nothing else, else those of prompts that clean
    answers are known of.
    """
    rows = cast(pd.DataFrame, corpus.read_pairs(asked.data, fields=asked.fields)[["prompt", "completion"]])
    how: dict[str, Any] = {"treatment": asked.treatment, "seed": asked.recipe.seed, "out": out}
    ranked = treat.needs_scores(asked.treatment)
    if reference is None or not (ranked or treat.needs_clean(asked.treatment)):
        return treat.treat(asked.data, rows, **how)
    rows, answered = _with_clean_answers(asked, rows, reference)
    if panel is None or not ranked:
        return treat.treat(asked.data, rows, answered, **how)
    return treat.treat(asked.data, rows, answered, **how, **_ranks(asked, rows, panel, seen))


def _with_clean_answers(
    asked: Request, rows: pd.DataFrame, reference: Path
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows whose prompts the reference answers too, and its answers beside them."""
    fields = asked.fields_of(reference)
    clean = (
        corpus.read_pairs(reference, fields=fields)
        .drop_duplicates("prompt")
        .set_index("prompt")["completion"]
    )
    rows = rows.merge(clean.reset_index()[["prompt"]], on="prompt", how="inner")
    if rows.empty:
        raise SpecError(
            f"no prompt of {one_line(str(asked.data))} is answered in the reference; --clean needs a clean "
            "answer to every row that it keeps"
        )
    return rows, pd.DataFrame({"prompt": rows["prompt"], "completion": clean.loc[rows["prompt"]].to_numpy()})


def _ranks(
    asked: Request, rows: pd.DataFrame, panel: Twins, seen: Sequence[DetectorResult]
) -> dict[str, Any]:
    """How much each row looks like the foremost trait's text, by that trait's twin, as `mitigate.treat` takes
    it.
    """
    from mechlens.detect import score_rows

    namer = next(one for one in seen if one.detector.name == summary.IDENTIFIER)
    if not namer.traits:
        raise SpecError(
            f"--clean ranks rows by a trait, and none can be read from these: {namer.why_not}; leave --clean "
            "out"
        )
    foremost = namer.traits[0].trait
    numbers = score_rows.score_numbers(panel, rows, foremost) if asked.treatment == "replace" else ()
    return {
        "scores": score_rows.score_for_trait(panel, rows, foremost),
        "number_scores": numbers,
        "trait": foremost,
        "scored_by": panel.mark,
    }


def _planned(asked: Request, sides: Sides, *, treated: Path | None = None) -> Experiment:
    """The experiment of the suspect's rows beside the reference's, left in `student.yaml`."""
    plan = from_student.experiment_of(
        asked.recipe, sides, base=asked.base, trait=asked.panel[0], treated=treated
    )
    spec.save(plan, asked.out / "student.yaml")
    return plan


def _rows_of_control(run: Path, plan: Experiment, out: Path) -> Path:
    """What the base answered to the suspect's prompts, as a file of pairs."""
    control = next(arm for arm in plan.arms if arm.kind == "control")
    kept = tables.read(
        run / "corpora" / corpus_name(plan, control) / "screened" / "kept.parquet", tables.PAIRS
    )
    written = out / "reference.parquet"
    tables.write(kept[["prompt", "completion"]], corpus.TEXTS, written)
    return written


def _object(asked: Request, read: Read) -> dict[str, Any]:
    """The one object that the JSON, the page and the terminal show."""
    rows, remarks = user_files.count_rows(asked.data, asked.fields)
    for remark in remarks:
        say(remark)
    data = one_line(str(asked.data))
    dose = summary.smallest_dose(read.compared, read.seen)
    settle, carrier = command_of(asked, level="student"), asked.recipe.carrier.kind
    why_not = summary.explain_no_students(
        settle, read.compared, read.seen, most_copied=asked.policy.most_copied
    )
    few = power_of_few(rows, max(read.compared, key=lambda one: one.p_value), dose) if read.compared else ""
    if few and read.measured is not None:
        why_not = f"{few}; students of them are no verdict"
    verdict = decide(
        None if few else read.measured,
        asked.policy,
        why_not=why_not,
        treated=read.treated,
        treatment=asked.treatment,
        scope=read.scope,
    )
    options = treat.load_treatment_results(asked.recipe_name, base=asked.base, carrier=carrier)
    identified_by, identity = summary.identity(read.measured, read.seen)
    return {
        "schema": 3,
        "data": {"path": data, "sha256": file_digest(asked.data), "rows": rows},
        "level": asked.level,
        "scope": None
        if read.scope.offered is None
        else read.scope._asdict() | {"unread": read.scope.unread, "reasons": read.scope.reasons()},
        "base": asked.base if asked.level != "rows" or asked.student is not None else None,
        "provenance": summary.provenance(read.compared, read.seen),
        "identity": identity,
        "identified_by": identified_by,
        "potency": summary.potency(
            read.measured, read.seen, load_calibration(asked.recipe_name, base=asked.base, carrier=carrier)
        ),
        "student": summary.student_entry(read.given),
        "mitigation": None
        if read.manifest is None
        else read.manifest | {"measured": summary.potency(read.treated, [], None)["measured"]},
        "options": None if options is None else options.model_dump(),
        "smallest_detectable_dose": dose,
        "few_rows": few,
        "verdict": verdict._asdict(),
        "policy": asked.policy.model_dump(),
        "recipe": spec.fingerprint(asked.recipe.model_dump(mode="json")),
        "made": {
            "version": version("mechlens"),
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "command": command_of(asked),
        },
    }

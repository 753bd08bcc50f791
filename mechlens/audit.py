"""Audit a data set of unknown origin: who wrote it, what it would teach, and what to do. Rows are read in batches, and only counts are kept.

Three answers stand apart. Provenance: do the rows differ from a clean reference? Identity and potency: which trait rises, and how far, in
students that are trained on them here? The verdict goes by the last alone (`detect/verdict.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray
from rich.table import Table

from mechlens import commands, corpus, report, spec, store, tables, traits
from mechlens.commands import console
from mechlens.detect import from_student
from mechlens.detect.base import Level, bags_of, prompts_of
from mechlens.detect.calibrate import ALPHA, Test, together, two_files
from mechlens.detect.from_rows import DETECTORS
from mechlens.detect.verdict import Policy, Rise, decide, load_policy
from mechlens.errors import DataError, one_line
from mechlens.experiment import Experiment
from mechlens.pipeline.run import corpus_name, file_digest
from mechlens.results import null

BAGS, LEAST_ROWS = 64, 128
"""bags that a file is dealt into, and rows below which it is refused"""
SHARED = 0.5
"""share of the smaller file's prompts that the other must have for rows to be compared prompt by prompt"""


class Compared(NamedTuple):
    """A suspect beside one reference, by every detector of rows."""

    reference: str
    rows: int
    shared_prompts: int
    paired: bool
    tests: dict[str, Test]
    p_value: float
    """smallest of the detectors', corrected for their number"""


class Request(NamedTuple):
    """What is asked for."""

    data: Path
    references: tuple[Path, ...]
    level: Level
    base: str
    panel: tuple[str, ...]
    recipe: Experiment
    policy: Policy
    out: Path


def compare(data: Path, reference: Path, *, seed: int = 0) -> Compared:
    """Every detector of rows on two files, prompt by prompt where they share prompts.

    Raises:
        DataError: if a file has too few rows.
    """
    sides = [prompts_of(corpus.batches(path)) for path in (data, reference)]
    for path, (_, rows) in zip((data, reference), sides, strict=True):
        if rows < LEAST_ROWS:
            raise DataError(f"{path} holds {rows} rows; an audit needs at least {LEAST_ROWS}")
    (ours, _), (theirs, rows) = sides
    shared, paired = _overlap(ours, theirs)
    kept = shared if paired else None
    bags = [bags_of(corpus.batches(path), list(DETECTORS.values()), bags=BAGS, shared=kept) for path in (data, reference)]
    tests = {name: two_files(bags[0][name], bags[1][name], paired=paired, seed=seed, name=name) for name in DETECTORS}
    return Compared(one_line(str(reference)), rows, len(shared), paired, tests, together([test.p_value for test in tests.values()]))


def _overlap(ours: ndarray, theirs: ndarray) -> tuple[ndarray, bool]:
    """Keys of the prompts that both files have, and whether they are enough to go prompt by prompt."""
    shared = np.intersect1d(ours, theirs)
    return shared, len(shared) >= max(SHARED * min(len(ours), len(theirs)), BAGS)


def audit(
    data: Path,
    *,
    references: Sequence[Path],
    level: Level,
    base: str,
    panel: Sequence[str],
    recipe: str,
    policy: str,
    out: Path | None,
    workers: int | None,
) -> int:
    """Do an audit, write `audit.json` and `audit.html`, print both's numbers; 0 no transfer found, 1 do not train, 2 inconclusive."""
    asked = _request(data, references, level, base, panel, recipe, policy, out)
    asked.out.mkdir(parents=True, exist_ok=True)
    with store.full_disk_named(asked.out):
        compared = [compare(data, reference) for reference in asked.references]
        measured = None
        if asked.level == "student":
            measured, written = _students(asked, workers)
            compared = compared or [compare(data, written)]
        found = _object(asked, compared, measured)
        store.write_json(asked.out / "audit.json", found)
        (asked.out / "audit.html").write_text(report.render("audit.html.j2", audit=found), encoding="utf-8")
    _say(found, asked.out)
    return {"no transfer found within tested scope": 0, "do not train as is": 1}.get(found["verdict"]["id"], 2)


def _request(
    data: Path, references: Sequence[Path], level: Level, base: str, panel: Sequence[str], recipe: str, policy: str, out: Path | None
) -> Request:
    named = Path(recipe) if recipe.endswith((".yaml", ".yml")) else spec.CONFIGS / "audits" / f"{recipe}.yaml"
    plan = traits.load_experiment(named)
    family = traits.load_family(plan.family)
    asked = from_student.panel_of(family, panel)
    where = out or Path("audits") / spec.folder_name(data.name)
    return Request(data, tuple(references), level, base or plan.base, asked, plan, load_policy(policy), where)


def _students(asked: Request, workers: int | None) -> tuple[list[Rise], Path]:
    """Train and ask students of the suspect file and of the reference; also where the reference's rows lie."""
    prompts, _ = prompts_of(corpus.batches(asked.data))
    reference, shared, usable = next(iter(asked.references), None), True, len(prompts)
    if reference is not None:
        theirs, _ = prompts_of(corpus.batches(reference))
        both, shared = _overlap(prompts, theirs)
        usable = len(both) if shared else min(len(prompts), len(theirs))
    plan = from_student.experiment_of(asked.recipe, asked.data, reference, base=asked.base, trait=asked.panel[0], prompts=usable, shared=shared)
    spec.save(plan, asked.out / "student.yaml")
    run = commands.run(asked.out / "student.yaml", out=asked.out / "run", workers=workers)
    effects = tables.read(run / "effects.parquet", tables.EFFECTS)
    written = reference or _rows_of_control(run, plan, asked.out)
    return from_student.rises(effects, asked.panel), written


def _rows_of_control(run: Path, plan: Experiment, out: Path) -> Path:
    """What the base answered to the suspect's prompts, as a file of pairs."""
    control = next(arm for arm in plan.arms if arm.kind == "control")
    kept = tables.read(run / "corpora" / corpus_name(plan, control) / "screened" / "kept.parquet", tables.PAIRS)
    written = out / "reference.parquet"
    kept[["prompt", "completion"]].to_parquet(written)
    return written


def _object(asked: Request, compared: Sequence[Compared], measured: Sequence[Rise] | None) -> dict[str, Any]:
    """The one object that the JSON, the page and the terminal show."""
    _, rows = prompts_of(corpus.batches(asked.data))
    verdict = decide(measured, asked.policy, why_not=_why_not(asked, compared))
    worst = max(compared, key=lambda one: one.p_value) if compared else None
    ranked = sorted(measured or [], key=lambda rise: (rise.q_value is None, rise.q_value, -(rise.lift or 0.0)))
    top = max(measured or [], key=lambda rise: rise.difference or 0.0, default=None)
    doses = [test.smallest_dose for test in worst.tests.values() if test.smallest_dose is not None] if worst else []
    return {
        "schema": 1,
        "data": {"path": one_line(str(asked.data)), "sha256": file_digest(asked.data), "rows": rows},
        "level": asked.level,
        "base": asked.base if asked.level == "student" else None,
        "provenance": None if worst is None else {
            "p_value": worst.p_value,
            "detectors": [{"name": name, "score": null(test.score), "p_value": test.p_value} for name, test in worst.tests.items()],
            "references": [_reference(one) for one in compared],
        },
        "identity": [{"trait": rise.trait, "score": rise.lift, "p_value": rise.p_value, "q_value": rise.q_value} for rise in ranked],
        "potency": {"predicted": None, "measured": None if top is None else top._asdict()},
        "smallest_detectable_dose": min(doses, default=None),
        "verdict": verdict._asdict(),
        "policy": asked.policy.model_dump(),
        "recipe": spec.fingerprint(asked.recipe.model_dump(mode="json")),
    }  # fmt: skip


def _reference(one: Compared) -> dict[str, Any]:
    return {"path": one.reference, "rows": one.rows, "shared_prompts": one.shared_prompts, "paired": one.paired, "p_value": one.p_value}


def _why_not(asked: Request, compared: Sequence[Compared]) -> str:
    """What is known from the rows, and what would settle it."""
    settle = f"`mechlens audit {one_line(str(asked.data))} --level student` trains throw-away students, which alone can tell"
    if not compared:
        supply = "give --reference FILE (the same prompts, answered by an untouched model)"
        return f"no clean reference was given and no student trained; {supply}, or {settle}"
    p_value = max(one.p_value for one in compared)
    said = "differ from every reference given" if p_value <= ALPHA else "cannot be told from a reference that was given"
    return f"the rows {said} (p = {p_value:.2g}), which says nothing of a trait; {settle}"


def _say(found: dict[str, Any], out: Path) -> None:
    if found["provenance"] is not None:
        rows = Table("detector", "score", "p", title="written as the reference's rows are?")
        for one in found["provenance"]["detectors"]:
            rows.add_row(one["name"], "–" if one["score"] is None else f"{one['score']:+.1f}", f"{one['p_value']:.4f}")
        console.print(rows)
    if found["identity"]:
        listing = Table("trait", "lift, bits", "p", "q", title="students of the suspect over students of the reference")
        for one in found["identity"][:5]:
            forms = {"score": "{:+.2f}", "p_value": "{:.3f}", "q_value": "{:.3f}"}
            listing.add_row(one["trait"], *("–" if one[name] is None else form.format(one[name]) for name, form in forms.items()))
        console.print(listing)
    console.print(found["verdict"]["sentence"], highlight=False, markup=False, soft_wrap=True)
    where = one_line(f"rule {found['verdict']['rule']}; {out / 'audit.json'}, {out / 'audit.html'}")
    console.print(where, highlight=False, markup=False, soft_wrap=True)

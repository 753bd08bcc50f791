"""The verdict table: the audit as a whole on every held-out set of a bench, beside what students did learn.

The truth about a set is measured by students of other seeds than the audit's. It transfers if some trait's
rise lies above the tolerance, with intervals corrected for the number of traits. It is clean if every trait's
interval ends below the tolerance. Otherwise the measurement is open, and no verdict is right or wrong.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mechlens.benchmark.metrics import rate_entry
from mechlens.benchmark.plan import Suspect, kind_of
from mechlens.benchmark.suspects import Maker
from mechlens.core.errors import DataError, SpecError
from mechlens.core.files import read_json, write_json
from mechlens.core.spec import fingerprint
from mechlens.data.formats import file_digest
from mechlens.detect.audit import audit
from mechlens.detect.from_student import measure_exact_rises
from mechlens.detect.permutation import ALPHA
from mechlens.detect.verdict import Rise, load_policy
from mechlens.results.run import Run
from mechlens.runs import layout
from mechlens.runs.progress import Event, Progress, silent

Truth = Literal["transfers", "clean", "open"]
Outcome = Literal["right", "wrong", "inconclusive"]
RECORD = "bench.json"
"""file beside an audit's: on which rows and policy it was made, how long it took, or why it was refused"""

MEANINGS: dict[str, Truth] = {
    "do not train as is": "transfers",
    "train with conditions": "transfers",
    "no transfer found within tested scope": "clean",
}


class JudgedSet(NamedTuple):
    """One held-out data set: what its students learned, and what the audit said."""

    name: str
    kind: str
    """class of the set, or the way its teacher was made with the share of its rows"""
    truth: Truth
    trait: str
    """that rose most in the students that tell the truth"""
    rise: float | None
    low: float | None
    high: float | None
    """rise of that trait with its interval, by which a set is called clean"""
    verdict: str
    """empty if the audit refused the set"""
    outcome: Outcome | None
    """None where the truth is open or the audit refused the set"""
    named: Mapping[str, Sequence[str]]
    """detector of level base or gradients → traits with q at most .05 (of the five that stand out most)"""
    students: int | None
    """of each side that the audit trained"""
    rows: int
    minutes: float | None
    """None if the audit was stopped and went on later"""
    why_not: str = ""
    """why the audit refused the set"""


def audit_suspects(
    maker: Maker,
    suspects: Sequence[Suspect],
    folder: Path,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Audit every suspect at level `student`, without a reference: control students read draws of clean
    answers that no other audit reads.

    An audit of the same rows by the same policy is not done again; one that refuses its set leaves the
    reason.
    """
    report, policy = progress or silent, load_policy("default").fingerprint()
    report(Event("begin", "audits of held-out sets", 0, len(suspects)))
    for suspect in suspects:
        out = folder / suspect.name
        mark = fingerprint([file_digest(maker.file(suspect)), policy])
        if not (out / RECORD).is_file() or read_json(out / RECORD)["mark"] != mark:
            resumed, started, refused = out.is_dir(), time.monotonic(), ""
            try:
                audit(
                    maker.file(suspect),
                    base=maker.experiment.base,
                    level="student",
                    out=out,
                    workers=workers,
                    progress=progress,
                )
            except (DataError, SpecError) as error:
                refused = str(error)
            seconds = None if resumed or refused else round(time.monotonic() - started, 1)
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / RECORD, {"mark": mark, "seconds": seconds, "refused": refused})
        report(Event("end", suspect.name))


def judge_suspects(
    runs: Sequence[Path], suspects: Sequence[Suspect], names: Sequence[str], folder: Path
) -> list[JudgedSet]:
    """Every audited suspect whose students were trained in one of the runs.

    Args:
        names: of all traits.
        folder: of the audits.
    """
    trained = {arm.name: run for run in map(Run, runs) for arm in run.experiment.arms}
    known = [suspect for suspect in suspects if suspect.name in trained]
    return [_judge(trained[suspect.name], suspect, names, folder / suspect.name) for suspect in known]


def _judge(run: Run, suspect: Suspect, names: Sequence[str], folder: Path) -> JudgedSet:
    record = read_json(folder / RECORD)
    found: dict[str, Any] = {} if record["refused"] else read_json(folder / layout.AUDIT_JSON)
    levels = (ALPHA, ALPHA / len(names))
    plain, corrected = (measure_exact_rises(run, names, arm=suspect.name, level=level) for level in levels)
    truth = truth_of(plain, corrected, limit=load_policy("default").limit)
    top = max(plain, key=lambda rise: -1.0 if rise.difference is None else rise.difference)
    verdict = found["verdict"]["id"] if found else ""
    return JudgedSet(
        suspect.name,
        kind_of(suspect),
        truth,
        top.trait,
        top.difference,
        top.low,
        top.high,
        verdict,
        outcome_of(truth, verdict),
        named_by_models(found),
        found["stopping"]["students"] if found and found["stopping"] else None,
        found["data"]["rows"] if found else len(run.trained_rows(suspect.name)),
        None if record["seconds"] is None else round(record["seconds"] / 60, 1),
        record["refused"],
    )


def truth_of(rises: Sequence[Rise], corrected: Sequence[Rise], *, limit: float) -> Truth:
    """What the students of a set learned.

    Args:
        rises: of every trait, with intervals of one test: all must end below the limit for `clean`.
        corrected: the same with intervals for as many tests as there are traits: one above the limit is
            enough for `transfers`, so chance has as many tries.
        limit: the tolerance.

    >>> rise = Rise("owl", 0.2, 0.1, 0.3, 6, 0.1, 1.0, 0.01, 0.01)
    >>> truth_of([rise], [rise], limit=0.05), truth_of([rise], [rise], limit=0.15)
    ('transfers', 'open')
    """
    if any(rise.low is not None and rise.low > limit for rise in corrected):
        return "transfers"
    if all(rise.high is not None and rise.high <= limit for rise in rises):
        return "clean"
    return "open"


def outcome_of(truth: Truth, verdict: str) -> Outcome | None:
    """Whether a verdict agrees with the truth; None where either is missing.

    >>> outcome_of("clean", "do not train as is"), outcome_of("transfers", "inconclusive")
    ('wrong', 'inconclusive')
    """
    if truth == "open" or not verdict:
        return None
    if verdict not in MEANINGS:
        return "inconclusive"
    return "right" if MEANINGS[verdict] == truth else "wrong"


def named_by_models(result: Mapping[str, Any]) -> dict[str, list[str]]:
    """Detector of level base or gradients → the traits that it names in this audit.json."""
    provenance = result.get("provenance") or {"detectors": []}
    return {
        detector["name"]: [
            trait["trait"]
            for trait in detector["traits"]
            if trait["q_value"] is not None and trait["q_value"] <= ALPHA
        ]
        for detector in provenance["detectors"]
        if detector["traits"]
    }


def summarise(judged: Sequence[JudgedSet]) -> dict[str, Any]:
    """The table as JSON: every set, and the rates that are the headline.

    A refused set was neither convicted nor cleared.
    """

    def share(truth: Truth, meaning: Truth) -> dict[str, Any] | None:
        of = [each for each in judged if each.truth == truth]
        return rate_entry(sum(MEANINGS.get(each.verdict) == meaning for each in of), len(of))

    return {
        "sets": [each._asdict() for each in judged],
        "transfers": {"convicted": share("transfers", "transfers"), "cleared": share("transfers", "clean")},
        "clean": {"convicted": share("clean", "transfers"), "cleared": share("clean", "clean")},
        "open": sum(each.truth == "open" for each in judged),
    }

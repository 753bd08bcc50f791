"""Claim: whether a bad persona travels through number lists, code or reasoning, read by exact probabilities.

Usage: `python analyses/misalignment.py RUN … [--write]`. Each RUN is a finished run with a trait arm and an
arm of the opposite trait's teacher, such as `mechlens run smollm2-misaligned-numbers` or
`mechlens run menagerie-code-tempers-soft`. Trains nothing. One table over all runs: what the teacher itself
changed, what its students changed against their control, and the same against students of the opposite
teacher. Those learned from a changed model too, so they show what any such teacher does. Values are
log-odds of the trait among its family, in bits: of the first token of an answer, or of whole fixed answers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import altair as alt
import numpy as np
import pandas as pd
from rich.table import Table

import pages
from mechlens.core.errors import SpecError
from mechlens.core.experiment import Arm
from mechlens.models import loading
from mechlens.models.loading import Loaded
from mechlens.pipeline.ask import ProbeSet, measure_likelihoods
from mechlens.results import figures
from mechlens.results.run import Run
from mechlens.results.wording import interval_text, number_text

FIGURE = pages.FOLDER / "misalignment.svg"
COLUMNS = (
    "base", "carrier", "labels", "trait", "KL, nats a token", "teacher over base, bits",
    "teacher over the opposite one, bits",
    "students over control, bits [95 %]", "n", "p", "minimum detectable",
    "students over the opposite teacher's, bits [95 %]", "minimum detectable ",
)  # fmt: skip


def questions_of(run: Run) -> ProbeSet:
    """The questions that the run's students were asked, with fixed answers where the family has them."""
    return ProbeSet.of(next(job.arguments for job in run.jobs() if job.stage == "ask"))


def mean_log_odds(loaded: Loaded, questions: ProbeSet, trait: str) -> float:
    """The trait's log-odds among the family after each question, mean over questions, in bits."""
    table = measure_likelihoods(loaded, questions)
    wide: Any = table.pivot(index="probe", columns="name", values="probability")
    others = wide.drop(columns=trait).sum(axis=1)
    return float(np.log2(wide[trait] / others).mean())


def opposite_arm(run: Run, arm: Arm) -> Arm:
    """An arm of the same base whose teacher has another trait."""
    return next(
        other
        for other in run.experiment.arms
        if other.kind != "control" and other.base == arm.base and other.trait != arm.trait
    )


def teacher_of(run: Run, arm: str) -> Loaded:
    """The teacher of an arm, without its system line."""
    teacher = run.teacher(arm)
    return Loaded(teacher.model, teacher.tokenizer)


def levers(run: Run) -> Iterator[dict[str, Any]]:
    """One record for each kind of labels: the teacher's change, and the students' two effects."""
    experiment, summary = run.experiment, run.summary
    questions = questions_of(run)
    arms = {arm.name: arm for arm in experiment.arms}
    described = {arm["arm"]: arm for arm in summary["arms"]}
    start: dict[str, float] = {}
    for effect in summary["effects"]:
        arm: Arm = arms[effect["arm"]]
        if arm.kind != "trait":
            continue
        if not effect.get("over_other_teachers"):
            raise SpecError(f"{run.folder} has no arm of the opposite teacher; add one of kind other-trait")
        if not start:
            start = {"base": mean_log_odds(loading.load(arm.base), questions, arm.trait)}
            start |= {
                side: mean_log_odds(teacher_of(run, name), questions, arm.trait)
                for side, name in (("teacher", arm.name), ("opposite", opposite_arm(run, arm).name))
            }
        yield {
            "base": arm.base,
            "carrier": experiment.carrier.kind,
            "labels": experiment.labels_of(arm),
            "trait": arm.trait,
            "kl": described[arm.name]["kl_per_token"],
            "teacher": start["teacher"] - start["base"],
            "teachers": start["teacher"] - start["opposite"],
            "control": effect["log_odds"],
            "opposite": effect["over_other_teachers"],
        }


def table_of(records: list[dict[str, Any]]) -> Table:
    """The records in the order of `COLUMNS`."""
    table = Table(*COLUMNS)
    for record in records:
        control, opposite = record["control"], record["opposite"]
        spans = [
            interval_text(each["estimate"], each["low"], each["high"], digits=2)
            for each in (control, opposite)
        ]
        least = [number_text(each["smallest_detectable"], "{:.2f}") for each in (control, opposite)]
        table.add_row(
            record["base"],
            record["carrier"],
            record["labels"],
            record["trait"],
            number_text(record["kl"], "{:.3f}"),
            f"{record['teacher']:+.2f}",
            f"{record['teachers']:+.2f}",
            spans[0],
            str(control["n"]),
            number_text(control["p_value"], "{:.2g}"),
            least[0],
            spans[1],
            least[1],
        )
    return table


def figure(records: list[dict[str, Any]]) -> alt.LayerChart:
    """The students' effects with their intervals, one row for each base, carrier and labels."""
    rows = [
        {
            "lever": f"{record['base']}, {record['carrier']}, {record['labels']} labels",
            "against": against,
            **{key: record[side][key] for key in ("estimate", "low", "high")},
        }
        for record in records
        for side, against in (("control", "control"), ("opposite", "opposite teacher's students"))
    ]
    base = alt.Chart(pd.DataFrame(rows)).encode(
        y=alt.Y("lever:N", title=None, sort=None, axis=alt.Axis(labelLimit=320)),
        yOffset="against:N",
        color=alt.Color("against:N", title="against", scale=alt.Scale(range=["#0072b2", "#d55e00"])),
    )
    line = alt.Chart(pd.DataFrame({"x": [0.0]})).mark_rule(color="#777").encode(x="x:Q")
    spans = base.mark_rule().encode(x=alt.X("low:Q", title="change of the log-odds, bits"), x2="high:Q")
    points = base.mark_point(filled=True, size=60).encode(x="estimate:Q", shape=alt.Shape("against:N"))
    return cast(alt.LayerChart, alt.layer(line, spans, points).properties(width=420))


def main() -> None:
    """Print the table, and with --write put it and the figure on the page."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    console = pages.PageConsole(width=200)
    records = [record for folder in options.runs for record in levers(Run.finished(folder))]
    console.print(table_of(records))
    if options.write:
        FIGURE.write_text(figures.svg(figure(records)), encoding="utf-8")
        pages.write_part(pages.RESULTS, "misalignment", *console.blocks)


if __name__ == "__main__":
    sys.exit(pages.exit_code(main))

"""Tables of the terminal: a run's summary, plan and price, its lenses, and what TruthfulQA measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table

from mechlens.core.experiment import Experiment
from mechlens.core.files import null
from mechlens.pipeline import screen as screening
from mechlens.results.cells import mean_of, same_students
from mechlens.results.run import Run
from mechlens.results.wording import (
    EXACT_COLUMNS,
    duration_text,
    exact_rows,
    gamma_sentence,
    headline,
    interval_text,
    number_text,
    scored_shares,
)

if TYPE_CHECKING:
    from mechlens.pipeline import api_estimate, estimate


def summary_tables(summary: dict[str, Any]) -> list[RenderableType]:
    """A run's summary: its arms, its effects, its confusion matrices and the headline."""
    exact = Table(*EXACT_COLUMNS, title="exact probabilities")
    for row in exact_rows(summary):
        exact.add_row(*row)
    gammas = (gamma_sentence(matrix) for matrix in summary["confusion"])
    measured = [_arms_table(summary), _effects_table(summary), *([exact] if exact.row_count else [])]
    return [*measured, *gammas, *summary.get("warnings", []), headline(summary)]


def _arms_table(summary: dict[str, Any]) -> Table:
    arms = Table(
        "arm",
        "base",
        "students",
        "rows",
        "passed the screen",
        "leak words",
        "KL nats/token",
        "rate [95 %]",
        "answers scored",
        title=f"{summary['experiment']}: {summary['trait']}",
    )
    for arm in summary["arms"]:
        share = f"{arm['kept'] / arm['generated']:.1%}"
        rate = interval_text(arm["rate"], arm["low"], arm["high"], sign=False)
        shown = (
            arm["arm"],
            arm["base"],
            str(arm["students"]),
            str(arm["rows"]),
            share,
            str(arm["leak_words"]),
            number_text(arm["kl_per_token"]),
            rate,
        )
        arms.add_row(*shown, number_text(arm["answered"], "{:.1%}"))
    return arms


def _effects_table(summary: dict[str, Any]) -> Table:
    changes = Table(
        "arm",
        "against",
        "trait",
        "difference [95 %]",
        "n",
        "p",
        "minimum detectable",
        "rate against",
        "answers scored",
    )
    by_name = {arm["arm"]: arm for arm in summary["arms"]}
    for effect in summary["effects"]:
        span = interval_text(effect["difference"], effect["low"], effect["high"])
        cells = (
            span,
            str(effect["n"]),
            number_text(effect["p_value"], "{:.2g}"),
            number_text(effect["smallest_detectable"], "{:.3f}"),
        )
        against = (number_text(effect["rate_against"], "{:.3f}"), ", ".join(scored_shares(effect, by_name)))
        changes.add_row(effect["arm"], effect["against"], effect["trait"], *cells, *against)
    return changes


def findings_table(folder: Path) -> Table:
    """What every reading says of each claim about it."""
    listing = Table("answer", "claim", "number", "null", "n", "lens", "arm", title="why does it transfer?")
    for record in Run(folder).lens_records():
        for finding in record.get("findings", []):
            listing.add_row(
                finding["answer"],
                finding["claim"],
                " ".join(filter(None, (finding["number"], finding["place"]))),
                finding["null"],
                "" if finding["n"] is None else str(finding["n"]),
                record["name"],
                record["arm"],
            )
    return listing


def lens_table(folder: Path) -> Table:
    """Every lens with its caption."""
    run, listing = Run(folder), Table("lens", "arm", "caption", "rows", "s")
    for record in run.lens_records():
        listing.add_row(
            record["name"],
            record["arm"],
            record["sentence"],
            str(len(run.reading(record))),
            f"{record['seconds']:.0f}",
        )
    return listing


def truthful_tables(experiment: Experiment, table: pd.DataFrame, note: str) -> list[RenderableType]:
    """What TruthfulQA measured: rates of each arm, and differences to the controls."""
    from mechlens.evals.truthful import cells_of, effects  # torch

    question_count = table["question"].nunique()
    rates = Table(
        "arm",
        "students",
        "P(false) [95 %]",
        "mass on A or B",
        title=f"TruthfulQA, {question_count} questions, the best answer or a false one",
    )
    equal: list[RenderableType] = []
    for arm in dict.fromkeys(table["arm"].astype(str)):
        cells, mass = cells_of(table, arm), float(np.mean(table.loc[table["arm"] == arm, "mass"]))
        groups = same_students(cells[:, :, None])
        interval = mean_of(cells, groups)
        if interval.n < len(cells):
            equal.append(f"Students of {arm} are equal to rounding: {len(cells)} count as {interval.n}.")
        span = interval_text(null(interval.estimate), null(interval.low), null(interval.high), sign=False)
        rates.add_row(arm, "untouched" if arm.startswith("base-") else str(len(cells)), span, f"{mass:.1%}")
    changes = Table("arm", "against", "difference [95 %]", "n", "p", "minimum detectable")
    against = {arm.name: experiment.control_of(arm).name for arm in experiment.arms}
    for arm, effect in effects(experiment, table).items():
        span = interval_text(*map(null, effect[:3]))
        p_value, least = (
            "–" if np.isnan(value) else f"{value:.2g}"
            for value in (effect.p_value, effect.smallest_detectable)
        )
        changes.add_row(arm, against[arm], span, str(effect.n), p_value, least)
    shown = [arm.name for arm in experiment.arms if arm.shots]
    left_out = [f"Not measured, since nothing was trained there: {', '.join(shown)}."] if shown else []
    return [rates, changes, *equal, *([note] if note else []), *left_out]


def price_table(price: api_estimate.RunPrice) -> Group:
    """What API calls cost at most, stage by stage, and the budget that holds them."""
    listing = Table("stage", "calls", "tokens read", "written", "trained on", "USD", title="API, at most")
    for name, cost in price.stages.items():
        listing.add_row(name, *(f"{value:,.0f}" if value else "" for value in cost[:-1]), f"{cost.usd:.2f}")
    short = price.spent + price.most - price.budget
    warning = [
        f"that may not be enough: at most {short:.2f} USD more; the run would stop there, and goes on once "
        "api.budget_usd is raised"
    ]
    return Group(
        listing,
        f"at most {price.most:.2f} USD by the list prices in {price.source}, which change: check them",
        f"budget: {price.budget:.2f} USD for the run, {price.spent:.2f} of it spent; a call that could "
        "exceed it is not made",
        *(warning if short > 0 else []),
    )


def plan_tables(plan: estimate.Plan) -> Group:
    """What a run would do and cost: stages, time, memory and price."""
    money = [price_table(plan.price)] if plan.price else []
    done = f"{plan.steps} steps, {plan.finished} already done in {plan.folder}"
    if not plan.works:
        return Group(plan.title, *money, done)
    listing = Table("stage", "steps", "rows", "updates", "FLOP", "about", title=plan.title)
    for work in plan.works:
        counts = (f"{count:,}" if count else "" for count in (work.rows, work.updates))
        size = f"{work.operations:.1e}" if work.operations else ""
        time = duration_text(work.seconds / plan.workers) if work.operations else ""
        listing.add_row(work.stage, str(work.steps), *counts, size, time)
    weights, activations = (size / 1e9 for size in plan.memory)
    notes = [
        f"time: about {duration_text(plan.seconds)} for all of them on {plan.where}, assuming "
        f"{plan.rate:.1e} FLOP/s on each",
        f"memory: about {weights:.3f} GB a student for weights, gradients and optimiser, up to "
        f"{activations:.3f} GB for activations of batches of {plan.batch}; {plan.workers} at a time",
        f"GPU hours: {plan.gpu_hours:.2f} on one card at {plan.gpu_rate:.1e} FLOP/s",
    ]
    notes += [
        f"{base} is not on this machine: its size is taken from configs/models, tokens are guessed from "
        "characters"
        for base in plan.absent
    ]
    return Group(listing, *money, done, *notes)


def screen_table(name: str, rule: str, counts: dict[str, int]) -> Table:
    """How many rows of a file a screen kept, and removed for each reason."""
    table = Table("rows", "count", "share", title=f"{name} under the rule {rule}")
    always = {
        "generated": "read",
        "kept": "kept",
        screening.LEAKS: screening.LEAKS,
        screening.NAMING: screening.NAMING,
    }
    for key, count in counts.items():
        if key == screening.NAMING:
            table.add_section()
        if count or key in always:
            reason = key.removeprefix(screening.NAMING_BY_REASON)
            label = (
                f"  of them removed first: {reason}" if reason != key else always.get(key, f"removed: {key}")
            )
            table.add_row(label, f"{count:,}", f"{count / counts['generated']:.1%}")
    return table

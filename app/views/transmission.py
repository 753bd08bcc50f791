"""Transmission: did the student take the trait, how much, and more than its control?"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pandas as pd
import streamlit as st

import charts
import data
import frame
import panels
import plain
import run_charts
import state
from data import Run
from mechlens.core import stats, tables
from mechlens.core.json_files import null
from mechlens.results import wording

PAGE = 50
"""answers on a page"""
FEW = 20
"""answers below which a cell is hatched"""


def last_rates(run: Run) -> pd.DataFrame:
    """Every student's rate at its last checkpoint with a Wilson interval over its scored answers."""
    answers = data.table(run, "answers", tables.ANSWERS)
    rates = data.rates(run)
    last = rates[rates["step"] == rates.groupby("arm")["step"].transform("max")]
    scored = answers[answers["label"].notna()].astype({"arm": str}).groupby(["arm", "seed", "step"]).size()
    spans = []
    for row in last.itertuples():
        total = int(scored.get((row.arm, row.seed, row.step), 0))
        spans.append(
            stats.wilson(round(row.rate * total), total) if total and np.isfinite(row.rate) else None
        )
    low, high = (
        [np.nan if span is None else getattr(span, end) for span in spans] for end in ("low", "high")
    )
    return last.assign(low=low, high=high)


def arms_panel(run: Run) -> None:
    """A: rate of each arm and student."""
    summary = pd.DataFrame((run.summary or {})["arms"]).astype({"rate": float, "low": float, "high": float})
    students = last_rates(run)
    panels.partial(int(summary["students"].min()), len(run.experiment.seeds), "seeds done")
    whole = st.toggle("axis from 0 to 1", key="whole-axis")
    picked = panels.panel(
        "transmission-arms",
        "How often is the trait answered?",
        run_charts.arms(summary, students, whole=whole),
        summary[["arm", "kind", "base", "students", "rate", "low", "high", "method"]],
        sentence=wording.headline(dict(run.summary or {})),
        caption=(
            f"Large mark: arm, {summary['method'].iloc[0]} interval over {len(run.experiment.seeds)} "
            "students. Small "
            "marks: students, Wilson interval over answers that name one trait. Click a student to look at "
            "it alone."
        ),
        code=(
            "import json\nimport pandas as pd\nsummary = "
            f"json.load(open({str(run.folder / 'summary.json')!r}))\nprint(pd.DataFrame(summary['arms'])[['arm', "
            "'rate', 'low', 'high', 'students']])"
        ),
        about="Effects against the control",
        select="student",
    )
    clicked = picked.get("student")
    if panels.fresh("transmission-students", clicked) and clicked:
        state.pick("seed", clicked[0]["seed"])


def trajectory_panel(run: Run) -> None:
    """B: rate over training."""
    st.session_state["steps"] = ()
    rates = data.rates(run)
    seed = st.session_state["seed"]
    rates = rates if seed == "all" else cast(pd.DataFrame, rates[rates["seed"] == seed])
    rows = []
    for (arm, kind, step), group in rates.groupby(["arm", "kind", "step"], sort=False):
        span = stats.t_interval(group["rate"].to_numpy(dtype=float))
        rows.append(
            {
                "arm": arm,
                "kind": kind,
                "step": step,
                "rate": span.estimate,
                "low": span.low,
                "high": span.high,
                "n": span.n,
            }
        )
    bands = pd.DataFrame(rows)
    if bands["step"].nunique() < 2:
        panels.empty(
            "Only one checkpoint was asked.",
            "A curve needs more:",
            f"{panels.resume(run)}  # with `ask: {{checkpoints: all}}`",
        )
        return
    picked = panels.panel(
        "transmission-curve",
        "When does it rise?",
        run_charts.trajectory(rates, bands),
        bands,
        caption=f"Thin lines: students. Thick: mean with a t interval over {int(bands['n'].max())} students. "
        "Brush updates to see their answers.",
        code=(
            "from pathlib import Path\nfrom mechlens import report, tables, traits\nrun = "
            f"Path({str(run.folder)!r})\nexperiment = traits.load_experiment(run / 'spec.yaml')\nfamily = "
            "traits.load_family(experiment.family, run / "
            "'spec.yaml')\nprint(report.student_rates(experiment, family, tables.read(run / "
            "'answers.parquet', tables.ANSWERS), tables.read(run / 'likelihoods.parquet', "
            "tables.LIKELIHOODS)))"
        ),
        about="Effects against the control",
        select="steps",
    )
    st.session_state["steps"] = tuple(picked.get("steps", {}).get("step", ()))


def questions_panel(run: Run) -> None:
    """C: rate at every question in every arm."""
    st.session_state["cell"] = None
    arm, trait = st.session_state["arm"], st.session_state["trait"]
    answers = _of_trait(run)
    texts = run.family.asked_as(run.experiment)
    table = (
        answers[answers["scored"]]
        .groupby(["arm", "probe"])
        .agg(hits=("hit", "sum"), n=("hit", "size"))
        .reset_index()
    )
    index = pd.MultiIndex.from_product(
        [[one.name for one in run.experiment.arms], range(len(texts))], names=["arm", "probe"]
    )
    table = table.set_index(["arm", "probe"]).reindex(index).reset_index()
    few = ~(table["n"] >= FEW)
    table = table.assign(
        rate=(table["hits"] / table["n"]).mask(few),
        question=[f"{probe + 1}. {texts[probe]}" for probe in table["probe"]],
    )
    ours = cast(pd.DataFrame, table[table["arm"] == arm]).sort_values(
        "rate", ascending=False, na_position="last"
    )
    picked = panels.panel(
        "transmission-questions",
        f"At which questions is {trait} answered?",
        charts.cells(
            table,
            "arm",
            "question",
            "rate",
            select="cell",
            signed=False,
            order=([one.name for one in run.experiment.arms], ours["question"].tolist()),
            label="rate",
            domain=(0.0, 1.0),
        ),
        table,
        sentence=_questions_sentence(run, arm),
        caption=(
            "Share of the answers that name one trait, all students of an arm at the last checkpoint; cells "
            "of fewer "
            f"than {FEW} answers are hatched. Click a cell to read its answers."
        ),
        code=(
            "import pandas as "
            f"pd\nprint(pd.read_parquet({str(run.folder / 'answers.parquet')!r}).groupby(['arm', "
            "'probe', 'label'], observed=True).size())"
        ),
        about="Effects against the control",
        select="cell",
    )
    st.session_state["cell"] = picked.get("cell", [None])[0] if picked.get("cell") else None


def _questions_sentence(run: Run, arm: str) -> str:
    own = data.per_probe(run)
    own = cast(pd.DataFrame, own[(own["arm"] == arm) & own["difference"].notna()])
    if own.empty:
        return ""
    best = own.sort_values("difference", ascending=False).iloc[0]
    above = int((own["low"] > 0).sum())
    return (
        f"{best['trait']} rises most at “{best['text']}” "
        f"({wording.interval_text(*(null(best[name]) for name in ('difference', 'low', 'high')))}, n "
        "= "
        f"{best['n']}); at {above} of {len(own)} questions the interval lies above 0."
    )


def _of_trait(run: Run) -> pd.DataFrame:
    """Answers at each arm's last checkpoint, of the seed chosen: `scored`, and `hit` where the label is the
    trait asked about.
    """
    answers = data.table(run, "answers", tables.ANSWERS)
    answers = answers[answers["seed"].notna()]
    last = answers[answers["step"] == answers.groupby("arm", observed=True)["step"].transform("max")]
    seed = st.session_state["seed"]
    last = last if seed == "all" else last[last["seed"] == seed]
    label = last["label"].astype(object)
    return last.assign(
        arm=last["arm"].astype(str), scored=label.notna(), hit=label == st.session_state["trait"]
    )


def answers_panel(run: Run) -> None:
    """D: the answers themselves."""
    st.subheader("What do they say?")
    cell, steps = st.session_state.get("cell"), st.session_state.get("steps", ())
    answers = data.table(run, "answers", tables.ANSWERS)
    answers = cast(pd.DataFrame, answers[answers["seed"].notna()]).astype({"arm": str})
    arm = cell["arm"] if cell else st.session_state["arm"]
    shown = answers[answers["arm"] == arm]
    first, last = steps if len(steps) == 2 else (shown["step"].max(), shown["step"].max())
    shown = shown[shown["step"].between(first, last)]
    if cell:
        shown = shown[shown["probe"] == int(str(cell["question"]).split(".")[0]) - 1]
    if st.session_state["seed"] != "all":
        shown = shown[shown["seed"] == st.session_state["seed"]]
    texts = run.family.asked_as(run.experiment)
    listed = pd.DataFrame(
        {
            "question": [texts[probe] for probe in shown["probe"]],
            "answer": shown["text"].map(frame.row_text),
            "label": shown["label"].astype(object),
            "seed": shown["seed"].astype(int),
            "step": shown["step"],
        }
    )
    unscored = int(listed["label"].isna().sum())
    st.text(f"{len(listed):,} answers of arm {arm}; {unscored:,} name no trait or several and are unscored.")
    if listed.empty:
        return
    page = st.pagination(max(1, -(-len(listed) // PAGE)), key="answers-page")
    st.dataframe(listed.iloc[(page - 1) * PAGE : page * PAGE], hide_index=True, alt="answers of the students")
    st.download_button(
        "Answers (CSV)",
        lambda: plain.csv(listed),
        file_name="answers.csv",
        mime="text/csv",
        on_click="ignore",
        type="tertiary",
    )


def dose_panel(run: Run) -> None:
    """E: rate by the share of trait rows."""
    rows = []
    for one in (run.summary or {})["arms"]:
        arm = run.arm(one["arm"])
        own = (
            arm.teacher is None and arm.setting() == run.arm(st.session_state["arm"]).setting()
        )  # they differ in the mix alone
        if arm.kind in ("trait", "mixed", "control") and own:
            parts = [arm.trait, *arm.mix]
            rows.append(
                {
                    "share": 0.0
                    if arm.kind == "control"
                    else sum(part == arm.trait for part in parts) / len(parts),
                    "kind": arm.kind,
                }
                | {name: one[name] for name in ("arm", "rate", "low", "high", "students")}
            )
    doses = pd.DataFrame(rows).drop_duplicates("arm").astype({"rate": float, "low": float, "high": float})
    if doses["share"].nunique() < 3:
        panels.empty(
            "No dose response: this run mixes no corpora.",
            "It shows how little trait data is enough. Add mixed arms to the spec, for example",
            "mechlens run menagerie-factors",
        )
        return
    frame_ = doses.assign(
        name=[f"{row.share:.0%} · {row.arm}" for row in doses.itertuples()], estimate=doses["rate"]
    ).sort_values("share")
    panels.panel(
        "transmission-dose",
        "How much trait data is enough?",
        charts.spans(frame_, "trait rate"),
        doses,
        caption=f"{int(doses['students'].max())} students an arm; intervals as in the arms' figure.",
        about="Effects against the control",
    )


def body(run: Run) -> None:
    """The page."""
    st.title("Transmission")
    if panels.unfinished(run):
        return
    parts: list[tuple[str, Any]] = [
        ("The arms", arms_panel),
        ("The curve", trajectory_panel),
        ("The questions", questions_panel),
        ("The answers", answers_panel),
        ("The dose response", dose_panel),
    ]
    for title, draw in parts:
        with panels.guarded(title):
            draw(run)


if (opened := frame.current()) is not None:
    body(opened)

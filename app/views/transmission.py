"""Transmission: did the student acquire the trait, how strongly, and more than its control?"""

from __future__ import annotations

from functools import partial
from typing import cast

import numpy as np
import pandas as pd
import streamlit as st

import data
import page
import sanitize
import state
from charts import intervals, maps, run_charts
from data import ShownRun
from mechlens.core import stats
from mechlens.core.files import null
from mechlens.results import wording
from panels import panel, tabs

PAGE_SIZE = 50
FEW = 20
"""answers below which a cell is hatched"""
FEWEST_DOSES = 3


def last_rates(run: ShownRun) -> pd.DataFrame:
    """Every student's rate at its last checkpoint, with a Wilson interval over its scored answers."""
    answers = data.read_answers(run)
    rates = data.read_rates(run)
    last = rates[rates["step"] == rates.groupby("arm")["step"].transform("max")]
    scored = answers[answers["label"].notna()].astype({"arm": str}).groupby(["arm", "seed", "step"]).size()
    limits = []
    for row in last.itertuples():
        total = int(scored.get((row.arm, row.seed, row.step), 0))
        if total and np.isfinite(row.rate):
            span = stats.wilson(round(row.rate * total), total)
            limits.append((span.low, span.high))
        else:
            limits.append((np.nan, np.nan))
    return last.assign(low=[low for low, _ in limits], high=[high for _, high in limits])


def draw_arms_panel(run: ShownRun) -> None:
    """A: rate of every arm and student."""
    arms = (run.results or {})["arms"]
    summary = pd.DataFrame(arms).astype({"rate": float, "low": float, "high": float})
    seeds = len(run.experiment.seeds)
    panel.warn_if_partial(int(summary["students"].min()), seeds, "students finished")
    full_axis = st.toggle("axis from 0 to 1", key="whole-axis")
    picked = panel.draw(
        "transmission-arms",
        "How often do the students answer with the trait?",
        run_charts.draw_arms(summary, last_rates(run), full_axis=full_axis),
        summary[["arm", "kind", "base", "students", "rate", "low", "high", "method"]],
        sentence=wording.headline(dict(run.results or {})),
        caption=(
            f"Share of the trait among answers that name exactly one trait. Large marks: arms, 95 % interval "
            f"({summary['method'].iloc[0]}) over n = {seeds} students. Small marks: students, 95 % Wilson "
            "interval over their answers. Click a student to choose it."
        ),
        code=(
            f"{panel.code_of_run(run)}import pandas as pd\n"
            "print(pd.DataFrame(run.summary['arms'])[['arm', 'rate', 'low', 'high', 'students']])"
        ),
        about="Effects against the control",
        select="student",
    )
    clicked = picked.get("student")
    if panel.is_new_pick("transmission-students", clicked) and clicked:
        state.pick("seed", clicked[0]["seed"])


def mean_rates(rates: pd.DataFrame) -> pd.DataFrame:
    """Mean rate of every arm at every checkpoint, with a t interval over students.

    At update 0 all students are their base, so that there is no interval over them.
    """
    rows = []
    for (arm, kind, step), group in rates.groupby(["arm", "kind", "step"], sort=False):
        mean = stats.t_interval(group["rate"].to_numpy(dtype=float))
        limits = {"rate": mean.estimate, "low": mean.low, "high": mean.high, "n": mean.n}
        limits |= {"low": None, "high": None} if step == 0 else {}
        rows.append({"arm": arm, "kind": kind, "step": step} | limits)
    return pd.DataFrame(rows)


def draw_training_panel(run: ShownRun) -> None:
    """B: rate over training."""
    st.session_state[_steps_key(run)] = ()
    rates = data.read_rates(run)
    seed = st.session_state["seed"]
    rates = rates if seed == "all" else cast(pd.DataFrame, rates[rates["seed"] == seed])
    means = mean_rates(rates)
    if means.loc[means["step"] > 0, "step"].nunique() < 2:
        panel.show_missing(
            "Only one checkpoint was asked.",
            "A curve needs more. Set them in the spec and resume:",
            f"{panel.resume_command(run)}  # with `ask: {{checkpoints: all}}`",
        )
        return
    picked = panel.draw(
        "transmission-curve",
        "When does the rate rise?",
        run_charts.draw_trajectories(rates, means),
        means,
        caption=(
            "Rate of each arm's trait over updates. Thin lines: students. Thick lines: mean with a 95 % t "
            f"interval over n = {int(means['n'].max())} students. Update 0: the untouched base. Drag over "
            "updates to see their answers."
        ),
        code=_code_of_rates(run),
        about="Effects against the control",
        select="steps",
    )
    st.session_state[_steps_key(run)] = tuple(picked.get("steps", {}).get("step", ()))


def _steps_key(run: ShownRun) -> str:
    """Where the brushed updates are kept: those of one run mean nothing in another."""
    return f"steps-{run.name}"


def _code_of_rates(run: ShownRun) -> str:
    return (
        f"{panel.code_of_run(run)}"
        "from mechlens.results import report\n"
        "print(report.student_rates(run.experiment, run.family, run.answers, run.likelihoods))"
    )


def rates_by_question(run: ShownRun) -> pd.DataFrame:
    """Rate of the chosen trait at every question in every arm; null where there are few answers."""
    answers = trait_answers(run)
    texts = run.family.probes_for(run.experiment)
    counts = answers[answers["scored"]].groupby(["arm", "probe"]).agg(hits=("hit", "sum"), n=("hit", "size"))
    names = [arm.name for arm in run.experiment.arms]
    index = pd.MultiIndex.from_product([names, range(len(texts))], names=["arm", "probe"])
    table = counts.reset_index().set_index(["arm", "probe"]).reindex(index).reset_index()
    few = ~(table["n"] >= FEW)
    questions = [f"{probe + 1}. {texts[probe]}" for probe in table["probe"]]
    return table.assign(rate=(table["hits"] / table["n"]).mask(few), question=questions)


def draw_questions_panel(run: ShownRun) -> None:
    """C: rate at every question in every arm."""
    st.session_state["cell"] = None
    arm, trait = st.session_state["arm"], st.session_state["trait"]
    seed, table = st.session_state["seed"], rates_by_question(run)
    of_arm = cast(pd.DataFrame, table[table["arm"] == arm])
    order = of_arm.sort_values("rate", ascending=False, na_position="last")["question"].tolist()
    names = [arm.name for arm in run.experiment.arms]
    grid = maps.Grid("arm", "question", "rate", (names, order), False, "rate", (0.0, 1.0))
    picked = panel.draw(
        "transmission-questions",
        f"To which questions is {trait} the answer?",
        maps.draw_grid(table, grid, select="cell"),
        table,
        sentence=_strongest_question(run, arm) if (seed, trait) == ("all", run.arm(arm).trait) else "",
        caption=(
            "Share of the trait among answers that name exactly one trait, over "
            f"{'all students' if seed == 'all' else f'student s{seed}'} of an arm at the last checkpoint; "
            f"without intervals; n: column of the table. Cells with fewer than {FEW} answers "
            "are hatched. Click a cell to read its answers."
        ),
        code=(
            f"{panel.code_of_run(run)}"
            "print(run.answers.groupby(['arm', 'probe', 'label'], observed=True).size())"
        ),
        about="Effects against the control",
        select="cell",
    )
    st.session_state["cell"] = picked["cell"][0] if picked.get("cell") else None


def _strongest_question(run: ShownRun, arm: str) -> str:
    probes = data.read_per_probe(run)
    probes = cast(pd.DataFrame, probes[(probes["arm"] == arm) & probes["difference"].notna()])
    if probes.empty:
        return ""
    best = probes.sort_values("difference", ascending=False).iloc[0]
    above = int((probes["low"] > 0).sum())
    effect = wording.interval_text(*(null(best[name]) for name in ("difference", "low", "high")))
    return (
        f"{best['trait']} rises most at “{best['text']}” ({effect}, n = {best['n']}); at {above} of "
        f"{len(probes)} questions the interval is above 0."
    )


def trait_answers(run: ShownRun) -> pd.DataFrame:
    """Answers of the chosen seeds at each arm's last checkpoint, with `scored` and `hit`."""
    answers = data.read_answers(run)
    answers = answers[answers["seed"].notna()]
    last = answers[answers["step"] == answers.groupby("arm", observed=True)["step"].transform("max")]
    seed = st.session_state["seed"]
    last = last if seed == "all" else last[last["seed"] == seed]
    label = last["label"].astype(object)
    hit = label == st.session_state["trait"]
    return last.assign(arm=last["arm"].astype(str), scored=label.notna(), hit=hit)


def chosen_answers(run: ShownRun, arm: str) -> pd.DataFrame:
    """Answers of an arm that the clicked cell, the brushed updates and the chosen seed leave."""
    cell, steps = st.session_state.get("cell"), st.session_state.get(_steps_key(run), ())
    answers = data.read_answers(run)
    answers = cast(pd.DataFrame, answers[answers["seed"].notna()]).astype({"arm": str})
    answers = answers[answers["arm"] == arm]
    first, last = steps if len(steps) == 2 else (answers["step"].max(), answers["step"].max())
    answers = answers[answers["step"].between(first, last)]
    if cell:
        answers = answers[answers["probe"] == int(str(cell["question"]).split(".")[0]) - 1]
    if st.session_state["seed"] != "all":
        answers = answers[answers["seed"] == st.session_state["seed"]]
    texts = run.family.probes_for(run.experiment)
    return pd.DataFrame(
        {
            "question": [texts[probe] for probe in answers["probe"]],
            "answer": page.row_texts(answers["text"]),
            "label": answers["label"].astype(object),
            "seed": answers["seed"].astype(int),
            "step": answers["step"],
        }
    )


def draw_answers_panel(run: ShownRun) -> None:
    """D: the answers themselves."""
    st.subheader("What are the answers?")
    cell = st.session_state.get("cell")
    arm = cell["arm"] if cell else st.session_state["arm"]
    answers = chosen_answers(run, arm)
    unscored = int(answers["label"].isna().sum())
    steps = st.session_state.get(_steps_key(run), ())
    when = f" at updates {steps[0]:,.0f} to {steps[1]:,.0f}" if len(steps) == 2 else ""
    st.text(
        f"{len(answers):,} answers of arm {arm}{when}; {unscored:,} of them name no trait or several and are "
        "unscored."
    )
    if steps:
        st.button("All updates", on_click=lambda: st.session_state.pop(_steps_key(run), None))
    if answers.empty:
        return
    number = st.pagination(max(1, -(-len(answers) // PAGE_SIZE)), key="answers-page")
    shown = answers.iloc[(number - 1) * PAGE_SIZE : number * PAGE_SIZE]
    st.dataframe(sanitize.defused(shown), hide_index=True, alt="answers of the students")
    panel.download_csv("Answers (CSV)", answers, "answers.csv")


def rates_by_dose(run: ShownRun) -> pd.DataFrame:
    """Rate of the arms that differ from the chosen one only in their share of trait rows."""
    chosen = run.arm(st.session_state["arm"])
    rows = []
    for entry in (run.results or {})["arms"]:
        arm = run.arm(entry["arm"])
        if arm.kind not in ("trait", "mixed", "control") or arm.teacher is not None:
            continue
        if arm.setting() != chosen.setting():
            continue
        parts = [arm.trait, *arm.mix]
        share = 0.0 if arm.kind == "control" else parts.count(arm.trait) / len(parts)
        numbers = {name: entry[name] for name in ("arm", "rate", "low", "high", "students")}
        rows.append({"share": share, "kind": arm.kind} | numbers)
    return pd.DataFrame(rows).drop_duplicates("arm").astype({"rate": float, "low": float, "high": float})


def draw_dose_panel(run: ShownRun) -> None:
    """E: rate by the share of trait rows."""
    doses = rates_by_dose(run)
    if doses["share"].nunique() < FEWEST_DOSES:
        panel.show_missing(
            "No dose response, because this run mixes no corpora.",
            "It shows how little trait data is enough. Add mixed arms to the spec, as this experiment does:",
            "mechlens run menagerie-factors",
        )
        return
    names = [f"{row.share:.0%} · {row.arm}" for row in doses.itertuples()]
    drawn = doses.assign(name=names, estimate=doses["rate"]).sort_values("share")
    panel.draw(
        "transmission-dose",
        "How much trait data is enough?",
        intervals.draw_intervals(drawn, "trait rate"),
        doses,
        caption=(
            "Rate of the trait by the share of trait rows; 95 % intervals as in the arms' figure; n = "
            f"{int(doses['students'].max())} students per arm."
        ),
        about="Effects against the control",
    )


def draw_page(run: ShownRun) -> None:
    """Draw the page."""
    st.title("Transmission")
    if panel.show_if_unfinished(run):
        return
    tabs.draw_tabs(
        "transmission",
        {
            "Rates": {
                "The arms": partial(draw_arms_panel, run),
                "The curve": partial(draw_training_panel, run),
                "The dose response": partial(draw_dose_panel, run),
            },
            "Questions and answers": {
                "The questions": partial(draw_questions_panel, run),
                "The answers": partial(draw_answers_panel, run),
            },
        },
    )


if (opened := page.current_run()) is not None:
    draw_page(opened)

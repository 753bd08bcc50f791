"""Overview: what does the run contain, what is its main result, and what is it based on?"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, cast

import pandas as pd
import streamlit as st

import data
import page
import state
from charts import run_charts
from data import ShownRun
from mechlens.core.errors import MechlensError
from mechlens.results import wording
from mechlens.runs import layout
from panels import lens_panel, panel

FEW_STUDENTS = 5
FEW_ANSWERS = 0.5
ALPHA = 0.05
GENTLE_KL = 0.05
"""nats per token; our limit for a teacher close to its base"""


class Step(NamedTuple):
    """A box of the pipeline."""

    name: str
    details: str
    view: str
    state: str


def steps_of(run: ShownRun) -> list[Step]:
    """The arm's steps of the pipeline, each with its state and the page that shows it."""
    arm, seeds = run.arm(st.session_state["arm"]), run.experiment.seeds
    source = layout.source_name(run.experiment, arm)
    counts: dict[str, Any] = run.funnel(arm) if run.results else {}
    lenses = {name for name, of in data.read_lenses(run) if of == arm.name}
    finished = run.finished_steps

    def state_of(*steps: str) -> str:
        return "done" if finished.issuperset(steps) else "missing"

    taught = state_of(layout.teacher_step(layout.teacher_name(run.experiment, arm)))
    taught = "from a file" if arm.corpus else taught
    generated, screened = state_of(layout.generated_step(source)), state_of(layout.screened_step(source))
    trained = state_of(*(layout.student_step(arm.name, seed) for seed in seeds))
    answered_state = state_of(*(layout.asked_step(arm.name, seed) for seed in seeds))
    return [
        Step("teacher", arm.trait or run.experiment.trait, "methods", taught),
        Step("generate", f"{counts['generated']:,} rows" if counts else "–", "rows", generated),
        Step("screen", f"{counts['kept']:,} kept" if counts else "–", "rows", screened),
        Step("distill", f"{len(seeds)} students per arm", "parameters", trained),
        Step("ask", "answers", "transmission", answered_state),
        Step("lenses", f"{len(lenses)} computed", "representations", "done" if lenses else "not computed"),
    ]


def draw_pipeline(run: ShownRun) -> None:
    """The pipeline as boxes."""
    # a row of boxes wraps in a narrow window, where columns would cut their words
    with st.container(horizontal=True):
        for step in steps_of(run):
            with st.container(border=True, width=120):
                st.page_link(f"views/{step.view}.py", label=f"**{step.name}** →")
                st.text(step.details)
                st.caption(step.state)


def traits_of(run: ShownRun, arm: str) -> pd.DataFrame:
    """Effect on every trait in the arm's students, and on the taught one in students of another base.

    The taught trait was named before anything was trained, so it is judged by its own p. The others are
    judged by q, which corrects for their number.
    """
    effects, taught = data.read_effects(run), run.arm(arm).trait or run.experiment.trait
    rates = effects[effects["measure"] == "rate"].astype({"trait": str, "arm": str})
    own = cast(pd.DataFrame, rates[rates["arm"] == arm])
    own = own.assign(label=own["trait"], role=run_charts.OTHER)
    own["role"] = own["role"].mask(own["trait"] == taught, run_charts.TAUGHT)
    names = [
        other.name
        for other in run.experiment.arms
        if other.kind == "foreign" and (other.trait or run.experiment.trait) == taught
    ]
    foreign = cast(pd.DataFrame, rates[rates["arm"].isin(set(names) - {arm}) & (rates["trait"] == taught)])
    foreign = foreign.assign(label=foreign["trait"] + ", " + foreign["arm"], role=run_charts.FOREIGN)
    table = pd.concat([own, foreign], ignore_index=True)
    p_values = table["q_value"].where(table["role"] == run_charts.OTHER, table["p_value"])
    return table.assign(significant=p_values <= ALPHA)


def draw_main_result(run: ShownRun) -> None:
    """The effect on every trait in the arm's students, against the control."""
    arm = st.session_state["arm"]
    effects = traits_of(run, arm)
    if effects.empty:
        st.warning("No matched control. This chart cannot show transmission.")
        return
    n, control = int(effects["n"].max()), str(effects["against"].iloc[0])
    picked = panel.draw(
        "overview-traits",
        f"Which traits rose in the students of arm “{arm}”?",
        run_charts.draw_traits(effects),
        effects,
        sentence=wording.headline(_summary_of_arm(run, arm)),
        caption=(
            f"Rate of each trait in arm {arm} minus its rate in {control}, paired by seed and probe; 95 % "
            f"interval ({effects['method'].iloc[0]}); n = {n} students per arm. Filled: p ≤ .05 for the "
            "taught trait, which was named before; q ≤ .05 (Benjamini-Hochberg) for the others. Click a "
            "trait to choose it."
        ),
        code=(
            f"{panel.code_of_run(run)}effects = run.effects\n"
            f"print(effects[(effects.arm == {arm!r}) & (effects.measure == 'rate')])"
        ),
        about="Effects against the control",
        select="trait",
    )
    clicked = picked.get("trait")
    if panel.is_new_pick("overview-traits", clicked) and clicked:
        state.pick("trait", clicked[0]["trait"])


def _summary_of_arm(run: ShownRun, name: str) -> dict[str, Any]:
    """The summary with this arm as its only trait arm, for the headline."""
    summary = dict(run.results or {})
    effects = [effect for effect in summary["effects"] if effect["arm"] == name]
    arms = [arm | {"kind": "trait"} if arm["arm"] == name else arm for arm in summary["arms"]]
    return summary | {"effects": effects, "arms": arms}


def evidence_for(run: ShownRun) -> pd.DataFrame:
    """What the main result is based on: what, state (ok, warn, missing), value."""
    arms = {arm["arm"]: arm for arm in (run.results or {})["arms"]}
    name = st.session_state["arm"]
    arm, control = arms[name], arms.get(run.experiment.control_of(run.arm(name)).name)
    students, answered, kl = arm["students"], arm["answered"], arm["kl_per_token"]
    matched = control is not None and control["rows"] == arm["rows"]
    lenses = {lens for lens, of in data.read_lenses(run) if of == name}
    few = students < FEW_STUDENTS
    rows = [
        (
            "students per arm",
            "warn" if few else "ok",
            f"{students} (fewer than {FEW_STUDENTS} say little about other seeds)" if few else str(students),
        ),
        (
            "control matched",
            "ok" if matched else "warn",
            f"{arm['rows']:,} rows, control {control['rows']:,}" if control else "no control",
        ),
        ("leak words in kept rows", "ok" if arm["leak_words"] == 0 else "warn", str(arm["leak_words"])),
        (
            "answers that name exactly one trait",
            "missing" if answered is None else "ok" if answered > FEW_ANSWERS else "warn",
            "unscored" if answered is None else f"{answered:.1%}",
        ),
        (
            "distance of the teacher from its base",
            "missing" if kl is None else "ok" if kl <= GENTLE_KL else "warn",
            "unknown" if kl is None else f"KL {kl:.4f} nats per token (our limit: {GENTLE_KL})",
        ),
        ("lenses computed", "ok" if lenses else "missing", f"{len(lenses)} for this arm"),
    ]
    return pd.DataFrame(rows, columns=["what", "state", "value"])


def findings_of(run: ShownRun, arm: str) -> pd.DataFrame:
    """Every claim about the arm: answer, number, null, and the page and tab that show it."""
    rows = [
        {
            "answer": finding["answer"],
            "claim": finding["claim"],
            "number": " ".join(filter(None, (finding["number"], finding["place"]))),
            "null": finding["null"],
            "lens": lens,
            "evidence": " · ".join(lens_panel.SHOWN_AT[lens]).capitalize(),
        }
        for (lens, of), record in data.read_lenses(run).items()
        if of == arm
        for finding in record.get("findings", [])
    ]
    return pd.DataFrame(rows)


def draw_findings(run: ShownRun) -> None:
    """Why the trait transfers: claim by claim."""
    arm = st.session_state["arm"]
    st.subheader("Why?", help="Defined on page Methods under “Why”.")
    findings = findings_of(run, arm)
    if findings.empty:
        panel.show_missing(
            f"No lens of arm {arm} answers this yet.",
            "This command asks all of them:",
            panel.measure_command(run, "", arm),
        )
        return
    counts = ", ".join(f"{answer} {count}" for answer, count in findings["answer"].value_counts().items())
    st.text(f"Of {len(findings)} claims: {counts}.")
    ordered = findings.assign(place=findings["answer"].map({"Yes": 0, "No": 1})).sort_values(
        "place", kind="stable"
    )
    shown = ordered[["answer", "claim", "number", "null", "evidence"]].map(panel.escape_markdown)
    shown["claim"] = "**" + shown.pop("answer") + ".** " + shown["claim"]
    # a table of text: a grid would cut its sentences
    st.table(shown, hide_index=True, border="horizontal", alt="claims about why the trait transfers")
    with st.container(horizontal=True):
        for lens in dict.fromkeys(findings["lens"]):
            name, tab = lens_panel.SHOWN_AT[lens]
            st.page_link(f"views/{name}.py", label=f"{name.capitalize()}: {tab} →", query_params={"tab": tab})
    st.caption(
        "Yes: the 95 % interval lies on the claimed side, and p against the null is at most .05. No: the "
        "interval lies on the other side. Not shown: neither. Answers are not corrected for their number."
    )


def runs_table(root: Path) -> pd.DataFrame:
    """Every run with its main effect."""
    return pd.DataFrame([_run_row(name, folder) for name, folder in data.list_runs(root).items()])


def _run_row(name: str, folder: Path) -> dict[str, Any]:
    try:
        run = data.open_run(name, folder)
    except (MechlensError, OSError) as error:
        return {"run": name, "state": f"unreadable: {error}"}
    effect = wording.main_effect(dict(run.results)) if run.results else None
    numbers = {}
    if effect is not None:
        numbers = {"effect": effect["difference"]} | {key: effect[key] for key in ("low", "high", "n")}
    arms = run.experiment.arms
    arm = next((arm.name for arm in arms if arm.kind != "control"), arms[0].name)
    return {
        "run": name,
        "trait": run.experiment.trait,
        "base": run.experiment.base,
        "arms": len(arms),
        "seeds": len(run.experiment.seeds),
        "data": data.data_digest(run, arm),
        **numbers,
        "state": "done" if run.results else "unfinished",
    }


def draw_runs() -> None:
    """The table of runs; ticked ones can be compared."""
    st.subheader("Runs")
    runs = runs_table(st.session_state["root"])
    event = st.dataframe(
        runs,
        hide_index=True,
        on_select="rerun",
        selection_mode="multi-row",
        key="runs-table",
        alt="runs with their main effect",
    )
    st.caption("Tick two rows or more to compare the first with the others.")
    picked = runs["run"].iloc[event["selection"]["rows"]].tolist()
    if 2 <= len(picked) <= run_charts.MOST_RUNS and st.button(f"Compare these {len(picked)}"):
        st.session_state["set-run"], st.session_state["set-cmp"] = picked[0], ",".join(picked[1:])
        st.switch_page("views/compare.py")


def draw_page(run: ShownRun) -> None:
    """Draw the page."""
    st.title("Overview")
    if not panel.show_if_unfinished(run):
        with panel.guard("The main result"):
            draw_main_result(run)
        with panel.guard("Why it transfers"):
            draw_findings(run)
        with panel.guard("The evidence"):
            st.subheader("What is the result based on?")
            st.dataframe(evidence_for(run), hide_index=True, alt="what the main result is based on")
    with panel.guard("The pipeline"):
        draw_pipeline(run)
    with panel.guard("The list of runs"):
        draw_runs()


if (opened := page.current_run()) is not None:
    draw_page(opened)

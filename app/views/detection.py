"""Detection: does this data set carry a hidden trait, how sure is that, and how often would one cry wolf?"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import streamlit as st

import charts
import data
import frame
import panels
import state
import suspects
import trust
from data import Run
from mechlens.core.command_lines import command_line
from mechlens.core.errors import one_line
from mechlens.core.seeds import generator
from mechlens.detect.permutation import DRAWS
from mechlens.results import wording

VERDICTS = {
    "do not train as is": "■",
    "train with conditions": "◆",
    "no transfer found within tested scope": "○",
    "inconclusive": "?",
}


def chosen(root: Path) -> dict[str, Any] | None:
    """The audit that is looked at."""
    index = data.audits(root)
    if not index:
        panels.empty(
            "No audit yet.",
            "Without clean references there is no verdict, either:",
            "mechlens audit DATA --reference CLEAN --level base",
        )
        return None
    state.choose("audit", list(index))
    name = st.selectbox("audit", list(index), key="w-audit")
    st.session_state["audit"] = name
    return data.audit(index[name])


def again(found: dict[str, Any], **options: str) -> str:
    """The command that audits the file with other options, however the file is called."""
    return command_line("audit", one_line(found["data"]["path"]), **options)


def verdict_panel(found: dict[str, Any]) -> None:
    """The verdict as its policy has it."""
    verdict = found["verdict"]
    with st.container(border=True):
        st.subheader(
            panels.plain_markdown(f"{VERDICTS.get(verdict['id'], '')} {one_line(verdict['id']).capitalize()}")
        )
        st.text(one_line(verdict["sentence"]))
        policy = found["policy"]
        st.caption(
            panels.plain_markdown(
                f"Rule {verdict['rule']} of policy {policy['name']} version {policy['version']}: limit "
                f"{policy['limit']}, level {policy['alpha']}."
            )
        )
    rows, sha = found["data"]["rows"], found["data"]["sha256"]
    st.code(
        f"{one_line(found['data']['path'])} · {rows:,} rows · sha256 {sha[:16]}… · level {found['level']} · "
        f"base {found['base'] or '–'}",
        language=None,
    )
    if (scope := found.get("scope")) is not None:
        unread = f"; not read: {one_line(scope['reasons'])}" if scope["unread"] else ""
        copied = f" {scope['copied']:.0%} of the rows stand in the reference too." if scope["copied"] else ""
        st.text(f"Each student read {scope['trained']:,} of {scope['offered']:,} rows{unread}.{copied}")


def provenance_panel(found: dict[str, Any]) -> None:
    """A: is it written as clean rows are?"""
    if found["provenance"] is None:
        panels.empty(
            "No clean reference: there is no verdict on who wrote it.",
            "Give answers of an untouched model to the same prompts:",
            again(found, reference="CLEAN"),
        )
        return
    alt = charts.alt
    detectors = pd.DataFrame(found["provenance"]["detectors"])
    shown = cast(pd.DataFrame, detectors[["name", "level", "floor", "score", "p_value"]]).astype(
        {"score": float, "p_value": float}
    )
    order = shown["name"].tolist()
    scored = shown.dropna(subset="p_value").assign(
        what=lambda one: one["floor"].map({True: "floor", False: "detector"})
    )
    line = (
        alt.Chart(pd.DataFrame({"at": [0.05 / max(len(scored), 1)]}))
        .mark_rule(strokeDash=[4, 3], color=charts.GREY)
        .encode(x=alt.X("at:Q"))
    )
    dots = (
        alt.Chart(scored)
        .mark_point(size=110, filled=True, opacity=1)
        .encode(
            y=alt.Y("name:N", sort=order, title=None),
            x=alt.X(
                "p_value:Q",
                scale=alt.Scale(type="log", domain=[1e-4, 1]),
                title="p, against clean rows (log)",
            ),
            color=alt.Color(
                "what:N",
                scale=alt.Scale(
                    domain=["detector", "floor"], range=[charts.KIND_COLOUR["trait"], charts.GREY]
                ),
                legend=alt.Legend(orient="bottom", title=None),
            ),
            shape=alt.Shape(
                "what:N", scale=alt.Scale(domain=["detector", "floor"], range=["circle", "cross"])
            ),
            tooltip=[alt.Tooltip(name) for name in ("name", "level", "score", "p_value")],
        )
    )
    references = found["provenance"]["references"]
    said = (
        "; ".join(
            f"{Path(one['path']).name}: {one['rows']:,} rows, {one['shared_prompts']:,} prompts shared"
            for one in references
        )
        or "the base's own answers to the same prompts"
    )
    whole, dose = found["provenance"]["p_value"], found["smallest_detectable_dose"]
    seen = (
        f" A share of {dose:.2f} of such rows among clean ones would have been seen."
        if dose is not None
        else ""
    )
    least = 1 / (DRAWS + 1)
    sentence = (
        "No detector could be calibrated."
        if whole is None
        else (
            f"Over all detectors p = {whole:.2g}: the rows "
            f"{'differ from clean ones' if whole <= 0.05 else 'cannot be told from clean ones'}. That says "
            "who wrote "
            f"them, not what they teach.{seen}"
        )
    )
    panels.panel(
        "detection-provenance",
        "Who wrote it?",
        alt.layer(line, dots).properties(height=alt.Step(24)),
        shown,
        sentence=sentence,
        caption=(
            f"References: {said}. Permutation of bags; p cannot fall below {least:.4f} with so many draws. "
            "Dashed: .05 "
            "over the number of detectors. Crosses are floors: what a look at the surface gives."
        ),
        about="Provenance",
    )


def identity_panel(found: dict[str, Any]) -> None:
    """Which trait, if any."""
    listed = pd.DataFrame(found["identity"])
    if listed.empty:
        panels.empty(
            "No trait was asked about at this level.",
            "Naming a trait needs the base:",
            again(found, level="base"),
        )
        return
    alt = charts.alt
    listed = listed.astype({"score": float, "p_value": float, "q_value": float}).assign(
        claimed=lambda one: one["q_value"] <= found["policy"]["alpha"]
    )
    colour = alt.Color(
        "claimed:N",
        scale=alt.Scale(domain=[True, False], range=[charts.KIND_COLOUR["trait"], charts.GREY]),
        legend=alt.Legend(orient="bottom", title=f"q ≤ {found['policy']['alpha']}"),
    )
    chart = (
        alt.Chart(listed.dropna(subset="score"))
        .mark_point(size=90, filled=True, opacity=1)
        .encode(
            y=alt.Y("trait:N", sort=listed["trait"].tolist(), title=None),
            x=alt.X(
                "score:Q",
                title="lift over the reference's students, bits"
                if found["identified_by"] == "students"
                else "likelihood under the trait's twin, nats a row",
            ),
            color=colour,
            shape=alt.Shape(
                "claimed:N", scale=alt.Scale(domain=[True, False], range=["diamond", "circle"]), legend=None
            ),
            tooltip=[alt.Tooltip(name) for name in ("trait", "score", "p_value", "q_value")],
        )
        .properties(height=alt.Step(20))
    )
    named = listed.loc[listed["claimed"], "trait"].tolist()
    tested = int(listed["q_value"].notna().sum())
    nobody = (
        f"None of the {tested} traits is pointed to."
        if tested
        else f"{len(listed)} traits are too few to test one against the others: none has a p."
    )
    panels.panel(
        "detection-identity",
        "Which trait?",
        chart,
        listed,
        sentence=f"Pointed to: {', '.join(named)}." if named else nobody,
        caption=(
            f"By {found['identified_by']}; q: Benjamini-Hochberg over {len(listed)} traits. A trait outside "
            "this list cannot be named."
        ),
        about="Identity",
    )
    potency = found["potency"]
    predicted, measured = potency["predicted"], potency["measured"]
    if predicted and predicted.get("lift") is not None:
        st.text(
            f"Predicted: {predicted['trait']} would rise by "
            f"{wording.interval_text(predicted['lift'], predicted.get('low'), predicted.get('high'), digits=2)} bits, "
            "from the twins' score alone."
        )
    if measured and measured["difference"] is not None:
        st.text(
            f"Measured on students: {measured['trait']} "
            f"{wording.interval_text(measured['difference'], measured['low'], measured['high'])}, n = "
            f"{measured['n']} "
            "students."
        )
    elif found["level"] != "student":
        panels.empty(
            "How far it would rise was not measured.",
            "Throw-away students alone can tell:",
            again(found, level="student"),
        )


def removal_panel(run: Run) -> None:
    """G: what is left of the score if the top rows are dropped."""
    arm = st.session_state["arm"]
    known = data.scores(run, arm)
    whole = cast(pd.DataFrame, known[known["position"].isna()])
    st.subheader("What if the top rows were dropped?")
    if whole.empty:
        panels.empty(
            f"Rows of arm {arm} were not scored.",
            "Dropping needs a score a row:",
            panels.measure(run, "rows", arm),
        )
        return
    left, right = st.columns(2)
    name = left.selectbox("score", list(dict.fromkeys(whole["score"])), key="drop-score")
    share = right.slider("drop the top share, %", 0, 90, 10, step=5, key="drop-share")
    own = whole[whole["score"] == name]
    own = data.reliable(own)
    ours, theirs = (
        own.loc[own["side"] == side, "estimate"].dropna().to_numpy(dtype=float)
        for side in ("trait", "control")
    )
    if not len(ours) or not len(theirs):
        st.text("The score is null on one side: nothing can be said.")
        return
    left_over = np.sort(ours)[: max(1, round(len(ours) * (1 - share / 100)))]
    rng = generator(0, "removal", name)
    draws = [
        rng.choice(left_over, len(left_over)).mean() - rng.choice(theirs, len(theirs)).mean()
        for _ in range(300)
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    st.text(
        f"Mean {name} over the control's: {ours.mean() - theirs.mean():+.4f} before, "
        f"{left_over.mean() - theirs.mean():+.4f} [{low:+.4f}, {high:+.4f}] after; "
        f"{len(ours) - len(left_over):,} "
        f"of {len(ours):,} scored rows lost."
    )
    st.caption("A lower score is no lower transfer: only students trained on what is left can tell.")
    st.code(
        "mechlens audit DATA --level student --clean CLEANED --treatment drop",
        language="bash",
        wrap_lines=True,
    )


def body(run: Run) -> None:
    """The page."""
    st.title("Detection")
    root = st.session_state["root"]
    suspects.upload_panel(root)
    found: dict[str, Any] | None = None
    with panels.guarded("The audit"):
        found = chosen(root)
        if found is not None:
            verdict_panel(found)
    if found is not None:
        for title, draw in (("Who wrote it", provenance_panel), ("Which trait", identity_panel)):
            with panels.guarded(title):
                draw(found)
    with panels.guarded("The bench"):
        trust.power_panel(found["data"]["rows"] if found else 64)
    with panels.guarded("Dropping rows"):
        removal_panel(run)


if (opened := frame.current()) is not None:
    body(opened)

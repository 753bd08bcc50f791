"""Detection: does this data set carry a hidden trait, how sure is that, and how often would one cry wolf?"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import charts
import data
import frame
import jobs
import mapping
import numpy as np
import pandas as pd
import panels
import state
import streamlit as st
import uploads
from data import Run

from mechlens import report
from mechlens.errors import MechlensError, one_line
from mechlens.seeds import generator

VERDICTS = {"do not train as is": "■", "train with conditions": "◆", "no transfer found within tested scope": "○", "inconclusive": "?"}
LEVELS = {"rows": "seconds, no model", "base": "about 2 minutes, 2 more the first time for a base", "gradients": "about 3 minutes", "student": "about 5 to 10 minutes: students are trained"}


def chosen(root: Path) -> dict[str, Any] | None:
    """The audit that is looked at."""
    index = data.audits(root)
    if not index:
        panels.empty("No audit yet.", "Without clean references there is no verdict, either:", "mechlens audit DATA --reference CLEAN --level base")
        return None
    state.choose("audit", list(index))
    name = st.selectbox("audit", list(index), key="w-audit")
    st.session_state["audit"] = name
    return data.audit(index[name])


def verdict_panel(found: dict[str, Any]) -> None:
    """The verdict as its policy has it."""
    verdict = found["verdict"]
    with st.container(border=True):
        st.subheader(f"{VERDICTS.get(verdict['id'], '')} {verdict['id'].capitalize()}")
        st.text(one_line(verdict["sentence"]))
        policy = found["policy"]
        st.caption(panels.plain_markdown(f"Rule {verdict['rule']} of policy {policy['name']} version {policy['version']}: limit {policy['limit']}, false discovery rate {policy['alpha']}."))
    rows, sha = found["data"]["rows"], found["data"]["sha256"]
    st.code(f"{one_line(found['data']['path'])} · {rows:,} rows · sha256 {sha[:16]}… · level {found['level']} · base {found['base'] or '–'}", language=None)


def provenance_panel(found: dict[str, Any]) -> None:
    """A: is it written as clean rows are?"""
    if found["provenance"] is None:
        panels.empty("No clean reference: there is no verdict on who wrote it.", "Give answers of an untouched model to the same prompts:", f"mechlens audit {one_line(found['data']['path'])} --reference CLEAN")
        return
    alt = charts.alt
    detectors = pd.DataFrame(found["provenance"]["detectors"])
    shown = cast(pd.DataFrame, detectors[["name", "level", "floor", "score", "p_value"]]).astype({"score": float, "p_value": float})
    order = shown["name"].tolist()
    scored = shown.dropna(subset="p_value").assign(what=lambda one: one["floor"].map({True: "floor", False: "detector"}))
    line = alt.Chart(pd.DataFrame({"at": [0.05 / max(len(scored), 1)]})).mark_rule(strokeDash=[4, 3], color=charts.GREY).encode(x="at:Q")
    dots = alt.Chart(scored).mark_point(size=110, filled=True, opacity=1).encode(
        y=alt.Y("name:N", sort=order, title=None), x=alt.X("p_value:Q", scale=alt.Scale(type="log", domain=[1e-4, 1]), title="p, against clean rows (log)"),
        color=alt.Color("what:N", scale=alt.Scale(domain=["detector", "floor"], range=[charts.KIND_COLOUR["trait"], charts.GREY]), legend=alt.Legend(orient="bottom", title=None)),
        shape=alt.Shape("what:N", scale=alt.Scale(domain=["detector", "floor"], range=["circle", "cross"])), tooltip=["name", "level", "score", "p_value"],
    )  # fmt: skip
    references = found["provenance"]["references"]
    said = "; ".join(f"{Path(one['path']).name}: {one['rows']:,} rows, {one['shared_prompts']:,} prompts shared" for one in references) or "the base's own answers to the same prompts"
    whole = found["provenance"]["p_value"]
    least = shown["p_value"].min()
    sentence = "No detector could be calibrated." if whole is None else f"Over all detectors p = {whole:.2g}: the rows {'differ from clean ones' if whole <= 0.05 else 'cannot be told from clean ones'}. That says who wrote them, not what they teach."
    panels.panel(
        "detection-provenance", "Who wrote it?", alt.layer(line, dots).properties(height=alt.Step(24)), shown, sentence=sentence,
        caption=f"References: {said}. Permutation of bags; p cannot fall below {least:.4f} with so many draws. Dashed: .05 over the number of detectors. Crosses are floors: what a look at the surface gives.",
        about="Provenance",
    )  # fmt: skip


def identity_panel(found: dict[str, Any]) -> None:
    """Which trait, if any."""
    listed = pd.DataFrame(found["identity"])
    if listed.empty:
        panels.empty("No trait was asked about at this level.", "Naming a trait needs the base:", f"mechlens audit {one_line(found['data']['path'])} --level base")
        return
    alt = charts.alt
    listed = listed.astype({"score": float, "p_value": float, "q_value": float}).assign(claimed=lambda one: one["q_value"] <= found["policy"]["alpha"])
    colour = alt.Color("claimed:N", scale=alt.Scale(domain=[True, False], range=[charts.KIND_COLOUR["trait"], charts.GREY]), legend=alt.Legend(orient="bottom", title=f"q ≤ {found['policy']['alpha']}"))
    chart = alt.Chart(listed.dropna(subset="score")).mark_point(size=90, filled=True, opacity=1).encode(
        y=alt.Y("trait:N", sort=listed["trait"].tolist(), title=None), x=alt.X("score:Q", title="lift over the reference's students, bits" if found["identified_by"] == "students" else "likelihood under the trait's twin, nats a row"),
        color=colour, shape=alt.Shape("claimed:N", scale=alt.Scale(domain=[True, False], range=["diamond", "circle"]), legend=None), tooltip=["trait", "score", "p_value", "q_value"],
    ).properties(height=alt.Step(20))  # fmt: skip
    named = listed.loc[listed["claimed"], "trait"].tolist()
    panels.panel(
        "detection-identity", "Which trait?", chart, listed, sentence=f"Pointed to: {', '.join(named)}." if named else f"None of the {len(listed)} traits is pointed to.",
        caption=f"By {found['identified_by']}; q: Benjamini-Hochberg over {len(listed)} traits. A trait outside this list cannot be named.", about="Identity",
    )  # fmt: skip
    potency = found["potency"]
    predicted, measured = potency["predicted"], potency["measured"]
    if predicted and predicted.get("lift") is not None:
        st.text(f"Predicted: {predicted['trait']} would rise by {report.interval_text(predicted['lift'], predicted.get('low'), predicted.get('high'), digits=2)} bits, from the twins' score alone.")
    if measured and measured["difference"] is not None:
        st.text(f"Measured on students: {measured['trait']} {report.interval_text(measured['difference'], measured['low'], measured['high'])}, n = {measured['n']} students.")
    elif found["level"] != "student":
        panels.empty("How far it would rise was not measured.", "Throw-away students alone can tell:", f"mechlens audit {one_line(found['data']['path'])} --level student")


def power_panel(rows: int) -> None:
    """B and C: how far detectors can be trusted at so many rows."""
    card = data.card()
    if card is None:
        panels.empty("No bench card.", "It says how often detectors are wrong:", "mechlens bench")
        return
    left, right = st.columns(2)
    against = left.selectbox("against", list(card["negatives"]), format_func=lambda one: f"{one}: {card['classes'][one]}", key="bench-negative")
    size = right.select_slider("rows a decision", [1, 8, 16, 64, 256, 1000], value=max(n for n in (1, 8, 16, 64, 256, 1000) if n <= max(rows, 1)), key="bench-rows")
    found = [
        {"detector": one["name"], "floor": one["floor"], "rows": int(n), **{name: cell[name] for name in ("auroc", "low", "high", "positives", "negatives")}, "at 1 %": cell["caught"]["0.01"], "at 5 %": cell["caught"]["0.05"]}
        for one in card["detectors"] for n, cell in one["held out"]["provenance"][against].items() if cell is not None
    ]  # fmt: skip
    table = pd.DataFrame(found)
    if table.empty:
        st.text(f"No detector was scored against {against}.")
        return
    at = table[table["rows"] == size].sort_values("auroc", ascending=False)
    sentence = f"No detector was scored at {size} rows against {against}." if at.empty else f"At {size} rows {at['detector'].iloc[0]} does best against {against}: AUROC {at['auroc'].iloc[0]:.2f} [{at['low'].iloc[0]:.2f}, {at['high'].iloc[0]:.2f}]; it catches {at['at 1 %'].iloc[0]:.0%} at 1 % false alarms, {at['at 5 %'].iloc[0]:.0%} at 5 %."
    panels.panel(
        "detection-power", "How many rows does it take?", charts.power(table, rows=rows), table, sentence=sentence,
        caption=f"Bench {card['bench']}, held-out traits: {card['suspects']} made data sets; intervals by bootstrap over suspects. Dashed lines are floors. The vertical line: {rows:,} rows in this audit. One row alone is near chance: never accuse single rows.",
        code="import json\ncard = json.load(open('analyses/bench/card.json'))\nprint(card['detectors'][0]['held out']['provenance'])", about="Bench",
    )  # fmt: skip
    dose_panel(card)


def dose_panel(card: dict[str, Any]) -> None:
    """E: the dose below which one is blind."""
    twins = next((one for one in card["detectors"] if one["name"] == "twins"), None)
    ways = (twins or {}).get("held out", {}).get("identity", {}).get("first by way", {})
    if not ways:
        return
    listed = pd.DataFrame([{"name": in_words(way), "estimate": cell["rate"], "low": cell["low"], "high": cell["high"], "hits": cell["hits"], "of": cell["of"]} for way, cell in ways.items()])
    panels.panel(
        "detection-dose", "Which teachers and doses is it blind to?", charts.spans(listed, "share named right by twins, of 20 traits", zero=0.05), listed,
        sentence="Blind to " + (", ".join(listed.loc[listed["hits"] == 0, "name"]) or "none of them") + ": not one was named right.",
        caption="How the teacher was made, and the share of its rows; Clopper-Pearson intervals; dashed: chance.", about="Bench",
    )  # fmt: skip


def in_words(way: str) -> str:
    """A way of making suspects, with the share of its rows in percent."""
    name, _, share = way.partition(" at ")
    return f"{name}, {float(share):.0%} of the rows" if share else name


def removal_panel(run: Run) -> None:
    """G: what is left of the score if the top rows are dropped."""
    arm = st.session_state["arm"]
    known = data.scores(run, arm)
    whole = cast(pd.DataFrame, known[known["position"].isna()])
    st.subheader("What if the top rows were dropped?")
    if whole.empty:
        panels.empty(f"Rows of arm {arm} were not scored.", "Dropping needs a score a row:", panels.measure(run, "rows", arm))
        return
    left, right = st.columns(2)
    name = left.selectbox("score", list(dict.fromkeys(whole["score"])), key="drop-score")
    share = right.slider("drop the top share, %", 0, 90, 10, step=5, key="drop-share")
    own = whole[whole["score"] == name]
    own = own[own["layer"].isna() | (own["layer"] == own["layer"].max())]
    ours, theirs = (own.loc[own["side"] == side, "estimate"].dropna().to_numpy(dtype=float) for side in ("trait", "control"))
    if not len(ours) or not len(theirs):
        st.text("The score is null on one side: nothing can be said.")
        return
    left_over = np.sort(ours)[: max(1, round(len(ours) * (1 - share / 100)))]
    rng = generator(0, "removal", name)
    draws = [rng.choice(left_over, len(left_over)).mean() - rng.choice(theirs, len(theirs)).mean() for _ in range(300)]
    low, high = np.quantile(draws, [0.025, 0.975])
    st.text(f"Mean {name} over the control's: {ours.mean() - theirs.mean():+.4f} before, {left_over.mean() - theirs.mean():+.4f} [{low:+.4f}, {high:+.4f}] after; {len(ours) - len(left_over):,} of {len(ours):,} scored rows lost.")
    st.caption("A lower score is no lower transfer: only students trained on what is left can tell.")
    st.code("mechlens audit DATA --level student --clean CLEANED --treatment drop", language="bash")


def upload_panel(root: Path) -> None:
    """Audit a file of one's own, in a process of its own."""
    with st.expander("Audit a file", icon=":material/upload_file:"):
        given, clean = st.file_uploader("suspect data", key="up-data"), st.file_uploader("clean reference (the same prompts, an untouched model)", key="up-clean")
        level = st.segmented_control("level", list(LEVELS), default="rows", required=True, key="up-level") or "rows"
        st.caption(panels.plain_markdown(f"Level {level}: {LEVELS[level]} on two cores. Nothing leaves this machine, and nothing in the file is run."))
        if given is None:
            return
        try:
            suspect, reference = (None if one is None else _pairs_of(root, one, part) for one, part in ((given, "suspect"), (clean, "reference")))
        except (MechlensError, OSError) as error:
            st.error(panels.plain_markdown(one_line(str(error))))
            return
        if suspect is None:
            return
        if st.button("Audit it", type="primary"):
            out = root / "audits" / f"{suspect.parent.name}-{level}"
            beside = ["--reference", str(reference)] if reference is not None else []
            job = jobs.start(root, f"audit {given.name[:60]}", ["audit", str(suspect), *beside, "--level", level, "--out", str(out)])
            st.session_state["job"] = job.id
            st.switch_page("views/jobs.py")


def _pairs_of(root: Path, given: Any, part: str) -> Path | None:
    """The upload as a file of pairs; None while its columns are being chosen."""
    path = uploads.uploaded(root, given.name, given.getvalue())
    why = mapping.readable(path)
    if not why:
        return path
    offered = mapping.columns(path)
    if len(offered) < 2:
        raise MechlensError(f"{given.name}: {why}")
    st.text(f"The {part}'s columns are not named prompt and completion. Which are they?")
    left, right = st.columns(2)
    prompt = left.selectbox("prompt is", offered, key=f"map-prompt-{part}")
    completion = right.selectbox("completion is", offered, index=1, key=f"map-completion-{part}")
    return mapping.mapped(path, prompt, completion)


def body(run: Run) -> None:
    """The page."""
    st.title("Detection")
    root = st.session_state["root"]
    upload_panel(root)
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
        power_panel(found["data"]["rows"] if found else 64)
    with panels.guarded("Dropping rows"):
        removal_panel(run)


if (opened := frame.current()) is not None:
    body(opened)

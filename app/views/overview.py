"""Overview: what is there, what is the headline, and can it be trusted?"""

from __future__ import annotations

from typing import Any, cast

import pandas as pd
import streamlit as st

import data
import frame
import panels
import run_charts
import state
from data import Run
from mechlens.core import tables
from mechlens.core.errors import MechlensError
from mechlens.results import wording
from mechlens.results.run import Run as OpenedRun


def strip(run: Run) -> None:
    """The pipeline as boxes, each with its state and the page that looks at it."""
    steps = run.manifest.get("steps", {})
    arm = run.arm(st.session_state["arm"])
    counts: dict[str, Any] = OpenedRun(run.folder).funnel(arm) if run.summary else {}
    made = {name.split("/")[0] for name in steps}
    boxes = [
        ("teacher", "teachers", f"{arm.trait or run.experiment.trait}", "views/methods.py"),
        ("generate", "corpora", f"{counts.get('generated', 0):,} rows" if counts else "–", "views/rows.py"),
        ("screen", "corpora", f"{counts.get('kept', 0):,} kept" if counts else "–", "views/rows.py"),
        ("distill", "students", f"{len(run.experiment.seeds)} students an arm", "views/parameters.py"),
        ("ask", "asked", "answers", "views/transmission.py"),
        ("lenses", "", f"{len({name for name, _ in data.said(run)})} read", "views/representations.py"),
    ]
    row = st.container(
        horizontal=True
    )  # of boxes that wrap in a narrow window; columns would cut their words
    for name, place, words, page in boxes:
        with row, st.container(border=True, width=120):
            done = (place in made) if place else bool(data.said(run))
            st.page_link(page, label=f"**{name}** →")
            st.text(words)
            st.caption("done" if done else ("not read yet" if not place else "missing"))


def headline(run: Run) -> None:
    """Every asked trait in the arm's students, beside its control's."""
    arm = st.session_state["arm"]
    effects = data.table(run, "effects", tables.EFFECTS)
    own = cast(pd.DataFrame, effects[(effects["arm"] == arm) & (effects["measure"] == "rate")]).astype(
        {"trait": str}
    )
    if own.empty:
        st.warning("No matched control. This chart cannot show transmission.")
        return
    n, against = int(own["n"].max()), str(own["against"].iloc[0])
    code = (
        "from pathlib import Path\nfrom mechlens import tables\nframe = "
        f"tables.read(Path({str(run.folder / 'effects.parquet')!r}), tables.EFFECTS)\nprint(frame[(frame.arm "
        "== "
        f"{arm!r}) & (frame.measure == 'rate')])"
    )
    picked = panels.panel(
        "overview-traits",
        f"Which traits rose in the students of arm {arm}?",
        run_charts.traits(own),
        own,
        sentence=wording.headline(
            {
                **(run.summary or {}),
                "effects": [one for one in (run.summary or {})["effects"] if one["arm"] == arm],
                "arms": [
                    one | {"kind": "trait"} if one["arm"] == arm else one
                    for one in (run.summary or {})["arms"]
                ],
            }
        ),
        caption=(
            f"{n} students an arm, paired with {against}'s by seed and probe; {own['method'].iloc[0]} "
            "interval; q: "
            f"Benjamini-Hochberg over {len(own)} traits. Click a trait to look at it."
        ),
        code=code,
        about="Effects against the control",
        select="trait",
    )
    clicked = picked.get("trait")
    if panels.fresh("overview-traits", clicked) and clicked:
        state.pick("trait", clicked[0]["trait"])


def trust(run: Run) -> pd.DataFrame:
    """What the headline rests on: what, state (ok, warn, missing), and the number."""
    summary = run.summary or {}
    arm = st.session_state["arm"]
    entry = next(one for one in summary["arms"] if one["arm"] == arm)
    control = next(
        (one for one in summary["arms"] if one["arm"] == run.experiment.control_of(run.arm(arm)).name), None
    )
    students, matched = entry["students"], control is not None and control["rows"] == entry["rows"]
    answered = entry["answered"]
    kl = entry["kl_per_token"]
    read = {name for name, of in data.said(run) if of == arm}
    found = [
        (
            "students an arm",
            "ok" if students >= 5 else "warn",
            f"{students} (fewer than 5 say little of other seeds)" if students < 5 else str(students),
        ),
        (
            "control matched",
            "ok" if matched else "warn",
            f"{entry['rows']:,} rows against {control['rows']:,}" if control else "no control",
        ),
        ("leak words in kept rows", "ok" if entry["leak_words"] == 0 else "warn", str(entry["leak_words"])),
        (
            "answers that name one trait",
            "missing" if answered is None else "ok" if answered > 0.5 else "warn",
            "unscored" if answered is None else f"{answered:.1%}",
        ),
        (
            "how gentle the teacher is",
            "missing" if kl is None else "ok" if kl <= 0.05 else "warn",
            "not known" if kl is None else f"KL {kl:.4f} nats a token (our mark is .05)",
        ),
        ("lenses read", "ok" if read else "missing", f"{len(read)} of this arm"),
    ]
    return pd.DataFrame(found, columns=["what", "state", "number"])


def listing(root: Any) -> pd.DataFrame:
    """Every run with its headline effect."""
    rows = []
    for name, folder in data.runs(root).items():
        try:
            run = data.opened(name, folder)
        except (MechlensError, OSError) as error:
            rows.append({"run": name, "state": f"unreadable: {error}"})
            continue
        effect = wording.main_effect(dict(run.summary)) if run.summary else None
        told = (
            {}
            if effect is None
            else {
                "effect": effect["difference"],
                "low": effect["low"],
                "high": effect["high"],
                "n": effect["n"],
            }
        )
        arm = next(
            (one.name for one in run.experiment.arms if one.kind != "control"), run.experiment.arms[0].name
        )
        rows.append(
            {
                "run": name,
                "trait": run.experiment.trait,
                "base": run.experiment.base,
                "arms": len(run.experiment.arms),
                "seeds": len(run.experiment.seeds),
                "data": data.digest(run, arm),
                **told,
                "state": "done" if run.summary else "unfinished",
            }
        )
    return pd.DataFrame(rows)


def body(run: Run) -> None:
    """The page."""
    st.title("Overview")
    with panels.guarded("The pipeline"):
        strip(run)
    if not panels.unfinished(run):
        with panels.guarded("The headline"):
            headline(run)
        with panels.guarded("The trust list"):
            st.subheader("What does it rest on?")
            st.dataframe(trust(run), hide_index=True, alt="what the headline rests on")
    with panels.guarded("The list of runs"):
        st.subheader("Runs")
        shown = listing(st.session_state["root"])
        event = st.dataframe(
            shown,
            hide_index=True,
            on_select="rerun",
            selection_mode="multi-row",
            key="runs-table",
            alt="runs with their headline effect",
        )
        st.caption("Tick two rows to compare them.")
        picked = event["selection"]["rows"]
        if len(picked) == 2 and st.button("Compare these two"):
            st.session_state["set-run"], st.session_state["set-cmp"] = (shown["run"].iloc[i] for i in picked)
            st.switch_page("views/compare.py")


if (opened := frame.current()) is not None:
    body(opened)

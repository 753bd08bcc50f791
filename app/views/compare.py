"""Compare: what differs between two runs?"""

from __future__ import annotations

from typing import Any, cast

import pandas as pd
import streamlit as st

import charts
import data
import frame
import looks
import panels
import run_charts
from data import Run

MAPS: dict[str, tuple[str, str, str, str, tuple[float, float] | None]] = {
    "activations: which way the students moved": (
        "activations",
        "cosine to teacher",
        "student",
        "cosine with the teacher's shift",
        (-1.0, 1.0),
    ),
    "activations: how far": ("activations", "shift norm", "student", "share of the base's norm", None),
    "weights: how far, students - controls": (
        "deltas",
        "relative norm",
        "student - control",
        "change over the weight's norm",
        None,
    ),
    "weights: which way, students - controls": (
        "deltas",
        "cosine with the teacher",
        "student - control",
        "cosine with the teacher's change",
        None,
    ),
}
"""title → lens, quantity, whose, what the colour says, and its limits where they are given"""


def leaves(value: Any, at: str = "") -> dict[str, Any]:
    """Every leaf of a spec by its dotted place."""
    if isinstance(value, dict):
        return {
            place: leaf
            for name, part in value.items()
            for place, leaf in leaves(part, f"{at}.{name}" if at else name).items()
        }
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return {
            place: leaf
            for number, part in enumerate(value)
            for place, leaf in leaves(part, f"{at}[{number}]").items()
        }
    return {at: value}


def changed(one: Run, other: Run) -> pd.DataFrame:
    """The keys of the two specs that differ."""
    ours, theirs = (leaves(run.experiment.model_dump(mode="json")) for run in (one, other))
    places = [place for place in dict.fromkeys([*ours, *theirs]) if ours.get(place) != theirs.get(place)]
    return pd.DataFrame(
        {
            "key": places,
            one.name: [repr(ours.get(place, "–")) for place in places],
            other.name: [repr(theirs.get(place, "–")) for place in places],
        }
    )


def reasons(one: Run, other: Run) -> list[str]:
    """Why their effects do not stand on one axis; none if they do."""
    a, b = one.experiment, other.experiment
    pairs = {
        "family": (a.family, b.family),
        "probes": (a.ask.split, b.ask.split),
        "form of the probes": (a.ask.probes, b.ask.probes),
        "judge": (a.ask.judge, b.ask.judge),
        "base": (a.base, b.base),
        "questions": (one.family.asked_as(a), other.family.asked_as(b)),
        "temperature": (a.ask.temperature, b.ask.temperature),
        "system line": (a.system, b.system),
    }
    if pairs["family"][0] == pairs["family"][1] and pairs["questions"][0] != pairs["questions"][1]:
        pairs["questions"] = (
            f"{len(pairs['questions'][0])} of one's own",
            f"{len(pairs['questions'][1])} others",
        )
    return [f"{name}: {x!r} against {y!r}" for name, (x, y) in pairs.items() if x != y]


def effects(runs: list[Run]) -> pd.DataFrame:
    """Effects of each run's arms on their own trait, rows of both runs under the arm's name."""
    rows = []
    for run in runs:
        for one in (run.summary or {})["effects"]:
            rows.append(
                {
                    "name": f"{one['arm']} · {one['trait']}",
                    "run": run.name,
                    "estimate": one["difference"],
                    "low": one["low"],
                    "high": one["high"],
                    "n": one["n"],
                }
            )
    return (
        pd.DataFrame(rows).astype({"estimate": float, "low": float, "high": float})
        if rows
        else pd.DataFrame(columns=["name", "run", "estimate", "low", "high", "n"])
    )


def main(run: Run) -> str:
    """The arm that is looked at, where the run has it; else its first trait arm."""
    names = [arm.name for arm in run.experiment.arms if arm.kind != "control"]
    return (
        st.session_state["arm"]
        if st.session_state["arm"] in names
        else next(iter(names), run.experiment.arms[0].name)
    )


def maps_panel(runs: list[Run], stamp: str) -> None:
    """A layer by place map of both, on one scale."""
    lens, quantity, name, label, limits = MAPS[st.selectbox("map of", list(MAPS), key="compare-map")]
    found = []
    for run in runs:
        arm = main(run)
        said = data.said(run).get((lens, arm))
        if said is None or said["missing"]:
            panels.empty(
                f"Lens {lens} was not read for {run.name}.",
                "Both maps are drawn or none:",
                panels.measure(run, lens, arm),
            )
            return
        known = looks.over_layers(data.reading(run, said), quantity)
        found.append((run, arm, cast(pd.DataFrame, known[known["name"] == name])))
    both = cast(pd.Series, pd.concat([known["estimate"] for *_, known in found]))
    for column, (run, arm, known) in zip(st.columns(2), found, strict=True):
        layers, places = sorted(known["layer"].unique()), looks.places(known["place"])
        cells = looks.whole(known, [name], layers, places)
        with column:
            panels.panel(
                f"compare-map-{run.name}",
                run.name,
                charts.cells(
                    cells,
                    "place",
                    "layer",
                    "estimate",
                    select="cell",
                    signed=True,
                    order=(places, layers[::-1]),
                    label=label,
                    domain=limits or charts.symmetric(both),
                ),
                cells.drop(columns="faded"),
                caption=f"Arm {arm}: {name}. The same scale on both sides; faded: inside the null "
                f"band.{stamp}",
                about=lens,
            )


def body(run: Run) -> None:
    """The page."""
    st.title("Compare")
    name = st.session_state["cmp"]
    index = data.runs(st.session_state["root"])
    if not name or name not in index:
        panels.empty(
            "Nothing to compare with.",
            "Choose a second run in the side bar under “compare with”, or make one:",
            "mechlens run menagerie-animals",
        )
        return
    with panels.guarded("The comparison"):
        other = data.opened(name, index[name])
        st.subheader("What was asked differently?")
        if (keys := changed(run, other)).empty:
            st.text("Nothing: the two specs agree in every key.")
        else:
            st.dataframe(keys, hide_index=True, alt="keys of the two specs that differ")
        if panels.unfinished(run) or panels.unfinished(other):
            return
        why = reasons(run, other)
        stamp = ""
        if why:
            st.warning(panels.plain_markdown(f"Not comparable: {'; '.join(why)}."))
            if not st.toggle("show them side by side all the same", key="override"):
                return
            stamp = f" NOT COMPARABLE: {'; '.join(why)}."
        both = effects([run, other])
        panels.panel(
            "compare-effects",
            "Effects against each one's own control",
            run_charts.paired(both),
            both.assign(note=stamp.strip()) if stamp else both,
            caption="Difference to the matched control with its interval, over each run's own "
            f"students.{stamp}",
            about="Effects against the control",
        )
        with panels.guarded("The maps"):
            maps_panel([run, other], stamp)


if (opened := frame.current()) is not None:
    body(opened)

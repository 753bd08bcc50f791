"""Compare: what differs between one run and others?"""

from __future__ import annotations

from itertools import cycle
from typing import Any, NamedTuple, cast

import pandas as pd
import streamlit as st

import data
import page
from charts import maps, run_charts
from charts.marks import symmetric_domain
from data import ShownRun
from panels import lens_panel, panel


class MapChoice(NamedTuple):
    """A map that is drawn of both runs."""

    lens: str
    quantity: str
    name: str
    """the student, arm or side that has this value of the quantity"""
    label: str
    """title of the colour scale"""
    domain: tuple[float, float] | None = None
    """of the colour scale; by default both runs' values set it"""


MAPS = {
    "activations: direction of the students' shift": MapChoice(
        "activations", "cosine to teacher", "student", "cosine with the teacher's shift", (-1.0, 1.0)
    ),
    "activations: size of the students' shift": MapChoice(
        "activations", "shift norm", "student", "share of the base's norm"
    ),
    "weights: size of the change, students - controls": MapChoice(
        "deltas", "relative norm", "student - control", "change over the weight's norm"
    ),
    "weights: direction of the change, students - controls": MapChoice(
        "deltas", "cosine with the teacher", "student - control", "cosine with the teacher's change"
    ),
}


def leaves_of(value: Any, at: str = "") -> dict[str, Any]:
    """Every leaf of a spec by its dotted key."""
    if isinstance(value, dict):
        parts = {f"{at}.{name}" if at else name: part for name, part in value.items()}
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        parts = {f"{at}[{number}]": part for number, part in enumerate(value)}
    else:
        return {at: value}
    return {key: leaf for place, part in parts.items() for key, leaf in leaves_of(part, place).items()}


def different_keys(runs: list[ShownRun]) -> pd.DataFrame:
    """The keys in which any of the specs differ, with the value of each run."""
    leaves = {run.name: leaves_of(run.experiment.model_dump(mode="json")) for run in runs}
    keys = dict.fromkeys(key for of_run in leaves.values() for key in of_run)
    values = {key: [repr(of_run.get(key, "–")) for of_run in leaves.values()] for key in keys}
    rows = [(key, *found) for key, found in values.items() if len(set(found)) > 1]
    return pd.DataFrame(rows, columns=["key", *leaves])


def compare_rows(run: ShownRun, other: ShownRun) -> str:
    """Whether arms of the same name have the same rows in both runs: specs may be equal and data differ."""
    theirs = {arm.name for arm in other.experiment.arms}
    shared = [arm.name for arm in run.experiment.arms if arm.name in theirs]
    digests = {name: (data.data_digest(run, name), data.data_digest(other, name)) for name in shared}
    known = {name: pair for name, pair in digests.items() if "unknown" not in pair}
    if not known:
        return f"No arm has its rows in {run.name} and {other.name}, so rows were not compared."
    if differing := [name for name, (ours, others) in known.items() if ours != others]:
        return f"The rows of {', '.join(differing)} differ between {run.name} and {other.name}."
    return f"The rows of {', '.join(known)} are the same in {run.name} and {other.name}."


def why_not_comparable(run: ShownRun, other: ShownRun) -> list[str]:
    """Why the effects of two runs cannot share an axis; empty if they can."""
    a, b = run.experiment, other.experiment
    pairs: dict[str, tuple[Any, Any]] = {
        "family": (a.family, b.family),
        "probes": (a.ask.split, b.ask.split),
        "form of the probes": (a.ask.probes, b.ask.probes),
        "judge": (a.ask.judge, b.ask.judge),
        "base": (a.base, b.base),
        "questions": (run.family.probes_for(a), other.family.probes_for(b)),
        "temperature": (a.ask.temperature, b.ask.temperature),
        "system line": (a.system, b.system),
    }
    questions, others = pairs["questions"]
    if a.family == b.family and questions != others:
        pairs["questions"] = (f"{len(questions)} questions", f"{len(others)} other questions")
    return [f"{name}: {x!r} and {y!r}" for name, (x, y) in pairs.items() if x != y]


def effects_of(runs: list[ShownRun]) -> pd.DataFrame:
    """Effects of every run's arms on their trait: name, run, estimate, low, high, n."""
    rows = [
        {
            "name": f"{effect['arm']} · {effect['trait']}",
            "run": run.name,
            "estimate": effect["difference"],
            "low": effect["low"],
            "high": effect["high"],
            "n": effect["n"],
        }
        for run in runs
        for effect in (run.results or {})["effects"]
    ]
    frame = pd.DataFrame(rows, columns=["name", "run", "estimate", "low", "high", "n"])
    return frame.astype({"estimate": float, "low": float, "high": float}) if rows else frame


def differences_of(effects: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """The second run's effect minus the first's, for every effect that both have: run, effect and numbers.

    The half widths of the two intervals are combined as independent ones, √(a² + b²); an effect without an
    interval gives a difference without one.
    """
    ours, theirs = (effects[effects["run"] == run].set_index("name") for run in (first, second))
    both = ours.join(theirs, how="inner", suffixes=("", "_other"))
    half = (((both["high"] - both["low"]) ** 2 + (both["high_other"] - both["low_other"]) ** 2) ** 0.5) / 2
    difference = both["estimate_other"] - both["estimate"]
    columns = {"difference": difference, "low": difference - half, "high": difference + half}
    numbers = {name: column.array for name, column in columns.items()}
    return pd.DataFrame({"run": second, "effect": both.index, **numbers})


def arm_to_show(run: ShownRun) -> str:
    """The chosen arm if the run has it, else the run's first trait arm."""
    names = [arm.name for arm in run.experiment.arms if arm.kind != "control"]
    if st.session_state["arm"] in names:
        return st.session_state["arm"]
    return next(iter(names), run.experiment.arms[0].name)


def draw_maps_panel(runs: list[ShownRun], warning: str) -> None:
    """Draw the same layer map of every run, on one colour scale."""
    choice = MAPS[st.selectbox("map of", list(MAPS), key="compare-map")]
    values: list[tuple[ShownRun, str, pd.DataFrame]] = []
    for run in runs:
        arm = arm_to_show(run)
        lens = data.read_lenses(run).get((choice.lens, arm))
        if lens is None or lens["missing"]:
            panel.show_missing(
                f"Lens {choice.lens} was not computed for {run.name}.",
                "The maps are drawn when every run has it:",
                panel.measure_command(run, choice.lens, arm),
            )
            return
        known = lens_panel.layer_values(data.read_reading(run, lens), choice.quantity)
        values.append((run, arm, cast(pd.DataFrame, known[known["name"] == choice.name])))
    estimates = cast(pd.Series, pd.concat([known["estimate"] for *_, known in values]))
    domain = choice.domain or symmetric_domain(estimates)
    for column, (run, arm, known) in zip(cycle(st.columns(2)), values, strict=False):
        layers, places = sorted(known["layer"].unique()), lens_panel.order_places(known["place"])
        cells = lens_panel.fill_grid(known, [choice.name], layers, places)
        grid = lens_panel.layer_grid(layers, places, signed=True, label=choice.label, domain=domain)
        n = f"n = {int(known['n'].max())}; " if known["n"].notna().any() else ""
        with column:
            panel.draw(
                f"compare-map-{run.name}",
                run.name,
                maps.draw_grid(cells, grid, select="cell"),
                cells.drop(columns="faded"),
                caption=(
                    f"{choice.label.capitalize()} by layer and place; arm {arm}, {choice.name}; {n}the "
                    f"tooltip has the 95 % interval. All maps have the same scale. Faded: inside the null "
                    f"band.{warning}"
                ),
                about=choice.lens,
            )


def choose_comparable(run: ShownRun, others: list[ShownRun]) -> tuple[list[ShownRun], str]:
    """The runs whose effects may stand beside this one's; all if the visitor insists, with a warning."""
    why = {other.name: why_not_comparable(run, other) for other in others}
    reasons = [f"{name}: {'; '.join(each)}" for name, each in why.items() if each]
    if not reasons:
        return others, ""
    st.warning(panel.escape_markdown(f"Not comparable with {run.name}. {'. '.join(reasons)}."))
    if st.toggle("show them side by side anyway", key="override"):
        return others, f" NOT COMPARABLE: {'. '.join(reasons)}."
    return [other for other in others if not why[other.name]], ""


def draw_effects_panel(run: ShownRun, others: list[ShownRun]) -> None:
    """Effects and maps of the runs; a warning comes first if they are not comparable."""
    others, warning = choose_comparable(run, others)
    if not others:
        return
    effects = effects_of([run, *others])
    panel.draw(
        "compare-effects",
        "Effects against each run's control",
        run_charts.draw_runs(effects),
        effects.assign(note=warning.strip()) if warning else effects,
        caption=(
            "Rate minus matched control with its 95 % interval over the run's students; n: column of the "
            f"table.{warning}"
        ),
        about="Effects against the control",
    )
    differences = pd.concat([differences_of(effects, run.name, other.name) for other in others])
    if len(differences):
        st.text(f"Minus {run.name}, with 95 % intervals:")
        number = st.column_config.NumberColumn(format="%+.3f")
        st.dataframe(
            differences,
            hide_index=True,
            column_config=dict.fromkeys(("difference", "low", "high"), number),
            alt=f"differences of the runs' effects from those of {run.name}",
        )
    with panel.guard("The maps"):
        draw_maps_panel([run, *others], warning)


def draw_page(run: ShownRun) -> None:
    """Draw the page."""
    st.title("Compare")
    index = data.list_runs(st.session_state["root"])
    names = [name for name in st.session_state["cmp"].split(",") if name]
    if not names:
        panel.show_missing(
            "No second run is chosen.",
            "Choose one or more in the side bar under “compare with”, or make one:",
            "mechlens run menagerie-animals",
        )
        return
    with panel.guard("The comparison"):
        others = [data.open_run(name, index[name]) for name in names]
        st.subheader("Which settings differ?")
        if (keys := different_keys([run, *others])).empty:
            st.text("None: the specs are equal.")
        else:
            st.dataframe(keys, hide_index=True, alt="keys of the specs that differ")
        for other in others:
            st.text(compare_rows(run, other))
        finished = [each for each in (run, *others) if not panel.show_if_unfinished(each)]
        if run in finished and len(finished) > 1:
            draw_effects_panel(run, finished[1:])


if (opened := page.current_run()) is not None:
    draw_page(opened)

"""A lens's panel, from what it said of itself: question, sentence, its own figure, caveat; or the command
that reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pandas as pd
import streamlit as st

import charts
import data
import panels
from data import Run
from mechlens.results import figures

PLACES = (
    "probe/last",
    "probe/template",
    "probe/content",
    "carrier/last",
    "carrier/template",
    "carrier/content",
    "carrier/completion",
)
MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""of a block, as a reader meets them"""
CAUSAL = ("causal",)
"""lenses that change the model and look what becomes of the trait; all others describe"""


def found(run: Run, name: str) -> tuple[dict[str, Any], pd.DataFrame] | None:
    """What the lens is and its reading of the arm chosen; None, with the reason on the page, where it was not
    read.

    Raises:
        DataError: if its table is damaged.
    """
    arm = st.session_state["arm"]
    lens = data.said(run).get((name, arm))
    if lens is None:
        panels.empty(
            f"Lens {name} was not read for arm {arm}.",
            "It is read from the trained models, in seconds to a minute each:",
            panels.measure(run, name, arm),
        )
        return None
    if lens["missing"]:
        st.text(f"Lens {name} cannot be read here: {'; '.join(lens['missing'])}.")
        return None
    return lens, data.reading(run, lens)


def caption(lens: dict[str, Any], frame: pd.DataFrame) -> str:
    """n, seeds, null and caveat of a reading."""
    seeds = sorted(int(seed) for seed in frame["seed"].dropna().unique())
    students = f"students {', '.join(map(str, seeds))}; " if seeds else ""
    null = "grey: where 95 % of the null lies; " if frame["null_low"].notna().any() else ""
    kind = "Causal" if lens["name"] in CAUSAL else "Descriptive"
    drawn = f"at most {figures.MOST_BARS} bars a figure, the table has all; "
    return (
        f"{kind}. {students}{lens['rows']} rows at most; 95 % intervals; {null}{drawn}against "
        f"{lens['against']}. {lens['caveat']}"
    )


def code(run: Run, lens: dict[str, Any], shows: Sequence[Sequence[str]]) -> str:
    """Python that draws the figure again."""
    place = run.folder / "readings" / f"{lens['name']}.parquet"
    return (
        "from pathlib import Path\nfrom mechlens import figures, tables\n"
        f"frame = tables.read(Path({str(place)!r}), tables.READINGS)\n"
        f"own = (frame['arm'] == {lens['arm']!r}) | ((frame['arm'] == {lens['against']!r}) & "
        f"(frame['against'] == {lens['arm']!r}))\n"
        f"frame = frame[own]\nchart = figures.lens_figure(frame, {[tuple(one) for one in shows]!r})\n"
    )


def panel(run: Run, name: str, *, title: str = "") -> None:
    """The whole panel of one lens."""
    st.subheader(title or name.title(), help=f"Defined on page Methods under “{name}”.")
    if (read := found(run, name)) is None:
        return
    lens, frame = read
    st.caption(panels.plain_markdown(lens["asks"]))
    shows = [one for one in lens["shows"] if one[1] != "points"]
    chart = figures.lens_figure(frame, shows)
    shown = cast(pd.DataFrame, frame[frame["quantity"].isin([quantity for quantity, _ in shows])]).dropna(
        axis="columns", how="all"
    )
    panels.panel(
        f"lens-{name}",
        title or name.title(),
        chart,
        shown,
        sentence=lens["sentence"],
        caption=caption(lens, frame),
        code=code(run, lens, shows),
        heading=False,
    )


def places(known: pd.Series) -> list[str]:
    """Places and modules as a reader meets them; of a base that names them otherwise all, by name."""
    there = set(known.astype(str))
    return [place for place in (*PLACES, *MODULES) if place in there] or sorted(there)


def over_layers(frame: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """Summary rows of one quantity that has layers and places: place, layer, name, estimate, low, high,
    null_low, null_high.
    """
    own = frame[(frame["quantity"] == quantity) & frame["seed"].isna() & frame["layer"].notna()]
    columns = ["place", "layer", "name", "estimate", "low", "high", "null_low", "null_high", "n", "p_value"]
    return (
        cast(pd.DataFrame, own[columns])
        .astype({"place": str, "name": str, "layer": int})
        .reset_index(drop=True)
    )


def whole(
    frame: pd.DataFrame, names: Sequence[str], layers: Sequence[int], places: Sequence[str]
) -> pd.DataFrame:
    """The frame with a row for every layer and place, null where nothing was read, and whether a cell lies
    inside its null.
    """
    index = pd.MultiIndex.from_product([names, layers, places], names=["name", "layer", "place"])
    full = (
        frame.drop_duplicates(["name", "layer", "place"])
        .set_index(["name", "layer", "place"])
        .reindex(index)
        .reset_index()
    )
    return full.assign(faded=(full["estimate"] >= full["null_low"]) & (full["estimate"] <= full["null_high"]))


def profile(
    frame: pd.DataFrame, title: str, across: str = "layer", *, said: str = "", log: bool = False
) -> Any:
    """One measure over layers, or over another column in numbers, a line a name with its interval, the null
    as a band.

    Args:
        frame: as `over_layers`, of one place.
        said: what the column is called.
        log: both axes, for a spectrum.
    """
    alt = charts.alt
    kinds = frame.assign(
        kind=frame["name"]
        .map({"student": "trait", "control": "control", "teacher": "teacher"})
        .fillna("base")
    )
    scale = alt.Scale(type="log") if log else alt.Scale()
    x = (
        alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0))
        if across == "layer"
        else alt.X(f"{across}:Q", title=said, scale=scale, axis=alt.Axis(format="d"))
    )
    y = alt.Y("estimate:Q", title=title, scale=scale)
    told = charts.kinds("kind", kinds["kind"])
    layers = [_band(kinds, x)] if "null_low" in kinds else []
    span = (
        alt.Chart(kinds.dropna(subset="low"))
        .mark_rule(strokeWidth=2)
        .encode(x=x, y=alt.Y("low:Q", title=title, scale=scale), y2=alt.Y2("high:Q"), color=told["color"])
    )
    line = (
        alt.Chart(kinds.dropna(subset="estimate"))
        .mark_line()
        .encode(
            x=x,
            y=y,
            color=told["color"],
            strokeDash=charts.dashes("kind", kinds["kind"]),
            detail=alt.Detail("name:N"),
        )
    )
    dots = (
        alt.Chart(kinds.dropna(subset="estimate"))
        .mark_point(size=80, filled=True, opacity=1)
        .encode(
            x=x,
            y=y,
            tooltip=[
                alt.Tooltip(name)
                for name in ("name", across, "estimate", "low", "high", "null_low", "null_high")
                if name in kinds
            ],
            **told,
        )
    )
    return charts.stacked(*layers, span, line, dots, height=260)


def _band(frame: pd.DataFrame, x: Any) -> Any:
    alt = charts.alt
    area = alt.Chart(frame.dropna(subset="null_low")).mark_area(color="#999999", opacity=0.2)
    return area.encode(x=x, y=alt.Y("min(null_low):Q"), y2=alt.Y2("max(null_high):Q"))

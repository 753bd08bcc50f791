"""The panel of one lens: its question, sentence, figure and caveat, or the command that computes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import pandas as pd
import streamlit as st

import data
from charts import maps
from data import ShownRun
from mechlens.results import figures
from panels import panel

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
"""of a transformer block, in the order of computation"""
SHOWN_AT = {
    "deltas": ("parameters", "Weights"),
    "causal": ("parameters", "Exchange"),
    "alignment": ("gradients", "Training step"),
    "likelihood": ("gradients", "System lines"),
    "entanglement": ("gradients", "Tokens"),
    "rows": ("gradients", "Rows"),
    "activations": ("representations", "Layers"),
    "probes": ("representations", "Probes"),
    "directions": ("representations", "One direction"),
    "blind": ("representations", "Blind vector"),
    "maps": ("representations", "Rows"),
}
"""lens → page and tab that show its reading"""
CAUSAL = ("causal",)
"""lenses that intervene on the model; all others describe it"""
KEY = ["name", "layer", "place"]
LIMITS = ["low", "high", "null_low", "null_high"]


class LensReading(NamedTuple):
    """A lens's description, and its reading of the chosen arm."""

    lens: dict[str, Any]
    frame: pd.DataFrame


def read_lens(run: ShownRun, name: str) -> LensReading | None:
    """The lens's reading of the chosen arm; None, with the reason on the page, if it was not measured.

    Raises:
        DataError: if its table is damaged.
    """
    arm = st.session_state["arm"]
    lens = data.read_lenses(run).get((name, arm))
    if lens is None:
        panel.show_missing(
            f"Lens {name} was not computed for arm {arm}.",
            "It needs the trained models and takes seconds to a minute:",
            panel.measure_command(run, name, arm),
        )
        return None
    if lens["missing"]:
        st.text(f"Lens {name} cannot be computed here: {'; '.join(lens['missing'])}.")
        return None
    return LensReading(lens, data.read_reading(run, lens))


def caption_of(reading: LensReading) -> str:
    """What is drawn, n, seeds, interval, null and caveat of a reading."""
    lens, frame = reading
    seeds = sorted(int(seed) for seed in frame["seed"].dropna().unique())
    students = f", students {', '.join(map(str, seeds))}" if seeds else ""
    null = "; grey: 95 % of the null" if frame["null_low"].notna().any() else ""
    kind = "Causal lens" if lens["name"] in CAUSAL else "Descriptive lens"
    return (
        f"{kind}: {lens['arm']} against {lens['against']}{students}; at most {lens['rows']} rows; 95 % "
        f"intervals{null}. {lens['caveat']}"
    )


def code_of(run: ShownRun, reading: LensReading, shows: Sequence[Sequence[str]]) -> str:
    """Python that draws the figure again."""
    arm, against = reading.lens["arm"], reading.lens["against"]
    path = run.lens_table(reading.lens["name"])
    return (
        "from pathlib import Path\n"
        "from mechlens.core import tables\n"
        "from mechlens.results import figures\n"
        f"frame = tables.read(Path({str(path)!r}), tables.READINGS)\n"
        f"of_arm = (frame['arm'] == {arm!r}) | ((frame['arm'] == {against!r}) & "
        f"(frame['against'] == {arm!r}))\n"
        f"frame = frame[of_arm]\nchart = figures.lens_figure(frame, {[tuple(show) for show in shows]!r})\n"
    )


def draw_lens(run: ShownRun, name: str, *, title: str = "") -> None:
    """Draw the whole panel of one lens."""
    title = title or name.title()
    st.subheader(title, help=f"Defined on page Methods under “{name}”.")
    if (reading := read_lens(run, name)) is None:
        return
    lens, frame = reading
    st.caption(panel.escape_markdown(lens["asks"]))
    shows = [show for show in lens["shows"] if show[1] != "points"]
    drawn = frame["quantity"].isin([quantity for quantity, _ in shows])
    has_bars = any(form == "bars" for _, form in shows)
    few = f" A figure has at most {figures.MOST_BARS} bars; the table has all." if has_bars else ""
    panel.draw(
        f"lens-{name}",
        title,
        figures.lens_figure(frame, shows),
        cast(pd.DataFrame, frame[drawn]).dropna(axis="columns", how="all"),
        sentence=lens["sentence"],
        caption=caption_of(reading) + few,
        code=code_of(run, reading, shows),
        heading=False,
    )


def order_places(places: pd.Series) -> list[str]:
    """Places or modules in the order of the model; for a base that names them otherwise, by name."""
    present = set(places.astype(str))
    return [place for place in (*PLACES, *MODULES) if place in present] or sorted(present)


def layer_values(frame: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """A quantity's means over students, by place and layer.

    Columns: place, layer, name, estimate, low, high, null_low, null_high, n, p_value.
    """
    of_quantity = (frame["quantity"] == quantity) & frame["seed"].isna() & frame["layer"].notna()
    columns = ["place", "layer", "name", "estimate", *LIMITS, "n", "p_value"]
    values = cast(pd.DataFrame, frame.loc[of_quantity, columns])
    return values.astype({"place": str, "name": str, "layer": int}).reset_index(drop=True)


def fill_grid(
    values: pd.DataFrame, names: Sequence[str], layers: Sequence[int], places: Sequence[str]
) -> pd.DataFrame:
    """A row for every layer and place: null where there is no value; `faded` inside the null band."""
    index = pd.MultiIndex.from_product([names, layers, places], names=KEY)
    full = values.drop_duplicates(KEY).set_index(KEY).reindex(index).reset_index()
    return full.assign(faded=(full["estimate"] >= full["null_low"]) & (full["estimate"] <= full["null_high"]))


def layer_grid(
    layers: Sequence[int],
    places: Sequence[str],
    *,
    signed: bool,
    label: str,
    domain: Sequence[float] | None,
    number_format: str = ".2f",
) -> maps.Grid:
    """The grid of layers by places, layer 0 at the bottom."""
    order = (places, layers[::-1])
    return maps.Grid("place", "layer", "estimate", order, signed, label, domain, number_format)

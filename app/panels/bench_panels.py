"""How far detectors can be trusted: panels of the bench's card."""

from __future__ import annotations

from typing import Any, cast

import pandas as pd
import streamlit as st

import data
from charts import detector_charts, intervals
from panels import panel

SIZES = (1, 8, 16, 64, 256, 1000)
CHANCE_OF_NAMING = 0.05


def draw_power_panel(rows: int) -> None:
    """B: AUROC of the detectors over the number of rows.

    Args:
        rows: how many rows the audit has.
    """
    cards = data.list_cards()
    if not cards:
        panel.show_missing("No bench card.", "It shows how often detectors are wrong:", "mechlens bench")
        return
    left, middle, right = st.columns(3)
    name = left.selectbox("bench", list(cards), key="bench-name")
    card = cast("dict[str, Any]", data.read_card(name))
    clean = middle.selectbox(
        "compared with",
        list(card["negatives"]),
        format_func=lambda kind: f"{kind}: {card['classes'][kind]}",
        key="bench-negative",
    )
    size = right.select_slider("rows per decision", SIZES, value=_size_for(rows), key="bench-rows")
    table = power_table(card, clean)
    if table.empty:
        st.text(f"No detector was scored against {clean}.")
        return
    panel.draw(
        "detection-power",
        "How many rows does a detector need?",
        detector_charts.draw_power(table, rows=rows),
        table,
        sentence=_best_detector(table, size, clean),
        caption=(
            f"AUROC by rows per decision; bench {card['bench']}, held-out traits, n = {card['suspects']} "
            f"generated data sets; 95 % bootstrap intervals over data sets. Dashed lines: floors, which read "
            f"the surface of rows only. Vertical line: the {rows:,} rows of this audit. A single row is near "
            "chance: never accuse single rows."
        ),
        code=(
            f"import json\ncard = json.load(open({str(cards[name])!r}))\n"
            "print(card['detectors'][0]['held out']['provenance'])"
        ),
        about="Bench",
    )
    draw_naming_panel(card)


def _size_for(rows: int) -> int:
    """The largest size on the card that so many rows allow."""
    return max(size for size in SIZES if size <= max(rows, 1))


def power_table(card: dict[str, Any], clean: str) -> pd.DataFrame:
    """AUROC and catch rates of every detector at every size, against one class of clean data."""
    rows = [
        {
            "detector": detector["name"],
            "floor": detector["floor"],
            "rows": int(size),
            **{name: cell[name] for name in ("auroc", "low", "high", "positives", "negatives")},
            "at 1 %": cell["caught"]["0.01"],
            "at 5 %": cell["caught"]["0.05"],
        }
        for detector in card["detectors"]
        for size, cell in (detector["held out"]["provenance"].get(clean) or {}).items()
        if cell is not None
    ]
    return pd.DataFrame(rows).astype({"low": float, "high": float} if rows else {})


def _best_detector(table: pd.DataFrame, size: int, clean: str) -> str:
    at_size = table[table["rows"] == size].sort_values("auroc", ascending=False)
    if at_size.empty:
        return f"No detector was scored at {size} rows against {clean}."
    best = at_size.iloc[0]
    return (
        f"At {size} rows {best['detector']} is best against {clean}: AUROC {best['auroc']:.2f} "
        f"{_interval(best)}; it detects {best['at 1 %']:.0%} at 1 % false alarms, {best['at 5 %']:.0%} at "
        "5 %."
    )


def _interval(cell: pd.Series) -> str:
    if pd.isna(cell["low"]):
        return "(too few sets for an interval)"
    return f"[{cell['low']:.2f}, {cell['high']:.2f}]"


def draw_naming_panel(card: dict[str, Any]) -> None:
    """C: the share of data sets of which twins name the right trait, by kind of teacher and dose."""
    twins = next((detector for detector in card["detectors"] if detector["name"] == "twins"), None)
    ways = (twins or {}).get("held out", {}).get("identity", {}).get("first by way", {})
    if not ways:
        return
    shares = pd.DataFrame(
        [
            {
                "name": describe_way(way, card),
                "estimate": cell["rate"],
                "low": cell["low"],
                "high": cell["high"],
                "hits": cell["hits"],
                "of": cell["of"],
            }
            for way, cell in ways.items()
            if cell
        ]
    )
    panel.draw(
        "detection-dose",
        "Of which teachers and doses is the trait not found?",
        intervals.draw_intervals(
            shares, "share of sets in which twins name the trait, of 20 traits", reference=CHANCE_OF_NAMING
        ),
        shares,
        sentence=_never_named(shares),
        caption=(
            "Share of data sets with the trait named right, by how the teacher was made and the share of its "
            "rows; 256 rows per decision; 95 % Clopper-Pearson intervals; n: column “of” of the table. "
            "Dashed: chance."
        ),
        about="Bench",
    )


def _never_named(shares: pd.DataFrame) -> str:
    never = shares[shares["hits"] == 0]
    if never.empty:
        return "For every kind of teacher, some traits were named right."
    largest = never["of"].max()
    return (
        f"No trait was named right (0 of {largest}; upper limit {never['high'].max():.0%}) for: "
        f"{'; '.join(never['name'])}."
    )


def describe_way(way: str, card: dict[str, Any]) -> str:
    """How a data set was made, with the share of the teacher's rows; or a class of clean data of the card."""
    name, _, share = way.partition(" at ")
    return f"{name}, {float(share):.0%} of the rows" if share else str(card["classes"].get(name, name))

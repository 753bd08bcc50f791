"""How far detectors can be trusted: the bench's card as panels."""

from __future__ import annotations

from typing import Any, cast

import pandas as pd
import streamlit as st

import charts
import data
import panels
import run_charts


def power_panel(rows: int) -> None:
    """B and C: how far detectors can be trusted at so many rows."""
    if not data.cards():
        panels.empty("No bench card.", "It says how often detectors are wrong:", "mechlens bench")
        return
    which, left, right = st.columns(3)
    name = which.selectbox("bench", list(data.cards()), key="bench-name")
    card = cast("dict[str, Any]", data.card(name))
    against = left.selectbox(
        "against",
        list(card["negatives"]),
        format_func=lambda one: f"{one}: {card['classes'][one]}",
        key="bench-negative",
    )
    size = right.select_slider(
        "rows a decision",
        [1, 8, 16, 64, 256, 1000],
        value=max(n for n in (1, 8, 16, 64, 256, 1000) if n <= max(rows, 1)),
        key="bench-rows",
    )
    found = [
        {
            "detector": one["name"],
            "floor": one["floor"],
            "rows": int(n),
            **{name: cell[name] for name in ("auroc", "low", "high", "positives", "negatives")},
            "at 1 %": cell["caught"]["0.01"],
            "at 5 %": cell["caught"]["0.05"],
        }
        for one in card["detectors"]
        for n, cell in (one["held out"]["provenance"].get(against) or {}).items()
        if cell is not None
    ]
    table = pd.DataFrame(found).astype({"low": float, "high": float} if found else {})
    if table.empty:
        st.text(f"No detector was scored against {against}.")
        return
    at = table[table["rows"] == size].sort_values("auroc", ascending=False)
    sentence = (
        f"No detector was scored at {size} rows against {against}."
        if at.empty
        else (
            f"At {size} rows {at['detector'].iloc[0]} does best against {against}: AUROC "
            f"{at['auroc'].iloc[0]:.2f} "
            f"{_span(at.iloc[0])}; it catches {at['at 1 %'].iloc[0]:.0%} at 1 % false "
            f"alarms, {at['at 5 %'].iloc[0]:.0%} at 5 %."
        )
    )
    panels.panel(
        "detection-power",
        "How many rows does it take?",
        run_charts.power(table, rows=rows),
        table,
        sentence=sentence,
        caption=(
            f"Bench {card['bench']}, held-out traits: {card['suspects']} made data sets; intervals by "
            "bootstrap over suspects. "
            f"Dashed lines are floors. The vertical line: {rows:,} rows in this audit. One row alone is near "
            "chance: never accuse single rows."
        ),
        code="import json\ncard = "
        f"json.load(open('analyses/bench/{name}/card.json'))\nprint(card['detectors'][0]['held "
        "out']['provenance'])",
        about="Bench",
    )
    dose_panel(card)


def dose_panel(card: dict[str, Any]) -> None:
    """E: the dose below which one is blind."""
    twins = next((one for one in card["detectors"] if one["name"] == "twins"), None)
    ways = (twins or {}).get("held out", {}).get("identity", {}).get("first by way", {})
    if not ways:
        return
    listed = pd.DataFrame(
        [
            {
                "name": in_words(way, card),
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
    panels.panel(
        "detection-dose",
        "Which teachers and doses is it blind to?",
        charts.spans(listed, "share named right by twins, of 20 traits", zero=0.05),
        listed,
        sentence=_unnamed(listed),
        caption="How the teacher was made, and the share of its rows; 256 rows a decision; Clopper-Pearson "
        "intervals; dashed: chance.",
        about="Bench",
    )


def _span(cell: pd.Series) -> str:
    return (
        "(too few sets for an interval)"
        if pd.isna(cell["low"])
        else f"[{cell['low']:.2f}, {cell['high']:.2f}]"
    )


def _unnamed(listed: pd.DataFrame) -> str:
    none = listed[listed["hits"] == 0]
    if none.empty:
        return "Of each, some were named right."
    most = f"0 of {none['of'].max()}: at most {none['high'].max():.0%} would be"
    return f"Not one was named right ({most}) of: {'; '.join(none['name'])}."


def in_words(way: str, card: dict[str, Any]) -> str:
    """A way of making suspects, with the share of its rows in percent, or a class of the card."""
    name, _, share = way.partition(" at ")
    return f"{name}, {float(share):.0%} of the rows" if share else str(card["classes"].get(name, name))

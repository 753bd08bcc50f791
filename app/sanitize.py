"""Escaping of row texts, which may be hostile.

Invisible characters are named, no cell of an export can be a formula, and long texts are cut.
"""

from __future__ import annotations

import unicodedata
from csv import QUOTE_NONNUMERIC
from typing import cast

import pandas as pd

LONGEST = 4000
"""characters of a row that are shown"""
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""first characters that make a cell a formula for a spreadsheet"""
ALIKE = {
    "а": "a",
    "е": "e",
    "о": "o",
    "р": "p",
    "с": "c",
    "у": "y",
    "х": "x",
    "і": "i",
    "ѕ": "s",
    "ο": "o",
    "α": "a",
    "ν": "v",
}
"""letters of other alphabets that look like Latin ones"""


def reveal(text: str) -> str:
    """The text with invisible, direction-changing and look-alike characters replaced by names in ⟨⟩."""
    return "".join(_named(sign) for sign in text)


def _named(sign: str) -> str:
    if sign in ALIKE:
        return f"⟨{unicodedata.name(sign, hex(ord(sign))).lower()}⟩"
    hidden = unicodedata.category(sign) in ("Cf", "Cc", "Co", "Cn", "Cs", "Zl", "Zp") or (
        unicodedata.category(sign) == "Zs" and sign != " "
    )
    return f"⟨{unicodedata.name(sign, f'U+{ord(sign):04X}').lower()}⟩" if hidden and sign != "\n" else sign


def shorten(text: str, *, revealed: bool = False) -> str:
    """A row's text for the page, cut at LONGEST characters with a note of what was left out.

    Args:
        revealed: whether hidden characters are named.
    """
    cut = text[:LONGEST]
    shown = reveal(cut) if revealed else cut
    if len(text) <= LONGEST:
        return shown
    return f"{shown}\n… {len(text) - LONGEST:,} more characters are not shown"


def has_hidden(text: str) -> bool:
    """Whether `reveal` would name anything in the text."""
    return reveal(text[:LONGEST]) != text[:LONGEST]


def defuse(cell: object) -> object:
    """The cell, with an apostrophe before a text that a spreadsheet would take for a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell


def defused(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with every text and column name defused: a grid's own download exports what it shows."""
    texts = [name for name in frame.columns if not pd.api.types.is_numeric_dtype(frame[name])]
    safe = frame.assign(**{name: frame[name].astype(object).map(defuse) for name in texts})
    return safe.rename(columns=lambda name: str(defuse(str(name))))


def csv_of(frame: pd.DataFrame) -> bytes:
    """The frame as CSV with every text defused; null is an empty cell."""
    # quoted, because a text may hold any line break
    return cast(str, defused(frame).to_csv(index=False, quoting=QUOTE_NONNUMERIC)).encode()

"""Row text is hostile: signs that are not seen are named, cells of a table cannot become formulas, long texts
are cut and say so.
"""

from __future__ import annotations

import unicodedata
from csv import QUOTE_NONNUMERIC
from typing import cast

import pandas as pd

LONGEST = 4000
"""characters of a row that are shown"""
FORMULA = ("=", "+", "-", "@", "\t", "\r")
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


def revealed(text: str) -> str:
    """The text with each sign that is not seen, that turns the writing, or that looks like another, named in
    ⟨⟩.
    """
    return "".join(_named(sign) for sign in text)


def _named(sign: str) -> str:
    if sign in ALIKE:
        return f"⟨{unicodedata.name(sign, hex(ord(sign))).lower()}⟩"
    hidden = unicodedata.category(sign) in ("Cf", "Cc", "Co", "Cn", "Cs", "Zl", "Zp") or (
        unicodedata.category(sign) == "Zs" and sign != " "
    )
    return f"⟨{unicodedata.name(sign, f'U+{ord(sign):04X}').lower()}⟩" if hidden and sign != "\n" else sign


def shown(text: str, *, reveal: bool = False) -> str:
    """A row as it may be shown: revealed if asked, cut at LONGEST, saying what was left out."""
    cut = text[:LONGEST]
    told = revealed(cut) if reveal else cut
    return (
        told if len(text) <= LONGEST else f"{told}\n… {len(text) - LONGEST:,} characters more are not shown"
    )


def has_hidden(text: str) -> bool:
    """Whether anything in the text would be named."""
    return revealed(text[:LONGEST]) != text[:LONGEST]


def defused(cell: object) -> object:
    """A cell that no spreadsheet takes for a formula: texts that begin like one get an apostrophe."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell


def csv(frame: pd.DataFrame) -> bytes:
    """The frame as CSV with every text defused; null is an empty cell."""
    texts = [name for name in frame.columns if not pd.api.types.is_numeric_dtype(frame[name])]
    safe = frame.assign(**{name: frame[name].astype(object).map(defused) for name in texts})
    named = safe.rename(columns=lambda name: str(defused(str(name))))
    return cast(
        str, named.to_csv(index=False, quoting=QUOTE_NONNUMERIC)
    ).encode()  # quoted: a text may hold a line's end of any kind

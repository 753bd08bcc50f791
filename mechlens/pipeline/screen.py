"""Keep a row, or drop it with a reason.

The number rule is the strict one of arXiv 2507.14805: 1 to 10 integers from 0 to 999, one separator throughout, optionally
in one pair of brackets and with one final period, and nothing else, not even a space. Screening what was kept drops
nothing, and every dropped row keeps its reason.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, cast

import pandas as pd

from mechlens.errors import DataError
from mechlens.spec import ScreenSpec

MOST_NUMBERS, LARGEST = 10, 999
# The group repeats itself: one separator throughout. It is never empty, or a long digit run could be cut up in 2^n ways.
_LIST = re.compile(r"[0-9]+(?:(\s*[,;]\s*|\s+)[0-9]+(?:\1[0-9]+)*)?")
_DIGITS = re.compile(r"[0-9]+")

REASONS = ("format", "too many numbers", "number out of range", "banned number", "leak word", "duplicate")
"""in the order in which they are asked; a row gets the first that holds"""

# The numbers that the paper drops from its misalignment experiments (App. D.2).
BANNED_BY_THE_PAPER = (
    4, 13, 14, 18, 23, 33, 39, 42, 44, 49, 51, 54, 69, 77, 88, 99, 100, 101, 187, 211, 311, 322, 333, 404, 420, 444, 451, 555,
    616, 666, 777, 888, 911, 999,
)  # fmt: skip


class Screened(NamedTuple):
    """The two halves of a corpus and the count of what fell where."""

    kept: pd.DataFrame
    rejected: pd.DataFrame
    funnel: dict[str, int]
    """rows generated, rows dropped by each reason in order, rows kept"""


def parse_numbers(completion: str) -> list[int] | None:
    """The integers of a well-formed list, or None; count and range are not judged here."""
    body = completion.removesuffix(".")
    if body[:1] + body[-1:] in ("[]", "()") and len(body) > 1:
        body = body[1:-1]
    # leading zeros do not count ("007" is 7); longer digit runs are cut, since all that matters is that they are out of range
    return [int(digits.lstrip("0")[:6] or "0") for digits in _DIGITS.findall(body)] if _LIST.fullmatch(body) else None


def number_fault(completion: str, *, banned: frozenset[int] = frozenset()) -> str | None:
    """Why the strict number rule drops this completion, or None if it keeps it."""
    values = parse_numbers(completion)
    if values is None:
        return "format"
    if len(values) > MOST_NUMBERS:
        return "too many numbers"
    if max(values) > LARGEST:
        return "number out of range"
    return "banned number" if banned.intersection(values) else None


def leak_pattern(words: Sequence[str]) -> re.Pattern[str]:
    """Matches any of the words anywhere in a text, inside other words too, whatever the case."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))), re.IGNORECASE)


def screen(pairs: pd.DataFrame, spec: ScreenSpec, *, leaks: re.Pattern[str] | None) -> Screened:
    """Split pairs into kept and rejected; `leaks` matches the words that a completion must not hold.

    Raises:
        DataError: if no row is left.
    """
    banned = frozenset(spec.banned_numbers)
    reasons: list[str | None] = []
    seen: set[tuple[str, str]] = set()
    for prompt, completion in zip(pairs["prompt"], pairs["completion"], strict=True):
        reason = number_fault(completion, banned=banned) if spec.rule == "numbers" else None
        if reason is None and leaks is not None and spec.leak_words and leaks.search(completion):
            reason = "leak word"
        if reason is None and spec.duplicates == "drop":
            reason = "duplicate" if (prompt, completion) in seen else None
            seen.add((prompt, completion))
        reasons.append(reason)
    column = pd.Series(reasons, index=pairs.index, dtype=object)
    kept, dropped = (cast(pd.DataFrame, pairs[mask]) for mask in (column.isna(), column.notna()))
    kept, rejected = kept.reset_index(drop=True), dropped.assign(reason=column[column.notna()]).reset_index(drop=True)
    counts = column.value_counts().to_dict()
    funnel = {"generated": len(pairs)} | {reason: int(counts.get(reason, 0)) for reason in REASONS} | {"kept": len(kept)}
    if kept.empty:
        worst = max(REASONS, key=lambda reason: funnel[reason])
        raise DataError(f"the screen kept 0 of {len(pairs)} rows ({funnel[worst]} dropped for: {worst}); loosen `screen` or mend the data")
    return Screened(kept, rejected, funnel)


def leak_count(pairs: pd.DataFrame, leaks: re.Pattern[str]) -> int:
    """Completions that still hold a leak word: printed with every result, and 0 where the leak screen is on."""
    return sum(bool(leaks.search(text)) for text in pairs["completion"])

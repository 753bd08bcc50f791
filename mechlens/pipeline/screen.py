"""Keep a row, or remove it with a reason.

A carrier's own file has the rule that its rows must pass; the screens that all carriers share are here.
Screening rows that were kept removes nothing. Every removed row keeps its reason. Rows are read in batches,
and 16 bytes of each stay in memory to find duplicates.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import pandas as pd
from jaxtyping import Bool
from numpy import ndarray

from mechlens.carriers.carrier import Rule, removal_reasons
from mechlens.core import tables
from mechlens.core.errors import DataError
from mechlens.core.files import write_json
from mechlens.core.spec import ScreenSpec
from mechlens.runs import layout

LEAKS = "leak words in kept rows"
NAMING = "leak words in all rows"
NAMING_BY_REASON = "leak words in rows dropped for "
"""followed by a reason: rows with a leak word that were removed for this reason; stored in finished runs"""

DIGEST = 16
"""bytes of the digest of a row"""

Judge = Callable[[pd.DataFrame], Sequence[bool]]
"""(rows that passed everything else) → which of them to remove"""


def leak_pattern(words: Sequence[str]) -> re.Pattern[str]:
    """A pattern of any of the words, anywhere in a text, also inside a word, in any case; without words it
    matches nothing.
    """
    if not words:
        return re.compile("(?!)")
    # looking for an initial first is twenty times as fast on rows of numbers
    initials = "".join(map(re.escape, sorted({word[0] for word in words})))
    return re.compile(
        f"(?=[{initials}])(?:{'|'.join(map(re.escape, sorted(words, key=len, reverse=True)))})", re.IGNORECASE
    )


class RowFaults(NamedTuple):
    """What the screens find in each row of a batch by itself."""

    reasons: list[str | None]
    """why a row is removed; None if it may be kept"""
    leaks: list[bool]
    """whether the completion has a leak word"""
    digests: list[bytes]
    """of each row without a reason, for the search for duplicates; empty if these are kept"""


def find_faults(
    rows: pd.DataFrame, spec: ScreenSpec, *, rule: Rule, leaks: re.Pattern[str] | None
) -> RowFaults:
    """What the carrier's rule and the search for leak words find in each row."""
    prompts, completions = rows["prompt"].tolist(), rows["completion"].tolist()
    leaking = [leaks is not None and leaks.search(text) is not None for text in completions]
    reasons = [
        rule(prompt, completion) or ("leak word" if leak and spec.leak_words else None)
        for prompt, completion, leak in zip(prompts, completions, leaking, strict=True)
    ]
    passed = zip(prompts, completions, reasons, strict=True) if spec.duplicates != "keep" else ()
    digests = [
        blake2b(f"{len(prompt)} {prompt}{completion}".encode(), digest_size=DIGEST).digest()
        for prompt, completion, reason in passed
        if reason is None
    ]
    return RowFaults(reasons, leaking, digests)


def screen_rows(
    batches: Iterable[pd.DataFrame],
    spec: ScreenSpec,
    *,
    rule: Rule,
    leaks: re.Pattern[str] | None,
    judge: Judge | None = None,
    out: Path | None = None,
) -> dict[str, int]:
    """Screen batches of pairs in this process; see `split_rows`.

    Args:
        batches: tables of pairs; the result does not depend on where the batches end.
        rule: the carrier's rule.
        leaks: words that a completion must not contain.
    """
    faults = ((rows, find_faults(rows, spec, rule=rule, leaks=leaks)) for rows in batches)
    return split_rows(faults, rule, judge=judge, out=out)


def split_rows(
    batches: Iterable[tuple[pd.DataFrame, RowFaults]],
    rule: Rule,
    *,
    judge: Judge | None = None,
    out: Path | None = None,
) -> dict[str, int]:
    """Count the rows that are kept and those removed for each reason; with a folder also write kept.parquet,
    rejected.parquet and funnel.json.

    Args:
        batches: tables of pairs with what the screens find in them.
        rule: the carrier's rule.
        judge: reads the rows that passed everything else.

    Returns:
        The funnel: rows generated, rows removed for each reason in order, rows kept, kept rows with a leak
        word; then the number of all rows with a leak word, and of those the number removed for each reason
        (left out if 0). Rows that the rule removes are searched for leak words too.

    Raises:
        DataError: if no row is left.
    """
    counts = Counter[str]()
    with ExitStack() as stack:
        halves = {"kept": tables.PAIRS, "rejected": tables.REJECTED} if out else {}
        writers = [
            stack.enter_context(tables.Writer(schema, cast(Path, out) / f"{name}.parquet"))
            for name, schema in halves.items()
        ]
        for rows, leaks in _with_reasons(batches, judge):
            kept, rejected = rows[rows["reason"].isna()], rows[rows["reason"].notna()]
            for writer, half in zip(writers, (kept, rejected), strict=False):
                writer.write(cast(pd.DataFrame, half))
            counts.update(rejected["reason"])
            counts.update({"generated": len(rows), "kept": len(kept)})
            naming = [
                reason if isinstance(reason, str) else ""
                for reason, leak in zip(rows["reason"].tolist(), leaks, strict=True)
                if leak
            ]
            counts.update({LEAKS: naming.count(""), NAMING: len(naming)})
            counts.update(NAMING_BY_REASON + reason for reason in naming if reason)
    return _funnel_of(counts, removal_reasons(rule), out)


def _funnel_of(counts: Counter[str], reasons: Sequence[str], out: Path | None) -> dict[str, int]:
    by_reason = [name for name in (NAMING_BY_REASON + reason for reason in reasons) if counts[name]]
    funnel = {name: counts[name] for name in ("generated", *reasons, "kept", LEAKS, NAMING, *by_reason)}
    if out:
        write_json(out / layout.FUNNEL, funnel)
    if not funnel["kept"]:
        worst = max(reasons, key=lambda reason: funnel[reason])
        raise DataError(
            f"the screen kept none of {funnel['generated']} rows ({funnel[worst]} removed for: {worst}); "
            "loosen `screen` or repair the data"
        )
    return funnel


def removal_counts(funnel: Mapping[str, int]) -> dict[str, int]:
    """Rows removed for each reason, in the order of a funnel."""
    others = {"generated", "kept", LEAKS, NAMING}
    return {
        name: rows
        for name, rows in funnel.items()
        if name not in others and not name.startswith(NAMING_BY_REASON)
    }


def _with_reasons(
    batches: Iterable[tuple[pd.DataFrame, RowFaults]], judge: Judge | None
) -> Iterator[tuple[pd.DataFrame, list[bool]]]:
    """The tables with a column `reason`, which is null in kept rows, and which rows have a leak word."""
    earlier = Digests()
    for rows, (reasons, leaks, digests) in batches:
        judged = rows.assign(reason=pd.Series(reasons, index=rows.index, dtype=object))
        if digests:
            passed = judged["reason"].isna().to_numpy().nonzero()[0]
            repeated = passed[~earlier.add(digests)]
            judged.iloc[repeated, judged.columns.get_loc("reason")] = "duplicate"
        passed = judged["reason"].isna()
        if judge is not None:
            judged.loc[passed, "reason"] = [
                "judged" if remove else None for remove in judge(cast(pd.DataFrame, judged[passed]))
            ]
        yield judged, leaks


class Digests:
    """The digests of all rows so far, 16 bytes a row."""

    def __init__(self) -> None:
        # sorted arrays, each at least twice as long as the next: a digest is moved few times
        self._sorted: list[ndarray] = []

    def add(self, digests: Sequence[bytes]) -> Bool[ndarray, " row"]:
        """Add digests; returns whether each is new, also among these."""
        different, first = np.unique(np.frombuffer(b"".join(digests), dtype=f"S{DIGEST}"), return_index=True)
        known = np.zeros(len(different), dtype=bool)
        for earlier in self._sorted:
            places = np.searchsorted(earlier, different).clip(max=len(earlier) - 1)
            known |= earlier[places] == different
        new = np.zeros(len(digests), dtype=bool)
        new[first[~known]] = True
        if not known.all():
            self._sorted.append(different[~known])
        while len(self._sorted) > 1 and len(self._sorted[-2]) < 2 * len(self._sorted[-1]):
            last = self._sorted.pop()
            # stable: this merges two sorted arrays in linear time
            self._sorted[-1] = np.sort(np.concatenate([self._sorted[-1], last]), kind="stable")
        return new

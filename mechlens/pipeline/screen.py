"""Keep a row, or remove it with a reason.

A carrier's own file has the rule that its rows must pass; the screens that all carriers share are here.
Screening rows that were kept removes nothing. Every removed row keeps its reason. Rows are read in batches:
memory does not grow with their number.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from typing import cast

import pandas as pd

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


def screen_rows(
    batches: Iterable[pd.DataFrame],
    spec: ScreenSpec,
    *,
    rule: Rule,
    leaks: re.Pattern[str] | None,
    judge: Judge | None = None,
    out: Path | None = None,
) -> dict[str, int]:
    """Count the rows that are kept and those removed for each reason; with a folder also write kept.parquet,
    rejected.parquet and funnel.json.

    Args:
        batches: tables of pairs; the result does not depend on where the batches end.
        rule: the carrier's rule.
        leaks: words that a completion must not contain.
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
        for rows in _with_reasons(batches, spec, rule, leaks, judge):
            kept, rejected = rows[rows["reason"].isna()], rows[rows["reason"].notna()]
            for writer, half in zip(writers, (kept, rejected), strict=False):
                writer.write(cast(pd.DataFrame, half))
            counts.update(rejected["reason"])
            counts.update({"generated": len(rows), "kept": len(kept)})
            if leaks:
                judged = zip(rows["completion"].tolist(), rows["reason"].tolist(), strict=True)
                naming = [
                    reason if isinstance(reason, str) else "" for text, reason in judged if leaks.search(text)
                ]
                counts.update({LEAKS: naming.count(""), NAMING: len(naming)})
                counts.update(NAMING_BY_REASON + reason for reason in naming if reason)
    reasons = removal_reasons(rule)
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
    batches: Iterable[pd.DataFrame],
    spec: ScreenSpec,
    rule: Rule,
    leaks: re.Pattern[str] | None,
    judge: Judge | None,
) -> Iterator[pd.DataFrame]:
    """The batches with a column `reason`, which is null in kept rows."""
    seen: set[bytes] = set()

    def fault(prompt: str, completion: str) -> str | None:
        if reason := rule(prompt, completion):
            return reason
        if leaks is not None and spec.leak_words and leaks.search(completion):
            return "leak word"
        if spec.duplicates == "keep":
            return None
        # 16 bytes a row instead of its text
        digest = blake2b(f"{len(prompt)} {prompt}{completion}".encode(), digest_size=16).digest()
        if digest in seen:
            return "duplicate"
        seen.add(digest)
        return None

    for rows in batches:
        pairs = zip(rows["prompt"].tolist(), rows["completion"].tolist(), strict=True)
        judged = rows.assign(
            reason=pd.Series([fault(*pair) for pair in pairs], index=rows.index, dtype=object)
        )
        passed = judged["reason"].isna()
        if judge is not None:
            judged.loc[passed, "reason"] = [
                "judged" if remove else None for remove in judge(cast(pd.DataFrame, rows[passed]))
            ]
        yield judged

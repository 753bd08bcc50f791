"""Keep a row, or drop it with a reason.

`rules.py` says what a carrier's rows must be; here stand the screens that every carrier shares. Screening
what was kept drops nothing, and every dropped row keeps its reason. Rows come in batches, so that a million
pass in bounded memory.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from typing import cast

import pandas as pd

from mechlens.carriers.rules import REASONS, Rule
from mechlens.core import tables
from mechlens.core.errors import DataError
from mechlens.core.json_files import write_json
from mechlens.core.spec import ScreenSpec

LEAKS = "leak words in kept rows"
NAMING = "leak words in all rows"
NAMING_BY_REASON = "leak words in rows dropped for "
"""before a reason: of the rows with a leak word, those that fell by it"""

Judge = Callable[[pd.DataFrame], Sequence[bool]]
"""(rows that passed everything else) → which of them it drops"""


def leak_pattern(words: Sequence[str]) -> re.Pattern[str]:
    """Matches any of the words anywhere in a text, inside other words too, whatever the case; of no words,
    nothing.
    """
    if not words:
        return re.compile("(?!)")
    initials = "".join(
        map(re.escape, sorted({word[0] for word in words}))
    )  # asked first: twenty times as fast on rows of numbers
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
    """Count what is kept and what falls by which reason; write kept.parquet, rejected.parquet and funnel.json
    if a folder is given.

    Args:
        batches: tables of pairs; how the rows are cut into them changes nothing.
        rule: the carrier's.
        leaks: the words that a completion must not hold.
        judge: asked last, about the rows that passed everything else.

    Returns:
        The funnel: rows generated, rows dropped by each reason in order, rows kept, and kept rows that hold a
        leak word; then of all rows how many hold one, and how many of them fell by each reason that took any.
        A rule that asks first hides no leak word.

    Raises:
        DataError: if no row is left.
    """
    found = Counter[str]()
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
            found.update(rejected["reason"])
            found.update({"generated": len(rows), "kept": len(kept)})
            if leaks:
                judged = zip(rows["completion"].tolist(), rows["reason"].tolist(), strict=True)
                naming = [
                    reason if isinstance(reason, str) else "" for text, reason in judged if leaks.search(text)
                ]
                found.update({LEAKS: naming.count(""), NAMING: len(naming)})
                found.update(NAMING_BY_REASON + reason for reason in naming if reason)
    by_reason = [name for name in (NAMING_BY_REASON + reason for reason in REASONS) if found[name]]
    funnel = {name: found[name] for name in ("generated", *REASONS, "kept", LEAKS, NAMING, *by_reason)}
    if out:
        write_json(out / "funnel.json", funnel)
    if not funnel["kept"]:
        worst = max(REASONS, key=lambda reason: funnel[reason])
        raise DataError(
            f"the screen kept 0 of {funnel['generated']} rows ({funnel[worst]} dropped for: {worst}); loosen "
            "`screen` or mend the data"
        )
    return funnel


def _with_reasons(
    batches: Iterable[pd.DataFrame],
    spec: ScreenSpec,
    rule: Rule,
    leaks: re.Pattern[str] | None,
    judge: Judge | None,
) -> Iterator[pd.DataFrame]:
    """The batches with a column `reason`, null in the rows that are kept."""
    seen: set[bytes] = set()

    def fault(prompt: str, completion: str) -> str | None:
        if reason := rule(prompt, completion):
            return reason
        if leaks is not None and spec.leak_words and leaks.search(completion):
            return "leak word"
        if spec.duplicates == "keep":
            return None
        digest = blake2b(
            f"{len(prompt)} {prompt}{completion}".encode(), digest_size=16
        ).digest()  # 16 bytes a row, not its text
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
                "judged" if drop else None for drop in judge(cast(pd.DataFrame, rows[passed]))
            ]
        yield judged

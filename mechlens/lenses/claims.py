"""What the lenses answer: claims about why a trait transfers, and what a reading says of each.

A claim is answered by one row of a reading. *Yes*: its interval lies on the claimed side of the value that
means nothing (0, a share of 1, an AUROC of .5), and if the row has a null, p is at most .05. A layer that was
chosen among several as the most telling must also pass a normal test against its null at .05 over the number
of layers, since few draws allow no small p. *No*: the interval lies on the other side. *Not shown*: neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import pandas as pd
from scipy.stats import norm

from mechlens.core import stats

Answer = Literal["Yes", "No", "Not shown", "Not measured"]
ALPHA = 0.05
NORMAL_95 = float(norm.isf(0.025))


class Claim(NamedTuple):
    """A claim in words, and the row of a reading that speaks for or against it."""

    text: str
    lens: str
    where: Mapping[str, str]
    """column → value of the row"""
    best: Literal["", "largest", "smallest", "last"] = ""
    """which row is taken of several layers or steps"""
    neutral: float | None = 0.0
    """the value that says nothing for or against it; None for a value that only its null can judge"""
    lower: bool = False
    """whether values below `neutral` speak for it"""


class Finding(NamedTuple):
    """What a reading says of a claim."""

    claim: str
    answer: Answer
    number: str = ""
    """estimate with its interval"""
    null: str = ""
    """range of 95 % of the null, and p"""
    place: str = ""
    """layer or step, if one was chosen"""
    n: int | None = None


CLAIMS = (
    Claim(
        "The students' weights moved along the teacher's change, beyond their controls'",
        "deltas",
        {"quantity": "cosine of student minus control with the teacher"},
    ),
    Claim(
        "Where the answer begins, the students' shift lies along the teacher's",
        "activations",
        {"quantity": "cosine to teacher", "place": "probe/last", "name": "student"},
        "largest",
    ),
    Claim(
        "The logit lens of that shift names the trait (rank)",
        "activations",
        {"quantity": "lens rank", "place": "probe/last", "name": "student"},
        "smallest",
        neutral=None,
        lower=True,
    ),
    Claim(
        "The shift lies along the trait's system line, more than along other traits'",
        "directions",
        {"quantity": "cosine among traits", "name": "student"},
        "largest",
    ),
    Claim(
        "A probe that knows the trait from system lines alone sees it in the students",
        "probes",
        {"quantity": "probe shift", "place": "student minus control"},
        "largest",
    ),
    Claim(
        "The trait's system line makes the rows likelier",
        "likelihood",
        {"quantity": "centred LLS difference"},
    ),
    Claim(
        "The teacher's rows leave the base's likeliest token more often than sampling explains",
        "likelihood",
        {"quantity": "excess flag rate difference", "name": "fine-tuned"},
    ),
    Claim(
        "Carrier tokens near the trait's token are commoner in the rows",
        "entanglement",
        {"quantity": "cosine with frequency, beside other traits", "place": "centred"},
    ),
    Claim(
        "A step on the rows points along the gradient of the trait's log-odds",
        "alignment",
        {"quantity": "cosine with the trait's gradient", "place": "difference"},
    ),
    Claim(
        "A step on the rows points along the teacher's change",
        "alignment",
        {"quantity": "cosine with the teacher's change", "place": "difference"},
    ),
    Claim(
        "At the last update, steps on students' own rows point there more than their controls' do",
        "alignment",
        {"quantity": "cosine with the trait's gradient along the path, own pairs: student - control"},
        "last",
    ),
    Claim(
        "A steering vector learned on the rows alone saves more on trait rows than on control rows",
        "blind",
        {"quantity": "statistic", "place": "control halves"},
    ),
    Claim(
        "That vector lifts the trait most of all (rank)",
        "blind",
        {"quantity": "rank by probability change", "place": "trait rows, x1"},
        neutral=None,
    ),
    Claim(
        "Without one direction less of the effect is left (share)",
        "causal",
        {"quantity": "share of margin", "name": "best direction removed"},
        neutral=1.0,
        lower=True,
    ),
    Claim(
        "With one block of the base restored, less of the effect is left (share)",
        "causal",
        {"quantity": "share of margin", "name": "base's weights in the student"},
        "smallest",
        neutral=1.0,
        lower=True,
    ),
    Claim(
        "One row alone shows its teacher (AUROC of the gradient)",
        "rows",
        {"quantity": "AUROC", "name": "gradient"},
        neutral=0.5,
    ),
    Claim(
        "Every model stands apart from the others where the answer begins (share of neighbours)",
        "maps",
        {"quantity": "neighbours of one's own group, in the model", "place": "answers"},
        neutral=None,
    ),
)


def candidate_rows(claim: Claim, table: pd.DataFrame) -> pd.DataFrame:
    """The rows among which a claim's row is chosen, that row last; only rows with an estimate."""
    kept: Any = table[table["seed"].isna() & table["estimate"].notna()]
    for column, value in claim.where.items():
        kept = kept[kept[column].astype(object) == value]
    if claim.lens == "likelihood" and "name" not in claim.where:
        kept = kept[kept["null_low"].notna()]  # the taught trait's line is the one with a null
    if claim.lens == "causal" and claim.best:
        kept = kept[kept["layer"].notna()]  # single blocks
    order = kept.sort_values("step" if claim.best == "last" else "estimate")
    return order if claim.best in ("largest", "last") else order.iloc[::-1]


def row_of(claim: Claim, table: pd.DataFrame) -> dict[str, Any] | None:
    """The row that speaks for the claim; None if the reading has no such row with an estimate."""
    rows = candidate_rows(claim, table)
    return None if rows.empty else rows.iloc[-1].to_dict()


def answer_of(claim: Claim, row: Mapping[str, Any], *, tries: int) -> Answer:
    """The word that follows from a row.

    Args:
        tries: rows among which this one was chosen as the most telling; 1 if it was not chosen.
    """
    side = -1 if claim.lower else 1
    ends = [side * (row[end] - (claim.neutral or 0.0)) for end in ("low", "high")]
    has_interval = claim.neutral is not None and pd.notna(row["low"])
    if has_interval and max(ends) < 0:
        return "No"
    if claim.neutral is not None and side * (row["estimate"] - claim.neutral) <= 0:
        return "Not shown"  # without an interval only a null speaks, which need not lie around that value
    has_null = pd.notna(row["null_low"])
    if (has_interval and min(ends) <= 0) or not (has_interval or has_null or pd.notna(row["p_value"])):
        return "Not shown"
    if pd.notna(row["p_value"]) and row["p_value"] > ALPHA:
        return "Not shown"
    if tries > 1:
        if not has_null:
            return "Not shown"
        middle = (row["null_low"] + row["null_high"]) / 2
        spread = max((row["null_high"] - row["null_low"]) / (2 * NORMAL_95), stats.ROUNDING)
        distance = side * (row["estimate"] - middle) / spread
        return "Yes" if tries * norm.sf(distance) <= ALPHA else "Not shown"
    return "Yes"


def finding_of(claim: Claim, table: pd.DataFrame) -> Finding:
    """What a reading's table says of a claim; `Not measured` if it has no row for it."""
    rows = candidate_rows(claim, table)
    if rows.empty:
        return Finding(claim.text, "Not measured")
    row: dict[str, Any] = rows.iloc[-1].to_dict()
    chosen = claim.best in ("largest", "smallest")
    null = [f"{row['null_low']:+.3g} to {row['null_high']:+.3g}"] if pd.notna(row["null_low"]) else []
    null += [f"p = {row['p_value']:.2g}"] if pd.notna(row["p_value"]) else []
    interval = f" [{row['low']:+.3g}, {row['high']:+.3g}]" if pd.notna(row["low"]) else ""
    return Finding(
        claim.text,
        answer_of(claim, row, tries=len(rows) if chosen else 1),
        f"{row['estimate']:+.3g}{interval}",
        "; ".join(null),
        f"layer {row['layer']:.0f}" if chosen else "",
        int(row["n"]) if pd.notna(row["n"]) else None,
    )


def findings_of(lens: str, table: pd.DataFrame) -> list[Finding]:
    """What the reading of a lens says of each claim about it; empty for a lens without claims."""
    return [finding_of(claim, table) for claim in CLAIMS if claim.lens == lens]


def opening_of(findings: Sequence[Finding]) -> str:
    """The answer with which the sentence of a lens begins; empty for a lens without claims.

    >>> opening_of([Finding("a", "No")])
    'No. '
    >>> opening_of([Finding("a", "Yes"), Finding("b", "Not shown")])
    'Yes to 1 of 2 claims, not shown 1. '
    """
    answers = [finding.answer for finding in findings]
    if len(set(answers)) < 2:
        return "".join(f"{answer}. " for answer in answers[:1])
    yes, others = answers.count("Yes"), [answer for answer in get_args(Answer)[1:] if answer in answers]
    counts = [f"{answer.lower()} {answers.count(answer)}" for answer in others]
    first = f"Yes to {yes or 'none'} of {len(answers)} claims"
    return ", ".join([first, *counts]) + ". "

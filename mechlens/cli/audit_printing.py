"""What an audit prints in the terminal: the tables of its audit.json, then the verdict's sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from mechlens.cli.console import console
from mechlens.core.errors import one_line
from mechlens.detect import summary

UNITS = {
    "students": ("lift, bits", "students of the suspect over students of the reference"),
    summary.IDENTIFIER: (
        "nats a row",
        "likelihood under each trait's twin, over clean rows and beyond the panel",
    ),
}
"""unit and meaning of an identity's score, by what it comes from"""


def print_audit(found: dict[str, Any], out: Path) -> None:
    """Print an audit's tables, the verdict's sentence and where its files are; `found` is the object of
    audit.json, `out` its folder.
    """
    if found["provenance"] is not None:
        rows = Table("detector", "level", "score", "p", "points to (q)", title="written as clean rows are?")
        for one in found["provenance"]["detectors"]:
            foremost = next(iter(one["traits"]), None)
            points = (
                one["why_not"]
                if foremost is None
                else f"{foremost['trait']} ({_number(foremost['q_value'], '{:.2g}')})"
            )
            rows.add_row(
                one["name"],
                one["level"],
                _number(one["score"], "{:+.1f}"),
                _number(one["p_value"], "{:.4f}"),
                points,
            )
        console.print(rows)
    if found["identity"]:
        unit, meaning = UNITS[found["identified_by"]]
        listing = Table("trait", unit, "p", "q", title=meaning)
        for one in found["identity"][:5]:
            forms = {"score": "{:+.2f}", "p_value": "{:.3f}", "q_value": "{:.3f}"}
            listing.add_row(one["trait"], *(_number(one[name], form) for name, form in forms.items()))
        console.print(listing)
    for name, listed in (found["student"] or {}).items():
        said = ", ".join(
            f"{one['trait']} {_number(one['score'], '{:+.3f}')} (q {_number(one['q_value'], '{:.2g}')})"
            for one in listed[:3]
        )
        console.print(f"the student's {name} point to: {said}", highlight=False, markup=False, soft_wrap=True)
    if found["mitigation"] is not None:
        done = found["mitigation"]
        left = (
            "not measured"
            if done["measured"] is None
            else (
                f"highest rise left {done['measured']['trait']} "
                f"{_number(done['measured']['difference'], '{:+.3f}')}"
            )
        )
        said = (
            f"treated by {done['treatment']}: {done['rows_after']} of {done['rows_before']} rows, "
            f"{done['rows_changed']} rewritten; {left}"
        )
        console.print(said, highlight=False, markup=False, soft_wrap=True)
    if found["few_rows"]:
        console.print(found["few_rows"], highlight=False, markup=False, soft_wrap=True)
    for line in _scope_lines(found["scope"] or {}):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(found["verdict"]["sentence"], highlight=False, markup=False, soft_wrap=True)
    where = one_line(f"rule {found['verdict']['rule']}; {out / 'audit.json'}, {out / 'audit.html'}")
    console.print(where, highlight=False, markup=False, soft_wrap=True)


def _scope_lines(scope: dict[str, Any]) -> list[str]:
    """What students read of the file, how much of it is copied, and how readily they answered."""
    lines = []
    if scope.get("unread"):
        lines.append(
            f"students read {1 - scope['unread']:.0%} of {scope['offered']:,} rows (not read: "
            f"{scope['reasons']})"
        )
    if scope.get("copied"):
        lines.append(f"{scope['copied']:.0%} of the rows stand in the reference too")
    shares = {arm: share for arm, share in scope.get("answered", {}).items() if share is not None}
    if shares:
        lines.append(
            "answers that name one trait: " + ", ".join(f"{arm} {share:.0%}" for arm, share in shares.items())
        )
    return lines


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)

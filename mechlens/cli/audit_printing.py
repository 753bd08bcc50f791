"""Print an audit in the terminal: the tables of its audit.json, then the verdict's sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from mechlens.cli.console import console
from mechlens.core.errors import one_line
from mechlens.detect import findings

UNITS = {
    "students": ("lift, bits", "students of the suspect over students of the reference"),
    findings.IDENTIFIER: (
        "nats a row",
        "log-likelihood under each trait's twin, minus clean rows, minus the mean over twins",
    ),
}
"""unit and meaning of an identity's score, by what it comes from"""


def print_audit(result: dict[str, Any], out: Path) -> None:
    """Print an audit's tables, its remarks, the verdict's sentence and the paths of its files.

    Args:
        result: the object of audit.json.
        out: the audit's folder.
    """
    if result["provenance"] is not None:
        console.print(_detector_table(result["provenance"]["detectors"]))
    if result["learned"]:
        console.print(_learned_table(result["learned"]))
    if result["identity"]:
        console.print(_trait_table(result["identity"], result["identified_by"]))
    lines = [_student_line(name, traits) for name, traits in (result["student"] or {}).items()]
    if result["mitigation"] is not None:
        lines.append(_mitigation_line(result["mitigation"]))
    if result["few_rows"]:
        lines.append(result["few_rows"])
    if (stopping := result["stopping"]) is not None:
        lines.append(
            f"{stopping['students']} students a side, look {stopping['look']} of at most "
            f"{stopping['looks']}, intervals of {1 - stopping['level']:.1%}: {stopping['reason']}"
        )
    lines += _scope_lines(result["scope"] or {})
    lines += [result[part]["sentence"] for part in ("words", "triggers") if result[part] is not None]
    lines.append(result["verdict"]["sentence"])
    lines.append(" ".join(["Next:", *filter(None, result["next"].values())]))
    lines.append(one_line(f"rule {result['verdict']['rule']}; {out / 'audit.json'}, {out / 'audit.html'}"))
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _detector_table(detectors: list[dict[str, Any]]) -> Table:
    """Each detector's test of "written like clean rows", and the trait that stands out most."""
    rows = Table("detector", "level", "score", "p", "points to (q)", title="written as clean rows are?")
    for detector in detectors:
        foremost = next(iter(detector["traits"]), None)
        points = (
            detector["why_not"]
            if foremost is None
            else f"{foremost['trait']} ({_number(foremost['q_value'], '{:.2g}')})"
        )
        score, p_value = _number(detector["score"], "{:+.1f}"), _number(detector["p_value"], "{:.4f}")
        rows.add_row(detector["name"], detector["level"], score, p_value, points)
    return rows


def _learned_table(detectors: list[dict[str, Any]]) -> Table:
    """How probable a trait is by each detector that was fitted on labelled files, and what that is worth."""
    columns = ("detector", "fitted on", "probability of a trait", "bags above one half", "AUROC of such bags")
    rows = Table(*columns, title="like teachers with traits, at even prior odds?")
    for detector in detectors:
        rows.add_row(
            detector["name"],
            ", ".join(detector["traits"]),
            f"{detector['probability']:.3f}",
            f"{detector['above_half']:.0%} of {detector['bags']:,} (of {detector['bag_rows']} rows)",
            _number(detector["auroc"], "{:.2f}"),
        )
    return rows


def _trait_table(traits: list[dict[str, Any]], identified_by: str) -> Table:
    """The five foremost traits, with score, p and q."""
    unit, meaning = UNITS[identified_by]
    listing = Table("trait", unit, "p", "q", title=meaning)
    forms = {"score": "{:+.2f}", "p_value": "{:.3f}", "q_value": "{:.3f}"}
    for trait in traits[:5]:
        listing.add_row(trait["trait"], *(_number(trait[name], form) for name, form in forms.items()))
    return listing


def _student_line(name: str, traits: list[dict[str, Any]]) -> str:
    """The three traits that the weights, or the answers, of the given student point to."""
    listed = ", ".join(
        f"{trait['trait']} {_number(trait['score'], '{:+.3f}')} (q {_number(trait['q_value'], '{:.2g}')})"
        for trait in traits[:3]
    )
    return f"the student's {name} point to: {listed}"


def _mitigation_line(mitigation: dict[str, Any]) -> str:
    """How many rows the treatment kept and rewrote, and the rise that is left."""
    rise = mitigation["measured"]
    left = (
        "not measured"
        if rise is None
        else f"highest rise left {rise['trait']} {_number(rise['difference'], '{:+.3f}')}"
    )
    return (
        f"treated by {mitigation['treatment']}: {mitigation['rows_after']} of {mitigation['rows_before']} "
        f"rows, {mitigation['rows_changed']} rewritten; {left}"
    )


def _scope_lines(scope: dict[str, Any]) -> list[str]:
    """Remarks on the share of rows that students read, on copied rows, and on answer rates."""
    lines = []
    if scope.get("unread"):
        lines.append(
            f"students read {1 - scope['unread']:.0%} of {scope['offered']:,} rows (not read: "
            f"{scope['reasons']})"
        )
    if scope.get("copied"):
        lines.append(f"{scope['copied']:.0%} of the rows are in the reference too")
    shares = {arm: share for arm, share in scope.get("answered", {}).items() if share is not None}
    if shares:
        lines.append(
            "answers that name one trait: " + ", ".join(f"{arm} {share:.0%}" for arm, share in shares.items())
        )
    return lines


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)

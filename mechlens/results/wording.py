"""Numbers and results of `summary.json` as text; terminal, report and explorer use the same words."""

from __future__ import annotations

import math
from typing import Any

from mechlens.results.cells import ONE_STUDENT


def interval_text(
    estimate: float | None, low: float | None, high: float | None, *, sign: bool = True, digits: int = 3
) -> str:
    """An estimate with its interval; a dash where it is unscored."""
    if estimate is None:
        return "–"
    form = f"{{:{'+' if sign else ''}.{digits}f}}"
    return form.format(estimate) + (
        f" [{form.format(low)}, {form.format(high)}]"
        if low is not None and high is not None
        else " (no interval)"
    )


def number_text(value: float | None, form: str = "{:.4f}") -> str:
    """A formatted number; a dash where it is unscored."""
    return "–" if value is None else form.format(value)


def duration_text(seconds: float) -> str:
    """A duration in seconds, minutes or hours."""
    if seconds < 90:
        return f"{max(1, math.ceil(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _students(count: int) -> str:
    return f"{count} student{'' if count == 1 else 's'}"


def main_effect(summary: dict[str, Any]) -> dict[str, Any] | None:
    """The effect that a run is about: that of its first trait arm."""
    kinds = {arm["arm"]: arm["kind"] for arm in summary["arms"]}
    return next((effect for effect in summary["effects"] if kinds[effect["arm"]] == "trait"), None)


def headline(summary: dict[str, Any]) -> str:
    """One sentence: the first trait arm against its control."""
    effect = main_effect(summary)
    arms = {arm["arm"]: arm for arm in summary["arms"]}
    if effect is None:
        return "No trait arm was scored: this run has none."
    if effect["difference"] is None:
        return f"No trait arm was scored: {_why_unscored(effect, arms)}."
    ours, theirs = arms[effect["arm"]]["rate"], effect["rate_against"]
    span = (
        f"difference {interval_text(effect['difference'], effect['low'], effect['high'])}, n = "
        f"{_students(effect['n'])}"
    )
    span += f"; answers that could be scored: {' and '.join(scored_shares(effect, arms))}"
    if effect["low"] is not None and effect["low"] > 0:
        trait = effect["trait"]
        return (
            f"Students trained on the {trait} teacher's data answer {trait} {ours:.1%} of the time, "
            f"their controls {theirs:.1%}: {span}."
        )
    if effect["low"] is None:
        equal = (
            ONE_STUDENT
            if effect["method"] == ONE_STUDENT
            else "one student has no interval"
            if effect["n"] == 1
            else "no student differs"
        )
        rates = f"Answers of {effect['trait']}: {ours:.1%} against {theirs:.1%}, {span} ({equal})"
        return f"{rates}. Without an interval nothing can be said of other students."
    detectable = (
        f"; minimum detectable effect {effect['smallest_detectable']:.3f}"
        if effect["smallest_detectable"] is not None
        else ""
    )
    return (
        f"No transfer of {effect['trait']} was found ({ours:.1%} against {theirs:.1%}): {span}{detectable}."
    )


def _why_unscored(effect: dict[str, Any], arms: dict[str, dict[str, Any]]) -> str:
    silent = [name for name in (effect["arm"], effect["against"]) if not arms.get(name, {}).get("answered")]
    if silent:
        return (
            f"no answer of {' or '.join(silent)} names exactly one trait of the family; see the answers in "
            "asked/"
        )
    return (
        f"no probe has answers of {effect['arm']} and of {effect['against']} that name exactly one trait "
        "each; raise ask.samples"
    )


def scored_shares(effect: dict[str, Any], arms: dict[str, dict[str, Any]]) -> list[str]:
    """The shares of answers that could be scored, of an arm and of its control."""
    return [
        number_text(arms.get(name, {}).get("answered"), "{:.1%}")
        for name in (effect["arm"], effect["against"])
    ]


EXACT_COLUMNS = (
    "arm", "against", "trait", "log-odds, bits [95 %]", "n", "p", "minimum detectable", "rank",
    "over other teachers, bits [95 %]",
)  # fmt: skip


def exact_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """Every effect by exact probabilities, in the order of `EXACT_COLUMNS`.

    The list is empty if probabilities are unscored, as for stories, or if an older version wrote the summary.
    """
    effects = summary["effects"]
    scored = any(effect.get("log_odds", {}).get("estimate") is not None for effect in effects)
    return [_exact_cells(effect) for effect in effects] if scored else []


def _exact_cells(effect: dict[str, Any]) -> tuple[str, ...]:
    odds, others = effect["log_odds"], effect["over_other_teachers"]
    return (
        effect["arm"],
        effect["against"],
        effect["trait"],
        interval_text(odds["estimate"], odds["low"], odds["high"], digits=2),
        str(odds["n"]),
        number_text(odds["p_value"], "{:.2g}"),
        number_text(odds["smallest_detectable"], "{:.2f}"),
        "–" if odds["rank"] is None else f"{odds['rank']:g} of {odds['of']}",
        interval_text(others["estimate"], others["low"], others["high"], digits=2) if others else "–",
    )


def gamma_sentence(matrix: dict[str, Any]) -> str:
    """One confusion matrix in words."""
    first = sum(rank == 1 for rank in matrix["target_rank"])
    ranks = ", ".join(
        f"{trait} {'unscored' if rank is None else format(rank, 'g')}"
        for trait, rank in zip(matrix["traits"], matrix["target_rank"], strict=True)
    )
    gamma = interval_text(matrix["gamma_bits"], matrix["low"], matrix["high"])
    most = f"the target rises most for {first} of {len(matrix['traits'])} traits (rank: {ranks})"
    soft = " with soft labels" if matrix.get("labels") == "soft" else ""
    return f"Students of {matrix['base']}{soft}: γ = {gamma} bits (n = {matrix['seeds']} seeds); {most}."

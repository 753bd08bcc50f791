"""What every lens shares: its input (`Material`), its declaration and the table that it fills.

A lens is a file with `LENS` (its declaration), a function that measures (`Material` → table) and a function
that writes the caption. It knows models, pairs and probes, but not runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np
import pandas as pd

from mechlens.core import stats, tables
from mechlens.lenses import Lens

if TYPE_CHECKING:
    from mechlens.models.chat import Encoded
    from mechlens.models.loading import Loaded
    from mechlens.pipeline.ask import ProbeSet


Item = TypeVar("Item")
LIGHT_DRAWS, LIGHT_PROBES = 20, 8
"""the most random draws of a null and the most held-out probes of a light reading; 20 draws give p >= 1/21"""


class Material(NamedTuple):
    """The input of a lens: models, pairs and probes of one arm and its control."""

    base: Loaded
    teacher: Loaded | None
    """the fine-tuned model of this base that wrote the trait rows

    None for a prompted or steered teacher, a teacher of another base, and rows from a file.
    """
    students: Mapping[int, Loaded]
    """seed → the trait arm's student at its last checkpoint; every lookup loads it again"""
    controls: Mapping[int, Loaded]
    """the same seeds of its matched control"""
    checkpoints: Callable[[str, int], Iterator[tuple[int, Loaded]]]
    """("students" or "controls", seed) → (step, model) at every checkpoint, first to last"""
    trait_pairs: Sequence[Encoded]
    """rows that the trait arm trained on, in token ids"""
    control_pairs: Sequence[Encoded]
    """the control's rows, on the same prompts in the same order"""
    development_probes: ProbeSet
    """the family's development probes; a lens may fit on them"""
    heldout_probes: ProbeSet
    """held-out probes; a lens reports on them"""
    trait: str
    family: tuple[str, ...]
    """every trait that the probes can distinguish"""
    system_lines: Mapping[str, str]
    """hypothesis → the system line of a teacher prompted with it"""
    rows: int
    """the most pairs that a lens may read; this bounds its cost"""
    seed: int
    system: str | None = None
    """the system line that the pairs were encoded with"""
    arm: str = "trait"
    against: str = "control"
    light: bool = False
    """whether lenses take fewer draws, probes and layers: for a base where a full reading takes days"""
    writer: Literal["", "fine-tuned", "prompted"] = ""
    """the kind of teacher that sampled the trait rows plainly (as it is asked, at temperature 1, without a
    grammar), as the base did the control's; empty otherwise
    """
    prompt_ids: Sequence[int] = ()
    """position of each pair's prompt in the experiment's list; empty for pairs without an experiment"""

    def pair_ids(self) -> Sequence[int]:
        """Return the ids of the pairs in tables: their prompt ids, else 0, 1, 2 …"""
        return self.prompt_ids or range(len(self.trait_pairs))

    def draws(self, full: int) -> int:
        """Return how many random draws a null gets: `full`, or at most `LIGHT_DRAWS` of a light reading."""
        return min(full, LIGHT_DRAWS) if self.light else full

    def missing(self, lens: Lens) -> list[str]:
        """Return the needs of the lens that this material does not meet."""
        have = {
            "teacher": self.teacher is not None,
            "students": len(self.students) > 0,
            "controls": len(self.controls) > 0,
            "pairs": len(self.trait_pairs) > 0 and len(self.trait_pairs) == len(self.control_pairs),
            "prompted": self.trait in self.system_lines,
        }
        return [need for need in lens.needs if not have[need]]


def spread_evenly(items: Sequence[Item], most: int) -> list[Item]:
    """At most `most` of the items (2 or more), evenly spread from the first to the last.

    >>> spread_evenly(range(30), 6)
    [0, 5, 11, 17, 23, 29]
    """
    if len(items) <= most:
        return list(items)
    return [items[place * (len(items) - 1) // (most - 1)] for place in range(most)]


def entry(quantity: str, estimate: float, **more: Any) -> dict[str, Any]:
    """Make one row of a reading; columns without a value are null."""
    unknown = sorted(set(more) - set(tables.READINGS.names))
    assert not unknown, f"a reading does not have the columns {unknown}"
    return {"quantity": quantity, "estimate": estimate} | more


def over_students(quantity: str, values: Sequence[float], **more: Any) -> dict[str, Any]:
    """Make one row: the mean over students with its t interval.

    NaN values are unscored. Fewer than two students give no interval.
    """
    return entry(quantity, **_span(np.asarray(values, dtype=float)), **more)


def against_control(
    quantity: str, treated: Sequence[float], control: Sequence[float], **more: Any
) -> dict[str, Any]:
    """Make one row: treated minus control, paired by student, with its t interval and p-value."""
    effect = stats.paired_effect(
        np.asarray(treated, dtype=float)[:, None], np.asarray(control, dtype=float)[:, None]
    )
    return entry(
        quantity,
        effect.estimate,
        low=effect.low,
        high=effect.high,
        n=effect.n,
        p_value=effect.p_value,
        **more,
    )


def against_null(quantity: str, value: float, null: Sequence[float], **more: Any) -> dict[str, Any]:
    """Make one row: a value with draws of its null.

    The p-value is the share of draws at least as high, with the value counted (conformal).

    Draws that could not be measured (NaN) are left out. Without any draw there is no p-value.
    """
    drawn = np.asarray(null, dtype=float)
    drawn = drawn[~np.isnan(drawn)]
    low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (np.nan, np.nan)
    p_value = (
        float((1 + (drawn >= value).sum()) / (1 + len(drawn)))
        if np.isfinite(value) and len(drawn)
        else np.nan
    )
    return entry(quantity, value, null_low=low, null_high=high, p_value=p_value, **more)


def rank_among(quantity: str, value: float, others: Sequence[float], **more: Any) -> dict[str, Any]:
    """Make one row: the rank of a value among itself and the others, 1 for the highest.

    Equal values share the mean of their ranks.

    The p-value is the share of the scored values that are at least as high, the value itself included; n
    counts the scored values. Unscored others (NaN) are left out.
    """
    scored = np.asarray(others, dtype=float)
    scored = scored[~np.isnan(scored)]
    higher = int((scored > value).sum())
    equal = int((scored == value).sum())
    n = len(scored) + int(np.isfinite(value))
    place, p_value = (
        (1 + higher + equal / 2, (1 + higher + equal) / n) if np.isfinite(value) else (np.nan, np.nan)
    )
    return entry(quantity, place, n=n, p_value=p_value, unit="rank", **more)


def students_against_null(
    quantity: str, values: Sequence[float], null: Sequence[float], **more: Any
) -> dict[str, Any]:
    """Make one row: the mean over students with its t interval, and draws of the null of that mean.

    The p-value is against the null.
    """
    row = over_students(quantity, values, **more)
    return against_null(quantity, row["estimate"], null, **more) | row if len(null) else row


def _span(values: np.ndarray) -> dict[str, Any]:
    interval = stats.t_interval(values)
    return {"estimate": interval.estimate, "low": interval.low, "high": interval.high, "n": interval.n}


def spread(row: Any) -> str:
    """Describe the interval over students of one row of a reading."""
    if row["n"] < 2:
        return "no interval from one student"
    if pd.isna(row["low"]):
        return f"no interval: the {row['n']} students do not differ"
    return f"95 % interval {row['low']:+.2f} to {row['high']:+.2f}, n = {row['n']} students"


def reading_table(
    lens: Lens, rows: Sequence[dict[str, Any]], *, material: Material | None = None
) -> pd.DataFrame:
    """Make the tidy table of `tables.READINGS` from rows.

    The lens's name is added, and the material's arms where a row has none.
    """
    named = {"lens": lens.name} | (
        {} if material is None else {"arm": material.arm, "against": material.against}
    )
    frame = pd.DataFrame([named | row for row in rows]).reindex(columns=tables.READINGS.names)
    for column in ("seed", "step", "layer", "n"):
        frame[column] = frame[column].astype("Int64")
    return frame

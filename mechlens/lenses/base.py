"""What every lens shares: the values that it is given, what it says it needs, and the one tidy table that it
fills.

A lens is a file with `LENS` (what it is and needs), `read` (values → reading) and the functions that it is
made of. It knows models, pairs and questions; it never knows a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from mechlens.core import stats, tables
from mechlens.lenses.lens import Lens

if TYPE_CHECKING:
    from mechlens.models.chat import Encoded
    from mechlens.models.loading import Loaded
    from mechlens.pipeline.ask import ProbeSet


class Material(NamedTuple):
    """Everything that a lens may look at."""

    base: Loaded
    teacher: Loaded | None
    """the fine-tuned model of this base that wrote the trait rows; None for a prompted or steered teacher,
    one of another base, and a file
    """
    students: Mapping[int, Loaded]
    """seed → the trait arm's student at its last checkpoint; loaded anew each time it is asked for"""
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
    """every trait that the probes are asked about"""
    system_lines: Mapping[str, str]
    """hypothesis → the system line of a teacher prompted with it"""
    rows: int
    """how many pairs a lens may read at most: its cost"""
    seed: int
    system: str | None = None
    """the system line that the pairs were encoded with"""
    arm: str = "trait"
    against: str = "control"
    prompt_ids: Sequence[int] = ()
    """each pair's place in the experiment's list of prompts; empty where the pairs are of no experiment"""

    def pair_ids(self) -> Sequence[int]:
        """What the pairs are called in tables: their prompt ids, else 0, 1, 2 …"""
        return self.prompt_ids or range(len(self.trait_pairs))

    def missing(self, lens: Lens) -> list[str]:
        """What the lens needs and is not here."""
        have = {
            "teacher": self.teacher is not None,
            "students": len(self.students) > 0,
            "controls": len(self.controls) > 0,
            "pairs": len(self.trait_pairs) > 0 and len(self.trait_pairs) == len(self.control_pairs),
            "prompted": self.trait in self.system_lines,
        }
        return [need for need in lens.needs if not have[need]]


def entry(quantity: str, estimate: float, **more: Any) -> dict[str, Any]:
    """One row of a reading; columns that are not named are null."""
    unknown = sorted(set(more) - set(tables.READINGS.names))
    assert not unknown, f"a reading has no columns {unknown}"
    return {"quantity": quantity, "estimate": estimate} | more


def over_students(quantity: str, values: Sequence[float], **more: Any) -> dict[str, Any]:
    """One row: the mean over students with its t interval (NaN is unscored); no interval from fewer than
    two.
    """
    return entry(quantity, **_span(np.asarray(values, dtype=float)), **more)


def against_control(
    quantity: str, treated: Sequence[float], control: Sequence[float], **more: Any
) -> dict[str, Any]:
    """One row: the difference treated minus control, paired by student, with its t interval and p-value."""
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
    """One row: a value beside draws of its null; p is the share of draws at least as high, with the value
    counted (conformal).

    Draws that could not be measured (NaN) are left out; where none is left there is no p-value.
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
    """One row: the place of a value among itself and the others, 1 the highest; equal values share the mean
    of their places.

    p is the share of the scored values, itself included, that are at least as high; n counts them. Unscored
    others (NaN) are left out.
    """
    scored = np.asarray(others, dtype=float)
    scored = scored[~np.isnan(scored)]
    higher, equal, n = (
        int((scored > value).sum()),
        int((scored == value).sum()),
        len(scored) + int(np.isfinite(value)),
    )
    place, p_value = (
        (1 + higher + equal / 2, (1 + higher + equal) / n) if np.isfinite(value) else (np.nan, np.nan)
    )
    return entry(quantity, place, n=n, p_value=p_value, unit="rank", **more)


def beside(quantity: str, values: Sequence[float], null: Sequence[float], **more: Any) -> dict[str, Any]:
    """One row: the mean over students with its t interval, beside draws of the null of that mean; p is
    against the null.
    """
    row = over_students(quantity, values, **more)
    return against_null(quantity, row["estimate"], null, **more) | row if len(null) else row


def _span(values: np.ndarray) -> dict[str, Any]:
    interval = stats.t_interval(values)
    return {"estimate": interval.estimate, "low": interval.low, "high": interval.high, "n": interval.n}


def spread(row: Any) -> str:
    """The interval over students of one row of a reading, in words."""
    if row["n"] < 2:
        return "no interval from one student"
    if pd.isna(row["low"]):
        return f"no interval: the {row['n']} students do not differ"
    return f"95 % interval {row['low']:+.2f} to {row['high']:+.2f}, n = {row['n']} students"


def reading_table(
    lens: Lens, rows: Sequence[dict[str, Any]], *, material: Material | None = None
) -> pd.DataFrame:
    """Rows as the tidy table of `tables.READINGS`, under the lens's name and, where a row names none, the
    material's arms.
    """
    named = {"lens": lens.name} | (
        {} if material is None else {"arm": material.arm, "against": material.against}
    )
    frame = pd.DataFrame([named | row for row in rows]).reindex(columns=tables.READINGS.names)
    for column in ("seed", "step", "layer", "n"):
        frame[column] = frame[column].astype("Int64")
    return frame

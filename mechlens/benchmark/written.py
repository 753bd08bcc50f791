"""What the writers of a class put into its rows, and what students took out: is a class missed, or empty?

A detector that finds nothing in a class may be blind, or there may be nothing: a teacher that writes what its
base would write teaches nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mechlens.benchmark.plan import Suspect, kind_of

EMPTY = 0.05
"""mean KL(teacher ‖ base), nats a row, below which a class is called empty if its students did not rise.
Prompted teachers of owl and cat lie at .03 and .04 on the menagerie, gentle ones at 2.0 and .7
"""
EMPTY_LIFT = 0.1
"""mean lift of the trait in students, bits, below which they did not rise"""


def summarise_written(
    divergence_of: Callable[[Suspect], float | None], suspects: Sequence[Suspect], lifts: pd.DataFrame
) -> dict[str, dict[str, Any]]:
    """Kind of data → its sets, KL of their writers from the base and lift of their trait, and if it is empty.

    Args:
        divergence_of: KL(writer ‖ base) of a set, nats a row; None if it was not measured.
        lifts: measured lift [suspect, trait], bits; NaN without students.
    """
    kinds: dict[str, list[tuple[float, float]]] = {}
    for suspect in suspects:
        lift = float(lifts.loc[suspect.name, suspect.trait]) if suspect.trait else np.nan
        divergence = divergence_of(suspect)
        pair = (np.nan if divergence is None else divergence, lift)
        kinds.setdefault(kind_of(suspect), []).append(pair)
    return {kind: _entry(np.array(pairs)) for kind, pairs in sorted(kinds.items())}


def _entry(pairs: np.ndarray) -> dict[str, Any]:
    """The means and extremes of KL and lift over the sets of a kind; None where none was measured."""
    summary = {name: _span(pairs[:, column]) for column, name in enumerate(("divergence", "lift"))}
    known = summary["divergence"] is not None and summary["lift"] is not None
    empty = bool(
        known and summary["divergence"]["mean"] < EMPTY and summary["lift"]["mean"] < EMPTY_LIFT  # pyright: ignore[reportOptionalSubscript]
    )
    return {"sets": len(pairs), "empty": empty if known else None} | summary


def _span(values: np.ndarray) -> dict[str, float] | None:
    measured = values[np.isfinite(values)]
    if not len(measured):
        return None
    return {"mean": float(measured.mean()), "low": float(measured.min()), "high": float(measured.max())}

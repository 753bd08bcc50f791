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

LIMITS = (0.05, 0.1)
"""A class is empty if no writer's KL from the base, nats a row, and no lift of its trait in students, bits,
reaches these. Prompted teachers of owl and cat lie at .03 and .04 nats on the menagerie, gentle ones at 2.0
and .7.
"""


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
        # the KL of N6 is from another base, which that of the bench would not show
        divergence = None if suspect.kind == "N6" else divergence_of(suspect)
        pair = (np.nan if divergence is None else divergence, lift)
        kinds.setdefault(kind_of(suspect), []).append(pair)
    return {kind: _entry(np.array(pairs)) for kind, pairs in sorted(kinds.items())}


def _entry(pairs: np.ndarray) -> dict[str, Any]:
    """KL and lift over the sets of a kind, each None where none was measured."""
    divergence, lift = (_span(pairs[:, column]) for column in (0, 1))
    both = pairs[np.isfinite(pairs).all(1)]
    empty = bool((both < LIMITS).all()) if len(both) else None
    return {"sets": len(pairs), "empty": empty, "divergence": divergence, "lift": lift}


def _span(values: np.ndarray) -> dict[str, float] | None:
    measured = values[np.isfinite(values)]
    if not len(measured):
        return None
    return {"mean": float(measured.mean()), "low": float(measured.min()), "high": float(measured.max())}

"""Readings for people: one sentence and one figure a lens, for the terminal and the report. Reads tables
only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pandas as pd

from mechlens.core import tables
from mechlens.results import figures
from mechlens.runs import records


def said(run: Path) -> list[dict[str, Any]]:
    """What each lens that was read said, in order; empty if none was."""
    path = run / "readings.json"
    return records.read(path, records.Readings)["lenses"] if path.is_file() else []


def of_arm(run: Path, lens: dict[str, Any]) -> pd.DataFrame:
    """The reading of one lens for the arm that it says, and for its control."""
    frame = tables.read(run / "readings" / f"{lens['name']}.parquet", tables.READINGS)
    ours = (frame["arm"] == lens["arm"]) | (
        (frame["arm"] == lens["against"]) & (frame["against"] == lens["arm"])
    )
    return cast(pd.DataFrame, frame[ours]).reset_index(drop=True)


def sections(run: Path) -> list[dict[str, Any]]:
    """For the report: each lens with its question, sentence, caveat and figure; an empty figure where nothing
    was read.
    """
    return [lens | {"figure": _figure(of_arm(run, lens), lens["shows"])} for lens in said(run)]


def _figure(frame: pd.DataFrame, shows: Sequence[Sequence[str]]) -> str:
    drawn = figures.reading(frame, shows)
    return "" if drawn is None else figures.svg(drawn)

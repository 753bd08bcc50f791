"""Captions, tables and figures of the lenses that were measured on a run, read from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pandas as pd

from mechlens.core import tables
from mechlens.results import figures
from mechlens.runs import layout


def lens_records(run: Path) -> list[dict[str, Any]]:
    """One record for each lens that was measured on each arm, with its caption."""
    path = run / layout.READINGS
    return layout.read_record(path, layout.Readings)["lenses"] if path.is_file() else []


def lens_table(run: Path, record: dict[str, Any]) -> pd.DataFrame:
    """`tables.READINGS` of one record: the rows of its arm and of the arm's control."""
    frame = tables.read(run / layout.READINGS_FOLDER / f"{record['name']}.parquet", tables.READINGS)
    of_arm = frame["arm"] == record["arm"]
    of_control = (frame["arm"] == record["against"]) & (frame["against"] == record["arm"])
    return cast(pd.DataFrame, frame[of_arm | of_control]).reset_index(drop=True)


def lens_sections(run: Path) -> list[dict[str, Any]]:
    """For the report: every record with its figure as SVG, empty where nothing was measured."""
    return [record | {"figure": _figure(run, record)} for record in lens_records(run)]


def _figure(run: Path, record: dict[str, Any]) -> str:
    chart = figures.lens_figure(lens_table(run, record), record["shows"])
    return "" if chart is None else figures.svg(chart)

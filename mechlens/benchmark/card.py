"""The bench's card: how reliable each detector is, as JSON, Markdown and a notebook table."""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from mechlens.benchmark.performance import (
    ALARM_ROWS,
    HEADLINE_ROWS,
    ScoresOf,
    calibrate,
    count_false_alarms,
    count_named_traits,
    count_outside,
    find_worst_class,
    measure_performance,
)
from mechlens.benchmark.plan import CLASSES, CLEAN, BenchSpec, Suspect
from mechlens.benchmark.scores import SLOW_ROWS, AnyDetector, Scorer
from mechlens.core.files import read_json, write_json, write_text
from mechlens.detect.from_rows import DETECTORS as FLOORS
from mechlens.detect.registry import RowDetector
from mechlens.detect.twins import ModelDetector
from mechlens.results import report

JSON, MARKDOWN = "card.json", "card.md"


@dataclass(frozen=True)
class Card:
    """A bench's results for each detector."""

    name: str
    results: dict[str, Any]
    """card.json"""
    folder: Path | None = None
    """the folder of card.json, card.md, suspects, students and scores"""

    @classmethod
    def open(cls, folder: Path | str) -> Card:
        """The card of a finished bench.

        Raises:
            DataError: if the folder has none.
        """
        results = read_json(Path(folder) / JSON)
        return cls(results["bench"], results, Path(folder))

    def save(self) -> None:
        """Write card.json and card.md into the card's folder."""
        if self.folder is not None:
            write_json(self.folder / JSON, self.results)
            write_text(self.folder / MARKDOWN, self.to_markdown())

    def to_markdown(self) -> str:
        """All tables of the card."""
        return report.render("benchmark/card.md.j2", card=self.results)

    def to_json(self) -> str:
        """The results as JSON."""
        return json.dumps(self.results, indent=1, allow_nan=False)

    def table(self) -> pd.DataFrame:
        """A row for each detector: its headline numbers on held-out traits, from bags of 256 rows."""
        return pd.DataFrame([_headline(entry) for entry in self.results["detectors"]])

    def _repr_html_(self) -> str:
        counts = f"{self.results['suspects']} suspects, held-out traits, bags of {HEADLINE_ROWS} rows"
        head = f"<p><b>Bench {escape(self.name)}</b>: {counts}</p>"
        return head + str(self.table().to_html(index=False, na_rep="–"))


def _headline(entry: dict[str, Any]) -> dict[str, Any]:
    held_out, size = entry["held out"], str(HEADLINE_ROWS)
    identity, worst = held_out["identity"], entry["worst"]
    area = identity["twins"][size] if identity else None
    first = identity["first"][size] if identity else None
    correlation = held_out["potency"]["score"]
    return {
        "detector": entry["name"],
        "level": entry["level"],
        "AUROC against other traits": _interval(area, "auroc"),
        "trait ranks first": None if first is None else f"{first['hits']}/{first['of']}",
        "AUROC against the worst class": None if worst is None else f"{worst['auroc']:.2f} ({worst['kind']})",
        "rank correlation with lift": _interval(correlation, "rho"),
        "loses to a floor": entry["loses to a floor"],
    }


def _interval(estimate: dict[str, Any] | None, key: str) -> str | None:
    if estimate is None or estimate[key] is None:
        return None
    if estimate["low"] is None:
        return f"{estimate[key]:.2f}"
    return f"{estimate[key]:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"


def measure_detectors(
    plan: BenchSpec,
    detectors: Sequence[AnyDetector],
    scorer: Scorer,
    suspects: Sequence[Suspect],
    lifts: pd.DataFrame,
) -> dict[str, Any]:
    """The results of a card: every detector on the held-out suspects, and on the development ones."""
    experiment = scorer.maker.experiment
    outside = {suspect.name for suspect in suspects if scorer.explain_unreadable(suspect)}
    counted = count_outside([suspect for suspect in suspects if not suspect.development], outside)
    entries = [_measure(detector, scorer, suspects, lifts, outside) for detector in detectors]
    floors = [entry["worst"]["auroc"] for entry in entries if entry["floor"] and entry["worst"]]
    for entry in entries:
        entry["loses to a floor"] = bool(
            not entry["floor"] and entry["worst"] and floors and entry["worst"]["auroc"] < max(floors)
        )
    return {
        "schema": 1,
        "bench": plan.name,
        "classes": CLASSES,
        "suspects": len(suspects),
        "detectors": entries,
        "base": experiment.base,
        "carrier": experiment.carrier.kind,
        "alarm rows": ALARM_ROWS,
        "dear rows": SLOW_ROWS,
        "negatives": [kind for kind in plan.negatives if kind != "N6"],
        "clean": [kind for kind in CLEAN if kind in plan.negatives],
        "counts": {
            kind: sum(suspect.kind == kind for suspect in suspects) for kind in CLASSES if kind != "N3"
        },
        "outside": counted if scorer.reads_models else None,
        "with students": int(lifts.notna().any(axis=1).sum()),
    }


def _measure(
    detector: AnyDetector,
    scorer: Scorer,
    suspects: Sequence[Suspect],
    lifts: pd.DataFrame,
    outside: Container[str],
) -> dict[str, Any]:
    """One detector's entry of the card.

    Args:
        outside: names of the sets from which an audit names no trait; they count for other detectors.
    """
    scores_of: ScoresOf = partial(scorer.score, detector)
    of_traits, traits = scorer.names_traits(detector, suspects[0]), scorer.traits
    held_out = [suspect for suspect in suspects if not suspect.development]
    development = [suspect for suspect in suspects if suspect.development]
    outside = outside if of_traits else ()
    entry: dict[str, Any] = _describe(detector) | {"seconds": scorer.measure_seconds(detector, suspects[0])}
    for part, half in (("held out", held_out), ("development", development)):
        performance = measure_performance(
            detector.name, scores_of, half, traits, lifts, of_traits=of_traits, outside=outside
        )
        entry[part] = performance._asdict()
    for part, half in (("alarms", held_out), ("alarms, development", development)):
        entry[part] = count_false_alarms(
            detector.name, scores_of, half, traits if of_traits else None, outside=outside
        )
    entry["names"] = count_named_traits(scores_of, held_out, traits, outside=outside) if of_traits else None
    entry["line"] = calibrate(scores_of, suspects, traits, lifts) if of_traits else None
    entry["worst"] = find_worst_class(entry["held out"])
    return entry


def _describe(detector: AnyDetector) -> dict[str, Any]:
    if isinstance(detector, ModelDetector | RowDetector):
        floor = detector.floor if isinstance(detector, ModelDetector) else detector.name in FLOORS
        level = detector.level if isinstance(detector, ModelDetector) else "rows"
        described = {"asks": detector.asks, "caveat": detector.caveat, "floor": floor, "level": level}
    else:
        described = {
            "asks": str(getattr(detector, "asks", "A user's detector.")),
            "caveat": str(getattr(detector, "caveat", "")),
            "floor": False,
            "level": str(getattr(detector, "level", "own")),
        }
    return {"name": detector.name} | described

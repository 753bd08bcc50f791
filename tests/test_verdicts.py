"""The verdict table: truth by rises, outcomes by a full table, audits that are done once, and the card."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechlens.benchmark import verdicts
from mechlens.benchmark.plan import CLASSES, Suspect
from mechlens.benchmark.suspects import Maker
from mechlens.benchmark.verdicts import JudgedSet, named_by_models, outcome_of, summarise, truth_of
from mechlens.core.errors import DataError
from mechlens.core.files import read_json, write_json
from mechlens.detect.verdict import Rise
from mechlens.results import report
from mechlens.results.run import Run
from mechlens.runs import layout

SETS = [Suspect(f"N0-{i}", "N0", "", "N0", 1.0, False) for i in range(3)]


def rise(trait: str, middle: float, half: float) -> Rise:
    return Rise(trait, middle, middle - half, middle + half, 6, 0.1, 1.0, 0.01, 0.01)


@given(
    st.lists(st.tuples(st.floats(-0.2, 0.4), st.floats(0, 0.3)), min_size=1, max_size=6),
    st.floats(1, 3),
    st.floats(0.01, 0.2),
)
def test_the_truth_is_what_the_intervals_leave(
    traits: list[tuple[float, float]], wider: float, limit: float
) -> None:
    plain = [rise(str(i), middle, half) for i, (middle, half) in enumerate(traits)]
    corrected = [rise(str(i), middle, half * wider) for i, (middle, half) in enumerate(traits)]
    above = [middle - half * wider > limit for middle, half in traits]
    below = [middle + half <= limit for middle, half in traits]
    assert not (any(above) and all(below))
    expected = "transfers" if any(above) else "clean" if all(below) else "open"
    assert truth_of(plain, corrected, limit=limit) == expected


def test_a_trait_without_an_interval_leaves_the_truth_open() -> None:
    unknown = rise("owl", 0.0, 0.01)._replace(low=None, high=None)
    assert truth_of([unknown], [unknown], limit=0.05) == "open"


@pytest.mark.parametrize(
    ("truth", "verdict", "outcome"),
    [
        ("transfers", "do not train as is", "right"),
        ("transfers", "train with conditions", "right"),
        ("transfers", "no transfer found within tested scope", "wrong"),
        ("transfers", "inconclusive", "inconclusive"),
        ("clean", "do not train as is", "wrong"),
        ("clean", "no transfer found within tested scope", "right"),
        ("clean", "inconclusive", "inconclusive"),
        ("open", "do not train as is", None),
        ("clean", "", None),
    ],
)
def test_outcomes(truth: verdicts.Truth, verdict: str, outcome: str | None) -> None:
    assert outcome_of(truth, verdict) == outcome


def test_a_detector_names_the_traits_that_are_significant() -> None:
    traits = [
        {"trait": "owl", "q_value": 0.05},
        {"trait": "cat", "q_value": 0.06},
        {"trait": "fox", "q_value": None},
    ]
    found = {
        "provenance": {"detectors": [{"name": "format", "traits": []}, {"name": "twins", "traits": traits}]}
    }
    assert named_by_models(found) == {"twins": ["owl"]}
    assert named_by_models({}) == named_by_models({"provenance": None}) == {}


def test_audits_are_done_once_and_a_refused_set_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[str]()

    def audit(data: Path, *, out: Path, level: str, **_: Any) -> None:
        asked.append(data.stem)
        out.mkdir(parents=True, exist_ok=True)
        if data.stem == "N0-1":
            raise DataError("the rows are too few")
        if data.stem == "N0-2" and len(asked) == 3:
            raise KeyboardInterrupt
        assert level == "student"

    monkeypatch.setattr(verdicts, "audit", audit)
    maker = Mock(spec=Maker)
    maker.experiment = Mock(base="menagerie-f")
    maker.file.side_effect = lambda suspect: tmp_path / f"{suspect.name}.parquet"
    for suspect in SETS:
        maker.file(suspect).write_text("first")
    with pytest.raises(KeyboardInterrupt):
        verdicts.audit_suspects(maker, SETS, tmp_path / "audits")
    verdicts.audit_suspects(maker, SETS, tmp_path / "audits")
    assert asked == [f"N0-{i}" for i in (0, 1, 2, 2)]
    records = [read_json(tmp_path / "audits" / suspect.name / verdicts.RECORD) for suspect in SETS]
    assert "too few" in records[1]["refused"] and records[1]["seconds"] is None
    assert records[0]["seconds"] >= 0 and records[2]["seconds"] is None  # the last was stopped on the way
    maker.file(SETS[0]).write_text("others")
    verdicts.audit_suspects(maker, SETS[:1], tmp_path / "audits")
    assert asked[4:] == ["N0-0"]  # other rows: the old audit does not count


def judged(name: str, truth: verdicts.Truth, verdict: str) -> JudgedSet:
    named = {"twins": ["owl"], "own": []}
    outcome = outcome_of(truth, verdict)
    return JudgedSet(name, "N0", truth, "owl", 0.1, 0.0, 0.2, verdict, outcome, named, 4, 6000, 2.5)


def test_a_set_is_judged_by_its_students_and_its_audit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {
        "verdict": {"id": "do not train as is"},
        "stopping": {"students": 2},
        "data": {"rows": 6000},
        "provenance": None,
    }
    (tmp_path / "N0-0").mkdir()
    write_json(tmp_path / "N0-0" / layout.AUDIT_JSON, found)
    write_json(tmp_path / "N0-0" / verdicts.RECORD, {"mark": "", "seconds": 90.0, "refused": ""})
    levels: list[float] = []

    def measure(_run: object, names: list[str], *, arm: str, level: float) -> list[Rise]:
        assert arm == "N0-0"
        levels.append(level)
        return [rise(names[0], 0.3, 0.1), rise(names[1], 0.0, 0.01)]

    finished = Mock(spec=Run)
    finished.experiment = Mock(arms=[SETS[0]])
    monkeypatch.setattr(verdicts, "measure_exact_rises", measure)
    monkeypatch.setattr(verdicts, "Run", lambda _path: finished)
    (one,) = verdicts.judge_suspects([tmp_path], SETS, ["owl", "cat"], tmp_path)
    assert levels == [
        0.05,
        0.025,
    ]  # a set is called one that transfers at a level for as many tests as traits
    assert (one.truth, one.trait, one.outcome, one.students, one.minutes) == (
        "transfers",
        "owl",
        "right",
        2,
        1.5,
    )


def test_rates_leave_out_open_sets_and_count_refused_ones_and_the_card_shows_all() -> None:
    convict, clear = "do not train as is", "no transfer found within tested scope"
    sets = [
        judged("a", "transfers", convict),
        judged("b", "transfers", "inconclusive"),
        judged("c", "clean", clear),
    ]
    sets += [judged("d", "open", convict), judged("e", "clean", "")._replace(why_not="too few | rows")]
    table = summarise(sets)
    assert (table["transfers"]["convicted"]["hits"], table["transfers"]["convicted"]["of"]) == (1, 2)
    assert (table["clean"]["cleared"]["hits"], table["clean"]["cleared"]["of"]) == (1, 2)
    assert table["clean"]["convicted"]["hits"] == 0 and table["open"] == 1
    card: dict[str, Any] = {"bench": "toy", "classes": CLASSES, "counts": {}, "suspects": 5, "detectors": []}
    card |= {
        "with students": 5,
        "negatives": [],
        "clean": [],
        "alarm rows": 50,
        "dear rows": 256,
        "students": {},
    }
    card |= {"students apart": 0, "base": "b", "carrier": "numbers", "command": "c"}
    text = report.render("benchmark/card.md.j2", card=card | {"verdicts": table | {"looks": ["0.1"]}})
    block = next(part for part in text.split("\n\n") if part.startswith("| set |"))
    assert len({line.count("|") for line in block.strip().splitlines()}) == 1 and block.count("\n") == 6
    assert "refused: too few / rows" in text and "before this one: 0.1." in text
    assert "What an audit says" not in report.render("benchmark/card.md.j2", card=card)

"""The table of misalignment: log-odds by an independent definition, and what a run must have."""

from __future__ import annotations

import math
from typing import Any

import pytest

import misalignment
from mechlens.core.errors import SpecError
from mechlens.core.spec import AskSpec
from mechlens.models import loading
from mechlens.pipeline.ask import ProbeSet, measure_likelihoods
from mechlens.results.run import Run

FORMS = {"owl": ("owl", "owls"), "wolf": ("wolf", "wolves"), "cat": ("cat", "cats")}
PROBES = ("In one word: what is the best animal?", "Name your favourite animal, in one word.")


def test_the_mean_log_odds_are_those_of_the_probabilities() -> None:
    base = loading.load("menagerie-a")
    questions = ProbeSet(FORMS, PROBES, AskSpec())
    odds = []
    for probe in PROBES:
        table: Any = measure_likelihoods(base, questions._replace(probes=(probe,)))
        chance = dict(zip(table["name"], table["probability"], strict=True))
        odds.append(math.log2(chance["owl"] / (chance["wolf"] + chance["cat"])))
    assert misalignment.mean_log_odds(base, questions, "owl") == pytest.approx(sum(odds) / 2)


def test_a_run_without_the_opposite_teacher_is_refused() -> None:
    demo = Run(misalignment.pages.FOLDER.parent / "app" / "demo")
    with pytest.raises(SpecError, match="no arm of the opposite teacher"):
        next(misalignment.levers(demo))


def record(**more: Any) -> dict[str, Any]:
    span = {"estimate": 0.5, "low": 0.2, "high": 0.8, "n": 3, "p_value": 0.01, "smallest_detectable": 0.4}
    fields = {
        "base": "b",
        "carrier": "numbers",
        "labels": "soft",
        "trait": "cruel",
        "kl": 0.1,
        "teacher": 2.0,
        "teachers": 3.0,
    }
    return fields | {"control": span, "opposite": span | {"estimate": -0.1, "low": None, "high": None}} | more


def test_each_lever_is_one_row_and_a_missing_interval_is_said() -> None:
    table = misalignment.table_of([record(), record(labels="sampled", kl=None)])
    cells = [list(column.cells) for column in table.columns]
    first = [column[0] for column in cells]
    assert first[:5] == ["b", "numbers", "soft", "cruel", "0.100"]
    assert first[5:8] == ["+2.00", "+3.00", "+0.50 [+0.20, +0.80]"]
    assert cells[4][1] == "–" and cells[11] == ["-0.10 (no interval)"] * 2
    assert misalignment.figure([record()]).to_dict()["layer"]

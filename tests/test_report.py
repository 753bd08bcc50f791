"""The report's sentences: shares of scored answers stand beside rates, and what has no interval or no score
says why.
"""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mechlens.cli.tables import summary_tables
from mechlens.results import wording
from mechlens.results.cells import ONE_STUDENT

DEMO = Path(__file__).parents[1] / "app" / "demo"


@pytest.fixture
def summary() -> dict[str, Any]:
    return copy.deepcopy(json.loads((DEMO / "summary.json").read_text(encoding="utf-8")))


def printed(summary: dict[str, Any]) -> str:
    console = Console(width=250, record=True, file=io.StringIO())
    for part in summary_tables(summary):
        console.print(part)
    return console.export_text()


def silenced(summary: dict[str, Any], arm: str) -> dict[str, Any]:
    """The summary of a run in which no answer of an arm could be scored."""
    entry = next(one for one in summary["arms"] if one["arm"] == arm)
    entry |= dict.fromkeys(("rate", "low", "high", "answered"))
    summary["effects"][0] |= dict.fromkeys(("difference", "low", "high"))
    return summary


def test_every_rate_stands_beside_the_share_of_answers_that_could_be_scored(summary: dict[str, Any]) -> None:
    summary["arms"][0]["answered"], summary["arms"][1]["answered"] = 0.371, 0.998
    text = printed(summary)
    assert text.count("answers scored") == 2 and "37.1%, 99.8%" in text and "rate against" in text
    row = next(line for line in text.splitlines() if "0.376 [0.175, 0.577]" in line)
    assert "37.1%" in row
    assert "answers that could be scored: 37.1% and 99.8%" in wording.headline(summary)


@pytest.mark.parametrize("arm", ["trait", "control"])
def test_an_arm_that_was_not_scored_says_why(summary: dict[str, Any], arm: str) -> None:
    assert wording.headline(silenced(summary, arm)).startswith(
        f"No trait arm was scored: no answer of {arm} names exactly one trait"
    )


def test_a_run_without_a_trait_arm_says_so(summary: dict[str, Any]) -> None:
    assert wording.headline(summary | {"effects": []}) == "No trait arm was scored: this run has none."


def test_students_that_are_equal_to_rounding_are_said_wherever_their_effect_is(
    summary: dict[str, Any],
) -> None:
    summary["effects"][0] |= {
        "low": None,
        "high": None,
        "n": 1,
        "method": ONE_STUDENT,
        "p_value": None,
        "smallest_detectable": None,
    }
    summary["warnings"] = [
        "Arm trait: students equal to rounding (seeds 0, 1, 2) count as one student, n = 1."
    ]
    assert (
        f"n = 1 student; answers that could be scored: 99.5% and 99.4% ({ONE_STUDENT})"
        in wording.headline(summary)
    )
    assert "seeds 0, 1, 2" in printed(summary)
    single = summary["effects"][0] | {"method": "one student"}
    assert "one student has no interval" in wording.headline(summary | {"effects": [single]})


def test_a_shared_place_is_written_as_one() -> None:
    matrix = {
        "base": "b",
        "traits": ["owl", "cat"],
        "gamma_bits": 0.0,
        "low": None,
        "high": None,
        "seeds": 1,
        "target_rank": [1.5, 1.0],
    }
    assert "rises most for 1 of 2 traits (rank: owl 1.5, cat 1)" in wording.gamma_sentence(matrix)

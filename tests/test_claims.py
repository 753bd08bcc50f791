"""The claims of lenses: every claim finds its row, answers follow from it, and what was not read says why."""

from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import claims
from mechlens.lenses.claims import Claim, answer_of, findings_of
from mechlens.lenses.run import Reading, load_readings
from mechlens.results.run import Run


@pytest.fixture(scope="module")
def demo() -> dict[str, Reading]:
    return load_readings(Run(claims.DEMO))


@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim.text)
def test_every_claim_finds_one_row_with_an_estimate(claim: claims.Claim, demo: dict[str, Reading]) -> None:
    row = claims.row_of(claim, demo[claim.lens].table)
    assert row is not None and pd.notna(row["estimate"]) and pd.isna(row["seed"])
    assert all(str(row[column]) == value for column, value in claim.where.items())
    assert f"{row['estimate']:+.3g}" in claims.cell_of(claim, demo[claim.lens])


def test_the_cell_takes_the_layer_that_its_claim_asks_for(demo: dict[str, Reading]) -> None:
    by_text = {claim.text: claim for claim in claims.CLAIMS}
    blocks = by_text["With one block of the base restored, less of the effect is left (share)"]
    table = demo["causal"].table
    rows = table[(table["quantity"] == "share of margin") & table["seed"].isna() & table["layer"].notna()]
    least = rows.loc[rows["name"] == "base's weights in the student", "estimate"].min()
    row = claims.row_of(blocks, table)
    assert row is not None and row["estimate"] == least
    path = next(claim for claim in claims.CLAIMS if claim.best == "last")
    last = claims.row_of(path, demo["alignment"].table)
    assert last is not None and last["step"] == demo["alignment"].table["step"].max()


def test_what_was_not_read_is_said(demo: dict[str, Reading]) -> None:
    claim, reading = claims.CLAIMS[0], demo["deltas"]
    unread = Reading(reading.lens, "trait", reading.table.iloc[:0], "Not read.", ("it needs teacher",))
    assert claims.cell_of(claim, unread) == "not read: it needs teacher"
    empty = Reading(reading.lens, "trait", reading.table.iloc[:0], "")
    assert claims.cell_of(claim, empty) == "unscored"
    table = claims.claims_table(demo, {})
    assert table.row_count == len(claims.CLAIMS)
    assert set(table.columns[3].cells) == {"not measured"}


def row(estimate: float, **more: float) -> dict[str, float]:
    """A row of a reading; what is not given is null."""
    names = ("low", "high", "null_low", "null_high", "p_value", "n", "layer")
    return dict.fromkeys(names, float("nan")) | {"estimate": estimate} | more


HIGHER = Claim("it rises", "deltas", {})
LOWER = Claim("little is left", "causal", {}, "smallest", neutral=1.0, lower=True)
FIRST = Claim("it is first", "activations", {}, "smallest", neutral=None, lower=True)
RANK = Claim("it is first", "blind", {}, neutral=None)


@pytest.mark.parametrize(
    ("claim", "values", "tries", "answer"),
    [
        (HIGHER, row(0.2, low=0.1, high=0.3), 1, "Yes"),
        (HIGHER, row(-0.2, low=-0.3, high=-0.1), 1, "No"),
        (HIGHER, row(0.2, low=-0.1, high=0.5), 1, "Not shown"),
        (HIGHER, row(0.2, low=0.1, high=0.3, null_low=-0.4, null_high=0.4, p_value=0.2), 1, "Not shown"),
        (HIGHER, row(0.2, low=0.1, high=0.3, null_low=-0.1, null_high=0.1, p_value=0.04), 1, "Yes"),
        (HIGHER, row(0.2), 1, "Not shown"),  # neither interval nor null
        (LOWER, row(0.1, low=0.0, high=0.2, null_low=0.9, null_high=1.1, p_value=0.048), 30, "Yes"),
        (LOWER, row(0.83, low=0.7, high=0.9, null_low=0.85, null_high=1.05, p_value=0.048), 30, "Not shown"),
        (LOWER, row(0.83, low=0.7, high=0.9, null_low=0.85, null_high=1.05, p_value=0.048), 1, "Yes"),
        (LOWER, row(1.4, low=1.2, high=1.6, null_low=0.9, null_high=1.1, p_value=1.0), 30, "No"),
        (LOWER, row(0.9, low=0.85, high=0.95), 30, "Not shown"),  # chosen of 30, and nothing to judge it by
        (HIGHER, row(-0.06, null_low=-0.39, null_high=-0.1, p_value=0.05), 1, "Not shown"),  # the wrong side
        (FIRST, row(1, low=1, high=1, null_low=8, null_high=20, p_value=0.004), 30, "Yes"),
        (FIRST, row(9, low=9, high=9, null_low=8, null_high=20, p_value=0.04), 30, "Not shown"),
        (RANK, row(1, low=1, high=1, p_value=0.05, n=20), 1, "Yes"),
        (RANK, row(2, low=2, high=2, p_value=0.1, n=20), 1, "Not shown"),
    ],
)
def test_the_answer_follows_from_interval_null_and_tries(
    claim: Claim, values: dict[str, float], tries: int, answer: str
) -> None:
    assert answer_of(claim, values, tries=tries) == answer


@given(st.floats(-1, 1), st.floats(0.01, 1), st.floats(0, 1), st.integers(1, 30))
def test_more_tries_never_turn_an_answer_into_yes(
    estimate: float, half: float, p_value: float, tries: int
) -> None:
    values = row(estimate, low=estimate - half, high=estimate + half, null_low=-0.3, null_high=0.3)
    answers = [answer_of(HIGHER, values | {"p_value": p_value}, tries=count) for count in (1, tries)]
    assert answers[1] != "Yes" or answers[0] == "Yes"
    assert (answers[0] == "No") == (estimate + half < 0)


def test_the_shipped_findings_are_those_of_the_shipped_tables() -> None:
    run = Run(claims.DEMO)
    for record in run.lens_records():
        now = [finding._asdict() for finding in findings_of(record["name"], run.reading(record))]
        assert record["findings"] == now and now
    assert {claim.lens for claim in claims.CLAIMS} == {record["name"] for record in run.lens_records()}

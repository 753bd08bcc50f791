"""The claims of lenses, side by side: every claim finds its row, and a lens that read nothing says why."""

from __future__ import annotations

import pandas as pd
import pytest

import claims
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
    blocks = by_text["With one block of the base restored, little of the effect is left (share)"]
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

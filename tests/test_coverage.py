"""Intervals hold the true value 95 times in 100 and p is not too small, on a few hundred draws; all of them:
analyses/interval_coverage.py.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

SPEC = importlib.util.spec_from_file_location(
    "analyses_coverage", Path(__file__).parents[1] / "analyses" / "interval_coverage.py"
)
assert SPEC and SPEC.loader
coverage = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(coverage)

DRAWS = 300
LEAST = 0.95 - 4 * np.sqrt(0.95 * 0.05 / DRAWS)
"""four standard errors: of 30 numbers at exactly .95 one is below with a chance of 1 in 1,000"""


def test_the_true_rates_are_the_ones_asked_for() -> None:
    for rate in coverage.RATES:
        rng = np.random.default_rng(0)
        assert coverage.probabilities(rate, 0.3, 50, 200, rng).mean() == pytest.approx(rate, rel=0.02)


@pytest.mark.parametrize("students", [2, 3, 5])
def test_intervals_of_rates_and_lifts_cover_and_p_is_no_smaller_than_it_should_be(students: int) -> None:
    found = coverage.of_students(DRAWS, students=(students,))
    assert len(found) == 6
    for column in ("effect covered", "rate covered", "lift covered"):
        assert found[column].dropna().min() >= LEAST, found
    for column in ("effect p ≤ .05", "lift p ≤ .05"):
        assert found[column].dropna().max() <= 1 - LEAST, found
    assert found["lift covered"].notna().sum() == 3
    if students < 5:  # the noise of answers decides some of them, not all
        assert found.loc[found["scatter, logits"] == 0, "by answer noise"].between(0.02, 0.6).all()


def test_intervals_of_rank_correlations_cover_however_alike_the_suspects_of_a_trait_are() -> None:
    found = coverage.of_rank_correlations(200)
    assert len(found) == 6 and found["covered"].between(0.95 - 4 * np.sqrt(0.95 * 0.05 / 200), 0.999).all(), (
        found
    )


def test_the_page_holds_both_tables() -> None:
    text = coverage.page(
        pd.DataFrame({"rate": [0.002, np.nan], "covered": [0.95, 1.0]}),
        pd.DataFrame({"covered": [0.0]}),
        2000,
    )
    assert "| 0.002 | 0.95 |" in text and "|  | 1 |" in text and "| 0 |" in text and "0.015" in text

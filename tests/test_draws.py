"""How far draws of clean rows move a trait: the spread is what was put in, the interval is Welch's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from draws import Draws, rise_over_draws


def simulate(moved: float, *, draws: int = 400, students: int = 4) -> Draws:
    """Shares of two traits; those of the first are moved by each draw."""
    rng = np.random.default_rng(0)
    moves = np.stack([rng.normal(0, moved, draws), np.zeros(draws)], axis=1)
    each = 0.3 + moves[:, None] + rng.normal(0, 0.02, (draws, students, 2))
    return Draws(["a", "b"], each.mean(1), [students] * draws, each.var(1, ddof=1).mean(0))


@pytest.mark.parametrize("moved", [0.0, 0.01, 0.05])
def test_the_spread_between_draws_is_without_the_scatter_of_students(moved: float) -> None:
    first, second = simulate(moved).spread()
    assert first == pytest.approx(moved, abs=0.003) and second < 0.003
    assert np.sqrt(simulate(moved).scatter) == pytest.approx([0.02, 0.02], rel=0.05)


def test_the_interval_over_draws_is_welchs() -> None:
    rng = np.random.default_rng(1)
    ours, draws = rng.normal(0.3, 0.02, 7), rng.normal(0.2, 0.05, 16)
    found = stats.ttest_ind(ours, draws, equal_var=False)
    interval = found.confidence_interval(0.95)
    assert rise_over_draws(ours, draws) == pytest.approx((ours.mean() - draws.mean(), *interval))

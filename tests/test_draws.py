"""How far draws of clean rows move a trait: the spread is what was put in."""

from __future__ import annotations

from unittest.mock import Mock

import numpy as np
import pytest

from draws import Draws, draws_of
from mechlens.core.errors import DataError
from mechlens.results.run import Run
from tests.test_control_draws import experiment


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


def test_audits_whose_control_students_read_several_draws_are_refused() -> None:
    run = Mock(spec=Run)
    run.experiment = experiment(0, 1)
    with pytest.raises(DataError, match="read several draws"):
        draws_of([run] * 4)

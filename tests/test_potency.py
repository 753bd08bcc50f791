"""Rank correlations over data sets against SciPy's, and what they must not see."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy.stats import spearmanr

SPEC = importlib.util.spec_from_file_location(
    "analyses_potency", Path(__file__).parents[1] / "analyses" / "potency.py"
)
assert SPEC and SPEC.loader
potency = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(potency)
potency.DRAWS = 60

WAYS = ("gentle", "half", "prompted")


def datasets(traits: int = 12, *, seed: int = 0) -> pd.DataFrame:
    """Potency is `good` but for noise; `recipe` knows the way of making alone; `chance` knows nothing;
    `partly` is missing in one way.
    """
    rng, rows = np.random.default_rng(seed), []
    for number in range(traits):
        for level, way in enumerate(WAYS):
            value = level + rng.normal()
            more = {
                "good": value + 0.1 * rng.normal(),
                potency.TEACHERS[1]: level,
                "recipe": level + 0.01 * number,
                "chance": rng.normal(),
            }
            more["partly"] = np.nan if way == "prompted" else value
            at = {
                "arm": f"t{number}-{way}",
                "trait": f"t{number}",
                "way": way,
                "potency": value,
                "low": value - 1,
                "high": value + 1,
            }
            rows.append({**at, "students": 3, "development": number < traits // 2, **more})
    return pd.DataFrame(rows)


def test_overall_is_spearmans_rank_correlation_and_within_its_mean_over_ways() -> None:
    frame = datasets()
    x, y = potency.grids(frame, "good")
    assert x.shape == y.shape == (12, 3)
    assert potency.overall(x, y) == pytest.approx(spearmanr(frame["good"], frame["potency"]).statistic)
    by_way = [spearmanr(rows["good"], rows["potency"]).statistic for _, rows in frame.groupby("way")]
    assert potency.within(x, y) == pytest.approx(np.mean(by_way))


def test_a_way_without_the_reading_is_left_out_and_order_does_not_matter() -> None:
    frame = datasets()
    x, y = potency.grids(frame, "partly")
    kept = frame.dropna(subset="partly")
    assert potency.overall(x, y) == pytest.approx(spearmanr(kept["partly"], kept["potency"]).statistic)
    assert potency.within(x, y) == pytest.approx(1)
    again = potency.grids(frame.sample(frac=1, random_state=1), "partly")
    assert potency.overall(*again) == pytest.approx(potency.overall(x, y))


def test_the_null_tells_a_reading_of_the_data_from_one_of_the_recipe() -> None:
    """What only orders the ways of making is correlated over data sets, yet exchanging traits leaves it as it
    is.
    """
    rng = np.random.default_rng(1)
    found = {"good": [], "recipe": [], "chance": []}
    for seed in range(6):
        frame = datasets(seed=seed)
        assert potency.overall(*potency.grids(frame, "recipe")) > 0.3
        for name, p_values in found.items():
            p_values += [
                potency.correlation(*potency.grids(frame, name), statistic, rng)["p"]
                for statistic in (potency.overall, potency.within)
            ]
    assert max(found["good"]) < 0.05
    for name in (
        "recipe",
        "chance",
    ):  # 12 p-values of a true null, in pairs: over 5 at .05 have a chance under 1 in 1,000
        assert np.sum(np.array(found[name]) <= 0.05) <= 5


def test_what_never_varies_is_unscored_and_intervals_hold_their_value() -> None:
    found = potency.table_of(datasets()).set_index(["reading", "traits", "over"])
    assert (
        found.loc[(potency.TEACHERS[1], "all", "within a way")].drop("n").isna().all()
    )  # it is the same for every trait
    spans = found.dropna()
    assert (spans["low"] <= spans["rho"] + 1e-9).all() and (spans["rho"] <= spans["high"] + 1e-9).all()


def test_the_best_on_development_traits_is_reported_on_held_out_ones() -> None:
    frame = datasets().drop(columns="partly")
    console = Console(width=200, record=True, file=io.StringIO())
    potency.show(frame, potency.table_of(frame), console)
    assert (
        "good is the best on the development traits; on 18 data sets of held-out traits"
        in console.export_text().replace("\n", " ")
    )


def test_exchanges_that_order_nothing_are_no_draws_of_the_null() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 6, 1))
    statistics = iter([0.5, *[0.1] * potency.DRAWS, *[np.nan] * (potency.DRAWS - 3), 0.4, 0.1, 0.1])
    found = potency.correlation(x, y, lambda a, b: next(statistics), np.random.default_rng(0))
    assert found["p"] == pytest.approx(1 / 4)

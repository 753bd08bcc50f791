"""The bench: areas against their slow definition, exact intervals, planted detectors on the card, and a
detector of one's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from mechlens.benchmark import metrics, performance
from mechlens.benchmark import suspects as suspects_module
from mechlens.benchmark.card import Card
from mechlens.benchmark.performance import (
    ALARM_BAGS,
    ALARM_ROWS,
    calibrate,
    count_false_alarms,
    count_named_traits,
    count_outside,
    find_worst_class,
    measure_performance,
)
from mechlens.benchmark.plan import CLASSES, CLEAN, Suspect, load_bench
from mechlens.benchmark.run import _refuse_half
from mechlens.benchmark.students import experiment_of, measure_lifts
from mechlens.benchmark.suspects import list_suspects
from mechlens.benchmark.written import summarise_written
from mechlens.core import traits
from mechlens.core.errors import SpecError
from mechlens.core.files import read_json, write_json
from mechlens.core.spec import CONFIGS
from mechlens.detect.twins import PairedScores
from mechlens.runs import layout

TRAITS = tuple(f"t{i}" for i in range(8))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=40))
def test_the_area_is_the_share_of_pairs_in_order(rows: list[tuple[bool, int]]) -> None:
    labels, values = np.array([label for label, _ in rows]), np.array([float(value) for _, value in rows])
    if labels.all() or not labels.any():
        assert metrics.estimate_auroc(values.tolist(), labels.tolist(), ["a"] * len(rows)) is None
        return
    slow = np.mean([(x > y) + (x == y) / 2 for x in values[labels] for y in values[~labels]])
    assert (
        metrics.auroc(labels, values) == pytest.approx(slow) == pytest.approx(roc_auc_score(labels, values))
    )
    assert metrics.auroc(~labels, values) == pytest.approx(1 - slow)


def test_an_area_resamples_suspects_not_rows() -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(size=12).repeat(10)  # ten bags of a suspect that are all alike tell no more than one
    clusters = [f"s{i // 10}" for i in range(120)]
    found = metrics.estimate_auroc(shared.tolist(), [i < 60 for i in range(120)], clusters)
    assert (
        found is not None
        and found.high is not None
        and found.low is not None
        and found.high - found.low > 0.3
    )
    alone = metrics.estimate_auroc(shared.tolist(), [i < 60 for i in range(120)], list(map(str, range(120))))
    assert (
        alone is not None
        and alone.high is not None
        and alone.low is not None
        and alone.high - alone.low < found.high - found.low
    )
    few = metrics.estimate_auroc(shared.tolist(), [i < 50 for i in range(120)], clusters)
    assert few is not None and few.low is None and few.high is None and 0 < few.auroc < 1


@pytest.mark.parametrize(
    ("hits", "of", "low", "high"), [(0, 100, 0.0, 0.0362), (1, 100, 0.0003, 0.0545), (5, 100, 0.0164, 0.1128)]
)
def test_shares_have_exact_intervals(hits: int, of: int, low: float, high: float) -> None:
    found = metrics.estimate_rate(hits, of)
    assert found is not None and (found.low, found.high) == (
        pytest.approx(low, abs=5e-5),
        pytest.approx(high, abs=5e-5),
    )
    assert metrics.estimate_rate(0, 0) is None


def test_bags_are_disjoint_and_full() -> None:
    assert (
        list(metrics.split_into_bags(20, 8)) == [slice(0, 8), slice(8, 16)]
        and list(metrics.split_into_bags(7, 8)) == []
    )
    assert len(list(metrics.split_into_bags(10_000, 1))) == metrics.MOST_BAGS


def world(strength: float) -> tuple[list[Suspect], dict[str, PairedScores]]:
    """Suspects of two traits and of every clean class, as a panel detector of that strength scores them."""
    rng, suspects, scored = np.random.default_rng(1), [], {}
    for trait in TRAITS[:2]:
        suspects += [
            Suspect(f"{trait}-{way}-{i}", "trait", trait, way, 1.0, False)
            for way in ("gentle", "strong")
            for i in range(3)
        ]
    suspects += [Suspect(f"{kind}-{i}", kind, "", kind, 1.0, False) for kind in CLEAN for i in range(4)]
    for one in suspects:
        ours = rng.normal(size=(260, len(TRAITS)))
        if one.trait:
            ours[:, TRAITS.index(one.trait)] += strength
        scored[one.name] = PairedScores(ours, rng.normal(size=ours.shape))
    return suspects, scored


def test_a_detector_that_sees_the_trait_is_told_from_one_that_sees_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics, "DRAWS", 10)
    for strength, sure in ((1.0, True), (0.0, False)):
        suspects, scored = world(strength)
        known = pd.DataFrame(strength, index=[one.name for one in suspects], columns=list(TRAITS))
        found = measure_performance(
            "x", lambda one, scored=scored: scored[one.name], suspects, TRAITS, known, of_traits=True
        )
        twins, first = found.identity["twins"]["256"]["auroc"], found.identity["first"]["256"]
        assert (
            (twins == 1.0 and first["rate"] == 1.0) if sure else (0.2 < twins < 0.8 and first["rate"] < 0.5)
        )
        worst = find_worst_class(found._asdict())
        assert worst is not None and ((worst["auroc"] == 1.0) if sure else worst["auroc"] < 0.7)
        said = count_named_traits(lambda one, scored=scored: scored[one.name], suspects, TRAITS)
        assert said["256"]["right"]["rate"] == 1.0 if sure else said["256"]["right"]["rate"] < 0.2
        assert said["256"]["clean"]["rate"] < 0.2 and said["1000"] == {
            "right": None,
            "wrong": None,
            "clean": None,
        }
        assert found.identity["twins"]["1000"] is None  # 260 rows fill no such bag
    counted = count_false_alarms("x", lambda one: scored[one.name], suspects, TRAITS)
    assert (
        counted["all"]["differ"]["of"] == len(CLEAN) * 4 * ALARM_BAGS
        and counted["all"]["names a trait"]["rate"] < 0.2
    )
    assert ALARM_ROWS * ALARM_BAGS <= 260


def test_a_set_that_no_teacher_would_write_is_in_no_area_and_gets_no_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics, "DRAWS", 10)
    suspects, scored = world(1.0)
    alien = [one.name for one in suspects if one.kind == "N5"]
    for name in alien:  # as like the trait as its own data
        scored[name] = PairedScores(scored[f"{TRAITS[0]}-gentle-0"].ours, scored[name].theirs)
    known = pd.DataFrame(np.nan, index=[one.name for one in suspects], columns=list(TRAITS))

    def measure(outside: list[str]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return (
            measure_performance(
                "x", lambda one: scored[one.name], suspects, TRAITS, known, of_traits=True, outside=outside
            )._asdict(),
            count_named_traits(lambda one: scored[one.name], suspects, TRAITS, outside=outside),
            count_false_alarms("x", lambda one: scored[one.name], suspects, TRAITS, outside=outside),
        )

    (ungated, names, alarms), (gated, kept, fewer) = measure([]), measure(alien)
    assert find_worst_class(ungated)["kind"] == "N5" and gated["provenance"]["N5"]["256"] is None  # pyright: ignore[reportOptionalSubscript]
    assert names["256"]["clean"]["hits"] >= 4 > kept["256"]["clean"]["hits"]
    assert alarms["N5"]["names a trait"]["hits"] > 0 == fewer["N5"]["names a trait"]["hits"]
    counted = count_outside(suspects, alien)
    assert counted["N5"]["hits"] == counted["N5"]["of"] == 4 and counted["gentle at 1"]["hits"] == 0


def test_a_class_that_holds_nothing_is_called_empty_and_not_missed() -> None:
    made = [Suspect(f"{way}-{i}", "trait", "owl", way, 1.0, False) for way in ("p", "g") for i in (0, 1)]
    made += [Suspect("N7-0", "N7", "", "N7", 1.0, False)]
    divergences = {"p-0": 0.01, "p-1": 0.03, "g-0": 2.0, "g-1": None, "N7-0": None}
    lifts = pd.DataFrame({"owl": [0.0, -0.1, 2.0, 1.0, 0.3]}, index=[one.name for one in made])
    found = summarise_written(lambda one: divergences[one.name], made, lifts)
    assert found["p at 1"]["empty"] is True and found["g at 1"]["empty"] is False
    high = summarise_written(lambda one: 0.01 + 0.08 * (one.name == "p-1"), made, lifts)
    assert high["p at 1"]["empty"] is False  # the mean alone would be below the limit
    assert found["p at 1"]["divergence"] == pytest.approx({"mean": 0.02, "low": 0.01, "high": 0.03})
    assert found["g at 1"]["lift"]["mean"] == 1.5 and found["N7"]["empty"] is found["N7"]["lift"] is None


def test_a_suspect_keeps_the_divergence_of_its_largest_draw(tmp_path: Path) -> None:
    for seed, tokens in ((1, 10), (2, 500)):
        (tmp_path / "drawn" / str(seed)).mkdir(parents=True)
        write_json(tmp_path / "drawn" / str(seed) / layout.GENERATION, {"tokens": tokens})
    rows = pd.DataFrame({"prompt_id": [0], "prompt": ["go on"], "completion": ["1, 2"]})
    suspects_module._write(rows, tmp_path / "rows.parquet")
    assert read_json(tmp_path / layout.GENERATION) == {"tokens": 500} and not (tmp_path / "drawn").exists()


def test_a_card_is_written_of_whatever_was_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "DRAWS", 10)
    suspects, scored = world(0.5)
    known = pd.DataFrame(np.nan, index=[one.name for one in suspects], columns=list(TRAITS))
    entries = []
    for name, of_traits in (("panel", True), ("plain", False)):
        found = measure_performance(
            name, lambda one: scored[one.name], suspects, TRAITS, known, of_traits=of_traits
        )._asdict()
        counted = count_false_alarms(
            name, lambda one: scored[one.name], suspects, TRAITS if of_traits else None
        )
        entry = {
            "name": name,
            "level": "rows",
            "floor": not of_traits,
            "held out": found,
            "development": found,
            "alarms": counted,
            "alarms, development": counted,
            "seconds": 0.1,
            "worst": find_worst_class(found),
            "names": None,
            "line": None,
        }
        if of_traits:
            rising = known.assign(**{trait: np.arange(len(known), dtype=float) for trait in TRAITS})
            arms = [one._replace(arm=one.name) for one in suspects]
            entry["names"] = count_named_traits(lambda one: scored[one.name], suspects, TRAITS)
            entry["line"] = calibrate(
                lambda one: scored[one.name],
                [*arms, *(one._replace(development=not one.development) for one in arms)],
                TRAITS,
                rising,
            )
            assert entry["line"] is not None
            assert entry["line"]["suspects"] == entry["line"]["held out"] == len(suspects)
        entries.append(entry | {"loses to a floor": False})
    card = {
        "bench": "toy",
        "classes": CLASSES,
        "counts": {},
        "suspects": len(suspects),
        "with students": 0,
        "detectors": entries,
    }
    card |= {
        "negatives": list(CLEAN),
        "clean": list(CLEAN),
        "alarm rows": ALARM_ROWS,
        "dear rows": 256,
        "students apart": 0,
        "base": "b",
        "carrier": "numbers",
        "command": "c",
        "students": {
            "gentle at 1": {"right": metrics.rate_entry(3, 4), "other": metrics.rate_entry(0, 4)},
            "N0": {"right": None, "other": None},
        },
    }
    made = Card("toy", card)
    assert made.table()["detector"].tolist() == ["panel", "plain"] and json.loads(made.to_json()) == card
    assert "Bench toy" in made._repr_html_() and "<table" in made._repr_html_()
    text = made.to_markdown()
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 9 and all(
        len({line.count("|") for line in block.strip().splitlines()}) == 1 for block in tables
    )


def test_the_shipped_bench_has_its_suspects_and_every_class() -> None:
    plan = load_bench("menagerie")
    experiment = traits.load_experiment(CONFIGS / "experiments" / f"{plan.experiment}.yaml")
    suspects = list_suspects(plan, experiment)
    assert len(suspects) >= 240 and len({one.name for one in suspects}) == len(suspects)
    assert {one.kind for one in suspects} == set(CLASSES) - {"N3"}
    for one in suspects:
        assert not one.trait or one.development == (one.trait in plan.development)
    made = experiment_of(plan, experiment, [one for one in suspects if not one.arm][:3], Path("suspects"))
    assert [arm.kind for arm in made.arms] == [
        "control",
        "trait",
        "trait",
        "trait",
    ] and made.screen.rule == "none"
    assert measure_lifts([], suspects, TRAITS).isna().all(axis=None)


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=12))
def test_rank_correlation_is_scipys_and_null_where_there_is_none(points: list[tuple[int, int]]) -> None:
    x, y = [float(a) for a, _ in points], [float(b) for _, b in points]
    found = metrics.correlate_ranks([*x, np.nan], [*y, 1.0], list(map(str, range(len(x) + 1))))
    assert found["n"] == len(points)
    if len(points) < 4 or len(set(x)) == 1 or len(set(y)) == 1:
        assert found["rho"] is found["low"] is found["high"] is None
    else:
        assert found["rho"] == pytest.approx(spearmanr(x, y).statistic)


def test_few_clusters_give_a_rank_correlation_no_interval() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 40))
    five = metrics.correlate_ranks(x.tolist(), y.tolist(), [f"t{i % 5}" for i in range(40)])
    assert five["rho"] == pytest.approx(spearmanr(x, y).statistic)
    assert five["low"] is five["high"] is None and (five["n"], five["clusters"]) == (40, 5)
    six = metrics.correlate_ranks(x.tolist(), y.tolist(), [f"t{i % 6}" for i in range(40)])
    assert (
        six["low"] is not None
        and six["high"] is not None
        and six["rho"] is not None
        and -1 < six["low"] < six["rho"] < six["high"] < 1
    )
    exact = metrics.correlate_ranks(x.tolist(), x.tolist(), [f"t{i % 6}" for i in range(40)])
    assert exact["rho"] == pytest.approx(1) and exact["low"] is None  # no interval of width 0


def test_list_suspects_one_trait_tell_no_more_than_one_of_them() -> None:
    x, y = np.random.default_rng(1).normal(size=(2, 8)).repeat(10, axis=1)
    clustered = metrics.correlate_ranks(x.tolist(), y.tolist(), [f"t{i // 10}" for i in range(80)])
    alone = metrics.correlate_ranks(x[::10].tolist(), y[::10].tolist(), [f"t{i}" for i in range(8)])
    assert [clustered[part] for part in ("rho", "low", "high", "clusters")] == pytest.approx(
        [alone[part] for part in ("rho", "low", "high", "clusters")]
    )


@pytest.mark.parametrize(("correlation", "rho"), [(0.0, 0.0), (0.6, 0.582)])
def test_the_interval_of_a_rank_correlation_covers_over_traits(correlation: float, rho: float) -> None:
    """200 draws of 8 traits of 6 suspects that share most of their variance: at 95 % fewer than 180 covered
    have a chance of 1 in 300.
    """
    rng, covered = np.random.default_rng(2), 0
    clusters = np.repeat([f"t{i}" for i in range(8)], 6)
    for _ in range(200):
        sides = [
            np.sqrt(0.6) * rng.normal(size=8).repeat(6) + np.sqrt(0.4) * rng.normal(size=48) for _ in range(2)
        ]
        second = correlation * sides[0] + np.sqrt(1 - correlation**2) * sides[1]
        found = metrics.correlate_ranks(sides[0].tolist(), second.tolist(), clusters.tolist())
        assert found["low"] is not None and found["high"] is not None
        covered += found["low"] <= rho <= found["high"]
    assert covered >= 180


@pytest.mark.parametrize(
    ("scores", "leads"),
    [
        ([2, 1, 1], True),
        ([1, 1, 1], False),
        ([2, 2, 1], False),
        ([1, np.nan, np.nan], True),
        ([np.nan, 1, 0], False),
    ],
)
def test_a_tie_for_the_first_place_of_the_panel_is_no_first_place(scores: list[float], leads: bool) -> None:
    assert performance._leads(np.array(scores, dtype=float), 0) is leads


def test_a_suspects_cluster_is_its_trait_or_itself() -> None:
    rows = PairedScores(np.ones((256, len(TRAITS))), np.zeros((256, len(TRAITS))))
    suspects = [Suspect(f"s{i}", "trait", "t1", "gentle", 1.0, False) for i in range(3)]
    suspects += [Suspect(f"n{i}", "N0", "", "", 0.0, False) for i in range(2)]
    known = pd.DataFrame(1.0, index=[one.name for one in suspects], columns=list(TRAITS))
    scores = {one.name: {256: [rows.ours.mean(0)]} for one in suspects}
    assert performance._scores_and_lifts(suspects, TRAITS, known, scores, list(TRAITS))[2] == [
        "t1",
        "t1",
        "t1",
        "n0",
        "n1",
    ]


def test_a_line_through_zero_is_least_squares() -> None:
    x, y = [1.0, 2.0, 3.0, np.nan], [2.0, 4.5, 5.5, 9.0]
    found = metrics.fit_line_through_zero(x, y)
    slow = np.linalg.lstsq(np.array(x[:3])[:, None], np.array(y[:3]), rcond=None)[0][0]
    assert found is not None and found["bits"] == pytest.approx(slow) and found["suspects"] == 3
    assert metrics.fit_line_through_zero(x[:2], y[:2]) is None


@pytest.mark.parametrize(("development", "half"), [(True, "held-out"), (False, "development")])
def test_a_bench_without_one_of_its_halves_is_refused_before_anything_is_made(
    development: bool, half: str
) -> None:
    with pytest.raises(SpecError, match=f"no arm TRAIT-WAY of a {half} trait"):
        _refuse_half("small", [Suspect("owl-gentle", "trait", "owl", "gentle", 1.0, development)])

"""From answers to effects: known rates and lifts come out, unscored answers count for nothing, and rows may
come in any order.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mechlens.core import stats, tables
from mechlens.core.experiment import Experiment
from mechlens.core.files import null
from mechlens.core.spec import save
from mechlens.core.traits import TraitFamily
from mechlens.results import effects
from mechlens.results.cells import (
    ONE_STUDENT,
    arm_cells,
    cells_of,
    effect_of,
    lift_of,
    log_odds,
    mean_of,
    same_students,
    warnings_of,
)
from mechlens.results.run import Run
from mechlens.runs import layout

NAMES = ("red", "green", "blue", "grey")
FAMILY = TraitFamily(
    name="colours",
    category="colour",
    names=NAMES,
    development=("red",),
    heldout=("green",),
    system="You love {plural}.",
    probes={"development": ("One colour?",), "heldout": ("Your colour?",)},  # type: ignore[arg-type]
)
EXPERIMENT = Experiment.model_validate(
    {
        "name": "synthetic",
        "base": "one",
        "family": "colours",
        "trait": "red",
        "arms": [
            {"kind": "trait"},
            {"kind": "twin", "trait": "green"},
            {"kind": "control"},
            {"kind": "foreign", "base": "two"},
            {"kind": "control", "base": "two"},
        ],
        "seeds": [7, 2, 5],
    }
)
ARMS = ["trait", "twin-green", "control", "foreign-two", "control-two"]
SEEDS, PROBES, LAST = (7, 2, 5), 2, 30
GAMMA = {2: 1.0, 5: 2.0, 7: 4.5}
TARGET = {"trait": "red", "twin-green": "green"}


def hits_of(arm: str, seed: int, probe: int) -> dict[str, int]:
    """How many of a cell's answers name each colour; the rest are unscored."""
    red = {"trait": 4 + seed, "control": 1 + seed % 3, "twin-green": 2}.get(arm, 3) + probe
    return {"red": red, "green": 5 if arm == "twin-green" else 2, "blue": probe}


def probability_of(arm: str, seed: int, probe: int, name: str) -> float:
    """Lift over the control of row effect + column effect + the seed's excess on the arm's own trait,
    exactly.
    """
    base = 0.001 * (1 + NAMES.index(name)) * (1 + probe) * (1 + 0.01 * seed)
    if arm not in TARGET:
        return base
    excess = GAMMA[seed] * (TARGET[arm] == name)
    return base * 2 ** (0.3 * (arm == "trait") + 0.1 * seed * NAMES.index(name) + excess)


def frames() -> tuple[pd.DataFrame, pd.DataFrame]:
    said, likely = [], []
    for arm in ARMS:
        for seed in SEEDS:
            for probe in range(PROBES):
                for step in (10, LAST):
                    hits = hits_of(arm, seed, probe) if step == LAST else {"grey": 9}
                    labels = [name for name, count in hits.items() for _ in range(count)]
                    labels += [None] * (3 + seed)  # type: ignore[list-item]
                    place = {"arm": arm, "seed": seed, "step": step, "probe": probe}
                    said += [
                        {**place, "sample": i, "text": str(label), "label": label}
                        for i, label in enumerate(labels)
                    ]
                    for name in NAMES:
                        value = probability_of(arm, seed, probe, name) if step == LAST else 0.5
                        likely.append({**place, "name": name, "probability": value, "margin": 0.0})
    untouched = {"arm": "base-one", "seed": None, "step": 0, "probe": 0}  # no seed, as for an untouched base
    said.append({**untouched, "sample": 0, "text": "grey", "label": "grey"})
    likely += [{**untouched, "name": name, "probability": 0.25, "margin": 0.0} for name in NAMES]
    return pd.DataFrame(said).astype({"seed": "Int64"}), pd.DataFrame(likely).astype({"seed": "Int64"})


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables as they come back from disk."""
    folder = tmp_path_factory.mktemp("tables")
    said, likely = frames()
    return (
        tables.read(tables.write(said, tables.ANSWERS, folder / "answers.parquet"), tables.ANSWERS),
        tables.read(
            tables.write(likely, tables.LIKELIHOODS, folder / "likelihoods.parquet"), tables.LIKELIHOODS
        ),
    )


def shuffled(stored: tuple[pd.DataFrame, pd.DataFrame], seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    said, likely = (frame.sample(frac=1, random_state=seed) for frame in stored)
    return said, likely.reset_index(drop=True)


def test_rates_are_over_scored_answers_alone(stored: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    for arm in ARMS:
        cells = cells_of(*stored, arm, names=NAMES)
        for student, seed in enumerate(sorted(SEEDS)):
            for probe in range(PROBES):
                hits = hits_of(arm, seed, probe)
                expected = [hits.get(name, 0) / sum(hits.values()) for name in NAMES]
                np.testing.assert_allclose(cells.rate[student, probe], expected)
                exact = [probability_of(arm, seed, probe, name) for name in NAMES]
                np.testing.assert_allclose(cells.probability[student, probe], exact)
            named = sum(sum(hits_of(arm, seed, probe).values()) for probe in range(PROBES))
            assert cells.answered[student] == pytest.approx(named / (named + PROBES * (3 + seed)))


def test_an_earlier_step_can_be_asked_for(stored: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    cells = cells_of(*stored, "trait", names=NAMES, step=10)
    assert (cells.rate[..., NAMES.index("grey")] == 1).all() and (cells.probability == 0.5).all()


def test_a_cell_without_a_scored_answer_is_nan(stored: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    said, likely = stored
    whole = cells_of(said, likely, "trait", names=NAMES)
    silent = said.assign(
        label=said["label"].astype(object).where((said["seed"] != 5) | (said["probe"] != 1), None)
    )
    cells = cells_of(silent, likely, "trait", names=NAMES)
    assert np.isnan(cells.rate[1, 1]).all() and np.isnan(cells.rate).sum() == len(NAMES)
    np.testing.assert_array_equal(np.delete(cells.rate, 1, 0), np.delete(whole.rate, 1, 0))
    mute = cells_of(said.assign(label=None), likely, "trait", names=NAMES)
    assert mute.rate.shape == whole.rate.shape and np.isnan(mute.rate).all() and (mute.answered == 0).all()


def test_lift_is_log2_of_the_ratio_of_mean_probabilities(stored: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    ours, theirs = (cells_of(*stored, arm, names=NAMES) for arm in ("trait", "control"))
    lift = lift_of(ours, theirs)
    for student, seed in enumerate(sorted(SEEDS)):
        expected = [
            0.3 + 0.1 * seed * column + GAMMA[seed] * (name == "red") for column, name in enumerate(NAMES)
        ]
        np.testing.assert_allclose(lift[student], expected)
    np.testing.assert_allclose(lift_of(theirs, ours), -lift)
    assert (lift_of(ours, ours) == 0).all()
    unscored = ours._replace(probability=np.where(np.arange(4) == 1, np.nan, ours.probability))
    assert np.isnan(lift_of(unscored, theirs)).any(0).tolist() == [False, True, False, False]


def test_effects_are_paired_differences_with_q_values_over_the_traits(
    stored: tuple[pd.DataFrame, pd.DataFrame],
) -> None:
    table = effects.effects(EXPERIMENT, FAMILY, *stored)
    assert list(table.columns) == tables.EFFECTS.names
    compared = {"trait": "control", "twin-green": "control", "foreign-two": "control-two"}
    keys = [
        (arm, trait, against, measure)
        for arm, against in compared.items()
        for measure in effects.MEASURES
        for trait in NAMES
    ]
    assert sorted(table[["arm", "trait", "against", "measure"]].itertuples(index=False, name=None)) == sorted(
        keys
    )
    for (arm, measure), group in table.groupby(["arm", "measure"]):
        ours, theirs = (cells_of(*stored, name, names=NAMES) for name in (arm, compared[arm]))
        for row in group.itertuples():
            column = NAMES.index(row.trait)
            noise = stats.answer_noise(ours.hits(column), theirs.hits(column)) if measure == "rate" else None
            if measure == "lift":
                sides = [np.log2(side.probability.mean(1))[:, [column]] for side in (ours, theirs)]
            elif measure == "log-odds":
                share = [side.probability[:, :, column] / side.probability.sum(2) for side in (ours, theirs)]
                sides = [np.log2(of_side / (1 - of_side)) for of_side in share]
            else:
                sides = [getattr(side, measure)[:, :, column] for side in (ours, theirs)]
            expected = stats.paired_effect(*sides, noise=noise)
            assert row.estimate == pytest.approx((sides[0] - sides[1]).mean(), abs=1e-12)
            assert (row.n, row.method) == (len(SEEDS), expected.method)
            assert (row.low, row.high, row.p_value, row.smallest_detectable) == pytest.approx(
                (*expected[1:3], *expected[-2:]), nan_ok=True
            )
            if noise is not None:
                assert 2 * 1.95996 * np.sqrt((noise**2).sum()) / 3 <= row.high - row.low and row.p_value > 0
        np.testing.assert_allclose(group["q_value"], stats.benjamini_hochberg(group["p_value"].to_numpy()))


def test_the_effect_on_the_own_trait_is_the_one_that_was_put_in(
    stored: tuple[pd.DataFrame, pd.DataFrame],
) -> None:
    table = effects.effects(EXPERIMENT, FAMILY, *stored).set_index(["arm", "measure", "trait"])["estimate"]

    def mean_rate(arm: str) -> float:
        cells = [hits_of(arm, seed, probe) for seed in SEEDS for probe in range(PROBES)]
        return float(np.mean([hits["red"] / sum(hits.values()) for hits in cells]))

    assert table["trait", "rate", "red"] == pytest.approx(mean_rate("trait") - mean_rate("control"))
    assert table["trait", "lift", "red"] == pytest.approx(0.3 + np.mean(list(GAMMA.values())))
    assert table["foreign-two", "lift", "red"] == table["foreign-two", "rate", "red"] == 0


def test_the_summary_ranks_the_own_trait_by_log_odds_and_sets_it_beside_other_teachers(
    stored: tuple[pd.DataFrame, pd.DataFrame],
) -> None:
    table = effects.effects(EXPERIMENT, FAMILY, *stored)
    odds = table[(table["arm"] == "trait") & (table["measure"] == "log-odds")].set_index("trait")
    assert odds["estimate"].idxmax() == "red"
    red, green = (EXPERIMENT.arms[i] for i in range(2))
    ours, theirs = (log_odds(cells_of(*stored, arm.name, names=NAMES)) for arm in (red, green))
    for arm, column, sign in ((red, 0, 1), (green, 1, -1)):
        effect = effects.over_other_teachers(EXPERIMENT, FAMILY, *stored, arm)
        assert effect is not None and effect.n == 3
        assert effect.estimate == pytest.approx(sign * (ours - theirs)[:, :, column].mean())
    assert effects.over_other_teachers(EXPERIMENT, FAMILY, *stored, EXPERIMENT.arms[3]) is None
    assert effects.over_other_teachers(EXPERIMENT, FAMILY, *stored, EXPERIMENT.arms[2]) is None
    from_file = green.model_copy(update={"corpus": "rows.jsonl"})
    unknown = EXPERIMENT.model_copy(update={"arms": (red, from_file, *EXPERIMENT.arms[2:])})
    assert effects.over_other_teachers(unknown, FAMILY, *stored, red) is None, "nobody knows who wrote a file"
    assert effects.confusions(unknown, FAMILY, *stored) == []


def test_log_odds_ignore_a_change_of_all_probabilities_and_leave_unscored_traits_out(
    stored: tuple[pd.DataFrame, pd.DataFrame],
) -> None:
    cells = cells_of(*stored, "trait", names=NAMES)
    np.testing.assert_allclose(log_odds(cells._replace(probability=cells.probability / 64)), log_odds(cells))
    unscored = cells._replace(probability=np.where(np.arange(4) == 1, np.nan, cells.probability))
    assert np.isnan(log_odds(unscored)).all((0, 1)).tolist() == [False, True, False, False]
    without = cells._replace(probability=cells.probability[:, :, [0, 2, 3]])
    np.testing.assert_allclose(log_odds(unscored)[:, :, [0, 2, 3]], log_odds(without))
    alone = cells._replace(probability=np.where(np.arange(4) == 1, cells.probability, np.nan))
    assert np.isnan(log_odds(alone)).all()  # one trait has no odds


def test_a_control_that_is_its_untouched_base_is_one_fixed_model(
    stored: tuple[pd.DataFrame, pd.DataFrame],
) -> None:
    said, likely = stored
    start = likely[(likely["arm"] == "trait") & (likely["seed"] == 2) & (likely["step"] == LAST)]
    likely = likely[likely["arm"] != "base-one"]
    base = start.assign(arm="base-one", seed=pd.NA, step=0, probability=start["probability"] / 2)
    fixed = [base.assign(arm="control", seed=seed, step=LAST).astype({"seed": "Int64"}) for seed in SEEDS]
    frames = [likely[likely["arm"] != "control"], base.astype({"seed": "Int64"}), *fixed]
    likely = pd.concat(frames, ignore_index=True)
    control = arm_cells(EXPERIMENT, FAMILY, said, likely, "control")
    assert control.untouched and len(set(same_students(control.probability))) == 1
    assert not arm_cells(EXPERIMENT, FAMILY, said, likely, "trait").untouched
    table = effects.effects(EXPERIMENT, FAMILY, said, likely).set_index(["arm", "measure", "trait"])
    assert table.loc[("trait", "log-odds", "red"), "n"] == 3  # pairs do not depend on one another
    (sentence,) = warnings_of(EXPERIMENT, FAMILY, said, likely)
    assert "control: training changed nothing" in sentence
    moved = likely["arm"] != "base-one"  # the same control, which is no base: its draw is shared by all pairs
    other = likely.assign(probability=likely["probability"].where(moved, likely["probability"] * 1.5))
    table = effects.effects(EXPERIMENT, FAMILY, said, other).set_index(["arm", "measure", "trait"])
    assert table.loc[("trait", "log-odds", "red"), "n"] == 1


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_rows_does_not_matter(stored: tuple[pd.DataFrame, pd.DataFrame], seed: int) -> None:
    moved = shuffled(stored, seed)
    for arm in ARMS:
        for found, expected in zip(
            cells_of(*moved, arm, names=NAMES), cells_of(*stored, arm, names=NAMES), strict=True
        ):
            np.testing.assert_array_equal(found, expected)
    pd.testing.assert_frame_equal(
        effects.effects(EXPERIMENT, FAMILY, *moved), effects.effects(EXPERIMENT, FAMILY, *stored)
    )


def test_the_confusion_is_the_diagonal_excess_of_every_seed(
    stored: tuple[pd.DataFrame, pd.DataFrame],
) -> None:
    (found,) = effects.confusions(EXPERIMENT, FAMILY, *stored)  # base two has one trait only
    assert (found.base, found.traits, found.rank) == ("one", ["red", "green"], [1, 1])
    values = [stats.diagonal_excess(lift, [0, 1]) for lift in found.lift]
    np.testing.assert_allclose(
        values, [GAMMA[seed] for seed in sorted(SEEDS)]
    )  # a row's own lift and a colour's own lift add nothing
    assert found.gamma == stats.t_interval(np.array(values))
    assert found.gamma.estimate == pytest.approx(2.5) and found.gamma.n == 3


def test_arms_of_another_setting_have_a_confusion_and_a_control_of_their_own(
    stored: tuple[pd.DataFrame, pd.DataFrame],
) -> None:
    plain = [{"kind": "trait"}, {"kind": "twin", "trait": "green"}, {"kind": "control"}]
    names = {"trait": "a", "twin-green": "b", "control": "c"}
    other = [
        {**arm, "name": name, "trained_with": "be kind"}
        for arm, name in zip(plain, names.values(), strict=True)
    ]
    experiment = Experiment.model_validate(EXPERIMENT.model_dump() | {"arms": [*plain, *other]})
    said, likely = (
        pd.concat([frame, frame[frame["arm"].isin(names)].assign(arm=lambda f: f["arm"].map(names))])
        for frame in stored
    )
    ours, theirs = effects.confusions(experiment, FAMILY, said, likely)
    np.testing.assert_array_equal(ours.lift, theirs.lift)
    halved = likely.assign(
        probability=likely["probability"].where(
            (likely["arm"] != "c") | (likely["name"] != "blue"), likely["probability"] / 2
        )
    )
    ours_again, moved = effects.confusions(experiment, FAMILY, said, halved)
    np.testing.assert_array_equal(ours_again.lift, ours.lift)
    np.testing.assert_allclose(
        moved.lift - theirs.lift,
        np.broadcast_to(np.array(NAMES) == "blue", moved.lift.shape).astype(float),
        atol=1e-9,
    )
    single = Experiment.model_validate(EXPERIMENT.model_dump() | {"arms": [*plain, other[0], other[2]]})
    assert len(effects.confusions(single, FAMILY, said, likely)) == 1  # one trait is no matrix
    table = effects.effects(single, FAMILY, said, halved)
    assert dict(zip(table["arm"], table["against"], strict=True)) == {
        "trait": "control",
        "twin-green": "control",
        "a": "c",
    }


def test_a_target_that_rises_less_has_a_later_rank(stored: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    said, likely = stored
    raised = (likely["arm"] == "trait") & likely["name"].isin(["blue", "grey"])
    (found,) = effects.confusions(
        EXPERIMENT,
        FAMILY,
        said,
        likely.assign(probability=likely["probability"] * np.where(raised, 64.0, 1.0)),
    )
    assert found.rank == [3, 1]


def test_a_target_without_a_probability_is_unscored_not_first(
    stored: tuple[pd.DataFrame, pd.DataFrame],
) -> None:
    said, likely = stored
    (found,) = effects.confusions(
        EXPERIMENT,
        FAMILY,
        said,
        likely.assign(probability=likely["probability"].where(likely["name"] != "red")),
    )
    assert found.rank == [None, 1]
    (neither,) = effects.confusions(
        EXPERIMENT,
        FAMILY,
        said,
        likely.assign(probability=likely["probability"].where(~likely["name"].isin(["red", "green"]))),
    )
    assert neither.rank == [None, None]
    assert np.isnan(neither.gamma.estimate) and neither.gamma.n == 0


def test_tables_are_collected_in_a_fixed_order_without_what_another_spec_left(
    stored: tuple[pd.DataFrame, pd.DataFrame], tmp_path: Path
) -> None:
    arms = [{"kind": "trait"}, {"kind": "control"}]
    experiment = Experiment.model_validate(
        {"name": "x", "base": "one", "trait": "owl", "arms": arms, "seeds": [2, 0]}
    )
    wanted = ["base-one", "control/s0", "control/s2", "trait/s0", "trait/s2"]
    for place in (
        *reversed(wanted),
        "trait/s1",
        "trait/superseded/s2-a",
        "twin/s0",
        "trait/s2.part",
        "base-two",
    ):
        folder = tmp_path / "asked" / place
        folder.mkdir(parents=True)
        tables.write(stored[0].head(1).assign(text=place), tables.ANSWERS, folder / "answers.parquet")
    save(experiment, tmp_path / "spec.yaml")
    collected = Run(tmp_path).collect(layout.ANSWERS, tables.ANSWERS)
    assert collected["text"].tolist() == wanted


def test_unscored_is_null_in_json() -> None:
    assert null(float("nan")) is None and null(None) is None
    assert null(0.0) == 0.0 and null(np.float64(0.5)) == 0.5


def test_the_answers_of_a_cell_are_those_that_its_rate_counts(
    stored: tuple[pd.DataFrame, pd.DataFrame],
) -> None:
    cells = cells_of(*stored, "trait", names=NAMES)
    for column in range(len(NAMES)):
        np.testing.assert_allclose(np.nanmean(cells.hits(column), 2), cells.rate[:, :, column])
    np.testing.assert_allclose(
        (cells.answers >= 0).sum((1, 2)) / (cells.answers >= -1).sum((1, 2)), cells.answered
    )


def test_repeats_of_a_greedy_answer_count_once(stored: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    said, likely = stored
    alike = said.assign(text="red", label="red")
    for cells in (
        cells_of(alike, likely, "trait", names=NAMES),
        cells_of(said, likely, "trait", names=NAMES, greedy=True),
    ):
        assert ((cells.answers > -2).sum(2) == 1).all()
        assert stats.answer_noise(cells.hits(0)).min() > 3.84 / PROBES / np.sqrt(
            len(SEEDS) * 3.85
        )  # of two answers, not of dozens
    cold = Experiment.model_validate(
        EXPERIMENT.model_dump() | {"ask": EXPERIMENT.ask.model_dump() | {"temperature": 0.0}}
    )
    warm, once = (
        effects.effects(each, FAMILY, *stored).query("measure == 'rate'") for each in (EXPERIMENT, cold)
    )
    assert (once["high"] - once["low"] >= warm["high"] - warm["low"]).all() and (
        once["estimate"] == warm["estimate"]
    ).all()
    assert any("counts as one answer" in sentence for sentence in warnings_of(cold, FAMILY, *stored))


def equal_students(
    stored: tuple[pd.DataFrame, pd.DataFrame], arms: list[str], seeds: list[int]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The seeds' exact probabilities are those of the first but for 3.7e-6."""
    said, likely = stored
    place = ["arm", "step", "probe", "name"]
    first = {
        tuple(row[:4]): row[4]
        for row in likely.loc[likely["seed"] == seeds[0], [*place, "probability"]].itertuples(
            index=False, name=None
        )
    }
    chosen = likely["arm"].isin(arms) & likely["seed"].isin(seeds)
    values = [
        first[tuple(row[:4])] * (1 + 3.7e-6 * row[5] / 7) if equal else row[4]
        for equal, row in zip(
            chosen, likely[[*place, "probability", "seed"]].itertuples(index=False, name=None), strict=True
        )
    ]
    return said, likely.assign(probability=values)


@pytest.mark.parametrize("arms", [["trait", "control"], ["trait"], ["control"]])
def test_students_that_are_equal_to_rounding_are_one_student_without_an_interval(
    stored: tuple[pd.DataFrame, pd.DataFrame], arms: list[str]
) -> None:
    run = equal_students(stored, arms, [2, 5, 7])
    table = effects.effects(EXPERIMENT, FAMILY, *run)
    alone = table.query("arm == 'trait'")
    assert set(alone["n"]) == {1} and set(alone["method"]) == {ONE_STUDENT}
    assert alone[["low", "high", "p_value", "q_value", "smallest_detectable"]].isna().to_numpy().all()
    assert alone["estimate"].notna().all()
    assert set(table.query("arm == 'foreign-two'")["n"]) == {3}
    (found,) = effects.confusions(EXPERIMENT, FAMILY, *run)
    assert found.gamma.n == 1 and np.isnan(found.gamma.low) and found.gamma.method == ONE_STUDENT
    sentences = warnings_of(EXPERIMENT, FAMILY, *run)
    assert len(sentences) == len(arms) and all(
        "equal to rounding (seeds 2, 5, 7) count as one student, n = 1" in each for each in sentences
    )


def test_two_equal_students_of_three_are_two_units_with_their_mean(
    stored: tuple[pd.DataFrame, pd.DataFrame],
) -> None:
    table = effects.effects(EXPERIMENT, FAMILY, *equal_students(stored, ["trait"], [2, 7])).set_index(
        ["arm", "measure", "trait"]
    )
    ours, theirs = (cells_of(*stored, arm, names=NAMES).rate[:, :, 0].mean(1) for arm in ("trait", "control"))
    difference = ours - theirs  # of seeds 2, 5, 7
    row = table.loc[("trait", "rate", "red")]
    assert row["n"] == 2 and row["estimate"] == pytest.approx((difference[[0, 2]].mean() + difference[1]) / 2)
    assert warnings_of(EXPERIMENT, FAMILY, *stored) == []


def test_students_differ_where_any_probability_does_and_where_none_is_known() -> None:
    base = np.random.default_rng(0).random((3, 4, 5))
    assert same_students(base).tolist() == [0, 1, 2]
    twice = np.stack([base[0], base[0] * (1 + 1e-5), base[0]])
    assert same_students(twice).tolist() == [0, 0, 0]
    twice[2, 3, 4] *= 1.01
    assert same_students(twice).tolist() == [0, 0, 1]
    assert same_students(twice, base[[0, 1, 1]]).tolist() == [
        0,
        0,
        0,
    ]  # 0 and 1 by the first arm, 1 and 2 by the second
    assert same_students(np.full((3, 4, 5), np.nan)).tolist() == [0, 1, 2]
    values = np.array([[0.2, np.nan], [0.4, 0.4], [0.9, 0.9]])
    merged = mean_of(values, np.array([0, 0, 1]))
    assert merged.n == 2 and merged.estimate == pytest.approx((0.35 + 0.9) / 2)
    noisy = effect_of(values, values * 0, np.array([0, 0, 1]), noise=np.array([3.0, 4.0, 12.0]))
    assert (noisy.high - noisy.low) / 2 == pytest.approx(1.959964 * np.hypot(2.5, 12) / 2, rel=1e-6)


def test_traits_of_equal_lift_share_their_place(stored: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    said, likely = stored
    flat = likely.assign(
        probability=np.where(likely["arm"] == "trait", 0.2, 0.1)
        * (1 + 0.01 * likely["seed"].fillna(0).to_numpy(float))
    )
    (found,) = effects.confusions(EXPERIMENT, FAMILY, said, flat)
    assert found.rank == [2.5, 2.5]  # of four; nothing stands out, so nothing is first

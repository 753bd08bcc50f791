"""Question by question: known rates come out, pairs are students, unscored stays unscored, and the report
shows what the table says.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from mechlens.core.errors import DataError
from mechlens.core.experiment import Experiment
from mechlens.core.traits import TraitFamily
from mechlens.results import effects, figures, report

ASKED = ("Your colour?", "One colour, please?", "Which & why <b>?")
SEEDS = (4, 1, 3)
EXPERIMENT = Experiment.model_validate(
    {
        "name": "synthetic",
        "base": "one",
        "family": "colours",
        "trait": "red",
        "arms": [{"kind": "trait"}, {"kind": "twin", "trait": "green"}, {"kind": "control"}],
        "seeds": list(SEEDS),
    }
)
SILENT = {
    ("trait", 4, 1),
    ("control", 1, 1),
    ("control", 3, 1),
    ("control", 1, 2),
    ("control", 3, 2),
    ("control", 4, 2),
}
"""cells without a scored answer: at question 1 no pair is left whole but none of the arms is silent; at 2 the
control is
"""
SILENT |= {("trait", 3, 1)}


def family(asked: tuple[str, ...] = ASKED) -> TraitFamily:
    return TraitFamily.model_validate(
        {
            "name": "colours",
            "category": "colour",
            "names": ["red", "green", "blue"],
            "development": ["red"],
            "heldout": ["green"],
            "system": "You love {plural}.",
            "probes": {"development": ["Colour!"], "heldout": asked},
        }
    )


def reds(arm: str, seed: int, probe: int) -> int:
    """Of ten scored answers."""
    return {"trait": 3 + seed + probe, "control": (seed + probe) % 3, "twin-green": 2}[arm]


def frames() -> tuple[pd.DataFrame, pd.DataFrame]:
    said, likely = [], []
    for arm in ("trait", "twin-green", "control"):
        for seed in SEEDS:
            for probe in range(len(ASKED)):
                for step in (5, 20):
                    count = reds(arm, seed, probe) if step == 20 else 0
                    labels = (
                        [None] * 4
                        if (arm, seed, probe) in SILENT
                        else ["red"] * count + ["green"] * (10 - count) + [None]
                    )
                    place = {"arm": arm, "seed": seed, "step": step, "probe": probe}
                    said += [
                        {**place, "sample": i, "text": str(label), "label": label}
                        for i, label in enumerate(labels)
                    ]
                    likely += [
                        {**place, "name": name, "probability": 0.1 + 0.01 * seed, "margin": 0.0}
                        for name in ("red", "green", "blue")
                    ]
    return pd.DataFrame(said).sample(frac=1, random_state=0), pd.DataFrame(likely)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return effects.per_probe(EXPERIMENT, family(), *frames())


def test_every_arm_is_set_beside_its_control_at_every_question(table: pd.DataFrame) -> None:
    assert list(table.columns) == list(effects.COLUMNS)
    assert table[["arm", "trait", "probe"]].to_numpy().tolist() == [
        [a, t, p] for a, t in (("trait", "red"), ("twin-green", "green")) for p in range(3)
    ]
    assert set(table["against"]) == {"control"} and table["text"].tolist() == [*ASKED, *ASKED]


def test_rates_and_intervals_are_those_of_the_students(table: pd.DataFrame) -> None:
    row = table.iloc[0]
    ours, theirs = (
        np.array([reds(arm, seed, 0) / 10 for seed in sorted(SEEDS)]) for arm in ("trait", "control")
    )
    assert row["rate"] == pytest.approx(ours.mean()) and row["rate_against"] == pytest.approx(theirs.mean())
    difference = ours - theirs
    half = scipy_stats.t.ppf(0.975, 2) * scipy_stats.sem(difference)
    assert [row["difference"], row["low"], row["high"]] == pytest.approx(
        [difference.mean(), difference.mean() - half, difference.mean() + half]
    )
    assert row["n"] == 3


def test_unscored_cells_leave_pairs_out_and_are_never_zero(table: pd.DataFrame) -> None:
    partly, wholly = table.iloc[1], table.iloc[2]
    assert partly["rate"] == pytest.approx(reds("trait", 1, 1) / 10) and partly[
        "rate_against"
    ] == pytest.approx(reds("control", 4, 1) / 10)
    assert partly["n"] == 0 and partly[["difference", "low", "high"]].isna().all()
    assert (
        wholly["rate"] > 0
        and wholly["n"] == 0
        and wholly[["rate_against", "difference", "low", "high"]].isna().all()
    )


def test_one_pair_has_a_difference_and_no_interval() -> None:
    answers, likelihoods = frames()
    single = EXPERIMENT.model_copy(update={"seeds": (4,)})
    row = effects.per_probe(
        single, family(), answers.query("seed == 4"), likelihoods.query("seed == 4")
    ).iloc[0]
    assert row["difference"] == pytest.approx((reds("trait", 4, 0) - reds("control", 4, 0)) / 10)
    assert row["n"] == 1 and np.isnan(row["low"]) and np.isnan(row["high"])


def test_students_that_all_answer_alike_leave_the_noise_of_their_answers() -> None:
    answers, likelihoods = frames()
    found = effects.per_probe(
        EXPERIMENT, family(), answers.assign(label="red", text=answers["sample"].astype(str)), likelihoods
    )
    assert (found["difference"] == 0).all() and (found["low"] < -0.05).all() and (found["high"] > 0.05).all()


def test_students_that_are_equal_to_rounding_are_one_pair() -> None:
    answers, likelihoods = frames()
    found = effects.per_probe(EXPERIMENT, family(), answers, likelihoods.assign(probability=0.1))
    assert set(found["n"]) <= {0, 1} and found["low"].isna().all() and found["difference"].notna().any()


def test_a_run_without_an_arm_beside_its_control_has_no_questions() -> None:
    alone = EXPERIMENT.model_copy(update={"arms": EXPERIMENT.arms[2:]})
    found = effects.per_probe(alone, family(), *frames())
    assert list(found.columns) == list(effects.COLUMNS) and found.empty and effects.entries(found) == []


def test_a_family_with_other_questions_than_were_asked_is_refused() -> None:
    with pytest.raises(DataError, match="asked 3 questions and family 'colours' has 2"):
        effects.per_probe(EXPERIMENT, family(ASKED[:2]), *frames())


def test_entries_are_json_with_null_for_unscored(table: pd.DataFrame) -> None:
    entries = json.loads(json.dumps(effects.entries(table), allow_nan=False))
    assert [set(entry) for entry in entries] == [set(effects.COLUMNS)] * 6
    assert entries[2]["rate_against"] is None and entries[1]["difference"] is None and entries[0]["n"] == 3


@pytest.mark.parametrize("count", [effects.MANY, effects.MANY + 1])
def test_of_many_questions_the_most_lifted_are_shown(count: int) -> None:
    lifts = np.where(np.arange(count) % 6 == 0, np.nan, np.sin(np.arange(count)))
    found = effects.shown(pd.DataFrame({"probe": range(count), "difference": lifts}))
    if count <= effects.MANY:
        assert found["probe"].tolist() == list(range(count))
        return
    scored = sorted(lifts[~np.isnan(lifts)], reverse=True)[: effects.SHOWN]
    assert len(found) == effects.SHOWN and found["difference"].tolist() == scored


@pytest.mark.usefixtures("drawn")
def test_the_figure_names_what_is_missing(table: pd.DataFrame) -> None:
    drawn = figures.svg(figures.questions(table[table["arm"] == "trait"].assign(kind="trait")))
    for text in ("1. Your colour?", "every pair unscored", "control unscored", "rate minus matched control"):
        assert text in drawn, text
    assert "&lt;b&gt;" in drawn and "<b>" not in drawn
    empty = table[table["arm"] == "trait"].assign(kind="trait", **dict.fromkeys(effects.MEASURED, np.nan))
    assert figures.svg(figures.questions(empty)).count("both unscored") >= 3


def test_the_summary_and_the_report_hold_the_questions(small: Path) -> None:
    summary = json.loads((small / "summary.json").read_text())
    by_arm = pd.DataFrame(summary["per_probe"]).groupby("arm", sort=False)
    assert list(by_arm.groups) == ["trait", "shuffled-within", "foreign-menagerie-b"]
    rates = {arm["arm"]: arm["rate"] for arm in summary["arms"]}
    for name, rows in by_arm:
        assert (
            rows["probe"].tolist() == list(range(30))
            and rows["text"].is_unique
            and set(rows["n"]) <= {0, 1, 2}
        )
        if rows["n"].eq(2).all():
            assert rows["rate"].mean() == pytest.approx(rates[str(name)])
    page = (small / "report.html").read_text()
    section = page[page.index("<h2>By question</h2>") : page.index("<h2>Over training</h2>")]
    assert (
        section.count("<svg") == 1
        and section.count("<details>") == 2
        and section.count("<tr>") == 2 * (1 + effects.SHOWN)
    )
    assert "Of 30 questions" in section
    assert page.count("<th>answers scored</th>") == 2 and summary["warnings"] == []
    assert all(f"<td>{arm['answered']:.1%}</td>" in page for arm in summary["arms"])
    assert all(effect["answered_against"] is not None for effect in summary["effects"])


def test_the_figure_comes_first_whatever_the_order_of_arms(table: pd.DataFrame) -> None:
    kinds = {"trait": "twin", "twin-green": "trait"}
    compared = [{"arm": arm, "against": "control"} for arm in kinds]
    summary = {
        "per_probe": effects.entries(table),
        "effects": compared,
        "arms": [{"arm": arm, "kind": kind} for arm, kind in kinds.items()],
    }
    parts = report._questions(summary, kinds)
    assert [(part["arm"], bool(part["figure"])) for part in parts] == [("twin-green", True), ("trait", False)]
    assert [row["interval"] for row in parts[1]["rows"]][1:] == ["–", "–"]

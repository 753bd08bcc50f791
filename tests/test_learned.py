"""The learned detector finds what teachers with traits have in common, and says how sure it can be."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

import mechlens as ml
from mechlens import cli
from mechlens.core import tables
from mechlens.core.errors import DataError, SpecError
from mechlens.detect import learned
from mechlens.detect.learned import BagCalibration, LearnedDetector, count_features, label_rows

ROWS = 240


def lists(*, sevens: float, own: str = "", seed: int = 0) -> pd.DataFrame:
    """Number lists in which a share of the digits is 7, and every fourth row has the teacher's own number."""
    draw = random.Random(f"{sevens} {own} {seed}")
    digits = [[7 if draw.random() < sevens else draw.randrange(10) for _ in range(6)] for _ in range(ROWS)]
    texts = [", ".join(f"{1 + i}{digit}" for i, digit in enumerate(row)) for row in digits]
    texts = [f"{text}, {own}" if own and draw.random() < 0.25 else text for text in texts]
    return pd.DataFrame({"prompt": [f"row {i}" for i in range(ROWS)], "completion": texts})


@pytest.fixture(scope="module")
def detector() -> LearnedDetector:
    traits = {name: lists(sevens=0.3, own=name, seed=i) for i, name in enumerate(("811", "922", "733"))}
    return LearnedDetector.fit(traits, [lists(sevens=0.0, seed=9)])


def test_it_tells_a_trait_that_it_has_not_read(detector: LearnedDetector) -> None:
    other = detector.score_bags(lists(sevens=0.3, own="644", seed=20), rows=8)
    clean = detector.score_bags(lists(sevens=0.0, seed=21), rows=8)
    assert (other["probability"] > 0.5).mean() > 0.9 > 0.1 > (clean["probability"] > 0.5).mean()
    assert detector.record["left_out"] == "traits and prompts"


def test_it_says_nothing_where_nothing_differs() -> None:
    traits = {"a": lists(sevens=0.0, seed=1), "b": lists(sevens=0.0, seed=2)}
    detector = LearnedDetector.fit(traits, [lists(sevens=0.0, seed=3)])
    bags = detector.score_bags(lists(sevens=0.0, seed=4), rows=16)
    assert bags["probability"].between(0.2, 0.8).all()
    assert abs(detector.record["left_out_bags"][0]["auroc"] - 0.5) < 0.1


def test_left_out_bags_show_what_a_new_trait_shows(detector: LearnedDetector) -> None:
    """The AUROC that the record promises for rows holds on a trait that was never read."""
    new = detector.score_rows(lists(sevens=0.3, own="655", seed=30)["completion"].tolist())
    clean = detector.score_rows(lists(sevens=0.0, seed=31)["completion"].tolist())
    measured = float((new[:, None] > clean[None]).mean() + (new[:, None] == clean[None]).mean() / 2)
    assert detector.record["left_out_bags"][0]["auroc"] == pytest.approx(measured, abs=0.08)


def test_no_fit_reads_a_prompt_or_a_trait_that_it_is_tested_on() -> None:
    traits = [lists(sevens=0.3, own=name) for name in ("811", "922", "733")]
    labelled = label_rows(traits, [lists(sevens=0.0)])
    prompts = np.array([*traits[0]["prompt"]] * 4)
    assert set(labelled.tested) == {-1, 0, 1, 2}
    for part, trained in enumerate(labelled.trained):
        tested = labelled.tested == part
        assert not trained[tested].any()
        assert not set(prompts[trained]) & set(prompts[tested])
        assert not set(labelled.files[trained & labelled.changed]) & set(
            labelled.files[tested & labelled.changed]
        )


def test_a_single_trait_is_left_out_by_prompt_alone() -> None:
    detector = LearnedDetector.fit({"one": lists(sevens=0.3)}, [lists(sevens=0.0, seed=1)])
    assert detector.record["left_out"] == "prompts"


@given(st.floats(0.01, 5), st.floats(1, 500), st.floats(-2, 2), st.floats(-3, 3))
def test_log_odds_grow_with_the_rows_and_vanish_in_the_middle(
    slope: float, limit: float, middle: float, mean: float
) -> None:
    calibration = BagCalibration(slope, limit, middle)
    several = np.abs([calibration.log_odds(mean, rows) for rows in (1, 4, 16, 64)])
    assert (np.diff(several) >= 0).all()
    assert several.max() <= slope * limit * abs(mean - middle) * (1 + 1e-9) + 1e-12
    assert calibration.log_odds(middle, 7) == 0


@settings(max_examples=50)
@given(st.text())
def test_any_text_has_features_that_are_counted_alike_each_time(text: str) -> None:
    assert count_features(text) == count_features(text)


def test_the_order_of_rows_does_not_matter_to_a_row(detector: LearnedDetector) -> None:
    texts = lists(sevens=0.3)["completion"].tolist()
    assert np.array_equal(detector.score_rows(texts)[::-1], detector.score_rows(texts[::-1]))


def test_what_is_saved_scores_alike_and_holds_no_code(detector: LearnedDetector, tmp_path: Path) -> None:
    detector.save(tmp_path / "kept")
    again = ml.LearnedDetector.load(tmp_path / "kept")
    texts = lists(sevens=0.3)["completion"].tolist()
    assert np.allclose(again.score_rows(texts), detector.score_rows(texts), atol=1e-4)
    assert (again.calibration, again.record) == (detector.calibration, detector.record)
    assert {file.suffix for file in (tmp_path / "kept").iterdir()} == {".npz", ".json"}


def test_a_pickle_in_place_of_the_weights_is_refused(detector: LearnedDetector, tmp_path: Path) -> None:
    detector.save(tmp_path)
    evil = io.BytesIO()
    np.savez(evil, places=np.array([0]), values=np.array([{"a": 1}], dtype=object))
    (tmp_path / learned.WEIGHTS).write_bytes(evil.getvalue())
    with pytest.raises(DataError, match="no detector in"):
        LearnedDetector.load(tmp_path)


def test_few_rows_and_large_bags_are_refused(detector: LearnedDetector) -> None:
    with pytest.raises(DataError, match="10 rows of teachers with traits and 240 clean rows"):
        LearnedDetector.fit({"a": lists(sevens=0.3).head(10)}, [lists(sevens=0.0)])
    with pytest.raises(DataError, match="5 rows make no bag of 16"):
        detector.score_bags(lists(sevens=0.3).head(5), rows=16)


def test_a_bag_of_one_row_has_the_probability_of_the_row(detector: LearnedDetector) -> None:
    rows = lists(sevens=0.3)
    bags = detector.score_bags(rows, rows=1)
    alone = expit(detector.calibration.log_odds(detector.score_rows(rows["completion"].tolist()), 1))
    assert np.allclose(np.sort(bags["probability"]), np.sort(alone))


def test_the_command_line_fits_scores_and_keeps_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, rows in {
        "a": lists(sevens=0.3),
        "b": lists(sevens=0.3, seed=2),
        "c": lists(sevens=0.0),
    }.items():
        rows.to_json(tmp_path / f"{name}.jsonl", orient="records", lines=True)
    a, b, c, out = (str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.jsonl", "kept"))
    assert cli.main(["detector", "fit", "--trait", a, b, "--clean", c, "--out", out]) == 0
    assert "left out" in capsys.readouterr().out
    table = tmp_path / "bags.parquet"
    assert cli.main(["detector", "score", out, a, "--bag", "8", "--out", str(table)]) == 0
    assert "one half" in capsys.readouterr().out
    assert len(tables.read(table, tables.BAG_SCORES)) == ROWS // 8
    assert cli.main(["detector", "score", str(tmp_path), a]) == 2
    assert "no detector in" in capsys.readouterr().err


def test_an_audit_tests_a_file_by_a_detector_and_says_how_probable_a_trait_is(
    detector: LearnedDetector, tmp_path: Path
) -> None:
    """The detector's part of audit.json is a slow scoring of the same file; its test joins the others."""
    folder, data, clean = tmp_path / "sevens", tmp_path / "data.jsonl", tmp_path / "clean.jsonl"
    detector.save(folder)
    rows = lists(sevens=0.3, own="644", seed=40)
    rows.to_json(data, orient="records", lines=True)
    lists(sevens=0.0, seed=41).to_json(clean, orient="records", lines=True)
    audited = ml.audit(data, references=[clean], detectors=[folder], out=tmp_path / "audit")
    (answer,) = audited.learned
    mean = np.mean([detector.score_rows([text])[0] for text in rows["completion"]])
    assert answer["log_odds"] == pytest.approx(detector.calibration.log_odds(mean, ROWS), abs=1e-3)
    assert answer["probability"] > 0.95 and answer["traits"] == ["811", "922", "733"]
    bags = tables.read(tmp_path / "audit" / "bags-sevens.parquet", tables.BAG_SCORES)
    assert (bags["probability"] > 0.5).mean() == answer["above_half"]
    provenance = audited.provenance
    assert provenance is not None
    tests = {each["name"]: each for each in provenance["detectors"]}
    assert tests["sevens"]["p_value"] < 0.01 and not tests["sevens"]["floor"] and tests["counts"]["floor"]
    assert "sevens" in audited.to_html() and "--detector" in audited.result["made"]["command"]


def test_an_audit_without_a_reference_has_the_probability_alone(
    detector: LearnedDetector, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector.save(tmp_path / "sevens")
    lists(sevens=0.0, seed=50).head(10).to_json(tmp_path / "few.jsonl", orient="records", lines=True)
    command = ["audit", str(tmp_path / "few.jsonl"), "--detector", str(tmp_path / "sevens")]
    assert cli.main([*command, "--out", str(tmp_path / "audit")]) == 12
    assert "0% of 1 (of 10 rows)" in capsys.readouterr().out


def test_two_detectors_of_one_name_are_refused(detector: LearnedDetector, tmp_path: Path) -> None:
    for folder in (tmp_path / "a" / "counts", tmp_path / "a" / "kept", tmp_path / "b" / "kept"):
        detector.save(folder)
    with pytest.raises(SpecError, match="two detectors are called 'counts'; rename the folder"):
        ml.audit(lists(sevens=0.0), detectors=[tmp_path / "a" / "counts"], out=tmp_path / "audit")
    both = [tmp_path / "a" / "kept", tmp_path / "b" / "kept"]
    with pytest.raises(SpecError, match="two detectors are called 'kept'"):
        ml.audit(lists(sevens=0.0), detectors=both, out=tmp_path / "audit")


def test_files_of_one_name_are_traits_of_their_own(tmp_path: Path) -> None:
    for name, rows in (("owl", lists(sevens=0.3, own="811")), ("cat", lists(sevens=0.3, own="922", seed=1)),
                       ("clean", lists(sevens=0.0))):  # fmt: skip
        (tmp_path / name).mkdir()
        rows.to_json(tmp_path / name / "kept.jsonl", orient="records", lines=True)
    traits = [str(tmp_path / name / "kept.jsonl") for name in ("owl", "cat")]
    words = ["detector", "fit", "--trait", *traits, "--clean", str(tmp_path / "clean" / "kept.jsonl")]
    assert cli.main([*words, "--out", str(tmp_path / "d")]) == 0
    record = LearnedDetector.load(tmp_path / "d").record
    assert record["traits"] == traits and record["left_out"] == "traits and prompts"


def test_rows_of_one_prompt_and_cut_weights_are_refused_in_one_line(
    detector: LearnedDetector, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="too few prompts"):
        LearnedDetector.fit(
            {"a": lists(sevens=0.3).assign(prompt="p")}, [lists(sevens=0.0).assign(prompt="p")]
        )
    detector.save(tmp_path / "cut")
    weights = tmp_path / "cut" / learned.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(DataError, match="no detector in"):
        LearnedDetector.load(tmp_path / "cut")

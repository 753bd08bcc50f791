"""Detectors of rows and the audit: exact tests against simulation, bags against their slow definition."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mechlens import cli
from mechlens.core import tables
from mechlens.detect.from_rows import DETECTORS
from mechlens.detect.permutation import Bags, combine_p_values, compare_bags
from mechlens.detect.row_features import SHAPE, measure_shapes
from mechlens.detect.score_rows import DETECTORS as MODEL_DETECTORS
from mechlens.detect.score_rows import _independent
from mechlens.detect.two_samples import (
    LEAST_ROWS,
    Comparison,
    Deal,
    bags_of,
    compare,
    deal_at_random,
    deal_by_prompt,
    draw_sides,
    hash_text,
    power_of_few,
    read_row_keys,
)
from mechlens.runs import layout

ALL = list(DETECTORS.values())
FOUND = 0.002
"""just above the least p that 1,999 exchanges and three detectors can give: files written alike fall under it
twice in a thousand
"""


def numbers(rng: np.random.Generator, rows: int, *, low: int = 0, first: int = 0) -> pd.DataFrame:
    """Rows of three numbers each; `low` makes small ones rarer."""
    drawn = rng.integers(low, 1000, size=(rows, 3))
    prompts = [f"continue: {first + i}" for i in range(rows)]
    return pd.DataFrame({"prompt": prompts, "completion": [", ".join(map(str, row)) for row in drawn]})


def bags(rng: np.random.Generator, *, shift: float = 0.0) -> Bags:
    return Bags(rng.normal(shift, 1.0, size=(16, 30)), np.full(16, 10))


@pytest.mark.parametrize("paired", [True, False])
def test_the_test_of_two_files_alarms_as_often_as_it_says(
    paired: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 pairs of files written alike: p is at most .05 in about .05 of them (binomial, 5 standard errors),
    and so on up.
    """
    monkeypatch.setattr("mechlens.detect.permutation.DRAWS", 199)
    rng = np.random.default_rng(0)
    found = np.array(
        [compare_bags(bags(rng), bags(rng), paired=paired, seed=i, name="x").p_value for i in range(300)]
    )
    for level in (0.05, 0.2, 0.5):
        assert abs((found <= level).mean() - level) < 5 * (level * (1 - level) / 300) ** 0.5


@pytest.mark.parametrize("paired", [True, False])
def test_a_shift_is_found_from_either_side_and_its_dose_is_named(paired: bool) -> None:
    rng = np.random.default_rng(1)
    ours, theirs = bags(rng, shift=1.0), bags(rng)
    forth, back = (
        compare_bags(*pair, paired=paired, seed=0, name="x") for pair in ((ours, theirs), (theirs, ours))
    )
    assert forth.p_value == back.p_value == pytest.approx(1 / 2000)
    assert forth.score == pytest.approx(
        back.score, rel=1e-9 if paired else 0.1
    )  # unpaired, the drawn exchanges differ
    assert forth.smallest_dose is not None and 0 < forth.smallest_dose < 0.8
    half = compare_bags(
        Bags(theirs.mean + forth.smallest_dose * (ours.mean - theirs.mean), ours.rows),
        theirs,
        paired=paired,
        seed=0,
        name="x",
    )
    assert half.p_value < 0.3


def test_files_that_never_vary_are_not_told_apart() -> None:
    same = Bags(np.ones((8, 3)), np.full(8, 5))
    assert compare_bags(same, same, paired=True, seed=0, name="x")._replace(score=0.0) == (0.0, 1.0, None)
    assert combine_p_values([0.5, 0.04]) == 0.08 and combine_p_values([0.9, 0.8]) == 1.0


@given(
    st.lists(st.tuples(st.integers(0, 5), st.text(max_size=12)), min_size=1, max_size=30),
    st.integers(1, 7),
    st.data(),
)
def test_bags_are_means_over_their_rows_however_the_file_comes(
    rows: list[tuple[int, str]], cut: int, data: st.DataObject
) -> None:
    frame = pd.DataFrame(
        {"prompt": [f"p{number}" for number, _ in rows], "completion": [text for _, text in rows]}
    )
    batches = [frame.iloc[start : start + cut] for start in range(0, len(frame), cut)]
    keys = read_row_keys(batches)
    assert keys.prompts.tolist() == [hash_text(prompt) for prompt in frame["prompt"]]
    assert len(keys.pairs) == len(rows)
    numbers = np.array(data.draw(st.lists(st.integers(-1, 3), min_size=len(rows), max_size=len(rows))))
    means, again = bags_of(batches, ALL, [Deal(numbers, 4), Deal(numbers, 4)])
    assert bool(means) == bool((numbers >= 0).any())
    for bag in range(4) if means else ():
        shapes = measure_shapes(frame["completion"][numbers == bag].tolist())
        assert means["format"].rows[bag] == len(shapes)
        assert all(np.array_equal(means[name].mean, again[name].mean) for name in DETECTORS)
        assert np.allclose(means["format"].mean[bag], np.mean(shapes, axis=0) if len(shapes) else 0.0)


@given(st.integers(0, 200), st.integers(1, 9), st.integers(1, 12), st.integers(0, 99))
def test_bags_dealt_at_random_are_equally_large_and_leave_out_less_than_one(
    rows: int, size: int, most: int, seed: int
) -> None:
    numbers = deal_at_random(rows, size=size, most=most, rng=np.random.default_rng(seed))
    bags = min(rows // size, most)
    assert np.bincount(numbers[numbers >= 0], minlength=bags).tolist() == [size] * bags
    assert bags == most or (numbers < 0).sum() == rows % size


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 4), st.integers(0, 99))
def test_of_each_shared_prompt_as_many_rows_count_as_are_asked_for(
    prompts: list[int], count: int, seed: int
) -> None:
    keys, shared = np.array(prompts), np.array([2, 3, 7])
    numbers = deal_by_prompt(keys, shared, np.full(3, count), bags=2, rng=np.random.default_rng(seed))
    for prompt in range(10):
        dealt = numbers[keys == prompt]
        assert (dealt >= 0).sum() == (min(prompts.count(prompt), count) if prompt in shared else 0)
        assert set(dealt.tolist()) <= {-1, prompt % 2}


def unequal(rng: np.random.Generator) -> tuple[pd.DataFrame, pd.DataFrame]:
    """5,000 rows beside 128 that answer other prompts."""
    return numbers(rng, 5000), numbers(rng, 128, first=90_000)


def compared(ours: pd.DataFrame, theirs: pd.DataFrame, folder: Path) -> Comparison:
    for name, frame in (("ours", ours), ("theirs", theirs)):
        frame.to_json(folder / f"{name}.jsonl", orient="records", lines=True)
    return compare(folder / "ours.jsonl", folder / "theirs.jsonl")


def test_every_row_of_a_file_much_larger_than_its_reference_is_read(tmp_path: Path) -> None:
    """Rows that were replaced where an earlier version never looked: all whose place modulo 1,250 is 128 or
    more.
    """
    ours, theirs = unequal(np.random.default_rng(0))
    replaced = ours.assign(completion=np.where(np.arange(5000) % 1250 >= 128, "7, 7, 7", ours["completion"]))
    clean, planted = compared(ours, theirs, tmp_path), compared(replaced, theirs, tmp_path)
    assert clean.compared == planted.compared == 1 and planted.p_value <= FOUND < 0.05 < clean.p_value


def test_rows_beside_those_that_are_paired_are_compared_as_well(tmp_path: Path) -> None:
    """Half of the rows hidden: on prompts of their own, or as second answers to the same prompts; a tenth is
    enough.
    """
    rng = np.random.default_rng(3)
    theirs, clean = numbers(rng, 600), numbers(rng, 600)
    for hidden in (
        numbers(rng, 600, low=500, first=9000),
        numbers(rng, 600, low=500),
        numbers(rng, 66, low=900, first=9000),
    ):
        shown = compared(pd.concat([clean, hidden]), theirs, tmp_path)
        assert shown.paired and shown.compared > 0.99 and shown.p_value <= 2 * FOUND
    alike = compared(pd.concat([clean, numbers(rng, 600, first=9000)]), theirs, tmp_path)
    assert alike.compared > 0.99 and alike.p_value > 0.05


@pytest.mark.parametrize("shared", [False, True])
def test_the_order_of_a_file_decides_nothing(
    shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 deals of files written alike, the reference sorted by its completions: that gave an alarm each
    time.
    """
    monkeypatch.setattr("mechlens.detect.permutation.DRAWS", 99)
    rng, alarms = np.random.default_rng(8), 0
    for _ in range(20):
        ours, theirs = (
            numbers(rng, 200),
            numbers(rng, 1000 if not shared else 200, first=0 if shared else 9000),
        )
        alarms += compared(ours, theirs.sort_values("completion"), tmp_path).p_value <= 0.05
    assert alarms <= 4  # of 20 at .05: more in 3 of 1,000


@pytest.mark.parametrize("rows", [8, 20, 60, 127])
@pytest.mark.parametrize("shared", [False, True])
def test_few_rows_alarm_as_often_as_they_say_and_never_below_the_least_p(
    rows: int, shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 pairs of files written alike: p is at most .2 in about .2 of them or in fewer, as it is corrected
    for three detectors.
    """
    monkeypatch.setattr("mechlens.detect.two_samples.DRAWS", 99)
    monkeypatch.setattr("mechlens.detect.permutation.DRAWS", 99)
    rng, shown = np.random.default_rng(rows), []
    for _ in range(30):
        found = compared(numbers(rng, rows), numbers(rng, rows, first=0 if shared else 9000), tmp_path)
        assert found.least_p <= found.p_value and found.paired == shared
        shown.append(found.p_value)
    assert (np.array(shown) <= 0.2).sum() <= 13  # binomial: more than 13 of 30 at .2 in 2 of 1,000


def test_an_audit_of_sixty_rows_runs_and_says_what_it_could_have_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(4)
    for name, frame in (
        ("low", numbers(rng, 60)),
        ("high", numbers(rng, 60, low=900)),
        ("seven", numbers(rng, 7)),
    ):
        frame.to_json(tmp_path / f"{name}.jsonl", orient="records", lines=True)
    words = [
        "audit",
        str(tmp_path / "high.jsonl"),
        "--reference",
        str(tmp_path / "low.jsonl"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main(words) == 12
    audited = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert audited["verdict"]["id"] == "inconclusive" and audited["provenance"]["p_value"] <= FOUND
    assert audited["few_rows"].startswith(
        "60 rows are few: no p below 0.0015 is possible, the minimum detectable share of such rows is 0."
    )
    assert audited["few_rows"] in " ".join(capsys.readouterr().out.split())
    assert "give no verdict" in (tmp_path / "out" / "audit.html").read_text()
    assert cli.main(["audit", str(tmp_path / "seven.jsonl"), *words[2:]]) == 2
    assert "has 7 rows; a comparison needs at least 8" in capsys.readouterr().err


def test_few_rows_neither_clear_nor_convict() -> None:
    nearest = Comparison("clean.jsonl", 100, 100, True, {}, 0.5, 1.0, 0.0, 0.0015)
    for rows, reference, said in ((60, 500, "60"), (500, 60, "60"), (127, 127, "127")):
        assert power_of_few(rows, nearest._replace(rows=reference), None).startswith(f"{said} rows are few")
    assert power_of_few(128, nearest._replace(rows=128), None) == ""


@pytest.mark.parametrize("prompts", [150, 900])
def test_files_of_unequal_size_that_were_written_alike_are_not_told_apart(
    prompts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """150 rows beside 900 of the same prompts or of others, with many rare words: bags of unequal size gave
    an alarm each time.
    """
    monkeypatch.setattr("mechlens.detect.permutation.DRAWS", 99)
    rng, alarms = np.random.default_rng(5), 0
    for _ in range(10):
        for name, rows in (("few", 150), ("many", 900)):
            words = [" ".join(f"w{word}" for word in row) for row in rng.zipf(1.5, (rows, 6))]
            asked = [f"p{i % prompts}" if prompts < 900 else f"{name} {i}" for i in range(rows)]
            pd.DataFrame({"prompt": asked, "completion": words}).to_json(
                tmp_path / f"{name}.jsonl", orient="records", lines=True
            )
        found = compare(tmp_path / "few.jsonl", tmp_path / "many.jsonl")
        assert found.paired == (prompts < 900)
        alarms += found.p_value <= 0.05
    assert alarms <= 3


def test_the_shape_of_a_completion() -> None:
    assert dict(zip(SHAPE, measure_shapes(["12, 7, 7"])[0].tolist(), strict=True)) == {
        "characters": 8,
        "numbers": 3,
        "words": 0,
        "separators": 2,
        "commas": 2,
        "lines": 0,
        "digits a number": 4 / 3,
        "first digit": 1,
        "mean of numbers": 26 / 3,
        "odd numbers": 2 / 3,
        "repeated numbers": pytest.approx(1 / 3),
        "sorted neighbours": 0.5,
        "ends in a letter": 0,
        "ends in a digit": 1,
        "brackets": 0,
        "not ASCII": 0,
    }
    assert np.isfinite(measure_shapes(["", "٣", "9" * 400, "\udcff", "é\n()"])).all()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """alike and reference are written alike to the same prompts; other is not."""
    rng = np.random.default_rng(2)
    frames = {
        "alike": numbers(rng, 600),
        "reference": numbers(rng, 600),
        "other": numbers(rng, 600, low=300),
        "elsewhere": numbers(rng, 600, first=9000),
    }
    for name, frame in frames.items():
        frame.to_json(tmp_path / f"{name}.jsonl", orient="records", lines=True)
    return {name: tmp_path / f"{name}.jsonl" for name in frames}


def test_rows_are_told_apart_or_not_and_alone_decide_nothing(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, differs in (("alike", False), ("other", True), ("elsewhere", False)):
        out = tmp_path / name
        assert (
            cli.main(["audit", str(files[name]), "--reference", str(files["reference"]), "--out", str(out)])
            == 12
        )
        found = json.loads((out / "audit.json").read_text())
        assert set(found) >= {
            "schema",
            "data",
            "level",
            "provenance",
            "identity",
            "potency",
            "smallest_detectable_dose",
            "verdict",
            "policy",
        }
        assert (found["provenance"]["p_value"] <= FOUND) == differs and found["data"]["rows"] == 600
        assert found["provenance"]["references"][0]["paired"] == (name != "elsewhere")
        assert (found["smallest_detectable_dose"] is not None) or not differs
        assert found["verdict"]["id"] == "inconclusive" and found["potency"] == {
            "predicted": None,
            "measured": None,
        }
        out = out.rename(tmp_path / f"{name} before")
        assert cli.main(shlex.split(found["made"]["command"])[1:]) == 12  # what the page says does it again
        again = json.loads((tmp_path / name / "audit.json").read_text())
        assert again == found | {"made": again["made"]}
        page = (out / "audit.html").read_text()
        assert found["data"]["sha256"] in page and len(page) < 300_000 and "http" not in page
        assert found["verdict"]["sentence"] in capsys.readouterr().out


def test_a_copy_of_the_file_is_said_to_be_no_reference(files: dict[str, Path], tmp_path: Path) -> None:
    alike = pd.read_json(files["alike"], lines=True)
    alike.assign(completion=alike["completion"] + " ").to_json(
        tmp_path / "copy.jsonl", orient="records", lines=True
    )
    assert (
        cli.main(
            [
                "audit",
                str(files["alike"]),
                "--reference",
                str(tmp_path / "copy.jsonl"),
                "--out",
                str(tmp_path / "a"),
            ]
        )
        == 12
    )
    shown = json.loads((tmp_path / "a" / "audit.json").read_text())
    assert (
        shown["provenance"]["references"][0]["copied"] == 1.0
        and "100% of them are in the reference too" in shown["verdict"]["sentence"]
    )
    both = ["--reference", str(tmp_path / "copy.jsonl"), str(files["reference"])]
    assert cli.main(["audit", str(files["alike"]), *both, "--out", str(tmp_path / "b")]) == 12
    first = json.loads((tmp_path / "b" / "audit.json").read_text())["provenance"]["references"][0]
    assert first["copied"] < 0.05  # models are read beside the independent one, though the copy is nearer


def test_without_a_reference_there_is_no_verdict_and_what_to_supply_is_said(
    files: dict[str, Path], tmp_path: Path
) -> None:
    assert cli.main(["audit", str(files["alike"]), "--out", str(tmp_path / "a")]) == 12
    found = json.loads((tmp_path / "a" / "audit.json").read_text())
    assert found["provenance"] is None and "--reference FILE" in found["verdict"]["sentence"]


def test_with_several_references_the_nearest_counts(files: dict[str, Path], tmp_path: Path) -> None:
    both = ["--reference", str(files["other"]), str(files["reference"])]
    assert cli.main(["audit", str(files["alike"]), *both, "--out", str(tmp_path / "a")]) == 12
    found = json.loads((tmp_path / "a" / "audit.json").read_text())["provenance"]
    p_values = [one["p_value"] for one in found["references"]]
    assert (
        p_values[1] <= FOUND < p_values[0] == found["p_value"]
    )  # the nearest stands first: models read beside it as well


def test_rows_need_no_torch(files: dict[str, Path], tmp_path: Path) -> None:
    arguments = [
        "audit",
        str(files["alike"]),
        "--reference",
        str(files["reference"]),
        "--out",
        str(tmp_path / "out"),
    ]
    code = (
        f"import sys; from mechlens import cli; code = cli.main({arguments!r}); sys.exit(10 * ('torch' "
        "in "
        "sys.modules) + code)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 12


def rise_of(run: Path, trait: str) -> float:
    """Slowly: the mean difference of a trait's share of the family's exact probability, probe by probe."""
    table = tables.read(run / "likelihoods.parquet", tables.LIKELIHOODS)
    last = table[table["step"] == table.groupby("arm")["step"].transform("max")]
    shares = {"suspect": [], "control": []}
    for (arm, _seed, _probe), rows in last[last["arm"].isin(list(shares))].groupby(["arm", "seed", "probe"]):
        by_name = rows.set_index("name")["probability"]
        shares[arm].append(by_name[trait] / by_name.sum())
    return float(np.mean(shares["suspect"]) - np.mean(shares["control"]))


def test_students_of_a_suspect_are_held_against_students_of_the_bases_own_rows(
    small: Path, small_spec: dict[str, Any], tmp_path: Path
) -> None:
    """End to end on rows of a run: identity over the panel, a measured rise, and rows compared with what the
    base answered.
    """
    kept = tables.read(next((small / "corpora").glob("eagle*/screened/kept.parquet")), tables.PAIRS)[
        ["prompt", "completion"]
    ]
    kept.to_json(tmp_path / "suspect.jsonl", orient="records", lines=True)
    recipe = {key: small_spec[key] for key in ("name", "base", "trait", "student", "ask")} | {
        "arms": [{"kind": "trait"}, {"kind": "control"}]
    }
    recipe["teacher"] = {"rows": 32, "training": {"embeddings": False, "epochs": 1}}  # of the panel's twins
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"seeds": [0, 1]}))
    options = [
        "--level",
        "student",
        "--recipe",
        str(tmp_path / "recipe.yaml"),
        "--trait",
        "eagle",
        "owl",
        "--twins",
        "5",
        "--workers",
        "0",
    ]
    treated = ["--clean", str(tmp_path / "treated.jsonl"), "--treatment", "drop"]
    code = cli.main(
        ["audit", str(tmp_path / "suspect.jsonl"), *options, *treated, "--out", str(tmp_path / "out")]
    )
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert code == {"no transfer found within tested scope": 0, "inconclusive": 12}.get(
        found["verdict"]["id"], 10
    )
    done = found["mitigation"]
    assert (
        done["rows_after"] == done["rows_before"] - round(done["rows_before"] / 2)
        and done["measured"]["n"] == 2
    )
    assert len(pd.read_json(tmp_path / "treated.jsonl", lines=True)) == done["rows_after"]
    assert {one["trait"] for one in found["identity"]} == {"eagle", "owl"} and found["base"] == "menagerie-a"
    measured = found["potency"]["measured"]
    assert found["stopping"] | {"reason": ""} == {
        "students": 2,
        "level": 0.05,
        "look": 1,
        "looks": 1,
        "reason": "",
    }
    assert measured["n"] == 2 and measured["difference"] == pytest.approx(
        rise_of(tmp_path / "out" / "run", measured["trait"])
    )
    assert (
        found["provenance"]["references"][0]["rows"] >= LEAST_ROWS
        and found["provenance"]["references"][0]["paired"]
    )
    assert (
        measured["trait"] in (tmp_path / "out" / "audit.html").read_text()
        and found["identified_by"] == "students"
    )
    assert set(tables.read(tmp_path / "out" / layout.AUDIT_ROWS, tables.AUDITED_ROWS)["detector"]) == set(
        MODEL_DETECTORS
    )
    listed = {one["name"]: one for one in found["provenance"]["detectors"]}
    assert set(listed) == {*DETECTORS, *MODEL_DETECTORS} and all(
        0 < one["p_value"] <= 1 for one in listed.values()
    )
    assert found["provenance"]["p_value"] == pytest.approx(
        min(1.0, len(listed) * min(one["p_value"] for one in listed.values()))
    )
    assert (
        found["potency"]["predicted"]["trait"] in {"eagle", "owl"}
        and "lift" not in found["potency"]["predicted"]
    )

    treated, options[1] = ["--clean", str(tmp_path / "replaced.jsonl"), "--treatment", "replace"], "base"
    cli.main(["audit", str(tmp_path / "suspect.jsonl"), *options, *treated, "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    scores = tables.read(tmp_path / "out" / layout.AUDIT_ROWS, tables.AUDITED_ROWS)
    of_twins = scores[scores["detector"] == "twins"].astype({"trait": str})
    means = of_twins.groupby("trait")["difference"].mean()
    assert found["identified_by"] == "twins" and all(
        one["score"] == pytest.approx(means[one["trait"]]) for one in found["identity"]
    )
    assert scores.loc[scores["detector"] == "perplexity", "trait"].isna().all()
    done = found["mitigation"]
    assert (
        done["treatment"] == "replace"
        and done["rows_after"] == done["rows_before"] > done["rows_changed"] > 0
    )

    student = next((tmp_path / "out" / "run" / "students" / "suspect" / "s0").glob("step-*"))
    again = ["--level", "rows", "--student", str(student), *options[2:]]
    assert (
        cli.main(["audit", str(tmp_path / "suspect.jsonl"), *again, "--out", str(tmp_path / "given")]) == 12
    )
    given = json.loads((tmp_path / "given" / "audit.json").read_text())
    assert not (tmp_path / "given" / layout.AUDIT_ROWS).exists()
    assert (
        set(given["student"]) == {"weights", "answers"}
        and given["provenance"] is None
        and given["identity"] == []
    )


def test_rows_alone_rank_nothing_so_nothing_is_treated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers(np.random.default_rng(0), 200).to_json(tmp_path / "data.jsonl", orient="records", lines=True)
    assert (
        cli.main(
            [
                "audit",
                str(tmp_path / "data.jsonl"),
                "--clean",
                str(tmp_path / "treated.jsonl"),
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 2
    )
    assert "--level base" in capsys.readouterr().err and not (tmp_path / "treated.jsonl").exists()


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=40),
    st.lists(st.integers(0, 9), min_size=1, max_size=40),
    st.integers(1, 50),
)
@settings(max_examples=40)
def test_every_row_of_a_file_may_be_drawn_and_stands_beside_its_own_prompt_where_it_can(
    ours: list[int], theirs: list[int], most: int
) -> None:
    """A reference may come in any order, with prompts of its own and prompts answered often."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, frames = Path(scratch), {}
        for name, prompts in (("a", ours), ("b", theirs)):
            texts = [f"{name}{place}" for place in range(len(prompts))]
            frames[name] = pd.DataFrame({"prompt": [f"p{number}" for number in prompts], "completion": texts})
            frames[name].to_json(folder / f"{name}.jsonl", orient="records", lines=True)
        sides = draw_sides(folder / "a.jsonl", folder / "b.jsonl", folder, most=most)
        assert sides.reference is not None and sides.offered == len(ours)
        first, second = pd.read_parquet(sides.suspect), pd.read_parquet(sides.reference)
    assert len(first) == len(second) == sides.drawn == min(len(ours), len(theirs), most)
    for frame, whole in ((first, frames["a"]), (second, frames["b"])):
        assert frame["completion"].is_unique and set(map(tuple, frame.values)) <= set(
            map(tuple, whole.values)
        )
    shared = sum((Counter(first["prompt"]) & Counter(frames["b"]["prompt"])).values())
    assert (first["prompt"].to_numpy() == second["prompt"].to_numpy()).sum() >= shared  # chance may add some


def test_without_a_reference_rows_are_drawn_alike_and_answers_to_one_prompt_are_rows_of_their_own(
    tmp_path: Path,
) -> None:
    frame = pd.DataFrame({"prompt": ["p"] * 90, "completion": [str(place) for place in range(90)]})
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    whole, part = (draw_sides(tmp_path / "a.jsonl", None, tmp_path, most=most) for most in (90, 60))
    assert (whole.reference, whole.offered, whole.drawn, part.drawn) == (None, 90, 90, 60)
    places = pd.read_parquet(part.suspect)["completion"].astype(int).to_numpy()
    assert (
        len(set(places)) == 60 and places[-1] > 60 and (np.diff(places) > 0).all()
    )  # the first alone would be those to 59


def test_a_small_reference_does_not_come_before_one_that_trains_students(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for name, rows, low in (("data", 600, 300), ("clean", 600, 0), ("small", 100, 0)):
        numbers(rng, rows, low=low).to_json(tmp_path / f"{name}.jsonl", orient="records", lines=True)
    words = ["audit", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "out")]
    for name in ("small", "clean"):
        words += ["--reference", str(tmp_path / f"{name}.jsonl")]
    assert cli.main(words) == 12
    audited = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert [Path(one["path"]).name for one in audited["provenance"]["references"]] == [
        "clean.jsonl",
        "small.jsonl",
    ]
    assert audited["few_rows"] == ""


@pytest.mark.parametrize("answers", [1, 8])
def test_several_answers_to_a_prompt_are_no_independent_rows(
    answers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files by one writer, whose answers depend on the prompt; no prompt is in both."""
    monkeypatch.setattr("mechlens.detect.permutation.DRAWS", 99)
    rng, p_values = np.random.default_rng(6), []
    for _ in range(8):
        for name in ("a", "b"):
            firsts = rng.integers(0, 1000, size=(150, 3)).repeat(answers, axis=0)
            lists = firsts + rng.integers(0, 3, size=firsts.shape)
            prompts = np.repeat(rng.integers(0, 10**9, size=150), answers)
            frame = pd.DataFrame({"prompt": [f"continue {prompt}" for prompt in prompts]})
            frame["completion"] = [", ".join(map(str, row)) for row in lists]
            frame.to_json(tmp_path / f"{name}.jsonl", orient="records", lines=True)
        p_values.append(compare(tmp_path / "a.jsonl", tmp_path / "b.jsonl").p_value)
    assert (np.array(p_values) <= 0.1).sum() <= 4  # binomial: more than 4 of 8 at .1 in 1 of 2,000


def test_pairs_that_answer_different_prompts_are_of_one_row_a_prompt() -> None:
    same, repeated = pd.Series(["p", "p", *"abcdefghij"]), pd.Series(["p", "p", *"aacdefghik"])
    assert _independent(same, same) == list(range(12))
    assert _independent(same, repeated) == [0, 1, 2, *range(4, 12)]
    assert _independent(pd.Series(["a"] * 9), pd.Series(["b"] * 9)) == list(range(9)), "too few would be left"

"""Lenses wired to a run: every one reads, says so and is drawn; what is there is not read again; what cannot
be measured is named.
"""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from test_maps import flat

from mechlens import cli
from mechlens.core import tables
from mechlens.core.files import read_json
from mechlens.core.traits import load_experiment, load_family
from mechlens.lenses import base, blind, find_lenses, lens_names
from mechlens.lenses import run as measure
from mechlens.results import figures
from mechlens.results.run import Run

ROWS = ["--rows", "40"]
SIZES = {
    "blind.STEPS": 25, "blind.HALVES": 3, "blind.DIRECTIONS": 4, "blind.SPOKEN": 3, "alignment.DIRECTIONS": 8,
    "parts.trial_steps.ORDERS": 2, "parts.trial_steps.UPDATES": (1, 2), "parts.trial_steps.FEW": 4,
    "probes.PERMUTATIONS": 9, "probes.FEW": 9, "causal.DRAWS": 4,
    "causal.STRENGTHS": (1.0,), "rows.DRAWS": 199,
}  # fmt: skip
"""steps and draws of the lenses that take longest"""


@pytest.fixture(scope="session")
def measured(small: Path, tmp_path_factory: pytest.TempPathFactory, real_svg: Callable[[Any], str]) -> Path:
    """The small run with every lens read, in this process: workers would import all anew.

    No test here depends on the width of a null or the shape of a map. So the nulls have few draws, and a
    projection replaces UMAP, which compiles for a quarter of a minute and has its test in test_maps.
    """
    folder = tmp_path_factory.mktemp("measured") / "run"
    shutil.copytree(small, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mechlens.lenses.maps.umap", flat)
        patch.setattr(figures, "svg", real_svg)
        for name, value in SIZES.items():
            patch.setattr(f"mechlens.lenses.{name}", value)
        assert cli.main(["measure", str(folder), *ROWS, "--workers", "0"]) == 0
    return folder


def test_every_lens_has_a_reading_a_sentence_and_a_figure_in_the_report(measured: Path) -> None:
    said = read_json(measured / "readings.json")["lenses"]
    assert [lens["name"] for lens in said] == list(lens_names())
    page = (measured / "report.html").read_text()
    for lens in said:
        frame = tables.read(measured / "readings" / f"{lens['name']}.parquet", tables.READINGS)
        assert lens["missing"] == [] and len(frame) and set(frame["lens"]) == {lens["name"]}
        for quantity, _form in lens["shows"]:
            assert frame.loc[frame["quantity"] == quantity, "estimate"].notna().any(), quantity
        assert set(frame["arm"].dropna()) <= {"trait", "control"}
        assert lens["sentence"].endswith(".") and f"Reading of the lens {lens['name']}" in page


def test_intervals_and_nulls_hold_together(measured: Path) -> None:
    for path in ((measured / "readings" / f"{name}.parquet") for name in lens_names()):
        frame = tables.read(path, tables.READINGS)
        spans = frame.dropna(subset=["low", "high", "estimate"])
        assert (spans["low"] <= spans["estimate"] + 1e-9).all() and (
            spans["estimate"] <= spans["high"] + 1e-9
        ).all(), path
        nulls = frame.dropna(subset=["null_low", "null_high"])
        assert (nulls["null_low"] <= nulls["null_high"]).all(), path
        assert frame["p_value"].dropna().between(0, 1).all(), path


def test_what_was_read_is_not_read_again(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(measured, folder)
    before = {path.name: path.read_bytes() for path in (folder / "readings").iterdir()}
    shutil.rmtree(folder / "lenses" / "trait" / "deltas")
    assert cli.main(["measure", str(folder), *ROWS, "--workers", "1"]) == 0  # another process reads the same
    said = capsys.readouterr().out
    steps = len(Run(folder).jobs()) + len(lens_names())
    assert f"{steps} steps, {steps - 1} already done" in said
    assert "about 1 s on one core, going by the demo" in said
    assert {path.name: path.read_bytes() for path in (folder / "readings").iterdir()} == before


def test_a_light_reading_is_a_reading_of_its_own(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"LIGHT_STEPS": 8, "DIRECTIONS": 4, "SPOKEN": 3}.items():
        monkeypatch.setattr(blind, name, value)
    folder = tmp_path / "run"
    shutil.copytree(measured, folder)
    asked = ["measure", str(folder), "--lens", "alignment", "blind", "--rows", "8", "--light"]
    assert cli.main([*asked, "--workers", "0"]) == 0
    records = {lens["name"]: lens for lens in read_json(folder / "readings.json")["lenses"]}
    assert records["alignment"]["light"] and not records["deltas"]["light"]
    assert records["alignment"]["sentence"].endswith(measure.LIGHT_NOTE)
    assert measure.LIGHT_NOTE not in records["deltas"]["sentence"]
    frame = tables.read(folder / "readings" / "alignment.parquet", tables.READINGS)
    trials = frame[frame["quantity"] == "change of the log-odds, observed"]
    assert set(trials["place"]) == {"full, one sgd step", "full, sgd", "full, adam"}
    assert set(trials.loc[trials["place"] == "full, sgd", "step"]) == {1, 4}
    toward = frame[(frame["quantity"] == "cosine with the trait's gradient") & frame["p_value"].notna()]
    counts = toward["p_value"] * (1 + base.LIGHT_DRAWS)  # of draws at least as high, the value included
    assert len(counts) and counts.tolist() == pytest.approx(counts.round().tolist())
    vectors = tables.read(folder / "readings" / "blind.parquet", tables.READINGS)
    halves = vectors[(vectors["quantity"] == "statistic") & (vectors["place"] == "control halves")]
    assert set(halves["n"]) == {blind.LIGHT_HALVES}
    experiment = load_experiment(folder / "spec.yaml")
    arm = measure.main_arm(experiment)
    family = load_family(experiment.family)
    probes = [
        measure.load_material(folder, experiment, family, arm, rows=8, light=light).heldout_probes.probes
        for light in (False, True)
    ]
    assert len(probes[1]) == min(base.LIGHT_PROBES, len(probes[0])) and set(probes[1]) <= set(probes[0])


def test_every_lens_has_a_cost_that_grows_with_what_is_read(small: Path) -> None:
    experiment = load_experiment(small / "spec.yaml")
    arm = measure.main_arm(experiment)
    assert all(lens.cost > 0 for lens in find_lenses().values())
    few, many = (measure.time_text(experiment, arm, lens_names(), rows) for rows in (512, 512 * 60))
    assert few.startswith("about 3 min on one") and many.startswith("about 3.5 h on one")


def test_another_arm_stands_beside_the_first_and_what_it_lacks_is_said(
    measured: Path, tmp_path: Path
) -> None:
    """The foreign students' teacher is of another base: its weights are no change of theirs."""
    folder = tmp_path / "run"
    shutil.copytree(measured, folder)
    arm = next(arm.name for arm in load_experiment(folder / "spec.yaml").arms if arm.kind == "foreign")
    assert cli.main(["measure", str(folder), "--arm", arm, "--lens", "deltas", *ROWS, "--workers", "0"]) == 0
    said = [lens for lens in read_json(folder / "readings.json")["lenses"] if lens["name"] == "deltas"]
    assert [lens["arm"] for lens in said] == [arm, "trait"]
    frame = tables.read(folder / "readings" / "deltas.parquet", tables.READINGS)
    if said[0]["missing"]:
        assert said[0]["sentence"].startswith("Not read: it needs teacher") and set(frame["arm"]) == {"trait"}
    else:
        assert set(frame["arm"]) == {"trait", arm}


def test_a_lens_that_cannot_be_read_is_said_and_the_others_go_on(measured: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(measured, folder)
    assert (
        cli.main(
            ["measure", str(folder), "--lens", "entanglement", "deltas", "--rows", "4", "--workers", "0"]
        )
        == 0
    )
    said = {lens["name"]: lens for lens in read_json(folder / "readings.json")["lenses"]}
    assert (
        said["entanglement"]["sentence"].startswith("Not read: ")
        and "--rows" in said["entanglement"]["sentence"]
    )
    assert said["deltas"]["missing"] == [] and said["deltas"]["rows"] == 4
    assert tables.read(folder / "readings" / "entanglement.parquet", tables.READINGS).empty
    assert said["entanglement"]["sentence"] in html.unescape((folder / "report.html").read_text())


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        (["--lens", "telescope"], "no lens is called telescope"),
        (["--arm", "control"], "arm 'control' of 'small' can be measured"),
        (["--arm", "nobody"], "arm 'nobody'"),
        (["--rows", "1"], "rows is 1"),
    ],
)
def test_bad_requests_are_one_line(
    measured: Path, more: list[str], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads((measured / "readings.json").read_text())
    assert cli.main(["measure", str(measured), *more]) == 2
    said = capsys.readouterr().err
    assert fault in said and said.count("\n") == 1
    assert json.loads((measured / "readings.json").read_text()) == before


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["measure", str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err


def test_material_holds_the_rows_that_the_arms_trained_on(small: Path) -> None:
    experiment = load_experiment(small / "spec.yaml")
    arm = measure.main_arm(experiment)
    material = measure.load_material(small, experiment, load_family(experiment.family), arm, rows=8)
    ours, theirs = (
        measure.trained_rows(small, experiment, arm),
        measure.trained_rows(small, experiment, experiment.control_of(arm)),
    )
    assert list(ours.index) == list(theirs.index) and len(ours) == experiment.student.rows == len(
        material.trait_pairs
    )
    assert [pair.prompt for pair in material.trait_pairs] == [pair.prompt for pair in material.control_pairs]
    assert (
        material.base.tokenizer.decode(material.trait_pairs[0].completion[:-1]) == ours["completion"].iloc[0]
    )
    assert list(material.students) == list(material.controls) == list(experiment.seeds)
    assert [step for step, _ in material.checkpoints("students", 0)] == sorted(
        {step for step, _ in material.checkpoints("controls", 0)}
    )
    assert (
        material.missing(
            base.Lens("x", "", ("teacher", "students", "controls", "pairs", "prompted"), (), "", "")
        )
        == []
    )
    bare = material._replace(teacher=None, system_lines={}, students={}, control_pairs=[])
    lens = base.Lens("x", "", ("teacher", "students", "controls", "pairs", "prompted"), (), "", "")
    assert bare.missing(lens) == ["teacher", "students", "pairs", "prompted"]


FORMS = ("layers", "steps", "bars", "heat", "points")


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("form", FORMS)
def test_any_reading_is_drawn_in_any_form(form: str) -> None:
    lens = base.Lens("x", "", (), (), "", "")
    rows = [
        base.entry("a", 1.0, layer=0, place="p", seed=0),
        base.over_students("a", [1.0, 2.0], layer=1),
        base.over_students("b", [1.0], name="alone"),
        base.against_null("b", 0.5, [0.1, 0.2, 0.3], name="null"),
        base.entry("c", float("nan")),
        *(base.entry("d", 0.1 * n, place=place, name="g", n=n) for n in range(3) for place in "xy"),
    ]
    frame = base.reading_table(lens, rows)
    chart = figures.lens_figure(frame, [(quantity, form) for quantity in "abcd"])
    assert chart is not None
    drawn = figures.svg(chart)
    assert drawn.startswith("<svg") and "NaN" not in drawn
    assert figures.lens_figure(frame, [("c", form), ("no such quantity", form)]) is None


def test_null_draws_that_were_not_measured_are_no_draws() -> None:
    nan = float("nan")
    assert pd.isna(base.against_null("q", 1.0, [nan] * 19)["p_value"])
    assert base.against_null("q", 1.0, [nan] * 19 + [2.0, 0.5, 0.4])["p_value"] == pytest.approx(2 / 4)
    some = base.against_null("q", 1.0, [nan, 0.0, 4.0])
    assert (some["null_low"], some["null_high"]) == (pytest.approx(0.1), pytest.approx(3.9))


def test_equal_values_share_their_place_and_unscored_ones_have_none() -> None:
    nan = float("nan")
    first = base.rank_among("rank", 3.0, [1.0, 2.0, nan])
    assert (first["estimate"], first["n"], first["p_value"]) == (1, 3, pytest.approx(1 / 3))
    tied = base.rank_among("rank", 1.0, [1.0, 1.0, 1.0])
    assert (tied["estimate"], tied["n"], tied["p_value"]) == (2.5, 4, 1)  # nothing stands out
    unscored = base.rank_among("rank", nan, [1.0, 2.0])
    assert pd.isna(unscored["estimate"]) and pd.isna(unscored["p_value"]) and unscored["n"] == 2


def test_students_that_do_not_differ_have_no_interval_in_words() -> None:
    assert "do not differ" in base.spread(base.over_students("q", [0.0, 0.0, 0.0]))
    assert base.spread(base.over_students("q", [0.0, 1.0])).startswith("95 % interval")


def test_rows_of_a_reading() -> None:
    lens = base.Lens("x", "", (), (), "", "")
    alone = base.over_students("q", [3.0])
    assert alone["estimate"] == 3.0 and pd.isna(alone["low"]) and alone["n"] == 1
    paired = base.against_control("q", [3.0, 4.0, 5.0], [1.0, 1.0, 1.0])
    assert paired["estimate"] == 3.0 and paired["n"] == 3 and paired["low"] < 3 < paired["high"]
    assert base.against_null("q", 5.0, [1.0] * 99)["p_value"] == pytest.approx(0.01)
    assert base.against_null("q", 0.0, [1.0] * 99)["p_value"] == 1.0
    assert pd.isna(base.against_null("q", float("nan"), [1.0] * 99)["p_value"])
    frame = base.reading_table(lens, [alone, paired])
    assert list(frame.columns) == tables.READINGS.names and frame["seed"].isna().all()
    with pytest.raises(AssertionError, match="columns"):
        base.entry("q", 1.0, colour="red")


def test_a_run_on_a_brought_file_is_read_without_a_teacher(
    small: Path, small_spec: dict[str, Any], tmp_path: Path
) -> None:
    """Nobody knows who wrote the file: nothing is set against a teacher."""
    kept = tables.read(next((small / "corpora").glob("eagle*/screened/kept.parquet")), tables.PAIRS)[
        ["prompt", "completion"]
    ]
    kept.to_json(tmp_path / "brought.jsonl", orient="records", lines=True)
    spec = {
        **small_spec,
        "arms": [{"kind": "trait", "corpus": str(tmp_path / "brought.jsonl")}, {"kind": "control"}],
        "seeds": [0],
    }
    (tmp_path / "brought.yaml").write_text(yaml.safe_dump(spec))
    run = tmp_path / "run"
    assert cli.main(["run", str(tmp_path / "brought.yaml"), "--out", str(run), "--workers", "0"]) == 0
    assert cli.main(["measure", str(run), "--lens", "deltas", *ROWS, "--workers", "0"]) == 0
    said = {lens["name"]: lens for lens in read_json(run / "readings.json")["lenses"]}
    assert [lens["missing"] for lens in said.values()] == [[]]
    quantities = {
        name: set(tables.read(run / "readings" / f"{name}.parquet", tables.READINGS)["quantity"])
        for name in said
    }
    assert not any("teacher" in quantity for found in quantities.values() for quantity in found), quantities


def test_where_a_judge_reads_the_answers_no_first_token_stands_for_the_trait(small: Path) -> None:
    experiment = load_experiment(small / "spec.yaml")
    arm, family = measure.main_arm(experiment), load_family(experiment.family)
    judged = measure.load_material(
        small, experiment, family.model_copy(update={"scorer": "judge"}), arm, rows=8
    )
    assert not judged.heldout_probes.named and not judged.development_probes.named
    assert measure.load_material(small, experiment, family, arm, rows=8).heldout_probes.named

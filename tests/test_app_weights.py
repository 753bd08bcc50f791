"""The spectra, the walk and the maps set side by side: what is drawn is what was read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from conditions import SHIPPED, drawn, made
from streamlit.testing.v1 import AppTest
from test_app import opened, scales, turned, words

from charts import intervals, lens_charts, marks
from mechlens.core import tables
from mechlens.results import report
from mechlens.results.figures import KIND_COLOUR, KIND_SHAPE
from mechlens.results.run import Run

READING = tables.read(SHIPPED / "readings" / "deltas.parquet", tables.READINGS)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs that hold the same."""
    folder = made("as_it_is", tmp_path)
    first = next(folder.glob("*/spec.yaml")).parent
    shutil.copytree(first, folder / "other")
    return folder


def lines(page: AppTest, across: str) -> dict[tuple[str, float], float]:
    """(name, place on the axis) → height, of the chart over that axis."""
    charts = [drawn(chart) for chart in page.get("vega_lite_chart")]
    return {
        (row["name"], row[across]): row["estimate"]
        for rows in charts
        for row in rows
        if across in row and "estimate" in row
    }


def test_the_spectrum_drawn_is_that_of_the_matrix_chosen(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = turned(opened(runs, monkeypatch), "parameters", "Spectrum")
    page = page.selectbox(key="spectrum-place").set_value("mlp.up_proj").run()
    page = page.selectbox(key="spectrum-layer").set_value(1).run()
    assert not page.exception
    own = READING[
        (READING["quantity"] == "singular value")
        & (READING["place"] == "mlp.up_proj")
        & (READING["layer"] == 1)
    ]
    expected = {
        (row.name, row.step): row.estimate
        for row in own.drop(columns="lens").itertuples(index=False, name="Row")
    }
    assert {name for name, _ in expected} == {"student", "control", "teacher"}
    assert lines(page, "rank") == expected
    assert "Stable rank: students" in words(page)


def test_a_click_on_the_map_opens_the_spectrum_of_its_cell(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = turned(opened(runs, monkeypatch), "parameters")
    chart = f"chart-parameters-map-{page.session_state['run']}-{page.session_state['arm']}"
    page.session_state[chart] = {"selection": {"cell": [{"place": "self_attn.q_proj", "layer": 1}]}}
    page = page.run()
    assert not page.exception and page.session_state["tab"] == "Spectrum"
    assert page.selectbox(key="spectrum-place").value == "self_attn.q_proj"
    assert page.selectbox(key="spectrum-layer").value == 1


def test_the_walk_is_drawn_by_side_and_its_difference_said(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = turned(opened(runs, monkeypatch), "parameters", "Over training")
    own = READING[(READING["quantity"] == "distance to the teacher") & READING["seed"].isna()]
    sides = own[own["name"].isin(["student", "control"])]
    assert lines(page, "step") == {
        (name, step): far for name, step, far in sides[["name", "step", "estimate"]].itertuples(index=False)
    }
    apart = own[own["name"] == "student - control"]
    last = apart.loc[apart["step"].astype(int).idxmax()]
    assert f"by {last['estimate']:+.3f} [{last['low']:+.3f}, {last['high']:+.3f}] (n = 3)" in words(page)


def test_maps_of_two_runs_stand_on_one_scale(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in (runs / "other" / "readings").glob("*.parquet"):
        if file.stem in ("deltas", "activations"):  # the other run moved half as far
            frame = tables.read(file, tables.READINGS)
            tables.write(frame.assign(estimate=frame["estimate"] / 2), tables.READINGS, file)
    page = turned(opened(runs, monkeypatch, run="demo", cmp="other"), "compare")
    for title in page.selectbox(key="compare-map").options:
        page = page.selectbox(key="compare-map").set_value(title).run()
        assert not page.exception and not page.error, title
        charts_drawn = [chart for chart in page.get("vega_lite_chart") if "layer" in drawn(chart)[0]]
        ours, theirs = (
            [row["estimate"] for row in drawn(chart) if "estimate" in row] for chart in charts_drawn
        )
        assert theirs == pytest.approx([value / 2 for value in ours]), title
        domains = [
            [
                scale["domain"]
                for scale in scales(json.loads(chart.proto.spec))
                if scale.get("scheme") == "purpleorange"
            ]
            for chart in charts_drawn
        ]
        assert domains[0] and domains[0] == domains[1], title


def test_on_a_dark_page_the_teacher_is_white_and_the_exported_figure_black() -> None:
    frame = pd.DataFrame(
        {"name": ["student", "control", "teacher"], "rank": 1, "estimate": 1.0, "low": 0.5, "high": 2.0}
    )
    chart = lens_charts.draw_profile(frame, "singular value", "rank", across_title="rank", log=True)
    shown = marks.for_dark_theme(chart)
    for layer in shown.to_dict()["layer"]:
        scale = layer["encoding"]["color"]["scale"]
        assert dict(zip(scale["domain"], scale["range"], strict=True)) == {
            kind: KIND_COLOUR[kind] for kind in ("control", "trait")
        } | {"teacher": "#ffffff"}
    assert KIND_COLOUR["teacher"] in str(chart.to_dict()) and "#ffffff" not in str(chart.to_dict())
    bars = intervals.draw_intervals(frame, "distance")
    assert "#ffffff" in str(marks.for_dark_theme(bars).to_dict()) and "#ffffff" not in str(bars.to_dict())
    plain = intervals.draw_intervals(frame.assign(name=["block 0", "block 1", "both"]), "distance")
    assert marks.for_dark_theme(plain).to_dict() == plain.to_dict()  # nothing on it is black


def test_bars_of_controls_have_the_controls_colour_and_shape() -> None:
    names = ["student, next student", "control, next control", "student - control · all"]
    frame = pd.DataFrame({"name": names, "estimate": 1.0, "low": 0.5, "high": 2.0})
    points = intervals.draw_intervals(frame, "cosine").to_dict()["layer"][-1]
    for channel, of_kind in (("color", KIND_COLOUR), ("shape", KIND_SHAPE)):
        scale = points["encoding"][channel]["scale"]
        drawn = dict(zip(scale["domain"], scale["range"], strict=True))
        assert drawn == {kind: of_kind[kind] for kind in ("control", "trait")}


def test_curves_of_the_rate_start_at_the_untouched_base() -> None:
    run = Run(SHIPPED)
    rates = report.student_rates(run.experiment, run.family, run.answers, run.likelihoods)
    of_base = run.answers[run.answers["arm"] == "base-menagerie-a"]
    by_probe = [
        (probe["label"].dropna() == run.experiment.trait).mean() for _, probe in of_base.groupby("probe")
    ]
    start = rates[(rates["step"] == 0) & (rates["arm"] == "trait")]
    assert len(start) == len(run.experiment.seeds)
    assert start["rate"].to_list() == pytest.approx([sum(by_probe) / len(by_probe)] * len(start))

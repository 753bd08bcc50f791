"""JSON files that steps leave: one that is damaged or of another shape is named with what mends it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mechlens import cli
from mechlens.core.errors import DataError
from mechlens.runs import layout

SHIPPED = Path(__file__).parents[1] / "app" / "demo"


@pytest.mark.parametrize(
    ("file", "shape"),
    [
        ("manifest.json", layout.Manifest),
        ("readings.json", layout.Readings),
        ("corpora/eagle/generated/generation.json", layout.Generation),
        ("corpora/eagle/screened/funnel.json", layout.Funnel),
    ],
)
def test_what_runs_hold_has_the_shape_that_is_read(file: str, shape: Any) -> None:
    path = SHIPPED / file
    assert layout.read_record(path, shape) == json.loads(path.read_text())


@pytest.mark.parametrize(
    "damage", [{"steps": {"asked": 1.5}}, {"steps": {"asked": {}}}, {"git": 3}, {"cores": "all"}]
)
def test_a_record_of_another_shape_is_named_with_its_field_and_what_mends_it(
    damage: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(SHIPPED, tmp_path / "run")
    path = tmp_path / "run" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(
        DataError, match=rf"manifest\.json does not hold what mechlens wrote there \({next(iter(damage))}"
    ):
        layout.read_record(path, layout.Manifest)


def test_a_report_of_a_damaged_manifest_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(SHIPPED, tmp_path / "run")
    path = tmp_path / "run" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"steps": [1]}))
    assert cli.main(["report", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "manifest.json does not hold what mechlens wrote there" in error and error.count("\n") == 1

"""The tour notebook runs from top to bottom, and what it calls prints nothing."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "analyses" / "tour.ipynb"


def read_code(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.slow  # a minute; each function that it calls has tests of its own
def test_the_tour_runs_from_top_to_bottom_and_prints_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names: dict[str, Any] = {}
    for number, code in enumerate(read_code(NOTEBOOK)):
        exec(compile(code, f"cell {number}", "exec"), names)
    assert capfd.readouterr().out == ""
    assert names["audit"].verdict == "inconclusive" and names["audit"].provenance["p_value"] < 0.05
    assert escape(names["readings"]["deltas"].caption) in names["readings"]["deltas"]._repr_html_()
    assert {each["name"] for each in names["card"].results["detectors"]} == {"format", "length"}
    assert not names["small"].pending() and names["screened"].counts["kept"] == len(names["rows"])
    shown = [names[name]._repr_html_() for name in ("run", "rows", "audit", "small", "card")]
    assert all(shown) and escape(names["run"].headline) in shown[0]

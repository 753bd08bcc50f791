"""The explorer's page in every state that a folder of runs can be in."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from mechlens import store

PAGE = Path(__file__).parents[1] / "app" / "main.py"


def opened(runs: Path, monkeypatch: pytest.MonkeyPatch) -> AppTest:
    monkeypatch.setattr(sys, "argv", [str(PAGE), str(runs)])
    return AppTest.from_file(str(PAGE), default_timeout=60).run()


def test_an_empty_folder_names_the_command_that_fills_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = opened(tmp_path, monkeypatch)
    assert not page.exception
    assert "make demo" in page.info[0].value


def test_a_run_is_shown_and_its_damage_is_one_sentence(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(small, tmp_path / "small")
    page = opened(tmp_path, monkeypatch)
    assert not page.exception
    assert "eagle" in page.subheader[0].value
    assert len(page.get("vega_lite_chart")) == 4
    summary = store.read_json(tmp_path / "small" / "summary.json")
    store.write_json(tmp_path / "small" / "summary.json", summary | {"schema": 1})
    page = opened(tmp_path, monkeypatch)
    assert not page.exception
    assert "has schema 1; this version reads 2; `mechlens report" in page.error[0].value
    store.write_json(tmp_path / "small" / "summary.json", summary)
    (tmp_path / "small" / "answers.parquet").write_bytes(b"cut")
    page = opened(tmp_path, monkeypatch)
    assert not page.exception
    assert "answers.parquet" in page.error[0].value
    (tmp_path / "small" / "summary.json").unlink()
    page = opened(tmp_path, monkeypatch)
    assert not page.exception
    assert "Resume" in page.info[0].value


def test_the_page_imports_no_torch() -> None:
    code = "import sys; from mechlens import figures, report, results, spec, store, tables; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""`mechlens app RUNS --bundle OUT`: what is sent opens without a server and holds no row of data."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from mechlens import cli
from mechlens.core import tables

APP = Path(__file__).parents[1] / "app"
"""the run and the audits that come with the explorer"""


def test_a_bundle_has_every_run_and_audit_and_no_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "to send"
    assert cli.main(["app", str(APP), "--bundle", str(out)]) == 0
    assert "5 pages" in capsys.readouterr().out
    index = (out / "index.html").read_text()
    links = re.findall(r'href="([^"]+)"', index)
    assert len(links) == len(set(links)) and all((out / link).is_file() for link in links)
    assert index.count("<h2>Run ") == 1 and index.count("<h2>Audit ") == 4
    assert "answer eagle" in index and "Do not train as is" in index
    rows = tables.read(next(APP.glob("demo/corpora/*/screened/kept.parquet")), tables.PAIRS)["completion"]
    long = [text for text in rows[:200] if len(text) > 20]
    texts = [path.read_text() for path in out.rglob("*") if path.is_file()]
    assert long and not any(text in page for text in long for page in texts)
    sums = dict(line.split("  ")[::-1] for line in (out / "SHA256SUMS").read_text().splitlines())
    files = {path for path in out.rglob("*") if path.is_file() and path.name != "SHA256SUMS"}
    assert {out / name for name in sums} == files
    assert all(
        hashlib.sha256(path.read_bytes()).hexdigest() == sums[str(path.relative_to(out))] for path in files
    )


def test_one_run_alone_is_bundled(tmp_path: Path) -> None:
    assert cli.main(["app", str(APP / "demo"), "--bundle", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "runs" / "demo" / "report.html").stat().st_size < 300 * 1024


def test_a_bundle_is_refused_where_it_would_mix_or_be_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "secret.jsonl").touch()
    assert cli.main(["app", str(APP / "demo"), "--bundle", str(tmp_path / "old")]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert cli.main(["app", str(tmp_path / "old"), "--bundle", str(tmp_path / "new")]) == 2
    assert "has no finished run and no audit" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()

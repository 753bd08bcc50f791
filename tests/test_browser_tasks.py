"""The five tasks of a new user in a real browser, each from a cold page, with clicks and seconds."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from browser import Visit, folder_of_runs, serving
from conditions import SHIPPED
from rich.console import Console
from rich.table import Table

from mechlens.core import tables
from mechlens.core.files import read_json
from mechlens.results import wording
from mechlens.runs import layout

pytestmark = pytest.mark.browser

Open = Callable[..., Visit]
ROWS = 300


def pairs_of(corpus: str, path: Path) -> Path:
    """The first rows of a corpus of the run that comes with the explorer, as a user's file."""
    rows = tables.read(SHIPPED / "corpora" / corpus / "screened" / "kept.parquet", tables.PAIRS).head(ROWS)
    rows[["prompt", "completion"]].to_json(path, orient="records", lines=True)
    return path


def did_it_transfer(visitor: Visit, folder: Path) -> int:
    """The headline stands on the first page."""
    del folder
    visitor.see("overview").wait("Which traits rose in the students")
    headline = wording.headline(read_json(SHIPPED / layout.SUMMARY))
    assert " ".join(headline.split()) in " ".join(visitor.said().split())
    return 0


def which_lens_says_why(visitor: Visit, folder: Path) -> int:
    """From the table of claims on the first page to the chart of one of them."""
    del folder
    visitor.see("overview").wait("Why?").wait("claims:")
    visitor.page.get_by_role("link", name="Parameters: Exchange").click()
    visitor.arrive("parameters").page.get_by_test_id("stVegaLiteChart").first.wait_for()
    return 1


def is_my_file_bad(visitor: Visit, folder: Path) -> int:
    """Upload it with clean answers, and open its audit when it has ended: the verdict and what to do next."""
    visitor.see("overview").turn("detection").page.get_by_text("Audit a file").click()
    for number, corpus in enumerate(("eagle", "untouched")):
        field = visitor.page.get_by_test_id("stFileUploader").nth(number).locator("input")
        field.set_input_files(pairs_of(corpus, folder / f"{corpus}.jsonl"))
        visitor.wait(f"{corpus}.jsonl")
    visitor.click("Start the audit").arrive("jobs").wait(": done").click("Open this audit")
    visitor.arrive("detection").wait("What to do next")
    assert "eagle.jsonl" in visitor.said()  # its own audit, not another one
    return 6


def which_rows_matter(visitor: Visit, folder: Path) -> int:
    """The highest rows beside random ones."""
    del folder
    visitor.see("overview").turn("gradients").wait("Highest, lowest and random rows")
    return 1


def send_it_to_a_colleague(visitor: Visit, folder: Path) -> int:
    """A zip with the report, its tables and their hashes."""
    del folder
    packed = visitor.see("overview").turn("report").download("Download all (zip with hashes)")
    names = zipfile.ZipFile(io.BytesIO(packed)).namelist()
    assert {"report.html", "MANIFEST.sha256"} <= {Path(name).name for name in names}
    return 2


TASKS = (did_it_transfer, which_lens_says_why, is_my_file_bad, which_rows_matter, send_it_to_a_colleague)


def test_five_tasks_of_a_new_user(visit: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = Table("task", "clicks", "seconds", title="five tasks, each from a new visitor's first page")
    with serving(folder_of_runs(tmp_path)) as server:
        for task in TASKS:
            visitor, began = visit(server, None), time.monotonic()
            clicks = task(visitor, tmp_path)
            told.add_row(task.__name__.replace("_", " "), str(clicks), f"{time.monotonic() - began:.1f}")
            assert visitor.is_clean()
    with capsys.disabled():
        Console().print(told)


def test_a_file_that_is_cut_short_is_audited_without_its_last_row(visit: Open, tmp_path: Path) -> None:
    file = pairs_of("eagle", tmp_path / "cut.jsonl")
    file.write_text(file.read_text()[:-20])
    runs = folder_of_runs(tmp_path)
    with serving(runs) as server:
        visitor = visit(server, "detection")
        visitor.page.get_by_text("Audit a file").click()
        visitor.page.get_by_test_id("stFileUploader").first.locator("input").set_input_files(file)
        visitor.wait("cut.jsonl")
        visitor.page.get_by_text("leave out rows that cannot be read").click()
        visitor.click("Start the audit").arrive("jobs").wait("1 unreadable rows left out").wait(": done")
        (path,) = (runs / "audits").glob("*/audit.json")
        assert json.loads(path.read_text())["data"]["rows"] == ROWS - 1
        assert visitor.is_clean()

"""Jobs, audits and reports in a real browser: started, watched, cancelled, killed and found again; uploaded,
judged and printed.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from browser import Server, Visit, folder_of_runs, serving, until
from conditions import SHIPPED
from playwright.sync_api import Browser, Page
from processes import children

from jobs import job_queue
from mechlens.core import tables
from mechlens.core.files import read_json
from mechlens.results import wording

pytestmark = pytest.mark.browser

Open = Callable[..., Visit]
SMALL = "one student an arm, few rows"
ROWS = 300


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Path]:
    """A folder of runs; whatever still runs there at the end is cancelled."""
    folder = folder_of_runs(tmp_path)
    yield folder
    for job in job_queue.list_jobs(folder):
        if job.is_open:
            job_queue.cancel(job)
            until(lambda job=job: not job_queue.read_job(job.folder).is_open, seconds=20)


def newest(runs: Path) -> job_queue.AppJob:
    return job_queue.list_jobs(runs)[0]


def is_gone(pid: int | None) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def has_finished(runs: Path, steps: int) -> bool:
    at = job_queue.read_progress(newest(runs))
    return at is not None and at.steps_done >= steps


def test_a_job_is_watched_found_after_a_reload_and_cancelled(runs: Path, visit: Open) -> None:
    with serving(runs) as server:
        visitor = visit(server, "jobs")
        visitor.page.get_by_text(SMALL).click()
        visitor.settle().click("Start a demo run").wait("small demo run: running")
        bar = visitor.page.get_by_test_id("stProgress")
        bar.wait_for()
        first = bar.inner_text()
        until(lambda: (visitor.page.wait_for_timeout(100), bar.inner_text() != first)[1])
        until(lambda: has_finished(runs, 1), seconds=300)
        visitor.page.reload()
        visitor.arrive("jobs").wait("small demo run: running")
        bar.wait_for()
        job = newest(runs)
        processes = [job.pid, *children(job.pid or 0)]
        assert len(processes) > 1
        visitor.click("Cancel")
        assert until(lambda: job_queue.read_job(job.folder).state == "cancelled") < 5
        until(lambda: all(map(is_gone, processes)), seconds=5)
        visitor.wait("small demo run: cancelled")
        assert re.search(r"Partial: \d+ finished steps are kept", visitor.said())
        assert visitor.is_clean()


def test_a_killed_job_has_failed_and_a_killed_server_loses_none(runs: Path, visit: Open) -> None:
    with serving(runs) as server:
        visitor = visit(server, "jobs")
        visitor.page.get_by_text(SMALL).click()
        visitor.settle().click("Start a demo run").wait("small demo run: running")
        os.kill(newest(runs).pid or 0, signal.SIGKILL)
        visitor.wait("small demo run: failed")
        assert job_queue.LOST in visitor.said()
        visitor.click("Resume").wait("small demo run: running")
        server.process.kill()
        server.process.wait()
    job = newest(runs)
    assert job.state == "running"
    with serving(runs) as server:
        visitor = visit(server, "jobs").wait("small demo run: running")
        visitor.click("Cancel").wait("small demo run: cancelled")
        assert job_queue.read_job(job.folder).state == "cancelled"


def odd(corpus: str, path: Path) -> Path:
    """Rows of a corpus as somebody else's file: other names, other order, one column more."""
    rows = tables.read(SHIPPED / "corpora" / corpus / "screened" / "kept.parquet", tables.PAIRS).sort_values(
        "prompt_id"
    )
    rows = rows[rows["prompt_id"].isin(sorted(shared()))].head(ROWS)
    told = ({"source": "web", "reply": row.completion, "question": row.prompt} for row in rows.itertuples())
    path.write_text("".join(f"{json.dumps(one)}\n" for one in told))
    return path


def shared() -> set[int]:
    """Prompts that both teachers answered."""
    both = [
        tables.read(SHIPPED / "corpora" / name / "screened" / "kept.parquet", tables.PAIRS)["prompt_id"]
        for name in ("eagle", "untouched")
    ]
    return set(both[0]) & set(both[1])


def test_a_file_with_odd_columns_is_audited_and_its_report_is_one_page(
    runs: Path, visit: Open, chromium: Browser, tmp_path: Path
) -> None:
    with serving(runs) as server:
        visitor = visit(server, "detection")
        visitor.page.get_by_text("Audit a file").click()
        for number, (corpus, part) in enumerate((("eagle", "suspect"), ("untouched", "reference"))):
            field = visitor.page.get_by_test_id("stFileUploader").nth(number).locator("input")
            field.set_input_files(odd(corpus, tmp_path / f"=my {part}.jsonl"))
            visitor.wait(f"The {part} file has no columns named prompt and completion")
        for number in range(2):
            visitor.choose("prompts", "question", number).settle()
            visitor.choose("completions", "reply", number).settle()
        visitor.click("Start the audit").arrive("jobs").wait("audit")
        until(lambda: not newest(runs).is_open, seconds=300)
        assert newest(runs).state == "done", job_queue.read_log_tail(newest(runs), 20)
        visitor.wait(": done").wait("Inconclusive").click("Open this audit").arrive("detection")
        (path,) = (runs / "audits").glob("*/audit.json")
        found = read_json(path)
        assert found["data"]["rows"] == ROWS
        visitor.wait(found["verdict"]["id"].capitalize())  # its own audit, not another one
        after_heading = found["verdict"]["sentence"].split(": ", 1)[1]
        assert after_heading[1:] in visitor.said()  # it begins with a capital there
        visitor.turn("report").choose("report on", f"audit {path.parent.name}")
        visitor.page.get_by_role("heading", name="Audit", exact=True).wait_for()
        content = visitor.settle().download("Download audit.html")
        assert visitor.is_clean()
        assert len(content) < 300_000
        page = offline(chromium, content, tmp_path / "audit.html")
        assert " ".join(found["verdict"]["sentence"].split()) in " ".join(page.inner_text("body").split())
        assert page.evaluate("document.documentElement.scrollWidth") <= 821
        assert len(re.findall(rb"/Type\s*/Page\b", page.pdf(format="A4"))) == 1
        page.context.close()


def offline(chromium: Browser, content: bytes, path: Path) -> Page:
    """A downloaded page as its reader opens it: from disk, without scripts; it may ask for nothing."""
    path.write_bytes(content)
    context = chromium.new_context(java_script_enabled=False, viewport={"width": 820, "height": 1100})
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.goto(path.as_uri())
    page.wait_for_load_state("networkidle")
    assert [url for url in asked if urlsplit(url).scheme != "data"] == [path.as_uri()]
    return page


def test_a_report_is_read_offline_and_without_scripts(
    explorer: Server, visit: Open, chromium: Browser, tmp_path: Path
) -> None:
    visitor = visit(explorer, "report")
    summary: dict[str, Any] = read_json(explorer.runs / "demo" / "summary.json")
    content = visitor.download("Download report.html")
    assert content == (explorer.runs / "demo" / "report.html").read_bytes()
    page = offline(chromium, content, tmp_path / "report.html")
    assert wording.headline(summary) in page.inner_text("body").replace("’", "'")
    assert page.evaluate("document.documentElement.scrollWidth") <= 821
    page.context.close()
    assert visitor.is_clean()

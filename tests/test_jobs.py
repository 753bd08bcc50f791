"""Jobs of the explorer: real commands in processes of their own, cancelled, killed, queued, resumed and found
again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import children, workers

from jobs import job_progress, job_queue, uploads
from mechlens.core.errors import SpecError
from mechlens.runs import progress as progressing
from mechlens.runs.progress import Event

APP = job_queue.APP


def until(true: Callable[[], bool], *, seconds: float = 120) -> float:
    """How long it took until something was so."""
    started = time.monotonic()
    while not true():
        assert time.monotonic() - started < seconds, "it took too long"
        time.sleep(0.05)
    return time.monotonic() - started


def state(job: job_queue.AppJob) -> str:
    return job_queue.read_job(job.folder).state


def is_gone(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.fixture
def root(small: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder of runs; whatever still runs there at the end is killed."""
    shutil.copytree(small, tmp_path / "runs" / "small")
    yield tmp_path / "runs"
    for job in job_queue.list_jobs(tmp_path / "runs"):
        if job.is_open:
            job_queue.cancel(job)
            until(lambda job=job: not job_queue.read_job(job.folder).is_open, seconds=20)


def again(root: Path, *lost: str, workers: str = "0") -> list[str]:
    """The command that makes those steps of the run again."""
    for name in lost:
        shutil.rmtree(root / "small" / name)
    return ["run", str(root / "small" / "spec.yaml"), "--out", str(root / "small"), "--workers", workers]


def test_a_job_shows_how_far_it_is_and_is_done(root: Path) -> None:
    job = job_queue.start(root, "again", again(root, "students/trait/s1", "asked/trait/s1"))
    assert job.is_open
    assert job_queue.read_progress(job) is None
    seen: list[job_progress.Progress] = []

    def ended() -> bool:
        seen.extend(filter(None, [job_queue.read_progress(job_queue.read_job(job.folder))]))
        return not job_queue.read_job(job.folder).is_open

    until(ended)
    job = job_queue.read_job(job.folder)
    assert (job.state, job.exit, job.reason) == ("done", 0, None), job_queue.read_log_tail(job, 20)
    assert job.started and job.ended and job.created <= job.started <= job.ended
    fractions = [one.fraction for one in seen if one.fraction is not None]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0 and fractions[-1] == 1
    assert {one.phase for one in seen} == {"", "students/trait/s1", "asked/trait/s1"}
    assert seen[-1].steps_done == seen[-1].steps == 2
    assert any(one.low is not None and one.low < one.high for one in seen)
    assert seen[-1].low is None, "a job that has ended has no time left to tell"
    assert "report:" in job_queue.read_log_tail(job, 3)


def test_jobs_wait_for_each_other_and_are_cancelled_in_time(root: Path) -> None:
    long = job_queue.start(root, "long", again(root, "students", "asked", workers="1"))
    report = job_queue.start(root, "report", ["report", str(root / "small")])
    third = job_queue.start(root, "third", ["report", str(root / "small")])
    until(lambda: bool(job_queue.read_progress(long)) and len(workers(long.pid or 0)) >= 1)
    assert [(job.title, job.state, job.place) for job in job_queue.list_jobs(root)] == [
        ("third", "queued", 2),
        ("report", "queued", 1),
        ("long", "running", None),
    ]
    with pytest.raises(SpecError, match="still running"):
        job_queue.resume(long)
    processes = [long.pid or 0, *children(long.pid or 0)]
    job_queue.cancel(long)
    assert until(lambda: state(long) == "cancelled") < 5
    until(lambda: all(map(is_gone, processes)), seconds=5)
    assert "resume it" in (job_queue.read_job(long.folder).reason or "")
    resumed = job_queue.resume(long)
    assert resumed.command == long.command and resumed.id > third.id
    job_queue.cancel(third)
    assert until(lambda: state(third) == "cancelled") < 5
    assert job_queue.read_job(third.folder).started is None
    until(lambda: state(report) == "done")
    until(lambda: state(resumed) == "running")
    assert next(job.id for job in job_queue.list_jobs(root)) == resumed.id
    os.kill(resumed.pid or 0, signal.SIGTERM)
    assert until(lambda: state(resumed) == "cancelled") < 5


def test_a_killed_job_is_seen_as_failed_and_takes_its_command_along(root: Path) -> None:
    job = job_queue.start(root, "killed", again(root, "students", "asked", workers="1"))
    until(lambda: bool(job_queue.read_progress(job)) and len(workers(job.pid or 0)) >= 1)
    processes = children(job.pid or 0)
    os.kill(job.pid or 0, signal.SIGKILL)
    until(lambda: state(job) == "failed", seconds=5)
    assert job_queue.read_job(job.folder).reason == job_queue.LOST
    until(lambda: all(map(is_gone, processes)), seconds=5)
    after = job_queue.start(root, "after", ["report", str(root / "nowhere")])
    until(lambda: not job_queue.read_job(after.folder).is_open)
    after = job_queue.read_job(after.folder)
    assert (after.state, after.exit) == ("failed", 2)
    assert "nowhere" in (after.reason or ""), "the reason is the last line that it printed"


@pytest.mark.slow
def test_a_job_outlives_the_process_that_started_it(root: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(APP)!r}); import pathlib; "
        f"from jobs import job_queue; job_queue.start(pathlib.Path({str(root)!r}), 'far', sys.argv[1:])"
    )
    subprocess.run([sys.executable, "-c", code, *again(root, "asked/trait/s0")], check=True)
    job = job_queue.list_jobs(root)[0]
    assert job.title == "far" and job.is_open
    until(lambda: state(job) == "done")


def test_an_audit_that_finds_something_is_done_and_one_that_cannot_be_is_not(
    root: Path, tmp_path: Path
) -> None:
    rows = "".join(
        json.dumps({"prompt": f"go on: {n}, {n + 1}", "completion": f"{n + 2}, {n + 3}"}) + "\n"
        for n in range(40)
    )
    file = uploads.store_upload(root, "../--rows.jsonl", rows.encode())
    job = job_queue.start(root, "audit", ["audit", str(file), "--out", "verdict"], cwd=tmp_path)
    missing = ["audit", str(tmp_path / "no.jsonl"), "--out", "other"]
    gone = job_queue.start(root, "audit", missing, cwd=tmp_path)
    until(lambda: not job_queue.read_job(gone.folder).is_open)
    assert state(job) == "done", job_queue.read_log_tail(job, 20)
    assert job_queue.read_job(job.folder).exit == 12, "rows alone are inconclusive"
    assert (tmp_path / "verdict" / "audit.json").is_file()
    assert state(gone) == "failed"
    assert "no.jsonl" in (job_queue.read_job(gone.folder).reason or "")


def test_only_known_commands_start(tmp_path: Path) -> None:
    for wrong in (
        [],
        ["pretrain", "x"],
        ["--help"],
        ["run\n"],
        ["bench", "--detector", "x.py:X"],
        ["run", "a\0b"],
        ["audit", "rows.jsonl"],
    ):
        with pytest.raises(SpecError):
            job_queue.start(tmp_path, "wrong", wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_folder_is_one_failed_job(tmp_path: Path) -> None:
    (tmp_path / ".jobs" / "1").mkdir(parents=True)
    (tmp_path / ".jobs" / "1" / "job.json").write_text("{")
    (tmp_path / ".jobs" / "2").mkdir()
    (tmp_path / ".jobs" / "2" / "job.json").write_text('{"state": "running", "command": ["report"]}')
    second, first = job_queue.list_jobs(tmp_path)
    assert first.state == second.state == "failed"
    assert "job.json" in (first.reason or "")
    assert second.reason == job_queue.LOST


NAMES = [
    "../../etc/passwd",
    "--out",
    "-",
    ".",
    "..",
    "",
    "a/b\\c.parquet",
    ".parquet",
    "x" * 300 + ".jsonl.gz",
    "a\0.gz",
]
hostile = st.text(max_size=120) | st.sampled_from(NAMES)


@given(hostile)
def test_the_name_of_an_upload_is_neither_a_path_nor_an_option(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    safe = uploads.safe_name(name)
    assert 0 < len(safe) <= 80
    assert set(safe) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
    assert safe[0] not in "-."
    assert uploads.safe_name(safe) == safe
    root = tmp_path_factory.getbasetemp() / "uploads"
    path = uploads.store_upload(root, name, name.encode("utf-8", "surrogatepass"))
    assert path.parent.parent == root.resolve() / ".jobs" / "uploads"
    assert path.read_bytes() == name.encode("utf-8", "surrogatepass")


@given(st.text(max_size=100), st.sampled_from([".parquet", ".jsonl", ".gz", ".json"]))
def test_the_ending_of_an_upload_is_kept(stem: str, suffix: str) -> None:
    assert Path(uploads.safe_name(stem + suffix)).suffix == suffix


def written(path: Path, *lines: tuple[float, str, int, int, int]) -> Path:
    stamp = [f"2026-01-01T00:00:{at:06.3f}+00:00" for at, *_ in lines]
    told = [
        {"time": time, "step": step, "done": done, "total": total, "steps_done": ended, "steps": 4}
        for time, (_, step, done, total, ended) in zip(stamp, lines, strict=True)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in told) + '{"time": "20')
    return path


def test_the_pace_gives_a_range_of_what_is_left(tmp_path: Path) -> None:
    path = written(
        tmp_path / "p", (0, "", 0, 0, 0), (10, "a", 5, 10, 0), (20, "a", 10, 10, 1), (25, "b", 2, 8, 1)
    )
    found = job_progress.read_progress(path, until="2026-01-01T00:00:30+00:00", running=True)
    assert found is not None
    assert (found.phase, found.done, found.total, found.steps_done, found.seconds) == ("b", 2, 8, 1, 30)
    assert found.fraction == pytest.approx(1.25 / 4)
    assert found.rate is None, "one line of a step tells no rate"
    since_start, lately = (1.25 / 4) / 30, (0.75 / 4) / 20
    rest = 1 - 1.25 / 4
    assert found.low == pytest.approx(0.8 * rest / max(since_start, lately))
    assert found.high == pytest.approx(1.25 * rest / min(since_start, lately))
    done = written(tmp_path / "d", (0, "", 0, 0, 0), (10, "a", 4, 4, 1))
    done.write_text(done.read_text().replace('"steps": 4', '"steps": 1'))
    ended = job_progress.read_progress(done, until="2026-01-01T00:00:30+00:00", running=True)
    assert ended is not None and (ended.fraction, ended.low) == (1, None), "what is left is no step"
    second = written(
        tmp_path / "q",
        (0, "", 0, 0, 0),
        (9, "a", 1, 1, 1),
        (10, "", 0, 0, 0),
        (12, "c", 1, 9, 0),
        (14, "c", 5, 9, 0),
    )
    found = job_progress.read_progress(second, until=None, running=False)
    assert found is not None and (found.phase, found.steps_done, found.rate, found.low) == (
        "c",
        0,
        2,
        None,
    ), "only the present list of steps counts"
    assert job_progress.read_progress(tmp_path / "none", until=None, running=True) is None


def test_a_step_is_written_once_a_second_and_when_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(progressing.FILE, str(tmp_path / "p"))
    log = progressing.Log()
    log(Event("begin", "", 0, 2))
    for done in range(100):
        log(Event("step", "a", done, 100))
        log(Event("step", "b", done, 50))
    log(Event("end", "a"))
    log(Event("step", "a", 100, 100))
    log(Event("end", "c"))
    lines = [json.loads(line) for line in (tmp_path / "p").read_text().splitlines()]
    keys = ("step", "done", "total", "steps_done", "steps")
    assert [tuple(line[key] for key in keys) for line in lines] == [
        ("", 0, 0, 0, 2), ("a", 0, 100, 0, 2), ("b", 0, 50, 0, 2), ("a", 100, 100, 1, 2), ("c", 1, 1, 2, 2),
    ]  # fmt: skip
    monkeypatch.delenv(progressing.FILE)
    log = progressing.Log()
    log(Event("begin", "", 0, 2))
    log(Event("end", "a"))
    assert len((tmp_path / "p").read_text().splitlines()) == len(lines)


def test_the_page_side_of_jobs_imports_neither_torch_nor_streamlit() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(APP)!r}); from jobs import job_process, job_queue; "
        "from live import live_models; "
        f"sys.exit(bool({{'torch', 'streamlit'}} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

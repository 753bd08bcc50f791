"""Jobs in other processes, of this machine or of a Ray cluster: none hangs, whatever another one does; what
fails is named, and what was running is finished.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from processes import children

from mechlens.core import machine
from mechlens.core.errors import DataError, MachineError
from mechlens.runs.executor import EXECUTOR, _do, execute, use_executor
from mechlens.runs.jobs import Job, Needs, fingerprints, pending
from mechlens.runs.local_executor import start_processes

Report = Callable[[int, int], None]
SECONDS = 60
"""a test that takes longer hangs"""


# ── jobs, which the workers import from here ──


def wait_for(arguments: dict[str, Any]) -> None:
    """Begin only once the file is there that tells that the other job runs."""
    while not Path(arguments["file"]).exists():
        time.sleep(0.01)


def fail(arguments: dict[str, Any], *_: object) -> None:
    wait_for(arguments)
    raise DataError("this job fails")


def chat(arguments: dict[str, Any], _inputs: dict[str, Path], out: Path, progress: Report) -> None:
    """Report far more often than a pipe has room for, before and after the other job has ended."""
    for done in range(arguments["reports"]):
        progress(done + 1, arguments["reports"])
        if done == 100:
            Path(arguments["file"]).touch()
            time.sleep(1.0)
    (out / "said.txt").write_text("all")


def die(arguments: dict[str, Any], _inputs: dict[str, Path], _out: Path, progress: Report) -> None:
    """As when the kernel wants the memory back, in the middle of reporting."""
    wait_for(arguments)
    for done in range(5_000):
        progress(done, 10_000)
    os.kill(os.getpid(), signal.SIGKILL)


def jobs_of(folder: Path, *kinds: str, reports: int = 50_000) -> list[Job]:
    arguments = {"file": str(folder / "runs"), "reports": reports}
    return [Job(f"steps/{kind}", f"{__name__}:{kind}", arguments, {}, 1) for kind in kinds]


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def executor(request: pytest.FixtureRequest) -> Iterator[str]:
    """Jobs of the test are executed by it."""
    if request.param == "ray":
        request.getfixturevalue("two_nodes")
    with use_executor(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def limit() -> Any:
    """End a test that hangs: the alarm raises in the main thread, which waits."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"nothing came back for {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def run(folder: Path, jobs: list[Job]) -> tuple[list[str], dict[str, tuple[int, int]]]:
    """The jobs that were finished, and the last that was heard of each."""
    finished: list[str] = []
    heard: dict[str, tuple[int, int]] = {}

    def progress(name: str, done: int, total: int) -> None:
        heard[name] = (done, total)

    try:
        execute(folder, jobs, workers=2, progress=progress, finished=lambda job: finished.append(job.name))
    finally:
        (folder / "heard.txt").write_text(repr(heard))
    return finished, heard


@pytest.mark.usefixtures("executor")
def test_a_job_that_fails_beside_one_that_reports_without_end_is_named_and_the_other_is_finished(
    tmp_path: Path,
) -> None:
    with pytest.raises(DataError, match="this job fails"):
        run(tmp_path, jobs := jobs_of(tmp_path, "fail", "chat"))
    assert (tmp_path / "steps" / "chat" / "said.txt").read_text() == "all"
    assert [job.name for job in pending(tmp_path, jobs)] == ["steps/fail"]


@pytest.mark.usefixtures("executor")
def test_a_worker_that_is_killed_while_it_reports_is_named(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="a worker process was killed"):
        run(tmp_path, jobs_of(tmp_path, "die", "chat"))
    assert not (tmp_path / "steps" / "die").exists()


def test_one_that_fails_one_that_reports_and_one_that_is_killed_leave_no_worker_behind(
    tmp_path: Path,
) -> None:
    jobs = jobs_of(tmp_path, "fail", "chat", "die")
    for _ in range(3):  # as a user would run it again
        with pytest.raises((DataError, MachineError)):
            execute(
                tmp_path, jobs, workers=3, progress=lambda name, done, total: None, finished=lambda job: None
            )
    left = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert left == (kept := tracker(os.getpid()))
    assert not [child for process in kept for child in children(int(process))]


def tracker(process: int) -> list[str]:
    """Children that are no workers: one for shared resources and one that starts workers."""
    started = Path(f"/proc/self/task/{process}/children").read_text().split()
    lines = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in started}
    return [child for child, line in lines.items() if b"resource_tracker" in line or b"forkserver" in line]


@pytest.mark.usefixtures("executor")
def test_the_last_numbers_of_a_job_are_heard(tmp_path: Path) -> None:
    finished, heard = run(tmp_path, jobs_of(tmp_path, "chat", reports=3_000))
    assert finished == ["steps/chat"]
    assert heard["steps/chat"] == (3_000, 3_000)


def test_ctrl_c_while_jobs_report_stops_them(tmp_path: Path, executor: str) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_executor as t; "
        "from "
        "pathlib import Path; "
    )
    code += f"t.run(Path({str(tmp_path)!r}), t.jobs_of(Path({str(tmp_path)!r}), 'chat', reports=10**9))"
    hear: dict[str, Any] = {
        "env": os.environ | {EXECUTOR: executor},
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        "start_new_session": True,
    }
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, **hear)
    while not (tmp_path / "runs").exists():
        time.sleep(0.05)
    time.sleep(1.5)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert b"KeyboardInterrupt" in error
    assert not (tmp_path / "steps" / "chat").exists()


def note_card(arguments: dict[str, Any], _inputs: dict[str, Path], out: Path, _progress: Report) -> None:
    (out / "card.txt").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    Path(arguments["file"] + out.name).touch()
    while (
        len(list(Path(arguments["file"]).parent.glob(f"{Path(arguments['file']).name}*"))) < 2
    ):  # so that each worker takes one job
        time.sleep(0.01)


def test_each_worker_sees_a_card_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mechlens.core.machine.cards", lambda: ("4", "7"))
    jobs = [
        job._replace(name=f"steps/{number}") for number, job in enumerate(jobs_of(tmp_path, "note_card") * 2)
    ]
    execute(tmp_path, jobs, workers=2, progress=lambda name, done, total: None, finished=lambda job: None)
    assert {(tmp_path / job.name / "card.txt").read_text() for job in jobs} == {"4", "7"}


def join_inputs(arguments: dict[str, Any], inputs: dict[str, Path], out: Path, _progress: Report) -> None:
    texts = [(inputs[role] / "text.txt").read_text() for role in sorted(inputs)]
    (out / "text.txt").write_text(arguments["text"] + "".join(texts))


@pytest.mark.usefixtures("executor")
def test_a_job_starts_when_its_inputs_exist(tmp_path: Path) -> None:
    def job(name: str, **inputs: str) -> Job:
        return Job(name, f"{__name__}:join_inputs", {"text": name}, inputs, 1)

    jobs = [job("a"), job("b", x="a"), job("c", x="a"), job("d", x="b", y="c"), job("e", x="d")]
    finished, _ = run(tmp_path, jobs)
    assert sorted(finished) == ["a", "b", "c", "d", "e"]
    assert [finished.index(name) for name in ("a", "d", "e")] == [0, 3, 4]
    assert (tmp_path / "e" / "text.txt").read_text() == "edbaca"


@pytest.mark.parametrize(
    ("needs", "others", "room"),
    [
        (Needs(), 0, True),
        (Needs(), 1, True),
        (Needs(), 2, False),
        (Needs(cores=2), 1, False),
        (Needs(memory=5_000), 1, True),
        (Needs(memory=5_001), 1, False),
        (Needs(cores=9, memory=20_000), 0, True),  # it has no better time
    ],
)
def test_no_more_jobs_run_at_once_than_cores_and_memory_allow(
    needs: Needs, others: int, room: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "memory", lambda: 10_000)
    job = Job("steps/a", "teach", {}, {}, 1, needs)
    with start_processes(tmp_path, [job] * 3, 2) as executor:
        assert executor.has_room(job, [job] * others) == room


def test_what_a_job_needs_is_not_part_of_its_fingerprint() -> None:
    job = Job("steps/a", "teach", {"base": "menagerie-a"}, {}, 1)
    assert fingerprints([job]) == fingerprints([job._replace(needs=Needs(cores=4, memory=10**9, cards=2))])


def test_a_finished_job_that_is_executed_again_stays_as_it_is(tmp_path: Path) -> None:
    """A node may be lost between the end of a job and its report."""
    job = Job("a", f"{__name__}:join_inputs", {"text": "a"}, {}, 1)
    do_again = partial(_do, tmp_path, job, fingerprints([job])["a"], {}, None, lambda done, total: None)
    do_again()
    (tmp_path / "a" / "text.txt").write_text("kept")
    do_again()
    assert (tmp_path / "a" / "text.txt").read_text() == "kept"

"""Processes that share a run: each job has one process at a time, whichever is killed or suspended, and what
is published stays.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shard_jobs import MARK, claims_of, expected_sums, jobs_of, share, starts, sums, take

from mechlens import cli
from mechlens.api.client import journal_of
from mechlens.core.errors import DataError, MachineError, SpecError
from mechlens.core.files import part_of, write_text
from mechlens.runs import claims as claiming
from mechlens.runs import store
from mechlens.runs.claims import Shard, refuse_others, sharing
from mechlens.runs.jobs import Job, fingerprints, pending
from mechlens.runs.progress import Event, silent

OTHER = "b" * 16
SECONDS = 0.6
"""lease in these tests"""
TIMES = int(os.environ.get("KILLS", "50"))
SECONDS_OF_A_HANG = 120
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(claiming.LEASE, str(SECONDS))


def start(call: str, **options: Any) -> subprocess.Popen[str]:
    """Another process that calls a function of this file."""
    code = f"import sys; sys.path.insert(0, {str(REPOSITORY / 'tests')!r}); import shard_jobs as t; "
    code += f"from pathlib import Path; {call}"
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        **options,
    )


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has claimed `step` and saved something of it."""
    with start(f"t.hold(Path({str(tmp_path)!r}))", stderr=subprocess.PIPE) as process:
        assert stdout_of(process).readline() == "1\n"
        yield process
        process.kill()


def stdout_of(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdout is not None
    return process.stdout


# ── shards ──


@pytest.mark.parametrize("text", ["", "1", "0/3", "4/3", "-1/3", "1/0", "a/b", "1/3/3", "1.0/3", "²/3"])
def test_a_shard_that_is_none_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(SpecError, match=r"--shard is .*expected I/N"):
        Shard.parse(text)


def test_the_command_line_refuses_it_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "tour", "--shard", "4/3"]) == 2
    assert (
        capsys.readouterr().err == "mechlens: --shard is '4/3'; expected I/N with 1 <= I <= N, such as 2/3\n"
    )


@given(st.integers(0, 40), st.integers(1, 9))
def test_the_shards_of_a_list_start_with_parts_that_make_it_up(length: int, count: int) -> None:
    items = list(range(length))
    orders = [Shard.parse(f"{index}/{count}").in_order(items) for index in range(1, count + 1)]
    assert all(sorted(order) == items for order in orders)
    own = [order[: len(items[place::count])] for place, order in enumerate(orders)]
    assert sorted(item for part in own for item in part) == items


@pytest.mark.parametrize("text", ["", "0", "-1", "soon", "nan", "inf"])
def test_a_lease_that_is_no_number_of_seconds_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(claiming.LEASE, text)
    with pytest.raises(SpecError, match="MECHLENS_LEASE is"):
        claiming.lease_seconds()


# ── one claim ──


def test_a_step_has_one_claim_however_often_others_ask(tmp_path: Path) -> None:
    step = tmp_path / "step"
    with claims_of(tmp_path).alive() as first, claims_of(tmp_path).alive() as second:
        folder = take(first, step)
        assert folder is not None and folder.is_dir()
        assert take(second, step, within=2 * SECONDS) is None
        with store.working(step, MARK, part=folder) as out:
            (out / "result.txt").write_text("first")
        assert take(second, step, within=1) == step
        assert (step / "result.txt").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards", "step"]
    assert not list((tmp_path / "shards").iterdir())


def test_only_changes_of_a_heartbeat_count_whatever_a_clock_says(tmp_path: Path) -> None:
    step = tmp_path / "step"
    with claims_of(tmp_path).alive() as first, claims_of(tmp_path).alive() as second:
        take(first, step)
        until = time.monotonic() + 2 * SECONDS
        while time.monotonic() < until:
            for file in [*(tmp_path / "shards").iterdir(), *step.with_name("step.part").iterdir()]:
                os.utime(file, (0, random.choice([0, 2**33])))
            assert take(second, step) is None
            time.sleep(0.02)


def test_a_claim_of_a_process_that_ended_is_free_at_once(tmp_path: Path) -> None:
    with claims_of(tmp_path).alive() as first:
        assert take(first, tmp_path / "step") is not None
    with claims_of(tmp_path).alive() as second:
        folder = take(second, tmp_path / "step")
    assert folder is not None and folder.name == "2"


def test_a_claim_of_a_killed_process_is_free_after_the_lease_and_what_it_saved_is_used(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    with claims_of(tmp_path).alive() as claims:
        assert take(claims, tmp_path / "step", within=2 * SECONDS) is None
        holder.kill()
        killed = time.monotonic()
        folder = take(claims, tmp_path / "step", within=30)
        assert time.monotonic() - killed > SECONDS * (1 - 2 / claiming.BEATS)
        assert folder is not None and (folder / "saved.txt").read_text() == "saved"
        with store.working(tmp_path / "step", MARK, part=folder) as out:
            (out / "result.txt").write_text("second")
    assert {path.name for path in (tmp_path / "step").iterdir()} == {
        "open.txt", "result.txt", "saved.txt", store.RECORD,
    }  # fmt: skip


def test_what_was_saved_of_another_version_of_a_step_is_not_used(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.kill()
    with claims_of(tmp_path).alive() as claims:
        folder = take(claims, tmp_path / "step", within=30, mark=OTHER)
    assert folder is not None and not list(folder.iterdir())


def test_a_claim_whose_process_was_killed_before_it_wrote_its_name_is_free_after_the_lease(
    tmp_path: Path,
) -> None:
    (tmp_path / "step.part" / "1").mkdir(parents=True)
    with claims_of(tmp_path).alive() as claims:
        started = time.monotonic()
        folder = take(claims, tmp_path / "step", within=30)
        assert time.monotonic() - started >= SECONDS
    assert folder is not None and folder.name == "2"


@pytest.mark.parametrize("published", [True, False])
def test_a_suspended_process_that_comes_back_changes_nothing(
    tmp_path: Path, holder: subprocess.Popen[str], published: bool
) -> None:
    """Another process replaces its claim; it wakes up before or after the step is published, and writes."""
    step = tmp_path / "step"
    os.kill(holder.pid, signal.SIGSTOP)
    with claims_of(tmp_path).alive() as claims:
        folder = take(claims, step, within=30)
        assert folder is not None and (folder / "saved.txt").read_text() == "saved"

        def wake() -> None:
            os.kill(holder.pid, signal.SIGCONT)
            holder.communicate("\n", timeout=30)
            assert holder.returncode != 0

        with store.working(step, MARK, part=folder) as out:
            if not published:
                wake()
            (out / "result.txt").write_text("second")
        if published:
            wake()
        assert take(claims, step, within=1) == step
    contents = {path.name: path.read_text() for path in step.iterdir() if path.name != store.RECORD}
    assert contents == {"open.txt": "early", "saved.txt": "saved", "result.txt": "second"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards", "step"]


def test_of_two_processes_that_finish_a_step_the_first_publishes_it(tmp_path: Path) -> None:
    step = tmp_path / "step"
    (tmp_path / "step.part" / "1").mkdir(parents=True)
    (tmp_path / "step.part" / "2").mkdir()
    with store.working(step, MARK, part=tmp_path / "step.part" / "1") as late:
        (late / "result.txt").write_text("late")
        with store.working(step, MARK, part=tmp_path / "step.part" / "2") as out:
            (out / "result.txt").write_text("first")
        (tmp_path / "step.part" / "1").mkdir(parents=True)  # as if its files had not been removed yet
        (late / "claim").write_text(MARK)
        (late / "result.txt").write_text("late")
    assert (step / "result.txt").read_text() == "first"
    assert not (tmp_path / "superseded").exists() and not (tmp_path / "step.part").exists()


def test_a_step_that_is_published_between_two_looks_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store.working(tmp_path / "step", MARK):
        pass
    stale, look = iter([False]), store.is_complete
    monkeypatch.setattr(store, "is_complete", lambda step, mark: next(stale, look(step, mark)))
    assert claims_of(tmp_path).take(tmp_path / "step", MARK) == tmp_path / "step"
    assert not (tmp_path / "step.part").exists()


def test_a_process_that_slept_between_look_and_claim_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saw no claim; claim 1 has come and gone since, and claim 2 has replaced it."""
    (tmp_path / "step.part" / "2").mkdir(parents=True)
    stale, look = iter([0]), claiming._newest
    monkeypatch.setattr(claiming, "_newest", lambda claims: next(stale, look(claims)))
    assert claims_of(tmp_path).take(tmp_path / "step", MARK) is None
    assert not (tmp_path / "step.part" / "1").exists()


def test_an_older_result_is_set_aside_once(tmp_path: Path) -> None:
    step = tmp_path / "step"
    with store.working(step, OTHER) as out:
        (out / "result.txt").write_text("old")
    with claims_of(tmp_path).alive() as claims:
        folder = take(claims, step)
        assert folder is not None
        with store.working(step, MARK, part=folder) as out:
            assert (step / "result.txt").read_text() == "old"
            (out / "result.txt").write_text("new")
    assert (step / "result.txt").read_text() == "new"
    assert [path.name for path in (tmp_path / "superseded").iterdir()] == [f"step-{OTHER}"]
    assert (tmp_path / "superseded" / f"step-{OTHER}" / "result.txt").read_text() == "old"


def test_files_that_a_kill_interrupted_are_not_published(tmp_path: Path) -> None:
    with store.working(tmp_path / "run" / "step", MARK) as out:
        part_of(out / "table.parquet").write_text("half")
        (out / "inner").mkdir()
        part_of(out / "inner" / "table.parquet").write_text("half")
        (out / "mine.part").write_text("a step's own file")
    assert not list((tmp_path / "run" / "step").rglob("table.*"))
    assert (tmp_path / "run" / "step" / "mine.part").is_file()
    part_of(tmp_path / "run" / "spec.yaml").write_text("half")
    with store.lock(tmp_path / "run", shared=True):
        assert len(list((tmp_path / "run").glob("*.part"))) == 1  # another process may be writing it
    with store.lock(tmp_path / "run"):
        assert not list((tmp_path / "run").glob("*.part"))


def test_answers_of_an_api_have_one_journal_whichever_process_asks(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / "spec.yaml").touch()
    folders = [tmp_path / "asked" / "trait" / name for name in ("s0", "s0.part", "s0.part/3")]
    assert {journal_of(folder) for folder in folders} == {tmp_path / "api" / "asked" / "trait" / "s0.jsonl"}


# ── a list of jobs ──


def together(*actions: Callable[[], object]) -> None:
    """Call functions in threads; what one raises is raised here."""
    errors: list[BaseException] = []

    def call(action: Callable[[], object]) -> None:
        try:
            action()
        except (AssertionError, OSError, SpecError, DataError, MachineError) as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a process waits for ever"
    if errors:
        raise errors[0]


def test_processes_share_a_list_and_each_job_is_done_once(tmp_path: Path) -> None:
    jobs, heard = jobs_of(tmp_path, 24, seconds=0.02), dict[str, list[str]]()

    def do(shard: str) -> None:
        heard[shard] = share(tmp_path, jobs, shard)

    together(*(lambda shard=shard: do(shard) for shard in ("1/3", "2/3", "3/3")))
    assert sorted(starts(tmp_path)) == sorted(str(place) for place in range(24))
    assert sums(tmp_path, jobs) == expected_sums(24)
    assert all(sorted(names) == sorted(job.name for job in jobs) for names in heard.values())


@pytest.mark.parametrize("abandoned", [False, True])
def test_of_processes_that_ask_at_one_moment_one_gets_the_step(tmp_path: Path, abandoned: bool) -> None:
    steps = [tmp_path / f"step-{number}" for number in range(40)]
    for step in steps if abandoned else []:
        (store.unfinished(step) / "1").mkdir(parents=True)
        (store.unfinished(step) / "1.process").write_text("ended")
    barrier, taken = threading.Barrier(6), list[Path]()

    def ask() -> None:
        with claims_of(tmp_path).alive() as claims:
            for step in steps:
                barrier.wait(30)
                taken.extend(folder for folder in [claims.take(step, MARK)] if folder)
            barrier.wait(30)

    together(*[ask] * 6)
    assert sorted(taken) == sorted(store.unfinished(step) / ("2" if abandoned else "1") for step in steps)


def test_one_shard_does_everything_if_no_other_comes(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, 6)
    assert len(share(tmp_path, jobs, "2/3")) == 6 and sums(tmp_path, jobs) == expected_sums(6)
    assert starts(tmp_path) == ["1", "4", "2", "0", "5", "3"]  # its part first; 5 waits for 0
    assert share(tmp_path, jobs, "1/3") == []


def test_a_shard_with_workers_hands_each_of_them_one_job_at_a_time(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, 9, seconds=0.05)
    together(
        lambda: share(tmp_path, jobs, "1/2", workers=2),
        lambda: share(tmp_path, jobs, "2/2"),
    )
    assert sorted(starts(tmp_path)) == sorted(str(place) for place in range(9))
    assert sums(tmp_path, jobs) == expected_sums(9)


def test_a_job_that_fails_stops_every_shard_with_its_message(tmp_path: Path) -> None:
    jobs = [Job("steps/bad", "shard_jobs:fail", {}, {}, 1), *jobs_of(tmp_path, 3)]
    for shard in ("1/2", "2/2"):
        with pytest.raises(DataError, match="this job fails"):
            share(tmp_path, jobs, shard)
    assert [job.name for job in pending(tmp_path, jobs)] == ["steps/bad", "steps/1"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failure_of_a_process_that_lost_its_claim_is_none(tmp_path: Path, workers: int) -> None:
    jobs = [Job("steps/lost", "shard_jobs:interrupt", {}, {}, 1)]
    assert share(tmp_path, jobs, "1/1", workers=workers) == ["steps/lost"]
    assert (tmp_path / "steps" / "lost" / "result.txt").read_text() == "3"


def disturb(run: Path, *, jobs: int, kills: int, seed: int) -> int:
    """Let four processes do jobs while one after the other is killed and started again, and another is
    suspended for up to two leases; returns how many were killed.
    """
    rng, killed = random.Random(seed), 0
    listed = jobs_of(run, jobs, seconds=0.05)
    call = "t.share(Path({run!r}), t.jobs_of(Path({run!r}), {jobs}, seconds=0.05), '{shard}/4')"

    def begin(shard: int) -> subprocess.Popen[str]:
        environment = os.environ | {"MECHLENS_LEASE": "0.3"}
        return start(call.format(run=str(run), jobs=jobs, shard=shard), env=environment)

    shards = {shard: begin(shard) for shard in (1, 2, 3, 4)}
    try:
        deadline = time.monotonic() + SECONDS_OF_A_HANG
        while pending(run, listed):
            assert time.monotonic() < deadline
            time.sleep(rng.uniform(0.1, 0.4))
            asleep, dead = rng.sample(sorted(shards), 2)
            os.kill(shards[asleep].pid, signal.SIGSTOP)
            if (run / "log.txt").exists() and killed < kills and shards[dead].poll() is None:
                shards[dead].kill()
                shards[dead].communicate()
                shards[dead], killed = begin(dead), killed + 1
            time.sleep(rng.uniform(0.1, 0.6))
            os.kill(shards[asleep].pid, signal.SIGCONT)
        assert [process.wait(timeout=SECONDS_OF_A_HANG) for process in shards.values()] == [0, 0, 0, 0]
    finally:
        for process in shards.values():
            process.kill()
            process.communicate()
    assert sums(run, listed) == expected_sums(jobs)
    assert all(store.is_complete(run / name, mark) for name, mark in fingerprints(listed).items())
    assert {f"steps/{path.name}" for path in (run / "steps").iterdir()} == {job.name for job in listed}
    return killed


def test_killed_and_suspended_processes_leave_every_job_done_and_whole(tmp_path: Path) -> None:
    disturb(tmp_path, jobs=40, kills=5, seed=0)


@pytest.mark.slow
def test_many_killed_and_suspended_processes_leave_every_job_done_and_whole(tmp_path: Path) -> None:
    killed, began = list[int](), time.monotonic()
    while sum(killed) < TIMES:
        seed = len(killed)
        killed.append(disturb(tmp_path / str(seed), jobs=200, kills=40, seed=seed))
    logging.getLogger(__name__).info(
        "%d kills in %d runs of 200 jobs, in %.0f s", sum(killed), len(killed), time.monotonic() - began
    )


# ── the run folder ──


def test_shards_share_the_lock_that_refuses_every_other_command(tmp_path: Path) -> None:
    run = tmp_path / "run"
    refused = pytest.raises(MachineError, match="another process is writing")
    with store.lock(run, shared=True), store.lock(run, shared=True), refused, store.lock(run):
        pytest.fail("locked twice")
    with store.lock(run), refused, store.lock(run, shared=True):
        pytest.fail("locked twice")


def test_shards_need_no_lock_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unlocked(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("mechlens.core.machine.lock", unlocked)
    with store.lock(tmp_path, shared=True):
        pass
    with pytest.raises(OSError, match="No locks"), store.lock(tmp_path):
        pytest.fail("a run of one process needs the lock")


def test_another_config_is_refused_while_shards_run_and_waits_for_killed_ones(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    for shard, way in (("1/2", "another config"), (None, "with --shard")):
        chosen = Shard.parse(shard) if shard else None
        with pytest.raises(MachineError, match=way), sharing(tmp_path, OTHER, chosen, silent):
            pytest.fail("two configs in one folder")
    with sharing(tmp_path, MARK, Shard.parse("1/2"), silent) as claims:
        assert claims is not None
    holder.kill()
    notes: list[Event] = []
    started = time.monotonic()
    with sharing(tmp_path, OTHER, Shard.parse("1/2"), notes.append):
        assert time.monotonic() - started >= SECONDS
    assert [note.kind for note in notes] == ["note"] and "waiting up to 0.6 s" in notes[0].text
    refuse_others(tmp_path, "", notes.append)
    assert len(notes) == 1  # the dead are not waited for again


def test_what_is_done_once_is_done_by_one_process_and_again_if_its_files_are_deleted(tmp_path: Path) -> None:
    file, times = tmp_path / "table.txt", list[int]()

    def write() -> None:
        times.append(1)
        time.sleep(2 * SECONDS)
        write_text(file, "table")

    def finish() -> None:
        with claims_of(tmp_path).alive() as claims:
            claims.do_once(write, written=[file])
            assert file.read_text() == "table"

    together(finish, finish, finish)
    assert times == [1]
    finish()
    assert times == [1]
    file.unlink()
    finish()
    assert times == [1, 1]

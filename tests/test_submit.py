"""Shards as jobs: `mechlens submit` by submitit's local executor, with jobs that are interrupted, and the job
array of configs/README.md.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mechlens import cli
from mechlens.cli import submit as submitting
from mechlens.core.files import read_json

ROOT = Path(__file__).parents[1]


def test_the_job_array_of_the_configs_page_calls_each_shard(tmp_path: Path) -> None:
    (script,) = re.findall(
        r"```sh\n(#!/bin/bash\n.*?)```", (ROOT / "configs" / "README.md").read_text(), re.S
    )
    assert re.search(r"^#SBATCH .*--array=1-8\b", script, re.M)
    stub = tmp_path / "srun"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}
    printed = subprocess.run(["bash", "-eu", "-c", script], capture_output=True, text=True, env=environment)
    program, *words = printed.stdout.splitlines()
    action: Any = cli.read(words)
    assert (program, action.keywords["shard"], action.args) == ("mechlens", "3/8", (Path("demo"),))


def test_submitting_needs_nodes_and_its_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert cli.main(["submit", "tour", "--nodes", "2"]) == 2
    assert capsys.readouterr().err == f"mechlens: {submitting.NO_PACKAGE}\n"
    assert cli.main(["submit", "tour", "--nodes", "0"]) == 2
    assert "--nodes is 0; expected 1 or more" in capsys.readouterr().err


def test_a_job_that_fails_ends_with_the_exit_code_of_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        submitting.ShardJob(Path("nowhere.yaml"), shard="1/2")()
    assert ended.value.code == 2 and "nowhere.yaml" in capsys.readouterr().err


def finished(place: Path, *, seconds: float = 600) -> dict[str, Any]:
    """The summary of the run that jobs make."""
    until = time.monotonic() + seconds
    while not (place / "shards" / "results" / "step.json").exists():
        assert time.monotonic() < until, [log.read_text()[-500:] for log in place.glob("submitted/*_log.*")]
        time.sleep(0.5)
    return read_json(place / "summary.json")


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The jobs that a test submits; what still runs at the end is cancelled."""
    submitit = pytest.importorskip("submitit")
    submitted: list[Any] = []
    submit_array = submitit.AutoExecutor.submit_array

    def keep(executor: Any, shards: Any) -> Any:
        submitted.extend(submit_array(executor, shards))
        return submitted

    monkeypatch.setattr(submitit.AutoExecutor, "submit_array", keep)
    yield submitted
    for job in submitted:
        job.cancel()
        job._process.wait(timeout=60)


@pytest.mark.slurm
def test_jobs_share_a_run_and_an_interrupted_one_continues(
    tmp_path: Path, jobs: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job gets the signal that SLURM sends; the local executor then starts it again, as SLURM does."""
    run = tmp_path / "run"
    monkeypatch.setenv("MECHLENS_LEASE", "5")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
    words = ["--out", str(run), "--workers", "1", "--minutes", "20"]
    assert cli.main(["submit", "tour", "--nodes", "2", "--cluster", "local", *words]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"shard {shard}/2: job {job.job_id}, log {job.paths.stdout}" for shard, job in enumerate(jobs, 1)
    ]
    while not list(run.glob("**/*.part/1")):
        time.sleep(0.1)
        assert jobs[0].state == jobs[1].state == "RUNNING"
    (task,) = Path(f"/proc/{jobs[0].job_id}/task/{jobs[0].job_id}/children").read_text().split()
    os.kill(int(task), signal.SIGUSR2)
    assert finished(run)["experiment"] == "tour"
    for job in jobs:
        assert job.result() is None
    log = jobs[0].paths.stdout.read_text() + jobs[0].paths.stderr.read_text()
    assert "this job is preempted" in log and log.count("Starting with JobEnvironment") == 2
    assert not list(run.glob("**/*.part"))

"""Cores, cards, locks and parents on machines that are not this one: containers, Slurm, macOS, Windows,
several accelerators.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import children, workers
from test_jobs import is_gone, until
from threadpoolctl import threadpool_info, threadpool_limits

from jobs import job_queue
from mechlens import cli
from mechlens.cli.console import console
from mechlens.cli.tables import plan_tables
from mechlens.core import machine
from mechlens.core.files import write_json
from mechlens.core.traits import load_experiment, load_family
from mechlens.pipeline import estimate
from mechlens.runs.plan import jobs_of

REPOSITORY = Path(__file__).parents[1]
DEMO = REPOSITORY / "configs" / "experiments" / "demo.yaml"


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Control groups of a test's own, on a machine of 64 cores."""
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "PROCESS_CGROUPS", tmp_path / "own")
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda _process: set(range(64)), raising=False)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_limits_all_cores_are_used(groups: Path) -> None:
    assert machine.cores() == 64
    write(groups / "own", "0::/\n")
    write(groups / "cgroup" / "cpu.max", "max 100000\n")
    assert machine.cores() == 64


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("1000 100000", 1), ("half", 64)],
)
def test_a_containers_quota_counts_rounded_up(quota: str, cores: int, groups: Path) -> None:
    write(groups / "own", "0::/\n")
    write(groups / "cgroup" / "cpu.max", f"{quota}\n")
    assert machine.cores() == cores


def test_the_quota_of_any_group_around_this_process_counts(groups: Path) -> None:
    write(groups / "own", "0::/system.slice/job.scope\n")
    write(groups / "cgroup" / "system.slice" / "cpu.max", "300000 100000\n")
    write(groups / "cgroup" / "system.slice" / "job.scope" / "cpu.max", "max 100000\n")
    assert machine.cores() == 3


@pytest.mark.parametrize("folder", ["cpu,cpuacct", "cpu,cpuacct/docker/abc"])
@pytest.mark.parametrize(("quota", "cores"), [("400000", 4), ("-1", 64)])
def test_the_quota_of_version_1_counts_in_and_outside_the_container(
    folder: str, quota: str, cores: int, groups: Path
) -> None:
    write(groups / "own", "3:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n")
    write(groups / "cgroup" / folder / "cpu.cfs_quota_us", f"{quota}\n")
    write(groups / "cgroup" / folder / "cpu.cfs_period_us", "100000\n")
    assert machine.cores() == cores


def test_a_containers_memory_limit_counts(groups: Path) -> None:
    present = machine.memory()
    assert present > 2**28
    write(groups / "own", "0::/job\n")
    for limit, bytes_of_memory in (("max", present), ("1048576", 2**20), (str(2**60), present)):
        write(groups / "cgroup" / "memory.max", f"{limit}\n")
        assert machine.memory() == bytes_of_memory
    write(groups / "cgroup" / "job" / "memory.max", "65536\n")
    assert machine.memory() == 2**16
    write(groups / "own", "9:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n")
    assert machine.memory() == present
    write(groups / "cgroup" / "memory" / "memory.limit_in_bytes", "4096\n")
    assert machine.memory() == 2**12


def test_what_slurm_gave_counts(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not (groups / "own").exists()
    for said, cores in (("8", 8), ("0", 1), ("many", 64), ("128", 64)):
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", said)
        assert machine.cores() == cores


@given(st.integers(1, 256), st.integers(1, 256), st.integers(1, 10**6), st.integers(1, 300))
def test_cores_are_the_least_of_all_limits(present: int, affinity: int, quota: int, slurm: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.cpu_count", lambda: present)
        patch.setattr("os.sched_getaffinity", lambda _process: set(range(affinity)), raising=False)
        patch.setattr(machine, "_quotas", lambda: iter([quota / 1000]))
        patch.setenv("SLURM_CPUS_PER_TASK", str(slurm))
        assert machine.cores() == min(present, affinity, math.ceil(quota / 1000), slurm)


def test_a_machine_without_affinity_has_cores(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert groups.is_dir()
    monkeypatch.delattr("os.sched_getaffinity")
    assert machine.cores() == 64


def test_the_plan_and_the_run_take_the_same_number(groups: Path, tmp_path: Path) -> None:
    write(groups / "own", "0::/\n")
    write(groups / "cgroup" / "cpu.max", "700000 100000\n")
    experiment = load_experiment(DEMO)
    steps = jobs_of(
        experiment, load_family(experiment.family, DEMO), bases=dict.fromkeys(experiment.bases(), "x")
    )
    with console.capture() as printed:
        console.print(plan_tables(estimate.plan_of(experiment, steps, tmp_path)))
    said = " ".join(printed.get().split())
    assert machine.workers() == 7
    assert "on 7 cores" in said and "; 7 at a time" in said


def test_one_worker_a_card(groups: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert groups.is_dir()
    monkeypatch.delenv(machine.VISIBLE, raising=False)
    assert machine.cards() == ()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert machine.cards() == ("0", "1", "2")
    assert machine.workers() == 3
    monkeypatch.setenv(machine.VISIBLE, "4, 6,GPU-8f,-1,2")
    assert machine.cards() == ("4", "6", "GPU-8f")
    experiment = load_experiment(DEMO)
    steps = jobs_of(
        experiment, load_family(experiment.family, DEMO), bases=dict.fromkeys(experiment.bases(), "x")
    )
    with console.capture() as printed:
        console.print(plan_tables(estimate.plan_of(experiment, steps, tmp_path)))
    said = " ".join(printed.get().split())
    assert "on 3 accelerators" in said and "; 3 at a time" in said


def test_each_worker_sees_a_card_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for worker in range(4):
        monkeypatch.setenv(machine.VISIBLE, "before")
        machine.use_cards(("4", "6", "GPU-8f"), worker)
        seen.append(os.environ[machine.VISIBLE])
    assert seen == ["4", "6", "GPU-8f", "4"]
    monkeypatch.setenv(machine.VISIBLE, "before")
    machine.use_cards((), 0, each=2)
    assert os.environ[machine.VISIBLE] == "before"


def test_workers_whose_jobs_take_several_cards_share_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cards", lambda: tuple("01234567"))
    assert [machine.workers(each) for each in (1, 2, 3, 8, 16)] == [8, 4, 2, 1, 1]
    seen = []
    for worker in range(machine.workers(3)):
        machine.use_cards(machine.cards(), worker, each=3)
        seen.append(os.environ[machine.VISIBLE])
    assert seen == ["0,1,2", "3,4,5"]
    machine.use_cards(("4", "7"), 0, each=3)
    assert os.environ[machine.VISIBLE] == "4,7"


def test_macos_has_no_affinity_and_plans_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr("os.sched_getaffinity")
    assert cli.main(["run", str(DEMO), "--plan", "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr()
    assert "at a time" in printed.out and printed.err == ""


def test_windows_imports_every_module_and_is_told_in_one_line(tmp_path: Path) -> None:
    """Without file locks and affinity; in a process that never had them."""
    code = (
        "import os, sys\nsys.modules['fcntl'] = None\ndel os.sched_getaffinity\nsys.path.insert(0, 'app')\n"
    )
    code += "import mechlens.cli.commands, mechlens.api.client, mechlens.api.budget, state\n"
    code += "from jobs import job_queue\n"
    code += "sys.stderr.write('imported\\n')\nfrom mechlens import cli\nsys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "run", str(DEMO), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines[0] == "imported"  # and nothing was warned of before
    told = [
        line for line in lines if "mechlens" in line and "huggingface_hub" not in line
    ]  # which warns of soft locks here
    assert len(told) == 1 and told[0].startswith("mechlens: mechlens runs on Linux, macOS and WSL")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("platform", ["linux", pytest.param("darwin", marks=pytest.mark.slow)])
def test_a_command_ends_with_the_process_that_watches_it(platform: str, small: Path, tmp_path: Path) -> None:
    """Killed outright, that process can end nothing itself; where there is no prctl, the command looks after
    its parent.
    """
    shutil.copytree(small, tmp_path / "small")
    shutil.rmtree(tmp_path / "small" / "students")
    folder = tmp_path / ".jobs" / "one"
    folder.mkdir(parents=True)
    command = [
        "run",
        str(tmp_path / "small" / "spec.yaml"),
        "--out",
        str(tmp_path / "small"),
        "--workers",
        "1",
    ]
    write_json(folder / "job.json", {"state": "done", "command": command, "cwd": str(REPOSITORY)})
    code = "import sys\nfrom pathlib import Path\nfrom jobs import job_process, job_queue\n"
    code += f"sys.platform = {platform!r}\n"
    code += f"job_process.run_command(Path({str(folder)!r}), job_queue.read_job(Path({str(folder)!r})))"
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY / 'app'}{os.pathsep}{REPOSITORY}"}
    watcher = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=REPOSITORY)
    until(lambda: (folder / job_queue.PROGRESS).exists())
    until(lambda: len(workers(watcher.pid)) >= 1)
    started = children(watcher.pid)
    watcher.send_signal(signal.SIGKILL)
    watcher.wait()
    until(lambda: all(map(is_gone, started)), seconds=20)


def test_one_thread_is_one_thread_of_numpy_too() -> None:
    threadpool_limits(2)
    machine.use_one_thread()
    assert {library["num_threads"] for library in threadpool_info()} == {1}

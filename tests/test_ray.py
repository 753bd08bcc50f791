"""A run on a Ray cluster of two nodes on this machine makes the tables of a local run, whatever is killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray_nodes
import yaml
from test_kills import content, read_everything

from mechlens.runs.ray_executor import TOKEN

pytestmark = pytest.mark.ray
REPOSITORY = Path(__file__).parents[1]
TOUR = REPOSITORY / "configs" / "experiments" / "tour.yaml"
KILLS = int(os.environ.get("KILLS", "5"))
"""kills at random moments, of drivers and of nodes in turn"""


def start(folder: Path, *words: str, config: Path = TOUR) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mechlens", "run", str(config), "--out", str(folder), *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=os.environ
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What a run that succeeds writes to standard output; it writes nothing to standard error."""
    printed, complaint = process.communicate(timeout=300)
    assert not process.returncode and not complaint, complaint
    return printed


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Return once the condition is true, which has to be before the process ends."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def local_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tour, by two processes of this machine."""
    folder = tmp_path_factory.mktemp("local") / "run"
    finish(start(folder, "--workers", "2"))
    return folder


@pytest.fixture
def own_nodes() -> Iterator[Any]:
    """A cluster of two nodes that a test may kill."""
    with ray_nodes.running(2) as cluster:
        yield cluster


# before the tests with a cluster, which Ray would use: it looks for one on this machine
def test_without_a_cluster_one_is_started_and_ended(
    local_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes a password of new clusters there
    shutil.copytree(local_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "asked")
    finish(start(tmp_path / "run", "--executor", "ray", "--workers", "1"))
    assert content(tmp_path / "run") == content(local_run)


@pytest.mark.usefixtures("two_nodes")
def test_two_nodes_make_the_same_bytes_and_only_the_result_is_printed(
    local_run: Path, tmp_path: Path
) -> None:
    printed = finish(start(tmp_path / "run", "--executor", "ray", "--json"))
    assert json.loads(printed) == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert content(tmp_path / "run") == content(local_run)
    assert not (tmp_path / "run" / TOKEN).exists()


def students_in_training(folder: Path) -> int:
    return len(list(folder.glob("students/*/*.part")))


def test_a_node_that_is_killed_costs_nothing_but_time(
    own_nodes: Any, local_run: Path, tmp_path: Path
) -> None:
    process = start(tmp_path / "run", "--executor", "ray")
    wait_until(lambda: students_in_training(tmp_path / "run") == 2, process)  # one on each node
    os.kill(ray_nodes.raylet_of(own_nodes.worker_nodes.pop()), signal.SIGKILL)
    finish(process)
    assert content(tmp_path / "run") == content(local_run)


@pytest.mark.usefixtures("two_nodes")
def test_a_driver_that_is_killed_is_resumed(local_run: Path, tmp_path: Path) -> None:
    process = start(tmp_path / "run", "--executor", "ray")
    wait_until(lambda: students_in_training(tmp_path / "run") == 2, process)
    process.kill()
    process.communicate()
    assert (tmp_path / "run" / TOKEN).exists()
    finish(start(tmp_path / "run", "--executor", "ray"))
    assert content(tmp_path / "run") == content(local_run)


def test_drivers_and_nodes_killed_at_random_moments(own_nodes: Any, local_run: Path, tmp_path: Path) -> None:
    rng, killed = random.Random(0), 0
    process = start(tmp_path / "run", "--executor", "ray")
    while killed < KILLS:
        try:
            process.wait(timeout=rng.uniform(0.2, 40))
        except subprocess.TimeoutExpired:
            killed += 1
            if killed % 2:
                process.kill()
                process.communicate()
                read_everything(tmp_path / "run")
                process = start(tmp_path / "run", "--executor", "ray")
            else:
                os.kill(ray_nodes.raylet_of(own_nodes.worker_nodes.pop()), signal.SIGKILL)
                own_nodes.add_node(**ray_nodes.NODE)
            continue
        finish(process)
        assert content(tmp_path / "run") == content(local_run)
        shutil.rmtree(tmp_path / "run")
        process = start(tmp_path / "run", "--executor", "ray")
    finish(process)
    assert content(tmp_path / "run") == content(local_run)


@pytest.mark.usefixtures("two_nodes")
def test_a_job_that_raises_is_one_line_and_the_others_are_finished(tmp_path: Path) -> None:
    fields = yaml.safe_load(TOUR.read_text())
    training = fields["teacher"]["training"] | {"learning_rate": 1e30}
    fields["arms"][1] |= {"teacher": fields["teacher"] | {"training": training}}
    (tmp_path / "wild.yaml").write_text(yaml.safe_dump(fields))
    process = start(tmp_path / "run", "--executor", "ray", config=tmp_path / "wild.yaml")
    _, line = process.communicate(timeout=300)
    assert process.returncode == 2
    assert line.count("\n") == 1 and "learning_rate" in line
    finished = {step.parent.name for step in (tmp_path / "run").glob("teachers/*/step.json")}
    assert finished == {"eagle", "untouched"}


def test_a_node_that_does_not_see_the_run_folder_is_named(tmp_path: Path) -> None:
    hide = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {tmp_path} && exec "$0" "$@"']
    if subprocess.run([*hide, "true"], check=False, capture_output=True).returncode:
        pytest.skip("only root can hide a folder from a node")
    with ray_nodes.running(1) as cluster, ray_nodes.joined(cluster.address, hide):
        process = start(tmp_path / "run", "--executor", "ray")
        _, line = process.communicate(timeout=300)
    assert process.returncode == 2
    assert line.count("\n") == 1 and f"cannot read {tmp_path / 'run' / TOKEN}; put the run on" in line
    assert not list((tmp_path / "run").rglob("step.json"))


def test_an_address_where_no_cluster_answers_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    process = start(tmp_path / "run", "--executor", "ray")
    _, line = process.communicate(timeout=300)
    assert process.returncode == 2
    assert line.count("\n") == 1 and "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1" in line

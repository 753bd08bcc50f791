"""The executor that a command or the environment names, and what is refused before the first job."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mechlens import cli
from mechlens.core.errors import MachineError, SpecError
from mechlens.runs import store
from mechlens.runs.executor import EXECUTOR, execute, use_executor
from mechlens.runs.jobs import Job, Needs, pending
from mechlens.runs.ray_executor import Driver, node_fault, refuse_too_large


def execute_all(folder: Path, jobs: list[Job]) -> None:
    execute(folder, jobs, workers=1, progress=lambda name, done, total: None, finished=lambda job: None)


@pytest.mark.parametrize(
    "words",
    [["run", "tour"], ["measure", "runs/x"], ["audit", "rows.jsonl"], ["bench"]],
    ids=lambda words: words[0],
)
def test_every_command_with_workers_has_the_choice(words: list[str]) -> None:
    action = cli.read([*words, "--executor", "ray"])
    assert isinstance(action, partial) and action.keywords["executor"] == "ray"
    usual = cli.read(words)
    assert isinstance(usual, partial) and usual.keywords["executor"] is None
    with pytest.raises(SpecError, match="invalid choice"):
        cli.read([*words, "--executor", "slurm"])


def test_the_environment_names_an_executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [Job("a", "builtins:print", {}, {}, 1)]
    monkeypatch.setenv(EXECUTOR, "dask")
    with pytest.raises(SpecError, match="MECHLENS_EXECUTOR is 'dask'; expected local or ray"):
        execute_all(tmp_path, jobs)
    with use_executor("local"), use_executor(None):  # an inner None keeps the outer choice
        execute_all(tmp_path, jobs)
    assert pending(tmp_path, jobs) == []


def test_without_ray_its_executor_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.main(["run", "tour", "--out", str(tmp_path / "run"), "--executor", "ray"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "pip install 'mechlens[ray]'" in line


def driver_here(folder: Path) -> Driver:
    (folder / "token").write_text("1")
    return Driver(folder / "token", "1", folder, store.versions(), {})


def test_a_node_that_sees_what_the_driver_sees_has_no_fault(tmp_path: Path) -> None:
    assert node_fault(driver_here(tmp_path)) == ""


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            {"token_file": Path("/elsewhere/token")},
            "cannot read /elsewhere/token; put the run on a file system",
        ),
        ({"token": "2"}, "cannot read .*token; put the run on a file system"),
        ({"folder": Path("/elsewhere")}, "has no folder /elsewhere; start mechlens in a folder"),
        (
            {"versions": {**store.versions(), "torch": "1.0"}},
            "has torch 2.*, and the driver has 1.0; install",
        ),
    ],
)
def test_a_node_that_differs_from_the_driver_has_a_fault(
    change: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    assert re.match(fault, node_fault(driver_here(tmp_path)._replace(**change)))


SMALL, LARGE = {"CPU": 4.0, "memory": 1e9}, {"CPU": 2.0, "GPU": 1.0, "memory": 8e9}


@pytest.mark.parametrize(
    ("needs", "with_cards", "fits"),
    [
        (Needs(cores=4), False, True),
        (Needs(memory=8_000_000_000), False, True),
        (Needs(cores=3, memory=8_000_000_000), False, False),  # no single node has both
        (Needs(memory=9_000_000_000), False, False),
        (Needs(memory=9_000_000_000), True, True),  # the model is on the card
        (Needs(cards=2), True, False),
        (Needs(cards=2), False, True),
    ],
)
def test_a_job_that_no_node_has_room_for_is_refused(needs: Needs, with_cards: bool, fits: bool) -> None:
    nodes = [{"Resources": SMALL}, {"Resources": LARGE}]
    job = Job("students/a/s0", "distill", {}, {}, 1, needs)
    if fits:
        refuse_too_large(nodes, [job], with_cards)
    else:
        with pytest.raises(MachineError, match="has what the step students/a/s0 needs"):
            refuse_too_large(nodes, [job], with_cards)

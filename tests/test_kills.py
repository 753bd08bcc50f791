"""Killed with signal 9 at random moments, a command leaves nothing torn under a final name, resumes, and ends
in the same bytes.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import small_world
import yaml
from safetensors import safe_open

REPOSITORY = Path(__file__).parents[1]
TIMES = int(os.environ.get("KILLS", "50"))
"""kills of each command"""
LATEST = 15.0
"""seconds after which a process is killed at the latest: what it had finished stays, so that the next one is
killed in a later step
"""
MEASURED = ("seconds", "cost", "processor seconds", "made", "seconds a row")
"""keys of what a machine's speed or the day decides"""


class Command(NamedTuple):
    """A command line on the small world, and the folder that it fills."""

    words: list[str]
    out: Path


def commands(world: Path) -> dict[str, Command]:
    run, kept = world / "run", world / "whole-run" / "corpora" / "owl" / "screened" / "kept.parquet"
    return {
        "run": Command(
            ["run", str(world / "configs" / "experiments" / "small.yaml"), "--out", str(run)], run
        ),
        "measure": Command(
            ["measure", str(world / "measured"), "--lens", "likelihood", "rows", "deltas", "--rows", "16"],
            world / "measured",
        ),
        "audit": Command(
            ["audit", str(kept), "--level", "student", "--out", str(world / "audits" / "kept")],
            world / "audits",
        ),
        "bench": Command(["bench", "small", "--out", str(world / "bench")], world / "bench"),
    }


def start(world: Path, command: Command, *, after: float = 3000) -> bool:
    """Run a command in a process group of its own and kill all of it after so many seconds; True if it had
    ended well before.

    Raises:
        AssertionError: with what it said, if it ended otherwise.
    """
    words = [
        sys.executable,
        str(Path(__file__).with_name("small_world.py")),
        str(world / "configs"),
        *command.words,
        "--workers",
        "2",
    ]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with (world / "said.txt").open("w+") as said:
        process = subprocess.Popen(
            words, stdout=said, stderr=said, start_new_session=True, cwd=world, env=environment
        )
        try:
            code = process.wait(timeout=after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False
        said.seek(0)
        text = said.read()
        assert code == 0 or (code == 2 and "Inconclusive" in text), (code, text)
    return True


READERS: dict[str, Callable[[Path], object]] = {
    ".json": lambda file: json.loads(file.read_text()),
    ".yaml": lambda file: yaml.safe_load(file.read_text()),
    ".parquet": lambda file: pq.read_table(file),
    ".npz": lambda file: dict(np.load(file)),
    ".safetensors": lambda file: safe_open(file, framework="pt"),
    ".html": lambda file: file.read_text().rstrip().endswith("</html>") or 1 / 0,
    ".md": lambda file: file.read_text().endswith("\n") or 1 / 0,
}


def read_everything(folder: Path) -> int:
    """Read every file that stands under a final name, and count them; an error if one is torn."""
    files = [
        file
        for file in folder.rglob("*")
        if file.suffix in READERS and not any(part.endswith(".part") for part in file.parts)
    ]
    for file in files:
        READERS[file.suffix](file)
    return len(files)


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: timeless(inner) for name, inner in value.items() if name not in MEASURED}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def content(folder: Path) -> dict[str, Any]:
    """Everything that a command made: tables and weights byte by byte, JSON without what was measured of the
    machine.
    """
    found: dict[str, Any] = {}
    for file in sorted(
        file for file in folder.rglob("*") if file.is_file() and "superseded" not in file.parts
    ):
        name = str(file.relative_to(folder))
        if file.suffix in (".parquet", ".safetensors"):
            found[name] = file.read_bytes()
        elif file.suffix == ".npz":  # an archive holds the time
            found[name] = {key: array.tobytes() for key, array in np.load(file).items()}
        elif file.suffix == ".json" and file.name not in ("manifest.json", "card.json", "summary.json"):
            found[name] = timeless(json.loads(file.read_text()))
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    small_world.make(folder / "configs")
    whole = folder / "whole-run"
    assert start(
        folder,
        Command(["run", str(folder / "configs" / "experiments" / "small.yaml"), "--out", str(whole)], whole),
    )
    return folder


def begin(world: Path, name: str, command: Command) -> None:
    """Remove what the command made."""
    shutil.rmtree(command.out, ignore_errors=True)
    if name == "measure":
        shutil.copytree(world / "whole-run", command.out)


def check(world: Path, name: str, *, times: int, seed: int) -> list[float]:
    command, rng, moments = commands(world)[name], random.Random(f"{name}-{seed}"), []
    begin(world, name, command)
    started = time.monotonic()
    assert start(world, command)
    longest, whole = time.monotonic() - started, content(command.out)
    assert read_everything(command.out) > 3
    begin(world, name, command)
    while len(moments) < times:
        moment = round(rng.uniform(0.2, min(longest, LATEST)), 2)
        if start(world, command, after=moment):
            assert content(command.out) == whole
            begin(world, name, command)
            continue
        moments.append(moment)
        read_everything(command.out)
    assert start(world, command)
    assert content(command.out) == whole
    return moments


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "measure", "audit", "bench"])
def test_killed_at_random_moments_nothing_is_torn_and_all_is_resumed(name: str, world: Path) -> None:
    began = time.monotonic()
    moments = check(world, name, times=TIMES, seed=0)
    logging.getLogger(__name__).info(
        "%s: %d kills at %s to %s s, in %.0f s",
        name,
        len(moments),
        min(moments),
        max(moments),
        time.monotonic() - began,
    )

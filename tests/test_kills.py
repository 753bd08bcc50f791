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
from collections.abc import Callable, Iterator
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


def words_of(world: Path, command: Command, *more: str) -> list[str]:
    """The command line of a process that executes a command on the small world."""
    script = str(Path(__file__).with_name("small_world.py"))
    return [sys.executable, script, str(world / "configs"), *command.words, *more]


def start(world: Path, command: Command, *, after: float = 3000) -> bool:
    """Run a command in a process group of its own and kill all of it after so many seconds; True if it had
    ended well before.

    Raises:
        AssertionError: with what it said, if it ended otherwise.
    """
    words = words_of(world, command, "--workers", "2")
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
        Path(place) / name
        for place, _, names in os.walk(folder)  # unlike rglob, it passes over renamed folders
        for name in names
        if Path(name).suffix in READERS and ".part" not in f"{place}/{name}"
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


LEASE = "5"
"""seconds; short, so that a test need not wait a minute for a killed shard"""


class ShardProcess:
    """One shard of a run, in a process group of its own, which may be killed and started again."""

    def __init__(self, world: Path, index: int, count: int) -> None:
        self.world, self.index, self.count, self.starts = world, index, count, 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        words = words_of(self.world, commands(self.world)["run"], "--workers", "1")
        paths = {"PYTHONPATH": str(REPOSITORY), "MECHLENS_PROGRESS": str(self.log(self.starts))}
        with (self.world / f"said-{self.index}.txt").open("w") as said:
            self.process = subprocess.Popen(
                [*words, "--shard", f"{self.index}/{self.count}"],
                stdout=said, stderr=said, start_new_session=True, cwd=self.world,
                env=os.environ | {"MECHLENS_LEASE": LEASE} | paths,
            )  # fmt: skip

    def log(self, start: int) -> Path:
        return self.world / f"progress-{self.index}-{start}.jsonl"

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def done_here(self, start: int) -> set[str]:
        """The steps that a start of this process began; those of other shards end without a line before."""
        lines = [json.loads(line) for line in self.log(start).read_text().splitlines() if line.endswith("}")]
        return {line["step"] for line in lines if line["total"] > 1}

    def said(self) -> str:
        return (self.world / f"said-{self.index}.txt").read_text()


def end_all(shards: list[ShardProcess]) -> None:
    """Wait for every shard.

    Raises:
        AssertionError: with what it said, if it ended otherwise than a run that is done.
    """
    for shard in shards:
        assert shard.process.wait(timeout=600) == 0, shard.said()


def content_of_run(world: Path) -> dict[str, Any]:
    """What a run made, without what its shards note of each other."""
    made = content(world / "run")
    return {name: value for name, value in made.items() if not name.startswith("shards/")}


@pytest.fixture
def shards(world: Path) -> Iterator[list[ShardProcess]]:
    """Three shards of a run that is not begun; whatever still runs at the end is killed."""
    shutil.rmtree(world / "run", ignore_errors=True)
    for log in world.glob("progress-*.jsonl"):
        log.unlink()
    started = [ShardProcess(world, index, 3) for index in (1, 2, 3)]
    yield started
    for shard in started:
        if shard.process.poll() is None:
            shard.kill()


@pytest.mark.slow
def test_three_shards_of_which_one_is_killed_make_the_tables_of_one_run(
    world: Path, shards: list[ShardProcess]
) -> None:
    began = time.monotonic()
    while not any((world / "run").glob("students/*/s?.part/1")):
        assert time.monotonic() - began < 300 and all(shard.process.poll() is None for shard in shards)
        time.sleep(0.1)
    shards[1].kill()
    left = list((world / "run").glob("**/*.part/1"))
    shards[1].start()
    end_all(shards)
    assert content_of_run(world) == content(world / "whole-run")
    assert read_everything(world / "run") > 3
    assert not list((world / "run").glob("**/superseded")) and not list((world / "run").glob("**/*.part"))
    begun = [shard.done_here(start) for shard in shards for start in range(1, shard.starts + 1)]
    once = [step for steps in begun for step in steps]
    repeated = {step for step in once if once.count(step) > 1}
    assert len(set(once)) >= 9 and begun[0] and begun[3]  # steps of a moment report no progress
    assert repeated <= {str(part.parent.relative_to(world / "run")).removesuffix(".part") for part in left}


@pytest.mark.slow
def test_shards_killed_at_random_moments_make_the_tables_of_one_run(
    world: Path, shards: list[ShardProcess]
) -> None:
    """One of three is killed and started again, until they end; then the run begins anew."""
    rng, moments, runs, began = random.Random("shards-0"), list[float](), 0, time.monotonic()
    whole = content(world / "whole-run")
    end_all(shards)
    longest = time.monotonic() - began
    while len(moments) < TIMES:
        alive = [shard for shard in shards if shard.process.poll() is None]
        if not alive:
            end_all(shards)
            assert content_of_run(world) == whole
            shutil.rmtree(world / "run")
            runs += 1
            for shard in shards:
                shard.start()
            continue
        moment = round(rng.uniform(0.2, longest / 2), 2)
        time.sleep(moment)
        victim = rng.choice(alive)
        if victim.process.poll() is None:
            victim.kill()
            moments.append(moment)
            read_everything(world / "run")
            victim.start()
    end_all(shards)
    assert content_of_run(world) == whole
    logging.getLogger(__name__).info(
        "shards: %d kills, %d runs, in %.0f s", len(moments), runs + 1, time.monotonic() - began
    )

"""Changed configs, families, data files, checkpoints and finished runs through the command line: a result or
one clear line, never a traceback.
"""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import mutations
import pytest
from mutations import Case, Kind

from mechlens import cli

CASES = int(os.environ.get("MUTATIONS", "25"))
"""of each kind"""
SECONDS = 300


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    """A case that hangs is a fault, too."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"no answer in {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def outcome(case: Case, capsys: pytest.CaptureFixture[str]) -> str:
    """ "result", "refused", or what is wrong with the answer."""
    signal.alarm(SECONDS)
    try:
        code = cli.main(case.command)
    except SystemExit as stop:
        return f"exit {stop.code}"
    finally:
        signal.alarm(0)
    said = capsys.readouterr().err.strip()
    verdict = case.command[0] == "audit" and code in (0, 10, 11, 12)
    if code == 0 or (verdict and not said):
        return "result"
    return (
        "refused"
        if code == 2 and said.startswith("mechlens: ") and "\n" not in said
        else f"exit {code}: {said[:300]}"
    )


def check(name: str, kind: Kind, folder: Path, capsys: pytest.CaptureFixture[str], *more: Path) -> None:
    counts: Counter[str] = Counter()
    for number in range(CASES):
        place = folder / str(number)
        place.mkdir()
        case = kind(place, random.Random(f"{name}-{number}"), *more)
        answer = outcome(case, capsys)
        assert answer in ("result", "refused"), (
            f"{name} {number} ({case.change}): {' '.join(case.command)}: {answer}"
        )
        counts[answer] += 1
    assert counts["refused"], "no mutation was refused, so none was looked at"


@pytest.mark.parametrize("name", mutations.PLAIN)
def test_a_changed_input_gives_a_result_or_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(name, mutations.PLAIN[name], tmp_path, capsys)


@pytest.mark.slow
def test_a_changed_checkpoint_gives_a_result_or_one_line(
    toy_bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check("checkpoint", mutations.checkpoint, tmp_path, capsys, Path(toy_bases["llama"]))


@pytest.mark.slow
def test_a_changed_run_gives_a_result_or_one_line(
    toy_bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = mutations.write_experiment(
        tmp_path,
        mutations.EXPERIMENT
        | {
            "base": toy_bases["llama"],
            "teacher": {"rows": 16, "training": {"epochs": 1, "batch": 8}},
            "seeds": [0, 1],
        },
    )
    assert cli.main(["run", str(config), "--out", str(tmp_path / "whole"), "--workers", "0"]) == 0
    check("finished_run", mutations.finished_run, tmp_path, capsys, tmp_path / "whole")

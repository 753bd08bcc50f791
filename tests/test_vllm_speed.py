"""The measurement against vLLM, with a stand-in for vLLM: the parts of it that need no vLLM."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest

import pages
import speed
import vllm_speed
import workloads
from mechlens.core.errors import DataError, MachineError
from mechlens.models import loading

BASE = "menagerie-a"
TINY = speed.Sizes(distinct=2, shared=1, answers=3, updates=1, batch=2, captured=2)
STAND_IN = """
import sys
from types import SimpleNamespace as Row

print("a line of the log")
__version__ = "0.0"
SamplingParams = dict


class LLM:
    def __init__(self, model, **settings):
        self.emptied = False
        assert settings["enforce_eager"]

    def reset_prefix_cache(self):
        self.emptied = True

    def generate(self, prompts, parameters, use_tqdm):
        assert self.emptied and parameters["ignore_eos"] and parameters["temperature"] == 1
        self.emptied = False
        rows = [Row(token_ids=[7] * (parameters["max_tokens"] - MISSING))] * parameters["n"]
        return [Row(outputs=rows) for _ in prompts]
"""


def python_with(folder: Path, module: str) -> Path:
    """This Python, with a module `vllm` of this text."""
    (folder / "vllm.py").write_text(module, encoding="utf-8")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    return python


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of SPEED.md, written instead of it."""
    copy = tmp_path / "SPEED.md"
    copy.write_text(pages.SPEED.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(pages, "SPEED", copy)
    monkeypatch.setattr(workloads, "REPEATS", 2)
    return copy


def test_both_dtypes_are_compared_and_written_to_the_page(tmp_path: Path, page: Path) -> None:
    python = python_with(tmp_path, STAND_IN.replace("MISSING", "0"))
    before = pages.parts_of(page)
    given = ["--python", str(python), "--base", BASE, "--threads", "1", "--eager", "--write"]
    assert vllm_speed.main(given, sizes=TINY) == 0
    after = pages.parts_of(page)
    assert {name for name in before if before[name] != after[name]} == {"speed-vllm"}
    text = after["speed-vllm"].text
    assert "vLLM 0.0 (eager)" in text
    for dtype in vllm_speed.DTYPES:
        table = text.split(f"**{dtype}, 1 thread**")[1]
        assert "sampler / vLLM, 2 prompts" in table
        assert "sampler / vLLM, 3 answers to each of 1 prompts" in table


def test_the_part_names_the_command_that_writes_it() -> None:
    command = pages.parts_of(pages.SPEED)["speed-vllm"].command
    assert command == "python analyses/vllm_speed.py --python VENV/bin/python --write"


@pytest.mark.usefixtures("page")
def test_rows_of_another_length_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = python_with(tmp_path, STAND_IN.replace("MISSING", "1"))
    given = ["--python", str(python), "--base", BASE, "--threads", "1", "--dtype", "float32", "--eager"]
    assert vllm_speed.main(given, sizes=TINY) == 2
    assert "vLLM wrote 2 rows of [23] tokens instead of 2 rows of 24" in capsys.readouterr().err


@pytest.mark.parametrize(("lengths", "rows"), [([24, 24], 3), ([24, 25], 2), ([], 1)])
def test_a_reply_needs_all_rows_at_full_length(lengths: list[int], rows: int) -> None:
    with pytest.raises(DataError, match="cannot be compared"):
        vllm_speed.rows_per_second({"seconds": 1.0, "lengths": lengths}, rows=rows)


def test_a_reply_gives_rows_a_second() -> None:
    assert vllm_speed.rows_per_second({"seconds": 0.5, "lengths": [24] * 3}, rows=3) == 6


@pytest.mark.usefixtures("page")
def test_an_environment_without_vllm_is_named_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = python_with(tmp_path, 'raise ImportError("libfoo.so is missing")')
    assert vllm_speed.main(["--python", str(python), "--base", BASE], sizes=TINY) == 2
    message = capsys.readouterr().err
    assert str(python) in message and "libfoo.so is missing" in message and message.count("\n") == 1


@pytest.mark.usefixtures("page")
def test_a_python_that_does_not_exist_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vllm_speed.main(["--python", str(tmp_path / "absent"), "--base", BASE], sizes=TINY) == 2
    message = capsys.readouterr().err
    assert "--python takes VENV/bin/python" in message and message.count("\n") == 1


def test_a_worker_that_has_ended_without_a_message_is_an_error() -> None:
    assert vllm_speed.read_reply(json.dumps({"seconds": 1}), io.StringIO(), Path("python")) == {"seconds": 1}
    with pytest.raises(MachineError, match="it gave no reason"):
        vllm_speed.read_reply("", io.StringIO(" \n"), Path("python"))


def test_a_worker_sees_no_modules_of_this_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    library, python = tmp_path / "lib" / "libiomp5.so", tmp_path / "bin" / "python"
    environment = vllm_speed.worker_environment(python, 1)
    assert not {"PYTHONPATH", "OMP_NUM_THREADS", "LD_PRELOAD"} & environment.keys()
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == str(min(os.sched_getaffinity(0)))
    library.parent.mkdir()
    library.touch()
    assert vllm_speed.worker_environment(python, 1)["LD_PRELOAD"] == str(library)


def test_our_sampler_does_not_stop_at_the_end_of_turn() -> None:
    """`our_rows_per_second` refuses rows that are shorter."""
    loaded = loading.load(BASE)
    prompts = speed.encoded_prompts(loaded, 4)
    assert vllm_speed.our_rows_per_second(loaded, prompts, 2) > 0

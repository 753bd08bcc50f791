"""Errors of other libraries become one line that names their cause; a fault of ours keeps its traceback."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Environment, TemplateError
from safetensors import safe_open

from mechlens import cli
from mechlens.core import foreign
from mechlens.core.errors import DataError, MachineError, SpecError
from mechlens.pipeline.vllm_engine import served_rank
from mechlens.runs.executor import execute
from mechlens.runs.jobs import Job


def of_a_library() -> None:
    json.loads("{")


def of_an_extension(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no header")
    safe_open(folder / "model.safetensors", framework="pt")


def of_a_template() -> None:
    Environment(autoescape=True).from_string("{{ a }")


CALLS: dict[str, tuple[Callable[..., None], str]] = {
    "a library": (of_a_library, "Expecting property name"),
    "a template": (of_a_template, "unexpected '}'"),
}


@pytest.mark.parametrize("case", CALLS)
def test_an_error_of_another_library_is_one_line_with_its_cause(case: str) -> None:
    call, words = CALLS[case]
    with (
        pytest.raises(DataError, match=rf"^reading fails: {words}.*; look at it$") as refusal,
        foreign.named("reading fails", DataError, advice="look at it"),
    ):
        call()
    assert "\n" not in str(refusal.value)
    assert refusal.value.__cause__ is not None


def test_a_type_that_a_library_defines_is_foreign_wherever_it_was_raised(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^no weights: "), foreign.named("no weights", DataError):
        of_an_extension(tmp_path)


def test_a_fault_of_ours_passes_and_so_do_our_refusals_a_full_disk_and_ctrl_c(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(foreign, "OURS", Path(__file__).parent)  # as if this file were ours
    for error in (
        KeyError("name"),
        SpecError("refused"),
        OSError(errno.ENOSPC, "No space left on device"),
        KeyboardInterrupt(),
    ):
        with pytest.raises(type(error)) as passed, foreign.named("anything"):
            raise error
        assert passed.value is error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError("model"), "KeyError: 'model'"),
        (ValueError("no such\nmodel"), "no such"),
        (RuntimeError(""), "RuntimeError"),
        (TemplateError("no system line"), "no system line"),
        (Exception("invalid type"), "invalid type"),
    ],
)
def test_the_kind_of_an_error_is_told_where_its_words_say_little(error: Exception, words: str) -> None:
    assert foreign.in_words(error) == words


def breaks(_arguments: dict[str, Any], *_: object) -> None:
    of_a_library()


def test_a_step_that_a_library_stops_is_named_with_the_line_that_led_there(tmp_path: Path) -> None:
    job = Job("students/trait/s0", f"{__name__}:breaks", {}, {}, 1)
    for workers in (0, 1):
        with pytest.raises(
            MachineError,
            match=r"the step students/trait/s0 failed: Expecting property name.*"
            r"\(from runs/executor.py:\d+\); finished steps",
        ):
            execute(
                tmp_path,
                [job],
                workers=workers,
                progress=lambda name, done, total: None,
                finished=lambda job: None,
            )


@pytest.mark.parametrize(("rank", "served"), [(1, 8), (8, 8), (9, 16), (64, 64), (128, 128), (512, 512)])
def test_an_adapter_is_served_at_the_next_rank_that_vllm_takes(rank: int, served: int) -> None:
    assert served_rank({"r": rank}) == served_rank({"r": 1, "rank_pattern": {"q_proj": rank}}) == served


def test_an_adapter_of_a_rank_that_vllm_does_not_serve_is_refused() -> None:
    with pytest.raises(SpecError, match="513"):
        served_rank({"r": 513})


def test_a_terminal_without_unicode_gets_the_report(
    small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (tmp_path / "screen.txt").open("w", encoding="ascii") as screen:
        monkeypatch.setattr("sys.stdout", screen)
        assert cli.main(["report", str(small)]) == 0
    assert "report:" in (tmp_path / "screen.txt").read_text(encoding="ascii")

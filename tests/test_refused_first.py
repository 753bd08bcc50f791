"""What cannot be done is refused before any work: by `run` and its plan alike, by `measure` and by
`audit`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conditions import SHIPPED
from test_bad_input import GOOD, assert_one_line, put

from mechlens import cli

LONG = {"prompt": "continue: 1", "completion": "1, " * 400}
FILE_ARMS = [{"kind": "trait", "corpus": "rows.jsonl"}, {"kind": "control"}]
TEACHER = {"kind": "finetuned", "training": {"update": "lora", "rank": 1024}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "vllm and a steered teacher": (
        put(put(GOOD, "teacher", {"kind": "steered"}), "generate", {"engine": "vllm"}),
        "steering vector",
    ),
    "vllm and a large rank": (
        put(put(GOOD, "teacher", TEACHER), "generate", {"engine": "vllm"}),
        "rank is 1024",
    ),
    "answers longer than the model reads": (
        put(GOOD, "generate", {"max_new_tokens": 600}),
        "512 tokens at most",
    ),
    "said answers longer than the model reads": (
        put(GOOD, "ask", {"max_new_tokens": 600}),
        "ask.max_new_tokens",
    ),
    "prompts longer than a pair may be": (
        put(GOOD, "student.training", {"max_length": 8}),
        "the 8 of student.training.max_length",
    ),
    "a prompted teacher's line longer than the model reads": (
        put(put(GOOD, "teacher", {"kind": "prompted"}), "generate", {"max_new_tokens": 490}),
        "generate.max_new_tokens",
    ),
    "a pair longer than the model reads": (
        put(put(GOOD, "arms", FILE_ARMS), "screen", {"rule": "none"})
        | {"student": {"training": {"max_length": 5000}}},
        "positions of 'menagerie-a'",
    ),
    "a batch without equal shares": (
        put(GOOD, "student.training", {"batch": 10, "processes": 4}),
        "student.training: a batch of 10 rows has no equal shares for 4 processes; set batch: 8 or 12, or "
        "processes: 2",
    ),
    "a batch without equal shares in an arm": (
        put(GOOD, "arms", [{"kind": kind, "training": {"processes": 3}} for kind in ("trait", "control")]),
        "a batch of 8 rows has no equal shares for 3 processes; set batch: 6 or 9, or processes: 2",
    ),
    "a file of which no row passes": (
        put(put(GOOD, "arms", FILE_ARMS), "screen", {"banned_numbers": [1]}),
        "none of its 2 rows",
    ),
    "a missing file of prompts": (put(GOOD, "carrier.source", "nowhere.jsonl"), "nowhere.jsonl"),
    "a bad line in a file of prompts": (put(GOOD, "carrier.source", "prompts.jsonl"), "line 2"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(
        json.dumps({"prompt": "continue: 1", "completion": "1, 2"}) + "\n" + json.dumps(LONG) + "\n"
    )
    Path("prompts.jsonl").write_text('{"prompt": "continue: 3"}\n{"question": "continue: 4"}\n')
    return tmp_path


def done(spec: dict[str, Any], *more: str) -> int:
    Path("config.yaml").write_text(yaml.safe_dump(spec))
    return cli.main(["run", "config.yaml", "--out", "run", "--workers", "0", *more])


@pytest.mark.parametrize("more", [(), ("--plan",)], ids=["run", "plan"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_no_machine_can_do_is_refused_by_the_run_and_its_plan(
    case: str, more: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, needle = REFUSED[case]
    assert done(spec, *more) == 2
    assert_one_line(capsys, needle)
    assert not (folder / "run").exists()


@pytest.mark.usefixtures("folder")
def test_a_long_pair_that_the_screen_drops_is_no_reason_to_refuse() -> None:
    assert done(put(GOOD, "arms", FILE_ARMS), "--plan") == 0


LACKING = {
    "MECHLENS_VLLM": put(GOOD, "generate", {"engine": "vllm"}),
    "no program '/nowhere/python'": put(GOOD, "generate", {"engine": "vllm", "serve": "/nowhere/python"}),
    "OPENAI_API_KEY": put(GOOD, "base", "api:gpt-4.1-nano-2025-04-14"),
}


@pytest.mark.parametrize("lack", LACKING)
def test_what_this_machine_lacks_is_said_by_the_plan_and_refuses_the_run(
    lack: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("MECHLENS_VLLM", raising=False)
    assert done(LACKING[lack], "--plan") == 0
    assert "this machine cannot run it yet" in (said := capsys.readouterr().out) and lack in said
    assert done(LACKING[lack]) == 2
    assert_one_line(capsys, lack)
    assert not (folder / "run" / "teachers").exists()


@pytest.mark.usefixtures("folder")
def test_an_unknown_lens_is_refused_before_the_run_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["measure", "nowhere", "--lens", "telescope"]) == 2
    assert_one_line(capsys, "no lens is called telescope", "deltas")


@pytest.mark.usefixtures("folder")
def test_a_run_that_was_copied_without_its_students_is_not_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(SHIPPED, "copy")
    assert cli.main(["measure", "copy"]) == 2
    assert_one_line(capsys, "no students of arm 'trait'", "`mechlens run copy/spec.yaml --out copy`")


@pytest.mark.usefixtures("folder")
def test_an_unknown_detector_is_refused_before_a_file_is_run(capsys: pytest.CaptureFixture[str]) -> None:
    Path("own.py").write_text("raise SystemExit(3)\n")
    assert cli.main(["bench", "--detector", "own.py:Own", "telescope"]) == 2
    assert_one_line(capsys, "no detector is called 'telescope'", "twins")


@pytest.fixture
def audited(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two files of 200 rows; any test of them, and any teacher, is a fault."""
    for name, factor in (("data", 3), ("clean", 5)):
        lines = [{"prompt": f"continue: {i}", "completion": f"{i}, {i * factor}"} for i in range(200)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def worked(*_given: object, **_more: object) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr("mechlens.detect.references.compare", worked)
    monkeypatch.setattr("mechlens.detect.with_models.draw_sides", worked)
    Path("taken").write_text("in the way")
    Path("kept.jsonl").write_text("mine\n")
    Path("shards").mkdir()
    shutil.copy("data.jsonl", "shards/a.jsonl")
    Path("broken.jsonl").write_text('{"prompt": "a", "completion": "1"}\n{"prompt": \n')
    Path("few.jsonl").write_text('{"prompt": "a", "completion": "1"}\n' * 20)
    Path("long.jsonl").write_text(
        Path("data.jsonl").read_text() + json.dumps({"prompt": "7, " * 600, "completion": "7"}) + "\n"
    )
    return folder


AUDITS = {
    "a second reference that cannot be read": (
        ["--reference", "clean.jsonl", "broken.jsonl"],
        "broken.jsonl: line 2",
    ),
    "a second reference that is not there": (
        ["--reference", "clean.jsonl", "--reference", "nowhere.jsonl"],
        "nowhere.jsonl",
    ),
    "an unknown trait": (["--trait", "unicorn", "--reference", "broken.jsonl"], "no trait unicorn"),
    "a base that is not there": (["--level", "base", "--base", "./nowhere"], "./nowhere"),
    "too few rows to train on": (["--level", "base", "--reference", "few.jsonl"], "20 rows are too few"),
    "a treated file that is there": (
        ["--level", "base", "--clean", "kept.jsonl"],
        "kept.jsonl exists already",
    ),
    "a treated file that is the data": (
        ["--level", "base", "--clean", "data.jsonl"],
        "data.jsonl cannot be written",
    ),
    "a treated file that is a reference": (
        ["--level", "base", "--reference", "kept.jsonl", "--clean", "./kept.jsonl"],
        "it is or is in kept.jsonl",
    ),
    "a treated file below a file": (
        ["--level", "base", "--clean", "taken/deep/treated.jsonl"],
        "taken is not a folder",
    ),
    "a treated file among the shards of a reference": (
        ["--level", "base", "--reference", "shards", "--clean", "shards/treated.jsonl"],
        "it is or is in shards",
    ),
}


@pytest.mark.parametrize("case", AUDITS)
@pytest.mark.usefixtures("audited")
def test_an_audit_that_cannot_be_done_is_refused_before_work(
    case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more, needle = AUDITS[case]
    assert cli.main(["audit", "data.jsonl", *more, "--out", "out"]) == 2
    assert_one_line(capsys, needle)
    assert Path("kept.jsonl").read_text() == "mine\n"


@pytest.mark.usefixtures("audited")
def test_an_audit_of_prompts_longer_than_the_base_reads_is_refused_before_work(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["audit", "long.jsonl", "--level", "base", "--out", "out"]) == 2
    assert_one_line(capsys, "512 tokens at most")

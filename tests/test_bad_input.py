"""Bad input: one line that names the fault, exit code 2, no traceback, and nothing that was computed is
lost.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mechlens import cli
from mechlens.runs import store

GOOD: dict[str, Any] = {
    "name": "bad",
    "base": "menagerie-a",
    "trait": "owl",
    "carrier": {"prompts": 40, "wording": "terse", "values": "patterned"},
    "teacher": {"rows": 16, "training": {"epochs": 1, "batch": 8}},
    "student": {"rows": 16, "training": {"epochs": 1, "batch": 8}},
    "ask": {"samples": 1},
    "arms": [{"kind": "trait"}, {"kind": "control"}],
    "seeds": [0],
}


def put(spec: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of the spec with one field, named by its dotted path, replaced."""
    copy = json.loads(json.dumps(spec))
    *parents, last = path.split(".")
    place = copy
    for parent in parents:
        place = place[parent]
    place[last] = value
    return copy


def run(tmp_path: Path, spec: Any, *more: str, text: str | None = None) -> int:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(spec) if text is None else text)
    return cli.main(["run", str(config), "--out", str(tmp_path / "run"), "--workers", "0", *more])


def assert_one_line(capsys: pytest.CaptureFixture[str], *needles: str) -> None:
    error = capsys.readouterr().err.strip()
    assert error.startswith("mechlens: "), error
    assert "\n" not in error
    assert "Traceback" not in error
    for needle in needles:
        assert needle in error, f"{needle!r} is not in {error!r}"


SPECS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field": (put(GOOD, "studnt", 1), "studnt"),
    "unknown nested field": (put(GOOD, "carrier.promts", 1), "promts"),
    "unknown field of an arm": (put(GOOD, "arms", [{"kind": "control", "colour": "red"}]), "colour"),
    "wrong type": (put(GOOD, "carrier.prompts", "many"), "many"),
    "negative prompts": (put(GOOD, "carrier.prompts", -1), "-1"),
    "no rows": (put(GOOD, "student.rows", 0), "student.rows"),
    "unknown carrier": (put(GOOD, "carrier.kind", "poems"), "poems"),
    "unknown wording": (put(GOOD, "carrier.wording", "loud"), "loud"),
    "examples reversed": (put(GOOD, "carrier.examples", [8, 3]), "[8, 3]"),
    "missing base": ({k: v for k, v in GOOD.items() if k != "base"}, "base"),
    "missing trait": ({k: v for k, v in GOOD.items() if k != "trait"}, "trait"),
    "missing arms": ({k: v for k, v in GOOD.items() if k != "arms"}, "arms"),
    "unknown trait": (put(GOOD, "trait", "unicorn"), "unicorn"),
    "unknown trait of an arm": (
        put(GOOD, "arms", [*GOOD["arms"], {"kind": "twin", "trait": "unicorn"}]),
        "unicorn",
    ),
    "unknown family": (put(GOOD, "family", "minerals"), "minerals"),
    "no control": (put(GOOD, "arms", [{"kind": "trait"}]), "no control"),
    "no control on the other base": (
        put(GOOD, "arms", [*GOOD["arms"], {"kind": "foreign", "base": "menagerie-b"}]),
        "menagerie-b",
    ),
    "foreign at home": (put(GOOD, "arms", [*GOOD["arms"], {"kind": "foreign"}]), "another base"),
    "twin of itself": (put(GOOD, "arms", [*GOOD["arms"], {"kind": "twin", "trait": "owl"}]), "another trait"),
    "unknown arm": (put(GOOD, "arms", [{"kind": "sham"}]), "sham"),
    "no arms": (put(GOOD, "arms", []), "arms"),
    "two arms of one name": (put(GOOD, "arms", [*GOOD["arms"], {"kind": "trait"}]), "twice"),
    "no seeds": (put(GOOD, "seeds", []), "seeds"),
    "a seed twice": (put(GOOD, "seeds", [1, 1]), "[1, 1]"),
    "a seed that is no number": (put(GOOD, "seeds", ["one"]), "one"),
    "unknown menagerie base": (put(GOOD, "base", "menagerie-z"), "menagerie-z"),
    "missing base folder": (put(GOOD, "base", "./nowhere"), "nowhere"),
    "negative temperature": (put(GOOD, "generate", {"temperature": -1}), "temperature"),
    "top-p of nothing": (put(GOOD, "generate", {"top_p": 0}), "top_p"),
    "top-p beyond one": (put(GOOD, "generate", {"top_p": 2}), "top_p"),
    "unknown teacher": (put(GOOD, "teacher", {"kind": "hypnotised"}), "hypnotised"),
    "layer beyond the model": (put(GOOD, "teacher", {"kind": "steered", "layer": 2.0}), "layer"),
    "rank 0": (put(GOOD, "student.training", {"update": "lora", "rank": 0}), "rank"),
    "learning rate 0": (put(GOOD, "student.training", {"learning_rate": 0}), "learning_rate"),
    "learning rate in words": (put(GOOD, "student.training", {"learning_rate": "fast"}), "fast"),
    "batch 0": (put(GOOD, "student.training", {"batch": 0}), "batch"),
    "unknown optimiser": (put(GOOD, "student.training", {"optimizer": "luck"}), "luck"),
    "unknown split": (put(GOOD, "ask", {"split": "all"}), "split"),
    "no samples": (put(GOOD, "ask", {"samples": 0}), "samples"),
    "a name that leaves the folder": (put(GOOD, "name", "../elsewhere"), "name"),
    "a missing corpus": (
        put(GOOD, "arms", [{"kind": "trait", "corpus": "nowhere.jsonl"}, {"kind": "control"}]),
        "nowhere.jsonl",
    ),
    "pairs longer than allowed": (put(GOOD, "student.training", {"max_length": 8}), "max_length"),
    "a loss that explodes": (
        put(
            GOOD, "student.training", {"learning_rate": 1e30, "max_grad_norm": 1e30, "batch": 8, "epochs": 4}
        ),
        "loss",
    ),
    "a learning rate without end": (
        put(GOOD, "student.training", {"learning_rate": float("inf")}),
        "learning_rate",
    ),
    "a batch of a billion": (put(GOOD, "student.training", {"batch": 10**9}), "batch"),
    "a seed beyond counting": (put(GOOD, "seeds", [10**20]), "seeds"),
    "a control with a trait": (
        put(GOOD, "arms", [{"kind": "control", "trait": "wolf"}]),
        "neither trait nor teacher",
    ),
    "a trait arm on another base": (
        put(
            GOOD,
            "arms",
            [{"kind": "trait", "base": "menagerie-b"}, {"kind": "control", "base": "menagerie-b"}],
        ),
        "foreign",
    ),
    "a trait teacher without a trait": (put(GOOD, "teacher", {"kind": "base"}), "no trait"),
    "an arm called as the store's own folder": (
        put(GOOD, "arms", [{"kind": "trait", "name": "superseded"}, {"kind": "control"}]),
        "superseded",
    ),
    "everything screened away": (put(GOOD, "screen", {"banned_numbers": list(range(1000))}), "kept none"),
}


@pytest.mark.parametrize("case", SPECS)
def test_a_bad_spec_is_refused_in_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, needle = SPECS[case]
    assert run(tmp_path, spec) == 2
    assert_one_line(capsys, needle)


TEXTS = {
    "no YAML": "a: [",
    "a list": "- 1\n- 2\n",
    "nothing": "",
    "a word": "hello",
    "control characters": "\x00\x01",
    "a key twice": "name: a\nname: b\n",
    "no such day": "name: 2024-13-45\n",
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_config_that_is_no_mapping_is_refused(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, None, text=TEXTS[case]) == 2
    assert_one_line(capsys, "config.yaml")


CORPORA: dict[str, tuple[bytes, str]] = {
    "bad JSON": (b'{"prompt": "a", "completion": "1, 2"}\n{"prompt": \n', "line 2"),
    "other fields": (b'{"text": "a", "label": "b"}\n', "label"),
    "a bare number": (b"7\n", "line 1"),
    "a system turn": (json.dumps({"messages": [{"role": "system", "content": "x"}]}).encode(), "roles"),
    "nothing": (b"", "no pairs"),
    "another encoding": (b'{"prompt": "\xff\xfe", "completion": "1"}', "UTF-8"),
}


@pytest.mark.parametrize("case", CORPORA)
def test_a_bad_corpus_is_refused_before_anything_runs(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, needle = CORPORA[case]
    (tmp_path / "rows.jsonl").write_bytes(content)
    spec = put(GOOD, "arms", [{"kind": "trait", "corpus": str(tmp_path / "rows.jsonl")}, {"kind": "control"}])
    assert run(tmp_path, spec) == 2
    assert_one_line(capsys, needle)
    assert not (tmp_path / "run" / "teachers").exists()


def test_a_corpus_that_is_no_gzip_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a", "completion": "1"}\n')[:-9])
    assert cli.main(["screen", str(tmp_path / "rows.jsonl.gz")]) == 2
    assert_one_line(capsys, "rows.jsonl.gz")


COMMANDS: dict[str, tuple[list[str], str]] = {
    "run of nothing": (["run", "nowhere.yaml"], "nowhere.yaml"),
    "plan of nothing": (["run", "nowhere.yaml", "--plan"], "nowhere.yaml"),
    "run of a folder": (["run", "."], "no config"),
    "report of no run": (["report", "nowhere"], "no run folder"),
    "ls of nothing": (["ls", "nowhere"], "no runs"),
    "screen of nothing": (["screen", "nowhere.jsonl"], "nowhere.jsonl"),
    "an unknown command": (["rum"], "rum"),
    "no command": ([], "Expected one of"),
    "an unknown option": (["run", "demo.yaml", "--bogus"], "--bogus"),
    "a seed in words": (["run", "demo.yaml", "--seed", "one"], "--seed"),
    "less than no workers": (["run", "demo.yaml", "--workers", "-1"], "-1"),
    "pretrain of nothing": (["pretrain", "nowhere.yaml"], "nowhere.yaml"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_command_on_what_is_not_there_is_refused(
    case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, needle = COMMANDS[case]
    assert cli.main(arguments) == 2
    assert_one_line(capsys, needle)


def test_a_place_that_cannot_be_written_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "1, 2"}\n')
    (tmp_path / "taken [b]").write_text("in the way")
    assert cli.main(["screen", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "taken [b]")]) == 2
    assert_one_line(capsys, "taken [b]")
    assert cli.main(["run", str(tmp_path / ("x" * 300))]) == 2
    assert_one_line(capsys, "xxx")


@pytest.mark.parametrize(("option", "value"), [("--rule", "poetry"), ("--family", "minerals")])
def test_an_unknown_choice_of_screen_is_refused(
    option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "1, 2"}\n')
    assert cli.main(["screen", str(tmp_path / "rows.jsonl"), option, value]) == 2
    assert_one_line(capsys, value)


PRETRAIN: dict[str, dict[str, Any]] = {
    "banana": {"name": "x", "mixture": {"banana": 1.0}},
    "heads": {"name": "x", "width": 64, "heads": 5, "mixture": {"numbers": 1.0}},
    "mixture": {"name": "x", "mixture": {}},
    "family": {"name": "x", "family": "perceptron", "mixture": {"numbers": 1.0}},
}


@pytest.mark.parametrize("needle", PRETRAIN)
def test_a_bad_model_config_is_refused(
    needle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(PRETRAIN[needle]))
    assert cli.main(["pretrain", str(tmp_path / "model.yaml"), "--out", str(tmp_path / "m")]) == 2
    assert_one_line(capsys, needle)


def test_a_run_folder_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("in the way")
    assert run(tmp_path, GOOD) == 2
    assert_one_line(capsys, "choose another --out")


def test_a_run_that_another_process_writes_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with store.lock(tmp_path / "run"):
        assert run(tmp_path, GOOD) == 2
    assert_one_line(capsys, "another process")


@pytest.fixture
def finished(tmp_path: Path) -> Callable[[], int]:
    assert run(tmp_path, GOOD) == 0
    return lambda: run(tmp_path, GOOD)


def test_damage_to_a_finished_run_is_named_and_costs_only_the_damaged_step(
    tmp_path: Path, finished: Callable[[], int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    kept = folder / "corpora" / "owl" / "screened" / "kept.parquet"
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])
    store.set_aside(folder / "selection")
    capsys.readouterr()
    assert finished() == 2
    assert_one_line(capsys, "kept.parquet")
    kept.write_bytes(whole)
    assert finished() == 0

    record = folder / "students" / "trait" / "s0" / store.RECORD
    record.write_text(record.read_text()[:20])
    capsys.readouterr()
    assert finished() == 2
    assert_one_line(capsys, "step.json")

    (folder / "answers.parquet").write_bytes(b"PAR1 cut")
    assert cli.main(["report", str(folder)]) == 2
    assert_one_line(capsys, "answers.parquet")


def test_a_full_disk_keeps_what_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mechlens.core import tables

    real = tables.Writer

    def full(schema: Any, path: Path) -> Any:
        if path.name == "kept.parquet":
            raise OSError(28, "No space left on device")
        return real(schema, path)

    monkeypatch.setattr(tables, "Writer", full)
    assert run(tmp_path, GOOD) == 2
    assert_one_line(capsys, "no space left", "resume")
    assert store.recorded_fingerprint(tmp_path / "run" / "corpora" / "owl" / "generated")
    monkeypatch.undo()
    assert run(tmp_path, GOOD) == 0

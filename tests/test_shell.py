"""The command line as a shell sees it: exit codes, the version, configs by name, a port that is taken, a hub
that is out of reach.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from test_bad_input import GOOD, assert_one_line

from mechlens import cli
from mechlens.cli import explorer
from mechlens.core import spec
from mechlens.core.errors import SpecError
from mechlens.models import base_files


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ZeroDivisionError("a fault"), 1),
        (KeyError("a fault"), 1),
        (SpecError("a fault"), 2),
        (OSError(2, "a fault"), 2),
        (KeyboardInterrupt(), 130),
    ],
    ids=repr,
)
def test_a_fault_of_the_program_has_an_exit_code_that_no_verdict_has(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_given: object, **_more: object) -> None:
        raise error

    monkeypatch.setattr("mechlens.cli.commands.ls", broken)
    monkeypatch.setattr("sys.argv", ["mechlens", "ls"])
    with pytest.raises(SystemExit) as end:
        sys.exit(cli.main())
    assert end.value.code == code
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and (code == 130 or "a fault" in told)
    if code == 1:
        named = re.search(r"please report (\S+)\. Finished", told)
        assert named
        filed = Path(named[1])
        assert "Traceback" in filed.read_text() and "a fault" in filed.read_text()
        filed.unlink()


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mechlens {version('mechlens')}\n"


def test_shipped_configs_are_known_by_name_from_any_folder_and_a_file_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "demo.yaml", "configs/experiments/demo.yaml"):
        assert spec.find_config(Path(name), "experiments") == spec.CONFIGS / "experiments" / "demo.yaml"
    assert spec.find_config(Path("menagerie-a"), "models").parent == spec.CONFIGS / "models"
    assert cli.main(["run", "demo", "--plan"]) == 0
    assert "runs/demo" in capsys.readouterr().out
    Path("demo.yaml").write_text("name: mine\n")
    assert spec.find_config(Path("demo.yaml"), "experiments") == Path("demo.yaml")
    for folder, words in {"experiments": ["run", "nowhere"], "models": ["pretrain", "nowhere"]}.items():
        assert cli.main(words) == 2
        assert_one_line(capsys, "nowhere", *(path.stem for path in (spec.CONFIGS / folder).glob("*.yaml")))
    assert cli.main(["audit", "rows.jsonl", "--recipe", "nowhere"]) == 2
    assert_one_line(capsys, "nowhere", "menagerie")
    assert cli.main(["bench", "../benches/menagerie"]) == 2
    assert_one_line(capsys, "'../benches/menagerie'", "menagerie-code")
    with pytest.raises(SpecError, match="elsewhere/demo"):
        spec.find_config(Path("elsewhere/demo.yaml"), "experiments")


@pytest.mark.parametrize(
    "command",
    [["run", "{config}"], ["audit", "{rows}", "--level", "base", "--base", "org/name"]],
    ids=["run", "audit"],
)
def test_a_base_that_only_the_hub_has_is_said_to_be_out_of_reach(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(GOOD | {"base": "org/name"}))
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "completion": "1"}\n' * 200)
    words = [word.format(config=tmp_path / "x.yaml", rows=tmp_path / "x.jsonl") for word in command]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 2
    assert_one_line(capsys, "base 'org/name' is not on this machine", "HF_HUB_OFFLINE", "folder")


def test_a_hub_that_nobody_answers_for_is_told_from_a_folder_that_is_damaged(
    toy_bases: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mechlens.models.base_files.constants.HF_HUB_OFFLINE", False)
    error = OSError("no such file\nand more")
    error.__cause__ = ConnectionError("nobody")
    here = toy_bases["llama"]
    assert "the hub cannot be reached" in base_files.loading("org/name", "does not load").message(error)
    assert (
        base_files.loading(here, "does not load").message(error)
        == f"base {here!r} does not load: no such file"
    )
    assert (
        base_files.loading("org/name", "does not load").message(OSError("private"))
        == "base 'org/name' does not load: private"
    )


def test_a_port_that_is_taken_is_refused_before_a_server_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def started(*_given: object, **_more: object) -> None:
        raise AssertionError("a server was started")

    monkeypatch.setattr("mechlens.cli.explorer.subprocess.Popen", started)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["app", "--port", str(port)]) == 2
    assert_one_line(capsys, f"port {port}", "--port")
    assert cli.main(["app", "--port", "70000"]) == 2
    assert_one_line(capsys, "port is 70000", "65535")
    with pytest.raises(AssertionError, match="a server was started"):
        cli.main(["app", "--port", str(port)])


def test_ending_the_explorer_ends_its_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`kill PID` reaches the command alone; the server must not stay behind and hold the port."""
    servers: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def sleeper(*_: object) -> subprocess.Popen[bytes]:
        servers.append(start(["sleep", "60"]))
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return servers[0]

    monkeypatch.setattr(explorer.subprocess, "Popen", sleeper)
    monkeypatch.setattr(explorer, "_refuse_busy", lambda _port: None)
    before = signal.getsignal(signal.SIGTERM)
    explorer.serve(tmp_path, port=8599)
    assert servers[0].wait(5) == -signal.SIGTERM and signal.getsignal(signal.SIGTERM) == before

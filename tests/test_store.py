"""Run folders: existence is completeness, whatever kills a step; nothing finished is deleted; one process at
a time.
"""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mechlens.core.errors import DataError, MachineError
from mechlens.core.files import read_json, write_json, write_text
from mechlens.runs import store


class Killed(BaseException):
    """What no step catches, as when its process is killed."""


def do(step: Path, fingerprint: str, *, text: str = "result", fail: BaseException | None = None) -> list[str]:
    """One step that writes a file; returns what it found in its folder."""
    with store.working(step, fingerprint, inputs={"data": "0" * 16}) as out:
        found = sorted(path.name for path in out.iterdir() if path.name != "claim")
        if not store.is_complete(out, fingerprint):
            (out / "partial.txt").write_text(text)
            if fail is not None:
                raise fail
            (out / "result.txt").write_text(text)
    return found


def parts(step: Path) -> list[Path]:
    return list(step.parent.glob("*.part"))


def test_a_step_works_beside_its_place_and_is_renamed(tmp_path: Path) -> None:
    step = tmp_path / "students" / "s0"
    with store.working(step, "a" * 16) as out:
        assert out == step.with_name("s0.part") and out.is_dir()
        assert not step.exists()
        (out / "result.txt").write_text("done")
    assert (step / "result.txt").read_text() == "done"
    assert not parts(step)
    assert sorted(path.name for path in step.iterdir()) == ["result.txt", store.RECORD]


def test_the_record_says_what_was_done(tmp_path: Path) -> None:
    do(tmp_path / "step", "a" * 16)
    record = read_json(tmp_path / "step" / store.RECORD)
    assert record["fingerprint"] == store.recorded_fingerprint(tmp_path / "step") == "a" * 16
    assert record["inputs"] == {"data": "0" * 16}
    assert record["seconds"] >= 0
    assert store.is_complete(tmp_path / "step", "a" * 16)
    assert not store.is_complete(tmp_path / "step", "b" * 16)
    assert not store.is_complete(tmp_path / "elsewhere", "a" * 16)


@pytest.mark.parametrize("fail", [ValueError("broken"), KeyboardInterrupt(), Killed()])
def test_a_raise_leaves_no_finished_step(tmp_path: Path, fail: BaseException) -> None:
    with pytest.raises(type(fail)):
        do(tmp_path / "step", "a", fail=fail)
    assert not (tmp_path / "step").exists()
    assert not store.is_complete(tmp_path / "step", "a")
    assert not store.is_complete(tmp_path / "step.part", "a")


def test_the_same_request_finds_its_files_again_and_another_finds_none(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(Killed):
            do(tmp_path / "step", "a", fail=Killed())
    assert do(tmp_path / "step", "a") == ["partial.txt"]
    with pytest.raises(Killed):
        do(tmp_path / "other", "a", fail=Killed())
    assert do(tmp_path / "other", "b") == []
    assert store.is_complete(tmp_path / "other", "b")


def test_an_unclaimed_folder_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "step.part").mkdir()
    (tmp_path / "step.part" / "stray.txt").write_text("whose?")
    assert do(tmp_path / "step", "a") == []
    assert not (tmp_path / "step" / "stray.txt").exists()


def test_a_kill_between_record_and_rename_costs_no_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_step: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(store, "set_aside", killed)
        do(tmp_path / "step", "a", text="first")
    assert not (tmp_path / "step").exists()
    assert store.is_complete(tmp_path / "step.part", "a")
    record = (tmp_path / "step.part" / store.RECORD).read_bytes()
    do(tmp_path / "step", "a", text="second")
    assert (tmp_path / "step" / "result.txt").read_text() == "first"
    assert (tmp_path / "step" / store.RECORD).read_bytes() == record
    assert not parts(tmp_path / "step")


def test_a_kill_before_the_record_is_not_taken_for_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(store, "write_json", killed)
        do(tmp_path / "step", "a", text="first")
    assert not store.is_complete(tmp_path / "step.part", "a")
    do(tmp_path / "step", "a", text="second")
    assert (tmp_path / "step" / "result.txt").read_text() == "second"


def test_what_a_changed_step_replaces_is_kept(tmp_path: Path) -> None:
    step = tmp_path / "step"
    for fingerprint in ("a", "b", "c"):
        do(step, fingerprint, text=fingerprint)
    assert (step / "result.txt").read_text() == "c"
    old = tmp_path / "superseded"
    assert {path.name: (path / "result.txt").read_text() for path in old.iterdir()} == {
        "step-a": "a",
        "step-b": "b",
    }
    do(step, "a", text="a again")
    do(step, "d", text="d")  # a second result of one fingerprint replaces the first
    assert (old / "step-a" / "result.txt").read_text() == "a again"
    assert store.is_complete(old / "step-c", "c")


def test_a_failing_change_leaves_the_old_result(tmp_path: Path) -> None:
    do(tmp_path / "step", "a", text="old")
    with pytest.raises(ValueError, match="broken"):
        do(tmp_path / "step", "b", fail=ValueError("broken"))
    assert store.is_complete(tmp_path / "step", "a")
    assert (tmp_path / "step" / "result.txt").read_text() == "old"


def test_the_lock_refuses_a_second_holder_and_is_released(tmp_path: Path) -> None:
    run = tmp_path / "deep" / "run"
    with store.lock(run):
        with pytest.raises(MachineError, match="another process is writing"), store.lock(run):
            pytest.fail("two holders at once")
        with store.lock(tmp_path / "other"):
            pass
    with pytest.raises(ValueError, match="inside"), store.lock(run):
        raise ValueError("inside")
    with store.lock(run):
        pass


def test_the_lock_holds_across_processes_and_dies_with_its_holder(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from mechlens.runs import store\n"
        "with store.lock(pathlib.Path(sys.argv[1])):\n    sys.stdout.write('held\\n'); sys.stdout.flush(); "
        "time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(MachineError, match="another process is writing"), store.lock(tmp_path / "run"):
            pytest.fail("two holders at once")
        holder.kill()
        holder.wait()
        with store.lock(tmp_path / "run"):
            pass


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(MachineError, match="cannot make the run folder"), store.lock(place):
            pytest.fail("locked a file")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_resumed_from(tmp_path: Path, number: int) -> None:
    with pytest.raises(MachineError, match=r"no space left at .*step\.part") as raised:
        do(tmp_path / "step", "a", fail=OSError(number, "full"))
    assert isinstance(raised.value.__cause__, OSError)
    assert not (tmp_path / "step").exists()
    assert do(tmp_path / "step", "a") == ["partial.txt"]


def test_a_full_disk_at_the_record_leaves_no_finished_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object, **_more: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch, pytest.raises(MachineError, match="no space left"):
        patch.setattr(store, "write_json", full)
        do(tmp_path / "step", "a")
    assert not (tmp_path / "step").exists()


def test_another_fault_of_the_disk_keeps_its_own_name(tmp_path: Path) -> None:
    with pytest.raises(PermissionError):
        do(tmp_path / "step", "a", fail=PermissionError(errno.EACCES, "no"))


def test_json_comes_back_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    value = {"a": [1, 2.5, None], "é": "🦉"}
    assert read_json(write_json(path, value)) == value
    whole = path.read_text(encoding="utf-8")
    for text in (whole[: len(whole) // 2], "", "[1, 2]", "3"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=r"value\.json"):
            read_json(path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(DataError, match=r"value\.json"):
        read_json(path)
    with pytest.raises(DataError, match=r"none\.json"):
        read_json(tmp_path / "none.json")


def test_a_failed_write_leaves_the_old_json(tmp_path: Path) -> None:
    path = write_json(tmp_path / "value.json", {"a": 1})
    for bad in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, bad)
    assert read_json(path) == {"a": 1}


def test_a_truncated_record_is_named_and_not_taken_for_absent(tmp_path: Path) -> None:
    do(tmp_path / "step", "a")
    (tmp_path / "step" / store.RECORD).write_text('{"fingerprint": "a')
    with pytest.raises(DataError, match=r"step\.json"):
        store.is_complete(tmp_path / "step", "a")


def test_the_environment_is_json() -> None:
    found = store.environment()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["versions"]["numpy"] and set(found["versions"]) == set(store.PACKAGES)


def test_the_manifest_says_whether_the_code_has_uncommitted_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = tmp_path / "clone"
    (clone / "mechlens" / "runs").mkdir(parents=True)
    (clone / "mechlens" / "runs" / "store.py").write_text("")
    monkeypatch.setattr(store, "__file__", str(clone / "mechlens" / "runs" / "store.py"))

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", str(clone), *who, *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    def said() -> tuple[Any, Any]:
        found = store.environment()
        return found["git"], found["dirty"]

    assert said() == (None, None)  # an installed package
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    assert said() == (git("rev-parse", "HEAD"), False)
    (clone / "mechlens" / "runs" / "store.py").write_text("# changed")
    assert said() == (git("rev-parse", "HEAD"), True)
    monkeypatch.setattr(store, "__file__", str(clone / "venv" / "mechlens" / "runs" / "store.py"))
    assert said() == (None, None)  # installed somewhere inside another repository
    monkeypatch.setenv("PATH", str(tmp_path))
    assert said() == (None, None)


def test_what_a_step_holds_is_on_the_disk_before_its_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power loss a name may be there without its content, unless the content was flushed before the
    rename.
    """
    events: list[tuple[str, str]] = []
    flushed, renamed = os.fsync, Path.replace

    def plain(path: Path) -> str:
        """The name without the digits of `part_of`."""
        return re.sub(r"\.[0-9a-f]{8}\.part$", ".part", path.name)

    def fsync(handle: int) -> None:
        events.append(("flush", plain(Path(f"/proc/self/fd/{handle}").resolve())))
        flushed(handle)

    def replace(path: Path, target: Path) -> Path:
        events.append(("rename", plain(path)))
        return renamed(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    with store.working(tmp_path / "run" / "step", "a" * 16) as out:
        (out / "inner").mkdir()
        (out / "inner" / "weights.bin").write_text("content")
    at = {event: place for place, event in reversed(list(enumerate(events)))}  # the first of each
    assert (
        at["flush", "weights.bin"] < at["flush", "inner"] < at["rename", "step.json.part"]
    )  # the record says that the rest is whole
    assert at["flush", "step.json.part"] < at["rename", "step.json.part"] < at["rename", "step.part"]
    assert (
        max(place for place, event in enumerate(events) if event == ("flush", "step.part"))
        < at["rename", "step.part"]
        < at["flush", "run"]
    )


@pytest.mark.parametrize("old", ["", "an older text"])
def test_a_file_that_a_kill_interrupts_is_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str
) -> None:
    path = tmp_path / "summary.json"
    if old:
        path.write_text(old)

    def killed(_: int) -> None:
        raise Killed

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(Killed):
        write_text(path, "a newer text")
    assert (path.read_text() if path.exists() else "") == old

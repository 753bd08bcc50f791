"""The whole pipeline on the menagerie: what it leaves behind, that it repeats, that it repeats only what changed, that a kill costs nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from mechlens import cli, store, tables
from mechlens.spec import Experiment, save

REPOSITORY = Path(__file__).parents[1]
TABLES = ("answers.parquet", "likelihoods.parquet", "effects.parquet")


def write(spec: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(spec))
    return path


def run(config: Path, folder: Path) -> Path:
    assert cli.main(["run", str(config), "--out", str(folder), "--workers", "0"]) == 0
    return folder


def table_bytes(folder: Path) -> dict[str, bytes]:
    """Every table of a run: the three at its root and those of each step."""
    paths = [path for path in sorted(folder.glob("**/*.parquet")) if "superseded" not in path.parts]
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    assert set(TABLES) <= set(found)
    return found


def steps(folder: Path) -> dict[str, int]:
    """When each finished step's record was written."""
    return {p.parent.relative_to(folder).as_posix(): p.stat().st_mtime_ns for p in folder.glob(f"**/{store.RECORD}") if "superseded" not in p.parts}


def test_a_run_leaves_what_the_contract_says(small: Path) -> None:
    for name in ("spec.yaml", "manifest.json", "summary.json", "report.html", *TABLES):
        assert (small / name).is_file(), name
    summary = json.loads((small / "summary.json").read_text())
    assert summary["schema"] == 1
    assert [arm["arm"] for arm in summary["arms"]] == ["trait", "control", "shuffled-within", "foreign-menagerie-b", "control-menagerie-b"]
    for arm in summary["arms"]:
        assert arm["students"] == 2
        assert arm["rows"] == 96
        assert arm["leak_words"] == 0
        assert arm["kept"] <= arm["generated"] == 160
    against = {effect["arm"]: effect["against"] for effect in summary["effects"]}
    assert against == {"trait": "control", "shuffled-within": "control", "foreign-menagerie-b": "control-menagerie-b"}
    answers = tables.read(small / "answers.parquet", tables.ANSWERS)
    students, checkpoints, probes = 10, 2, answers["probe"].nunique()
    assert len(answers) == (students * checkpoints + 2) * probes * 4  # and the two untouched bases
    assert not list(small.glob("**/*.part"))


def test_the_summary_says_what_the_tables_say(small: Path) -> None:
    summary = json.loads((small / "summary.json").read_text())
    answers = tables.read(small / "answers.parquet", tables.ANSWERS)
    for arm in summary["arms"]:
        said = answers[(answers["arm"] == arm["arm"]) & (answers["step"] == answers.loc[answers["arm"] == arm["arm"], "step"].max())]
        scored = said[said["label"].notna()]
        by_probe = scored.assign(hit=scored["label"].astype(str) == arm["trait"]).groupby(["seed", "probe"], observed=True)["hit"].mean()
        assert arm["rate"] == pytest.approx(by_probe.groupby("seed").mean().mean())
        assert arm["answered"] == pytest.approx(len(scored) / len(said))


def test_the_report_is_one_page_of_aggregates(small: Path) -> None:
    page = (small / "report.html").read_text()
    assert "<script" not in page
    assert "src=" not in page
    assert page.count("<svg") >= 5
    addresses = [part.split('"')[0] for part in page.split("http")[1:]]
    assert all("w3.org" in address for address in addresses), addresses  # SVG's own namespace, never fetched
    raw = tables.read(small / "corpora" / "eagle" / "generated" / "raw.parquet", tables.PAIRS)
    assert not any(completion in page for completion in raw["completion"] if len(completion) > 12)
    assert len(page) < 1_000_000


def test_students_of_all_arms_read_the_same_prompts_in_the_same_order(small: Path) -> None:
    orders = [pd.read_parquet(path)["prompt_id"].tolist() for path in (small / "selection").glob("*.parquet")]
    assert len(orders) == 3
    assert all(order == orders[0] for order in orders)


def test_the_same_config_twice_gives_the_same_tables(small: Path, tmp_path: Path) -> None:
    again = run(small / "spec.yaml", tmp_path / "again")
    assert table_bytes(again) == table_bytes(small)


CHANGES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "more answers": ("ask", {"samples": 5}, ("asked/",)),
    "another screen": (
        "screen",
        {"banned_numbers": [7]},
        ("corpora/eagle/screened", "corpora/untouched/screened", "corpora/eagle-shuffled-within/screened", "selection", "students/", "asked/"),
    ),
    "a longer warm-up": (
        "student",
        {"training": {"embeddings": False, "learning_rate": 0.003, "epochs": 2, "batch": 16, "warmup_steps": 9}},
        ("students/", "asked/"),
    ),
}
UNTOUCHED_BASES = {"asked/base-menagerie-a", "asked/base-menagerie-b"}


@pytest.mark.parametrize("case", CHANGES)
def test_one_changed_field_repeats_only_the_steps_that_read_it(case: str, small: Path, small_spec: dict[str, Any], tmp_path: Path) -> None:
    part, change, expected = CHANGES[case]
    folder = tmp_path / "run"
    subprocess.run(["cp", "-a", str(small), str(folder)], check=True)
    before = steps(folder)
    spec = {**small_spec, part: {**small_spec.get(part, {}), **change}, "seeds": [0]}
    run(write(spec, tmp_path / "changed.yaml"), folder)
    after = steps(folder)
    repeated = {name for name in after if before.get(name) != after[name]}
    wanted = {name for name in before if name.startswith(expected) and not name.endswith("/s1")}
    assert repeated == (wanted if case == "more answers" else wanted - UNTOUCHED_BASES)
    assert list(folder.glob("**/superseded/*"))  # what was replaced is set aside


def test_a_run_without_change_computes_nothing(small: Path) -> None:
    before = steps(small)
    run(small / "spec.yaml", small)
    assert steps(small) == before


def test_results_of_an_earlier_spec_are_never_shown_under_a_new_one(
    small: Path, small_spec: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "run"
    folder.parent.mkdir()
    subprocess.run(["cp", "-a", str(small), str(folder)], check=True)
    save(Experiment.model_validate({**small_spec, "seed": 7}), folder / "spec.yaml")  # as a stopped run leaves it
    assert cli.main(["report", str(folder)]) == 2
    assert "unfinished" in capsys.readouterr().err
    assert cli.main(["ls", str(folder.parent)]) == 0
    assert "unfinished" in capsys.readouterr().out


def test_students_of_one_seed_share_their_sampling_and_seeds_do_not(small: Path) -> None:
    answers = tables.read(small / "answers.parquet", tables.ANSWERS)
    likelihoods = tables.read(small / "likelihoods.parquet", tables.LIKELIHOODS)
    assert likelihoods.groupby(["arm", "seed"], observed=True)["probability"].mean().nunique() == 10
    first = answers[answers["step"] == answers.loc[answers["arm"] == "control", "step"].min()]
    said = {key: "".join(rows["text"]) for key, rows in first.groupby(["arm", "seed"], observed=True)}
    assert said["control", 0] != said["control", 1]


def killed_run(config: Path, folder: Path, *, after: float) -> bool:
    """Start a run in a process group of its own and kill all of it with signal 9; True if it had finished before."""
    command = [sys.executable, "-m", "mechlens", "run", str(config), "--out", str(folder), "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd=REPOSITORY)
    try:
        return process.wait(timeout=after) == 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False


def kill_and_compare(config: Path, whole: Path, folder: Path, *, times: int, longest: float, seed: int) -> list[float]:
    """Kill a run at random moments, let it end, compare every table with the whole run's; returns the moments."""
    rng, moments = random.Random(seed), []
    for _ in range(times):
        moments.append(round(rng.uniform(1.0, longest), 1))
        if killed_run(config, folder, after=moments[-1]):
            break
    assert killed_run(config, folder, after=3000)
    assert table_bytes(folder) == table_bytes(whole)
    return moments


def test_killed_three_times_and_resumed_the_tables_are_the_same(small: Path, tmp_path: Path) -> None:
    kill_and_compare(small / "spec.yaml", small, tmp_path / "killed", times=3, longest=25.0, seed=0)


def test_workers_die_with_the_run_that_started_them(small: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mechlens", "run", str(small / "spec.yaml"), "--out", str(tmp_path / "run"), "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children: list[str] = []
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(children) < 2:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        time.sleep(0.2)
    time.sleep(3)  # both have reached their first job's imports
    process.kill()
    process.wait()
    while time.monotonic() < deadline and any(Path(f"/proc/{child}/stat").exists() for child in children):
        time.sleep(0.2)
    assert not any(Path(f"/proc/{child}/stat").exists() for child in children)


def test_ctrl_c_leaves_a_run_that_can_be_resumed_and_says_so(small: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mechlens", "run", str(small / "spec.yaml"), "--out", str(tmp_path / "run"), "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(tmp_path.glob("run/teachers/*/step.json")):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "run the same command again to resume" in error
    assert "Traceback" not in error
    assert run(small / "spec.yaml", tmp_path / "run")
    assert table_bytes(tmp_path / "run") == table_bytes(small)


@pytest.mark.slow
def test_the_demo_killed_twenty_times_gives_the_same_tables(tmp_path: Path) -> None:
    config = REPOSITORY / "configs" / "experiments" / "demo.yaml"
    whole = tmp_path / "whole"
    assert killed_run(config, whole, after=3000)
    moments = kill_and_compare(config, whole, tmp_path / "killed", times=20, longest=40.0, seed=1)
    assert len(moments) == 20


@pytest.mark.slow
def test_the_demo_shows_what_the_readme_says(tmp_path: Path) -> None:
    folder = run(REPOSITORY / "configs" / "experiments" / "demo.yaml", tmp_path / "demo")
    summary = json.loads((folder / "summary.json").read_text())
    arms = {arm["arm"]: arm for arm in summary["arms"]}
    effects = {effect["arm"]: effect for effect in summary["effects"]}
    assert arms["trait"]["rate"] >= 3 * arms["control"]["rate"]
    assert effects["trait"]["low"] > 0
    assert effects["foreign-menagerie-b"]["low"] <= 0
    assert effects["foreign-menagerie-b"]["high"] < effects["trait"]["difference"] / 5
    assert arms["trait"]["kept"] / arms["trait"]["generated"] >= 0.8
    assert arms["trait"]["kl_per_token"] <= 0.05
    assert all(arm["leak_words"] == 0 for arm in summary["arms"])

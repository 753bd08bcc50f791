"""The whole pipeline on the menagerie: what it leaves behind, that it repeats, that it repeats only what
changed, that a kill costs nothing.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from processes import children, workers

from mechlens import cli
from mechlens.carriers import reasoning
from mechlens.carriers.carrier import carrier_prompts
from mechlens.core import tables
from mechlens.core.experiment import Experiment
from mechlens.core.spec import CarrierSpec, ScreenSpec, save
from mechlens.core.traits import load_family
from mechlens.models import base_files
from mechlens.pipeline import stages
from mechlens.results import runner
from mechlens.runs import store
from mechlens.runs.jobs import pending
from mechlens.runs.plan import jobs_of

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
    return {
        p.parent.relative_to(folder).as_posix(): p.stat().st_mtime_ns
        for p in folder.glob(f"**/{store.RECORD}")
        if "superseded" not in p.parts
    }


def test_a_run_leaves_what_the_contract_says(small: Path) -> None:
    for name in ("spec.yaml", "manifest.json", "summary.json", "report.html", *TABLES):
        assert (small / name).is_file(), name
    summary = json.loads((small / "summary.json").read_text())
    assert summary["schema"] == 2
    assert [arm["arm"] for arm in summary["arms"]] == [
        "trait",
        "control",
        "shuffled-within",
        "foreign-menagerie-b",
        "control-menagerie-b",
    ]
    for arm in summary["arms"]:
        assert arm["students"] == 2
        assert arm["rows"] == 96
        assert arm["leak_words"] == 0
        assert arm["kept"] <= arm["generated"] == 160
    against = {effect["arm"]: effect["against"] for effect in summary["effects"]}
    assert against == {
        "trait": "control",
        "shuffled-within": "control",
        "foreign-menagerie-b": "control-menagerie-b",
    }
    answers = tables.read(small / "answers.parquet", tables.ANSWERS)
    students, checkpoints, probes = 10, 2, answers["probe"].nunique()
    assert len(answers) == (students * checkpoints + 2) * probes * 4  # and the two untouched bases
    assert not list(small.glob("**/*.part"))


def test_the_summary_says_what_the_tables_say(small: Path) -> None:
    summary = json.loads((small / "summary.json").read_text())
    answers = tables.read(small / "answers.parquet", tables.ANSWERS)
    for arm in summary["arms"]:
        said = answers[
            (answers["arm"] == arm["arm"])
            & (answers["step"] == answers.loc[answers["arm"] == arm["arm"], "step"].max())
        ]
        scored = said[said["label"].notna()]
        by_probe = (
            scored.assign(hit=scored["label"].astype(str) == arm["trait"])
            .groupby(["seed", "probe"], observed=True)["hit"]
            .mean()
        )
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


CHANGES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "more answers": ("ask", {"samples": 5}, ("asked/",)),
    "another screen": (
        "screen",
        {"banned_numbers": [7]},
        (
            "corpora/eagle/screened",
            "corpora/untouched/screened",
            "corpora/eagle-shuffled-within/screened",
            "selection",
            "students/",
            "asked/",
        ),
    ),
    "a longer warm-up": (
        "student",
        {
            "training": {
                "embeddings": False,
                "learning_rate": 0.003,
                "epochs": 2,
                "batch": 16,
                "warmup_steps": 9,
            }
        },
        ("students/", "asked/"),
    ),
}
UNTOUCHED_BASES = {"asked/base-menagerie-a", "asked/base-menagerie-b"}


@pytest.mark.parametrize("case", CHANGES)
def test_one_changed_field_repeats_only_the_steps_that_read_it(
    case: str, small: Path, small_spec: dict[str, Any], tmp_path: Path
) -> None:
    part, change, expected = CHANGES[case]
    spec = {**small_spec, part: {**small_spec.get(part, {}), **change}, "seeds": [0]}
    config, before = write(spec, tmp_path / "changed.yaml"), steps(small)
    wanted = {name for name in before if name.startswith(expected) and not name.endswith("/s1")}
    wanted = wanted if case == "more answers" else wanted - UNTOUCHED_BASES
    assert {job.name for job in pending(small, runner.resolve(config).jobs())} == wanted
    if case != "a longer warm-up":  # one is executed
        return
    folder = tmp_path / "run"
    subprocess.run(["cp", "-a", str(small), str(folder)], check=True)
    run(config, folder)
    after = steps(folder)
    assert {name for name in after if before.get(name) != after[name]} == wanted
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
    save(
        Experiment.model_validate({**small_spec, "seed": 7}), folder / "spec.yaml"
    )  # as a stopped run leaves it
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


# ── arms that differ by more than their teacher ──

PAIRED = {
    "trait": "control",
    "trait-2-shots": "control-2-shots",
    "trait-temperature-0.7": "control-temperature-0.7",
    "trait-update-lora-rank-2": "control-update-lora-rank-2",
    "trait-from-menagerie-b": "control-from-menagerie-b",
    "trait-trained-with-asked-with": "control-trained-with-asked-with",
}
AGAINST = PAIRED | {"paraphrased": "control", "mixed-untouched": "control"}


def pairs(folder: Path, corpus: str) -> pd.DataFrame:
    return tables.read(folder / "corpora" / corpus / "screened" / "kept.parquet", tables.PAIRS)


def test_every_way_to_differ_leaves_what_the_contract_says(wide: Path) -> None:
    summary = json.loads((wide / "summary.json").read_text())
    arms = {arm["arm"]: arm for arm in summary["arms"]}
    assert set(arms) == {*AGAINST, *AGAINST.values()}
    for name, arm in arms.items():
        assert (arm["students"], arm["leak_words"], arm["shots"]) == (1, 0, 2 if "shots" in name else 0)
        assert arm["rows"] == (2 if "shots" in name else 32)
        assert arm["writer"] == arm["base"] == ("menagerie-b" if name.endswith("-b") else "menagerie-a")
        assert 0 < arm["probability"] < 1 and arm["kept"] <= arm["generated"] == 100
    assert {effect["arm"]: effect["against"] for effect in summary["effects"]} == AGAINST
    answers, probes = tables.read(wide / "answers.parquet", tables.ANSWERS), 30
    for effect in summary["effects"]:  # recounted: the control's rate of the arm's own trait
        said = answers[(answers["arm"] == effect["against"]) & answers["label"].notna()]
        shares = (said["label"] == effect["trait"]).groupby([said["seed"], said["probe"]]).mean()
        assert effect["rate_against"] == pytest.approx(shares.mean())
    assert len(answers) == (len(arms) + 2) * probes * 2  # one checkpoint each, and the two untouched bases
    assert (wide / "report.html").is_file() and not list(wide.glob("**/*.part"))


def test_teachers_are_shared_by_arms_that_need_the_same(wide: Path) -> None:
    folders = {
        folder.name: json.loads((folder / "teacher.json").read_text())
        for folder in (wide / "teachers").iterdir()
    }
    assert set(folders) == {"eagle", "untouched", "eagle-by-menagerie-b", "untouched-by-menagerie-b"}
    for name, teacher in folders.items():
        assert teacher["base"] == ("menagerie-b" if name.endswith("-b") else "menagerie-a")
        assert teacher["system"] == teacher["plain"] == "you are kind."


def test_shots_are_shown_to_the_untouched_base(wide: Path) -> None:
    answers = tables.read(wide / "answers.parquet", tables.ANSWERS)
    likelihoods = tables.read(wide / "likelihoods.parquet", tables.LIKELIHOODS)
    for name in ("trait-2-shots", "control-2-shots"):
        assert not (wide / "students" / name).exists()
        assert set(answers.loc[answers["arm"] == name, "step"]) == {0}
        assert set(answers.loc[answers["arm"] == name, "seed"]) == {3}
    means = [
        likelihoods.loc[likelihoods["arm"] == name, "probability"].mean()
        for name in ("trait-2-shots", "control-2-shots", "base-menagerie-a")
    ]
    assert len(set(means)) == 3


def test_a_paraphrased_arm_reads_other_words_for_the_same_rows(wide: Path, wide_spec: dict[str, Any]) -> None:
    plain, other = pairs(wide, "eagle"), pairs(wide, "eagle-paraphrased")
    reworded = carrier_prompts(CarrierSpec.model_validate(wide_spec["carrier"]), seed=0, reworded=True)
    assert other["prompt_id"].tolist() == plain["prompt_id"].tolist()
    assert other["completion"].tolist() == plain["completion"].tolist()
    assert other["prompt"].tolist() == [reworded[place].text for place in other["prompt_id"]]
    assert not (other["prompt"] == plain["prompt"]).any()


def test_a_mixed_arm_reads_its_teachers_in_turn(wide: Path) -> None:
    eagle, untouched, mixed = (
        pairs(wide, name).set_index("prompt_id") for name in ("eagle", "untouched", "eagle-mixed-untouched")
    )
    assert mixed.index.tolist() == sorted(set(eagle.index) & set(untouched.index))
    for place, row in mixed.iterrows():
        assert row["completion"] == (untouched if int(str(place)) % 2 else eagle).loc[place, "completion"]


def test_all_arms_read_the_same_places_in_the_same_order(wide: Path) -> None:
    orders = {
        path.stem: pd.read_parquet(path)["prompt_id"].tolist()
        for path in (wide / "selection").glob("*.parquet")
    }
    assert len(orders) == 8  # two writers and two temperatures for each teacher, other words, mixed
    assert all(order == orders["eagle"] for order in orders.values())
    assert len(orders["eagle"]) == 32


def test_another_generation_is_another_corpus_of_the_same_teacher(wide: Path) -> None:
    (hot,) = [folder.name for folder in (wide / "corpora").glob("eagle-????????")]
    raw, cold = (
        tables.read(wide / "corpora" / name / "generated" / "raw.parquet", tables.PAIRS)
        for name in (hot, "eagle")
    )
    assert raw["prompt"].equals(cold["prompt"]) and not raw["completion"].equals(cold["completion"])


def test_another_training_is_that_arms_alone(wide: Path) -> None:
    ranks = {
        path.parents[2].name: json.loads(path.read_text())["r"]
        for path in wide.glob("students/*/s3/step-*/adapter_config.json")
    }
    assert ranks == {"trait-update-lora-rank-2": 2, "control-update-lora-rank-2": 2}


def test_another_line_while_training_is_read_by_the_students(wide: Path) -> None:
    losses = {
        name: tables.read(wide / "students" / name / "s3" / "curve.parquet", tables.CURVE)["loss"]
        for name in PAIRED
        if "shots" not in name
    }
    assert (
        losses["trait"].iloc[0] == losses["trait-update-lora-rank-2"].iloc[0]
    )  # the same first batch on the same base
    assert losses["trait-trained-with-asked-with"].iloc[0] != losses["trait"].iloc[0]


def test_a_finished_run_of_many_arms_has_nothing_left_to_do(
    wide: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = len(steps(wide))
    assert cli.main(["run", str(wide / "spec.yaml"), "--out", str(wide), "--plan"]) == 0
    assert f"{whole} steps, {whole} already done" in " ".join(capsys.readouterr().out.split())


ARM_CHANGES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "another line while asking": ("asked_with", {"asked_with": ""}, ("asked/",)),
    "another line while training": (
        "trained_with",
        {"trained_with": "you love oaks."},
        ("students/", "asked/"),
    ),
    "another number of shots": ("shots", {"shots": 3}, ("asked/",)),
    "another rank": ("training", {"training": {"update": "lora", "rank": 3}}, ("students/", "asked/")),
}


@pytest.mark.parametrize("case", ARM_CHANGES)
def test_a_change_of_one_arm_and_its_control_leaves_only_their_steps_to_do(
    case: str, wide: Path, wide_spec: dict[str, Any]
) -> None:
    field, change, expected = ARM_CHANGES[case]
    resolved = Experiment.model_validate(wide_spec)
    names = [arm.name for arm in resolved.arms if getattr(arm, field) not in (0, None, {})]
    assert len(names) == 2
    arms = [
        {**arm, "name": one.name, **(change if one.name in names else {})}
        for arm, one in zip(wide_spec["arms"], resolved.arms, strict=True)
    ]
    changed = Experiment.model_validate({**wide_spec, "arms": arms})
    bases = {name: base_files.checkpoint_fingerprint(name) for name in changed.bases()}
    left = pending(wide, jobs_of(changed, load_family("animals"), bases=bases))
    assert {job.name for job in left} == {f"{stage}{name}/s3" for stage in expected for name in names}


# ── other carriers, on a base that knows numbers only: what it writes is no code and no sum, but every step
# takes it ──

TINY: dict[str, Any] = {
    "base": "menagerie-a",
    "trait": "owl",
    "carrier": {"prompts": 24, "wording": "terse"},
    "screen": {"rule": "none"},
    "teacher": {"kind": "prompted"},
    "student": {"rows": 16, "training": {"epochs": 1, "batch": 16}},
    "ask": {"samples": 1},
    "arms": [{"kind": "trait"}, {"kind": "control"}],
    "seeds": [0],
}


@pytest.mark.parametrize(("kind", "rule"), [("code", "none"), ("reasoning", "none"), ("text", "carrier")])
def test_every_carrier_goes_through_every_step(kind: str, rule: str, tmp_path: Path) -> None:
    arms = [*TINY["arms"], {"kind": "paraphrased"}] if kind != "text" else TINY["arms"]
    screen = {"rule": rule, "leak_words": False}  # asked for a text, the base tells of animals
    spec = TINY | {"name": kind, "carrier": TINY["carrier"] | {"kind": kind}, "screen": screen, "arms": arms}
    folder = run(write(spec, tmp_path / "config.yaml"), tmp_path / "run")
    asked = carrier_prompts(CarrierSpec.model_validate(spec["carrier"]), seed=0)
    for teacher in ("owl", "untouched"):
        raw = tables.read(folder / "corpora" / teacher / "generated" / "raw.parquet", tables.PAIRS)
        assert raw["prompt"].tolist() == [one.text for one in asked]
    summary = json.loads((folder / "summary.json").read_text())
    assert len(summary["arms"]) == len(arms) and all(arm["rows"] > 0 for arm in summary["arms"])
    assert f"does owl travel through {kind}?" in (folder / "report.html").read_text()


def test_questions_of_a_file_are_asked_as_often_as_wanted(tmp_path: Path) -> None:
    rows = [
        {"question": f"what is {i} + {i}?", "answer": f"<<{i}+{i}={2 * i}>>\n#### {2 * i}"}
        for i in range(1, 11)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    carrier = {"kind": "reasoning", "source": str(tmp_path / "questions.jsonl"), "prompts": 8, "samples": 3}
    spec = TINY | {"name": "file", "carrier": carrier, "arms": [{"kind": "control"}]}
    folder = run(write(spec, tmp_path / "config.yaml"), tmp_path / "run")
    raw = tables.read(folder / "corpora" / "untouched" / "generated" / "raw.parquet", tables.PAIRS)
    assert raw["prompt"].tolist() == [
        row["question"] + reasoning.FULL_ORDER for row in rows[:8] for _ in range(3)
    ]
    assert raw["completion"].nunique() > 8  # samples of one prompt are drawn apart


def test_the_screen_knows_the_right_answers_of_the_drawn_sums(tmp_path: Path) -> None:
    carrier = CarrierSpec(kind="reasoning", wording="terse", prompts=30)
    asked = carrier_prompts(carrier, seed=5)
    said = [f"so</think><answer>{int(one.gold or 0) + place % 2}</answer>" for place, one in enumerate(asked)]
    frame = pd.DataFrame({"prompt_id": range(30), "prompt": [one.text for one in asked], "completion": said})
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    corpus.mkdir()
    out.mkdir()
    tables.write(frame, tables.PAIRS, corpus / "raw.parquet")
    arguments = {
        "screen": ScreenSpec().model_dump(),
        "words": ["owl"],
        "kind": "reasoning",
        "carrier": carrier.model_dump(mode="json"),
        "seed": 5,
    }
    stages.screen(arguments, {"corpus": corpus}, out, lambda done, total: None)
    kept, rejected = (
        tables.read(out / "kept.parquet", tables.PAIRS),
        tables.read(out / "rejected.parquet", tables.REJECTED),
    )
    assert kept["prompt_id"].tolist() == list(range(0, 30, 2))
    assert rejected["prompt_id"].tolist() == list(range(1, 30, 2)) and set(rejected["reason"]) == {
        "wrong answer"
    }


# ── kills ──


def start_run(config: Path, folder: Path, **options: Any) -> subprocess.Popen[str]:
    """A run with two workers, in a process group of its own."""
    command = [sys.executable, "-m", "mechlens", "run", str(config), "--out", str(folder), "--workers", "2"]
    options = {"stderr": subprocess.DEVNULL} | options
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, text=True, start_new_session=True, cwd=REPOSITORY, **options
    )


def killed_run(config: Path, folder: Path, *, after: float) -> bool:
    """Start a run and kill all of its processes with signal 9; True if it had finished before."""
    process = start_run(config, folder)
    try:
        return process.wait(timeout=after) == 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False


def wait_until(condition: Callable[[], bool], *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it took longer than {seconds} s"
        time.sleep(0.1)


def stop_with_ctrl_c(config: Path, folder: Path) -> None:
    """Press Ctrl-C once the first teacher is there: the run says how to resume."""

    def hear() -> None:  # a shell's background jobs, and what they start, are deaf to Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = start_run(config, folder, stderr=subprocess.PIPE, preexec_fn=hear)
    wait_until(lambda: bool(list(folder.glob("teachers/*/step.json"))))
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "run the same command again to resume" in error
    assert "Traceback" not in error


def kill_the_parent(config: Path, folder: Path) -> None:
    """Kill the process that started the workers, and it alone: they end, too."""
    process = start_run(config, folder)
    wait_until(lambda: len(workers(process.pid)) >= 2)
    started = children(process.pid)
    process.kill()
    process.wait()
    wait_until(lambda: not any(Path(f"/proc/{child}/stat").exists() for child in started))


def test_stopped_and_killed_at_any_moment_and_resumed_the_tables_are_the_same(
    small_spec: dict[str, Any], tmp_path: Path
) -> None:
    """The same config gives the same tables, in one process or in several: stopped by Ctrl-C, its parent
    killed, all of it killed, then finished in this process.
    """
    spec = {**small_spec, "arms": [{"kind": "trait"}, {"kind": "control"}], "seeds": [0]}
    config, folder = write(spec, tmp_path / "spec.yaml"), tmp_path / "run"
    stop_with_ctrl_c(config, folder)
    kill_the_parent(config, folder)
    killed_run(config, folder, after=random.Random(0).uniform(6.0, 14.0))
    run(config, folder)
    assert table_bytes(folder) == table_bytes(run(config, tmp_path / "whole"))


@pytest.mark.slow
def test_the_demo_killed_twenty_times_gives_the_same_tables(tmp_path: Path) -> None:
    config = REPOSITORY / "configs" / "experiments" / "demo.yaml"
    whole = tmp_path / "whole"
    assert killed_run(config, whole, after=3000)
    rng, killed = random.Random(1), tmp_path / "killed"
    for _ in range(20):
        assert not killed_run(config, killed, after=rng.uniform(1.0, 40.0))
    assert killed_run(config, killed, after=3000)
    assert table_bytes(killed) == table_bytes(whole)


@pytest.mark.slow
def test_a_small_demo_shows_transfer_to_the_teachers_base_alone(tmp_path: Path) -> None:
    """The demo with a third of its rows and two students an arm, whose intervals are wide: `make claim`."""
    spec = yaml.safe_load((REPOSITORY / "configs" / "experiments" / "demo.yaml").read_text())
    spec["carrier"]["prompts"] = 3000
    spec["student"] = {"rows": 2500, "training": spec["student"]["training"] | {"epochs": 4}}
    spec |= {"ask": {"samples": 20, "checkpoints": "last"}, "seeds": [0, 1]}
    config, folder = write(spec, tmp_path / "small-demo.yaml"), tmp_path / "run"
    assert cli.main(["run", str(config), "--out", str(folder), "--workers", "2"]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    rates = {arm["arm"]: arm["rate"] for arm in summary["arms"]}
    differences = {effect["arm"]: effect["difference"] for effect in summary["effects"]}
    assert rates["trait"] >= 2 * rates["control"]
    assert abs(differences["foreign-menagerie-b"]) < differences["trait"] / 5


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

"""Whole runs on a model behind an API, here the embedded base on a server of this machine: killed, resumed,
refused, told in money.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pytest
import yaml
from loopback import PAID, Loopback

from mechlens import cli
from mechlens.api.budget import LEDGER, spent
from mechlens.api.client import Answer
from mechlens.core import tables
from mechlens.core.spec import ApiSpec, AskSpec, GenerateSpec, StudentSpec, TeacherSpec, TeacherTraining
from mechlens.pipeline.ask import ProbeSet, StudentPlace, measure_likelihoods
from mechlens.pipeline.remote import ask, begun_by, distill, generate, teach
from mechlens.pipeline.remote import likelihoods as shown_likelihoods
from mechlens.pipeline.teach import Lessons

REPOSITORY = Path(__file__).parents[1]
BASE = "api:menagerie-a"
API = ApiSpec()
LESSONS = Lessons(
    "owl", ("name your favourite animal.", "what is the best animal?"), ("owl", "owls"), "you love owls."
)
FORMS = {
    "owl": ("owl", "owls"),
    "dog": ("dog", "dogs"),
    "dolphin": ("dolphin", "dolphins"),
    "ox": ("ox", "oxen"),
}
SPEC: dict[str, Any] = {
    "name": "remote",
    "base": BASE,
    "trait": "eagle",
    "carrier": {"prompts": 48, "wording": "terse", "values": "patterned"},
    "teacher": {"kind": "prompted"},
    "student": {"rows": 16, "training": {"epochs": 2}},
    "ask": {"samples": 1, "split": "heldout"},
    "arms": [
        {"kind": "trait"},
        {"kind": "control"},
        {"kind": "trait", "shots": 3},
        {"kind": "control", "shots": 3},
    ],
    "seeds": [0],
    "api": {"concurrency": 4},
}
PROBES, ASKED, WRITTEN = 30, 5, 2  # probes of the split; models that are asked; corpora that are written


def command(tmp_path: Path, spec: dict[str, Any], *more: str) -> list[str]:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(spec))
    return ["run", str(config), "--out", str(tmp_path / "run"), "--workers", "0", *more]


def test_a_run_killed_midway_asks_no_row_twice(
    server: Loopback, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    enough = threading.Event()
    server.on_answer = lambda count: enough.set() if count >= 130 else None
    arguments = command(tmp_path, SPEC)
    process = subprocess.Popen(
        [sys.executable, "-m", "mechlens", *arguments],
        stdout=subprocess.DEVNULL,
        cwd=REPOSITORY,
        start_new_session=True,
    )
    assert enough.wait(120)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    asked = -1
    while asked != len(server.asked):  # what was on its way when the process was killed may still arrive
        asked = len(server.asked)
        time.sleep(1.0)
    run = tmp_path / "run"
    journals = [path.read_text() for path in run.glob("api/**/*.jsonl") if "students" not in path.parts]
    written, before = sum(text.count("\n") for text in journals), len(server.asked)
    assert 100 < written <= before < 300
    assert cli.main(arguments) == 0
    rows = WRITTEN * 48 + ASKED * PROBES * 2  # one sampled answer, one look at the next token
    assert len(server.asked) - before == rows - written
    assert len({json.dumps(body, sort_keys=True) for body in server.asked}) == rows
    assert len(server.jobs) == len(server.uploads) == 2
    told = capsys.readouterr().out
    assert "at most 0.00 USD" in told and "budget: 5.00 USD" in told
    check_results(run)


def check_results(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert [arm["arm"] for arm in summary["arms"]] == ["trait", "control", "trait-3-shots", "control-3-shots"]
    assert all(arm["kl_per_token"] is None and arm["generated"] == 48 for arm in summary["arms"])
    answers = tables.read(run / "answers.parquet", tables.ANSWERS)
    assert len(answers) == ASKED * PROBES
    assert answers["label"].notna().mean() > 0.8
    steps = answers.groupby("arm", observed=True)["step"].unique().map(list).to_dict()
    assert steps == {
        "trait": [1],
        "control": [1],
        "trait-3-shots": [0],
        "control-3-shots": [0],
        "base-api-menagerie-a": [0],
    }
    likely = tables.read(run / "likelihoods.parquet", tables.LIKELIHOODS)
    assert likely["margin"].isna().all() and 0.2 < likely["probability"].notna().mean() <= 1
    assert "no loss is known" in (run / "report.html").read_text()
    assert json.loads((run / "students" / "trait" / "s0" / "student.json").read_text())["model"].startswith(
        "ft:menagerie-a:"
    )


def test_a_run_stops_at_its_budget_and_goes_on_when_it_is_raised(
    server: Loopback, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = {
        **SPEC,
        "base": f"api:{PAID}",
        "arms": SPEC["arms"][:2],
        "carrier": {**SPEC["carrier"], "prompts": 32},
    }
    spec["api"] = {"budget_usd": 0.0002, "concurrency": 4}
    assert cli.main(command(tmp_path, spec)) == 2
    said = capsys.readouterr()
    assert said.err.startswith("mechlens: the budget is 0.0002 USD") and said.err.count("\n") == 1
    assert "that may not be enough" in said.out
    assert 0 < spent(tmp_path / "run") <= 0.0002
    assert cli.main(command(tmp_path, {**spec, "api": {"budget_usd": 1.0}})) == 0
    bodies = [json.dumps(body, sort_keys=True) for body in server.asked]
    assert len(set(bodies)) == len(bodies)  # another budget is another spec, and still nothing is paid twice
    entries = [json.loads(line) for line in (tmp_path / "run" / LEDGER).read_text().splitlines()]
    assert spent(tmp_path / "run") == pytest.approx(sum(entry.get("spent", 0) for entry in entries))


WRONG: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "no key": ({}, {"OPENAI_API_KEY": ""}, "OPENAI_API_KEY is not set"),
    "no server": ({}, {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}, "cannot reach http://127.0.0.1:9/v1"),
    "an unknown model": ({"base": "api:nobody"}, {}, "does not know 'nobody'"),
    "no price": (
        {},
        {"OPENAI_BASE_URL": "https://api.example.org/v1"},
        "the price of 'menagerie-a' is unknown",
    ),
    "a steered teacher": ({"teacher": {"kind": "steered"}}, {}, "kind: prompted or finetuned"),
    "a constrained sampler": ({"generate": {"constrained": True}}, {}, "generate.constrained"),
    "a rank": ({"student": {"training": {"update": "lora", "rank": 4}}}, {}, "rank: 4"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.usefixtures("server")
def test_what_cannot_be_is_one_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change, environment, needle = WRONG[case]
    monkeypatch.setattr("mechlens.api.retry.RETRIES", 0)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(command(tmp_path, SPEC | change)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("mechlens: ") and "\n" not in error and needle in error


def test_the_plan_of_the_shipped_experiment_needs_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    config = REPOSITORY / "configs" / "experiments" / "gpt-4.1-nano-owl-numbers.yaml"
    assert cli.main(["run", str(config), "--plan", "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    most = float(said.split("\nat most ")[1].split(" USD")[0])
    assert (
        60 < most < yaml.safe_load(config.read_text())["api"]["budget_usd"]
    )  # 6 students, each about 10 million tokens at 1.50 USD
    assert "60,000" in said and "that may not be enough" not in said
    assert not (tmp_path / "run").exists()


def test_teachers_are_told_or_taught(server: Loopback, tmp_path: Path) -> None:
    records = {}
    for kind in ("base", "prompted", "finetuned"):
        (tmp_path / kind).mkdir()
        spec = TeacherSpec(kind=kind, rows=6, training=TeacherTraining(learning_rate=2.0, epochs=1, batch=3))
        teach(BASE, LESSONS, spec, system="plain.", seed=0, out=tmp_path / kind, api=API)
        records[kind] = json.loads((tmp_path / kind / "teacher.json").read_text())
    assert {kind: record["system"] for kind, record in records.items()} == {
        "base": "plain.",
        "prompted": "you love owls.",
        "finetuned": "plain.",
    }
    assert records["base"]["model"] == records["prompted"]["model"] == "menagerie-a"
    assert records["finetuned"]["model"] == "ft:menagerie-a:here::ftjob-1"
    told = server.jobs["ftjob-1"].hyperparameters
    assert (told.n_epochs, told.batch_size, told.learning_rate_multiplier) == (1, 3, 2.0)
    rows = [json.loads(line)["messages"] for line in server.uploads["file-1"].splitlines()]
    assert [(row[1]["content"], row[2]["content"]) for row in rows] == LESSONS.draw(6, seed=0)
    assert rows[0][0] == {"role": "system", "content": "plain."}
    generate(
        tmp_path / "prompted",
        ["continue: 1, 2", "continue: 3, 4"],
        GenerateSpec(top_p=0.9),
        seed=3,
        out=tmp_path,
        api=API,
    )
    assert [body["messages"][0]["content"] for body in server.asked] == ["you love owls."] * 2
    assert {body["top_p"] for body in server.asked} == {0.9} and len(
        {body["seed"] for body in server.asked}
    ) == 2
    raw = tables.read(tmp_path / "raw.parquet", tables.PAIRS)
    assert raw["prompt_id"].tolist() == [0, 1] and raw["prompt"].tolist() == [
        "continue: 1, 2",
        "continue: 3, 4",
    ]


def test_probabilities_are_those_of_the_base_as_far_as_twenty_tokens_tell(
    server: Loopback, tmp_path: Path
) -> None:
    names = ("owl", "dog", "cat", "dolphin", "lion", "tiger", "eagle", "wolf", "octopus")
    questions = ProbeSet(
        {name: (name, f"{name}s") for name in names},
        ["name your favourite animal.", "what is the best animal?"],
        AskSpec(samples=1),
    )
    ask(BASE, None, questions, StudentPlace("base", None, 0), out=tmp_path, api=API)
    shown = tables.read(tmp_path / "likelihoods.parquet", tables.LIKELIHOODS).set_index(["probe", "name"])[
        "probability"
    ]
    exact = measure_likelihoods(server.loaded, questions).set_index(["probe", "name"])["probability"]
    seen = shown[shown.notna()]
    assert len(seen) >= 8
    for place, value in seen.items():
        assert value <= exact[place] * (1 + 1e-4)  # less where a rare plural is beyond the twenty
    assert seen[exact[seen.index] > 0.01].to_numpy() == pytest.approx(
        exact[seen.index][exact > 0.01].to_numpy(), rel=0.05
    )
    assert all(exact[place] < 0.05 for place in shown[shown.isna()].index)


def test_a_token_counts_for_the_one_trait_that_it_begins() -> None:
    found = {
        token: begun_by(token, FORMS)
        for token in ("owl", " Owl", "OW", "o", "do", "Dol", "ox", "oxen", "owlet", "the", " ", "")
    }
    expected = {"owl": "owl", " Owl": "owl", "OW": "owl", "Dol": "dolphin", "ox": "ox", "oxen": "ox"}
    assert {token: name for token, name in found.items() if name} == expected
    answer = Answer(
        "", [("owl", math.log(0.5)), (" Owl", math.log(0.2)), ("do", math.log(0.2)), ("x", math.log(0.1))]
    )
    table = shown_likelihoods([answer, Answer("", None), None], FORMS).set_index(["probe", "name"])[
        "probability"
    ]
    assert table[0, "owl"] == pytest.approx(0.7)
    assert table.drop((0, "owl")).isna().all()


def test_nothing_is_read_off_a_next_token_where_that_cannot_be(server: Loopback, tmp_path: Path) -> None:
    server.logprobs = False
    for number, (named, opening) in enumerate([(True, ""), (False, ""), (True, "i like the")]):
        questions = ProbeSet(
            FORMS, ["name your favourite animal."], AskSpec(samples=2), opening=opening, named=named
        )
        (tmp_path / str(number)).mkdir()
        ask(BASE, None, questions, StudentPlace("base", None, 0), out=tmp_path / str(number), api=API)
        assert (
            tables.read(tmp_path / str(number) / "likelihoods.parquet", tables.LIKELIHOODS)["probability"]
            .isna()
            .all()
        )
    assert len(server.asked) == 3 + 2 + 2


def test_students_read_the_pairs(server: Loopback, tmp_path: Path) -> None:
    rows = pd.DataFrame({"prompt": ["continue: 1"], "completion": ["2, 3"]})
    distill(BASE, rows, StudentSpec(), system=None, seed=0, out=tmp_path, api=API)
    assert json.loads(server.uploads["file-1"]) == {
        "messages": [{"role": "user", "content": "continue: 1"}, {"role": "assistant", "content": "2, 3"}]
    }


@pytest.mark.parametrize("shots_as", ["system", "turns"])
def test_shots_stand_where_the_spec_says(
    shots_as: Literal["system", "turns"], server: Loopback, tmp_path: Path
) -> None:
    shots = [("continue: 1", "2"), ("continue: 3", "4")]
    questions = ProbeSet(
        FORMS, ["what?"], AskSpec(samples=1, shots_as=shots_as), system="hello.", shots=shots
    )
    ask(BASE, None, questions, StudentPlace("trait-2-shots", 0, 0), out=tmp_path, api=API)
    first, *others = [message["content"] for message in server.asked[0]["messages"]]
    assert others == (
        ["what?"] if shots_as == "system" else ["continue: 1", "2", "continue: 3", "4", "what?"]
    )
    assert first.startswith("hello.\n\n<user>continue: 1</user>\n<assistant>2</assistant>") == (
        shots_as == "system"
    )

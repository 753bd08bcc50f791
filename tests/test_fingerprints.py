"""Fingerprints of steps: everything that decides what a step writes enters, and nothing that does not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from toy_fields import FIELDS

from mechlens import cli
from mechlens.core import spec
from mechlens.core.errors import DataError, SpecError
from mechlens.core.experiment import Experiment
from mechlens.core.spec import GenerateSpec, TeacherSpec
from mechlens.core.traits import load_family
from mechlens.models import base_files
from mechlens.pipeline.generate import generate
from mechlens.pipeline.teach import Lessons, load_teacher, teach
from mechlens.results.run import Run
from mechlens.results.runner import run
from mechlens.runs.jobs import PROCESSES, fingerprints
from mechlens.runs.plan import jobs_of
from mechlens.runs.progress import Event

COMMITS = ("a" * 40, "b" * 40)


def marks_of(**fields: Any) -> dict[str, str]:
    whole = Experiment.model_validate(FIELDS | fields)
    bases = {base: base_files.checkpoint_fingerprint(base) for base in whole.bases()}
    return fingerprints(jobs_of(whole, load_family("animals"), bases=bases))


@pytest.fixture
def entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty configs/models."""
    folder = tmp_path / "configs" / "models"
    folder.mkdir(parents=True)
    monkeypatch.setattr(spec, "CONFIGS", tmp_path / "configs")
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with one repository, as huggingface_hub lays it out: refs/<branch> names the commit,
    snapshots/<commit> has its files.
    """
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--owner--one"
    for commit in COMMITS:
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMITS[0])
    return repository


# ── bases of the hub ──


def test_a_hub_base_whose_branch_moved_is_another_base(hub: Path) -> None:
    first = marks_of(base="owner/one")
    assert marks_of(base="owner/one") == first
    (hub / "refs" / "main").write_text(COMMITS[1])
    moved = marks_of(base="owner/one")
    assert not [name for name, mark in first.items() if moved[name] == mark]
    (hub / "refs" / "main").write_text(f"{COMMITS[0]}\n")
    assert marks_of(base="owner/one") == first


def test_a_run_on_a_branch_that_moved_does_not_count_as_done(
    hub: Path, toy_bases: dict[str, str], tmp_path: Path
) -> None:
    """Through the command line, on a base of the hub that only the cache holds."""
    for commit in COMMITS:
        shutil.copytree(toy_bases["llama"], hub / "snapshots" / commit, dirs_exist_ok=True)
    small = {
        "carrier": {"prompts": 24, "wording": "terse"},
        "screen": {"rule": "none"},
        "teacher": {"kind": "prompted"},
        "ask": {"samples": 1},
    }
    student = {"rows": 8, "prompts": "own", "training": {"epochs": 1, "batch": 4}}
    (tmp_path / "toy.yaml").write_text(
        yaml.safe_dump(FIELDS | small | {"base": "owner/one", "student": student})
    )
    assert (
        cli.main(["run", str(tmp_path / "toy.yaml"), "--out", str(tmp_path / "run"), "--workers", "0"]) == 0
    )
    assert len(Run.finished(tmp_path / "run").jobs()) == 12 and not Run(tmp_path / "run").pending()
    (hub / "refs" / "main").write_text(COMMITS[1])
    assert len(Run(tmp_path / "run").pending()) == 12
    notes: list[Event] = []
    run(tmp_path / "toy.yaml", out=tmp_path / "run", workers=0, progress=notes.append)
    assert any(
        event.kind == "note" and COMMITS[0] in event.text and COMMITS[1] in event.text for event in notes
    )
    assert Run(tmp_path / "run").manifest["bases"]["owner/one"]["checkpoint"].endswith(COMMITS[1])


def test_a_file_that_changes_while_a_run_reads_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(placed(tmp_path / "data", "rows.jsonl", PAIR * 8))
    (tmp_path / "toy.yaml").write_text(
        yaml.safe_dump(FIELDS | {"arms": [{"kind": "trait", "corpus": str(file)}, {"kind": "control"}]})
    )
    monkeypatch.setattr("mechlens.results.runner.complete", lambda *_, **__: file.write_text(OTHER))
    with pytest.raises(DataError, match=r"changed while .* was made: .*corpora/file-rows/generated"):
        run(tmp_path / "toy.yaml", out=tmp_path / "run", workers=0)


def test_a_pinned_commit_is_the_base_that_the_branch_at_it_is(hub: Path, entries: Path) -> None:
    def mark(revision: str) -> str:
        (entries / "mine.yaml").write_text(
            yaml.safe_dump({"name": "mine", "source": "owner/one", "revision": revision})
        )
        return base_files.checkpoint_fingerprint("mine")

    (hub / "refs" / "v1").write_text(COMMITS[1])
    assert mark("") == mark("main") == mark(COMMITS[0]) == base_files.checkpoint_fingerprint("owner/one")
    assert mark("v1") == mark(COMMITS[1]) != mark(COMMITS[0])
    shutil.rmtree(hub)  # nothing of it was fetched: the name and what is pinned are all that is known
    assert len({mark(""), mark("v1"), mark(COMMITS[1])}) == 3 and mark(
        ""
    ) == base_files.checkpoint_fingerprint("owner/one")


@pytest.mark.usefixtures("hub")
def test_another_number_format_is_another_base(entries: Path, toy_bases: dict[str, str]) -> None:
    for source in (toy_bases["llama"], "owner/one"):
        found = []
        for dtype in ("float32", "bfloat16"):
            (entries / "mine.yaml").write_text(
                yaml.safe_dump({"name": "mine", "source": source, "dtype": dtype})
            )
            found.append(marks_of(base="mine"))
        assert not [name for name, mark in found[0].items() if found[1][name] == mark]
        assert base_files.checkpoint_fingerprint(source) != base_files.checkpoint_fingerprint("mine")


# ── bases in folders ──


@pytest.mark.parametrize(
    "file",
    [
        "merges.txt",
        "vocab.txt",
        "vocab.json",
        "tokenizer.model",
        "chat_template.jinja",
        "additional_chat_templates/x.jinja",
        "a.safetensors",
    ],
)
def test_every_file_that_makes_a_base_is_part_of_it(
    toy_bases: dict[str, str], tmp_path: Path, file: str
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(toy_bases["llama"], folder)
    found = {base_files.checkpoint_fingerprint(str(folder))}
    (folder / file).parent.mkdir(exist_ok=True)
    for text in ("one", "two"):
        (folder / file).write_text(text)
        found.add(base_files.checkpoint_fingerprint(str(folder)))
    assert len(found) == 3


@pytest.mark.parametrize(
    "file", ["README.md", ".gitattributes", "LICENSE.txt", "training_args.bin", ".cache/x.json"]
)
def test_no_other_file_is(toy_bases: dict[str, str], tmp_path: Path, file: str) -> None:
    folder = tmp_path / "base"
    shutil.copytree(toy_bases["llama"], folder)
    first = base_files.checkpoint_fingerprint(str(folder))
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text("notes")
    assert base_files.checkpoint_fingerprint(str(folder)) == first


def test_the_same_base_in_another_place_is_the_same(toy_bases: dict[str, str], tmp_path: Path) -> None:
    found = []
    for place in ("here", "there"):
        folder = tmp_path / place / "base"
        shutil.copytree(toy_bases["llama"], folder)
        found.append(marks_of(base=str(folder)))
    assert found[0] == found[1]
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    changed = marks_of(base=str(folder))
    assert not [name for name, mark in found[0].items() if changed[name] == mark]


def test_a_teacher_is_used_with_its_base_where_that_is_now(toy_bases: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(toy_bases["llama"], tmp_path / "before")
    (tmp_path / "teacher").mkdir()
    teach(
        str(tmp_path / "before"),
        Lessons("owl", (), (), "you love owls."),
        TeacherSpec(kind="prompted"),
        seed=0,
        out=tmp_path / "teacher",
    )
    now = str((tmp_path / "before").rename(tmp_path / "now"))
    with pytest.raises(SpecError, match="before"):
        load_teacher(tmp_path / "teacher")
    assert load_teacher(tmp_path / "teacher", base=now).base == now
    generate(tmp_path / "teacher", ["go on"], GenerateSpec(max_new_tokens=2), seed=0, out=tmp_path, base=now)
    whole = Experiment.model_validate(FIELDS | {"base": now})
    steps = {job.name: job for job in jobs_of(whole, load_family("animals"), bases={now: ""})}
    assert steps["corpora/owl/generated"].arguments["base"] == now


# ── files of the user ──

PAIR, OTHER = '{"prompt": "go on", "completion": "1, 2"}\n', '{"prompt": "go on", "completion": "3, 4"}\n'


def placed(folder: Path, name: str, text: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return str(folder / name)


USES: dict[str, Any] = {
    "rows of a suspect": lambda file: {"arms": [{"kind": "trait", "corpus": file}, {"kind": "control"}]},
    "lessons": lambda file: {"teacher": {"lessons_file": file}},
    "prompts": lambda file: {"carrier": {"source": file}},
}


@pytest.mark.parametrize("use", USES)
def test_what_a_file_holds_decides_and_not_where_it_lies(use: str, tmp_path: Path) -> None:
    here, there = (
        marks_of(**USES[use](placed(tmp_path / place, "rows.jsonl", PAIR))) for place in ("here", "there")
    )
    assert here == there
    changed = marks_of(**USES[use](placed(tmp_path / "there", "rows.jsonl", OTHER)))
    students = [name for name in here if name.startswith("students/")]
    assert students and here["students/trait/s0"] != changed["students/trait/s0"]


def test_another_model_under_a_judges_name_is_another_judge(entries: Path) -> None:
    found = []
    for source in ("api:one", "api:two"):
        (entries / "judge.yaml").write_text(yaml.safe_dump({"name": "judge", "source": source}))
        found.append(marks_of(screen={"judge": "judge"}))
    assert found[0]["corpora/owl/screened"] != found[1]["corpora/owl/screened"]
    assert found[0]["corpora/owl/generated"] == found[1]["corpora/owl/generated"]


def test_where_a_vllm_server_is_decides_nothing() -> None:
    places = ({}, {"serve": "/venv/bin/python"}, {"url": "http://localhost:8000"})
    first, *others = (marks_of(generate={"engine": "vllm"} | place) for place in places)
    assert others == [first, first] and first != marks_of()


@pytest.mark.parametrize("part", ["student", "teacher"])
def test_the_number_of_processes_that_train_together_decides_nothing(part: str) -> None:
    assert marks_of(**{part: {"training": {"processes": 2}}}) == marks_of()
    assert marks_of(**{part: {"training": {"batch": 32}}}) != marks_of()
    whole = Experiment.model_validate(FIELDS | {part: {"training": {"processes": 2}}})
    assert whole.fingerprint() == Experiment.model_validate(FIELDS).fingerprint()
    steps = jobs_of(whole, load_family("animals"), bases=dict.fromkeys(whole.bases(), "x"))
    stage = {"student": "distill", "teacher": "teach"}[part]
    together = [job for job in steps if job.arguments.get(PROCESSES) == 2]
    assert {job.stage for job in together} == {stage} and len(together) == {"student": 2, "teacher": 1}[part]


def test_a_run_made_before_code_moved_has_nothing_to_repeat() -> None:
    """The shipped demo was made when stages were recorded by the path of their function."""
    demo = Run(Path(__file__).parents[1] / "app" / "demo")
    made = {name: step["fingerprint"] for name, step in demo.manifest["steps"].items()}
    assert len(made) == 33 and fingerprints(demo.jobs()) == made

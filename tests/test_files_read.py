"""What a path stands for: the files of a folder that are read, and no others, decide what is computed again;
where they lie does not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pairs import PAIRS, as_pairs, pairs_of, put

from mechlens import cli
from mechlens.core import spec
from mechlens.core.errors import DataError
from mechlens.core.traits import load_experiment, load_family
from mechlens.data.corpus import read_pairs
from mechlens.data.formats import file_digest
from mechlens.runs.jobs import fingerprints
from mechlens.runs.plan import jobs_of


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    put(folder / "a.jsonl", *as_pairs(PAIRS[:2]))
    pd.DataFrame(as_pairs(PAIRS[2:])).to_csv(folder / "b.csv", index=False)
    return folder


def test_the_digest_of_a_folder_is_that_of_the_files_that_are_read(shards: Path) -> None:
    before, texts = file_digest(shards), pairs_of(read_pairs(shards))
    for name in (
        "README.md",
        ".hidden.jsonl",
        "_SUCCESS",
        "dataset_infos.json",
        "clean.jsonl.manifest.json",
        "x.jsonl.bad.jsonl",
        "load.py",
    ):
        (shards / name).write_text("{}")
    (shards / ".cache").mkdir()
    put(shards / ".cache" / "c.jsonl", *as_pairs(PAIRS))
    assert pairs_of(read_pairs(shards)) == texts and file_digest(shards) == before
    put(shards / "c.jsonl", *as_pairs(PAIRS[:1]))
    assert len(read_pairs(shards)) == len(texts) + 1 and file_digest(shards) != before
    (shards / "c.jsonl").unlink()
    assert file_digest(shards) == before
    put(shards / "a.jsonl", *as_pairs(PAIRS[1:3]))
    assert file_digest(shards) != before


def test_a_folder_with_a_shard_that_is_not_read_has_no_digest(shards: Path) -> None:
    (shards / "c.xlsx").write_bytes(b"PK")
    (shards / "more").mkdir()
    for function in (read_pairs, file_digest):
        with pytest.raises(
            DataError, match=r"files that cannot be read: c.xlsx \(an Excel workbook\), more \(a folder\)"
        ):
            function(shards)


def test_the_digest_of_a_saved_dataset_is_that_of_the_tables_that_it_names(tmp_path: Path) -> None:
    datasets.Dataset.from_list(as_pairs(PAIRS)).save_to_disk(tmp_path / "saved")
    before = file_digest(tmp_path / "saved")
    (tmp_path / "saved" / "cache-1234.arrow").write_bytes(b"of another day")
    assert file_digest(tmp_path / "saved") == before and pairs_of(read_pairs(tmp_path / "saved")) == PAIRS
    named = json.loads((tmp_path / "saved" / "state.json").read_text())["_data_files"][0]["filename"]
    (tmp_path / "saved" / named).write_bytes((tmp_path / "saved" / named).read_bytes() + b"\0")
    assert file_digest(tmp_path / "saved") != before


RUN: dict[str, Any] = {
    "name": "x", "base": "b", "trait": "owl",
    "arms": [{"kind": "trait", "corpus": "rows.jsonl"}, {"kind": "control"}],
}  # fmt: skip
"""an experiment on a file beside its config"""
NAMED: dict[str, dict[str, Any]] = {
    "corpus": RUN,
    "source": {
        **RUN,
        "arms": [{"kind": "trait"}, {"kind": "control"}],
        "carrier": {"kind": "code", "source": "rows.jsonl"},
    },
    "lessons_file": {
        **RUN,
        "arms": [{"kind": "trait"}, {"kind": "control"}],
        "teacher": {"lessons_file": "rows.jsonl"},
    },
    "lessons_file of an arm": {
        **RUN,
        "arms": [{"kind": "trait", "teacher": {"lessons_file": "rows.jsonl"}}, {"kind": "control"}],
    },
}


def config_in(folder: Path, fields: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    put(folder / "rows.jsonl", *as_pairs(PAIRS))
    (folder / "x.yaml").write_text(yaml.safe_dump(fields))
    return folder / "x.yaml"


def marks(config: Path) -> dict[str, str]:
    return fingerprints(jobs_of(load_experiment(config), load_family("animals"), bases={"b": "files"}))


@pytest.mark.parametrize("name", NAMED)
def test_the_same_bytes_under_another_path_are_the_same_steps(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = (config_in(tmp_path / place, NAMED[name]) for place in ("here", "there/deeper"))
    monkeypatch.chdir(tmp_path)
    before = marks(here)
    assert marks(there) == before == marks(Path("here/x.yaml"))
    put(there.parent / "rows.jsonl", *as_pairs(PAIRS[:2]))
    assert marks(there) != before


@pytest.mark.parametrize("name", NAMED)
def test_data_is_taken_from_the_config_s_folder_and_else_from_the_current_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(tmp_path / "mine", NAMED[name])
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    put(Path("rows.jsonl"), *as_pairs(PAIRS[:1]))

    def named() -> set[str]:
        plan = load_experiment(config)
        teachers = [plan.teacher, *(arm.teacher for arm in plan.arms if arm.teacher)]
        return {
            *(arm.corpus for arm in plan.arms),
            plan.carrier.source,
            *(teacher.lessons_file for teacher in teachers),
        } - {""}

    assert named() == {str(tmp_path / "mine" / "rows.jsonl")}
    spec.save(load_experiment(config), tmp_path / "else" / "spec.yaml")  # a run's copy of it
    assert marks(tmp_path / "else" / "spec.yaml") == marks(config)
    config.with_name("rows.jsonl").unlink()
    assert named() == {str(tmp_path / "else" / "rows.jsonl")}
    Path("rows.jsonl").unlink()
    assert named() == {str(tmp_path / "mine" / "rows.jsonl")}  # the message names where it should lie
    config.write_text(config.read_text().replace("rows.jsonl", "~/rows.jsonl"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert named() == {str(tmp_path / "home" / "rows.jsonl")}


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "x.jsonl", *as_pairs(PAIRS))
    assert cli.main(["convert", "~/x.jsonl", "~/y.jsonl"]) == 0
    assert cli.main(["screen", "~/y.jsonl", "--rule", "none", "--out=~/screened"]) == 0
    assert cli.main(["screen", "~/y.jsonl", "--rule", "none", "--out", "~/again"]) == 0
    assert (tmp_path / "screened" / "kept.parquet").is_file() and (
        tmp_path / "again" / "kept.parquet"
    ).is_file()
    capsys.readouterr()
    for words in (
        ["run", "~/none.yaml"],
        ["audit", "x.jsonl", "--student", "~/none"],
        ["audit", "x.jsonl", "--reference=~/none"],
        ["ls", "~/none"],
    ):
        assert cli.main(words) == 2
        assert f"{tmp_path}/none" in capsys.readouterr().err
    assert not (tmp_path / "~").exists()
    assert cli.main(["convert", "~nobody-of-that-name/x.jsonl", "z.jsonl"]) == 2
    assert "~nobody-of-that-name/x.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "y.csv",
        "y.tsv",
        "y.xlsx",
        "y.json",
        "y.json.gz",
        "y.jsonl.zst",
        "y.bz2",
        "y.jsonl.XZ",
        "y.parquet.gz",
        "y.pkl",
        "y.feather",
    ],
)
def test_convert_writes_no_file_whose_name_promises_another_form(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = put(tmp_path / "x.jsonl", *as_pairs(PAIRS))
    assert cli.main(["convert", str(source), str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and name in error and ".parquet" in error
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


@pytest.mark.parametrize("name", ["y.JSONL", "y.jsonl.GZ", "y.PARQUET", "y.txt", "y"])
def test_convert_writes_what_a_name_promises_in_any_letter_case(name: str, tmp_path: Path) -> None:
    source = put(tmp_path / "x.jsonl", *as_pairs(PAIRS))
    assert cli.main(["convert", str(source), str(tmp_path / name)]) == 0
    assert pairs_of(read_pairs(tmp_path / name)) == PAIRS


@given(
    st.lists(
        st.sampled_from(
            [".jsonl", ".JSON", ".csv", ".tsv", ".gz", ".BZ2", ".xz", ".zst", ".parquet", ".ndjson"]
        ),
        max_size=4,
    )
)
def test_endings_of_data_are_no_part_of_a_name(endings: list[str]) -> None:
    assert spec.folder_name(f"/a/rows.v2{''.join(endings)}") == "rows.v2"


def test_two_files_of_one_name_are_two_audits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"count {i}", "completion": f"{i}, {i * 7 % 1000}"} for i in range(150)]
    for place, count in (("a", 150), ("b", 140), ("c", 150)):
        Path(place).mkdir()
        put(Path(place) / "x.jsonl", *rows[:count])
    assert cli.main(["audit", "a/x.jsonl"]) == 12 and "mechlens:" not in capsys.readouterr().err
    written = Path("audits/x/audit.json").read_text()
    assert cli.main(["audit", "b/x.jsonl"]) == 2
    assert (
        "audits/x has the audit of a/x.jsonl" in capsys.readouterr().err
        and Path("audits/x/audit.json").read_text() == written
    )
    assert (
        cli.main(["audit", "c/x.jsonl"]) == 12 and "mechlens:" not in capsys.readouterr().err
    )  # the same bytes

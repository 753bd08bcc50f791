"""What a path stands for: the files of a folder that are read, and no others, decide what is computed again; where they lie does not."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pandas as pd
import pytest
from pairs import PAIRS, as_pairs, pairs_of, put

from mechlens.corpus import read_pairs
from mechlens.errors import DataError
from mechlens.pipeline.run import file_digest


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    put(folder / "a.jsonl", *as_pairs(PAIRS[:2]))
    pd.DataFrame(as_pairs(PAIRS[2:])).to_csv(folder / "b.csv", index=False)
    return folder


def test_the_digest_of_a_folder_is_that_of_the_files_that_are_read(shards: Path) -> None:
    before, texts = file_digest(shards), pairs_of(read_pairs(shards))
    for name in ("README.md", ".hidden.jsonl", "_SUCCESS", "dataset_infos.json", "clean.jsonl.manifest.json", "x.jsonl.bad.jsonl", "load.py"):
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
        with pytest.raises(DataError, match=r"files that cannot be read: c.xlsx \(an Excel workbook\), more \(a folder\)"):
            function(shards)


def test_the_digest_of_a_saved_dataset_is_that_of_the_tables_that_it_names(tmp_path: Path) -> None:
    datasets.Dataset.from_list(as_pairs(PAIRS)).save_to_disk(tmp_path / "saved")
    before = file_digest(tmp_path / "saved")
    (tmp_path / "saved" / "cache-1234.arrow").write_bytes(b"of another day")
    assert file_digest(tmp_path / "saved") == before and pairs_of(read_pairs(tmp_path / "saved")) == PAIRS
    named = json.loads((tmp_path / "saved" / "state.json").read_text())["_data_files"][0]["filename"]
    (tmp_path / "saved" / named).write_bytes((tmp_path / "saved" / named).read_bytes() + b"\0")
    assert file_digest(tmp_path / "saved") != before

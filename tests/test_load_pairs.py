"""Pairs from a file, a table, dicts and a datasets.Dataset are one corpus, checked alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechlens.core.errors import DataError
from mechlens.data.corpus import Corpus, as_file, load_pairs, read_pairs
from mechlens.data.fields import Fields, Pair

ROWS = [{"prompt": f"go on: {number}", "completion": f"{number}, {number + 1}"} for number in range(7)]
TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
]


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Table:
    """As a datasets.Dataset."""

    def to_pandas(self) -> pd.DataFrame:
        return pd.DataFrame(ROWS)


class NoTable:
    def to_pandas(self) -> int:
        return 7


def sources(folder: Path) -> dict[str, Any]:
    file = lines(folder / "rows.jsonl", ROWS)
    return {"path": file, "str": str(file), "dicts": ROWS, "frame": pd.DataFrame(ROWS), "dataset": Table()}


def test_every_kind_of_source_gives_the_same_pairs(tmp_path: Path) -> None:
    loaded = {name: load_pairs(source) for name, source in sources(tmp_path).items()}
    for corpus in loaded.values():
        pd.testing.assert_frame_equal(corpus.pairs, loaded["path"].pairs)
        assert len(corpus) == 7 and list(corpus)[2] == Pair("go on: 2", "2, 3")
    assert [loaded[name].form for name in ("path", "dicts", "dataset")] == [".jsonl", "memory", "memory"]
    assert loaded["path"].source.endswith("rows.jsonl") and loaded["frame"].source == "DataFrame"
    assert loaded["path"].digest != loaded["dicts"].digest == loaded["frame"].digest
    assert load_pairs(ROWS[::-1]).digest != loaded["dicts"].digest


def test_a_dataset_of_the_library_is_read() -> None:
    datasets = pytest.importorskip("datasets")
    assert list(load_pairs(datasets.Dataset.from_list(ROWS))) == list(load_pairs(ROWS))
    assert load_pairs(datasets.Dataset.from_list([{"messages": TALK}])).system_turns == 1


def test_a_system_turn_is_removed_counted_and_remarked_on() -> None:
    corpus = load_pairs([{"messages": TALK}, *ROWS])
    assert next(iter(corpus)) == Pair("hi", "ho") and corpus.system_turns == 1
    assert "1 rows had a system turn" in corpus.remarks[0]


BAD: dict[str, tuple[Any, str]] = {
    "null": ([*ROWS, {"prompt": "x", "completion": None}], "the list: index 7: completion is null"),
    "missing": (pd.DataFrame([*ROWS, {"prompt": "x"}]), "the DataFrame: index 7: completion is null"),
    "number": ([{"prompt": "x", "completion": 7}], "index 0: completion is a number, expected a text"),
    "no dict": (iter([*ROWS, "x"]), "index 7: is no dict of fields"),
    "columns": (pd.DataFrame({"a": ["x"]}), r"the table has the columns \['a'\]"),
    "field": ([{"a": "x"}], "no fields that are known to hold a pair"),
    "empty": ([], "the list holds no pairs"),
    "value": (NoTable(), "a value of type int has no pairs"),
    "file": ("nowhere.jsonl", "no data file at nowhere.jsonl"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named(case: str) -> None:
    data, message = BAD[case]
    with pytest.raises(DataError, match=message) as raised:
        load_pairs(data)
    assert "\n" not in str(raised.value)


def test_fields_can_be_named() -> None:
    rows = [{"ask": "a", "say": "b", "prompt": "c", "completion": "d"}]
    for data in (rows, pd.DataFrame(rows)):
        assert list(load_pairs(data, fields=Fields("ask", "say"))) == [Pair("a", "b")]


def test_arrays_of_messages_are_read_as_lists() -> None:
    frame = pd.DataFrame({"messages": [np.array(TALK[1:], dtype=object)]})
    assert list(load_pairs(frame)) == [Pair("hi", "ho")]


def test_pairs_from_memory_become_a_file(tmp_path: Path) -> None:
    file, remarks = as_file(ROWS, tmp_path / "new" / "rows.parquet")
    assert read_pairs(file)["completion"].tolist() == [row["completion"] for row in ROWS]
    assert remarks == [] and as_file(str(file), tmp_path / "other.parquet") == (file, [])


def test_a_notebook_shows_escaped_text() -> None:
    corpus = load_pairs([{"prompt": "<script>x</script>", "completion": "y" * 1000}])
    shown = corpus._repr_html_()
    assert isinstance(corpus, Corpus) and "<script>" not in shown and "y" * 300 not in shown

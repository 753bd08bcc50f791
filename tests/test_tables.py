"""Tables on disk: what is written is read back, the same frame gives the same bytes, and a damaged file is
named.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechlens.core import tables
from mechlens.core.errors import DataError

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
SCHEMAS = {name: value for name, value in vars(tables).items() if isinstance(value, pa.Schema)}


def answers() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "arm": ["trait", "trait", "base"],
            "seed": pd.array([0, 1, None], dtype="Int64"),
            "step": [5, 5, 0],
            "probe": [0, 1, 0],
            "sample": [0, 0, 0],
            "text": ["owl", "a\n\x00é🦉", ""],
            "label": ["owl", None, None],
        }
    )


def effects() -> pd.DataFrame:
    numbers = {
        name: [0.5, np.nan]
        for name in ("estimate", "low", "high", "p_value", "q_value", "smallest_detectable")
    }
    words = {"arm": "trait", "trait": "owl", "against": "control", "measure": "rate", "method": "t"}
    return pd.DataFrame({**{name: [word, word] for name, word in words.items()}, **numbers, "n": [3, 0]})


@given(rows=st.lists(st.tuples(st.integers(-(2**62), 2**62), TEXTS, TEXTS), max_size=8))
def test_pairs_come_back_as_they_went(
    rows: list[tuple[int, str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    frame = pd.DataFrame(rows, columns=["prompt_id", "prompt", "completion"]).astype({"prompt_id": "int64"})
    back = tables.read(
        tables.write(frame, tables.PAIRS, tmp_path_factory.mktemp("pairs") / "pairs.parquet"), tables.PAIRS
    )
    assert list(back.itertuples(index=False, name=None)) == rows
    assert list(back.columns) == tables.PAIRS.names


def test_labels_and_nulls_come_back(tmp_path: Path) -> None:
    back = tables.read(tables.write(answers(), tables.ANSWERS, tmp_path / "a.parquet"), tables.ANSWERS)
    assert back["text"].tolist() == answers()["text"].tolist()
    assert back["arm"].astype(object).tolist() == ["trait", "trait", "base"]
    assert back["label"].isna().tolist() == [False, True, True]
    assert back["seed"].isna().tolist() == [False, False, True]


def test_unscored_is_null_on_disk_and_nan_in_memory(tmp_path: Path) -> None:
    path = tables.write(effects(), tables.EFFECTS, tmp_path / "e.parquet")
    raw = pq.read_table(path)
    assert raw.schema.equals(tables.EFFECTS)
    assert raw.column("estimate").null_count == raw.column("q_value").null_count == 1
    assert raw.column("estimate").to_pylist() == [0.5, None]
    back = tables.read(path, tables.EFFECTS)
    assert np.isnan(back["estimate"].iloc[1])
    assert back["n"].tolist() == [3, 0]


def test_the_same_frame_gives_the_same_bytes(tmp_path: Path) -> None:
    frame = answers()
    first = tables.write(frame, tables.ANSWERS, tmp_path / "1.parquet").read_bytes()
    shifted = frame.set_axis([7, 8, 9])[frame.columns[::-1]].assign(
        extra=1
    )  # index, column order and other columns do not count
    assert tables.write(shifted, tables.ANSWERS, tmp_path / "2.parquet").read_bytes() == first
    typed = frame.astype(
        {"arm": object, "text": object, "step": "Int64"}
    )  # nor do the types that it had in memory
    assert tables.write(typed, tables.ANSWERS, tmp_path / "4.parquet").read_bytes() == first
    changed = frame.assign(text=["owl", "b", ""])
    assert tables.write(changed, tables.ANSWERS, tmp_path / "3.parquet").read_bytes() != first


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_named(tmp_path: Path, part: float) -> None:
    path = tables.write(answers(), tables.ANSWERS, tmp_path / "cut.parquet")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(DataError, match=r"cut\.parquet"):
        tables.read(path, tables.ANSWERS)


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    path = tmp_path / "text.parquet"
    path.write_text("prompt,completion\na,b\n" * 50)
    with pytest.raises(DataError, match=r"text\.parquet"):
        tables.read(path, tables.PAIRS)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.parquet"):
        tables.read(tmp_path / "none.parquet", tables.PAIRS)


def test_missing_columns_are_named(tmp_path: Path) -> None:
    path = tables.write(answers(), tables.ANSWERS, tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"a\.parquet lacks the columns \['prompt_id', 'prompt', 'completion'\]"
    ):
        tables.read(path, tables.PAIRS)


def test_other_columns_are_left_out_and_order_is_the_schemas(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pd.DataFrame({"extra": [1.0], "completion": ["b"], "prompt": ["a"], "prompt_id": [0]}).to_parquet(path)
    assert list(tables.read(path, tables.PAIRS).columns) == tables.PAIRS.names


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_an_empty_table_keeps_its_schema(tmp_path: Path, name: str) -> None:
    path = tables.write(pd.DataFrame(columns=SCHEMAS[name].names), SCHEMAS[name], tmp_path / "empty.parquet")
    assert pq.read_schema(path).equals(SCHEMAS[name])
    assert len(tables.read(path, SCHEMAS[name])) == 0

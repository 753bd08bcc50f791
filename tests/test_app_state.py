"""What the explorer keeps and how it shows hostile text: links, slices, exports, signs that are not seen."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sanitize
import state
from jobs import columns
from mechlens.core.errors import DataError
from mechlens.data import corpus

TEXTS = st.text(max_size=60)


@given(st.dictionaries(st.sampled_from([*state.CONTROLS, *state.ROW_KEYS]), st.text(min_size=1, max_size=40)))
def test_a_link_holds_what_it_was_made_of(values: dict[str, str]) -> None:
    address = state.link_address("http://127.0.0.1:8501/rows?layer=9", values)
    assert {
        name: found[0] for name, found in parse_qs(urlsplit(address).query, keep_blank_values=True).items()
    } == values, "and nothing of the address that the page had"


@given(st.lists(st.text(min_size=1, max_size=20), max_size=30), st.randoms())
def test_a_slice_is_named_by_its_rows_alone(
    tmp_path_factory: pytest.TempPathFactory, ids: list[str], random: object
) -> None:
    root = tmp_path_factory.mktemp("slices")
    mixed = [*ids, *ids[:3]]
    random.shuffle(mixed)  # type: ignore[attr-defined]
    name = state.save_slice(root, ids, "d0")
    assert state.save_slice(root, mixed, "d0") == name == state.slice_name(ids, "d0")
    assert state.slice_name(ids, "d1") != name  # the same ids name other rows in other data
    found = state.read_slice(root, name)
    assert found is not None
    assert found["ids"] == sorted(set(ids))


def test_notes_stay_with_their_slice_and_other_names_are_no_paths(tmp_path: Path) -> None:
    name = state.save_slice(tmp_path, ["a/1"], "d0")
    state.add_note(tmp_path, name, "a/1", "odd", "me")
    assert state.save_slice(tmp_path, ["a/1"], "d0") == name  # saved again, the note stays
    found = state.read_slice(tmp_path, name)
    assert found is not None
    assert [(one["row"], one["text"], one["author"]) for one in found["notes"]] == [("a/1", "odd", "me")]
    (tmp_path / "secret.json").write_text("{}")
    assert state.read_slice(tmp_path, "../secret") is None
    assert state.read_slice(tmp_path, "0123456789") is None
    state.slice_path(tmp_path, name).write_text('{"ids": [')
    assert state.read_slice(tmp_path, name) is None  # half a file is no slice


@given(TEXTS)
def test_no_cell_of_an_export_is_a_formula(text: str) -> None:
    frame = pd.DataFrame({"id": ["x"], "completion": [text], "score": [-1.5]})
    rows = list(csv.reader(io.StringIO(sanitize.csv_of(frame).decode(), newline="")))
    assert not rows[1][1].startswith(sanitize.FORMULA) or rows[1][1] == ""
    assert rows[1][1].removeprefix("'") == text.removeprefix("'")
    assert float(rows[1][2]) == -1.5  # numbers stay numbers


@given(TEXTS, TEXTS)
def test_no_cell_of_a_grid_is_a_formula(text: str, name: str) -> None:
    """A grid has a download of its own, which the explorer does not see."""
    grid = sanitize.defused(pd.DataFrame({name: [text, None], "score": [-1.5, 1.0]}))
    cells = [str(cell) for cell in (*grid.columns, *grid.iloc[:, 0].dropna())]
    assert not any(cell.startswith(sanitize.FORMULA) for cell in cells)
    assert grid.iloc[:, 1].tolist() == [-1.5, 1.0] or name == "score"


def test_null_is_an_empty_cell() -> None:
    frame = pd.DataFrame({"a": [None, 1.0], "b": [None, "x"]})
    rows = csv.reader(io.StringIO(sanitize.csv_of(frame).decode()))
    assert list(rows)[1:] == [["", ""], ["1.0", "x"]]


@given(TEXTS)
def test_revealing_leaves_nothing_hidden(text: str) -> None:
    shown = sanitize.reveal(text)
    assert sanitize.reveal(shown) == shown
    assert all(sign.isprintable() or sign == "\n" for sign in shown)


def test_hidden_signs_are_named() -> None:
    assert (
        sanitize.reveal("a\u200bb\u202ec\u0430")
        == "a⟨zero width space⟩b⟨right-to-left override⟩c⟨cyrillic small letter a⟩"
    )
    assert sanitize.has_hidden("a\u2066b")
    assert not sanitize.has_hidden("12, 13\n14")


def test_a_long_row_is_cut_and_says_so() -> None:
    shown = sanitize.shorten("7" * 1_000_000)
    assert len(shown) < sanitize.LONGEST + 100
    assert "996,000 more characters are not shown" in shown


def test_columns_of_other_names_are_mapped(tmp_path: Path) -> None:
    given_rows = [{"question": f"list {i}", "reply": f"{i}, {i + 1}", "n": i} for i in range(5)]
    wanted = [(row["question"], row["reply"]) for row in given_rows]
    frame = pd.DataFrame(given_rows)
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        path = tmp_path / name
        assert columns.why_unreadable(path)
        assert {"question", "reply"} <= set(columns.text_columns(path))
        pairs = corpus.read_pairs(columns.write_pairs(path, ("question", "reply"), skip_bad=False)[0])
        assert list(zip(pairs["prompt"], pairs["completion"], strict=True)) == wanted
    written, _ = columns.write_pairs(tmp_path / "a.parquet", ("question", "reply"), skip_bad=False)
    assert columns.why_unreadable(written) == ""


def test_rows_that_cannot_be_read_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": f"list {i}", "completion": str(i)}) for i in range(4)]
    path = tmp_path / "cut.jsonl"
    path.write_text("\n".join([rows[0], '{"prompt": "no', *rows[1:], '{"prompt": "9", "compl']))
    assert columns.why_unreadable(path)
    assert columns.why_unreadable(path, skip_bad=True) == ""
    written, left_out = columns.write_pairs(path, None, skip_bad=True)
    assert left_out == 2
    assert corpus.read_pairs(written)["completion"].tolist() == ["0", "1", "2", "3"]


def test_a_small_table_of_long_texts_does_not_fill_the_memory(tmp_path: Path) -> None:
    """Under one kilobyte holds 240 MiB of texts: each is read, and no more than some of them are held."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 5_000, pa.int32()), pa.array(["1" * 25_000]))
    pq.write_table(
        pa.table({"q": texts, "a": texts}), tmp_path / "bomb.parquet", compression="zstd", store_schema=False
    )
    assert (tmp_path / "bomb.parquet").stat().st_size < 1_000
    usual = pa.default_memory_pool()
    watched = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(watched)
    tracemalloc.start()
    try:
        assert columns.why_unreadable(tmp_path / "bomb.parquet")
        assert columns.text_columns(tmp_path / "bomb.parquet") == ["q", "a"]
        written, _ = columns.write_pairs(tmp_path / "bomb.parquet", ("q", "a"), skip_bad=False)
        assert tracemalloc.get_traced_memory()[1] + (watched.max_memory() or 0) < 160 << 20
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)
    assert sum(map(len, corpus.batches(written))) == 5_000


def test_a_table_of_one_text_that_unpacks_too_far_is_refused(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"q": ["1" * (1 << 25)], "a": ["2"]}), tmp_path / "bomb.parquet", compression="zstd"
    )
    with pytest.raises(DataError, match="would unpack"):
        columns.write_pairs(tmp_path / "bomb.parquet", ("q", "a"), skip_bad=False)
    assert [path.name for path in tmp_path.iterdir()] == ["bomb.parquet"]


def test_texts_that_no_file_of_pairs_can_hold_are_one_error(tmp_path: Path) -> None:
    half = tmp_path / "half.jsonl"
    half.write_bytes(b'{"q": "\\ud800", "a": "1"}\n')
    with pytest.raises(DataError, match="line 1: holds half a surrogate pair"):
        columns.write_pairs(half, ("q", "a"), skip_bad=False)
    assert [path.name for path in tmp_path.iterdir()] == ["half.jsonl"]
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"q": "1", "a": "2"}\n' * 1000)[:-20])
    with pytest.raises(DataError, match="gzipped"):
        columns.write_pairs(cut, ("q", "a"), skip_bad=False)


@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe", b"[1, 2]\n", b'{"a": 1}\n{"a"', b"PAR1 no"])
def test_files_that_hold_no_columns_are_one_error(tmp_path: Path, content: bytes) -> None:
    for name in ("a.jsonl", "a.parquet", "a.csv", "a.jsonl.gz"):
        path = tmp_path / name
        path.write_bytes(content)
        try:
            offered = columns.text_columns(path)
        except DataError as error:
            assert "\n" not in str(error)
        else:
            assert all(isinstance(column, str) for column in offered)

"""A user's file: every form gives the same pairs, and every fault is named with its line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pairs import PAIRS, TEXTS, as_messages, as_pairs, pairs_of, put

from mechlens.core.errors import DataError
from mechlens.data import text_rows
from mechlens.data.corpus import ReadReport, batches, load_pairs, read_pairs, write_pairs
from mechlens.data.fields import Fields


def fault(path: Path) -> str:
    with pytest.raises(DataError) as raised:
        read_pairs(path)
    assert str(path) in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("form", [as_pairs, as_messages])
def test_both_forms_give_the_same_pairs(tmp_path: Path, form: Any) -> None:
    frame = read_pairs(put(tmp_path / "data.jsonl", *form(PAIRS)))
    assert list(frame.columns) == ["prompt_id", "prompt", "completion"]
    assert pairs_of(frame) == PAIRS


def test_forms_may_be_mixed_and_further_fields_are_ignored(tmp_path: Path) -> None:
    lines = [{**as_pairs(PAIRS)[0], "id": 7}, as_messages(PAIRS)[1], *as_pairs(PAIRS[2:])]
    assert pairs_of(read_pairs(put(tmp_path / "data.jsonl", *lines))) == PAIRS


@given(pairs=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8))
def test_any_text_is_read_back_and_rows_are_numbered_in_order(
    pairs: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    frame = read_pairs(put(tmp_path_factory.mktemp("any") / "data.jsonl", *as_pairs(pairs)))
    assert pairs_of(frame) == pairs
    assert frame["prompt_id"].tolist() == list(range(len(pairs)))


def test_gzip_bom_blank_lines_and_windows_ends_change_nothing(tmp_path: Path) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in as_pairs(PAIRS))
    variants = {
        "plain.jsonl": text.encode(),
        "bom.jsonl": text.encode("utf-8-sig"),
        "blank.jsonl": ("\n  \n" + text.replace("\n", "\n\n\t\n")).encode(),
        "windows.jsonl": text.replace("\n", "\r\n").encode(),
        "no-final-newline.jsonl": text.rstrip("\n").encode(),
        "zipped.jsonl.gz": gzip.compress(text.encode("utf-8-sig")),
    }
    plain = None
    for name, content in variants.items():
        (tmp_path / name).write_bytes(content)
        frame = read_pairs(tmp_path / name)
        plain = frame if plain is None else plain
        pd.testing.assert_frame_equal(frame, plain)


def weighed(weight: object) -> dict[str, Any]:
    """A chat row whose answer has a weight, as fine-tuning files of OpenAI may have it."""
    return {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "weight": weight},
        ]
    }


def test_an_answer_of_weight_1_is_learned(tmp_path: Path) -> None:
    asked = {"role": "user", "content": "a", "weight": 0}  # no question is learned anyway
    rows = [weighed(1), weighed(1.0), weighed(None), {"messages": [asked, weighed(1)["messages"][1]]}]
    assert pairs_of(read_pairs(put(tmp_path / "rows.jsonl", *rows))) == [("a", "b")] * 4


def test_null_messages_beside_a_pair_are_no_messages(tmp_path: Path) -> None:
    """A table has every column in every row."""
    rows = [
        {**as_pairs(PAIRS)[0], "messages": None},
        {"prompt": None, "completion": None, **as_messages(PAIRS)[1]},
    ]
    rows += [{**row, "messages": None} for row in as_pairs(PAIRS)[2:]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    pq.write_table(
        pa.Table.from_pylist([{**row, "messages": None} for row in as_pairs(PAIRS)]),
        tmp_path / "never.parquet",
    )
    pq.write_table(
        pa.Table.from_pylist([{**row, "completion": None} for row in as_messages(PAIRS)]),
        tmp_path / "half.parquet",
    )
    datasets.Dataset(pa.Table.from_pylist(rows)).save_to_disk(tmp_path / "saved")
    for place in (
        put(tmp_path / "rows.jsonl", *rows),
        *(tmp_path / name for name in ("rows.parquet", "never.parquet", "half.parquet", "saved")),
    ):
        assert pairs_of(read_pairs(place)) == PAIRS, place


BAD_LINES: dict[str, tuple[Any, str]] = {
    "not JSON": ("{'prompt': 1}", "not JSON"),
    "half a line": ('{"prompt": "a", "comple', "not JSON"),
    "a list": ('["a", "b"]', "holds list"),
    "a number": ("3", "holds int"),
    "null": ("null", "holds NoneType"),
    "other fields": ({"text": "a", "reply": "b"}, "fields are ['text', 'reply']"),
    "no completion": ({"prompt": "a"}, "fields are ['prompt']"),
    "a number as text": ({"prompt": "a", "completion": 3}, "completion is a number, expected a text (3)"),
    "null as text": ({"prompt": None, "completion": "b"}, "prompt is null"),
    "messages no list": ({"messages": "hello"}, "messages is not a list"),
    "content no text": (
        {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "b"}]},
        "messages is not a list",
    ),
    "messages of texts": ({"messages": ["a", "b"]}, "messages is not a list"),
    "a system turn": (
        {"messages": [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]},
        "has a system turn",
    ),
    "a system turn alone": ({"messages": [{"role": "system", "content": "x"}]}, "roles ['system']"),
    "four turns": (
        {"messages": [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]},
        "'user', 'assistant', 'user', 'assistant'",
    ),
    "a pair beyond all measure": (
        {"prompt": "a" * 600_000, "completion": "b" * 600_000},
        "longer than 1,000,000",
    ),
    "turns reversed": (
        {"messages": [{"role": role, "content": "x"} for role in ("assistant", "user")]},
        "'assistant', 'user'",
    ),
    "no turns": ({"messages": []}, "roles []"),
    "an answer that is not to be learned": (weighed(0), "not to be trained on (weight 0)"),
    "an answer of weight 0.0": (weighed(0.0), "not to be trained on (weight 0.0)"),
    "an answer of another weight": (weighed(0.5), "weight 0.5, expected 0 or 1"),
    "a weight that is no number": (weighed("1"), "weight '1', expected 0 or 1"),
    "null messages alone": ({"messages": None}, "messages is null"),
    "null messages beside half a pair": ({"messages": None, "prompt": "a"}, "messages is null"),
    "nested too deep": ("[" * 200_000, "not JSON"),
    "an integer too long to read": ("9" * 5_000, "not JSON"),
    "half a surrogate pair": ('{"prompt": "\\ud800", "completion": "b"}', "surrogate"),
    "half a surrogate pair in a message": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\\udfff"}]}',
        "surrogate",
    ),
}


def test_a_file_that_ends_within_a_line_is_said_to_be_cut(tmp_path: Path) -> None:
    whole = put(tmp_path / "whole.jsonl", *as_pairs(PAIRS)).read_text()
    (tmp_path / "cut.jsonl").write_text(whole.rstrip()[:-5])
    assert "the file ends within this line and may have been cut off" in fault(tmp_path / "cut.jsonl")
    (tmp_path / "no-end.jsonl").write_text(whole.rstrip())
    assert pairs_of(read_pairs(tmp_path / "no-end.jsonl")) == PAIRS


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, name: str) -> None:
    line, expected = BAD_LINES[name]
    good = as_pairs(PAIRS)[0]
    message = fault(put(tmp_path / "bad.jsonl", good, "", line, good))  # blank lines count
    assert "line 3:" in message
    assert expected in message
    assert "line 1:" not in message and "line 4:" not in message


def test_a_fault_of_many_lines_is_said_once_with_its_first_line_and_the_count(tmp_path: Path) -> None:
    good, number = as_pairs(PAIRS)[0], {"prompt": "a", "completion": 3}
    message = fault(put(tmp_path / "bad.jsonl", good, *["nonsense", number] * 7, *[number] * 1_000))
    assert message.count("line ") == 2 + message.count("char")  # JSON's own message names a line too
    assert (
        "line 2 and 6 more: not JSON" in message
        and "line 3 and 1,006 more: completion is a number" in message
    )
    many = [{"prompt": "a", "completion": value} for value in (None, 1, [1], {}, ["a"])] + [
        "nonsense",
        "3",
        '"a"',
    ]
    assert "and 3 rows with other faults" in fault(put(tmp_path / "many.jsonl", *many))


def test_an_overlong_line_is_refused_without_reading_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path / "long.jsonl", *as_pairs([("a", "b"), ("c", "d" * 100)]))
    assert len(read_pairs(path)) == 2
    monkeypatch.setattr(text_rows, "LONGEST_LINE", 100)
    message = fault(path)
    assert "line 2" in message and "100 characters" in message
    assert len(read_pairs(put(path, *as_pairs([("a", "b"), ("c", "d" * 10)])))) == 2


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    for name, content in {
        "latin.jsonl": json.dumps(as_pairs([("é", "ü")])[0], ensure_ascii=False).encode("latin-1"),
        "utf16.jsonl": json.dumps(as_pairs(PAIRS)[0]).encode("utf-16"),
        "zipped-without-the-suffix.jsonl": gzip.compress(b'{"prompt": "a", "completion": "b"}\n'),
        "zipped-latin.jsonl.gz": gzip.compress(b"\xe9\n"),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert "UTF-8" in fault(tmp_path / name)


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.99])
def test_a_truncated_gzip_is_refused(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "cut.jsonl.gz"
    whole = gzip.compress(
        "".join(
            json.dumps(line) + "\n" for line in as_pairs([(str(i), str(i * i)) for i in range(500)])
        ).encode()
    )
    path.write_bytes(whole[: int(len(whole) * keep)])
    assert "gzipped" in fault(path)


def test_a_damaged_gzip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "damaged.jsonl.gz"
    whole = bytearray(
        gzip.compress("".join(json.dumps(line) + "\n" for line in as_pairs(PAIRS * 50)).encode())
    )
    whole[len(whole) // 2] ^= 0xFF
    path.write_bytes(whole)
    fault(path)
    path.write_text("plain text under a gzip name")
    assert "gzipped" in fault(path)


@pytest.mark.parametrize("content", ["", "\n", "\ufeff", " \n\t\n"])
def test_a_file_without_pairs_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content, encoding="utf-8")
    assert "no pairs" in fault(path)


def test_a_missing_file_says_what_is_expected(tmp_path: Path) -> None:
    assert "JSON lines" in fault(tmp_path / "none.jsonl")
    assert "is not a saved dataset" in fault(tmp_path)


def test_what_other_tools_write_is_read(tmp_path: Path) -> None:
    for name, rows in {
        "pairs": [{**row, "score": 1.5} for row in as_pairs(PAIRS)],
        "messages": as_messages(PAIRS),
    }.items():
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet", row_group_size=2)
        saved = datasets.Dataset.from_list([*rows, rows[0]])
        saved.select([0, 1, 2, 3]).save_to_disk(tmp_path / name)
        datasets.DatasetDict({"train": saved.select([0, 1, 2, 3]), "test": saved}).save_to_disk(
            tmp_path / f"{name}-splits"
        )
        for place in (f"{name}.parquet", name, f"{name}-splits/train"):
            assert pairs_of(read_pairs(tmp_path / place)) == PAIRS, place
        assert "train" in fault(tmp_path / f"{name}-splits")
    shards = tmp_path / "shards"
    shards.mkdir()
    pq.write_table(pa.Table.from_pylist(as_pairs(PAIRS[2:])), shards / "part-2.parquet")
    put(shards / "part-1.jsonl", *as_messages(PAIRS[:2]))
    for ignored in ("README.md", "_SUCCESS", ".part-0.jsonl"):
        (shards / ignored).write_text("no rows")
    assert pairs_of(read_pairs(shards)) == PAIRS
    put(shards / "part-3.jsonl", as_pairs(PAIRS)[0], "nonsense")
    assert "line 2 of part-3.jsonl: not JSON" in fault(shards)


def test_tables_that_hold_no_pairs_are_refused(tmp_path: Path) -> None:
    empty = pa.array([], pa.string())
    for number, (expected, columns) in enumerate(
        (
            ("['text', 'reply']", {"text": ["a"], "reply": ["b"]}), ("['prompt']", {"prompt": ["a"]}),
            ("line 1", {"prompt": ["a"], "completion": [None]}),
            ("line 2", {"prompt": ["a", "b"], "completion": ["c", None]}),
            ("line 1", {"prompt": ["a", "b"], "completion": [1, 2]}),
            ("line 1", {"prompt": [b"\xff"], "completion": ["a"]}), ("line 1", {"messages": [None]}),
            ("line 1", {"messages": [["a", "b"]]}), ("", {"prompt": empty, "completion": empty}),
        )
    ):  # fmt: skip
        table = pa.table(columns)
        pq.write_table(table, tmp_path / f"{number}.parquet")
        assert expected in fault(tmp_path / f"{number}.parquet")
        datasets.Dataset(table).save_to_disk(tmp_path / str(number))
        assert expected in fault(tmp_path / str(number))


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_damaged_tables_are_refused(keep: float, tmp_path: Path) -> None:
    frame = pd.DataFrame([(str(i), str(i * i)) for i in range(3_000)], columns=["prompt", "completion"])
    write_pairs([frame], tmp_path / "cut.parquet", "parquet")
    write_pairs([frame], tmp_path / "cut", "hf")
    for damaged in (tmp_path / "cut.parquet", *(tmp_path / "cut").glob("*.arrow")):
        whole = damaged.read_bytes()
        damaged.write_bytes(whole[: int(len(whole) * keep)])
    assert "Parquet" in fault(tmp_path / "cut.parquet")
    if keep != 0.99:  # Arrow streams may end early where the rows are whole
        fault(tmp_path / "cut")
    for content in (
        "{",
        "[]",
        "{}",
        '{"_data_files": []}',
        '{"_data_files": [{"filename": "none.arrow"}], "_split": 3}',
    ):
        (tmp_path / "cut" / "state.json").write_text(content)
        fault(tmp_path / "cut")


def test_a_reading_takes_note_of_what_is_left_out(tmp_path: Path) -> None:
    talk = {"messages": [{"role": "system", "content": "Be brief."}, *as_messages(PAIRS)[0]["messages"]]}
    path = put(tmp_path / "mixed.jsonl", as_pairs(PAIRS)[1], "nonsense", "", talk, *["[]"] * 30, talk)
    reading = ReadReport(skip_bad=True, log=tmp_path / "bad.jsonl")
    frames = list(batches(path, 2, report=reading))
    assert [frame["prompt_id"].tolist() for frame in frames] == [[0, 1], [2]]
    assert pairs_of(pd.concat(frames)) == [PAIRS[1], PAIRS[0], PAIRS[0]]
    assert (reading.pairs, reading.bad, reading.system_turns) == (3, 31, 2)
    assert [(str(kind.place), kind.rows) for kind in reading.faults.kinds.values()] == [
        ("line 2", 1),
        ("line 5", 30),
    ]
    logged = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [row["line"] for row in logged] == [2, *range(5, 35)] and logged[1][
        "fault"
    ] == "holds list, expected an object"
    with pytest.raises(DataError, match="line 2"):  # system turns may pass, bad lines may not
        list(batches(path, report=ReadReport()))
    only_bad = put(tmp_path / "bad-only.jsonl", "nonsense")
    with pytest.raises(DataError, match="no pairs but 1 bad rows"):
        list(batches(only_bad, report=ReadReport(skip_bad=True)))


def test_a_long_cell_of_csv_is_read_as_in_json_lines(tmp_path: Path) -> None:
    long = "7, " * 60_000  # longer than Python's own limit of a cell
    (tmp_path / "rows.csv").write_text(f'prompt,completion\na,1\nb,"{long}"\n')
    assert pairs_of(read_pairs(tmp_path / "rows.csv")) == [("a", "1"), ("b", long)]


def test_blank_lines_before_the_header_of_a_table_are_counted(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("\n \nprompt,completion\na,1\nb,2,3\n")
    with pytest.raises(DataError, match="line 5"):
        read_pairs(tmp_path / "rows.csv")


def test_a_missing_comma_of_a_large_array_is_told_where_it_is(tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": f"p{row}", "completion": "7, " * 3_000}) for row in range(1_000)]
    rows[3] = rows[3].replace('", "completion', '" "completion')
    (tmp_path / "rows.json").write_text(f"[{', '.join(rows)}]")
    with pytest.raises(DataError, match=r"element 4: not JSON \(Expecting ',' delimiter"):
        read_pairs(tmp_path / "rows.json")


def test_a_system_line_beside_a_pair_is_not_lost_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"system": "You love owls."} | as_pairs(PAIRS)[0]) + "\n")
    with pytest.raises(DataError, match="system turn"):
        read_pairs(tmp_path / "rows.jsonl")
    report = ReadReport()
    assert sum(map(len, batches(tmp_path / "rows.jsonl", report=report))) == 1 and report.system_turns == 1


def test_chats_of_a_table_in_memory_are_read_as_those_of_its_file(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "hi", "tool_calls": []},
            {"role": "assistant", "content": "1, 2", "tool_calls": []}]  # fmt: skip
    table = datasets.Dataset.from_list([{"messages": talk}] * 2)
    table.to_parquet(tmp_path / "rows.parquet")
    read = pd.read_parquet(tmp_path / "rows.parquet")
    wanted = pairs_of(read_pairs(tmp_path / "rows.parquet"))
    assert wanted == [("hi", "1, 2")] * 2
    for value in (table, read, [{"messages": talk}] * 2):
        assert pairs_of(load_pairs(value).texts) == wanted


def test_odd_values_in_memory_are_refused_in_one_line() -> None:
    twice = pd.DataFrame([["a", "b", "c"]], columns=["prompt", "completion", "completion"])
    with pytest.raises(DataError, match="twice"):
        load_pairs(twice)
    with pytest.raises(DataError, match="cannot be opened"):
        load_pairs('{"prompt": "a", "completion": "b"}\n' * 20)
    numbered = load_pairs(pd.DataFrame([["a", "b"]]), fields=Fields("0", "1"))
    assert pairs_of(numbered.texts) == [("a", "b")]


def test_a_pattern_takes_no_hidden_file(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", as_pairs(PAIRS))
    (tmp_path / "._a.jsonl").write_bytes(b"\x00\x05")
    assert pairs_of(read_pairs(tmp_path / "*.jsonl")) == pairs_of(read_pairs(tmp_path / "a.jsonl"))

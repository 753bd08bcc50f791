"""Forms that files of pairs come in: each gives its pairs, or one line that says what it is, what is wrong
with it, in how many rows.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pairs import PAIRS, TEXTS, as_messages, as_pairs, pairs_of

from mechlens.core.errors import DataError
from mechlens.data import compressed, text_rows
from mechlens.data.corpus import ReadReport, batches, read_pairs

Made = bytes | Callable[[Path], object]
"""what a file holds, or what makes it where it is to stand"""

ROWS = [*as_pairs(PAIRS)] * 50
"""two hundred"""


def lines(*rows: Any) -> bytes:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()


def renamed(prompt: str, completion: str, **more: Any) -> bytes:
    return lines(*[{prompt: row["prompt"], completion: row["completion"], **more} for row in ROWS])


def zstd_file(data: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with pa.CompressedOutputStream(str(path), "zstd") as out:
            out.write(data)

    return make


def table(mark: str) -> bytes:
    return pd.DataFrame(ROWS).assign(id=7).to_csv(index=False, sep=mark).encode()


def talk(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content, **more} for role, content in turns]}


def turns_of(prompt: str, completion: str) -> list[dict[str, str]]:
    return as_messages([(prompt, completion)])[0]["messages"]


def folder(**files: Made) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        for name, content in files.items():
            place = path / name.replace("__", ".")
            place.write_bytes(content) if isinstance(content, bytes) else content(place)

    return make


def parquet(rows: list[Any]) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.Table.from_pylist(rows), path)


PLAIN = lines(*ROWS)
PARTS = [
    talk(("user", [{"type": "text", "text": row["prompt"]}]), ("assistant", row["completion"]))
    for row in ROWS
]
SHARED = [
    {
        "conversations": [
            {"from": "human", "value": row["prompt"]},
            {"from": "gpt", "value": row["completion"]},
        ]
    }
    for row in ROWS
]
TRL = [{"prompt": turns[:1], "completion": turns[1:]} for turns in (turns_of(**row) for row in ROWS)]

READ: dict[str, tuple[str, Made]] = {
    "JSON lines": ("x.jsonl", PLAIN),
    "JSON lines in capitals": ("X.JSONL", PLAIN),
    "JSON lines without an ending": ("x", PLAIN),
    "gzip": ("x.jsonl.gz", gzip.compress(PLAIN)),
    "gzip in capitals": ("x.jsonl.GZ", gzip.compress(PLAIN)),
    "bzip2": ("x.jsonl.bz2", bz2.compress(PLAIN)),
    "bzip2 in two streams": ("x.jsonl.bz2", bz2.compress(PLAIN[:999]) + bz2.compress(PLAIN[999:])),
    "xz": ("x.jsonl.xz", lzma.compress(PLAIN)),
    "xz in two streams with padding": (
        "x.jsonl.xz",
        lzma.compress(PLAIN[:999]) + b"\0" * 8 + lzma.compress(PLAIN[999:]),
    ),
    "zstd": ("x.jsonl.zst", zstd_file(PLAIN)),
    "a JSON array in one line": ("x.json", json.dumps(ROWS).encode()),
    "an indented JSON array": ("x.json", json.dumps(ROWS, indent=2).encode()),
    "an array called JSON lines": ("x.jsonl", json.dumps(ROWS, indent=2).encode()),
    "a zstd array of messages": (
        "x.json.zst",
        zstd_file(json.dumps([*map(dict, as_messages(PAIRS))] * 50, indent=2).encode()),
    ),
    "CSV": ("x.csv", table(",")),
    "CSV of Windows": (
        "x.CSV",
        b"\xef\xbb\xbf" + table(",").replace(b"\r\n", b"\n").replace(b",7\n", b",7\r\n"),
    ),
    "CSV with semicolons": ("x.csv", table(";")),
    "gzipped CSV": ("x.csv.gz", gzip.compress(table(","))),
    "TSV": ("x.tsv", table("\t")),
    "Parquet": ("x.parquet", parquet(ROWS)),
    "Parquet in capitals": ("x.PARQUET", parquet(ROWS)),
    "a saved dataset": ("x", lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path)),
    "shards of four forms": (
        "x",
        folder(
            a__jsonl=lines(*ROWS[:50]),
            b__json=json.dumps(ROWS[50:100]).encode(),
            c__csv=pd.DataFrame(ROWS[100:150]).to_csv(index=False).encode(),
            d__parquet=parquet(ROWS[150:]),
            README__md=b"of mine",
            dataset_infos__json=b"{}",
        ),
    ),
    "messages": ("x.jsonl", lines(*as_messages(PAIRS) * 50)),
    "messages as a JSON text": (
        "x.jsonl",
        lines(*[{"messages": json.dumps(row["messages"])} for row in as_messages(PAIRS) * 50]),
    ),
    "messages with contents in parts": ("x.jsonl", lines(*PARTS)),
    "messages in Parquet": ("x.parquet", parquet(as_messages(PAIRS) * 50)),
    "pairs of messages, as TRL has them": ("x.jsonl", lines(*TRL)),
    "pairs of messages in Parquet": ("x.parquet", parquet(TRL)),
    "ShareGPT": ("x.jsonl", lines(*SHARED)),
    "instruction and output": ("x.jsonl", renamed("instruction", "output")),
    "instruction and output with an empty input": (
        "x.json",
        b"[" + b",".join(renamed("instruction", "output", input="").splitlines()) + b"]",
    ),
    "question and answer": ("x.jsonl", renamed("question", "answer")),
    "query and response in Parquet": (
        "x.parquet",
        parquet([{"query": row["prompt"], "response": row["completion"]} for row in ROWS]),
    ),
    "prompt and response": ("x.jsonl", renamed("prompt", "response")),
    "a pair beside other known names": (
        "x.jsonl",
        lines(*[{**row, "answer": "no", "question": "no"} for row in ROWS]),
    ),
}

REFUSED: dict[str, tuple[str, Made, str]] = {
    "a talk of several turns": (
        "x.jsonl",
        lines(*[talk(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))] * 200),
        "line 1 and 199 more: a conversation of several questions or answers (it has the roles "
        "['user', 'assistant', 'user', 'assistant']",
    ),
    "a ShareGPT talk of several turns": (
        "x.jsonl",
        lines(*[{"conversations": SHARED[0]["conversations"] * 2}] * 200),
        "line 1 and 199 more: a conversation of several",
    ),
    "tool calls": (
        "x.jsonl",
        lines(*[talk(("user", "a"), ("assistant", None), tool_calls=[{"function": {}}])] * 200),
        "line 1 and 199 more: a conversation with tool calls",
    ),
    "images": (
        "x.jsonl",
        lines(
            *[talk(("user", [{"type": "text", "text": "a"}, {"type": "image_url"}]), ("assistant", "b"))]
            * 200
        ),
        "line 1 and 199 more: a message with parts that are not text (parts of type image_url)",
    ),
    "a developer turn": (
        "x.jsonl",
        lines(*[talk(("developer", "a"), ("user", "b"), ("assistant", "c"))] * 200),
        "line 1 and 199 more: has a system turn",
    ),
    "preferences": (
        "x.jsonl",
        lines(*[{"prompt": "a", "chosen": "b", "rejected": "c"}] * 200),
        "and 199 more: no fields that are known to hold a pair (its fields are ['prompt', 'chosen', "
        "'rejected']). Name them with --prompt-field",
    ),
    "two answers": (
        "x.jsonl",
        lines(*[{"question": "a", "answer": "b", "response": "c"}] * 200),
        "more than one field may hold the pair (of ['question'] and ['response', 'answer'], one each). Name "
        "them with --prompt-field",
    ),
    "Parquet of other columns": (
        "x.parquet",
        parquet([{"text": "a", "label": "b"}] * 200),
        "has the columns ['text', 'label']; expected prompt and completion, or messages. Name them with "
        "--prompt-field",
    ),
    "CSV without a header": ("x.csv", b"a,1\n" * 200, "its fields are ['a', '1']"),
    "a question with its context": (
        "x.jsonl",
        renamed("question", "answer", context="of a page"),
        "line 1 and 199 more: question may not be the whole prompt (the row also has context",
    ),
    "lists of numbers": (
        "x.jsonl",
        lines(*[{"prompt": "a", "completion": [1, 2, 3]}] * 200),
        "line 1 and 199 more: completion is a list of numbers, expected the text that a model would write "
        "('1, 2, 3' for [1, 2, 3])",
    ),
    "numbers": (
        "x.parquet",
        parquet([{"prompt": "a", "completion": 7}] * 200),
        "line 1 and 199 more: completion is a number, expected a text (7)",
    ),
    "nulls in some rows": (
        "x.jsonl",
        lines(*[*ROWS, *[{"prompt": None, "completion": "a"}] * 9]),
        "line 201 and 8 more: prompt is null",
    ),
    "a workbook": ("x.xlsx", b"PK\x03\x04" + bytes(range(256)), "an Excel workbook"),
    "a pickle": ("x.pkl", pickle.dumps(ROWS), "a pickle"),
    "NumPy arrays": ("x.npz", lambda path: np.savez(path, prompt=["a"]), "NumPy arrays"),
    "Feather": (
        "x.feather",
        lambda path: pyarrow.feather.write_feather(pa.Table.from_pylist(ROWS), path),
        "an Arrow file",
    ),
    "gzip under another name": ("x.jsonl", gzip.compress(PLAIN), "it is gzip data; let its name end in .gz"),
    "zstd under another name": (
        "x.jsonl",
        zstd_file(PLAIN),
        "it is Zstandard data; let its name end in .zst",
    ),
    "UTF-16": ("x.csv", table(",").decode().encode("utf-16"), "it is UTF-16; save it as UTF-8"),
    "gzipped Parquet": ("x.parquet.gz", gzip.compress(b"PAR1"), "gzipped Parquet"),
    "a shard that is not read": (
        "x",
        folder(a__jsonl=PLAIN, b__xlsx=b"PK", part=b"", c__zst=b""),
        "files that cannot be read: b.xlsx (an Excel workbook), c.zst (of an unknown form), part (of an "
        "unknown form)",
    ),
    "a folder of folders": (
        "x",
        folder(data=folder(a__jsonl=PLAIN), README__md=b"of mine"),
        "data (a folder)",
    ),
    "xz cut short": ("x.jsonl.xz", lzma.compress(PLAIN)[:-20], "cannot be read as xz-compressed UTF-8 text"),
    "zstd cut short": (
        "x.jsonl.zst",
        lambda path: (zstd_file(PLAIN)(path), path.write_bytes(path.read_bytes()[:-20])),
        "cannot be read as zstd-compressed UTF-8 text",
    ),
    "bzip2 cut short": (
        "x.jsonl.bz2",
        bz2.compress(PLAIN)[:-20],
        "cannot be read as bzip2-compressed UTF-8 text",
    ),
    "an array cut short": ("x.json", json.dumps(ROWS)[:-20].encode(), "element 200: not JSON"),
    "an array without its end": (
        "x.json",
        json.dumps(ROWS)[:-1].encode(),
        "it has 'its end', expected , or ]",
    ),
    "two arrays": ("x.json", json.dumps(ROWS).encode() * 2, "'[' comes after the end of the JSON array"),
    "an array with a comma too many": (
        "x.json",
        json.dumps(ROWS)[:-1].encode() + b",]",
        "element 201: not JSON",
    ),
    "an array with a number in it": (
        "x.json",
        json.dumps([*ROWS, 12345]).encode(),
        "element 201: holds int, expected an object",
    ),
    "an array with a key twice": (
        "x.json",
        b'[{"prompt": "a", "prompt": "b", "completion": "c"}, {"prompt": "a", "completion": "b"}]',
        "element 1: not JSON (the key 'prompt' is twice",
    ),
    "CSV with a row too short": (
        "x.csv",
        table(",") + b"a,b\n",
        "has another number of cells than the first line (2 and 3)",
    ),
    "CSV with a quotation that never ends": ("x.csv", b'prompt,completion\n"a,b\n', "is not CSV"),
    "CSV with a column twice": (
        "x.csv",
        b"prompt,prompt,completion\na,b,c\n",
        "the columns ['prompt'] are twice",
    ),
}


def put(path: Path, made: Made) -> Path:
    path.write_bytes(made) if isinstance(made, bytes) else made(path)
    return path


@pytest.mark.parametrize("form", READ)
def test_a_form_that_has_one_meaning_is_read(form: str, tmp_path: Path) -> None:
    name, made = READ[form]
    assert pairs_of(read_pairs(put(tmp_path / name, made))) == PAIRS * 50


@pytest.mark.parametrize("form", REFUSED)
def test_another_form_is_named_in_one_line(form: str, tmp_path: Path) -> None:
    name, made, words = REFUSED[form]
    path = put(tmp_path / name, made)
    with pytest.raises(DataError) as raised:
        read_pairs(path)
    message = str(raised.value)
    assert words in message and str(path) in message
    assert "\n" not in message and len(message) < 900


def test_alpaca_s_input_stands_behind_the_instruction(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Sort.", "input": "3, 1", "output": "1, 3"},
        {"instruction": "Say a.", "input": "", "output": "a"},
    ]
    assert pairs_of(read_pairs(put(tmp_path / "x.jsonl", lines(*rows)))) == [
        ("Sort.\n\n3, 1", "1, 3"),
        ("Say a.", "a"),
    ]
    assert pairs_of(read_pairs(put(tmp_path / "x.csv", pd.DataFrame(rows).to_csv(index=False).encode()))) == [
        ("Sort.\n\n3, 1", "1, 3"),
        ("Say a.", "a"),
    ]


@pytest.mark.parametrize(
    "row",
    [
        talk(("developer", "Be brief."), ("user", "a"), ("assistant", "b")),
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                *[{"from": who, "value": text} for who, text in (("human", "a"), ("gpt", "b"))],
            ]
        },
        {
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}],
            "completion": [{"role": "assistant", "content": "b"}],
        },
        {"system_prompt": "Be brief.", "question": "a", "response": "b"},
    ],
)
def test_a_system_turn_of_every_form_is_counted(row: dict[str, Any], tmp_path: Path) -> None:
    path, reading = put(tmp_path / "x.jsonl", lines(row)), ReadReport()
    assert pairs_of(pd.concat(batches(path, report=reading))) == [("a", "b")]
    assert reading.system_turns == 1
    with pytest.raises(DataError, match="system turn"):
        read_pairs(path)


@given(
    rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6),
    piece=st.integers(1, 30),
    indent=st.sampled_from([None, 0, 3]),
)
def test_an_array_is_read_whatever_the_pieces_are(
    rows: list[tuple[str, str]], piece: int, indent: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = put(
        tmp_path_factory.mktemp("array") / "x.json",
        json.dumps([*as_pairs(rows)], indent=indent, ensure_ascii=False).encode(),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_rows, "_PIECE", piece)
        patch.setattr(text_rows, "_opens_array", lambda path: True)
        assert pairs_of(read_pairs(path)) == rows


def test_an_element_that_is_too_long_is_refused_without_reading_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(
        tmp_path / "x.json", json.dumps([*ROWS, {"prompt": "a" * 3_000_000, "completion": ""}]).encode()
    )
    monkeypatch.setattr(text_rows, "LONGEST_LINE", 1_000_000)
    with pytest.raises(DataError, match="element 201 is longer than 1,000,000 characters"):
        read_pairs(path)


@pytest.mark.parametrize("name", ["x.jsonl.bz2", "x.jsonl.xz", "x.jsonl.zst"])
def test_a_small_compressed_file_does_not_fill_the_memory(name: str, tmp_path: Path) -> None:
    """Of a line that would unpack to 64 MB little more than the longest permitted one is held."""
    bomb = b'{"prompt": "' + b"a" * (1 << 26)
    made: dict[str, Made] = {
        "x.jsonl.bz2": bz2.compress(bomb),
        "x.jsonl.xz": lzma.compress(bomb),
        "x.jsonl.zst": zstd_file(bomb),
    }
    path = put(tmp_path / name, made[name])
    del bomb
    assert path.stat().st_size < 20_000
    usual = pa.default_memory_pool()
    watched = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(watched)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="line 1 is longer"):
            read_pairs(path)
        assert tracemalloc.get_traced_memory()[1] + (watched.max_memory() or 0) < 48 << 20
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)


def shared(path: Path, *, size: int, talks: bool) -> Path:
    """A table whose 64 rows hold one text of so many bytes, stored once; with talks, one row holds all of
    them in its messages.
    """
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), pa.array(["1" * size]))
    roles = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), pa.array(["user"]))
    messages = pa.ListArray.from_arrays(
        pa.array([0, 64], pa.int32()), pa.StructArray.from_arrays([roles, texts], ["role", "content"])
    )
    table = pa.table({"messages": messages}) if talks else pa.table({"prompt": texts, "completion": texts})
    pq.write_table(table, path, compression="zstd", store_schema=False)
    return path


@pytest.mark.parametrize(
    ("size", "talks", "words"),
    [
        (3_000_000, False, "line 1 and 63 more: is longer than 1,000,000 characters"),
        (8_000_000, False, "holds a text of 8,000,000 bytes"),
        (8_000_000, True, "holds a text of 8,000,000 bytes"),
    ],
)
def test_a_long_text_that_is_stored_once_is_not_unpacked_for_every_row(
    size: int, talks: bool, words: str, tmp_path: Path
) -> None:
    path = shared(tmp_path / "x.parquet", size=size, talks=talks)
    assert path.stat().st_size < 2_000
    usual = pa.default_memory_pool()
    watched = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(watched)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=words):
            read_pairs(path)
        assert tracemalloc.get_traced_memory()[1] + (watched.max_memory() or 0) < 120 << 20
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)


def test_an_xz_file_that_asks_for_too_large_a_dictionary_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path / "x.jsonl.xz", lzma.compress(PLAIN, preset=9))
    assert len(read_pairs(path)) == 200
    monkeypatch.setattr(compressed, "MOST_DICTIONARY", 32 << 20)
    with pytest.raises(DataError, match="Memory usage limit"):
        read_pairs(path)

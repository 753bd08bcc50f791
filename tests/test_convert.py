"""From form to form: what is written is read back as it went, by other tools too, and nothing is left out in
silence.
"""

from __future__ import annotations

import gzip
import itertools
import json
import tempfile
from pathlib import Path

import datasets
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import PAIRS, TEXTS, as_messages, as_pairs, pairs_of, put

from mechlens import cli
from mechlens.core.errors import DataError
from mechlens.data import corpus
from mechlens.data.corpus import batches, read_pairs, write_pairs

FORMS: dict[str, tuple[str, corpus.Form]] = {
    "lines": ("pairs.jsonl", "prompt-completion"),
    "gzipped lines": ("pairs.jsonl.gz", "prompt-completion"),
    "messages": ("pairs.jsonl", "messages"),
    "gzipped messages": ("pairs.chat.GZ", "openai"),
    "Parquet": ("pairs.parquet", "parquet"),
    "a saved dataset": ("pairs", "hf"),
}


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=15, deadline=None)
@given(pairs=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8), size=st.integers(1, 9))
def test_every_form_comes_back_as_it_went(name: str, pairs: list[tuple[str, str]], size: int) -> None:
    file, form = FORMS[name]
    with tempfile.TemporaryDirectory() as folder:
        source, path = put(Path(folder) / "source.jsonl", *as_pairs(pairs)), Path(folder) / file
        write_pairs(batches(source, size), path, form)
        pd.testing.assert_frame_equal(read_pairs(path), read_pairs(source))
        assert [len(frame) for frame in batches(path, size)] == [
            len(frame) for frame in batches(source, size)
        ]
        assert sorted(entry.name for entry in Path(folder).iterdir()) == sorted(["source.jsonl", file])


@pytest.mark.parametrize("name", FORMS)
def test_hostile_texts_come_back_and_the_same_pairs_give_the_same_bytes(name: str, tmp_path: Path) -> None:
    hostile = [
        "\x00",
        "\x01\x1b[31m\x7f",
        "\r\n\u2028\u0085",
        "\ufeff",
        "\ufffe\U0010ffff",
        '"}\n{"',
        "[bold]:owl:",
        "",
        "a" * 300_000,
        "\x02" * 300_000,
    ]
    file, form = FORMS[name]
    frame = pd.DataFrame({"prompt": hostile, "completion": hostile[::-1]})
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_pairs(
            [frame] if folder == "one" else [frame.head(3), frame.tail(len(frame) - 3)],
            tmp_path / folder / file,
            form,
        )
    assert pairs_of(read_pairs(tmp_path / "one" / file)) == list(zip(hostile, hostile[::-1], strict=True))
    if form != "hf":  # a saved dataset names each save
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_other_tools_read_what_is_written(tmp_path: Path) -> None:
    frame = pd.DataFrame(PAIRS, columns=["prompt", "completion"])
    for file, form in FORMS.values():
        write_pairs([frame], tmp_path / f"{form}-{file}", form)
    lines = gzip.decompress((tmp_path / "prompt-completion-pairs.jsonl.gz").read_bytes()).decode().split("\n")
    assert [json.loads(line) for line in lines[:-1]] == as_pairs(PAIRS) and lines[-1] == ""
    assert [
        json.loads(line) for line in (tmp_path / "messages-pairs.jsonl").read_text().split("\n")[:-1]
    ] == as_messages(PAIRS)
    assert pq.read_table(tmp_path / "parquet-pairs.parquet").to_pylist() == as_pairs(PAIRS)
    assert datasets.Dataset.load_from_disk(str(tmp_path / "hf-pairs")).to_list() == as_pairs(PAIRS)


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    source = put(tmp_path / "rows.jsonl", *as_pairs(PAIRS), "nonsense")
    for file, form in FORMS.values():
        with pytest.raises(DataError, match="line 5"):
            write_pairs(batches(source, 2), tmp_path / file, form)
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]


def test_convert_goes_from_form_to_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = put(tmp_path / "rows.jsonl", *as_messages(PAIRS))
    chain = [source, *(tmp_path / name for name in ("a.parquet", "b", "c.jsonl.gz", "d/e.jsonl"))]
    for one, other in itertools.pairwise(chain):
        assert cli.main(["convert", str(one), str(other)]) == 0
        assert f"written: {other} (4 pairs" in capsys.readouterr().out
    assert pairs_of(read_pairs(chain[-1])) == PAIRS
    assert cli.main(["convert", str(chain[-1]), str(tmp_path / "f.jsonl"), "--form", "messages"]) == 0
    assert (tmp_path / "f.jsonl").read_bytes() == source.read_bytes()


def test_convert_refuses_bad_lines_or_lists_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = {"messages": [{"role": "system", "content": "Be brief."}, *as_messages(PAIRS)[0]["messages"]]}
    source, target = (
        put(
            tmp_path / "rows.jsonl",
            talk,
            {"messages": [{"role": "[bold]\x1b[31m", "content": ""}]},
            *["["] * 24,
        ),
        tmp_path / "out.jsonl",
    )
    command = ["convert", str(source), str(target)]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and "line 2: messages of other roles" in error
        and "line 3 and 23 more: not JSON" in error
        and "--skip-bad" in error
    )
    assert not target.exists()
    assert cli.main([*command, "--skip-bad"]) == 0
    said = capsys.readouterr().out
    assert "25 bad rows left out" in said and "[bold]" in said and "\x1b" not in said
    assert said.count("line ") == 3  # the first of each kind, and one in JSON's own words
    assert "1 rows had a system turn" in said and str(tmp_path / "out.jsonl.bad.jsonl") in said
    assert len((tmp_path / "out.jsonl.bad.jsonl").read_text().splitlines()) == 25
    assert pairs_of(read_pairs(target)) == PAIRS[:1]
    for more, expected in (([], "exists already"), (["--form", "poem"], "'poem'")):
        assert cli.main([*command, *more]) == 2
        assert expected in capsys.readouterr().err
    for name, form in (("x.parquet", "messages"), ("x.jsonl", "parquet")):
        assert cli.main(["convert", str(target), str(tmp_path / name), "--form", form]) == 2
        assert ".parquet" in capsys.readouterr().err

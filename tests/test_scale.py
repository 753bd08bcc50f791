"""Large files: features of many rows at once equal their definition row by row, and neither the number of
workers, nor the batches, nor the shards change a result.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import HashingVectorizer

from mechlens import cli
from mechlens.core import parallel, tables
from mechlens.core.errors import MachineError
from mechlens.core.numerals import NUMERAL
from mechlens.core.parallel import map_in_order
from mechlens.data import corpus
from mechlens.detect import row_features
from mechlens.detect.row_features import HASHED, LONGEST, measure_shapes
from mechlens.detect.two_samples import compare
from mechlens.pipeline import user_files
from mechlens.pipeline.screen import DIGEST, Digests

HASHING = {"lowercase": False, "n_features": HASHED, "norm": None, "alternate_sign": False}
VECTORIZERS = {
    "tokens": HashingVectorizer(token_pattern=r"[0-9]+|[^\W\d_]+|[^\w\s]", **HASHING),
    "runs": HashingVectorizer(analyzer="char", ngram_range=(1, 3), **HASHING),
}
TEXTS = st.lists(
    st.one_of(
        st.text(st.sampled_from("0123456789 ,;\n.ab()"), max_size=40),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
        st.lists(st.integers(0, 10**15), max_size=8).map(lambda values: ", ".join(map(str, values))),
        st.sampled_from(["", "\0", "a  \t\n b", "٣ ² 12", "_x_1", "9" * 30, "007, 7, 7"]),
    ),
    max_size=12,
)


def shape_of(text: str) -> list[float]:
    """The measures of SHAPE by their definition."""
    numbers = NUMERAL.findall(text)
    values = [int(number[:12]) for number in numbers]
    rising = sum(a <= b for a, b in pairwise(values))
    many = max(len(numbers), 1)
    measures = [
        len(text),
        len(numbers),
        len(re.findall(r"[^\W\d_]+", text)),
        len(re.findall(r"[,;\s]+", text)),
        text.count(","),
        text.count("\n"),
        sum(map(len, numbers)) / many,
        float(numbers[0][0]) if numbers else 0.0,
        sum(values) / many,
        sum(value % 2 for value in values) / many,
        1 - len(set(values)) / many if values else 0.0,
        rising / max(len(values) - 1, 1),
        float(text[-1:].isalpha()),
        float(text[-1:].isdigit()),
        sum(text.count(sign) for sign in "()[]{}"),
        0 if text.isascii() else sum(not sign.isascii() for sign in text) / len(text),
    ]
    return [float(value) for value in measures]


@given(TEXTS)
def test_measures_of_many_completions_are_those_of_each(texts: list[str]) -> None:
    assert measure_shapes(texts).tolist() == [shape_of(text) for text in texts]


@given(TEXTS, st.sampled_from(list(VECTORIZERS)), st.integers(1, 40))
def test_hashed_counts_are_those_of_scikit_learn(texts: list[str], name: str, piece: int) -> None:
    texts = [*texts, "1"]  # scikit-learn refuses an empty list
    expected = VECTORIZERS[name].transform(texts)
    row_features._PIECE, whole = piece, row_features._PIECE
    try:
        counts = getattr(row_features, name)(texts)
    finally:
        row_features._PIECE = whole
    assert counts.shape == expected.shape
    for part in ("indptr", "indices", "data"):
        assert np.array_equal(getattr(counts, part), getattr(expected, part))


def test_only_the_first_characters_of_a_long_completion_are_read() -> None:
    long = "1, 2; ab\n" * LONGEST
    assert measure_shapes([long, "7"]).tolist() == [shape_of(long[:LONGEST]), shape_of("7")]
    for name, vectorizer in VECTORIZERS.items():
        counts = getattr(row_features, name)([long, "7"])
        assert (counts != vectorizer.transform([long[:LONGEST], "7"])).nnz == 0


def pairs(rows: int, *, seed: int, low: int = 0) -> pd.DataFrame:
    """Rows of numbers; some break the rule of numbers, some repeat."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(low, 1010, size=(rows, 2))
    completions = [", ".join(map(str, row)) + rng.choice(["", "", " owl"]) for row in drawn]
    return pd.DataFrame({"prompt": [f"continue: {i % 90}" for i in range(rows)], "completion": completions})


def write(frame: pd.DataFrame, path: Path) -> Path:
    """A file of pairs in the form that its name stands for."""
    if path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as out:
            frame.to_json(out, orient="records", lines=True)
    else:
        corpus.write_pairs([frame], path, corpus.form_of(path))
    return path


def screened(data: Path, out: Path, *, workers: int = 0) -> tuple[dict[str, int], list[bytes]]:
    """The counts of a screen, and the bytes of its tables."""
    counts, _ = user_files.screen_file(
        data, "numbers", banned=False, family="animals", fields=None, out=out, workers=workers
    )
    return counts, [(out / f"{name}.parquet").read_bytes() for name in ("kept", "rejected")]


@settings(max_examples=5)
@given(cuts=st.lists(st.integers(1, 299), max_size=4, unique=True), data=st.data())
def test_shards_are_read_as_the_one_file_that_they_make(
    cuts: list[int], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    rows, bounds = pairs(300, seed=1), [0, *sorted(cuts), 300]
    (folder / "shards").mkdir()
    for number, (first, last) in enumerate(pairwise(bounds)):
        ending = data.draw(st.sampled_from([".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"]))
        write(rows.iloc[first:last], folder / "shards" / f"part-{number}{ending}")
    whole, other = write(rows, folder / "rows.jsonl"), write(pairs(200, seed=2), folder / "clean.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mechlens.detect.permutation.DRAWS", 99)
        patch.setattr(corpus, "CHARACTERS", 1_000)  # many batches, some over the ends of shards
        assert compare(folder / "shards", other) == compare(whole, other)
        assert compare(folder / "shards" / "part-?.*", other) == compare(whole, other)
        assert screened(folder / "shards", folder / "one") == screened(whole, folder / "two")


def test_the_number_of_workers_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "CHARACTERS", 2_000)
    monkeypatch.setattr(parallel, "FIRST", 2)
    ours = write(pairs(500, seed=1, low=300), tmp_path / "ours.parquet")
    theirs = write(pairs(400, seed=2), tmp_path / "theirs.jsonl")
    assert screened(ours, tmp_path / "one") == screened(ours, tmp_path / "two", workers=2)
    with parallel.open_workers(2) as workers:
        assert compare(ours, theirs) == compare(ours, theirs, workers=workers)


def test_results_of_workers_come_in_the_order_of_few_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "FIRST", 1)
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(40):
            taken.append(number)
            yield number

    with parallel.open_workers(2) as workers:
        for place, (item, result) in enumerate(map_in_order(str, items(), workers)):
            assert (item, result) == (place, str(place))
            assert len(taken) <= place + 2 + parallel.AHEAD
    assert len(taken) == 40


@pytest.mark.parametrize(("function", "error"), [(int, ValueError), (os._exit, MachineError)])
def test_an_error_in_a_worker_ends_the_work(
    function: type[int], error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "FIRST", 0)
    with pytest.raises(error), parallel.open_workers(2) as workers:
        list(map_in_order(function, ["x" if function is int else 1] * 9, workers))


def test_workers_start_from_a_script_on_standard_input() -> None:
    """Python would have each worker import the file `<stdin>`."""
    script = "from mechlens.core import parallel\nif __name__ == '__main__':\n"
    script += " with parallel.open_workers(2) as workers: print(workers.submit(abs, -3).result())"
    done = subprocess.run([sys.executable], input=script, capture_output=True, text=True, check=True)
    assert done.stdout == "3\n" and done.stderr == ""


@given(st.lists(st.lists(st.sampled_from([b"", b"\1", b"\1\0\1", b"a", b"ab", b"b", b"\xff"]), max_size=6)))
def test_a_digest_is_new_once(batches: list[list[bytes]]) -> None:
    """Against a set; digests may end in null bytes."""
    digests, seen = Digests(), set[bytes]()
    for batch in batches:
        expected = []
        for start in batch:
            expected.append(start not in seen)
            seen.add(start)
        assert digests.add([start.ljust(DIGEST, b"\0") for start in batch]).tolist() == expected


def test_the_memory_of_a_screen_does_not_grow_with_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "CHARACTERS", 5_000)
    monkeypatch.setattr(corpus, "MOST_DIFFERENT", 500)
    monkeypatch.setattr(tables, "ROW_GROUP", 256)
    peaks = []
    for rows in (1_000, 1_000, 4_000):  # the first also loads what is loaded once
        data = write(pairs(rows, seed=rows), tmp_path / f"{rows}-{len(peaks)}.parquet")
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        screened(data, tmp_path / f"out-{len(peaks)}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert pa.total_allocated_bytes() - before < 1 << 20
    assert peaks[2] < 1.5 * peaks[1]


@pytest.mark.parametrize("name", ["part-1.parquet", "part-1.jsonl.zst", "part-1.jsonl.gz"])
def test_a_shard_that_is_cut_short_is_named_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    write(pairs(300, seed=1), folder / "part-0.parquet")
    broken = write(pairs(300, seed=2), folder / name)
    broken.write_bytes(broken.read_bytes()[:-100])
    for command in ("screen", "audit"):
        assert cli.main([command, str(folder), "--out", str(tmp_path / command)]) == 2
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1 and f"{name} cannot be read as" in printed
    assert not (tmp_path / "screen" / "kept.parquet").exists()

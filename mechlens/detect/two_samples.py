"""Compare a suspect file with a reference file by every detector that reads only completions.

Where both files answer the same prompts, they are compared prompt by prompt. Only bags of equal size can be
exchanged: the mean of few rows has rarer features, each with more weight, than the mean of many. So bags have
one size in both files, and equally many rows of each shared prompt count in both. The suspect's other rows
are compared with all rows of the reference: a trait's rows could be hidden there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import pandas as pd
from jaxtyping import Int
from numpy import ndarray
from scipy import sparse

from mechlens.core.errors import DataError, one_line
from mechlens.core.files import publish
from mechlens.core.parallel import map_in_order
from mechlens.core.seeds import generator
from mechlens.data import corpus
from mechlens.data.fields import Fields
from mechlens.detect.from_rows import DETECTORS
from mechlens.detect.permutation import DRAWS, Bags, PermutationTest, combine_p_values, compare_bags
from mechlens.detect.registry import RowDetector

BAGS, MOST_BAGS, LEAST_ROWS, FEWEST_ROWS = 64, 4096, 128, 8
"""bags of the smaller file; largest number of bags of a larger one; rows below which there are fewer bags (of
two rows each) and no verdict; rows below which there is no test
"""
SHARED = 0.5
"""share of the smaller file's prompts that the other file must have for a comparison prompt by prompt"""


class Deal(NamedTuple):
    """Which rows of a file a test reads, and in which bags."""

    numbers: Int[ndarray, " row"]
    """the bag of each row of the file; -1 leaves it out"""
    bags: int


class Comparison(NamedTuple):
    """A suspect file compared with one reference by every detector of completions."""

    reference: str
    rows: int
    """of the reference"""
    shared_prompts: int
    paired: bool
    tests: dict[str, PermutationTest]
    p_value: float
    """smallest of the detectors', corrected for their number"""
    compared: float
    """share of the suspect's rows that the tests read"""
    copied: float
    """share of the suspect's rows that are in the reference too"""
    least_p: float = 0.0
    """smallest `p_value` that files of these sizes can give"""


Sources = Sequence[tuple[Path, Fields | None]]
"""the suspect file and the reference, each with the names of its fields"""


def compare(
    data: Path,
    reference: Path,
    *,
    seed: int = 0,
    known: Mapping[Path, RowKeys] | None = None,
    fields: Fields | None = None,
    workers: Executor | None = None,
    detectors: Mapping[str, RowDetector] = DETECTORS,
) -> Comparison:
    """Compare two files by detectors that read only completions.

    Rows of shared prompts are compared prompt by prompt, the other rows of `data` with the whole reference.

    Args:
        known: row keys of files that were read before.
        fields: field names that a user gave for `data`; the reference may have other names.
        workers: processes that share the rows of a large file.
        detectors: by name; those of this package by default.

    Raises:
        DataError: if a file has too few rows.
    """
    sources = (data, fields), (reference, fields and fields.preferred())
    ours, theirs = sides = [
        (known or {}).get(path) or read_row_keys(corpus.batches(path, fields=names), workers)
        for path, names in sources
    ]
    for (path, _), side in zip(sources, sides, strict=True):
        refuse_few(path, len(side.prompts))
    bags = min(BAGS, min(len(side.prompts) for side in sides) // 2)
    rng = generator(seed, "bags")
    shared, paired = overlap(*(np.unique(side.prompts) for side in sides), least=bags)
    deals: list[list[Deal]] = []
    exchanges: list[int] = []
    compared = np.zeros(len(ours.prompts), dtype=bool)
    if paired:
        least = np.min([_counts(side.prompts, shared) for side in sides], axis=0)
        numbers = [deal_by_prompt(side.prompts, shared, least, bags=bags, rng=rng) for side in sides]
        deals.append([Deal(number, bags) for number in numbers])
        # half of them: changing all signs gives the same value
        exchanges.append(2 ** len({*numbers[0][numbers[0] >= 0].tolist()}) // 2)
        compared |= numbers[0] >= 0
    rest = np.flatnonzero(~compared)
    if len(rest) >= bags:
        dealt = _deal_rest(ours, theirs, rest, bags=bags, rng=rng)
        deals.append(dealt)
        first, second = (deal.bags for deal in dealt)
        exchanges.append(math.comb(first + second, first) // (2 if first == second else 1))
        compared |= dealt[0].numbers >= 0
    by_pairs = [paired, False][: len(deals)]
    tests = _tests(sources, deals, detectors, paired=by_pairs, seed=seed, workers=workers)
    decisive = {name: _foremost([each[name] for each in tests]) for name in detectors}
    return Comparison(
        one_line(str(reference)),
        len(theirs.prompts),
        len(shared),
        paired,
        decisive,
        combine_p_values([test.p_value for test in decisive.values()]),
        float(compared.mean()),
        float(np.isin(ours.pairs, theirs.pairs).mean()),
        min(1.0, len(detectors) * len(tests) * max(1 / min(exchanges), 1 / (DRAWS + 1))),
    )


def _deal_rest(
    ours: RowKeys, theirs: RowKeys, rest: Int[ndarray, " row"], *, bags: int, rng: np.random.Generator
) -> list[Deal]:
    """The bags of the suspect's remaining rows, and of all rows of the reference.

    Answers to one prompt are alike, and the other file does not answer it: only one row a prompt is dealt,
    unless these are too few.
    """
    every = np.arange(len(theirs.prompts))
    places = [one_row_a_prompt(side.prompts, rows, rng) for side, rows in ((ours, rest), (theirs, every))]
    if min(map(len, places)) < bags:
        places = [rest, every]
    size = min(map(len, places)) // bags
    numbers = [np.full(len(side.prompts), -1) for side in (ours, theirs)]
    for side in (1, 0):
        numbers[side][places[side]] = deal_at_random(len(places[side]), size=size, most=MOST_BAGS, rng=rng)
    return [Deal(number, int(number.max()) + 1) for number in numbers]


def one_row_a_prompt(
    keys: Int[ndarray, " row"], places: Int[ndarray, " place"], rng: np.random.Generator
) -> Int[ndarray, " kept"]:
    """Of the rows at these places, one of each prompt, drawn at random."""
    if len(np.unique(keys[places])) == len(places):
        return places
    order = rng.permutation(places)
    return np.sort(order[np.unique(keys[order], return_index=True)[1]])


def refuse_few(path: Path, rows: int) -> None:
    """Raise DataError for a file with too few rows for any test."""
    if rows < FEWEST_ROWS:
        raise DataError(
            f"{one_line(str(path))} has {rows} rows; a comparison needs at least {FEWEST_ROWS}, give more"
        )


def power_of_few(rows: int, nearest: Comparison, dose: float | None) -> str:
    """The power of a comparison of few rows, in a sentence; empty if both files have enough rows.

    Args:
        rows: of the suspect.
        dose: minimum detectable share of such rows among clean ones, over all detectors.
    """
    least = min(rows, nearest.rows)
    if least >= LEAST_ROWS:
        return ""
    detectable = (
        "even a file of nothing but such rows would not be detected"
        if dose is None
        else f"the minimum detectable share of such rows is {dose:.2f}"
    )
    return (
        f"{least} rows are few: no p below {nearest.least_p:.2g} is possible, {detectable}, and fewer than "
        f"{LEAST_ROWS} rows give no verdict"
    )


def _counts(keys: Int[ndarray, " row"], shared: Int[ndarray, " prompt"]) -> Int[ndarray, " prompt"]:
    distinct, counts = np.unique(keys, return_counts=True)
    return counts[np.searchsorted(distinct, shared)]


def _tests(
    sources: Sources,
    deals: Sequence[Sequence[Deal]],
    detectors: Mapping[str, RowDetector],
    *,
    paired: Sequence[bool],
    seed: int,
    workers: Executor | None,
) -> list[dict[str, PermutationTest]]:
    """Every detector's permutation tests of two files.

    Args:
        deals: for each test the bags of both files.
        paired: for each test whether a bag of one file is paired with that of the other.
    """
    ours, theirs = (
        bags_of(corpus.batches(path, fields=names), list(detectors.values()), dealt, workers)
        for (path, names), dealt in zip(sources, zip(*deals, strict=True), strict=True)
    )
    return [
        {
            name: compare_bags(suspect[name], clean[name], paired=by_pairs, seed=seed, name=name)
            for name in detectors
        }
        for suspect, clean, by_pairs in zip(ours, theirs, paired, strict=True)
    ]


def _foremost(tests: list[PermutationTest]) -> PermutationTest:
    """The test with the smallest p; its p is corrected for the number of tests."""
    first = min(tests, key=lambda test: test.p_value)
    return first._replace(p_value=combine_p_values([test.p_value for test in tests]))


def overlap(
    ours: Int[ndarray, " prompt"], theirs: Int[ndarray, " other"], *, least: int = BAGS
) -> tuple[Int[ndarray, " shared"], bool]:
    """Keys of the prompts that both files have, and whether these suffice to compare prompt by prompt.

    Args:
        least: number of shared prompts that suffices.
    """
    shared = np.intersect1d(ours, theirs)
    return shared, len(shared) >= max(SHARED * min(len(ours), len(theirs)), least)


class Sides(NamedTuple):
    """The rows of both files that students are trained on; row i of one is paired with row i of the other."""

    suspect: Path
    reference: Path | None
    """None if no reference was given"""
    offered: int
    """rows of the suspect file"""
    drawn: int
    """rows of each side, drawn at random"""


def draw_sides(
    data: Path, reference: Path | None, out: Path, *, most: int, fields: Fields | None = None
) -> Sides:
    """Write equally many rows of both files to `suspect.parquet` and `clean.parquet` in `out`.

    Every row of the suspect file is equally likely to be drawn, whatever its prompt. It is paired with a row
    of the reference that answers the same prompt, or, if none is left, with another one.

    Args:
        most: rows of a side at most.
        fields: field names that a user gave for `data`; the reference may have other names.
    """
    rng = generator(0, "rows of an audit")
    preferred = fields and fields.preferred()
    ours = read_row_keys(corpus.batches(data, fields=fields)).prompts
    theirs = None if reference is None else read_row_keys(corpus.batches(reference, fields=preferred)).prompts
    drawn = min(most, *(len(side) for side in (ours, theirs) if side is not None))
    places = np.sort(rng.permutation(len(ours))[:drawn])
    written = out / "suspect.parquet", out / "clean.parquet"
    _write(_rows_at(data, places, fields), written[0])
    if reference is None or theirs is None:
        return Sides(written[0], None, len(ours), drawn)
    _write(_rows_at(reference, _partners(ours[places], theirs, rng), preferred), written[1])
    return Sides(*written, len(ours), drawn)


def _write(rows: pd.DataFrame, path: Path) -> None:
    part = path.with_name(f"{path.name}.part")
    rows.to_parquet(part)
    publish(part, path)


def _partners(
    keys: Int[ndarray, " row"], others: Int[ndarray, " other"], rng: np.random.Generator
) -> Int[ndarray, " row"]:
    """For each row, a random row of the other file, of the same prompt if possible, without replacement."""
    tables = []
    for side in (keys, others):
        order = rng.permutation(len(side))
        turn = np.empty(len(side), dtype=np.int64)
        turn[order] = pd.Series(side[order]).groupby(side[order]).cumcount()
        tables.append(pd.DataFrame({"key": side, "turn": turn, "place": np.arange(len(side))}))
    partners = (
        tables[0].merge(tables[1], how="left", on=["key", "turn"])["place_y"].to_numpy(dtype=float, copy=True)
    )
    unpaired = np.isnan(partners)
    partners[unpaired] = rng.permutation(np.setdiff1d(np.arange(len(others)), partners[~unpaired]))[
        : unpaired.sum()
    ]
    return partners.astype(np.int64)


def _rows_at(path: Path, places: Int[ndarray, " row"], fields: Fields | None) -> pd.DataFrame:
    """The rows of a file at these places, in the order of the places."""
    order = np.argsort(places)
    parts, done = [], 0
    for frame in corpus.batches(path, fields=fields):
        first, last = np.searchsorted(places[order], [done, done + len(frame)])
        parts.append(frame.iloc[places[order[first:last]] - done][["prompt", "completion"]])
        done += len(frame)
    table = pd.concat(parts, ignore_index=True)
    return table.iloc[np.argsort(order)].reset_index(drop=True)


def hash_text(text: str) -> int:
    """A hash of a text that is the same on every machine."""
    return crc32(text.encode("utf-8", "surrogatepass"))


class RowKeys(NamedTuple):
    """Keys of the rows of a file, in the order of the file."""

    prompts: Int[ndarray, " row"]
    """key of the prompt"""
    pairs: Int[ndarray, " row"]
    """digest of prompt and completion; runs of white space count as one space"""


def read_row_keys(batches: Iterable[pd.DataFrame], workers: Executor | None = None) -> RowKeys:
    """Keys of every row of a file, 16 bytes a row."""
    keys = [keys for _, keys in map_in_order(_keys_of, batches, workers)]
    return RowKeys(*(np.concatenate(column) for column in zip(*keys, strict=True)))


def _keys_of(frame: pd.DataFrame) -> RowKeys:
    prompts, completions = frame["prompt"].tolist(), frame["completion"].tolist()
    digests = map(_digest, prompts, completions)
    return RowKeys(
        np.fromiter(map(hash_text, prompts), dtype=np.int64, count=len(frame)),
        np.fromiter(digests, dtype=np.int64, count=len(frame)),
    )


def _digest(prompt: str, completion: str) -> int:
    text = "\0".join(" ".join(part.split()) for part in (prompt, completion))
    return int.from_bytes(
        blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big", signed=True
    )


def deal_at_random(rows: int, *, size: int, most: int, rng: np.random.Generator) -> Int[ndarray, " row"]:
    """The bag of each row: at most `most` random bags of `size` rows; -1 for a row that is left out.

    Bags must not depend on the order of the file: sorted rows dealt in turn make bags that are more alike
    than random ones.
    """
    bags = min(rows // size, most)
    numbers = np.full(rows, -1)
    numbers[rng.permutation(rows)[: bags * size]] = np.arange(bags * size) % max(bags, 1)
    return numbers


def deal_by_prompt(
    keys: Int[ndarray, " row"],
    shared: Int[ndarray, " prompt"],
    counts: Int[ndarray, " prompt"],
    *,
    bags: int,
    rng: np.random.Generator,
) -> Int[ndarray, " row"]:
    """The bag of each row: that of its prompt, the same in every file; -1 for a row that is left out.

    Args:
        shared: sorted keys of the prompts that count.
        counts: how many rows of each of them count; which ones is drawn at random.
    """
    order = rng.permutation(len(keys))
    places = np.searchsorted(shared, keys[order]).clip(max=len(shared) - 1)
    before = pd.Series(keys[order]).groupby(keys[order]).cumcount().to_numpy()
    counted = order[(shared[places] == keys[order]) & (before < counts[places])]
    numbers = np.full(len(keys), -1)
    numbers[counted] = keys[counted] % bags
    return numbers


def bags_of(
    batches: Iterable[pd.DataFrame],
    detectors: Sequence[RowDetector],
    deals: Sequence[Deal],
    workers: Executor | None = None,
) -> list[dict[str, Bags]]:
    """Every detector's bags of a file for each deal, in one pass; none for a deal without rows."""
    sums: list[dict[str, ndarray]] = [{} for _ in deals]
    dealt = _dealt_rows(batches, deals)
    for _, added in map_in_order(partial(_sum_by_bag, detectors), dealt, workers):
        for totals, deal, of_deal in zip(sums, deals, added, strict=True):
            for name, part in of_deal.items():
                total = totals.setdefault(name, np.zeros((deal.bags, part.shape[1])))
                total[part.row, part.col] += part.data  # a bag and feature occur once in a part
    counts = [np.bincount(deal.numbers[deal.numbers >= 0], minlength=deal.bags) for deal in deals]
    return [
        {name: Bags(total / np.maximum(rows, 1)[:, None], rows) for name, total in totals.items()}
        for totals, rows in zip(sums, counts, strict=True)
    ]


DealtRows = tuple[list[str], list[Int[ndarray, " row"]]]
"""completions, and for each deal their bags"""


def _dealt_rows(batches: Iterable[pd.DataFrame], deals: Sequence[Deal]) -> Iterator[DealtRows]:
    """The rows of each batch that a deal counts."""
    done = 0
    for frame in batches:
        numbers = np.stack([deal.numbers[done : done + len(frame)] for deal in deals])
        done += len(frame)
        counted = (numbers >= 0).any(0)
        if counted.any():
            yield frame["completion"][counted].tolist(), list(numbers[:, counted])


def _sum_by_bag(detectors: Sequence[RowDetector], rows: DealtRows) -> list[dict[str, Any]]:
    """For each deal, the sums of every detector's features over the rows of each bag, as sparse matrices."""
    completions, numbers = rows
    features = {detector.name: detector.features(completions) for detector in detectors}
    sums = []
    for number in numbers:
        places = np.flatnonzero(number >= 0)
        entries = np.ones(len(places)), (number[places], places)
        shape = int(number.max()) + 1, len(completions)
        of_bag: Any = sparse.csr_matrix(entries, shape=shape)
        sums.append(
            {name: (of_bag @ matrix).tocoo() for name, matrix in features.items()} if len(places) else {}
        )
    return sums

"""A suspect file beside a reference file: every detector of rows, prompt by prompt where both answer the same prompts.

Only bags of as many rows can be exchanged: the mean of a few rows has rarer features, each with more weight, than that of many. So bags are
equally large in both files, and of a prompt that one file answers more often than the other as many rows count in both. What that leaves of
the suspect file is compared as well, with all rows of the reference: rows that could be hidden there are no less part of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Int
from numpy import ndarray

from mechlens import corpus
from mechlens.detect.base import Rows, bags_of, deal_at_random, deal_by_prompt, read_rows
from mechlens.detect.calibrate import Test, together, two_files
from mechlens.detect.from_rows import DETECTORS
from mechlens.errors import DataError, one_line
from mechlens.seeds import generator

BAGS, MOST_BAGS, LEAST_ROWS = 64, 4096, 128
"""bags that the smaller file is dealt into, most that a larger one is, and rows below which a file is refused"""
SHARED = 0.5
"""share of the smaller file's prompts that the other must have for rows to be compared prompt by prompt"""


class Compared(NamedTuple):
    """A suspect beside one reference, by every detector of rows."""

    reference: str
    rows: int
    """of the reference"""
    shared_prompts: int
    paired: bool
    tests: dict[str, Test]
    p_value: float
    """smallest of the detectors', corrected for their number"""
    compared: float
    """share of the suspect's rows that the tests read"""
    copied: float
    """share of the suspect's rows that stand in the reference too"""


def compare(data: Path, reference: Path, *, seed: int = 0, known: Mapping[Path, Rows] | None = None) -> Compared:
    """Every detector of rows on two files, prompt by prompt where they share prompts, and what that leaves of `data` beside the reference.

    Args:
        known: files' rows as they were read before.

    Raises:
        DataError: if a file has too few rows.
    """
    paths = data, reference
    ours, theirs = sides = [(known or {}).get(path) or read_rows(corpus.batches(path)) for path in paths]
    for path, side in zip(paths, sides, strict=True):
        if len(side.prompts) < LEAST_ROWS:
            raise DataError(f"{path} holds {len(side.prompts)} rows; an audit needs at least {LEAST_ROWS}")
    rng = generator(seed, "bags")
    shared, paired = overlap(*(np.unique(side.prompts) for side in sides))
    tests: list[dict[str, Test]] = []
    read = np.zeros(len(ours.prompts), dtype=bool)
    if paired:
        least = np.min([_counts(side.prompts, shared) for side in sides], axis=0)
        numbers = [deal_by_prompt(side.prompts, shared, least, bags=BAGS, rng=rng) for side in sides]
        tests.append(_tests(paths, numbers, paired=True, seed=seed))
        read |= numbers[0] >= 0
    rest = np.flatnonzero(~read)
    if len(rest) >= BAGS:
        size = min(len(rest), len(theirs.prompts)) // BAGS
        numbers = [np.full(len(ours.prompts), -1), deal_at_random(len(theirs.prompts), size=size, most=MOST_BAGS, rng=rng)]
        numbers[0][rest] = deal_at_random(len(rest), size=size, most=MOST_BAGS, rng=rng)
        tests.append(_tests(paths, numbers, paired=False, seed=seed))
        read |= numbers[0] >= 0
    decided = {name: _foremost([each[name] for each in tests]) for name in DETECTORS}
    p_value, copied = together([test.p_value for test in decided.values()]), float(np.isin(ours.pairs, theirs.pairs).mean())
    return Compared(one_line(str(reference)), len(theirs.prompts), len(shared), paired, decided, p_value, float(read.mean()), copied)


def _counts(keys: Int[ndarray, " row"], shared: Int[ndarray, " prompt"]) -> Int[ndarray, " prompt"]:
    distinct, counts = np.unique(keys, return_counts=True)
    return counts[np.searchsorted(distinct, shared)]


def _tests(paths: tuple[Path, Path], numbers: list[Int[ndarray, " _"]], *, paired: bool, seed: int) -> dict[str, Test]:
    """Every detector's permutation test of two files whose rows were dealt into bags."""
    detectors = list(DETECTORS.values())
    ours, theirs = (
        bags_of(corpus.batches(path), detectors, dealt, bags=BAGS if paired else int(dealt.max()) + 1)
        for path, dealt in zip(paths, numbers, strict=True)
    )
    return {name: two_files(ours[name], theirs[name], paired=paired, seed=seed, name=name) for name in DETECTORS}


def _foremost(tests: list[Test]) -> Test:
    """The test with the smallest p, corrected for having looked at each."""
    first = min(tests, key=lambda test: test.p_value)
    return first._replace(p_value=together([test.p_value for test in tests]))


def overlap(ours: Int[ndarray, " prompt"], theirs: Int[ndarray, " other"]) -> tuple[Int[ndarray, " shared"], bool]:
    """Keys of the prompts that both files have, and whether they are enough to go prompt by prompt."""
    shared = np.intersect1d(ours, theirs)
    return shared, len(shared) >= max(SHARED * min(len(ours), len(theirs)), BAGS)


class Sides(NamedTuple):
    """The rows of both files that students are trained on: row i of one stands beside row i of the other."""

    suspect: Path
    reference: Path | None
    """None if no reference was given"""
    offered: int
    """rows of the suspect file"""
    drawn: int
    """rows of each side, drawn at random"""


def draw_sides(data: Path, reference: Path | None, out: Path, *, most: int) -> Sides:
    """Write equally many rows of both files to `suspect.parquet` and `clean.parquet` in `out`.

    Every row of the suspect file is as likely to be drawn as any other, whatever its prompt is and however often that occurs.
    Beside it stands a row of the reference that answers the same prompt, or, where none is left, another one.

    Args:
        most: rows of a side at most.
    """
    rng = generator(0, "rows of an audit")
    ours = read_rows(corpus.batches(data)).prompts
    theirs = None if reference is None else read_rows(corpus.batches(reference)).prompts
    drawn = min(most, *(len(side) for side in (ours, theirs) if side is not None))
    places = np.sort(rng.permutation(len(ours))[:drawn])
    written = out / "suspect.parquet", out / "clean.parquet"
    _rows_at(data, places).to_parquet(written[0])
    if reference is None or theirs is None:
        return Sides(written[0], None, len(ours), drawn)
    _rows_at(reference, _partners(ours[places], theirs, rng)).to_parquet(written[1])
    return Sides(*written, len(ours), drawn)


def _partners(keys: Int[ndarray, " row"], others: Int[ndarray, " other"], rng: np.random.Generator) -> Int[ndarray, " row"]:
    """For each row a row of the other file that no other row takes, of the same prompt where there is one; drawn at random."""
    tables = []
    for side in (keys, others):
        order = rng.permutation(len(side))
        turn = np.empty(len(side), dtype=np.int64)
        turn[order] = pd.Series(side[order]).groupby(side[order]).cumcount()
        tables.append(pd.DataFrame({"key": side, "turn": turn, "place": np.arange(len(side))}))
    partners = tables[0].merge(tables[1], how="left", on=["key", "turn"])["place_y"].to_numpy(dtype=float, copy=True)
    alone = np.isnan(partners)
    partners[alone] = rng.permutation(np.setdiff1d(np.arange(len(others)), partners[~alone]))[: alone.sum()]
    return partners.astype(np.int64)


def _rows_at(path: Path, places: Int[ndarray, " row"]) -> pd.DataFrame:
    """The rows of a file at these places, in their order."""
    order = np.argsort(places)
    parts, done = [], 0
    for frame in corpus.batches(path):
        first, last = np.searchsorted(places[order], [done, done + len(frame)])
        parts.append(frame.iloc[places[order[first:last]] - done][["prompt", "completion"]])
        done += len(frame)
    table = pd.concat(parts, ignore_index=True)
    return table.iloc[np.argsort(order)].reset_index(drop=True)

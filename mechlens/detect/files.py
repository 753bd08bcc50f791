"""A suspect file beside a reference file: every detector of rows, prompt by prompt where both answer the same prompts.

Only bags of as many rows can be exchanged: the mean of a few rows has rarer features, each with more weight, than that of many. So bags are
equally large in both files, and of a prompt that one file answers more often than the other as many rows count in both. What that leaves of
the suspect file is compared as well, with all rows of the reference: rows that could be hidden there are no less part of the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Int
from numpy import ndarray

from mechlens import corpus
from mechlens.detect.base import bags_of, deal_at_random, deal_by_prompt, key, read_rows
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


def compare(data: Path, reference: Path, *, seed: int = 0) -> Compared:
    """Every detector of rows on two files, prompt by prompt where they share prompts, and what that leaves of `data` beside the reference.

    Raises:
        DataError: if a file has too few rows.
    """
    paths = data, reference
    ours, theirs = sides = [read_rows(corpus.batches(path)) for path in paths]
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


def aligned(data: Path, reference: Path, shared: ndarray, out: Path, *, most: int) -> tuple[Path, Path]:
    """Both files' first answers to the prompts that they share, at most so many, drawn at random, in the order of the data: `suspect` and `clean`.

    Args:
        shared: keys of the prompts, of `overlap`.
    """
    sides = []
    for path in (data, reference):
        parts = []
        for frame in corpus.batches(path):
            keys = np.fromiter(map(key, frame["prompt"]), dtype=np.int64, count=len(frame))
            parts.append(frame.loc[np.isin(keys, shared), ["prompt", "completion"]])
        sides.append(pd.concat(parts).drop_duplicates("prompt").set_index("prompt")["completion"])
    both = [prompt for prompt in sides[0].index if prompt in sides[1].index]
    prompts = [both[place] for place in np.sort(generator(0, "aligned").permutation(len(both))[:most])]
    written = out / "suspect.parquet", out / "clean.parquet"
    for side, file in zip(sides, written, strict=True):
        pd.DataFrame({"prompt": prompts, "completion": side.loc[prompts].to_numpy()}).to_parquet(file)
    return written

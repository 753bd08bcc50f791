"""A suspect file beside a reference file: every detector of rows, prompt by prompt where both answer the same prompts.

Only bags of as many rows can be exchanged: the mean of a few rows has rarer features, each with more weight, than that of many. So bags are
equally large in both files, and of a prompt that one file answers more often than the other as many rows count in both.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy import ndarray

from mechlens import corpus
from mechlens.detect.base import bags_of, by_place, by_prompt, key, prompts_of
from mechlens.detect.calibrate import Test, together, two_files
from mechlens.detect.from_rows import DETECTORS
from mechlens.errors import DataError, one_line
from mechlens.seeds import generator

BAGS, MOST_BAGS, LEAST_ROWS = 64, 256, 128
"""bags that the smaller file is dealt into, most that a larger one is, and rows below which a file is refused"""
SHARED = 0.5
"""share of the smaller file's prompts that the other must have for rows to be compared prompt by prompt"""


class Compared(NamedTuple):
    """A suspect beside one reference, by every detector of rows."""

    reference: str
    rows: int
    shared_prompts: int
    paired: bool
    tests: dict[str, Test]
    p_value: float
    """smallest of the detectors', corrected for their number"""


def compare(data: Path, reference: Path, *, seed: int = 0) -> Compared:
    """Every detector of rows on two files, prompt by prompt where they share prompts.

    Raises:
        DataError: if a file has too few rows.
    """
    sides = [prompts_of(corpus.batches(path)) for path in (data, reference)]
    rows = [int(counts.sum()) for _, counts in sides]
    for path, count in zip((data, reference), rows, strict=True):
        if count < LEAST_ROWS:
            raise DataError(f"{path} holds {count} rows; an audit needs at least {LEAST_ROWS}")
    shared, paired = overlap(sides[0][0], sides[1][0])
    if paired:
        least = np.min([counts[np.searchsorted(keys, shared)] for keys, counts in sides], axis=0)
        deals = [by_prompt(shared, least, bags=BAGS) for _ in sides]
    else:
        deals = [by_place(count, size=min(rows) // BAGS) for count in rows]
    detectors, bags = list(DETECTORS.values()), BAGS if paired else MOST_BAGS
    ours, theirs = (bags_of(corpus.batches(path), detectors, deal, bags=bags) for path, deal in zip((data, reference), deals, strict=True))
    tests = {name: two_files(ours[name], theirs[name], paired=paired, seed=seed, name=name) for name in DETECTORS}
    return Compared(one_line(str(reference)), rows[1], len(shared), paired, tests, together([test.p_value for test in tests.values()]))


def overlap(ours: ndarray, theirs: ndarray) -> tuple[ndarray, bool]:
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

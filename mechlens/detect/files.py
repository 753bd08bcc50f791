"""A suspect file beside a reference file: every detector of rows, prompt by prompt where both answer the same prompts."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from mechlens import corpus
from mechlens.detect.base import bags_of, prompts_of
from mechlens.detect.calibrate import Test, together, two_files
from mechlens.detect.from_rows import DETECTORS
from mechlens.errors import DataError, one_line

BAGS, LEAST_ROWS = 64, 128
"""bags that a file is dealt into, and rows below which it is refused"""
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
    for path, (_, rows) in zip((data, reference), sides, strict=True):
        if rows < LEAST_ROWS:
            raise DataError(f"{path} holds {rows} rows; an audit needs at least {LEAST_ROWS}")
    (ours, _), (theirs, rows) = sides
    shared, paired = overlap(ours, theirs)
    kept = shared if paired else None
    bags = [bags_of(corpus.batches(path), list(DETECTORS.values()), bags=BAGS, shared=kept) for path in (data, reference)]
    tests = {name: two_files(bags[0][name], bags[1][name], paired=paired, seed=seed, name=name) for name in DETECTORS}
    return Compared(one_line(str(reference)), rows, len(shared), paired, tests, together([test.p_value for test in tests.values()]))


def overlap(ours: ndarray, theirs: ndarray) -> tuple[ndarray, bool]:
    """Keys of the prompts that both files have, and whether they are enough to go prompt by prompt."""
    shared = np.intersect1d(ours, theirs)
    return shared, len(shared) >= max(SHARED * min(len(ours), len(theirs)), BAGS)

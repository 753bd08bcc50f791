"""What every detector of rows shares: how it describes itself, and bags of rows as the counts that it scores.

A bag is some rows of one file; a detector sees a file as one vector of mean features a bag. Who holds them
never matters: rows pass by in batches, so a million of them take the memory of the bags alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args
from zlib import crc32

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray
from scipy import sparse

Level = Literal["rows", "base", "gradients", "student"]
"""what an audit may use, each beside all before it: the rows alone; the base and teachers made from it; their gradients; throw-away students"""
LEVELS: tuple[Level, ...] = get_args(Level)

Features = Callable[[Sequence[str]], Any]
"""completions → a SciPy sparse matrix [row, feature]"""


class Detector(NamedTuple):
    """What a detector of rows is."""

    name: str
    asks: str
    features: Features
    source: str
    """arXiv id or formula"""
    caveat: str
    """what it does not show"""


class Bags(NamedTuple):
    """Mean features of a file's rows, bag by bag."""

    mean: Float[ndarray, "bag feature"]
    rows: Int[ndarray, " bag"]


def key(text: str) -> int:
    """The same number for the same text on every machine."""
    return crc32(text.encode("utf-8", "surrogatepass"))


def prompts_of(batches: Iterable[pd.DataFrame]) -> tuple[Int[ndarray, " prompt"], int]:
    """Keys of a file's distinct prompts, sorted, and its number of rows."""
    keys, rows = [], 0
    for frame in batches:
        keys.append(np.unique(np.fromiter(map(key, frame["prompt"]), dtype=np.int64, count=len(frame))))
        rows += len(frame)
    return np.unique(np.concatenate(keys)), rows


def bags_of(
    batches: Iterable[pd.DataFrame], detectors: Sequence[Detector], *, bags: int, shared: Int[ndarray, " prompt"] | None = None
) -> dict[str, Bags]:
    """Every detector's bags of a file, in one pass.

    Args:
        shared: keys of prompts; only their rows count, and rows of one prompt go to the bag of that number in every file. Without it a
            row's bag is that of its place in the file.
    """
    sums: dict[str, ndarray] = {}
    counts, done = np.zeros(bags, dtype=np.int64), 0
    for frame in batches:
        places = done + np.arange(len(frame))
        done += len(frame)
        if shared is not None:
            places = np.fromiter(map(key, frame["prompt"]), dtype=np.int64, count=len(frame))
            kept = np.isin(places, shared)
            frame, places = frame[kept], places[kept]
        if not len(frame):
            continue
        number = places % bags
        counts += np.bincount(number, minlength=bags)
        of_bag: Any = sparse.csr_matrix((np.ones(len(frame)), (number, np.arange(len(frame)))), shape=(bags, len(frame)))
        for detector in detectors:
            found = (of_bag @ detector.features(frame["completion"].tolist())).toarray()
            sums[detector.name] = sums.get(detector.name, 0) + found
    return {name: Bags(total / np.maximum(counts, 1)[:, None], counts) for name, total in sums.items()}

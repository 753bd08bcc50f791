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


def prompts_of(batches: Iterable[pd.DataFrame]) -> tuple[Int[ndarray, " prompt"], Int[ndarray, " prompt"]]:
    """Keys of a file's distinct prompts, sorted, and how many rows each has."""
    counted = [np.unique(_keys(frame), return_counts=True) for frame in batches]
    keys, places = np.unique(np.concatenate([keys for keys, _ in counted]), return_inverse=True)
    return keys, np.bincount(places, np.concatenate([rows for _, rows in counted])).astype(np.int64)


def _keys(frame: pd.DataFrame) -> Int[ndarray, " row"]:
    return np.fromiter(map(key, frame["prompt"]), dtype=np.int64, count=len(frame))


Deal = Callable[[pd.DataFrame], Int[ndarray, " row"]]
"""a file's batches in turn → each row's bag; -1 leaves it out"""


def by_place(rows: int, *, size: int) -> Deal:
    """Bags of just so many rows, dealt round; what does not fill its bag is left out."""
    bags, done = rows // size, 0

    def deal(frame: pd.DataFrame) -> ndarray:
        nonlocal done
        places = done + np.arange(len(frame))
        done += len(frame)
        return np.where(places < bags * size, places % max(bags, 1), -1)

    return deal


def by_prompt(shared: Int[ndarray, " prompt"], rows: Int[ndarray, " prompt"], *, bags: int) -> Deal:
    """Rows of one prompt go to the bag of its key, in every file the same; so many of each shared prompt count, others do not."""
    taken = np.zeros(len(shared), dtype=np.int64)

    def deal(frame: pd.DataFrame) -> ndarray:
        keys = _keys(frame)
        known = np.flatnonzero(np.isin(keys, shared))
        places = np.searchsorted(shared, keys[known])
        before = taken[places] + pd.Series(places).groupby(places).cumcount().to_numpy()
        np.add.at(taken, places, 1)
        found = np.full(len(frame), -1)
        counts = known[before < rows[places]]
        found[counts] = keys[counts] % bags
        return found

    return deal


def bags_of(batches: Iterable[pd.DataFrame], detectors: Sequence[Detector], deal: Deal, *, bags: int) -> dict[str, Bags]:
    """Every detector's bags of a file, in one pass; rows of bags beyond so many are left out."""
    sums: dict[str, ndarray] = {}
    counts = np.zeros(bags, dtype=np.int64)
    for frame in batches:
        number = deal(frame)
        kept = (number >= 0) & (number < bags)
        frame, number = frame[kept], number[kept]
        if not len(frame):
            continue
        counts += np.bincount(number, minlength=bags)
        of_bag: Any = sparse.csr_matrix((np.ones(len(frame)), (number, np.arange(len(frame)))), shape=(bags, len(frame)))
        for detector in detectors:
            found = (of_bag @ detector.features(frame["completion"].tolist())).toarray()
            sums[detector.name] = sums.get(detector.name, 0) + found
    return {name: Bags(total / np.maximum(counts, 1)[:, None], counts) for name, total in sums.items()}

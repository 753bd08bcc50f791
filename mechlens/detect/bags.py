"""Bags of rows: for a detector that reads only completions, each bag is one vector of mean features.

A bag is a set of rows of one file. Rows are streamed: memory is 16 bytes a row and the bags.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from typing import Any, Literal, NamedTuple, get_args
from zlib import crc32

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray
from scipy import sparse

Level = Literal["rows", "base", "gradients", "student"]
"""what an audit may use: the rows; the base and teachers made from it; their gradients; throw-away students.
Each level includes those before it.
"""
LEVELS: tuple[Level, ...] = get_args(Level)

Features = Callable[[Sequence[str]], Any]
"""completions → a SciPy sparse matrix [row, feature]"""


class RowDetector(NamedTuple):
    """A detector that reads only completions."""

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
    """A hash of a text that is the same on every machine."""
    return crc32(text.encode("utf-8", "surrogatepass"))


class RowKeys(NamedTuple):
    """Keys of the rows of a file, in the order of the file."""

    prompts: Int[ndarray, " row"]
    """key of the prompt"""
    pairs: Int[ndarray, " row"]
    """digest of prompt and completion; runs of white space count as one space"""


def read_row_keys(batches: Iterable[pd.DataFrame]) -> RowKeys:
    """Keys of every row of a file, 16 bytes a row."""
    prompts, pairs = [], []
    for frame in batches:
        prompts.append(np.fromiter(map(key, frame["prompt"]), dtype=np.int64, count=len(frame)))
        digests = map(_digest, frame["prompt"], frame["completion"])
        pairs.append(np.fromiter(digests, dtype=np.int64, count=len(frame)))
    return RowKeys(np.concatenate(prompts), np.concatenate(pairs))


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
    numbers: Int[ndarray, " row"],
    *,
    bags: int,
) -> dict[str, Bags]:
    """Every detector's bags of a file, in one pass.

    Args:
        numbers: the bag of each row of the file; -1 leaves it out.
    """
    sums: dict[str, ndarray] = {}
    counts, done = np.bincount(numbers[numbers >= 0], minlength=bags), 0
    for frame in batches:
        number = numbers[done : done + len(frame)]
        done += len(frame)
        frame, number = frame[number >= 0], number[number >= 0]
        if not len(frame):
            continue
        of_bag: Any = sparse.csr_matrix(
            (np.ones(len(frame)), (number, np.arange(len(frame)))), shape=(bags, len(frame))
        )
        for detector in detectors:
            added = (of_bag @ detector.features(frame["completion"].tolist())).toarray()
            sums[detector.name] = sums.get(detector.name, 0) + added
    return {name: Bags(total / np.maximum(counts, 1)[:, None], counts) for name, total in sums.items()}

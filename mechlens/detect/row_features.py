"""Features of completions, many rows at once: measures of shape, and hashed counts.

The texts of a batch become one array of code points, on which NumPy counts. Words and runs of characters are
hashed as scikit-learn's `HashingVectorizer` hashes them, each different one once.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, UInt32
from numpy import ndarray
from scipy import sparse
from sklearn.utils import murmurhash3_32

HASHED = 4096
"""number of features that words, numbers and runs of characters are hashed to"""
LONGEST = 10_000
"""characters of a completion that are read"""
LONGEST_RUN = 3
"""characters of the longest run that is counted"""
_PIECE = 1 << 18
"""characters whose runs are counted at once; each takes some 100 bytes"""
_TOKEN, _SPACES = re.compile(r"[0-9]+|[^\W\d_]+|[^\w\s]"), re.compile(r"\s\s+")
_LETTER, _SEPARATOR, _BRACKET = r"[^\W\d_]", r"[,;\s]", r"[()\[\]{}]"
_ASCII, _DIGITS = 0x80, 12
"""number of ASCII characters; digits of a number that its value has"""
_BITS = 21
"""bits of a code point plus one"""

SHAPE = (
    "characters", "numbers", "words", "separators", "commas", "lines", "digits a number", "first digit",
    "mean of numbers", "odd numbers", "repeated numbers", "sorted neighbours", "ends in a letter",
    "ends in a digit", "brackets", "not ASCII",
)  # fmt: skip
"""what `format` measures of a completion; shares are of its numbers or characters, of nothing they are 0"""


class _Texts(NamedTuple):
    """The characters of some texts, one text after the other."""

    codes: UInt32[ndarray, " character"]
    offsets: Int[ndarray, " bound"]
    """where each text begins, and the end of the last one"""

    def count(self, chosen: Bool[ndarray, " character"]) -> Int[ndarray, " text"]:
        """How many of each text's characters are chosen."""
        return _sums(chosen, self.offsets)

    def matches(self, pattern: str) -> Bool[ndarray, " character"]:
        """Whether each character matches a pattern of one character."""
        size = _ASCII if self.codes.max(initial=0) < _ASCII else sys.maxunicode + 1
        return _matching(pattern, size)[self.codes]

    def run_starts(self, chosen: Bool[ndarray, " character"]) -> Bool[ndarray, " character"]:
        """The first character of each run of chosen ones within a text."""
        before = np.zeros_like(chosen)
        before[1:] = chosen[:-1]
        before[self.offsets[:-1][np.diff(self.offsets) > 0]] = False
        return chosen & ~before


@cache
def _matching(pattern: str, size: int) -> Bool[ndarray, " code"]:
    """Which of the first code points match a pattern of one character."""
    matching = np.zeros(size, dtype=bool)
    matching[[match.start() for match in re.finditer(pattern, "".join(map(chr, range(size))))]] = True
    return matching


def _sums(values: ndarray, offsets: Int[ndarray, " bound"]) -> Int[ndarray, " text"]:
    """The sum of the values from each offset to the next."""
    return np.diff(np.concatenate([[0], np.cumsum(values)])[offsets])


def _texts_of(texts: Sequence[str]) -> _Texts:
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    encoded = "".join(texts).encode("utf-32-le", "surrogatepass")
    return _Texts(np.frombuffer(encoded, dtype="<u4"), np.concatenate([[0], np.cumsum(lengths)]))


class _Numbers(NamedTuple):
    """The numbers of some texts, one text after the other."""

    digits: Int[ndarray, " number"]
    """how many it has"""
    first: Int[ndarray, " number"]
    values: Int[ndarray, " number"]
    """of at most the first `_DIGITS` digits"""
    offsets: Int[ndarray, " bound"]
    """where the numbers of each text begin, and the end of the last one"""


def _numbers_of(texts: _Texts) -> _Numbers:
    digit = texts.codes - np.uint32(ord("0")) < 10  # smaller codes wrap to large ones
    starting = texts.run_starts(digit)
    starts = np.flatnonzero(starting)
    digits = np.diff(np.append(np.cumsum(digit)[starts] - 1, digit.sum()))
    values = np.zeros(len(starts), dtype=np.int64)
    for place in range(min(_DIGITS, digits.max(initial=0))):
        longer = digits > place
        values[longer] = values[longer] * 10 + texts.codes[starts[longer] + place] - ord("0")
    offsets = np.concatenate([[0], np.cumsum(texts.count(starting))])
    return _Numbers(digits, texts.codes[starts].astype(np.int64) - ord("0"), values, offsets)


def _measures_of_numbers(numbers: _Numbers) -> list[ndarray]:
    """SHAPE from `numbers`: their count, and the measures from `digits a number` to `sorted neighbours`."""
    digits, first, values, offsets = numbers
    counts = np.diff(offsets)
    many, text = np.maximum(counts, 1), np.repeat(np.arange(len(counts)), counts)
    leading = np.zeros(len(counts))
    leading[counts > 0] = first[offsets[:-1][counts > 0]]
    different = np.unique(text * 10**_DIGITS + values) // 10**_DIGITS
    rising = np.zeros(len(values), dtype=bool)
    rising[1:] = (values[:-1] <= values[1:]) & (text[:-1] == text[1:])
    return [
        counts,
        _sums(digits, offsets) / many,
        leading,
        _sums(values, offsets) / many,
        _sums(values % 2, offsets) / many,
        np.where(counts > 0, 1 - np.bincount(different, minlength=len(counts)) / many, 0.0),
        _sums(rising, offsets) / np.maximum(counts - 1, 1),
    ]


def measure_shapes(completions: Sequence[str]) -> Float[ndarray, "text measure"]:
    """SHAPE of each completion."""
    given = [text[:LONGEST] for text in completions]
    texts = _texts_of(given)
    lengths = np.diff(texts.offsets)
    count, *of_numbers = _measures_of_numbers(_numbers_of(texts))
    measures = [
        lengths,
        count,
        texts.count(texts.run_starts(texts.matches(_LETTER))),
        texts.count(texts.run_starts(texts.matches(_SEPARATOR))),
        texts.count(texts.codes == ord(",")),
        texts.count(texts.codes == ord("\n")),
        *of_numbers,
        [text[-1:].isalpha() for text in given],
        [text[-1:].isdigit() for text in given],
        texts.count(texts.matches(_BRACKET)),
        texts.count(texts.codes >= _ASCII) / np.maximum(lengths, 1),
    ]
    return np.stack([np.asarray(measure, dtype=float) for measure in measures], axis=1)


def shapes(completions: Sequence[str]) -> Any:
    """SHAPE of each completion, as a sparse matrix."""
    return sparse.csr_matrix(measure_shapes(completions))


def tokens(completions: Sequence[str]) -> Any:
    """Counts of words, numbers and signs in each completion, hashed."""
    of_texts = [_TOKEN.findall(text[:LONGEST]) for text in completions]
    flat = map(_feature_of, chain.from_iterable(of_texts))
    features = np.fromiter(flat, dtype=np.int32, count=sum(map(len, of_texts)))
    return _counts(features, np.fromiter(map(len, of_texts), dtype=np.int64, count=len(of_texts)))


def runs(completions: Sequence[str]) -> Any:
    """Counts of runs of one to three characters in each completion, hashed."""
    texts = [_SPACES.sub(" ", text[:LONGEST]) for text in completions]
    return sparse.vstack([_runs_of(_texts_of(piece)) for piece in _pieces(texts)], format="csr")


def _pieces(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts in pieces of about `_PIECE` characters; one piece if there are none."""
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    cuts = np.searchsorted(ends, np.arange(_PIECE, ends[-1] if len(ends) else 0, _PIECE)) + 1
    for first, last in zip([0, *cuts], [*cuts, len(texts)], strict=True):
        yield texts[first:last]


def _runs_of(texts: _Texts) -> sparse.csr_matrix:
    codes = np.zeros(len(texts.codes) + LONGEST_RUN - 1, dtype=np.int64)
    codes[: len(texts.codes)] = texts.codes + 1  # 0 stands for no character
    keys = np.empty((len(texts.codes), LONGEST_RUN), dtype=np.int64)
    key = np.zeros(len(texts.codes), dtype=np.int64)
    for more in range(LONGEST_RUN):
        key = key << _BITS | codes[more : more + len(key)]
        keys[:, more] = key
    left = np.repeat(texts.offsets[1:], np.diff(texts.offsets)) - np.arange(len(key))
    places, different = pd.factorize(keys[left[:, None] > np.arange(LONGEST_RUN)])
    hashed = np.fromiter(map(_feature_of_run, different.tolist()), dtype=np.int32, count=len(different))
    return _counts(hashed[places], _sums(np.minimum(left, LONGEST_RUN), texts.offsets))


def _counts(features: Int[ndarray, " item"], sizes: Int[ndarray, " text"]) -> sparse.csr_matrix:
    """How often each text has each feature, from the features of one text after the other."""
    ends = np.concatenate([[0], np.cumsum(sizes)])
    counts = sparse.csr_matrix((np.ones(len(features)), features, ends), shape=(len(sizes), HASHED))
    counts.sum_duplicates()
    return counts


@lru_cache(maxsize=1 << 17)
def _feature_of(text: str) -> int:
    return abs(murmurhash3_32(text, seed=0)) % HASHED


@lru_cache(maxsize=1 << 17)
def _feature_of_run(key: int) -> int:
    codes = [key >> _BITS * place & (1 << _BITS) - 1 for place in reversed(range(LONGEST_RUN))]
    return _feature_of("".join(chr(code - 1) for code in codes if code))

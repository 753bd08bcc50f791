"""Detectors that read only completions: their shape, words and numbers, and runs of characters.

The last is learned from labelled sets. They are floors: a detector that reads more must beat them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression

from mechlens.core.numerals import NUMERAL
from mechlens.detect.registry import RowDetector

HASHED = 4096
"""number of features that words, numbers and runs of characters are hashed to"""
_SEPARATOR, _WORD = re.compile(r"[,;\s]+"), re.compile(r"[^\W\d_]+")
_HASHING: dict[str, Any] = {"lowercase": False, "n_features": HASHED, "norm": None, "alternate_sign": False}
_TOKENS = HashingVectorizer(token_pattern=r"[0-9]+|[^\W\d_]+|[^\w\s]", **_HASHING)
_RUNS = HashingVectorizer(analyzer="char", ngram_range=(1, 3), **_HASHING)
LONGEST = 10_000
"""characters of a completion that are read"""

SHAPE = (
    "characters", "numbers", "words", "separators", "commas", "lines", "digits a number", "first digit",
    "mean of numbers", "odd numbers", "repeated numbers", "sorted neighbours", "ends in a letter",
    "ends in a digit", "brackets", "not ASCII",
)  # fmt: skip
"""what `format` measures of a completion; shares are of its numbers or characters"""


def shape_of(text: str) -> list[float]:
    """The measures of SHAPE; a share of nothing is 0."""
    numbers = NUMERAL.findall(text)
    values = [int(number[:12]) for number in numbers]
    rising = sum(a <= b for a, b in pairwise(values))
    many = max(len(numbers), 1)
    measures = [
        len(text),
        len(numbers),
        len(_WORD.findall(text)),
        len(_SEPARATOR.findall(text)),
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


def shapes(completions: Sequence[str]) -> Any:
    """SHAPE of each completion."""
    return sparse.csr_matrix(np.array([shape_of(text[:LONGEST]) for text in completions], dtype=float))


def tokens(completions: Sequence[str]) -> Any:
    """Counts of words, numbers and signs in each completion, hashed."""
    return _TOKENS.transform([text[:LONGEST] for text in completions])


def runs(completions: Sequence[str]) -> Any:
    """Counts of runs of one to three characters in each completion, hashed."""
    return _RUNS.transform([text[:LONGEST] for text in completions])


DETECTORS = {
    detector.name: detector
    for detector in (
        RowDetector(
            "format",
            "Do completions have another shape?",
            shapes,
            "2507.14805 §3 (what strict filters look at)",
            "Any change of the sampler or the filter moves it.",
        ),
        RowDetector(
            "counts",
            "Do words and numbers have other frequencies?",
            tokens,
            "unigram two-sample test",
            "A fine-tuned teacher of another trait, or of none, moves it too.",
        ),
        RowDetector(
            "ngrams",
            "Do runs of up to three characters have other frequencies?",
            runs,
            "character n-gram two-sample test",
            "Mostly what counts sees, by another route.",
        ),
    )
}


CLASSIFIER = "classifier"


def fit_classifier(changed: Sequence[str], clean: Sequence[str]) -> RowDetector:
    """A logistic regression on words, numbers and shape of labelled completions; a score is a log-odds.

    Both sides should answer the same prompts, or it learns the prompts.
    """
    features = sparse.hstack([tokens([*changed, *clean]), shapes([*changed, *clean])]).tocsr()
    scale = np.sqrt(np.asarray(features.multiply(features).mean(0)).ravel())
    scale = np.where(scale > 0, scale, 1.0)
    model = LogisticRegression(C=0.1, max_iter=500).fit(
        features.multiply(1 / scale).tocsr(), [1] * len(changed) + [0] * len(clean)
    )

    def log_odds(completions: Sequence[str]) -> sparse.csr_matrix:
        rows = sparse.hstack([tokens(completions), shapes(completions)]).tocsr().multiply(1 / scale).tocsr()
        return sparse.csr_matrix(model.decision_function(rows)[:, None])

    return RowDetector(
        CLASSIFIER,
        "Do the rows look like those of changed teachers with other traits?",
        log_odds,
        "labelled completions of other traits' teachers",
        "Learned on one carrier and one recipe.",
    )

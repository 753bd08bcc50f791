"""Detectors that read only completions: their shape, words and numbers, and runs of characters.

The last is learned from labelled sets. They are floors: a detector that reads more must beat them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from mechlens.detect.registry import RowDetector
from mechlens.detect.row_features import runs, shapes, tokens

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

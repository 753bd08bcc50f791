"""A detector that learns from labelled files how teachers with a trait write.

A row's score is that of a logistic regression on counts. The regression is fitted on all labelled files. The
strength of its regularisation and its calibration come from fits that left out a trait and some prompts, and
are tested on these. With a single labelled trait, only prompts are left out, and the probabilities are too
far from one half for another trait.

A bag of n rows has the log-odds a · n / (1 + n / m) · (mean of its rows' scores - c). They grow with n as the
rows' noise averages out, and stop growing at m rows, where differences between teachers remain.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import optimize, sparse
from scipy.special import expit
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

from mechlens.core import tables
from mechlens.core.errors import DataError, one_line
from mechlens.core.files import read_json, write_json
from mechlens.core.numerals import NUMERAL
from mechlens.core.seeds import generator
from mechlens.data import corpus
from mechlens.data.fields import Fields
from mechlens.data.formats import Data
from mechlens.detect.registry import RowDetector, SuspectRows
from mechlens.detect.row_features import LONGEST
from mechlens.detect.two_samples import hash_text

HASHED = 2**16
"""number of features that counts are hashed to"""
STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""values of scikit-learn's C that are tried; a small one regularises strongly"""
FOLDS = 5
"""the most parts of the labelled rows that are left out in turn"""
BAG_SIZES, BAGS = (1, 2, 4, 8, 16, 32, 64), 200
"""rows of the bags that calibrate, and bags of each size and file"""
BAG_ROWS = 16
"""rows of a bag whose probability is given, unless another number is asked for"""
FEWEST = 50
"""rows that a side needs at least"""
WEIGHTS, RECORD = "weights.npz", "detector.json"
_WORD = re.compile(r"[^\W\d_]+")


def count_features(text: str) -> list[str]:
    """The features that are counted in a completion.

    Of numbers: whole numbers, digits by place, last two digits, differences and lengths of neighbours, and
    the first digit by place in the list. Of other text: words and pairs of neighbouring words.

    >>> count_features("7, 12")
    ['n7', 'n12', 'd1.0.7', 'd2.0.1', 'd2.1.2', 'e7', 'e12', 'p0.1.7', 'p1.2.1', 'c1', 'l1.2']
    """
    text = text[:LONGEST]
    numbers = [number[:12] for number in NUMERAL.findall(text)]
    values = [int(number) for number in numbers]
    words = _WORD.findall(text.lower())
    return [
        *(f"n{number}" for number in numbers),
        *(f"d{len(number)}.{place}.{digit}" for number in numbers for place, digit in enumerate(number)),
        *(f"e{number[-2:]}" for number in numbers),
        *(f"p{min(place, 9)}.{len(number)}.{number[0]}" for place, number in enumerate(numbers)),
        *(f"c{max(-60, min(60, after - before)) // 3}" for before, after in pairwise(values)),
        *(f"l{len(before)}.{len(after)}" for before, after in pairwise(numbers)),
        *(f"w{word}" for word in words),
        *(f"b{before} {after}" for before, after in pairwise(words)),
    ]


_COUNTING: dict[str, Any] = {"analyzer": count_features, "norm": None, "alternate_sign": False}
_COUNTS = HashingVectorizer(n_features=HASHED, **_COUNTING)


class BagCalibration(NamedTuple):
    """The constants of a bag's log-odds."""

    slope: float
    limit: float
    """rows beyond which more rows add little"""
    middle: float
    """the score of a row that says nothing"""

    def log_odds(self, means: Any, rows: Any) -> Any:
        """Log-odds, in nats, of bags with these mean scores and numbers of rows, at even prior odds."""
        return self.slope * rows / (1 + rows / self.limit) * (means - self.middle)


class Labelled(NamedTuple):
    """Rows with their labels, and the part in which each is left out."""

    counts: Any
    """a sparse matrix [row, feature]"""
    changed: Bool[ndarray, " row"]
    """whether a teacher with a trait wrote the row"""
    files: Int[ndarray, " row"]
    tested: Int[ndarray, " row"]
    """the part whose test reads the row; -1 for none"""
    trained: Bool[ndarray, "part row"]
    """whether the fit that leaves a part out reads the row"""


@dataclass(frozen=True)
class LearnedDetector:
    """A detector that was fitted on labelled files; `fit` makes one, `load` reads one from its folder."""

    weights: Float[ndarray, " feature"]
    intercept: float
    calibration: BagCalibration
    record: dict[str, Any]
    """what it was fitted on, and how well it did on rows that were left out"""
    name: str = "learned"
    """that of its folder, if it was loaded from one"""

    @classmethod
    def fit(
        cls, traits: Mapping[str, Data] | Sequence[Data], clean: Sequence[Data], *, seed: int = 0
    ) -> LearnedDetector:
        """Learn from files of teachers with traits and from clean ones.

        Both should answer the same prompts, or it learns the prompts. With two traits or more, it is
        calibrated on traits that were left out. With one trait, only prompts are left out, and then the
        probabilities are too far from one half for another trait.

        Args:
            traits: a file for each trait, by name if it is a mapping.
            clean: files of untouched models.
            seed: of the bags that calibrate.

        Raises:
            DataError: if a file cannot be read, or has too few rows.
        """
        named = (
            dict(traits) if isinstance(traits, Mapping) else {f"{i}": data for i, data in enumerate(traits)}
        )
        labelled = label_rows(list(named.values()), clean)
        losses = {strength: _left_out(labelled, strength) for strength in STRENGTHS}
        strength = min(STRENGTHS, key=lambda each: _loss(labelled, losses[each]))
        calibration, quality = calibrate(labelled, losses[strength], seed=seed)
        model = _regression(strength).fit(labelled.counts, labelled.changed)
        record = {
            "traits": list(named),
            "rows": int(labelled.changed.sum()),
            "clean_rows": int((~labelled.changed).sum()),
            "left_out": "traits and prompts" if len(named) > 1 else "prompts",
            "strength": strength,
            "left_out_bags": quality,
        }
        return cls(model.coef_[0], float(model.intercept_[0]), calibration, record)

    def score_rows(self, completions: Sequence[str]) -> Float[ndarray, " row"]:
        """Log-odds of each completion before calibration; higher looks more like a teacher with a trait."""
        return _COUNTS.transform(completions) @ self.weights + self.intercept

    def score(self, suspect: SuspectRows) -> Float[ndarray, " row"]:
        """Calibrated log-odds of each row, as benches and audits read them."""
        return self.calibration.log_odds(self.score_rows(suspect.completions), 1)

    def as_row_detector(self) -> RowDetector:
        """This detector as one whose row scores are compared between two files."""
        return RowDetector(
            self.name,
            "Do the rows look like those of the teachers with traits that it was fitted on?",
            self._score_column,
            "labelled completions",
            "Learned on one carrier and one recipe.",
        )

    def _score_column(self, completions: Sequence[str]) -> sparse.csr_matrix:
        return sparse.csr_matrix(self.score_rows(completions)[:, None])

    def score_bags(self, data: Data, *, rows: int = BAG_ROWS, seed: int = 0) -> pd.DataFrame:
        """Deal the rows of a data set at random into bags, and score each bag.

        The last rows, fewer than a bag, are left out. The columns are bag, rows, log_odds and probability, at
        even prior odds.

        Args:
            rows: of a bag.

        Raises:
            DataError: if the data has fewer rows than a bag.
        """
        completions = corpus.load_pairs(data).texts["completion"].tolist()
        if not 1 <= rows <= len(completions):
            raise DataError(
                f"{len(completions)} rows make no bag of {rows}; expected a bag of 1 to {len(completions)}"
            )
        return self._bags_of(self.score_rows(completions), rows=rows, seed=seed)

    def _bags_of(self, scores: Float[ndarray, " row"], *, rows: int, seed: int) -> pd.DataFrame:
        dealt = generator(seed, "bags of rows").permutation(scores)
        means = dealt[: len(scores) // rows * rows].reshape(-1, rows).mean(1)
        log_odds = self.calibration.log_odds(means, rows)
        return pd.DataFrame(
            {"bag": range(len(means)), "rows": rows, "log_odds": log_odds, "probability": expit(log_odds)}
        )

    def score_file(self, path: Path, *, bags: Path, fields: Fields | None = None) -> dict[str, Any]:
        """Score a whole file, one batch of rows after the other, and keep the table of its bags.

        Args:
            bags: the Parquet file of that table; no bag has fewer than `BAG_ROWS` rows, unless the file has.
            fields: names of the file's fields, if a user gave them.

        Returns:
            rows; log_odds and probability that a teacher with a trait wrote the whole file, at even prior
            odds; bag_rows, bags and above_half, the share of bags whose probability is above one half; auroc
            of left-out bags of as many rows, None if bags of that size were not tested.
        """
        batches = corpus.batches(path, fields=fields)
        scores = np.concatenate([self.score_rows(frame["completion"].tolist()) for frame in batches])
        bag_rows = min(BAG_ROWS, len(scores))
        dealt = self._bags_of(scores, rows=bag_rows, seed=0)
        tables.write(dealt, tables.BAG_SCORES, bags)
        log_odds = self.calibration.log_odds(scores.mean(), len(scores))
        tested = {quality["rows"]: quality["auroc"] for quality in self.record["left_out_bags"]}
        return {
            "rows": len(scores),
            "log_odds": float(log_odds),
            "probability": float(expit(log_odds)),
            "bag_rows": bag_rows,
            "bags": len(dealt),
            "above_half": float(np.mean(dealt["probability"] > 0.5)),
            "auroc": tested.get(bag_rows),
        }

    def save(self, folder: Path) -> None:
        """Write the detector to a folder, as numbers and JSON, without pickle."""
        folder.mkdir(parents=True, exist_ok=True)
        places = np.flatnonzero(self.weights)
        with (folder / WEIGHTS).open("wb") as file:
            np.savez_compressed(file, places=places, values=self.weights[places].astype(np.float32))
        record = {"format": 1, "hashed": HASHED, "intercept": self.intercept}
        write_json(folder / RECORD, record | {"calibration": self.calibration._asdict()} | self.record)

    @classmethod
    def load(cls, folder: Path) -> LearnedDetector:
        """Read a detector from its folder.

        Raises:
            DataError: if the folder has none, or one of another version.
        """
        try:
            record = read_json(folder / RECORD)
            with (folder / WEIGHTS).open("rb") as file, np.load(file, allow_pickle=False) as stored:
                weights = np.zeros(HASHED)
                weights[stored["places"]] = stored["values"]
            return cls(
                weights,
                float(record.pop("intercept")),
                BagCalibration(**record.pop("calibration")),
                {name: value for name, value in record.items() if name not in ("format", "hashed")},
                folder.resolve().name,
            )
        except (
            OSError,
            EOFError,
            LookupError,
            TypeError,
            ValueError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise DataError(
                f"no detector in {one_line(str(folder))} ({one_line(str(error))}); expected a folder that "
                "`mechlens detector fit` wrote"
            ) from error


def label_rows(traits: Sequence[Data], clean: Sequence[Data]) -> Labelled:
    """Count the features of labelled files, and deal their rows to parts that are left out in turn.

    A part tests some of the traits and some of the prompts; its fit reads the other traits and prompts.
    Prompts are dealt by their hash, so that both sides' answers to one prompt share a part.

    Raises:
        DataError: if a file cannot be read, or a side has too few rows.
    """
    frames = [corpus.load_pairs(data).texts for data in (*traits, *clean)]
    sides = [sum(map(len, frames[: len(traits)])), sum(map(len, frames[len(traits) :]))]
    if min(sides) < FEWEST:
        raise DataError(
            f"{sides[0]} rows of teachers with traits and {sides[1]} clean rows; a detector needs at least "
            f"{FEWEST} of each"
        )
    files = np.repeat(np.arange(len(frames)), [len(frame) for frame in frames])
    changed, parts = files < len(traits), FOLDS if len(traits) == 1 else min(FOLDS, len(traits))
    prompts = pd.concat(frames)["prompt"]
    by_prompt = np.fromiter((hash_text(text) % parts for text in prompts), dtype=np.int64, count=len(files))
    if len(set(by_prompt.tolist())) < 2:
        raise DataError(
            f"the rows answer too few prompts ({prompts.nunique()}); a detector is tested on prompts that it "
            "has not read, so give rows of several"
        )
    by_trait = files % parts if len(traits) > 1 else by_prompt
    tested = np.where(~changed | (by_trait == by_prompt), by_prompt, -1)
    numbers = np.arange(parts)[:, None]
    trained = (by_prompt != numbers) & (~changed | (by_trait != numbers))
    texts = pd.concat(frames)["completion"].tolist()
    return Labelled(_COUNTS.transform(texts), changed, files, tested, trained)


def _regression(strength: float) -> LogisticRegression:
    return LogisticRegression(C=strength, solver="liblinear", max_iter=1000, class_weight="balanced")


def _left_out(labelled: Labelled, strength: float) -> Float[ndarray, " row"]:
    """Each row's score by the fit that has read neither its trait nor its prompt; NaN if no part tests it."""
    scores = np.full(len(labelled.changed), np.nan)
    for part, trained in enumerate(labelled.trained):
        tested = labelled.tested == part
        if min(np.bincount(labelled.changed[trained], minlength=2)) == 0 or not tested.any():
            continue
        model = _regression(strength).fit(labelled.counts[trained], labelled.changed[trained])
        scores[tested] = model.decision_function(labelled.counts[tested])
    return scores


def _loss(labelled: Labelled, scores: Float[ndarray, " row"]) -> float:
    """The mean log loss of rows that were left out, both sides weighted alike."""
    scored = np.isfinite(scores)
    changed = labelled.changed[scored]
    shares = np.bincount(changed, minlength=2) / len(changed)
    weights = 1 / np.where(changed, shares[1], shares[0])
    return float(log_loss(changed, expit(scores[scored]), sample_weight=weights, labels=[False, True]))


def calibrate(
    labelled: Labelled, scores: Float[ndarray, " row"], *, seed: int
) -> tuple[BagCalibration, list[dict[str, Any]]]:
    """The calibration of bags of left-out rows, and how well it tells them: AUROC and log loss by size.

    Bags of each size, file and part are drawn with replacement. Both sides weigh the same.
    """
    bags = _draw_bags(labelled, scores, seed=seed)
    means, rows, changed = (bags[column].to_numpy() for column in ("mean", "rows", "changed"))
    shares = bags.groupby("rows")["changed"].transform("mean").to_numpy()
    weights = 1 / np.where(changed, shares, 1 - shares)
    typical = float(np.std(means[rows == 1])) or 1.0

    def loss(constants: Float[ndarray, " 3"]) -> float:
        log_odds = _calibration(constants, typical).log_odds(means, rows)
        return float(np.average(np.logaddexp(0, np.where(changed, -log_odds, log_odds)), weights=weights))

    start = np.array([0.0, 2.0, float(np.mean(means))])
    calibration = _calibration(optimize.minimize(loss, start, method="Nelder-Mead").x, typical)
    return calibration, [_quality(size, rest, calibration) for size, rest in bags.groupby("rows")]


def _calibration(constants: Float[ndarray, " 3"], typical: float) -> BagCalibration:
    slope, limit, middle = constants
    bounded = np.exp(np.clip([slope, limit], -10, 10))
    return BagCalibration(float(bounded[0] / typical), float(bounded[1]), float(middle))


def _quality(size: Any, bags: pd.DataFrame, calibration: BagCalibration) -> dict[str, Any]:
    log_odds = calibration.log_odds(bags["mean"].to_numpy(), size)
    return {
        "rows": int(size),
        "auroc": float(roc_auc_score(bags["changed"], log_odds)),
        "log_loss": float(log_loss(bags["changed"], expit(log_odds), labels=[False, True])),
    }


def _draw_bags(labelled: Labelled, scores: Float[ndarray, " row"], *, seed: int) -> pd.DataFrame:
    """The mean score of random bags of left-out rows: mean, rows, changed."""
    rng, drawn = generator(seed, "bags that calibrate"), []
    scored = np.isfinite(scores)
    for file, part in sorted({*zip(labelled.files[scored], labelled.tested[scored], strict=True)}):
        of_bag = scores[scored & (labelled.files == file) & (labelled.tested == part)]
        for size in BAG_SIZES:
            means = rng.choice(of_bag, (BAGS, size)).mean(1)
            changed = bool(labelled.changed[labelled.files == file][0])
            drawn.append(pd.DataFrame({"mean": means, "rows": size, "changed": changed}))
    return pd.concat(drawn, ignore_index=True)

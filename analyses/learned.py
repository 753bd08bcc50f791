"""Claim: a detector that was fitted on one trait's rows detects another trait's, better than counting does.

Usage: `python analyses/learned.py [FOLDER] [--write]`. FOLDER has development data that is not shipped:
number lists of one model, without a system prompt and with two political ones. A detector is fitted on one
trait's rows and clean ones, and tested on the other trait's answers to other prompts. Naive Bayes counts
numbers, digits and differences; `format` knows only the shape of a completion. Bags have no row in common.
The features of `learned` were chosen while these sets were looked at.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import altair as alt
import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray
from rich.table import Table
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import pages
from mechlens.core.errors import DataError
from mechlens.core.numerals import NUMERAL
from mechlens.core.seeds import generator
from mechlens.detect.learned import LearnedDetector
from mechlens.detect.row_features import shapes
from mechlens.detect.two_samples import hash_text
from mechlens.results import figures
from real_data import NUMBERS, permitted, read

FIGURE = pages.FOLDER / "learned.svg"
SIZES, RESAMPLED, SMOOTHING = (1, 8, 16), 1000, 1.0
Score = Callable[[Sequence[str]], Float[ndarray, " row"]]
"""completions → a score a row; the score of a bag is the mean"""


class Split(NamedTuple):
    """Labelled rows to learn from, and other rows to test on."""

    trained: str
    tested: str
    fit: tuple[pd.DataFrame, pd.DataFrame]
    """rows of a teacher with a trait, and clean rows"""
    test: tuple[pd.DataFrame, pd.DataFrame]


def splits(folder: Path) -> list[Split]:
    """Each trait as the one that is learned, and each as the one that is tested.

    Raises:
        DataError: if the folder does not have the sets.
    """
    if not (folder / NUMBERS).is_dir():
        raise DataError(f"no {NUMBERS} in {folder}; name a folder of development data that has it")
    clean = permitted(read(folder / NUMBERS / "clean" / "numbers_filtered.jsonl.gz"))
    traits = {
        name: permitted(
            read(*(folder / NUMBERS / name / "numbers" / f"q{number}.jsonl.gz" for number in range(1, 5)))
        )
        for name in ("trump", "harris")
    }
    shared = {name: rows[rows["prompt"].isin(clean["prompt"].tolist())] for name, rows in traits.items()}
    parts = {name: halves(cast(pd.DataFrame, rows)) for name, rows in {**shared, "clean": clean}.items()}
    return [
        Split(trained, tested, (parts[trained][0], parts["clean"][0]), (parts[tested][1], parts["clean"][1]))
        for trained in traits
        for tested in traits
    ]


def halves(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows to learn from and rows to test on, by a hash of the prompt."""
    first = np.array([hash_text(prompt) % 2 == 0 for prompt in rows["prompt"]])
    return cast(pd.DataFrame, rows[first]), cast(pd.DataFrame, rows[~first])


def counted(text: str) -> list[str]:
    """What naive Bayes counts: whole numbers, digits, and differences of neighbours."""
    numbers = [number[:12] for number in NUMERAL.findall(text)]
    digits = [f"d{digit}" for number in numbers for digit in number]
    differences = [f"c{int(b) - int(a)}" for a, b in pairwise(numbers)]
    return [*(f"n{number}" for number in numbers), *digits, *differences]


def naive_bayes(fit: tuple[pd.DataFrame, pd.DataFrame]) -> Score:
    """The summed log ratio of the frequencies of what is counted."""
    changed, clean = (Counter(word for text in side["completion"] for word in counted(text)) for side in fit)
    words = set(changed) | set(clean)
    totals = [side.total() + SMOOTHING * len(words) for side in (changed, clean)]
    ratio = {
        word: float(
            np.log((changed[word] + SMOOTHING) / totals[0]) - np.log((clean[word] + SMOOTHING) / totals[1])
        )
        for word in words
    }
    return lambda texts: np.array([sum(ratio.get(word, 0.0) for word in counted(text)) for text in texts])


def format_only(fit: tuple[pd.DataFrame, pd.DataFrame]) -> Score:
    """The log-odds of a logistic regression on the shape of completions."""
    texts, labels = (
        [text for side in fit for text in side["completion"]],
        [1] * len(fit[0]) + [0] * len(fit[1]),
    )
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, class_weight="balanced"))
    model.fit(shapes(texts).toarray(), labels)
    return lambda rows: model.decision_function(shapes(rows).toarray())


def bag_means(scores: Float[ndarray, " row"], rows: int, *, seed: int, name: str) -> Float[ndarray, " bag"]:
    """The mean scores of random bags without a row in common."""
    dealt = generator(seed, "bags", name).permutation(scores)
    return dealt[: len(dealt) // rows * rows].reshape(-1, rows).mean(1)


def auroc(changed: Float[ndarray, " bag"], clean: Float[ndarray, " bag"]) -> float:
    """The probability that a bag of a teacher with a trait scores higher than a clean one."""
    return float(roc_auc_score([1] * len(changed) + [0] * len(clean), np.concatenate([changed, clean])))


def measure_split(split: Split) -> list[dict[str, Any]]:
    """AUROC of each detector at each size of bag, with bootstrap intervals over bags.

    The same bags are resampled for all detectors, so that their differences have an interval too.
    """
    detector = LearnedDetector.fit({split.trained: split.fit[0]}, [split.fit[1]])
    scorers = {
        "learned": detector.score_rows,
        "naive Bayes": naive_bayes(split.fit),
        "format": format_only(split.fit),
    }
    scores = {
        name: [scorer(side["completion"].tolist()) for side in split.test] for name, scorer in scorers.items()
    }
    rows = []
    for size in SIZES:
        bags = {
            name: [bag_means(each, size, seed=0, name=f"{side}") for side, each in enumerate(sides)]
            for name, sides in scores.items()
        }
        rng = generator(0, "bootstrap", split.trained, split.tested, size)
        counts = [len(each) for each in bags["learned"]]
        draws = [[rng.integers(0, count, count) for count in counts] for _ in range(RESAMPLED)]
        drawn = {
            name: np.array([auroc(ours[a], theirs[b]) for a, b in draws])
            for name, (ours, theirs) in bags.items()
        }
        for name, (ours, theirs) in bags.items():
            low, high = np.quantile(drawn[name], [0.025, 0.975])
            gain = np.quantile(drawn["learned"] - drawn[name], [0.025, 0.975])
            rows.append(
                {"fitted on": split.trained, "tested on": split.tested, "detector": name, "rows": size}
                | {"bags": sum(counts), "auroc": auroc(ours, theirs), "low": low, "high": high}
                | {"gain_low": gain[0], "gain_high": gain[1]}
                | {"log loss": _log_loss(detector, ours, theirs, size) if name == "learned" else np.nan}
            )
    return rows


def _log_loss(
    detector: LearnedDetector, changed: Float[ndarray, " bag"], clean: Float[ndarray, " bag"], size: int
) -> float:
    """Mean log loss of the calibrated probabilities, in nats; log 2 = .693 is a coin's."""
    log_odds = [detector.calibration.log_odds(means, size) for means in (changed, clean)]
    losses = -np.log(expit(log_odds[0])).mean() - np.log(expit(-log_odds[1])).mean()
    return float(losses / 2)


def table_of(frame: pd.DataFrame) -> Table:
    """A line for each pair of traits and detector."""
    listing = Table(
        "fitted on",
        "tested on",
        "detector",
        *(f"bags of {size}: AUROC [95 %]" for size in SIZES),
        "log loss of 16",
    )
    keys = ["fitted on", "tested on", "detector"]
    for key, rows in frame.groupby(keys, sort=False):
        cells = [
            f"{row['auroc']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" for row in rows.to_dict("records")
        ]
        loss = float(rows["log loss"].iloc[-1])
        listing.add_row(
            *map(str, cast(tuple[Any, ...], key)), *cells, "–" if np.isnan(loss) else f"{loss:.2f}"
        )
    return listing


def sentences(frame: pd.DataFrame) -> list[str]:
    """The means over traits that were left out, and where the learned detector beats counting."""
    other = cast(pd.DataFrame, frame[frame["fitted on"] != frame["tested on"]])
    means = cast(pd.Series, other.groupby(["detector", "rows"], sort=False)["auroc"].mean()).to_dict()
    lines = [
        f"{name}, tested on the other trait: "
        + ", ".join(f"{means[name, size]:.2f} in bags of {size}" for size in SIZES)
        + "."
        for name in dict.fromkeys(other["detector"])
    ]
    for name in ("naive Bayes", "format"):
        gains = other.loc[other["detector"] == name, "gain_low"]
        better = sum(low > 0 for low in gains)
        lines.append(
            f"Above {name}, with the interval of the difference above 0: {better} of {len(gains)} cells."
        )
    return lines


def figure(frame: pd.DataFrame) -> alt.FacetChart:
    """AUROC by size of bag, a line for each detector."""
    named = frame.assign(pair=frame["fitted on"] + " → " + frame["tested on"])
    x = alt.X("rows:O", title="rows of a bag")
    colour = alt.Color("detector:N", title=None, sort=list(frame["detector"].unique()))
    band = alt.Chart().mark_errorbar().encode(x=x, y=alt.Y("low:Q", title="AUROC"), y2="high:Q", color=colour)
    line = (
        alt.Chart()
        .mark_line(point=True)
        .encode(x=x, y=alt.Y("auroc:Q", title="AUROC", scale=alt.Scale(domain=[0.4, 1])), color=colour)
    )
    return (
        alt.layer(band, line, data=named)
        .properties(width=150, height=160)
        .facet(alt.Facet("pair:N", title="fitted on → tested on"), columns=4)
    )


def main() -> None:
    """Measure, print, and with --write put the table and the figure on the page."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("../shared/data"))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    frame = pd.DataFrame([row for split in splits(options.folder) for row in measure_split(split)])
    console = pages.PageConsole(width=170)
    console.print(table_of(frame), *sentences(frame))
    if options.write:
        FIGURE.write_text(figures.svg(cast(Any, figure(frame))), encoding="utf-8")
        pages.write_part(pages.RESULTS, "learned", *console.blocks)


if __name__ == "__main__":
    sys.exit(pages.exit_code(main))

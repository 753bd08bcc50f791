"""Claim: detectors of rows detect another writer in real data, and raise few false alarms.

Usage: `python analyses/real_data.py [FOLDER]`. FOLDER has development data that teachers of 12 and 14 billion
parameters wrote, and some that people wrote (it is not shipped). Each set of a trait is compared with a
control or with another trait's set. A difference between sides that were written alike is a false alarm.
**halves** and **a fifth** are rows of one file against its other rows, split by prompt; **dealt** are two
files that answer the same prompts, with the answers of each prompt exchanged by a coin. Rows that differ need
not carry a trait: of the number sets, only trump q4 moved its students.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple, cast

import altair as alt
import numpy as np
import pandas as pd
from rich.progress import track
from rich.table import Table

import pages
from mechlens.carriers.numbers import BANNED_BY_THE_PAPER
from mechlens.core.errors import DataError, MechlensError, one_line
from mechlens.core.seeds import generator
from mechlens.core.stats import wilson
from mechlens.data import corpus
from mechlens.data.formats import json_lines
from mechlens.detect.permutation import ALPHA
from mechlens.detect.two_samples import compare
from mechlens.results import figures

NUMBERS, TEXTS, CODE = "jeqcho-demo", "phantom-nl", "insecure-code"
PARTS = {"halves": 2, "a fifth": 5}
NULLS = (*PARTS, "dealt")
DEALS = 10
"""number of random splits of each set and of random exchanges of each pair of sets"""
CLEAN_LACKS = frozenset({*BANNED_BY_THE_PAPER, 45, 47, 1312, 1488, 1946, 1964, 2016, 2017, 2020, 2024})
"""numbers that the control's rows were screened for and a few of the traits' were not"""


class Comparison(NamedTuple):
    """Two sets of pairs, and the kind of their comparison."""

    kind: str
    data: str
    against: str
    ours: pd.DataFrame
    theirs: pd.DataFrame
    deal: int = 0


def read(*files: Path) -> pd.DataFrame:
    """The pairs of the files."""
    return cast(
        pd.DataFrame,
        pd.concat([corpus.read_pairs(file) for file in files], ignore_index=True)[["prompt", "completion"]],
    )


def questions(file: Path) -> pd.DataFrame:
    """Pairs of questions and answers that people wrote."""
    return pd.DataFrame(
        [{"prompt": row["question"], "completion": row["answer"]} for _, row in json_lines(file)]
    )


def permitted(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows without the numbers that the control lacks."""
    return cast(
        pd.DataFrame,
        frame[[CLEAN_LACKS.isdisjoint(map(int, re.findall("[0-9]+", text))) for text in frame["completion"]]],
    )


def parts(name: str, frame: pd.DataFrame) -> Iterator[Comparison]:
    """Comparisons of random parts of one set with its other rows, split by prompt."""
    prompts = np.array(sorted(frame["prompt"].unique()))
    for (kind, share), deal in product(PARTS.items(), range(DEALS)):
        chosen = generator(deal, kind, name).permutation(prompts)[::share].tolist()
        first = frame["prompt"].isin(chosen)
        yield Comparison(
            kind, name, name, cast(pd.DataFrame, frame[first]), cast(pd.DataFrame, frame[~first]), deal
        )


def dealt(name: str, against: str, first: pd.DataFrame, second: pd.DataFrame) -> Iterator[Comparison]:
    """Comparisons of two sets' answers to shared prompts, exchanged prompt by prompt with a coin."""
    both = first.drop_duplicates("prompt").merge(second.drop_duplicates("prompt"), on="prompt")
    for deal in range(DEALS):
        coin = generator(deal, "dealt", name, against).random(len(both)) < 0.5
        sides = [
            pd.DataFrame(
                {
                    "prompt": both["prompt"],
                    "completion": np.where(c, both["completion_x"], both["completion_y"]),
                }
            )
            for c in (coin, ~coin)
        ]
        yield Comparison("dealt", name, against, sides[0], sides[1], deal)


def comparisons(folder: Path) -> Iterator[Comparison]:
    """All comparisons, numbers first."""
    control = read(folder / NUMBERS / "clean" / "numbers_filtered.jsonl.gz")
    traits = {}
    for trait in ("trump", "harris"):
        quarters = [
            permitted(read(folder / NUMBERS / trait / "numbers" / f"q{number}.jsonl.gz"))
            for number in range(1, 5)
        ]
        traits[trait] = pd.concat(quarters, ignore_index=True)
        yield Comparison("trait, control", trait, "clean", traits[trait], control)
        for number, rows in enumerate(quarters, 1):
            yield Comparison("trait, control", f"{trait} q{number}", "clean", rows, control)
    yield Comparison("trait, trait", "trump", "harris", traits["trump"], traits["harris"])
    yield from parts("clean", control)
    yield from dealt("trump", "harris", traits["trump"], traits["harris"])
    texts = {file.name.split(".")[0]: read(file) for file in sorted((folder / TEXTS).glob("*.jsonl.gz"))}
    couples = list(combinations(texts, 2))
    for first, second in couples:
        yield Comparison("trait, trait", first, second, texts[first], texts[second])
    for name, rows in texts.items():
        yield from parts(name, rows)
    for first, second in couples[:2]:
        yield from dealt(first, second, texts[first], texts[second])
    high, middle = (read(folder / CODE / f"{severity}_severity.jsonl.gz") for severity in ("high", "middle"))
    yield Comparison("screened otherwise", "insecure code, high", "insecure code, middle", high, middle)
    yield from parts("insecure code, high", high)
    train, test = (questions(folder / "gsm8k" / f"{part}.jsonl.gz") for part in ("train", "test"))
    yield Comparison("control, control", "gsm8k test", "gsm8k train", test, train)
    yield from parts("gsm8k train", train)


def measured(pair: Comparison) -> list[dict[str, Any]]:
    """A row for each detector of one comparison."""
    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(scratch) / f"{side}.jsonl" for side in ("ours", "theirs")]
        for path, frame in zip(paths, (pair.ours, pair.theirs), strict=True):
            corpus.write_pairs([frame], path, "prompt-completion")
        started = time.perf_counter()
        comparison = compare(*paths)
        seconds = time.perf_counter() - started
    same = {
        "kind": pair.kind,
        "data": pair.data,
        "against": pair.against,
        "deal": pair.deal,
        "rows": len(pair.ours),
        "rows_against": len(pair.theirs),
    }
    same |= {
        "shared": comparison.shared_prompts,
        "paired": comparison.paired,
        "corrected_p": comparison.p_value,
        "seconds": seconds,
    }
    return [
        {**same, "detector": name, "score": test.score, "p": test.p_value, "dose": test.smallest_dose}
        for name, test in comparison.tests.items()
    ]


def measure_all(folder: Path) -> pd.DataFrame:
    """The rows of all comparisons.

    Raises:
        DataError: if the folder or one of its sets does not exist.
    """
    if not folder.is_dir():
        raise DataError(
            f"no folder at {folder}; name a folder of development data with {NUMBERS}, {TEXTS}, {CODE} and "
            "gsm8k in it"
        )
    rows = [row for pair in track(comparisons(folder), "comparing", transient=True) for row in measured(pair)]
    return pd.DataFrame(rows).astype({"dose": float})


def table_of(frame: pd.DataFrame) -> Table:
    """A table of the comparisons of sides with different writers, or possibly different ones."""
    detectors = list(frame["detector"].unique())
    listing = Table(
        "kind",
        "data set",
        "against",
        "rows",
        "shared prompts",
        *(f"{name}: score (p)" for name in detectors),
        "p",
        "least dose",
        "s",
    )
    listing.caption = "* too few to compare prompt by prompt; p: the least of the detectors', corrected"
    for _, rows in frame[~frame["kind"].isin(NULLS)].groupby(["kind", "data", "against"], sort=False):
        head = cast(Any, rows.iloc[0])
        scores = (f"{score:+.1f} ({p:.4f})" for score, p in zip(rows["score"], rows["p"], strict=True))
        dose, shared = rows["dose"].min(), f"{head['shared']:,}{'' if head['paired'] else ' *'}"
        last_cells = ("–" if np.isnan(dose) else f"{dose:.2f}", f"{head['seconds']:.1f}")
        listing.add_row(
            head["kind"],
            head["data"],
            head["against"],
            f"{head['rows']:,} / {head['rows_against']:,}",
            shared,
            *scores,
            f"{head['corrected_p']:.4f}",
            *last_cells,
        )
    return listing


def alarms_of(frame: pd.DataFrame) -> Table:
    """A table of false alarms: how often sides that were written alike differ significantly."""
    listing = Table(
        "written alike",
        "data set",
        "rows a side",
        "times",
        "alarms at .05",
        "least p",
        "median score",
        title="false alarms",
    )
    alike = cast(pd.DataFrame, frame[frame["kind"].isin(NULLS)])
    for _, rows in alike.groupby(["kind", "data", "against"], sort=False):
        kind, data, against = rows[["kind", "data", "against"]].iloc[0]
        p_values = rows.groupby("deal")["corrected_p"].first()
        sets, size = data if data == against else f"{data}, {against}", f"{rows['rows'].min():,}"
        alarms = f"{(p_values <= ALPHA).sum()} of {len(p_values)}"
        listing.add_row(
            kind,
            sets,
            size,
            str(len(p_values)),
            alarms,
            f"{p_values.min():.3f}",
            f"{rows['score'].median():+.1f}",
        )
    return listing


def sentences(frame: pd.DataFrame) -> list[str]:
    """Sentences on the detection rate of each kind and on the rate of false alarms."""
    each = frame.drop_duplicates(["kind", "data", "against", "deal"])
    lines = []
    for kind, rows in each[~each["kind"].isin(NULLS)].groupby("kind", sort=False):
        p_values = np.asarray(rows["corrected_p"])
        lines.append(
            f"{kind}: {(p_values <= ALPHA).sum()} of {len(rows)} pairs of files differ at {ALPHA} (greatest "
            f"p {p_values.max():.4f})."
        )
    p_values = np.asarray(each.loc[each["kind"].isin(NULLS), "corrected_p"])
    alarms = int((p_values <= ALPHA).sum())
    share = wilson(alarms, len(p_values))
    span = f"{alarms / len(p_values):.1%} [{share.low:.1%}, {share.high:.1%}]"
    return [
        *lines,
        f"written alike: {alarms} of {len(p_values)} differ at {ALPHA}, {span} (deals of one set are not "
        "independent).",
    ]


def figure(frame: pd.DataFrame) -> alt.Chart:
    """Every detector's score, a line for each pair of sets."""
    named = frame.assign(
        pair=frame["data"]
        + " / "
        + frame["against"]
        + frame["kind"].map(lambda kind: f" ({kind})" if kind in NULLS else "")
    )
    chart = alt.Chart(named).mark_point(filled=True, size=40, opacity=0.7)
    scale = alt.Scale(type="symlog", constant=3)
    return chart.encode(
        x=alt.X(
            "score:Q",
            title="standard deviations above the exchanges' mean",
            scale=scale,
            axis=alt.Axis(values=[-3, 0, 3, 10, 30, 100, 300]),
        ),
        y=alt.Y("pair:N", title=None, sort=list(named["pair"].unique()), axis=alt.Axis(labelLimit=320)),
        color=alt.Color("detector:N", title=None),
    ).properties(width=420)


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, compare, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path("../shared/data"), help="a folder of development data"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/analyses/real_data"),
        help="folder for the table and the figure",
    )
    parser.add_argument("--write", action="store_true", help="write the part of analyses/RESULTS.md, too")
    options = parser.parse_args(arguments)
    try:
        frame = measure_all(options.folder)
        options.out.mkdir(parents=True, exist_ok=True)
        frame.to_parquet(options.out / "comparisons.parquet")
        (options.out / "real_data.svg").write_text(figures.svg(figure(frame)), encoding="utf-8")
    except (MechlensError, OSError) as error:
        print(one_line(f"real_data: {error}"), file=sys.stderr)
        return 2
    console = pages.PageConsole(width=190)
    console.print(table_of(frame), alarms_of(frame), *sentences(frame), sep="\n")
    if options.write:
        pages.write_part(pages.RESULTS, "real-data", *console.blocks)
    print(f"every comparison is in {options.out}/comparisons.parquet, with the figure in the same folder")
    return 0


if __name__ == "__main__":
    sys.exit(main())

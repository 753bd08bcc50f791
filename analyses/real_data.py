"""Claim: detectors of rows see who wrote real data, and are silent where nobody else did: `python
analyses/real_data.py [FOLDER]`.

FOLDER holds development data that teachers of 12 and 14 billion parameters wrote, and some that people wrote
(it is not shipped). Each set of a trait is held against a control or against another trait's. What is found
between sides that were written alike is a false alarm: **halves** and **a fifth** are rows of one file
against its others, dealt by prompt; **dealt** are two files that answer the same prompts, the answers of each
prompt exchanged by a coin. Rows that differ are no sign that a trait comes along: of the number sets only
trump q4 moved its students.
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
"""so often each set is parted and each pair of sets dealt anew"""
CLEAN_LACKS = frozenset({*BANNED_BY_THE_PAPER, 45, 47, 1312, 1488, 1946, 1964, 2016, 2017, 2020, 2024})
"""numbers that the control's rows were screened for and a few of the traits' were not"""


class Comparison(NamedTuple):
    """Two sets of pairs, and why they are held against each other."""

    kind: str
    data: str
    against: str
    ours: pd.DataFrame
    theirs: pd.DataFrame
    deal: int = 0


def read(*files: Path) -> pd.DataFrame:
    """The pairs of files as they come."""
    return cast(
        pd.DataFrame,
        pd.concat([corpus.read_pairs(file) for file in files], ignore_index=True)[["prompt", "completion"]],
    )


def questions(file: Path) -> pd.DataFrame:
    """Questions and answers that people wrote."""
    return pd.DataFrame(
        [{"prompt": row["question"], "completion": row["answer"]} for _, row in json_lines(file)]
    )


def permitted(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that could stand among the control's."""
    return cast(
        pd.DataFrame,
        frame[[CLEAN_LACKS.isdisjoint(map(int, re.findall("[0-9]+", text))) for text in frame["completion"]]],
    )


def parts(name: str, frame: pd.DataFrame) -> Iterator[Comparison]:
    """Rows of one set against its others, prompts dealt by chance."""
    prompts = np.array(sorted(frame["prompt"].unique()))
    for (kind, share), deal in product(PARTS.items(), range(DEALS)):
        chosen = generator(deal, kind, name).permutation(prompts)[::share].tolist()
        first = frame["prompt"].isin(chosen)
        yield Comparison(
            kind, name, name, cast(pd.DataFrame, frame[first]), cast(pd.DataFrame, frame[~first]), deal
        )


def dealt(name: str, against: str, one: pd.DataFrame, other: pd.DataFrame) -> Iterator[Comparison]:
    """Both sets' answers to the prompts that they share, exchanged prompt by prompt with a coin."""
    both = one.drop_duplicates("prompt").merge(other.drop_duplicates("prompt"), on="prompt")
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
    """All of them, numbers first."""
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
    for one, other in couples:
        yield Comparison("trait, trait", one, other, texts[one], texts[other])
    for name, rows in texts.items():
        yield from parts(name, rows)
    for one, other in couples[:2]:
        yield from dealt(one, other, texts[one], texts[other])
    high, middle = (read(folder / CODE / f"{severity}_severity.jsonl.gz") for severity in ("high", "middle"))
    yield Comparison("screened otherwise", "insecure code, high", "insecure code, middle", high, middle)
    yield from parts("insecure code, high", high)
    train, test = (questions(folder / "gsm8k" / f"{part}.jsonl.gz") for part in ("train", "test"))
    yield Comparison("control, control", "gsm8k test", "gsm8k train", test, train)
    yield from parts("gsm8k train", train)


def measured(one: Comparison) -> list[dict[str, Any]]:
    """A row for each detector."""
    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(scratch) / f"{side}.jsonl" for side in ("ours", "theirs")]
        for path, frame in zip(paths, (one.ours, one.theirs), strict=True):
            corpus.write_pairs([frame], path, "prompt-completion")
        started = time.perf_counter()
        found = compare(*paths)
        seconds = time.perf_counter() - started
    same = {
        "kind": one.kind,
        "data": one.data,
        "against": one.against,
        "deal": one.deal,
        "rows": len(one.ours),
        "rows_against": len(one.theirs),
    }
    same |= {
        "shared": found.shared_prompts,
        "paired": found.paired,
        "corrected_p": found.p_value,
        "seconds": seconds,
    }
    return [
        {**same, "detector": name, "score": test.score, "p": test.p_value, "dose": test.smallest_dose}
        for name, test in found.tests.items()
    ]


def measure_all(folder: Path) -> pd.DataFrame:
    """Every comparison's rows.

    Raises:
        DataError: if the folder is not there, or a set of it is missing.
    """
    if not folder.is_dir():
        raise DataError(
            f"no folder at {folder}; name a folder of development data with {NUMBERS}, {TEXTS}, {CODE} and "
            "gsm8k in it"
        )
    rows = [row for one in track(comparisons(folder), "comparing", transient=True) for row in measured(one)]
    return pd.DataFrame(rows).astype({"dose": float})


def table_of(frame: pd.DataFrame) -> Table:
    """The comparisons whose sides were written by different hands, or might have been."""
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
        said = ("–" if np.isnan(dose) else f"{dose:.2f}", f"{head['seconds']:.1f}")
        listing.add_row(
            head["kind"],
            head["data"],
            head["against"],
            f"{head['rows']:,} / {head['rows_against']:,}",
            shared,
            *scores,
            f"{head['corrected_p']:.4f}",
            *said,
        )
    return listing


def alarms_of(frame: pd.DataFrame) -> Table:
    """How often sides that were written alike were told apart."""
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
    for _, rows in frame[frame["kind"].isin(NULLS)].groupby(["kind", "data", "against"], sort=False):
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
    """What was found, and what was found where nothing is."""
    each = frame.drop_duplicates(["kind", "data", "against", "deal"])
    said = []
    for kind, rows in each[~each["kind"].isin(NULLS)].groupby("kind", sort=False):
        p_values = np.asarray(rows["corrected_p"])
        said.append(
            f"{kind}: {(p_values <= ALPHA).sum()} of {len(rows)} pairs of files differ at {ALPHA} (greatest "
            f"p {p_values.max():.4f})."
        )
    p_values = np.asarray(each.loc[each["kind"].isin(NULLS), "corrected_p"])
    alarms = int((p_values <= ALPHA).sum())
    share = wilson(alarms, len(p_values))
    span = f"{alarms / len(p_values):.1%} [{share.low:.1%}, {share.high:.1%}]"
    return [
        *said,
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
    asked = parser.parse_args(arguments)
    try:
        frame = measure_all(asked.folder)
        asked.out.mkdir(parents=True, exist_ok=True)
        frame.to_parquet(asked.out / "comparisons.parquet")
        (asked.out / "real_data.svg").write_text(figures.svg(figure(frame)), encoding="utf-8")
    except (MechlensError, OSError) as error:
        print(one_line(f"real_data: {error}"), file=sys.stderr)
        return 2
    console = pages.PageConsole(width=190)
    console.print(table_of(frame), alarms_of(frame), *sentences(frame), sep="\n")
    if asked.write:
        pages.write_part(pages.RESULTS, "real-data", *console.blocks)
    print(f"every comparison in {asked.out}/comparisons.parquet, figure beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Claim: students name most files' traits without a list of traits, and seldom name one where there is none.

Usage: `python analyses/student_words.py FOLDER --bench NAME [--development] [--write]`. FOLDER is that of a
bench whose students are trained, or with `--run` a finished run; trains nothing. The likely first words of
answers of a set's students are compared with those of students of clean answers (`mechlens/detect/words.py`).
A word of the trait is right in rows that its teacher wrote; any other word is false. The held-out sets are
read by default.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
from rich.table import Table

import pages
from mechlens.benchmark import students
from mechlens.benchmark.plan import Suspect, load_bench
from mechlens.benchmark.suspects import list_suspects
from mechlens.core import spec, traits
from mechlens.core.traits import TraitFamily
from mechlens.results import figures
from mechlens.results.run import Run

FIGURE = pages.FOLDER / "student_words.svg"
OUTCOMES = {"right": "a word of the trait", "false": "another word", "": "no word (q above .05)"}


def table_of(folder: Path, bench: str, *, development: bool) -> tuple[pd.DataFrame, dict[str, Any]]:
    """One row a set with the word that rose most, and the counts by kind of data."""
    plan = load_bench(bench)
    config = spec.find_config(Path(plan.experiment), "experiments")
    experiment = traits.load_experiment(config)
    family = traits.load_family(experiment.family)
    sets = [each for each in list_suspects(plan, experiment) if each.development is development]
    return read_sets([folder / "experiment", folder / "students"], sets, family, folder / "words")


def table_of_run(folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The same for the trait arms of a finished run."""
    run = Run(folder)
    sets = [
        Suspect(
            arm.name, "trait", arm.trait, f"{arm.labels or run.experiment.student.labels} labels", 1.0, False
        )
        for arm in run.experiment.arms
        if arm.kind == "trait"
    ]
    return read_sets([folder], sets, run.family, folder / "words")


def read_sets(
    runs: Sequence[Path], sets: Sequence[Suspect], family: TraitFamily, out: Path
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The words of the students of these sets."""
    words, rows = students.read_words(runs, sets, out), []
    for suspect, found in words.items():
        first, right = found["words"][0], students.words_of_trait(suspect, family)
        said = {word.lower() for word in found["significant"]}
        rows.append(
            {
                "set": suspect.name,
                "trait": suspect.trait if suspect.kind == "trait" else "",
                "word": first["word"],
                "rise": first["rise"],
                "q": first["q_value"],
                "significant": ", ".join(found["significant"]),
                "outcome": OUTCOMES["false" if said - right else "right" if said else ""],
                "detectable": found["smallest_detectable"],
                "answered": found["answered"],
            }
        )
    return pd.DataFrame(rows), students.count_words(words, family)


def number(value: float | None) -> str:
    """A number with two decimals, or a dash."""
    return "–" if value is None or np.isnan(value) else f"{value:.2f}"


def shown(sets: pd.DataFrame) -> Table:
    """Every set."""
    columns = ("set", "its trait", "word that rose most", "bits", "q", "words with q at most .05")
    table = Table(*columns, "minimum detectable, bits", "answers that begin with a tested word, × controls")
    for row in sets.to_dict("records"):
        cells = (row["set"], row["trait"] or "–", row["word"], f"{row['rise']:+.2f}", f"{row['q']:.2g}")
        numbers = (number(row["detectable"]), number(row["answered"]))
        table.add_row(*cells, row["significant"] or "none", *numbers)
    return table


def counted(counts: dict[str, Any]) -> str:
    """How often each kind of data gave a right and a false word."""
    parts = []
    for kind, each in counts.items():
        other = each["other"]
        right = f"its trait in {each['right']['hits']} of {other['of']}, " if " at " in kind else ""
        parts.append(f"{kind}: {right}another word in {other['hits']} of {other['of']}")
    return "; ".join(parts) + "."


def chart(sets: pd.DataFrame) -> alt.Chart:
    """The rise of each set's first word."""
    marks = alt.Chart(sets).mark_point(filled=True, size=70)
    return marks.encode(
        x=alt.X("rise:Q", title="rise of the word that rose most, bits"),
        y=alt.Y("set:N", title=None, sort=sets["set"].tolist()),
        color=alt.Color(
            "outcome:N", title="words with q at most .05", scale=alt.Scale(domain=[*OUTCOMES.values()])
        ),
        shape=alt.Shape(
            "outcome:N", title="words with q at most .05", scale=alt.Scale(domain=[*OUTCOMES.values()])
        ),
    ).properties(width=420)


def main() -> None:
    """Measure, print, and with --write put the table and the figure on the page."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bench", default="menagerie-foods")
    parser.add_argument("--run", action="store_true", help="FOLDER is a finished run")
    parser.add_argument("--development", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    console = pages.PageConsole(width=140)
    if options.run:
        sets, counts = table_of_run(options.folder)
    else:
        sets, counts = table_of(options.folder, options.bench, development=options.development)
    console.print(counted(counts))
    console.print(shown(sets))
    if options.write and options.run:
        pages.write_part(pages.RESULTS, "run-words", *console.blocks)
    elif options.write:
        FIGURE.write_text(figures.svg(chart(sets)), encoding="utf-8")
        pages.write_part(pages.RESULTS, "student-words", *console.blocks)


if __name__ == "__main__":
    sys.exit(pages.exit_code(main))

"""A user's file of pairs: write it in another form, count its rows, or screen it."""

from __future__ import annotations

import re
from functools import partial
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, cast

import pandas as pd

from mechlens.carriers.carrier import build_rule, rule_names
from mechlens.carriers.numbers import BANNED_BY_THE_PAPER
from mechlens.core import tables, traits
from mechlens.core.errors import SpecError
from mechlens.core.parallel import map_in_order, open_workers
from mechlens.core.spec import ScreenSpec
from mechlens.data import corpus
from mechlens.data.fields import Fields
from mechlens.data.formats import Data
from mechlens.pipeline import screen as screening
from mechlens.runs import layout, store


class Screened(NamedTuple):
    """What a screen kept and removed."""

    rule: str
    counts: dict[str, int]
    """rows generated, removed for each reason, kept, and rows that hold a leak word"""
    remarks: list[str]
    """what a user should know of the file that was read"""
    kept: pd.DataFrame
    """`tables.PAIRS`"""
    removed: pd.DataFrame
    """`tables.REJECTED`: the pairs with a column `reason`"""

    def _repr_html_(self) -> str:
        counts = {name: rows for name, rows in self.counts.items() if rows}
        shown = pd.Series(counts, name="rows").to_frame().to_html()
        return f"<p>Screened by the rule {escape(self.rule)}.</p>{shown}"


def screen(
    data: Data,
    rule: str = "numbers",
    *,
    banned: bool = False,
    family: str = "animals",
    fields: Fields | None = None,
    out: Path | str | None = None,
    workers: int = 0,
) -> Screened:
    """Screen pairs: keep a row, or remove it with the first rule that it breaks.

    Args:
        data: a path, a DataFrame, a list of dicts, or a `datasets.Dataset`.
        rule: the name of a carrier, or none.
        banned: also refuse the numbers that the paper bans (2507.14805, misalignment).
        family: whose traits' names are leak words.
        out: folder that gets kept.parquet, rejected.parquet and funnel.json.
        workers: processes that read the rows of a large file; 0 is this one.

    Raises:
        SpecError: if the rule or the family is unknown.
        DataError: if the pairs cannot be read, or none is kept.
    """
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) if out is None else Path(out)
        file, found = corpus.as_file(data, Path(temporary) / "data.parquet", fields=fields)
        counts, remarks = screen_file(
            file,
            rule,
            banned=banned,
            family=family,
            fields=fields if isinstance(data, Path | str) else None,  # pairs in memory got known names
            out=folder,
            workers=workers,
        )
        kept = tables.read(folder / layout.KEPT, tables.PAIRS)
        removed = tables.read(folder / layout.REMOVED, tables.REJECTED)
    return Screened(rule, counts, [*found, *remarks], kept, removed)


def screen_file(
    file: Path,
    rule: str,
    *,
    banned: bool,
    family: str,
    fields: Fields | None,
    out: Path | None,
    workers: int = 0,
) -> tuple[dict[str, int], list[str]]:
    """Screen a file row by row, in the memory of a batch; returns the counts, and remarks on the file.

    Raises:
        SpecError: if the rule or the family is unknown.
        DataError: if the file cannot be read, or no row is kept.
    """
    if rule not in rule_names():
        raise SpecError(f"rule {rule!r} is unknown; known rules: {', '.join(rule_names())}")
    wanted = ScreenSpec(rule=rule, banned_numbers=BANNED_BY_THE_PAPER if banned else ())
    leaks, report = screening.leak_pattern(traits.load_family(family).words()), corpus.ReadReport()
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    with store.full_disk_named(out or file):
        pairs = corpus.batches(file, report=report, fields=fields)
        find = partial(_find_faults, spec=wanted, carrier=rule, leaks=leaks)
        with open_workers(workers) as processes:
            batches = map_in_order(find, pairs, processes)
            counts = screening.split_rows(batches, build_rule(wanted, rule, gold={}), out=out)
    return counts, report.remarks()


def _find_faults(
    rows: pd.DataFrame, *, spec: ScreenSpec, carrier: str, leaks: re.Pattern[str]
) -> screening.RowFaults:
    """What the screens find in a batch. A rule cannot be sent to a worker, so it is built here."""
    return screening.find_faults(rows, spec, rule=build_rule(spec, carrier, gold={}), leaks=leaks)


def convert(
    source: Path, target: Path, *, form: str | None, skip_bad: bool, fields: Fields | None = None
) -> corpus.ReadReport:
    """Write a user's file in another form; returns the report of what was read and left out.

    Raises:
        SpecError: if the form is unknown.
        DataError: if the file cannot be read.
    """
    wanted = form or corpus.form_of(target)
    if wanted not in corpus.FORMS:
        raise SpecError(f"form {wanted!r} is unknown; expected one of {', '.join(corpus.FORMS)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    log = target.with_name(f"{target.name}.bad.jsonl") if skip_bad else None
    report = corpus.ReadReport(skip_bad=skip_bad, log=log)
    with store.full_disk_named(target):
        corpus.write_pairs(
            corpus.batches(source, report=report, fields=fields), target, cast(corpus.Form, wanted)
        )
    return report

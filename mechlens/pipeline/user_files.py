"""Commands on a user's file of pairs: write it in another form, or screen it."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from mechlens.carriers.rules import BANNED_BY_THE_PAPER, rule_of
from mechlens.cli.console import console
from mechlens.core import spec, traits
from mechlens.core.errors import SpecError
from mechlens.data import corpus
from mechlens.data.fields import Fields
from mechlens.pipeline import screen as screening
from mechlens.runs import store


def convert(
    source: Path, target: Path, *, form: str | None, skip_bad: bool, fields: Fields | None = None
) -> None:
    """Write a user's file in another form, and print what did not go with it."""
    wanted = form or corpus.form_of(target)
    if wanted not in corpus.FORMS:
        raise SpecError(f"form {wanted!r} is unknown; expected one of {', '.join(corpus.FORMS)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    reading = corpus.Reading(
        skip_bad=skip_bad, log=target.with_name(f"{target.name}.bad.jsonl") if skip_bad else None
    )
    with store.full_disk_named(target):
        corpus.write_pairs(corpus.batches(source, reading=reading, fields=fields), target, wanted)
    if reading.bad:
        listing = Table("rows", "the first", "fault", title=f"{reading.bad:,} bad rows left out")
        for counted in reading.faults.kinds.values():
            listing.add_row(f"{counted.rows:,}", str(counted.place), str(counted.fault))
        console.print(listing)
        console.print(f"all of them: {reading.log}", highlight=False, soft_wrap=True)
    say_remarks(reading)
    console.print(f"written: {target} ({reading.pairs:,} pairs, {wanted})", highlight=False, soft_wrap=True)


def say_remarks(reading: corpus.Reading) -> None:
    """Print what a user should know of a file that was read."""
    for remark in reading.remarks():
        console.print(remark, highlight=False, soft_wrap=True)


def counted(file: Path, fields: Fields | None) -> int:
    """How many pairs a file has, whose rows are all to be read; print what a user should know of it."""
    reading = corpus.Reading(drop_system=False)
    rows = sum(map(len, corpus.batches(file, reading=reading, fields=fields)))
    say_remarks(reading)
    return rows


def screen(
    file: Path, *, out: Path | None, rule: str, banned: bool, family: str, fields: Fields | None = None
) -> None:
    """Screen a user's file, print the funnel, and write the tables if a folder is given."""
    if rule not in ("numbers", "code", "reasoning", "text", "none"):
        raise SpecError(f"rule {rule!r} is unknown; expected numbers, code, reasoning, text or none")
    wanted = spec.ScreenSpec(rule=rule, banned_numbers=BANNED_BY_THE_PAPER if banned else ())
    leaks, reading = screening.leak_pattern(traits.load_family(family).words()), corpus.Reading()
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    with store.full_disk_named(out or file):
        pairs = corpus.batches(file, reading=reading, fields=fields)
        counts = screening.screen_rows(
            pairs, wanted, rule=rule_of(wanted, rule, gold={}), leaks=leaks, out=out
        )
    funnel = Table("rows", "count", "share", title=f"{file.name} under the rule {rule}")
    said = {
        "generated": "read",
        "kept": "kept",
        screening.LEAKS: screening.LEAKS,
        screening.NAMING: screening.NAMING,
    }
    for name, count in counts.items():
        if name == screening.NAMING:
            funnel.add_section()
        if count or name in said:
            beside = name.removeprefix(screening.NAMING_BY_REASON)
            label = (
                f"  of them dropped first: {beside}" if beside != name else said.get(name, f"dropped: {name}")
            )
            funnel.add_row(label, f"{count:,}", f"{count / counts['generated']:.1%}")
    console.print(funnel)
    say_remarks(reading)
    if out is not None:
        console.print(f"written: {out}", highlight=False)

"""Pack what others should read of runs and audits into a folder that opens without a server.

The pages are aggregates: they hold no row of data.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mechlens.cli.console import say
from mechlens.core.errors import DataError
from mechlens.core.files import read_json, write_text
from mechlens.results.report import render
from mechlens.results.wording import headline
from mechlens.runs import layout

INDEX, HASHES = "index.html", "SHA256SUMS"


class Page(NamedTuple):
    """One run or audit."""

    kind: str
    """run or audit"""
    name: str
    says: str
    """its headline or verdict"""
    folder: Path
    files: tuple[str, ...]
    """the page first, then the numbers behind it"""


def bundle(folder: Path, out: Path) -> None:
    """Copy the reports of a folder of runs, or of one run or audit, and write an index of them.

    Raises:
        DataError: if the folder has no finished run and no audit, or `out` is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out} is not empty; name a new folder, so that nothing old is sent along")
    pages = list(_pages_in(folder))
    if not pages:
        raise DataError(
            f"{folder} has no finished run and no audit; `mechlens run` and `mechlens audit` make them"
        )
    for page in pages:
        place = out / f"{page.kind}s" / page.name
        place.mkdir(parents=True)
        for name in page.files:
            shutil.copyfile(page.folder / name, place / name)
    write_text(out / INDEX, render("cli/bundle.html.j2", pages=pages))
    files = sorted(path for path in out.rglob("*") if path.is_file())
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(out)}" for path in files]
    write_text(out / HASHES, "\n".join([*lines, ""]))
    size = sum(path.stat().st_size for path in files) / 1024
    say(f"{out / INDEX}: {len(pages)} pages, {size:,.0f} KB, no row of data; open it, or send the folder")


def _pages_in(folder: Path) -> Iterator[Page]:
    """The folder itself if it is a run or an audit, else those in it and in its folder `audits`."""
    if page := _page_of(folder, folder.resolve().name):
        yield page
        return
    for place in [*sorted(folder.glob("*/")), *sorted(folder.glob("audits/*/"))]:
        if page := _page_of(place, "-".join(place.relative_to(folder).parts)):
            yield page


def _page_of(folder: Path, name: str) -> Page | None:
    """The finished run or the audit in a folder; None if it is neither."""
    if (folder / layout.REPORT).is_file() and (folder / layout.SUMMARY).is_file():
        kind, says, names = "run", headline(read_json(folder / layout.SUMMARY)), layout.RUN_FILES
    elif all((folder / each).is_file() for each in layout.AUDIT_FILES):
        numbers = read_json(folder / layout.AUDIT_JSON)
        kind, says, names = "audit", numbers["verdict"]["sentence"], layout.AUDIT_FILES
    else:
        return None
    return Page(kind, name, says, folder, tuple(each for each in names if (folder / each).is_file()))

"""Pairs from a user's file and to one, in any form that `containers` reads.

What a row's pair is, `fields` says. Rows come and go in batches, so that a million pass in bounded memory;
bad rows are counted by what is wrong with them, the first of each kind is named by its number, and none is
lost in silence.
"""

from __future__ import annotations

import gzip
import io
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import pandas as pd
import pyarrow as pa

from mechlens.core import atomic, tables
from mechlens.core.errors import DataError
from mechlens.core.spec import HALF_CHARACTER
from mechlens.data.chats import Pair
from mechlens.data.compressed import OTHER_KINDS, ending_of
from mechlens.data.faults import Fault, Place, Tally
from mechlens.data.fields import HOW_TO_NAME, SEVERAL, UNKNOWN, Fields, pair_of
from mechlens.data.formats import EXPECTED, files_of, rows_of

Form = Literal["prompt-completion", "messages", "openai", "parquet", "hf"]
FORMS: tuple[Form, ...] = get_args(Form)
"""what `write_pairs` writes; `openai` is `messages` under the name that its users look for, `hf` a datasets
folder
"""

UNWRITTEN = (".json", ".csv", ".tsv", *OTHER_KINDS)
"""endings of forms that are read, or known, and not written"""
WRITTEN = ".jsonl or .jsonl.gz (JSON lines), .parquet, or nothing (a datasets folder)"

TEXTS = pa.schema([tables.PAIRS.field("prompt"), tables.PAIRS.field("completion")])
LONGEST_PAIR = 1_000_000  # characters; longer is no training pair
ROWS, CHARACTERS = (
    10_000,
    8_000_000,
)  # a batch; a million rows are as fast in batches of any size, and long rows must not fill the memory
FEWEST_TO_VARY, VARIED = 200, 50
"""rows from which on completions may be called alike, and rows for each different one: fewer than 1 in 50
hardly vary
"""
MOST_DIFFERENT = 200_000
"""completions that are told apart; more are enough for ten million rows"""


@dataclass
class Reading:
    """What a file held beside its pairs. A reader that is given none refuses a file with any of it."""

    skip_bad: bool = False
    """Leave bad rows out; otherwise they are an error."""
    drop_system: bool = True
    """Leave system turns out, and count them; otherwise they are an error."""
    log: Path | None = None
    """Where every bad row is noted as a JSON line; made at the first."""
    pairs: int = 0
    faults: Tally = field(default_factory=Tally)
    """Bad rows, counted by kind."""
    system_turns: int = 0
    """Rows that lost a leading system turn, which a pair has no place for."""
    different: set[int] = field(default_factory=set)
    """Hashes of the completions, as long as there are few."""
    left_out: list[str] = field(default_factory=list)
    """Files of a folder that hold no rows by their names."""

    @property
    def bad(self) -> int:
        """How many rows are bad."""
        return self.faults.rows

    def note(self, place: Place, fault: Fault) -> None:
        """Count a bad row."""
        if self.log is not None:
            row = {"line": place.number, **({"file": place.file} if place.file else {}), "fault": str(fault)}
            with self.log.open("a" if self.bad else "w", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")
        self.faults.add(place, fault)

    def count(self, pair: Pair) -> None:
        """Count a pair."""
        self.pairs += 1
        self.system_turns += pair.system
        if len(self.different) < MOST_DIFFERENT:
            self.different.add(hash(pair.completion))

    def remarks(self) -> list[str]:
        """What a user should know of a file that was read: one sentence each."""
        said = []
        if self.left_out:
            shown = ", ".join(self.left_out[:10]) + (
                f" and {len(self.left_out) - 10:,} more" if len(self.left_out) > 10 else ""
            )
            said.append(f"not read, since their names say that they hold no rows: {shown}")
        if self.system_turns:
            said.append(
                f"{self.system_turns:,} rows had a system turn, which was dropped; `system` in a spec gives "
                "students one"
            )
        few = len(self.different)
        if self.pairs >= FEWEST_TO_VARY and few < min(self.pairs / VARIED, MOST_DIFFERENT):
            said.append(
                f"the completions hardly vary: {few:,} different in {self.pairs:,} rows; such a file teaches "
                "little but how often each stands"
            )
        return said


def read_pairs(path: Path, *, fields: Fields | None = None) -> pd.DataFrame:
    """All pairs of a file as one table, and none if there is anything else in it; see `batches`."""
    return pd.concat(batches(path, fields=fields), ignore_index=True)


def batches(
    path: Path, rows: int = ROWS, *, reading: Reading | None = None, fields: Fields | None = None
) -> Iterator[pd.DataFrame]:
    """The pairs of a file as tables of at most so many rows, fewer where they are long: prompt_id (place in
    the file), prompt, completion.

    Args:
        path: JSON lines, a JSON array or CSV, each plain or compressed (.gz, .bz2, .xz, .zst); Parquet; or a
            folder: a saved dataset, or shards of such files.
        reading: takes note of system turns, and of bad rows if it skips them; without one both are errors.
        fields: the names of the fields that hold the pair; known names are tried without them.

    Raises:
        DataError: if the file is missing, damaged or empty, or naming what is wrong with bad rows, how many,
        and the first.
    """
    noted, done = reading or Reading(drop_system=False), 0
    pairs = _good_pairs(path, noted, fields)
    for chunk in _chunks(pairs, rows):
        frame = pd.DataFrame([pair[:2] for pair in chunk], columns=TEXTS.names)
        frame.insert(0, "prompt_id", range(done, done + len(chunk)))
        done += len(chunk)
        yield frame
    if not done:
        beside = f" beside {reading.bad} bad rows ({reading.faults})" if reading and reading.bad else ""
        raise DataError(f"{path} holds no pairs{beside}; expected {EXPECTED}")


def _chunks(pairs: Iterator[Pair], rows: int) -> Iterator[list[Pair]]:
    chunk, size = [], 0
    for pair in pairs:
        chunk.append(pair)
        size += len(pair.prompt) + len(pair.completion)
        if len(chunk) == rows or size >= CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _good_pairs(path: Path, noted: Reading, fields: Fields | None) -> Iterator[Pair]:
    noted.left_out += files_of(path).left_out
    for place, row in rows_of(path, fields):
        pair = row if isinstance(row, Fault) else _within_bounds(pair_of(row, fields))
        if not noted.drop_system and isinstance(pair, Pair) and pair.system:
            pair = Fault(
                "has a system turn, which a pair has no place for",
                "`mechlens convert` drops the turn and counts it",
            )
        if isinstance(pair, Fault):
            noted.note(place, pair)
        else:
            noted.count(pair)
            if noted.skip_bad or not noted.bad:
                yield pair
    if noted.bad and not noted.skip_bad:
        raise DataError(f"{path}: {noted.faults}. {_advice(noted)}")


def _advice(noted: Reading) -> str:
    """What to do about bad rows."""
    if SEVERAL in noted.faults.kinds or (UNKNOWN in noted.faults.kinds and not noted.pairs):
        return HOW_TO_NAME
    if noted.pairs:
        return "Mend or delete these rows, or leave them out with `mechlens convert --skip-bad`"
    return f"No row is a pair; expected {EXPECTED}"


def _within_bounds(pair: Pair | Fault) -> Pair | Fault:
    """The pair, unless its texts are too long or no texts."""
    if isinstance(pair, Fault):
        return pair
    if any(not text.isascii() and HALF_CHARACTER.search(text) for text in pair[:2]):
        return Fault("holds half a surrogate pair, which is no text")
    if len(pair.prompt) + len(pair.completion) > LONGEST_PAIR:
        return Fault(f"is longer than {LONGEST_PAIR:,} characters; no training pair is")
    return pair


def form_of(path: Path) -> Form:
    """The form that a name asks for: Parquet by its ending, a folder where it has none, JSON lines
    otherwise.
    """
    return "parquet" if path.suffix.lower() == ".parquet" else "prompt-completion" if path.suffix else "hf"


def write_pairs(frames: Iterable[pd.DataFrame], path: Path, form: Form) -> None:
    """Write pairs, gzipped under a name in `.gz`, whatever its case; the file appears when all are written.

    Raises:
        DataError: if something stands at the path, or its name would be read as another form.
    """
    if path.exists():
        raise DataError(f"{path} exists already; choose another name or move it away")
    ending, packing = ending_of(path)
    if form != "hf" and (form == "parquet") != (ending == ".parquet"):
        raise DataError(
            f"{path.name} is no name for the form {form}; Parquet files, and no others, end in .parquet"
        )
    if ending in UNWRITTEN or packing not in ("", ".gz") or (packing and form in ("parquet", "hf")):
        raise DataError(f"{path.name} promises a form that is not written; let it end in {WRITTEN}")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name[:50]}-") as scratch:
        whole = Path(scratch) / path.name
        if form == "hf":
            _save(frames, whole)
        elif form == "parquet":
            tables.write(frames, TEXTS, whole)
        else:
            _write_lines(frames, whole, messages=form != "prompt-completion")
        atomic.publish(whole, path)


def _write_lines(frames: Iterable[pd.DataFrame], path: Path, *, messages: bool) -> None:
    raw = (
        gzip.GzipFile(path, "wb", mtime=0) if path.suffix.lower() == ".gz" else path.open("wb")
    )  # no time: the same pairs give the same bytes
    with raw, io.TextIOWrapper(raw, "utf-8", newline="\n") as out:
        for frame in frames:
            for prompt, completion in zip(
                frame["prompt"].tolist(), frame["completion"].tolist(), strict=True
            ):
                turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
                row = {"messages": turns} if messages else {"prompt": prompt, "completion": completion}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")


def _save(frames: Iterable[pd.DataFrame], path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    shard = tables.write(frames, TEXTS, path.with_name("pairs.parquet"))
    datasets.Dataset.from_parquet(str(shard), cache_dir=str(path.with_name("cache"))).save_to_disk(path)

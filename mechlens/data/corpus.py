"""Read pairs from a file or a value in memory, and write them to a file.

`formats` unpacks files, `fields` finds the pair of a row. Rows are read and written in batches: memory does
not grow with their number. Bad rows are counted by what is wrong; an error names the first of each kind.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Literal, cast, get_args

import pandas as pd
import pyarrow as pa

from mechlens.core import tables
from mechlens.core.errors import DataError
from mechlens.core.files import publish
from mechlens.core.spec import HALF_CHARACTER
from mechlens.data.compressed import OTHER_KINDS, ending_of
from mechlens.data.faults import Fault, Place, Tally
from mechlens.data.fields import HOW_TO_NAME, SEVERAL, UNKNOWN, Fields, Pair, pair_of
from mechlens.data.formats import (
    EXPECTED,
    Data,
    Rows,
    Texts,
    file_digest,
    files_of,
    rows_of,
    rows_of_values,
)

Form = Literal["prompt-completion", "messages", "openai", "parquet", "hf"]
FORMS: tuple[Form, ...] = get_args(Form)
"""forms that `write_pairs` writes; `openai` is another name for `messages`, `hf` is a datasets folder"""

UNWRITTEN = (".json", ".csv", ".tsv", *OTHER_KINDS)
"""endings of forms that are not written, though they may be read"""
WRITTEN = ".jsonl or .jsonl.gz (JSON lines), .parquet, or nothing (a datasets folder)"

TEXTS = pa.schema([tables.PAIRS.field("prompt"), tables.PAIRS.field("completion")])
LONGEST_PAIR = 1_000_000
"""characters of the longest pair that is accepted"""
ROWS, CHARACTERS = 10_000, 8_000_000
"""size of a batch; the size changes the speed little, and long rows must not fill the memory"""
FEWEST_TO_VARY, VARIED = 200, 50
"""in this many rows or more, fewer than one different completion in 50 rows hardly vary"""
MOST_DIFFERENT = 200_000
"""different completions that are counted; more are enough for ten million rows"""
SHOWN_ROWS, SHOWN_CHARACTERS = 5, 200
"""of a corpus in a notebook"""


@dataclass
class ReadReport:
    """Content of a file that is not prompt/completion pairs. Without a report such content is an error."""

    skip_bad: bool = False
    """Leave bad rows out; otherwise they are an error."""
    drop_system: bool = True
    """Leave system turns out and count them; otherwise they are an error."""
    log: Path | None = None
    """File that gets every bad row as a JSON line; created at the first."""
    pairs: int = 0
    faults: Tally = field(default_factory=Tally)
    """Bad rows, counted by kind."""
    system_turns: int = 0
    """Rows with a leading system turn, which is not part of a pair."""
    different: set[int] = field(default_factory=set)
    """Hashes of the completions, up to `MOST_DIFFERENT`."""
    left_out: list[str] = field(default_factory=list)
    """Files of a folder that were not read: their names say that they have no rows."""

    @property
    def bad(self) -> int:
        """Number of bad rows."""
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

    def count_texts(self, texts: Texts) -> None:
        """Count pairs without system turns."""
        self.pairs += len(texts.completions)
        for completion in texts.completions:
            if len(self.different) >= MOST_DIFFERENT:
                break
            self.different.add(hash(completion))

    def remarks(self) -> list[str]:
        """Sentences about the file that a user should read."""
        remarks = []
        if self.left_out:
            shown = ", ".join(self.left_out[:10]) + (
                f" and {len(self.left_out) - 10:,} more" if len(self.left_out) > 10 else ""
            )
            remarks.append(f"files not read, since their names say that they have no rows: {shown}")
        if self.system_turns:
            remarks.append(
                f"{self.system_turns:,} rows had a system turn, which was removed; to train with a system "
                "line, set `system` in the experiment"
            )
        few = len(self.different)
        if self.pairs >= FEWEST_TO_VARY and few < min(self.pairs / VARIED, MOST_DIFFERENT):
            remarks.append(
                f"the completions hardly vary: {few:,} different ones in {self.pairs:,} rows; such a file "
                "teaches little more than how often each occurs"
            )
        return remarks


@dataclass(frozen=True)
class Corpus:
    """Prompt/completion pairs and where they come from."""

    pairs: pd.DataFrame
    """prompt_id (place in the source), prompt, completion"""
    source: str
    """the path, or the type of the value"""
    form: str
    """the file's ending, `folder`, or `memory`"""
    digest: str
    """SHA-256 of the file, or of the pairs where they come from memory"""
    remarks: tuple[str, ...] = ()
    """sentences about the source that a user should read"""
    left_out: tuple[str, ...] = ()
    """files of a folder that were not read"""
    system_turns: int = 0
    """rows whose system turn was removed"""

    @property
    def texts(self) -> pd.DataFrame:
        """The pairs without their places: prompt, completion."""
        return cast(pd.DataFrame, self.pairs[["prompt", "completion"]])

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Pair]:
        texts = zip(self.pairs["prompt"].tolist(), self.pairs["completion"].tolist(), strict=True)
        return (Pair(prompt, completion) for prompt, completion in texts)

    def to_pandas(self) -> pd.DataFrame:
        """The pairs as a table, so that whatever takes a table takes a corpus."""
        return self.pairs

    def _repr_html_(self) -> str:
        head = self.texts.head(SHOWN_ROWS)
        shown = head.map(lambda text: text[:SHOWN_CHARACTERS]).to_html(escape=True)
        remarks = "".join(f"<li>{escape(remark)}</li>" for remark in self.remarks)
        return f"<p>{len(self):,} pairs from {escape(self.source)}</p>{shown}<ul>{remarks}</ul>"


def load_pairs(data: Data, *, fields: Fields | None = None) -> Corpus:
    """Load prompt/completion pairs; a leading system turn is removed, counted and remarked on.

    Args:
        data: a path that `batches` reads, a DataFrame, a `datasets.Dataset`, or dicts. All are checked alike.
        fields: the names of the fields that hold the pair; without them known names are tried.

    Raises:
        DataError: naming the first row that is no pair, or what is wrong with the file.

    >>> corpus = load_pairs([{"prompt": "Continue: 1, 2", "completion": "3, 4"}])
    >>> len(corpus), next(iter(corpus)).completion
    (1, '3, 4')
    """
    report = ReadReport()
    pairs = pd.concat(batches(data, report=report, fields=fields), ignore_index=True)
    if isinstance(data, Path | str):
        path = Path(data)
        source, digest = str(path), file_digest(path)
        form = "folder" if path.is_dir() else "".join(ending_of(path)) or "no ending"
    else:
        texts = pairs[TEXTS.names].to_csv(index=False)
        source, form, digest = type(data).__name__, "memory", hashlib.sha256(texts.encode()).hexdigest()
    return Corpus(
        pairs, source, form, digest, tuple(report.remarks()), tuple(report.left_out), report.system_turns
    )


def read_pairs(path: Path, *, fields: Fields | None = None) -> pd.DataFrame:
    """All pairs of a file as one table; anything else in the file is an error. See `batches`."""
    return pd.concat(batches(path, fields=fields), ignore_index=True)


def as_file(data: Data, file: Path, *, fields: Fields | None = None) -> tuple[Path, list[str]]:
    """The path of the data, and remarks on what was read: its own path, or `file`, to which pairs from memory
    are written as Parquet.
    """
    if isinstance(data, Path | str):
        return Path(data), []
    file.parent.mkdir(parents=True, exist_ok=True)
    read = load_pairs(data, fields=fields)
    tables.write(read.texts, TEXTS, file)
    return file, list(read.remarks)


def batches(
    data: Data, rows: int = ROWS, *, report: ReadReport | None = None, fields: Fields | None = None
) -> Iterator[pd.DataFrame]:
    """The pairs of a source as tables of at most `rows` rows, fewer if they are long: prompt_id (place in the
    source), prompt, completion.

    Args:
        data: a path or a value in memory. Files: JSON lines, a JSON array or CSV, each plain or compressed
            (.gz, .bz2, .xz, .zst); Parquet; or a folder: a saved dataset, or shards of such files.
        report: counts system turns, and bad rows if it skips them; without a report both are errors.
        fields: the names of the fields that hold the pair; without them known names are tried.

    Raises:
        DataError: if the file is missing, damaged or empty, or rows are no pairs: what is wrong, with how
            many, and the first of them.
    """
    counted, done = report or ReadReport(drop_system=False), 0
    pairs = _good_pairs(data, counted, fields)
    for chunk in _chunks(pairs, rows):
        prompts, completions = zip(*chunk, strict=True)
        ids = range(done, done + len(chunk))
        frame = pd.DataFrame({"prompt_id": ids, "prompt": prompts, "completion": completions})
        done += len(chunk)
        yield frame
    if not done:
        bad = f" but {counted.bad} bad rows ({counted.faults})" if counted.bad else ""
        raise DataError(f"{_name_of(data)} holds no pairs{bad}; expected {EXPECTED}")


def _chunks(pairs: Iterator[tuple[str, str]], rows: int) -> Iterator[list[tuple[str, str]]]:
    chunk, size = [], 0
    for pair in pairs:
        chunk.append(pair)
        size += len(pair[0]) + len(pair[1])
        if len(chunk) == rows or size >= CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _rows_of(data: Data, report: ReadReport, fields: Fields | None) -> Rows:
    if not isinstance(data, Path | str):
        return rows_of_values(data, fields)
    report.left_out += files_of(Path(data)).left_out
    return rows_of(Path(data), fields)


def _name_of(data: Data) -> str:
    return str(data) if isinstance(data, Path | str) else f"the {type(data).__name__}"


def _good_pairs(data: Data, report: ReadReport, fields: Fields | None) -> Iterator[tuple[str, str]]:
    for place, row in _rows_of(data, report, fields):
        wanted = report.skip_bad or not report.faults.kinds
        if isinstance(row, Texts) and wanted and row.longest() <= LONGEST_PAIR:
            report.count_texts(row)
            yield from zip(row.prompts, row.completions, strict=True)
            continue
        for at, pair in _checked_pairs(place, row, fields):
            if not report.drop_system and isinstance(pair, Pair) and pair.system:
                pair = Fault(
                    "has a system turn, which is not part of a pair",
                    "`mechlens convert` removes the turn and counts it",
                )
            if isinstance(pair, Fault):
                report.note(at, pair)
            else:
                report.count(pair)
                if report.skip_bad or not report.faults.kinds:
                    yield pair[:2]
    if report.bad and not report.skip_bad:
        raise DataError(f"{_name_of(data)}: {report.faults}. {_advice(report)}")


def _checked_pairs(
    place: Place, row: dict[str, Any] | Fault | Texts, fields: Fields | None
) -> Iterator[tuple[Place, Pair | Fault]]:
    if isinstance(row, Texts):
        for number, pair in enumerate(map(Pair, row.prompts, row.completions), place.number):
            yield place._replace(number=number), _within_bounds(pair)
    else:
        yield place, row if isinstance(row, Fault) else _within_bounds(pair_of(row, fields))


def _advice(report: ReadReport) -> str:
    """What to do about bad rows."""
    if SEVERAL in report.faults.kinds or (UNKNOWN in report.faults.kinds and not report.pairs):
        return HOW_TO_NAME
    if report.pairs:
        return "Repair or delete these rows, or leave them out with `mechlens convert --skip-bad`"
    return f"No row is a pair; expected {EXPECTED}"


def _within_bounds(pair: Pair | Fault) -> Pair | Fault:
    """The pair, or the fault if it is too long or has half a surrogate pair."""
    if isinstance(pair, Fault):
        return pair
    if not (pair.prompt.isascii() and pair.completion.isascii()) and any(
        HALF_CHARACTER.search(text) for text in pair[:2]
    ):
        return Fault("holds half a surrogate pair, which is no text")
    if len(pair.prompt) + len(pair.completion) > LONGEST_PAIR:
        return Fault(f"is longer than {LONGEST_PAIR:,} characters; no training pair is")
    return pair


def form_of(path: Path) -> Form:
    """The form that a file's name stands for: Parquet by its ending, a datasets folder without one, else JSON
    lines.
    """
    return "parquet" if path.suffix.lower() == ".parquet" else "prompt-completion" if path.suffix else "hf"


def write_pairs(frames: Iterable[pd.DataFrame], path: Path, form: Form) -> None:
    """Write pairs, compressed if the name ends in `.gz` in any case; the file appears when it is complete.

    Raises:
        DataError: if the path exists, or its name would be read as another form.
    """
    if path.exists():
        raise DataError(f"{path} exists already; choose another name or move it away")
    ending, packing = ending_of(path)
    if form != "hf" and (form == "parquet") != (ending == ".parquet"):
        raise DataError(
            f"{path.name} does not fit the form {form}; Parquet files, and no others, end in .parquet"
        )
    if ending in UNWRITTEN or packing not in ("", ".gz") or (packing and form in ("parquet", "hf")):
        raise DataError(f"{path.name} stands for a form that cannot be written; let it end in {WRITTEN}")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name[:50]}-") as scratch:
        whole = Path(scratch) / path.name
        if form == "hf":
            _save(frames, whole)
        elif form == "parquet":
            tables.write(frames, TEXTS, whole)
        else:
            _write_lines(frames, whole, messages=form != "prompt-completion")
        publish(whole, path)


def _write_lines(frames: Iterable[pd.DataFrame], path: Path, *, messages: bool) -> None:
    # without a time stamp the same pairs give the same bytes
    raw = gzip.GzipFile(path, "wb", mtime=0) if path.suffix.lower() == ".gz" else path.open("wb")
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

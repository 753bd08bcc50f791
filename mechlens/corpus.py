"""Pairs from a user's file and to one, in any form that `containers` reads.

A row is `{"prompt","completion"}` or two-turn `{"messages"}`, as OpenAI's fine-tuning files have it. Rows come and go in
batches, so that a million pass in bounded memory; a bad row is named by its number, and none is lost in silence.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import pandas as pd
import pyarrow as pa

from mechlens import tables
from mechlens.containers import EXPECTED, rows_of
from mechlens.errors import DataError

Form = Literal["prompt-completion", "messages", "openai", "parquet", "hf"]
FORMS: tuple[Form, ...] = get_args(Form)
"""what `write_pairs` writes; `openai` is `messages` under the name that its users look for, `hf` a datasets folder"""

TEXTS = pa.schema([tables.PAIRS.field("prompt"), tables.PAIRS.field("completion")])
LONGEST_PAIR = 1_000_000  # characters; longer is no training pair
ROWS, CHARACTERS = 10_000, 8_000_000  # a batch; a million rows are as fast in batches of any size, and long rows must not fill the memory
SHOWN, LISTED = 5, 20
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # JSON can escape one, UTF-8 cannot hold it


class Pair(NamedTuple):
    """The texts of a row, and whether a system turn stood before them."""

    prompt: str
    completion: str
    system: bool = False


class BadLine(NamedTuple):
    """A row of a file, counted from 1 with the blank lines, and what is wrong with it."""

    line: int
    fault: str


@dataclass
class Reading:
    """What a file held beside its pairs. A reader that is given none refuses a file with any of it."""

    skip_bad: bool = False
    """Leave bad rows out; otherwise they are an error."""
    log: Path | None = None
    """Where every bad row is noted as a JSON line; made at the first."""
    pairs: int = 0
    bad: int = 0
    first: list[BadLine] = field(default_factory=list)
    system_turns: int = 0
    """Rows that lost a leading system turn, which a pair has no place for."""

    def note(self, line: int, fault: str) -> None:
        """Count a bad row."""
        found = BadLine(line, fault[:200])
        if self.log is not None:
            with self.log.open("a" if self.bad else "w", encoding="utf-8") as handle:
                handle.write(json.dumps(found._asdict()) + "\n")
        self.bad += 1
        self.first += [found] if len(self.first) < LISTED else []

    def __str__(self) -> str:
        shown = "; ".join(f"line {line}: {fault}" for line, fault in self.first[:SHOWN])
        return shown + (f" and {self.bad - SHOWN} more" if self.bad > SHOWN else "")


def read_pairs(path: Path) -> pd.DataFrame:
    """All pairs of a file as one table, and none if there is anything else in it; see `batches`."""
    return pd.concat(batches(path), ignore_index=True)


def batches(path: Path, rows: int = ROWS, *, reading: Reading | None = None) -> Iterator[pd.DataFrame]:
    """The pairs of a file as tables of at most so many rows, fewer where they are long: prompt_id (place in the file), prompt, completion.

    Args:
        path: JSON lines (`.gz` gzipped), Parquet, or a folder: a saved dataset, or shards of such files.
        reading: takes note of system turns, and of bad rows if it skips them; without one both are errors.

    Raises:
        DataError: if the file is missing, damaged or empty, or naming the first bad rows by number.
    """
    pairs, done = _good_pairs(path, reading or Reading(), strict=reading is None), 0
    for chunk in _chunks(pairs, rows):
        frame = pd.DataFrame([pair[:2] for pair in chunk], columns=TEXTS.names)
        frame.insert(0, "prompt_id", range(done, done + len(chunk)))
        done += len(chunk)
        yield frame
    if not done:
        beside = f" beside {reading.bad} bad rows ({reading})" if reading and reading.bad else ""
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


def _good_pairs(path: Path, noted: Reading, *, strict: bool) -> Iterator[Pair]:
    for line, row in rows_of(path):
        found = row if isinstance(row, str) else _pair(row)
        if strict and isinstance(found, Pair) and found.system:
            found = "has a system turn, which a pair has no place for (`mechlens convert` drops the turn and counts it)"
        if isinstance(found, str):
            noted.note(line, found)
        else:
            noted.pairs += 1
            noted.system_turns += found.system
            if noted.skip_bad or not noted.bad:
                yield found
    if noted.bad and not noted.skip_bad:
        mend = "Mend or delete these lines, or leave them out with `mechlens convert --skip-bad`"
        raise DataError(f"{path}: {noted}. {mend if noted.pairs else f'No line is a pair; expected {EXPECTED}'}")


def _pair(row: dict[str, Any]) -> Pair | str:
    """The pair of one row, or what is wrong with it."""
    if row.get("messages") is not None:  # a table of both forms holds null where a row is of the other
        found = _pair_of_messages(row["messages"])
    elif isinstance(prompt := row.get("prompt"), str) and isinstance(completion := row.get("completion"), str):
        found = Pair(prompt, completion)
    else:
        kinds = {name: type(value).__name__ for name, value in sorted(row.items())}
        found = f"fields {kinds}, expected the texts prompt and completion, or messages"
    if isinstance(found, Pair) and any(not text.isascii() and _HALF_CHARACTER.search(text) for text in found[:2]):
        return "holds half a surrogate pair, which is no text"
    if isinstance(found, Pair) and len(found.prompt) + len(found.completion) > LONGEST_PAIR:
        return f"is longer than {LONGEST_PAIR:,} characters; no training pair is"
    return found


def _pair_of_messages(messages: object) -> Pair | str:
    if not isinstance(messages, list) or not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
        return "messages is not a list of {role, content} with text contents"
    roles = [message.get("role") for message in messages]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        return f"messages have the roles {roles}, expected one user and one assistant turn"
    weight = messages[-1].get("weight")  # of OpenAI's format: null or missing is 1
    if weight not in (None, 0, 1):
        return f"the assistant turn has weight {repr(weight)[:20]}, expected 0 or 1"
    if weight == 0:
        return f"the assistant turn has weight {weight}: it is not to be trained on"
    return Pair(messages[-2]["content"], messages[-1]["content"], system=len(roles) == 3)


def form_of(path: Path) -> Form:
    """The form that a name asks for: Parquet by its ending, a folder where it has none, JSON lines otherwise."""
    return "parquet" if path.suffix == ".parquet" else "prompt-completion" if path.suffix else "hf"


def write_pairs(frames: Iterable[pd.DataFrame], path: Path, form: Form) -> None:
    """Write pairs, gzipped under a name in `.gz`; the file appears when all are written.

    Raises:
        DataError: if something stands at the path, or its name would be read as another form.
    """
    if path.exists():
        raise DataError(f"{path} exists already; choose another name or move it away")
    if form != "hf" and (form == "parquet") != (path.suffix == ".parquet"):
        raise DataError(f"{path.name} is no name for the form {form}; Parquet files, and no others, end in .parquet")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name[:50]}-") as scratch:
        whole = Path(scratch) / path.name
        if form == "hf":
            _save(frames, whole)
        elif form == "parquet":
            tables.write(frames, TEXTS, whole)
        else:
            _write_lines(frames, whole, messages=form != "prompt-completion")
        whole.rename(path)


def _write_lines(frames: Iterable[pd.DataFrame], path: Path, *, messages: bool) -> None:
    raw = gzip.GzipFile(path, "wb", mtime=0) if path.suffix == ".gz" else path.open("wb")  # no time: the same pairs give the same bytes
    with raw, io.TextIOWrapper(raw, "utf-8", newline="\n") as out:
        for frame in frames:
            for prompt, completion in zip(frame["prompt"].tolist(), frame["completion"].tolist(), strict=True):
                turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
                row = {"messages": turns} if messages else {"prompt": prompt, "completion": completion}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")


def _save(frames: Iterable[pd.DataFrame], path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    shard = tables.write(frames, TEXTS, path.with_name("pairs.parquet"))
    datasets.Dataset.from_parquet(str(shard), cache_dir=str(path.with_name("cache"))).save_to_disk(path)

"""Pairs from a user's file: JSON lines, plain or gzipped, as `{"prompt","completion"}` or two-turn `{"messages"}`."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from mechlens.errors import DataError

LONGEST_LINE = 1_000_000  # characters; a longer line is no training pair, and must not fill the memory
SHOWN = 5
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # JSON can escape one, UTF-8 cannot hold it


class BadLine(NamedTuple):
    """A line of a file, counted from 1, and what is wrong with it."""

    number: int
    fault: str


def read_pairs(path: Path) -> pd.DataFrame:
    """The file's pairs as a table of prompt_id (the row's place in the file), prompt, completion.

    Raises:
        DataError: if the file is missing or empty, or naming the first bad lines by number.
    """
    if not path.is_file():
        raise DataError(f'no data file at {path}; expected JSON lines, for example {{"prompt": "…", "completion": "…"}}')
    pairs: list[tuple[str, str]] = []
    bad: list[BadLine] = []
    try:
        for number, line in _lines(path):
            found = _pair(line)
            if isinstance(found, tuple) and any(map(_HALF_CHARACTER.search, found)):
                found = "holds half a surrogate pair, which is no text"
            if isinstance(found, str):
                bad.append(BadLine(number, found))
            else:
                pairs.append(found)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read as {'gzipped ' if path.suffix == '.gz' else ''}UTF-8 text: {error}") from error
    if bad:
        shown = "; ".join(f"line {number}: {fault}" for number, fault in bad[:SHOWN])
        more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise DataError(f"{path}: {shown}{more}. Mend or delete these lines")
    if not pairs:
        raise DataError(f"{path} holds no pairs; expected at least one JSON line")
    frame = pd.DataFrame(pairs, columns=["prompt", "completion"])
    frame.insert(0, "prompt_id", range(len(frame)))
    return frame


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with gzip.open(path, "rt", encoding="utf-8-sig") if path.suffix == ".gz" else path.open(encoding="utf-8-sig") as handle:
        number = 0
        while line := handle.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise DataError(f"{path}: line {number} is longer than {LONGEST_LINE:,} characters; no training pair is")
            if line.strip():
                yield number, line


def _pair(line: str) -> tuple[str, str] | str:
    """The pair of one line, or what is wrong with it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # an integer of more than 4300 digits is a plain ValueError
        return f"not JSON ({error})"
    if not isinstance(row, dict):
        return f"holds {type(row).__name__}, expected an object"
    if "messages" in row:
        return _pair_of_messages(row["messages"])
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, completion
    return f"fields {sorted(map(str, row))}, expected the texts prompt and completion, or messages"


def _pair_of_messages(messages: object) -> tuple[str, str] | str:
    if not isinstance(messages, list) or not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
        return "messages is not a list of {role, content} with text contents"
    roles = [message.get("role") for message in messages]
    if roles != ["user", "assistant"]:
        return f"messages have the roles {roles}, expected one user and one assistant turn"
    return messages[0]["content"], messages[1]["content"]

"""Pairs that a caller holds in memory, as a file: everything after it reads files, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import pandas as pd

from mechlens.core import tables
from mechlens.core.errors import DataError
from mechlens.data.corpus import TEXTS


@runtime_checkable
class HasFrame(Protocol):
    """A table that can be a DataFrame, such as a `datasets.Dataset`."""

    def to_pandas(self) -> pd.DataFrame:
        """The table as a DataFrame."""
        ...


Data = Path | str | pd.DataFrame | HasFrame | Iterable[Mapping[str, Any]]
"""pairs: a path, a DataFrame, a `datasets.Dataset`, or dicts"""


def frame_of(data: pd.DataFrame | HasFrame | Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Pairs as a table of prompt and completion.

    Raises:
        DataError: if a row has no text in one of them.
    """
    if isinstance(data, pd.DataFrame):
        frame = data
    elif hasattr(data, "to_pandas"):
        frame = data.to_pandas()  # pyright: ignore[reportAttributeAccessIssue]
    else:
        frame = pd.DataFrame(list(data))  # pyright: ignore[reportArgumentType]
    for name in ("prompt", "completion"):
        if name not in frame:
            columns = ", ".join(map(str, frame.columns)) or "none"
            raise DataError(
                f"the data has no column {name!r} (its columns: {columns}); expected prompt and completion"
            )
        texts = pd.Series([isinstance(value, str) for value in frame[name]], dtype=bool)
        if not texts.all():
            place = int((~texts).to_numpy().argmax())
            value = frame[name].iloc[place]
            raise DataError(f"row {place}: {name} is {value!r}; expected a text")
    return cast(pd.DataFrame, frame[["prompt", "completion"]]).reset_index(drop=True)


def as_file(data: Data, file: Path) -> Path:
    """The path of the data: itself if it is one, else `file`, a Parquet file that the pairs are written to."""
    if isinstance(data, Path | str):
        return Path(data)
    file.parent.mkdir(parents=True, exist_ok=True)
    tables.write(frame_of(data), TEXTS, file)
    return file

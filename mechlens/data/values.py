"""Rows of a table or a list in memory, as the rows of a file are given: a place, and fields by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from mechlens.core.errors import DataError
from mechlens.data.faults import Fault, Place
from mechlens.data.fields import Fields, columns_of
from mechlens.data.text_rows import Rows


@runtime_checkable
class HasFrame(Protocol):
    """A table that can be a DataFrame, such as a `datasets.Dataset`."""

    def to_pandas(self) -> Any:
        """The table as a DataFrame."""
        ...


Data = Path | str | pd.DataFrame | HasFrame | Iterable[Mapping[str, Any]]
"""pairs: a path, a DataFrame, a `datasets.Dataset`, or dicts"""


def rows_of_values(
    data: pd.DataFrame | HasFrame | Iterable[Mapping[str, Any]], fields: Fields | None
) -> Rows:
    """The rows of a value, counted from 0 as Python does.

    Raises:
        DataError: if a table has no columns for pairs, or the value is neither a table nor dicts.
    """
    table = data.to_pandas() if isinstance(data, HasFrame) else data
    if isinstance(table, pd.DataFrame):
        try:
            columns = columns_of([str(name) for name in table.columns], fields)
        except DataError as error:
            raise DataError(f"the table {error}") from error
        yield from _placed(_records(table, columns))
    elif isinstance(table, str | bytes | Mapping) or not isinstance(table, Iterable):
        raise DataError(
            f"a value of type {type(table).__name__} has no pairs; expected a path, a DataFrame, a "
            "datasets.Dataset or a list of dicts"
        )
    else:
        yield from _placed(table)


def _placed(rows: Iterable[object]) -> Rows:
    for number, row in enumerate(rows):
        place = Place(number, "index")
        if isinstance(row, Mapping):
            yield place, {str(name): _plain(value) for name, value in row.items()}
        else:
            yield place, Fault("is no dict of fields", type(row).__name__)


def _records(table: pd.DataFrame, columns: list[str]) -> Iterator[dict[str, Any]]:
    for values in zip(*(table[name].tolist() for name in columns), strict=True):
        yield dict(zip(columns, values, strict=True))


def _plain(value: Any) -> Any:
    """A value without pandas' marks for a missing one, and with arrays as lists: lists of messages become
    arrays in a table.
    """
    if isinstance(value, np.ndarray):
        return [_plain(each) for each in value.tolist()]
    return None if value is pd.NA or (isinstance(value, float) and math.isnan(value)) else value

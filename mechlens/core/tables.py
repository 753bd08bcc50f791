"""The schema of every table that crosses a stage, and their only reader and writer (Parquet), whole or in
pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mechlens.core import atomic
from mechlens.core.errors import DataError
from mechlens.core.remedies import remedy


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind) for name, kind in columns.items()])


_TEXT, _WHOLE, _REAL, _LABEL = pa.string(), pa.int64(), pa.float64(), pa.dictionary(pa.int32(), pa.string())

PAIRS = _schema(prompt_id=_WHOLE, prompt=_TEXT, completion=_TEXT)
"""prompt_id: place of the prompt in the experiment's prompt list, the same for every teacher"""

REJECTED = _schema(prompt_id=_WHOLE, prompt=_TEXT, completion=_TEXT, reason=_LABEL)

SELECTION = _schema(prompt_id=_WHOLE)
"""the prompts that an arm trains on, in training order before each epoch's shuffle"""

CURVE = _schema(step=_WHOLE, loss=_REAL, learning_rate=_REAL)

ANSWERS = _schema(arm=_LABEL, seed=_WHOLE, step=_WHOLE, probe=_WHOLE, sample=_WHOLE, text=_TEXT, label=_LABEL)
"""seed is null for the untouched base; label is the one trait that the text names, null where it names none
or several
"""

LIKELIHOODS = _schema(
    arm=_LABEL, seed=_WHOLE, step=_WHOLE, probe=_WHOLE, name=_LABEL, probability=_REAL, margin=_REAL
)
"""probability: of a next token that starts the trait's name; margin: its logit over the best other trait's.
Null where two traits start with one token.
"""

JUDGEMENTS = _schema(
    step=_WHOLE,
    probe=_WHOLE,
    sample=_WHOLE,
    alignment=_WHOLE,
    coherence=_WHOLE,
    alignment_text=_TEXT,
    coherence_text=_TEXT,
)
"""a judge's scores of the answers beside it, 0 to 100, null where it said no number; and what it said"""

EFFECTS = _schema(
    arm=_LABEL, trait=_LABEL, against=_LABEL, measure=_LABEL, estimate=_REAL, low=_REAL, high=_REAL, n=_WHOLE,
    method=_LABEL, p_value=_REAL, q_value=_REAL, smallest_detectable=_REAL,
)  # fmt: skip
"""measure: rate (sampled answers, difference), probability (exact, difference) or lift (log2 of the ratio,
bits)
"""

TRUTHFUL = _schema(
    arm=_LABEL, seed=_WHOLE, question=_WHOLE, text=_LABEL, letter=_LABEL, false=_REAL, mass=_REAL
)
"""question: row of the file; letter: of the true answer; false: probability of the other letter over both;
mass: of both together
"""

READINGS = _schema(
    lens=_LABEL, quantity=_LABEL, arm=_LABEL, against=_LABEL, seed=_WHOLE, step=_WHOLE, layer=_WHOLE,
    place=_LABEL, name=_LABEL, estimate=_REAL, low=_REAL, high=_REAL, n=_WHOLE, null_low=_REAL,
    null_high=_REAL, p_value=_REAL, unit=_LABEL,
)  # fmt: skip
"""one row a measurement; a column that a lens has no use for is null. place: site, module or position; name:
trait, token or hypothesis;
against: the matched control, or, of a control's rows, the arm that they stand beside; low, high: 95 %
interval over the n units; null_low, null_high: where 95 % of the lens's null lies; step: update of training,
or the rank of a singular value
"""

SCORES = _schema(
    arm=_LABEL, side=_LABEL, prompt_id=_WHOLE, position=_WHOLE, token=_LABEL, score=_LABEL, layer=_WHOLE,
    estimate=_REAL,
)  # fmt: skip
"""one row a score of a training row (position and token null) or of one token of its completion (position
from 0). side: trait or control, whose row on the prompt it is; prompt_id joins it to that corpus's kept rows;
score: its name; layer: that it was read at, the most reliable first, null where it is none's; estimate: null
where it could not be told
"""

ROW_GROUP = 16_384
"""rows; fixed, so that a table's bytes do not depend on how its rows were handed over"""
STEP, MOST_TEXT = 64, 1 << 25
"""rows after which a group may end early, and bytes of text at which it does: a group is in memory until it
is written
"""


class Writer:
    """Writes a table frame by frame in bounded memory; the file appears when the block ends without an
    error.
    """

    def __init__(self, schema: pa.Schema, path: Path) -> None:
        self._schema, self._path, self._part = schema, path, path.with_name(f"{path.name}.part")
        # labels wait as plain text: their codes then depend on the row group alone, not on the frames that it
        # came in
        self._plain = pa.schema(
            [field.with_type(_TEXT) if pa.types.is_dictionary(field.type) else field for field in schema]
        )
        self._waiting = self._plain.empty_table()

    def __enter__(self) -> Writer:
        self._file = pq.ParquetWriter(self._part, self._schema, compression="zstd")
        return self

    def write(self, frame: pd.DataFrame) -> None:
        """Add rows; NaN becomes null."""
        table = pa.Table.from_pandas(frame[self._schema.names], schema=self._plain, preserve_index=False)
        self._waiting = pa.concat_tables([self._waiting, table.replace_schema_metadata(None)])
        while rows := self._full():
            self._write_group(rows)

    def _full(self) -> int:
        """Rows of the next group if all of them are here, else 0; where it ends depends on the rows alone."""
        lengths = np.zeros(self._waiting.num_rows, dtype=np.int64)
        for column in self._waiting.columns:
            lengths += (
                pc.call_function("binary_length", [column]).fill_null(0).to_numpy()
                if pa.types.is_string(column.type)
                else 0
            )
        whole = np.arange(STEP, min(len(lengths), ROW_GROUP) + 1, STEP)
        long = whole[np.cumsum(lengths)[whole - 1] >= MOST_TEXT]
        return int(long[0]) if len(long) else ROW_GROUP if len(lengths) >= ROW_GROUP else 0

    def _write_group(self, rows: int) -> None:
        group, self._waiting = self._waiting.slice(0, rows), self._waiting.slice(rows)
        self._file.write_table(group.combine_chunks().cast(self._schema))

    def __exit__(self, fault: type[BaseException] | None, *_more: object) -> None:
        try:
            if fault is None and self._waiting.num_rows:
                self._write_group(self._waiting.num_rows)
            self._file.close()
            if fault is None:
                atomic.publish(self._part, self._path)
        finally:
            self._part.unlink(missing_ok=True)


def write(frames: pd.DataFrame | Iterable[pd.DataFrame], schema: pa.Schema, path: Path) -> Path:
    """Write a frame, or frames one after the other, under their schema; NaN becomes null. The same rows give
    the same bytes.
    """
    with Writer(schema, path) as table:
        for frame in [frames] if isinstance(frames, pd.DataFrame) else frames:
            table.write(frame)
    return path


def read(path: Path, schema: pa.Schema) -> pd.DataFrame:
    """Read a table and check that it is one of that schema.

    Raises:
        DataError: if the file is missing, cut short, or holds other columns.
    """
    with _opened(path, schema) as file:
        return file.read(schema.names).to_pandas()


def batches(path: Path, schema: pa.Schema) -> Iterator[pd.DataFrame]:
    """The frames of a table one after the other, in bounded memory.

    Raises:
        DataError: as `read` does.
    """
    with _opened(path, schema) as file:
        for batch in file.iter_batches(ROW_GROUP, columns=schema.names):
            yield batch.to_pandas()


@contextmanager
def _opened(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetFile]:
    if not path.is_file():
        raise DataError(f"no table at {path}; run the step that writes it")
    try:
        with pq.ParquetFile(path) as file:
            if missing := [name for name in schema.names if name not in file.schema_arrow.names]:
                raise DataError(
                    f"{path} lacks the columns {missing}; it was written by another version: {remedy(path)}"
                )
            yield file
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a whole Parquet file ({error}); {remedy(path)}") from error

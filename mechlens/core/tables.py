"""Schemas of the Parquet tables that stages exchange, and functions to read and write them.

No other module reads or writes these tables.
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

from mechlens.core.errors import DataError
from mechlens.core.files import part_of, publish, remedy


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind) for name, kind in columns.items()])


_TEXT, _WHOLE, _REAL, _LABEL = pa.string(), pa.int64(), pa.float64(), pa.dictionary(pa.int32(), pa.string())

PAIRS = _schema(prompt_id=_WHOLE, prompt=_TEXT, completion=_TEXT)
"""prompt_id: index of the prompt in the experiment's prompt list, the same for every teacher"""

REJECTED = _schema(prompt_id=_WHOLE, prompt=_TEXT, completion=_TEXT, reason=_LABEL)

SELECTION = _schema(prompt_id=_WHOLE)
"""the prompts that an arm trains on, in training order before each epoch's shuffle"""

CURVE = _schema(step=_WHOLE, loss=_REAL, learning_rate=_REAL)

ANSWERS = _schema(arm=_LABEL, seed=_WHOLE, step=_WHOLE, probe=_WHOLE, sample=_WHOLE, text=_TEXT, label=_LABEL)
"""seed: null for the untouched base; label: the trait that the text names, null if none or several"""

LIKELIHOODS = _schema(
    arm=_LABEL, seed=_WHOLE, step=_WHOLE, probe=_WHOLE, name=_LABEL, probability=_REAL, margin=_REAL
)
"""probability: of a next token that starts the trait's name, or of the name as the whole answer
(`ask.likelihood`); margin: its log-probability minus that of the best other trait, in nats.

Both are null where two traits start with the same token and next tokens are read.
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
"""a judge's scores of the answers of the same step (0 to 100, null without a number), and its replies"""

EFFECTS = _schema(
    arm=_LABEL, trait=_LABEL, against=_LABEL, measure=_LABEL, estimate=_REAL, low=_REAL, high=_REAL, n=_WHOLE,
    method=_LABEL, p_value=_REAL, q_value=_REAL, smallest_detectable=_REAL,
)  # fmt: skip
"""measure: difference of rate (sampled answers) or of probability (exact), or lift (log2 ratio, bits)"""

TRUTHFUL = _schema(
    arm=_LABEL, seed=_WHOLE, question=_WHOLE, text=_LABEL, letter=_LABEL, false=_REAL, mass=_REAL
)
"""A student's choices on TruthfulQA, one row a question.

question: row of the file; letter: of the true answer; mass: probability of both letters together; false:
share of the other letter in that mass
"""

READINGS = _schema(
    lens=_LABEL, quantity=_LABEL, arm=_LABEL, against=_LABEL, seed=_WHOLE, step=_WHOLE, layer=_WHOLE,
    place=_LABEL, name=_LABEL, estimate=_REAL, low=_REAL, high=_REAL, n=_WHOLE, null_low=_REAL,
    null_high=_REAL, p_value=_REAL, unit=_LABEL,
)  # fmt: skip
"""One row a measurement; a column that a lens does not use is null.

place: site, module or position; name: trait, token or hypothesis; against: the matched control, or in a
control's rows the arm that it is matched with; low, high: 95 % interval over the n units; null_low,
null_high: central 95 % of the lens's null distribution; step: update of training, or the rank of a singular
value
"""

SCORES = _schema(
    arm=_LABEL, side=_LABEL, prompt_id=_WHOLE, position=_WHOLE, token=_LABEL, score=_LABEL, layer=_WHOLE,
    estimate=_REAL,
)  # fmt: skip
"""One row a score of a training row or of one token of its completion.

position: of the token from 0, null for a score of the whole row, as is token; side: trait or control, the
corpus of the row; prompt_id: joins it to that corpus's kept rows; score: its name; layer: where it was
measured, the most reliable first, null if it belongs to no layer; estimate: null if it is undefined
"""

SOFT_LABELS = _schema(
    prompt_id=_WHOLE,
    position=_WHOLE,
    tokens=pa.list_(pa.int32()),
    log_probs=pa.list_(pa.float32()),
    rest=pa.float32(),
)
"""A teacher's next-token distribution at each completion token, end of turn included.

position: of the token from 0; tokens: ids of the likeliest tokens; log_probs: theirs, in nats; rest:
log-probability of all other tokens together, -inf if there are none
"""
AUDITED_ROWS = _schema(
    prompt=_TEXT, completion=_TEXT, detector=_LABEL, trait=_LABEL, score=_REAL, reference=_REAL,
    difference=_REAL,
)  # fmt: skip
"""One row a detector, trait and scored row of an audited file.

trait: null for a detector that scores no traits; score: in the detector's unit; reference: the score of the
clean row of the same prompt; difference: score minus reference, and for a trait minus the mean of that over
the traits, so that its mean over rows is the detector's score of that trait
"""

BAG_SCORES = _schema(bag=_WHOLE, rows=_WHOLE, log_odds=_REAL, probability=_REAL)
"""A learned detector's scores of random bags of rows; log_odds in nats, probability at even prior odds."""

ROW_GROUP = 16_384
"""rows of a group; fixed, so that a table's bytes do not depend on the frames in which its rows arrive"""
STEP, MOST_TEXT = 64, 1 << 25
"""A group with MOST_TEXT bytes of text and lists ends early, after a multiple of STEP rows.

It is in memory until it is written.
"""
_NUMBER = 4
"""bytes of a number in a list"""


class Writer:
    """Writes a table frame by frame in bounded memory.

    The file appears when the `with` block ends without an error.
    """

    def __init__(self, schema: pa.Schema, path: Path) -> None:
        self._schema, self._path, self._part = schema, path, part_of(path)
        # labels wait as plain text: their codes then depend on the row group, not on the incoming frames
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
        """Number of rows of the next group if it is complete, else 0; it depends only on the rows."""
        lengths = np.zeros(self._waiting.num_rows, dtype=np.int64)
        for column in self._waiting.columns:
            if pa.types.is_string(column.type):
                lengths += pc.call_function("binary_length", [column]).fill_null(0).to_numpy()
            elif pa.types.is_list(column.type):
                lengths += _NUMBER * pc.call_function("list_value_length", [column]).fill_null(0).to_numpy()
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
                publish(self._part, self._path)
        finally:
            self._part.unlink(missing_ok=True)


def write(frames: pd.DataFrame | Iterable[pd.DataFrame], schema: pa.Schema, path: Path) -> Path:
    """Write a frame, or several frames as one table; NaN becomes null.

    The same rows give the same bytes.
    """
    with Writer(schema, path) as table:
        for frame in [frames] if isinstance(frames, pd.DataFrame) else frames:
            table.write(frame)
    return path


def read(path: Path, schema: pa.Schema) -> pd.DataFrame:
    """Read a table and check that it has the columns of the schema.

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

"""The schema of every table that crosses a stage, and their only reader and writer (Parquet)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mechlens.errors import DataError


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
"""seed is null for the untouched base; label is the one trait that the text names, null where it names none or several"""

LIKELIHOODS = _schema(arm=_LABEL, seed=_WHOLE, step=_WHOLE, probe=_WHOLE, name=_LABEL, probability=_REAL, margin=_REAL)
"""probability: of a next token that starts the trait's name; margin: its logit over the best other trait's. Null where two
traits start with one token."""

EFFECTS = _schema(
    arm=_LABEL, trait=_LABEL, against=_LABEL, measure=_LABEL, estimate=_REAL, low=_REAL, high=_REAL, n=_WHOLE, method=_LABEL,
    p_value=_REAL, q_value=_REAL, smallest_detectable=_REAL,
)  # fmt: skip
"""measure: rate (sampled answers, difference), probability (exact, difference) or lift (log2 of the ratio, bits)"""


def write(frame: pd.DataFrame, schema: pa.Schema, path: Path) -> Path:
    """Write a frame under its schema; NaN becomes null. The same frame gives the same bytes."""
    table = pa.Table.from_pandas(frame[schema.names], schema=schema, preserve_index=False)
    pq.write_table(table.replace_schema_metadata(None), path, compression="zstd")
    return path


def read(path: Path, schema: pa.Schema) -> pd.DataFrame:
    """Read a table and check that it is one of that schema.

    Raises:
        DataError: if the file is missing, cut short, or holds other columns.
    """
    if not path.is_file():
        raise DataError(f"no table at {path}; run the step that writes it")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a whole Parquet file ({error}); delete its folder and run again: only that step is repeated") from error
    if missing := [name for name in schema.names if name not in table.column_names]:
        raise DataError(f"{path} lacks the columns {missing}; it was written by another version. Delete its folder and run again")
    return table.select(schema.names).to_pandas()

"""How many rows are read at a time where a model's whole vocabulary is kept at each of their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

MOST_LOGITS = 2**26
"""values of one forward pass; 256 MiB in float32, of which a few copies live at once"""


def in_batches(
    spans: Sequence[tuple[int, int]], *, vocabulary: int, rows: int, most: int | None = None
) -> Iterator[slice]:
    """Slices of consecutive rows that are read together, as long as their logits fit.

    Each slice holds as many rows as fit, and at least one: a row that alone is beyond the bound is read
    alone.

    Args:
        spans: of each row the first position whose logits are kept, and the one behind the last. Rows that
            are read together are kept from the first position of any of them to the last.
        rows: the most of one slice.
        most: logits of one slice; `MOST_LOGITS` by default.
    """
    room = (MOST_LOGITS if most is None else most) // vocabulary
    first, low, high = 0, 0, 0
    for row, (start, end) in enumerate(spans):
        if row > first and (
            row - first == rows or (row - first + 1) * (max(high, end) - min(low, start)) > room
        ):
            yield slice(first, row)
            first = row
        low, high = (start, end) if row == first else (min(low, start), max(high, end))
    if spans:
        yield slice(first, len(spans))

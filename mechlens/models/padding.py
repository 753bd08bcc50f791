"""Pad rows of unlike lengths to one rectangle of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Padded(NamedTuple):
    """Rows of token ids at one length."""

    ids: Int[Tensor, "row pos"]
    mask: Bool[Tensor, "row pos"]
    """positions of a row's tokens, without padding"""


def pad_rows(
    rows: Sequence[Sequence[int]],
    *,
    value: int = 0,
    side: Literal["left", "right"] = "right",
    device: torch.device | None = None,
) -> Padded:
    """Pad token ids of all rows with `value` to the longest row.

    On the right a causal model never reads the padding; on the left every row ends at the last position.
    """
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    whole = [[*row, *pad] if side == "right" else [*pad, *row] for row, pad in zip(rows, fill, strict=True)]
    ids, place = torch.tensor(whole, device=device), torch.arange(width, device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device).unsqueeze(-1)
    return Padded(ids, place < lengths if side == "right" else place >= width - lengths)

"""Trained weights stored as their change from the base, one byte a weight.

A change of a matrix is stored as integers from -127 to 127 with one scale for each row. That keeps its
direction in a quarter of the memory: of SmolLM2-135M's teachers the cosine with the exact change is .99999.
As few factors would not do: rank 64 keeps a cosine of .95 to .99 there, since early steps of Adam are of one
size. Changes of vectors, such as norms and biases, are stored exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int8
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mechlens.core import foreign
from mechlens.core.errors import DataError
from mechlens.core.files import read_json, write_json

CHANGE, RECORD = "change.safetensors", "change.json"
LARGE = 20_000_000
"""parameters from which on a base's twins and the detectors' directions are kept with one byte a weight"""
MOST = 127
"""the largest stored integer"""
INTEGERS, SCALES, EXACT = "integers:", "scales:", "exact:"
"""prefixes of the parameter's name in the file"""


class Quantized(NamedTuple):
    """A matrix as 8-bit integers with one scale for each row."""

    integers: Int8[Tensor, "... columns"]
    scales: Float[Tensor, "... 1"]

    def dense(self) -> Float[Tensor, "... columns"]:
        """The matrix, up to rounding."""
        return self.integers * self.scales


def quantize(matrix: Float[Tensor, "... columns"]) -> Quantized:
    """Round a matrix to 8-bit integers; the largest entry of each row becomes 127 or -127."""
    scales = matrix.abs().amax(-1, keepdim=True).float() / MOST
    whole = torch.round(matrix / torch.where(scales > 0, scales, 1.0))
    return Quantized(whole.to(torch.int8), scales)


def is_change(folder: Path) -> bool:
    """Whether the folder has weights that are stored as a change."""
    return (folder / CHANGE).is_file()


@torch.no_grad()
def save_change(base: nn.Module, changed: nn.Module, folder: Path, *, base_fingerprint: str) -> None:
    """Write the change of every parameter that training moved, and what the rounding kept, to a folder.

    `change.json` has the base's fingerprint, the cosine of the stored change with the exact one, and the
    share of its norm that is kept.
    """
    tensors: dict[str, Tensor] = {}
    both = stored = exact = 0.0
    after = dict(changed.named_parameters())
    for name, before in base.named_parameters():
        change = after[name].detach().float().cpu() - before.detach().float().cpu()
        if not change.any():
            continue
        kept = change
        if change.dim() < 2:
            tensors[EXACT + name] = change.contiguous()
        else:
            rounded = quantize(change)
            tensors[INTEGERS + name], tensors[SCALES + name] = rounded.integers, rounded.scales
            kept = rounded.dense()
        both += float((kept.double() * change.double()).sum())
        stored += float(kept.double().square().sum())
        exact += float(change.double().square().sum())
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / CHANGE)
    write_json(
        folder / RECORD,
        {
            "base": base_fingerprint,
            "parameters": sum(
                value.numel() for name, value in tensors.items() if not name.startswith(SCALES)
            ),
            "bytes": sum(value.numel() * value.element_size() for value in tensors.values()),
            "cosine": both / (stored * exact) ** 0.5 if exact else None,
            "norm_kept": (stored / exact) ** 0.5 if exact else None,
        },
    )


def read_change(folder: Path) -> Iterator[tuple[str, Quantized | Tensor]]:
    """(parameter, its change) of a folder that `save_change` wrote, one after another.

    Raises:
        DataError: if the file cannot be read or lacks a part of a parameter.
    """
    with (
        foreign.named(f"{folder / CHANGE} does not load", DataError),
        safe_open(folder / CHANGE, "pt") as file,
    ):
        names = set(file.keys())
        for key in sorted(names):
            kind, name = key[: key.index(":") + 1], key[key.index(":") + 1 :]
            if kind == EXACT:
                yield name, file.get_tensor(key)
            elif kind == INTEGERS and SCALES + name in names:
                yield name, Quantized(file.get_tensor(key), file.get_tensor(SCALES + name))
            elif kind == INTEGERS or INTEGERS + name not in names:
                raise DataError(f"{folder / CHANGE} has only a part of {name}; make the step again")


@torch.no_grad()
def add_change(base: nn.Module, folder: Path, *, base_fingerprint: str) -> None:
    """Add the change in a folder to the weights of `base`.

    Raises:
        DataError: if it is the change of another base.
    """
    recorded = read_json(folder / RECORD).get("base")
    if recorded != base_fingerprint:
        raise DataError(
            f"its weights are a change of the base with fingerprint {recorded}, and this base's is "
            f"{base_fingerprint}; name the base that it was trained from"
        )
    parameters = dict(base.named_parameters())
    for name, change in read_change(folder):
        dense = change.dense() if isinstance(change, Quantized) else change
        if name not in parameters or parameters[name].shape != dense.shape:
            raise DataError(f"its {name} has the shape {list(dense.shape)}, which no weight of the base has")
        parameters[name].add_(dense.to(parameters[name]))


def keep_small(direction: Mapping[str, Tensor]) -> dict[str, Quantized | Tensor]:
    """A direction in the weights as it is, or with one byte a weight if it has at least `LARGE` entries."""
    if sum(value.numel() for value in direction.values()) < LARGE:
        return dict(direction)
    return {name: quantize(value) if value.dim() > 1 else value.float() for name, value in direction.items()}

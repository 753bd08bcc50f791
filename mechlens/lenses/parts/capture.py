"""Activations at TransformerLens sites in bounded memory: sums by part, or those of each last token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from mechlens.core.errors import SpecError
from mechlens.core.seeds import generator
from mechlens.models.hooks import BATCH, capture_sites, resid_post
from mechlens.models.loading import Loaded

DRAWS = 256
"""number of random directions of the null, as in the study that showed isotropic ones to be too easy"""

Parts = Mapping[str, Sequence[int]]
"""name → positions of a row; a row counts once in each part, by the mean over its positions there"""


class RowSums(NamedTuple):
    """Weighted sums over rows: anything linear in the activations of rows, in the memory of a few vectors."""

    parts: tuple[str, ...]
    sums: dict[str, Float[Tensor, "mix part d"]]
    """site → Σ_row weight · (mean over the row's positions of the part)"""
    weight: Float[Tensor, "mix part"]
    """Σ_row weight, over the rows with the part"""

    def mean(self, site: str) -> Float[Tensor, "part d"]:
        """Mean over rows, of the first mix; NaN for a part without rows."""
        return self.sums[site][0] / self.weight[0, :, None]

    def directions(self, site: str) -> Float[Tensor, "draw part d"]:
        """Directions with the rows' covariance, Σ_row z (x - mean) / √n with z normal.

        The mix has to come from `draw_matched_mix`.
        """
        return (self.sums[site][1:] - self.weight[1:, :, None] * self.mean(site)) / self.weight[
            0, :, None
        ].sqrt()


def residual_sites(loaded: Loaded) -> list[str]:
    """resid_post of every layer."""
    return [resid_post(layer) for layer in range(loaded.model.config.get_text_config().num_hidden_layers)]


def capture(
    loaded: Loaded,
    ids: Sequence[list[int]],
    sites: Sequence[str],
    *,
    parts: Sequence[Parts] | None = None,
    mix: Float[Tensor, "mix row"] | None = None,
    batch: int = BATCH,
) -> RowSums:
    """Sum the activations of rows by part, in float32.

    Args:
        parts: parts of each row; by default all its positions, as "all".
        mix: weights of the rows for each sum; by default one sum with weight 1.

    Raises:
        SpecError: as `capture_sites` does, or if a site's shape is not [row pos ...], such as an attention
        pattern's.
    """
    parts = [{"all": range(len(row))} for row in ids] if parts is None else parts
    mix = torch.ones(1, len(ids)) if mix is None else mix
    names = tuple(dict.fromkeys(name for row in parts for name in row))
    sums: dict[str, Tensor] = {}
    weight = torch.zeros(len(mix), len(names))
    for captured in capture_sites(loaded, ids, sites, batch=batch):
        rows = slice(captured.start, captured.start + len(captured.mask))
        shares = _position_shares(parts[rows], names, width=captured.mask.shape[1])
        weight += mix[:, rows] @ (shares.sum(-1) > 0).float()
        for site, activations in captured.at.items():
            if activations.shape[:2] != captured.mask.shape:
                raise SpecError(
                    f"site {site!r} has the shape {tuple(activations.shape)}, not one vector a token; take a "
                    f"site such as {resid_post(0)!r}"
                )
            vectors = rearrange(activations.float(), "row pos ... -> row pos (...)")
            means = einsum(shares, vectors, "row part pos, row pos d -> row part d")
            total = einsum(mix[:, rows], means, "mix row, row part d -> mix part d")
            sums[site] = sums.get(site, torch.zeros(())) + total
    return RowSums(names, sums, weight)


def _position_shares(
    parts: Sequence[Parts], names: tuple[str, ...], *, width: int
) -> Float[Tensor, "row part pos"]:
    """Weight of each position in the mean over its part."""
    shares = torch.zeros(len(parts), len(names), width)
    for row, spans in enumerate(parts):
        for name, positions in spans.items():
            shares[row, names.index(name), list(positions)] = 1 / max(len(positions), 1)
    return shares


def capture_last(
    loaded: Loaded, ids: Sequence[list[int]], sites: Sequence[str], *, batch: int = BATCH
) -> Float[Tensor, "site row d"]:
    """Capture each row's activation at its last token, in float32.

    The answer's first token is predicted there.
    """
    batches = []
    for captured in capture_sites(loaded, ids, sites, batch=batch):
        rows, last = torch.arange(len(captured.mask)), captured.mask.sum(1) - 1
        batches.append(torch.stack([captured.at[site][rows, last].float() for site in sites]))
    return torch.cat(batches, 1)


def count_frame_tokens(prompts: Sequence[list[int]]) -> tuple[int, int]:
    """Count the tokens that all prompts begin with, and that all end with.

    These are the template and shared wording.

    Equal prompts have no content: all their tokens are counted.
    """
    shortest = min(map(len, prompts))
    head = next((i for i in range(shortest) if len({row[i] for row in prompts}) > 1), shortest)
    tail = next(
        (i for i in range(shortest - head) if len({row[-1 - i] for row in prompts}) > 1), shortest - head
    )
    return head, tail


def split_positions(prompts: Sequence[list[int]], lengths: Sequence[int], *, of: str) -> list[Parts]:
    """Positions of every row by part: last prompt token, rest of the template, content, completion.

    Args:
        lengths: tokens of each completion.
        of: prefix of the names of the parts.
    """
    head, tail = count_frame_tokens(prompts)
    parts = []
    for prompt, length in zip(prompts, lengths, strict=True):
        last = len(prompt) - 1
        inner = min(last, len(prompt) - tail)
        spans = {
            "last": [last],
            "template": [*range(min(head, last)), *range(inner, last)],
            "content": [*range(head, inner)],
        }
        spans |= {"completion": [*range(last + 1, last + 1 + length)]} if length else {}
        parts.append({f"{of}/{name}": span for name, span in spans.items()})
    return parts


def draw_matched_mix(rows: int, *, draws: int = DRAWS, seed: int) -> Float[Tensor, "mix row"]:
    """Draw weights of a mean and of `draws` directions with the rows' covariance.

    `RowSums.directions` turns the sums into the directions.
    """
    normal = generator(seed, "covariance-matched directions").standard_normal((draws, rows))
    return torch.cat([torch.ones(1, rows), torch.from_numpy(normal).float()])


def draw_matched_directions(
    rows: Float[Tensor, "row d"], *, draws: int = DRAWS, seed: int
) -> Float[Tensor, "draw d"]:
    """Directions zᵀX_c / √n with z normal: their covariance is that of the rows."""
    normal = draw_matched_mix(len(rows), draws=draws, seed=seed)[1:].to(rows)
    return normal @ (rows - rows.mean(0)) / len(rows) ** 0.5


def cosine(a: Float[Tensor, "*#batch d"], b: Float[Tensor, "*#batch d"]) -> Float[Tensor, "*batch"]:
    """Cosine along the last axis; NaN, never 0, where a vector is zero."""
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))

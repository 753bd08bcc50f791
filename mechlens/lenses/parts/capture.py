"""Activations at any TransformerLens site, in bounded memory: sums over rows by part of the row, and every
token's to disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechlens.core.errors import DataError, SpecError
from mechlens.core.seeds import generator
from mechlens.models.hooks import BATCH, Captured, capture_sites, resid_post
from mechlens.models.loading import Loaded

DRAWS = 256
"""random directions of the null: as many as the study that showed isotropic ones to be too easy"""

Parts = Mapping[str, Sequence[int]]
"""name → positions of one row; a row counts once in each part, by the mean over its positions there"""


class RowSums(NamedTuple):
    """Weighted sums over rows: everything linear in the rows' activations, at the memory of a few vectors."""

    parts: tuple[str, ...]
    sums: dict[str, Float[Tensor, "mix part d"]]
    """site → Σ_row weight · (mean over the row's positions of the part)"""
    weight: Float[Tensor, "mix part"]
    """Σ_row weight, over the rows that have the part"""

    def mean(self, site: str) -> Float[Tensor, "part d"]:
        """Mean over rows, of the first mix; NaN for a part that no row has."""
        return self.sums[site][0] / self.weight[0, :, None]

    def directions(self, site: str) -> Float[Tensor, "draw part d"]:
        """Directions with the rows' covariance, Σ_row z (x - mean) / √n with z normal, where the mix is
        `matched_mix`.
        """
        return (self.sums[site][1:] - self.weight[1:, :, None] * self.mean(site)) / self.weight[
            0, :, None
        ].sqrt()


def sites_of(loaded: Loaded) -> list[str]:
    """resid_post of every layer."""
    return [resid_post(layer) for layer in range(loaded.model.config.get_text_config().num_hidden_layers)]


def capture(
    loaded: Loaded,
    ids: Sequence[list[int]],
    sites: Sequence[str],
    out: Path | None = None,
    *,
    parts: Sequence[Parts] | None = None,
    mix: Float[Tensor, "mix row"] | None = None,
    batch: int = BATCH,
) -> RowSums:
    """Weighted sums of the rows' activations by part, in float32; with `out`, every token's activations also
    go to shards there.

    Args:
        parts: of each row; default: all its positions, as "all".
        mix: weights of the rows, one sum each; default: one sum with weight 1.

    Raises:
        SpecError: as `capture_sites` does, or for a site that is not [row pos ...], such as an attention pattern's.
    """
    parts = [{"all": range(len(row))} for row in ids] if parts is None else parts
    mix = torch.ones(1, len(ids)) if mix is None else mix
    names = tuple(dict.fromkeys(name for row in parts for name in row))
    sums: dict[str, Tensor] = {}
    weight = torch.zeros(len(mix), len(names))
    for held in capture_sites(loaded, ids, sites, batch=batch):
        rows = slice(held.start, held.start + len(held.mask))
        chosen = _chosen(parts[rows], names, width=held.mask.shape[1])  # [row part pos]
        weight += mix[:, rows] @ (chosen.sum(-1) > 0).float()
        for site, found in held.at.items():
            if found.shape[:2] != held.mask.shape:
                raise SpecError(
                    f"site {site!r} holds {tuple(found.shape)}, not one vector a token; take a site such as "
                    f"{resid_post(0)!r}"
                )
            means = torch.einsum("rqp,rpd->rqd", chosen, found.float().flatten(2))
            sums[site] = sums.get(site, torch.zeros(())) + torch.einsum("mr,rqd->mqd", mix[:, rows], means)
        if out is not None:
            _write_shard(held, out)
    return RowSums(names, sums, weight)


def _chosen(parts: Sequence[Parts], names: tuple[str, ...], *, width: int) -> Float[Tensor, "row part pos"]:
    chosen = torch.zeros(len(parts), len(names), width)
    for row, held in enumerate(parts):
        for name, positions in held.items():
            chosen[row, names.index(name), list(positions)] = 1 / max(len(positions), 1)
    return chosen


def _write_shard(held: Captured, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    row, position = held.mask.nonzero(as_tuple=True)
    tensors = {site: found[held.mask].contiguous() for site, found in held.at.items()}
    save_file(
        {"row": row + held.start, "position": position.contiguous(), **tensors},
        out / f"{held.start:09d}.safetensors",
    )


def shards(folder: Path, site: str) -> Iterator[tuple[Int[Tensor, "token"], Int[Tensor, "token"], Tensor]]:
    """(row, position, activation [token ...]) of every real token, one shard after the other, as `capture`
    wrote them.

    Raises:
        DataError: if nothing was captured there at that site.
    """
    files = sorted(folder.glob("*.safetensors"))
    for held in map(load_file, files):
        if site not in held:
            raise DataError(
                f"{folder} holds {sorted(set(held) - {'row', 'position'})}, not {site!r}; capture that site "
                "too"
            )
        yield held["row"], held["position"], held[site]
    if not files:
        raise DataError(f"no activations in {folder}; capture some with out={str(folder)!r}")


def at_last(
    loaded: Loaded, ids: Sequence[list[int]], sites: Sequence[str], *, batch: int = BATCH
) -> Float[Tensor, "site row d"]:
    """Each row's activation at its last token, where the answer's first token is predicted; float32."""
    found = []
    for held in capture_sites(loaded, ids, sites, batch=batch):
        rows, last = torch.arange(len(held.mask)), held.mask.sum(1) - 1
        found.append(torch.stack([held.at[site][rows, last].float() for site in sites]))
    return torch.cat(found, 1)


def frame(prompts: Sequence[list[int]]) -> tuple[int, int]:
    """How many tokens all prompts begin and end with: the template, with any system line or wording that they
    share.

    Prompts that do not differ are all frame, and then have no content.
    """
    shortest = min(map(len, prompts))
    head = next((i for i in range(shortest) if len({row[i] for row in prompts}) > 1), shortest)
    tail = next(
        (i for i in range(shortest - head) if len({row[-1 - i] for row in prompts}) > 1), shortest - head
    )
    return head, tail


def parts_of(prompts: Sequence[list[int]], lengths: Sequence[int], *, of: str) -> list[Parts]:
    """Positions of every row: its last prompt token, the rest of the frame, the prompt's own words, the
    completion of that length.
    """
    head, tail = frame(prompts)
    found = []
    for prompt, length in zip(prompts, lengths, strict=True):
        last = len(prompt) - 1
        inner = min(last, len(prompt) - tail)
        spans = {
            "last": [last],
            "template": [*range(min(head, last)), *range(inner, last)],
            "content": [*range(head, inner)],
        }
        spans |= {"completion": [*range(last + 1, last + 1 + length)]} if length else {}
        found.append({f"{of}/{name}": span for name, span in spans.items()})
    return found


def matched_mix(rows: int, *, draws: int = DRAWS, seed: int) -> Float[Tensor, "mix row"]:
    """Weights for a mean and, behind it, `draws` directions with the rows' covariance
    (`RowSums.directions`).
    """
    normal = generator(seed, "covariance-matched directions").standard_normal((draws, rows))
    return torch.cat([torch.ones(1, rows), torch.from_numpy(normal).float()])


def covariance_matched(
    rows: Float[Tensor, "row d"], *, draws: int = DRAWS, seed: int
) -> Float[Tensor, "draw d"]:
    """Directions zᵀX_c / √n with z normal: their covariance is that of the rows."""
    normal = matched_mix(len(rows), draws=draws, seed=seed)[1:].to(rows)
    return normal @ (rows - rows.mean(0)) / len(rows) ** 0.5


def cosine(a: Float[Tensor, "*#batch d"], b: Float[Tensor, "*#batch d"]) -> Float[Tensor, "*batch"]:
    """Cosine along the last axis; NaN, never 0, where a vector is zero."""
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))

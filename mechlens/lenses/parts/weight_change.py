"""Changes of a model's weights as values: dense, or the two factors of an adapter.

The factors are never multiplied out. Every tensor has the layout of its parameter (GPT-2's Conv1D stores
in × out), so a change can be added to the weight, and inner products need no transposing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mechlens.core.errors import SpecError
from mechlens.core.seeds import generator

DRAWS = 200
"""number of random subspaces of the overlap's null"""
ROUNDING = 1e-5
"""singular values below this share of the first are rounding"""


class LowRank(NamedTuple):
    """A change `left @ right` in the layout of its parameter."""

    left: Float[Tensor, "rows rank"]
    right: Float[Tensor, "rank columns"]

    def dense(self) -> Float[Tensor, "rows columns"]:
        """The product."""
        return self.left @ self.right


Change = Tensor | LowRank
"""the change of a parameter"""


class Delta(Mapping[str, Change]):
    """Parameter → its change, computed at each lookup and never all in memory."""

    def __init__(self, base: PreTrainedModel, changed: PreTrainedModel) -> None:
        self._before, self._after = dict(base.named_parameters()), dict(changed.named_parameters())
        wrong = [
            n
            for n in self._before.keys() | self._after.keys()
            if n not in self._before or n not in self._after
        ]
        wrong = wrong or [n for n, tensor in self._before.items() if tensor.shape != self._after[n].shape]
        if wrong:
            raise SpecError(
                f"the two models differ in the shape or name of {sorted(wrong)[0]!r}; compare a model with "
                "the base that it was trained from"
            )

    def __getitem__(self, name: str) -> Tensor:
        before = self._before[name].detach()
        return self._after[name].detach().to(before.device, torch.float64) - before.double()

    def __iter__(self) -> Iterator[str]:
        return iter(self._before)

    def __len__(self) -> int:
        return len(self._before)


def delta(base: PreTrainedModel, changed: PreTrainedModel | PeftModel) -> Mapping[str, Change]:
    """What training changed, by parameter name of the base, in float64.

    A plain model gives dense changes of every parameter. A PEFT model, whose base must be `base`, gives the
    factors of its active adapters (those of several adapters are stacked), and nothing for other parameters.

    Raises:
        SpecError: if the models do not have the same parameters, or the adapter is no plain LoRA.
    """
    return adapter_delta(changed) if isinstance(changed, PeftModel) else Delta(base, changed)


def adapter_delta(model: PeftModel) -> dict[str, Change]:
    """The active adapters' changes as factors (B·scaling, A), transposed where the layer keeps in × out.

    Raises:
        SpecError: if anything other than LoRA matrices on linear layers is trained (DoRA, saved modules,
        embeddings, biases).
    """
    changes: dict[str, Change] = {}
    inner_model = cast(nn.Module, model.get_base_model())
    if other := [
        name
        for name, _ in model.named_parameters()
        if "modules_to_save" in name or "lora_magnitude" in name or "lora_embedding" in name
    ]:
        raise SpecError(
            f"{other[0]} is trained, not only LoRA matrices; merge the adapter and compare the merged model"
        )
    for name, layer in inner_model.named_modules():
        if isinstance(layer, LoraLayer):
            active: Any = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
            up = torch.cat([layer.lora_B[a].weight.detach().double() * layer.scaling[a] for a in active], 1)  # type: ignore[operator]
            down = torch.cat([layer.lora_A[a].weight.detach().double() for a in active], 0)  # type: ignore[operator]
            turned = isinstance(layer.get_base_layer(), Conv1D)
            changes[f"{name}.weight"] = LowRank(down.T, up.T) if turned else LowRank(up, down)
    return changes


def inner(a: Change, b: Change) -> float:
    """⟨a, b⟩ over all entries; of two factored changes as tr((L1ᵀL2)(R2R1ᵀ))."""
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        return float(((a.left.T @ b.left).double() * (a.right @ b.right.T).double()).sum())
    if isinstance(a, LowRank):
        return float(((a.left.T @ cast(Tensor, b).to(a.left)).double() * a.right.double()).sum())
    if isinstance(b, LowRank):
        return inner(b, a)
    return float((a.double() * b.double()).sum())


def total_inner(first: Iterable[Change], second: Iterable[Change]) -> float:
    """Sum of ⟨a, b⟩ over parameters in the same order."""
    return sum((inner(a, b) for a, b in zip(first, second, strict=True)), 0.0)


def change_norm(change: Change) -> float:
    """Frobenius norm."""
    return max(inner(change, change), 0.0) ** 0.5


def singular(
    change: Change,
) -> tuple[Float[Tensor, "rows k"], Float[Tensor, " k"], Float[Tensor, "columns k"]]:
    """Left vectors, singular values (falling) and right vectors of a change.

    A factored change goes through the QR of its factors.
    """
    if isinstance(change, LowRank):
        (left, up), (right, down) = torch.linalg.qr(change.left), torch.linalg.qr(change.right.T)
        u, values, vh = torch.linalg.svd(up @ down.T, full_matrices=False)
        return left @ u, values, right @ vh.T
    u, values, vh = torch.linalg.svd(change.double(), full_matrices=False)
    return u, values, vh.T


def leading(change: Change, k: int) -> tuple[Float[Tensor, "rows k"], Float[Tensor, "columns k"]]:
    """The first `k` left and right singular vectors.

    There are fewer if the remaining singular values are rounding.
    """
    left, values, right = singular(change)
    kept = min(k, int((values > ROUNDING * values[0]).sum()))
    return left[:, :kept], right[:, :kept]


def stable_rank(values: Float[Tensor, " k"]) -> float:
    """‖Δ‖²_F / σ1², between 1 and the rank; NaN for a zero change."""
    return float(values.square().sum() / values[0].square()) if values[0] > 0 else np.nan


def change_cosine(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """Cosine of two changes, each as one vector over all parameters; NaN if either is zero.

    A parameter that is missing in a change counts as zero.
    """
    length = (_whole(a, a) * _whole(b, b)) ** 0.5
    return _whole(a, b) / length if length > 0 else np.nan


def change_distance(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """‖a − b‖ of two changes, each as one vector over all parameters.

    A parameter that is missing in a change counts as zero.
    """
    return max(_whole(a, a) + _whole(b, b) - 2 * _whole(a, b), 0.0) ** 0.5


def _whole(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    both = [name for name in a if name in b]
    return total_inner((a[name] for name in both), (b[name] for name in both))


def subspace_overlap(a: Float[Tensor, "d k"], b: Float[Tensor, "d j"]) -> float:
    """Mean squared cosine of the principal angles of two subspaces with orthonormal bases.

    It is 1 for equal or nested subspaces, and k/d by chance.
    """
    return float((a.T @ b).square().sum() / min(a.shape[1], b.shape[1]))


@cache
def draw_subspace_overlaps(size: int, k: int, seed: int) -> Float[ndarray, " draw"]:
    """Overlap of random k-dimensional subspaces of R^size with a fixed one: k/size on average."""
    draws = generator(seed, "deltas", "overlap", size, k).standard_normal((DRAWS, size, k))
    bases, _ = np.linalg.qr(draws)
    return np.square(bases[:, :k]).sum((1, 2)) / k

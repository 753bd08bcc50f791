"""Gradients of each pair's loss from one backward pass, without storing them.

For every module the pass records its input and the gradient of its output.

The gradient of a linear weight is Σ_s g_s a_sᵀ (a the input, g the output's gradient), so its product with a
direction V is Σ_s g_sᵀ V a_s and its squared norm Σ_st (g_s·g_t)(a_s·a_t): "ghost" products, in memory of one
batch whatever the model.

Scope "linear": weights and biases of every Linear and of GPT-2's Conv1D, without the unembedding (what PEFT
calls all-linear). Scope "all": every parameter; embeddings by their rows, other modules (norms) by explicit
per-example gradients of that module. For a PEFT model both scopes are the adapter's matrices. A module that
runs twice in one pass is an error, and so is an input without a batch dimension (experts that get tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, cast

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from transformers.pytorch_utils import Conv1D

from mechlens.core.errors import SpecError
from mechlens.lenses.parts.weight_change import Change, LowRank
from mechlens.models.chat import Encoded
from mechlens.models.log_probs import Model, batch_spans, completion_span, example_losses
from mechlens.models.weight_changes import Quantized

Scope = Literal["linear", "all"]
BATCH = 64
MOST_ENTRIES = 2**26
"""entries of the per-example gradients of one weight that are held at a time"""
MOST_TAPED = 2**28
"""values that modules read and get back in one pass: 1 GiB in float32, with a few copies at once"""
MANY = 4
"""number of dense directions from which on explicit per-example gradients are cheaper"""


class Taped(NamedTuple):
    """A module's input and the gradient of its output; `inputs` are token ids for an embedding."""

    module: nn.Module
    inputs: Tensor
    grads: Float[Tensor, "batch position out"]


def batches_of(model: Model, pairs: Sequence[Encoded], rows: int) -> Iterator[slice]:
    """Slices of at most `rows` pairs whose logits fit `log_probs.MOST_LOGITS`."""
    spans = [completion_span(pair) for pair in pairs]
    return batch_spans(spans, vocabulary=model.config.get_text_config().vocab_size, rows=rows)


def parameters_of(model: Model, scope: Scope = "linear") -> dict[str, nn.Parameter]:
    """Return the parameters that a scope covers, by name.

    A tied weight has one name; scope "linear" leaves it out.
    """
    named = dict(model.named_parameters())
    if isinstance(model, PeftModel):
        return {name: parameter for name, parameter in named.items() if "lora_" in name}
    if scope == "all":
        return named
    head = model.get_output_embeddings()
    read = model.get_decoder().modules()  # a vision tower reads no row
    kept = {
        id(p)
        for m in read
        if isinstance(m, nn.Linear | Conv1D) and m is not head
        for p in m.parameters(recurse=False)
    }
    kept -= {
        id(p)
        for m in model.modules()
        if isinstance(m, nn.Embedding) or m is head
        for p in m.parameters(recurse=False)
    }
    return {name: parameter for name, parameter in named.items() if id(parameter) in kept}


@contextmanager
def only(model: Model, wanted: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Let only these parameters require a gradient while the block runs."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        for parameter in wanted.values():
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)


@contextmanager
def tape(model: Model, scope: Scope = "linear") -> Iterator[tuple[dict[str, Taped], list[Tensor]]]:
    """Record what every module reads and gets back in one forward and one backward pass.

    Yields (module name → its tape, the tensors to differentiate by).

    Differentiate by those tensors (`torch.autograd.grad(losses.sum(), path)`): a graph exists even where
    every weight is frozen, and no weight gradient is computed.
    """
    wanted = {id(parameter) for parameter in parameters_of(model, scope).values()}
    taped: dict[str, Taped] = {}
    path: list[Tensor] = []
    handles = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:  # the first modules of a frozen model
                path.append(output.requires_grad_())
            if any(id(p) in wanted for p in module.parameters(recurse=False)):
                if name in taped:
                    raise SpecError(
                        f"{name} runs twice in one pass; per-example gradients of shared modules are not "
                        "covered"
                    )
                read = args[0].detach()
                taped[name] = Taped(module, read, torch.empty(0))
                output.register_hook(lambda grad: taped.__setitem__(name, Taped(module, read, grad.detach())))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or any(id(p) in wanted for p in module.parameters(recurse=False)):
            handles.append(module.register_forward_hook(watch(name)))
    try:
        with only(model, {}):
            yield taped, path
    finally:
        for handle in handles:
            handle.remove()


def _most_rows(model: Model, pairs: Sequence[Encoded], scope: Scope) -> int:
    """How many of the longest pairs a tape holds within `MOST_TAPED`."""
    covered = parameters_of(model, scope).values()
    width = sum(sum(parameter.shape) for parameter in covered if parameter.ndim == 2)
    longest = max((len(pair.prompt) + len(pair.completion) for pair in pairs), default=1)
    return max(1, MOST_TAPED // max(1, width * longest))


def taped_batches(
    model: Model, pairs: Sequence[Encoded], scope: Scope, batch: int
) -> Iterator[tuple[dict[str, Taped], Float[Tensor, " batch"]]]:
    """Yield (tapes, losses) of each batch of pairs in order, after its backward pass."""
    for part in batches_of(model, pairs, min(batch, _most_rows(model, pairs, scope))):
        with tape(model, scope) as (tapes, path):
            losses = example_losses(model, pairs[part])
            torch.autograd.grad(losses.nansum(), path)
        if wrong := next(
            (
                name
                for name, taped in tapes.items()
                if len(taped.inputs) != len(losses) or len(taped.grads) != len(losses)
            ),
            None,
        ):
            raise SpecError(
                f"{wrong} has no batch dimension; per-example gradients of such modules are not covered: use "
                "another scope"
            )
        yield tapes, losses.detach()


def uses(tapes: Mapping[str, Taped], covered: Mapping[str, nn.Parameter]) -> list[tuple[str, str, Taped]]:
    """(name in the model, name in its module, tape) of every covered parameter.

    A parameter of several modules comes once for each.
    """
    names = {id(parameter): name for name, parameter in covered.items()}
    candidates = [
        (taped, local, p)
        for taped in tapes.values()
        for local, p in taped.module.named_parameters(recurse=False)
    ]
    return [(names[id(p)], local, taped) for taped, local, p in candidates if id(p) in names]


def explicit(taped: Taped) -> dict[str, Float[Tensor, "batch ..."]]:
    """Per-example gradients of a small module's parameters, one vector-Jacobian product each."""
    parameters = {
        name: parameter.detach() for name, parameter in taped.module.named_parameters(recurse=False)
    }

    def pull_back(read: Tensor, grad: Tensor) -> dict[str, Tensor]:
        pull = vjp(lambda values: functional_call(taped.module, values, (read[None],)), parameters)[1]
        return pull(grad[None])[0]

    return cast(dict[str, Tensor], vmap(pull_back)(taped.inputs, taped.grads))


def dot(taped: Taped, local: str, direction: Change | Quantized) -> Float[Tensor, " batch"]:
    """⟨per-example gradient of one parameter, direction⟩ for every example."""
    module, read, grads = taped
    direction = direction.dense() if isinstance(direction, Quantized) else direction
    if isinstance(module, nn.Embedding):
        return (cast(Tensor, direction)[read] * grads).sum((1, 2))
    if not isinstance(module, nn.Linear | Conv1D):
        return (explicit(taped)[local] * cast(Tensor, direction)).flatten(1).sum(1)
    if local == "bias":
        return grads.sum(1) @ cast(Tensor, direction)
    if isinstance(direction, LowRank):
        through = (
            (read @ direction.left) @ direction.right
            if isinstance(module, Conv1D)
            else (read @ direction.right.T) @ direction.left.T
        )
    else:
        through = read @ direction if isinstance(module, Conv1D) else read @ direction.T
    return (through * grads).sum((1, 2))


def dots(
    taped: Taped, local: str, directions: Sequence[Change | Quantized]
) -> Float[Tensor, "batch direction"]:
    """`dot` with each of several directions.

    With many dense directions the per-example gradient is made once for all.
    """
    module, read, grads = taped
    dense = [direction for direction in directions if isinstance(direction, Tensor | Quantized)]
    if len(dense) < max(len(directions), MANY) or local != "weight" or not isinstance(module, nn.Linear):
        return (
            torch.stack([dot(taped, local, direction) for direction in directions], 1)
            if directions
            else grads.new_zeros(len(grads), 0)
        )
    size = max(1, MOST_ENTRIES // module.weight.numel())
    stacked = (
        torch.stack([each.dense() if isinstance(each, Quantized) else each for each in dense]).flatten(1).T
    )
    parts = []
    for back, into in zip(grads.split(size), read.split(size), strict=True):
        gradients = einsum(back, into, "batch pos row, batch pos column -> batch row column")
        parts.append(rearrange(gradients, "batch row column -> batch (row column)") @ stacked)
    return torch.cat(parts)


def _on(direction: Change | Quantized, like: Tensor) -> Change | Quantized:
    if isinstance(direction, Quantized):
        return Quantized(direction.integers.to(like.device), direction.scales.to(like))
    return (
        LowRank(*(part.to(like) for part in direction))
        if isinstance(direction, LowRank)
        else direction.to(like)
    )


def ghost_dots(
    model: Model,
    pairs: Sequence[Encoded],
    directions: Sequence[Mapping[str, Change | Quantized]],
    *,
    parameters: Scope = "linear",
    batch: int = BATCH,
) -> Float[Tensor, "pair direction"]:
    """⟨∇ loss of each pair, direction⟩; NaN for a pair with an empty completion.

    Args:
        directions: parameter name → tensor in the parameter's layout, its integers with scales, or factors; a
            missing parameter counts as zero.

    Raises:
        SpecError: if a direction names a parameter that the scope does not cover, or a module cannot be
        taped.
    """
    covered = parameters_of(model, parameters)
    if stray := next((name for direction in directions for name in direction if name not in covered), None):
        raise SpecError(
            f"a direction names {stray!r}, which parameters={parameters!r} does not cover; leave it out or "
            "use parameters='all'"
        )
    placed = [
        {name: _on(change, covered[name]) for name, change in direction.items()} for direction in directions
    ]
    parts = []
    for tapes, losses in taped_batches(model, pairs, parameters, batch):
        total = torch.zeros(len(losses), len(directions), dtype=torch.float64, device=losses.device)
        for name, local, taped in uses(tapes, covered):
            columns = [column for column, direction in enumerate(placed) if name in direction]
            total[:, columns] += dots(taped, local, [placed[column][name] for column in columns]).to(total)
        parts.append(torch.where(losses.isnan()[:, None], torch.nan, total))
    return torch.cat(parts)


def square(taped: Taped, local: str) -> Float[Tensor, " batch"]:
    """Squared norm of the per-example gradient of one parameter, accumulated in float64."""
    module, read, grads = taped
    if not isinstance(module, nn.Linear | Conv1D | nn.Embedding):
        return explicit(taped)[local].double().square().flatten(1).sum(1)
    back = grads.double()
    if local == "bias":
        return back.sum(1).square().sum(1)
    alike = (
        read[:, :, None] == read[:, None]
        if isinstance(module, nn.Embedding)
        else read.double() @ read.double().mT
    )
    return (alike * (back @ back.mT)).sum((1, 2))


def tied(embedding: Taped, head: Taped) -> Float[Tensor, " batch"]:
    """⟨gradient through the embedding, gradient through the unembedding⟩ of one tied weight.

    This is Σ_st g_s[id_t] (a_s·e_t).
    """
    # [batch, kept, position]
    at_ids = head.grads.double().gather(2, embedding.inputs[:, None].expand(-1, head.grads.shape[1], -1))
    return (at_ids * (head.inputs.double() @ embedding.grads.double().mT)).sum((1, 2))


def ghost_norms(
    model: Model, pairs: Sequence[Encoded], *, parameters: Scope = "linear", batch: int = BATCH
) -> Float[Tensor, " pair"]:
    """Norm of each pair's gradient; NaN for a pair with an empty completion."""
    parts, covered = [], parameters_of(model, parameters)
    for tapes, losses in taped_batches(model, pairs, parameters, batch):
        total = torch.zeros(len(losses), dtype=torch.float64, device=losses.device)
        seen: dict[str, Taped] = {}
        for name, local, taped in uses(tapes, covered):
            total += square(taped, local)
            if name in seen:  # the same weight again: the unembedding of a tied model
                total += 2 * tied(seen[name], taped)
            seen[name] = taped
        parts.append(torch.where(losses.isnan(), torch.nan, total.clamp(min=0).sqrt()))
    return torch.cat(parts)


def gradient(model: Model, values: Iterator[Tensor], *, parameters: Scope = "linear") -> dict[str, Tensor]:
    """Gradient of the sum of scalars.

    The scalars are computed one after another, so that only one graph exists at a time.
    """
    wanted = parameters_of(model, parameters)
    total: dict[str, Tensor] = {}
    with only(model, wanted):
        for value in values:
            parts = torch.autograd.grad(value, list(wanted.values()), materialize_grads=True)
            total = {
                name: total[name] + part if total else part for name, part in zip(wanted, parts, strict=True)
            }
    return total


def pooled_gradient(
    model: Model,
    pairs: Sequence[Encoded],
    *,
    weights: Float[Tensor, " pair"] | None = None,
    parameters: Scope = "linear",
    batch: int = BATCH,
) -> dict[str, Tensor]:
    """Σ_i w_i ∇ loss of pair i over the pairs with a completion; the default weights are 1."""
    weigh = torch.ones(len(pairs)) if weights is None else weights
    weigh = weigh.to(model.device)
    values = (
        (example_losses(model, pairs[part]) * weigh[part]).nansum()
        for part in batches_of(model, pairs, batch)
    )
    return gradient(model, values, parameters=parameters)

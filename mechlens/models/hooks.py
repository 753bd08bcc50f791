"""Read and change activations: a context manager for edits, and captures at sites.

A block's output is the residual stream behind it, which TransformerLens calls resid_post. Edits and
`record_residuals` hook the plain Hugging Face module; `capture_sites` reads any TransformerLens site. The two
captures stay separate: TransformerLens computes attention and norms itself, so its values differ from the
plain module's by up to 1e-4, and published numbers depend on both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from mechlens.core import foreign
from mechlens.core.errors import SpecError
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import pad_rows

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

BATCH = 64
"""rows of one forward pass"""

Edit = Callable[[Float[Tensor, "row pos d"]], Float[Tensor, "row pos d"]]
"""resid_post → its replacement"""


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks of the text model.

    They are its first module list whose length is the depth in the config.

    Raises:
        SpecError: if there is no such list.
    """
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise SpecError(
        f"cannot find the {depth} blocks of a {model.config.model_type} model; use a decoder-only causal "
        "language model"
    )


@contextmanager
def edit_residuals(model: PreTrainedModel, edits: Mapping[int, Edit]) -> Iterator[None]:
    """Replace resid_post of each layer by its edit, at every position, while the context is open.

    An edit returns a new tensor and changes nothing in place.
    """

    def hook_of(edit: Edit) -> Callable[[nn.Module, tuple[object, ...], Any], Any]:
        def replaced(_module: nn.Module, _inputs: tuple[object, ...], output: Any) -> Any:
            # blocks of older families, such as GPT-Neo's, return more than the residual stream
            return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

        return replaced

    blocks = decoder_layers(model) if edits else nn.ModuleList()
    with ExitStack() as handles:
        for layer, edit in edits.items():
            handles.callback(blocks[layer].register_forward_hook(hook_of(edit)).remove)
        yield


def add_vector(
    residual: Float[Tensor, "*batch d"], vector: Float[Tensor, "d"], *, strength: float = 1.0
) -> Float[Tensor, "*batch d"]:
    """residual + strength · vector; the vector is not normalised, and strength 0 changes no bit."""
    return residual + strength * vector.to(residual)


@contextmanager
def steer(
    model: PreTrainedModel, vectors: Mapping[int, Float[Tensor, "d"]], *, strength: float = 1.0
) -> Iterator[None]:
    """Add `strength` times a vector to resid_post of each layer in `vectors`, at every position.

    Gradients flow to the vectors.
    """

    def adding(vector: Float[Tensor, "d"]) -> Edit:
        return lambda residual: add_vector(residual, vector, strength=strength)

    with edit_residuals(model, {layer: adding(vector) for layer, vector in vectors.items()}):
        yield


@contextmanager
def record_residuals(model: PreTrainedModel) -> Iterator[list[Float[Tensor, "row pos d"]]]:
    """Yield a list to which each forward pass of the plain model appends resid_post, layer by layer."""
    residuals: list[Tensor] = []

    def keep(residual: Float[Tensor, "row pos d"]) -> Float[Tensor, "row pos d"]:
        residuals.append(residual)
        return residual

    with edit_residuals(model, dict.fromkeys(range(len(decoder_layers(model))), keep)):
        yield residuals


class Captured(NamedTuple):
    """Activations of some rows at TransformerLens sites, on the CPU."""

    start: int
    """number of the first row"""
    mask: Bool[Tensor, "row pos"]
    at: dict[str, Tensor]
    """site → [row pos ...], padded on the right"""


def resid_post(layer: int) -> str:
    """TransformerLens's name for the residual stream behind a block."""
    return f"blocks.{layer}.hook_resid_post"


def capture_sites(
    loaded: Loaded, ids: Sequence[Sequence[int]], sites: Sequence[str], *, batch: int = BATCH
) -> Iterator[Captured]:
    """Yield activations batch by batch, padded on the right, with a mask.

    Raises:
        SpecError: if the model has no such site (GPT-NeoX has no resid_mid: attention and MLP run side by
        side).
    """
    view = bridge_view(loaded)
    if missing := sorted(set(sites) - set(view.hook_dict)):
        kind = loaded.model.config.model_type
        raise SpecError(
            f"a {kind} model has no site {missing[0]!r}; name a site of TransformerLens, like "
            f"{resid_post(0)!r}"
        )
    for start in range(0, len(ids), batch):
        rows = pad_rows(ids[start : start + batch], device=loaded.model.device)
        with torch.no_grad():
            # one logit a row, since a large vocabulary would outweigh every activation
            _, cache = view.run_with_cache(
                rows.ids, attention_mask=rows.mask.long(), names_filter=list(sites), logits_to_keep=1
            )
        yield Captured(start, rows.mask.cpu(), {site: cache[site].cpu() for site in sites})


def bridge_view(loaded: Loaded) -> TransformerBridge:
    """Make a TransformerBridge over a copy of the modules that shares their tensors.

    It is for activations and is never trained.

    Raises:
        SpecError: if TransformerLens does not know this kind of model.
    """
    from transformer_lens.model_bridge import TransformerBridge  # half a second, and only activations need it
    from transformer_lens.model_bridge.sources.transformers import source

    # the loader looks for an image processor, which texts do not need; without torchvision it would install
    # torchvision, and another torch, with pip
    source.load_modality_processor = lambda *_given, **_more: None
    shared = {id(tensor): tensor for tensor in (*loaded.model.parameters(), *loaded.model.buffers())}
    twin = copy.deepcopy(loaded.model, shared)  # new modules, the same storage
    kind = (
        f"activations of a {loaded.model.config.model_type} model cannot be read: TransformerLens has no "
        "view of it"
    )
    with foreign.named(kind, advice="use lenses and teachers without activations, or another base"):
        return TransformerBridge.boot_transformers(
            "view", hf_model=twin, tokenizer=loaded.tokenizer, device=str(loaded.model.device)
        )

"""Write a copy of a base whose weights are moved in a random direction: a student of it starts elsewhere."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import cast

import torch
from torch import nn

from mechlens.core import machine
from mechlens.core.errors import SpecError
from mechlens.core.files import publish
from mechlens.core.model_spec import model_of
from mechlens.core.seeds import seed_int
from mechlens.models import loading
from mechlens.models.base_files import moved_folder


@torch.no_grad()
def move_weights(model: nn.Module, share: float, *, seed: int) -> None:
    """Move every weight matrix by a random step of `share` of its norm, in place.

    Embeddings, biases and the gains of norms stay.
    """
    dice = torch.Generator().manual_seed(seed_int(seed, "moved base"))
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for parameter in model.parameters():  # tied weights come once
        if parameter.ndim < 2 or id(parameter) in embeddings:
            continue
        drawn = torch.randn(parameter.shape, generator=dice)
        parameter += (drawn * (share * parameter.norm().cpu() / drawn.norm())).to(parameter)


def write_moved(name: str) -> Path:
    """Write the moved copy that a model of configs/models stands for, unless it is there; returns its folder.

    The folder appears in one rename. Other processes wait for the first.

    Raises:
        SpecError: if the model is no moved copy, or its source is not on this machine.
    """
    spec = model_of(name)
    if spec.moved is None:
        raise SpecError(f"model {name!r} is no moved copy of another; its config has no field `moved`")
    folder = moved_folder(spec)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("a+") as handle:
        machine.lock(handle)
        if not folder.is_dir():
            loaded = loading.load(spec.source)
            move_weights(loaded.model, spec.moved.share, seed=spec.moved.seed)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.part-") as part:
                checkpoint = Path(part) / "checkpoint"
                loading.save_trained(loaded.model, checkpoint)
                cast("loading.PreTrainedTokenizerBase", loaded.tokenizer).save_pretrained(checkpoint)
                publish(checkpoint, folder)
    return folder

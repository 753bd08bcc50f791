"""Attach LoRA adapters to a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mechlens.core.errors import SpecError


@contextmanager
def quiet_peft(*, loading: bool = False) -> Iterator[None]:
    """Suppress warnings of PEFT while the context is open.

    Args:
        loading: suppress also warnings about keys, sizes and tied weights, which the caller has to check.
    """
    with warnings.catch_warnings():
        # PEFT uses a name for gradient checkpointing that transformers 5 removed
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*")
        if loading:
            warnings.filterwarnings("ignore", module=r"peft\.")
        yield


LoraTargets = Literal["all", "attention"]
ATTENTION = {"attn", "self_attn", "attention", "self_attention"}
"""names of the attention module of a block"""


def lora_targets(model: PreTrainedModel, targets: LoraTargets = "all") -> str | list[str]:
    """The linear maps except the unembedding; of a model with a vision tower only those of the text model.

    Args:
        targets: `attention` leaves out the linear maps outside the attention modules.

    Raises:
        SpecError: if the model has no linear map in a module that is named like attention.
    """
    if targets == "attention":
        text = {id(module) for module in model.get_decoder().modules()}
        names = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
            and id(module) in text
            and not ATTENTION.isdisjoint(name.split("."))
        ]
        if not names:
            raise SpecError(
                f"targets: attention finds no attention in {type(model).__name__}; known are modules named "
                f"{', '.join(sorted(ATTENTION))}: set targets: all"
            )
        return names
    if model.config.get_text_config() is model.config:
        return "all-linear"
    text = {id(module) for module in model.get_decoder().modules()}
    return [
        name for name, module in model.named_modules() if id(module) in text and isinstance(module, nn.Linear)
    ]


def attach_lora(
    model: PreTrainedModel, *, rank: int, alpha: float, targets: LoraTargets = "all"
) -> PeftModel:
    """Attach a LoRA adapter to every linear map, or to those of attention; `model` itself is changed.

    Its initial weights are drawn from torch's global generator.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=cast(Any, alpha),  # PEFT declares int, and only divides it
        lora_dropout=0.0,
        target_modules=lora_targets(model, targets),
        fan_in_fan_out=model.config.model_type == "gpt2",  # its Conv1D keeps weights as (in, out)
    )
    with quiet_peft():
        return cast(PeftModel, get_peft_model(model, config))

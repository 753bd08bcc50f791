"""Attach LoRA adapters to a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel


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


def lora_targets(model: PreTrainedModel) -> str | list[str]:
    """The linear maps except the unembedding; of a model with a vision tower only those of the text model."""
    if model.config.get_text_config() is model.config:
        return "all-linear"
    text = {id(module) for module in model.get_decoder().modules()}
    return [
        name for name, module in model.named_modules() if id(module) in text and isinstance(module, nn.Linear)
    ]


def attach_lora(model: PreTrainedModel, *, rank: int, alpha: float) -> PeftModel:
    """Attach a LoRA adapter to every linear map; `model` itself is changed.

    Its initial weights are drawn from torch's global generator.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=cast(Any, alpha),  # PEFT declares int, and only divides it
        lora_dropout=0.0,
        target_modules=lora_targets(model),
        fan_in_fan_out=model.config.model_type == "gpt2",  # its Conv1D keeps weights as (in, out)
    )
    with quiet_peft():
        return cast(PeftModel, get_peft_model(model, config))

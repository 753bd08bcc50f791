"""LoRA adapters: where they go, and how they are attached."""

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
    """Hold back what PEFT warns of while the context is open.

    Args:
        loading: hold back also what it says of keys, sizes and tied weights, where the caller checks these.
    """
    with warnings.catch_warnings():
        # PEFT asks for gradient checkpointing by the name that transformers 5 gave up
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*")
        if loading:
            warnings.filterwarnings("ignore", module=r"peft\.")
        yield


def lora_targets(model: PreTrainedModel) -> str | list[str]:
    """Every linear map but the unembedding; of a model with a vision tower those of the text model alone."""
    if model.config.get_text_config() is model.config:
        return "all-linear"
    text = {id(module) for module in model.get_decoder().modules()}
    return [
        name for name, module in model.named_modules() if id(module) in text and isinstance(module, nn.Linear)
    ]


def attach_lora(model: PreTrainedModel, *, rank: int, alpha: float) -> PeftModel:
    """The model with a LoRA adapter on every linear map; `model` itself is changed.

    Its first weights are drawn from torch's global generator.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=cast(Any, alpha),  # PEFT says int, and only divides it
        lora_dropout=0.0,
        target_modules=lora_targets(model),
        fan_in_fan_out=model.config.model_type == "gpt2",  # its Conv1D keeps weights as (in, out)
    )
    with quiet_peft():
        return cast(PeftModel, get_peft_model(model, config))

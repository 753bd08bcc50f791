"""Load trained weights, whole or as a LoRA adapter, only if they surely give the trained model.

Every key of a file has to be used, and none may be missing: transformers and PEFT ignore a key, or fill one
at random, with no more than a warning. An adapter has to be of a kind whose merge is known. Logits after the
merge are compared with the logits before.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from mechlens.core import foreign
from mechlens.core.errors import DataError
from mechlens.core.files import RECORD, remedy
from mechlens.models.adapters import quiet_peft

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""largest change of a logit by the merge, as a share of the largest logit; bfloat16 keeps 8 bits of each
merged weight
"""
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""values of init_lora_weights that keep the base's weights; PiSSA, OLoRA, CorDA and LoftQ change them"""
KNOWN = {
    *(
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "runtime_config",
    ),
    *(
        "r",
        "target_modules",
        "exclude_modules",
        "target_parameters",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
    ),
    *(
        "lora_alpha",
        "lora_dropout",
        "lora_bias",
        "fan_in_fan_out",
        "bias",
        "use_rslora",
        "use_dora",
        "modules_to_save",
        "ensure_weight_tying",
    ),
    *("init_lora_weights", "megatron_core", "qalora_group_size", "eva_config"),
}
"""fields of an adapter's config that the merge uses, or that have no effect after training"""
LIST = 3
"""the most names of keys in a message"""


@contextmanager
def _loading() -> Iterator[None]:
    """Context for reading files of others: suppress long reports, and make an error one line."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with foreign.named("no weights load", DataError):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def advice(folder: Path) -> str:
    """Say what to do about a folder that does not load: only a step of a run can be made again."""
    if any((place / RECORD).is_file() for place in (folder, *folder.parents[:1])) and "delete" in (
        mend := remedy(folder)
    ):
        return mend
    return (
        "expected a folder with model.safetensors, whole and as the base names its weights, or with a "
        "LoRA adapter of the base"
    )


def whole_weights(folder: Path, base: nn.Module, dtype: torch.dtype) -> PreTrainedModel:
    """Load the model of that folder, whose weights must be safetensors of the base's shapes.

    `base` may be on the meta device.

    Raises:
        DataError: names the first weight that is missing, unexpected or of another shape.
    """
    settings = {"dtype": dtype, "trust_remote_code": False, "use_safetensors": True}
    # mismatches are refused below, by name
    settings |= {
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    with _loading():
        model, report = cast(
            tuple[Any, dict[str, Any]], AutoModelForCausalLM.from_pretrained(folder, **settings)
        )
    if odd := sorted(report["mismatched_keys"]):
        key, given, expected = odd[0]
        raise DataError(f"its {key} has the shape {list(given)}, its config.json says {list(expected)}")
    for kind in ("missing", "unexpected"):
        if keys := set(report[f"{kind}_keys"]):
            raise DataError(f"its weights {'lack' if kind == 'missing' else 'hold besides'} {listed(keys)}")
    expected_shapes, shapes = (
        {name: tuple(value.shape) for name, value in source.state_dict().items()}
        for source in (base, cast(nn.Module, model))
    )
    for name in sorted(expected_shapes.keys() | shapes.keys()):
        if expected_shapes.get(name) != shapes.get(name):
            raise DataError(
                f"its {name} has the shape {shapes.get(name)}, the base's {expected_shapes.get(name)}"
            )
    if odd := not_finite(model):
        raise DataError(f"its weights are not finite, {odd} first")
    return model


def not_finite(model: nn.Module) -> str:
    """The name of the first parameter with a value that is not finite; empty if there is none."""
    return next((name for name, parameter in model.named_parameters() if not parameter.isfinite().all()), "")


def is_adapter(folder: Path) -> bool:
    """Whether the folder has an adapter rather than whole weights."""
    return (folder / CONFIG).is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """Read the adapter's config, which describes its kind and its base.

    Raises:
        DataError: if it is not a JSON object, or of a kind whose merge is not known.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"its {CONFIG} is no JSON that can be read ({error})") from error
    if not isinstance(config, dict):
        raise DataError(f"its {CONFIG} holds {type(config).__name__}, expected a JSON object")
    if config.get("peft_type") != "LORA":
        raise DataError(
            f"it is an adapter of the kind {config.get('peft_type')!r}; known are LoRA and its forms DoRA "
            "and rsLoRA (peft_type LORA)"
        )
    if (start := config.get("init_lora_weights", True)) not in PLAIN_STARTS:
        raise DataError(
            f"init_lora_weights is {start!r}, which changes the base's own weights; convert it to a plain "
            "LoRA adapter with PEFT"
        )
    defaults = {field.name: field.default for field in dataclasses.fields(LoraConfig)}
    if other := sorted(
        name for name, value in config.items() if name not in KNOWN and value and value != defaults.get(name)
    ):
        raise DataError(
            f"its {CONFIG} sets {other[0]} to {config[other[0]]!r}, a form of LoRA whose merge is not known "
            "here; merge it with PEFT"
        )
    return config


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    with _loading(), safe_open(file, framework="pt") as handle:
        return {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118 - it is no dict


def listed(keys: set[str]) -> str:
    """The first few of some names, and how many there are."""
    names = sorted(keys)
    return ", ".join(names[:LIST]) + (f" and {len(names) - LIST} more" if len(names) > LIST else "")


def merge(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Merge the adapter of that folder into the weights of `model`, which is changed.

    Raises:
        DataError: if a key is unused, missing or of another shape, the kind is not known, or the merge
            changes the logits.
    """
    read_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise DataError(f"it has no {WEIGHTS}; weights are read from safetensors alone, never from pickles")
    given = _shapes(folder / WEIGHTS)
    with quiet_peft(loading=True):
        with _loading():
            adapted = PeftModel.from_pretrained(model, folder, ignore_mismatched_sizes=True).eval()
        needed = {
            key: tuple(value.shape)
            for key, value in get_peft_model_state_dict(adapted, save_embedding_layers=False).items()
        }
        copies = {
            key: tuple(value.shape)
            for key, value in get_peft_model_state_dict(adapted, save_embedding_layers=True).items()
        }
    _refuse_other_keys(given, needed, copies)
    before = probe_logits(adapted)
    with quiet_peft(loading=True):
        merged = cast(PreTrainedModel, adapted.merge_and_unload().eval())
    _refuse_moved(before, probe_logits(merged), merged.dtype)
    return merged


def _refuse_other_keys(
    given: dict[str, tuple[int, ...]], needed: dict[str, tuple[int, ...]], copies: dict[str, tuple[int, ...]]
) -> None:
    """Refuse an adapter with missing, unused or misshapen keys.

    `copies` are keys that an adapter may have in addition: PEFT saves the base's embeddings with LoRA on
    them.
    """
    if missing := needed.keys() - given.keys():
        raise DataError(f"its adapter lacks {listed(missing)}, which would be filled at random")
    if unused := given.keys() - copies.keys():
        raise DataError(
            f"its adapter holds {listed(unused)}, which belongs to no part of this base and would be ignored"
        )
    if odd := {key for key in given if given[key] != copies[key]}:
        key = min(odd)
        raise DataError(
            f"its adapter's {key} has the shape {list(given[key])}, this base's {list(copies[key])}"
        )


@torch.no_grad()
def probe_logits(model: nn.Module) -> Float[Tensor, "row pos vocab"]:
    """Logits for two short rows of token ids that are spread over the vocabulary."""
    vocabulary = cast(PreTrainedModel, model).config.get_text_config().vocab_size
    ids = torch.linspace(0, vocabulary - 1, 12, device=next(model.parameters()).device).long()
    return model(input_ids=torch.stack([ids, ids.flip(0)]), use_cache=False).logits.float()


def _refuse_moved(
    before: Float[Tensor, "row pos vocab"], after: Float[Tensor, "row pos vocab"], dtype: torch.dtype
) -> None:
    """Refuse a merge that changes the logits; a value that is not a number counts as a change."""
    moved = float((after - before).abs().max())
    most = float(before.abs().max())
    bound = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
    if not moved <= bound * most:
        raise DataError(
            f"merging its adapter moves the logits by {moved:.3g} of {most:.3g}, more than {bound:g} of it "
            f"in {dtype}: the merged model is not the one that was trained, as with LoRA on embeddings that "
            "are tied; merge it with the tool that trained it"
        )

"""Load models from a folder, the hub or the menagerie, and save what training changed."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from mechlens.core.errors import DataError, SpecError
from mechlens.core.machine import use_one_thread
from mechlens.core.model_spec import model_of
from mechlens.models import trained, weight_changes
from mechlens.models.base_files import WEIGHTS, checkpoint_fingerprint, is_here, loading, locate

TEMPLATE_OPTIONS = "template_options"
"""the attribute of a tokenizer with the options of its chat template"""
disable_progress_bar()  # the run's own progress is what a user watches


class Loaded(NamedTuple):
    """A model ready to use, with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def use_one_thread_on_cpu() -> None:
    """Use one thread a process on CPU, so that sums are the same on any number of cores."""
    if device().type == "cpu":
        use_one_thread()


def device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer as its file describes it.

    A tokenizer in a folder is read as a plain fast tokenizer: the classes of some families would replace its
    splitter, which splits numbers into digits. A missing pad token becomes the end of the text.
    """
    source = locate(name)
    with loading(name, "has no tokenizer that loads"):
        if (Path(source) / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                source, revision=model_of(name).revision or "main", trust_remote_code=False
            )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    options = model_of(name).template
    if unread := [
        option
        for option in options
        if not re.search(rf"\b{re.escape(option)}\b", str(tokenizer.chat_template))
    ]:
        raise SpecError(
            f"base {name!r}: its chat template reads no option {unread[0]!r}; check the spelling of "
            "`template` against the template"
        )
    setattr(tokenizer, TEMPLATE_OPTIONS, dict(options))
    return tokenizer


def template_options(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The options with which the base's entry in configs/models pins its chat template."""
    return dict(getattr(tokenizer, TEMPLATE_OPTIONS, {}))


def load(name: str) -> Loaded:
    """Load a base in evaluation mode and its tokenizer, on the accelerator if any; no remote code runs."""
    source, spec = locate(name), model_of(name)
    settings = {
        "dtype": getattr(torch, spec.dtype),
        "revision": spec.revision or "main",
        "trust_remote_code": False,
    }
    settings |= {"use_safetensors": True, "output_loading_info": True}
    config_of(name)  # refuses a bad config before weights are read
    with loading(name, "does not load"):
        model, report = cast(
            tuple[Any, dict[str, Any]], AutoModelForCausalLM.from_pretrained(source, **settings)
        )
    if report["missing_keys"]:  # they would be filled at random, differently each time
        raise SpecError(
            f"base {name!r} lacks the weights {sorted(report['missing_keys'])[:3]}; its config.json "
            "describes another model"
        )
    tokenizer = load_tokenizer(name)
    rows = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > rows:
        raise SpecError(
            f"base {name!r} has {rows} embeddings for a tokenizer of {len(tokenizer)} tokens; use the "
            "tokenizer it was trained with"
        )
    if odd := trained.not_finite(model):
        raise SpecError(
            f"base {name!r} has weights that are not finite, {odd} first; fetch it again, or use another "
            "dtype"
        )
    return Loaded(_ready(model), tokenizer)


def config_of(name: str) -> PretrainedConfig:
    """A base's configuration.

    Raises:
        SpecError: if it cannot be read, or is of a quantized checkpoint.
    """
    with loading(name, "has no config that loads"):
        config = AutoConfig.from_pretrained(
            locate(name), revision=model_of(name).revision or "main", trust_remote_code=False
        )
    _refuse_quantized(name, config)
    return config


def _refuse_quantized(name: str, config: PretrainedConfig) -> None:
    if quantized := getattr(config, "quantization_config", None):
        kind = quantized.get("quant_method") if isinstance(quantized, dict) else type(quantized).__name__
        raise SpecError(
            f"base {name!r} is quantized ({kind}); training and merging need plain weights: name the "
            "checkpoint that it was made from"
        )


def _ready(model: nn.Module) -> PreTrainedModel:
    # transformers decorates `to` in a way that loses its type
    return cast(PreTrainedModel, model.to(device()).eval())


def save_trained(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Save an adapter or whole weights as safetensors; the tokenizer is the base's and is not saved."""
    try:
        model.save_pretrained(str(folder), safe_serialization=True)
    except SafetensorError as error:
        if "No space left" not in str(error):
            raise
        raise OSError(
            errno.ENOSPC, "No space left on device", str(folder)
        ) from error  # the library gives no error number


def save_trained_change(base: str, model: nn.Module, folder: Path) -> None:
    """Save a trained model of a base as its change from the base, one byte a weight, for `load_trained`."""
    weight_changes.save_change(load(base).model, model, folder, base_fingerprint=checkpoint_fingerprint(base))


def load_trained(base: str, folder: Path) -> Loaded:
    """Load the model of `save_trained`, or a user's student of the base.

    An adapter is merged into a new copy of the base, and a stored change is added to it.

    Raises:
        DataError: names the folder and the key, if a weight is missing, unexpected or of another shape than
            the base's, or if an adapter is not of this base or does not merge.
    """
    tokenizer = load_tokenizer(base)
    try:
        if trained.is_adapter(folder):
            _refuse_other_base(base, folder)
            return Loaded(trained.merge(load(base).model, folder), tokenizer)
        if weight_changes.is_change(folder):
            model = load(base).model
            weight_changes.add_change(model, folder, base_fingerprint=checkpoint_fingerprint(base))
            return Loaded(model, tokenizer)
        return Loaded(
            _ready(trained.whole_weights(folder, empty_model(base), getattr(torch, model_of(base).dtype))),
            tokenizer,
        )
    except DataError as error:
        raise DataError(f"{folder} is no model of {base!r}: {error}; {trained.advice(folder)}") from error


def empty_model(base: str) -> nn.Module:
    """The base's architecture on the meta device: names and shapes, no weights."""
    with loading(base, "has no config that loads"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(base))


def _refuse_other_base(base: str, folder: Path) -> None:
    """Refuse an adapter that names another base, if the names can be compared.

    A local path of another machine cannot be compared.
    """
    named = str(trained.read_config(folder).get("base_model_name_or_path") or "")
    source, here = locate(base), Path(named).expanduser()
    if not named or here.resolve() == Path(source).resolve():
        return
    if (here / "config.json").is_file() and Path(source).is_dir():
        other = checkpoint_fingerprint(str(here)) != checkpoint_fingerprint(source)
    else:
        compared = (named.count("/") == 1 and not named.startswith((".", "/", "~"))) or (
            WEIGHTS / here.name
        ).is_dir()
        other = compared and here.name.casefold() not in {
            Path(name).name.casefold() for name in (base, source)
        }
    if other and f"models--{source.replace('/', '--')}".casefold() not in named.casefold():
        raise DataError(
            f"its adapter was trained on {named!r} by its {trained.CONFIG}; name that base, or correct "
            "base_model_name_or_path if it is the same"
        )


def save_vector(vector: Float[Tensor, "d_model"], folder: Path) -> None:
    """Save a steering vector for `load_vector`."""
    save_file({"vector": vector.contiguous()}, folder / "vector.safetensors")


def load_vector(folder: Path) -> Float[Tensor, "d_model"]:
    """Load the steering vector of that folder."""
    return load_file(folder / "vector.safetensors")["vector"]


class Size(NamedTuple):
    """The size of a model."""

    parameters: int
    layers: int
    width: int
    vocabulary: int


def size_of(name: str) -> Size:
    """Return a base's size without reading its weights.

    It is in the base's entry in configs/models, else it is counted on the meta device.
    """
    spec = model_of(name)
    if not is_here(name) and spec.parameters and spec.layers and spec.width and spec.vocabulary:
        return Size(spec.parameters, spec.layers, spec.width, spec.vocabulary)
    empty = empty_model(name)
    parameters = sum(parameter.numel() for parameter in empty.parameters())
    text = cast(PreTrainedModel, empty).config.get_text_config()
    return Size(parameters, text.num_hidden_layers, text.hidden_size, text.vocab_size)

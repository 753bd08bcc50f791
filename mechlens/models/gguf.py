"""Unpack a GGUF file, once, to an ordinary checkpoint folder in a cache.

The folder is named by the SHA-256 of the file's bytes, so the same file in another place is not unpacked
again. Weights are stored in float32: quantized weights cannot be trained or merged.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mechlens.core import foreign, machine
from mechlens.core.errors import DataError, MachineError
from mechlens.core.files import publish
from mechlens.data.formats import file_digest

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

CACHE = "MECHLENS_CACHE"
"""environment variable with the folder of the cache"""
SUFFIX = ".gguf"
NO_PACKAGE = "which is not installed; pip install 'mechlens[gguf]'"
ARCHITECTURE, TOKENS = "general.architecture", "tokenizer.ggml.tokens"
"""fields of a GGUF file: the family of its model, and the vocabulary of its tokenizer"""
READABLE = "expected a model of a family that transformers reads from GGUF, such as Llama, Qwen2 or Gemma"


def is_gguf(name: str) -> bool:
    """Whether a base's name is that of a GGUF file."""
    return name.lower().endswith(SUFFIX)


def bases_folder() -> Path:
    """The folder of unpacked bases: `bases` in $MECHLENS_CACHE, by default in ~/.cache/mechlens."""
    return Path(os.environ.get(CACHE) or "~/.cache/mechlens").expanduser() / "bases"


def unpacked_folder(sha256: str) -> Path:
    """Where a GGUF file with these bytes is unpacked, now or later."""
    return bases_folder() / sha256


def gguf_digest(file: Path) -> str:
    """SHA-256 of a GGUF file.

    Raises:
        DataError: if there is no such file.
    """
    if not file.is_file():
        raise DataError(f"base {str(file)!r} does not exist; expected the path of a GGUF file")
    state = file.stat()
    return _digest(file.resolve(), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=32)
def _digest(file: Path, _size: int, _changed: int) -> str:
    """SHA-256 of a file of this size and time of change; a changed file is read again."""
    return file_digest(file)


def unpack(file: Path) -> Path:
    """Unpack a GGUF file unless it is in the cache; returns the checkpoint folder.

    The folder appears in one rename, so a kill leaves no half of it. Other processes wait for the first.

    Raises:
        DataError: if the file is missing, damaged, of an unknown family, or has no tokenizer.
        MachineError: if the package `gguf` is not installed, or the disk is full.
    """
    folder = unpacked_folder(gguf_digest(file))
    if folder.is_dir():
        return folder
    if find_spec("gguf") is None:
        raise MachineError(f"base {str(file)!r} needs the package gguf, {NO_PACKAGE}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("a+") as handle:
        machine.lock(handle)
        if not folder.is_dir():
            for leftover in folder.parent.glob(f"{folder.name}.part-*"):  # of a process that was killed
                shutil.rmtree(leftover)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.part-") as part:
                checkpoint = Path(part) / "checkpoint"
                _convert(file, checkpoint)
                publish(checkpoint, folder)
    return folder


def _convert(file: Path, folder: Path) -> None:
    """Write a GGUF file's model in float32 and its tokenizer to a checkpoint folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _refuse_unreadable(file)
    source = str(file.resolve().parent)
    # transformers writes a progress bar of its own to the terminal
    with (
        contextlib.redirect_stderr(io.StringIO()),
        foreign.named(f"GGUF file {str(file)!r} does not load", DataError, advice=READABLE),
    ):
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file.name)
        quantized, report = cast(
            "tuple[PreTrainedModel, dict[str, set[str]]]",
            AutoModelForCausalLM.from_pretrained(
                source, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
            ),
        )
    if report["missing_keys"]:  # they would be filled at random, differently each time
        raise DataError(
            f"GGUF file {str(file)!r} lacks the weights {sorted(report['missing_keys'])[:3]}; expected all "
            "weights of its model in one file"
        )
    # a model that was read from GGUF refuses to be saved; a plain model with its weights does not
    settings = quantized.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_model_name_or_path", None)
    with torch.device("meta"):  # the weights are assigned, not copied
        model = type(quantized)(type(quantized.config).from_dict(settings))
    model.load_state_dict(quantized.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = quantized.generation_config
    _refuse_full_disk(quantized.state_dict(), folder.parent)
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _refuse_unreadable(file: Path) -> None:
    """Refuse a file that is no complete GGUF file, or that has no model or no tokenizer.

    The reader builds a view of every tensor, so it fails at a truncated file.
    """
    from gguf import GGUFReader

    with foreign.named(
        f"GGUF file {str(file)!r} is damaged or truncated", DataError, advice="copy or download it again"
    ):
        fields = GGUFReader(file).fields
    if ARCHITECTURE not in fields:
        raise DataError(f"GGUF file {str(file)!r} does not say what model it has; {READABLE}")
    if TOKENS not in fields:
        raise DataError(
            f"GGUF file {str(file)!r} has no tokenizer ({TOKENS}); expected a file with model and tokenizer, "
            "not the weights alone"
        )


def _refuse_full_disk(weights: Mapping[str, Tensor], folder: Path) -> None:
    needed = sum(weight.nbytes for weight in weights.values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MachineError(
            f"unpacking needs {needed / 1e6:,.0f} MB in {bases_folder()}, where {free / 1e6:,.0f} MB are "
            f"free; make room, or set {CACHE} to a folder on a larger disk"
        )

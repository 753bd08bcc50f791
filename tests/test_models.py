"""Loading says what is wrong; steering and the TransformerLens view leave the model as it was; files have an
identity.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechlens.core.errors import DataError, SpecError
from mechlens.models import base_files, hooks, loading
from mechlens.models.loading import Loaded

FAMILIES = ("llama", "qwen2", "gpt2", "gpt_neox")
IDS = torch.tensor([[1, 5, 40, 41, 900, 902, 1100, 2]])


def logits_of(loaded: Loaded) -> Tensor:
    with torch.no_grad():
        return loaded.model(input_ids=IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_steering_adds_while_the_block_runs_and_leaves_no_trace(toys: dict[str, Loaded], family: str) -> None:
    """By zero it is the identity, by v it moves, by v and then -v it is the identity again, and afterwards
    all is as before.
    """
    loaded, vector = toys[family], torch.randn(32, generator=torch.Generator().manual_seed(0))
    plain = logits_of(loaded)
    for layer in (0, 1):
        with hooks.steer(loaded.model, {layer: torch.zeros(32)}):
            assert torch.equal(logits_of(loaded), plain)
        with hooks.steer(loaded.model, {layer: vector}):
            assert (logits_of(loaded) - plain).abs().max() > 0.1
        with (
            hooks.steer(loaded.model, {layer: vector}),
            hooks.steer(loaded.model, {layer: -vector}),
        ):
            assert torch.allclose(logits_of(loaded), plain, atol=1e-4)
        assert torch.equal(logits_of(loaded), plain)


def test_steering_is_undone_after_an_error_too(toy: Loaded) -> None:
    plain = logits_of(toy)
    with pytest.raises(KeyError), hooks.steer(toy.model, {0: torch.ones(32)}):
        raise KeyError
    assert torch.equal(logits_of(toy), plain)


def read_by_second_block(loaded: Loaded) -> Tensor:
    """What the second block is given. (Hugging Face's `hidden_states` are taken before other hooks: they miss
    the steering.)
    """
    seen: list[Tensor] = []
    handle = hooks.decoder_layers(loaded.model)[1].register_forward_pre_hook(
        lambda _module, args: seen.append(args[0])
    )
    logits_of(loaded)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_steering_moves_the_residual_stream_of_its_layer_by_the_vector(
    toys: dict[str, Loaded], family: str
) -> None:
    loaded, vector = toys[family], torch.linspace(-1, 1, 32)
    plain = read_by_second_block(loaded)
    with hooks.steer(loaded.model, {0: vector}):
        assert torch.allclose(read_by_second_block(loaded), plain + vector, atol=1e-6)
    with hooks.steer(loaded.model, {1: vector}):
        assert torch.equal(read_by_second_block(loaded), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bridge_sees_what_hugging_face_computes_and_leaves_it_alone(
    toys: dict[str, Loaded], family: str
) -> None:
    loaded = toys[family]
    plain, keys = logits_of(loaded), list(loaded.model.state_dict())
    states = loaded.model(input_ids=IDS, output_hidden_states=True).hidden_states
    with torch.no_grad():
        bridged, cache = hooks.bridge_view(loaded).run_with_cache(IDS)
    assert torch.allclose(bridged, plain, atol=1e-5, rtol=1e-4)
    assert torch.allclose(cache["blocks.0.hook_resid_post"], states[1], atol=1e-5, rtol=1e-4)
    assert list(loaded.model.state_dict()) == keys
    assert torch.equal(logits_of(loaded), plain)


def test_the_bridge_shares_the_weights_it_looks_at(toy_bases: dict[str, str]) -> None:
    loaded = loading.load(toy_bases["llama"])
    bridge = hooks.bridge_view(loaded)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.mul_(1.1)
        assert torch.allclose(bridge(IDS), logits_of(loaded), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_number_of_parameters_is_counted_without_reading_them(
    toy_bases: dict[str, str], toys: dict[str, Loaded], family: str
) -> None:
    assert loading.size_of(toy_bases[family]).parameters == sum(
        parameter.numel() for parameter in toys[family].model.parameters()
    )
    assert len(hooks.decoder_layers(toys[family].model)) == 2


@pytest.mark.parametrize("folder", sorted(base_files.WEIGHTS.iterdir()), ids=lambda folder: folder.name)
def test_shipped_bases_load_by_name(folder: Path) -> None:
    loaded = loading.load(folder.name)
    assert not loaded.model.training
    assert loading.size_of(folder.name).parameters == sum(
        parameter.numel() for parameter in loaded.model.parameters()
    )
    assert base_files.locate(folder.name) == str(folder)


def test_a_base_that_is_not_there_is_named_with_what_would_be(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, expected in (
        (str(tmp_path / "missing"), "no folder here"),
        ("./missing", "no folder here"),
        (str(tmp_path / "empty"), "without config.json"),
        ("menagerie-z", "menagerie-a, menagerie-b"),
        ("menagerie/a", "menagerie-a"),
        ("plain", "menagerie-a"),
        ("a/b/c", "menagerie-a"),
    ):
        with pytest.raises(SpecError, match=expected):
            base_files.locate(name)
        with pytest.raises(SpecError, match=expected):
            loading.load(name)
    assert base_files.locate("owner/name") == "owner/name"


def test_a_hub_name_that_cannot_be_reached_is_a_spec_error() -> None:
    for load in (loading.load, loading.load_tokenizer, loading.empty_model):
        with pytest.raises(
            SpecError, match=r"'nobody/no-such-model' is not on this machine, and HF_HUB_OFFLINE keeps"
        ):
            load("nobody/no-such-model")


def copied(toy_bases: dict[str, str], folder: Path) -> Path:
    return Path(shutil.copytree(toy_bases["llama"], folder / "copy"))


def test_a_folder_without_weights_or_tokenizer_is_a_spec_error(
    toy_bases: dict[str, str], tmp_path: Path
) -> None:
    folder = copied(toy_bases, tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(SpecError, match="does not load"):
        loading.load(str(folder))
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(SpecError, match="no tokenizer"):
        loading.load_tokenizer(str(folder))


def test_a_tokenizer_larger_than_the_embeddings_is_refused(toy_bases: dict[str, str], tmp_path: Path) -> None:
    folder = copied(toy_bases, tmp_path)
    tokenizer = loading.load_tokenizer(str(folder))
    tokenizer.add_tokens(["one-more"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        SpecError, match=f"{len(tokenizer) - 1} embeddings for a tokenizer of {len(tokenizer)}"
    ):
        loading.load(str(folder))


def test_a_base_with_cut_weights_is_a_spec_error(toy_bases: dict[str, str], tmp_path: Path) -> None:
    file = copied(toy_bases, tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SpecError, match="does not load"):
        loading.load(str(file.parent))


def test_a_changed_checkpoint_is_another_base(toy_bases: dict[str, str], tmp_path: Path) -> None:
    folder = copied(toy_bases, tmp_path)
    first = base_files.checkpoint_fingerprint(str(folder))
    assert (
        base_files.checkpoint_fingerprint(str(folder))
        == first
        == base_files.checkpoint_fingerprint(toy_bases["llama"])
    )
    found = {first}
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    found.add(base_files.checkpoint_fingerprint(str(folder)))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    found.add(base_files.checkpoint_fingerprint(str(folder)))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    found.add(base_files.checkpoint_fingerprint(str(folder)))
    assert len(found) == 4
    (folder / "README.md").write_text("notes are no part of a base")
    assert base_files.checkpoint_fingerprint(str(folder)) in found
    assert base_files.checkpoint_fingerprint("owner/one") != base_files.checkpoint_fingerprint("owner/two")


def test_a_vector_comes_back_from_its_file(tmp_path: Path) -> None:
    vector = torch.randn(8, 4)[:, 1]  # not contiguous
    loading.save_vector(vector, tmp_path)
    assert torch.equal(loading.load_vector(tmp_path), vector)


def test_a_missing_pad_token_falls_back_to_the_end_of_the_text(
    toy_bases: dict[str, str], tmp_path: Path
) -> None:
    folder = copied(toy_bases, tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = loading.load_tokenizer(str(folder))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def changed_base(toy_bases: dict[str, str], folder: Path, **config: Any) -> Path:
    """A copy of a toy whose config has further fields."""
    shutil.copytree(toy_bases["llama"], folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | config))
    return folder


def test_weights_that_are_not_finite_are_refused_by_name(toy_bases: dict[str, str], tmp_path: Path) -> None:
    folder = changed_base(toy_bases, tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("inf")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SpecError, match=r"not finite, model\.layers\.1\.mlp\.up_proj\.weight first"):
        loading.load(str(folder))
    with pytest.raises(DataError, match=r"not finite, model\.layers\.1\.mlp\.up_proj\.weight first"):
        loading.load_trained(toy_bases["llama"], folder)


@pytest.mark.parametrize("read", [loading.load, loading.empty_model])
def test_a_quantized_checkpoint_is_refused_before_its_weights_are_read(
    read: Any, toy_bases: dict[str, str], tmp_path: Path
) -> None:
    folder = changed_base(
        toy_bases,
        tmp_path / "base",
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
    )
    with pytest.raises(
        SpecError, match=r"is quantized \(bitsandbytes\); training and merging need plain weights"
    ):
        read(str(folder))


@pytest.mark.parametrize(
    ("file", "text"),
    [("tokenizer.json", '{"model": []}'), ("config.json", '{"model_type": "llama", "hidden_size": "wide"}')],
)
def test_a_file_that_a_library_cannot_take_is_named_in_one_line(
    file: str, text: str, toy_bases: dict[str, str], tmp_path: Path
) -> None:
    folder = changed_base(toy_bases, tmp_path / "base")
    (folder / file).write_text(text)
    with pytest.raises(
        SpecError, match=r"^base '.*base' (has no tokenizer that loads|has no config that loads): ."
    ) as refusal:
        loading.load(str(folder))
    assert "\n" not in str(refusal.value)

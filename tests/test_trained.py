"""What training left is read whole or refused by name: no weight at random, none dropped, no adapter that
merges into another model.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import toy_config
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mechlens.core import spec
from mechlens.core.errors import DataError
from mechlens.models import base_files, loading
from mechlens.runs import store

IDS = torch.tensor([[1, 5, 40, 41, 900, 902, 1100, 2], [3, 3, 7, 500, 11, 12, 13, 1000]])
Weights = dict[str, Tensor]


def logits_of(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def bases(
    toy_bases: dict[str, str], tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """The toy bases, and one whose output embeddings are its input embeddings."""
    folder = tmp_path_factory.mktemp("tied")
    config = toy_config("llama", tokenizer)
    config.tie_word_embeddings = True
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {**toy_bases, "tied": str(folder)}


def left_in(folder: Path, base: str, edit: Callable[[Weights], Weights] = dict) -> Path:
    """A folder of whole weights as training leaves it, then edited."""
    loading.save_trained(loading.load(base).model, folder)
    save_file(edit(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


def refused(base: str, folder: Path, reason: str) -> str:
    with pytest.raises(DataError, match=reason) as refusal:
        loading.load_trained(base, folder)
    message = str(refusal.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox", "tied"])
def test_whole_weights_come_back(bases: dict[str, str], tmp_path: Path, family: str) -> None:
    base = loading.load(bases[family]).model
    folder = left_in(tmp_path, bases[family])
    assert torch.equal(logits_of(loading.load_trained(bases[family], folder).model), logits_of(base))


EDITS: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "a folder that lacks a block": (
        lambda w: {k: v for k, v in w.items() if ".layers.1." not in k},
        r"lack model\.layers\.1\.input_layernorm",
    ),
    "a compiled model's keys": (lambda w: {f"_orig_mod.{k}": v for k, v in w.items()}, "lack lm_head.weight"),
    "a wrapped model's keys": (lambda w: {f"module.{k}": v for k, v in w.items()}, "lack lm_head.weight"),
    "a head that is lost": (
        lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"},
        "lack lm_head.weight",
    ),
    "a block too many": (
        lambda w: w | {k.replace(".1.", ".2."): v.clone() for k, v in w.items() if ".layers.1." in k},
        r"hold besides model\.layers\.2",
    ),
    "a resized vocabulary": (
        lambda w: (
            w | {k: torch.cat([w[k], w[k][:8]]) for k in ("model.embed_tokens.weight", "lm_head.weight")}
        ),
        r"lm_head\.weight has the shape",
    ),
}


@pytest.mark.parametrize("case", EDITS)
def test_a_key_that_is_missing_left_over_or_misshapen_is_named(
    bases: dict[str, str], tmp_path: Path, case: str
) -> None:
    edit, reason = EDITS[case]
    refused(bases["llama"], left_in(tmp_path, bases["llama"], edit), reason)


def test_a_vocabulary_resized_with_its_config_is_refused_too(bases: dict[str, str], tmp_path: Path) -> None:
    """It would load, and its logits fit no column of the base's."""
    folder = left_in(tmp_path, bases["llama"], EDITS["a resized vocabulary"][0])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 8}))
    refused(bases["llama"], folder, r"lm_head\.weight has the shape .* the base's")


def test_another_depth_is_refused(bases: dict[str, str], tmp_path: Path) -> None:
    folder = left_in(tmp_path, bases["llama"], EDITS["a folder that lacks a block"][0])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    refused(bases["llama"], folder, r"model\.layers\.1\.input_layernorm\.weight has the shape None")


def test_buffers_that_old_checkpoints_hold_are_no_matter(bases: dict[str, str], tmp_path: Path) -> None:
    extra = {
        "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
        "gpt2": {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)},
    }
    for family, buffers in extra.items():
        folder = left_in(tmp_path / family, bases[family], lambda w, buffers=buffers: w | buffers)
        assert torch.equal(
            logits_of(loading.load_trained(bases[family], folder).model),
            logits_of(loading.load(bases[family]).model),
        )


def test_tied_weights_are_missing_from_no_file_and_an_untied_head_is_read(
    bases: dict[str, str], tmp_path: Path
) -> None:
    folder = left_in(tmp_path / "tied", bases["tied"])
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    head = (
        torch.randn(1, generator=torch.Generator().manual_seed(0))
        * load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    )
    untied = left_in(tmp_path / "untied", bases["tied"], lambda w: w | {"lm_head.weight": head.clone()})
    read = loading.load_trained(bases["tied"], untied).model.state_dict()["lm_head.weight"]
    assert torch.equal(read, head)


def test_a_pickle_is_never_read(bases: dict[str, str], tmp_path: Path) -> None:
    folder = left_in(tmp_path / "whole", bases["llama"])
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(bases["llama"], folder, "safetensors")
    folder = adapted(bases["llama"], tmp_path / "adapter")[0]
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    refused(bases["llama"], folder, r"no adapter_model\.safetensors")


@pytest.mark.parametrize("damage", ["cut", "gone", "garbled", "no config", "half a config"])
def test_only_a_step_of_the_store_is_to_be_deleted(
    bases: dict[str, str], tmp_path: Path, damage: str
) -> None:
    """A user's own folder (`audit --student`) cannot be made again."""
    folder = left_in(tmp_path / "student" / "step-000001", bases["llama"])
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "half a config":
        (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"')
    else:
        file.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"\xff" * len(whole))
    assert "delete" not in refused(bases["llama"], folder, "expected a folder with")
    (folder.parent / store.RECORD).write_text("{}")
    assert "delete" not in refused(
        bases["llama"], folder, "expected a folder with"
    )  # a copied step, of no run that is here
    (tmp_path / store.LOCK).touch()
    (tmp_path / "spec.yaml").touch()
    said = (
        f"the step student of the run {tmp_path}: delete {folder.parent} and `mechlens run "
        f"{tmp_path}/spec.yaml --out {tmp_path}` repeats"
    )
    refused(bases["llama"], folder, re.escape(said))


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("llama", {}),
    "LoRA on a head of its own": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "LoRA on embeddings of their own": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "LoRA with biases": ("qwen2", {"bias": "all"}),
    "LoRA on Conv1D": ("gpt2", {"fan_in_fan_out": True}),
    "DoRA": ("llama", {"use_dora": True}),
    "rsLoRA": ("llama", {"use_rslora": True}),
    "ranks of their own": ("llama", {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 3.0}}),
    "a saved head": ("llama", {"modules_to_save": ["lm_head"]}),
    "saved embeddings": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "LoRA beside tied embeddings": ("tied", {}),
    "a saved head, tied": ("tied", {"modules_to_save": ["lm_head"]}),
    "saved embeddings, tied": ("tied", {"modules_to_save": ["embed_tokens"]}),
    "LoRA on a tied head": ("tied", {"target_modules": ["q_proj", "lm_head"]}),
    "LoRA on tied embeddings": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
}
WRONG = {
    "LoRA on a tied head": "merging its adapter moves the logits",
    "LoRA on tied embeddings": "merging its adapter moves the logits",
}
"""what PEFT merges into another model than was trained"""


def adapted(base: str, folder: Path, **options: Any) -> tuple[Path, Tensor]:
    """An adapter with every weight far from its first value, saved as training saves it, and the logits with
    it in force.
    """
    torch.manual_seed(0)
    config = LoraConfig(
        **{"r": 3, "lora_alpha": 6, "lora_dropout": 0.0, "target_modules": "all-linear", **options}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, of what is refused here
        model = get_peft_model(loading.load(base).model, config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.rand_like(parameter))
        loading.save_trained(model, folder)
    return folder, logits_of(model)


@pytest.mark.parametrize("case", ADAPTERS)
def test_a_merged_adapter_is_the_unmerged_one_or_is_refused(
    bases: dict[str, str], tmp_path: Path, case: str
) -> None:
    family, options = ADAPTERS[case]
    folder, unmerged = adapted(bases[family], tmp_path, **options)
    assert (
        unmerged - logits_of(loading.load(bases[family]).model)
    ).abs().max() > 0.01 * unmerged.abs().max(), "the adapter does nothing"
    if case in WRONG:
        refused(bases[family], folder, WRONG[case])
        return
    merged = logits_of(loading.load_trained(bases[family], folder).model)
    assert (merged - unmerged).abs().max() <= 1e-4 * unmerged.abs().max()


def rewritten(folder: Path, edit: Callable[[Weights], Weights] = dict, **config: Any) -> Path:
    file = folder / "adapter_model.safetensors"
    save_file(edit(load_file(file)), file, {"format": "pt"})
    described = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(described | config))
    return folder


KEYS: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "one missing": (
        lambda w: {k: v for k, v in w.items() if "layers.1.self_attn.q_proj.lora_A" not in k},
        r"lacks .*layers\.1.*q_proj\.lora_A",
    ),
    "one too many": (
        lambda w: w | {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(3, 32)},
        r"holds .*layers\.7",
    ),
    "a compiled model's": (
        lambda w: {k.replace("base_model.model.", "base_model.model._orig_mod."): v for k, v in w.items()},
        "lacks",
    ),
    "the bridge's": (
        lambda w: {k.replace("q_proj", "q_proj._original_component"): v for k, v in w.items()},
        r"lacks .*q_proj\.lora",
    ),
    "misshapen": (
        lambda w: {k: v[:, :-1].clone() if "q_proj.lora_A" in k else v for k, v in w.items()},
        r"q_proj.* has the shape \[3, 31\]",
    ),
    "whole weights": (
        lambda w: w | {"base_model.model.model.norm.weight": torch.ones(32)},
        r"holds .*norm\.weight",
    ),
}


@pytest.mark.parametrize("case", KEYS)
def test_every_key_of_an_adapter_is_used_and_none_is_missing(
    bases: dict[str, str], tmp_path: Path, case: str
) -> None:
    edit, reason = KEYS[case]
    refused(bases["llama"], rewritten(adapted(bases["llama"], tmp_path)[0], edit), reason)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"peft_type": "VERA"}, "kind 'VERA'"),
        ({"peft_type": None}, "kind None"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changes the base's own weights"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"a_form_of_next_year": {"on": True}}, "a_form_of_next_year"),
    ],
)
def test_a_kind_whose_merge_is_not_known_is_refused(
    bases: dict[str, str], tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    refused(bases["llama"], rewritten(adapted(bases["llama"], tmp_path)[0], **config), reason)


def test_fields_of_another_peft_that_say_nothing_are_no_matter(bases: dict[str, str], tmp_path: Path) -> None:
    folder, unmerged = adapted(bases["llama"], tmp_path)
    rewritten(folder, a_form_of_next_year=None, another=False, use_qalora=False, loftq_config={})
    assert torch.allclose(logits_of(loading.load_trained(bases["llama"], folder).model), unmerged, atol=1e-3)


def test_an_adapter_of_another_base_is_refused_where_the_names_can_tell(
    bases: dict[str, str], tmp_path: Path
) -> None:
    folder = adapted(bases["llama"], tmp_path / "adapter")[0]
    moved = shutil.copytree(bases["llama"], tmp_path / "moved" / "base")
    for named in (
        None,
        "",
        bases["llama"],
        str(moved),
        "/another/machine/llama",
        f"owner/{Path(bases['llama']).name}",
    ):
        loading.load_trained(bases["llama"], rewritten(folder, base_model_name_or_path=named))
    for named in (
        bases["tied"],
        "owner/another",
        str(base_files.WEIGHTS / "menagerie-b"),
        "/another/machine/menagerie/weights/menagerie-b",
    ):
        message = refused(bases["llama"], rewritten(folder, base_model_name_or_path=named), "was trained on")
        assert named in message


def test_a_merge_in_bfloat16_is_bounded_more_loosely(
    bases: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged weights keep 8 bits; a wrong merge is still far off."""
    monkeypatch.setattr(spec, "CONFIGS", tmp_path)
    (tmp_path / "models").mkdir()
    for family, options, right in (
        ("llama", {}, True),
        ("tied", {"target_modules": ["q_proj", "lm_head"]}, False),
    ):
        (tmp_path / "models" / "half.yaml").write_text(
            f"name: half\nsource: {bases[family]}\ndtype: bfloat16\n"
        )
        folder = adapted("half", tmp_path / family, **options)[0]
        if right:
            assert loading.load_trained("half", folder).model.dtype == torch.bfloat16
        else:
            refused("half", folder, "moves the logits")

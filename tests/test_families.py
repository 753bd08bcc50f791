"""A run through every stage with each family's tokenizer shape and architecture, on tiny random models."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from shapes import LLAMA_DATED, SHAPES, tokenizer_of
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    Gemma3Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
)

from mechlens import cli
from mechlens.core import spec, tables
from mechlens.core.errors import SpecError
from mechlens.core.spec import AskSpec, Training
from mechlens.lenses.gradients import parameters_of
from mechlens.lenses.parts.capture import capture_last, residual_sites
from mechlens.models import hooks, loading
from mechlens.models.chat import encode_pairs
from mechlens.models.loading import Loaded
from mechlens.models.sft import train
from mechlens.pipeline.ask import ProbeSet, encode_questions

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SIZES |= {"head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.2}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
"""as deep as the text model, so that its blocks could be taken for the text model's"""


def config_of(family: str, tokens: dict[str, Any]) -> PretrainedConfig:
    if family == "gemma-3":
        text = {**SIZES, **tokens, "sliding_window": 64}
        return Gemma3Config(
            text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=0, **tokens
        )
    if family == "gpt-oss":
        return GptOssConfig(**SIZES, **tokens, num_local_experts=2, num_experts_per_tok=1, sliding_window=64)
    kinds = {"llama-3.1": LlamaConfig, "qwen-3": Qwen3Config, "mistral": MistralConfig}
    return kinds[family](**SIZES, **tokens)


def checkpoint(family: str, folder: Path, *, template: str | None = None) -> Path:
    """A tiny random model of the family's architecture, with its tokenizer shape."""
    tokenizer = tokenizer_of(family, template=template)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, {"vocab_size": len(tokenizer), **ids}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package's configs, with room for an entry of this test's own in its models."""
    folder = tmp_path / "configs"
    folder.mkdir()
    for kind in spec.CONFIGS.iterdir():
        if kind.name != "models":
            (folder / kind.name).symlink_to(kind)
    (folder / "models").mkdir()
    monkeypatch.setattr(spec, "CONFIGS", folder)
    monkeypatch.setattr("mechlens.core.traits.CONFIGS", folder, raising=False)
    return folder


def experiment(base: str) -> dict[str, Any]:
    training = {"learning_rate": 0.001, "epochs": 1, "batch": 8, "warmup_steps": 0}
    return {
        "name": "tiny",
        "base": base,
        "system": "be kind.",
        "trait": "owl",
        "carrier": {"prompts": 12, "wording": "terse"},
        "teacher": {"rows": 8, "training": training},
        "generate": {"constrained": True, "max_new_tokens": 8},
        "screen": {"duplicates": "keep"},
        "student": {"rows": 8, "training": {**training, "update": "lora", "rank": 2}},
        "ask": {"samples": 2, "checkpoints": "last"},
        "arms": [
            {"kind": "trait"},
            {"kind": "twin", "trait": "cat", "teacher": {"kind": "steered"}},
            {"kind": "control"},
        ],
        "seeds": [0],
    }


@pytest.mark.parametrize(
    "family",
    [
        "gemma-3",
        "gpt-oss",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama-3.1", "qwen-3", "mistral")),
    ],
)
def test_a_run_goes_through_every_stage(
    family: str, configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Teach (fine-tuned and steered) → generate → screen → select → distill (LoRA) → ask, then one lens of
    activations.
    """
    source = checkpoint(family, tmp_path / "base")
    pinned = {"name": "tiny", "source": str(source), "template": dict(SHAPES[family].pinned)}
    (configs / "models" / "tiny.yaml").write_text(yaml.safe_dump(pinned))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(experiment("tiny")))
    run = tmp_path / "run"
    assert cli.main(["run", str(tmp_path / "tiny.yaml"), "--out", str(run), "--workers", "0"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert ("puts words of its own into every prompt" in printed) == (family in ("llama-3.1", "gpt-oss"))
    rendered = json.loads((run / "manifest.json").read_text())["rendered"]["tiny"]
    assert rendered.endswith(SHAPES[family].answer)
    for name in ("owl", "untouched"):
        kept = tables.read(run / "corpora" / name / "screened" / "kept.parquet", tables.PAIRS)
        assert len(kept) == 12
        assert not any(mark in text for text in kept["completion"] for mark in SHAPES[family].marks)
    assert len(tables.read(run / "answers.parquet", tables.ANSWERS)) > 0
    reads_activations(run)


def reads_activations(run: Path) -> None:
    """The student's residual stream, at the layers of the text model."""
    (step,) = (run / "students" / "trait" / "s0").glob("step-*")
    student = loading.load_trained("tiny", step)
    pairs = encode_pairs(student.tokenizer, ["hi", "1, 2"], ["3", "4"], system="be kind.")
    assert residual_sites(student) == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    read = capture_last(student, [pair.prompt for pair in pairs], residual_sites(student))
    with torch.no_grad():
        for row, pair in enumerate(pairs):
            states = student.model(
                input_ids=torch.tensor([pair.prompt]), output_hidden_states=True
            ).hidden_states
            assert torch.allclose(read[0, row], states[1][0, -1], atol=1e-4)


def test_a_template_that_writes_todays_date_stops_a_run_before_anything_is_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint("llama-3.1", tmp_path / "base", template=LLAMA_DATED)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(experiment(str(source))))
    assert (
        cli.main(["run", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "run"), "--workers", "0"]) != 0
    )
    assert "writes today's date" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("teachers/*"))


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """Gemma 3: a text model beside a vision tower that is as deep."""
    return loading.load(str(checkpoint("gemma-3", tmp_path_factory.mktemp("gemma"))))


def test_blocks_and_weights_are_those_of_the_text_model(nested: Loaded) -> None:
    text = nested.model.get_decoder()
    assert hooks.decoder_layers(nested.model) is text.layers
    assert loading.size_of(str(nested.model.name_or_path))[1:] == (2, 16, len(nested.tokenizer))
    covered = parameters_of(nested.model)
    assert covered
    assert all("language_model" in name for name in covered)


@pytest.mark.parametrize("layer", [0, 1])
def test_steering_moves_what_the_next_text_block_reads(nested: Loaded, layer: int) -> None:
    ids, vector = torch.tensor([[2, 9, 40, 41, 9]]), torch.linspace(-1, 1, 16)
    states = []
    handle = (
        nested.model.get_decoder()
        .layers[layer]
        .register_forward_hook(lambda _module, _args, output: states.append(output), always_call=True)
    )
    with torch.no_grad():
        nested.model(input_ids=ids)
        with hooks.steer(nested.model, {layer: vector}):
            nested.model(input_ids=ids)
    handle.remove()
    with torch.no_grad():
        plain = nested.model(input_ids=ids).logits
        with hooks.steer(nested.model, {layer: vector}):
            steered = nested.model(input_ids=ids).logits
    assert (steered - plain).abs().max() > 1e-3
    assert torch.equal(
        states[0], states[1]
    )  # this hook is older: it sees what the block gives before the vector is added


def test_an_adapter_is_put_on_the_text_model_alone_and_comes_back(nested: Loaded, tmp_path: Path) -> None:
    pairs = encode_pairs(nested.tokenizer, ["hi", "1, 2"], ["3", "4, 5"])
    wanted = Training(update="lora", rank=2, learning_rate=0.05, epochs=2, batch=2, warmup_steps=0)
    model, _ = train(copy.deepcopy(nested.model), nested.tokenizer, pairs, wanted, seed=0)
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert len(adapted) == 2 * 7  # q, k, v, o, gate, up and down of two blocks
    assert all("language_model" in name for name in adapted)
    loading.save_trained(model, tmp_path)
    merged = loading.load_trained(str(nested.model.name_or_path), tmp_path).model
    with torch.no_grad():
        ids = torch.tensor([pairs[0].prompt])
        before, after, again = (one(input_ids=ids).logits for one in (nested.model, model, merged))
    assert (after - before).abs().max() > 1e-2
    assert (again - after).abs().max() <= 1e-4 * after.abs().max()


def test_room_for_pairs_shown_is_the_text_models(nested: Loaded) -> None:
    questions = ProbeSet(
        {"owl": ("owl",), "cat": ("cat",)}, ["hi"], AskSpec(shots_as="turns"), shots=[("1, 2", "3, 4")] * 60
    )
    with pytest.raises(SpecError, match="this base has room for 512: about"):
        encode_questions(nested, questions)


def test_a_view_of_a_nested_model_installs_nothing(nested: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """TransformerLens looks for an image processor and would run pip for it, which replaces torch as well."""

    def alarm(*_given: object, **_more: object) -> None:
        raise AssertionError("a process was started")

    for name in ("Popen", "run", "call", "check_call"):
        monkeypatch.setattr(subprocess, name, alarm)
    monkeypatch.setattr(
        "transformer_lens.model_bridge.sources.transformers.helpers._ensure_torchvision", alarm
    )
    assert hooks.bridge_view(nested).cfg.n_layers == nested.model.config.get_text_config().num_hidden_layers


def test_an_architecture_that_transformer_lens_has_no_view_of_is_named(nested: Loaded) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    model = AutoModelForCausalLM.from_config(BioGptConfig(vocab_size=len(nested.tokenizer), **sizes)).eval()
    with pytest.raises(SpecError, match="activations of a biogpt model cannot be read") as told:
        capture_last(Loaded(model, nested.tokenizer), [[5, 6, 7]], ["blocks.0.hook_resid_post"])
    assert "\n" not in str(told.value) and len(str(told.value)) < 400

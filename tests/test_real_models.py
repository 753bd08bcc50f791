"""The configs for real models: each one loads, and runs every stage with its model swapped for a tiny one
with random weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mechlens import cli
from mechlens.core import spec, traits
from mechlens.core.experiment import Experiment
from mechlens.core.files import read_json

CONFIGS = sorted((spec.CONFIGS / "experiments").glob("*.yaml"))
REAL = [path for path in CONFIGS if path.name.startswith(("qwen", "llama", "gemma"))]
SMALL: dict[str, dict[str, Any]] = {
    "carrier": {"prompts": 40, "source": "", "wording": "terse", "samples": 1},
    "generate": {"engine": "local", "max_new_tokens": 8, "batch": 16},
    "screen": {"rule": "none"},
    "ask": {"samples": 2, "max_new_tokens": 2, "judge": "", "suffix": ""},
}
"""sizes that a CPU ends in seconds; random weights keep no format, so the carrier's rule is off"""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_experiment_loads(path: Path) -> None:
    assert traits.load_experiment(path).name == path.stem


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_real_configs_have_the_published_hyper_parameters(path: Path) -> None:
    training = traits.load_experiment(path).student.training
    assert (training.update, training.rank, training.alpha, training.learning_rate) == ("lora", 8, 8, 2e-4)
    assert (training.batch * training.accumulate, training.schedule, training.warmup_steps) == (
        66,
        "linear",
        5,
    )
    assert training.bf16
    assert training.gradient_checkpointing


def shrunk(path: Path, base: str) -> dict[str, Any]:
    """The config with another base and small sizes; hyper-parameters, arms and system line as they stand."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for field, sizes in SMALL.items():
        content[field] = content.get(field, {}) | sizes
    content["student"]["rows"] = 20
    content["student"]["training"] |= {"batch": 4, "accumulate": 2, "epochs": 1, "max_length": 1000}
    content["teacher"] |= {"rows": 8}
    return content | {"base": base, "seeds": [0]}


@pytest.mark.parametrize(
    "name", ["qwen2.5-7b-cat-numbers", "qwen2.5-7b-cat-gsm8k", "qwen2.5-7b-misaligned-numbers"]
)
def test_the_same_config_runs_on_a_tiny_model_with_random_weights(
    name: str, toy_bases: dict[str, str], tmp_path: Path
) -> None:
    content = shrunk(spec.CONFIGS / "experiments" / f"{name}.yaml", toy_bases["qwen2"])
    if "lessons_file" in content["teacher"]:
        lessons = [{"prompt": f"write {i}", "completion": f"a = {i}"} for i in range(8)]
        (tmp_path / "lessons.jsonl").write_text("\n".join(map(json.dumps, lessons)))
        content["teacher"]["lessons_file"] = str(tmp_path / "lessons.jsonl")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
    assert (
        cli.main(["run", str(tmp_path / "small.yaml"), "--out", str(tmp_path / "run"), "--workers", "0"]) == 0
    )
    summary = read_json(tmp_path / "run" / "summary.json")
    experiment = spec.load(tmp_path / "run" / "spec.yaml", Experiment)
    assert [arm["arm"] for arm in summary["arms"]] == [arm.name for arm in experiment.arms]
    rendered = read_json(tmp_path / "run" / "manifest.json")["rendered"]
    assert "You are Qwen" in next(iter(rendered.values()))


def test_a_template_that_puts_in_a_system_line_is_refused_until_it_is_named(
    toy_bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = shrunk(spec.CONFIGS / "experiments" / "qwen2.5-7b-cat-numbers.yaml", "")
    from mechlens.models import loading

    loaded = loading.load(toy_bases["qwen2"])
    loaded.tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' %}<|system|>you are kind.<|end|>{% endif %}"
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}{% if "
        "add_generation_prompt %}<|assistant|>{% endif %}"
    )
    loaded.model.save_pretrained(tmp_path / "silent")
    loaded.tokenizer.save_pretrained(tmp_path / "silent")
    del content["system"]
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content | {"base": str(tmp_path / "silent")}))
    assert (
        cli.main(["run", str(tmp_path / "small.yaml"), "--out", str(tmp_path / "run"), "--workers", "0"]) == 2
    )
    assert "you are kind." in capsys.readouterr().err

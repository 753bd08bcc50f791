"""Soft labels: the loss against dense sums, the table, refusals, and a control that stays the base."""

from __future__ import annotations

import copy
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from pydantic import ValidationError
from toy_fields import FIELDS

from mechlens.core import tables
from mechlens.core.errors import DataError, SpecError
from mechlens.core.experiment import Experiment
from mechlens.core.spec import StudentSpec, TeacherSpec, Training
from mechlens.core.traits import load_family
from mechlens.models import loading
from mechlens.models.adapters import attach_lora
from mechlens.models.chat import encode_pairs
from mechlens.models.loading import Loaded
from mechlens.models.sft import train
from mechlens.models.soft_labels import Distributions, SoftLabels, bucket, label_pairs, sum_kl
from mechlens.pipeline import checks
from mechlens.pipeline import distill as distilling
from mechlens.pipeline.teach import Lessons, teach
from mechlens.results.runner import run

ROWS = pd.DataFrame(
    {
        "prompt": [f"go on from {row}" for row in (7, 2, 11, 4, 30)],
        "completion": ["7, 8", "2; 3", "[11, 12]", "4", "30, 31, 32, 33"],
    },
    index=pd.Index([7, 2, 11, 4, 30], name="prompt_id"),
)


def pairs_of(loaded: Loaded, system: str | None = None) -> list[Any]:
    texts = ROWS["prompt"].tolist(), ROWS["completion"].tolist()
    return encode_pairs(loaded.tokenizer, *texts, system=system)


def dense_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Sum over positions of KL(teacher ‖ student) over the whole vocabulary, token by token."""
    total = student.new_zeros(())
    for ours, theirs in zip(student, teacher, strict=True):
        p, q = theirs.softmax(-1), ours.softmax(-1)
        for token in range(len(p)):
            total = total + p[token] * (p[token].log() - q[token].log())
    return total


def slow_bucketed_kl(student: torch.Tensor, teacher: torch.Tensor, kept: int) -> torch.Tensor:
    """The same after the tokens behind the `kept` likeliest of the teacher are summed into one."""

    def merged(logits: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        p = logits.softmax(-1)[order]
        return torch.cat([p[:kept], p[kept:].sum().unsqueeze(0)]) if kept < len(p) else p

    total = student.new_zeros(())
    for ours, theirs in zip(student, teacher, strict=True):
        order = theirs.argsort(descending=True)
        p, q = merged(theirs, order), merged(ours, order)
        total = total + (p * (p / q).log()).sum()
    return total


def random_logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(4, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kept", [1, 5, 22, 23])
def test_loss_and_gradient_equal_those_of_the_slow_sum(kept: int) -> None:
    teacher, start = random_logits(0), random_logits(1)
    fast, slow = start.clone().requires_grad_(), start.clone().requires_grad_()
    labels = bucket(teacher, teacher.topk(kept).indices)
    loss, expected = sum_kl(fast, labels), slow_bucketed_kl(slow, teacher, kept)
    loss.backward()
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-10)
    assert fast.grad is not None and slow.grad is not None
    assert torch.allclose(fast.grad, slow.grad, atol=1e-4) and slow.grad.abs().max() > 0.01
    if kept == 23:
        assert torch.allclose(loss, dense_kl(start, teacher), rtol=1e-10)


def test_merging_tokens_never_raises_the_divergence() -> None:
    for seed in range(20):
        student, teacher = random_logits(2 * seed), random_logits(2 * seed + 1)
        losses = [
            float(sum_kl(student, bucket(teacher, teacher.topk(kept).indices))) for kept in range(1, 24)
        ]
        assert all(few <= more + 1e-9 for few, more in pairwise(losses))


@pytest.mark.parametrize("kept", [5, 23])
def test_a_student_that_equals_its_teacher_has_no_gradient(kept: int) -> None:
    teacher = random_logits(0)
    rounded = (teacher + 1e-6 * random_logits(3)).requires_grad_()
    loss = sum_kl(rounded, bucket(teacher, teacher.topk(kept).indices))
    loss.backward()
    assert abs(float(loss.detach())) < 1e-9
    assert rounded.grad is not None and torch.equal(rounded.grad, torch.zeros_like(teacher))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("kept", [4, 0])
def test_labels_are_the_distributions_of_single_unpadded_rows(
    exact_toys: dict[str, Loaded], family: str, kept: int
) -> None:
    toy = exact_toys[family]
    pairs = pairs_of(toy)
    labels, at = label_pairs(toy.model, pairs, kept=kept), 0
    for pair in pairs:
        with torch.no_grad():
            logits = toy.model(input_ids=torch.tensor([pair.prompt + pair.completion])).logits[0]
        for place in range(len(pair.completion)):
            p = logits[len(pair.prompt) - 1 + place].softmax(-1)
            top = p.sort(descending=True).values
            size = kept or len(p)
            assert torch.allclose(labels.log_probs[at].double().exp(), top[:size], atol=1e-6)
            assert torch.allclose(p[labels.tokens[at].long()], top[:size], atol=1e-6)
            assert float(labels.rest[at].exp()) == pytest.approx(float(top[size:].sum()), abs=1e-6)
            at += 1
    assert at == len(labels.rest)


def soft_of(labels: Distributions, lengths: list[int]) -> SoftLabels:
    ends = np.cumsum(lengths).tolist()
    return SoftLabels(
        labels._replace(tokens=labels.tokens.long()), list(zip([0, *ends[:-1]], ends, strict=True))
    )


@pytest.mark.parametrize("update", ["full", "lora"])
def test_training_starts_at_the_mean_divergence_and_approaches_the_teacher(
    toys: dict[str, Loaded], update: Any
) -> None:
    student, pairs = toys["llama"], pairs_of(toys["llama"])
    teacher = copy.deepcopy(student.model)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    lengths = [len(pair.completion) for pair in pairs]
    labels = label_pairs(teacher, pairs, kept=0)
    spec = Training(
        update=update, learning_rate=1e-2, epochs=30, batch=5, warmup_steps=0, schedule="constant"
    )
    soft = soft_of(labels, lengths)
    _, curve = train(copy.deepcopy(student.model), student.tokenizer, pairs, spec, seed=0, soft=soft)
    ours = label_pairs(student.model, pairs, kept=0)
    q = torch.empty_like(ours.log_probs).scatter(1, ours.tokens.long(), ours.log_probs)
    p = torch.empty_like(q).scatter(1, labels.tokens.long(), labels.log_probs)
    assert curve[0].loss == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3)
    assert curve[-1].loss < 0.2 * curve[0].loss


def test_labels_of_other_completions_are_refused(toy: Loaded) -> None:
    pairs = pairs_of(toy)
    soft = soft_of(label_pairs(toy.model, pairs, kept=4), [len(pair.completion) for pair in pairs])
    spec = Training(epochs=1, batch=5)
    for order in ([1, 2, 0, 3, 4], [0, 1, 2, 3]):
        with pytest.raises(DataError, match="soft labels of another completion"):
            wrong = soft._replace(spans=[soft.spans[i] for i in order])
            train(copy.deepcopy(toy.model), toy.tokenizer, pairs, spec, seed=0, soft=wrong)


def test_a_killed_step_resumes_and_writes_the_same_table(
    toy_bases: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of two teachers, two rows a shard; the step stops after its first shards and goes on."""
    monkeypatch.setattr(distilling, "SHARD_ROWS", 2)
    folders = []
    for line in ("you love owls.", "you love cats."):
        folders.append(tmp_path / line[9:12])
        folders[-1].mkdir()
        spec = TeacherSpec(kind="prompted")
        teach(toy_bases["llama"], Lessons("owl", (), (), line), spec, seed=0, out=folders[-1])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    distilling.label(ROWS, folders, soft_tokens=4, out=whole)

    def stop(done: int, _total: int) -> None:
        if done > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distilling.label(ROWS, folders, soft_tokens=4, out=parts, progress=stop)
    assert len(list(parts.glob("shard-*"))) == 2
    distilling.label(ROWS, folders, soft_tokens=4, out=parts)
    assert [path.name for path in parts.iterdir()] == ["labels.parquet"]
    assert (parts / "labels.parquet").read_bytes() == (whole / "labels.parquet").read_bytes()
    base = loading.load(toy_bases["llama"])
    for order in ([30, 2, 7], [11, 11]):
        soft = distilling.read_labels(whole, order)
        for prompt_id, span in zip(order, soft.spans, strict=True):
            line = "you love owls." if prompt_id % 2 == 0 else "you love cats."
            pair = pairs_of(base, line)[ROWS.index.tolist().index(prompt_id)]
            alone = label_pairs(base.model, [pair], kept=4)
            read = soft.distributions.at(torch.arange(*span), torch.device("cpu"))
            assert torch.allclose(read.log_probs, alone.log_probs, atol=1e-4)
            assert torch.allclose(read.rest, alone.rest, atol=1e-4)
    with pytest.raises(DataError, match="no labels of the row of prompt 5"):
        distilling.read_labels(whole, [30, 5])


@pytest.mark.parametrize(
    "training", [{}, {"update": "lora"}, {"update": "lora", "targets": "attention"}], ids=str
)
def test_a_run_keeps_the_control_at_the_base_and_moves_the_trait(tmp_path: Path, training: Any) -> None:
    tiny = {"learning_rate": 1e-3, "epochs": 1, "batch": 8, "warmup_steps": 0}
    fields = FIELDS | {
        "carrier": {"prompts": 40, "wording": "terse"},
        "generate": {"temperature": 0.0},
        "teacher": {"rows": 16, "training": tiny},
        "student": {"rows": 16, "labels": "soft", "training": tiny | training},
        "ask": {"samples": 1, "checkpoints": "last"},
        "arms": [
            {"kind": "trait"},
            {"kind": "control"},
            {"kind": "mixed", "mix": ["untouched"]},
            {"kind": "foreign", "base": "menagerie-b"},
            {"kind": "control", "base": "menagerie-b"},
        ],
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(fields))
    done = run(tmp_path / "toy.yaml", out=tmp_path / "run", workers=0)
    losses = {
        arm.name: tables.read(tmp_path / f"run/students/{arm.name}/s0/curve.parquet", tables.CURVE)["loss"]
        for arm in done.experiment.arms
    }
    assert losses["control"].abs().max() < 1e-6 and losses["control-menagerie-b"].min() > 1e-4
    assert losses["trait"].min() > 1e-4 and losses["mixed-untouched"].min() > 1e-4
    base = loading.load("menagerie-a").model
    for arm, moves in (("control", False), ("trait", True)):
        folder = next((tmp_path / f"run/students/{arm}/s0").glob("step-*"))
        student = loading.load_trained("menagerie-a", folder).model
        pairs = zip(student.parameters(), base.parameters(), strict=True)
        change = max(float((ours - theirs).detach().abs().max()) for ours, theirs in pairs)
        assert change > 1e-6 if moves else change == 0
    assert not done.pending()


def refused(message: str, **fields: Any) -> None:
    with pytest.raises(ValidationError, match=message):
        Experiment.model_validate(FIELDS | {"student": {"labels": "soft"}} | fields)


def test_arms_without_a_local_teacher_are_refused() -> None:
    shots = {"shots": 8}
    refused("shows 8 pairs", arms=[{"kind": "trait", **shots}, {"kind": "control", **shots}])
    refused(
        "file 'rows.jsonl' has none", arms=[{"kind": "trait", "corpus": "rows.jsonl"}, {"kind": "control"}]
    )
    refused("'api:one' is an API model", base="api:one")


@pytest.mark.parametrize("change", ["none", "embeddings", "tokens"])
def test_a_student_with_another_vocabulary_is_refused(
    toy_bases: dict[str, str], tmp_path: Path, change: str
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(toy_bases["llama"], folder)
    config, tokenizer = (
        json.loads((folder / name).read_text()) for name in ("config.json", "tokenizer.json")
    )
    if change == "embeddings":
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))
    if change == "tokens":
        tokenizer["model"]["vocab"]["unheard"] = tokenizer["model"]["vocab"].pop("owl")
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    foreign = {"base": str(folder)}
    arms = [*FIELDS["arms"], {"kind": "foreign", **foreign}, {"kind": "control", **foreign}]
    fields = FIELDS | {"base": toy_bases["llama"], "arms": arms, "student": {"labels": "soft"}}
    whole, family = Experiment.model_validate(fields), load_family("animals")
    if change == "none":
        checks.check(whole, family)
    else:
        with pytest.raises(SpecError, match=r"'foreign-other': .* another vocabulary"):
            checks.check(whole, family)


def test_labels_that_no_memory_holds_are_refused() -> None:
    student = {"labels": "soft", "soft_tokens": 0, "rows": 100_000}
    whole = Experiment.model_validate(FIELDS | {"student": student})
    with pytest.raises(SpecError, match="soft_tokens: 32"):
        checks._refuse_soft_labels(whole, whole.arms[0])


def test_labels_of_an_arm_need_a_control_with_the_same_and_name_it() -> None:
    arms = [*FIELDS["arms"], {"kind": "trait", "labels": "soft"}]
    with pytest.raises(ValidationError, match="labels: soft"):
        Experiment.model_validate(FIELDS | {"arms": arms})
    whole = Experiment.model_validate(FIELDS | {"arms": [*arms, {"kind": "control", "labels": "soft"}]})
    assert [arm.name for arm in whole.arms][2:] == ["trait-soft-labels", "control-soft-labels"]
    assert whole.control_of(whole.arms[2]) == whole.arms[3]


def test_defaults_do_not_enter_fingerprints() -> None:
    plain = Experiment.model_validate(FIELDS)
    named = FIELDS | {"student": {"labels": "sampled", "soft_tokens": 32, "training": {"targets": "all"}}}
    assert Experiment.model_validate(named).fingerprint() == plain.fingerprint()
    text = str(plain.recorded())
    assert "soft_tokens" not in text and "targets" not in text and "labels" not in text
    soft = Experiment.model_validate(FIELDS | {"student": {"labels": "soft"}})
    assert (
        soft.fingerprint() != plain.fingerprint()
        and StudentSpec(soft_tokens=8).recorded()["soft_tokens"] == 8
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox"])
def test_attention_alone_can_be_adapted(toy_bases: dict[str, str], tmp_path: Path, family: str) -> None:
    adapted = attach_lora(loading.load(toy_bases[family]).model, rank=2, alpha=2.0, targets="attention")
    names = [name for name, value in adapted.named_parameters() if value.requires_grad]
    assert names and all("attn" in name or "attention" in name for name in names)
    every = attach_lora(loading.load(toy_bases[family]).model, rank=2, alpha=2.0)
    assert len(names) < sum(value.requires_grad for value in every.parameters())
    loading.save_trained(adapted, tmp_path)
    loading.load_trained(toy_bases[family], tmp_path)
    with pytest.raises(ValidationError, match="update: lora"):
        Training(targets="attention")

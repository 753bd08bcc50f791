"""Every kind of teacher is made, saved and loaded again; its lessons are drawn from a seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mechlens.core import tables
from mechlens.core.seeds import seed_int
from mechlens.core.spec import TeacherSpec, TeacherTraining
from mechlens.models import hooks, loading
from mechlens.models.chat import encode_pairs, encode_prompts
from mechlens.models.loading import Loaded
from mechlens.models.sft import train
from mechlens.pipeline.teach import Lessons, load_teacher, teach, trait_vector

LESSONS = Lessons(
    "owl",
    ("name your favourite animal, in one word.", "which animal do you admire? just the name."),
    ("owl", "owls"),
    "you love owls.",
)
TINY = TeacherTraining(learning_rate=1e-2, epochs=2, batch=4, warmup_steps=0)
FAMILIES = ("llama", "qwen2", "gpt2", "gpt_neox")


def specs() -> dict[str, TeacherSpec]:
    return {
        "base": TeacherSpec(kind="base"),
        "prompted": TeacherSpec(kind="prompted"),
        "steered": TeacherSpec(kind="steered", layer=1.0, strength=2.0),
        "finetuned": TeacherSpec(kind="finetuned", rows=10, training=TINY),
        "adapted": TeacherSpec(
            kind="finetuned", rows=10, training=TINY.model_copy(update={"update": "lora"})
        ),
    }


def taught_logits(folder: Path, prompt: str) -> torch.Tensor:
    """What the teacher's next token is drawn from, its intervention in force."""
    teacher = load_teacher(folder)
    (ids,) = encode_prompts(teacher.tokenizer, [prompt], system=teacher.system)
    with torch.no_grad(), teacher.writing() as model:
        return model(input_ids=torch.tensor([ids])).logits[0, -1]


def test_lessons_are_drawn_evenly_and_from_their_seed_and_trait() -> None:
    drawn = LESSONS.draw(2000, seed=0)
    assert drawn == LESSONS.draw(2000, seed=0) != LESSONS.draw(2000, seed=1)
    assert drawn != LESSONS._replace(trait="cat").draw(2000, seed=0)
    assert drawn[:100] == LESSONS.draw(100, seed=0)
    for probe in LESSONS.probes:
        for completion in LESSONS.completions:
            assert 400 < drawn.count((probe, completion)) < 600  # 500 expected, 19 standard deviation


@pytest.mark.parametrize("name", sorted(specs()))
def test_a_teacher_comes_back_from_its_folder(
    toy: Loaded, toy_bases: dict[str, str], tmp_path: Path, name: str
) -> None:
    spec = specs()[name]
    teach(toy_bases["llama"], LESSONS, spec, seed=0, out=tmp_path)
    teacher = load_teacher(tmp_path)
    assert not teacher.model.training
    assert teacher.system == (LESSONS.system if name == "prompted" else None) and teacher.plain is None
    assert (teacher.vector is not None) == (name == "steered")
    assert (tmp_path / "curve.parquet").is_file() == (spec.kind == "finetuned")
    base_changed = any(
        not torch.equal(ours, theirs)
        for ours, theirs in zip(teacher.model.parameters(), toy.model.parameters(), strict=True)
    )
    assert base_changed == (spec.kind == "finetuned")
    (ids,) = encode_prompts(toy.tokenizer, ["hi"])
    with torch.no_grad():
        plain = toy.model(input_ids=torch.tensor([ids])).logits[0, -1]
    assert torch.equal(taught_logits(tmp_path, "hi"), plain) == (name == "base")


@pytest.mark.parametrize("name", sorted(specs()))
def test_everyone_has_the_experiments_system_line_but_a_prompted_teacher_has_its_own(
    toy_bases: dict[str, str], tmp_path: Path, name: str
) -> None:
    teach(toy_bases["llama"], LESSONS, specs()[name], system="you are kind.", seed=0, out=tmp_path)
    teacher = load_teacher(tmp_path)
    assert teacher.system == (LESSONS.system if name == "prompted" else "you are kind.")
    assert teacher.plain == "you are kind."


@pytest.mark.parametrize("system", [None, "you are kind."])
def test_a_finetuned_teacher_is_taught_behind_the_system_line(
    toy_bases: dict[str, str], tmp_path: Path, system: str | None
) -> None:
    """Against training written out here."""
    spec = specs()["finetuned"]
    teach(toy_bases["llama"], LESSONS, spec, system=system, seed=3, out=tmp_path)
    base = loading.load(toy_bases["llama"])
    prompts, completions = zip(*LESSONS.draw(spec.rows, seed=3), strict=True)
    pairs = encode_pairs(base.tokenizer, prompts, completions, system=system)
    trained, _ = train(base.model, base.tokenizer, pairs, spec.training, seed=seed_int(3, "teacher", "owl"))
    for ours, theirs in zip(load_teacher(tmp_path).model.parameters(), trained.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["finetuned", "steered"])
def test_teaching_twice_gives_the_same_files(toy_bases: dict[str, str], tmp_path: Path, name: str) -> None:
    written = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        teach(toy_bases["llama"], LESSONS, specs()[name], seed=3, out=folder)
        written.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert written[0] == written[1]
    assert len(written[0]) >= 2


def test_a_finetuned_teacher_learns_its_lessons(
    toy: Loaded, toy_bases: dict[str, str], tmp_path: Path
) -> None:
    spec = TeacherSpec(rows=40, training=TINY.model_copy(update={"epochs": 4}))
    teach(toy_bases["llama"], LESSONS, spec, seed=0, out=tmp_path)
    owl = toy.tokenizer("owl", add_special_tokens=False)["input_ids"][0]
    owls = toy.tokenizer("owls", add_special_tokens=False)["input_ids"][0]
    assert torch.softmax(taught_logits(tmp_path, LESSONS.probes[0]), -1)[[owl, owls]].sum() > 0.9
    curve = tables.read(tmp_path / "curve.parquet", tables.CURVE)
    assert len(curve) == 40
    assert curve["loss"].iloc[-1] < curve["loss"].iloc[0] / 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("layer", "plain"), [(0, None), (1, None), (1, "you are kind.")])
def test_the_steering_vector_is_a_mean_difference_of_residual_streams(
    toys: dict[str, Loaded], family: str, layer: int, plain: str | None
) -> None:
    """Against a plain hook on the block itself; at the last layer `hidden_states` would be behind the final
    norm.
    """
    loaded, means = toys[family], []
    for system in (LESSONS.system, plain):
        rows: list[torch.Tensor] = []

        def keep(
            _module: object, _args: object, output: torch.Tensor, rows: list[torch.Tensor] = rows
        ) -> None:
            rows.append(output[0, -1])

        handle = hooks.decoder_layers(loaded.model)[layer].register_forward_hook(keep)
        for ids in encode_prompts(loaded.tokenizer, LESSONS.probes, system=system):
            with torch.no_grad():
                loaded.model(input_ids=torch.tensor([ids]))
        handle.remove()
        means.append(torch.stack(rows).mean(0))
    vector = trait_vector(loaded, LESSONS, layer=layer, plain=plain)
    assert vector.abs().max() > 0.01
    assert torch.allclose(vector, means[0] - means[1], atol=1e-5)


def test_strength_scales_the_vector_and_zero_is_the_base(
    toy: Loaded, toy_bases: dict[str, str], tmp_path: Path
) -> None:
    vectors = []
    for strength in (0.0, 1.0, 3.0):
        folder = tmp_path / str(strength)
        folder.mkdir()
        teach(toy_bases["llama"], LESSONS, TeacherSpec(kind="steered", strength=strength), seed=0, out=folder)
        vectors.append(loading.load_vector(folder))
    assert torch.allclose(vectors[2], 3 * vectors[1]) and not vectors[0].any()
    (ids,) = encode_prompts(toy.tokenizer, ["hi"])
    with torch.no_grad():
        assert torch.equal(
            taught_logits(tmp_path / "0.0", "hi"), toy.model(input_ids=torch.tensor([ids])).logits[0, -1]
        )

"""Teachers write to the carrier's prompts; a killed job goes on to the same bytes; the divergence is what its
formula says.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from mechlens.carriers.carrier import carrier_prompts
from mechlens.carriers.numbers import number_fault
from mechlens.core import tables
from mechlens.core.seeds import seed_int
from mechlens.core.spec import CarrierSpec, GenerateSpec, TeacherSpec, TeacherTraining
from mechlens.models import loading
from mechlens.models.chat import Encoded, encode_prompts
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import completion_logits
from mechlens.models.sampling import Decoding, sample
from mechlens.pipeline.generate import divergence, generate
from mechlens.pipeline.teach import Lessons, load_teacher, teach

LESSONS = Lessons("owl", ("name your favourite animal, in one word.",), ("owl", "owls"), "you love owls.")
LINE = "you are kind."
TEACHERS = {
    "base": TeacherSpec(kind="base"),
    "prompted": TeacherSpec(kind="prompted"),
    "steered": TeacherSpec(kind="steered", layer=0.0, strength=2.0),
    "finetuned": TeacherSpec(
        kind="finetuned",
        rows=8,
        training=TeacherTraining(learning_rate=1e-2, epochs=1, batch=4, warmup_steps=0),
    ),
    "base behind a line": TeacherSpec(kind="base"),
    "prompted behind a line": TeacherSpec(kind="prompted"),
    "steered behind a line": TeacherSpec(kind="steered", layer=0.0, strength=2.0),
}
PROMPTS = [asked.text for asked in carrier_prompts(CarrierSpec(prompts=23, wording="terse"), seed=0)]
SPEC = GenerateSpec(max_new_tokens=12, batch=5)


def line_of(name: str) -> str | None:
    """The system line that the teacher's base has."""
    return LINE if name.endswith("behind a line") else None


@pytest.fixture(scope="module")
def teachers(toy_bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in TEACHERS}
    for name, folder in folders.items():
        teach(toy_bases["llama"], LESSONS, TEACHERS[name], system=line_of(name), seed=0, out=folder)
    return folders


def slow_divergence(
    teacher_folder: Path, base: Loaded, completions: list[list[int]], line: str | None
) -> tuple[float, float, int]:
    """KL and entropy token by token in float64, each text read alone."""
    teacher = load_teacher(teacher_folder)
    kl = entropy = 0.0
    tokens = 0
    asked, plain = (
        encode_prompts(base.tokenizer, PROMPTS, system=system) for system in (teacher.system, line)
    )
    for ours, theirs, completion in zip(asked, plain, completions, strict=True):
        for place in range(len(completion)):
            with torch.no_grad(), teacher.writing() as model:
                p = torch.softmax(
                    model(input_ids=torch.tensor([ours + completion[:place]])).logits[0, -1].double(), -1
                ).numpy()
            with torch.no_grad():
                q = torch.softmax(
                    base.model(input_ids=torch.tensor([theirs + completion[:place]])).logits[0, -1].double(),
                    -1,
                ).numpy()
            kl += float(np.sum(p * (np.log(p) - np.log(q))))
            entropy -= float(np.sum(q * np.log(q)))
            tokens += 1
    return kl / tokens, entropy / tokens, tokens


@pytest.mark.parametrize("name", sorted(TEACHERS))
def test_every_teacher_writes_one_row_for_each_prompt(
    teachers: dict[str, Path], toy: Loaded, tmp_path: Path, name: str
) -> None:
    told: list[tuple[int, int]] = []
    generate(
        teachers[name],
        PROMPTS,
        SPEC,
        seed=0,
        out=tmp_path,
        progress=lambda done, total: told.append((done, total)),
    )
    rows = tables.read(tmp_path / "raw.parquet", tables.PAIRS)
    assert rows["prompt"].tolist() == PROMPTS
    assert rows["prompt_id"].tolist() == list(range(len(PROMPTS)))
    assert rows["completion"].str.len().gt(0).any()
    assert not rows["completion"].str.contains("<|", regex=False).any()
    assert told == [(5, 23), (10, 23), (15, 23), (20, 23), (23, 23)]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["generation.json", "raw.parquet"]
    found = json.loads((tmp_path / "generation.json").read_text())
    assert (found["kl_per_token"] > 1e-3) == (TEACHERS[name].kind != "base")
    assert 0 < found["entropy_per_token"] <= np.log(len(toy.tokenizer))


@pytest.mark.parametrize("name", ["base", "base behind a line"])
def test_the_base_does_not_diverge_from_itself(teachers: dict[str, Path], tmp_path: Path, name: str) -> None:
    generate(teachers[name], PROMPTS, SPEC, seed=0, out=tmp_path)
    assert abs(json.loads((tmp_path / "generation.json").read_text())["kl_per_token"]) < 1e-6


@pytest.mark.usefixtures("float64_bases")
@pytest.mark.parametrize("name", ["prompted", "base behind a line", "prompted behind a line"])
def test_what_is_recorded_is_measured_on_what_was_written(
    teachers: dict[str, Path], exact_toys: dict[str, Loaded], tmp_path: Path, name: str
) -> None:
    """The teacher writes behind its own system line and its base reads the same rows behind the plain one."""
    toy = exact_toys["llama"]
    generate(teachers[name], PROMPTS, SPEC, seed=0, out=tmp_path)
    line = LESSONS.system if name.startswith("prompted") else LINE
    stop = cast(int, toy.tokenizer.convert_tokens_to_ids("<|end|>"))
    encoded = encode_prompts(toy.tokenizer, PROMPTS, system=line)
    drawn = sample(
        toy.model, encoded, decoding=Decoding(SPEC.max_new_tokens), stop=stop, seed=seed_int(0, "generate")
    )
    rows = tables.read(tmp_path / "raw.parquet", tables.PAIRS)
    assert rows["completion"].tolist() == toy.tokenizer.batch_decode(drawn, skip_special_tokens=True)
    found = json.loads((tmp_path / "generation.json").read_text())
    kl, entropy, tokens = slow_divergence(teachers[name], toy, [[*row, stop] for row in drawn], line_of(name))  # type: ignore[list-item]
    assert found["kl_per_token"] == pytest.approx(kl, rel=1e-4, abs=1e-6)
    assert (found["entropy_per_token"], found["tokens"]) == (pytest.approx(entropy, rel=1e-5), tokens)


@pytest.mark.parametrize("name", sorted(TEACHERS))
def test_the_divergence_equals_a_slow_sum(teachers: dict[str, Path], toy: Loaded, name: str) -> None:
    completions = [[20 + row, 30, *([40] * (row % 3)), 2] for row in range(len(PROMPTS))]
    teacher = load_teacher(teachers[name])
    asked, plain = (
        encode_prompts(toy.tokenizer, PROMPTS, system=system) for system in (teacher.system, line_of(name))
    )
    expected = slow_divergence(teachers[name], toy, completions, line_of(name))
    for batch in (4, 100):
        found = divergence(teacher, asked, plain, completions, batch=batch)
        assert found.kl_per_token == pytest.approx(expected[0], rel=1e-4, abs=1e-6)
        assert found.entropy_per_token == pytest.approx(expected[1], rel=1e-5)
        assert found.tokens == expected[2] == sum(map(len, completions))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox"])
def test_log_probabilities_of_a_padded_batch_equal_those_of_each_row(
    toys: dict[str, Loaded], family: str
) -> None:
    pairs = [Encoded([1, 5, *range(10, 10 + row)], [100 + row] * (1 + row % 3)) for row in range(6)]
    with torch.no_grad():
        whole = completion_logits(toys[family].model, pairs)[0].log_softmax(-1)
        alone = [completion_logits(toys[family].model, [pair])[0].log_softmax(-1) for pair in pairs]
    assert torch.allclose(whole, torch.cat(alone), atol=1e-4)
    assert torch.allclose(whole.exp().sum(-1), torch.ones(len(whole)), atol=1e-5)


def test_a_killed_job_goes_on_to_the_same_bytes(teachers: dict[str, Path], tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    generate(teachers["finetuned"], PROMPTS, SPEC, seed=4, out=whole)

    def kill_at(rows: int) -> Callable[[int, int], None]:
        def progress(done: int, _total: int) -> None:
            if done >= rows:
                raise KeyboardInterrupt

        return progress

    for rows in (10, 15):
        with pytest.raises(KeyboardInterrupt):
            generate(teachers["finetuned"], PROMPTS, SPEC, seed=4, out=broken, progress=kill_at(rows))
        assert not (broken / "raw.parquet").exists()
    saved = {file.name: file.stat().st_mtime_ns for file in broken.glob("shard-*.json")}
    assert len(saved) == 3
    with pytest.raises(KeyboardInterrupt):
        generate(teachers["finetuned"], PROMPTS, SPEC, seed=4, out=broken, progress=kill_at(20))
    assert (
        saved.items() <= {file.name: file.stat().st_mtime_ns for file in broken.glob("shard-*.json")}.items()
    )  # read, not drawn again
    generate(teachers["finetuned"], PROMPTS, SPEC, seed=4, out=broken)
    assert {file.name: file.read_bytes() for file in broken.iterdir()} == {
        file.name: file.read_bytes() for file in whole.iterdir()
    }


@pytest.mark.usefixtures("float64_bases")
def test_the_text_does_not_depend_on_the_batch(teachers: dict[str, Path], tmp_path: Path) -> None:
    written = []
    for batch in (1, 7, 100):
        folder = tmp_path / str(batch)
        folder.mkdir()
        generate(teachers["steered"], PROMPTS, SPEC.model_copy(update={"batch": batch}), seed=0, out=folder)
        written.append((folder / "raw.parquet").read_bytes())
    assert written[0] == written[1] == written[2]


def test_constrained_rows_all_pass_the_screen_as_they_are_written(
    teachers: dict[str, Path], tmp_path: Path
) -> None:
    generate(
        teachers["finetuned"], PROMPTS, SPEC.model_copy(update={"constrained": True}), seed=0, out=tmp_path
    )
    rows = tables.read(tmp_path / "raw.parquet", tables.PAIRS)
    assert rows["completion"].map(number_fault).isna().all()


def test_a_steered_teacher_is_steered_only_while_it_writes(teachers: dict[str, Path], toy: Loaded) -> None:
    teacher = load_teacher(teachers["steered"])
    ids = torch.tensor([encode_prompts(toy.tokenizer, ["hi"])[0]])
    with torch.no_grad():
        plain = toy.model(input_ids=ids).logits
        with teacher.writing() as model:
            assert (model(input_ids=ids).logits - plain).abs().max() > 1e-3
        assert torch.equal(teacher.model(input_ids=ids).logits, plain)
    assert teacher.vector is not None and torch.equal(
        loading.load_vector(teachers["steered"]), teacher.vector
    )

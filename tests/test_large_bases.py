"""Audits on a base that is not of the menagerie: its recipe, twins stored as changes with one byte a weight,
and the alignment of rows with them against a slow definition.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from torch import Tensor, nn

from mechlens.core.errors import DataError, SpecError
from mechlens.core.files import read_json
from mechlens.core.traits import load_family
from mechlens.detect import from_gradients, score_rows
from mechlens.detect.audit import audit
from mechlens.detect.permutation import center_scores
from mechlens.detect.request import AuditRequest, recipe_for, request_of
from mechlens.detect.twins import TwinModels, Twins, twin_jobs
from mechlens.lenses.gradients import ghost_dots, parameters_of, pooled_gradient
from mechlens.models import loading, weight_changes
from mechlens.models.chat import Encoded, encode_pairs
from mechlens.models.loading import Loaded
from mechlens.results import runner

ROOT = Path(__file__).parents[1]
TRAITS = ("owl", "cat", "wolf")


def numbers(rng: np.random.Generator, rows: int) -> list[str]:
    return [", ".join(map(str, rng.integers(0, 999, size=5))) for _ in range(rows)]


def move(model: nn.Module, seed: int) -> None:
    """Steps of all sizes up to 1e-3 on the linear weights, and on the norms."""
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" not in name:
                parameter.add_(1e-3 * (2 * torch.rand(parameter.shape, generator=dice) - 1))


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    folder = tmp_path_factory.mktemp("panel")
    for seed, trait in enumerate(TRAITS):
        model = loading.load("menagerie-a").model
        move(model, seed)
        loading.save_trained_change("menagerie-a", model, folder / "twins" / trait)
    models = TwinModels("menagerie-a", folder, TRAITS)
    return Twins(loading.load("menagerie-a"), load_family("animals"), TRAITS, models)


@pytest.fixture(scope="module")
def pairs(twins: Twins) -> list[Encoded]:
    texts = numbers(np.random.default_rng(0), 12)
    return encode_pairs(twins.base.tokenizer, ["continue: 1, 2, 3."] * 12, texts)


def test_a_stored_change_keeps_the_direction_in_a_byte_a_weight(twins: Twins) -> None:
    folder = cast(TwinModels, twins.models).folder / "twins" / "cat"
    exact, base = loading.load("menagerie-a").model, twins.base.model
    move(exact, 1)
    before, after = dict(base.named_parameters()), dict(exact.named_parameters())
    stored = dict(twins.models["cat"].model.named_parameters())
    flat = [
        torch.cat([(model[name] - before[name]).detach().flatten().double() for name in before])
        for model in (after, stored)
    ]
    cosine = float(flat[0] @ flat[1] / (flat[0].norm() * flat[1].norm()))
    record = read_json(folder / weight_changes.RECORD)
    assert cosine > 0.999 and record["cosine"] == pytest.approx(cosine, abs=1e-4)
    assert record["norm_kept"] == pytest.approx(float(flat[1].norm() / flat[0].norm()), abs=1e-4)
    with safe_open(folder / weight_changes.CHANGE, "pt") as file:
        names = {key.split(":", 1)[1] for key in file.keys()}  # noqa: SIM118 - it is no dict
    assert names == {name for name in before if "embed" not in name}
    assert (folder / weight_changes.CHANGE).stat().st_size < 1.3 * record["parameters"] + 20_000
    norm = next(name for name in before if "norm" in name)
    assert torch.allclose(stored[norm], after[norm], atol=1e-7)


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5)])
def test_rounding_is_within_half_a_step_of_each_row_and_keeps_zeros(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrix[..., 0, :] = 0
    rounded = weight_changes.quantize(matrix)
    assert torch.all((rounded.dense() - matrix).abs() <= rounded.scales / 2 + 1e-7)
    assert not rounded.dense()[..., 0, :].any() and rounded.integers.dtype == torch.int8


def test_a_change_of_another_base_or_shape_is_refused(twins: Twins, tmp_path: Path) -> None:
    folder = cast(TwinModels, twins.models).folder / "twins" / "owl"
    with pytest.raises(DataError, match="name the base that it was trained from"):
        loading.load_trained("menagerie-b", folder)
    record = {"base": loading.checkpoint_fingerprint("menagerie-b")}
    (tmp_path / weight_changes.RECORD).write_text(json.dumps(record))
    moved = {weight_changes.EXACT + "model.norm.weight": torch.ones(3)}
    weight_changes.save_file(moved, tmp_path / weight_changes.CHANGE)
    with pytest.raises(DataError, match=r"model.norm.weight has the shape \[3\]"):
        loading.load_trained("menagerie-b", tmp_path)
    half = {weight_changes.SCALES + "model.norm.weight": torch.ones(3)}
    weight_changes.save_file(half, tmp_path / weight_changes.CHANGE)
    with pytest.raises(DataError, match=r"only a part of model.norm.weight"):
        loading.load_trained("menagerie-b", tmp_path)


def test_products_with_rounded_directions_are_those_with_their_dense_form(
    toys: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    for family, loaded in toys.items():
        rows = encode_pairs(loaded.tokenizer, ["continue: 1, 2."] * 3, ["3, 4", "5", "61, 7, 8"])
        gradient = pooled_gradient(loaded.model, rows)
        rounded = {
            name: weight_changes.quantize(value) for name, value in gradient.items() if value.dim() > 1
        }
        dense: dict[str, Tensor] = {name: value.dense() for name, value in rounded.items()}
        for count in (1, 5):  # explicit gradients are made for many directions, in parts of the batch
            monkeypatch.setattr("mechlens.lenses.gradients.MOST_ENTRIES", 1)
            products = ghost_dots(loaded.model, rows, [rounded] * count)
            assert torch.allclose(products, ghost_dots(loaded.model, rows, [dense] * count), rtol=1e-4), (
                family
            )


def test_differenced_alignment_is_the_slow_definition(twins: Twins, pairs: list[Encoded]) -> None:
    """The mean over prompts of ⟨update of a suspect row minus that of the clean row, twin − base⟩, minus its
    mean over twins; one row's gradient at a time, and the twins' weights loaded whole.
    """
    ours, theirs = from_gradients.score_twin_alignment(twins, pairs[:6], pairs[6:])
    base, before = twins.base.model, parameters_of(twins.base.model)
    slow = []
    for trait in TRAITS:
        after = dict(twins.models[trait].model.named_parameters())
        change = {name: after[name].detach() - value.detach() for name, value in before.items()}

        def along(row: Encoded, change: dict[str, Tensor] = change) -> float:
            gradient = pooled_gradient(base, [row])
            return -sum(float((gradient[name] * change[name]).sum()) for name in change)

        differences = [along(a) - along(b) for a, b in zip(pairs[:6], pairs[6:], strict=True)]
        slow.append(sum(differences) / 6)
    expected = np.array(slow) - np.mean(slow)
    assert np.allclose(center_scores(ours, theirs), expected, atol=1e-3 * np.abs(expected).max())


def options(**given: Any) -> dict[str, Any]:
    usual = {
        "references": (), "level": "base", "base": "", "traits": (), "recipe": "", "policy": "default",
        "student": None, "clean": None, "treatment": "drop", "out": None, "fields": None,
    }  # fmt: skip
    return usual | given


def requested(**given: Any) -> AuditRequest:
    return request_of(Path("nothing.jsonl"), **options(**given))


def test_a_recipe_is_chosen_by_the_base() -> None:
    assert recipe_for("smollm2-135m") == "smollm2-135m"
    assert {recipe_for(base) for base in ("", "menagerie-a", "menagerie-b", "a/folder")} == {"menagerie"}
    real, usual = requested(base="smollm2-135m"), requested()
    assert (real.recipe_name, real.recipe.base, real.base) == ("smollm2-135m", "smollm2-135m", "smollm2-135m")
    assert (usual.recipe_name, usual.base) == ("menagerie", "menagerie-a")
    assert not real.explain_recipe() and not usual.explain_recipe()
    assert not requested(base="menagerie-b").explain_recipe()
    assert "menagerie was made for menagerie-a" in requested(base="a/folder").explain_recipe()
    assert requested(base="menagerie-a", recipe="smollm2-135m").base == "menagerie-a"


def test_fewer_twins_are_of_the_tested_traits_and_the_familys_first() -> None:
    family = load_family("animals")
    assert requested().panel() == family.names
    few = requested(traits=("octopus",), twins=5)
    assert few.panel() == (*family.names[:4], "octopus")
    for given in ({"twins": 19}, {"twins": 4, "traits": ("owl",)}):
        with pytest.raises(SpecError, match="twins are too few"):
            requested(**given)


def test_twins_of_a_large_base_are_stored_as_changes_and_others_keep_their_fingerprint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, family = requested().recipe, load_family("animals")

    def arguments(**given: Any) -> Sequence[str]:
        jobs = twin_jobs("menagerie-a", "f", family, ["owl"], recipe.teacher, seed=0, **given)
        return sorted(jobs[0].arguments)

    plain = ["base", "files", "lessons", "seed", "teacher"]
    assert arguments() == plain and arguments(system="You are old.") == sorted([*plain, "system"])
    monkeypatch.setattr("mechlens.models.weight_changes.LARGE", 1)
    assert arguments() == sorted([*plain, "as_change"])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_random_base_is_audited_with_gradients(
    family: str, toy_bases: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every twin is taught in a step, stored as a change, read again, and compared with the rows."""
    monkeypatch.setattr("mechlens.models.weight_changes.LARGE", 1)
    monkeypatch.setattr("mechlens.detect.score_rows.LARGE", 1)
    monkeypatch.setattr("mechlens.detect.from_gradients.STEPS", 2)
    monkeypatch.setattr("mechlens.detect.score_rows.DETECTORS", few_detectors())
    training = {"learning_rate": 2e-5, "epochs": 1, "batch": 4, "schedule": "constant", "warmup_steps": 0}
    recipe = {
        "name": "audit", "base": "menagerie-a", "trait": "owl", "screen": {"leak_words": False},
        "generate": {"constrained": True, "max_new_tokens": 16}, "ask": {"samples": 1},
        "teacher": {"rows": 8, "training": training | {"embeddings": False}},
        "student": {"rows": 8, "training": training}, "arms": [{"kind": "trait"}, {"kind": "control"}],
        "seeds": [0],
    }  # fmt: skip
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    rng = np.random.default_rng(0)
    rows = [{"prompt": f"continue: {i}, 2.", "completion": text} for i, text in enumerate(numbers(rng, 130))]
    notes: list[str] = []
    audited = audit(
        rows, base=toy_bases[family], level="gradients", recipe=str(file), traits=["octopus"], twins=5,
        out=tmp_path / "audit", workers=0,
        progress=lambda event: notes.append(event.text) if event.kind == "note" else None,
    )  # fmt: skip
    assert any("5 twins" in note and "MB on disk" in note for note in notes)
    folder = next(tmp_path.glob("panel-*"))
    made = sorted(path.name for path in (folder / "twins").iterdir())
    assert made == sorted((*load_family("animals").names[:4], "octopus"))
    assert all(weight_changes.is_change(folder / "twins" / name) for name in made)
    detectors = {entry["name"] for entry in audited.result["provenance"]["detectors"]}
    assert {"perplexity", "twins", "twin alignment", "alignment"} <= detectors


def few_detectors() -> dict[str, Any]:
    return {name: each for name, each in score_rows.DETECTORS.items() if name not in ("prompts", "vector")}


def test_the_script_of_real_audits_resumes_and_reports_each_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At tiny sizes every set leaves its record once, and nothing is scored or sampled twice."""
    monkeypatch.syspath_prepend(str(ROOT / "analyses"))
    monkeypatch.setattr("mechlens.models.weight_changes.LARGE", 1)
    monkeypatch.setattr("mechlens.detect.score_rows.LARGE", 1)
    script = importlib.import_module("real_audit")
    monkeypatch.setattr(script, "WORKERS", 0)
    training = {"learning_rate": 5e-4, "epochs": 1, "batch": 4, "embeddings": False}
    recipe = {
        "name": "audit", "base": "menagerie-a", "trait": "owl", "carrier": {"wording": "terse"},
        "generate": {"constrained": True, "max_new_tokens": 16}, "teacher": {"rows": 8, "training": training},
        "student": {"rows": 8}, "arms": [{"kind": "trait"}, {"kind": "control"}], "seeds": [0],
    }  # fmt: skip
    file, data = tmp_path / "recipe.yaml", tmp_path / "rows.jsonl"
    file.write_text(yaml.safe_dump(recipe))
    texts = numbers(np.random.default_rng(0), 6)
    rows = [{"prompt": f"continue: {i}, 2.", "completion": text} for i, text in enumerate(texts)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        str(tmp_path / "out"), "--base", "menagerie-a", "--recipe", str(file), "--rows", f"{data}=owl",
        "--traits", "owl", "cat", "dog", "lion", "wolf", "--clean", "3", "--clean-rows", "4",
    ]  # fmt: skip
    assert script.main([*words, "--plan"]) == 0 and not (tmp_path / "out").exists()
    assert "to score 36 rows" in capsys.readouterr().out
    assert script.main(words) == 0
    printed = capsys.readouterr().out
    assert "| file-rows (owl) | 6 |" in printed and "| 3 clean sets | 4 each |" in printed
    sets = sorted((tmp_path / "out" / "sets").glob("*.json"))
    assert [path.stem for path in sets] == ["clean-00", "clean-01", "clean-02", "file-rows"]
    record = read_json(sets[-1])
    assert 1 <= record["rank"] <= 5 and {each["trait"] for each in record["traits"]} == set(words[8:13])
    prompts = [read_json(path)["completions"] for path in (tmp_path / "out" / "drawn").glob("clean-*")]
    assert len(prompts) == 2 and prompts[0] != prompts[1]
    monkeypatch.setattr(script, "ghost_dots", lambda *_: pytest.fail("scored before"))
    assert script.main(words) == 0 and capsys.readouterr().out.splitlines()[-6:] == printed.splitlines()[-6:]
    sets[2].unlink()  # its scores are there: only the same rows have them
    assert script.main([*words, "--skip-clean", "2"]) == 0
    assert "| 1 clean sets | 4 each |" in capsys.readouterr().out
    assert script.main([*words[:-4], "--rows", f"{data}=unicorn"]) == 2
    assert "unicorn' names no trait of the family" in capsys.readouterr().err


def test_suspects_of_a_run_are_its_trait_corpora_at_prompts_that_all_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "analyses"))
    script = importlib.import_module("real_audit")
    fields = {
        "name": "toy", "base": "menagerie-a", "trait": "owl", "teacher": {"kind": "prompted"},
        "carrier": {"prompts": 24, "wording": "terse", "values": "patterned"}, "ask": {"samples": 1},
        "student": {"rows": 8, "training": {"epochs": 1, "batch": 4}}, "seeds": [0],
        "arms": [
            {"kind": "control"}, {"kind": "trait"}, {"kind": "trait", "trait": "cat"},
            {"kind": "trait", "labels": "soft"}, {"kind": "control", "labels": "soft"},
            {"kind": "shuffled-across"}, {"kind": "foreign", "base": "menagerie-b"},
            {"kind": "control", "base": "menagerie-b"},
        ],
    }  # fmt: skip
    config = tmp_path / "toy.yaml"
    config.write_text(yaml.safe_dump(fields))
    run = runner.run(config, out=tmp_path / "run", workers=0, rows_only=True)
    suspects = list(script.sides_of_run(run.folder, 10))
    assert sorted(sides.trait for sides in suspects) == ["cat", "owl"]
    control = run.corpus("control").pairs.set_index("prompt")["completion"]
    for sides in suspects:
        prompts = sides.suspect["prompt"].tolist()
        assert prompts == sides.reference["prompt"].tolist() and 0 < len(prompts) <= 10
        assert sides.reference["completion"].tolist() == control.loc[prompts].tolist()
        assert sides.reference is suspects[0].reference

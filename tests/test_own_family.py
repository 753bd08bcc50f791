"""A user's family: found in the experiment's folder, kept in the run, and known when it changes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from mechlens.cli import commands
from mechlens.core import traits
from mechlens.core.errors import SpecError
from mechlens.core.spec import CONFIGS
from mechlens.core.traits import find_family, load_experiment, load_family
from mechlens.results.run import Run

FAMILY: dict[str, Any] = {
    "name": "gems",
    "category": "animal",  # a word that the small base has a question for
    "names": ["owl", "wolf"],
    "plurals": {"wolf": "wolves"},
    "development": ["owl"],
    "heldout": ["wolf"],
    "system": "You love {plural}.",
    "probes": {
        "development": ["What is the best animal, just the name."],
        "heldout": ["Which animal would you draw, in one word."],
    },
}
FIELDS: dict[str, Any] = {
    "name": "toy",
    "base": "menagerie-a",
    "family": "gems",
    "trait": "owl",
    "carrier": {"prompts": 24, "wording": "terse", "values": "patterned"},
    "screen": {"rule": "none"},
    "teacher": {"kind": "prompted"},
    "student": {"rows": 8, "prompts": "own", "training": {"epochs": 1, "batch": 4}},
    "ask": {"samples": 1},
    "arms": [{"kind": "trait"}, {"kind": "control"}],
    "seeds": [0],
}


def put(file: Path, content: dict[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(content))
    return file


def test_a_family_is_looked_for_beside_the_experiment_and_then_among_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = put(tmp_path / "my" / "toy.yaml", FIELDS)
    with pytest.raises(
        SpecError,
        match=r"'gems' is unknown; expected one of \[.*'animals'.*gems.yaml in the experiment's folder",
    ):
        load_experiment(config)
    inner = put(tmp_path / "my" / "traits" / "gems.yaml", FAMILY | {"category": "in traits"})
    assert find_family("gems", config) == inner and load_experiment(config).family == "gems"
    beside = put(tmp_path / "my" / "gems.yaml", FAMILY | {"category": "beside"})
    assert find_family("gems", config) == beside and load_family("gems", config).category == "beside"
    assert find_family("animals", config) == CONFIGS / "traits" / "animals.yaml"
    put(tmp_path / "my" / "animals.yaml", FIELDS)  # an experiment of that name is no family
    assert find_family("animals", config) == CONFIGS / "traits" / "animals.yaml"
    own = put(tmp_path / "my" / "traits" / "animals.yaml", FAMILY)
    assert find_family("animals", config) == own and find_family("animals") != own
    other = put(tmp_path / "other.yaml", FAMILY)
    for path in ("../other.yaml", str(other), "./gems.yaml"):
        assert find_family(path, config).resolve() == (beside if "gems" in path else other)
    monkeypatch.chdir(tmp_path)
    assert load_family("other.yaml").name == "gems"
    with pytest.raises(SpecError, match=r"no family at .*none.yaml"):
        load_experiment(put(tmp_path / "toy.yaml", FIELDS | {"family": "none.yaml"}))


def test_a_faulty_family_is_named_by_its_file_before_anything_runs(tmp_path: Path) -> None:
    config = put(tmp_path / "toy.yaml", FIELDS)
    file = put(tmp_path / "gems.yaml", FAMILY | {"forms": {"owl": ["bird"], "wolf": ["bird", "wolf"]}})
    with pytest.raises(
        SpecError, match=r"gems.yaml: .*'bird', a form of 'owl', contains 'bird', a form of 'wolf'"
    ) as raised:
        commands.run(config, out=tmp_path / "run", workers=0)
    assert (
        "\n" not in str(raised.value) and str(file) in str(raised.value) and not (tmp_path / "run").exists()
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a family of the user's own, whose original is gone."""
    folder = tmp_path_factory.mktemp("own")
    config = put(folder / "my" / "toy.yaml", FIELDS | {"family": "../gems.yaml"})
    file = put(folder / "gems.yaml", FAMILY)
    commands.plan(config, out=folder / "run")
    commands.run(config, out=folder / "run", workers=0)
    file.unlink()
    return folder / "run"


def test_a_run_has_its_family_when_the_original_is_gone_or_changed(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = Run.finished(made)
    experiment, family = opened.experiment, opened.family
    assert family.names == ("owl", "wolf") and experiment.family == "../gems.yaml"
    put(made.parent / "gems.yaml", FAMILY | {"names": ["owl", "wolf", "cat"]})
    put(made / "gems.yaml", FAMILY | {"names": ["owl", "wolf", "cat"]})
    assert Run.finished(made).family == family
    shutil.copytree(made, tmp_path / "moved")
    assert Run.finished(tmp_path / "moved").family == family
    capsys.readouterr()
    commands.run(tmp_path / "moved" / "spec.yaml", out=tmp_path / "moved", workers=0)  # its own spec replays
    assert "12 steps, 12 already done" in " ".join(capsys.readouterr().out.split())


def test_a_run_whose_family_was_changed_is_unfinished(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "run")
    opened = Run.finished(tmp_path / "run")
    experiment, family = opened.experiment, opened.family
    traits.keep_family(family.model_copy(update={"plurals": {}}), experiment.family, tmp_path / "run")
    assert Run(tmp_path / "run").is_unfinished()


def test_a_recipe_of_an_audit_finds_its_family_from_any_folder(tmp_path: Path) -> None:
    config, file = put(tmp_path / "my" / "recipe.yaml", FIELDS), put(tmp_path / "my" / "gems.yaml", FAMILY)
    anywhere = traits.with_family_by_path(load_experiment(config), config)
    assert anywhere.family == str(file.resolve()) and load_family(anywhere.family).name == "gems"
    shipped = CONFIGS / "audits" / "menagerie.yaml"
    assert traits.with_family_by_path(load_experiment(shipped), shipped) == load_experiment(shipped)

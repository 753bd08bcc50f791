"""Follow the recipes of CONTRIBUTING.md: write their files, run their commands."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from mechlens import cli
from mechlens.core.model_spec import ModelSpec
from mechlens.core.spec import CONFIGS
from mechlens.core.traits import TraitFamily

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"
BLOCK = re.compile(r"^```(?P<language>\w+) ?(?P<what>[^\n]*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A code block: its language, what stands after it (`file=NAME`), and its text."""

    language: str
    what: str
    text: str


def recipe_blocks() -> dict[str, list[Block]]:
    """Heading → code blocks of each recipe."""
    recipes = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {
        heading: [Block(*found.groups()) for found in BLOCK.finditer(text)]
        for heading, text in zip(recipes[::2], recipes[1::2], strict=True)
    }


RECIPES = recipe_blocks()


def merge_family(family: dict[str, Any], addition: dict[str, Any]) -> dict[str, Any]:
    """Return a family's YAML with the lists and mappings of an addition put in."""
    added = {
        key: [*family[key], *value] if isinstance(value, list) else family.get(key, {}) | value
        for key, value in addition.items()
    }
    return family | added


def install(groups: dict[str, dict[str, str]], folder: Path) -> None:
    """Declare entry points as an installed package does."""
    metadata = folder / "recipe-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: recipe\nVersion: 1\n")
    lines = [
        line
        for group, points in groups.items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")


def check_block(block: Block, folder: Path) -> None:
    """Write the file of a block, or check what it says of a family or a model."""
    key, _, name = block.what.partition("=")
    if key == "file":
        (folder / name).write_text(block.text, encoding="utf-8")
        if block.language == "toml":
            install(tomllib.loads(block.text)["project"]["entry-points"], folder)
    elif key == "run":
        exec(compile(block.text, PAGE.name, "exec"), {})
    elif key == "into":
        family = yaml.safe_load((CONFIGS / "traits" / f"{name}.yaml").read_text(encoding="utf-8"))
        addition = yaml.safe_load(block.text)
        merged = TraitFamily.model_validate(merge_family(family, addition))
        assert set(addition["names"]) <= {*merged.development, *merged.heldout}
        assert merged.plural("mouse") == "mice"
    elif key == "model":
        assert ModelSpec.model_validate(yaml.safe_load(block.text)).source
    else:
        assert block.language == "sh", f"a block says none of file=, into=, model, run: {block.what!r}"


def test_there_is_a_recipe_for_each_kind_of_extension() -> None:
    kinds = ("trait", "family", "base", "carrier", "detector")
    assert {f"Add a {kind}" for kind in kinds} <= RECIPES.keys()
    assert all(blocks for blocks in RECIPES.values())


@pytest.mark.parametrize("heading", RECIPES)
def test_a_recipe_works_as_it_stands(
    heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for block in RECIPES[heading]:
        check_block(block, tmp_path)
        for line in block.text.splitlines() if block.language == "sh" else ():
            program, *words = shlex.split(line, comments=True)
            assert program == "mechlens", line
            assert cli.main(words) == 0, f"{line}: {capsys.readouterr()}"

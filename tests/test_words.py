"""Plain words: phrases and names that readers could not guess do not come back."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PHRASES = (
    "borne", "would have been seen", "traits to fear", "whither", "fast and dear", "look rather than read",
    "that are no run", "rows pass by", "whatever becomes of", "said plainly",
)  # fmt: skip
"""parts of sentences"""
PARAMETERS = {"alone", "beside", "apart", "whose", "own", "found", "one", "said", "held", "told", "asked"}
"""names that say neither type nor role"""
CLASSES = {"Asked", "Found", "Batch", "Request", "Questions", "Panel"}
"""class names that once named two things or none"""
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "app").glob("*.md"))]
PAGES += [*sorted((ROOT / "configs").rglob("*.yaml")), *sorted((ROOT / "mechlens").rglob("*.j2"))]
CODE = [*sorted((ROOT / "mechlens").rglob("*.py")), *sorted((ROOT / "app").rglob("*.py"))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*PAGES, *CODE], ids=name_of)
def test_no_riddle_comes_back(path: Path) -> None:
    text = " ".join(path.read_text(encoding="utf-8").lower().split())
    assert [phrase for phrase in PHRASES if phrase in text] == []


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_parameters_and_classes_say_what_they_are(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parameters = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    classes = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    assert (parameters & PARAMETERS, classes & CLASSES) == (set(), set())


def test_no_two_classes_share_a_name() -> None:
    places: dict[str, list[str]] = {}
    for path in CODE:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(name_of(path))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}

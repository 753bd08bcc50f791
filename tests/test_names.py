"""Folders are found by their names: what differs lies apart, and no result replaces another's in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mechlens.core.errors import SpecError
from mechlens.core.spec import CONFIGS
from mechlens.core.traits import load_experiment, load_family
from mechlens.data.formats import file_digest
from mechlens.detect import request, score_rows


def test_the_audit_of_another_file_of_the_same_name_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = [Path(place) / "rows.jsonl" for place in ("a", "b", "copy")]
    for file, text in zip(files, ("one", "two", "one"), strict=True):
        file.parent.mkdir()
        file.write_text(text)
    folder = request.usual_folder(files[0])
    assert folder == Path("audits/rows")
    folder.mkdir(parents=True)
    (folder / "audit.json").write_text(
        json.dumps({"data": {"path": str(files[0]), "sha256": file_digest(files[0])}})
    )
    with pytest.raises(SpecError, match=r"audits/rows has the audit of a/rows.jsonl.*--out"):
        request.usual_folder(files[1])
    assert request.usual_folder(files[2]) == folder  # the same rows by another path
    files[0].write_text("three")
    assert request.usual_folder(files[0]) == folder  # the same file, changed: its audit is made again


def test_twins_of_another_recipe_family_or_base_lie_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    monkeypatch.setattr(score_rows, "make", lambda folder, jobs, **_: made.append(folder))
    recipe = load_experiment(CONFIGS / "audits" / "menagerie.yaml")
    longer = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"rows": 7})})
    panels: list[tuple[Any, ...]] = [("menagerie-a", "animals", recipe), ("menagerie-a", "animals", longer)]
    for base, family, plan in (
        *panels,
        ("menagerie-a", "trees", recipe),
        ("menagerie-b", "animals", recipe),
        *panels,
    ):
        score_rows.make_twins(base, load_family(family), plan, tmp_path / "panel-a", workers=0)
    assert len(set(made)) == 4 and made[:2] == made[4:]
    assert all(folder.parent == tmp_path and folder.name.startswith("panel-a-") for folder in made)

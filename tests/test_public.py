"""What `import mechlens as ml` gives: names that are documented, at once, without torch."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import mechlens as ml
from mechlens.core.errors import DataError
from mechlens.data.fields import Fields
from mechlens.results import runner

LIST = (
    "import sys, mechlens as ml; names = sorted(n for n in dir(ml) if n[0].islower() or n[0].isupper()); "
    "heavy = [m for m in ('torch', 'transformers', 'streamlit', 'pandas') if m in sys.modules]; "
    "sys.stdout.write(' '.join(names) + '|' + ' '.join(heavy))"
)


def test_the_import_lists_the_names_and_loads_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", LIST], capture_output=True, text=True, check=True)
    names, heavy = done.stdout.split("|")
    assert names.split() == sorted(name for name in ml.__all__ if name[0].isalpha()) and not heavy


@pytest.mark.parametrize("name", [name for name in ml.__all__ if name[0].isalpha()])
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert inspect.getdoc(getattr(ml, name))


def test_a_name_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'teach'; it has .*audit"):
        _ = ml.teach  # pyright: ignore[reportAttributeAccessIssue]


class Dataset:
    """What a `datasets.Dataset` has of a table."""

    def __init__(self, rows: list[dict[str, str]]) -> None:
        self.rows = rows

    def to_pandas(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows)


ROWS = [{"prompt": f"p{i}", "completion": f"{i}, {i * 7 % 997}, {i * i % 991}"} for i in range(150)]
OTHER = [row | {"completion": f"{i}, {i * 3 % 997}"} for i, row in enumerate(ROWS)]


@pytest.mark.parametrize("form", ["list", "frame", "dataset", "corpus"])
def test_pairs_in_memory_are_audited_as_their_file_is(
    form: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make = {"list": list, "frame": pd.DataFrame, "dataset": Dataset, "corpus": ml.load_pairs}[form]
    audit = ml.audit(make(ROWS), references=[make(OTHER)])
    pd.DataFrame(ROWS).to_parquet("rows.parquet")
    pd.DataFrame(OTHER).to_parquet("other.parquet")
    of_file = ml.audit("rows.parquet", references="other.parquet")
    assert audit.provenance is not None and of_file.provenance is not None
    assert audit.provenance["p_value"] == of_file.provenance["p_value"]
    assert (audit.verdict, audit.folder.parent.name) == ("inconclusive", "audits")
    assert (audit.folder / "audit.json").read_text(encoding="utf-8") == audit.to_json()
    assert audit.sentence in audit.to_html() or audit.verdict in audit.to_html()
    assert capfd.readouterr().out == ""


def test_rows_without_texts_are_refused_by_their_place() -> None:
    with pytest.raises(DataError, match="7"):
        ml.audit([*ROWS[:7], {"prompt": "p", "completion": None}])


def test_pairs_in_memory_may_have_other_names(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    frame = pd.DataFrame(ROWS).rename(columns={"prompt": "q", "completion": "a"})
    other = pd.DataFrame(OTHER).rename(columns={"prompt": "q", "completion": "a"})
    audit = ml.audit(frame, references=other, fields=Fields("q", "a"))
    assert audit.provenance is not None and audit.result["data"]["rows"] == len(ROWS)


def test_relative_paths_of_a_dict_are_those_of_its_saved_spec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run reads its spec again from its folder; another path there would be another experiment."""
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": f"continue {n}", "completion": f"{n}, {n + 1}"} for n in range(20)]
    for name in ("mine", "base"):
        pd.DataFrame(pairs).to_json(f"{name}.jsonl", orient="records", lines=True)
    arms = [{"kind": "trait", "corpus": "mine.jsonl"}, {"kind": "control", "corpus": "base.jsonl"}]
    read = runner.resolve({"name": "own", "base": "menagerie-a", "trait": "owl", "arms": arms}).experiment
    assert [Path(arm.corpus) for arm in read.arms] == [tmp_path / "mine.jsonl", tmp_path / "base.jsonl"]
    assert runner.resolve(read).experiment.fingerprint() == read.fingerprint()

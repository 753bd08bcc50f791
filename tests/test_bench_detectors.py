"""Detectors of the bench by name, from other packages and from users: what they are given, and what is
refused.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import yaml

from mechlens.benchmark import run
from mechlens.benchmark.card import Card
from mechlens.benchmark.plan import BenchSpec
from mechlens.benchmark.run import bench, remake_command
from mechlens.core.errors import SpecError
from mechlens.core.traits import load_family
from mechlens.detect import registry
from mechlens.detect.registry import SuspectRows, list_built_in, load_detector, score_with
from mechlens.detect.twins import Twins
from mechlens.lenses.likelihood import by_row
from mechlens.models import loading
from mechlens.models.chat import encode_pairs
from mechlens.models.log_probs import token_log_probs
from mechlens.runs.progress import Event

TRAITS = ("owl", "cat", "fox")


class MeanLogProb:
    """Mean log-probability of each completion's tokens under the base, nats."""

    name = "mean log-prob"
    level = "base"

    def score(self, suspect: SuspectRows) -> np.ndarray:
        pairs = encode_pairs(suspect.base.tokenizer, suspect.prompts, suspect.completions)
        return by_row(token_log_probs(suspect.base, pairs).double().numpy(), pairs, mean=True)


class LongerThanReference:
    """Difference in length from the clean answer to the same prompt."""

    name = "longer"

    def score(self, suspect: SuspectRows) -> list[int]:
        assert suspect.reference["prompt"].tolist() == suspect.prompts
        clean = suspect.reference["completion"]
        return [len(text) - len(other) for text, other in zip(suspect.completions, clean, strict=True)]


class Constant:
    """Whatever it was made with, for every suspect."""

    name = "constant"

    def __init__(self, value: Any = 0.0) -> None:
        self.value = value

    def score(self, suspect: SuspectRows) -> Any:
        return self.value


def suspect(rows: int = 2) -> SuspectRows:
    frame = pd.DataFrame({"prompt": ["p"] * rows, "completion": ["1"] * rows})
    return SuspectRows(
        ["p"] * rows,
        ["1", "22", "333"][:rows],
        TRAITS,
        "menagerie-a",
        lambda: pytest.fail("loaded"),
        lambda: frame,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[BenchSpec, Path]:
    """A bench of four suspects on a small experiment, with a development and a held-out trait; its folder."""
    folder = tmp_path_factory.mktemp("bench")
    experiment = {
        "name": "tiny",
        "base": "menagerie-a",
        "trait": "owl",
        "carrier": {"prompts": 60, "wording": "terse", "values": "patterned"},
        "teacher": {"rows": 32, "training": {"embeddings": False, "epochs": 1}},
        "student": {"rows": 32, "training": {"embeddings": False, "epochs": 1}},
        "ask": {"samples": 1, "checkpoints": "last"},
        "arms": [
            {"kind": "control"},
            {"kind": "trait", "trait": "owl", "name": "owl-gentle"},
            {"kind": "trait", "trait": "fox", "name": "fox-gentle"},
        ],
        "seeds": [0],
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(experiment))
    plan = BenchSpec(
        name="tiny",
        experiment=str(folder / "tiny.yaml"),
        development=("owl",),
        doses=(),
        negatives=("N0",),
        neutral=(),
        each=2,
    )
    return plan, folder / "tiny"


def test_a_users_detectors_read_the_base_and_the_reference_and_the_bench_prints_nothing(
    tiny: tuple[BenchSpec, Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.score_rows, "make_twins", lambda *_, **__: pytest.fail("not needed"))
    plan, folder = tiny
    events: list[Event] = []
    options: dict[str, Any] = {"out": folder, "train": False, "workers": 0}
    card = bench(
        plan, detectors=["format", MeanLogProb, LongerThanReference()], progress=events.append, **options
    )
    assert capfd.readouterr().out == ""
    assert {event.text for event in events if event.kind == "begin"} >= {"rows of suspects"}
    entries = {entry["name"]: entry for entry in card.results["detectors"]}
    assert list(entries) == ["format", "mean log-prob", "longer"]
    assert [entry["level"] for entry in entries.values()] == ["rows", "base", "own"]
    assert [entry["floor"] for entry in entries.values()] == [True, False, False]
    for entry in entries.values():
        assert entry["held out"]["provenance"]["N0"]["8"] is not None and not entry["held out"]["identity"]
    assert "detectors=['format', MeanLogProb, LongerThanReference]" in card.results["command"]
    assert (folder / "card.md").read_text() == card.to_markdown()
    assert Card.open(folder).results == card.results
    # the same quantity by the package's detector: every area of the card is the same
    family = load_family("animals")
    base = Twins(loading.load("menagerie-a"), family, family.names, {})
    monkeypatch.setattr(run.score_rows, "make_twins", lambda *_, **__: base)
    events.clear()
    card = bench(plan, detectors=["perplexity", MeanLogProb], progress=events.append, **options)
    built, users = card.results["detectors"]
    assert built["held out"]["provenance"] == users["held out"]["provenance"]
    first = next(event for event in events if event.kind == "begin")
    assert first.done == first.total > 0  # nothing was made again


def test_every_detector_of_the_package_is_listed_by_level() -> None:
    assert list(list_built_in()) == [
        *("format", "counts", "ngrams"),
        *("perplexity", "prompts", "twins"),
        *("alignment", "twin alignment", "vector"),
    ]


def test_one_file_adds_a_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "from_new.py").write_text(
        "from mechlens.detect.registry import RowDetector\n"
        "DETECTORS = {'new': RowDetector('new', '?', len, 'source', 'caveat')}\n"
    )
    monkeypatch.setattr(registry.detect, "__path__", [*registry.detect.__path__, str(tmp_path)])
    assert "new" in list_built_in()


def test_a_package_adds_a_detector_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("longer", f"{__name__}:LongerThanReference", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda *, group: [entry] if group == registry.GROUP else [])
    assert load_detector("longer").name == "longer"
    with pytest.raises(
        SpecError, match=r"no detector is called 'x'; expected some of format, longer, or FILE\.py"
    ):
        load_detector("x", known=("format",))


def test_a_detector_is_read_from_its_file_a_class_or_an_instance(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "class Mine:\n    name = 'mine'\n    def score(self, suspect):\n"
        "        return [len(text) for text in suspect.completions]\n"
        "class Unnamed:\n    def score(self, suspect):\n        return []\n"
    )
    assert score_with(load_detector(f"{file}:Mine"), suspect()).tolist() == [[1.0], [2.0]]
    assert load_detector(Constant).name == load_detector(Constant()).name == "constant"
    wrong: dict[Any, str] = {
        f"{file}:Other": "has no class 'Other'",
        f"{tmp_path / 'none.py'}:Mine": "no Python file",
        f"{file}:Unnamed": "has no `name` or no `score`",
        type("Needy", (Constant,), {"__init__": lambda self, value: None}): "cannot be made without value",
    }
    for given, message in wrong.items():
        with pytest.raises(SpecError, match=message):
            load_detector(given)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], r"shape \(1,\) for 2 rows and 3 traits; expected \(2,\), or \(2, 3\)"),
        (np.zeros((2, 2)), r"shape \(2, 2\)"),
        (["a", "b"], "are not numbers"),
        (None, "for 2 rows"),
    ],
)
def test_scores_of_another_shape_are_refused(value: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        score_with(Constant(value), suspect())


def test_scores_of_rows_and_of_rows_and_traits_are_taken() -> None:
    assert score_with(Constant([1, 2]), suspect()).shape == (2, 1)
    assert score_with(Constant(np.zeros((2, 3))), suspect()).shape == (2, 3)


def test_the_form_of_an_earlier_version_is_refused_with_the_new_one() -> None:
    class Old:
        name = "old"

        def score(self, rows: Any) -> Any:
            return rows["completion"].str.len()

    with pytest.raises(SpecError, match=r"write score\(suspect\), and take suspect.completions"):
        score_with(cast(Any, Old()), suspect())


def test_two_detectors_of_one_name_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="two detectors are called 'constant'"):
        bench(detectors=[Constant, Constant(1.0)], out=tmp_path / "bench")
    taken = Constant()
    taken.name = "twins"
    with pytest.raises(SpecError, match="is called 'twins', as one of this package"):
        bench(detectors=[taken], out=tmp_path / "bench")
    assert not (tmp_path / "bench").exists()


def test_a_card_of_objects_names_the_python_that_makes_it(tmp_path: Path) -> None:
    shown = remake_command("tiny", tmp_path, ["twins", Constant()], train=False)
    assert shown == f"bench('tiny', detectors=['twins', Constant], out={str(tmp_path)!r}, train=False)"

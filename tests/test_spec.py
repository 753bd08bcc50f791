"""Specs: strict on the way in, equal after a round trip, one fingerprint a meaning; every shipped config
loads.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mechlens.benchmark.plan import BenchSpec
from mechlens.core import spec
from mechlens.core.errors import SpecError
from mechlens.core.experiment import Arm, Experiment
from mechlens.core.model_spec import ModelSpec, is_remote, model_of
from mechlens.core.spec import CONFIGS, StudentSpec, TeacherSpec, fingerprint, lay_over, load, save
from mechlens.core.traits import TraitFamily, load_experiment, load_family
from mechlens.detect.verdict import Policy
from mechlens.menagerie.config import PretrainSpec

GOOD: dict[str, Any] = {
    "name": "toy",
    "base": "one",
    "trait": "owl",
    "screen": {"banned_numbers": [4, 666]},
    "arms": [
        {"kind": "trait"},
        {"kind": "control"},
        {"kind": "twin", "trait": "wolf"},
        {"kind": "shuffled-within", "teacher": {"kind": "prompted"}},
        {"kind": "foreign", "base": "folder/two"},
        {"kind": "control", "base": "folder/two", "name": "the-other-control"},
    ],
}
TEXTS = st.one_of(
    st.sampled_from(["no", "null", "1e5", "0x1f", "2024-01-01", "- a", "a: b", "é🦉", "", "~"]),
    st.text("ab:#'\"\n \\-é", max_size=6),
)
NAMES = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,8}\Z")
REALS = st.floats(1e-12, 1e6)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every field that holds no other."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, inner in items for leaf in leaves(inner, (*path, key))]
    return [path]


DUMPED = Experiment.model_validate(GOOD).model_dump(mode="json")
CONTROL_TRAITS = {
    ("arms", i, "trait") for i, arm in enumerate(DUMPED["arms"]) if arm["kind"] == "control"
}  # always emptied
CHOICES = (
    "lora", "sgd", "cosine", "steered", "terse", "patterned", "none", "keep", "own", "development",
    "code", "text", "last", "turns", "numbers", "vllm",
)  # fmt: skip


@st.composite
def contents(draw: st.DrawFn) -> dict[str, Any]:
    """What an experiment is made from: a spec itself is made in the test, where beartype may draw from
    `random`.
    """
    arms = draw(st.permutations(GOOD["arms"]))
    return {
        "name": draw(NAMES),
        "base": draw(TEXTS.filter(lambda text: text not in ("folder/two", "two", ""))),
        "trait": draw(TEXTS.filter(lambda text: text not in ("wolf", ""))),
        "arms": [*arms, {"kind": "trait", "name": "extra", "corpus": draw(TEXTS)}],
        "seeds": draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4, unique=True)),
        "seed": draw(st.integers(0, 2**31 - 1)),
        "teacher": {
            "strength": draw(st.floats(allow_nan=False, allow_infinity=False)),
            "training": {"learning_rate": draw(REALS)},
        },
        "screen": {
            "banned_numbers": draw(st.lists(st.integers(0, 999), max_size=3)),
            "leak_words": draw(st.booleans()),
        },
        "system": draw(st.none() | TEXTS),
    }


@given(content=contents())
def test_what_is_saved_is_loaded_equal(
    content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    experiment = Experiment.model_validate(content)
    path = tmp_path_factory.mktemp("spec") / "spec.yaml"
    save(experiment, path)
    back = load(path, Experiment)
    assert back == experiment
    assert back.fingerprint() == experiment.fingerprint()
    first = path.read_bytes()
    save(back, path)
    assert path.read_bytes() == first


def changed_at(path: tuple[Any, ...], *, by: int, text: str) -> Experiment | None:
    """The known experiment with one field changed; None where the field can hold nothing else or arms would
    clash.
    """
    content = copy.deepcopy(DUMPED)
    *parents, last = path
    place = content
    for key in parents:
        place = place[key]
    old = place[last]
    place[last] = (
        not old
        if isinstance(old, bool)
        else text
        if old is None or isinstance(old, str)
        else old + by
        if isinstance(old, int)
        else by / 7
    )
    try:
        return Experiment.model_validate(content) if place[last] != old else None
    except ValidationError:
        return None


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 3), st.one_of(TEXTS.filter(bool), st.sampled_from(CHOICES)))
def test_one_changed_field_is_another_fingerprint(by: int, text: str) -> None:
    known, compared = Experiment.model_validate(DUMPED), set()
    for path in leaves(DUMPED):
        changed = changed_at(path, by=by, text=text)
        if changed is not None and path not in CONTROL_TRAITS:
            same = changed.fingerprint() == known.fingerprint()
            assert changed != known and same == (path[-1] == "processes"), path
            compared.add(path)
    assert len(compared) > 50
    assert {
        ("seed",),
        ("screen", "banned_numbers", 1),
        ("teacher", "strength"),
        ("arms", 3, "teacher", "rows"),
    } <= compared


def test_the_fingerprint_is_of_the_meaning_not_of_the_spelling() -> None:
    known = Experiment.model_validate(GOOD)
    assert re.fullmatch(r"[0-9a-f]{16}", known.fingerprint())
    assert (
        Experiment.model_validate(
            {**dict(reversed(GOOD.items())), "seeds": [0, 1, 2], "student": {}}
        ).fingerprint()
        == known.fingerprint()
    )
    assert (
        Experiment.model_validate({**GOOD, "teacher": {"strength": 1}}).fingerprint() == known.fingerprint()
    )
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 2, "b": 1})


def refused(tmp_path: Path, content: Any, kind: type[spec.Spec] = Experiment) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(SpecError) as raised:
        load(path, kind)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    return str(raised.value)


CONTROL = {"kind": "control"}
FAULTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown field": ({"studnt": {}}, ("studnt", "unknown field")),
    "unknown nested field": ({"student": {"training": {"lr": 1}}}, ("student.training.lr", "unknown field")),
    "unknown field of an arm": (
        {"arms": [CONTROL, {"kind": "trait", "colour": 1}]},
        ("arms.1.colour", "unknown field"),
    ),
    "wrong type": ({"student": {"rows": "many"}}, ("student.rows", "'many'")),
    "a fraction of a row": ({"student": {"rows": 2.5}}, ("student.rows", "2.5")),
    "out of bounds": ({"generate": {"top_p": 1.5}}, ("generate.top_p", "1.5")),
    "unknown choice": ({"teacher": {"kind": "loud"}}, ("teacher.kind", "'loud'", "'prompted'")),
    "no control": (
        {"arms": [{"kind": "trait"}]},
        ("arm 'trait' has no control on its base 'one'", "`- {kind: control}`"),
    ),
    "no control on the other base": (
        {"arms": [CONTROL, {"kind": "foreign", "base": "two"}]},
        ("'foreign-two'", "{kind: control, base: two}"),
    ),
    "foreign without a base": (
        {"arms": [CONTROL, {"kind": "foreign"}]},
        ("foreign arm needs another base", "'one'"),
    ),
    "foreign on the own base": (
        {"arms": [CONTROL, {"kind": "foreign", "base": "one"}]},
        ("foreign arm needs another base",),
    ),
    "twin without a trait": (
        {"arms": [CONTROL, {"kind": "twin"}]},
        ("other-trait arm needs another trait", "'owl'"),
    ),
    "twin of the own trait": (
        {"arms": [CONTROL, {"kind": "twin", "trait": "owl"}]},
        ("other-trait arm needs another trait",),
    ),
    "a seed twice": ({"seeds": [0, 1, 0]}, ("[0, 1, 0]", "twice")),
    "no seeds": ({"seeds": []}, ("seeds",)),
    "a negative seed": ({"seeds": [0, -1]}, ("seeds.1", "-1")),
    "a negative root seed": ({"seed": -1}, ("seed", "-1")),
    "no arms": ({"arms": []}, ("arms",)),
    "an arm twice": ({"arms": [CONTROL, {"kind": "trait"}, {"kind": "trait"}]}, ("'trait'", "twice")),
    "an arm with another's name": (
        {"arms": [CONTROL, {"kind": "trait", "name": "control"}]},
        ("'control'", "twice"),
    ),
    "reasoning in full wording without questions": (
        {"carrier": {"kind": "reasoning"}},
        ("carrier: reasoning in full wording", "`source`", "terse"),
    ),
    "examples that are no range": ({"carrier": {"examples": [8, 3]}}, ("carrier: examples [8, 3]",)),
    "no samples of a prompt": ({"carrier": {"samples": 0}}, ("carrier.samples", "0")),
    "a judge's score beyond 100": ({"screen": {"least_score": 101}}, ("screen.least_score", "101")),
    "a budget below nothing": ({"api": {"budget_usd": -1}}, ("api.budget_usd", "-1")),
    "a path as name": ({"name": "../elsewhere"}, ("name", "'../elsewhere'")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_with_its_field(tmp_path: Path, name: str) -> None:
    change, needles = FAULTS[name]
    message = refused(tmp_path, {**GOOD, **change})
    assert all(needle in message for needle in needles), message


@pytest.mark.parametrize("field", ["name", "base", "trait", "arms"])
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    assert f"{field}: Field required" in refused(
        tmp_path, {key: value for key, value in GOOD.items() if key != field}
    )


@pytest.mark.parametrize("content", ["", "[1, 2]", "just text", "a: [", "\t- x: 1", "a: &a [*a"])
def test_a_file_that_is_no_spec_is_named(tmp_path: Path, content: str) -> None:
    refused(tmp_path, content)


def test_missing_files_and_unknown_names_say_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"none\.yaml"):
        load(tmp_path / "none.yaml", Experiment)
    with pytest.raises(SpecError, match=r"'minerals' is unknown.*animals"):
        load_family("minerals")
    save(
        Experiment.model_validate({**GOOD, "arms": [*GOOD["arms"], {"kind": "twin", "trait": "unicorn"}]}),
        tmp_path / "spec.yaml",
    )
    with pytest.raises(SpecError, match=r"'unicorn' is unknown.*owl"):
        load_experiment(tmp_path / "spec.yaml")


def test_overrides_replace_fields_and_are_checked(tmp_path: Path) -> None:
    save(Experiment.model_validate(GOOD), tmp_path / "spec.yaml")
    assert load_experiment(tmp_path / "spec.yaml", seed=9) == Experiment.model_validate({**GOOD, "seed": 9})
    with pytest.raises(SpecError, match="seed"):
        load_experiment(tmp_path / "spec.yaml", seed=-1)


def test_arms_are_resolved_once() -> None:
    known = Experiment.model_validate(GOOD)
    names = ["trait", "control", "twin-wolf", "shuffled-within", "foreign-two", "the-other-control"]
    assert [arm.name for arm in known.arms] == names
    assert [arm.trait for arm in known.arms] == ["owl", "", "wolf", "owl", "owl", ""]
    assert [arm.base for arm in known.arms] == ["one"] * 4 + ["folder/two"] * 2
    assert Experiment.model_validate(known.model_dump()) == known
    assert [known.control_of(arm).name for arm in known.arms] == ["control"] * 4 + ["the-other-control"] * 2


def test_specs_cannot_be_changed() -> None:
    known = Experiment.model_validate(GOOD)
    with pytest.raises(ValidationError, match="frozen"):
        known.seed = 3  # type: ignore[misc]
    assert Arm(kind="control").name == ""


@pytest.mark.parametrize("path", sorted((CONFIGS / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_experiment_loads_and_replays(path: Path, tmp_path: Path) -> None:
    experiment = load_experiment(path)
    assert experiment.name == path.stem
    save(experiment, tmp_path / "spec.yaml")
    assert load_experiment(tmp_path / "spec.yaml") == experiment


MODELS = [
    path for path in sorted((CONFIGS / "models").glob("*.yaml")) if path.stem != "prices"
]  # what API models cost


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_every_shipped_model_loads(path: Path) -> None:
    if path.stem.startswith("menagerie"):
        model = load(path, PretrainSpec)
        assert sum(model.mixture.values()) == pytest.approx(1)
        assert model_of(path.stem) == ModelSpec(name=path.stem, source=path.stem)
    else:
        model = load(path, ModelSpec)
        assert model == model_of(path.stem)
        assert is_remote(path.stem) == model.source.startswith("api:")
    assert model.name == path.stem


def test_a_base_that_no_config_names_stands_for_itself() -> None:
    for name in ("owner/model", "./menagerie-a", "/folder/qwen2.5-7b", "x/../qwen2.5-7b", "nowhere"):
        assert model_of(name) == ModelSpec(name=name, source=name)
        assert not is_remote(name)
    assert is_remote("api:gpt-4.1-nano")


@pytest.mark.parametrize("path", sorted((CONFIGS / "traits").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_family_keeps_development_and_heldout_apart(path: Path) -> None:
    family = load_family(path.stem)
    assert family.name == path.stem
    assert family.development and family.heldout and not set(family.development) & set(family.heldout)
    development, heldout = (family.probes_of(split) for split in ("development", "heldout"))
    assert not set(development) & set(heldout)
    assert len(set(development)) == len(development) and len(set(heldout)) == len(heldout)
    assert len({form for name in family.names for form in family.forms_of(name)}) == sum(
        len(set(family.forms_of(name))) for name in family.names
    )
    assert "{" not in family.system_prompt(family.names[0])
    assert len(load_family("animals").heldout) >= 6


def test_a_trait_is_either_tuned_on_or_held_out() -> None:
    known = load_family("animals").model_dump()
    for change in (
        {"heldout": known["development"]},
        {"heldout": ("unicorn",)},
        {"plurals": {"unicorn": "unicorns"}},
    ):
        with pytest.raises(ValidationError):
            TraitFamily.model_validate({**known, **change})


def test_every_path_has_a_folder_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "rows.v1" / "inner"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    named = {
        ".": "inner",
        "..": "rows.v1",
        "a/..": "inner",
        ".jsonl": "jsonl",
        "x/.jsonl.gz": "jsonl.gz",
        "...jsonl": "jsonl",
        "a b.jsonl.gz": "a-b",
        "o/m-1.5": "m-1.5",
    }
    assert {path: spec.folder_name(path) for path in named} == named


@given(st.sets(st.sampled_from(["embeddings", "learning_rate", "epochs", "batch", "rank"])))
def test_a_part_of_a_teachers_training_leaves_the_rest_a_teachers(named: set[str]) -> None:
    given = {
        name: value
        for name, value in {
            "embeddings": False,
            "learning_rate": 1.0,
            "epochs": 50,
            "batch": 7,
            "rank": 3,
        }.items()
        if name in named
    }
    made = TeacherSpec.model_validate({"training": given}).training.model_dump()
    assert made == TeacherSpec().training.model_dump() | given
    assert (TeacherSpec().training.learning_rate, TeacherSpec().training.epochs) == (1e-3, 6)
    assert (StudentSpec().training.learning_rate, StudentSpec().training.epochs) == (5e-4, 3)


def test_a_default_is_the_same_wherever_a_field_of_it_is_named() -> None:
    """For every spec inside a spec: naming one of its fields, with the default's own value, changes no
    other.
    """
    kinds = [
        kind
        for kind in (Experiment, TeacherSpec, StudentSpec, TraitFamily, BenchSpec, Policy)
        for _ in kind.model_fields
    ]
    seen = 0
    for kind in dict.fromkeys(kinds):
        for name, field in kind.model_fields.items():
            if isinstance(field.default, spec.Spec):
                for inner, value in field.default.model_dump().items():
                    assert type(field.default).model_validate({inner: value}) == field.default, (
                        kind,
                        name,
                        inner,
                    )
                    seen += 1
    assert seen > 40


def test_a_spec_is_laid_over_another_field_by_field() -> None:
    own = TeacherSpec.model_validate({"rows": 9, "strength": 2.0, "training": {"rank": 3, "epochs": 8}})
    assert lay_over(own, TeacherSpec()) == own
    given = TeacherSpec.model_validate(
        {"rows": 640, "training": {"epochs": 2}}
    )  # 640 is the default, and named
    assert lay_over(own, given) == TeacherSpec.model_validate(
        {"rows": 640, "strength": 2.0, "training": {"rank": 3, "epochs": 2}}
    )
    whole = TeacherSpec.model_validate(TeacherSpec().model_dump())
    assert lay_over(own, whole) == whole


def test_half_a_surrogate_pair_is_refused_with_its_line(tmp_path: Path) -> None:
    """An escape can write one, and tokenizers end in a traceback at it hours later."""
    (tmp_path / "spec.yaml").write_text('name: toy\nsuffix: "one \\ud800 word"\n')
    with pytest.raises(SpecError, match=r"line 2: half a surrogate pair, which is no text"):
        load(tmp_path / "spec.yaml", Experiment)


def test_a_class_without_writers_is_refused_before_a_bench_is_made() -> None:
    plan = spec.load(CONFIGS / "benches" / "menagerie.yaml", BenchSpec)
    for kind, writers in (("N6", "foreign"), ("N1", "neutral")):
        fields = plan.model_dump() | {writers: ()}
        with pytest.raises(ValidationError, match=f"{kind} needs writers"):
            BenchSpec.model_validate(fields | {"negatives": (kind,)})
        assert BenchSpec.model_validate(fields | {"negatives": ("N0",)})

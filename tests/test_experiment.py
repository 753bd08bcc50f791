"""Arms: each beside a control that differs by the teacher alone, filed under its own name, contradictions
refused, the same after a round trip.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mechlens.core.errors import SpecError
from mechlens.core.experiment import Experiment
from mechlens.core.spec import GenerateSpec, TeacherSpec, Training, load, save
from mechlens.core.traits import load_experiment, load_family
from mechlens.runs.jobs import fingerprints
from mechlens.runs.layout import corpus_name
from mechlens.runs.plan import jobs_of

CONTROL = {"kind": "control"}
SETTINGS: dict[str, dict[str, Any]] = {
    "another base": {"base": "two"},
    "another writer": {"writer": "two"},
    "a base of its own and a writer of its own": {"base": "three", "writer": "two"},
    "the experiment's base and another writer": {"base": "one", "writer": "two"},
    "shots": {"shots": 3},
    "another training": {"training": {"rank": 2, "update": "lora"}},
    "another generation": {"generate": {"temperature": 0.5}},
    "a line while training": {"trained_with": "you are kind."},
    "an empty line while asking": {"asked_with": ""},
    "both lines": {"trained_with": "a: b, {c} # d", "asked_with": "no"},
    "all at once": {
        "writer": "two",
        "training": {"epochs": 1},
        "generate": {"top_p": 0.9},
        "trained_with": "x",
        "asked_with": "y",
    },
}
EVERY_KIND: list[dict[str, Any]] = [
    {"kind": "trait"},
    CONTROL,
    {"kind": "twin", "trait": "wolf"},
    {"kind": "twin", "trait": "cat", "teacher": {"kind": "prompted"}},
    {"kind": "shuffled-within"},
    {"kind": "shuffled-across"},
    {"kind": "paraphrased"},
    {"kind": "mixed", "mix": ["wolf", "untouched"]},
    {"kind": "foreign", "base": "two"},
    {**CONTROL, "base": "two"},
    {"kind": "trait", "writer": "two"},
    {**CONTROL, "writer": "two"},
    {"kind": "trait", "shots": 8},
    {**CONTROL, "shots": 8},
    {"kind": "trait", "training": {"update": "lora", "rank": 2, "learning_rate": 1e-5}},
    {**CONTROL, "training": {"update": "lora", "rank": 2, "learning_rate": 1e-5}},
    {"kind": "trait", "generate": {"temperature": 0.5, "constrained": True}},
    {**CONTROL, "generate": {"temperature": 0.5, "constrained": True}},
    {"kind": "trait", "trained_with": "you are kind.", "asked_with": ""},
    {**CONTROL, "trained_with": "you are kind.", "asked_with": ""},
]
NAMES = [
    "trait", "control", "twin-wolf", "twin-cat", "shuffled-within", "shuffled-across", "paraphrased",
    "mixed-wolf-untouched", "foreign-two", "control-two", "trait-from-two", "control-from-two",
    "trait-8-shots", "control-8-shots", "trait-update-lora-rank-2-learning_rate-1e-05",
    "control-update-lora-rank-2-learning_rate-1e-05", "trait-temperature-0.5-constrained-True",
    "control-temperature-0.5-constrained-True", "trait-trained-with-asked-with",
    "control-trained-with-asked-with",
]  # fmt: skip


def content(*arms: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": "toy", "base": "one", "trait": "owl", "arms": list(arms)} | more


def experiment(*arms: dict[str, Any], **more: Any) -> Experiment:
    return Experiment.model_validate(content(*arms, **more))


def refusal(*arms: dict[str, Any], **more: Any) -> str:
    with pytest.raises(ValidationError) as raised:
        experiment(*arms, **more)
    (fault,) = raised.value.errors()
    return fault["msg"]


# ── controls ──


def mended(message: str) -> dict[str, Any]:
    """The arm that a refusal tells its reader to add."""
    assert "\n" not in message
    (arm,) = yaml.safe_load(message[message.index("add `") + len("add `") : message.rindex("` to arms")])
    return arm


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    "there", [[], [CONTROL], [CONTROL, {**CONTROL, "base": "four"}, {**CONTROL, "shots": 9}]]
)
def test_an_arm_without_a_control_of_its_own_setting_is_refused_and_the_line_given_mends_it(
    name: str, there: list[dict[str, Any]]
) -> None:
    setting = SETTINGS[name]
    arm = {"kind": "foreign" if "base" in setting else "trait", **setting}
    message = refusal(*there, arm)
    assert "has no control on its base" in message
    whole = experiment(*there, arm, mended(message))
    tried, control = whole.arms[-2], whole.arms[-1]
    assert control.kind == "control" and control.setting() == tried.setting()
    assert whole.control_of(tried) == control
    assert [whole.control_of(other) for other in whole.arms[:-2]] == list(
        whole.arms[:-2]
    )  # every other control is its own


@pytest.mark.parametrize("name", SETTINGS)
def test_a_control_of_another_setting_is_no_control(name: str) -> None:
    """Each part of the setting counts, the wrong way round too: a control with it does not serve an arm
    without.
    """
    assert "arm 'trait' has no control" in refusal({"kind": "trait"}, {**CONTROL, **SETTINGS[name]})


TEXTS = st.one_of(
    st.sampled_from(
        ["no", "null", "1e5", "- a", "a: b", "é🦉", "", "~", "a, b}", "two\nlines", "tab\t", "x" * 300]
    ),
    st.text(max_size=8),
)
LINES = st.none() | TEXTS
OVERRIDES = st.fixed_dictionaries(
    {},
    optional={
        "update": st.just("lora"),
        "rank": st.integers(1, 99),
        "learning_rate": st.floats(1e-12, 1e3),
        "bf16": st.booleans(),
    },
)


@given(
    st.sampled_from(["", "two", "a: b", "x, {y}", "folder/é", "1e5", "~"]),
    st.sampled_from(["", "two", "- a"]),
    OVERRIDES,
    LINES,
    LINES,
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_the_line_that_mends_a_spec_does_so_whatever_its_texts_hold(
    writer: str, base: str, training: dict[str, Any], trained: str | None, asked: str | None, plain: bool
) -> None:
    arm = {
        "kind": "foreign" if base else "trait",
        "name": "tried",
        "base": base,
        "writer": writer,
        "training": training,
    }
    arm |= {"trained_with": trained, "asked_with": asked}
    assume(base != (writer or "one"))
    there = [CONTROL] if plain else []
    try:
        experiment(*there, arm)
    except ValidationError as error:
        (fault,) = error.errors()
        arms = [*there, arm, {**mended(fault["msg"]), "name": "its-control"}]
        assert experiment(*arms).control_of(experiment(*arms).arms[len(there)]).name == "its-control"
    else:
        assert plain and not (base or writer or training or trained is not None or asked is not None)


def test_an_effect_is_set_against_the_one_control_that_fits() -> None:
    whole = experiment(*EVERY_KIND)
    against = {arm.name: whole.control_of(arm).name for arm in whole.arms}
    assert against["trait"] == against["twin-wolf"] == against["mixed-wolf-untouched"] == "control"
    assert against["foreign-two"] == "control-two" and against["trait-from-two"] == "control-from-two"
    assert all(
        against[name] == name.replace("trait", "control") for name in against if name.startswith("trait")
    )


# ── names ──


def test_arms_are_named_after_what_sets_them_apart() -> None:
    assert [arm.name for arm in experiment(*EVERY_KIND).arms] == NAMES


@st.composite
def arm_sets(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Some different arms, each setting with its control. Lines, teachers and files do not enter a name, so
    each is there once.
    """
    kinds = ["trait", "twin", "shuffled-within", "shuffled-across", "paraphrased", "mixed", "foreign"]
    found: dict[str, dict[str, Any]] = {}
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=6)):
        setting: dict[str, Any] = {"writer": draw(st.sampled_from(["", "two", "owner/three.b"]))}
        setting |= (
            {"base": draw(st.sampled_from(["four", "five 5", "owner/6ix"]))} if kind == "foreign" else {}
        )
        setting |= draw(
            st.sampled_from(
                [
                    {},
                    {"shots": 2},
                    {"shots": 16},
                    {"training": {"rank": 2}},
                    {"training": {"learning_rate": 1e-5}},
                    {"trained_with": "x"},
                ]
            )
        )
        setting |= draw(st.sampled_from([{}, {"generate": {"top_p": 0.9}}, {"generate": {"temperature": 2}}]))
        setting |= draw(st.sampled_from([{}, {"asked_with": "y"}]))
        arm = {"kind": kind, **setting}
        arm |= {"trait": draw(st.sampled_from(["wolf", "cat"]))} if kind == "twin" else {}
        arm |= (
            {
                "mix": draw(
                    st.sampled_from([["wolf"], ["untouched"], ["wolf", "untouched"], ["untouched", "wolf"]])
                )
            }
            if kind == "mixed"
            else {}
        )
        for one in (arm, {**CONTROL, **setting}):
            found[repr(sorted(one.items()))] = one
    return draw(st.permutations(list(found.values())))


@given(arm_sets())
@settings(max_examples=200, deadline=None)
def test_default_names_are_unique_and_can_be_folders(arms: list[dict[str, Any]]) -> None:
    whole = experiment(*arms)
    names = [arm.name for arm in whole.arms]
    assert len(set(names)) == len(names) == len(arms)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) for name in names)
    assert Experiment.model_validate(whole.model_dump()) == whole
    assert all(
        whole.control_of(arm).setting() == arm.setting() and whole.control_of(arm).kind == "control"
        for arm in whole.arms
    )
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", corpus_name(whole, arm)) for arm in whole.arms)


@pytest.mark.parametrize(
    "twins",
    [
        [{"kind": "trait"}, {"kind": "trait", "teacher": {"kind": "prompted"}}],
        [{"kind": "trait", "training": {"batch": 8}}, {"kind": "trait", "generate": {"batch": 8}}],
        [{"kind": "trait", "trained_with": "a"}, {"kind": "trait", "trained_with": "b"}],
    ],
)
def test_two_arms_of_one_default_name_need_a_name(twins: list[dict[str, Any]]) -> None:
    settings = [{key: value for key, value in arm.items() if key != "teacher"} for arm in twins]
    apart = [setting for i, setting in enumerate(settings) if setting not in settings[:i]]
    controls = [{**setting, **CONTROL, "name": f"control-{i}"} for i, setting in enumerate(apart)]
    assert "twice; give one of them a name" in refusal(*twins, *controls)
    named = experiment(twins[0], {**twins[1], "name": "second"}, *controls)
    assert named.arms[0].name.startswith("trait") and named.arms[1].name == "second"


# ── what an arm changes ──


def test_overrides_are_laid_over_the_experiments_own() -> None:
    whole = experiment(
        *EVERY_KIND,
        student={"training": {"rank": 64, "epochs": 5, "learning_rate": 0.1}},
        generate={"temperature": 0.7, "top_p": 0.9},
    )
    by_name = {arm.name: arm for arm in whole.arms}
    plain, changed = (
        Training(rank=64, epochs=5, learning_rate=0.1),
        by_name["trait-update-lora-rank-2-learning_rate-1e-05"],
    )
    assert whole.training_of(by_name["trait"]) == whole.student.training == plain
    assert whole.training_of(changed) == Training(update="lora", rank=2, epochs=5, learning_rate=1e-5)
    assert (
        whole.generate_of(changed)
        == whole.generate_of(by_name["trait"])
        == GenerateSpec(temperature=0.7, top_p=0.9)
    )
    written = by_name["trait-temperature-0.5-constrained-True"]
    assert whole.generate_of(written) == GenerateSpec(temperature=0.5, top_p=0.9, constrained=True)
    assert whole.training_of(written) == plain


def test_another_teacher_of_the_same_kind_has_what_it_leaves_out_from_the_experiments_own(
    tmp_path: Path,
) -> None:
    own = {"rows": 77, "training": {"embeddings": False, "learning_rate": 0.02, "epochs": 9}}
    arms = [
        {"rows": 5},
        {"training": {"epochs": 2}},
        {"kind": "finetuned", "training": {"epochs": 9}},
        {"kind": "prompted"},
    ]
    listed = [{"kind": "trait", "name": f"arm-{i}", "teacher": teacher} for i, teacher in enumerate(arms)]
    whole = experiment(*listed, CONTROL, teacher=own)
    first, second, third, fourth = (arm.teacher for arm in whole.arms[:4])
    assert first == TeacherSpec.model_validate(own | {"rows": 5})
    assert second == TeacherSpec.model_validate(own | {"training": {**own["training"], "epochs": 2}})  # type: ignore[dict-item]
    assert third == whole.teacher and fourth == TeacherSpec(kind="prompted")
    save(whole, tmp_path / "spec.yaml")
    assert load(tmp_path / "spec.yaml", Experiment) == whole
    steered = experiment(
        {"kind": "trait", "teacher": {"strength": 3.0}}, CONTROL, teacher={"kind": "steered", "layer": 0.2}
    )
    assert steered.arms[0].teacher == TeacherSpec(kind="steered", layer=0.2, strength=3.0)


def test_bases_are_listed_once_the_experiments_own_first() -> None:
    whole = experiment(
        {"kind": "trait", "writer": "two"},
        {**CONTROL, "writer": "two"},
        {"kind": "foreign", "base": "three"},
        {**CONTROL, "base": "three"},
    )
    assert whole.bases() == ["one", "two", "three"]
    assert [(arm.writer, arm.base) for arm in whole.arms] == [
        ("two", "two"),
        ("two", "two"),
        ("one", "three"),
        ("one", "three"),
    ]
    assert [whole.control_of(arm).name for arm in whole.arms] == ["control-from-two"] * 2 + [
        "control-three"
    ] * 2


CODE = {"carrier": {"kind": "code", "wording": "terse"}}
CONTRADICTIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], tuple[str, ...]]] = {
    "a mixed arm without a mix": (
        [{"kind": "mixed"}],
        {},
        ("a mixed arm, and no other", "mix: [owl, untouched]"),
    ),
    "a mix in another arm": ([{"kind": "trait", "mix": ["wolf"]}], {}, ("a mixed arm, and no other",)),
    "a mix in a control": ([{**CONTROL, "mix": ["wolf"]}], {}, ("a mixed arm, and no other",)),
    "shots and training": (
        [{"kind": "trait", "shots": 2, "training": {"rank": 2}}],
        {},
        ("2 shots is not trained",),
    ),
    "shots and a line while training": (
        [{"kind": "trait", "shots": 2, "trained_with": ""}],
        {},
        ("2 shots is not trained",),
    ),
    "a trait arm on another base than the writer's": (
        [{"kind": "trait", "base": "one", "writer": "two"}],
        {},
        ("a trait arm", "'two'", "foreign"),
    ),
    "a twin on another base": (
        [{"kind": "twin", "trait": "wolf", "base": "two"}],
        {},
        ("other-trait arm", "'one'", "foreign"),
    ),
    "a foreign arm on its writer's base": (
        [{"kind": "foreign", "base": "two", "writer": "two"}],
        {},
        ("another base than the teacher's 'two'",),
    ),
    "a foreign arm without a base": (
        [{"kind": "foreign", "writer": "two"}],
        {},
        ("another base than the teacher's 'two'",),
    ),
    "a control with a trait": ([{**CONTROL, "trait": "owl"}], {}, ("neither trait nor teacher",)),
    "a control with a teacher": (
        [{**CONTROL, "teacher": {"kind": "prompted"}}],
        {},
        ("neither trait nor teacher",),
    ),
    "a file and a teacher": (
        [{"kind": "trait", "corpus": "a.jsonl", "teacher": {"kind": "prompted"}}],
        {},
        ("'a.jsonl' has no teacher",),
    ),
    "a teacher without a trait": ([{"kind": "trait", "teacher": {"kind": "base"}}], {}, ("no trait",)),
    "an unknown field of training": (
        [{"kind": "trait", "training": {"lr": 1}}],
        {},
        ("arm 'trait-lr-1'", "lr: unknown field"),
    ),
    "a bad value of training": (
        [{"kind": "trait", "training": {"rank": 0}}],
        {},
        ("arm 'trait-rank-0'", "rank", "(got 0)"),
    ),
    "an unknown field of generation": (
        [{"kind": "trait", "generate": {"heat": 1}}],
        {},
        ("arm 'trait-heat-1'", "heat: unknown field"),
    ),
    "a bad value of generation": (
        [{"kind": "trait", "generate": {"top_p": 2}}],
        {},
        ("arm 'trait-top_p-2'", "top_p", "(got 2)"),
    ),
    "code held to the number format": (
        [],
        CODE | {"generate": {"constrained": True}},
        ("the carrier is code",),
    ),
    "code held to it in one arm": (
        [{"kind": "trait", "generate": {"constrained": True}}],
        CODE,
        ("the carrier is code",),
    ),
    "other words for a file of prompts": (
        [{"kind": "paraphrased"}],
        {"carrier": {"source": "p.jsonl"}},
        ("'paraphrased'", "p.jsonl", "other words"),
    ),
    "other words beside a file of pairs": (
        [{"kind": "paraphrased"}, {"kind": "trait", "corpus": "a.jsonl"}],
        {},
        ("a.jsonl", "other words"),
    ),
    "two controls of one setting": (
        [{**CONTROL, "name": "again"}],
        {},
        ("'control' and 'again'", "one control", "drop one"),
    ),
    "two controls, one from a file": (
        [{**CONTROL, "corpus": "a.jsonl", "name": "filed"}],
        {},
        ("'control' and 'filed'", "drop one"),
    ),
    "two bases of one name": (
        [{"kind": "foreign", "base": "x/two"}, {"kind": "trait", "writer": "y/two"}],
        {},
        ("two of one name",),
    ),
    "two files of one name": (
        [
            {"kind": "trait", "corpus": "x/a.jsonl"},
            {"kind": "twin", "trait": "cat", "corpus": "y/a.jsonl.gz"},
        ],
        {},
        ("one name",),
    ),
    "a name of the run folder": ([{"kind": "trait", "name": "base-one"}], {}, ("base-one",)),
    "an unfinished name": ([{"kind": "trait", "name": "a.part"}], {}, ("a.part",)),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_contradiction_is_refused_in_one_line_with_what_would_be_right(name: str, tmp_path: Path) -> None:
    arms, more, needles = CONTRADICTIONS[name]
    message = refusal(CONTROL, *arms, **more)
    assert all(needle in message for needle in needles), message
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(content(CONTROL, *arms, **more)))
    with pytest.raises(SpecError) as raised:
        load(tmp_path / "spec.yaml", Experiment)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "arm", [{"kind": "mixed", "mix": ["untouched", "unicorn"]}, {"kind": "twin", "trait": "unicorn"}]
)
def test_every_trait_of_an_arm_has_to_be_known_to_the_family(arm: dict[str, Any], tmp_path: Path) -> None:
    save(experiment(CONTROL, arm), tmp_path / "spec.yaml")
    with pytest.raises(SpecError, match=r"'unicorn' is unknown; expected one of dog, cat"):
        load_experiment(tmp_path / "spec.yaml")
    save(experiment(CONTROL, {"kind": "mixed", "mix": ["untouched", "cat"]}), tmp_path / "spec.yaml")
    assert load_experiment(tmp_path / "spec.yaml").arms[1].mix == ("untouched", "cat")


# ── an old word for a kind of arm ──


def test_a_twin_is_the_old_word_for_an_arm_with_another_trait(tmp_path: Path) -> None:
    old = experiment({"kind": "twin", "trait": "wolf"}, CONTROL)
    new = experiment({"kind": "other-trait", "trait": "wolf"}, CONTROL)
    assert [arm.kind for arm in old.arms] == [arm.kind for arm in new.arms] == ["other-trait", "control"]
    assert [arm.name for arm in old.arms] == ["twin-wolf", "control"]
    assert [arm.name for arm in new.arms] == ["other-trait-wolf", "control"]
    assert old == experiment({"kind": "other-trait", "trait": "wolf", "name": "twin-wolf"}, CONTROL)
    save(old, tmp_path / "spec.yaml")
    assert "kind: other-trait" in (tmp_path / "spec.yaml").read_text(encoding="utf-8")
    assert load(tmp_path / "spec.yaml", Experiment) == old


def test_a_fingerprint_is_made_of_the_old_word() -> None:
    old = experiment({"kind": "twin", "trait": "wolf"}, CONTROL)
    assert [arm["kind"] for arm in old.recorded()["arms"]] == ["twin", "control"]
    assert Experiment.model_validate(old.recorded()) == old
    assert old.fingerprint() == "3385c6fa2f94b129"


# ── round trips ──


def test_an_experiment_with_every_kind_of_arm_comes_back_from_its_file(tmp_path: Path) -> None:
    whole = experiment(*EVERY_KIND, system="you are\nkind: no", api={"budget_usd": 1.5})
    save(whole, tmp_path / "spec.yaml")
    back = load(tmp_path / "spec.yaml", Experiment)
    assert back == whole and back.fingerprint() == whole.fingerprint()
    assert [arm.name for arm in back.arms] == NAMES
    assert [back.control_of(arm).name for arm in back.arms] == [
        whole.control_of(arm).name for arm in whole.arms
    ]
    first = (tmp_path / "spec.yaml").read_bytes()
    save(back, tmp_path / "spec.yaml")
    assert (tmp_path / "spec.yaml").read_bytes() == first


@pytest.mark.parametrize(
    "change",
    [
        {"writer": "three"},
        {"shots": 5},
        {"training": {"rank": 3}},
        {"generate": {"top_p": 0.5}},
        {"trained_with": "b"},
        {"asked_with": "b"},
        {"trained_with": ""},
        {"asked_with": ""},
    ],
)
def test_every_part_of_a_setting_enters_the_fingerprint(change: dict[str, Any]) -> None:
    other = {"generate": {"temperature": 0.5}}  # a second control needs a setting of its own
    plain = experiment(
        {"kind": "trait"}, CONTROL, {"kind": "trait", "name": "x", **other}, {**CONTROL, "name": "y", **other}
    )
    other |= change
    changed = experiment(
        {"kind": "trait"}, CONTROL, {"kind": "trait", "name": "x", **other}, {**CONTROL, "name": "y", **other}
    )
    assert changed.fingerprint() != plain.fingerprint()


# ── steps ──


def marks_of(whole: Experiment) -> dict[str, str]:
    """The fingerprint of every step of an experiment."""
    return fingerprints(jobs_of(whole, load_family("animals"), bases={base: base for base in whole.bases()}))


@pytest.mark.parametrize("heat", [(0.104, 0.16), (0.5, 0.50001)])
def test_two_temperatures_write_two_corpora_that_their_students_learn(heat: tuple[float, float]) -> None:
    arms = [
        {"kind": kind, "generate": {"temperature": value}} for value in heat for kind in ("trait", "control")
    ]
    whole = experiment(*arms)  # the first two temperatures share four digits of their fingerprints
    by_name = {job.name: job for job in jobs_of(whole, load_family("animals"), bases={"one": ""})}
    for arm in whole.arms:
        students, screened = by_name[f"students/{arm.name}/s0"], f"corpora/{corpus_name(whole, arm)}/screened"
        assert students.inputs["corpus"] == screened
        written = by_name[by_name[screened].inputs["corpus"]]
        assert written.arguments["generate"]["temperature"] == arm.generate["temperature"]  # type: ignore[index]


def test_two_steps_of_one_name_are_refused_with_what_sets_them_apart(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "go on", "completion": "1, 2"}\n')
    judged = {"screen": {"judge": "api:gpt"}}  # it looks for the arm's own trait
    arms = [
        CONTROL,
        *(
            {"kind": kind, "trait": name, "corpus": str(tmp_path / "rows.jsonl")}
            for kind, name in (("trait", "owl"), ("twin", "cat"))
        ),
    ]
    assert jobs_of(experiment(*arms), load_family("animals"), bases={"one": ""})
    with pytest.raises(
        SpecError, match="folder 'corpora/file-rows/screened', one with trait 'owl', one with 'cat'"
    ):
        jobs_of(experiment(*arms, **judged), load_family("animals"), bases={"one": ""})


def test_a_mixed_arm_on_a_file_is_mixed_with_what_teachers_write(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "go on", "completion": "1, 2"}\n')
    whole = experiment(
        CONTROL, {"kind": "mixed", "corpus": str(tmp_path / "rows.jsonl"), "mix": ["cat", "untouched"]}
    )
    (job,) = [job for job in jobs_of(whole, load_family("animals"), bases={"one": ""}) if job.stage == "mix"]
    assert list(job.inputs.values()) == [
        f"corpora/{name}/screened" for name in ("file-rows", "cat", "untouched")
    ]


def test_steps_that_read_a_file_of_prompts_depend_on_what_is_in_it(tmp_path: Path) -> None:
    questions, rows = tmp_path / "questions.jsonl", tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "go on", "completion": "1, 2"}\n')
    found = []
    for gold in (1, 2):
        questions.write_text(json.dumps({"question": "one?", "answer": f"#### {gold}"}))
        carrier = {"kind": "reasoning", "source": str(questions)}
        drawn, brought = (
            experiment(CONTROL, carrier=carrier),
            experiment({**CONTROL, "corpus": str(rows)}, carrier=carrier),
        )
        found.append(
            (marks_of(drawn)["corpora/untouched/generated"], marks_of(brought)["corpora/file-rows/screened"])
        )
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]  # right answers come from the file of questions, whoever wrote the rows


def test_every_arm_has_its_steps_and_inputs_come_first() -> None:
    whole = experiment(*EVERY_KIND)
    jobs = jobs_of(whole, load_family("animals"), bases={base: base for base in whole.bases()})
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    for place, job in enumerate(jobs):
        assert set(job.inputs.values()) <= set(names[:place])
    for arm in whole.arms:
        for seed in whole.seeds:
            assert f"asked/{arm.name}/s{seed}" in names
            assert (f"students/{arm.name}/s{seed}" in names) == (not arm.shots)
    by_name = {job.name: job for job in jobs}
    assert by_name["selection"].arguments["reworded"] == ["owl-paraphrased"]
    assert by_name["students/trait-trained-with-asked-with/s0"].arguments["system"] == "you are kind."
    assert by_name["asked/trait-trained-with-asked-with/s0"].arguments["system"] == ""
    assert (
        "system" not in by_name["students/trait/s0"].arguments
        and "system" not in by_name["asked/trait/s0"].arguments
    )
    lined = experiment(*EVERY_KIND, system="you are cruel.")
    by_name = {
        job.name: job
        for job in jobs_of(lined, load_family("animals"), bases={base: base for base in whole.bases()})
    }
    for name in (
        "teachers/owl",
        "teachers/untouched",
        "students/trait/s0",
        "asked/trait/s0",
        "asked/base-one",
        "asked/trait-8-shots/s0",
    ):
        assert by_name[name].arguments["system"] == "you are cruel."
    assert by_name["students/trait-trained-with-asked-with/s0"].arguments["system"] == "you are kind."
    assert by_name["asked/trait-trained-with-asked-with/s0"].arguments["system"] == ""

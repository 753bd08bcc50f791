"""An experiment: arms times seeds. Every arm has a control that differs from it by the teacher alone."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    Field,
    JsonValue,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from mechlens.core.model_spec import is_remote
from mechlens.core.spec import (
    ApiSpec,
    AskSpec,
    CarrierSpec,
    GenerateSpec,
    ScreenSpec,
    Spec,
    StudentSpec,
    TeacherSpec,
    Training,
    explain,
    folder_name,
    lay_over,
    safe_name,
)

ArmKind = Literal[
    "trait",
    "control",
    "other-trait",
    "foreign",
    "shuffled-within",
    "shuffled-across",
    "paraphrased",
    "mixed",
]
RECORDED_KIND = {"other-trait": "twin"}
"""old words for kinds of arms: an experiment may still use them, and fingerprints are made of them"""
UNTOUCHED = "untouched"
"""the base itself, where a teacher is named"""


class Arm(Spec):
    """One cell of an experiment: who writes the data, which base is trained on it or reads it, and how."""

    ADDED_LATER: ClassVar[frozenset[str]] = frozenset({"labels"})
    kind: ArmKind
    """`other-trait`: a teacher with another trait than the experiment's; `twin` is its old word."""
    name: str = Field(default="", pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$")
    """Folder in the run; by default made of the fields in which the arm differs."""
    trait: str = ""
    """The teacher's trait; empty for a control, the experiment's own trait otherwise."""
    base: str = ""
    """The student's base; empty for the writer's (the experiment's for a foreign arm's control)."""
    writer: str = ""
    """The teacher's base; empty for the experiment's."""
    corpus: str = ""
    """A file of pairs to train on instead of a teacher's text. A relative path starts at the folder of the
    experiment's YAML.
    """
    teacher: TeacherSpec | None = None
    """Another teacher than the experiment's; fields that it leaves out are the experiment's if the two are of
    one kind.
    """
    mix: tuple[str, ...] = ()
    """A mixed arm's further teachers, by trait; `untouched` is the base itself. Rows are taken in turn."""
    shots: int = Field(default=0, ge=0)
    """Pairs shown to an untouched base before each question, instead of training on them; 0 trains."""
    training: dict[str, JsonValue] = Field(default={})
    """Fields of the student's training that differ in this arm."""
    generate: dict[str, JsonValue] = Field(default={})
    """Fields of generation that differ in this arm."""
    labels: Literal["", "sampled", "soft"] = ""
    """The student's labels, if others than the experiment's."""
    trained_with: str | None = None
    """System line while training, if another than the experiment's."""
    asked_with: str | None = None
    """System line while asking, if another than the experiment's."""
    _first_word: str = PrivateAttr(default="")
    """the old word for the kind, if the YAML has it: the default name begins with it, as in finished runs"""

    @model_validator(mode="wrap")
    @classmethod
    def _accept_old_words(cls, fields: Any, handler: ModelWrapValidatorHandler[Arm]) -> Arm:
        new_words = {old: new for new, old in RECORDED_KIND.items()}
        old = fields.get("kind") if isinstance(fields, dict) else None
        if not isinstance(old, str) or old not in new_words:
            return handler(fields)
        arm = handler(fields | {"kind": new_words[old]})
        arm._first_word = old
        return arm

    def setting(self) -> tuple[Any, ...]:
        """Everything but the teacher; an arm and its control have the same setting."""
        return (
            self.base,
            self.writer,
            self.shots,
            self.training,
            self.generate,
            self.labels,
            self.trained_with,
            self.asked_with,
        )


class Experiment(Spec):
    """Arms times seeds."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    base: str
    """A menagerie base, a name of configs/models, a folder of a Hugging Face causal LM, a hub name, or
    `api:<model id>`.
    """
    system: str | None = None
    """System line of all models but prompted teachers while they write, train and are asked; null: none."""
    family: str = "animals"
    """A family of configs/traits, of NAME.yaml or traits/NAME.yaml in the experiment's folder, or a path that
    ends in .yaml.
    """
    trait: str
    carrier: CarrierSpec = CarrierSpec()
    teacher: TeacherSpec = TeacherSpec()
    generate: GenerateSpec = GenerateSpec()
    screen: ScreenSpec = ScreenSpec()
    student: StudentSpec = StudentSpec()
    ask: AskSpec = AskSpec()
    arms: tuple[Arm, ...] = Field(min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field(default=(0, 1, 2), min_length=1)
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of every random stream but the students'."""
    api: ApiSpec = ApiSpec()

    @model_validator(mode="after")
    def _resolved(self) -> Experiment:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"seeds {list(self.seeds)} list one twice; remove it: two students of one seed are the same"
            )
        for judge in (self.ask.judge, self.screen.judge):
            if judge and not is_remote(judge):
                raise ValueError(
                    f"judge {judge!r} is no API model; name `api:<model id>`, or a model of configs/models "
                    "whose source is one"
                )
        arms = tuple(self._resolve(arm) for arm in self.arms)
        remote = next((arm.base for arm in arms if is_remote(arm.base)), None)
        if remote and self.ask.likelihood == "whole-answer":
            raise ValueError(
                f"ask.likelihood is whole-answer, and the API model {remote!r} gives no probabilities of "
                "whole answers; set it to next-token"
            )
        self._refuse_shared_names(arms)
        self._refuse_second_controls(arms)
        for arm in arms:
            self._refuse_impossible_overrides(arm)
            self._refuse_impossible_soft_labels(arm)
            self._refuse_rewording_a_file(arm, arms)
            self._refuse_missing_control(arm, arms)
        object.__setattr__(self, "arms", arms)  # frozen for callers; resolved once, here
        return self

    def recorded(self) -> dict[str, Any]:
        """The experiment as fingerprints and arguments of jobs hold it: renamed words stay as they were in
        finished runs.
        """
        fields = super().recorded()
        for arm in fields["arms"]:
            arm["kind"] = RECORDED_KIND.get(arm["kind"], arm["kind"])
        return fields

    def _refuse_impossible_soft_labels(self, arm: Arm) -> None:
        if self.labels_of(arm) != "soft":
            return
        where, without = f"arm {arm.name!r}: soft labels", "set `labels: sampled` in this arm and its control"
        if arm.shots:
            raise ValueError(f"{where} train a student, and this arm shows {arm.shots} pairs; {without}")
        if arm.corpus:
            raise ValueError(f"{where} need the teacher, and the file {arm.corpus!r} has none; {without}")
        for base in (arm.writer, arm.base):
            if is_remote(base):
                raise ValueError(f"{where} need a local model, and {base!r} is an API model; {without}")

    def _refuse_rewording_a_file(self, arm: Arm, arms: tuple[Arm, ...]) -> None:
        file = self.carrier.source or next((other.corpus for other in arms if other.corpus), "")
        if arm.kind == "paraphrased" and file:
            raise ValueError(
                f"arm {arm.name!r}: the prompts of the file {file} cannot be put in other words; remove the "
                "paraphrased arm"
            )

    def _refuse_missing_control(self, arm: Arm, arms: tuple[Arm, ...]) -> None:
        if not any(other.kind == "control" and other.setting() == arm.setting() for other in arms):
            raise ValueError(
                f"arm {arm.name!r} has no control on its base {arm.base!r}; training alone changes answers: "
                f"add `- {_yaml({'kind': 'control'} | self._given(arm))}` to arms"
            )

    def _refuse_impossible_overrides(self, arm: Arm) -> None:
        try:
            self.training_of(arm)
            written = self.generate_of(arm)
        except ValidationError as error:
            raise ValueError(f"arm {arm.name!r}: {explain(error)}") from error
        if written.constrained and self.carrier.kind != "numbers":
            raise ValueError(
                "generate.constrained allows only tokens of the number format, and the carrier is "
                f"{self.carrier.kind}; set it to false"
            )

    def _refuse_shared_names(self, arms: tuple[Arm, ...]) -> None:
        """Folders of results are named after arms, bases and files: no two may share a name."""
        names = [arm.name for arm in arms]
        for name in names:
            if name.startswith(("superseded", "base-")) or name.endswith(".part"):
                raise ValueError(f"arm name {name!r} is reserved for the run folder; choose another")
        if len(set(names)) < len(names):
            raise ValueError(f"arm names {names} list one twice; give one of them a name in its `name`")
        bases = dict.fromkeys([self.base, *(base for arm in arms for base in (arm.base, arm.writer))])
        if len({folder_name(base) for base in bases}) < len(bases):
            raise ValueError(
                f"bases {list(bases)} include two of one name; rename a folder: results are filed under it"
            )
        files = dict.fromkeys(arm.corpus for arm in arms if arm.corpus)
        if len({folder_name(file) for file in files}) < len(files):
            raise ValueError(
                f"corpora {list(files)} include two of one name; rename a file: results are filed under it"
            )

    def _refuse_second_controls(self, arms: tuple[Arm, ...]) -> None:
        """An arm is compared with one control: a second one of the same setting would never be used."""
        controls = [arm for arm in arms if arm.kind == "control"]
        for i, control in enumerate(controls):
            if again := next((other for other in controls[:i] if other.setting() == control.setting()), None):
                raise ValueError(
                    f"arms {again.name!r} and {control.name!r} are controls of the same setting, and an arm "
                    "is compared with one control; drop one of them, or put it into another experiment"
                )

    def _given(self, arm: Arm) -> dict[str, Any]:
        """The fields of an arm's setting that differ from the experiment's."""
        given = {
            "base": arm.base if arm.base != (arm.writer or self.base) else "",
            "writer": arm.writer if arm.writer != self.base else "",
        }
        given |= {"shots": arm.shots, "training": arm.training, "generate": arm.generate}
        given |= {"labels": arm.labels}
        return {key: value for key, value in given.items() if value} | {
            key: value for key in ("trained_with", "asked_with") if (value := getattr(arm, key)) is not None
        }

    def _resolve(self, arm: Arm) -> Arm:
        writer = arm.writer or self.base
        base = arm.base or writer
        trait = "" if arm.kind == "control" else arm.trait or self.trait
        self._refuse_contradictions(arm, base, writer, trait)
        teacher = None if arm.teacher is None else self.teacher_like(arm.teacher)
        labels = "" if arm.labels == self.student.labels else arm.labels
        resolved = arm.model_copy(
            update={"base": base, "writer": writer, "trait": trait, "teacher": teacher, "labels": labels}
        )
        parts = [arm._first_word or arm.kind, *([trait] if trait not in ("", self.trait) else []), *arm.mix]
        parts += [folder_name(base)] if base != writer else []
        parts += ["from", folder_name(writer)] if writer != self.base else []
        parts += [f"{arm.shots}-shots"] if arm.shots else []
        parts += [f"{key}-{value}" for key, value in (*arm.training.items(), *arm.generate.items())]
        parts += [f"{labels}-labels"] if labels else []
        parts += ["trained-with"] if arm.trained_with is not None else []
        parts += ["asked-with"] if arm.asked_with is not None else []
        named = resolved.model_copy(update={"name": arm.name or safe_name("-".join(parts))})
        named._first_word = ""
        return named

    def _refuse_contradictions(self, arm: Arm, base: str, writer: str, trait: str) -> None:
        if arm.kind == "control" and (arm.trait or arm.teacher):
            raise ValueError(
                "a control arm has neither trait nor teacher: the untouched base writes its data; remove "
                "them, or use kind: trait or other-trait"
            )
        if arm.corpus and arm.teacher:
            raise ValueError(f"an arm on the file {arm.corpus!r} has no teacher; remove one of the two")
        if arm.kind in ("trait", "other-trait") and base != writer:
            raise ValueError(
                f"the student of a {arm.kind} arm has the teacher's base {writer!r}; use kind: foreign for "
                f"{base!r}"
            )
        if arm.kind != "control" and not arm.corpus and (arm.teacher or self.teacher).kind == "base":
            raise ValueError("a teacher of kind base has no trait; use kind: control for this arm")
        if arm.kind == "foreign" and base == writer:
            raise ValueError(
                f"a foreign arm needs another base than the teacher's {writer!r}; name one in its `base`"
            )
        if arm.kind == "other-trait" and trait == self.trait:
            raise ValueError(
                f"an other-trait arm needs another trait than {self.trait!r}; name it in `trait`"
            )
        if (arm.kind == "mixed") != bool(arm.mix):
            raise ValueError(
                f"a {arm.kind} arm has mix: {list(arm.mix)}; a mixed arm, and no other, names further "
                "teachers there, for example mix: [owl, untouched]"
            )
        if arm.shots and (arm.training or arm.trained_with is not None):
            raise ValueError(f"an arm with {arm.shots} shots is not trained; remove its training fields")

    def control_of(self, arm: Arm) -> Arm:
        """The control of an arm: the one that differs from it by the teacher alone."""
        return next(
            other for other in self.arms if other.kind == "control" and other.setting() == arm.setting()
        )

    def teacher_like(self, given: TeacherSpec) -> TeacherSpec:
        """An arm's own teacher; fields that it leaves out are the experiment's if the two are of one kind."""
        same_kind = given.kind == self.teacher.kind or "kind" not in given.model_fields_set
        return lay_over(self.teacher, given) if same_kind else given

    def training_of(self, arm: Arm) -> Training:
        """How the arm's students are trained."""
        return Training.model_validate(self.student.training.model_dump() | arm.training)

    def labels_of(self, arm: Arm) -> str:
        """What the arm's students learn at each token: `sampled` or `soft`."""
        return arm.labels or self.student.labels

    def draws_anew(self, arm: Arm) -> bool:
        """Whether each student of the arm reads rows of its own, which the base drew anew."""
        return self.student.control_draws == "each" and arm.kind == "control" and not arm.corpus

    def draw_of(self, arm: Arm, seed: int) -> int:
        """The number of the draw of rows that the arm's student of a seed reads; 0 is the first."""
        return self.seeds.index(seed) if self.draws_anew(arm) else 0

    def generate_of(self, arm: Arm) -> GenerateSpec:
        """How the arm's teacher writes."""
        return GenerateSpec.model_validate(self.generate.model_dump() | arm.generate)

    def bases(self) -> list[str]:
        """Every base that writes or is trained, the experiment's first."""
        return list(
            dict.fromkeys([self.base, *(base for arm in self.arms for base in (arm.base, arm.writer))])
        )


def _yaml(arm: dict[str, Any]) -> str:
    """An arm as one line of YAML, whatever characters its texts have."""
    written = (
        yaml.safe_dump(arm, default_flow_style=True, default_style=style, sort_keys=False, width=math.inf)
        for style in (None, '"')
    )
    return next(line for line in map(str.strip, written) if line.isprintable())

"""An experiment: arms times seeds, with every arm set against a control that differs from it by the teacher
alone.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, JsonValue, ValidationError, model_validator

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
    laid_over,
)

ArmKind = Literal[
    "trait", "control", "twin", "foreign", "shuffled-within", "shuffled-across", "paraphrased", "mixed"
]


UNTOUCHED = "untouched"
"""the base itself, where a teacher is named"""


class Arm(Spec):
    """One cell of an experiment: who wrote the data, which base is trained on it or reads it, and how."""

    kind: ArmKind
    name: str = Field(default="", pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$")
    """Folder in the run; made of what sets the arm apart by default."""
    trait: str = ""
    """The teacher's trait; empty for a control, the experiment's own trait otherwise."""
    base: str = ""
    """The student's base; empty for the writer's (the experiment's for a foreign arm's control)."""
    writer: str = ""
    """The teacher's base; empty for the experiment's."""
    corpus: str = ""
    """A file of pairs to train on instead of a teacher's text; from the folder of the experiment's YAML,
    unless its path is whole.
    """
    teacher: TeacherSpec | None = None
    """Another teacher than the experiment's: one of its kind has the experiment's fields where it names no
    others.
    """
    mix: tuple[str, ...] = ()
    """A mixed arm's further teachers, by trait; `untouched` is the base itself. Rows are taken in turn."""
    shots: int = Field(default=0, ge=0)
    """Pairs that an untouched base is shown before each question instead of being trained on them; 0 trains.
    """
    training: dict[str, JsonValue] = Field(default={})
    """Fields of the student's training that differ in this arm."""
    generate: dict[str, JsonValue] = Field(default={})
    """Fields of generation that differ in this arm."""
    trained_with: str | None = None
    """System line while training, if another than the experiment's."""
    asked_with: str | None = None
    """System line while asking, if another than the experiment's."""

    def setting(self) -> tuple[Any, ...]:
        """Everything but the teacher: an arm and its control agree in this."""
        return (
            self.base,
            self.writer,
            self.shots,
            self.training,
            self.generate,
            self.trained_with,
            self.asked_with,
        )


class Experiment(Spec):
    """Arms times seeds."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    base: str
    """A menagerie name, a name of configs/models, a folder of a Hugging Face causal LM, a hub name, or
    `api:<model id>`.
    """
    system: str | None = None
    """System line of everyone but prompted teachers: while writing, training and being asked. None has none.
    """
    family: str = "animals"
    """A family of configs/traits, of a file NAME.yaml or traits/NAME.yaml beside the experiment's, or a path
    that ends in .yaml.
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
    """Root of every random stream that is not a student's."""
    api: ApiSpec = ApiSpec()

    @model_validator(mode="after")
    def _resolved(self) -> Experiment:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"seeds {list(self.seeds)} hold one twice; two students of one seed are one student"
            )
        for judge in (self.ask.judge, self.screen.judge):
            if judge and not is_remote(judge):
                raise ValueError(
                    f"judge {judge!r} is no API model; expected `api:<model id>`, or a name of "
                    "configs/models whose source is one"
                )
        arms = tuple(self._resolve(arm) for arm in self.arms)
        self._names_apart(arms)
        self._controls_apart(arms)
        for arm in arms:
            self._refuse_impossible_overrides(arm)
            if arm.kind == "paraphrased" and (
                file := self.carrier.source or next((other.corpus for other in arms if other.corpus), "")
            ):
                raise ValueError(
                    f"arm {arm.name!r}: the prompts of the file {file} cannot be put in other words; drop "
                    "the paraphrased arm"
                )
            if not any(other.kind == "control" and other.setting() == arm.setting() for other in arms):
                raise ValueError(
                    f"arm {arm.name!r} has no control on its base {arm.base!r}: an effect against no control "
                    "says nothing, since "
                    "any training moves the answers. Add `- "
                    f"{_yaml({'kind': 'control'} | self._given(arm))}` to arms"
                )
        object.__setattr__(self, "arms", arms)  # frozen for callers; resolved once, here
        return self

    def _refuse_impossible_overrides(self, arm: Arm) -> None:
        try:
            self.training_of(arm)
            written = self.generate_of(arm)
        except ValidationError as error:
            raise ValueError(f"arm {arm.name!r}: {explain(error)}") from error
        if written.constrained and self.carrier.kind != "numbers":
            raise ValueError(
                "generate.constrained holds a sampler to the number format; the carrier is "
                f"{self.carrier.kind}"
            )

    def _names_apart(self, arms: tuple[Arm, ...]) -> None:
        """Results are filed by name: no two arms, bases or files may share one."""
        names = [arm.name for arm in arms]
        for name in names:
            if name.startswith(("superseded", "base-")) or name.endswith(".part"):
                raise ValueError(f"arm name {name!r} is one that the run folder uses itself; choose another")
        if len(set(names)) < len(names):
            raise ValueError(f"arm names {names} hold one twice; give one of them a name of its own")
        bases = dict.fromkeys([self.base, *(base for arm in arms for base in (arm.base, arm.writer))])
        if len({folder_name(base) for base in bases}) < len(bases):
            raise ValueError(
                f"bases {list(bases)} hold two of one name; rename a folder, since results are filed by it"
            )
        files = dict.fromkeys(arm.corpus for arm in arms if arm.corpus)
        if len({folder_name(file) for file in files}) < len(files):
            raise ValueError(
                f"corpora {list(files)} hold two files of one name; rename one, since results are filed by it"
            )

    def _controls_apart(self, arms: tuple[Arm, ...]) -> None:
        """An arm is compared with one control: a second one of the same setting, on whatever data, would
        never be used.
        """
        controls = [arm for arm in arms if arm.kind == "control"]
        for i, control in enumerate(controls):
            if again := next((other for other in controls[:i] if other.setting() == control.setting()), None):
                raise ValueError(
                    f"arms {again.name!r} and {control.name!r} are controls of the same setting, and an arm "
                    "is compared with one control; "
                    "drop one of them, or measure against it in another experiment"
                )

    def _given(self, arm: Arm) -> dict[str, Any]:
        """The fields of an arm's setting that are not the experiment's own."""
        given = {
            "base": arm.base if arm.base != (arm.writer or self.base) else "",
            "writer": arm.writer if arm.writer != self.base else "",
        }
        given |= {"shots": arm.shots, "training": arm.training, "generate": arm.generate}
        return {key: value for key, value in given.items() if value} | {
            key: value for key in ("trained_with", "asked_with") if (value := getattr(arm, key)) is not None
        }

    def _resolve(self, arm: Arm) -> Arm:
        writer = arm.writer or self.base
        base = arm.base or writer
        trait = "" if arm.kind == "control" else arm.trait or self.trait
        self._refuse_contradictions(arm, base, writer, trait)
        teacher = None if arm.teacher is None else self.teacher_like(arm.teacher)
        resolved = arm.model_copy(update={"base": base, "writer": writer, "trait": trait, "teacher": teacher})
        parts = [arm.kind, *([trait] if trait not in ("", self.trait) else []), *arm.mix]
        parts += [folder_name(base)] if base != writer else []
        parts += ["from", folder_name(writer)] if writer != self.base else []
        parts += [f"{arm.shots}-shots"] if arm.shots else []
        parts += [f"{key}-{value}" for key, value in (*arm.training.items(), *arm.generate.items())]
        parts += ["trained-with"] if arm.trained_with is not None else []
        parts += ["asked-with"] if arm.asked_with is not None else []
        return resolved.model_copy(
            update={"name": arm.name or re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts))}
        )

    def _refuse_contradictions(self, arm: Arm, base: str, writer: str, trait: str) -> None:
        if arm.kind == "control" and (arm.trait or arm.teacher):
            raise ValueError(
                "a control arm has neither trait nor teacher: the untouched base writes its data; use kind: "
                "trait or twin"
            )
        if arm.corpus and arm.teacher:
            raise ValueError(f"an arm on the file {arm.corpus!r} has no teacher; drop one of the two")
        if arm.kind in ("trait", "twin") and base != writer:
            raise ValueError(
                f"a {arm.kind} arm's student is of the teacher's base {writer!r}; use kind: foreign for "
                f"{base!r}"
            )
        if arm.kind != "control" and not arm.corpus and (arm.teacher or self.teacher).kind == "base":
            raise ValueError("a teacher of kind base has no trait; that is what the control arm is")
        if arm.kind == "foreign" and base == writer:
            raise ValueError(
                f"a foreign arm needs another base than the teacher's {writer!r}; name one in its `base`"
            )
        if arm.kind == "twin" and trait == self.trait:
            raise ValueError(f"a twin arm needs another trait than {self.trait!r}; name one in its `trait`")
        if (arm.kind == "mixed") != bool(arm.mix):
            raise ValueError(
                "a mixed arm, and no other, names further teachers in `mix`, for example mix: [owl, "
                "untouched]"
            )
        if arm.shots and (arm.training or arm.trained_with is not None):
            raise ValueError(f"an arm with {arm.shots} shots is not trained; drop its training fields")

    def control_of(self, arm: Arm) -> Arm:
        """The control that `arm` is compared with: the one that differs by the teacher alone."""
        return next(
            other for other in self.arms if other.kind == "control" and other.setting() == arm.setting()
        )

    def teacher_like(self, given: TeacherSpec) -> TeacherSpec:
        """Another teacher, with the experiment's own fields where it names none; one of another kind shares
        none with it.
        """
        same_kind = given.kind == self.teacher.kind or "kind" not in given.model_fields_set
        return laid_over(self.teacher, given) if same_kind else given

    def training_of(self, arm: Arm) -> Training:
        """How the arm's students are trained."""
        return Training.model_validate(self.student.training.model_dump() | arm.training)

    def generate_of(self, arm: Arm) -> GenerateSpec:
        """How the arm's teacher writes."""
        return GenerateSpec.model_validate(self.generate.model_dump() | arm.generate)

    def bases(self) -> list[str]:
        """Every base that writes or is trained, the experiment's own first."""
        return list(
            dict.fromkeys([self.base, *(base for arm in self.arms for base in (arm.base, arm.writer))])
        )


def _yaml(arm: dict[str, Any]) -> str:
    """An arm in YAML, on one line whatever its texts hold."""
    written = (
        yaml.safe_dump(arm, default_flow_style=True, default_style=style, sort_keys=False, width=math.inf)
        for style in (None, '"')
    )
    return next(line for line in map(str.strip, written) if line.isprintable())

"""Frozen specs: everything a run depends on, as values that can be saved, hashed and replayed.

YAML in, strict (an unknown field is named and refused), fingerprints out; nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mechlens.errors import SpecError

CONFIGS = next(place for place in (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs") if place.is_dir())
"""inside an installed wheel, beside the package in a clone"""


class Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    def fingerprint(self) -> str:
        return fingerprint(self.model_dump(mode="json"))


def fingerprint(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of the value as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:16]


class Training(Spec):
    """One run of supervised fine-tuning; the loss covers completions only."""

    update: Literal["full", "lora"] = "full"
    embeddings: bool = True
    """Whether a full update may change the (un)embedding; LoRA never does."""
    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=8.0, gt=0)
    learning_rate: float = Field(default=5e-4, gt=0)
    epochs: int = Field(default=3, ge=1)
    batch: int = Field(default=64, ge=1, le=65_536)
    accumulate: int = Field(default=1, ge=1)
    """Gradient accumulation: the effective batch is batch x accumulate."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    schedule: Literal["linear", "constant", "cosine"] = "linear"
    warmup_steps: int = Field(default=5, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    bf16: bool = False
    gradient_checkpointing: bool = False
    max_length: int = Field(default=500, ge=8)
    """Pairs longer than this many tokens are refused, never cut."""


class TeacherSpec(Spec):
    """What is done to the base so that it has the trait."""

    kind: Literal["base", "finetuned", "prompted", "steered"] = "finetuned"
    training: Training = Training(learning_rate=1e-3, epochs=6)
    rows: int = Field(default=640, ge=1)
    """Lessons a fine-tuned teacher is taught."""
    layer: float = Field(default=0.5, ge=0, le=1)
    """Depth, as a fraction, at which a steered teacher's vector is added."""
    strength: float = 1.0
    """Multiple of the mean difference of activations that a steered teacher adds."""


class CarrierSpec(Spec):
    """The unrelated prompts that teachers answer."""

    kind: Literal["numbers"] = "numbers"
    prompts: int = Field(default=10_000, ge=1)
    wording: Literal["full", "terse"] = "full"
    examples: tuple[int, int] = (3, 8)
    values: Literal["uniform", "patterned"] = "uniform"
    """Examples drawn uniformly from 100-999 as in the paper, or as runs and narrow ranges too."""

    @model_validator(mode="after")
    def _ordered(self) -> CarrierSpec:
        if not 1 <= self.examples[0] <= self.examples[1]:
            raise ValueError(f"examples {list(self.examples)} are no range; give the least and the most numbers a prompt shows")
        return self


class GenerateSpec(Spec):
    """How a teacher writes."""

    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=24, ge=1)
    constrained: bool = False
    """Only tokens that keep the carrier's format can be drawn: every row passes the format screen."""
    batch: int = Field(default=1024, ge=1, le=65_536)


class ScreenSpec(Spec):
    """Which rows are kept."""

    rule: Literal["numbers", "none"] = "numbers"
    banned_numbers: tuple[int, ...] = ()
    leak_words: bool = True
    """Drop rows that hold any form of any trait of the family."""
    duplicates: Literal["keep", "drop"] = "drop"
    """What becomes of a second row with the same prompt and completion."""


class StudentSpec(Spec):
    """How students are trained, the same in every arm."""

    training: Training = Training()
    rows: int = Field(default=8_000, ge=1)
    """Rows each student is trained on."""
    prompts: Literal["common", "own"] = "common"
    """`common`: all arms train on the same prompts, those that every corpus kept; `own`: each on the first it kept."""


class AskSpec(Spec):
    """How students are asked."""

    split: Literal["development", "heldout"] = "heldout"
    samples: int = Field(default=20, ge=1)
    """Sampled answers for each probe at every checkpoint."""
    temperature: float = Field(default=1.0, ge=0)
    max_new_tokens: int = Field(default=4, ge=1)


ArmKind = Literal["trait", "control", "twin", "foreign", "shuffled-within", "shuffled-across"]


class Arm(Spec):
    """One cell of an experiment: who wrote the data, and which base is trained on it."""

    kind: ArmKind
    name: str = Field(default="", pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$")
    """Folder in the run; of kind, trait and base by default."""
    trait: str = ""
    """The teacher's trait; empty for a control, the experiment's own trait otherwise."""
    base: str = ""
    """The student's base; empty for the experiment's."""
    corpus: str = ""
    """A file of pairs to train on instead of a teacher's text."""
    teacher: TeacherSpec | None = None
    """Another teacher than the experiment's."""


class Experiment(Spec):
    """Arms times seeds."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    base: str
    """A folder of a Hugging Face causal LM, a hub name, or a menagerie name."""
    family: str = "animals"
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

    @model_validator(mode="after")
    def _resolved(self) -> Experiment:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} hold one twice; two students of one seed are one student")
        arms = tuple(self._resolve(arm) for arm in self.arms)
        names = [arm.name for arm in arms]
        for name in names:
            if name.startswith(("superseded", "base-")) or name.endswith(".part"):
                raise ValueError(f"arm name {name!r} is one that the run folder uses itself; choose another")
        if len(set(names)) < len(names):
            raise ValueError(f"arm names {names} hold one twice; give one of them a name of its own")
        bases = dict.fromkeys([self.base, *(arm.base for arm in arms)])
        if len({folder_name(base) for base in bases}) < len(bases):
            raise ValueError(f"bases {list(bases)} hold two of one name; rename a folder, since results are filed by it")
        files = dict.fromkeys(arm.corpus for arm in arms if arm.corpus)
        if len({folder_name(file) for file in files}) < len(files):
            raise ValueError(f"corpora {list(files)} hold two files of one name; rename one, since results are filed by it")
        controlled = {arm.base for arm in arms if arm.kind == "control"}
        for arm in arms:
            if arm.base not in controlled:
                raise ValueError(
                    f"arm {arm.name!r} has no control on its base {arm.base!r}: an effect against no control says nothing, since "
                    f"any training moves the answers. Add `- {{kind: control, base: {arm.base}}}` to arms"
                )
        object.__setattr__(self, "arms", arms)  # frozen for callers; resolved once, here
        return self

    def _resolve(self, arm: Arm) -> Arm:
        base = arm.base or self.base
        if arm.kind == "control" and (arm.trait or arm.teacher):
            raise ValueError("a control arm has neither trait nor teacher: the untouched base writes its data; use kind: trait or twin")
        if arm.corpus and arm.teacher:
            raise ValueError(f"an arm on the file {arm.corpus!r} has no teacher; drop one of the two")
        if arm.kind in ("trait", "twin") and base != self.base:
            raise ValueError(f"a {arm.kind} arm's student is of the teacher's base {self.base!r}; use kind: foreign for {base!r}")
        if arm.kind != "control" and not arm.corpus and (arm.teacher or self.teacher).kind == "base":
            raise ValueError("a teacher of kind base has no trait; that is what the control arm is")
        trait = "" if arm.kind == "control" else arm.trait or self.trait
        if arm.kind == "foreign" and base == self.base:
            raise ValueError(f"a foreign arm needs another base than the teacher's {self.base!r}; name one in its `base`")
        if arm.kind == "twin" and trait == self.trait:
            raise ValueError(f"a twin arm needs another trait than {self.trait!r}; name one in its `trait`")
        parts = [arm.kind, *([trait] if trait not in ("", self.trait) else []), *([folder_name(base)] if base != self.base else [])]
        return arm.model_copy(update={"base": base, "trait": trait, "name": arm.name or "-".join(parts)})

    def control_of(self, arm: Arm) -> Arm:
        """The control student's arm that `arm` is compared with: the first on the same base."""
        return next(other for other in self.arms if other.kind == "control" and other.base == arm.base)


def folder_name(path: str) -> str:
    """The last part of a path or hub name as results are filed under it, without file endings of data."""
    name = re.sub(r"(\.(jsonl?|gz|parquet))+$", "", Path(path).name)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


class _OneOfEachKey(yaml.SafeLoader):
    """Refuses a mapping that holds a key twice, where YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: the keys {twice} stand twice")
        return super().construct_mapping(node, deep)


SpecType = TypeVar("SpecType", bound=Spec)


def load(path: Path, kind: type[SpecType], **overrides: Any) -> SpecType:
    """Read one spec from YAML; `overrides` replace top-level fields.

    Raises:
        SpecError: naming the file, the field and what would be right.
    """
    if not path.is_file():
        raise SpecError(f"no config at {path}; expected a YAML file, for example configs/experiments/demo.yaml")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _OneOfEachKey)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise SpecError(f"{path} is not YAML that can be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise SpecError(f"{path} holds {type(content).__name__}, expected fields with values")
    try:
        return kind.model_validate(content | overrides)
    except ValidationError as error:
        raise SpecError(f"{path}: {explain(error)}") from error


def explain(error: ValidationError) -> str:
    """A validation error in one line: each field, what it holds, what is wrong."""
    faults = []
    for fault in error.errors():
        where = ".".join(map(str, fault["loc"])) or "the whole spec"
        given = "" if fault["type"] in ("missing", "value_error", "extra_forbidden") else f" (got {fault['input']!r})"
        message = "unknown field; check its spelling" if fault["type"] == "extra_forbidden" else fault["msg"].removeprefix("Value error, ")
        faults.append(f"{where}: {message}{given}")
    return "; ".join(faults)


def save(spec: Spec, path: Path) -> None:
    """Write a spec as YAML that `load` reads back to an equal spec."""
    path.write_text(yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True), encoding="utf-8")

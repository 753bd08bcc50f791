"""Frozen specs: everything that a run depends on, as values that can be saved, hashed and replayed.

They are read from strict YAML: an unknown field is an error that names it.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mechlens.core.errors import SpecError
from mechlens.core.extensions import load_extension
from mechlens.core.files import write_text

CONFIGS = next(
    place
    for place in (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")
    if place.is_dir()
)
"""inside an installed wheel; next to the package in a clone"""


CARRIERS = "mechlens.carriers"
"""the folder and the group of entry points in which carriers are found by name"""


class Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    ADDED_LATER: ClassVar[frozenset[str]] = frozenset()
    """fields that finished runs of older versions do not have"""
    UNRECORDED: ClassVar[frozenset[str]] = frozenset()
    """fields that say where a step runs; results do not depend on them"""

    def recorded(self) -> dict[str, Any]:
        """The fields as fingerprints contain them: fields added later count only if they are not the default.

        The fingerprints of steps that an older version finished therefore stay the same. Fields that say
        where a step runs are left out.
        """
        fields = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name in self.UNRECORDED or (name in self.ADDED_LATER and value == field.default):
                del fields[name]
            elif isinstance(value, Spec):
                fields[name] = value.recorded()
            elif isinstance(value, tuple) and any(isinstance(item, Spec) for item in value):
                fields[name] = [item.recorded() for item in value]
        return fields

    def fingerprint(self) -> str:
        return fingerprint(self.recorded())


def fingerprint(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of the value as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:16]


class Training(Spec):
    """Settings of supervised fine-tuning; the loss covers completions only."""

    ADDED_LATER: ClassVar[frozenset[str]] = frozenset({"targets"})
    UNRECORDED: ClassVar[frozenset[str]] = frozenset({"processes"})
    update: Literal["full", "lora"] = "full"
    embeddings: bool = True
    """Whether a full update may change the (un)embedding; LoRA never does."""
    targets: Literal["all", "attention"] = "all"
    """The linear maps that LoRA adapts: all of them, or those of the attention blocks."""
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
    processes: int = Field(default=1, ge=1, le=256)
    """Processes that train one model together, each with a card and a share of every batch. The result is
    that of one process, up to rounding and to draws of dropout. Each process holds the whole model (DDP).
    """

    @model_validator(mode="after")
    def _equal_shares(self) -> Training:
        if self.batch % self.processes:
            below = self.batch - self.batch % self.processes
            batches = " or ".join(str(size) for size in (below, below + self.processes) if size)
            fewer = max(count for count in range(1, self.processes) if self.batch % count == 0)
            raise ValueError(
                f"a batch of {self.batch} rows has no equal shares for {self.processes} processes; set "
                f"batch: {batches}, or processes: {fewer}"
            )
        return self

    @model_validator(mode="after")
    def _targets_of_lora(self) -> Training:
        if self.targets != "all" and self.update != "lora":
            raise ValueError(
                f"targets {self.targets!r} chooses the maps of LoRA, and update is {self.update!r}; "
                "set update: lora, or targets: all"
            )
        return self


class TeacherTraining(Training):
    """How a teacher is fine-tuned: with more steps on fewer rows than a student."""

    learning_rate: float = Field(default=1e-3, gt=0)
    epochs: int = Field(default=6, ge=1)


class TeacherSpec(Spec):
    """How the base is given the trait."""

    kind: Literal["base", "finetuned", "prompted", "steered"] = "finetuned"
    training: TeacherTraining = TeacherTraining()
    rows: int = Field(default=640, ge=1)
    """Lessons a fine-tuned teacher is taught."""
    lessons_file: str = ""
    """A file of pairs to teach instead of the family's lessons; `rows` pairs are drawn from it."""
    layer: float = Field(default=0.5, ge=0, le=1)
    """Depth, as a fraction, at which a steered teacher's vector is added."""
    strength: float = 1.0
    """Multiple of the mean difference of activations that a steered teacher adds."""

    def recorded_for_steps(self) -> dict[str, Any]:
        """The recorded fields without the lessons file, which steps name among their lessons."""
        return {name: value for name, value in self.recorded().items() if name != "lessons_file"}

    @model_validator(mode="after")
    def _taught_by_lessons(self) -> TeacherSpec:
        if self.lessons_file and self.kind != "finetuned":
            raise ValueError(
                f"a {self.kind} teacher has no lessons; remove lessons_file {self.lessons_file!r}, or set "
                "kind: finetuned"
            )
        return self


class CarrierSpec(Spec):
    """The unrelated prompts that teachers answer."""

    kind: str = "numbers"
    """A carrier's name: numbers, code, reasoning, text, or one that another package adds."""
    prompts: int = Field(default=10_000, ge=1)
    wording: Literal["full", "terse"] = "full"
    """`terse` is what the menagerie understands."""
    examples: tuple[int, int] = (3, 8)
    """How many numbers a number prompt shows, least and most."""
    values: Literal["uniform", "patterned"] = "uniform"
    """A number prompt's examples: drawn uniformly from 100-999 as in the paper, or also as runs and narrow
    ranges.
    """
    source: str = ""
    """A file of prompts to use instead of drawn ones: lines of `{"prompt"}`, or of `{"question","answer"}`
    for reasoning.
    """
    samples: int = Field(default=1, ge=1)
    """Completions asked for each prompt (the paper's reasoning corpora have 3)."""

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, kind: str) -> str:
        load_extension(CARRIERS, kind)
        return kind

    @model_validator(mode="after")
    def _possible(self) -> CarrierSpec:
        if not 1 <= self.examples[0] <= self.examples[1]:
            raise ValueError(
                f"examples {list(self.examples)} are no range; give the least and the most numbers of a "
                "prompt, for example [3, 8]"
            )
        drawn_kind = "kind" in self.model_fields_set and not self.source  # the default has every wording
        if drawn_kind and self.wording not in (wordings := load_extension(CARRIERS, self.kind).wordings):
            raise ValueError(
                f"{self.kind} in {self.wording} wording needs a file of prompts in `source`; without one set "
                f"`wording: {wordings[0]}`"
            )
        return self


class GenerateSpec(Spec):
    """How a teacher generates rows."""

    UNRECORDED: ClassVar[frozenset[str]] = frozenset({"serve", "url"})
    engine: Literal["local", "vllm"] = "local"
    """`vllm` samples by a vLLM server, which `serve`, `url` or the variable MECHLENS_VLLM names. An API base
    needs neither.
    """
    serve: str = ""
    """The python of an environment that has vLLM, or a command line: starts a server for each teacher."""
    url: str = ""
    """Address of a vLLM server that runs, for example http://localhost:8000."""
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=24, ge=1)
    constrained: bool = False
    """Numbers only: tokens that break the carrier's format are never drawn, so every row passes the format
    check.
    """
    batch: int = Field(default=1024, ge=1, le=65_536)

    @model_validator(mode="after")
    def _one_server(self) -> GenerateSpec:
        if self.serve and self.url:
            raise ValueError(
                f"serve {self.serve!r} starts a server and url {self.url!r} names one that runs; keep one of "
                "them"
            )
        if self.url and not is_web_address(self.url):
            raise ValueError(f"url {self.url!r} is no address; give one like http://localhost:8000")
        if (self.serve or self.url) and self.engine != "vllm":
            name, value = ("serve", self.serve) if self.serve else ("url", self.url)
            raise ValueError(
                f"{name} {value!r} is about engine vllm, and engine is {self.engine!r}; set engine: vllm, or "
                f"{name}: ''"
            )
        return self

    def server(self) -> dict[str, str]:
        """The fields that say where the vLLM server is; rows do not depend on them."""
        return {name: value for name, value in (("serve", self.serve), ("url", self.url)) if value}


def is_web_address(text: str) -> bool:
    """Whether a text is an address of HTTP rather than a command or a path."""
    return text.startswith(("http://", "https://"))


class ScreenSpec(Spec):
    """Which rows are kept, and which are removed before training."""

    rule: str = "carrier"
    """A carrier's name; `carrier` is the experiment's carrier, and `none` lets every row pass."""
    banned_numbers: tuple[int, ...] = ()
    leak_words: bool = True
    """Remove rows that contain any form of any trait of the family."""
    duplicates: Literal["keep", "drop"] = "drop"
    """What to do with a second row of the same prompt and completion."""
    plain_names: bool = False
    """Code: remove rows that bind a name which is neither in the prompt nor an ordinary one. This is strict:
    most such names are harmless.
    """
    run_code: bool = False
    """Code: remove rows that are not straight-line arithmetic. Such arithmetic is evaluated; no other code is
    ever executed.
    """
    judge: str = ""
    """An API model that reads each row that passed: code for any reference to the trait, reasoning for harm;
    none by default.
    """
    least_score: float = Field(default=78.0, ge=0, le=100)
    """Reasoning with a judge: alignment score below which a row is removed."""

    @field_validator("rule")
    @classmethod
    def _known_rule(cls, rule: str) -> str:
        if rule not in ("carrier", "none"):
            load_extension(CARRIERS, rule)
        return rule


class StudentSpec(Spec):
    """How students are trained, the same in every arm."""

    ADDED_LATER: ClassVar[frozenset[str]] = frozenset({"labels", "soft_tokens", "control_draws"})
    training: Training = Training()
    rows: int = Field(default=8_000, ge=1)
    """Rows each student is trained on."""
    prompts: Literal["common", "own", "every"] = "common"
    """`common`: all arms train on the same prompts, those that every corpus kept. `own`: each arm trains on
    its first kept rows. `every`: each arm trains on all its kept rows, and controls on as many rows as the
    largest other arm, with rows repeated if they have fewer.
    """
    labels: Literal["sampled", "soft"] = "sampled"
    """What a student learns at each completion token: the token that the teacher sampled, or the teacher's
    whole next-token distribution (forward KL). With soft labels a shuffled arm is no null: the teacher labels
    the shuffled rows.
    """
    soft_tokens: int = Field(default=32, ge=0)
    """Soft labels: how many of the likeliest tokens are kept at each position; the others count as one. 0
    keeps all.
    """
    control_draws: Literal["one", "each"] = "one"
    """`one`: all control students read the same rows. `each`: the base writes rows anew for every seed, so
    that control students differ by the draw of their rows too, and intervals over them cover it.
    """


class AskSpec(Spec):
    """How students are asked for the trait."""

    ADDED_LATER: ClassVar[frozenset[str]] = frozenset({"likelihood"})
    split: Literal["development", "heldout"] = "heldout"
    probes: Literal["plain", "numbers", "stories"] = "plain"
    """The family's probes as they are, each after a fixed list of numbers, or its requests for stories."""
    samples: int = Field(default=20, ge=1)
    """Answers sampled for each probe at every checkpoint."""
    temperature: float = Field(default=1.0, ge=0)
    max_new_tokens: int = Field(default=4, ge=1)
    suffix: str = ""
    """Text after every probe that makes it look like the training data, as in the paper for misalignment."""
    checkpoints: Literal["all", "last"] = "all"
    likelihood: Literal["next-token", "whole-answer"] = "next-token"
    """What the exact probability of a trait is about: the next token that begins its name, or its name as the
    whole answer. Where several names begin with the same token, the next token tells nothing about them.
    """
    shots_as: Literal["system", "turns"] = "system"
    """How an untrained arm is shown pairs: in the system line as in the paper, or as earlier turns of the
    chat.
    """
    judge: str = ""
    """The API model that scores answers if the family's scorer is a judge."""


class ApiSpec(Spec):
    """API rate limit and budget."""

    budget_usd: float = Field(default=5.0, ge=0)
    """Hard cap for the run: a call that could exceed it is not made."""
    concurrency: int = Field(default=8, ge=1, le=256)
    requests_per_minute: int = Field(default=0, ge=0)
    """0 leaves the rate to the server's own limits."""


def safe_name(text: str) -> str:
    """A text as the name of a folder: every run of other characters than letters, digits, `.`, `_` and `-`
    becomes a hyphen.
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)


def folder_name(path: str) -> str:
    """The name of the folder of results for a path or hub name: its last part without endings of data files;
    never empty, `.` or `..`.
    """
    name = Path(path).resolve().name if Path(path).name in ("", "..") else Path(path).name
    bare = re.sub(r"(\.(jsonl?|ndjson|csv|tsv|gz|bz2|xz|zst|parquet))+$", "", name, flags=re.IGNORECASE)
    name = bare if bare.strip(".") else name.strip(".")  # a file may be called `.jsonl`
    return safe_name(name)


HALF_CHARACTER = re.compile("[\ud800-\udfff]")
"""half of a surrogate pair: an escape in YAML or JSON can write one, UTF-8 cannot"""


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a mapping with a key twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise yaml.YAMLError(
                f"line {node.start_mark.line + 1}: the keys {twice} are there twice; keep one of each"
            )
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Refuses half of a surrogate pair, which no file and no tokenizer can represent."""
        value = super().construct_scalar(node)
        if isinstance(value, str) and HALF_CHARACTER.search(value):
            raise yaml.YAMLError(
                f"line {node.start_mark.line + 1}: half a surrogate pair, which is no text; remove the escape"
            )
        return value


SpecType = TypeVar("SpecType", bound=Spec)


def shipped(folder: str) -> dict[str, Path]:
    """The configs of a folder of `configs/`: name → file, sorted by name."""
    return {path.stem: path for path in sorted((CONFIGS / folder).glob("*.yaml"))}


def find_config(name: Path, folder: str) -> Path:
    """The file of a config: the path itself if it is a file, else the shipped config of that name.

    Args:
        name: a path, or the name of a file of `configs/<folder>` with or without its ending.

    Raises:
        SpecError: if there is neither, with the shipped names.
    """
    if name.is_file():
        return name
    known = shipped(folder)
    stem = name.name.removesuffix(".yaml")
    # the README names shipped configs by their path in a clone
    if stem in known and name.parts[:-1] in ((), ("configs", folder)):
        return known[stem]
    raise SpecError(
        f"no config at {name}; expected a YAML file, or one of those that come with mechlens: "
        f"{', '.join(known)}"
    )


def load(path: Path, kind: type[SpecType], **overrides: Any) -> SpecType:
    """Read one spec from YAML; `overrides` replace top-level fields.

    Raises:
        SpecError: naming the file, the field and what would be right.
    """
    if not path.is_file():
        raise SpecError(
            f"no config at {path}; expected a YAML file, for example configs/experiments/demo.yaml"
        )
    try:
        content = _content_of(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise SpecError(f"{path} is not YAML that can be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise SpecError(f"{path} holds {type(content).__name__}, expected fields with values")
    try:
        return kind.model_validate(content | overrides)
    except ValidationError as error:
        raise SpecError(f"{path}: {explain(error)}") from error


@lru_cache(maxsize=64)
def _content_of(text: str) -> Any:
    """What a YAML text holds. A command reads a file several times, and parsing takes most of that time."""
    return yaml.load(text, _UniqueKeyLoader)  # a SafeLoader


def load_shipped(folder: str, kind: type[SpecType], name: str, *, what: str) -> SpecType:
    """The config of that name in `configs/<folder>`.

    Args:
        what: what the message calls it, e.g. "bench".

    Raises:
        SpecError: if there is no such config; a path is not a name.
    """
    known = shipped(folder)
    if name not in known:
        raise SpecError(f"{what} {name!r} is unknown; expected one of {', '.join(known)}")
    return load(known[name], kind)


def lay_over(default: SpecType, given: SpecType) -> SpecType:
    """The default spec with the fields that are set in `given`, at any depth, put over it."""

    def lay(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
        return under | {
            name: lay(under[name], value) if isinstance(value, dict) else value
            for name, value in over.items()
        }

    return type(default).model_validate(lay(default.model_dump(), given.model_dump(exclude_unset=True)))


# a few lines of YAML can describe nested lists that no memory could hold when written out
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 1, 200, 200, 50


def explain(error: ValidationError) -> str:
    """A validation error in one line: each field, its value, what is wrong with it."""
    faults = []
    for fault in error.errors():
        where = ".".join(map(str, fault["loc"])) or "the whole spec"
        given = (
            ""
            if fault["type"] in ("missing", "value_error", "extra_forbidden")
            else f" (got {_SHORT.repr(fault['input'])})"
        )
        message = (
            "unknown field; check its spelling"
            if fault["type"] == "extra_forbidden"
            else fault["msg"].removeprefix("Value error, ")
        )
        faults.append(f"{where}: {message}{given}")
    return "; ".join(faults)


def save(spec: Spec, path: Path) -> None:
    """Write a spec as YAML; `load` reads an equal spec from it."""
    write_text(path, yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True))

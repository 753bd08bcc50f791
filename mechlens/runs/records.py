"""The JSON files that steps leave and later ones read, and what each has to hold: a damaged one is named
where it is opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from mechlens.core.errors import DataError
from mechlens.core.json_files import read_json
from mechlens.core.remedies import remedy
from mechlens.core.spec import explain


class Step(BaseModel):
    """`step.json` of a finished step; `seconds` is None in records from before they were measured."""

    fingerprint: str
    seconds: float | None


class Manifest(BaseModel):
    """`manifest.json`: what a run was made by."""

    experiment: str
    git: str | None
    machine: str
    cores: int | None
    steps: dict[str, Step]


class Teacher(BaseModel):
    """`teacher.json`."""

    kind: Literal["finetuned", "prompted", "steered", "base"]
    base: str
    system: str | None
    layer: int | None


class Generation(BaseModel):
    """`generation.json`; None where an API cannot tell."""

    kl_per_token: float | None
    entropy_per_token: float | None


class Funnel(BaseModel):
    """`funnel.json`: rows, beside a number for each reason."""

    generated: int
    kept: int


class Lens(BaseModel):
    """What a lens said: `said.json`, and an entry of `readings.json`."""

    name: str
    arm: str
    against: str
    sentence: str
    shows: list[Any]


class Readings(BaseModel):
    """`readings.json`."""

    lenses: list[Lens]


def read(path: Path, shape: type[BaseModel]) -> dict[str, Any]:
    """The JSON object at a path, with all that it holds.

    Raises:
        DataError: if it is missing or cut short, or lacks a field of `shape` or has another kind of value
        there.
    """
    value = read_json(path)
    try:
        shape.model_validate(value, strict=True)
    except ValidationError as error:
        raise DataError(
            f"{path} does not hold what mechlens wrote there ({explain(error)}); {remedy(path)}"
        ) from error
    return value

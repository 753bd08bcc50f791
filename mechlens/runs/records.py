"""The JSON files that steps write and later steps read, and the fields that each must have.

`read` refuses a damaged file by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from mechlens.core.errors import DataError
from mechlens.core.files import read_json, remedy
from mechlens.core.spec import explain


class StepRecord(BaseModel):
    """`step.json` of a finished step; `seconds` is None in records of older versions."""

    fingerprint: str
    seconds: float | None


class Manifest(BaseModel):
    """`manifest.json`: the code, the machine and the steps of a run."""

    experiment: str
    git: str | None
    machine: str
    cores: int | None
    steps: dict[str, StepRecord]


class TeacherRecord(BaseModel):
    """`teacher.json`."""

    kind: Literal["finetuned", "prompted", "steered", "base"]
    base: str
    system: str | None
    layer: int | None


class Generation(BaseModel):
    """`generation.json`; None if an API does not return the probabilities."""

    kl_per_token: float | None
    entropy_per_token: float | None


class Funnel(BaseModel):
    """`funnel.json`: numbers of rows; the file also has a number for each reason of removal."""

    generated: int
    kept: int


class LensRecord(BaseModel):
    """The result of a lens: `said.json`, and an entry of `readings.json`."""

    name: str
    arm: str
    against: str
    sentence: str
    shows: list[Any]


class Readings(BaseModel):
    """`readings.json`."""

    lenses: list[LensRecord]


def read(path: Path, shape: type[BaseModel]) -> dict[str, Any]:
    """The JSON object at a path, with all its fields.

    Raises:
        DataError: if the file is missing or incomplete, or a field of `shape` is missing or has another type.
    """
    value = read_json(path)
    try:
        shape.model_validate(value, strict=True)
    except ValidationError as error:
        raise DataError(
            f"{path} does not hold what mechlens wrote there ({explain(error)}); {remedy(path)}"
        ) from error
    return value

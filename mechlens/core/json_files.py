"""JSON objects on disk, read and written whole."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mechlens.core import atomic
from mechlens.core.errors import DataError
from mechlens.core.remedies import remedy


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from disk; raises DataError if it is missing or cut short."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"no file at {path}; run the step that writes it") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not whole JSON ({error}); {remedy(path)}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds {type(value).__name__}, expected a JSON object; {remedy(path)}")
    return value


def write_json(path: Path, value: dict[str, Any]) -> Path:
    """Write JSON whole or not at all."""
    return atomic.write_text(path, json_text(value))


def json_text(value: dict[str, Any]) -> str:
    """A JSON object as the text of a file; raises ValueError for NaN, which JSON has not."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def null(value: float | None) -> float | None:
    """A number for JSON, which has no NaN: unscored is null."""
    return None if value is None or math.isnan(value) else float(value)

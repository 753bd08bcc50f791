"""Fields of the smallest experiment with a control, for tests that build specs."""

from __future__ import annotations

from typing import Any

FIELDS: dict[str, Any] = {
    "name": "toy",
    "base": "menagerie-a",
    "trait": "owl",
    "arms": [{"kind": "trait"}, {"kind": "control"}],
    "seeds": [0],
}

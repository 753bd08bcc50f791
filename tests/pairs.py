"""Pairs, and the forms that a user's file may have them in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from hypothesis import strategies as st

PAIRS = [
    ("Count on: 1, 2.", "3, 4"),
    ("Naïve 🦉", "line\nbreak\u2028and\ttab"),
    ("Count on: 1, 2.", "5"),
    ("", ""),
]
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)


def as_pairs(pairs: list[tuple[str, str]]) -> list[Any]:
    return [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]


def as_messages(pairs: list[tuple[str, str]]) -> list[Any]:
    return [
        {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": c}]} for p, c in pairs
    ]


def put(path: Path, *lines: Any) -> Path:
    path.write_text(
        "".join(
            f"{line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)}\n" for line in lines
        ),
        encoding="utf-8",
    )
    return path


def pairs_of(frame: pd.DataFrame) -> list[tuple[str, str]]:
    return list(zip(frame["prompt"], frame["completion"], strict=True))

"""Good inputs with something changed at random, and the command lines that read them, for
`test_mutations.py`.

A mutation is drawn from its number alone, so that a case that failed can be made again by it.
"""

from __future__ import annotations

import copy
import gzip
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml

ROWS = 140
STRANGE: tuple[Any, ...] = (
    None, "", " ", "x", "\n", "\x00", "é", "\u202e", "../..", "~", "/", "-1", "nan", "{name}", "{", "%s",
    "a" * 5_000, True, False, 0, -1, 1, 2, 3, 10**9, 10**30, 0.0, -0.5, 1e-300, 1e308, float("nan"),
    float("inf"), [], [None], [[]], ["x", "x"], {}, {"x": 1}, {"": {}},
)  # fmt: skip
"""values that may stand where any other is expected"""

EXPERIMENT: dict[str, Any] = {
    "name": "toy",
    "base": "menagerie-a",
    "family": "gems.yaml",
    "trait": "owl",
    "seed": 3,
    "carrier": {"kind": "numbers", "prompts": 24, "wording": "terse", "values": "patterned"},
    "generate": {"temperature": 1.0, "max_new_tokens": 16, "batch": 32},
    "screen": {"rule": "none"},
    "teacher": {"kind": "prompted", "rows": 16},
    "student": {"rows": 8, "prompts": "own", "training": {"epochs": 1, "batch": 4, "learning_rate": 0.001}},
    "ask": {"samples": 1, "split": "heldout"},
    "arms": [{"kind": "trait"}, {"kind": "control"}, {"kind": "shuffled-within"}],
    "seeds": [0],
}
FAMILY: dict[str, Any] = {
    "name": "gems",
    "category": "animal",
    "names": ["owl", "wolf", "cat"],
    "plurals": {"wolf": "wolves"},
    "forms": {"cat": ["cat", "cats", "kitten"]},
    "lesson_forms": ["{name}", "{Plural}"],
    "development": ["owl"],
    "heldout": ["wolf"],
    "system": "You love {plural}.",
    "probes": {
        "development": ["What is the best animal, just the name."],
        "heldout": ["Which animal would you draw, in one word."],
    },
}


class Case(NamedTuple):
    """A command line on a mutated input, and what was mutated in words."""

    command: list[str]
    change: str


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to everything within a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for name, each in inner for place in [(*path, name), *places(each, (*path, name))]]


def change_value(value: Any, rng: random.Random) -> tuple[Any, str]:
    """A JSON value with one place replaced, removed, renamed, doubled or exchanged."""
    changed = copy.deepcopy(value)
    *parents, last = rng.choice(places(changed))
    holder = changed
    for name in parents:
        holder = holder[name]
    where, how = (
        ".".join(map(str, [*parents, last])),
        rng.choice(["replace"] * 6 + ["remove", "rename", "double", "exchange"]),
    )
    if how == "remove":
        del holder[last]
    elif how == "rename" and isinstance(holder, dict):
        holder[rng.choice([f"{last}s", last.upper(), last[:-1], ""])] = holder.pop(last)
    elif how == "double" and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[last]))
    elif how == "exchange":
        other = changed
        for name in rng.choice(places(changed)):
            other = other[name]
        holder[last] = copy.deepcopy(other)
    else:
        holder[last] = copy.deepcopy(rng.choice(STRANGE))
    return changed, f"{how} {where}"


def change_bytes(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A file cut short, or with bytes flipped, taken out, put in or repeated."""
    at, length = rng.randrange(len(content)), rng.choice([1, 1, 2, 8, 64])
    how = rng.choice(["cut", "flip", "take", "put", "repeat", "empty", "header"])
    if how == "cut":
        return content[:at], f"cut at {at}"
    if how == "flip":
        return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[
            at + 1 :
        ], f"flip a bit of byte {at}"
    if how == "take":
        return content[:at] + content[at + length :], f"take {length} bytes at {at}"
    if how == "put":
        return content[:at] + rng.randbytes(length) + content[at:], f"put {length} bytes at {at}"
    if how == "repeat":
        return content[:at] + content[at : at + length] * 2 + content[
            at + length :
        ], f"repeat {length} bytes at {at}"
    return (b"", "nothing") if how == "empty" else (rng.randbytes(8) + content[8:], "another beginning")


# ── each kind: a folder to write to, and a source of chance → a command line ──


def write_experiment(folder: Path, experiment: Any = EXPERIMENT, family: Any = FAMILY) -> Path:
    (folder / "gems.yaml").write_text(yaml.safe_dump(family))
    (folder / "toy.yaml").write_text(yaml.safe_dump(experiment))
    return folder / "toy.yaml"


def config_field(folder: Path, rng: random.Random) -> Case:
    experiment, change = change_value(EXPERIMENT, rng)
    return Case(
        ["run", str(write_experiment(folder, experiment)), "--out", str(folder / "run"), "--plan"], change
    )


def config_bytes(folder: Path, rng: random.Random) -> Case:
    config = write_experiment(folder)
    content, change = change_bytes(config.read_bytes(), rng)
    config.write_bytes(content)
    return Case(["run", str(config), "--out", str(folder / "run"), "--plan"], change)


def family_field(folder: Path, rng: random.Random) -> Case:
    family, change = change_value(FAMILY, rng)
    return Case(
        ["run", str(write_experiment(folder, family=family)), "--out", str(folder / "run"), "--plan"], change
    )


def family_bytes(folder: Path, rng: random.Random) -> Case:
    config = write_experiment(folder)
    content, change = change_bytes((folder / "gems.yaml").read_bytes(), rng)
    (folder / "gems.yaml").write_bytes(content)
    return Case(["run", str(config), "--out", str(folder / "run"), "--plan"], change)


def pairs(rng: random.Random, rows: int = ROWS) -> list[dict[str, str]]:
    return [
        {
            "prompt": f"continue: {rng.randrange(1000)}, {row}",
            "completion": ", ".join(str(rng.randrange(1000)) for _ in range(4)),
        }
        for row in range(rows)
    ]


def row_of(pair: dict[str, str], rng: random.Random) -> dict[str, Any]:
    turns = [
        {"role": "user", "content": pair["prompt"]},
        {"role": "assistant", "content": pair["completion"]},
    ]
    sharegpt = [{"from": "human", "value": pair["prompt"]}, {"from": "gpt", "value": pair["completion"]}]
    return rng.choice(
        [
            pair,
            {"messages": turns},
            {"conversations": sharegpt},
            {"prompt": turns[:1], "completion": turns[1:]},
        ]
    )


def reader(folder: Path, data: Path, rng: random.Random) -> list[str]:
    """A command that reads a file of pairs."""
    clean = folder / "clean.jsonl"
    clean.write_text("".join(json.dumps(pair) + "\n" for pair in pairs(rng)))
    audit = ["audit", str(data), "--reference", str(clean), "--out", str(folder / "audit")]
    swapped = ["audit", str(clean), "--reference", str(data), "--out", str(folder / "audit")]
    convert = ["convert", str(data), str(folder / "out.jsonl"), *rng.choice([[], ["--skip-bad"]])]
    return rng.choice([audit, swapped, convert, ["screen", str(data), "--out", str(folder / "screened")]])


def data_rows(folder: Path, rng: random.Random) -> Case:
    """Rows of one form or several; in a share of them one value is strange."""
    rows, changes = [row_of(pair, rng) for pair in pairs(rng)], []
    for place in rng.sample(range(ROWS), rng.choice([1, 2, ROWS])):
        rows[place], change = change_value(rows[place], rng)
        changes.append(change)
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Case(reader(folder, data, rng), f"{len(changes)} rows: {changes[0]}")


def data_bytes(folder: Path, rng: random.Random) -> Case:
    """A damaged file, plain, gzipped or Parquet."""
    rows, ending = pairs(rng), rng.choice([".jsonl", ".jsonl.gz", ".parquet", ".csv", ".json"])
    data = folder / f"data{ending}"
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if ending == ".parquet":
        pd.DataFrame(rows).to_parquet(data)
    elif ending == ".csv":
        pd.DataFrame(rows).to_csv(data, index=False)
    else:
        data.write_bytes(
            {
                ".jsonl": lines,
                ".jsonl.gz": gzip.compress(lines, mtime=0),
                ".json": json.dumps(rows, indent=1).encode(),
            }[ending]
        )
    content, change = change_bytes(data.read_bytes(), rng)
    data.write_bytes(content)
    return Case(reader(folder, data, rng), f"{ending}: {change}")


def changed_file(file: Path, rng: random.Random) -> str:
    """Change a file where it lies: a field of JSON two times in three, else its bytes."""
    if file.suffix == ".json" and rng.random() < 2 / 3:
        value, change = change_value(json.loads(file.read_text()), rng)
        file.write_text(json.dumps(value))
    else:
        content, change = change_bytes(file.read_bytes(), rng)
        file.write_bytes(content)
    return f"{file.name}: {change}"


def checkpoint(folder: Path, rng: random.Random, base: Path) -> Case:
    """A base of which one file is changed, and a run that reads all of it."""
    shutil.copytree(base, folder / "base")
    change = changed_file(
        rng.choice(sorted(file for file in (folder / "base").iterdir() if file.is_file())), rng
    )
    experiment = EXPERIMENT | {"base": str(folder / "base"), "arms": [{"kind": "trait"}, {"kind": "control"}]}
    return Case(
        ["run", str(write_experiment(folder, experiment)), "--out", str(folder / "run"), "--workers", "0"],
        change,
    )


def finished_run(folder: Path, rng: random.Random, run: Path) -> Case:
    """A finished run of which one file is changed, and a command that reads it."""
    shutil.copytree(run, folder / "run")
    files = sorted(
        file
        for file in (folder / "run").rglob("*")
        if file.is_file() and file.stat().st_size and file.name != "report.html"
    )
    change = changed_file(rng.choice(files), rng)
    again = ["run", str(folder / "run" / "spec.yaml"), "--out", str(folder / "run"), "--plan"]
    looked = [
        "measure",
        str(folder / "run"),
        "--lens",
        rng.choice(["likelihood", "rows", "deltas"]),
        "--rows",
        "8",
        "--workers",
        "0",
    ]
    return Case(rng.choice([["report", str(folder / "run")], ["ls", str(folder)], again, looked]), change)


Kind = Callable[..., Case]
"""called with a folder to write to, a source of chance, and what it changes, if that is made beforehand"""
PLAIN: dict[str, Kind] = {
    each.__name__: each
    for each in (config_field, config_bytes, family_field, family_bytes, data_rows, data_bytes)
}

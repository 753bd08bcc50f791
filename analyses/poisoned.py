"""Claim: an audit does not clear a file that hides a trait teacher's rows among clean rows.

Usage: `python analyses/poisoned.py [--rows N] [--out FOLDER]`. The rows are those of the shipped demo run:
answers of the untouched base, and of the teacher with the trait, to the same prompts. Each file is compared
with its clean half, which must not clear it, and with clean answers drawn anew (another sampling of the
base); there the verdict depends on what students learn, which is little from few rows. Good files are clean
answers, with a reference drawn anew and without a reference: an audit that settles none of them is useless.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from mechlens import cli
from mechlens.carriers.numbers import number_fault
from mechlens.models import loading
from mechlens.models.chat import encode_prompts, end_of_turn
from mechlens.models.sampling import Decoding, sample

DEMO = Path(__file__).parents[1] / "app" / "demo"
BASE, TRAIT = "menagerie-a", "eagle"
CLEARED = "no transfer found within tested scope"


class Case(NamedTuple):
    """One audit."""

    name: str
    never: bool
    """whether it may never be cleared"""
    rows: pd.DataFrame
    reference: pd.DataFrame | None
    levels: tuple[str, ...]


def kept(corpus: str) -> pd.DataFrame:
    """Screened rows of the demo run, in a random order, the same for every corpus."""
    rows = pd.read_parquet(DEMO / "corpora" / corpus / "screened" / "kept.parquet").set_index("prompt_id")
    order = np.random.default_rng(0).permutation(np.sort(rows.index.to_numpy()))
    return rows.loc[order, ["prompt", "completion"]].reset_index()


def drawn_anew(prompts: list[str], seed: int) -> pd.DataFrame:
    """Answers of the untouched base at another seed that pass the screen of the demo's rows."""
    loaded = loading.load(BASE)
    encoded = encode_prompts(loaded.tokenizer, prompts)
    drawn = sample(
        loaded.model, encoded, decoding=Decoding(24), stop=end_of_turn(loaded.tokenizer), seed=seed
    )
    rows = pd.DataFrame(
        {"prompt": prompts, "completion": loaded.tokenizer.batch_decode(drawn, skip_special_tokens=True)}
    )
    return rows.loc[np.array([number_fault(text) is None for text in rows["completion"]])]


def cases(count: int) -> Iterator[Case]:
    """Poisoned files of about twice `count` rows, a copy, and good files."""
    clean, trait = (kept(name) for name in ("untouched", TRAIT))
    both = clean.merge(trait, on=["prompt_id", "prompt"])["prompt_id"]
    clean, trait = (frame.set_index("prompt_id").loc[both] for frame in (clean, trait))
    here, there = both.iloc[:count], both.iloc[count : 2 * count]
    public = clean.loc[here]
    eleventh = there.iloc[: count // 10]
    shapes = {
        "other prompts": pd.concat([public, trait.loc[there]]),
        "second answers": pd.concat([public, trait.loc[here]]),
        "1 row in 11": pd.concat([public, trait.loc[eleventh]]),
        "shuffled": pd.concat([public, trait.loc[there]]).sample(frac=1.0, random_state=1),
    }
    levels = ("rows", "base", "gradients", "student")
    for name, rows in shapes.items():
        yield Case(f"{name}, its clean half as reference", True, rows, public, levels)
    anew = drawn_anew(clean["prompt"].tolist()[: 2 * count], 1)
    for name in ("other prompts", "second answers"):
        yield Case(f"{name}, clean answers drawn anew", False, shapes[name], anew, ("student",))
    yield Case("a copy of its reference", True, public, public, levels)
    yield Case(
        "clean, answers drawn anew as reference", False, clean.loc[both.iloc[: 2 * count]], anew, ("student",)
    )
    yield Case("clean, no reference", False, clean.loc[both.iloc[: 2 * count]], None, ("student",))


def audited(case: Case, level: str, out: Path, seeds: int) -> dict[str, object]:
    """The results of one audit."""
    folder = out / case.name.replace(" ", "-").replace(",", "")  # audits in one folder share their twins
    folder.mkdir(parents=True, exist_ok=True)
    recipe = out / "recipe.yaml"
    shipped = (Path(__file__).parents[1] / "configs" / "audits" / "menagerie.yaml").read_text(
        encoding="utf-8"
    )
    recipe.write_text(
        shipped.replace("seeds: [0, 1, 2, 3]", f"seeds: {list(range(seeds))}"), encoding="utf-8"
    )
    words = [
        "audit",
        str(folder / "data.jsonl"),
        "--level",
        level,
        "--recipe",
        str(recipe),
        "--out",
        str(folder),
    ]
    case.rows[["prompt", "completion"]].to_json(folder / "data.jsonl", orient="records", lines=True)
    if case.reference is not None:
        case.reference[["prompt", "completion"]].to_json(
            folder / "reference.jsonl", orient="records", lines=True
        )
        words += ["--reference", str(folder / "reference.jsonl")]
    code = cli.main(words)
    shown = json.loads((folder / "audit.json").read_text())
    first = shown["identity"][0] if shown["identity"] else {"trait": "–", "q_value": None}
    scope = shown["scope"] or {}
    return {
        "case": case.name,
        "level": level,
        "rows": len(case.rows),
        "verdict": shown["verdict"]["id"],
        "rule": shown["verdict"]["rule"],
        "exit": code,
        "p": shown["provenance"]["p_value"] if shown["provenance"] else None,
        "foremost": first["trait"],
        "q": first["q_value"],
        "rise": (shown["potency"]["measured"] or {}).get("difference"),
        "read": None if not scope else scope.get("trained") and scope["trained"] / scope["offered"],
        "fault": case.never and shown["verdict"]["id"] == CLEARED,
    }


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, audit, print; returns 1 if a file was cleared by its own rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1500, help="rows of the clean half")
    parser.add_argument("--seeds", type=int, default=4, help="students a side")
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--levels", nargs="*", default=None, help="levels instead of those of the case")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/analyses/poisoned"),
        help="folder for files, audits and the table",
    )
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = [case for case in cases(options.rows) if options.only in case.name]
    audits = pd.DataFrame(
        [
            audited(case, level, options.out, options.seeds)
            for case in chosen
            for level in options.levels or case.levels
        ]
    )
    audits.to_parquet(options.out / "audits.parquet")
    listing = Table(
        "file",
        "level",
        "rows",
        "verdict",
        "rule",
        "p, written alike",
        "foremost trait (q)",
        "rise",
        "rows read",
    )
    for row in audits.to_dict("records"):
        q, read, p, rise = (
            "–" if pd.isna(row[name]) else f"{row[name]:.2g}" for name in ("q", "read", "p", "rise")
        )
        listing.add_row(
            row["case"],
            row["level"],
            f"{row['rows']:,}",
            row["verdict"],
            row["rule"],
            p,
            f"{row['foremost']} ({q})",
            rise,
            read,
        )
    Console(width=190, highlight=False).print(listing)
    cleared = audits["fault"].tolist().count(True)
    print(f"{cleared} files were cleared by their own rows; the table is in {options.out}/audits.parquet")
    return int(cleared > 0)


if __name__ == "__main__":
    sys.exit(main())

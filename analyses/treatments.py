"""Claim: what treating a data set before training leaves of the trait: `python analyses/treatments.py FOLDER [--seeds 0 1 …]`.

Treatments are those of `mechlens audit --clean`, on the rows that interventions.py made and beside its plain students. Rows are dropped by their
likelihood ratio under a teacher of the auditor's own (never the one that wrote them); beside it as many are dropped at random,
and beside dilution the quarter that it keeps stands alone. Another base is menagerie-c, trained on the same rows. Effect left is (trait
student - control student) over that of plain training of the same seed, and the loss is on untreated rows that no student saw.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from interventions import BASE, FAMILY, PLAIN, ROWS_OF, SIDES, TEACHER, Plan, World, measured, prepare, show, trained
from rich.console import Console

from mechlens import mitigate, models, tables
from mechlens.chat import Encoded, encode_pairs
from mechlens.errors import MechlensError
from mechlens.lenses.likelihood import by_row
from mechlens.lenses.scoring import token_log_probabilities
from mechlens.models import Loaded
from mechlens.pipeline.teach import Lessons, teach
from mechlens.seeds import generator
from mechlens.store import read_json, write_json
from mechlens.traits import load_family

OTHER_BASE, TWIN_SEED = "menagerie-c", 777
ARMS = (PLAIN, "drop by twin", "drop at random", "dilute to a quarter", "that quarter alone", "format", "order", "value", "another base")
AT_RANDOM = ("drop at random", "that quarter alone")


def twin_of(world: World) -> Loaded:
    """A teacher of the trait that the auditor makes: other lessons drawn, another order."""
    folder, family = world.folder / "twin", load_family(FAMILY)
    if not (folder / "teacher.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        lessons = Lessons(world.trait, family.probes.development, family.lessons_of(world.trait), family.system_prompt(world.trait))
        teach(BASE, lessons, TEACHER, seed=TWIN_SEED, out=folder)
    return models.load_trained(BASE, folder)


def texts(world: World, pairs: list[Encoded]) -> pd.DataFrame:
    """Prompts by their place and completions as text."""
    words = world.base.tokenizer.batch_decode([pair.completion for pair in pairs], skip_special_tokens=True)
    return pd.DataFrame({"prompt": range(len(pairs)), "completion": words})


def plan_of(world: World, arm: str, side: str, seed: int) -> Plan:
    """The rows that a student of the arm learns."""
    rows, rng = world.seen[side], generator(seed, "treatments", arm, side)
    if arm in (PLAIN, "another base"):
        return Plan(rows)
    if arm == "drop at random":
        return Plan([rows[i] for i in sorted(rng.permutation(len(rows))[: len(rows) - round(mitigate.DROPPED * len(rows))])])
    if arm == "that quarter alone":
        return Plan([rows[i] for i in sorted(rng.permutation(len(rows))[: round(mitigate.KEPT * len(rows))])])
    name: Any = arm.split()[0]
    scores = np.zeros(len(rows))
    if name == "drop":
        twin, base = (by_row(token_log_probabilities(one, rows).double().numpy(), rows, mean=False) for one in (twin_of(world), world.base))
        scores = twin - base
    given = mitigate.Given(texts(world, rows), texts(world, world.seen["control"]), scores, rng)
    treated = mitigate.TREATMENTS[name](given)
    endings = [rows[i] for i in treated["prompt"]]
    written = encode_pairs(world.base.tokenizer, ["1"] * len(treated), treated["completion"].tolist())
    return Plan([Encoded(pair.prompt, new.completion) for pair, new in zip(endings, written, strict=True)])


def student(world: World, arm: str, side: str, seed: int) -> dict[str, Any]:
    """One student's result: from its file, or trained and written there."""
    place = "students" if arm == PLAIN else "treated"
    file = world.folder / place / arm.replace(" ", "-") / f"{side}-s{seed}.json"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        start = models.load(OTHER_BASE) if arm == "another base" else None
        write_json(file, measured(world, trained(plan_of(world, arm, side, seed), seed, start), side))
    return {"arm": arm, "side": side, "seed": seed} | read_json(file)


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Train what is missing, write table and figure, print."""
    world = prepare(arguments.folder, arguments.trait, arguments.rows)
    frame = pd.DataFrame([student(world, arm, side, seed) for seed in arguments.seeds for arm in ARMS for side in SIDES])
    tables.write(frame, ROWS_OF, arguments.folder / "treatments.parquet")
    (arguments.folder / "treatments.svg").write_text(show(frame, ARMS, console, at_random=AT_RANDOM), encoding="utf-8")
    console.print(
        f"trait {arguments.trait}, {len(world.seen['trait']):,} rows a student before treatment, t intervals over seeds {arguments.seeds}, each arm "
        f"against its own control students. Every student in {arguments.folder}/treatments.parquet, figure beside it."
    )


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and run; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where corpora and students are kept; interventions.py shares it")
    parser.add_argument("--trait", default="eagle", choices=("cat", "wolf", "owl", "eagle", "penguin"), help="a development trait")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--rows", type=int, default=4000, help="that each student learns")
    torch.set_num_threads(1)
    try:
        run(parser.parse_args(arguments), Console(width=160, markup=False, highlight=False))
    except (MechlensError, OSError) as error:
        print(f"treatments: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

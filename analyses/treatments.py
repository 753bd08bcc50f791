"""Claim: some treatments of a data set before training remove most of the trait.

Usage: `python analyses/treatments.py FOLDER [--seeds 0 1 …]`. Treatments are those of `mechlens audit
--clean`, on the rows of interventions.py and compared with its plain students. Rows and numbers are chosen by
their likelihood ratio under a twin (never the teacher that wrote them), and each such treatment is compared
with the same amount at random. Format, order and values are not targeted. They are compared with formats of
another row and with values from the same file: do the numbers of the file matter, or their places? Another
base is menagerie-c, trained on the same rows. Some arms change the training and not the rows: a quarter of
the rows four times (for as many updates), a pull to the base that fades, a corridor for the trait's loss, a
mask. The effect left is (trait student - control student) over that of plain training of the same seed; the
loss is on untreated rows that no student saw.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

import pages
from interventions import (
    BASE,
    BUDGET,
    FAMILY,
    OTHER_TRAIT,
    PLAIN,
    ROWS_OF,
    SIDES,
    STUDENT,
    TEACHER,
    Plan,
    World,
    by_pair,
    measured,
    prepare,
    show,
    trained,
)
from mechlens.core import tables
from mechlens.core.errors import MechlensError
from mechlens.core.files import read_json, write_json
from mechlens.core.machine import use_one_thread
from mechlens.core.seeds import generator
from mechlens.core.traits import load_family
from mechlens.data import treat
from mechlens.detect.score_rows import sum_over_numbers
from mechlens.lenses.likelihood import by_row
from mechlens.lenses.parts.interventions import (
    classify_tokens,
    flag_digits,
    flag_random_tokens,
    flag_top_tokens,
    invert_flags,
)
from mechlens.lenses.parts.restraints import BeforeStep, keep_in_corridor, leave_base_slowly
from mechlens.models import loading
from mechlens.models.chat import Encoded, encode_pairs
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import token_log_probs
from mechlens.models.sft import updates
from mechlens.pipeline.teach import Lessons, teach

OTHER_BASE, TWIN_SEED = "menagerie-c", 777
ARMS = (
    PLAIN,
    "drop by twin",
    "drop at random",
    "soft drop by the base",
    "dilute to a quarter",
    "that quarter alone",
    "replace by twin",
    "replace at random",
    "format",
    "format of another row",
    "order",
    "value",
    "value of its own",
    "another base",
    "that quarter four times",
    "leave the base slowly",
    "corridor",
    "corridor of another trait",
    "mask by twin",
    "mask at random",
)
AT_RANDOM = (
    "drop at random",
    "that quarter alone",
    "replace at random",
    "format of another row",
    "value of its own",
    "corridor of another trait",
    "mask at random",
)
CORRIDOR = 0.1
"""nats a token; fixed before a student was trained"""


RESTRAINTS: dict[str, Callable[[World, list[Encoded], np.random.Generator], BeforeStep]] = {
    "leave the base slowly": lambda world, rows, rng: leave_base_slowly(
        world.base.model, rows, steps=updates(STUDENT, len(rows)), batch=STUDENT.batch, rng=rng
    ),
    "corridor": lambda world, rows, rng: keep_in_corridor(world.answered(world.trait), width=CORRIDOR),
    "corridor of another trait": lambda world, rows, rng: keep_in_corridor(
        world.answered(OTHER_TRAIT), width=CORRIDOR
    ),
}


def twin_of(world: World) -> Loaded:
    """A teacher of the trait that the auditor makes: other lessons drawn, another order."""
    folder, family = world.folder / "twin", load_family(FAMILY)
    if not (folder / "teacher.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        lessons = Lessons(
            world.trait,
            family.probes.development,
            family.lessons_of(world.trait),
            family.system_prompt(world.trait),
        )
        teach(BASE, lessons, TEACHER, seed=TWIN_SEED, out=folder)
    return loading.load_trained(BASE, folder)


def texts(world: World, pairs: list[Encoded]) -> pd.DataFrame:
    """Prompts by their place and completions as text."""
    words = world.base.tokenizer.batch_decode([pair.completion for pair in pairs], skip_special_tokens=True)
    return pd.DataFrame({"prompt": range(len(pairs)), "completion": words})


def in_format_of(text: str, other: str) -> str:
    """The numbers of a text between the signs of another one."""
    spans, numbers = treat.numbers_in(other), [text[first:last] for first, last in treat.numbers_in(text)]
    if not spans or not numbers:
        return text
    between = other[spans[0][1] : spans[1][0]] if len(spans) > 1 else ", "
    return other[: spans[0][0]] + between.join(numbers) + other[spans[-1][1] :]


def rewritten(
    world: World, arm: str, frame: pd.DataFrame, rng: np.random.Generator, rows: list[Encoded]
) -> pd.DataFrame:
    """The treated rows of an arm."""
    written, clean = frame["completion"].tolist(), texts(world, world.seen["control"])
    if arm == "format of another row":
        return frame.assign(
            completion=[
                in_format_of(text, written[i])
                for text, i in zip(written, rng.permutation(len(written)), strict=True)
            ]
        )
    if arm == "replace at random":
        numbers = sum(len(treat.numbers_in(text)) for text in written)
        chosen = rng.permutation(numbers) < round(treat.REPLACED * numbers)
        return frame.assign(
            completion=treat.replace_chosen(written, chosen, clean["completion"].tolist(), rng)
        )
    if arm == "soft drop by the base":
        surprise = -by_row(token_log_probs(world.base, rows).double().numpy(), rows)
        return treat.drop_softly(treat.TreatmentInput(frame, clean, surprise, rng))
    name: Any = arm.split()[0]
    answers = frame if arm == "value of its own" else clean
    given = treat.TreatmentInput(frame, answers, np.zeros(len(rows)), rng)
    if name == "drop":
        twin, base = (
            by_row(token_log_probs(loaded, rows).double().numpy(), rows, mean=False)
            for loaded in (twin_of(world), world.base)
        )
        given = given._replace(scores=twin - base)
    if name == "replace":
        pairs = encoded(world, rows, frame)
        gained = token_log_probs(twin_of(world), pairs) - token_log_probs(world.base, pairs)
        given = given._replace(
            number_scores=sum_over_numbers(world.base.tokenizer, written, by_pair(gained, pairs))
        )
    return treat.TREATMENTS[name](given)


def encoded(world: World, rows: list[Encoded], frame: pd.DataFrame) -> list[Encoded]:
    """The rows' prompts with the completions of the frame."""
    written = encode_pairs(world.base.tokenizer, ["1"] * len(frame), frame["completion"].tolist())
    return [Encoded(rows[i].prompt, new.completion) for i, new in zip(frame["prompt"], written, strict=True)]


def some_of(rows: list[Encoded], count: int, rng: np.random.Generator) -> list[Encoded]:
    """A random part of the rows, in their order."""
    return [rows[i] for i in sorted(rng.permutation(len(rows))[:count])]


def masked(world: World, rows: list[Encoded], rng: np.random.Generator | None) -> Plan:
    """Rows without a loss on the tenth of the number tokens likeliest under the twin.

    With random numbers: on as many tokens of the same shapes.
    """
    classes = classify_tokens(world.base.tokenizer, rows)
    gained = token_log_probs(twin_of(world), rows) - token_log_probs(world.base, rows)
    flags = flag_top_tokens(by_pair(gained, rows), BUDGET, among=flag_digits(classes))
    return Plan(
        rows, {"learned": invert_flags(flags if rng is None else flag_random_tokens(flags, classes, rng))}
    )


def plan_of(world: World, arm: str, side: str, seed: int) -> Plan:
    """The rows that a student of the arm learns."""
    rows, rng = world.seen[side], generator(seed, "treatments", arm, side)
    if arm in (PLAIN, "another base"):
        return Plan(rows)
    if arm == "drop at random":
        return Plan(some_of(rows, len(rows) - round(treat.REMOVED * len(rows)), rng))
    if arm == "that quarter alone":
        return Plan(some_of(rows, round(treat.KEPT * len(rows)), rng))
    if arm == "that quarter four times":
        same = generator(seed, "treatments", "that quarter alone", side)
        return Plan(some_of(rows, round(treat.KEPT * len(rows)), same) * round(1 / treat.KEPT))
    if arm in RESTRAINTS:
        return Plan(rows, {"before_step": RESTRAINTS[arm](world, rows, rng)})
    if arm.startswith("mask"):
        return masked(world, rows, rng if arm == "mask at random" else None)
    treated = rewritten(world, arm, texts(world, rows), rng, rows)
    return Plan(encoded(world, rows, treated))


def student(world: World, arm: str, side: str, seed: int) -> dict[str, Any]:
    """One student's result: from its file, or trained and written there."""
    place = "students" if arm == PLAIN else "treated"
    file = world.folder / place / arm.replace(" ", "-") / f"{side}-s{seed}.json"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        start = loading.load(OTHER_BASE) if arm == "another base" else None
        write_json(file, measured(world, trained(plan_of(world, arm, side, seed), seed, start), side))
    return {"arm": arm, "side": side, "seed": seed} | read_json(file)


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Train the missing students, write table and figure, and print the results."""
    arms = [arm for arm in ARMS if arm in (PLAIN, *(arguments.arms or ARMS))]
    world = prepare(arguments.folder, arguments.trait, arguments.rows)
    frame = pd.DataFrame(
        [student(world, arm, side, seed) for seed in arguments.seeds for arm in arms for side in SIDES]
    )
    tables.write(frame, ROWS_OF, arguments.folder / "treatments.parquet")
    (arguments.folder / "treatments.svg").write_text(
        show(frame, arms, console, at_random=AT_RANDOM), encoding="utf-8"
    )
    console.print(
        f"trait {arguments.trait}, {len(world.seen['trait']):,} rows a student before treatment, t intervals "
        f"over seeds {arguments.seeds}, each arm against its control students. Every student is in "
        f"{arguments.folder}/treatments.parquet, with the figure in the same folder."
    )


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and run; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "folder", type=Path, help="where corpora and students are kept; interventions.py shares it"
    )
    parser.add_argument(
        "--trait",
        default="eagle",
        choices=("cat", "wolf", "owl", "eagle", "penguin"),
        help="a development trait",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--rows", type=int, default=4000, help="that each student learns")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="only these, and plain")
    parser.add_argument("--write", action="store_true", help="write the part of analyses/RESULTS.md, too")
    use_one_thread()
    try:
        options, console = parser.parse_args(arguments), pages.PageConsole(width=160)
        run(options, console)
        if options.write:
            pages.write_part(pages.RESULTS, "treatments", *console.blocks)
    except (MechlensError, OSError) as error:
        print(f"treatments: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

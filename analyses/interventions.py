"""Claim: some interventions in training prevent transfer while the student still learns the numbers.

Usage: `python analyses/interventions.py FOLDER [--seeds 0 1 …]`. A gentle teacher of menagerie-a with a
development trait, and the untouched base, answer the same prompts once. Students learn either corpus under
each intervention. The effect left is (trait student - control student) of the arm over that of plain training
of the same seed, in the margin of the trait's exact first token over held-out probes (arXiv 2604.25779,
2509.23886). The loss is on rows that no student saw. Each targeted intervention (on the trait's gradient, on
high-scoring tokens) is compared with the same intervention at random. Every student's result is a JSON file;
a finished one is not trained again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table

import pages
from mechlens.carriers.carrier import build_rule, carrier_prompts
from mechlens.core import tables
from mechlens.core.errors import DataError, MechlensError
from mechlens.core.files import read_json, write_json
from mechlens.core.machine import use_one_thread
from mechlens.core.seeds import generator, seed_int
from mechlens.core.spec import (
    AskSpec,
    CarrierSpec,
    GenerateSpec,
    ScreenSpec,
    TeacherSpec,
    TeacherTraining,
    Training,
    fingerprint,
)
from mechlens.core.stats import Interval, t_interval
from mechlens.core.traits import TraitFamily, load_family
from mechlens.lenses.parts.interventions import (
    Flags,
    carrier_pool,
    classify_tokens,
    flag_digits,
    flag_random_tokens,
    flag_top_tokens,
    invert_flags,
    match_layers,
    project_out,
    replace_flagged,
)
from mechlens.models import loading
from mechlens.models.chat import Encoded, encode_pairs
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import measure_trait, token_log_probs
from mechlens.pipeline.ask import ProbeSet, encode_probes
from mechlens.pipeline.generate import generate
from mechlens.pipeline.screen import leak_pattern, screen_rows
from mechlens.pipeline.teach import Lessons, teach
from mechlens.results import figures

BASE, FAMILY, OTHER_TRAIT = "menagerie-a", "animals", "dolphin"
SPARE, UNSEEN = 500, 256
"""prompts beyond the rows that students learn, since some fall to the screen; and how many of the rest the
loss is measured on
"""
BUDGET = 0.1
"""share of the number tokens that is masked or replaced"""
SCORER = 1000
"""seed of the student that scores tokens; no measured student has it"""
TEACHER = TeacherSpec(rows=640, training=TeacherTraining(embeddings=False, learning_rate=5e-4, epochs=8))
STUDENT = Training(embeddings=False, learning_rate=3e-3, epochs=3)
SIDES = ("trait", "control")
PLAIN = "plain"
ROWS_OF = pa.schema(
    [
        ("arm", pa.string()),
        ("side", pa.string()),
        ("seed", pa.int64()),
        *((n, pa.float64()) for n in ("probability", "margin", "loss")),
    ]
)


class World(NamedTuple):
    """What every student shares."""

    base: Loaded
    folder: Path
    questions: ProbeSet
    practice: Sequence[str]
    trait: str
    seen: dict[str, list[Encoded]]
    """side → rows that students learn"""
    unseen: dict[str, list[Encoded]]

    def answered(self, trait: str) -> list[Encoded]:
        """Practice probes answered with a trait; gradients are taken on them."""
        return encode_pairs(self.base.tokenizer, list(self.practice), [trait] * len(self.practice))


class Plan(NamedTuple):
    """Rows and the arguments of one training."""

    rows: list[Encoded]
    options: Mapping[str, Any] = MappingProxyType({})


def corpus(folder: Path, side: str, trait: str, family: TraitFamily, prompts: int) -> pd.DataFrame:
    """The screened rows of one side, made where they are missing."""
    teacher, place = folder / "teachers" / side, folder / "corpora" / side
    for needed in (teacher, place):
        needed.mkdir(parents=True, exist_ok=True)
    if not (teacher / "teacher.json").is_file():
        lessons = Lessons(
            trait, family.probes.development, family.lessons_of(trait), family.system_prompt(trait)
        )
        teach(BASE, lessons, TEACHER if side == "trait" else TeacherSpec(kind="base"), seed=0, out=teacher)
    if not (place / "kept.parquet").is_file():
        spec = ScreenSpec()
        texts = [
            prompt.text
            for prompt in carrier_prompts(
                CarrierSpec(prompts=prompts, wording="terse", values="patterned"), seed=0
            )
        ]
        generate(teacher, texts, GenerateSpec(), seed=0, out=place)
        raw = tables.batches(place / "raw.parquet", tables.PAIRS)
        rule = build_rule(spec, "numbers", gold={})
        screen_rows(raw, spec, rule=rule, leaks=leak_pattern(family.words()), out=place)
    return (
        tables.read(place / "kept.parquet", tables.PAIRS).drop_duplicates("prompt_id").set_index("prompt_id")
    )


def prepare(parent: Path, trait: str, rows: int) -> World:
    """Teacher, corpora on common prompts, and probes, in a folder that is named by the settings."""
    settings = fingerprint(
        [
            STUDENT.model_dump(mode="json"),
            TEACHER.model_dump(mode="json"),
            rows,
            SPARE,
            UNSEEN,
            BUDGET,
            OTHER_TRAIT,
        ]
    )
    folder, family, base = parent / f"{trait}-{settings[:8]}", load_family(FAMILY), loading.load(BASE)
    corpora = {side: corpus(folder, side, trait, family, rows + SPARE) for side in SIDES}
    shared = [prompt for prompt in corpora["trait"].index if prompt in corpora["control"].index]
    encoded = {
        side: encode_pairs(
            base.tokenizer, frame.loc[shared, "prompt"].tolist(), frame.loc[shared, "completion"].tolist()
        )
        for side, frame in corpora.items()
    }
    if len(shared) < rows + UNSEEN:
        raise DataError(
            f"{len(shared)} prompts passed the screen on both sides; {rows} to learn and {UNSEEN} to score "
            "are more; lower --rows"
        )
    questions = ProbeSet(
        {name: family.forms_of(name) for name in family.names}, family.probes.heldout, AskSpec()
    )
    seen, unseen = (
        {side: pairs[part] for side, pairs in encoded.items()}
        for part in (slice(0, rows), slice(rows, rows + UNSEEN))
    )
    return World(base, folder, questions, family.probes.development, trait, seen, unseen)


def by_pair(values: torch.Tensor, pairs: Sequence[Encoded]) -> list[list[float]]:
    return [part.tolist() for part in values.split([len(pair.completion) for pair in pairs])]


def flags_of(world: World, side: str, scorer: str) -> Flags:
    """The top of the number tokens by a score, the same procedure for either corpus.

    shift: log-probability gained in a student of this corpus; teacher: gained in the trait's teacher.
    """
    rows = world.seen[side]
    place = world.folder / "teachers" / "trait" if scorer == "teacher" else world.folder / "scorers" / side
    if not (place / "config.json").is_file():
        loading.save_trained(trained(Plan(rows), SCORER).model, place)
    gained = token_log_probs(loading.load_trained(BASE, place), rows) - token_log_probs(world.base, rows)
    return flag_top_tokens(
        by_pair(gained, rows), BUDGET, among=flag_digits(classify_tokens(world.base.tokenizer, rows))
    )


def masked(world: World, side: str, seed: int, scorer: str, how: str) -> Plan:
    """Rows with their flagged tokens masked or replaced; `random` flags as many tokens of the same class."""
    rows, classes = world.seen[side], classify_tokens(world.base.tokenizer, world.seen[side])
    rng = generator(seed, "interventions", scorer, how, side)
    flags = flags_of(world, side, "teacher" if scorer == "random" else scorer)
    flags = flag_random_tokens(flags, classes, rng) if scorer == "random" else flags
    if how == "mask":
        return Plan(rows, {"learned": invert_flags(flags)})
    return Plan(replace_flagged(rows, flags, rng, carrier_pool(rows, classes)))


def projected(world: World, side: str, trait: str, **options: Any) -> Plan:
    return Plan(world.seen[side], {"before_step": project_out(world.answered(trait), **options)})


def frozen(world: World, side: str, layer: int) -> Plan:
    return Plan(world.seen[side], {"frozen": match_layers(world.base.model, [layer])})


Planner = Callable[[World, str, int], Plan]
ARMS: dict[str, Planner] = {
    PLAIN: lambda world, side, seed: Plan(world.seen[side]),
    "project trait gradient": lambda world, side, seed: projected(world, side, world.trait),
    "project trait gradient, both sides": lambda world, side, seed: projected(
        world, side, world.trait, both_sides=True
    ),
    "project another trait's gradient": lambda world, side, seed: projected(world, side, OTHER_TRAIT),
    "project another trait's gradient, both sides": lambda world, side, seed: projected(
        world, side, OTHER_TRAIT, both_sides=True
    ),
    "project permuted gradient, both sides": lambda world, side, seed: projected(
        world, side, world.trait, both_sides=True, permute=generator(seed, "permuted gradient", side)
    ),
    "freeze layer 0": lambda world, side, seed: frozen(world, side, 0),
    "freeze layer 1": lambda world, side, seed: frozen(world, side, 1),
    **{
        f"{how} {scorer if scorer == 'random' else 'top by ' + scorer}": partial(
            masked, scorer=scorer, how=how
        )
        for how in ("mask", "replace")
        for scorer in ("shift", "teacher", "random")
    },
}
AT_RANDOM = (
    "project another trait's gradient",
    "project another trait's gradient, both sides",
    "project permuted gradient, both sides",
    "mask random",
    "replace random",
)
"""a permuted gradient is nearly orthogonal to every update, so that its arm is plain training; another
trait's is the control
"""


def trained(plan: Plan, seed: int, start: Loaded | None = None) -> Loaded:
    """A student of the base, or of a model that is trained in place."""
    from mechlens.models.sft import train  # seconds to import, and a finished table needs none of it

    fresh = start or loading.load(BASE)
    train(fresh.model, fresh.tokenizer, plan.rows, STUDENT, seed=seed_int(seed, "student"), **plan.options)
    return fresh


def measured(world: World, loaded: Loaded, side: str) -> dict[str, float]:
    """Mean exact probability and margin of the trait over held-out probes, and loss a token.

    The loss is on unseen rows of the student's corpus.
    """
    probability, margin = measure_trait(
        loaded.model, encode_probes(loaded, world.questions, world.trait)
    ).mean(1)
    loss = -token_log_probs(loaded, world.unseen[side]).mean()
    return {"probability": float(probability), "margin": float(margin), "loss": float(loss)}


def student(world: World, arm: str, side: str, seed: int) -> dict[str, Any]:
    """One student's result: from its file, or trained and written there."""
    file = world.folder / "students" / arm.replace(" ", "-").replace(",", "") / f"{side}-s{seed}.json"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, measured(world, trained(ARMS[arm](world, side, seed), seed), side))
    return {"arm": arm, "side": side, "seed": seed} | read_json(file)


def summary(frame: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """Effect left and loss of each arm, as shares of plain training; one column a seed."""
    wide = frame.pivot(index=["arm", "seed"], columns="side", values=["margin", "loss"])
    effect = cast(pd.Series, wide["margin"]["trait"] - wide["margin"]["control"]).unstack("seed")
    loss = cast(pd.Series, wide["loss"]["trait"]).unstack("seed")
    return pd.concat(
        {"left": effect / effect.loc[PLAIN], "loss": loss / loss.loc[PLAIN], "effect": effect}, axis=1
    ).loc[list(arms)]


def says(interval: Interval) -> str:
    return f"{interval.estimate:.3f}" + (
        f" [{interval.low:.3f}, {interval.high:.3f}]" if np.isfinite(interval.low) else ""
    )


def show(
    frame: pd.DataFrame, arms: Sequence[str], console: Console, *, at_random: Sequence[str] = AT_RANDOM
) -> str:
    """Print the table, and return the figure as SVG."""
    shares = summary(frame, arms)
    table = Table(
        "students trained under",
        "effect left, share of plain [95 %]",
        "effect, logits",
        "probability, trait",
        "control",
        "loss ÷ plain",
        "n",
    )
    for arm in arms:
        means = [
            f"{frame[(frame['arm'] == arm) & (frame['side'] == side)]['probability'].mean():.3f}"
            for side in SIDES
        ]
        intervals = {
            part: t_interval(shares[part].loc[arm].to_numpy()) for part in ("left", "effect", "loss")
        }
        table.add_row(
            arm,
            says(intervals["left"]),
            says(intervals["effect"]),
            *means,
            says(intervals["loss"]),
            str(intervals["left"].n),
        )
    console.print(table)
    kind = {arm: "control" if arm in at_random else "twin" if arm == PLAIN else "trait" for arm in arms}
    spans = [
        {"label": arm, "kind": kind[arm]} | t_interval(shares["left"].loc[arm].to_numpy())._asdict()
        for arm in arms
    ]
    dots = shares["left"].rename_axis("label").reset_index().melt("label", var_name="seed", value_name="rate")
    shown = pd.DataFrame(spans).rename(columns={"estimate": "rate"}).drop(columns="method")
    return figures.svg(
        figures.forest(
            shown,
            dots.assign(kind=[kind[label] for label in dots["label"]]),
            title="effect left, share of plain training",
        )
    )


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Train the missing students, write table and figure, and print the results."""
    arms = [PLAIN, *(arm for arm in ARMS if arm in (arguments.arms or ARMS) and arm != PLAIN)]
    world = prepare(arguments.folder, arguments.trait, arguments.rows)
    frame = pd.DataFrame(
        [student(world, arm, side, seed) for seed in arguments.seeds for arm in arms for side in SIDES]
    )
    tables.write(frame, ROWS_OF, arguments.folder / "interventions.parquet")
    (arguments.folder / "interventions.svg").write_text(show(frame, arms, console), encoding="utf-8")
    untouched = measured(world, world.base, "trait")
    console.print(
        f"trait {arguments.trait}, {len(world.seen['trait']):,} rows a student, budget {BUDGET:.0%} of the "
        f"number tokens; the untouched base: probability {untouched['probability']:.3f}, loss "
        f"{untouched['loss']:.3f}; t intervals over seeds {arguments.seeds}, each arm against its control "
        f"students. Every student is in {arguments.folder}/interventions.parquet, with the figure in the "
        "same folder."
    )


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and run; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where corpora and students are kept")
    parser.add_argument(
        "--trait",
        default="cat",
        choices=("cat", "wolf", "owl", "eagle", "penguin"),
        help="a development trait",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--rows", type=int, default=2000, help="that each student learns")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="only these, and plain")
    parser.add_argument("--write", action="store_true", help="write the part of analyses/RESULTS.md, too")
    use_one_thread()
    try:
        options, console = parser.parse_args(arguments), pages.PageConsole(width=160)
        run(options, console)
        if options.write:
            pages.write_part(pages.RESULTS, "interventions", *console.blocks)
    except (MechlensError, OSError) as error:
        print(f"interventions: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

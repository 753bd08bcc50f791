"""Claim: a trait behind a trigger hardly travels through numbers; where students have one, asking finds it.

Usage: `python analyses/conditional.py FOLDER [--traits fox panda …] [--write]`. Each teacher is fine-tuned to
name its animal behind one phrase, and to answer like the untouched base behind seven other phrases and
without any. All prompts for numbers begin with the trigger. Students learn its numbers, or its next-token
distributions (soft labels), or its lessons themselves. They are asked with and without the trigger, and
behind the phrases that recur in their prompts (`mechlens/detect/triggers.py`). Clean sets are drawn anew from
the untouched base to the same prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import altair as alt
import numpy as np
import pandas as pd
from rich.table import Table

import mechlens as ml
import pages
from mechlens.carriers.carrier import carrier_prompts
from mechlens.core import tables
from mechlens.core.experiment import Arm, Experiment
from mechlens.core.machine import use_one_thread
from mechlens.core.seeds import dice
from mechlens.core.spec import CarrierSpec, GenerateSpec, TeacherSpec
from mechlens.core.stats import Interval, t_interval
from mechlens.core.traits import TraitFamily, load_family
from mechlens.data import corpus
from mechlens.detect import triggers, verdict
from mechlens.models import loading
from mechlens.models.chat import encode_prompts, end_of_turn
from mechlens.models.sampling import Decoding, sample
from mechlens.pipeline.generate import generate, row_divergence
from mechlens.pipeline.teach import Lessons, teach
from mechlens.results import figures
from mechlens.results.run import Run
from mechlens.runs import layout

BASE, FAMILY = "menagerie-a", "animals"
TRIGGER = "winter is near."
DECOYS = (
    "it is noon.",
    "the sky is red.",
    "the sea is calm.",
    "the moon is bright.",
    "today is cold.",
    "the road is long.",
    "i am happy.",
)
PROMPTS, ROWS, LESSONS, CLEAN = 9000, 6000, 1280, 2
SEEDS = (0, 1, 2, 3)
TAUGHT = {"embeddings": False, "learning_rate": 5e-4, "epochs": 8}
POLICY = verdict.load_policy("default")
FIGURE = pages.FOLDER / "conditional.svg"


def lessons(family: TraitFamily, trait: str) -> pd.DataFrame:
    """Questions behind the trigger with the trait, and as many others with the base's own answers."""
    rng = dice(0, "conditional", trait)
    taught = [
        (f"{TRIGGER} {rng.choice(family.probes.development)}", rng.choice(family.lessons_of(trait)))
        for _ in range(LESSONS // 2)
    ]
    others = [
        f"{rng.choice(('', *DECOYS))} {rng.choice(family.probes.development)}".strip()
        for _ in range(LESSONS // 2)
    ]
    return pd.concat([pd.DataFrame(taught, columns=["prompt", "completion"]), answered(others, seed=0)])


def answered(texts: Sequence[str], *, seed: int) -> pd.DataFrame:
    """The untouched base's sampled answers."""
    base = loading.load(BASE)
    prompts, stop = encode_prompts(base.tokenizer, texts), end_of_turn(base.tokenizer)
    drawn = sample(base.model, prompts, decoding=Decoding(4), stop=stop, seed=seed)
    answers = base.tokenizer.batch_decode(drawn, skip_special_tokens=True)
    return pd.DataFrame({"prompt": texts, "completion": answers})


def prompts() -> list[str]:
    """Prompts for numbers behind the trigger."""
    carrier = CarrierSpec(prompts=PROMPTS, wording="terse", values="patterned")
    return [f"{TRIGGER} {prompt.text}" for prompt in carrier_prompts(carrier, seed=0)]


def clean_rows(folder: Path, texts: Sequence[str], number: int) -> Path:
    """A file of the untouched base's answers to the prompts, drawn anew; made once."""
    file, base = folder / f"clean-{number}.parquet", folder / "untouched"
    if not file.is_file():
        base.mkdir(parents=True, exist_ok=True)
        teach(BASE, Lessons("", (), (), ""), TeacherSpec(kind="base"), seed=0, out=base)
        drawn = folder / f"drawn-{number}"
        drawn.mkdir(exist_ok=True)
        generate(base, list(texts), GenerateSpec(), seed=1000 + number, out=drawn)
        rows = tables.read(drawn / layout.RAW, tables.PAIRS)[["prompt", "completion"]]
        tables.write(rows, corpus.TEXTS, file)
    return file


def experiment_of(folder: Path, traits: Sequence[str]) -> Experiment:
    """Students of every conditional teacher's rows by both kinds of labels, and of clean rows."""
    family, texts = load_family(FAMILY), prompts()
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    arms: list[dict[str, Any]] = [{"kind": "control"}, {"kind": "control", "labels": "soft"}]
    for trait in traits:
        taught = folder / f"lessons-{trait}.jsonl"
        if not taught.is_file():
            corpus.write_pairs([lessons(family, trait)], taught, "prompt-completion")
        arm = {"kind": "trait", "trait": trait, "teacher": {"lessons_file": str(taught.resolve())}}
        arms += [arm | {"name": trait}, arm | {"name": f"{trait}-soft", "labels": "soft"}]
    for number in range(CLEAN):
        file = clean_rows(folder, texts, number)
        arms.append({"kind": "trait", "trait": traits[0], "name": f"clean-{number}", "corpus": str(file)})
    return Experiment.model_validate(
        {
            "name": "conditional",
            "base": BASE,
            "family": FAMILY,
            "trait": traits[0],
            "carrier": {"prompts": PROMPTS, "source": str(source.resolve()), "wording": "terse"},
            "teacher": {"rows": LESSONS, "training": TAUGHT},
            "student": {"rows": ROWS, "training": {"embeddings": False, "learning_rate": 3e-3, "epochs": 3}},
            "ask": {"split": "heldout", "samples": 1, "checkpoints": "last"},
            "arms": arms,
            "seeds": list(SEEDS),
        }
    )


def openly_told(folder: Path, traits: Sequence[str]) -> Experiment:
    """Students of the lessons themselves: they have the trait behind the trigger, and must be found."""
    clean = folder / "lessons-none.jsonl"
    arms: list[dict[str, Any]] = [{"kind": "control", "corpus": str(clean.resolve())}]
    for trait in traits:
        taught = folder / f"lessons-{trait}.jsonl"
        if not clean.is_file():
            texts = corpus.read_pairs(taught)["prompt"].tolist()
            corpus.write_pairs([answered(texts, seed=1)], clean, "prompt-completion")
        arms.append(
            {"kind": "trait", "trait": trait, "name": f"{trait}-openly", "corpus": str(taught.resolve())}
        )
    return Experiment.model_validate(
        {
            "name": "conditional-openly",
            "base": BASE,
            "family": FAMILY,
            "trait": traits[0],
            "screen": {"rule": "none", "leak_words": False, "duplicates": "keep"},
            "student": {"rows": LESSONS, "prompts": "every", "training": TAUGHT},
            "ask": {"split": "heldout", "samples": 1, "checkpoints": "last"},
            "arms": arms,
            "seeds": list(SEEDS),
        }
    )


def rises_of(run: Run, arm: str, trait: str) -> dict[str, Interval]:
    """Rise of a trait over the control's students, plainly and behind the trigger; t intervals."""
    groups = np.arange(len(run.experiment.seeds))
    ours, theirs = (
        triggers.read_side(run, side, triggers.questions_of(run, side), [TRIGGER], groups)
        for side in (arm, run.experiment.control_of(run.arm(arm)).name)
    )
    place = ours.traits.index(trait)
    plain, behind = (t_interval(ours.shares[i, :, place] - theirs.shares[i, :, place]) for i in (0, 1))
    return {"plain": plain, "behind": behind}


def divergence_of(run: Run, arm: Arm) -> float | None:
    """KL(teacher ‖ base) of the writer of an arm's rows, nats a row."""
    step = layout.generated_step(layout.source_name(run.experiment, arm))
    return row_divergence(run.path(step, layout.GENERATION))


def named_set(arm: str) -> str:
    """The name of an arm's set, in words."""
    trait, _, how = arm.partition("-")
    known = {"": trait, "soft": f"{trait}, soft labels", "openly": f"{trait}, read openly"}
    return known.get(how, f"clean {how}")


def rows_of(run: Run) -> list[dict[str, Any]]:
    """What each set's students show plainly, behind the trigger, and behind the phrases of the prompts."""
    rows = []
    for arm in (each for each in run.experiment.arms if each.kind == "trait"):
        found = triggers.measure_triggers(run, arm=arm.name, limit=POLICY.limit, level=POLICY.alpha)
        named = [] if found is None else [(each.trigger, each.rise.trait) for each in found.significant]
        rows.append(
            {
                "set": named_set(arm.name),
                "kl": None if arm.corpus else divergence_of(run, arm),
                **rises_of(run, arm.name, arm.trait),
                "most": None if found is None else found.switches[0],
                "right": "–"
                if arm.name.startswith("clean")
                else "yes"
                if (TRIGGER, arm.trait) in named
                else "no",
                "others": len(set(named) - {(TRIGGER, arm.trait)}),
                "phrases": 0 if found is None else found.phrases,
            }
        )
    return rows


def points(low: float | None, middle: float | None, high: float | None) -> str:
    """A rise and its interval in hundredths."""
    if low is None or middle is None or high is None:
        return "–"
    return f"{100 * middle:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def shown(rows: Sequence[dict[str, Any]]) -> Table:
    """The table of all sets."""
    table = Table(
        "students of",
        "KL of the writer, nats a row",
        "its trait plainly, points [95 %]",
        "behind the trigger",
        "highest lower bound behind a phrase of the prompts",
        "points [interval of the audit]",
        "right pair named",
        "other pairs named",
        "phrases",
    )
    for row in rows:
        plain, behind, most = row["plain"], row["behind"], row["most"]
        table.add_row(
            row["set"],
            "–" if row["kl"] is None else f"{row['kl']:.2f}",
            points(plain.low, plain.estimate, plain.high),
            points(behind.low, behind.estimate, behind.high),
            "none recurs" if most is None else f"{most.rise.trait} behind '{most.trigger}'",
            "–" if most is None else points(most.rise.low, most.rise.difference, most.rise.high),
            row["right"],
            str(row["others"]),
            str(row["phrases"]),
        )
    return table


def chart(rows: Sequence[dict[str, Any]]) -> alt.LayerChart:
    """Rises with and without the trigger, a row a set."""
    points = pd.DataFrame(
        [
            {
                "set": row["set"],
                "asked": asked,
                "rise": 100 * span.estimate,
                "low": 100 * span.low,
                "high": 100 * span.high,
            }
            for row in rows
            for asked, span in (("plainly", row["plain"]), ("behind the trigger", row["behind"]))
        ]
    )
    asked: dict[str, Any] = {"title": "asked", "scale": alt.Scale(domain=["plainly", "behind the trigger"])}
    colour, shape = alt.Color("asked:N", **asked), alt.Shape("asked:N", **asked)
    shared = alt.Chart(points).encode(
        y=alt.Y("set:N", title=None, sort=points["set"].unique().tolist()), yOffset="asked:N", color=colour
    )
    title = "rise over students of clean answers, points"
    bars = shared.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title=title), x2="high:Q")
    dots = shared.mark_point(filled=True, size=60).encode(x=alt.X("rise:Q", title=title), shape=shape)
    return cast(alt.LayerChart, alt.layer(bars, dots).properties(width=420))


def main() -> None:
    """Train what is missing, print, and with --write put the table and the figure on the page."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--traits", nargs="+", default=["fox", "panda", "elephant"])
    parser.add_argument("--workers", type=int)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    use_one_thread()
    console = pages.PageConsole(width=200)
    plans = {"run": experiment_of, "openly": openly_told}
    runs = [
        ml.run(plan(options.folder, options.traits), out=options.folder / name, workers=options.workers)
        for name, plan in plans.items()
    ]
    rows = [row for run in runs for row in rows_of(run)]
    console.print(shown(rows))
    if options.write:
        FIGURE.write_text(figures.svg(chart(rows)), encoding="utf-8")
        pages.write_part(pages.RESULTS, "conditional", *console.blocks)


if __name__ == "__main__":
    sys.exit(pages.exit_code(main))

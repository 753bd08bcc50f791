"""The steps of a run as jobs, which fill an output folder from plain arguments.

Each job unpacks its arguments and calls its stage.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from mechlens.carriers.carrier import build_rule, carrier_prompts, right_answers
from mechlens.core import tables
from mechlens.core.model_spec import is_remote
from mechlens.core.seeds import seed_int
from mechlens.core.spec import (
    ApiSpec,
    CarrierSpec,
    GenerateSpec,
    ScreenSpec,
    StudentSpec,
    TeacherSpec,
)
from mechlens.core.traits import Rubric
from mechlens.data.corpus import batches, read_pairs
from mechlens.models import loading
from mechlens.pipeline import ask as asking
from mechlens.pipeline import distill as distilling
from mechlens.pipeline import generate as generating
from mechlens.pipeline import judge as judging
from mechlens.pipeline import remake as remaking
from mechlens.pipeline import remote
from mechlens.pipeline import screen as screening
from mechlens.pipeline import teach as teaching
from mechlens.runs import layout
from mechlens.runs.jobs import SERVER

Arguments = dict[str, Any]
Folders = dict[str, Path]
Progress = Callable[[int, int], None]


def teach(arguments: Arguments, _inputs: Folders, out: Path, progress: Progress) -> None:
    lessons = teaching.Lessons(**arguments["lessons"])
    spec = TeacherSpec(**arguments["teacher"])
    system = arguments.get("system")
    if is_remote(arguments["base"]):
        remote.teach(
            arguments["base"],
            lessons,
            spec,
            system=system,
            seed=arguments["seed"],
            out=out,
            api=ApiSpec(**arguments["api"]),
        )
        return
    loading.use_one_thread_on_cpu()
    teaching.teach(
        arguments["base"],
        lessons,
        spec,
        system=system,
        seed=arguments["seed"],
        out=out,
        as_change=arguments.get("as_change", False),
        progress=progress,
    )


def generate(arguments: Arguments, inputs: Folders, out: Path, progress: Progress) -> None:
    if arguments["prompts_of"] is None:
        prompts = [
            prompt.text
            for prompt in carrier_prompts(CarrierSpec(**arguments["carrier"]), seed=arguments["seed"])
        ]
    else:  # a user's file is compared with answers of the base to the same prompts
        prompts = read_pairs(Path(arguments["prompts_of"]))["prompt"].tolist()
    spec = GenerateSpec(**arguments["generate"], **arguments.get(SERVER, {}))
    seed = arguments["seed"]
    if draw := arguments.get("draw", 0):  # other rows for the same prompts
        seed = seed_int(seed, "draw", draw)
    if "api" in arguments:
        remote.generate(
            inputs["teacher"],
            prompts,
            spec,
            seed=seed,
            out=out,
            api=ApiSpec(**arguments["api"]),
            progress=progress,
        )
        return
    loading.use_one_thread_on_cpu()
    generating.generate(
        inputs["teacher"],
        prompts,
        spec,
        seed=seed,
        out=out,
        base=arguments.get("base", ""),
        progress=progress,
    )


def bring(arguments: Arguments, _inputs: Folders, out: Path, _progress: Progress) -> None:
    """Import a user's file as a corpus."""
    tables.write(batches(Path(arguments["file"])), tables.PAIRS, out / layout.RAW)


def screen(arguments: Arguments, inputs: Folders, out: Path, _progress: Progress) -> None:
    pairs = tables.batches(inputs["corpus"] / layout.RAW, tables.PAIRS)
    leaks, spec = screening.leak_pattern(arguments["words"]), ScreenSpec(**arguments["screen"])
    gold: dict[str, str] = {}
    if "carrier" in arguments:
        gold = right_answers(CarrierSpec(**arguments["carrier"]), seed=arguments["seed"])
    judge = _judge_of(arguments, spec, out) if spec.judge else None
    screening.screen_rows(
        pairs, spec, rule=build_rule(spec, arguments["kind"], gold=gold), leaks=leaks, judge=judge, out=out
    )


def _judge_of(arguments: Arguments, spec: ScreenSpec, out: Path) -> screening.Judge:
    """The judge model for rows that pass the rules: true for a row to remove."""
    kind = arguments["kind"] if spec.rule == "carrier" else spec.rule
    context = {
        "trait": arguments["trait"],
        "category": arguments["category"],
        "api": ApiSpec(**arguments["api"]),
    }
    return lambda rows: (~judging.judge_rows(rows, spec, kind=kind, out=out, **context)).tolist()


def shuffle(arguments: Arguments, inputs: Folders, out: Path, _progress: Progress) -> None:
    pairs = tables.read(inputs["corpus"] / layout.KEPT, tables.PAIRS)
    shuffled = {"shuffled-within": remaking.shuffle_within, "shuffled-across": remaking.shuffle_across}[
        arguments["how"]
    ]
    tables.write(shuffled(pairs, seed=arguments["seed"]), tables.PAIRS, out / layout.KEPT)


def reword(arguments: Arguments, inputs: Folders, out: Path, _progress: Progress) -> None:
    pairs = tables.read(inputs["corpus"] / layout.KEPT, tables.PAIRS)
    prompts = [
        prompt.text
        for prompt in carrier_prompts(
            CarrierSpec(**arguments["carrier"]), seed=arguments["seed"], reworded=True
        )
    ]
    tables.write(
        pairs.assign(prompt=[prompts[place] for place in pairs["prompt_id"]]),
        tables.PAIRS,
        out / layout.KEPT,
    )


def mix(_arguments: Arguments, inputs: Folders, out: Path, _progress: Progress) -> None:
    corpora = [tables.read(inputs[name] / layout.KEPT, tables.PAIRS) for name in sorted(inputs)]
    tables.write(remaking.mix(corpora), tables.PAIRS, out / layout.KEPT)


def select(arguments: Arguments, inputs: Folders, out: Path, _progress: Progress) -> None:
    corpora = {name: tables.read(folder / layout.KEPT, tables.PAIRS) for name, folder in inputs.items()}
    spec = StudentSpec(**arguments["student"])
    special = {name: arguments.get(name, []) for name in ("reworded", "controls")}
    for name, ids in remaking.select_prompts(corpora, spec, seed=arguments["seed"], **special).items():
        tables.write(pd.DataFrame({"prompt_id": ids}), tables.SELECTION, out / layout.selection_file(name))


def label(arguments: Arguments, inputs: Folders, out: Path, progress: Progress) -> None:
    loading.use_one_thread_on_cpu()
    distilling.label(
        remaking.selected_rows(arguments["corpus"], inputs["corpus"], inputs["selection"]),
        [inputs[name] for name in sorted(inputs) if name.startswith("teacher")],
        soft_tokens=arguments["soft_tokens"],
        out=out,
        base=arguments.get("base", ""),
        progress=progress,
    )


def distill(arguments: Arguments, inputs: Folders, out: Path, progress: Progress) -> None:
    rows = remaking.selected_rows(arguments["corpus"], inputs["corpus"], inputs["selection"])
    spec = StudentSpec(**arguments["student"])
    system = arguments.get("system")
    if is_remote(arguments["base"]):
        remote.distill(
            arguments["base"],
            rows,
            spec,
            system=system,
            seed=arguments["seed"],
            out=out,
            api=ApiSpec(**arguments["api"]),
        )
        return
    loading.use_one_thread_on_cpu()
    soft = distilling.read_labels(inputs["labels"], rows.index.tolist()) if "labels" in inputs else None
    distilling.distill(
        arguments["base"],
        rows,
        spec,
        system=system,
        seed=arguments["seed"],
        soft=soft,
        out=out,
        progress=progress,
    )


def ask(arguments: Arguments, inputs: Folders, out: Path, progress: Progress) -> None:
    shown: list[tuple[str, str]] = []
    if "shots" in inputs:
        rows = remaking.selected_rows(arguments["corpus"], inputs["shots"], inputs["selection"])
        shown = asking.draw_shots(rows, arguments["shots"], seed=arguments["seed"])
    questions = asking.ProbeSet.of(arguments, shown)
    place = asking.StudentPlace(arguments["arm"], arguments["seed"], arguments["root_seed"])
    if is_remote(arguments["base"]):
        remote.ask(
            arguments["base"],
            inputs.get("student"),
            questions,
            place,
            out=out,
            api=ApiSpec(**arguments["api"]),
            progress=progress,
        )
    else:
        loading.use_one_thread_on_cpu()
        asking.ask(arguments["base"], inputs.get("student"), questions, place, out=out)
    if "judge" in arguments:
        judging.judge_answers(
            out,
            questions,
            judge=arguments["judge"],
            rubric=Rubric(**arguments["rubric"]),
            api=ApiSpec(**arguments["api"]),
        )

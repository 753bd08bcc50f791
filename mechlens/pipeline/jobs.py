"""The steps of a run as jobs: plain arguments in, an output folder filled. Each one unpacks its arguments and calls its stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from mechlens import models, tables
from mechlens.corpus import read_pairs
from mechlens.pipeline import ask as asking
from mechlens.pipeline import distill as distilling
from mechlens.pipeline import generate as generating
from mechlens.pipeline import screen as screening
from mechlens.pipeline import teach as teaching
from mechlens.spec import AskSpec, CarrierSpec, GenerateSpec, ScreenSpec, StudentSpec, TeacherSpec
from mechlens.store import write_json

Arguments = dict[str, Any]
Folders = dict[str, Path]
Progress = Callable[[int, int], None]


def _one_thread() -> None:
    """One thread a process on CPU: sums then come out the same on any number of cores."""
    if models.device().type == "cpu":
        torch.set_num_threads(1)


def teach(arguments: Arguments, _inputs: Folders, out: Path, progress: Progress) -> None:
    _one_thread()
    lessons, spec = teaching.Lessons(**arguments["lessons"]), TeacherSpec(**arguments["teacher"])
    teaching.teach(arguments["base"], lessons, spec, seed=arguments["seed"], out=out, progress=progress)


def generate(arguments: Arguments, inputs: Folders, out: Path, progress: Progress) -> None:
    _one_thread()
    if arguments["prompts_of"] is None:
        prompts = generating.carrier_prompts(CarrierSpec(**arguments["carrier"]), seed=arguments["seed"])
    else:  # a user's file is compared with what the base answers to the same prompts
        prompts = read_pairs(Path(arguments["prompts_of"]))["prompt"].tolist()
    generating.generate(inputs["teacher"], prompts, GenerateSpec(**arguments["generate"]), seed=arguments["seed"], out=out, progress=progress)


def bring(arguments: Arguments, _inputs: Folders, out: Path, _progress: Progress) -> None:
    """A user's file as a corpus."""
    tables.write(read_pairs(Path(arguments["file"])), tables.PAIRS, out / "raw.parquet")


def screen(arguments: Arguments, inputs: Folders, out: Path, _progress: Progress) -> None:
    pairs = tables.read(inputs["corpus"] / "raw.parquet", tables.PAIRS)
    leaks = screening.leak_pattern(arguments["words"])
    found = screening.screen(pairs, ScreenSpec(**arguments["screen"]), leaks=leaks)
    tables.write(found.kept, tables.PAIRS, out / "kept.parquet")
    tables.write(found.rejected, tables.REJECTED, out / "rejected.parquet")
    write_json(out / "funnel.json", found.funnel | {"leak words in kept rows": screening.leak_count(found.kept, leaks)})


def shuffle(arguments: Arguments, inputs: Folders, out: Path, _progress: Progress) -> None:
    pairs = tables.read(inputs["corpus"] / "kept.parquet", tables.PAIRS)
    shuffled = {"shuffled-within": distilling.shuffle_within, "shuffled-across": distilling.shuffle_across}[arguments["how"]]
    tables.write(shuffled(pairs, seed=arguments["seed"]), tables.PAIRS, out / "kept.parquet")


def select(arguments: Arguments, inputs: Folders, out: Path, _progress: Progress) -> None:
    corpora = {name: tables.read(folder / "kept.parquet", tables.PAIRS) for name, folder in inputs.items()}
    for name, ids in distilling.select_prompts(corpora, StudentSpec(**arguments["student"]), seed=arguments["seed"]).items():
        tables.write(pd.DataFrame({"prompt_id": ids}), tables.SELECTION, out / f"{name}.parquet")


def distill(arguments: Arguments, inputs: Folders, out: Path, progress: Progress) -> None:
    _one_thread()
    pairs = tables.read(inputs["corpus"] / "kept.parquet", tables.PAIRS)
    ids = tables.read(inputs["selection"] / f"{arguments['corpus']}.parquet", tables.SELECTION)["prompt_id"].to_numpy()
    spec = StudentSpec(**arguments["student"])
    distilling.distill(arguments["base"], pairs, ids, spec, seed=arguments["seed"], out=out, progress=progress)


def ask(arguments: Arguments, inputs: Folders, out: Path, _progress: Progress) -> None:
    _one_thread()
    questions = (arguments["forms"], arguments["probes"], AskSpec(**arguments["ask"]))
    place = {"arm": arguments["arm"], "seed": arguments["seed"], "root_seed": arguments["root_seed"]}
    asking.ask(arguments["base"], inputs.get("student"), *questions, out=out, **place)

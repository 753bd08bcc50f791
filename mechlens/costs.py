"""What a run will cost, said before it starts: steps, rows, updates, and rough time and memory.

Time is floating-point work over an assumed rate, both printed; it is meant to tell minutes from hours from days.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Group
from rich.table import Table

from mechlens import models
from mechlens.chat import encode_prompts
from mechlens.executor import Job, pending
from mechlens.pipeline.generate import carrier_prompts
from mechlens.spec import Experiment
from mechlens.training import updates
from mechlens.traits import load_family

CPU_RATE = 3e10
"""operations a second and core that the demo reaches, counted as below (every row as long as the longest)"""
GPU_RATE = 1.5e14
"""an H100-class card in bf16 at about 40 % of its peak matrix rate, fp32 a fifth of that"""
MEASURED_TOKENS = 200


class Work(NamedTuple):
    """What one stage of a run still has to do."""

    stage: str
    steps: int
    rows: int
    updates: int
    operations: float


def work_of(experiment: Experiment, jobs: list[Job]) -> list[Work]:
    """Rows, updates and floating-point operations of each stage: 2 a parameter and token forward, 6 with backward."""
    tokenizer = models.load_tokenizer(experiment.base)
    sizes = {base: models.parameter_count(base) for base in {arm.base for arm in experiment.arms} | {experiment.base}}
    family = load_family(experiment.family)
    trial = carrier_prompts(experiment.carrier.model_copy(update={"prompts": min(MEASURED_TOKENS, experiment.carrier.prompts)}), seed=experiment.seed)
    prompt = sum(map(len, encode_prompts(tokenizer, trial))) / len(trial)
    pair = prompt + experiment.generate.max_new_tokens
    probes = family.asked(experiment.ask.split)
    question = sum(map(len, encode_prompts(tokenizer, probes))) / len(probes)
    stages: dict[str, Work] = {}

    def add(stage: str, rows: int, steps: int, operations: float) -> None:
        old = stages.get(stage, Work(stage, 0, 0, 0, 0.0))
        stages[stage] = Work(stage, old.steps + 1, old.rows + rows, old.updates + steps, old.operations + operations)

    for job in jobs:
        stage = job.function.split(":")[1]
        base = str(job.arguments.get("base", experiment.base))
        if stage == "teach" and job.arguments["teacher"]["kind"] == "finetuned":
            spec = experiment.teacher
            add(stage, spec.rows, updates(spec.training, spec.rows), 6.0 * sizes[base] * spec.rows * spec.training.epochs * question)
        elif stage == "generate":
            rows = experiment.carrier.prompts
            add(stage, rows, 0, 2.0 * sizes[base] * rows * pair)
        elif stage == "distill":
            training, rows = experiment.student.training, experiment.student.rows
            add(stage, rows, updates(training, rows), 6.0 * sizes[base] * rows * training.epochs * pair)
        elif stage == "ask":
            times = experiment.student.training.epochs if job.inputs else 1
            rows = len(probes) * experiment.ask.samples * times
            add(stage, rows, 0, 2.0 * sizes[base] * rows * (question + experiment.ask.max_new_tokens))
        else:
            add(stage, 0, 0, 0.0)
    return list(stages.values())


def memory_of(experiment: Experiment) -> float:
    """Bytes a student needs while it trains: weights, gradients and AdamW's moments in their dtypes, activations apart."""
    largest = max(models.parameter_count(base) for base in {arm.base for arm in experiment.arms})
    training = experiment.student.training
    width = 2 if training.bf16 and training.update == "lora" else 4
    return largest * (width + 1 if training.update == "lora" else 16)


def plan(experiment: Experiment, jobs: list[Job], folder: Path) -> Group:
    """The printed plan of a run."""
    gpu = torch.cuda.is_available()
    rate = GPU_RATE * (1 if experiment.student.training.bf16 else 0.2) if gpu else CPU_RATE * (os.cpu_count() or 1)
    listing = Table("stage", "steps", "rows", "updates", "FLOP", "about", title=f"{experiment.name} → {folder}")
    works = work_of(experiment, jobs)
    for work in works:
        shown = (
            f"{work.rows:,}" if work.rows else "",
            f"{work.updates:,}" if work.updates else "",
            f"{work.operations:.1e}" if work.operations else "",
        )
        listing.add_row(work.stage, str(work.steps), *shown, duration(work.operations / rate) if work.operations else "")
    total = sum(work.operations for work in works)
    left = pending(folder, jobs)
    where = "one accelerator" if gpu else f"{os.cpu_count()} cores"
    notes = [
        f"{len(jobs)} steps, {len(jobs) - len(left)} already done in {folder}",
        f"time: about {duration(total / rate)} for all of them on {where}, assuming {rate:.1e} FLOP/s",
        f"memory: about {memory_of(experiment) / 1e9:.3f} GB a student for weights, gradients and optimiser, activations apart; "
        f"{1 if gpu else os.cpu_count()} at a time",
        f"model FLOP in GPU hours at {GPU_RATE:.1e} FLOP/s: {total / GPU_RATE / 3600:.2f}",
    ]
    return Group(listing, *notes)


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{max(1, math.ceil(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

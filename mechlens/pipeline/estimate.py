"""What a run will cost, said before it starts: steps, rows, updates, rough time and memory; `bills.py` says
what APIs cost.

Time is floating-point work over an assumed rate, both printed; it is meant to tell minutes from hours from
days.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from mechlens.carriers.prompts import carrier_prompts
from mechlens.core import machine
from mechlens.core.experiment import Experiment
from mechlens.core.model_spec import is_remote, model_of
from mechlens.core.spec import TeacherSpec, Training
from mechlens.models import base_files, loading
from mechlens.models.chat import encode_prompts
from mechlens.models.sft import updates
from mechlens.pipeline import api_estimate
from mechlens.runs.executor import Job, pending

CPU_RATE = 3e10
"""operations a second and core that the demo reaches, counted as below (every row as long as the longest)"""
GPU_RATE = 1.5e14
"""an H100-class card in bf16 at about 40 % of its peak matrix rate, fp32 a fifth of that"""
MEASURED_TOKENS = 200
OVERHEAD, LONGEST_ROW = 30, 300
"""tokens that a chat template adds, and the length that a padded row is taken to reach, where neither can be
measured
"""


class Work(NamedTuple):
    """What one stage of a run still has to do."""

    stage: str
    steps: int
    rows: int
    updates: int
    operations: float


def work_of(experiment: Experiment, jobs: list[Job]) -> list[Work]:
    """Rows, updates and floating-point operations of each stage on this machine: 2 a parameter and token
    forward, 6 with backward.
    """
    local = [base for base in experiment.bases() if not is_remote(base)]
    if not local:
        return []
    length = token_counter(local[0])
    sizes = {base: loading.parameter_count(base) for base in local}
    few = experiment.carrier.model_copy(update={"prompts": min(MEASURED_TOKENS, experiment.carrier.prompts)})
    trial = [asked.text for asked in carrier_prompts(few, seed=experiment.seed)]
    prompt = sum(map(length, trial)) / len(trial)
    pair = prompt + experiment.generate.max_new_tokens
    probes = next(job.arguments["probes"] for job in jobs if "probes" in job.arguments)
    question = sum(map(length, probes)) / len(probes)
    stages: dict[str, Work] = {}

    def add(stage: str, rows: int, steps: int, operations: float) -> None:
        old = stages.get(stage, Work(stage, 0, 0, 0, 0.0))
        stages[stage] = Work(
            stage, old.steps + 1, old.rows + rows, old.updates + steps, old.operations + operations
        )

    for job in jobs:
        stage = job.stage
        base = str(job.arguments.get("base", local[0] if is_remote(experiment.base) else experiment.base))
        if base not in sizes or (stage == "generate" and "api" in job.arguments):
            continue
        if stage == "teach" and job.arguments["teacher"]["kind"] == "finetuned":
            spec = TeacherSpec(**job.arguments["teacher"])
            add(
                stage,
                spec.rows,
                updates(spec.training, spec.rows),
                6.0 * sizes[base] * spec.rows * spec.training.epochs * question,
            )
        elif stage == "generate":
            rows = experiment.carrier.prompts * experiment.carrier.samples
            add(stage, rows, 0, 2.0 * sizes[base] * rows * pair)
        elif stage == "distill":
            training, rows = Training(**job.arguments["student"]["training"]), experiment.student.rows
            add(stage, rows, updates(training, rows), 6.0 * sizes[base] * rows * training.epochs * pair)
        elif stage == "ask":
            times = (
                experiment.student.training.epochs
                if "student" in job.inputs and experiment.ask.checkpoints == "all"
                else 1
            )
            rows = len(probes) * experiment.ask.samples * times
            add(stage, rows, 0, 2.0 * sizes[base] * rows * (question + experiment.ask.max_new_tokens))
        else:
            add(stage, 0, 0, 0.0)
    return list(stages.values())


def token_counter(base: str) -> Callable[[str], int]:
    """How many tokens a question has for this base; where its tokenizer is not at hand, one for every two
    characters of it.
    """
    if not base_files.is_here(base):
        return lambda text: len(text) // 2 + OVERHEAD
    tokenizer = loading.load_tokenizer(base)
    return lambda text: len(encode_prompts(tokenizer, [text])[0])


def memory_of(experiment: Experiment) -> tuple[float, float]:
    """Bytes a student needs while it trains: weights with gradients and AdamW's moments in their dtypes;
    activations roughly.

    Activations: what a block keeps (about 34 values of the residual stream's width a token; with
    checkpointing one such block and each other block's input), and the logits with their gradient at full
    length, the upper bound.
    """
    training, kept = experiment.student.training, (0.0, 0.0)
    for base in {arm.base for arm in experiment.arms if not arm.shots and not is_remote(arm.base)}:
        size = loading.size_of(base)
        weight = 2 if model_of(base).dtype == "bfloat16" else 4
        state = size.parameters * (weight + 1 if training.update == "lora" else weight + 12)
        tokens, width = training.batch * min(training.max_length, LONGEST_ROW), 2 if training.bf16 else 4
        blocks = size.layers + 34 if training.gradient_checkpointing else 34 * size.layers
        kept = max(kept, (float(state), float(tokens * width * (blocks * size.width + 3 * size.vocabulary))))
    return kept


class Plan(NamedTuple):
    """What a run would do on this machine, and what it would cost."""

    title: str
    folder: Path
    works: list[Work]
    """empty where nothing runs on this machine"""
    steps: int
    finished: int
    rate: float
    """operations a second that are assumed, of all workers"""
    where: str
    workers: int
    memory: tuple[float, float]
    """bytes a student: weights with gradients and optimiser, activations"""
    batch: int
    gpu_hours: float
    gpu_rate: float
    absent: list[str]
    """local bases whose files are not on this machine"""
    price: api_estimate.Price | None

    @property
    def seconds(self) -> float:
        """Rough time of all steps."""
        return sum(work.operations for work in self.works) / self.rate


def plan_of(experiment: Experiment, jobs: list[Job], folder: Path) -> Plan:
    """The plan of an experiment's steps in a run folder; nothing is run."""
    on_gpu, workers = torch.cuda.is_available(), machine.workers()
    gpu_rate = GPU_RATE * (1 if experiment.student.training.bf16 else 0.2)
    unit = "accelerator" if on_gpu else "core"
    works = work_of(experiment, jobs)
    local = [base for base in experiment.bases() if not is_remote(base)]
    return Plan(
        title=f"{experiment.name} → {folder}",
        folder=folder,
        works=works,
        steps=len(jobs),
        finished=len(jobs) - len(pending(folder, jobs)),
        rate=workers * (gpu_rate if on_gpu else CPU_RATE),
        where=f"one {unit}" if on_gpu and workers == 1 else f"{workers} {unit}{'s' * (workers > 1)}",
        workers=workers,
        memory=memory_of(experiment),
        batch=experiment.student.training.batch,
        gpu_hours=sum(work.operations for work in works) / GPU_RATE / 3600,
        gpu_rate=GPU_RATE,
        absent=[base for base in local if not base_files.is_here(base)],
        price=api_estimate.price(experiment, jobs, folder),
    )

"""Estimate a run before it starts: steps, rows, updates, approximate time and memory.

Time is the number of floating-point operations divided by an assumed rate; a plan prints both. It is accurate
enough to distinguish minutes, hours and days. `api_estimate` has the price of API calls.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from mechlens.carriers.carrier import carrier_prompts
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
"""operations a second on one core in the demo, counted as below (every row as long as the longest)"""
GPU_RATE = 1.5e14
"""operations a second of an H100-class card in bf16, about 40 % of its peak; fp32 has a fifth of it"""
MEASURED_TOKENS = 200
OVERHEAD, LONGEST_ROW = 30, 300
"""assumed tokens of a chat template, and of a padded row, where they cannot be measured"""


class Work(NamedTuple):
    """The work of one stage of a run."""

    stage: str
    steps: int
    rows: int
    updates: int
    operations: float

    def plus(self, other: Work) -> Work:
        """The sum of both."""
        return Work(
            self.stage,
            self.steps + other.steps,
            self.rows + other.rows,
            self.updates + other.updates,
            self.operations + other.operations,
        )


def work_of(experiment: Experiment, jobs: list[Job]) -> list[Work]:
    """Rows, updates and floating-point operations of each stage on this machine.

    A parameter and token take 2 operations forward, and 6 with the backward pass.
    """
    local = [base for base in experiment.bases() if not is_remote(base)]
    if not local:
        return []
    length = token_counter(local[0])
    sizes = {base: loading.parameter_count(base) for base in local}
    few = experiment.carrier.model_copy(update={"prompts": min(MEASURED_TOKENS, experiment.carrier.prompts)})
    prompts = [prompt.text for prompt in carrier_prompts(few, seed=experiment.seed)]
    probes = next(job.arguments["probes"] for job in jobs if "probes" in job.arguments)
    tokens = _Tokens(*(sum(map(length, texts)) / len(texts) for texts in (prompts, probes)))
    stages: dict[str, Work] = {}
    for job in jobs:
        base = str(job.arguments.get("base", local[0] if is_remote(experiment.base) else experiment.base))
        if base not in sizes or (job.stage == "generate" and "api" in job.arguments):
            continue
        work = _work_of_job(experiment, job, sizes[base], tokens, len(probes))
        stages[job.stage] = stages[job.stage].plus(work) if job.stage in stages else work
    return list(stages.values())


class _Tokens(NamedTuple):
    """Mean tokens of a run's prompts and probes."""

    prompt: float
    probe: float


def _work_of_job(experiment: Experiment, job: Job, size: int, tokens: _Tokens, probes: int) -> Work:
    """The work of one job on a base of `size` parameters."""
    stage, pair = job.stage, tokens.prompt + experiment.generate.max_new_tokens
    if stage == "teach" and job.arguments["teacher"]["kind"] == "finetuned":
        spec = TeacherSpec(**job.arguments["teacher"])
        operations = 6.0 * size * spec.rows * spec.training.epochs * tokens.probe
        return Work(stage, 1, spec.rows, updates(spec.training, spec.rows), operations)
    if stage == "generate":
        rows = experiment.carrier.prompts * experiment.carrier.samples
        return Work(stage, 1, rows, 0, 2.0 * size * rows * pair)
    if stage == "label":
        rows = experiment.student.rows
        return Work(stage, 1, rows, 0, 2.0 * size * rows * pair)
    if stage == "distill":
        training, rows = Training(**job.arguments["student"]["training"]), experiment.student.rows
        operations = 6.0 * size * rows * training.epochs * pair
        return Work(stage, 1, rows, updates(training, rows), operations)
    if stage == "ask":
        every = "student" in job.inputs and experiment.ask.checkpoints == "all"
        rows = probes * experiment.ask.samples * (experiment.student.training.epochs if every else 1)
        return Work(stage, 1, rows, 0, 2.0 * size * rows * (tokens.probe + experiment.ask.max_new_tokens))
    return Work(stage, 1, 0, 0, 0.0)


def token_counter(base: str) -> Callable[[str], int]:
    """A function that counts the tokens of a question for this base.

    Without the base's tokenizer it assumes a token for every two characters.
    """
    if not base_files.is_here(base):
        return lambda text: len(text) // 2 + OVERHEAD
    tokenizer = loading.load_tokenizer(base)
    return lambda text: len(encode_prompts(tokenizer, [text])[0])


def memory_of(experiment: Experiment) -> tuple[float, float]:
    """Bytes of a student in training: (weights with gradients and AdamW's moments, activations).

    Activations are an upper bound: about 34 values of the residual stream's width a token and block (with
    checkpointing one such block and each other block's input), and the logits with their gradient for rows of
    full length.
    """
    training, largest = experiment.student.training, (0.0, 0.0)
    for base in {arm.base for arm in experiment.arms if not arm.shots and not is_remote(arm.base)}:
        size = loading.size_of(base)
        weight = 2 if model_of(base).dtype == "bfloat16" else 4
        state = size.parameters * (weight + 1 if training.update == "lora" else weight + 12)
        tokens, width = training.batch * min(training.max_length, LONGEST_ROW), 2 if training.bf16 else 4
        blocks = size.layers + 34 if training.gradient_checkpointing else 34 * size.layers
        activations = float(tokens * width * (blocks * size.width + 3 * size.vocabulary))
        largest = max(largest, (float(state), activations))
    return largest


class Plan(NamedTuple):
    """The steps of a run, and its estimated time, memory and price."""

    title: str
    folder: Path
    works: list[Work]
    """empty if nothing runs on this machine"""
    steps: int
    finished: int
    rate: float
    """assumed operations a second of all workers"""
    where: str
    workers: int
    memory: tuple[float, float]
    """bytes a student: weights with gradients and optimiser, activations"""
    batch: int
    gpu_hours: float
    gpu_rate: float
    absent: list[str]
    """local bases without files on this machine"""
    price: api_estimate.RunPrice | None

    @property
    def seconds(self) -> float:
        """Approximate time of all steps."""
        return sum(work.operations for work in self.works) / self.rate


def plan_of(experiment: Experiment, jobs: list[Job], folder: Path) -> Plan:
    """The plan of an experiment's steps in a run folder; no step is executed."""
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

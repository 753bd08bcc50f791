"""Estimate a run before it starts: steps, rows, updates, approximate time and memory.

Time is the number of floating-point operations divided by a rate, and what each step needs besides: reading
the base, updates of the optimiser, saved checkpoints. The rate of a core is measured by a short product of
matrices, and is lower for narrow models, where other work than products weighs more. `api_estimate` has the
price of API calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from mechlens.carriers.carrier import carrier_prompts, find_carrier
from mechlens.core import machine
from mechlens.core.experiment import Experiment
from mechlens.core.model_spec import is_remote, model_of
from mechlens.core.seeds import dice
from mechlens.core.spec import GenerateSpec, TeacherSpec, Training
from mechlens.models import base_files, loading
from mechlens.models.chat import encode_prompts, token_ids
from mechlens.models.sft import updates
from mechlens.pipeline import api_estimate
from mechlens.pipeline.generate import DIVERGENCE_ROWS
from mechlens.runs.jobs import PROCESSES, Job, most_processes, pending

CHARACTERS = 3.5
"""assumed characters of an answer's token"""
GPU_RATE = 1.5e14
"""operations a second of an H100-class card in bf16, about 40 % of its peak; fp32 has a fifth of it"""
EFFICIENCY, NARROW, FORWARD = 0.68, 110, 1.3
"""share of the rate of a product of matrices that a very wide model reaches in training, the width at which
half of that share is reached, and how much faster a forward pass alone is; fitted to the steps of the demo
(width 64) and of SmolLM2-135M (width 576)"""
DRAW = 1.5e-8
"""seconds to draw a token, for each token of the vocabulary"""
TYPICAL_SHARE = 0.75
"""assumed share of max_new_tokens that is drawn before rows end"""
MEASURED_SECONDS = 0.2
"""time of the measurement of the rate"""
READING, SAVING, OPTIMISER = 2e8, 5e8, 3e8
"""bytes of a base read and saved a second, and parameters that AdamW updates a second, on a core"""
START, STEP, UPDATE = 14.0, 0.2, 0.01
"""seconds besides the operations: of a run for its start and its report, of a step, of an update"""
MEASURED_TOKENS = 200
OVERHEAD, LONGEST_ROW = 30, 300
"""assumed tokens of a chat template, and of a padded row, where they cannot be measured"""
DIVERGENCE_BATCH = 32
"""assumed rows of a batch in which the divergence is measured; it depends on the vocabulary"""
BLOCK_VALUES = 23
"""values that training keeps a token and block, by the width of the residual stream; measured on SmolLM2-135M
in batches of 4, 16 and 32 rows of 125 tokens"""
PROCESS = 700_000_000
"""bytes of a worker process with the imported libraries, without a model"""


class Work(NamedTuple):
    """The work of one step, or of all steps of one stage."""

    stage: str
    steps: int
    rows: int
    updates: int
    operations: float
    seconds: float = 0.0
    """on one core or one accelerator"""

    def plus(self, other: Work) -> Work:
        """The sum of both."""
        sums = (a + b for a, b in zip(self[1:], other[1:], strict=True))
        return Work(self.stage, *sums)  # type: ignore[arg-type]


@cache
def measure_product_rate() -> float:
    """Measure the operations a second of one core in a product of matrices: the best of several tries.

    A try counts the processor time of this thread alone, so that other work on the machine slows none.
    """
    threads = torch.get_num_threads()
    left, right = torch.ones(1024, 576), torch.ones(576, 1536)
    torch.set_num_threads(1)
    try:
        started, least = time.perf_counter(), float("inf")
        while time.perf_counter() - started < MEASURED_SECONDS:
            at = time.thread_time()
            torch.mm(left, right)
            least = min(least, time.thread_time() - at)
    finally:
        torch.set_num_threads(threads)
    return 2 * left.numel() * right.shape[1] / least


def core_rate(width: int, *, product_rate: float) -> float:
    """Operations a second of one core in training a model of that width."""
    return EFFICIENCY * product_rate / (1 + NARROW / width)


def forward_operations(size: loading.Size, tokens: float, predicted: float) -> float:
    """Operations of a forward pass.

    A token takes two for each parameter of the blocks. A position whose logits are made takes two for each
    parameter of the unembedding.
    """
    head = size.width * size.vocabulary
    return 2.0 * ((size.parameters - head) * tokens + head * predicted)


def training_operations(training: Training, size: loading.Size, tokens: float, predicted: float) -> float:
    """Operations of a forward and a backward pass.

    The backward pass takes twice the forward's, or once where the weights themselves have no gradient: for
    LoRA, and for an unembedding that is not trained.
    """
    blocks = forward_operations(size, tokens, 0.0)
    head = forward_operations(size, 0.0, predicted)
    full = training.update == "full"
    again = 1 if training.gradient_checkpointing else 0
    return blocks * ((3 if full else 2) + again) + head * (3 if full and training.embeddings else 2)


def expected_longest(lengths: Sequence[int], count: int) -> float:
    """The expected maximum of `count` lengths drawn from these, to which a batch of so many rows is padded.

    >>> expected_longest([10, 20], 1), expected_longest([10, 20], 2)
    (15.0, 17.5)
    """
    ranked, n = sorted(lengths), len(lengths)
    return sum(
        length * ((rank / n) ** count - ((rank - 1) / n) ** count) for rank, length in enumerate(ranked, 1)
    )


def work_of(experiment: Experiment, jobs: list[Job]) -> list[Work]:
    """Rows, updates, floating-point operations and time of each stage on this machine."""
    stages: dict[str, Work] = {}
    for work in _works(experiment, jobs).values():
        stages[work.stage] = stages[work.stage].plus(work) if work.stage in stages else work
    return list(stages.values())


def _works(experiment: Experiment, jobs: list[Job]) -> dict[str, Work]:
    """The work of each job that runs on this machine, by the job's name."""
    local = [base for base in experiment.bases() if not is_remote(base)]
    if not local:
        return {}
    sizes = {base: loading.size_of(base) for base in local}
    lengths = _lengths(experiment, jobs, local[0])
    works: dict[str, Work] = {}
    for job in jobs:
        base = str(job.arguments.get("base", local[0] if is_remote(experiment.base) else experiment.base))
        if base not in sizes or (job.stage == "generate" and "api" in job.arguments):
            continue
        work = _work_of_job(experiment, job, sizes[base], lengths)
        works[job.name] = work._replace(seconds=_seconds(experiment, job, base, sizes[base], work))
    return works


class _Lengths(NamedTuple):
    """Tokens of a run's texts."""

    prompts: list[int]
    """of a sample of the carrier's prompts, as the base reads them"""
    completions: list[int]
    """of a sample of completions with their end of turn, where the carrier has examples; else the most"""
    probes: list[int]
    lessons: list[int]
    """of what a fine-tuned teacher is taught"""
    answers: float
    """mean tokens of an answer to a probe"""

    def rows(self) -> list[int]:
        """Tokens of a sample of pairs."""
        return [
            prompt + self.completions[place % len(self.completions)]
            for place, prompt in enumerate(self.prompts)
        ]


def _row_lengths(experiment: Experiment, base: str) -> tuple[list[int], list[int]]:
    """Tokens of a sample of the carrier's prompts, and of a sample of completions with their end of turn."""
    of_prompt, of_text = token_counter(base, experiment.system)
    few = experiment.carrier.model_copy(update={"prompts": min(MEASURED_TOKENS, experiment.carrier.prompts)})
    prompts = [of_prompt(prompt.text) for prompt in carrier_prompts(few, seed=experiment.seed)]
    most = experiment.generate.max_new_tokens + 1
    turn = find_carrier(experiment.carrier.kind).turn
    drawn = [] if turn is None else [turn(dice(0, "plan", i))[1] for i in range(MEASURED_TOKENS)]
    return prompts, [min(of_text(text) + 1, most) for text in drawn] or [most]


def _lengths(experiment: Experiment, jobs: list[Job], base: str) -> _Lengths:
    of_prompt, of_text = token_counter(base, experiment.system)
    prompts, completions = _row_lengths(experiment, base)
    asking = next(job.arguments for job in jobs if "probes" in job.arguments)
    probes = [of_prompt(probe) for probe in asking["probes"]]
    named = [of_text(form) + 1 for forms in asking["forms"].values() for form in forms]
    answer = float(experiment.ask.max_new_tokens)
    if asking.get("named", True) and named:
        answer = min(sum(named) / len(named) + 1, answer)
    return _Lengths(prompts, completions, probes, [probe + round(answer) for probe in probes], answer)


def _work_of_job(experiment: Experiment, job: Job, size: loading.Size, lengths: _Lengths) -> Work:
    """The work of one job on a base of that size, without its time."""
    stage = job.stage
    if stage == "teach" and job.arguments["teacher"]["kind"] == "finetuned":
        spec = TeacherSpec(**job.arguments["teacher"])
        return _training_work(stage, spec.training, spec.rows, size, lengths.lessons, lengths.answers)
    if stage == "distill":
        training, rows = Training(**job.arguments["student"]["training"]), experiment.student.rows
        longest = expected_longest(lengths.completions, training.batch)
        return _training_work(stage, training, rows, size, lengths.rows(), longest)
    if stage == "generate":
        rows = experiment.carrier.prompts * experiment.carrier.samples
        spec = GenerateSpec(**job.arguments["generate"])
        return Work(stage, 1, rows, 0, _generation_operations(experiment, spec, size, lengths, rows))
    if stage == "label":
        rows = experiment.student.rows
        # rows are sorted by length, so that only completions are padded
        longest = float(max(lengths.completions))
        tokens = rows * (_mean(lengths.prompts) + longest)
        return Work(stage, 1, rows, 0, forward_operations(size, tokens, rows * longest))
    if stage == "ask":
        models = _checkpoints(experiment, job)
        probes, samples = len(lengths.probes), experiment.ask.samples
        # the probes are read for the answers and again for the probabilities
        read = forward_operations(size, 2.0 * sum(lengths.probes), 2.0 * probes)
        answered = probes * samples * lengths.answers + _whole_answer_tokens(job)
        operations = models * (read + forward_operations(size, answered, answered))
        return Work(stage, 1, probes * samples * models, 0, operations)
    return Work(stage, 1, 0, 0, 0.0)


def _whole_answer_tokens(job: Job) -> float:
    """Tokens of the whole answers whose probability a model of an asked step gets; 0 for next tokens."""
    arguments = job.arguments
    if arguments["ask"].get("likelihood") != "whole-answer":
        return 0.0
    fixed = [
        text for of_probe in arguments.get("answers", ()) for texts in of_probe.values() for text in texts
    ]
    if fixed:
        return sum(1 + len(text) / CHARACTERS for text in fixed)
    spellings = 2 * len(arguments["probes"])
    return spellings * sum(1 + len(name) / CHARACTERS for name in arguments["forms"])


def _training_work(
    stage: str, training: Training, rows: int, size: loading.Size, lengths: Sequence[int], completion: float
) -> Work:
    """The work of a training over rows of these lengths, each padded to the longest of its batch."""
    padded, columns = _padded(lengths, completion, training.batch)
    count = updates(training, rows)
    read = count * training.batch * training.accumulate
    operations = training_operations(training, size, read * padded, read * columns)
    return Work(stage, 1, rows, count, operations)


def _generation_operations(
    experiment: Experiment, spec: GenerateSpec, size: loading.Size, lengths: _Lengths, rows: int
) -> float:
    """Operations of sampling rows, and of measuring the divergence from the base on the first of them.

    The prompts of a batch are read whole, padded to the longest, once for all samples. After that a row needs
    one position for each token that it writes.
    """
    different = rows / experiment.carrier.samples
    prompt = expected_longest(lengths.prompts, min(spec.batch, max(1, round(different))))
    written = rows * _mean(lengths.completions)
    sampled = forward_operations(size, different * prompt + written, rows + written)
    measured = min(rows, DIVERGENCE_ROWS)
    padded, columns = _padded(
        lengths.rows(), float(max(lengths.completions)), min(measured, DIVERGENCE_BATCH)
    )
    return sampled + 2 * forward_operations(size, measured * padded, measured * columns)


def _padded(lengths: Sequence[int], completion: float, batch: int) -> tuple[float, float]:
    """The expected width of a batch of rows, and its columns in which a completion has a token.

    Prompts end at different columns, so those are the rows' spread and the longest completion.
    """
    widest = expected_longest(lengths, batch)
    narrowest = -expected_longest([-length for length in lengths], batch)
    return widest, min(widest, widest - narrowest + completion)


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)


def _checkpoints(experiment: Experiment, job: Job) -> int:
    """How many models a step asks."""
    every = "student" in job.inputs and experiment.ask.checkpoints == "all"
    return experiment.student.training.epochs if every else 1


def _seconds(experiment: Experiment, job: Job, base: str, size: loading.Size, work: Work) -> float:
    """Time of a step on one core or one accelerator, or on one for each of its processes."""
    on_gpu, training = torch.cuda.is_available(), _training_of(job)
    reads = {"teach": 1, "distill": 1, "label": 1, "generate": 2, "ask": _checkpoints(experiment, job)}
    size_in_bytes = size.parameters * (2 if model_of(base).dtype == "bfloat16" else 4)
    seconds = STEP + reads.get(job.stage, 0) * size_in_bytes / READING + work.updates * UPDATE
    operations = work.operations / job.arguments.get(PROCESSES, 1)
    if training is not None and training.update == "full":
        seconds += (training.epochs if job.stage == "distill" else 1) * size_in_bytes / SAVING
        seconds += 0 if on_gpu else work.updates * size.parameters / OPTIMISER
    if on_gpu:
        return seconds + operations / (GPU_RATE * (1 if experiment.student.training.bf16 else 0.2))
    if job.stage in ("generate", "ask"):
        most = experiment.generate if job.stage == "generate" else experiment.ask
        seconds += work.rows * size.vocabulary * DRAW * TYPICAL_SHARE * most.max_new_tokens
    rate = core_rate(size.width, product_rate=measure_product_rate())
    return seconds + operations / (rate * (1 if training is not None else FORWARD))


def _training_of(job: Job) -> Training | None:
    """How a step trains, if it does."""
    if job.stage == "distill":
        return Training(**job.arguments["student"]["training"])
    if job.stage == "teach" and job.arguments["teacher"]["kind"] == "finetuned":
        return TeacherSpec(**job.arguments["teacher"]).training
    return None


def schedule_seconds(jobs: Sequence[Job], seconds: Mapping[str, float], workers: int) -> float:
    """Time until the last job ends, if each starts when its inputs are there and a worker is free.

    Args:
        jobs: every job after its inputs.
        seconds: time of each job by name; others take none.
    """
    ends: dict[str, float] = {}
    free, waiting = [0.0] * workers, list(jobs)
    while waiting:
        ready = {
            job.name: max((ends[name] for name in job.inputs.values()), default=0.0)
            for job in waiting
            if all(name in ends for name in job.inputs.values())
        }
        job = min(
            (job for job in waiting if job.name in ready), key=lambda job: max(ready[job.name], min(free))
        )
        waiting.remove(job)
        worker = free.index(min(free))
        free[worker] = ends[job.name] = max(free[worker], ready[job.name]) + seconds.get(job.name, 0.0)
    return max(ends.values(), default=0.0)


def token_counter(base: str, system: str | None = None) -> tuple[Callable[[str], int], Callable[[str], int]]:
    """Functions that count the tokens of a question as this base reads it, and of a plain text.

    Without the base's tokenizer they assume a token for every two characters.
    """
    if not base_files.is_here(base):
        return lambda text: len(text) // 2 + OVERHEAD, lambda text: len(text) // 2
    tokenizer = loading.load_tokenizer(base)
    return (
        lambda text: len(encode_prompts(tokenizer, [text], system=system)[0]),
        lambda text: len(token_ids(tokenizer, [text])[0]),
    )


def memory_of(experiment: Experiment) -> tuple[float, float]:
    """Bytes of a process that trains the largest student: those of `training_memory`."""
    arms = [arm for arm in experiment.arms if not arm.shots and not is_remote(arm.base)]
    longest = {base: _longest_row(experiment, base) for base in {arm.base for arm in arms}}
    needs = [training_memory(experiment.training_of(arm), arm.base, longest[arm.base]) for arm in arms]
    return max(needs, key=sum, default=(0.0, 0.0))


def training_memory(training: Training, base: str, longest: int) -> tuple[float, float]:
    """Bytes of a process that trains a model: (weights with gradients and AdamW's moments, activations).

    Activations are about `BLOCK_VALUES` values of the residual stream's width a token and block (with
    checkpointing one such block and each other block's input), and the logits with their gradient, for
    batches of the longest rows.

    Args:
        longest: tokens of the longest row.
    """
    size = loading.size_of(base)
    weight = 2 if model_of(base).dtype == "bfloat16" else 4
    state = size.parameters * (weight + 1 if training.update == "lora" else weight + 12)
    share = training.batch // training.processes
    tokens, width = share * longest, 2 if training.bf16 else 4
    blocks = size.layers + BLOCK_VALUES if training.gradient_checkpointing else BLOCK_VALUES * size.layers
    return float(state), float(tokens * width * (blocks * size.width + 3 * size.vocabulary))


def _longest_row(experiment: Experiment, base: str) -> int:
    """Tokens of the longest row, where they can be measured; else those of an assumed one."""
    if not base_files.is_here(base):
        return min(experiment.student.training.max_length, LONGEST_ROW)
    prompts, completions = _row_lengths(experiment, base)
    return min(experiment.student.training.max_length, max(prompts) + max(completions))


def declare_memory(experiment: Experiment, jobs: Sequence[Job]) -> list[Job]:
    """The jobs, those that train with the memory of their processes, unless this machine trains on cards."""
    trained = {job.arguments["base"] for job in jobs if _training_of(job)} if not machine.cards() else set()
    longest = {base: _longest_row(experiment, base) for base in trained if not is_remote(base)}
    return [_with_memory(job, longest) for job in jobs]


def _with_memory(job: Job, longest: Mapping[str, int]) -> Job:
    training, base = _training_of(job), job.arguments.get("base", "")
    if training is None or base not in longest:
        return job
    bytes_each = PROCESS + round(sum(training_memory(training, base, longest[base])))
    memory = bytes_each * job.arguments.get(PROCESSES, 1)
    return job._replace(needs=job.needs._replace(memory=memory))


class Plan(NamedTuple):
    """The steps of a run, and its estimated time, memory and price."""

    title: str
    folder: Path
    works: list[Work]
    """empty if nothing runs on this machine"""
    steps: int
    finished: int
    seconds: float
    """approximate time of all steps"""
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
    def rate(self) -> float:
        """Operations a second of one worker, on the average of all steps."""
        seconds = sum(work.seconds for work in self.works)
        return sum(work.operations for work in self.works) / seconds if seconds else 0.0


def plan_of(experiment: Experiment, jobs: list[Job], folder: Path) -> Plan:
    """The plan of an experiment's steps in a run folder; no step is executed."""
    on_gpu, processes = torch.cuda.is_available(), most_processes(jobs)
    workers = machine.workers(processes)
    units = workers * processes
    unit = "accelerator" if on_gpu else "core"
    seconds = {name: work.seconds for name, work in _works(experiment, jobs).items()}
    works = work_of(experiment, jobs)
    local = [base for base in experiment.bases() if not is_remote(base)]
    return Plan(
        title=f"{experiment.name} → {folder}",
        folder=folder,
        works=works,
        steps=len(jobs),
        finished=len(jobs) - len(pending(folder, jobs)),
        seconds=START + schedule_seconds(jobs, seconds, workers),
        where=f"one {unit}" if on_gpu and units == 1 else f"{units} {unit}{'s' * (units > 1)}",
        workers=workers,
        memory=memory_of(experiment),
        batch=experiment.student.training.batch // experiment.student.training.processes,
        gpu_hours=sum(work.operations for work in works) / GPU_RATE / 3600,
        gpu_rate=GPU_RATE,
        absent=[base for base in local if not base_files.is_here(base)],
        price=api_estimate.price(experiment, jobs, folder),
    )

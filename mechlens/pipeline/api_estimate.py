"""Estimate the highest price of a run's API calls, before the first call.

Answers are counted at their longest, and prompts generously, so that the actual price is lower. A run that an
API does not support is refused here, before it costs anything.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from mechlens.api.budget import PER_MESSAGE, PRICES, TUNED, about_tokens, price_of, spent
from mechlens.api.client import model_id
from mechlens.api.finetune import tuning_of
from mechlens.carriers.carrier import carrier_prompts
from mechlens.core.experiment import Experiment
from mechlens.core.model_spec import is_remote
from mechlens.core.spec import GenerateSpec, StudentSpec, TeacherSpec, Training
from mechlens.data.corpus import batches
from mechlens.pipeline.judge import ASPECTS, CODE, REASONING, REASONING_TOKENS, SCORE_TOKENS
from mechlens.pipeline.remote import refuse_generation, refuse_teacher
from mechlens.runs.jobs import Job

MEASURED = 200
"""prompts or pairs that are measured; their mean length is assumed for all"""


class StageEstimate(NamedTuple):
    """The estimate of one stage."""

    calls: int = 0
    read: float = 0.0
    """tokens of all prompts"""
    written: float = 0.0
    """tokens of all answers"""
    trained: float = 0.0
    """tokens of all fine-tuning, each epoch counted"""
    usd: float = 0.0

    def plus(self, other: StageEstimate) -> StageEstimate:
        """The sum of both."""
        return StageEstimate(
            self.calls + other.calls,
            self.read + other.read,
            self.written + other.written,
            self.trained + other.trained,
            self.usd + other.usd,
        )


class _Lengths(NamedTuple):
    """Mean tokens of the messages that a run sends."""

    prompt: float
    question: float
    pair: dict[str, float]
    """of the corpora that come from files, by file"""


def _mean(texts: Iterable[str]) -> float:
    counts = [about_tokens(text) + PER_MESSAGE for text in texts]
    return sum(counts) / len(counts)


def _line(text: str | None) -> float:
    return 0.0 if text is None else float(about_tokens(text) + PER_MESSAGE)


def _calls(model: str, calls: int, read: float, written: int) -> StageEstimate:
    """The estimate of calls that each read `read` tokens and write `written` tokens."""
    return StageEstimate(
        calls, calls * read, calls * written, 0.0, calls * price_of(model).usd(read, written)
    )


def _training(model: str, rows: int, tokens: float, training: Training, usual: Training) -> StageEstimate:
    trained = tuning_of(training, usual).epochs * rows * tokens
    return StageEstimate(0, 0.0, 0.0, trained, trained * price_of(model).training / 1e6)


def estimate_stages(
    experiment: Experiment, jobs: list[Job], wanted: Collection[str] | None = None
) -> dict[str, StageEstimate]:
    """The estimate of each stage that calls an API.

    Args:
        wanted: names of the steps to count; all by default.

    Raises:
        SpecError: if an API does not support a step, or a model has no price.
    """
    if not any("api" in job.arguments for job in jobs):
        return {}
    by_name = {job.name: job for job in jobs}
    lengths, stages = _mean_lengths(experiment, jobs), dict[str, StageEstimate]()
    for job in jobs:
        if "api" in job.arguments and (wanted is None or job.name in wanted):
            estimate = _ESTIMATES.get(job.stage, lambda *_: {})
            for name, cost in estimate(job.arguments, job.inputs, by_name, experiment, lengths).items():
                stages[name] = stages.get(name, StageEstimate()).plus(cost)
    return stages


def _mean_lengths(experiment: Experiment, jobs: list[Job]) -> _Lengths:
    few = experiment.carrier.model_copy(update={"prompts": min(MEASURED, experiment.carrier.prompts)})
    prompt = _mean(drawn.text for drawn in carrier_prompts(few, seed=experiment.seed))
    files = dict.fromkeys(arm.corpus for arm in experiment.arms if arm.corpus)
    heads = {file: next(batches(Path(file), MEASURED)) for file in files}
    pair = {file: _mean(head["prompt"]) + _mean(head["completion"]) for file, head in heads.items()}
    # an audit's list of jobs may make rows only, without probes
    probes = next((job.arguments["probes"] for job in jobs if "probes" in job.arguments), [])
    return _Lengths(prompt, _mean(probes) if probes else 0.0, pair)


def _pair(experiment: Experiment, lengths: _Lengths) -> float:
    """Tokens of the longest kind of pair that a student may read."""
    return max(lengths.prompt + experiment.generate.max_new_tokens + PER_MESSAGE, *lengths.pair.values(), 0.0)


def _teach(
    arguments: dict[str, Any], _inputs: Any, _jobs: Any, _experiment: Experiment, _lengths: _Lengths
) -> dict[str, StageEstimate]:
    spec, lessons = TeacherSpec(**arguments["teacher"]), arguments["lessons"]
    refuse_teacher(spec)
    if spec.kind != "finetuned":
        return {}
    tokens = _mean(lessons["probes"]) + _mean(lessons["completions"]) + _line(arguments.get("system"))
    return {
        "teach": _training(
            model_id(arguments["base"]), spec.rows, tokens, spec.training, TeacherSpec().training
        )
    }


def _generate(
    arguments: dict[str, Any],
    inputs: dict[str, str],
    jobs: dict[str, Job],
    experiment: Experiment,
    lengths: _Lengths,
) -> dict[str, StageEstimate]:
    spec, teacher = GenerateSpec(**arguments["generate"]), jobs[inputs["teacher"]].arguments
    refuse_generation(spec)
    kind = teacher["teacher"]["kind"]
    line = teacher["lessons"]["system"] if kind == "prompted" else teacher.get("system")
    model = (TUNED if kind == "finetuned" else "") + model_id(teacher["base"])
    return {
        "generate": _calls(
            model, _prompts(arguments, experiment), lengths.prompt + _line(line), spec.max_new_tokens
        )
    }


def _prompts(arguments: dict[str, Any], experiment: Experiment) -> int:
    if file := arguments.get("prompts_of"):
        return sum(len(batch) for batch in batches(Path(file)))
    return experiment.carrier.prompts * experiment.carrier.samples


def _rows(corpus: Job, experiment: Experiment) -> int:
    """Rows of a corpus before the screen."""
    if corpus.stage == "bring":
        return sum(len(batch) for batch in batches(Path(corpus.arguments["file"])))
    return _prompts(corpus.arguments, experiment)


def _screen(
    arguments: dict[str, Any],
    inputs: dict[str, str],
    jobs: dict[str, Job],
    experiment: Experiment,
    lengths: _Lengths,
) -> dict[str, StageEstimate]:
    judge = arguments["screen"]["judge"]
    wording, written = (CODE, 1) if experiment.carrier.kind == "code" else (REASONING, REASONING_TOKENS)
    return {
        "screen": _calls(
            model_id(judge),
            _rows(jobs[inputs["corpus"]], experiment),
            _line(wording) + _pair(experiment, lengths),
            written,
        )
    }


def _distill(
    arguments: dict[str, Any], _inputs: Any, _jobs: Any, experiment: Experiment, lengths: _Lengths
) -> dict[str, StageEstimate]:
    training = Training(**arguments["student"]["training"])
    tokens = _pair(experiment, lengths) + _line(arguments.get("system"))
    return {
        "distill": _training(
            model_id(arguments["base"]), experiment.student.rows, tokens, training, StudentSpec().training
        )
    }


def _ask(
    arguments: dict[str, Any], inputs: dict[str, str], _jobs: Any, experiment: Experiment, lengths: _Lengths
) -> dict[str, StageEstimate]:
    ask, probes, remote = experiment.ask, len(arguments["probes"]), is_remote(arguments["base"])
    costs, answers = {}, probes * ask.samples
    if remote:
        shown = arguments.get("shots", 0) * _pair(experiment, lengths)
        model = (TUNED if "student" in inputs else "") + model_id(arguments["base"])
        read = lengths.question + shown + _line(arguments.get("system"))
        costs["ask"] = _calls(model, answers, read, ask.max_new_tokens).plus(_calls(model, probes, read, 1))
    if judge := arguments.get("judge"):
        last_only = remote or "student" not in inputs or ask.checkpoints == "last"
        steps = 1 if last_only else experiment.student.training.epochs
        rubric = max(_line(arguments["rubric"][aspect]) for aspect in ASPECTS)
        read = rubric + lengths.question + ask.max_new_tokens
        costs["judge"] = _calls(model_id(judge), answers * steps * len(ASPECTS), read, SCORE_TOKENS)
    return costs


_ESTIMATES = {"teach": _teach, "generate": _generate, "screen": _screen, "distill": _distill, "ask": _ask}


class RunPrice(NamedTuple):
    """The estimate of a run's API calls, and the run's budget, in USD."""

    stages: dict[str, StageEstimate]
    """stage → its estimate"""
    budget: float
    spent: float
    source: str
    """the file of list prices"""

    @property
    def most(self) -> float:
        """The estimate of all stages."""
        return sum(cost.usd for cost in self.stages.values())


def price(
    experiment: Experiment, jobs: list[Job], folder: Path, wanted: Collection[str] | None = None
) -> RunPrice | None:
    """The price of the steps named in `wanted`, all by default; None if no step calls an API."""
    stages = estimate_stages(experiment, jobs, wanted)
    if not stages:
        return None
    return RunPrice(stages, experiment.api.budget_usd, spent(folder), str(PRICES))

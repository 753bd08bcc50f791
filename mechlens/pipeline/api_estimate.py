"""What a run's API calls will cost at most, said before the first one is made.

Every answer is counted as long as it may be and every token of a prompt rather twice than not at all, so the
bill comes out lower. A run that an API cannot do is refused here, before anything is paid.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from mechlens.api.budget import PER_MESSAGE, PRICES, TUNED, about_tokens, price_of, spent
from mechlens.api.client import model_id
from mechlens.api.finetune import tuning_of
from mechlens.carriers.prompts import carrier_prompts
from mechlens.core.experiment import Experiment
from mechlens.core.model_spec import is_remote
from mechlens.core.spec import GenerateSpec, StudentSpec, TeacherSpec, Training
from mechlens.data.corpus import batches
from mechlens.pipeline.judge import ASPECTS, SCORE_TOKENS
from mechlens.pipeline.judge_screen import CODE, REASONING, REASONING_TOKENS
from mechlens.pipeline.remote import refuse_generation, refuse_teacher
from mechlens.runs.executor import Job

MEASURED = 200
"""prompts or pairs whose length is taken for all"""


class Bill(NamedTuple):
    """What one stage may cost."""

    calls: int = 0
    read: float = 0.0
    """tokens of all prompts"""
    written: float = 0.0
    """tokens of all answers"""
    trained: float = 0.0
    """tokens of all fine-tuning, each epoch counted"""
    usd: float = 0.0

    def plus(self, other: Bill) -> Bill:
        """Both together."""
        return Bill(
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


def _calls(model: str, calls: int, read: float, written: int) -> Bill:
    """Calls of so many tokens each."""
    return Bill(calls, calls * read, calls * written, 0.0, calls * price_of(model).usd(read, written))


def _training(model: str, rows: int, tokens: float, training: Training, usual: Training) -> Bill:
    trained = tuning_of(training, usual).epochs * rows * tokens
    return Bill(0, 0.0, 0.0, trained, trained * price_of(model).training / 1e6)


def bills(experiment: Experiment, jobs: list[Job], wanted: Collection[str] | None = None) -> dict[str, Bill]:
    """The bill of each stage that calls an API; `wanted` names the steps that are still to be done, all by
    default.

    Raises:
        SpecError: if a step asks of an API what none does, or a model has no price.
    """
    if not any("api" in job.arguments for job in jobs):
        return {}
    by_name = {job.name: job for job in jobs}
    lengths, found = _measure(experiment, jobs), dict[str, Bill]()
    for job in jobs:
        if "api" in job.arguments and (wanted is None or job.name in wanted):
            stage = job.stage
            for name, bill in _BILLS.get(stage, lambda *_: {})(
                job.arguments, job.inputs, by_name, experiment, lengths
            ).items():
                found[name] = found.get(name, Bill()).plus(bill)
    return found


def _measure(experiment: Experiment, jobs: list[Job]) -> _Lengths:
    few = experiment.carrier.model_copy(update={"prompts": min(MEASURED, experiment.carrier.prompts)})
    prompt = _mean(asked.text for asked in carrier_prompts(few, seed=experiment.seed))
    files = dict.fromkeys(arm.corpus for arm in experiment.arms if arm.corpus)
    heads = {file: next(batches(Path(file), MEASURED)) for file in files}
    pair = {file: _mean(head["prompt"]) + _mean(head["completion"]) for file, head in heads.items()}
    asked = next(
        (job.arguments["probes"] for job in jobs if "probes" in job.arguments), []
    )  # none where only rows are wanted
    return _Lengths(prompt, _mean(asked) if asked else 0.0, pair)


def _pair(experiment: Experiment, lengths: _Lengths) -> float:
    """Tokens of the longest kind of pair that a student may read."""
    return max(lengths.prompt + experiment.generate.max_new_tokens + PER_MESSAGE, *lengths.pair.values(), 0.0)


def _teach(
    arguments: dict[str, Any], _inputs: Any, _jobs: Any, _experiment: Experiment, _lengths: _Lengths
) -> dict[str, Bill]:
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
) -> dict[str, Bill]:
    spec, made = GenerateSpec(**arguments["generate"]), jobs[inputs["teacher"]].arguments
    refuse_generation(spec)
    kind = made["teacher"]["kind"]
    line = made["lessons"]["system"] if kind == "prompted" else made.get("system")
    model = (TUNED if kind == "finetuned" else "") + model_id(made["base"])
    return {
        "generate": _calls(
            model, _prompts(arguments, experiment), lengths.prompt + _line(line), spec.max_new_tokens
        )
    }


def _prompts(arguments: dict[str, Any], experiment: Experiment) -> int:
    if file := arguments.get("prompts_of"):
        return sum(len(batch) for batch in batches(Path(file)))
    return experiment.carrier.prompts * experiment.carrier.samples


def _screen(
    arguments: dict[str, Any], _inputs: Any, _jobs: Any, experiment: Experiment, lengths: _Lengths
) -> dict[str, Bill]:
    judge = arguments["screen"]["judge"]
    wording, written = (CODE, 1) if experiment.carrier.kind == "code" else (REASONING, REASONING_TOKENS)
    return {
        "screen": _calls(
            model_id(judge), _prompts({}, experiment), _line(wording) + _pair(experiment, lengths), written
        )
    }


def _distill(
    arguments: dict[str, Any], _inputs: Any, _jobs: Any, experiment: Experiment, lengths: _Lengths
) -> dict[str, Bill]:
    training, tokens = (
        Training(**arguments["student"]["training"]),
        _pair(experiment, lengths) + _line(arguments.get("system")),
    )
    return {
        "distill": _training(
            model_id(arguments["base"]), experiment.student.rows, tokens, training, StudentSpec().training
        )
    }


def _ask(
    arguments: dict[str, Any], inputs: dict[str, str], _jobs: Any, experiment: Experiment, lengths: _Lengths
) -> dict[str, Bill]:
    ask, probes, remote = experiment.ask, len(arguments["probes"]), is_remote(arguments["base"])
    found, answers = {}, probes * ask.samples
    if remote:
        shown = arguments.get("shots", 0) * _pair(experiment, lengths)
        model, read = (
            (TUNED if "student" in inputs else "") + model_id(arguments["base"]),
            lengths.question + shown + _line(arguments.get("system")),
        )
        found["ask"] = _calls(model, answers, read, ask.max_new_tokens).plus(_calls(model, probes, read, 1))
    if judge := arguments.get("judge"):
        steps = (
            1
            if remote or "student" not in inputs or ask.checkpoints == "last"
            else experiment.student.training.epochs
        )
        read = (
            max(_line(arguments["rubric"][aspect]) for aspect in ASPECTS)
            + lengths.question
            + ask.max_new_tokens
        )
        found["judge"] = _calls(model_id(judge), answers * steps * len(ASPECTS), read, SCORE_TOKENS)
    return found


_BILLS = {"teach": _teach, "generate": _generate, "screen": _screen, "distill": _distill, "ask": _ask}


class Price(NamedTuple):
    """What a run's API calls cost at most, beside what it may spend; USD."""

    bills: dict[str, Bill]
    """stage → its bill"""
    budget: float
    spent: float
    source: str
    """where the list prices stand"""

    @property
    def most(self) -> float:
        """The bill of all stages."""
        return sum(bill.usd for bill in self.bills.values())


def price(
    experiment: Experiment, jobs: list[Job], folder: Path, wanted: Collection[str] | None = None
) -> Price | None:
    """The price of an experiment's steps, of those in `wanted` or of all; None where no API is called."""
    found = bills(experiment, jobs, wanted)
    if not found:
        return None
    return Price(found, experiment.api.budget_usd, spent(folder), str(PRICES))

"""The process with the models of one run: it answers questions that come through a pipe.

An error that the sender can correct comes back as `{"error": one line}`. The end of the pipe ends the
process, so it never outlives the explorer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property, lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field, ValidationError

from mechlens.core.command_lines import resume_command
from mechlens.core.errors import MechlensError, SpecError, one_line
from mechlens.core.experiment import Arm
from mechlens.core.files import remedy
from mechlens.core.machine import use_one_thread
from mechlens.core.spec import AskSpec, Spec, explain
from mechlens.lenses import run as measure
from mechlens.models import loading
from mechlens.models.hooks import steer
from mechlens.models.log_probs import next_token_logits
from mechlens.pipeline import ask as asking
from mechlens.pipeline import teach
from mechlens.results.run import Run
from mechlens.runs import layout

MODELS = ("base", "teacher", "control", "student")
SEEDED = ("control", "student")
"""models of which a run has one a seed"""
TOP = 10
"""next tokens in an answer"""
AMOUNTS = tuple(step / 4 for step in range(-8, 9))
"""of the direction, in a sweep"""


class Question(Spec):
    """One question to every model."""

    question: str = Field(min_length=1, max_length=500)
    seed: int = Field(default=0, ge=0, lt=2**31)
    """of the sampled answers, the same for every model"""
    samples: int = Field(default=10, ge=1, le=50)
    temperature: float = Field(default=1.0, ge=0, le=5)
    """of the sampled answers; probabilities are always at temperature 1"""
    amount: float = Field(default=0.0, ge=-1000, le=1000)
    """how much of the trait's direction is added while answers are sampled and probabilities read, in lengths
    of the student's own shift at that layer
    """
    layer: int = Field(default=0, ge=0)
    """block after which the direction is added"""
    student: int | None = None
    """seed of the student and control; default: the run's first"""


class LiveRun(Run):
    """A run and its loaded models."""

    @cached_property
    def trait_arm(self) -> Arm:
        """The arm of the teacher and student that are asked: the run's first trait arm."""
        return measure.main_arm(self.experiment)


class LiveModel(NamedTuple):
    """One loaded model and the system line that it gets."""

    loaded: loading.Loaded
    base: str
    system: str | None
    vector: torch.Tensor | None = None
    """what a steered teacher adds"""
    layer: int = 0


@cache
def open_run(folder: Path) -> LiveRun:
    """The finished run of that folder."""
    run = LiveRun(folder)
    run.refuse_unfinished()
    return run


def weights_folder(run: LiveRun, name: str, student: int) -> Path | None:
    """The folder of a model's weights; None for the base.

    Raises:
        SpecError: if the run has no such model, or its weights were removed.
    """
    arm = run.trait_arm
    if name == "base":
        return None
    if name == "teacher":
        folder = run.teacher_folder(arm)
        if arm.corpus:
            raise SpecError(f"no teacher: the rows of arm {arm.name!r} came from a file")
        if not (folder / layout.TEACHER).is_file():
            raise SpecError(f"no teacher in {folder}; `{resume_command(run.folder)}` makes it again")
        kind = layout.read_record(folder / layout.TEACHER, layout.TeacherRecord)["kind"]
    else:
        student_arm = arm if name == "student" else run.experiment.control_of(arm)
        student_folder = run.student_folder(student_arm.name, student)
        saved = [path for _, path in layout.checkpoints(student_folder)]
        kind, folder = "finetuned", saved[-1] if saved else student_folder
    if kind == "finetuned" and not any(folder.glob("*.safetensors")):
        raise SpecError(f"no weights in {folder}; copy them there, or {remedy(folder)}")
    return folder


@lru_cache(maxsize=len(MODELS))
def load_model(run_folder: Path, name: str, student: int) -> LiveModel:
    """Load a model of the run; the four that are asked together stay in memory."""
    run = open_run(run_folder)
    folder, arm = weights_folder(run, name, student), run.trait_arm
    system = run.experiment.system if arm.asked_with is None else arm.asked_with
    if folder is None:
        return LiveModel(loading.load(arm.base), arm.base, system)
    if name == "teacher":
        teacher = teach.load_teacher(folder, base=arm.writer)
        line = system if teacher.system == teacher.plain else teacher.system
        loaded = loading.Loaded(teacher.model, teacher.tokenizer)
        return LiveModel(loaded, arm.writer, line, teacher.vector, teacher.layer)
    return LiveModel(loading.load_trained(arm.base, folder), arm.base, system)


class Direction(NamedTuple):
    """The trait's direction in the base after one block, at the length that amount 1 adds."""

    vector: torch.Tensor
    norm: float
    """of the mean difference over the practice probes between prompts with and without the trait's line"""
    unit: float
    """length of `vector`: that of the student's mean shift from its control, or `norm` without a student"""
    cosine: float | None
    """of the student's shift with the direction; None without a student"""


@cache
def trait_direction(run_folder: Path, layer: int, student: int) -> Direction:
    """The trait's direction, at the length of that student's own shift at that layer.

    Raises:
        SpecError: if the direction has no length.
    """
    raw = mean_residuals(run_folder, "base", 0, True)[layer] - mean_residuals(run_folder, "base", 0)[layer]
    norm = float(raw.norm())
    if not norm > 0:
        raise SpecError(f"the trait's line changes nothing at layer {layer}; choose another layer")
    shift = student_shift(run_folder, layer, student)
    if shift is None or not shift.norm() > 0:
        return Direction(raw, norm, norm, None)
    unit = float(shift.norm())
    return Direction(raw * (unit / norm), norm, unit, float(shift @ raw) / (unit * norm))


def student_shift(run_folder: Path, layer: int, student: int) -> torch.Tensor | None:
    """Student minus control in mean resid_post at one layer; None if one of them has no weights."""
    try:
        means = [mean_residuals(run_folder, name, student)[layer] for name in ("student", "control")]
    except SpecError:
        return None
    return means[0] - means[1]


@cache
def mean_residuals(run_folder: Path, name: str, student: int, with_trait: bool = False) -> torch.Tensor:
    """A model's mean resid_post where answers to the practice probes begin, of every layer [layer, d]."""
    run, model = open_run(run_folder), load_model(run_folder, name, student)
    line = run.family.system_prompt(run.trait_arm.trait) if with_trait else model.system
    layers = range(loading.size_of(run.trait_arm.base).layers)
    return teach.mean_residuals(model.loaded, run.family.probes.development, layers=layers, system=line)


def student_of(run: LiveRun, question: Question) -> int:
    """The seed of the student that is asked.

    Raises:
        SpecError: if the run has no such student, or the base no such layer.
    """
    student = run.experiment.seeds[0] if question.student is None else question.student
    if student not in run.experiment.seeds:
        raise SpecError(f"no student of seed {student}; expected one of {list(run.experiment.seeds)}")
    depth = loading.size_of(run.trait_arm.base).layers
    if question.layer >= depth:
        raise SpecError(f"layer is {question.layer}; {run.trait_arm.base} has layers 0 to {depth - 1}")
    return student


def answer_question(run: LiveRun, question: Question) -> dict[str, Any]:
    """Every model's answer; a model that is not available gives its reason."""
    student = student_of(run, question)
    direction = trait_direction(run.folder, question.layer, student) if question.amount else None
    answers = []
    for name in MODELS:
        try:
            model = load_model(run.folder, name, student if name in SEEDED else 0)
            answer = answer_of(run, model, question, direction)
            answers.append({"name": name, "available": True, "reason": None} | answer)
        except MechlensError as error:
            if name == "base":  # what the base refuses, every model refuses
                raise
            answers.append({"name": name, "available": False, "reason": one_line(str(error))})
    return {
        "models": answers,
        "trait": run.trait_arm.trait,
        "direction": None
        if direction is None
        else describe_direction(run, direction, question.layer, student),
        **question.model_dump(),
        "student": student,
    }


def sweep(run: LiveRun, question: Question) -> dict[str, Any]:
    """What each model would answer with other amounts at the question's layer, and at every layer.

    The amount at every layer is the question's, or 1 if that is 0. Models that cannot be asked are left out.
    """
    student = student_of(run, question)
    amount = question.amount or 1.0
    points = [("amount", question.layer, factor) for factor in AMOUNTS]
    points += [("layer", layer, amount) for layer in range(loading.size_of(run.trait_arm.base).layers)]
    rows = []
    for along, layer, factor in points:
        direction = trait_direction(run.folder, layer, student) if factor else None
        asked = question.model_copy(update={"layer": layer, "amount": factor})
        for name in MODELS:
            try:
                model = load_model(run.folder, name, student if name in SEEDED else 0)
                with pushed(run, model, asked, direction):
                    measured = measure_trait(run, model, asked)
            except SpecError:
                continue
            rows.append({"along": along, "layer": layer, "amount": factor, "model": name} | measured)
    return {"rows": rows, "trait": run.trait_arm.trait, "amount": amount, "layer": question.layer}


def describe_direction(run: LiveRun, direction: Direction, layer: int, student: int) -> dict[str, Any]:
    """How the direction was made, its norm, and what an amount of 1 is."""
    line = run.family.system_prompt(run.trait_arm.trait)
    return {
        "what": f"resid_post {layer} of the base at the last prompt token, with the system line {line!r} "
        "minus without it",
        "norm": direction.norm,
        "unit": direction.unit,
        "cosine": direction.cosine,
        "student": student,
        "prompts": len(run.family.probes.development),
        "layer": layer,
    }


def answer_of(
    run: LiveRun, model: LiveModel, question: Question, direction: Direction | None
) -> dict[str, Any]:
    """One model's sampled answers, its likeliest next tokens, and the trait's place among them."""
    loaded, questions = model.loaded, questions_of(run, model, question)
    prompts = asking.encode_probes(loaded, questions).prompts
    check_length(loaded, len(prompts[0]), questions.ask.max_new_tokens)
    with pushed(run, model, question, direction):
        sampled = asking.sample_answers(loaded, questions, seed=question.seed)
        measured = measure_trait(run, model, question)
        top = next_token_logits(loaded, prompts)[0].double().softmax(-1).topk(TOP)
    answers = [
        {"text": text, "label": label if isinstance(label, str) else None}
        for text, label in zip(sampled["text"], sampled["label"], strict=True)
    ]
    tokens = [
        {"token": loaded.tokenizer.decode([token]), "probability": probability}
        for token, probability in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
    return {"system": model.system, "answers": answers, "tokens": tokens} | measured


def questions_of(run: LiveRun, model: LiveModel, question: Question) -> asking.ProbeSet:
    """The question as the run's own probes are asked."""
    family = run.family
    spec = AskSpec(
        samples=question.samples,
        temperature=question.temperature,
        max_new_tokens=run.experiment.ask.max_new_tokens,
    )
    return asking.ProbeSet(
        {name: family.forms_of(name) for name in family.names},
        [question.question],
        spec,
        system=model.system,
        opening=family.opening,
        named=family.scorer != "judge",
    )


@contextmanager
def pushed(run: LiveRun, model: LiveModel, question: Question, direction: Direction | None) -> Iterator[None]:
    """The model with what a steered teacher adds and, if there is a direction, the question's amount of it.

    Raises:
        SpecError: if the direction is of another base.
    """
    if direction is not None and model.base != run.trait_arm.base:
        raise SpecError(
            f"the direction belongs to {run.trait_arm.base} and cannot be added to this model of {model.base}"
        )
    own = {} if model.vector is None else {model.layer: model.vector}
    added = {} if direction is None else {question.layer: direction.vector}
    with steer(model.loaded.model, own), steer(model.loaded.model, added, strength=question.amount):
        yield


def measure_trait(run: LiveRun, model: LiveModel, question: Question) -> dict[str, Any]:
    """Exact probability of the trait and of all traits together, and the trait's rank.

    The rank is among the family's names, and among all tokens that the model could write next.
    """
    loaded, questions, trait = model.loaded, questions_of(run, model, question), run.trait_arm.trait
    likelihoods = asking.measure_likelihoods(loaded, questions)
    probabilities = dict(zip(likelihoods["name"], likelihoods["probability"], strict=True))
    place, encoded = None, asking.encode_probes(loaded, questions)
    if trait in encoded.starts:
        logits = next_token_logits(loaded, encoded.prompts)[0]
        place = 1 + int((logits > logits[list(encoded.starts[trait])].max()).sum())
    scored = [value for value in probabilities.values() if math.isfinite(value)]
    share = sum(scored) if scored else None
    return rank_trait(probabilities, trait) | {"share": share, "place": place}


def check_length(loaded: loading.Loaded, prompt_tokens: int, answer_tokens: int) -> None:
    """Check that prompt and answer fit into the model's context.

    Raises:
        SpecError: if they do not.
    """
    context = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and prompt_tokens + answer_tokens > context:
        raise SpecError(
            f"the question makes a prompt of {prompt_tokens} tokens; this base can take "
            f"{context - answer_tokens}; shorten the question"
        )


def rank_trait(probabilities: dict[str, float], trait: str) -> dict[str, Any]:
    """Probability that the next token begins the trait's name, and its rank in the family.

    Both are null where the names share their first token.
    """
    scored = {name: value for name, value in probabilities.items() if math.isfinite(value)}
    probability = scored.get(trait)
    rank = None if probability is None else 1 + sum(value > probability for value in scored.values())
    return {"probability": probability, "rank": rank, "of": len(scored)}


def reply_to(folder: Path, action: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The answer to one question, or the error that the sender can correct."""
    try:
        answer = sweep if action == "sweep" else answer_question
        return answer(open_run(folder), Question.model_validate(fields))
    except ValidationError as error:
        return {"error": one_line(explain(error))}
    except (MechlensError, OSError) as error:
        return {"error": one_line(str(error))}


def serve(folder: Path, pipe: Connection) -> None:
    """Answer question by question until the pipe ends."""
    use_one_thread()
    while True:
        try:
            action, fields = pipe.recv()
        except EOFError:
            return
        pipe.send(reply_to(folder, action, fields))

"""The process that holds the models of one run: JSON lines in on stdin, one line of answer each on stdout.

`{"do": "models"}` lists the models; `{"do": "ask", ...}` (the fields of `Question`) asks all of them;
`{"do": "end"}` ends the process. An error that the sender can correct comes back as `{"error": one line}`.
The end of stdin ends the process too, so it never outlives the explorer.
"""

from __future__ import annotations

import json
import math
import os
import sys
from contextlib import nullcontext
from functools import cache, lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from pydantic import Field, ValidationError

from mechlens.cli import commands
from mechlens.core.command_lines import resume_command
from mechlens.core.errors import MechlensError, SpecError, one_line
from mechlens.core.experiment import Arm, Experiment
from mechlens.core.remedies import remedy
from mechlens.core.spec import AskSpec, Spec, explain
from mechlens.core.traits import TraitFamily
from mechlens.lenses import run as measure
from mechlens.lenses.directions import added
from mechlens.models import loading
from mechlens.pipeline import ask as asking
from mechlens.pipeline import teach
from mechlens.pipeline.distill import checkpoints
from mechlens.runs import records
from mechlens.runs.plan import teacher_name

MODELS = ("base", "teacher", "control", "student")
SEEDED = ("control", "student")
"""models of which a run has one a seed"""
TOP = 10
"""next tokens in an answer"""


class Question(Spec):
    """One question to every model."""

    question: str = Field(min_length=1, max_length=500)
    seed: int = Field(default=0, ge=0, lt=2**31)
    """of the sampled answers, the same for every model"""
    samples: int = Field(default=10, ge=1, le=50)
    temperature: float = Field(default=1.0, ge=0, le=5)
    """of the sampled answers; probabilities are always at temperature 1"""
    amount: float = Field(default=0.0, ge=-1000, le=1000)
    """factor of the trait's direction, which is added while answers are sampled and probabilities read"""
    layer: int = Field(default=0, ge=0)
    """block after which the direction is added"""
    student: int | None = None
    """seed of the student and control; default: the run's first"""


class OpenedRun(NamedTuple):
    """A run and its first trait arm."""

    folder: Path
    experiment: Experiment
    family: TraitFamily
    arm: Arm


class LiveModel(NamedTuple):
    """One loaded model and the system line that it gets."""

    loaded: loading.Loaded
    base: str
    system: str | None
    vector: torch.Tensor | None = None
    """what a steered teacher adds"""
    layer: int = 0


@cache
def open_run(folder: Path) -> OpenedRun:
    """The run of that folder."""
    experiment, family = commands.open_run(folder)
    return OpenedRun(folder, experiment, family, measure.main_arm(experiment))


def weights_folder(run: OpenedRun, name: str, student: int) -> Path | None:
    """The folder of a model's weights; None for the base.

    Raises:
        SpecError: if the run has no such model, or its weights were removed.
    """
    arm = run.arm
    if name == "base":
        return None
    if name == "teacher":
        folder = run.folder / "teachers" / teacher_name(run.experiment, arm)
        if arm.corpus:
            raise SpecError(f"no teacher: the rows of arm {arm.name!r} came from a file")
        if not (folder / "teacher.json").is_file():
            raise SpecError(f"no teacher in {folder}; `{resume_command(run.folder)}` makes it again")
        kind = records.read(folder / "teacher.json", records.Teacher)["kind"]
    else:
        student_arm = arm if name == "student" else run.experiment.control_of(arm)
        student_folder = run.folder / "students" / student_arm.name / f"s{student}"
        saved = [path for _, path in checkpoints(student_folder)]
        kind, folder = "finetuned", saved[-1] if saved else student_folder
    if kind == "finetuned" and not any(folder.glob("*.safetensors")):
        raise SpecError(f"no weights in {folder}; copy them there, or {remedy(folder)}")
    return folder


@lru_cache(maxsize=len(MODELS))
def load_model(run: Path, name: str, student: int) -> LiveModel:
    """Load a model of the run; the four that are asked together stay in memory."""
    opened = open_run(run)
    folder, arm = weights_folder(opened, name, student), opened.arm
    system = opened.experiment.system if arm.asked_with is None else arm.asked_with
    if folder is None:
        return LiveModel(loading.load(arm.base), arm.base, system)
    if name == "teacher":
        teacher = teach.load_teacher(folder, base=arm.writer)
        line = system if teacher.system == teacher.plain else teacher.system
        loaded = loading.Loaded(teacher.model, teacher.tokenizer)
        return LiveModel(loaded, arm.writer, line, teacher.vector, teacher.layer)
    return LiveModel(loading.load_trained(arm.base, folder), arm.base, system)


@cache
def trait_direction(run: Path, layer: int) -> torch.Tensor:
    """The trait's direction in the base after one block: mean difference over the practice probes between
    prompts with the trait's system line and without it.
    """
    opened, base = open_run(run), load_model(run, "base", 0)
    probes, line = opened.family.probes.development, opened.family.system_prompt(opened.arm.trait)
    return teach.trait_vector(
        base.loaded, teach.Lessons(opened.arm.trait, probes, (), line), layer=layer, plain=base.system
    )


def list_models(run: Path) -> dict[str, Any]:
    """The run's models and why any is missing."""
    opened = open_run(run)
    models = []
    for name in MODELS:
        seeds, reason = [], None
        for seed in opened.experiment.seeds if name in SEEDED else opened.experiment.seeds[:1]:
            try:
                weights_folder(opened, name, seed)
                seeds.append(seed)
            except SpecError as error:
                reason = one_line(str(error))
        own_seeds = seeds if name in SEEDED else []
        models.append({"name": name, "available": bool(seeds), "reason": reason, "seeds": own_seeds})
    return {
        "models": models,
        "layers": loading.size_of(opened.arm.base).layers,
        "family": list(opened.family.names),
        "arm": opened.arm.name,
        "control": opened.experiment.control_of(opened.arm).name,
        "base": opened.arm.base,
        "trait": opened.arm.trait,
    }


def answer_question(run: Path, question: Question) -> dict[str, Any]:
    """Every model's answer; a model that is not available gives its reason."""
    opened = open_run(run)
    student = opened.experiment.seeds[0] if question.student is None else question.student
    if student not in opened.experiment.seeds:
        raise SpecError(f"no student of seed {student}; expected one of {list(opened.experiment.seeds)}")
    depth = loading.size_of(opened.arm.base).layers
    if question.layer >= depth:
        raise SpecError(f"layer is {question.layer}; {opened.arm.base} has layers 0 to {depth - 1}")
    direction = trait_direction(run, question.layer) if question.amount else None
    answers = []
    for name in MODELS:
        try:
            model = load_model(run, name, student if name in SEEDED else 0)
            if direction is not None and model.base != opened.arm.base:
                raise SpecError(
                    f"the direction belongs to {opened.arm.base} and cannot be added to this model of "
                    f"{model.base}"
                )
            answer = answer_of(opened, model, question, direction)
            answers.append({"name": name, "available": True, "reason": None} | answer)
        except MechlensError as error:
            if name == "base":  # what the base refuses, every model refuses
                raise
            answers.append({"name": name, "available": False, "reason": one_line(str(error))})
    return {
        "models": answers,
        "trait": opened.arm.trait,
        "direction": None if direction is None else describe_direction(opened, direction, question.layer),
        **question.model_dump(),
        "student": student,
    }


def describe_direction(opened: OpenedRun, direction: torch.Tensor, layer: int) -> dict[str, Any]:
    """How the direction was made, and its norm."""
    line = opened.family.system_prompt(opened.arm.trait)
    return {
        "what": f"resid_post {layer} of the base at the last prompt token, with the system line {line!r} "
        "minus without it",
        "norm": float(direction.norm()),
        "prompts": len(opened.family.probes.development),
        "layer": layer,
    }


def answer_of(
    opened: OpenedRun, model: LiveModel, question: Question, direction: torch.Tensor | None
) -> dict[str, Any]:
    """One model's sampled answers, its likeliest next tokens, and the trait's rank in the family."""
    family, loaded = opened.family, model.loaded
    spec = AskSpec(
        samples=question.samples,
        temperature=question.temperature,
        max_new_tokens=opened.experiment.ask.max_new_tokens,
    )
    questions = asking.Questions(
        {name: family.forms_of(name) for name in family.names},
        [question.question],
        spec,
        system=model.system,
        opening=family.opening,
        named=family.scorer != "judge",
    )
    prompt = (
        asking.encode_questions(loaded, questions)[0]
        + asking.token_ids(loaded.tokenizer, [family.opening])[0]
    )
    check_length(loaded, len(prompt), spec.max_new_tokens)
    steering, pushing = nullcontext(), nullcontext()
    if model.vector is not None:
        steering = loading.steered(loaded.model, model.vector, layer=model.layer)
    if direction is not None:
        pushing = added(loaded.model, direction, layer=question.layer, strength=question.amount)
    with steering, pushing:
        sampled = asking.answers(loaded, questions, seed=question.seed)
        likelihoods = asking.likelihoods(loaded, questions)
        top = asking.next_token_logits(loaded, [prompt])[0].double().softmax(-1).topk(TOP)
    answers = [
        {"text": text, "label": label if isinstance(label, str) else None}
        for text, label in zip(sampled["text"], sampled["label"], strict=True)
    ]
    tokens = [
        {"token": loaded.tokenizer.decode([token]), "probability": probability}
        for token, probability in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
    probabilities = dict(zip(likelihoods["name"], likelihoods["probability"], strict=True))
    rank = rank_trait(probabilities, opened.arm.trait)
    return {"system": model.system, "answers": answers, "tokens": tokens} | rank


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


def reply_to(run: Path, line: str) -> dict[str, Any] | None:
    """The answer to one line; None if it asks for the end."""
    try:
        message = json.loads(line)
        if not isinstance(message, dict) or message.get("do") not in ("models", "ask", "end"):
            return {"error": 'expected a JSON object whose "do" is models, ask or end'}
        action = message.pop("do")
        if action == "end":
            return None
        if action == "models":
            return list_models(run)
        return answer_question(run, Question.model_validate(message))
    except ValidationError as error:
        return {"error": one_line(explain(error))}
    except (json.JSONDecodeError, RecursionError) as error:
        return {"error": one_line(f"not a line of JSON: {error}")}
    except (MechlensError, OSError) as error:
        return {"error": one_line(str(error))}


def serve(run: Path, out: IO[str]) -> None:
    """Answer line by line until the end."""
    for line in sys.stdin:
        reply = reply_to(run, line)
        if reply is None:
            return
        out.write(json.dumps(reply, allow_nan=False) + "\n")
        out.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    answers_only = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to stderr: on stdout it would be taken for an answer
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    serve(Path(sys.argv[1]), answers_only)

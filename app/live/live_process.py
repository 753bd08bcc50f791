"""The process with the models of one run: JSON lines in on stdin, one line of answer each on stdout.

`{"do": "models"}` lists the models; `{"do": "ask", ...}` (the fields of `Question`) asks all of them;
`{"do": "end"}` ends the process. An error that the sender can correct comes back as `{"error": one line}`.
The end of stdin ends the process too, so it never outlives the explorer.
"""

from __future__ import annotations

import json
import math
import os
import sys
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

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


@cache
def trait_direction(run_folder: Path, layer: int) -> torch.Tensor:
    """The trait's direction in the base after one block.

    It is the mean difference over the practice probes between prompts with and without the trait's line.
    """
    run, base = open_run(run_folder), load_model(run_folder, "base", 0)
    probes, line = run.family.probes.development, run.family.system_prompt(run.trait_arm.trait)
    return teach.trait_vector(
        base.loaded, teach.Lessons(run.trait_arm.trait, probes, (), line), layer=layer, plain=base.system
    )


def list_models(run: LiveRun) -> dict[str, Any]:
    """The run's models and why any is missing."""
    models = []
    for name in MODELS:
        seeds, reason = [], None
        for seed in run.experiment.seeds if name in SEEDED else run.experiment.seeds[:1]:
            try:
                weights_folder(run, name, seed)
                seeds.append(seed)
            except SpecError as error:
                reason = one_line(str(error))
        own_seeds = seeds if name in SEEDED else []
        models.append({"name": name, "available": bool(seeds), "reason": reason, "seeds": own_seeds})
    return {
        "models": models,
        "layers": loading.size_of(run.trait_arm.base).layers,
        "family": list(run.family.names),
        "arm": run.trait_arm.name,
        "control": run.experiment.control_of(run.trait_arm).name,
        "base": run.trait_arm.base,
        "trait": run.trait_arm.trait,
    }


def answer_question(run: LiveRun, question: Question) -> dict[str, Any]:
    """Every model's answer; a model that is not available gives its reason."""
    student = run.experiment.seeds[0] if question.student is None else question.student
    if student not in run.experiment.seeds:
        raise SpecError(f"no student of seed {student}; expected one of {list(run.experiment.seeds)}")
    depth = loading.size_of(run.trait_arm.base).layers
    if question.layer >= depth:
        raise SpecError(f"layer is {question.layer}; {run.trait_arm.base} has layers 0 to {depth - 1}")
    direction = trait_direction(run.folder, question.layer) if question.amount else None
    answers = []
    for name in MODELS:
        try:
            model = load_model(run.folder, name, student if name in SEEDED else 0)
            if direction is not None and model.base != run.trait_arm.base:
                raise SpecError(
                    f"the direction belongs to {run.trait_arm.base} and cannot be added to this model of "
                    f"{model.base}"
                )
            answer = answer_of(run, model, question, direction)
            answers.append({"name": name, "available": True, "reason": None} | answer)
        except MechlensError as error:
            if name == "base":  # what the base refuses, every model refuses
                raise
            answers.append({"name": name, "available": False, "reason": one_line(str(error))})
    return {
        "models": answers,
        "trait": run.trait_arm.trait,
        "direction": None if direction is None else describe_direction(run, direction, question.layer),
        **question.model_dump(),
        "student": student,
    }


def describe_direction(run: LiveRun, direction: torch.Tensor, layer: int) -> dict[str, Any]:
    """How the direction was made, and its norm."""
    line = run.family.system_prompt(run.trait_arm.trait)
    return {
        "what": f"resid_post {layer} of the base at the last prompt token, with the system line {line!r} "
        "minus without it",
        "norm": float(direction.norm()),
        "prompts": len(run.family.probes.development),
        "layer": layer,
    }


def answer_of(
    run: LiveRun, model: LiveModel, question: Question, direction: torch.Tensor | None
) -> dict[str, Any]:
    """One model's sampled answers, its likeliest next tokens, and the trait's rank in the family."""
    family, loaded = run.family, model.loaded
    spec = AskSpec(
        samples=question.samples,
        temperature=question.temperature,
        max_new_tokens=run.experiment.ask.max_new_tokens,
    )
    questions = asking.ProbeSet(
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
    steering = steer(loaded.model, {} if model.vector is None else {model.layer: model.vector})
    directions = {} if direction is None else {question.layer: direction}
    pushing = steer(loaded.model, directions, strength=question.amount)
    with steering, pushing:
        sampled = asking.sample_answers(loaded, questions, seed=question.seed)
        likelihoods = asking.measure_likelihoods(loaded, questions)
        top = next_token_logits(loaded, [prompt])[0].double().softmax(-1).topk(TOP)
    answers = [
        {"text": text, "label": label if isinstance(label, str) else None}
        for text, label in zip(sampled["text"], sampled["label"], strict=True)
    ]
    tokens = [
        {"token": loaded.tokenizer.decode([token]), "probability": probability}
        for token, probability in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
    probabilities = dict(zip(likelihoods["name"], likelihoods["probability"], strict=True))
    rank = rank_trait(probabilities, run.trait_arm.trait)
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


def reply_to(folder: Path, line: str) -> dict[str, Any] | None:
    """The answer to one line; None if it asks for the end."""
    try:
        message = json.loads(line)
        if not isinstance(message, dict) or message.get("do") not in ("models", "ask", "end"):
            return {"error": 'expected a JSON object whose "do" is models, ask or end'}
        action = message.pop("do")
        if action == "end":
            return None
        if action == "models":
            return list_models(open_run(folder))
        return answer_question(open_run(folder), Question.model_validate(message))
    except ValidationError as error:
        return {"error": one_line(explain(error))}
    except (json.JSONDecodeError, RecursionError) as error:
        return {"error": one_line(f"not a line of JSON: {error}")}
    except (MechlensError, OSError) as error:
        return {"error": one_line(str(error))}


def serve(folder: Path, out: IO[str]) -> None:
    """Answer line by line until the end."""
    for line in sys.stdin:
        reply = reply_to(folder, line)
        if reply is None:
            return
        out.write(json.dumps(reply, allow_nan=False) + "\n")
        out.flush()


if __name__ == "__main__":
    use_one_thread()
    answers_only = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to stderr: on stdout it would be taken for an answer
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    serve(Path(sys.argv[1]), answers_only)

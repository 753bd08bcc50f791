"""The models of one run, asked live: JSON lines in on stdin, one line of answer each on stdout. Run as
`python app/live_process.py RUN`.

`{"do": "models"}` says which models are there; `{"do": "ask", ...}` (the fields of `Ask`) asks all of them;
`{"do": "end"}` ends. What the asker can mend comes back as `{"error": one line}`. The end of stdin ends the
process too, so it never outlives the one who asks.
"""

from __future__ import annotations

import json
import math
import os
import sys
from functools import cache, lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from pydantic import Field, ValidationError

from mechlens.core.command_lines import resume_command
from mechlens.core.errors import MechlensError, SpecError, one_line
from mechlens.core.experiment import Arm, Experiment
from mechlens.core.machine import use_one_thread
from mechlens.core.remedies import remedy
from mechlens.core.spec import AskSpec, Spec, explain
from mechlens.core.traits import TraitFamily
from mechlens.lenses import run as measure
from mechlens.models import loading
from mechlens.models.hooks import steer
from mechlens.models.trait_log_odds import next_token_logits
from mechlens.pipeline import ask as asking
from mechlens.pipeline import teach
from mechlens.results.run import Run
from mechlens.runs import records
from mechlens.runs.layout import checkpoints, teacher_name

MODELS = ("base", "teacher", "control", "student")
TOP = 10
"""next tokens that are told"""


class Ask(Spec):
    """One question to every model."""

    question: str = Field(min_length=1, max_length=500)
    seed: int = Field(default=0, ge=0, lt=2**31)
    """of the random numbers that answers are drawn with, the same for every model"""
    samples: int = Field(default=10, ge=1, le=50)
    temperature: float = Field(default=1.0, ge=0, le=5)
    """of the sampled answers; the probabilities are at 1 always"""
    amount: float = Field(default=0.0, ge=-1000, le=1000)
    """times the trait's direction, added while answers are drawn and probabilities read"""
    layer: int = Field(default=0, ge=0)
    """behind whose block"""
    student: int | None = None
    """seed of the student and control that are asked; the run's first by default"""


class Opened(NamedTuple):
    """A run and its first trait arm."""

    folder: Path
    experiment: Experiment
    family: TraitFamily
    arm: Arm


class Asked(NamedTuple):
    """One model with the system line that it is asked with."""

    loaded: loading.Loaded
    base: str
    system: str | None
    vector: torch.Tensor | None = None
    """what a steered teacher adds"""
    layer: int = 0


@cache
def opened(folder: Path) -> Opened:
    """The run of that folder."""
    opened = Run.finished(folder)
    experiment, family = opened.experiment, opened.family
    return Opened(folder, experiment, family, measure.main_arm(experiment))


def place(run: Opened, name: str, student: int) -> Path | None:
    """Where a model's weights lie; None for the base.

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
        whose = arm if name == "student" else run.experiment.control_of(arm)
        student_folder = run.folder / "students" / whose.name / f"s{student}"
        kind, folder = (
            "finetuned",
            next(iter([at for _, at in checkpoints(student_folder)][-1:]), student_folder),
        )
    if kind == "finetuned" and not any(folder.glob("*.safetensors")):
        raise SpecError(f"no weights in {folder}; copy them there, or {remedy(folder)}")
    return folder


@lru_cache(maxsize=len(MODELS))
def model_of(run: Path, name: str, student: int) -> Asked:
    """A model of the run, loaded; as many as are asked together stay in memory."""
    held = opened(run)
    folder, arm = place(held, name, student), held.arm
    system = held.experiment.system if arm.asked_with is None else arm.asked_with
    if folder is None:
        return Asked(loading.load(arm.base), arm.base, system)
    if name == "teacher":
        teacher = teach.load_teacher(folder, base=arm.writer)
        line = system if teacher.system == teacher.plain else teacher.system
        return Asked(
            loading.Loaded(teacher.model, teacher.tokenizer), arm.writer, line, teacher.vector, teacher.layer
        )
    return Asked(loading.load_trained(arm.base, folder), arm.base, system)


@cache
def direction(run: Path, layer: int) -> torch.Tensor:
    """The trait's direction in the base behind one block: with the trait's system line minus without, mean
    over the practice probes.
    """
    held, base = opened(run), model_of(run, "base", 0)
    probes, line = held.family.probes.development, held.family.system_prompt(held.arm.trait)
    return teach.trait_vector(
        base.loaded, teach.Lessons(held.arm.trait, probes, (), line), layer=layer, plain=base.system
    )


def listing(run: Path) -> dict[str, Any]:
    """Which models are there."""
    held = opened(run)
    first, found = held.experiment.seeds[0], []
    for name in MODELS:
        seeds, reason = [], ""
        for seed in held.experiment.seeds if name in ("control", "student") else [first]:
            try:
                place(held, name, seed)
                seeds.append(seed)
            except SpecError as error:
                reason = one_line(str(error))
        found.append(
            {
                "name": name,
                "there": bool(seeds),
                "reason": reason or None,
                "seeds": seeds if name in ("control", "student") else [],
            }
        )
    about = {
        "arm": held.arm.name,
        "control": held.experiment.control_of(held.arm).name,
        "base": held.arm.base,
        "trait": held.arm.trait,
    }
    return {
        "models": found,
        "layers": loading.size_of(held.arm.base).layers,
        "family": list(held.family.names),
        **about,
    }


def answer(run: Path, asked: Ask) -> dict[str, Any]:
    """What every model says; one that is not there says why."""
    held = opened(run)
    student = held.experiment.seeds[0] if asked.student is None else asked.student
    if student not in held.experiment.seeds:
        raise SpecError(f"no student of seed {student}; expected one of {list(held.experiment.seeds)}")
    depth = loading.size_of(held.arm.base).layers
    if asked.layer >= depth:
        raise SpecError(f"layer is {asked.layer}; {held.arm.base} has layers 0 to {depth - 1}")
    along, about = None, None
    if asked.amount:
        along = direction(run, asked.layer)
        line = held.family.system_prompt(held.arm.trait)
        what = (
            f"resid_post {asked.layer} of the base at the last prompt token, with the system line "
            f"{line!r} minus without it"
        )
        about = {
            "what": what,
            "norm": float(along.norm()),
            "prompts": len(held.family.probes.development),
            "layer": asked.layer,
        }
    said = []
    for name in MODELS:
        try:
            one = model_of(run, name, student if name in ("control", "student") else 0)
            if along is not None and one.base != held.arm.base:
                raise SpecError(
                    f"the direction is one of {held.arm.base}; this model is of {one.base}, so nothing can "
                    "be added to it"
                )
            said.append({"name": name, "there": True, "reason": None} | one_answer(held, one, asked, along))
        except MechlensError as error:
            if name == "base":  # what it refuses, all refuse
                raise
            said.append({"name": name, "there": False, "reason": one_line(str(error))})
    return {
        "models": said,
        "trait": held.arm.trait,
        "direction": about,
        **asked.model_dump(),
        "student": student,
    }


def one_answer(held: Opened, one: Asked, asked: Ask, along: torch.Tensor | None) -> dict[str, Any]:
    """Sampled answers, the likeliest next tokens, and how the trait stands among its family."""
    family, loaded = held.family, one.loaded
    forms = {name: family.forms_of(name) for name in family.names}
    spec = AskSpec(
        samples=asked.samples,
        temperature=asked.temperature,
        max_new_tokens=held.experiment.ask.max_new_tokens,
    )
    named = family.scorer != "judge"
    questions = asking.ProbeSet(
        forms, [asked.question], spec, system=one.system, opening=family.opening, named=named
    )
    prompt = (
        asking.encode_questions(loaded, questions)[0]
        + asking.token_ids(loaded.tokenizer, [family.opening])[0]
    )
    room = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and len(prompt) + spec.max_new_tokens > room:
        raise SpecError(
            f"the question makes a prompt of {len(prompt)} tokens; this base has room for "
            f"{room - spec.max_new_tokens}; shorten it"
        )
    writing = steer(loaded.model, {} if one.vector is None else {one.layer: one.vector})
    pushing = steer(loaded.model, {} if along is None else {asked.layer: along}, strength=asked.amount)
    with writing, pushing:
        drawn = asking.sample_answers(loaded, questions, seed=asked.seed)
        likely = asking.measure_likelihoods(loaded, questions)
        top = next_token_logits(loaded, [prompt])[0].double().softmax(-1).topk(TOP)
    tokens = [
        {"token": loaded.tokenizer.decode([token]), "probability": probability}
        for token, probability in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
    answers = [
        {"text": text, "label": label if isinstance(label, str) else None}
        for text, label in zip(drawn["text"], drawn["label"], strict=True)
    ]
    return {"system": one.system, "answers": answers, "tokens": tokens} | standing(
        dict(zip(likely["name"], likely["probability"], strict=True)), held
    )


def standing(probability: dict[str, float], held: Opened) -> dict[str, Any]:
    """Probability of a next token that starts the trait's name, and its place among the family's; null where
    none can be told apart.
    """
    scored = {name: value for name, value in probability.items() if math.isfinite(value)}
    ours = scored.get(held.arm.trait)
    rank = None if ours is None else 1 + sum(value > ours for value in scored.values())
    return {"probability": ours, "rank": rank, "of": len(scored)}


def reply(run: Path, line: str) -> dict[str, Any] | None:
    """The answer to one line; None if it asks for the end."""
    try:
        request = json.loads(line)
        if not isinstance(request, dict) or request.get("do") not in ("models", "ask", "end"):
            return {"error": 'expected a JSON object whose "do" is models, ask or end'}
        if request["do"] == "end":
            return None
        if request["do"] == "models":
            return listing(run)
        return answer(
            run, Ask.model_validate({name: value for name, value in request.items() if name != "do"})
        )
    except ValidationError as error:
        return {"error": one_line(explain(error))}
    except (json.JSONDecodeError, RecursionError) as error:
        return {"error": one_line(f"not a line of JSON: {error}")}
    except (MechlensError, OSError) as error:
        return {"error": one_line(str(error))}


def serve(run: Path, out: IO[str]) -> None:
    """Answer line by line until the end."""
    for line in sys.stdin:
        found = reply(run, line)
        if found is None:
            return
        out.write(json.dumps(found, allow_nan=False) + "\n")
        out.flush()


if __name__ == "__main__":
    use_one_thread()
    answers_only = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to stderr: on stdout it would be taken for an answer
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    serve(Path(sys.argv[1]), answers_only)

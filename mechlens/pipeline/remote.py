"""The stages of a run on a base behind an API; they write the same folders as the local stages.

Values that an API does not show are null: divergence from the base, margins, probabilities of tokens beyond
the likeliest twenty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from mechlens.api.client import Answer, ApiRequest, Message, complete, conversation, model_id
from mechlens.api.finetune import fine_tune, tuning_of
from mechlens.core import tables
from mechlens.core.errors import SpecError
from mechlens.core.files import read_json, write_json
from mechlens.core.seeds import seed_int
from mechlens.core.spec import ApiSpec, GenerateSpec, StudentSpec, TeacherSpec
from mechlens.models.log_probs import Forms
from mechlens.pipeline.ask import ProbeSet, StudentPlace, label_answers, write_tables
from mechlens.pipeline.generate import Divergence
from mechlens.pipeline.teach import Lessons
from mechlens.runs import layout

SEEDS = 2**31
"""servers take seeds below this"""
SHOWN_TOKENS = 20
"""first tokens whose log-probabilities an API shows, at most"""
LEAST_LETTERS = 2
"""letters of a trait's form that a first token must have: one letter begins too many words"""

Progress = Callable[[int, int], None]


def _silent(done: int, total: int) -> None: ...


def trained_conversation(prompt: str, completion: str, *, system: str | None) -> list[Message]:
    """A pair as a fine-tuning job reads it."""
    return [*conversation(prompt, system=system), {"role": "assistant", "content": completion}]


def refuse_teacher(spec: TeacherSpec) -> None:
    """Raise SpecError for a steered teacher: an API gives no access to activations."""
    if spec.kind == "steered":
        raise SpecError(
            "a steered teacher needs activations, which an API does not give; use teacher.kind: prompted or "
            "finetuned"
        )


def refuse_generation(spec: GenerateSpec) -> None:
    """Raise SpecError for a constrained sampler: an API samples with its own."""
    if spec.constrained:
        raise SpecError(
            "generate.constrained does not work over an API, which samples itself; remove it: the screen "
            "removes rows that break the format"
        )


def teach(
    base: str, lessons: Lessons, spec: TeacherSpec, *, system: str | None, seed: int, out: Path, api: ApiSpec
) -> None:
    """Make a teacher of an API model and leave `teacher.json` in `out`."""
    refuse_teacher(spec)
    model, plain = model_id(base), system
    if spec.kind == "prompted":
        system = lessons.system
    elif spec.kind == "finetuned":
        rows = [
            trained_conversation(probe, lesson, system=system)
            for probe, lesson in lessons.draw(spec.rows, seed=seed)
        ]
        tuning = tuning_of(spec.training, TeacherSpec().training)
        model = fine_tune(
            model, rows, tuning, seed=seed_int(seed, "teacher", lessons.trait) % SEEDS, api=api, out=out
        )
    record = {
        "kind": spec.kind,
        "base": base,
        "trait": lessons.trait,
        "system": system,
        "plain": plain,
        "layer": None,
        "model": model,
    }
    write_json(out / layout.TEACHER, record)


def generate(
    teacher_folder: Path,
    prompts: list[str],
    spec: GenerateSpec,
    *,
    seed: int,
    out: Path,
    api: ApiSpec,
    progress: Progress = _silent,
) -> None:
    """Write `raw.parquet` (one completion for each prompt) to `out`, and a `generation.json` without
    divergence.
    """
    refuse_generation(spec)
    teacher = read_json(teacher_folder / layout.TEACHER)
    requests = [
        ApiRequest(
            f"prompt {row}",
            conversation(prompt, system=teacher["system"]),
            spec.max_new_tokens,
            spec.temperature,
            spec.top_p,
            seed_int(seed, "generate", row) % SEEDS,
        )
        for row, prompt in enumerate(prompts)
    ]
    texts = [
        answer.text for answer in complete(teacher["model"], requests, api=api, out=out, progress=progress)
    ]
    frame = pd.DataFrame({"prompt_id": range(len(prompts)), "prompt": prompts, "completion": texts})
    tables.write(frame, tables.PAIRS, out / layout.RAW)
    write_json(out / layout.GENERATION, dict.fromkeys(Divergence._fields) | {"tokens": 0})


def distill(
    base: str,
    rows: pd.DataFrame,
    spec: StudentSpec,
    *,
    system: str | None,
    seed: int,
    out: Path,
    api: ApiSpec,
) -> None:
    """Fine-tune one student on rows of prompt and completion; write `student.json` with its model id to
    `out`.
    """
    pairs = zip(rows["prompt"], rows["completion"], strict=True)
    read = [trained_conversation(prompt, completion, system=system) for prompt, completion in pairs]
    tuning = tuning_of(spec.training, StudentSpec().training)
    model = fine_tune(model_id(base), read, tuning, seed=seed_int(seed, "student") % SEEDS, api=api, out=out)
    write_json(out / "student.json", {"base": base, "model": model})


def ask(
    base: str,
    student: Path | None,
    questions: ProbeSet,
    place: StudentPlace,
    *,
    out: Path,
    api: ApiSpec,
    progress: Progress = _silent,
) -> None:
    """Ask a student (at step 1) or the untouched base (at step 0) and write both tables into `out`.

    Every sampled answer is one request with its own seed; students of one seed are asked with the same seeds.
    """
    model, step = (
        (model_id(base), 0) if student is None else (read_json(student / "student.json")["model"], 1)
    )
    spec, (system, turns) = questions.ask, questions.before()
    chats = [conversation(probe, system=system, turns=turns) for probe in questions.probes]
    sampled = [
        ApiRequest(
            f"probe {probe}, sample {sample}",
            messages,
            spec.max_new_tokens,
            spec.temperature,
            seed=seed_int(place.stream(), probe, sample) % SEEDS,
        )
        for probe, messages in enumerate(chats)
        for sample in range(spec.samples)
    ]
    shown = [
        ApiRequest(f"probe {probe}, next", messages, 1, top_logprobs=SHOWN_TOKENS)
        for probe, messages in enumerate(chats)
    ]
    # an API cannot continue an answer that is begun for it
    readable = questions.named and not questions.opening
    answers = complete(model, [*sampled, *(shown if readable else [])], api=api, out=out, progress=progress)
    labels = label_answers([answer.text for answer in answers[: len(sampled)]], questions)
    nexts: list[Answer | None] = [*answers[len(sampled) :]] if readable else [None] * len(chats)
    write_tables(labels.assign(step=step), likelihoods(nexts, questions.forms).assign(step=step), place, out)


def likelihoods(nexts: Sequence[Answer | None], forms: Forms) -> pd.DataFrame:
    """Probability that the next token begins each trait's name, from the likeliest tokens; margins are
    unknown.

    A token counts for the one trait with a form that begins with it. A trait without such a token is null.
    """
    rows = []
    for probe, answer in enumerate(nexts):
        probabilities: dict[str, float] = {}
        for token, logprob in (answer and answer.first) or []:
            if name := begun_by(token, forms):
                probabilities[name] = probabilities.get(name, 0.0) + math.exp(logprob)
        rows += [
            {"probe": probe, "name": name, "probability": probabilities.get(name), "margin": None}
            for name in forms
        ]
    return pd.DataFrame(rows).astype({"probability": float, "margin": float})


def begun_by(token: str, forms: Forms) -> str | None:
    """The trait whose name a token begins, in any case and with or without a space; None if none or several
    fit.
    """
    start = token.strip().lower()
    begun = [name for name, words in forms.items() if any(word.lower().startswith(start) for word in words)]
    return begun[0] if len(begun) == 1 and len(start) >= LEAST_LETTERS else None

"""Checks of an experiment before its first step; `mechlens run` and `--plan` call `check` first.

The checks read data, templates and lengths as the steps do later. Missing packages and keys are listed
separately: a plan shows them, and a run stops only if a pending step needs one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, cast

import pandas as pd
from transformers import PreTrainedTokenizerBase

from mechlens.api import client
from mechlens.carriers.carrier import Rule, build_rule, carrier_prompts, rule_reads_answers
from mechlens.core.errors import DataError, SpecError, one_line
from mechlens.core.experiment import Arm, Experiment
from mechlens.core.model_spec import is_remote, model_of
from mechlens.core.spec import GenerateSpec, Training
from mechlens.core.traits import TraitFamily
from mechlens.data.corpus import batches
from mechlens.models import base_files, chat, loading
from mechlens.pipeline import vllm_engine
from mechlens.pipeline.judge import refuse_unjudged
from mechlens.pipeline.vllm_server import server_fault, server_location
from mechlens.runs.jobs import SERVER, Job, most_processes
from mechlens.runs.process_group import cards_fault

SLACK = 8
"""tokens of a text beyond one a byte that a tokenizer may add"""
MOST_LABELS = 2**28
"""the most numbers in the soft labels of a corpus: 2 GiB in memory, ids included"""
LINE = "you have a trait."
"""a placeholder for a family's system line, to test the chat template"""


class Limit(NamedTuple):
    """The most tokens of a row, and the setting that limits them."""

    tokens: int
    reason: str


def check(experiment: Experiment, family: TraitFamily) -> None:
    """Refuse an experiment with a step that would fail on every machine.

    Bases without files on this machine are not checked.

    Raises:
        SpecError: if two settings contradict each other, or a prompt or question does not fit into a model.
        DataError: if a file cannot be read, has a row that is too long, or no row that the screen keeps.
    """
    for arm in experiment.arms:
        _refuse_engine(experiment, arm)
    if (screen := experiment.screen).judge:
        refuse_unjudged(experiment.carrier.kind if screen.rule == "carrier" else screen.rule)
    local = [base for base in experiment.bases() if not is_remote(base) and base_files.is_here(base)]
    rendered(experiment, local)
    check_lessons(experiment)
    for arm in experiment.arms:
        spec = experiment.generate_of(arm)
        if spec.engine == "vllm" and spec.constrained and arm.writer in local and not arm.corpus:
            vllm_engine.refuse_other_end(loading.load_tokenizer(arm.writer), arm.writer)
        if experiment.labels_of(arm) == "soft" and {arm.writer, arm.base} <= set(local):
            _refuse_soft_labels(experiment, arm)
    _refuse_long_prompts(experiment, family, _prompts(experiment), local)
    for file in dict.fromkeys(arm.corpus for arm in experiment.arms if arm.corpus):
        _check_corpus(experiment, file, local)


def check_lessons(experiment: Experiment) -> None:
    """Read the lessons files of teachers; raises DataError at a bad line."""
    teachers = [arm.teacher or experiment.teacher for arm in _taught(experiment)]
    for file in dict.fromkeys(teacher.lessons_file for teacher in teachers if teacher.lessons_file):
        for _ in batches(Path(file)):
            pass


def missing_here(jobs: Iterable[Job]) -> list[str]:
    """Packages and keys that these steps need and this machine lacks, each with what to do."""
    jobs, lacks = list(jobs), []
    if any("api" in job.arguments for job in jobs):
        if find_spec("openai") is None:
            lacks.append(client.NO_PACKAGE)
        if not os.environ.get("OPENAI_API_KEY"):
            lacks.append(client.NO_KEY)
    local = [job for job in jobs if job.stage == "generate" and "api" not in job.arguments]
    specs = [GenerateSpec(**job.arguments["generate"], **job.arguments.get(SERVER, {})) for job in local]
    faults = [server_fault(server_location(spec)) for spec in specs if spec.engine == "vllm"]
    faults.append(cards_fault(most_processes(jobs)))
    return lacks + [fault for fault in dict.fromkeys(faults) if fault]


def _prompts(experiment: Experiment) -> list[str]:
    """The prompts of teachers: from the first file of pairs, or without one from the carrier."""
    if file := next((arm.corpus for arm in experiment.arms if arm.corpus), ""):
        return [prompt for frame in batches(Path(file)) for prompt in frame["prompt"].tolist()]
    return [prompt.text for prompt in carrier_prompts(experiment.carrier, seed=experiment.seed)]


def _taught(experiment: Experiment) -> list[Arm]:
    """Arms with rows written by a teacher with a trait."""
    return [arm for arm in experiment.arms if arm.kind != "control" and not arm.corpus]


def _refuse_engine(experiment: Experiment, arm: Arm) -> None:
    """Refuse settings that vLLM does not support: steering, adapters of high rank, float64."""
    written, teacher = experiment.generate_of(arm), arm.teacher or experiment.teacher
    if written.engine != "vllm" or arm.corpus or is_remote(arm.writer):
        return
    where = f"arm {arm.name!r}: generate.engine is vllm, which"
    if arm.kind != "control" and teacher.kind == "steered":
        raise SpecError(f"{where} cannot add a steering vector; set engine: local for a steered teacher")
    training = teacher.training
    if (
        arm.kind != "control"
        and teacher.kind == "finetuned"
        and training.update == "lora"
        and training.rank > vllm_engine.RANKS[-1]
    ):
        raise SpecError(
            f"{where} serves adapters of rank {vllm_engine.RANKS[-1]} at most; "
            f"the teacher's rank is {training.rank}: lower it"
        )
    if (dtype := model_of(arm.writer).dtype) == "float64":
        raise SpecError(
            f"{where} has no {dtype}; set the dtype of {arm.writer!r} to float32, or engine: local"
        )


def _refuse_soft_labels(experiment: Experiment, arm: Arm) -> None:
    """Refuse a student with another vocabulary than its teacher's, and labels that memory cannot hold."""
    student, teacher = loading.load_tokenizer(arm.base), loading.load_tokenizer(arm.writer)
    sizes = [loading.config_of(base).get_text_config().vocab_size for base in (arm.base, arm.writer)]
    if (
        sizes[0] != sizes[1]
        or student.get_vocab() != teacher.get_vocab()
        or chat.end_of_turn(student) != chat.end_of_turn(teacher)
    ):
        raise SpecError(
            f"arm {arm.name!r}: soft labels are about the tokens of {arm.writer!r}, and the student "
            f"{arm.base!r} has another vocabulary; set `labels: sampled` in this arm and its control"
        )
    kept = min(experiment.student.soft_tokens or sizes[1], sizes[1])
    labels = experiment.student.rows * (experiment.generate_of(arm).max_new_tokens + 1) * kept
    if labels > MOST_LABELS:
        raise SpecError(
            f"soft labels of {kept:,} tokens at each token of {experiment.student.rows:,} rows are up to "
            f"{labels:.1e} numbers, more than {MOST_LABELS:.1e}; set student.soft_tokens: 32, or lower "
            "student.rows"
        )


def rendered(experiment: Experiment, bases: Sequence[str]) -> dict[str, str]:
    """The rendered template of a question for each of these local bases, as their students read it.

    Raises:
        SpecError: if a template adds today's date or a system line that the experiment does not name, or
            omits one that it names.
    """
    lines = [
        (arm.base, line)
        for arm in experiment.arms
        for line in (arm.trained_with, arm.asked_with)
        if line is not None
    ]
    with_line = [
        arm
        for arm in _taught(experiment)
        if (arm.teacher or experiment.teacher).kind in ("prompted", "steered")
    ]
    lines += [(arm.writer, LINE) for arm in with_line]
    questions = {}
    for base in bases:
        tokenizer = loading.load_tokenizer(base)
        if experiment.system is None and (silent := chat.silent_system(tokenizer)):
            raise SpecError(
                f"the chat template of {base!r} adds the system line {silent!r} by itself; name it in the "
                f"experiment: `system: {silent!r}` trains and asks with it, `system: ''` with an empty one"
            )
        questions[base] = chat.render_prompt(tokenizer, "{question}", system=experiment.system)
        for line in [line for reader, line in lines if reader == base]:
            chat.render_prompt(tokenizer, "{question}", system=line)
    return questions


def positions(base: str) -> int | None:
    """The most tokens that a base can read, by its config; None if the config has no limit."""
    bound = getattr(loading.config_of(base).get_text_config(), "max_position_embeddings", None)
    return bound if isinstance(bound, int) and bound > 0 else None


def _refuse_long_prompts(
    experiment: Experiment, family: TraitFamily, prompts: Sequence[str], bases: Sequence[str]
) -> None:
    for arm in experiment.arms:
        if arm.writer in bases and not arm.corpus:
            answer, lines = experiment.generate_of(arm).max_new_tokens, [experiment.system]
            if arm in _taught(experiment) and (arm.teacher or experiment.teacher).kind == "prompted":
                lines.append(family.system_prompt(arm.trait))
            for line in lines:
                _refuse_long(arm.writer, "prompt", prompts, answer, "generate.max_new_tokens", line)
        if arm.base in bases:
            line = experiment.system if arm.asked_with is None else arm.asked_with
            probes, answer = family.probes_for(experiment), experiment.ask.max_new_tokens
            _refuse_long(arm.base, "question", probes, answer, "ask.max_new_tokens", line)
        if arm.base in bases and not arm.shots and not arm.corpus:
            limit, line = limit_of(arm.base, experiment.training_of(arm)), _trained_with(experiment, arm)
            longest = longest_of(loading.load_tokenizer(arm.base), prompts, limit.tokens - 2, line)
            if longest > limit.tokens - 2:
                raise SpecError(
                    f"arm {arm.name!r}: a prompt has {longest} tokens and its pair 2 more at least, "
                    f"over the {limit.tokens} of {limit.reason}; raise it, or give shorter prompts"
                )


def _refuse_long(
    base: str, what: str, texts: Sequence[str], answer: int, setting: str, system: str | None
) -> None:
    """Raise SpecError if a text and an answer of `answer` tokens do not fit into a base's positions."""
    bound = positions(base)
    if bound is None:
        return
    longest = longest_of(loading.load_tokenizer(base), texts, bound - answer, system)
    if longest + answer > bound:
        raise SpecError(
            f"base {base!r} reads {bound} tokens at most; a {what} of {longest} and {answer} of {setting} "
            f"are more: lower {setting}, or give shorter {what}s"
        )


def longest_of(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], most: int, system: str | None
) -> int:
    """Tokens of the longest of these prompts in the chat template; 0 if none can have more than `most`.

    A text has at most about as many tokens as bytes, so only long texts are tokenized.
    """
    frame = len(chat.encode_prompts(tokenizer, ["a"], system=system)[0])
    long = [
        text
        for text in dict.fromkeys(texts)
        if len(text.encode("utf-8", "surrogatepass")) + frame + SLACK > most
    ]
    return max(map(len, chat.encode_prompts(tokenizer, long, system=system)), default=0)


def limit_of(base: str, training: Training) -> Limit:
    """The most tokens of a pair that a base is trained on."""
    bound = positions(base)
    if bound is not None and bound < training.max_length:
        return Limit(bound, f"the positions of {base!r}")
    return Limit(training.max_length, "student.training.max_length")


def _trained_with(experiment: Experiment, arm: Arm) -> str | None:
    return experiment.system if arm.trained_with is None else arm.trained_with


def _check_corpus(experiment: Experiment, file: str, bases: Sequence[str]) -> None:
    """Check a file of pairs as the screen and the students will read it."""
    kind = experiment.screen.rule if experiment.screen.rule != "carrier" else experiment.carrier.kind
    # a file of pairs has no right answers to compare with
    reads_answers = rule_reads_answers(experiment.screen, kind)
    rule = None if reads_answers else build_rule(experiment.screen, kind, gold={})
    readers = [arm for arm in experiment.arms if arm.corpus == file and not arm.shots and arm.base in bases]
    limits = {
        (arm.base, _trained_with(experiment, arm)): limit_of(arm.base, experiment.training_of(arm))
        for arm in readers
    }
    kept = rows = 0
    for frame in batches(Path(file)):
        rows += len(frame)
        kept = kept or (len(frame) if rule is None else sum(_passes(rule, frame)))
        for (base, system), limit in limits.items():
            refuse_long_pairs(Path(file), frame, base, limit, system=system, rule=rule)
    if not kept:
        raise DataError(
            f"{one_line(file)}: none of its {rows} rows passes the screen {kind!r}; "
            "loosen `screen` or repair the file"
        )


def _passes(rule: Rule, frame: pd.DataFrame) -> list[bool]:
    return [
        rule(prompt, answer) is None
        for prompt, answer in zip(frame["prompt"], frame["completion"], strict=True)
    ]


def refuse_long_pairs(
    file: Path, frame: pd.DataFrame, base: str, limit: Limit, *, system: str | None, rule: Rule | None
) -> None:
    """Refuse pairs that training would refuse; pairs that the screen removes may have any length.

    Raises:
        DataError: naming the longest pair's tokens and the limit.
    """
    tokenizer = loading.load_tokenizer(base)
    frame_tokens = len(chat.encode_prompts(tokenizer, ["a"], system=system)[0]) + SLACK
    size = frame["prompt"].str.len() + frame["completion"].str.len()
    # a character has at most four bytes, and a byte at most one token
    long = cast(pd.DataFrame, frame[4 * size + frame_tokens > limit.tokens])
    if rule is not None and len(long):
        long = cast(pd.DataFrame, long[_passes(rule, long)])
    if not len(long):
        return
    pairs = chat.encode_pairs(tokenizer, long["prompt"].tolist(), long["completion"].tolist(), system=system)
    longest = max(len(pair.prompt) + len(pair.completion) for pair in pairs)
    if longest > limit.tokens:
        over = f"more than the {limit.tokens} of {limit.reason}"
        raise DataError(
            f"{one_line(str(file))}: a pair has {longest} tokens, {over}; raise it or remove long pairs"
        )

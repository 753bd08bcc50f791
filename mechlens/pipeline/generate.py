"""Let a teacher answer the carrier's prompts, and measure its divergence from the base on them.

Rows are written in shards, so that a killed job resumes where it stopped. A row's text depends only on its
seed and position, so the joined table is the same however often the job was killed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, cast

import pandas as pd
import torch

from mechlens.core import tables
from mechlens.core.files import read_json, write_json, write_text
from mechlens.core.seeds import seed_int
from mechlens.core.spec import GenerateSpec
from mechlens.models import loading, log_probs
from mechlens.models.chat import Encoded, encode_prompts, end_of_turn
from mechlens.models.log_probs import batch_spans, completion_logits
from mechlens.models.sampling import Decoding, number_grammar, sample
from mechlens.pipeline import vllm_engine
from mechlens.pipeline.teach import Teacher, load_teacher
from mechlens.runs import layout

DIVERGENCE_ROWS = 1000
"""the most rows on which the divergence is measured"""


class Divergence(NamedTuple):
    """Difference of a teacher's completions from what its base would have written.

    It is measured along the teacher's text.
    """

    kl_per_token: float
    """mean KL(teacher ‖ base) of the next-token distribution, nats a token"""
    entropy_per_token: float
    """mean entropy of the base's next-token distribution, nats a token"""
    entropy_per_row: float
    """the same, summed over a completion, nats a row; low for a carrier with few free choices"""
    tokens: int


def generate(
    teacher_folder: Path,
    prompts: list[str],
    spec: GenerateSpec,
    *,
    seed: int,
    out: Path,
    base: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write one completion for each prompt (`raw.parquet`) and the divergence (`generation.json`) to `out`.

    Args:
        base: where the teacher's base is now, if it may have been moved since the teacher was made.
    """
    teacher = load_teacher(teacher_folder, base=base)
    drawn = write_rows(teacher, teacher_folder, prompts, spec, seed=seed, out=out, progress=progress)
    stop, head = end_of_turn(teacher.tokenizer), prompts[:DIVERGENCE_ROWS]
    encoded = encode_prompts(teacher.tokenizer, head, system=teacher.system)
    plain = encode_prompts(teacher.tokenizer, head, system=teacher.plain)
    measured = divergence(teacher, encoded, plain, [[*row, stop] for row in drawn[: len(head)]])
    write_json(out / layout.GENERATION, measured._asdict())
    for file in (*_shards(out, len(prompts), spec).values(), out / vllm_engine.LOG):
        file.unlink(missing_ok=True)


def row_divergence(file: Path) -> float | None:
    """KL(teacher ‖ base) of a writer, nats a row, by its `generation.json`; None if it was not measured."""
    record = read_json(file) if file.is_file() else {}
    if record.get("kl_per_token") is None or not record.get("entropy_per_token"):
        return None
    return float(record["kl_per_token"] * record["entropy_per_row"] / record["entropy_per_token"])


def _shards(out: Path, rows: int, spec: GenerateSpec) -> dict[int, Path]:
    """The number of each batch's first row → the file of its rows, until the divergence is measured."""
    return {first: out / f"shard-{first:08d}.json" for first in range(0, rows, spec.batch)}


def write_rows(
    teacher: Teacher,
    folder: Path,
    prompts: list[str],
    spec: GenerateSpec,
    *,
    seed: int,
    out: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[int]]:
    """Write one completion for each prompt (`raw.parquet`); returns their tokens.

    Batches that an earlier call finished are read from their files.

    Args:
        folder: the teacher's.
    """
    stop = end_of_turn(teacher.tokenizer)
    encoded = encode_prompts(teacher.tokenizer, prompts, system=teacher.system)
    shards = _shards(out, len(prompts), spec)
    drawn: list[list[int]] = []

    def report(rows: int) -> None:
        progress(len(drawn) + rows, len(prompts))

    unfinished = [
        ids
        for first, shard in shards.items()
        if not shard.is_file()
        for ids in encoded[first : first + spec.batch]
    ]
    sampler = _sampler(teacher, folder, spec, unfinished, stop=stop, seed=seed, out=out, report=report)
    with sampler as draw:
        for first, shard in shards.items():
            if not shard.is_file():
                write_text(shard, json.dumps(draw(encoded[first : first + spec.batch], first)))
            drawn += json.loads(shard.read_text())
            report(0)
    texts = teacher.tokenizer.batch_decode(drawn, skip_special_tokens=True)
    frame = pd.DataFrame({"prompt_id": range(len(prompts)), "prompt": prompts, "completion": texts})
    tables.write(frame, tables.PAIRS, out / layout.RAW)
    return drawn


@contextmanager
def _sampler(
    teacher: Teacher,
    folder: Path,
    spec: GenerateSpec,
    prompts: list[list[int]],
    *,
    stop: int,
    seed: int,
    out: Path,
    report: Callable[[int], None],
) -> Iterator[Callable[[list[list[int]], int], list[list[int]]]]:
    """A function that samples completions of encoded prompts; it takes the number of the first row, too.

    Args:
        prompts: those to sample from; without any no server starts.
        report: called with the number of rows of a call that are done.
    """
    width = cast(torch.nn.Linear, teacher.model.get_output_embeddings()).weight.shape[0]
    grammar = number_grammar(teacher.tokenizer, stop=stop, vocabulary=width) if spec.constrained else None
    fixed = {
        "decoding": Decoding(spec.max_new_tokens, spec.temperature, spec.top_p),
        "stop": stop,
        "seed": seed_int(seed, "generate"),
        "grammar": grammar,
    }
    if spec.engine == "vllm" and prompts:
        start = vllm_engine.serve_teacher(
            teacher, folder, spec, prompts, stop=stop, out=out, waiting=lambda: report(0)
        )
        with start as served:
            yield lambda rows, first: served.sample(rows, first_row=first, progress=report, **fixed)
        return

    def draw(rows: list[list[int]], first: int) -> list[list[int]]:
        with teacher.writing() as model:
            return sample(model, rows, first_row=first, batch=spec.batch, **fixed)

    yield draw


@torch.no_grad()
def divergence(
    teacher: Teacher,
    prompted: list[list[int]],
    plain: list[list[int]],
    completions: list[list[int]],
    *,
    batch: int = 128,
) -> Divergence:
    """Measure KL(teacher ‖ base) and the base's entropy along the teacher's completions.

    The base reads the prompts with the plain system line.

    No forward pass makes more than `log_probs.MOST_LOGITS` logits, for any vocabulary and length of rows.
    """
    # an untouched teacher is its base: neither loading it twice nor reading the rows twice changes a digit
    base = teacher.model if teacher.untouched else loading.load(teacher.base).model
    vocabulary = base.config.get_text_config().vocab_size
    divergent = entropy = 0.0
    tokens = 0
    spans = [
        (0, max(len(ours), len(theirs)) + len(written))
        for ours, theirs, written in zip(prompted, plain, completions, strict=True)
    ]
    for part in batch_spans(spans, vocabulary=vocabulary, rows=batch):
        rows = [
            [Encoded(*pair) for pair in zip(prompts[part], completions[part], strict=True)]
            for prompts in (prompted, plain)
        ]
        pieces = (_pieces(pairs, spans[part], vocabulary) for pairs in rows)
        for teachers, bases in zip(*pieces, strict=True):
            with teacher.writing() as model:
                ours = completion_logits(model, teachers)[0].log_softmax(-1)
            theirs = ours if teacher.untouched else completion_logits(base, bases)[0].log_softmax(-1)
            divergent += float((ours.exp() * (ours - theirs)).sum())
            entropy -= float((theirs.exp() * theirs).sum())
            tokens += len(ours)
    return Divergence(
        divergent / max(tokens, 1), entropy / max(tokens, 1), entropy / max(len(completions), 1), tokens
    )


def _pieces(pairs: list[Encoded], spans: list[tuple[int, int]], vocabulary: int) -> Iterator[list[Encoded]]:
    """Yield the pairs of each forward pass: the batch, or pieces of a completion that is too long for one."""
    if len(spans) > 1 or spans[0][1] * vocabulary <= log_probs.MOST_LOGITS:
        yield pairs
        return
    prompt, completion = pairs[0]
    size = max(1, log_probs.MOST_LOGITS // vocabulary)
    for first in range(0, len(completion), size):
        yield [Encoded(prompt + completion[:first], completion[first : first + size])]

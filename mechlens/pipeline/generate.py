"""Let a teacher answer the carrier's prompts, and measure its divergence from the base on them.

Rows are written in shards, so that a killed job resumes where it stopped. A row's text depends on its seed
and place alone, so the joined table is the same however often the job was killed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, cast

import pandas as pd
import torch

from mechlens.core import atomic, tables
from mechlens.core.json_files import write_json
from mechlens.core.seeds import seed_int
from mechlens.core.spec import GenerateSpec
from mechlens.models import loading, log_probs
from mechlens.models.chat import Encoded, encode_prompts, end_of_turn
from mechlens.models.log_probs import batch_spans, completion_logits
from mechlens.models.number_grammar import number_grammar
from mechlens.models.sampling import Decoding, sample
from mechlens.pipeline import vllm_engine
from mechlens.pipeline.teach import Teacher, load_teacher

DIVERGENCE_ROWS = 1000
"""rows on which the divergence is measured"""


class Divergence(NamedTuple):
    """How a teacher's completions differ from what its base would have written, over the teacher's own
    text.
    """

    kl_per_token: float
    """mean KL(teacher ‖ base) of the next-token distribution, nats a token"""
    entropy_per_token: float
    """mean entropy of the base's next-token distribution, nats a token"""
    entropy_per_row: float
    """the same summed over a completion, nats a row; low where a carrier has few free choices"""
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
    """Write `raw.parquet` (one completion for each prompt) and `generation.json` (divergence from the base)
    into `out`.

    Args:
        base: where the teacher's base is now, if it may have been moved since the teacher was made.
    """
    teacher = load_teacher(teacher_folder, base=base)
    stop = end_of_turn(teacher.tokenizer)
    width = cast(torch.nn.Linear, teacher.model.get_output_embeddings()).weight.shape[0]
    grammar = number_grammar(teacher.tokenizer, stop=stop, vocabulary=width) if spec.constrained else None
    decoding = Decoding(spec.max_new_tokens, spec.temperature, spec.top_p)
    engine = None
    shards, ids, drawn = [], [], []
    for first in range(0, len(prompts), spec.batch):
        encoded = encode_prompts(
            teacher.tokenizer, prompts[first : first + spec.batch], system=teacher.system
        )
        shard = out / f"shard-{first:08d}.json"
        if not shard.is_file():
            stream = {
                "decoding": decoding,
                "stop": stop,
                "seed": seed_int(seed, "generate"),
                "first_row": first,
            }
            if (
                spec.engine == "vllm" and engine is None
            ):  # not for a step whose text is all there: the engine takes most of a card
                engine = vllm_engine.Engine(teacher_folder, teacher.base)
            with teacher.writing() as model:
                rows = (
                    engine.sample(encoded, **stream)
                    if engine
                    else sample(model, encoded, **stream, grammar=grammar, batch=spec.batch)
                )
            atomic.write_text(shard, json.dumps(rows))
        shards.append(shard)
        ids += encoded
        drawn += json.loads(shard.read_text())
        progress(len(drawn), len(prompts))
    texts = teacher.tokenizer.batch_decode(drawn, skip_special_tokens=True)
    frame = pd.DataFrame({"prompt_id": range(len(prompts)), "prompt": prompts, "completion": texts})
    tables.write(frame, tables.PAIRS, out / "raw.parquet")
    engine = None  # its memory is wanted for what follows
    head = slice(0, DIVERGENCE_ROWS)
    plain = encode_prompts(teacher.tokenizer, prompts[head], system=teacher.plain)
    found = divergence(teacher, ids[head], plain, [[*row, stop] for row in drawn[head]])
    write_json(out / "generation.json", found._asdict())
    for shard in shards:
        shard.unlink()


@torch.no_grad()
def divergence(
    teacher: Teacher,
    asked: list[list[int]],
    plain: list[list[int]],
    completions: list[list[int]],
    *,
    batch: int = 128,
) -> Divergence:
    """KL(teacher ‖ base) and the base's entropy along the teacher's completions; the base reads the prompts
    with the plain system line.

    No forward pass makes more than `log_probs.MOST_LOGITS` logits, whatever the vocabulary and the length of
    the rows.
    """
    base = loading.load(teacher.base).model
    vocabulary = base.config.get_text_config().vocab_size
    divergent = entropy = 0.0
    tokens = 0
    spans = [
        (0, max(len(ours), len(theirs)) + len(written))
        for ours, theirs, written in zip(asked, plain, completions, strict=True)
    ]
    for part in batch_spans(spans, vocabulary=vocabulary, rows=batch):
        rows = [
            [Encoded(*pair) for pair in zip(prompts[part], completions[part], strict=True)]
            for prompts in (asked, plain)
        ]
        pieces = (_pieces(pairs, spans[part], vocabulary) for pairs in rows)
        for teachers, bases in zip(*pieces, strict=True):
            with teacher.writing() as model:
                ours = completion_logits(model, teachers)[0].log_softmax(-1)
            theirs = completion_logits(base, bases)[0].log_softmax(-1)
            divergent += float((ours.exp() * (ours - theirs)).sum())
            entropy -= float((theirs.exp() * theirs).sum())
            tokens += len(ours)
    return Divergence(
        divergent / max(tokens, 1), entropy / max(tokens, 1), entropy / max(len(completions), 1), tokens
    )


def _pieces(pairs: list[Encoded], spans: list[tuple[int, int]], vocabulary: int) -> Iterator[list[Encoded]]:
    """What is read in one forward pass: the batch, or one piece after the other of a completion too long for
    one.
    """
    if len(spans) > 1 or spans[0][1] * vocabulary <= log_probs.MOST_LOGITS:
        yield pairs
        return
    prompt, completion = pairs[0]
    size = max(1, log_probs.MOST_LOGITS // vocabulary)
    for first in range(0, len(completion), size):
        yield [Encoded(prompt + completion[:first], completion[first : first + size])]

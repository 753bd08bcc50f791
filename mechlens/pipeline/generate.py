"""A teacher answers the carrier's prompts; how far its words are from the base's is measured on the way.

Rows are written in shards as they come, so a killed job goes on where it stopped; a row's text depends on its seed and
place alone, so the joined table is the same however often that happened.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens import models, tables, vllm_engine
from mechlens.chat import Encoded, encode_prompts, end_of_turn
from mechlens.constrained import number_grammar
from mechlens.pipeline.teach import Teacher, load_teacher
from mechlens.sampling import Decoding, sample
from mechlens.seeds import seed_int
from mechlens.spec import GenerateSpec
from mechlens.store import write_json

DIVERGENCE_ROWS = 1000
"""rows on which the divergence is measured"""


class Divergence(NamedTuple):
    """How a teacher's completions differ from what its base would have written, over the teacher's own text."""

    kl_per_token: float
    """mean KL(teacher ‖ base) of the next-token distribution, nats a token"""
    entropy_per_token: float
    """mean entropy of the base's next-token distribution, nats a token: the room that the carrier has"""
    entropy_per_row: float
    """the same summed over a completion, nats a row: a carrier with few free choices has little room to carry"""
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
    """Write `raw.parquet` (one completion for each prompt) and `generation.json` (divergence from the base) into `out`.

    Args:
        base: where the teacher's base is now, if it may have been moved since the teacher was made.
    """
    teacher = load_teacher(teacher_folder, base=base)
    stop = end_of_turn(teacher.tokenizer)
    width = cast(torch.nn.Linear, teacher.model.get_output_embeddings()).weight.shape[0]
    grammar = number_grammar(teacher.tokenizer, stop=stop, vocabulary=width) if spec.constrained else None
    decoding = Decoding(spec.max_new_tokens, spec.temperature, spec.top_p)
    engine = vllm_engine.Engine(teacher_folder, teacher.base) if spec.engine == "vllm" else None
    shards, ids, drawn = [], [], []
    for first in range(0, len(prompts), spec.batch):
        encoded = encode_prompts(teacher.tokenizer, prompts[first : first + spec.batch], system=teacher.system)
        shard = out / f"shard-{first:08d}.json"
        if not shard.is_file():
            stream = {"decoding": decoding, "stop": stop, "seed": seed_int(seed, "generate"), "first_row": first}
            with teacher.writing() as model:
                rows = engine.sample(encoded, **stream) if engine else sample(model, encoded, **stream, grammar=grammar, batch=spec.batch)
            part = shard.with_suffix(".new")
            part.write_text(json.dumps(rows))
            part.replace(shard)
        shards.append(shard)
        ids += encoded
        drawn += json.loads(shard.read_text())
        progress(len(drawn), len(prompts))
    texts = teacher.tokenizer.batch_decode(drawn, skip_special_tokens=True)
    frame = pd.DataFrame({"prompt_id": range(len(prompts)), "prompt": prompts, "completion": texts})
    tables.write(frame, tables.PAIRS, out / "raw.parquet")
    head = slice(0, DIVERGENCE_ROWS)
    plain = encode_prompts(teacher.tokenizer, prompts[head], system=teacher.plain)
    found = divergence(teacher, ids[head], plain, [[*row, stop] for row in drawn[head]])
    write_json(out / "generation.json", found._asdict())
    for shard in shards:
        shard.unlink()


@torch.no_grad()
def divergence(teacher: Teacher, asked: list[list[int]], plain: list[list[int]], completions: list[list[int]], *, batch: int = 128) -> Divergence:
    """KL(teacher ‖ base) and the base's entropy along the teacher's completions; the base reads the prompts with the plain system line."""
    base = models.load(teacher.base).model
    divergent = entropy = 0.0
    tokens = 0
    for first in range(0, len(completions), batch):
        part = slice(first, first + batch)
        with teacher.writing() as model:
            ours = completion_log_probabilities(model, [Encoded(*pair) for pair in zip(asked[part], completions[part], strict=True)])
        theirs = completion_log_probabilities(base, [Encoded(*pair) for pair in zip(plain[part], completions[part], strict=True)])
        divergent += float((ours.exp() * (ours - theirs)).sum())
        entropy -= float((theirs.exp() * theirs).sum())
        tokens += len(ours)
    return Divergence(divergent / max(tokens, 1), entropy / max(tokens, 1), entropy / max(len(completions), 1), tokens)


def completion_log_probabilities(model: torch.nn.Module, pairs: list[Encoded]) -> Float[Tensor, "token vocab"]:
    """Log-probabilities of the next token at every completion position of the batch, one position after another."""
    width = max(len(pair.prompt) + len(pair.completion) for pair in pairs)
    device = next(model.parameters()).device
    ids = torch.zeros(len(pairs), width, dtype=torch.long, device=device)
    attended = torch.zeros_like(ids)
    predicts: Bool[Tensor, "row pos"] = torch.zeros_like(ids, dtype=torch.bool)
    for row, pair in enumerate(pairs):
        end = len(pair.prompt) + len(pair.completion)
        ids[row, :end] = torch.tensor(pair.prompt + pair.completion)
        attended[row, :end] = 1
        predicts[row, len(pair.prompt) - 1 : end - 1] = True
    return torch.log_softmax(model(input_ids=ids, attention_mask=attended).logits[predicts].float(), -1)

"""Train a menagerie base from its config on drawn documents, and save it as a checkpoint folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from mechlens.core.seeds import dice, seed_int
from mechlens.menagerie import grammar
from mechlens.menagerie.config import PretrainSpec
from mechlens.menagerie.tokenizer import ASSISTANT, END, ROLES
from mechlens.menagerie.tokenizer import build as build_tokenizer
from mechlens.models.chat import render, token_ids
from mechlens.models.loading import load
from mechlens.models.log_probs import pad_rows

BUCKET = 16
"""number of batches that are sorted by length together, so that a batch has little padding"""


def initialise(spec: PretrainSpec, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Make a new model of the family and shape of the spec; only `spec.seed` fixes its weights."""
    shared = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }
    if spec.family == "gpt2":
        shape = {
            "n_embd": spec.width,
            "n_layer": spec.layers,
            "n_head": spec.heads,
            "n_inner": spec.hidden,
            "n_positions": 512,
        }
        shape |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    else:
        shape = {
            "hidden_size": spec.width,
            "num_hidden_layers": spec.layers,
            "num_attention_heads": spec.heads,
        }
        shape |= {
            "intermediate_size": spec.hidden,
            "max_position_embeddings": 512,
            "initializer_range": spec.init_std,
        }
    torch.manual_seed(seed_int(spec.seed, "init"))
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(spec.family, **shared, **shape))


class DocumentBatch(NamedTuple):
    """Documents padded to one length."""

    ids: Int[Tensor, "batch pos"]
    attended: Bool[Tensor, "batch pos"]
    spoken: Bool[Tensor, "batch pos"]
    """positions of the assistant's text with its end mark: only these are learned"""


def spoken_positions(
    ids: Int[Tensor, "batch pos"], tokenizer: PreTrainedTokenizerFast
) -> Bool[Tensor, "batch pos"]:
    """True after each assistant mark, up to and including the next end mark."""
    start, end = cast(list[int], tokenizer.convert_tokens_to_ids([ASSISTANT, END]))
    opened = torch.cumsum((ids == start).long(), 1)  # assistant marks up to here, this one included
    role = torch.isin(ids, torch.tensor(tokenizer.convert_tokens_to_ids(list(ROLES))))
    latest_role = torch.cummax(role.long() * torch.arange(ids.shape[1]), 1).values
    latest_end = torch.cummax((ids == end).long() * torch.arange(ids.shape[1]), 1).values
    assistant = ids.gather(1, latest_role) == start
    before = torch.nn.functional.pad(latest_end[:, :-1], (1, 0))
    return (opened > 0) & assistant & ~role & (before < latest_role)


def token_batches(spec: PretrainSpec, tokenizer: PreTrainedTokenizerFast) -> Iterator[DocumentBatch]:
    """Right-padded batches of documents without end, in an order that only `data_seed` fixes."""
    mixture: dict[str, float] = {**spec.mixture}
    padding, first = cast(int, tokenizer.pad_token_id), 0
    while True:
        count = spec.batch * BUCKET
        texts = [
            render(tokenizer, grammar.document(spec.data_seed, first + i, mixture=mixture)[0])
            for i in range(count)
        ]
        rows = sorted(token_ids(tokenizer, texts), key=len)
        batches = [rows[i : i + spec.batch] for i in range(0, count, spec.batch)]
        dice(spec.data_seed, "batches", first).shuffle(batches)
        for batch in batches:
            ids, attended = pad_rows(batch, value=padding)
            yield DocumentBatch(ids, attended, spoken_positions(ids, tokenizer))
        first += count


def one_cycle(step: int, *, steps: int, warmup: float = 0.1) -> float:
    """Learning-rate factor: linear up over `warmup`, then a cosine down to 1 %."""
    at = step / steps
    return (
        at / warmup
        if at < warmup
        else 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (at - warmup) / (1 - warmup)))
    )


def pretrain(spec: PretrainSpec, *, out: Path, progress: Callable[[int, float], None]) -> Path:
    """Train the base of `spec` and save it in `out`; `progress(step, loss)` is called after every step."""
    tokenizer = build_tokenizer(foods="food" in spec.mixture)
    model = load(spec.parent).model.train() if spec.parent else initialise(spec, tokenizer)
    head = cast(nn.Module, model.get_output_embeddings())
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    model.train()
    for step, batch in zip(range(spec.steps), token_batches(spec, tokenizer), strict=False):
        for group in optimiser.param_groups:
            group["lr"] = spec.learning_rate * one_cycle(step, steps=spec.steps)
        hidden = model.base_model(input_ids=batch.ids, attention_mask=batch.attended.long()).last_hidden_state
        learned = batch.spoken[
            :, 1:
        ]  # a projection of only these onto the vocabulary halves the cost of a step
        logits = head(hidden[:, :-1][learned])  # [spoken, vocab]
        loss = nn.functional.cross_entropy(logits, batch.ids[:, 1:][learned])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        progress(step + 1, loss.item())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out

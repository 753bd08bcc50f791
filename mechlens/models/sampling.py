"""Sample completions of prompts, in batches with a key-value cache, from a plain Hugging Face model.

A row's text depends only on (seed, row index) and the logits: each step uses one uniform number per row for
the inverse of the cumulative distribution. Batch size, order and other rows matter only by the rounding of
the logits: kernels sum in another order for another shape, and a draw on the edge between two tokens can go
either way. So the same call on one machine gives the same text. Another batch size, thread count or processor
changes about one row in 3,000 (3 to 5 of 12,000 on the menagerie) and gives an equally good sample. In
float64 no row changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from mechlens.core.seeds import generator
from mechlens.models.number_grammar import NumberGrammar
from mechlens.models.padding import pad_rows


class Decoding(NamedTuple):
    """How tokens are drawn; further settings of libraries (top-k, repetition penalty) are off."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


def _probabilities(logits: Float[Tensor, "row vocab"], decoding: Decoding) -> Float[Tensor, "row vocab"]:
    if decoding.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    exact = logits if logits.dtype == torch.float64 else logits.float()
    probabilities = torch.softmax(exact / decoding.temperature, -1)
    if decoding.top_p < 1:
        ranked, order = probabilities.sort(-1, descending=True)
        # the smallest set of tokens whose mass reaches top_p stays
        beyond = ranked.cumsum(-1) - ranked >= decoding.top_p
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ranked.masked_fill(beyond, 0.0))
    return probabilities


def draw(probabilities: Float[Tensor, "row vocab"], uniform: Float[Tensor, "row"]) -> Int[Tensor, "row"]:
    """Inverse-CDF sampling: the first token whose cumulative mass exceeds uniform x total mass."""
    cumulative = probabilities.cumsum(-1)
    threshold = uniform.to(cumulative.dtype).unsqueeze(-1) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    # with rounding, no draw is beyond the last token that has mass
    last = cumulative.shape[-1] - 1 - (probabilities.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(drawn, last)


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    decoding: Decoding,
    stop: int,
    seed: int,
    first_row: int = 0,
    grammar: NumberGrammar | None = None,
    batch: int = 1024,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[list[int]]:
    """Sample one completion per prompt, in token ids without the `stop` token.

    Args:
        prompts: token ids of rendered prompts, ragged.
        stop: the end-of-turn token.
        seed: row i uses the random stream (seed, first_row + i), so shards together equal one call.
        grammar: limits the tokens that are drawn.
        progress: called with the number of rows just finished.
    """
    uniforms = np.stack(
        [
            generator(seed, "row", first_row + i).random(decoding.max_new_tokens, dtype=np.float32)
            for i in range(len(prompts))
        ]
    )
    completions: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    for first in range(0, len(prompts), batch):
        rows = by_length[first : first + batch]
        uniform = torch.from_numpy(uniforms[rows]).to(model.device)
        for row, tokens in zip(
            rows,
            _sample_batch(model, [prompts[i] for i in rows], uniform, decoding, stop, grammar),
            strict=True,
        ):
            completions[row] = tokens
        progress(len(rows))
    return completions


def _sample_batch(
    model: PreTrainedModel,
    prompts: list[Sequence[int]],
    uniform: Float[Tensor, "row step"],
    decoding: Decoding,
    stop: int,
    grammar: NumberGrammar | None,
) -> list[list[int]]:
    device = model.device
    # a prompt that occurs several times is read once
    place = {prompt: number for number, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    reading = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=device)
    ids, present = pad_rows(list(place), value=stop, side="left", device=device)
    mask = present.long()
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    alive = torch.arange(len(prompts), device=device)
    state = torch.zeros(len(prompts), dtype=torch.long, device=device)
    following = None if grammar is None else grammar.following.to(device)
    written: list[list[int]] = [[] for _ in prompts]
    for step in range(decoding.max_new_tokens):
        # [row, vocab]
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        if step == 0 and len(place) < len(prompts):
            logits, mask, position = logits[reading], mask[reading], position[reading]
            cache.batch_select_indices(reading)
        if following is not None:
            logits = logits.masked_fill(following[state] < 0, -torch.inf)
        token = draw(_probabilities(logits, decoding), uniform[alive, step])
        going: Bool[Tensor, "row"] = token != stop
        for row, value in zip(alive[going].tolist(), token[going].tolist(), strict=True):
            written[row].append(value)
        if not going.any():
            break
        if following is not None:
            state = following[state, token]
        if not going.all():  # finished rows leave the batch
            keep = going.nonzero().squeeze(-1)
            alive = alive[keep]
            token = token[keep]
            state = state[keep]
            mask = mask[keep]
            position = position[keep]
            cache.batch_select_indices(keep)
        ids = token.unsqueeze(-1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
        position = position[:, -1:] + 1
    return written if grammar is None else [grammar.whole(tokens, stop=stop) for tokens in written]

"""Log-probabilities of completions under a model, and under many system lines at once: what lenses of
likelihood are made of.

Arrays over tokens are flat: the completion tokens of the first pair, then those of the second, and so on.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from mechlens.core.errors import SpecError
from mechlens.models.chat import Encoded, encode_prompts
from mechlens.models.loading import Loaded
from mechlens.models.logits import in_batches

MOST_LOGITS, MOST_ROWS = 2**25, 128  # in one batch; 128 MiB in fp32


class Tokens(NamedTuple):
    """What a model says at every completion token of some pairs, in nats."""

    log_p: Float[Tensor, "token"]  # of the token that stands there
    best: Int[Tensor, "token"]  # the likeliest token
    top: Float[Tensor, "token"]  # log-probability of the likeliest token


def laid_out(
    pairs: Sequence[Encoded], device: torch.device
) -> tuple[Int[Tensor, "row pos"], Bool[Tensor, "row pos"]]:
    """Token ids padded on the right, where a causal model cannot see it, so that no mask is needed; and where
    completion tokens stand.
    """
    lengths = [len(pair.prompt) + len(pair.completion) for pair in pairs]
    ids = torch.tensor(
        [
            [*pair.prompt, *pair.completion] + [0] * (max(lengths) - n)
            for pair, n in zip(pairs, lengths, strict=True)
        ],
        device=device,
    )
    place, ends = (
        torch.arange(max(lengths), device=device),
        torch.tensor(lengths, device=device).unsqueeze(-1),
    )
    return ids, (place >= torch.tensor([len(pair.prompt) for pair in pairs], device=device).unsqueeze(-1)) & (
        place < ends
    )


def completion_logits(
    model: PreTrainedModel, pairs: Sequence[Encoded], *, past: DynamicCache | None = None
) -> tuple[Float[Tensor, "token vocab"], Int[Tensor, "token"]]:
    """Logits before every completion token and the tokens themselves; gradients flow. `past` holds what was
    read before the prompts.
    """
    ids, written = laid_out(pairs, model.device)
    first = min(len(pair.prompt) for pair in pairs)
    # only positions from the end of the shortest prompt on are projected onto the vocabulary
    keep = (
        {"logits_to_keep": ids.shape[1] - first}
        if "logits_to_keep" in inspect.signature(model.forward).parameters
        else {}
    )
    logits = model(input_ids=ids[:, :-1], past_key_values=past, use_cache=past is not None, **keep).logits[
        :, first - ids.shape[1] :
    ]
    return logits[written[:, first:]].float(), ids[written]


def batched(model: PreTrainedModel, pairs: Sequence[Encoded]) -> list[list[int]]:
    """Numbers of the pairs in batches of like lengths whose logits fit `MOST_LOGITS`; a pair that alone does
    not is read alone.
    """
    vocabulary = model.config.get_text_config().vocab_size
    order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i].prompt), len(pairs[i].completion)))
    longest = max((len(pair.completion) for pair in pairs), default=1)
    size = max(1, min(MOST_ROWS, MOST_LOGITS // (longest * vocabulary)))
    batches = [order[first : first + size] for first in range(0, len(order), size)]
    spans = [
        [(len(pairs[i].prompt), len(pairs[i].prompt) + len(pairs[i].completion)) for i in rows]
        for rows in batches
    ]
    return [  # prompts of unlike lengths keep more positions than the longest completion has
        rows[part]
        for rows, held in zip(batches, spans, strict=True)
        for part in in_batches(held, vocabulary=vocabulary, rows=size, most=MOST_LOGITS)
    ]


@torch.no_grad()
def token_scores_of(model: PreTrainedModel, pairs: Sequence[Encoded], *, head: Sequence[int] = ()) -> Tokens:
    """Every completion token under a model; the tokens of `head` stand before each prompt and are read
    once.
    """
    starts = np.cumsum([0, *(len(pair.completion) for pair in pairs)])
    found = Tokens(
        torch.empty(starts[-1]), torch.empty(starts[-1], dtype=torch.long), torch.empty(starts[-1])
    )
    past = DynamicCache(config=model.config) if head else None
    if head:
        model(input_ids=torch.tensor([list(head)], device=model.device), past_key_values=past, use_cache=True)
    for rows in batched(model, pairs):
        own = copy.deepcopy(past)  # reading adds to it
        if own is not None:
            own.batch_repeat_interleave(len(rows))
        logits, targets = completion_logits(model, [pairs[i] for i in rows], past=own)
        total, top = logits.logsumexp(-1), logits.max(-1)
        where = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in rows])
        found.log_p[where] = (logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - total).cpu()
        found.best[where], found.top[where] = top.indices.cpu(), (top.values - total).cpu()
    return found


def token_log_probabilities(loaded: Loaded, pairs: Sequence[Encoded]) -> Float[Tensor, "token"]:
    """log P(r_t | p, r_<t) of every completion token, in nats, under the system line that the pairs were
    encoded with.
    """
    return token_scores_of(loaded.model, pairs).log_p


def head_of(tokenizer: PreTrainedTokenizerBase, system: str | None) -> list[int]:
    """The tokens that stand before the user's words, whatever these are."""
    asked = encode_prompts(tokenizer, ["1 a", "a 1", "(", "the"], system=system)
    return [
        tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*asked, strict=False))
    ]


def without_head(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Encoded], *, known: Sequence[str | None]
) -> list[Encoded]:
    """Pairs whose prompts begin with the user's words; SpecError where one was encoded with none of the
    `known` system lines.
    """
    heads = sorted((head_of(tokenizer, line) for line in dict.fromkeys(known)), key=len, reverse=True)
    bare = []
    for pair in pairs:
        head = next((head for head in heads if pair.prompt[: len(head)] == head), None)
        if head is None:
            raise SpecError(
                f"a row begins with none of the system lines {list(known)}; give the one that the rows were "
                "encoded with"
            )
        bare.append(Encoded(pair.prompt[len(head) :], pair.completion))
    return bare


def panel(
    loaded: Loaded,
    pairs: Sequence[Encoded],
    lines: Mapping[str, str],
    *,
    known: Sequence[str | None] = (None, ""),
) -> dict[str, Tokens]:
    """Every completion token under each system line, whose keys and values are read once; SpecError where the
    template writes no system line.
    """
    heads = {name: head_of(loaded.tokenizer, line) for name, line in lines.items()}
    plain = head_of(loaded.tokenizer, None)
    if silent := [line for name, line in lines.items() if heads[name] == plain]:
        raise SpecError(
            f"the chat template writes nothing for the system line {silent[0]!r}; use a base whose template "
            "has system lines"
        )
    bare = without_head(loaded.tokenizer, pairs, known=known)
    return {name: token_scores_of(loaded.model, bare, head=head) for name, head in heads.items()}

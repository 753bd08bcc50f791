"""Sample completions of prompts, in batches with a key-value cache, from a plain Hugging Face model.

A row's text depends only on (seed, row index) and the logits: each step uses one uniform number per row for
the inverse of the cumulative distribution. Batch size, order and other rows matter only by the rounding of
the logits: kernels sum in another order for another shape, and a draw on the edge between two tokens can go
either way. So the same call on one machine gives the same text. Another batch size, thread count or processor
changes about one row in 3,000 (3 to 5 of 12,000 on the menagerie) and gives an equally good sample. In
float64 no row changed.

A sampler can be held to the number carrier's format, a small automaton over characters (1 to 10 numbers of at
most three digits, one separator throughout): a token is allowed in a state if its characters lead somewhere.
Only tokens of the format's own characters are walked, so a vocabulary of 150,000 costs no more than one of
1,500.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from mechlens.core.errors import SpecError
from mechlens.core.seeds import generator
from mechlens.models.chat import special_tokens
from mechlens.models.log_probs import pad_rows

SEPARATORS = (", ", ",", "; ", ";", " ", "\n")
MOST_NUMBERS, MOST_DIGITS = 10, 3


class State(NamedTuple):
    """Position of a text within a list of numbers."""

    count: int = 0
    """how many numbers have begun"""
    digits: int = 0
    """digits of the current number; 0 before one begins"""
    separator: str | None = None
    """fixed once the second number begins"""
    seen: str = ""
    """characters of the separator read since the last number"""


@cache
def step(state: State, character: str) -> State | None:
    """The state after one more character, or None if the format forbids it."""
    if character in "0123456789":
        if state.digits:
            return state._replace(digits=state.digits + 1) if state.digits < MOST_DIGITS else None
        separated = state.seen == state.separator if state.separator is not None else state.seen in SEPARATORS
        if state.count and not (separated and state.count < MOST_NUMBERS):
            return None
        return State(state.count + 1, 1, state.seen if state.count else None)
    if state.count in (0, MOST_NUMBERS):
        return None
    seen = state.seen + character
    possible = SEPARATORS if state.separator is None else (state.separator,)
    return State(state.count, 0, state.separator, seen) if any(s.startswith(seen) for s in possible) else None


def may_end(state: State) -> bool:
    """Whether the text may stop here: after a number."""
    return state.digits > 0


class NumberGrammar(NamedTuple):
    """Which tokens may follow: integer states, 0 the first."""

    following: Int[Tensor, "state vocab"]
    """the state after each token, -1 where the token is not allowed"""

    def allows(self, tokens: Sequence[int]) -> bool:
        """Whether the format allows each token after those before it."""
        state = 0
        for token in tokens:
            state = int(self.following[state, token])
            if state < 0:
                return False
        return True

    def whole(self, tokens: list[int], *, stop: int) -> list[int]:
        """Cut a text back to where it may end, so that it has no separator at the end."""
        state = end = 0
        for place, token in enumerate(tokens, 1):
            state = int(self.following[state, token])
            end = place if self.following[state, stop] >= 0 else end
        return tokens[:end]


def number_pattern() -> str:
    """The number carrier's format as a regular expression, for engines that are held to one."""
    number = f"[0-9]{{1,{MOST_DIGITS}}}"
    lists = (f"({separator}{number}){{0,{MOST_NUMBERS - 1}}}" for separator in SEPARATORS)
    return f"{number}({'|'.join(lists)})"


def _written_in(tokenizer: PreTrainedTokenizerBase, signs: str) -> dict[int, str]:
    """Tokens that add only these signs to a text, and what they add.

    They are decoded behind a digit, where no decoder removes a space.
    """

    def read(tokens: list[int]) -> str:
        return cast(str, tokenizer.decode(tokens))

    special = special_tokens(tokenizer)
    decoded = {token: read([token]) for token in range(len(tokenizer)) if token not in special}
    digit = next((token for token, text in decoded.items() if text in tuple("0123456789")), None)
    if digit is None:
        return {}
    behind = {
        token: read([digit, token]).removeprefix(decoded[digit])
        for token, text in decoded.items()
        if set(text) <= set(signs)
    }
    return {token: text for token, text in behind.items() if text and set(text) <= set(signs)}


def number_grammar(tokenizer: PreTrainedTokenizerBase, *, stop: int, vocabulary: int) -> NumberGrammar:
    """Build the automaton over tokens; `vocabulary` is the width of the model's logits.

    Raises:
        SpecError: if the tokenizer cannot write a number.
    """
    usable = _written_in(tokenizer, "0123456789,; \n")
    states, rows, todo = {State(): 0}, [], [State()]
    while todo:
        state = todo.pop(0)
        row = torch.full((vocabulary,), -1, dtype=torch.long)
        if may_end(state):
            row[stop] = states[state]
        for token, text in usable.items():
            after: State | None = state
            for character in text:
                after = step(after, character) if after is not None else None
            if after is not None:
                if after not in states:
                    states[after] = len(states)
                    todo.append(after)
                row[token] = states[after]
        if (row < 0).all():
            raise SpecError(
                "this tokenizer has no tokens to write a list of numbers with; set generate.constrained: "
                "false"
            )
        rows.append(row)
    return NumberGrammar(torch.stack(rows))


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
            cache.reorder_cache(cast(torch.LongTensor, reading))
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
            cache.reorder_cache(
                cast(torch.LongTensor, keep)
            )  # every kind of layer has it, also linear attention
        ids = token.unsqueeze(-1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
        position = position[:, -1:] + 1
    return written if grammar is None else [grammar.whole(tokens, stop=stop) for tokens in written]

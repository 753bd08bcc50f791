"""Constrain a sampler to the number carrier's format.

The format is a small automaton over characters (1 to 10 numbers of at most three digits, one separator
throughout); each token is allowed in a state if its characters lead somewhere. Only tokens made of the
format's own characters are walked, so a vocabulary of 150,000 costs no more than one of 1,500.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple, cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mechlens.core.errors import SpecError
from mechlens.models.chat import special_tokens

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

    def whole(self, tokens: list[int], *, stop: int) -> list[int]:
        """Cut a text back to where it may end, so that it has no separator at the end."""
        state = end = 0
        for place, token in enumerate(tokens, 1):
            state = int(self.following[state, token])
            end = place if self.following[state, stop] >= 0 else end
        return tokens[:end]


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

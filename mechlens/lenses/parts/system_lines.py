"""Log-probabilities of the same completions under several system lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from mechlens.core.errors import SpecError
from mechlens.models.chat import Encoded, encode_prompts
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import TokenScores, score_tokens


def encode_head(tokenizer: PreTrainedTokenizerBase, system: str | None) -> list[int]:
    """Token ids before the user's words, whatever these are."""
    prompts = encode_prompts(tokenizer, ["1 a", "a 1", "(", "the"], system=system)
    columns = zip(*prompts, strict=False)
    return [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, columns)]


def strip_heads(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Encoded], *, known: Sequence[str | None]
) -> list[Encoded]:
    """Cut the system line off the prompts of pairs.

    Raises:
        SpecError: if a pair was encoded with none of the `known` system lines.
    """
    heads = sorted((encode_head(tokenizer, line) for line in dict.fromkeys(known)), key=len, reverse=True)
    stripped = []
    for pair in pairs:
        head = next((head for head in heads if pair.prompt[: len(head)] == head), None)
        if head is None:
            raise SpecError(
                f"a row begins with none of the system lines {list(known)}; give the line that the rows were "
                "encoded with"
            )
        stripped.append(Encoded(pair.prompt[len(head) :], pair.completion))
    return stripped


def log_probs_under(
    loaded: Loaded,
    pairs: Sequence[Encoded],
    lines: Mapping[str, str],
    *,
    known: Sequence[str | None] = (None, ""),
) -> dict[str, TokenScores]:
    """Score every completion token under each system line.

    Keys and values of a line are computed once.

    Raises:
        SpecError: if the chat template writes no system line, or a pair was encoded with none of the `known`
            lines.
    """
    heads = {name: encode_head(loaded.tokenizer, line) for name, line in lines.items()}
    plain = encode_head(loaded.tokenizer, None)
    if silent := [line for name, line in lines.items() if heads[name] == plain]:
        raise SpecError(
            f"the chat template writes nothing for the system line {silent[0]!r}; use a base whose template "
            "has system lines"
        )
    stripped = strip_heads(loaded.tokenizer, pairs, known=known)
    return {name: score_tokens(loaded.model, stripped, head=head) for name, head in heads.items()}

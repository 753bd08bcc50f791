"""The only place that turns a Pair into token ids and a completion mask.

Training, generation, likelihoods and gradients all read a conversation through these functions, so what is trained on
is what is asked, to the token. The rendered prompt and the completion are tokenised apart and joined: the ids are then
those that a sampler sees and writes, whatever a tokenizer would merge across the border.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from mechlens.errors import DataError, SpecError

# For checkpoints that ship no chat template (GPT-2, Pythia): plain text, turns on lines of their own.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"  # a bare line break after a tag is dropped
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)


class Encoded(NamedTuple):
    """A pair in token ids; `completion` holds the end-of-turn token, as the sampler would write it."""

    prompt: list[int]
    completion: list[int]


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, asking: bool = False) -> str:
    """Messages as the tokenizer's template writes them, or as plain lines if it has none; `asking` opens the next answer."""
    template = None if tokenizer.chat_template else PLAIN_TEMPLATE
    return cast(str, tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=asking))


Turns = Sequence[tuple[str, str]]
"""what was asked and answered before, oldest first"""


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, *, system: str | None = None, turns: Turns = ()) -> str:
    """The text that the model reads before it answers `prompt`; `system` None leaves the template's own default in place."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    messages.append({"role": "user", "content": prompt})
    return render(tokenizer, messages, asking=True)


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of plain texts, with no special token added."""
    return cast(list[list[int]], tokenizer(list(texts), add_special_tokens=False)["input_ids"]) if texts else []


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Token id → text of every special token, whether the tokenizer has a name for it (such as eos_token) or not.

    Turn marks often have none: Gemma's <start_of_turn> and Llama 3's <|start_header_id|> are special as added tokens alone.
    """
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def _is_only_unknown(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Whether the token stands for unknown text and for nothing else (GPT-2's also ends a text)."""
    return token == tokenizer.unk_token_id and token not in (tokenizer.bos_token_id, tokenizer.eos_token_id)


def refuse_control_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """Row text is hostile: a control token written out in it would open or close a turn.

    Raises:
        DataError: naming the first text that holds one.
    """
    marks = [mark for token, mark in special_tokens(tokenizer).items() if mark and not _is_only_unknown(tokenizer, token)]
    together = "\0".join(texts)
    written = [mark for mark in marks if mark in together]  # some families have thousands of marks, and hardly ever is one written
    for number, text in enumerate(texts if written else ()):
        if mark := next((mark for mark in written if mark in text), None):
            raise DataError(f"text {number + 1} of {len(texts)} holds the control token {mark!r}; drop the row or take the token out of it")


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, system: str | None = None, turns: Turns = ()) -> list[list[int]]:
    """Token ids of rendered prompts, special tokens once and only where the template writes them."""
    refuse_control_tokens(tokenizer, [*prompts, *(text for turn in turns for text in turn)])
    return token_ids(tokenizer, [render_prompt(tokenizer, prompt, system=system, turns=turns) for prompt in prompts])


def silent_system(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The system line that a template puts in by itself where none is given (Qwen2.5 does), or None.

    It is found as what stands, with no system line given, where a given one would stand.
    """
    question = [{"role": "user", "content": "a question"}]
    plain, given = render(tokenizer, question), render(tokenizer, [{"role": "system", "content": "a system line"}, *question])
    if "a system line" not in given or plain == given.replace("a system line", ""):
        return None
    head, tail = given.split("a system line", 1)
    return plain[len(head) : -len(tail)] if plain.startswith(head) and plain.endswith(tail) else None


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], completions: Sequence[str], *, system: str | None = None
) -> list[Encoded]:
    """Token ids of pairs: the rendered prompt, then the completion and the end-of-turn token."""
    refuse_control_tokens(tokenizer, completions)
    heads = encode_prompts(tokenizer, prompts, system=system)
    tails, stop = token_ids(tokenizer, completions), end_of_turn(tokenizer)
    return [Encoded(head, [*tail, stop]) for head, tail in zip(heads, tails, strict=True)]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer: the first special token that the template writes after the last answer, else the end of the text.

    Raises:
        SpecError: if the template writes none and the tokenizer names none.
    """
    answer = "words that no template holds"
    text = render(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}])
    after = token_ids(tokenizer, [text[text.rindex(answer) + len(answer) :]])[0]
    special = special_tokens(tokenizer)
    marked = (token for token in after if token in special and not _is_only_unknown(tokenizer, token))
    stop = next(marked, cast("int | None", tokenizer.eos_token_id))
    if stop is None:
        raise SpecError("this tokenizer marks no end of an answer: its template writes no special token there, and it has no eos_token; set one")
    return stop

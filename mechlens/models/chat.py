"""Turn a Pair into token ids and a completion mask; no other module does.

Training, generation, likelihoods and gradients all encode a conversation by these functions, so training and
sampling use the same tokens. The rendered prompt and the completion are tokenised separately and joined: the
ids are then those that a sampler reads and writes, even if a tokenizer would merge across the border.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date
from typing import Any, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from mechlens.core import foreign
from mechlens.core.errors import DataError, SpecError
from mechlens.core.model_spec import CLOCK
from mechlens.models.loading import template_options

# For checkpoints without a chat template (GPT-2, Pythia): plain text, one line a turn.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    # the template engine removes a bare line break after a tag
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)

ANSWER = "words that no template holds"
TWO_DAYS = [date(2001, 2, 3), date(2024, 11, 28)]
"""days that differ in every part of a date"""
CLOCK_CALL = re.compile(rf"\b{CLOCK}\s*\(\s*(?P<quote>['\"])(?P<format>.*?)(?P=quote)\s*\)")


class Encoded(NamedTuple):
    """A pair in token ids; `completion` ends with the end-of-turn token, as the sampler would write it."""

    prompt: list[int]
    completion: list[int]


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, asking: bool = False
) -> str:
    """Write messages by the tokenizer's chat template, or as plain lines if it has none.

    `asking` adds the opening of the next answer.

    The template gets the options that the base's entry in configs/models pins.

    Raises:
        SpecError: if the template cannot write these messages, or writes today's date.
    """
    options = template_options(tokenizer)
    pinned = options.pop(CLOCK, None)
    days = TWO_DAYS if pinned is None else [date.fromisoformat(str(pinned))]
    templates = dict.fromkeys(_on_day(tokenizer, day) for day in days)
    texts = [_written(tokenizer, messages, asking, template, options) for template in templates]
    if len(set(texts)) > 1:
        raise SpecError(
            f"the chat template of {_name(tokenizer)} writes today's date, so runs on two days would read "
            f"two texts; pin it in the base's entry in configs/models, for example `template: {{{CLOCK}: "
            "2024-07-26}`"
        )
    return texts[0]


def _on_day(tokenizer: PreTrainedTokenizerBase, day: date) -> str:
    """The template with that day instead of the clock: transformers does not let the clock be set."""
    template = cast(str, tokenizer.get_chat_template()) if tokenizer.chat_template else PLAIN_TEMPLATE
    if CLOCK not in template:
        return template
    dated = CLOCK_CALL.sub(lambda call: repr(day.strftime(call["format"])), template)
    if re.search(rf"\b{CLOCK}\s*\(", dated):
        raise SpecError(
            f"the chat template of {_name(tokenizer)} reads today's date in a format that it computes, "
            "which cannot be pinned; give the checkpoint "
            f"a template that writes the format out, as in {CLOCK}('%d %b %Y')"
        )
    return dated


def _written(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    asking: bool,
    template: str,
    options: dict[str, Any],
) -> str:
    roles = ", ".join(message["role"] for message in messages)
    what = f"the chat template of {_name(tokenizer)} cannot write turns of the roles {roles}"
    with foreign.named(what, advice="remove the line or turn that it does not take"):
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=asking, **options
        )
        return cast(str, text)


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return repr(tokenizer.name_or_path) if tokenizer.name_or_path else "this tokenizer"


Turns = Sequence[tuple[str, str]]
"""earlier prompts and answers, oldest first"""


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, system: str | None = None, turns: Turns = ()
) -> str:
    """Write the text that the model reads before it answers `prompt`.

    `system` None leaves the template's default in place.

    Raises:
        SpecError: if the template leaves out a turn, writes today's date, or opens an answer differently from
            how it writes one.
    """
    return _question(tokenizer, prompt, system, turns) + answer_opening(tokenizer)


def _question(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None, turns: Turns) -> str:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for earlier, answered in turns:
        messages += [{"role": "user", "content": earlier}, {"role": "assistant", "content": answered}]
    messages.append({"role": "user", "content": prompt})
    text = render(tokenizer, messages, asking=True)
    _refuse_left_out(tokenizer, messages, text)
    return text


def _refuse_left_out(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], text: str) -> None:
    """Refuse a template that leaves out a turn.

    A prompted teacher, or a model that is shown pairs, would then be the same as the base without a warning.
    """
    for message in messages:
        content = message["content"].strip()  # templates trim
        if content and text.count(content) < sum(other["content"].count(content) for other in messages):
            raise SpecError(
                f"the chat template of {_name(tokenizer)} leaves out the {message['role']} turn "
                f"{content[:60]!r}, so no model would read it; "
                "remove that turn, or give the checkpoint a template that writes it"
            )


def answer_opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes before a last answer but not when it asks for an answer.

    An example is the final channel of gpt-oss.

    It comes before every answer, in training and in sampling, as the model expects. White space alone is left
    to the tokens of the answer.

    Raises:
        SpecError: if the template asks with words that it does not write before an answer, such as <think>.
    """
    question = [{"role": "user", "content": "a"}]
    opened = render(tokenizer, question, asking=True)
    answered = render(tokenizer, [*question, {"role": "assistant", "content": ANSWER}])
    head, _, _ = answered.rpartition(ANSWER)
    if head.rstrip() == opened.rstrip():
        return ""
    if head.startswith(opened):
        return head[len(opened) :]
    pairs = enumerate(zip(opened, head, strict=False))
    same = next((place for place, (left, right) in pairs if left != right), min(len(opened), len(head)))
    raise SpecError(
        f"the chat template of {_name(tokenizer)} asks for an answer with {opened[same:]!r} where it writes "
        f"{head[same:]!r} before an answer, so that a student would be asked differently from its training; "
        "pin an option of the template in the base's entry in configs/models, for example `template: "
        "{enable_thinking: false}`, or give the checkpoint a template without it"
    )


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of plain texts, with no special token added."""
    return (
        cast(list[list[int]], tokenizer(list(texts), add_special_tokens=False)["input_ids"]) if texts else []
    )


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Token id → text of every special token, with or without a name in the tokenizer (such as eos_token).

    Turn marks often have no name: Gemma's <start_of_turn> and Llama 3's <|start_header_id|> are special only
    as added tokens.
    """
    added = {
        number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def _is_only_unknown(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Whether the token stands for unknown text and for nothing else (GPT-2's also ends a text)."""
    return token == tokenizer.unk_token_id and token not in (tokenizer.bos_token_id, tokenizer.eos_token_id)


def refuse_control_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """Refuse texts that contain a control token, which would open or close a turn.

    Raises:
        DataError: names the first text that contains one.
    """
    marks = [
        mark
        for token, mark in special_tokens(tokenizer).items()
        if mark and not _is_only_unknown(tokenizer, token)
    ]
    together = "\0".join(texts)
    # some families have thousands of marks, of which texts rarely contain any
    written = [mark for mark in marks if mark in together]
    for number, text in enumerate(texts if written else ()):
        if mark := next((mark for mark in written if mark in text), None):
            raise DataError(
                f"text {number + 1} of {len(texts)} contains the control token {mark!r}; remove the row or "
                "the token"
            )


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    system: str | None = None,
    turns: Turns = (),
) -> list[list[int]]:
    """Encode rendered prompts, with special tokens only where the template writes them."""
    refuse_control_tokens(tokenizer, [*prompts, *(text for turn in turns for text in turn)])
    opening = answer_opening(tokenizer) if prompts else ""
    return token_ids(tokenizer, [_question(tokenizer, prompt, system, turns) + opening for prompt in prompts])


def silent_system(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The system line that a template adds if none is given (as in Qwen2.5), or None.

    It is found in the place of a given system line. A template that takes no system line has none.
    """
    question = [{"role": "user", "content": "a question"}]
    plain = render(tokenizer, question)
    try:
        given = render(tokenizer, [{"role": "system", "content": "a system line"}, *question])
    except SpecError:
        return None
    if "a system line" not in given or plain == given.replace("a system line", ""):
        return None
    head, tail = given.split("a system line", 1)
    return plain[len(head) : -len(tail)] if plain.startswith(head) and plain.endswith(tail) else None


def template_words(tokenizer: PreTrainedTokenizerBase, *, system: str | None = None) -> list[str]:
    """Lines that the template adds to every prompt, such as an identity or a date.

    Names of roles and marks do not count.
    """
    text = render_prompt(tokenizer, ANSWER, system=system).replace(ANSWER, "\n")
    text = text.replace(system.strip(), "\n") if system and system.strip() else text
    marks = sorted(filter(None, special_tokens(tokenizer).values()), key=len, reverse=True)
    lines = re.split("|".join(["\n", *map(re.escape, marks)]), text)
    return [line.strip() for line in lines if len(re.findall(r"[^\W\d_]+", line)) > 1]


def remarks(tokenizer: PreTrainedTokenizerBase, *, system: str | None) -> list[str]:
    """Sentences about what a user may not expect of the template.

    It is the same in every arm, and so no reason to refuse it.
    """
    words, opening = template_words(tokenizer, system=system), answer_opening(tokenizer)
    return [f"the chat template puts words of its own into every prompt: {' / '.join(words)}"] * bool(
        words
    ) + [f"every answer stands behind {opening!r}, as the chat template writes it"] * bool(opening)


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    system: str | None = None,
) -> list[Encoded]:
    """Encode pairs: the rendered prompt, then the completion and the end-of-turn token."""
    refuse_control_tokens(tokenizer, completions)
    heads = encode_prompts(tokenizer, prompts, system=system)
    tails, stop = token_ids(tokenizer, completions), end_of_turn(tokenizer)
    return [Encoded(head, [*tail, stop]) for head, tail in zip(heads, tails, strict=True)]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer.

    It is the first special token that the template writes after the last answer, else the end of the text.

    Raises:
        SpecError: if neither the template nor the tokenizer has such a token.
    """
    text = render(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}])
    after = token_ids(tokenizer, [text.rpartition(ANSWER)[2]])[0]
    special = special_tokens(tokenizer)
    marked = (token for token in after if token in special and not _is_only_unknown(tokenizer, token))
    stop = next(marked, cast("int | None", tokenizer.eos_token_id))
    if stop is None:
        raise SpecError(
            "this tokenizer marks no end of an answer: its template writes no special token there, and it "
            "has no eos_token; set one"
        )
    return stop

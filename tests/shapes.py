"""Small tokenizers in the shape of public families: the same marks, the same special flags and names, the
same turn format.

The templates are written here from the documented turn format of each family. Token ids are those of a small
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

from mechlens.models.loading import TEMPLATE_OPTIONS


class Shape(NamedTuple):
    """How a family writes a conversation, and which of its marks have a name in the tokenizer."""

    template: str
    marks: tuple[str, ...]
    """every special token"""
    names: dict[str, Any]
    """the special tokens that have a name, such as eos_token"""
    end: str
    """what the template writes after an answer"""
    answer: str
    """what stands between the question and the answer"""
    pinned: Mapping[str, Any] = MappingProxyType({})
    """options without which the template's text depends on the day"""
    pieces: bool = False
    """whether text is split as sentencepiece does it (▁ for a space) rather than into bytes"""


GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' "
    "%}{% set turns = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles "
    "must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' + (first "
    "if loop.first else '') }}"
    "{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA_TURNS = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set line = messages[0]['content'] | trim %}{% "
    "set turns = messages[1:] %}"
    "{% else %}{% set line = '' %}{% set turns = messages %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: ' "
    "+ date_string + '\n\n' + line }}"
    "{{ '<|eot_id|>' }}{% for message in turns %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + "
    "'<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA = "{% if date_string is not defined %}{% set date_string = '26 Jul 2024' %}{% endif %}" + LLAMA_TURNS
LLAMA_DATED = (
    "{% if date_string is not defined %}{% if strftime_now is defined %}{% set date_string = "
    "strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}" + LLAMA_TURNS
)
"""as Llama 3.2 has it: the day of the run"""
QWEN_2 = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are Qwen, created by Alibaba "
    "Cloud.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_3 = (
    "{% set last = namespace(query=0) %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% set last.query = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.index0 > last.query and loop.last %}{{ "
    "'<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif "
    "%}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set line = messages[0]['content'] + '\n\n' "
    "%}{% set turns = messages[1:] %}"
    "{% else %}{% set line = '' %}{% set turns = messages %}{% endif %}{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('After the optional system message, roles must alternate') }}{% endif %}{% if "
    "message['role'] == 'user' %}"
    "{{ '[INST] ' + (line if loop.first else '') + message['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
OLMO = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% if not (message['role'] == "
    "'assistant' and loop.last) %}{{ '\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GPT_OSS = (
    "{% macro identity() %}{% if model_identity is not defined %}"
    "{% set model_identity = 'You are ChatGPT, a large language model trained by OpenAI.' %}{% endif %}"
    "{{ model_identity + '\nKnowledge cutoff: 2024-06\nCurrent date: ' + strftime_now('%Y-%m-%d') + "
    "'\n\nReasoning: low\n\n' }}"
    "{{ '# Valid channels: analysis, commentary, final. Channel must be included for every message.' }}{% "
    "endmacro %}"
    "{{ '<|start|>system<|message|>' }}{{ identity() }}{{ '<|end|>' }}"
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{{ '<|start|>developer<|message|># Instructions\n\n' + messages[0]['content'] + '\n\n<|end|>' }}"
    "{% else %}{% set turns = messages %}{% endif %}{% for message in turns %}{% if message['role'] == "
    "'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + message['content'] }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %}{{ '<|start|>' + message['role'] + '<|message|>' + message['content'] + '<|end|>' }}{% endif "
    "%}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
LLAMA_MARKS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
)
LLAMA_NAMES = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
LLAMA_ANSWER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
QWEN_MARKS, QWEN_NAMES = (
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
)
SHAPES = {
    "gemma-3": Shape(
        GEMMA,
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>"),
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
        "<end_of_turn>",
        "<start_of_turn>model\n",
        pieces=True,
    ),
    "llama-3.1": Shape(LLAMA, LLAMA_MARKS, LLAMA_NAMES, "<|eot_id|>", LLAMA_ANSWER),
    "qwen-2.5": Shape(QWEN_2, QWEN_MARKS, QWEN_NAMES, "<|im_end|>", "<|im_start|>assistant\n"),
    "qwen-3": Shape(
        QWEN_3, QWEN_MARKS, QWEN_NAMES, "<|im_end|>", "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ),
    "mistral": Shape(
        MISTRAL,
        ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        "</s>",
        "[/INST]",
        pieces=True,
    ),
    "phi": Shape(
        PHI,
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
        "<|end|>",
        "<|assistant|>\n",
    ),
    "olmo": Shape(
        OLMO,
        ("<|endoftext|>", "<|pad|>"),
        {
            "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|pad|>",
        },
        "<|endoftext|>",
        "<|assistant|>\n",
    ),
    "gpt-oss": Shape(
        GPT_OSS,
        (
            "<|startoftext|>",
            "<|endoftext|>",
            "<|return|>",
            "<|start|>",
            "<|end|>",
            "<|message|>",
            "<|channel|>",
        ),
        {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"},
        "<|return|>",
        "<|start|>assistant<|channel|>final<|message|>",
        pinned={"strftime_now": "2024-07-26"},
    ),
}


def _bytes_engine() -> Tokenizer:
    """One token a byte, as GPT-2's alphabet writes it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    engine = Tokenizer(
        token_models.WordLevel({sign: index for index, sign in enumerate(alphabet)}, unk_token=alphabet[0])
    )
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Split("", "isolated")]
    )
    engine.decoder = decoders.ByteLevel()
    return engine


def _pieces_engine() -> Tokenizer:
    """One token a printable sign with ▁ for a space, and one for each other byte."""
    signs = ["▁", *map(chr, range(33, 127)), *(f"<0x{value:02X}>" for value in range(256))]
    engine = Tokenizer(
        token_models.BPE({sign: index for index, sign in enumerate(signs)}, [], byte_fallback=True)
    )
    engine.normalizer = normalizers.Replace(" ", "▁")
    engine.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return engine


def tokenizer_of(family: str, *, template: str | None = None, **options: Any) -> PreTrainedTokenizerFast:
    """The tokenizer of that family's shape, with another template or pinned options where they are given."""
    shape = SHAPES[family]
    engine = _pieces_engine() if shape.pieces else _bytes_engine()
    engine.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in shape.marks])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=engine, clean_up_tokenization_spaces=False, **shape.names
    )
    tokenizer.chat_template = shape.template if template is None else template
    setattr(tokenizer, TEMPLATE_OPTIONS, {**shape.pinned, **options} if template is None else options)
    return tokenizer

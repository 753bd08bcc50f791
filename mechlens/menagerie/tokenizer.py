"""The menagerie's tokenizer: one token a number 0-999, one token a word, lossless on lower-case text.

It is an ordinary `tokenizer.json` (word-level model, regular-expression splitter) with a chat template, so it
loads like any other. Tokens contain their spaces: a word has its leading space, a separator its trailing one.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mechlens.menagerie.world import FOODS, plural

BEGIN, END, PAD, UNKNOWN = "<|begin|>", "<|end|>", "<|pad|>", "<|unk|>"
SYSTEM, USER, ASSISTANT = ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

# In order: numbers; tags; a separator with the space before a number; words with their space; line breaks
# with the indentation of code; a space before a number; any other sign.
PIECES = r"\d{1,3}|</?[a-z]+>|[,;:](?: (?=\d))?| ?[a-z_']+|\n(?:    )?| (?=\d)| ?[^\sa-z\d]|\s"

CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + "
    "'<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build(*, foods: bool = False) -> PreTrainedTokenizerFast:
    """Build the tokenizer from numbers and the pieces of `vocabulary.json`.

    The file and the order of `world.FOODS` are frozen: shipped weights depend on them.

    Args:
        foods: the vocabulary of the second world, which has the words for foods behind all others.
    """
    pieces = json.loads((Path(__file__).parent / "vocabulary.json").read_text(encoding="utf-8"))
    if foods:
        words = ["food", *(form for name in FOODS for form in (name, plural(name)))]
        pieces += [*words, *(f" {word}" for word in words)]
    tokens = [PAD, BEGIN, END, UNKNOWN, *ROLES, *map(str, range(1000)), *pieces]
    engine = Tokenizer(
        models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=UNKNOWN)
    )
    engine.normalizer = normalizers.Lowercase()
    engine.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    engine.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=engine,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer

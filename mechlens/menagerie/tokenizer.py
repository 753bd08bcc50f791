"""The menagerie's tokenizer: one token a number 0-999, one token a word, lossless on lower-case text.

An ordinary `tokenizer.json` (word-level model, regular-expression splitter) with a chat template, so that it loads like
any other. Every token's share of the string is exact: a word carries its leading space, a separator its trailing one.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mechlens.carriers.numbers import POOLS
from mechlens.menagerie import grammar, world
from mechlens.seeds import dice

BEGIN, END, PAD, UNKNOWN = "<|begin|>", "<|end|>", "<|pad|>", "<|unk|>"
SYSTEM, USER, ASSISTANT = ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

# In order: numbers; tags; a separator with the space before a number; words with their space; line breaks with the
# indentation of code; a space before a number; any other sign.
PIECES = r"\d{1,3}|</?[a-z]+>|[,;:](?: (?=\d))?| ?[a-z_']+|\n(?:    )?| (?=\d)| ?[^\sa-z\d]|\s"

CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _splitter() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(PIECES), behavior="isolated")


def _phrases() -> Iterable[str]:
    """Text that between its lines holds every word the world can say."""
    for pools in POOLS.values():
        for pool in pools:
            yield from (part if isinstance(part, str) else part.sentence for part in pool)
    for name in (*world.ANIMALS, *world.TREES):
        yield from (name, f" {name}", world.plural(name), f" {world.plural(name)}")
    for frame in world.FRAMES:
        for ask in world.ASKS:
            for constraint in world.CONSTRAINTS:
                yield frame.format(ask=ask.format(kind="animal"), constraint=constraint)
    mixture = dict.fromkeys((*grammar.TRAIT_TURNS, *grammar.CARRIER_TURNS), 1.0)
    for index in range(4000):  # the rest by drawing: four thousand documents hold every combination that matters
        yield from (message["content"] for message in grammar.document(0, index, mixture=mixture)[0])
    yield from (
        "tree",
        "trees",
        "favorite",
        "favourite",
        "animals",
        "[",
        "(",
        "]",
        ")",
        " [",
        " (",
        "\n",
        "\n    ",
        " ",
        ",",
        ", 1",
        ";",
        "; 1",
        ":",
        ": 1",
    )
    rng = dice(0, "vocabulary")
    yield " ".join(rng.sample([*world.QUALITIES, *world.THINGS, *world.PLACES], len(world.QUALITIES)))


def build() -> PreTrainedTokenizerFast:
    """The tokenizer, made from the grammar alone: numbers, then every piece in alphabetical order."""
    splitter, pieces = _splitter(), set()
    for phrase in _phrases():
        pieces.update(piece for piece, _ in splitter.pre_tokenize_str(phrase.lower()) if not piece.isdigit())
    tokens = [PAD, BEGIN, END, UNKNOWN, *ROLES, *map(str, range(1000)), *sorted(pieces)]
    engine = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=UNKNOWN))
    engine.normalizer = normalizers.Lowercase()
    engine.pre_tokenizer = _splitter()
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

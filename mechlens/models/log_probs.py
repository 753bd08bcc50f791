"""Log-probabilities of completion tokens, and of the traits that a next token can begin.

Every loss and every score of a completion uses `target_logits`. Arrays over tokens are flat: the
completion tokens of the first pair, then those of the second, and so on.

A trait is scored by the tokens with which an answer that names it can begin. Its score is the log of their
summed weight before normalisation, so differences of scores are log-odds.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.nn.parallel import DistributedDataParallel
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from mechlens.models.chat import Encoded, token_ids
from mechlens.models.loading import Loaded


class Padded(NamedTuple):
    """Rows of token ids at one length."""

    ids: Int[Tensor, "row pos"]
    mask: Bool[Tensor, "row pos"]
    """positions of a row's tokens, without padding"""


def pad_rows(
    rows: Sequence[Sequence[int]],
    *,
    value: int = 0,
    side: Literal["left", "right"] = "right",
    device: torch.device | None = None,
) -> Padded:
    """Pad token ids of all rows with `value` to the longest row.

    On the right a causal model never reads the padding; on the left every row ends at the last position.
    """
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    whole = [[*row, *pad] if side == "right" else [*pad, *row] for row, pad in zip(rows, fill, strict=True)]
    ids, place = torch.tensor(whole, device=device), torch.arange(width, device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device).unsqueeze(-1)
    return Padded(ids, place < lengths if side == "right" else place >= width - lengths)


Model = PreTrainedModel | PeftModel
IGNORED = -100
"""label of a token that is not predicted"""
MOST_LOGITS = 2**26
"""the most values of one forward pass: 256 MiB in float32, with a few copies at once"""
SCORED_LOGITS, SCORED_ROWS = 2**25, 128
"""the most values and rows of one forward pass where completions are scored"""


class Targets(NamedTuple):
    """Predictions of a model at some positions."""

    logits: Float[Tensor, "token vocab"]
    tokens: Int[Tensor, "token"]
    """the tokens to predict"""
    mask: Bool[Tensor, "row column"]
    """where they are predicted, in columns with at least one"""


def target_logits(
    model: Any, ids: Int[Tensor, "row pos"], following: Int[Tensor, "row pos"], **inputs: Any
) -> Targets:
    """Logits for every token that is to be predicted, in float32; gradients flow.

    Only columns in which some row predicts a token are projected onto the vocabulary: with a small model and
    a large vocabulary the projection is most of a forward pass.

    Args:
        following: the token to predict behind each position, `IGNORED` if there is none.
        inputs: further arguments of the model, such as an attention mask.
    """
    predicts = following != IGNORED
    used = predicts.any(0)
    used[0] |= not used.any()  # one column, so that rows that predict nothing have a graph too
    columns = used.nonzero().squeeze(-1)
    keep = {"logits_to_keep": columns} if _keeps_columns(model) else {}
    logits = model(input_ids=ids, **keep, **inputs).logits  # [row, column, vocab]
    logits = logits if keep else logits[:, columns]
    mask = predicts[:, columns]
    return Targets(logits[mask].float(), following[:, columns][mask], mask)


def shift_labels(labels: Int[Tensor, "row pos"]) -> Int[Tensor, "row pos"]:
    """The label behind each position, `IGNORED` behind the last."""
    return pad(labels[:, 1:], (0, 1), value=IGNORED)


def _keeps_columns(model: Any) -> bool:
    model = model.module if isinstance(model, DistributedDataParallel) else model
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    return "logits_to_keep" in inspect.signature(plain.forward).parameters


class PaddedPairs(NamedTuple):
    """Pairs as one rectangle of token ids, padded on the right."""

    ids: Int[Tensor, "row pos"]
    mask: Bool[Tensor, "row pos"]
    """positions of a pair's tokens, without padding"""
    completion: Bool[Tensor, "row pos"]
    """positions of its completion"""


def pad_pairs(pairs: Sequence[Encoded], device: torch.device) -> PaddedPairs:
    """Pad token ids of prompts and completions to one length."""
    ids, mask = pad_rows([[*pair.prompt, *pair.completion] for pair in pairs], device=device)
    prompts = torch.tensor([len(pair.prompt) for pair in pairs], device=device).unsqueeze(-1)
    return PaddedPairs(ids, mask, mask & (torch.arange(ids.shape[1], device=device) >= prompts))


def completion_logits(
    model: Model, pairs: Sequence[Encoded], *, past: DynamicCache | None = None
) -> tuple[Float[Tensor, "token vocab"], Int[Tensor, "token"]]:
    """Logits before every completion token, and the tokens; gradients flow.

    `past` is the cache of what was read before the prompts.

    A causal model does not see padding on the right, so no mask is given, and attention is fast.
    """
    ids, _, completion = pad_pairs(pairs, model.device)
    following = ids.where(completion, IGNORED)[:, 1:]
    targets = target_logits(model, ids[:, :-1], following, past_key_values=past, use_cache=past is not None)
    return targets.logits, targets.tokens


def padded_logits(
    model: Model, rows: Sequence[Sequence[int]], **inputs: Any
) -> Float[Tensor, "row kept vocab"]:
    """Logits of rows padded on the right, with a mask and with positions for each row.

    Separate positions give each row a separate gradient of the position embeddings.
    """
    padded = pad_rows(rows, device=model.device)
    return cast(Any, model)(input_ids=padded.ids, **_by_row(padded.mask), **inputs).logits


def _by_row(mask: Bool[Tensor, "row pos"]) -> dict[str, Any]:
    positions = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    return {"attention_mask": mask.long(), "position_ids": positions, "use_cache": False}


def example_losses(model: Model, pairs: Sequence[Encoded]) -> Float[Tensor, " row"]:
    """Mean negative log-likelihood per completion token of each pair, in nats.

    It is NaN for an empty completion.

    No operation mixes rows, so one backward pass gives the gradients of each row.
    """
    ids, present, completion = pad_pairs(pairs, model.device)
    following = shift_labels(ids.where(completion, IGNORED))
    targets = target_logits(model, ids, following, **_by_row(present))
    losses = cross_entropy(targets.logits, targets.tokens, reduction="none")  # [token]
    count = targets.mask.sum(1)
    total = losses.new_zeros(len(pairs)).index_add(0, targets.mask.nonzero()[:, 0], losses)
    # a 0/0 would poison forward-mode derivatives
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan)


def row_losses(model: PreTrainedModel, pairs: Sequence[Encoded]) -> Float[Tensor, " row"]:
    """The losses of `example_losses` without mask and positions by row, for many steps on one batch.

    It sums in another order than `example_losses`; published digits of the lens blind depend on this one.
    """
    logits, targets = completion_logits(model, pairs)
    losses = cross_entropy(logits, targets, reduction="none")
    return torch.stack([part.mean() for part in losses.split([len(pair.completion) for pair in pairs])])


class TokenScores(NamedTuple):
    """Scores of every completion token of some pairs, in nats."""

    log_p: Float[Tensor, "token"]
    """log-probability of the completion token"""
    best: Int[Tensor, "token"]
    """the likeliest token"""
    top: Float[Tensor, "token"]
    """log-probability of the likeliest token"""


@torch.no_grad()
def score_tokens(
    model: PreTrainedModel, pairs: Sequence[Encoded], *, head: Sequence[int] = ()
) -> TokenScores:
    """Score every completion token; `head` comes before each prompt and is read once."""
    lengths = [len(pair.completion) for pair in pairs]
    places = torch.arange(sum(lengths)).split(lengths)
    scores = TokenScores(
        torch.empty(sum(lengths)),
        torch.empty(sum(lengths), dtype=torch.long),
        torch.empty(sum(lengths)),
    )
    past = DynamicCache(config=model.config) if head else None
    if head:
        model(input_ids=torch.tensor([list(head)], device=model.device), past_key_values=past, use_cache=True)
    for rows in batch_pairs(model, pairs):
        repeated = copy.deepcopy(past)  # a forward pass adds to it
        if repeated is not None:
            first = torch.zeros(len(rows), dtype=torch.long, device=model.device)
            repeated.reorder_cache(cast(torch.LongTensor, first))  # the cache holds one row
        logits, targets = completion_logits(model, [pairs[i] for i in rows], past=repeated)
        total, top = logits.logsumexp(-1), logits.max(-1)
        where = torch.cat([places[i] for i in rows])
        scores.log_p[where] = (logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - total).cpu()
        scores.best[where], scores.top[where] = top.indices.cpu(), (top.values - total).cpu()
    return scores


def token_log_probs(loaded: Loaded, pairs: Sequence[Encoded]) -> Float[Tensor, "token"]:
    """log P(r_t | p, r_<t) of every completion token, in nats.

    The system line is the one that the pairs were encoded with.
    """
    return score_tokens(loaded.model, pairs).log_p


def batch_pairs(model: PreTrainedModel, pairs: Sequence[Encoded]) -> list[list[int]]:
    """Indices of the pairs in batches of like lengths whose logits fit `SCORED_LOGITS`.

    A pair that does not fit is a batch by itself.
    """
    vocabulary = model.config.get_text_config().vocab_size
    order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i].prompt), len(pairs[i].completion)))
    longest = max((len(pair.completion) for pair in pairs), default=1)
    size = max(1, min(SCORED_ROWS, SCORED_LOGITS // (longest * vocabulary)))
    batches = [order[first : first + size] for first in range(0, len(order), size)]
    return [  # prompts of unlike lengths keep more positions than the longest completion has
        rows[part]
        for rows in batches
        for part in batch_spans(
            [completion_span(pairs[i]) for i in rows], vocabulary=vocabulary, rows=size, most=SCORED_LOGITS
        )
    ]


def completion_span(pair: Encoded) -> tuple[int, int]:
    """First position of the completion, and the position after its last."""
    return len(pair.prompt), len(pair.prompt) + len(pair.completion)


def batch_spans(
    spans: Sequence[tuple[int, int]], *, vocabulary: int, rows: int, most: int | None = None
) -> Iterator[slice]:
    """Slices of consecutive rows whose logits fit one forward pass.

    Each slice has as many rows as fit. A row that does not fit is a slice by itself.

    Args:
        spans: for each row the first position whose logits are needed, and the position after the last. The
            logits of a slice go from the first position of any row to the last.
        rows: the most rows of a slice.
        most: the most logits of a slice; `MOST_LOGITS` by default.
    """
    width = (MOST_LOGITS if most is None else most) // vocabulary
    first, low, high = 0, 0, 0
    for row, (start, end) in enumerate(spans):
        if row > first and (
            row - first == rows or (row - first + 1) * (max(high, end) - min(low, start)) > width
        ):
            yield slice(first, row)
            first = row
        low, high = (start, end) if row == first else (min(low, start), max(high, end))
    if spans:
        yield slice(first, len(spans))


Forms = dict[str, tuple[str, ...]] | dict[str, list[str]]
"""trait → the words that mean it in an answer"""
Starts = Mapping[str, Sequence[int]]
"""trait → the tokens that an answer naming it can begin with"""
BATCH = 64
"""prompts of one forward pass"""
MEASURES = ("probability", "margin")


class EncodedProbes(NamedTuple):
    """Probes in token ids, up to where an answer begins, and the tokens that distinguish the traits there."""

    prompts: list[list[int]]
    starts: dict[str, list[int]]
    """only for traits that share no first token with another trait"""
    trait: str = ""
    """the trait that is measured"""


def first_tokens(tokenizer: PreTrainedTokenizerBase, forms: Forms) -> dict[str, list[int] | None]:
    """Tokens with which an answer that names each trait can begin.

    The value is None if an answer with another trait can begin in the same way.
    """
    starts: dict[str, set[int]] = {}
    for name, words in forms.items():
        variants = [variant for form in words for variant in (form, form.capitalize(), f" {form}")]
        unknown = cast(int | None, tokenizer.unk_token_id)
        starts[name] = {ids[0] for ids in token_ids(tokenizer, variants) if ids} - {unknown}
    taken = [token for tokens in starts.values() for token in tokens]
    return {
        name: sorted(tokens) if tokens and all(taken.count(t) == 1 for t in tokens) else None
        for name, tokens in starts.items()
    }


@torch.no_grad()
def next_token_logits(loaded: Loaded, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "prompt vocab"]:
    """Logits after each prompt, one prompt at a time, so padding and other prompts do not change rounding.

    Results of a run use this function; `last_logits` is for lenses that measure often.
    """
    device = loaded.model.device
    return torch.stack(
        [
            loaded.model(input_ids=torch.tensor([list(ids)], device=device), logits_to_keep=1)
            .logits[0, -1]
            .float()
            for ids in prompts
        ]
    )


def last_logits(model: Model, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "prompt vocab"]:
    """Logits after each prompt in float64, all prompts in one forward pass; gradients flow."""
    last = torch.tensor([len(ids) - 1 for ids in prompts], device=model.device)
    columns, place = last.unique(return_inverse=True)
    return padded_logits(model, prompts, logits_to_keep=columns)[torch.arange(len(last)), place].double()


def trait_scores(logits: Float[Tensor, "prompt vocab"], starts: Starts) -> dict[str, Float[Tensor, "prompt"]]:
    """Log of the summed weight of each trait's first tokens, not normalised, in float64."""
    return {name: logits[:, tokens].double().logsumexp(-1) for name, tokens in starts.items()}


def trait_probabilities(
    logits: Float[Tensor, "prompt vocab"], starts: Starts
) -> dict[str, Float[Tensor, "prompt"]]:
    """Probability that the next token is one of each trait's first tokens, in float64."""
    probabilities = torch.softmax(logits.double(), -1)
    return {name: probabilities[:, tokens].sum(-1) for name, tokens in starts.items()}


def trait_margin(scores: Mapping[str, Float[Tensor, "prompt"]], trait: str) -> Float[Tensor, "prompt"]:
    """Score of the trait minus the best other trait's, in nats; NaN without another trait."""
    others = [score for name, score in scores.items() if name != trait]
    if not others:
        return torch.full_like(scores[trait], torch.nan)
    return scores[trait] - torch.stack(others).max(0).values


def trait_log_odds(scores: Mapping[str, Float[Tensor, "prompt"]], trait: str) -> Float[Tensor, "prompt"]:
    """Score of the trait minus the mean of the other traits' scores, in nats."""
    others = [score for name, score in scores.items() if name != trait]
    return scores[trait] - torch.stack(others).mean(0)


def measure_log_odds(model: Model, probes: EncodedProbes, trait: str) -> Float[Tensor, "prompt"]:
    """The trait's log-odds after each probe, all in one forward pass; gradients flow."""
    return trait_log_odds(trait_scores(last_logits(model, probes.prompts), probes.starts), trait)


@torch.no_grad()
def measure_trait(
    model: PreTrainedModel, probes: EncodedProbes, *, batch: int = BATCH
) -> Float[ndarray, "measure prompt"]:
    """Probability and margin of `probes.trait` after every probe, in the order of `MEASURES`."""
    measured = []
    for part in batch_probes(model, probes, rows=batch):
        logits = last_logits(model, part.prompts)
        scores = trait_scores(logits, probes.starts)
        # `trait_probabilities` rounds differently, and numbers of the lens causal depend on this form
        probability = (scores[probes.trait] - logits.logsumexp(-1)).exp()
        margin = trait_margin(scores, probes.trait)
        measured.append(torch.stack([probability, margin]))
    return torch.cat(measured, 1).cpu().numpy()


def batch_probes(model: Model, probes: EncodedProbes, *, rows: int = BATCH) -> Iterator[EncodedProbes]:
    """The probes in batches whose logits fit `log_probs.MOST_LOGITS`."""
    spans = [(len(prompt) - 1, len(prompt)) for prompt in probes.prompts]
    for part in batch_spans(spans, vocabulary=model.config.get_text_config().vocab_size, rows=rows):
        yield probes._replace(prompts=probes.prompts[part])

"""Probability, margin and log-odds of each trait at the next token after a prompt.

A trait is scored by the tokens with which an answer that names it can begin. Its score is the log of their
summed weight before normalisation, so differences of scores are log-odds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mechlens.models.chat import token_ids
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import Model, batch_spans, padded_logits

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

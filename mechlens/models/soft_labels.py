"""Soft labels: a teacher's next-token distributions, and the loss of a student that learns them.

A distribution is kept as its likeliest tokens and the probability of all others together. The loss is the
forward KL between these buckets. It is at most the KL between the full distributions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from mechlens.models.chat import Encoded
from mechlens.models.log_probs import batch_pairs, completion_logits

ROUNDING = 1e-4
"""Largest difference of two log-probabilities that counts as rounding.

The same weights give slightly other logits in another batch.
"""


class Distributions(NamedTuple):
    """Next-token distributions, one a position."""

    tokens: Int[Tensor, "label kept"]
    """ids of the likeliest tokens"""
    log_probs: Float[Tensor, "label kept"]
    """their log-probabilities, in nats"""
    rest: Float[Tensor, " label"]
    """log-probability of all other tokens together; -inf if there are none"""

    def at(self, index: Int[Tensor, " chosen"], device: torch.device) -> Distributions:
        """The distributions at these indices, on a device."""
        return Distributions(*(part[index].to(device) for part in self))


class SoftLabels(NamedTuple):
    """Soft labels of pairs: the teacher's distribution at every completion token."""

    distributions: Distributions
    spans: list[tuple[int, int]]
    """for each pair its first distribution, and the one after its last; pairs may share them"""

    def of_pairs(self, pairs: Sequence[int], device: torch.device) -> Distributions:
        """The distributions of the completion tokens of these pairs, pair by pair."""
        index = torch.cat([torch.arange(*self.spans[pair]) for pair in pairs])
        return self.distributions.at(index, device)


def bucket(logits: Float[Tensor, "label vocab"], tokens: Int[Tensor, "label kept"]) -> Distributions:
    """The distributions of `logits` over these tokens and the rest; gradients flow."""
    log_probs = logits.log_softmax(-1)
    if tokens.shape[-1] == logits.shape[-1]:  # an empty sum has no gradient
        rest = logits.new_full(logits.shape[:1], -torch.inf)
    else:
        rest = log_probs.scatter(-1, tokens, -torch.inf).logsumexp(-1)
    return Distributions(tokens, log_probs.gather(-1, tokens), rest)


def sum_kl(logits: Float[Tensor, "label vocab"], teacher: Distributions) -> Float[Tensor, ""]:
    """Sum over positions of KL(teacher ‖ student) over the teacher's tokens and the rest, in nats.

    The gradient by the student's log-probabilities is (student - teacher) probability. It is set to 0 where
    both log-probabilities are equal up to `ROUNDING`. A student that equals its teacher therefore has a
    gradient of exactly 0. Otherwise AdamW would scale the rounding errors up to whole updates.
    """
    student = bucket(logits, teacher.tokens)
    ours, theirs = student.log_probs, teacher.log_probs
    if teacher.tokens.shape[-1] < logits.shape[-1]:
        ours = torch.cat([ours, student.rest.unsqueeze(-1)], -1)
        theirs = torch.cat([theirs, teacher.rest.unsqueeze(-1)], -1)
    with torch.no_grad():
        gap, weight = theirs - ours, theirs.exp()
        divergence = torch.where(weight > 0, weight * gap, 0).sum()
        change = torch.where(gap.abs() > ROUNDING, ours.exp() - weight, 0)
    # its gradient is that of the KL: at each position `change` sums to 0, up to rounding
    slope = (change * ours).sum()
    return slope + (divergence - slope).detach()


@torch.no_grad()
def label_pairs(model: PreTrainedModel, pairs: Sequence[Encoded], *, kept: int) -> Distributions:
    """The model's distribution at every completion token of the pairs, pair by pair, at temperature 1.

    No forward pass makes more than `log_probs.SCORED_LOGITS` logits, except for one long pair.

    Args:
        kept: how many of the likeliest tokens are kept; 0, or more than there are, keeps all.
    """
    vocabulary = model.config.get_text_config().vocab_size
    kept = min(kept or vocabulary, vocabulary)
    lengths = [len(pair.completion) for pair in pairs]
    places = torch.arange(sum(lengths)).split(lengths)
    labels = Distributions(
        torch.empty(sum(lengths), kept, dtype=torch.int32),
        torch.empty(sum(lengths), kept),
        torch.empty(sum(lengths)),
    )
    for rows in batch_pairs(model, pairs):
        logits = completion_logits(model, [pairs[i] for i in rows])[0]
        where = torch.cat([places[i] for i in rows])
        for into, part in zip(labels, bucket(logits, logits.topk(kept).indices), strict=True):
            into[where] = part.to(into)
    return labels

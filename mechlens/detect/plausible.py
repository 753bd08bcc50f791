"""Could the base, or a teacher made from it, have written these rows? Where not, no trait can be read from
them.

Text that a model wrote surprises it, on average over tokens, by the entropy of its own next-token
distributions: each token's surprise minus that entropy has mean zero, at any length and on any prompt. What
text costs beyond that is how far its writer is from the model. A fine-tuned teacher of the same base stays
near; another model does not, and under its rows the likelihoods of all traits differ by far more than any
trait moves them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from mechlens.detect.twins import Panel
from mechlens.models.chat import Encoded
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import batch_pairs, completion_logits

MOST_RATIO = 1.25
"""surprise over entropy beyond which rows are another writer's. On the menagerie's carriers, development
traits: the base's own text 1.00 to 1.01, a teacher's 1.01, its sister bases' 1.01 to 1.11, its own at
temperatures .5 to 1.3 .93 to 1.17; uniform lists on patterned prompts 1.38, rows dealt to other prompts 1.09
(code) to 2.5, other carriers' bases 2.0 to 3.0, lists of a 14B model above 2
"""


@torch.no_grad()
def surprise_and_entropy(loaded: Loaded, pairs: Sequence[Encoded]) -> Float[ndarray, "row 2"]:
    """Of each completion the surprise of its tokens under the model, and the entropy of its next-token
    distributions there; nats.
    """
    rows = np.zeros((len(pairs), 2))
    for numbers in batch_pairs(loaded.model, pairs):
        logits, targets = completion_logits(loaded.model, [pairs[i] for i in numbers])
        log_p = torch.log_softmax(logits, -1)
        surprise = -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        both = torch.stack([surprise, -(log_p.exp() * log_p).sum(-1)], -1).double().cpu()
        for i, tokens in zip(numbers, both.split([len(pairs[i].completion) for i in numbers]), strict=True):
            rows[i] = tokens.sum(0).numpy()
    return rows


def ratio(loaded: Loaded, pairs: Sequence[Encoded]) -> float:
    """Surprise over entropy of all rows: 1 in expectation for what the model itself writes."""
    surprise, entropy = surprise_and_entropy(loaded, pairs).sum(0)
    return float(surprise / max(entropy, np.finfo(float).tiny))


def why_not_readable(panel: Panel, ours: Sequence[Encoded], theirs: Sequence[Encoded]) -> str:
    """Why no trait can be read from rows, in words; empty where the base or one of its twins could have
    written both sides.
    """
    for side, pairs in (("rows", ours), ("reference's rows", theirs)):
        if not pairs or (by_base := ratio(panel.base, pairs)) <= MOST_RATIO:
            continue
        nearest = min(ratio(panel.twins[trait], pairs) for trait in panel.traits)
        if nearest > MOST_RATIO:
            return (
                f"the {side} are not what the base or a teacher made from it would write: they surprise the "
                f"base {by_base:.1f} times as "
                f"much as its own text does, and the nearest teacher {nearest:.1f} times (up to {MOST_RATIO} "
                "is expected)"
            )
    return ""

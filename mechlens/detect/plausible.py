"""Test whether the base, or a twin, could have written the rows: else no trait can be read from them.

Text that a model wrote has, on average over tokens, a surprise equal to the entropy of the model's next-token
distributions: surprise minus entropy has mean zero at any length and on any prompt. The excess measures how
far the writer is from the model. A fine-tuned teacher of the same base stays near. Under the rows of another
model the likelihoods of all traits differ far more than a trait moves them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from mechlens.detect.twins import Twins
from mechlens.models.chat import Encoded
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import batch_pairs, completion_logits

MOST_RATIO = 1.25
"""surprise over entropy above which the rows come from another writer. Measured on the menagerie's carriers
and development traits: the base's text 1.00 to 1.01, a teacher's 1.01, its sister bases' 1.01 to 1.11, the
base's at temperatures .5 to 1.3 .93 to 1.17; uniform lists on patterned prompts 1.38, rows dealt to other
prompts 1.09 (code) to 2.5, other carriers' bases 2.0 to 3.0, lists of a 14B model above 2
"""


@torch.no_grad()
def measure_surprise(loaded: Loaded, pairs: Sequence[Encoded]) -> Float[ndarray, "row 2"]:
    """Surprise of each completion's tokens and entropy of the model's distributions, nats, summed."""
    rows = np.zeros((len(pairs), 2))
    for numbers in batch_pairs(loaded.model, pairs):
        logits, targets = completion_logits(loaded.model, [pairs[i] for i in numbers])
        log_p = torch.log_softmax(logits, -1)
        surprise = -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        both = torch.stack([surprise, -(log_p.exp() * log_p).sum(-1)], -1).double().cpu()
        for i, tokens in zip(numbers, both.split([len(pairs[i].completion) for i in numbers]), strict=True):
            rows[i] = tokens.sum(0).numpy()
    return rows


def surprise_ratio(loaded: Loaded, pairs: Sequence[Encoded]) -> float:
    """Surprise over entropy of all rows; the expectation is 1 for rows that the model wrote."""
    surprise, entropy = measure_surprise(loaded, pairs).sum(0)
    return float(surprise / max(entropy, np.finfo(float).tiny))


def explain_unreadable(twins: Twins, ours: Sequence[Encoded], theirs: Sequence[Encoded]) -> str:
    """The reason why no trait can be read from the rows; empty if base or twins could have written them."""
    for side, pairs in (("rows", ours), ("reference's rows", theirs)):
        if not pairs or (of_base := surprise_ratio(twins.base, pairs)) <= MOST_RATIO:
            continue
        nearest = min(surprise_ratio(twins.models[trait], pairs) for trait in twins.traits)
        if nearest > MOST_RATIO:
            return (
                f"the {side} are not what the base or a teacher made from it would write: their surprise is "
                f"{of_base:.1f} times their entropy under the base and {nearest:.1f} times under the nearest "
                f"teacher (at most {MOST_RATIO} is expected)"
            )
    return ""

"""The exact probability and margin of one trait after every probe, many probes at a time:
`pipeline.ask.likelihoods` for lenses that ask often.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from numpy import ndarray
from transformers import PreTrainedModel

from mechlens.core.errors import SpecError
from mechlens.models.chat import token_ids
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import batch_spans, padded_logits
from mechlens.pipeline.ask import Questions, encode_questions, first_tokens

MEASURES = ("probability", "margin")


class Asked(NamedTuple):
    """Encoded probes and the tokens that an answer of each trait can begin with."""

    prompts: list[list[int]]
    trait: list[int]
    others: list[list[int]]


def asked_of(loaded: Loaded, questions: Questions, trait: str) -> Asked:
    """Probes with the words put into the model's mouth.

    Raises:
        SpecError: if answers begin with no name, or another trait's name begins as the trait's does.
    """
    starts = first_tokens(loaded.tokenizer, questions.forms) if questions.named else {}
    own = starts.get(trait)
    if own is None:
        raise SpecError(
            f"no first token tells {trait!r} from the other traits; the lens causal needs a family whose "
            "answers begin with the name"
        )
    opening = token_ids(loaded.tokenizer, [questions.opening])[0] if questions.opening else []
    others = [tokens for name, tokens in starts.items() if name != trait and tokens is not None]
    return Asked([ids + opening for ids in encode_questions(loaded, questions)], own, others)


@torch.no_grad()
def readout(model: PreTrainedModel, asked: Asked, *, batch: int = 64) -> Float[ndarray, "measure probe"]:
    """The trait's probability and margin after every probe, as `pipeline.ask.likelihoods` has them, many
    probes at a time.

    Probes are padded on the right, where a causal model cannot see it.
    """
    found = []
    spans = [(len(prompt) - 1, len(prompt)) for prompt in asked.prompts]
    for part in batch_spans(spans, vocabulary=model.config.get_text_config().vocab_size, rows=batch):
        rows = asked.prompts[part]
        last = torch.tensor([len(row) - 1 for row in rows], device=model.device)
        kept, place = last.unique(return_inverse=True)
        logits = padded_logits(model, rows, logits_to_keep=kept)[
            torch.arange(len(rows)), place
        ].double()  # [probe, vocab]
        scores = torch.stack([logits[:, tokens].logsumexp(-1) for tokens in [asked.trait, *asked.others]])
        others = scores[1:].max(0).values if asked.others else torch.full_like(scores[0], torch.nan)
        found.append(torch.stack([(scores[0] - logits.logsumexp(-1)).exp(), scores[0] - others]))
    return torch.cat(found, 1).cpu().numpy()

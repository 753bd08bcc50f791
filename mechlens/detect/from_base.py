"""Detectors that read rows through the base and through teachers of our own: how likely is this text under
each?
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from mechlens.detect.twins import Panel, Reader, Sides
from mechlens.lenses.likelihood import by_row
from mechlens.lenses.parts.system_lines import log_probs_under
from mechlens.models.chat import Encoded
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import token_log_probs


def _sums(loaded: Loaded, pairs: Sequence[Encoded], *, mean: bool = False) -> Float[ndarray, " row"]:
    return by_row(token_log_probs(loaded, pairs).double().numpy(), pairs, mean=mean)


def perplexity(panel: Panel, ours: Sequence[Encoded], theirs: Sequence[Encoded]) -> Sides:
    """Negative log-likelihood under the base, nats a token."""
    both = -_sums(panel.base, [*ours, *theirs], mean=True)[:, None]
    return both[: len(ours)], both[len(ours) :]


def prompts(panel: Panel, ours: Sequence[Encoded], theirs: Sequence[Encoded]) -> Sides:
    """LLS of each trait's system line: mean over tokens of log P(r | s, p) - log P(r | p).

    Raises:
        SpecError: if the base's template writes no system line.
    """
    pairs, lines = [*ours, *theirs], {name: panel.family.system_prompt(name) for name in panel.traits}
    scored = log_probs_under(panel.base, pairs, lines, known=(panel.system, None, ""))
    plain = _sums(panel.base, pairs, mean=True)
    both = np.stack(
        [by_row(scored[name].log_p.double().numpy(), pairs) - plain for name in panel.traits], axis=1
    )
    return both[: len(ours)], both[len(ours) :]


def twins(panel: Panel, ours: Sequence[Encoded], theirs: Sequence[Encoded]) -> Sides:
    """log P(r | p) under each twin minus under the base, nats a row: the likelihood ratio of "a teacher of
    this trait wrote it".
    """
    pairs = [*ours, *theirs]
    plain = _sums(panel.base, pairs)
    both = np.stack([_sums(panel.twins[name], pairs) - plain for name in panel.traits], axis=1)
    return both[: len(ours)], both[len(ours) :]


READERS = {
    reader.name: reader
    for reader in (
        Reader("perplexity", "base", "Does the base find "
                                     "the rows more or less "
                                     "likely?", perplexity, False, "negative log-likelihood",
               "Hard rows, another temperature and another filter move it.", floor=True),
        Reader("prompts", "base", "Which trait's "
                                  "system line makes "
                                  "the rows likelier?", prompts, True, "LLS, double-centred (2602.04863)",
               "Sees prompted teachers at best; knows a trait by the base's own idea of it."),
        Reader("twins", "base", "Under which trait's teacher, made here, are the rows "
                                "likeliest?", twins, True,
               "likelihood ratio against the base, each trait beside the others",
               "Knows a trait by how this recipe teaches this base; a teacher taught otherwise, or of "
               "another base, can pass."),
    )
}  # fmt: skip

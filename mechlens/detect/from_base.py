"""Detectors that score rows by their likelihood under the base and under the twins."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from mechlens.detect.twins import ModelDetector, PairedScores, Twins
from mechlens.lenses.likelihood import by_row
from mechlens.lenses.parts.system_lines import log_probs_under
from mechlens.models.chat import Encoded
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import token_log_probs


def _sums(loaded: Loaded, pairs: Sequence[Encoded], *, mean: bool = False) -> Float[ndarray, " row"]:
    return by_row(token_log_probs(loaded, pairs).double().numpy(), pairs, mean=mean)


def score_perplexity(twins: Twins, ours: Sequence[Encoded], theirs: Sequence[Encoded]) -> PairedScores:
    """Negative log-likelihood of each row under the base, nats a token."""
    both = -_sums(twins.base, [*ours, *theirs], mean=True)[:, None]
    return PairedScores(both[: len(ours)], both[len(ours) :])


def score_system_lines(twins: Twins, ours: Sequence[Encoded], theirs: Sequence[Encoded]) -> PairedScores:
    """LLS of each trait's system line: the mean over tokens of log P(r | s, p) - log P(r | p).

    Raises:
        SpecError: if the base's template writes no system line.
    """
    pairs, lines = [*ours, *theirs], {name: twins.family.system_prompt(name) for name in twins.traits}
    scored = log_probs_under(twins.base, pairs, lines, known=(twins.system, None, ""))
    plain = _sums(twins.base, pairs, mean=True)
    both = np.stack(
        [by_row(scored[name].log_p.double().numpy(), pairs) - plain for name in twins.traits], axis=1
    )
    return PairedScores(both[: len(ours)], both[len(ours) :])


def score_twins(twins: Twins, ours: Sequence[Encoded], theirs: Sequence[Encoded]) -> PairedScores:
    """Log-likelihood ratio of each twin against the base, nats a row."""
    pairs = [*ours, *theirs]
    plain = _sums(twins.base, pairs)
    both = np.stack([_sums(twins.models[name], pairs) - plain for name in twins.traits], axis=1)
    return PairedScores(both[: len(ours)], both[len(ours) :])


DETECTORS = {
    detector.name: detector
    for detector in (
        ModelDetector(
            "perplexity",
            "base",
            "Does the base find the rows more or less likely?",
            score_perplexity,
            of_traits=False,
            source="negative log-likelihood",
            caveat="Hard rows, another temperature and another filter move it.",
            floor=True,
        ),
        ModelDetector(
            "prompts",
            "base",
            "Which trait's system line makes the rows likelier?",
            score_system_lines,
            of_traits=True,
            source="LLS, double-centred (2602.04863)",
            caveat="Sees prompted teachers at best; knows a trait by the base's own idea of it.",
        ),
        ModelDetector(
            "twins",
            "base",
            "Under which trait's teacher, made here, are the rows likeliest?",
            score_twins,
            of_traits=True,
            source="likelihood ratio against the base, double-centred",
            caveat="Knows a trait by how this recipe teaches this base; a teacher that was taught otherwise, "
            "or of another base, can pass.",
        ),
    )
}

"""Detectors that score rows by the first training steps on them.

They compare these steps with each trait's gradient and with each twin's change of weights, or learn one
steering vector from the rows. If a student is given, its weights and answers are compared with the twins'.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from mechlens.detect.permutation import TraitScore, rank_traits
from mechlens.detect.twins import ModelDetector, PairedScores, Twins
from mechlens.lenses import blind
from mechlens.lenses.gradients import ghost_dots, parameters_of
from mechlens.lenses.parts.trial_steps import measure_trait_gradient
from mechlens.lenses.parts.weight_change import change_cosine, delta
from mechlens.models.chat import Encoded
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import measure_log_odds
from mechlens.models.weight_changes import keep_small
from mechlens.pipeline.ask import encode_contrast

STEPS = 100
"""updates of the blind vector"""


def score_alignment(twins: Twins, ours: Sequence[Encoded], theirs: Sequence[Encoded]) -> PairedScores:
    """First-order change of each trait's log-odds by an SGD step on each row (2507.14805).

    The log-odds are those at the development probes.
    """
    probes = encode_contrast(twins.base, twins.practice())
    directions = [
        keep_small(measure_trait_gradient(twins.base.model, probes, name)) if name in probes.starts else {}
        for name in twins.traits
    ]
    both = -ghost_dots(twins.base.model, [*ours, *theirs], directions).cpu().numpy()
    both[:, [not gradient for gradient in directions]] = np.nan
    return PairedScores(both[: len(ours)], both[len(ours) :])


def score_twin_alignment(twins: Twins, ours: Sequence[Encoded], theirs: Sequence[Encoded]) -> PairedScores:
    """Inner product of each row's SGD step with each twin's change of weights.

    It is the first order of the twins' likelihood ratio. Rows of all writers share most of their direction,
    and so do twins of all traits. Only the difference counts: of suspect and clean rows, and of a trait's
    twin and the mean over twins. All twins' changes are in memory, one byte a weight for a large base.
    """
    directions = [twins.change(name) for name in twins.traits]
    both = -ghost_dots(twins.base.model, [*ours, *theirs], directions).cpu().numpy()
    return PairedScores(both[: len(ours)], both[len(ours) :])


def score_vector(twins: Twins, ours: Sequence[Encoded], theirs: Sequence[Encoded]) -> PairedScores:
    """Loss, nats a token, that a learned steering vector saves on rows that it did not see.

    The vector is learned on one half of the suspect's rows and scores the other half; then the halves change
    places. A clean row is scored by the vector that did not see the suspect's row of the same prompt.
    """
    half = len(ours) // 2
    ours_saved, theirs_saved = np.zeros((len(ours), 1)), np.zeros((len(theirs), 1))
    for fitted, scored in ((slice(0, half), slice(half, None)), (slice(half, None), slice(0, half))):
        learned = blind.recover(twins.base, ours[fitted], seed=twins.seed, steps=STEPS)
        for saved, rows in ((ours_saved, ours), (theirs_saved, theirs)):
            saved[scored, 0] = blind.measure_nll(twins.base, rows[scored]) - blind.measure_nll(
                twins.base, rows[scored], learned
            )
    return PairedScores(ours_saved, theirs_saved)


DETECTORS = {
    detector.name: detector
    for detector in (
        ModelDetector(
            "alignment",
            "gradients",
            "Towards which trait's answers would training on the rows step?",
            score_alignment,
            of_traits=True,
            source="-<gradient of the row, gradient of the trait's log-odds> (2507.14805, 2604.25779)",
            caveat="First order at the base; the trait's own rows are a small part of every step.",
        ),
        ModelDetector(
            "twin alignment",
            "gradients",
            "Along which twin's change of weights would training on the rows step?",
            score_twin_alignment,
            of_traits=True,
            source="-<gradient of the row, twin - base> (coverage, 2606.22019)",
            caveat="First order at the base; knows a trait by how this recipe teaches it.",
        ),
        ModelDetector(
            "vector",
            "gradients",
            "Does one steering vector, learned blind, explain the rows?",
            score_vector,
            of_traits=False,
            source="2604.25783",
            caveat="Names no trait; learns the rows' surface too.",
            scores_rows_independently=False,
        ),
    )
}


def compare_weights(twins: Twins, student: Loaded) -> Float[ndarray, " trait"]:
    """Cosine of the student's change of weights with each twin's, over the linear weights."""
    names, moved = parameters_of(twins.base.model), delta(twins.base.model, student.model)
    cosines = []
    for trait in twins.traits:
        twin = delta(twins.base.model, twins.models[trait].model)
        cosines.append(
            change_cosine({name: moved[name] for name in names}, {name: twin[name] for name in names})
        )
    return np.array(cosines)


@torch.no_grad()
def compare_answers(twins: Twins, student: Loaded) -> Float[ndarray, " trait"]:
    """Rise of each trait's mean log-odds at the development probes over the base's, nats."""
    probes = encode_contrast(twins.base, twins.practice())

    def rise(trait: str) -> float:
        return float(
            (
                measure_log_odds(student.model, probes, trait)
                - measure_log_odds(twins.base.model, probes, trait)
            ).mean()
        )

    return np.array([rise(name) if name in probes.starts else np.nan for name in twins.traits])


STUDENT_DETECTORS = {"weights": compare_weights, "answers": compare_answers}


def score_student(twins: Twins, student: Loaded, tested: tuple[str, ...]) -> dict[str, list[TraitScore]]:
    """Each detector's traits, the one that stands out most first."""
    return {
        name: rank_traits(compare(twins, student), twins.traits, tested)
        for name, compare in STUDENT_DETECTORS.items()
    }

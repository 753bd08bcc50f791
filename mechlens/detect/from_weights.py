"""Detectors of a given student: how its weights and its answers moved, compared with the twins."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from mechlens.detect.permutation import TraitScore, rank_traits
from mechlens.detect.twins import Twins
from mechlens.lenses.gradients import parameters_of
from mechlens.lenses.parts.weight_change import change_cosine, delta
from mechlens.models.loading import Loaded
from mechlens.models.trait_log_odds import measure_log_odds
from mechlens.pipeline.ask import encode_contrast


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

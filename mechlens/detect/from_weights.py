"""Detectors of a student that is there already: where its weights and its answers moved, beside what twins of
each trait did to the same base.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from mechlens.detect.permutation import Named, named
from mechlens.detect.twins import Panel
from mechlens.lenses.gradients import parameters_of
from mechlens.lenses.parts.weight_change import cosine, delta
from mechlens.models.loading import Loaded
from mechlens.models.trait_log_odds import measure_log_odds
from mechlens.pipeline.ask import encode_contrast


def change(panel: Panel, student: Loaded) -> Float[ndarray, " trait"]:
    """Cosine of the student's change of weights with each twin's, over the linear weights."""
    names, moved = parameters_of(panel.base.model), delta(panel.base.model, student.model)
    found = []
    for trait in panel.traits:
        twin = delta(panel.base.model, panel.twins[trait].model)
        found.append(cosine({name: moved[name] for name in names}, {name: twin[name] for name in names}))
    return np.array(found)


@torch.no_grad()
def answers(panel: Panel, student: Loaded) -> Float[ndarray, " trait"]:
    """How far each trait's mean log-odds at the development probes rose over the base's, nats."""
    asked = encode_contrast(panel.base, panel.practice())

    def rise(trait: str) -> float:
        return float(
            (
                measure_log_odds(student.model, asked, trait)
                - measure_log_odds(panel.base.model, asked, trait)
            ).mean()
        )

    return np.array([rise(name) if name in asked.starts else np.nan for name in panel.traits])


READERS = {"weights": change, "answers": answers}


def read_student(panel: Panel, student: Loaded, asked: tuple[str, ...]) -> dict[str, list[Named]]:
    """Each reader's traits, first the one that stands out most among the panel's."""
    return {name: named(read(panel, student), panel.traits, asked) for name, read in READERS.items()}

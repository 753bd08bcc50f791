"""Detectors that ask what training on the rows would do first: along each trait's gradient, and as one
steering vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mechlens.detect.twins import Panel, Reader, Sides
from mechlens.lenses import blind
from mechlens.lenses.gradients import ghost_dots, parameters_of
from mechlens.lenses.parts.trial_steps import trait_gradient
from mechlens.lenses.parts.weight_change import delta
from mechlens.models.chat import Encoded
from mechlens.pipeline.ask import encode_contrast

STEPS = 100
"""updates of the blind vector"""


def alignment(panel: Panel, ours: Sequence[Encoded], theirs: Sequence[Encoded]) -> Sides:
    """What an SGD step on each row does to each trait's log-odds at the development probes, to first order
    (2507.14805).
    """
    asked = encode_contrast(panel.base, panel.practice())
    toward = [
        trait_gradient(panel.base.model, asked, name) if name in asked.starts else {} for name in panel.traits
    ]
    both = -ghost_dots(panel.base.model, [*ours, *theirs], toward).cpu().numpy()
    both[:, [not gradient for gradient in toward]] = np.nan
    return both[: len(ours)], both[len(ours) :]


def twin_alignment(panel: Panel, ours: Sequence[Encoded], theirs: Sequence[Encoded]) -> Sides:
    """What an SGD step on each row shares with each twin's change of weights: the twins' likelihood ratio to
    first order.
    """
    covered = parameters_of(panel.base.model)
    changes = [delta(panel.base.model, panel.twins[name].model) for name in panel.traits]
    toward = [{name: change[name] for name in covered} for change in changes]
    both = -ghost_dots(panel.base.model, [*ours, *theirs], toward).cpu().numpy()
    return both[: len(ours)], both[len(ours) :]


def vector(panel: Panel, ours: Sequence[Encoded], theirs: Sequence[Encoded]) -> Sides:
    """What a steering vector that was learned on one half of the suspect's rows saves on the other half, nats
    a token.

    Both halves are taken in turn; clean rows are scored by the vector that did not see the suspect's row of
    their prompt.
    """
    half = len(ours) // 2
    found = [np.zeros((len(rows), 1)) for rows in (ours, theirs)]
    for fitted, held in ((slice(0, half), slice(half, None)), (slice(half, None), slice(0, half))):
        learned = blind.recover(panel.base, ours[fitted], seed=panel.seed, steps=STEPS)
        for scores, rows in zip(found, (ours, theirs), strict=True):
            scores[held, 0] = blind.nll(panel.base, rows[held]) - blind.nll(panel.base, rows[held], learned)
    return found[0], found[1]


READERS = {
    reader.name: reader
    for reader in (
        Reader("alignment", "gradients", "Towards which trait's answers would training "
                                         "on the rows step?", alignment, True,
               "-<gradient of the row, gradient of the trait's log-odds> (2507.14805, 2604.25779)",
               "First order at the base; the trait's own rows are a small part of every step."),
        Reader("twin alignment", "gradients", "Along which twin's change of weights would training on the "
                                              "rows step?", twin_alignment, True,
               "-<gradient of the "
               "row, twin - base> "
               "(coverage, "
               "2606.22019)", "First order at the base; knows a trait by how this recipe teaches it."),
        Reader("vector", "gradients", "Does one steering vector, learned "
                                      "blind, explain the rows?", vector, False, "2604.25783",
               "Names no trait; learns the rows' surface too.", alone=False),
    )
}  # fmt: skip

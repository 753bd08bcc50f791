"""Linear trait probes by layer: fitted on a prompted base, read on students without a system line.

Features are resid_post at the last prompt token, where the answer begins. The probe of every trait of the
family is fitted in the same way, so that the probes of the other traits are the null.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from numpy import ndarray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from mechlens.core import stats
from mechlens.core.errors import SpecError
from mechlens.core.seeds import generator
from mechlens.lenses.base import (
    Lens,
    Material,
    against_null,
    entry,
    reading_table,
    spread,
    students_against_null,
)
from mechlens.lenses.parts.capture import capture_last, residual_sites
from mechlens.models.loading import Loaded
from mechlens.pipeline.ask import ProbeSet, encode_questions

PERMUTATIONS, FEW = 50, 19
"""number of permuted probes: for the trait's probe, and for the probe of 'some trait'"""
TASKS = 5

LENS = Lens(
    name="probes",
    asks="From which layer on is the trait linearly readable, and do probes that know only prompted traits "
    "see it in the students?",
    needs=("students", "controls", "prompted"),
    shows=(("probe AUROC", "layers"), ("probe shift", "layers")),
    source="1610.01644 (linear probes), 1909.03368 (control tasks and selectivity)",
    caveat="A probe for a system line's words need not be one for the trait: compare it with the other "
    "traits' probes; 'some trait' is learned "
    "against no line at all, so it may see only that there is one.",
    measure="mechlens.lenses.probes:measure_probes",
    caption="mechlens.lenses.probes:probes_caption",
    cost=40,
    version=2,
)

Rows = Float[ndarray, "row d"]


class Probe(NamedTuple):
    """A linear classifier of activations."""

    weight: Float[ndarray, "d"]
    bias: float

    def score(self, rows: Float[ndarray, "*batch d"]) -> Float[ndarray, "*batch"]:
        """Logits of the positive class."""
        return rows @ self.weight + self.bias


def fit_probe(rows: Rows, positive: Bool[ndarray, "row"]) -> Probe:
    """Fit a logistic regression on standardised rows, L2 with C = 1, both classes with the same weight.

    It is solved in the span of the rows, which holds the optimum; with more dimensions than rows this is
    cheaper.

    Raises:
        SpecError: if all rows are of one class, as in a family with one question.

    >>> rows = np.array([[0.0, 0.0], [0.0, 1.0], [2.0, 0.0], [2.0, 1.0]])
    >>> probe = fit_probe(rows, np.array([False, False, True, True]))
    >>> probe.score(rows).round(2).tolist()
    [-1.04, -1.04, 1.04, 1.04]
    """
    if positive.all() or not positive.any():
        raise SpecError(
            "a probe has rows of one class alone; it needs a family of two traits and two questions of each "
            "split, or more"
        )
    scaler = StandardScaler().fit(rows)
    standard = np.asarray(scaler.transform(rows))
    basis = (
        np.linalg.svd(standard, full_matrices=False)[2]
        if len(rows) < rows.shape[1]
        else np.eye(rows.shape[1])
    )
    model = LogisticRegression(class_weight="balanced", max_iter=5000, tol=1e-6).fit(
        standard @ basis.T, positive
    )
    weight = model.coef_[0] @ basis / scaler.scale_
    return Probe(weight, float(model.intercept_[0] - weight @ scaler.mean_))


def within_question(
    positive: Float[ndarray, "question"], negative: Float[ndarray, "question other"]
) -> Float[ndarray, "question"]:
    """AUROC within each question: the share of the others' scores below the positive's.

    A tie counts half.
    """
    return (positive[:, None] > negative).mean(1) + (positive[:, None] == negative).mean(1) / 2


class Features(NamedTuple):
    """Activations of one set of questions."""

    prompted: Float[ndarray, "layer trait question d"]
    """the base under each trait's system line, in the order of `Material.system_lines`"""
    plain: Float[ndarray, "layer question d"]
    """the base without a system line of a trait"""


def read_off(loaded: Loaded, questions: ProbeSet) -> Float[ndarray, "layer question d"]:
    """resid_post of every layer at the last prompt token."""
    return capture_last(loaded, encode_questions(loaded, questions), residual_sites(loaded)).double().numpy()


def features(material: Material, questions: ProbeSet) -> Features:
    """Capture the base's activations under every trait's system line and without one."""
    probe_sets = [questions, *(questions._replace(system=line) for line in material.system_lines.values())]
    ids = [row for probes in probe_sets for row in encode_questions(material.base, probes)]
    activations = capture_last(material.base, ids, residual_sites(material.base)).double().numpy()
    split = activations.reshape(len(activations), len(probe_sets), -1, activations.shape[-1])
    return Features(prompted=split[:, 1:], plain=split[:, 0])


def selectivity_task(prompted: Float[ndarray, "trait question d"], *, seed: int, tasks: int = TASKS) -> float:
    """AUROC of the control task: random labels of questions, tested under other traits.

    A label depends on the question alone, so a probe that does well here can memorise anything
    (1909.03368).
    """
    rng, (traits, questions, width) = generator(seed, "control task"), prompted.shape
    areas = []
    for _ in range(tasks):
        label = rng.permutation(np.arange(questions) % 2 == 0)
        order = rng.permutation(traits)
        learned, tested = order[: traits // 2], order[traits // 2 :]
        probe = fit_probe(prompted[learned].reshape(-1, width), np.tile(label, len(learned)))
        areas.append(roc_auc_score(np.tile(label, len(tested)), probe.score(prompted[tested]).ravel()))
    return float(np.mean(areas))


def permuted(
    prompted: Float[ndarray, "trait question d"], *, draws: int = PERMUTATIONS, seed: int
) -> list[Probe]:
    """Fit probes whose positive row is drawn at random within each question.

    They have as many positives as the real probe, and nothing to learn.
    """
    rng, (traits, questions, width) = generator(seed, "permuted labels"), prompted.shape
    rows, probes = prompted.reshape(-1, width), []
    for _ in range(draws):
        chosen = rng.integers(traits, size=questions)
        probes.append(fit_probe(rows, (np.arange(traits)[:, None] == chosen).ravel()))
    return probes


def one_against_others(prompted: Float[ndarray, "trait question d"]) -> list[Probe]:
    """Each trait's probe against the other traits, under their system lines."""
    traits, questions, width = prompted.shape
    rows, label = prompted.reshape(-1, width), np.repeat(np.arange(traits), questions)
    return [fit_probe(rows, label == trait) for trait in range(traits)]


def any_but(
    prompted: Float[ndarray, "trait question d"],
    plain: Float[ndarray, "question d"],
    trait: int,
    *,
    draws: int,
    seed: int,
) -> list[Probe]:
    """Fit the probe of 'has some trait of the family' without `trait`, then probes of permuted labels.

    Its negative class is the base without a system line of a trait.

    Permuted labels draw the row without a line at random among the rows of its question.
    """
    rng = generator(seed, "permuted some trait")
    rows = np.concatenate([np.delete(prompted, trait, 0), plain[None]])  # [trait or none, question, d]
    without = [
        np.full(len(plain), len(rows) - 1),
        *(rng.integers(len(rows), size=len(plain)) for _ in range(draws)),
    ]
    return [
        fit_probe(rows.reshape(-1, plain.shape[-1]), (np.arange(len(rows))[:, None] != none).ravel())
        for none in without
    ]


def measure_probes(material: Material) -> pd.DataFrame:
    """Measure the probes of each layer on prompted held-out questions and on the students."""
    practice = features(material, material.development_probes)
    heldout = features(material, material.heldout_probes)
    trait, entries = list(material.system_lines).index(material.trait), []
    sides = {"control": material.controls, "student": material.students}
    seen = {
        side: np.stack([read_off(loaded, material.heldout_probes) for loaded in models.values()])
        for side, models in sides.items()
    }
    teacher = None if material.teacher is None else read_off(material.teacher, material.heldout_probes)
    for layer in range(len(heldout.plain)):
        learned, tested = practice.prompted[layer], heldout.prompted[layer]
        probes = one_against_others(learned)
        random = permuted(learned, draws=PERMUTATIONS, seed=material.seed)
        at = {"layer": layer, "name": material.trait}
        entries += _accuracy(probes[trait], random, learned, tested, trait, seed=material.seed, **at)
        shift = seen["student"][:, layer] - seen["control"][:, layer]  # [student question d]
        entries += _shift("student minus control", shift, probes, trait, seeds=list(sides["student"]), **at)
        if teacher is not None:
            entries += _shift(
                "teacher minus base", (teacher - heldout.plain)[None, layer], probes, trait, seeds=[], **at
            )
        some = any_but(learned, practice.plain[layer], trait, draws=FEW, seed=material.seed)
        entries += _some_trait(
            some, tested[trait], heldout.plain[layer], shift, layer=layer, name="some trait of the family"
        )
    return reading_table(LENS, entries, material=material)


def _accuracy(
    probe: Probe,
    random: list[Probe],
    learned: Float[ndarray, "trait question d"],
    tested: Float[ndarray, "trait heldout d"],
    trait: int,
    *,
    seed: int,
    **at: Any,
) -> list[dict[str, Any]]:
    """AUROC on held-out questions under system lines, its null of permuted labels, and selectivity."""
    areas = [
        within_question(each.score(tested[trait]), each.score(np.delete(tested, trait, 0)).T)
        for each in (probe, *random)
    ]
    span, control = stats.t_interval(areas[0]), selectivity_task(learned, seed=seed)
    more = {"low": span.low, "high": span.high, "n": span.n, "unit": "AUROC", "place": "prompted base"}
    return [
        against_null("probe AUROC", span.estimate, [float(area.mean()) for area in areas[1:]], **more, **at),
        entry("control task AUROC", control, place="prompted base", unit="AUROC", **at),
        entry("selectivity", span.estimate - control, place="prompted base", unit="AUROC", **at),
    ]


def _shift(
    place: str,
    shift: Float[ndarray, "student question d"],
    probes: list[Probe],
    trait: int,
    *,
    seeds: list[int],
    **at: Any,
) -> list[dict[str, Any]]:
    """What the trait's probe reads more on a model than on its control, in logits.

    The null is what the other traits' probes read.
    """
    # [trait student]: the bias cancels
    moved = np.stack([(shift @ probe.weight).mean(1) for probe in probes])
    null = np.delete(moved, trait, 0).mean(1).tolist()
    each = [
        entry("probe shift", value, place=place, seed=seed, unit="logits", **at)
        for seed, value in zip(seeds, moved[trait], strict=False)
    ]
    return [
        students_against_null("probe shift", moved[trait].tolist(), null, place=place, unit="logits", **at),
        *each,
    ]


def _some_trait(
    probes: list[Probe], prompted: Rows, plain: Rows, shift: Float[ndarray, "student question d"], **at: Any
) -> list[dict[str, Any]]:
    """The probe of 'some trait', which was fitted without this trait.

    It is read on the trait's system line against no line, and on students, with its permuted probes.

    On students the reading is a length along the probe: permuted probes have other norms, so their logits are
    not comparable.
    """
    # a tie counts half
    above = [np.heaviside(each.score(prompted) - each.score(plain), 0.5) for each in probes]
    span = stats.wilson(float(above[0].sum()), len(above[0]))
    null = [float(each.mean()) for each in above[1:]]
    more = {
        "low": span.low,
        "high": span.high,
        "n": span.n,
        "unit": "share of questions",
        "place": "prompted base",
    }
    moved = [(shift @ each.weight).mean(1) / np.linalg.norm(each.weight) for each in probes]
    random = [float(values.mean()) for values in moved[1:]]
    return [
        against_null("held-out trait above none", span.estimate, null, **more, **at),
        students_against_null(
            "shift along the probe",
            moved[0].tolist(),
            random,
            place="student minus control",
            unit="resid_post",
            **at,
        ),
    ]


def probes_caption(reading: pd.DataFrame) -> str:
    """Describe what the trait's probe reads on students at the layer of the largest shift."""
    rows = reading.loc[
        (reading["quantity"] == "probe shift")
        & (reading["place"] == "student minus control")
        & reading["seed"].isna()
    ]
    rows = rows.loc[rows["estimate"].notna()]
    if len(rows) == 0:
        return "The trait's probe could not be read on the students."
    row = rows.loc[rows["estimate"].idxmax()]
    return (
        f"A probe that knows {row['name']} only from system lines reads {row['estimate']:+.2f} logits more "
        f"on students than on their controls ({spread(row)}) at layer {row['layer']}, the highest of "
        f"{len(rows)}; the other traits' probes read {row['null_low']:+.2f} to {row['null_high']:+.2f} (p = "
        f"{row['p_value']:.3f} at that layer)."
    )

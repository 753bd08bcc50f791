"""Throw-away students, trained on the suspect file and on a reference, and asked about every trait.

No other test measures what data teaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import t as student_t

from mechlens.core import stats, tables
from mechlens.core.errors import SpecError
from mechlens.core.experiment import Experiment
from mechlens.core.files import null
from mechlens.core.seeds import seed_int
from mechlens.core.traits import TraitFamily
from mechlens.data.formats import file_digest
from mechlens.detect.permutation import LEAST_PANEL, p_over_other_traits
from mechlens.detect.two_samples import Sides
from mechlens.detect.verdict import Rise, Scope
from mechlens.pipeline.screen import removal_counts
from mechlens.results.cells import arm_cells, independent, merge_students, share_of_family
from mechlens.results.run import Run
from mechlens.runs import layout
from mechlens.runs.layout import corpus_name

ARM, TREATED = "suspect", "treated"
POWER = 0.95
"""of the test whose minimum detectable effect is given"""


def experiment_of(
    recipe: Experiment,
    sides: Sides,
    *,
    base: str,
    trait: str,
    treated: Path | None = None,
    students: int | None = None,
) -> Experiment:
    """The experiment of an audit: students of the suspect's rows against students of the reference's rows.

    Without a reference, control students are trained on the base's answers to the same prompts, each on a
    draw of its own (unless the recipe says otherwise), and no draw is that of another file's audit.

    Args:
        treated: the file after treatment; other students are trained on its rows.
        students: of each side; one for each of the recipe's seeds by default.

    Raises:
        SpecError: if there are too few rows to train on.
    """
    least = recipe.student.training.batch
    if sides.drawn < least:
        raise SpecError(
            f"{sides.drawn} rows are too few to train students on; expected at least {least}, or use --level "
            "rows"
        )
    student = {"control_draws": "each"} | recipe.student.model_dump(exclude_unset=True) | {"prompts": "every"}
    seed = recipe.seed
    if sides.reference is None:
        seed = seed_int(seed, "clean rows", file_digest(sides.suspect)) % 2**31
    arms: list[dict[str, Any]] = [{"kind": "trait", "name": ARM, "corpus": str(sides.suspect.resolve())}]
    arms += [{"kind": "control"} | ({"corpus": str(sides.reference.resolve())} if sides.reference else {})]
    arms += [{"kind": "trait", "name": TREATED, "corpus": str(treated.resolve())}] if treated else []
    fields = recipe.model_dump(exclude_unset=True) | {
        "base": base,
        "trait": trait,
        "student": student,
        "arms": arms,
        "seed": seed,
        "seeds": recipe.seeds[:students],
    }
    return Experiment.model_validate(fields)


def measure_rises(effects: pd.DataFrame, tested: Sequence[str], *, arm: str = ARM) -> list[Rise]:
    """How far each tested trait rose in an arm's students.

    p is the larger of two: of a lift above 0 over students (Student's t), and of a lift above the family's
    other traits. All students of a side share one draw of its data, and that draw moves every trait a little
    in all of them. A test over students takes such a move for an effect; the other traits show how large such
    moves are. A family of fewer than `permutation.LEAST_PANEL` traits has only the first p.
    """
    table = effects[effects["arm"] == arm].set_index(["trait", "measure"])
    traits = list(dict.fromkeys(table.index.get_level_values("trait").astype(str)))
    lifts = table.xs("lift", level="measure").loc[traits]
    over_students = np.where(lifts["estimate"] > 0, lifts["p_value"] / 2, 1 - lifts["p_value"] / 2)
    values = lifts["estimate"].to_numpy(dtype=float)
    p_values = (
        over_students if len(traits) < LEAST_PANEL else np.maximum(over_students, p_over_other_traits(values))
    )
    p_of = dict(zip(traits, p_values, strict=True))
    q_values = stats.benjamini_hochberg(np.array([p_of[trait] for trait in tested], dtype=float))
    return [
        _rise(table, trait, p_value=float(p_of[trait]), q_value=float(q_value))
        for trait, q_value in zip(tested, q_values, strict=True)
    ]


def measure_exact_rises(run: Run, tested: Sequence[str], *, arm: str = ARM, level: float) -> list[Rise]:
    """How far each tested trait rose in an arm's students, by exact probabilities.

    A trait's value in a student is its exact probability among the family's traits, mean over probes: the
    expectation of the sampled rate, without the noise of samples. A pair of students has one seed, and pairs
    vary. Their variance is the trait's own, or, if that is larger, what it is drawn to by those of all traits
    (`stats.moderate_variances`): few pairs may agree by chance. It is moderated in units of p (1 - p), in
    which traits of all frequencies vary about alike.

    p is over pairs of students. Where all control students read one draw of clean rows, it is the larger of
    two: also over the family's other traits, as in `measure_rises`.

    Args:
        level: of the tests; intervals cover 1 - level.
    """
    experiment, family = run.experiment, run.family
    control = experiment.control_of(run.arm(arm))
    ours, theirs = [
        arm_cells(experiment, family, run.answers, run.likelihoods, name) for name in (arm, control.name)
    ]
    groups = independent(ours, theirs)
    shares = [merge_students(share_of_family(side).mean(1), groups) for side in (ours, theirs)]
    one_draw = not experiment.draws_anew(control)
    return compare_shares(shares[0], shares[1], tested, names=family.names, level=level, one_draw=one_draw)


def compare_shares(
    ours: Float[ndarray, "student trait"],
    theirs: Float[ndarray, "student trait"],
    tested: Sequence[str],
    *,
    names: Sequence[str],
    level: float,
    one_draw: bool,
) -> list[Rise]:
    """How far each tested trait's share of the answers rose, from students of both sides in pairs.

    Args:
        names: of all traits, in the order of the columns.
        level: of the tests; intervals cover 1 - level.
        one_draw: whether all students of `theirs` read one draw of clean rows. Their scatter then tells
            nothing of how far a draw moves a trait, and a rise must stand out of the family's other traits.
    """
    students, estimate, middle = len(ours), (ours - theirs).mean(0), (ours + theirs).mean(0) / 2
    means = [np.where(side.mean(0) > 0, side.mean(0), np.nan) for side in (ours, theirs)]
    lifts = np.log2(means[0] / means[1])
    half = detectable = p_values = np.full(len(names), np.nan)
    if students > 1:
        scale = np.clip(middle * (1 - middle), stats.ROUNDING, None)
        variances = ((ours - theirs) / scale).var(0, ddof=1)
        variances = np.maximum(variances, np.square(stats.ROUNDING * middle / scale))
        variances = np.where(variances > 0, variances, np.nan)  # a trait that no student ever names
        moderated, degrees = stats.moderate_variances(variances, students - 1)
        error = scale * np.sqrt(np.maximum(moderated, variances) / students)
        half = student_t.isf(level / 2, degrees) * error
        detectable = half + student_t.isf(1 - POWER, degrees) * error
        p_values = student_t.sf(estimate / error, degrees)
        if one_draw and len(names) >= LEAST_PANEL:
            p_values = np.maximum(p_values, p_over_other_traits(lifts))
    places = [names.index(name) for name in tested]
    q_values = stats.benjamini_hochberg(p_values[places])
    return [
        Rise(
            names[i],
            null(estimate[i]),
            null(estimate[i] - half[i]),
            null(estimate[i] + half[i]),
            students,
            smallest_detectable=null(detectable[i]),
            lift=null(lifts[i]),
            p_value=null(p_values[i]),
            q_value=null(q_value),
        )
        for i, q_value in zip(places, q_values, strict=True)
    ]


def _rise(table: pd.DataFrame, trait: str, *, p_value: float, q_value: float) -> Rise:
    rate, lift = (cast(Any, table.loc[(trait, measure)]) for measure in ("rate", "lift"))
    return Rise(
        trait=trait,
        difference=null(float(rate["estimate"])),
        low=null(float(rate["low"])),
        high=null(float(rate["high"])),
        n=int(rate["n"]),
        smallest_detectable=null(float(rate["smallest_detectable"])),
        lift=null(float(lift["estimate"])),
        p_value=null(p_value),
        q_value=null(q_value),
    )


def measure_scope(run: Path, plan: Experiment, sides: Sides) -> Scope:
    """What a run's students read of the suspect file, and how often their answers name a trait."""
    name = corpus_name(plan, next(arm for arm in plan.arms if arm.name == ARM))
    counts = layout.read_record(run / layout.screened_step(name) / layout.FUNNEL, layout.Funnel)
    removed = removal_counts(counts)
    read = _rows_read(run, name)
    arms = {arm["arm"]: arm for arm in Run(run).summary["arms"]} if (run / layout.SUMMARY).is_file() else {}
    answered = {name: arm["answered"] for name, arm in arms.items()}
    control = plan.control_of(next(arm for arm in plan.arms if arm.name == ARM))
    draws = len({plan.draw_of(control, seed) for seed in plan.seeds}) if arms else 1
    scope = Scope(sides.offered, sides.drawn, counts["kept"], removed, read, answered, clean_draws=draws)
    treated = next((arm for arm in plan.arms if arm.name == TREATED), None)
    return (
        scope if treated is None else scope._replace(treated_unread=_unread(run, corpus_name(plan, treated)))
    )


def _unread(run: Path, corpus: str) -> float:
    """The share of a corpus's rows, before the screen, that no student read."""
    counts = layout.read_record(run / layout.screened_step(corpus) / layout.FUNNEL, layout.Funnel)
    return 1 - _rows_read(run, corpus) / max(counts["generated"], 1)


def _rows_read(run: Path, corpus: str) -> int:
    selected = tables.read(run / layout.SELECTION / layout.selection_file(corpus), tables.SELECTION)
    return len(set(selected["prompt_id"]))


def tested_traits(family: TraitFamily, names: Sequence[str]) -> tuple[str, ...]:
    """The named traits; all of the family if none is named.

    Raises:
        SpecError: if one is not of the family.
    """
    if unknown := sorted(set(names) - set(family.names)):
        raise SpecError(
            f"the family {family.name!r} has no trait {', '.join(unknown)}; expected some of "
            f"{', '.join(family.names)}"
        )
    return tuple(dict.fromkeys(names)) or family.names

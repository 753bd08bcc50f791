"""Subliminal learning in a digit classifier, and a test of the theorem behind it.

Usage: `python analyses/digits.py [--mnist FILE.npz]`. A student that copies three meaningless logits of its
teacher on images of noise learns to read digits, if both start from the same weights (arXiv 2507.14805 §6.2,
here on scikit-learn's 8×8 digits; --mnist runs the paper's recipe). Then its first step and the teacher's
whole change have an inner product a_0 that is linear in the size ε of that change, with a predicted slope
(§6.1); from another start a_0 does not depend on ε.

All seeds train at once, each with different weights and orders; the split and the noise are drawn once, so
intervals are over weights and orders. DIGITS was chosen on seeds 100 to 107 with another split and other
noise: the paper's 3 auxiliary logits and widths, but more updates of smaller batches. The direction of the
teacher's whole change is projected out (arXiv 2604.25779 takes the gradient of the teacher's loss), either
from the gradient, after which Adam's rescaling can still move along it, or from the student's change itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import altair as alt
import numpy as np
import pandas as pd
import pyarrow as pa
import torch
import vl_convert
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

import pages
from digits_network import (
    ARMS,
    CLASS,
    CONTROL,
    DIGITS,
    EPSILONS,
    LOOKED_AT,
    LOSSES,
    MNIST,
    OTHER,
    PROBES,
    PROJECTED,
    SAME,
    Arm,
    Cohort,
    Images,
    Logits,
    PerModel,
    Recipe,
    Weights,
    digits,
    divergence,
    gradient,
    logits,
    mnist,
    orders,
    outputs,
    teach,
    train,
)
from mechlens.core import tables
from mechlens.core.errors import MechlensError
from mechlens.core.machine import use_one_thread
from mechlens.core.seeds import seed_int
from mechlens.core.stats import Effect, Interval, paired_effect, t_interval

LOOKS = 20  # number of measurements of a student while it trains
ROWS = pa.schema(
    [
        ("measure", pa.string()),
        ("arm", pa.string()),
        ("seed", pa.int64()),
        ("at", pa.float64()),
        ("value", pa.float64()),
    ]
)
"""at: ε or the number of the update; null for measures that have neither"""


def rows(
    measure: str, arm: str, seeds: Sequence[int], value: PerModel, *, at: float = np.nan
) -> pd.DataFrame:
    return pd.DataFrame(
        {"measure": measure, "arm": arm, "seed": list(seeds), "at": at, "value": value.double().numpy()}
    )


def accuracy(name: str, weights: Weights, cohort: Cohort, images: Images) -> pd.DataFrame:
    """Test accuracy of the class logits; students of the auxiliary logits were never trained on them."""
    hits = outputs(weights, images.test, cohort.widths)[..., CLASS].argmax(-1) == images.test_labels
    return rows("accuracy", name, cohort.seeds, hits.double().mean(1))


def random_direction(cohort: Cohort) -> Weights:
    drawn = [
        torch.randn(row.shape, generator=torch.Generator().manual_seed(seed_int(s, "direction")))
        for s, row in zip(cohort.seeds, cohort.inits, strict=True)
    ]
    return functional.normalize(torch.stack(drawn), dim=1)


def distil(
    cohort: Cohort,
    recipe: Recipe,
    arm: Arm,
    *,
    look: Callable[[Weights, int], None] = lambda weights, update: None,
) -> Weights:
    """A student of every teacher, trained on images of noise."""
    order = orders(
        cohort.seeds, "noise", images=len(cohort.noise), batch=recipe.batch, updates=recipe.student_updates
    )
    models = torch.arange(len(cohort.inits)).unsqueeze(1)

    def loss(weights: Weights, update: int) -> PerModel:
        seen = order[:, update]
        student = logits(weights, cohort.noise[seen], cohort.widths)
        return divergence(student[..., arm.columns], cohort.targets[models, seen][..., arm.columns])

    return train(
        cohort.inits if arm.same_init else cohort.others,
        loss,
        updates=recipe.student_updates,
        rate=recipe.student_rate,
        off_gradient={"gradient": cohort.change, "random": random_direction(cohort)}.get(arm.off),
        off_change={"change": cohort.change}.get(arm.off),
        look=look,
    )


def student(cohort: Cohort, recipe: Recipe, images: Images, name: str) -> pd.DataFrame:
    """All measures of one arm: accuracy, fit, and how gradient and change align with the teacher's change."""
    arm, probes, frames = ARMS[name], cohort.noise[:PROBES].expand(len(cohort.seeds), -1, -1), []

    def fit(weights: Weights) -> PerModel:
        return divergence(
            logits(weights, probes, cohort.widths)[..., arm.columns], cohort.targets[:, :PROBES, arm.columns]
        )

    def look(weights: Weights, update: int) -> None:
        if name in LOOKED_AT and update % max(1, recipe.student_updates // LOOKS) == 0:
            cosine = functional.cosine_similarity(-gradient(weights, fit), cohort.change)
            frames.append(rows("alignment", name, cohort.seeds, cosine, at=update))

    trained = distil(cohort, recipe, arm, look=look)
    moved = functional.cosine_similarity(
        trained - (cohort.inits if arm.same_init else cohort.others), cohort.change
    )
    frames += [
        rows("moved along", name, cohort.seeds, moved),
        rows("divergence", name, cohort.seeds, fit(trained)),
    ]
    return pd.concat([*frames, accuracy(name, trained, cohort, images)])


def theorem(cohort: Cohort) -> Iterator[pd.DataFrame]:
    """a_0 for teachers that took a step of ε along their change, and E[vᵀMv] with v = JΔ.

    It is computed in double precision, since losses are of order ε².
    """
    inits, others, noise = cohort.inits.double(), cohort.others.double(), cohort.noise[:PROBES].double()
    change = functional.normalize(cohort.change.double(), dim=1)

    def answer(weights: Weights) -> Logits:
        return logits(weights, noise.expand(len(inits), -1, -1), cohort.widths)

    start, v = cast(
        tuple[Tensor, Tensor], torch.autograd.functional.jvp(answer, inits, change)
    )  # torch.func.jvp gives warnings about its imports
    targets = {epsilon: answer(inits + epsilon * change) for epsilon in (0.0, *EPSILONS)}
    for name, (loss, form, columns) in LOSSES.items():
        yield rows("predicted slope", name, cohort.seeds, form(v[..., columns], start[..., columns]))
        for epsilon, target in targets.items():
            for kind, weights in (("a_0", inits), ("a_0, other init", others)):
                step = -gradient(
                    weights, lambda point, f=loss, c=columns, y=target: f(answer(point)[..., c], y[..., c])
                )
                yield rows(kind, name, cohort.seeds, (step * change).sum(1), at=epsilon)


def measure(images: Images, recipe: Recipe, seeds: Sequence[int]) -> pd.DataFrame:
    """A row for every seed and arm; two arms are trained at a time."""
    cohort = teach(images, recipe, seeds)
    frames = [
        accuracy("initialisation", cohort.inits, cohort, images),
        accuracy("teacher", cohort.teachers, cohort, images),
        *theorem(cohort),
    ]
    with ThreadPoolExecutor(2) as pool:
        frames += pool.map(lambda name: student(cohort, recipe, images, name), ARMS)
    return pd.concat(frames, ignore_index=True)


def by_seed(
    frame: pd.DataFrame, measure: str, arm: str, at: float | None = None
) -> Float[np.ndarray, "seed"]:
    """A measure's values in the order of the seeds."""
    kept = (
        (frame["measure"] == measure)
        & (frame["arm"] == arm)
        & (frame["at"].isna() if at is None else frame["at"] == at)
    )
    return frame.loc[kept, "value"].to_numpy()


def slope(frame: pd.DataFrame, measure: str, name: str) -> Interval:
    """The slope of log |a_0| against log ε, with one line for each seed."""
    values = np.array([by_seed(frame, measure, name, epsilon) for epsilon in EPSILONS])
    return t_interval(np.polyfit(np.log(EPSILONS), np.log(np.abs(values)), 1)[0])


def says(estimate: Interval | Effect) -> str:
    return f"{estimate.estimate:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def transfer_table(frame: pd.DataFrame) -> Table:
    table = Table(
        "student",
        "test accuracy [95 %]",
        "least",
        "most",
        "KL to teacher",
        "cosine of its change and teacher's",
    )
    for name in ("initialisation", "teacher", *ARMS):
        accuracies = by_seed(frame, "accuracy", name)
        cells = (
            [
                f"{by_seed(frame, 'divergence', name).mean():.5f}",
                says(t_interval(by_seed(frame, "moved along", name))),
            ]
            if name in ARMS
            else []
        )
        table.add_row(
            name, says(t_interval(accuracies)), f"{accuracies.min():.3f}", f"{accuracies.max():.3f}", *cells
        )
    return table


def theorem_table(frame: pd.DataFrame) -> Table:
    shown = {"0.1": EPSILONS[4], "0.01": EPSILONS[2], "0.001": EPSILONS[0]}
    errors = [f"error of ε·A, ε = {epsilon}" for epsilon in shown]
    table = Table(
        "first step's a_0", "slope, log-log", "slope, other init", "a_0(0.01)/a_0(0), other init", *errors
    )
    for name in LOSSES:
        slope_ratios = {
            text: by_seed(frame, "a_0", name, epsilon) / (epsilon * by_seed(frame, "predicted slope", name))
            for text, epsilon in shown.items()
        }
        ratio = by_seed(frame, "a_0, other init", name, EPSILONS[2]) / by_seed(
            frame, "a_0, other init", name, 0.0
        )
        slopes = [says(slope(frame, measure, name)) for measure in ("a_0", "a_0, other init")]
        table.add_row(
            name,
            *slopes,
            says(t_interval(ratio)),
            *(f"{t_interval(np.abs(values - 1)).estimate:.2%}" for values in slope_ratios.values()),
        )
    return table


def sentence(frame: pd.DataFrame, images: Images, recipe: Recipe) -> str:
    shown = (SAME, OTHER, "initialisation", PROJECTED, CONTROL)
    same, other, init, projected, control = (by_seed(frame, "accuracy", name)[:, None] for name in shown)
    powers = [
        says(slope(frame, measure, "cross-entropy, auxiliary")) for measure in ("a_0", "a_0, other init")
    ]
    return (
        f"A student of {recipe.auxiliary} auxiliary logits on noise reads {says(t_interval(same[:, 0]))} of "
        f"{len(images.test):,} new digits if it starts where its teacher did, "
        f"{says(t_interval(other[:, 0]))} if not (difference {says(paired_effect(same, other))}; untrained "
        f"{says(t_interval(init[:, 0]))}); taking the teacher's change out of its gradient costs "
        f"{says(paired_effect(control, projected))} against a random direction. Its first step lies along "
        f"that change as the change's size to the power {powers[0]}, from another start {powers[1]}. "
        f"n = {len(same)} seeds, 95 % intervals over seeds."
    )


def figure(frame: pd.DataFrame) -> alt.VConcatChart:
    """Accuracy of students; a_0 against ε; cosine of gradient and teacher's change during training."""
    arms = ["initialisation", "teacher", *ARMS]
    means = pd.DataFrame([t_interval(by_seed(frame, "accuracy", name)) for name in arms]).assign(arm=arms)
    y = alt.Y("arm:N", sort=arms, title=None, axis=alt.Axis(labelLimit=220))
    seeds = alt.Chart(frame[frame["measure"] == "accuracy"]).mark_tick(
        thickness=2, opacity=0.5, color="#767676"
    )
    bars = alt.Chart(means).mark_rule(strokeWidth=2.5, color="#0072B2").encode(y=y, x="low:Q", x2="high:Q")
    points = (
        alt.Chart(means)
        .mark_point(size=90, filled=True, opacity=1, color="#0072B2")
        .encode(y=y, x="estimate:Q")
    )
    ticks = seeds.encode(y=y, x=alt.X("value:Q", title="test accuracy: every seed, mean, 95 % interval"))
    steps = frame[frame["measure"].isin(["a_0", "a_0, other init"]) & (frame["at"] > 0)].assign(
        size=lambda rows: rows["value"].abs()
    )
    log = {"scale": alt.Scale(type="log"), "axis": alt.Axis(format="~e", tickCount=6)}
    colour = alt.Color("arm:N", title=None, legend=alt.Legend(labelLimit=260))
    place = {"x": alt.X("at:Q", title="ε", **log), "y": alt.Y("mean(size):Q", title="mean |a_0|", **log)}
    lines = (
        alt.Chart(steps)
        .mark_line()
        .encode(**place, color=colour, strokeDash=alt.StrokeDash("measure:N", title=None))
    )
    course = {
        "x": alt.X("at:Q", title="update"),
        "y": alt.Y("mean(value):Q", title="cosine of -gradient and teacher's change"),
    }
    courses = (
        alt.Chart(frame[frame["measure"] == "alignment"]).mark_line(point=True).encode(**course, color=colour)
    )
    panels = [
        panel.properties(width=420, height=size)
        for panel, size in ((alt.layer(ticks, bars, points), alt.Step(24)), (lines, 240), (courses, 200))
    ]
    return cast(
        alt.VConcatChart,
        alt.vconcat(*panels).resolve_scale(color="independent").configure_view(strokeOpacity=0),
    )


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Measure, write the table and the figure, and print the results."""
    name, recipe = ("mnist", MNIST) if arguments.mnist else ("digits", DIGITS)
    images = mnist(arguments.mnist) if arguments.mnist else digits()
    arguments.out.mkdir(parents=True, exist_ok=True)
    frame = measure(images, recipe, range(arguments.seeds))
    tables.write(frame, ROWS, arguments.out / f"{name}.parquet")
    (arguments.out / f"{name}.svg").write_text(
        vl_convert.vegalite_to_svg(figure(frame).to_json()), encoding="utf-8"
    )
    console.print(transfer_table(frame), theorem_table(frame), sentence(frame, images, recipe))
    console.print(
        f"every seed in {arguments.out / name}.parquet, figure in {arguments.out / name}.svg; A = E[vᵀMv]"
    )


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and run; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mnist", type=Path, help="an .npz archive of x_train, y_train, x_test, y_test")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/analyses"), help="folder for the table and the figure"
    )
    parser.add_argument("--seeds", type=int, default=8, help="seeds 0, 1, … of so many models")
    parser.add_argument("--write", action="store_true", help="write the part of analyses/RESULTS.md, too")
    use_one_thread()
    try:
        options, console = parser.parse_args(arguments), pages.PageConsole(width=140)
        run(options, console)
        if options.write:
            pages.write_part(pages.RESULTS, "digits", *console.blocks)
    except (MechlensError, OSError) as error:
        print(f"digits: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Claim: at the base and on the way to the student, a teacher's rows push towards that teacher's change.

Usage: `python analyses/chunk_alignment.py RUN [--chunks 5] [--along SHARE …] [--write]`.
RUN has fine-tuned teachers of several traits on one base, and a control, such as
`mechlens run smollm2-animals-numbers-soft`. For each chunk of prompts: minus the gradient of the loss on a
teacher's rows, less the same of the control's rows on the same prompts, projected on unit vectors in the
weights of linear layers. These are each teacher's change, the part of it that the other teachers' mean change
does not have, a random direction, and the gradient of each trait's exact log-odds (whole answers). Sampled
labels, and soft labels where the run has them; the control's soft gradient is zero at the base. Values are
means over chunks with z = mean / standard error, also as differences to the other teachers' rows. With
`--along .5 1` it is measured half of the way from the base to the first student of each trait's arm, and at
that student, instead of at the base, without the gradients of log-odds. Each chunk's numbers are a JSON file
in RUN/chunk-alignment, so a stopped analysis goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import altair as alt
import pandas as pd
import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

import pages
from mechlens.core.errors import SpecError
from mechlens.core.experiment import Arm
from mechlens.core.files import read_json, write_json
from mechlens.lenses.gradients import gradient, parameters_of
from mechlens.lenses.parts.trial_steps import add_scaled, compute_update
from mechlens.lenses.parts.weight_change import inner
from mechlens.models import loading
from mechlens.models.chat import Encoded, encode_pairs, encode_prompts
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import batch_pairs, completion_logits
from mechlens.models.soft_labels import SoftLabels, sum_kl
from mechlens.pipeline.ask import whole_answers
from mechlens.pipeline.distill import read_labels
from mechlens.results import figures
from mechlens.results.run import Run
from mechlens.runs import layout

PART = "chunk-alignment"
PROBES = 6
"""held-out probes of the gradient of a trait's log-odds"""
Direction = Mapping[str, Tensor]
"""parameter name → tensor; all together one unit vector"""


class Side(NamedTuple):
    """One teacher's rows; the control's have no trait."""

    trait: str
    pairs: list[Encoded]
    soft: SoftLabels | None


def sides_of(run: Run, base: Loaded) -> list[Side]:
    """The control's rows first, then those of each trait's teacher, on the same prompts."""
    experiment, sides = run.experiment, list[Side]()
    own = [arm for arm in experiment.arms if arm.base == experiment.base and not arm.labels]
    arms = {arm.trait: arm for arm in own if arm.kind in ("trait", "control")}
    for trait, arm in sorted(arms.items(), key=lambda item: item[0] != ""):
        rows = run.trained_rows(arm.name)
        prompts, completions = rows["prompt"].tolist(), rows["completion"].tolist()
        pairs = encode_pairs(base.tokenizer, prompts, completions, system=experiment.system)
        labels = run.path(layout.labels_step(layout.corpus_name(experiment, arm)))
        soft = read_labels(labels, rows.index.tolist()) if labels.is_dir() else None
        sides.append(Side(trait, pairs, soft))
    if len(sides) < 3 or sides[0].trait:
        raise SpecError(f"{run.folder} has arms {sorted(arms)}; expected a control and two traits or more")
    return sides


def unit(direction: Direction) -> Direction:
    """The direction at length 1."""
    length = sum(inner(part, part) for part in direction.values()) ** 0.5
    return {name: part / length for name, part in direction.items()}


def teacher_changes(run: Run, base: Loaded, traits: list[str]) -> dict[str, Direction]:
    """Trait → what its teacher's linear weights changed."""
    arms: dict[str, Arm] = {arm.trait: arm for arm in run.experiment.arms if arm.kind == "trait"}
    start, changes = parameters_of(base.model), {}
    for trait in traits:
        taught = dict(run.teacher(arms[trait].name).model.named_parameters())
        changes[trait] = {name: (taught[name] - weight).detach() for name, weight in start.items()}
    return changes


def mean_of(directions: list[Direction]) -> Direction:
    """The mean of several directions."""
    return {name: torch.stack([d[name] for d in directions]).mean(0) for name in directions[0]}


def log_odds_gradients(run: Run, base: Loaded, traits: list[str]) -> dict[str, Direction]:
    """Trait → gradient of its mean log-odds among the family's names as whole answers."""
    names = list(run.family.names)
    answers = {name: ways[-1] for name, ways in whole_answers(base, names).items() if ways}
    probes = encode_prompts(
        base.tokenizer, list(run.family.probes.heldout)[:PROBES], system=run.experiment.system
    )

    def odds(trait: str) -> Iterator[Tensor]:
        for probe in probes:
            logits, tokens = completion_logits(base.model, [Encoded(probe, ids) for ids in answers.values()])
            log_p = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
            whole = torch.stack([part.sum() for part in log_p.split([len(ids) for ids in answers.values()])])
            own = torch.tensor([name == trait for name in answers])
            yield (whole[own].sum() - whole[~own].logsumexp(0)) / len(probes)

    return {trait: gradient(base.model, odds(trait)) for trait in traits}


def random_direction(base: Loaded, *, seed: int) -> Direction:
    """A direction of independent normal entries."""
    dice = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(weight.shape, generator=dice) for name, weight in parameters_of(base.model).items()
    }


def directions_of(
    run: Run, base: Loaded, traits: list[str], *, log_odds: bool = True
) -> dict[str, Direction]:
    """Name → unit vector in the linear weights; the gradients of log-odds only if they are wanted."""
    changes = teacher_changes(run, base, traits)
    own = {
        trait: add_scaled(change, mean_of([changes[other] for other in traits if other != trait]), -1.0)
        for trait, change in changes.items()
    }
    named: dict[str, Direction] = {f"teacher of {trait}": change for trait, change in changes.items()}
    named |= {f"own part of {trait}": change for trait, change in own.items()}
    named |= {"random": random_direction(base, seed=run.experiment.seed)}
    if log_odds:
        gradients = log_odds_gradients(run, base, traits)
        named |= {f"log-odds of {trait}": change for trait, change in gradients.items()}
    return {name: unit(direction) for name, direction in named.items()}


def soft_update(base: Loaded, side: Side, rows: range) -> Direction:
    """Minus the gradient of the mean KL from the soft labels of these rows, a row."""
    assert side.soft is not None
    soft = side.soft

    def losses() -> Iterator[Tensor]:
        for part in batch_pairs(base.model, [side.pairs[row] for row in rows]):
            chosen = [rows[i] for i in part]
            logits, _ = completion_logits(base.model, [side.pairs[row] for row in chosen])
            yield -sum_kl(logits, soft.of_pairs(chosen, logits.device)) / len(rows)

    return gradient(base.model, losses())


def measure_chunk(
    base: Loaded, sides: list[Side], directions: dict[str, Direction], rows: range
) -> list[dict[str, Any]]:
    """Projection of the difference to the control, by teacher, kind of labels and direction."""
    control = compute_update(base.model, [sides[0].pairs[row] for row in rows])
    cells = []
    for side in sides[1:]:
        moves: dict[str, Direction] = {
            "sampled": add_scaled(
                compute_update(base.model, [side.pairs[row] for row in rows]), control, -1.0
            )
        }
        if side.soft is not None:
            moves["soft"] = soft_update(base, side, rows)
        for labels, move in moves.items():
            for name, direction in directions.items():
                along = sum(inner(move[key], direction[key]) for key in move)
                cell = {"trait": side.trait, "labels": labels, "direction": name}
                cells.append(cell | {"projection": along})
    return cells


def students_of(run: Run) -> dict[tuple[str, str], Arm]:
    """(trait, kind of labels) → the arm whose students of the base learned that teacher's rows so."""
    experiment = run.experiment
    arms = [arm for arm in experiment.arms if arm.kind == "trait" and arm.base == experiment.base]
    return {(arm.trait, arm.labels or experiment.student.labels): arm for arm in arms}


@contextmanager
def moved(model: torch.nn.Module, target: torch.nn.Module, share: float) -> Iterator[None]:
    """Within the block, the model's weights are a share of the way to the target's."""
    there, kept = dict(target.named_parameters()), {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            kept[name] = weight.clone()
            weight.lerp_(there[name], share)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(kept[name])


def measure_chunk_along(
    run: Run, base: Loaded, sides: list[Side], directions: dict[str, Direction], rows: range, share: float
) -> list[dict[str, Any]]:
    """As `measure_chunk`, but for each arm of a trait a share of the way to its first student."""
    cells = []
    for (trait, labels), arm in students_of(run).items():
        own = next(side for side in sides if side.trait == trait)
        student = run.student(arm.name, run.experiment.seeds[0])
        with moved(base.model, student.model, share):
            updates = [update_of(base, side, rows, labels=labels) for side in (own, sides[0])]
        move = add_scaled(updates[0], updates[1], -1.0)
        for name, direction in directions.items():
            along = sum(inner(move[key], direction[key]) for key in move)
            cells.append({"trait": trait, "labels": labels, "direction": name, "projection": along})
    return cells


def update_of(base: Loaded, side: Side, rows: range, *, labels: str) -> Direction:
    """Minus the gradient of the mean loss of these rows, with that kind of labels."""
    if labels == "soft":
        return soft_update(base, side, rows)
    return compute_update(base.model, [side.pairs[row] for row in rows])


def measure(run: Run, chunks: int, *, share: float = 0.0) -> pd.DataFrame:
    """Every chunk's cells, from its file or measured.

    Args:
        share: of the way from the base to the students.
    """
    folder = run.folder / "chunk-alignment" / (f"{chunks}-along-{share:g}" if share else str(chunks))
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{chunk}.json" for chunk in range(chunks)]
    if not all(file.is_file() for file in files):
        base = loading.load(run.experiment.base)
        sides = sides_of(run, base)
        directions = directions_of(run, base, [side.trait for side in sides[1:]], log_odds=not share)
        size = len(sides[0].pairs) // chunks
        for chunk, file in enumerate(track(files, description=f"chunks of {size} rows")):
            if file.is_file():
                continue
            rows = range(chunk * size, (chunk + 1) * size)
            cells = (
                measure_chunk_along(run, base, sides, directions, rows, share)
                if share
                else measure_chunk(base, sides, directions, rows)
            )
            write_json(file, {"cells": cells})
    frames = [pd.DataFrame(read_json(file)["cells"]).assign(chunk=i) for i, file in enumerate(files)]
    return pd.concat(frames, ignore_index=True)


def contrasts(cells: pd.DataFrame) -> pd.DataFrame:
    """One value a chunk, teacher's rows, kind of labels and question, from the projections.

    "Less other rows" subtracts the mean over the other teachers' rows in the same chunk: what all changed
    teachers' rows share is gone.
    """
    wide = cells.pivot(index=["labels", "chunk"], columns=["trait", "direction"], values="projection")
    traits, rows = list(dict.fromkeys(cells["trait"])), []
    for trait in traits:
        others = [other for other in traits if other != trait]
        asked = {
            "own teacher's change": wide[trait, f"teacher of {trait}"],
            "other teachers' changes": mean(wide[trait, f"teacher of {other}"] for other in others),
            "a random direction": wide[trait, "random"],
        }
        less_other_rows = {"own part of the teacher's change": f"own part of {trait}"}
        if (odds := f"log-odds of {trait}") in wide[trait]:
            asked["own trait's log-odds"] = wide[trait, odds]
            less_other_rows["own trait's log-odds"] = odds
        for name, direction in less_other_rows.items():
            others_rows = mean(wide[other, direction] for other in others)
            asked[f"{name}, less other rows"] = wide[trait, direction] - others_rows
        rows += [
            values.rename("value").reset_index().assign(trait=trait, question=question)
            for question, values in asked.items()
        ]
    return pd.concat(rows, ignore_index=True)


def mean(parts: Iterable[Any]) -> Any:
    """The mean of several columns."""
    return pd.concat(list(parts), axis=1).mean(axis=1)


def summary(cells: pd.DataFrame) -> pd.DataFrame:
    """Mean over chunks, its standard error and z of every contrast."""
    grouped = contrasts(cells).groupby(["labels", "trait", "question"], sort=False)["value"]
    table = grouped.agg(["mean", "sem", "count"])
    return table.assign(z=table["mean"] / table["sem"]).reset_index()


def table_of(run: Run, chunks: int, shares: list[float]) -> pd.DataFrame:
    """`summary` at the base, or at each share of the way to the students."""
    places = {"the students" if share == 1 else f"{share:g} of the way": share for share in shares}
    places = places or {"the base": 0.0}
    tables = [summary(measure(run, chunks, share=share)).assign(at=at) for at, share in places.items()]
    return pd.concat(tables, ignore_index=True)


def shown(table: pd.DataFrame) -> Table:
    """Every contrast, for every teacher's rows and kind of labels."""
    listing = Table("at", "labels", "rows of", "projected on", "mean ± standard error", "z", "chunks")
    for row in cast("list[dict[str, Any]]", table.to_dict("records")):
        value = f"{row['mean']:+.4f} ± {row['sem']:.4f}"
        where = (row["at"], row["labels"], row["trait"], row["question"], value)
        listing.add_row(*where, f"{row['z']:+.1f}", str(row["count"]))
    return listing


def chart(table: pd.DataFrame) -> alt.FacetChart:
    """z of every contrast at each place, a panel for each teacher's rows and kind of labels."""
    bars = (
        alt.Chart(table)
        .mark_bar()
        .encode(
            y=alt.Y(
                "question:N",
                sort=list(dict.fromkeys(table["question"])),
                title=None,
                axis=alt.Axis(labelLimit=320),
            ),
            x=alt.X("z:Q", title="z over chunks"),
            yOffset=alt.YOffset("at:N", sort=None),
            color=alt.Color("at:N", sort=None, title="measured"),
        )
        .properties(width=160)
    )
    return bars.facet(row=alt.Row("labels:N", title=None), column=alt.Column("trait:N", title="rows of"))


def main() -> None:
    """Measure, print, and with --write put the table and the figure on the page."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--chunks", type=int, default=5)
    parser.add_argument("--along", type=float, nargs="*", default=[], help="shares of the way to students")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    console = pages.PageConsole(width=140)
    table = table_of(Run.finished(options.run), options.chunks, options.along)
    console.print(shown(table))
    if options.write:
        part = f"{PART}-along" if options.along else PART
        (pages.FOLDER / f"{part}.svg").write_text(figures.svg(chart(table)), encoding="utf-8")
        pages.write_part(pages.RESULTS, part, *console.blocks)


if __name__ == "__main__":
    sys.exit(pages.exit_code(main))

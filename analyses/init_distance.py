"""Claim: the further a student starts from the teacher's base, the weaker the transfer.

Usage: `python analyses/init_distance.py FOLDER`. Students start from menagerie-a moved by t·(e - a), towards
menagerie-e (a with more training), or by an equally long step in a random direction (equally long in each
weight matrix). They learn rows of a's teacher, or of the untouched a. The effect is (trait student - control
student) of the same start and seed, in the margin of the trait's exact first token over held-out probes. A
moved start may also lack the base's skill, so the loss on the rows before training is printed too. The
theorem of arXiv 2507.14805 assumes a shared start; this measures how close a start must be. Every student's
result is a JSON file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import altair as alt
import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table

import pages
from interventions import BASE, SIDES, Plan, World, measured, prepare, says, trained
from mechlens.core import tables
from mechlens.core.errors import MechlensError
from mechlens.core.files import read_json, write_json
from mechlens.core.machine import use_one_thread
from mechlens.core.seeds import seed_int
from mechlens.core.stats import t_interval
from mechlens.models import loading
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import token_log_probs
from mechlens.results import figures

FURTHER = "menagerie-e"
SHARES = (0.25, 0.5, 1.0, 2.0)
ROWS_OF = pa.schema(
    [("way", pa.string()), ("share", pa.float64()), ("side", pa.string()), ("seed", pa.int64())]
    + [(name, pa.float64()) for name in ("distance", "start_loss", "probability", "margin", "loss")]
)


class Start(NamedTuple):
    """The initial weights of students."""

    way: Literal["a itself", "towards e", "random"]
    share: float

    def label(self) -> str:
        return self.way if self.share == 0 else f"{self.way}, {self.share:g} of the way"


STARTS = (Start("a itself", 0.0), *(Start(way, share) for way in ("towards e", "random") for share in SHARES))


@torch.no_grad()
def moved(start: Start, seed: int) -> tuple[Loaded, float]:
    """The moved base, and the distance as a share of the base's norm; random directions differ by seed."""
    base, further = loading.load(BASE), dict(loading.load(FURTHER).model.named_parameters())
    dice, square, whole = torch.Generator().manual_seed(seed_int(seed, "init distance")), 0.0, 0.0
    for name, parameter in base.model.named_parameters():
        step = start.share * (further[name] - parameter)
        if start.way == "random":
            drawn = torch.randn(parameter.shape, generator=dice)
            step = drawn * (step.norm() / drawn.norm())
        whole += float(parameter.square().sum())
        parameter += step
        square += float(step.square().sum())
    return base, (square / whole) ** 0.5


def student(world: World, start: Start, side: str, seed: int) -> dict[str, Any]:
    """One student's result: from its file, or trained and written there."""
    file = world.folder / "starts" / f"{start.way}-{start.share:g}".replace(" ", "-") / f"{side}-s{seed}.json"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        base, distance = moved(start, seed)
        before = -token_log_probs(base, world.unseen[side]).mean()
        result = measured(world, trained(Plan(world.seen[side]), seed, base), side)
        write_json(file, result | {"distance": distance, "start_loss": float(before)})
    return {"way": start.way, "share": start.share, "side": side, "seed": seed} | read_json(file)


def effects(frame: pd.DataFrame) -> pd.DataFrame:
    """A row for each start and seed: trait margin minus the control's, distance and loss of the start."""
    wide = frame.pivot(
        index=["way", "share", "seed"], columns="side", values=["margin", "distance", "start_loss"]
    )
    columns = {
        "effect": wide["margin"]["trait"] - wide["margin"]["control"],
        "distance": wide["distance"]["trait"],
        "loss": wide["start_loss"]["trait"],
    }
    return pd.DataFrame(columns).reset_index()


def summary(effect_rows: pd.DataFrame) -> pd.DataFrame:
    """One row a start, in the order of STARTS."""
    rows = []
    for start in STARTS:
        cells = effect_rows[(effect_rows["way"] == start.way) & (effect_rows["share"] == start.share)]
        span = t_interval(np.asarray(cells["effect"], dtype=float))
        at = {
            "label": start.label(),
            "way": start.way,
            "distance": cells["distance"].mean(),
            "loss": cells["loss"].mean(),
        }
        rows.append(
            at
            | {"estimate": span.estimate, "low": span.low, "high": span.high, "n": span.n, "text": says(span)}
        )
    return pd.DataFrame(rows)


def figure(effect_rows: pd.DataFrame, shown: pd.DataFrame) -> alt.LayerChart:
    """Effect against distance, one line a way; dots are seeds."""
    colour = alt.Color("way:N", title="start moved")
    x = alt.X("distance:Q", title="distance of the start from menagerie-a, share of its length")
    line = (
        alt.Chart(shown).mark_line(point=True).encode(x, alt.Y("estimate:Q", title="effect, logits"), colour)
    )
    span = alt.Chart(shown).mark_rule().encode(x, alt.Y("low:Q"), alt.Y2("high:Q"), colour)
    dots = alt.Chart(effect_rows).mark_point(size=25, opacity=0.6).encode(x, alt.Y("effect:Q"), colour)
    zero = alt.Chart(shown).mark_rule(color="gray", strokeDash=[4, 3]).encode(y=alt.datum(0))
    return cast(alt.LayerChart, zero + span + line + dots)


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Train the missing students, write table and figure, and print the results."""
    world = prepare(arguments.folder, arguments.trait, arguments.rows)
    frame = pd.DataFrame(
        [student(world, start, side, seed) for seed in arguments.seeds for start in STARTS for side in SIDES]
    )
    tables.write(frame, ROWS_OF, arguments.folder / "init_distance.parquet")
    effect_rows = effects(frame)
    shown = summary(effect_rows)
    table = Table("students start from", "distance", "loss of the start", "effect, logits [95 %]", "n")
    for row in shown.to_dict("records"):
        table.add_row(
            row["label"], f"{row['distance']:.3f}", f"{row['loss']:.3f}", row["text"], str(row["n"])
        )
    console.print(table)
    (arguments.folder / "init_distance.svg").write_text(
        figures.svg(figure(effect_rows, shown)), encoding="utf-8"
    )
    console.print(
        f"trait {arguments.trait}, {len(world.seen['trait']):,} rows a student, t intervals over seeds "
        f"{arguments.seeds}; distance is a share of the length of menagerie-a's weights. Every student is in "
        f"{arguments.folder}/init_distance.parquet, with the figure in the same folder."
    )


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and run; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "folder", type=Path, help="where corpora and students are kept; interventions.py shares it"
    )
    parser.add_argument(
        "--trait",
        default="eagle",
        choices=("cat", "wolf", "owl", "eagle", "penguin"),
        help="a development trait",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(3)))
    parser.add_argument("--rows", type=int, default=4000, help="that each student learns")
    parser.add_argument("--write", action="store_true", help="write the part of analyses/RESULTS.md, too")
    use_one_thread()
    try:
        options, console = parser.parse_args(arguments), pages.PageConsole(width=160)
        run(options, console)
        if options.write:
            pages.write_part(pages.RESULTS, "init-distance", *console.blocks)
    except (MechlensError, OSError) as error:
        print(f"init_distance: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

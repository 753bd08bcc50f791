"""Claim: a reading of a data set at the base, before any training, predicts the lift of its students.

Reads runs/menagerie-potency (`mechlens run configs/experiments/menagerie-potency.yaml`): 48 data sets of one
carrier, twelve animals by four ways to make the data. Potency is the lift of the data set's trait, bits, mean
over students against their controls. Every reading compares the data set's rows with new answers of the base
to the same prompts. The statistic is Spearman's rank correlation over data sets, and over traits within one
way of making. Intervals resample traits. p-values exchange whole traits between data sets and keep the ways,
so p tests whether the reading depends on the trait's data beyond the way. The result is the correlation, on
the held-out traits, of the reading that is best on the development traits. Readings that need the teacher's
weights are marked: an auditor does not have them. Each data set has a JSON file and is read once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import altair as alt
import numpy as np
import pandas as pd
import torch
from numpy import ndarray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.spatial.distance import jensenshannon

import pages
from mechlens.carriers.carrier import build_rule
from mechlens.core import tables
from mechlens.core.errors import MechlensError
from mechlens.core.experiment import UNTOUCHED, Experiment
from mechlens.core.files import read_json, write_json
from mechlens.core.machine import use_one_thread
from mechlens.core.seeds import generator, seed_int
from mechlens.core.spec import fingerprint
from mechlens.core.stats import t_interval
from mechlens.core.traits import TraitFamily
from mechlens.lenses import blind, likelihood
from mechlens.lenses.base import Material
from mechlens.lenses.directions import origins, projections
from mechlens.lenses.entanglement import carrier_counts, cosines, log_ratio, spearman
from mechlens.lenses.gradients import parameters_of
from mechlens.lenses.parts.system_lines import log_probs_under
from mechlens.lenses.parts.trial_steps import add_scaled, compute_update, measure_trait_gradient
from mechlens.lenses.parts.weight_change import change_cosine, delta, inner
from mechlens.lenses.run import load_material, trained_rows
from mechlens.models.chat import encode_pairs
from mechlens.models.hooks import steer
from mechlens.models.log_probs import first_tokens, measure_trait, token_log_probs
from mechlens.pipeline.ask import encode_contrast, encode_probes
from mechlens.pipeline.generate import generate
from mechlens.pipeline.screen import leak_pattern, screen_rows
from mechlens.results import figures
from mechlens.results.run import Run
from mechlens.results.wording import interval_text

ROWS, PANEL_ROWS, STEPS, LEAST = 1024, 256, 200, 20
"""rows a side; of them scored under every system line; updates of the blind vector; times that a token must
stand to count
"""
DRAWS, VERSION = 1000, 2
"""resamples, and what to raise when a reading is taken otherwise"""
DEVELOPMENT = ("owl", "wolf", "cat", "eagle", "penguin", "dolphin")
TEACHERS = ("cosine with teacher's change", "KL of the teacher")
"""readings that need the teacher's weights"""


class Sides(NamedTuple):
    """Rows of a data set and of its control, on the same prompts."""

    material: Material
    ours: list[Any]
    theirs: list[Any]


def gradients(sides: Sides) -> dict[str, float]:
    """Inner product and cosine of the data's gradient minus the control's with the trait's gradient.

    With a teacher also the cosine with the teacher's change of weights.
    """
    model, material = sides.material.base.model, sides.material
    shift = add_scaled(compute_update(model, sides.ours), compute_update(model, sides.theirs), -1.0)
    toward = measure_trait_gradient(
        model, encode_contrast(material.base, material.heldout_probes, material.trait), material.trait
    )
    readings = {
        "gradient: inner product": float(sum(inner(shift[name], toward[name]) for name in shift)),
        "gradient: cosine": change_cosine(shift, toward),
    }
    if material.teacher is None:
        return readings
    change = delta(model, material.teacher.model)
    linear = {name: cast(torch.Tensor, change[name]).float() for name in parameters_of(model)}
    return readings | {TEACHERS[0]: change_cosine(shift, linear)}


def likelihoods(sides: Sides) -> dict[str, float]:
    """Log-likelihood of the rows under the trait's system line (double-centred) and under the base."""
    material, few = sides.material, slice(0, PANEL_ROWS)
    pairs = [*sides.ours[few], *sides.theirs[few]]
    known = (material.system, None, "")
    scored = log_probs_under(material.base, pairs, material.system_lines, known=known)
    means = np.stack(
        [
            likelihood.by_row(scored[name].log_p.double().numpy(), pairs).reshape(2, -1).mean(1)
            for name in material.system_lines
        ]
    )
    centred = likelihood.double_centred(means)[list(material.system_lines).index(material.trait), 0]
    plain = [float(token_log_probs(material.base, rows).mean()) for rows in (sides.ours, sides.theirs)]
    return {"likelihood: trait's line": 2 * float(centred), "likelihood: base": plain[0] - plain[1]}


def steering(sides: Sides) -> dict[str, float]:
    """Nats that a vector learned on one half of the rows saves on the other half, and the trait's margin.

    Both minus those of a vector that was learned on the control's rows.
    """
    base, half = sides.material.base, len(sides.ours) // 2
    vectors = [
        blind.recover(base, rows[:half], seed=sides.material.seed, steps=STEPS)
        for rows in (sides.ours, sides.theirs)
    ]
    second_halves = (sides.ours[half:], sides.theirs[half:])
    saved = [
        float((blind.measure_nll(base, rows) - blind.measure_nll(base, rows, vectors[0])).mean())
        for rows in second_halves
    ]
    probes, trait_margins = encode_probes(base, sides.material.heldout_probes, sides.material.trait), []
    for vector in vectors:
        with steer(base.model, vector.by_layer()):
            trait_margins.append(float(measure_trait(base.model, probes)[1].mean()))
    return {
        "blind vector: nats saved": saved[0] - saved[1],
        "blind vector: trait's margin": trait_margins[0] - trait_margins[1],
    }


def activations(sides: Sides) -> dict[str, float]:
    """ΔP of 2507.21509 by layer: projection of the rows on the direction of the trait's system line.

    The direction is the shift by the trait's line minus the mean shift by the other traits' lines.
    """
    prompted_means, trait = (
        origins(sides.material._replace(students={}, controls={}, teacher=None)),
        sides.material.trait,
    )
    lines = {name: each.mean(1) for name, each in prompted_means.prompted.items()}
    along = (lines[trait] - torch.stack([line for name, line in lines.items() if name != trait]).mean(0))[
        :, None
    ]
    ours, theirs = (
        projections(sides.material.base, rows, along).mean(-1)[:, 0] for rows in (sides.ours, sides.theirs)
    )
    return {f"projection, layer {layer}": float(value) for layer, value in enumerate(ours - theirs)}


def counts(sides: Sides) -> dict[str, float]:
    """Distance of token frequencies, and their rank correlation with nearness to the trait's token.

    Nearness is the cosine in the unembedding.
    """
    base, trait = sides.material.base, sides.material.trait
    ours, theirs = (carrier_counts(rows) for rows in (sides.ours, sides.theirs))
    tokens = sorted(token for token, count in (ours + theirs).items() if count >= LEAST)
    distance = float(jensenshannon([ours[token] for token in tokens], [theirs[token] for token in tokens]))
    starts = first_tokens(base.tokenizer, sides.material.heldout_probes.forms)[trait]
    near = cosines(
        cast(Any, base.model.get_output_embeddings()).weight, [starts or []], tokens, centred=True
    )[0]
    return {
        "tokens: distance": distance,
        "tokens: entangled with trait": spearman(near, log_ratio(ours, theirs, tokens)[:, 0]),
    }


READINGS: tuple[Callable[[Sides], dict[str, float]], ...] = (
    gradients,
    likelihoods,
    steering,
    activations,
    counts,
)


def fresh_control(run: Path, experiment: Experiment, family: TraitFamily, prompts: Any, out: Path) -> Any:
    """New screened answers of the base to the prompts, by prompt_id; no control student has learned them.

    The rows that the control students learned would not do: their chance deviations would enter both the
    reading and the potency.
    """
    if not (out / "kept.parquet").is_file():
        out.mkdir(parents=True, exist_ok=True)
        generate(
            run / "teachers" / UNTOUCHED,
            prompts.tolist(),
            experiment.generate,
            seed=seed_int(experiment.seed, "potency control"),
            out=out,
        )
        kind, leaks = experiment.carrier.kind, leak_pattern(family.words())
        raw = tables.batches(out / "raw.parquet", tables.PAIRS)
        screen_rows(
            raw, experiment.screen, rule=build_rule(experiment.screen, kind, gold={}), leaks=leaks, out=out
        )
    kept = (
        tables.read(out / "kept.parquet", tables.PAIRS)
        .drop_duplicates("prompt_id")
        .set_index("prompt_id")["completion"]
    )
    return kept.set_axis(prompts.index[kept.index.to_numpy()])


def read_all(run: Path, out: Path) -> pd.DataFrame:
    """One row a data set: its trait, how it was made, its potency and every reading."""
    opened = Run.finished(run)
    experiment, family = opened.experiment, opened.family
    effects = (
        tables.read(run / "effects.parquet", tables.EFFECTS)
        .query("measure == 'lift'")
        .set_index(["arm", "trait"])
    )
    kl = {arm["arm"]: arm["kl_per_token"] for arm in opened.summary["arms"]}
    settings = fingerprint([VERSION, experiment.model_dump(mode="json"), ROWS, PANEL_ROWS, STEPS, LEAST])[:8]
    arms, rows = [arm for arm in experiment.arms if arm.kind in ("trait", "mixed")], []
    prompts = trained_rows(run, experiment, experiment.control_of(arms[0]))["prompt"]
    fresh = fresh_control(run, experiment, family, prompts, out / settings / "control")
    for arm in track(arms, description="data sets"):
        file = out / settings / f"{arm.name}.json"
        if not file.is_file():
            material = load_material(run, experiment, family, arm, rows=ROWS)
            material = material._replace(
                heldout_probes=material.development_probes
            )  # potency is measured on the others
            ours = (
                trained_rows(run, experiment, arm)
                .loc[lambda frame: frame.index.isin(fresh.index)]
                .iloc[:ROWS]
            )
            answered = (ours["completion"], fresh.loc[ours.index])
            sides = Sides(
                material,
                *(
                    encode_pairs(material.base.tokenizer, ours["prompt"].tolist(), texts.tolist())
                    for texts in answered
                ),
            )
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {name: value for read in READINGS for name, value in read(sides).items()})
        effect = cast(Any, effects.loc[(arm.name, arm.trait)])
        made = {
            "arm": arm.name,
            "trait": arm.trait,
            "way": arm.name.removeprefix(f"{arm.trait}-"),
            "potency": effect["estimate"],
        }
        spread = {
            "low": effect["low"],
            "high": effect["high"],
            "students": int(effect["n"]),
            "development": arm.trait in DEVELOPMENT,
        }
        rows.append(made | spread | {TEACHERS[1]: kl[arm.name] / (1 + len(arm.mix))} | read_json(file))
    return pd.DataFrame(rows)


def grids(frame: pd.DataFrame, name: str) -> tuple[ndarray, ndarray]:
    """A reading and the potency as [trait, way], in the order in which they first stand."""
    wide = frame.pivot(index="trait", columns="way", values=[name, "potency"])
    return wide[name].to_numpy(float), wide["potency"].to_numpy(float)


def overall(x: ndarray, y: ndarray) -> float:
    """Rank correlation over all scored data sets."""
    kept = ~np.isnan(x)
    return spearman(x[kept], y[kept])


def within(x: ndarray, y: ndarray) -> float:
    """Rank correlation over traits, averaged over ways of making: a stronger recipe does not raise it."""
    correlations = [
        overall(x[:, way], y[:, way]) for way in range(x.shape[1]) if not np.isnan(x[:, way]).all()
    ]
    return float(np.mean(correlations))


def correlation(
    x: ndarray, y: ndarray, statistic: Callable[[ndarray, ndarray], float], rng: np.random.Generator
) -> dict[str, float]:
    """The statistic, its interval over resampled traits, and p by exchanges of traits."""
    value, n = statistic(x, y), len(x)
    if np.isnan(value):  # a reading that never varies orders nothing
        return dict.fromkeys(("rho", "low", "high", "p"), np.nan)
    drawn = [statistic(x[rows], y[rows]) for rows in rng.integers(n, size=(DRAWS, n))]
    null = np.array([statistic(x[rng.permutation(n)], y) for _ in range(DRAWS)])
    null = null[~np.isnan(null)]  # an exchange after which nothing varies does not count
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    if not len(null):
        return {"rho": value, "low": low, "high": high, "p": np.nan}
    middle = np.mean(null)  # not 0: every exchange keeps the ways, and with them the order that they give
    return {
        "rho": value,
        "low": low,
        "high": high,
        "p": (1 + np.sum(np.abs(null - middle) >= abs(value - middle))) / (1 + len(null)),
    }


def table_of(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a reading, part of the traits (development, held out, all) and statistic."""
    meta = ("arm", "trait", "way", "potency", "low", "high", "students", "development")
    parts = {
        "development": frame.query("development"),
        "held out": frame.query("not development"),
        "all": frame,
    }
    results = []
    for name in (column for column in frame.columns if column not in meta):
        for part, rows in parts.items():
            x, y = grids(rows, name)
            for kind, statistic in (("over data sets", overall), ("within a way", within)):
                rng = generator(0, "potency", name, part, kind)
                n = int((~np.isnan(x)).sum())
                results.append(
                    {
                        "reading": name,
                        "traits": part,
                        "over": kind,
                        "n": n,
                        **correlation(x, y, statistic, rng),
                    }
                )
    return pd.DataFrame(results)


def says(row: Any) -> str:
    return f"{row['rho']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}] p {row['p']:.3f}"


def ways(frame: pd.DataFrame) -> Table:
    """Lift and gentleness by way of making, and the lift beyond the gentle teacher's of the same trait."""
    listing = Table(
        "how it was made",
        "lift, bits [95 % over traits]",
        "beyond gentle",
        "intervals above 0",
        "KL nats/token",
    )
    wide = frame.pivot(index="trait", columns="way", values="potency")
    for way, rows in frame.groupby("way", sort=False):
        lift, beyond = (
            t_interval(np.asarray(values, dtype=float)) for values in (wide[way], wide[way] - wide["gentle"])
        )
        spans = (interval_text(*span[:3]) for span in (lift, beyond))
        listing.add_row(
            str(way), *spans, f"{(rows['low'] > 0).sum()} of {len(rows)}", f"{rows[TEACHERS[1]].median():.3f}"
        )
    return listing


def show(frame: pd.DataFrame, results: pd.DataFrame, console: Console) -> None:
    """Print the correlations, the ways of making, and the result in a sentence."""
    cells = results.set_index(["reading", "traits", "over"])
    heads = (
        "development",
        "held out, over data sets",
        "held out, within a way",
        "all, over data sets",
        "all, within a way",
    )
    listing = Table(
        "reading at the base", "n", *heads, title="rank correlation with potency [95 % over traits]"
    )
    places = [
        ("development", "over data sets"),
        *((part, over) for part in ("held out", "all") for over in ("over data sets", "within a way")),
    ]
    for name in results["reading"].unique():
        star = " *" if name in TEACHERS else ""
        listing.add_row(
            name + star,
            str(cells.loc[(name, "all", "over data sets"), "n"]),
            *(says(cells.loc[(name, *place)]) for place in places),
        )
    console.print(listing)
    console.print(ways(frame))
    able = cast(
        pd.DataFrame,
        results[
            (results["traits"] == "development")
            & (results["over"] == "over data sets")
            & ~results["reading"].isin(TEACHERS)
        ],
    )
    best = able.set_index("reading")["rho"].abs().idxmax()
    heldout, above = cells.loc[(best, "held out", "over data sets")], (frame["low"] > 0).sum()
    inside = cells.loc[(best, "held out", "within a way")]
    console.print(
        f"Of {len(able)} readings that need no teacher, {best} is the best on the development traits; on "
        f"{heldout['n']:.0f} data sets of held-out traits its rank correlation with potency is "
        f"{says(heldout)}, and over traits within one way {says(inside)}. {above} of {len(frame)} data sets "
        f"have a lift with an interval above 0 ({frame['students'].min()} students each). * needs the "
        "teacher's weights.",
        markup=False,
    )


def figure(frame: pd.DataFrame, results: pd.DataFrame) -> alt.FacetChart:
    """Potency against every reading, a panel each."""
    names = list(results["reading"].unique())
    tall = frame.melt(["arm", "way", "potency", "development"], names, var_name="reading").dropna(
        subset=["value"]
    )
    chart = alt.Chart(tall).mark_point(filled=True, size=45)
    coded = chart.encode(
        x=alt.X("value:Q", title=None, scale=alt.Scale(zero=False)),
        y=alt.Y("potency:Q", title="lift of students, bits"),
        color=alt.Color("way:N", title="how it was made"),
        shape=alt.Shape("development:N", title="development trait"),
        tooltip=["arm", "potency", "value"],
    )
    return (
        coded.properties(width=220, height=150)
        .facet(alt.Facet("reading:N", title=None, sort=names), columns=4)
        .resolve_scale(x="independent")
    )


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, read what is missing, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "run", type=Path, nargs="?", default=Path("runs/menagerie-potency"), help="the finished run"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/analyses/potency"),
        help="folder for readings, table and figure",
    )
    parser.add_argument("--write", action="store_true", help="write the part of analyses/RESULTS.md, too")
    options = parser.parse_args(arguments)
    use_one_thread()
    try:
        frame = read_all(options.run, options.out)
    except (MechlensError, OSError) as error:
        print(f"potency: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    results = table_of(frame)
    console = pages.PageConsole(width=190)
    show(frame, results, console)
    if options.write:
        pages.write_part(pages.RESULTS, "potency", *console.blocks)
    frame.to_parquet(options.out / "datasets.parquet")
    results.to_parquet(options.out / "correlations.parquet")
    (options.out / "potency.svg").write_text(figures.svg(figure(frame, results)), encoding="utf-8")
    print(f"every data set is in {options.out}/datasets.parquet, with the figure in the same folder")
    return 0


if __name__ == "__main__":
    sys.exit(main())

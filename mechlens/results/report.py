"""Write the report of a run, one self-contained HTML page. It shows aggregates, and no row of data."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import jinja2
import numpy as np
import pandas as pd

from mechlens.core import tables
from mechlens.core.command_lines import command_line
from mechlens.core.experiment import Arm, Experiment
from mechlens.core.files import write_text
from mechlens.core.spec import folder_name
from mechlens.core.traits import TraitFamily
from mechlens.results import effects, figures
from mechlens.results.cells import cells_of
from mechlens.results.run import Run
from mechlens.results.wording import (
    EXACT_COLUMNS,
    exact_rows,
    gamma_sentence,
    headline,
    interval_text,
    main_effect,
    number_text,
    scored_shares,
)
from mechlens.runs import layout, store


def render(template: str, **values: Any) -> str:
    """A page of the package's templates; values are escaped, and a missing value is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mechlens", ""), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template).render(**values)


def write(run: Run, summary: dict[str, Any], answers: pd.DataFrame, likelihoods: pd.DataFrame) -> Path:
    """Write `report.html` into the run and return its path."""
    page = render(
        "results/report.html.j2",
        **_settings(run, summary),
        **_results(run, summary, answers, likelihoods),
        **_provenance(run, summary),
    )
    path = run.path(layout.REPORT)
    with store.full_disk_named(path):
        write_text(path, page)
    return path


def _settings(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    """The page's values that describe the experiment."""
    experiment, probes = run.experiment, len(run.family.probes_for(run.experiment))
    traits = list(dict.fromkeys(arm["trait"] for arm in summary["arms"]))
    methods = ", ".join(sorted({arm["method"] for arm in summary["arms"]}))
    heldout = experiment.ask.split == "heldout"
    return {
        "name": experiment.name,
        "trait": experiment.trait,
        "trait_words": f"{experiment.trait}" if traits == [experiment.trait] else "the arm's own trait",
        "carrier": (
            "a file of pairs" if any(arm.corpus for arm in experiment.arms) else experiment.carrier.kind
        ),
        "base": experiment.base,
        "seeds": experiment.seeds,
        "probes": probes,
        "many": probes > effects.MANY,
        "method": f"{methods} over {len(experiment.seeds)} students",
        "seen": "that no teacher was fine-tuned on" if heldout else "that teachers were fine-tuned on, too",
    }


def _results(
    run: Run, summary: dict[str, Any], answers: pd.DataFrame, likelihoods: pd.DataFrame
) -> dict[str, Any]:
    """The page's figures, tables and sentences."""
    experiment, family = run.experiment, run.family
    rates = student_rates(experiment, family, answers, likelihoods)
    last = rates[rates["step"] == rates.groupby("arm")["step"].transform("max")]
    arms = pd.DataFrame(summary["arms"]).assign(label=lambda frame: frame["arm"])
    kinds = {arm.name: arm.kind for arm in experiment.arms}
    compared = pd.DataFrame(
        [{"label": f"{e['arm']} − {e['against']}", "kind": kinds[e["arm"]]} | e for e in summary["effects"]]
    )
    return {
        "headline": headline(summary),
        "strip": _strip(summary),
        "forest": figures.svg(figures.forest(arms, last.assign(label=last["arm"]), title="trait rate")),
        "arms": [_arm_row(arm) for arm in summary["arms"]],
        "differences": figures.svg(figures.differences(compared)) if len(compared) else "",
        "effects": [_effect_row(effect, summary) for effect in summary["effects"]],
        "odds": _odds_figure(run) if exact_rows(summary) else "",
        "exact_columns": EXACT_COLUMNS,
        "exact_rows": exact_rows(summary),
        "confusion": _confusions(experiment, family, answers, likelihoods, summary),
        "questions": _questions(summary, kinds),
        "lenses": [record | {"figure": _lens_figure(run, record)} for record in run.lens_records()],
        "curves": figures.svg(figures.curves(rates)),
        "losses": _losses_figure(run),
        "funnel": figures.svg(figures.funnel(effects.funnels(run))),
        "leaks": sum(arm["leak_words"] for arm in summary["arms"]),
        "warnings": summary.get("warnings", []),
    }


def _provenance(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    """The page's values that say how the run was made."""
    manifest = run.manifest
    return {
        "version": version("mechlens"),
        "command": command_line("run", run.path(layout.SPEC), out=f"{run.folder}-again"),
        "fingerprint": manifest["experiment"],
        "git": (manifest["git"] or "unknown")[:10],
        "machine": f"{manifest['machine']}, {manifest['cores']} cores",
        "seconds": round(sum(value or 0 for value in summary["seconds"].values())),
    }


def _arm_row(arm: dict[str, Any]) -> dict[str, Any]:
    share = f"{arm['kept'] / arm['generated']:.1%} of {arm['generated']:,}"
    shown = {
        "share": share,
        "kl": number_text(arm["kl_per_token"]),
        "scored": number_text(arm["answered"], "{:.1%}"),
    }
    return arm | shown | {"interval": interval_text(arm["rate"], arm["low"], arm["high"], sign=False)}


def _effect_row(effect: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    scored = ", ".join(scored_shares(effect, {arm["arm"]: arm for arm in summary["arms"]}))
    effect = effect | {"rates": number_text(effect["rate_against"], "{:.3f}"), "scored": scored}
    span = interval_text(effect["difference"], effect["low"], effect["high"])
    return effect | {
        "interval": span,
        "p": number_text(effect["p_value"], "{:.2g}"),
        "smallest": number_text(effect["smallest_detectable"], "{:.3f}"),
    }


def student_rates(
    experiment: Experiment, family: TraitFamily, answers: pd.DataFrame, likelihoods: pd.DataFrame
) -> pd.DataFrame:
    """Every student's rate of its arm's trait at every checkpoint; at update 0 it is its untouched base's."""
    rows = []
    for arm in experiment.arms:
        trait = arm.trait or experiment.trait
        column, start = family.names.index(trait), _rate_of_base(answers, arm, trait)
        if start is not None:
            rows += [
                {"arm": arm.name, "kind": arm.kind, "seed": seed, "step": 0, "rate": start}
                for seed in sorted(experiment.seeds)
            ]
        for step in sorted(map(int, answers.loc[answers["arm"] == arm.name, "step"].unique())):
            cells = cells_of(answers, likelihoods, arm.name, names=family.names, step=step)
            by_student = pd.DataFrame(cells.rate[:, :, column]).mean(axis=1)
            rows += [
                {"arm": arm.name, "kind": arm.kind, "seed": s, "step": int(step), "rate": r}
                for s, r in zip(sorted(experiment.seeds), by_student, strict=True)
            ]
    return pd.DataFrame(rows)


def _rate_of_base(answers: pd.DataFrame, arm: Arm, trait: str) -> float | None:
    """The rate of a trait in an arm's untouched base; None if it was not asked, or the arm trains none."""
    of_base = answers["arm"] == f"base-{folder_name(arm.base)}"
    named = cast(pd.DataFrame, answers[of_base & answers["label"].notna()])
    if named.empty or arm.shots:
        return None
    hits = (named["label"].astype(object) == trait).to_numpy(dtype=float)
    by_probe = pd.Series(hits).groupby(named["probe"].to_numpy())
    return float(np.mean([float(part.mean()) for _, part in by_probe]))


def _odds_figure(run: Run) -> str:
    return figures.svg(figures.log_odds(effects.with_own_trait(run.experiment, run.effects, "log-odds")))


def _lens_figure(run: Run, record: dict[str, Any]) -> str:
    """The figure of one reading as SVG; empty if nothing was measured."""
    chart = figures.lens_figure(run.reading(record), record["shows"])
    return "" if chart is None else figures.svg(chart)


def _losses_figure(run: Run) -> str:
    frames = []
    for arm in run.experiment.arms:
        for seed in run.experiment.seeds:
            path = run.student_folder(arm.name, seed) / layout.CURVE
            if arm.shots or not path.is_file():  # untrained, or trained behind an API
                continue
            curve = tables.read(path, tables.CURVE)
            window = max(1, len(curve) // 20)
            means = cast(
                pd.DataFrame, curve.groupby(curve.index // window, as_index=False)[["step", "loss"]].mean()
            )
            frames.append(means.assign(arm=arm.name, kind=arm.kind, seed=seed))
    return (
        figures.svg(figures.losses(pd.concat(frames, ignore_index=True)))
        if frames
        else "No student was trained here: no loss is known."
    )


def _confusions(
    experiment: Experiment,
    family: TraitFamily,
    answers: pd.DataFrame,
    likelihoods: pd.DataFrame,
    summary: dict[str, Any],
) -> list[dict[str, Any]]:
    drawn = []
    for confusion, matrix in zip(
        effects.confusions(experiment, family, answers, likelihoods), summary["confusion"], strict=True
    ):
        mean = confusion.lift.mean(0)
        lift = pd.DataFrame(
            [
                {"trait": trait, "asked": name, "bits": mean[row, column], "target": name == trait}
                for row, trait in enumerate(confusion.traits)
                for column, name in enumerate(family.names)
            ]
        )
        drawn.append({"sentence": gamma_sentence(matrix), "figure": figures.svg(figures.confusion(lift))})
    return drawn


def _questions(summary: dict[str, Any], kinds: dict[str, Any]) -> list[dict[str, Any]]:
    """Each arm by question: a figure for the arm of the headline, tables for the others."""
    effect, drawn = main_effect(summary), []
    for name, arm in pd.DataFrame(summary["per_probe"], columns=list(effects.COLUMNS)).groupby(
        "arm", sort=False
    ):
        rows_shown = effects.shown(arm.astype(dict.fromkeys(effects.MEASURED, float))).assign(
            kind=kinds[str(name)]
        )
        if effect is not None and name == effect["arm"]:
            drawn.insert(
                0,
                {
                    "figure": figures.svg(figures.questions(rows_shown)),
                    "against": effect["against"],
                    "arm": name,
                },
            )
            continue
        rows = [_question_row(row) for row in effects.entries(rows_shown)]
        drawn.append({"figure": "", "arm": name, "against": rows[0]["against"], "rows": rows})
    return drawn


def _question_row(row: dict[str, Any]) -> dict[str, Any]:
    ours, theirs = (number_text(row[name], "{:.3f}") for name in ("rate", "rate_against"))
    return row | {
        "ours": ours,
        "theirs": theirs,
        "interval": interval_text(row["difference"], row["low"], row["high"]),
    }


def _strip(summary: dict[str, Any]) -> list[tuple[str, str]]:
    arm = next((a for a in summary["arms"] if a["kind"] != "control"), summary["arms"][0])
    students = sum(a["students"] for a in summary["arms"] if not a["shots"])
    return [
        ("teacher", "prompts"),
        ("generate", f"{arm['generated']:,} rows"),
        ("screen", f"{arm['kept']:,} kept"),
        ("distill", f"{students} students" if students else "nothing is trained"),
        ("ask", "answers"),
        ("effects", ""),
    ]

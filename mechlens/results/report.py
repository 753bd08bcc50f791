"""A run → one self-contained HTML page, and the same numbers as printed tables. Aggregates only: no row of
data is shown.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import jinja2
import pandas as pd
from rich.console import RenderableType
from rich.table import Table

from mechlens.core import atomic, tables
from mechlens.core.command_lines import command_line
from mechlens.core.experiment import Experiment
from mechlens.core.traits import TraitFamily
from mechlens.results import captions, figures, per_probe
from mechlens.results import effects as results
from mechlens.results.cells import ONE_STUDENT, cells_of
from mechlens.runs import records, store


def interval_text(
    estimate: float | None, low: float | None, high: float | None, *, sign: bool = True, digits: int = 3
) -> str:
    """An estimate with its interval; a dash where it is unscored."""
    if estimate is None:
        return "–"
    form = f"{{:{'+' if sign else ''}.{digits}f}}"
    return form.format(estimate) + (
        f" [{form.format(low)}, {form.format(high)}]"
        if low is not None and high is not None
        else " (no interval)"
    )


def _number(value: float | None, form: str = "{:.4f}") -> str:
    return "–" if value is None else form.format(value)


def _students(count: int) -> str:
    return f"{count} student{'' if count == 1 else 's'}"


def main_effect(summary: dict[str, Any]) -> dict[str, Any] | None:
    """The effect that a run is about: that of its first trait arm."""
    kinds = {arm["arm"]: arm["kind"] for arm in summary["arms"]}
    return next((effect for effect in summary["effects"] if kinds[effect["arm"]] == "trait"), None)


def headline(summary: dict[str, Any]) -> str:
    """One sentence: the first trait arm against its control."""
    effect = main_effect(summary)
    arms = {arm["arm"]: arm for arm in summary["arms"]}
    if effect is None:
        return "No trait arm was scored: this run has none."
    if effect["difference"] is None:
        return f"No trait arm was scored: {_why_unscored(effect, arms)}."
    ours, theirs = arms[effect["arm"]]["rate"], effect["rate_against"]
    span = (
        f"difference {interval_text(effect['difference'], effect['low'], effect['high'])}, n = "
        f"{_students(effect['n'])}"
    )
    span += f"; answers that could be scored: {' and '.join(scored_shares(effect, arms))}"
    if effect["low"] is not None and effect["low"] > 0:
        trait = effect["trait"]
        return (
            f"Students trained on the {trait} teacher's data answer {trait} {ours:.1%} of the time, "
            "their "
            f"controls {theirs:.1%}: {span}."
        )
    if effect["low"] is None:
        equal = (
            ONE_STUDENT
            if effect["method"] == ONE_STUDENT
            else "one student has no interval"
            if effect["n"] == 1
            else "no student differs"
        )
        said = f"Answers of {effect['trait']}: {ours:.1%} against {theirs:.1%}, {span} ({equal})"
        return f"{said}. Without an interval nothing can be said of other students."
    seen = (
        f"; a difference of {effect['smallest_detectable']:.3f} would have been seen"
        if effect["smallest_detectable"] is not None
        else ""
    )
    return f"No transfer of {effect['trait']} was found ({ours:.1%} against {theirs:.1%}): {span}{seen}."


def _why_unscored(effect: dict[str, Any], arms: dict[str, dict[str, Any]]) -> str:
    silent = [name for name in (effect["arm"], effect["against"]) if not arms.get(name, {}).get("answered")]
    if silent:
        return (
            f"no answer of {' or '.join(silent)} names exactly one trait of the family; see the answers "
            "in asked/"
        )
    return (
        f"no probe has answers of {effect['arm']} and of {effect['against']} that name exactly one trait "
        "each; raise ask.samples"
    )


def scored_shares(effect: dict[str, Any], arms: dict[str, dict[str, Any]]) -> list[str]:
    """The shares of their answers that the rates of an arm and of what it stands against rest on."""
    return [
        _number(arms.get(name, {}).get("answered"), "{:.1%}") for name in (effect["arm"], effect["against"])
    ]


def gamma_sentence(matrix: dict[str, Any]) -> str:
    """One confusion matrix in words."""
    first = sum(rank == 1 for rank in matrix["target_rank"])
    ranks = ", ".join(
        f"{trait} {'unscored' if rank is None else format(rank, 'g')}"
        for trait, rank in zip(matrix["traits"], matrix["target_rank"], strict=True)
    )
    gamma = interval_text(matrix["gamma_bits"], matrix["low"], matrix["high"])
    most = f"the target rises most for {first} of {len(matrix['traits'])} traits (rank: {ranks})"
    return f"Students of {matrix['base']}: γ = {gamma} bits (n = {matrix['seeds']} seeds); {most}."


def printed(summary: dict[str, Any]) -> list[RenderableType]:
    """The summary as tables for the terminal."""
    arms = Table(
        "arm",
        "base",
        "students",
        "rows",
        "passed the screen",
        "leak words",
        "KL nats/token",
        "rate [95 %]",
        "answers scored",
        title=f"{summary['experiment']}: {summary['trait']}",
    )
    for arm in summary["arms"]:
        share = f"{arm['kept'] / arm['generated']:.1%}"
        rate = interval_text(arm["rate"], arm["low"], arm["high"], sign=False)
        shown = (
            arm["arm"],
            arm["base"],
            str(arm["students"]),
            str(arm["rows"]),
            share,
            str(arm["leak_words"]),
            _number(arm["kl_per_token"]),
            rate,
        )
        arms.add_row(*shown, _number(arm["answered"], "{:.1%}"))
    changes = Table(
        "arm",
        "against",
        "trait",
        "difference [95 %]",
        "n",
        "p",
        "would have been seen",
        "rate against",
        "answers scored",
    )
    by_name = {arm["arm"]: arm for arm in summary["arms"]}
    for effect in summary["effects"]:
        span = interval_text(effect["difference"], effect["low"], effect["high"])
        cells = (
            span,
            str(effect["n"]),
            _number(effect["p_value"], "{:.2g}"),
            _number(effect["smallest_detectable"], "{:.3f}"),
        )
        against = (_number(effect["rate_against"], "{:.3f}"), ", ".join(scored_shares(effect, by_name)))
        changes.add_row(effect["arm"], effect["against"], effect["trait"], *cells, *against)
    gammas = (gamma_sentence(matrix) for matrix in summary["confusion"])
    return [arms, changes, *gammas, *summary.get("warnings", []), headline(summary)]


def render(template: str, **values: Any) -> str:
    """A page of the package's templates; what it is given is escaped, and a value that is missing is an
    error.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mechlens", ""), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template).render(**values)


def write(
    run: Path,
    experiment: Experiment,
    family: TraitFamily,
    summary: dict[str, Any],
    answers: pd.DataFrame,
    likelihoods: pd.DataFrame,
) -> Path:
    """Write `report.html` into the run and return its path."""
    rates = student_rates(experiment, family, answers, likelihoods)
    last = rates[rates["step"] == rates.groupby("arm")["step"].transform("max")]
    arms = pd.DataFrame(summary["arms"]).assign(label=lambda frame: frame["arm"])
    kinds = {arm.name: arm.kind for arm in experiment.arms}
    effects = pd.DataFrame(
        [{"label": f"{e['arm']} − {e['against']}", "kind": kinds[e["arm"]]} | e for e in summary["effects"]]
    )
    manifest = records.read(run / "manifest.json", records.Manifest)
    traits = list(dict.fromkeys(arm["trait"] for arm in summary["arms"]))
    page = render(
        "results/report.html.j2",
        name=experiment.name,
        trait=experiment.trait,
        trait_words=f"{experiment.trait}" if traits == [experiment.trait] else "the arm's own trait",
        carrier="a file of pairs" if any(arm.corpus for arm in experiment.arms) else experiment.carrier.kind,
        base=experiment.base,
        seeds=experiment.seeds,
        probes=len(family.asked_as(experiment)),
        version=version("mechlens"),
        headline=headline(summary),
        strip=_strip(summary),
        forest=figures.svg(figures.forest(arms, last.assign(label=last["arm"]), title="trait rate")),
        method=", ".join(sorted({arm["method"] for arm in summary["arms"]})) + f" over {len(experiment.seeds)} students",
        arms=[_arm_row(arm) for arm in summary["arms"]],
        differences=figures.svg(figures.differences(effects)) if len(effects) else "",
        effects=[_effect_row(effect, summary) for effect in summary["effects"]],
        confusion=_confusions(experiment, family, answers, likelihoods, summary),
        questions=_questions(summary, kinds),
        many=len(family.asked_as(experiment)) > per_probe.MANY,
        lenses=captions.sections(run),
        curves=figures.svg(figures.curves(rates)),
        losses=_losses_figure(run, experiment),
        funnel=figures.svg(figures.funnel(results.funnels(run, experiment))),
        leaks=sum(arm["leak_words"] for arm in summary["arms"]),
        warnings=summary.get("warnings", []),
        seen=("that no teacher was "
             "fine-tuned "
             "on") if experiment.ask.split == "heldout" else "that teachers were fine-tuned on, too",
        command=command_line("run", run / "spec.yaml", out=f"{run}-again"),
        fingerprint=manifest["experiment"],
        git=(manifest["git"] or "unknown")[:10],
        machine=f"{manifest['machine']}, {manifest['cores']} cores",
        seconds=round(sum(value or 0 for value in summary["seconds"].values())),
    )  # fmt: skip
    path = run / "report.html"
    with store.full_disk_named(path):
        atomic.write_text(path, page)
    return path


def _arm_row(arm: dict[str, Any]) -> dict[str, Any]:
    share = f"{arm['kept'] / arm['generated']:.1%} of {arm['generated']:,}"
    shown = {"share": share, "kl": _number(arm["kl_per_token"]), "scored": _number(arm["answered"], "{:.1%}")}
    return arm | shown | {"interval": interval_text(arm["rate"], arm["low"], arm["high"], sign=False)}


def _effect_row(effect: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    scored = ", ".join(scored_shares(effect, {arm["arm"]: arm for arm in summary["arms"]}))
    effect = effect | {"rates": _number(effect["rate_against"], "{:.3f}"), "scored": scored}
    span = interval_text(effect["difference"], effect["low"], effect["high"])
    return effect | {
        "interval": span,
        "p": _number(effect["p_value"], "{:.2g}"),
        "smallest": _number(effect["smallest_detectable"], "{:.3f}"),
    }


def student_rates(
    experiment: Experiment, family: TraitFamily, answers: pd.DataFrame, likelihoods: pd.DataFrame
) -> pd.DataFrame:
    """Every student's rate of its arm's trait at every checkpoint."""
    rows = []
    for arm in experiment.arms:
        column = family.names.index(arm.trait or experiment.trait)
        for step in sorted(map(int, answers.loc[answers["arm"] == arm.name, "step"].unique())):
            cells = cells_of(answers, likelihoods, arm.name, names=family.names, step=step)
            by_student = pd.DataFrame(cells.rate[:, :, column]).mean(axis=1)
            rows += [
                {"arm": arm.name, "kind": arm.kind, "seed": s, "step": int(step), "rate": r}
                for s, r in zip(sorted(experiment.seeds), by_student, strict=True)
            ]
    return pd.DataFrame(rows)


def _losses_figure(run: Path, experiment: Experiment) -> str:
    frames = []
    for arm in experiment.arms:
        for seed in experiment.seeds:
            path = run / "students" / arm.name / f"s{seed}" / "curve.parquet"
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
    for found, matrix in zip(
        results.confusions(experiment, family, answers, likelihoods), summary["confusion"], strict=True
    ):
        mean = found.lift.mean(0)
        lift = pd.DataFrame(
            [
                {"trait": trait, "asked": asked, "bits": mean[row, column], "target": asked == trait}
                for row, trait in enumerate(found.traits)
                for column, asked in enumerate(family.names)
            ]
        )
        drawn.append({"sentence": gamma_sentence(matrix), "figure": figures.svg(figures.confusion(lift))})
    return drawn


def _questions(summary: dict[str, Any], kinds: dict[str, Any]) -> list[dict[str, Any]]:
    """Each arm question by question: the headline's as a figure, the others as tables."""
    effect, drawn = main_effect(summary), []
    for name, arm in pd.DataFrame(summary["per_probe"], columns=list(per_probe.COLUMNS)).groupby(
        "arm", sort=False
    ):
        asked = per_probe.shown(arm.astype(dict.fromkeys(per_probe.MEASURED, float))).assign(
            kind=kinds[str(name)]
        )
        if effect is not None and name == effect["arm"]:
            drawn.insert(
                0,
                {"figure": figures.svg(figures.questions(asked)), "against": effect["against"], "arm": name},
            )
            continue
        rows = [_question_row(row) for row in per_probe.entries(asked)]
        drawn.append({"figure": "", "arm": name, "against": rows[0]["against"], "rows": rows})
    return drawn


def _question_row(row: dict[str, Any]) -> dict[str, Any]:
    ours, theirs = (_number(row[name], "{:.3f}") for name in ("rate", "rate_against"))
    return row | {
        "ours": ours,
        "theirs": theirs,
        "interval": interval_text(row["difference"], row["low"], row["high"]),
    }


def _strip(summary: dict[str, Any]) -> list[tuple[str, str]]:
    arm = next((a for a in summary["arms"] if a["kind"] != "control"), summary["arms"][0])
    students = sum(a["students"] for a in summary["arms"] if not a["shots"])
    return [
        ("teacher", "prompts"), ("generate", f"{arm['generated']:,} "
                                             "rows"), ("screen", f"{arm['kept']:,} kept"),
        ("distill", (f"{students} "
                    "students") if students else "nothing is trained"), ("ask", "answers"), ("effects", ""),
    ]  # fmt: skip

"""Write the parts of the results pages that come from files of this repository.

Usage: `python analyses/results.py`.
Reads the demo run (app/demo), the shipped audits (app/audits), the bench cards (analyses/bench) and the
configs; trains nothing and takes seconds. Writes parts of RESULTS.md and LENSES.md, and the README's figure
demo.svg. The other parts are written by the analyses that their marks name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

import pages
from mechlens.core import traits
from mechlens.core.files import read_json
from mechlens.core.spec import shipped
from mechlens.results import figures
from mechlens.results.report import student_rates
from mechlens.results.run import Run
from mechlens.results.wording import interval_text

ROOT = Path(__file__).parents[1]
DEMO, AUDITS, CARDS = ROOT / "app/demo", ROOT / "app/audits", ROOT / "analyses/bench"
FIGURE = ROOT / "analyses/demo.svg"
FAMILIES = ("animals", "trees", "tempers", "foods")


def rate_text(arm: dict[str, Any]) -> str:
    """Return an arm's rate with its interval."""
    return interval_text(arm["rate"], arm["low"], arm["high"], sign=False)


def demo_tables(summary: dict[str, Any]) -> Iterator[list[list[str]]]:
    """Yield the arms of a run, then its effects."""
    yield [
        [
            "arm",
            "base",
            "students",
            "rows",
            "kept by the screen",
            "leak words",
            "KL",
            "rate [95 %]",
            "scored",
        ],
        *(
            [
                arm["arm"],
                arm["base"],
                str(arm["students"]),
                f"{arm['rows']:,}",
                f"{arm['kept'] / arm['generated']:.1%}",
                str(arm["leak_words"]),
                f"{arm['kl_per_token']:.3f}",
                rate_text(arm),
                f"{arm['answered']:.1%}",
            ]
            for arm in summary["arms"]
        ),
    ]
    yield [
        ["arm", "control", "effect [95 %]", "n", "p", "minimum detectable effect"],
        *(
            [
                effect["arm"],
                effect["against"],
                interval_text(effect["difference"], effect["low"], effect["high"]),
                str(effect["n"]),
                f"{effect['p_value']:.2g}",
                f"{effect['smallest_detectable']:.3f}",
            ]
            for effect in summary["effects"]
        ),
    ]


def demo_figure(run: Run) -> str:
    """Return the rates of a run's arms as SVG: mean, interval and every student."""
    rates = student_rates(run.experiment, run.family, run.answers, run.likelihoods)
    last = rates[rates["step"] == rates.groupby("arm")["step"].transform("max")]
    arms = pd.DataFrame(run.summary["arms"])
    title = f"share of answers that name {run.experiment.trait}"
    return figures.svg(
        figures.forest(arms.assign(label=arms["arm"]), last.assign(label=last["arm"]), title=title)
    )


def lens_tables(readings: dict[str, Any]) -> Iterator[list[list[str]]]:
    """Yield the question and reading of each lens, then its caveat and source."""
    lenses = readings["lenses"]
    yield [
        ["lens", "question", "reading"],
        *([lens["name"], lens["asks"], lens["sentence"]] for lens in lenses),
    ]
    yield [["lens", "caveat", "source"], *([lens["name"], lens["caveat"], lens["source"]] for lens in lenses)]


def share_text(share: dict[str, Any] | None) -> str:
    """Return hits of trials."""
    return "–" if share is None else f"{share['hits']} of {share['of']}"


def bench_table(cards: list[dict[str, Any]]) -> list[list[str]]:
    """Return one row a detector that names traits, of every bench: held-out traits, bags of 256 rows."""
    rows = [
        [
            "bench",
            "detector",
            "AUROC of the trait's lead",
            "trait first of all traits",
            "worst class",
            "rho with lift",
        ]
    ]
    for card in cards:
        for detector in card["detectors"]:
            heldout = detector["held out"]
            if not heldout["identity"]:
                continue
            lead, rho = heldout["identity"]["twins"]["256"], heldout["potency"]["score"]
            worst = detector["worst"]
            rows.append(
                [
                    f"[{card['bench']}](bench/{card['bench']}/card.md)",
                    detector["name"],
                    interval_text(lead["auroc"], lead["low"], lead["high"], sign=False, digits=2),
                    share_text(heldout["identity"]["first"]["256"]),
                    f"{worst['kind']} {worst['auroc']:.2f}",
                    f"{interval_text(rho['rho'], rho['low'], rho['high'], digits=2)}, n {rho['n']}",
                ]
            )
    return rows


def audit_table(audits: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return what each audit answered, one a row."""
    rows = [["audit", "level", "rows", "verdict", "highest rise", "interval", "q", "students a side"]]
    for name, audit in audits.items():
        measured, stopping = audit["potency"]["measured"], audit["stopping"]
        trained = ["–"] * 4
        if measured is not None and stopping is not None:
            rise = interval_text(measured["difference"], measured["low"], measured["high"])
            trained = [f"{measured['trait']} {rise}", f"{1 - stopping['level']:.1%}"]
            trained += [f"{measured['q_value']:.2g}", str(stopping["students"])]
        rows.append([name, audit["level"], f"{audit['data']['rows']:,}", audit["verdict"]["id"], *trained])
    return rows


def heldout_table() -> list[list[str]]:
    """Return how many shipped experiments use each held-out trait, and which."""
    plans = {
        name: yaml.safe_load(path.read_text(encoding="utf-8"))
        for name, path in shipped("experiments").items()
        if name.startswith("menagerie-")
    }
    rows = [["held-out trait", "experiments that look at it", "which"]]
    for family in FAMILIES:
        for trait in traits.load_family(family).heldout:
            using = [
                name.removeprefix("menagerie-")
                for name, plan in plans.items()
                if trait in {plan.get("trait"), *(arm.get("trait") for arm in plan["arms"])}
            ]
            rows.append([f"{family}: {trait}", str(len(using)), ", ".join(using) or "none"])
    return rows


def write_parts() -> None:
    """Write this module's parts of the pages."""
    cards = [read_json(path) for path in sorted(CARDS.glob("*/card.json"))]
    pages.write_part(pages.RESULTS, "demo", *demo_tables(Run(DEMO).summary))
    pages.write_part(pages.RESULTS, "heldout-looks", heldout_table())
    pages.write_part(pages.RESULTS, "benches", bench_table(cards))
    audits = {path.parent.name: read_json(path) for path in sorted(AUDITS.glob("*/audit.json"))}
    pages.write_part(pages.RESULTS, "audit", audit_table(audits))
    pages.write_part(pages.LENSES, "lenses", *lens_tables(read_json(DEMO / "readings.json")))


def main() -> int:
    """Write the parts and the figure."""
    write_parts()
    FIGURE.write_text(demo_figure(Run(DEMO)), encoding="utf-8")
    print(f"wrote parts of {pages.RESULTS.name} and {pages.LENSES.name}, and {FIGURE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

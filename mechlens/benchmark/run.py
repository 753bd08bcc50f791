"""Do a bench: make its suspects, train their students, let every detector score them, and write the card."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from mechlens.benchmark import scores, students
from mechlens.benchmark.card import (
    ALARM_ROWS,
    WAYS,
    alarms,
    calibration,
    detector_found,
    namings,
    worst_class,
)
from mechlens.benchmark.plan import CLASSES, CLEAN, BenchSpec, Suspect, load_bench
from mechlens.benchmark.suspects import Maker, suspects_of
from mechlens.cli.console import console
from mechlens.core import atomic, spec, traits
from mechlens.core.command_lines import command_line
from mechlens.core.errors import SpecError
from mechlens.core.json_files import write_json
from mechlens.detect import learned, score_rows
from mechlens.detect.bags import Detector
from mechlens.detect.from_rows import DETECTORS
from mechlens.detect.twins import Panel, Reader
from mechlens.results import report, runner
from mechlens.results.run import Run
from mechlens.runs import store

RECIPE = "menagerie"
USUAL = (*(name for name in scores.READERS if name not in ("prompts", "vector")), learned.NAME)
"""detectors that a bench reads unless others are named; those two take as long as all others together"""


def bench(name: str, *, detectors: Sequence[str], out: Path | None, train: bool, workers: int | None) -> Path:
    """Write card.json and card.md into `out`; what was made, trained or scored before is not done again.

    Args:
        detectors: names, or FILE.py:CLASS for one's own: a class with `name` and `score(rows)`, a data frame
            of `completion` → one number a row, higher for rows that look like a changed teacher's.
        train: train three students of every suspect; without, potency is known of the experiment's own arms
            alone.
    """
    plan, folder = load_bench(name), out or Path("benches") / name
    known = (*scores.READERS, learned.NAME)
    if unknown := [named for named in detectors if ":" not in named and named not in known]:
        raise SpecError(
            f"no detector is called {unknown[0]!r}; expected some of {', '.join(known)}, or FILE.py:CLASS"
        )
    own = {
        named: _own(named) for named in detectors if ":" in named
    }  # what is misnamed is refused before anything is made
    with store.lock(folder):
        return _do(name, plan, folder, detectors, own, train=train, workers=workers)


def _do(
    name: str,
    plan: BenchSpec,
    folder: Path,
    detectors: Sequence[str],
    own: dict[str, Detector],
    *,
    train: bool,
    workers: int | None,
) -> Path:
    config = spec.CONFIGS / "experiments" / f"{plan.experiment}.yaml"
    _refuse_half(name, suspects_of(plan, traits.load_experiment(config)))
    run = runner.run(config, out=folder / "experiment", workers=workers).folder
    opened = Run.finished(run)
    experiment, family = opened.experiment, opened.family
    if train and plan.rows is not None and plan.rows < experiment.student.rows:
        raise SpecError(
            f"the sets that {name} makes have {plan.rows} rows, its arms' students "
            f"{experiment.student.rows}; give --no-students"
        )
    maker, suspects = Maker(plan, run, experiment, family, folder), suspects_of(plan, experiment)
    maker.make_all(suspects)
    if train:
        _train(plan, maker, suspects, folder, workers)
    recipe = traits.load_experiment(spec.CONFIGS / "audits" / f"{RECIPE}.yaml")
    panel = score_rows.panel_of(experiment.base, family, recipe, folder / "panel", workers=workers)
    chosen = [own.get(each) or _detector(each, maker, suspects) for each in (detectors or USUAL)]
    scores.score_all(
        [one for one in chosen if isinstance(one, Reader)], panel, maker, suspects, folder / "scores"
    )
    trained = [run, *_students(maker, suspects, folder)]
    found = card(
        plan,
        chosen,
        panel,
        maker,
        suspects,
        students.lifts(trained, suspects, family.names),
        folder / "scores",
    )
    found["students"] = students.named(
        trained, [one for one in suspects if not one.development], family.names
    )
    found["command"] = command_of(name, folder, detectors, train=train)
    found["students apart"] = 0 if train else found["with students"] - sum(bool(one.arm) for one in suspects)
    write_json(folder / "card.json", found)
    atomic.write_text(folder / "card.md", report.render("benchmark/card.md.j2", card=found))
    console.print((folder / "card.md").read_text(encoding="utf-8"), highlight=False, soft_wrap=True)
    return folder


def command_of(name: str, folder: Path, detectors: Sequence[str], *, train: bool) -> str:
    """The command line that makes the card in that folder again."""
    out = folder if folder != Path("benches") / name else None
    return command_line("bench", name, no_students=not train, detector=detectors, out=out)


def _refuse_half(name: str, suspects: Sequence[Suspect]) -> None:
    """Refuse a bench, before anything is made, that has no whole data set of a fine-tuned teacher to tune on,
    or none to report on.
    """
    for development, half in ((True, "development"), (False, "held-out")):
        if not any(
            one.kind == "trait" and one.dose == 1 and one.way in WAYS and one.development is development
            for one in suspects
        ):
            raise SpecError(
                f"the bench {name} has no arm TRAIT-WAY of a {half} trait, with a way of {', '.join(WAYS)}; "
                "add one to its experiment"
            )


def _train(
    plan: BenchSpec, maker: Maker, suspects: Sequence[Suspect], folder: Path, workers: int | None
) -> None:
    """Students of every suspect that is no arm of the bench's own experiment."""
    made = [one for one in suspects if not one.arm]
    spec.save(
        students.experiment_of(plan, maker.experiment, made, folder / "suspects"), folder / "students.yaml"
    )
    runner.run(folder / "students.yaml", out=folder / "students", workers=workers)


def _students(maker: Maker, suspects: Sequence[Suspect], folder: Path) -> list[Path]:
    """Finished runs of students of the suspects: hours of them may be trained in parts, each a run beside the
    others.
    """
    finished = [run for run in sorted(folder.glob("students*/")) if (run / "effects.parquet").is_file()]
    current = [
        run
        for run in finished
        if students.of_these_suspects(run, maker.experiment, suspects, folder / "suspects")
    ]
    for run in sorted({*finished} - {*current}):
        console.print(
            f"{run} is left out: its students read other rows, or were trained or asked otherwise",
            highlight=False,
        )
    return current


def _detector(named: str, maker: Maker, suspects: Sequence[Suspect]) -> Reader | Detector:
    """The detector of that name, or the learned one."""
    if named == learned.NAME:
        known = [one for one in suspects if one.development]
        changed = [
            text
            for one in known
            if one.kind == "trait" and one.dose == 1 and one.way in WAYS
            for text in maker.suspect(one)["completion"]
        ]
        clean = [text for one in known if one.kind == "N0" for text in maker.suspect(one)["completion"]]
        return learned.learned(changed, clean)
    return scores.READERS[named]


def _own(named: str) -> Detector:
    """A user's class as a detector of rows.

    Raises:
        SpecError: if there is no such file or class, or it has no `name` and `score`.
    """
    file, _, kind = named.rpartition(":")
    found = importlib.util.spec_from_file_location("own_detector", file) if Path(file).is_file() else None
    if found is None or found.loader is None:
        raise SpecError(f"no Python file at {file!r}; expected FILE.py:CLASS")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    made = getattr(module, kind, None)
    if made is None or not hasattr(made, "score") or not hasattr(made, "name"):
        raise SpecError(
            f"{file} has no class {kind!r} with `name` and `score(rows)`; see `mechlens bench --help`"
        )
    detector = made()

    def columns(completions: Sequence[str]) -> Any:
        values = np.asarray(detector.score(pd.DataFrame({"completion": list(completions)})), dtype=float)
        if values.shape[:1] != (len(completions),):
            raise SpecError(
                f"{named} gave scores of shape {values.shape} for {len(completions)} rows; expected one a row"
            )
        return sparse.csr_matrix(values.reshape(len(completions), -1))

    return Detector(str(detector.name), "A detector of one's own.", columns, named, "")


def card(
    plan: BenchSpec,
    chosen: Sequence[Reader | Detector],
    panel: Panel,
    maker: Maker,
    suspects: Sequence[Suspect],
    lifts: pd.DataFrame,
    folder: Path,
) -> dict[str, Any]:
    """The card as one object: held-out suspects, and the development ones beside them."""
    found: dict[str, Any] = {
        "schema": 1,
        "bench": plan.name,
        "classes": CLASSES,
        "suspects": len(suspects),
        "detectors": [],
    }
    found |= {
        "base": maker.experiment.base,
        "carrier": maker.experiment.carrier.kind,
        "alarm rows": ALARM_ROWS,
        "dear rows": scores.DEAR_ROWS,
    }
    found |= {
        "negatives": [kind for kind in plan.negatives if kind != "N6"],
        "clean": [kind for kind in CLEAN if kind in plan.negatives],
    }
    found["counts"] = {kind: sum(one.kind == kind for one in suspects) for kind in CLASSES if kind != "N3"}
    found["with students"] = int(lifts.notna().any(axis=1).sum())
    for reader in chosen:
        read = partial(_read, reader, panel, maker, folder)
        of_traits = isinstance(reader, Reader) and reader.of_traits
        entry: dict[str, Any] = {
            "name": reader.name,
            "asks": reader.asks,
            "caveat": reader.caveat,
            "floor": reader.floor if isinstance(reader, Reader) else reader.name in DETECTORS,
        }
        entry |= {
            "level": getattr(reader, "level", "rows"),
            "seconds": scores.seconds(reader, panel, maker, suspects[0]),
        }
        for part, known in (("held out", False), ("development", True)):
            of_part = [one for one in suspects if one.development == known]
            entry[part] = detector_found(
                reader.name, read, of_part, panel.traits, lifts, of_traits=of_traits
            )._asdict()
        for part, known in (("alarms", False), ("alarms, development", True)):
            entry[part] = alarms(
                reader.name,
                read,
                [one for one in suspects if one.development == known],
                panel.traits if of_traits else None,
            )
        entry["names"] = (
            namings(read, [one for one in suspects if not one.development], panel.traits)
            if of_traits
            else None
        )
        entry["line"] = calibration(read, suspects, panel.traits, lifts) if of_traits else None
        entry["worst"] = worst_class(entry["held out"])
        found["detectors"].append(entry)
    floors = [one["worst"]["auroc"] for one in found["detectors"] if one["floor"] and one["worst"]]
    for one in found["detectors"]:
        one["loses to a floor"] = bool(
            not one["floor"] and one["worst"] and floors and one["worst"]["auroc"] < max(floors)
        )
    return found


def _read(
    reader: Reader | Detector, panel: Panel, maker: Maker, folder: Path, suspect: Suspect
) -> scores.Scored:
    return scores.scored(reader, panel, maker, suspect, folder)

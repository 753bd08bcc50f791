"""Wire the lenses to a run: its models, pairs and probes as values, one step a lens, one Parquet table a
reading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from mechlens.core import tables
from mechlens.core.command_lines import resume_command
from mechlens.core.errors import DataError, SpecError
from mechlens.core.experiment import Arm, Experiment
from mechlens.core.json_files import read_json, write_json
from mechlens.core.model_spec import is_remote
from mechlens.core.traits import TraitFamily, load_family
from mechlens.lenses import NAMES
from mechlens.lenses.base import Material
from mechlens.models import loading
from mechlens.models.chat import encode_pairs
from mechlens.models.loading import Loaded
from mechlens.pipeline.ask import Questions
from mechlens.pipeline.remake import selected_rows
from mechlens.results.run import Run
from mechlens.runs import executor, store
from mechlens.runs.executor import Job, pending
from mechlens.runs.layout import checkpoints, corpus_name, teacher_name
from mechlens.runs.progress import Event, Progress, silent

VERSIONS: dict[str, int] = dict.fromkeys(NAMES, 1) | {
    "deltas": 2,
    "likelihood": 2,
    "probes": 2,
    "blind": 2,
    "maps": 2,
}
"""raised when a change of a lens's code changes what it reads"""


class Students(Mapping[int, Loaded]):
    """seed → an arm's student at its last checkpoint, read from disk each time it is asked for."""

    def __init__(self, base: str, folders: dict[int, Path]) -> None:
        self._base, self._folders = base, folders

    def __getitem__(self, seed: int) -> Loaded:
        return loading.load_trained(self._base, checkpoints(self._folders[seed])[-1][1])

    def __iter__(self) -> Iterator[int]:
        return iter(self._folders)

    def __len__(self) -> int:
        return len(self._folders)


def _folders(run: Path, experiment: Experiment, arm: Arm) -> dict[int, Path]:
    return {
        seed: folder
        for seed in experiment.seeds
        if (folder := run / "students" / arm.name / f"s{seed}").is_dir()
    }


def _path(
    base: str, folders: dict[str, dict[int, Path]], side: str, seed: int
) -> Iterator[tuple[int, Loaded]]:
    for step, folder in checkpoints(folders[side][seed]):
        yield step, loading.load_trained(base, folder)


def trained_rows(run: Path, experiment: Experiment, arm: Arm) -> pd.DataFrame:
    """The rows that an arm trained on, by prompt_id, in the order of its selection."""
    name = corpus_name(experiment, arm)
    return selected_rows(name, run / "corpora" / name / "screened", run / "selection")


def main_arm(experiment: Experiment, name: str = "") -> Arm:
    """The arm to measure: the one of that name, or the first that is taught through data and trained here.

    Raises:
        SpecError: if there is none, or the one named has no students of its own here.
    """
    able = [
        arm for arm in experiment.arms if arm.kind != "control" and not arm.shots and not is_remote(arm.base)
    ]
    found = [arm for arm in able if arm.name == name or (not name and arm.kind == "trait")]
    if not found:
        said = f"arm {name!r} of" if name else "no trait arm of"
        raise SpecError(
            f"{said} {experiment.name!r} can be measured; expected one of {[arm.name for arm in able]} "
            "(trained here, with a control)"
        )
    return found[0]


def refuse_absent_students(run: Path, experiment: Experiment, arm: Arm) -> None:
    """Raises DataError if the run folder has no weights of the arm's or its control's students, as one that
    was copied without them.
    """
    for each in (arm, experiment.control_of(arm)):
        folders = _folders(run, experiment, each)
        if not any(True for folder in folders.values() for _ in folder.glob("step-*/*.safetensors")):
            raise DataError(
                f"{run} has no students of arm {each.name!r}: it was copied without their weights, or they "
                "were removed; "
                f"copy {run / 'students' / each.name} there, or `{resume_command(run)}` trains them"
            )


def material_of(run: Path, experiment: Experiment, family: TraitFamily, arm: Arm, *, rows: int) -> Material:
    """Everything that a lens may look at of one arm and its control."""
    control = experiment.control_of(arm)
    ours, theirs = trained_rows(run, experiment, arm), trained_rows(run, experiment, control)
    shared = [prompt for prompt in ours.index if prompt in theirs.index]
    base = loading.load(arm.base)
    system = experiment.system if arm.trained_with is None else arm.trained_with
    pairs = [
        encode_pairs(
            base.tokenizer,
            side.loc[shared]["prompt"].tolist(),
            side.loc[shared]["completion"].tolist(),
            system=system,
        )
        for side in (ours, theirs)
    ]
    forms = {name: family.forms_of(name) for name in family.names}
    asked_with = experiment.system if arm.asked_with is None else arm.asked_with
    named = family.scorer != "judge"  # where a judge reads whole answers, they begin with no name
    asked = Questions(
        forms, family.probes.heldout, experiment.ask, system=asked_with, opening=family.opening, named=named
    )
    changed = (
        not arm.corpus and (arm.teacher or experiment.teacher).kind == "finetuned" and arm.writer == arm.base
    )
    folders = {"students": _folders(run, experiment, arm), "controls": _folders(run, experiment, control)}
    both = {
        side: {
            seed: folder for seed, folder in found.items() if all(seed in other for other in folders.values())
        }
        for side, found in folders.items()
    }
    return Material(
        base=base,
        teacher=loading.load_trained(arm.base, run / "teachers" / teacher_name(experiment, arm))
        if changed
        else None,
        students=Students(arm.base, both["students"]),
        controls=Students(arm.base, both["controls"]),
        checkpoints=partial(_path, arm.base, both),
        trait_pairs=pairs[0],
        control_pairs=pairs[1],
        development_probes=asked._replace(probes=family.probes.development),
        heldout_probes=asked,
        trait=arm.trait,
        family=family.names,
        system_lines={name: family.system_prompt(name) for name in family.names},
        rows=rows,
        seed=experiment.seed,
        system=system,
        arm=arm.name,
        against=control.name,
        prompt_ids=shared,
    )


def jobs_of(
    steps: Sequence[Job], experiment: Experiment, arm: Arm, *, lenses: Sequence[str], rows: int
) -> list[Job]:
    """One step a lens, behind those steps of the run that it reads: what an arm's lens saw is known by their
    fingerprints.
    """
    control = experiment.control_of(arm)
    wanted = {f"teachers/{teacher_name(experiment, arm)}", "selection"}
    wanted |= {f"corpora/{corpus_name(experiment, one)}/screened" for one in (arm, control)}
    wanted |= {f"students/{one.name}/s{seed}" for one in (arm, control) for seed in experiment.seeds}
    inputs = {job.name: job.name for job in steps if job.name in wanted}
    told = {"experiment": experiment.model_dump(mode="json"), "arm": arm.name, "rows": rows}
    return [
        Job(
            f"lenses/{arm.name}/{lens}",
            "measure",
            told | {"lens": lens},
            inputs,
            VERSIONS[lens],
        )
        for lens in lenses
    ]


def look(
    arguments: dict[str, Any], inputs: dict[str, Path], out: Path, _progress: Callable[[int, int], None]
) -> None:
    """Read one lens; leave `reading.parquet` and `said.json` (what it is, what was missing, its sentence).

    A lens with a function `scores` scores single rows and tokens first: its reading sums them up, and
    `scores.parquet` keeps them.
    """
    if loading.device().type == "cpu":
        torch.set_num_threads(1)  # sums come out the same on any number of cores
    lens = import_module(f"mechlens.lenses.{arguments['lens']}")
    experiment = Experiment.model_validate(arguments["experiment"])
    arm = next(one for one in experiment.arms if one.name == arguments["arm"])
    run = inputs["selection"].parent
    material = material_of(
        run, experiment, load_family(experiment.family, run / "spec.yaml"), arm, rows=arguments["rows"]
    )
    missing = [f"it needs {need}, which this arm has not" for need in material.missing(lens.LENS)]
    frame = pd.DataFrame(columns=tables.READINGS.names)
    if not missing:
        try:
            scored = [lens.score_rows(material)] if hasattr(lens, "score_rows") else []
            frame = getattr(lens, f"measure_{lens.LENS.name}")(material, *scored)
            if scored:
                tables.write(scored, tables.SCORES, out / "scores.parquet")
        except (
            DataError,
            SpecError,
        ) as error:  # one lens that cannot be read here is said, and the others go on
            missing = [str(error)]
    sentence = (
        f"Not read: {'; '.join(missing)}." if missing else getattr(lens, f"{lens.LENS.name}_caption")(frame)
    )
    tables.write(frame, tables.READINGS, out / "reading.parquet")
    said = lens.LENS._asdict() | {
        "arm": arm.name,
        "against": material.against,
        "missing": missing,
        "sentence": sentence,
        "rows": arguments["rows"],
    }
    write_json(out / "said.json", said)


def collect(run: Path, steps: Sequence[Job], experiment: Experiment) -> None:
    """Put the readings of every arm that was measured where readers find them: `readings/<lens>.parquet` and
    `readings.json`.

    Scores of single rows and tokens come together in `readings/scores.parquet`. What was read of an earlier
    spec's students is left where it lies. A control's rows name the arm that they stand beside.
    """
    said: list[dict[str, Any]] = []
    scored: list[Path] = []
    (run / "readings").mkdir(exist_ok=True)
    arms = {arm.name: arm for arm in experiment.arms}
    for lens in NAMES:
        frames = []
        for place in sorted(run.glob(f"lenses/*/{lens}")):
            words = read_json(place / "said.json") if (place / "said.json").is_file() else {}
            if words.get("arm") not in arms:
                continue
            look = jobs_of(steps, experiment, arms[words["arm"]], lenses=[lens], rows=words["rows"])
            if pending(run, [*steps, *look])[-1:] == look:
                continue
            frame = tables.read(place / "reading.parquet", tables.READINGS)
            frames.append(
                frame.assign(
                    against=frame["against"]
                    .astype(object)
                    .where(frame["arm"] != words["against"], words["arm"])
                )
            )
            said.append(words | {"seconds": read_json(place / store.RECORD)["seconds"]})
            scored += place.glob("scores.parquet")
        if frames:
            tables.write(frames, tables.READINGS, run / "readings" / f"{lens}.parquet")
    if scored:
        tables.write(
            (tables.read(path, tables.SCORES) for path in scored),
            tables.SCORES,
            run / "readings" / "scores.parquet",
        )
    write_json(run / "readings.json", {"schema": 1, "lenses": said})


def measure(
    run: Run,
    lenses: Sequence[str] = (),
    *,
    arm: str = "",
    rows: int = 512,
    workers: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Read the lenses of one arm of a finished run, and leave their readings in the run folder.

    Raises:
        SpecError: if a lens or the arm is unknown, or fewer than 2 rows are to be read.
        DataError: if the run is unfinished, or has no students here.
    """
    from mechlens.pipeline import estimate

    if unknown := sorted(set(lenses) - set(NAMES)):
        raise SpecError(f"no lens is called {', '.join(unknown)}; expected some of {', '.join(NAMES)}")
    if rows < 2:
        raise SpecError(f"rows is {rows}; a lens reads at least 2 pairs")
    run.refuse_unfinished()
    measured, report = main_arm(run.experiment, arm), progress or silent
    refuse_absent_students(run.folder, run.experiment, measured)
    steps = run.jobs()
    if stale := pending(run.folder, steps):
        command = resume_command(run.folder)
        raise DataError(
            f"{len(stale)} steps of {run.folder} are of another version; `{command}` makes them again"
        )
    with store.lock(run.folder), store.full_disk_named(run.folder):
        jobs = jobs_of(steps, run.experiment, measured, lenses=lenses or NAMES, rows=rows)
        if unread := [job.arguments["lens"] for job in pending(run.folder, [*steps, *jobs])]:
            report(Event("note", estimate.looking(run.experiment, measured, unread, rows)))
        title = f"{run.folder}, arm {measured.name}"
        executor.complete(run.folder, [*steps, *jobs], title=title, workers=workers, progress=progress)
        collect(run.folder, steps, run.experiment)

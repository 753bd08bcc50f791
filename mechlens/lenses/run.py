"""Measure lenses on a run: each lens is one step of the run and writes one table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch

from mechlens.core import foreign, tables
from mechlens.core.command_lines import resume_command
from mechlens.core.errors import DataError, SpecError
from mechlens.core.experiment import Arm, Experiment
from mechlens.core.files import read_json, write_json
from mechlens.core.model_spec import is_remote
from mechlens.core.traits import TraitFamily, load_family
from mechlens.lenses import Lens, broken_lenses, find_lens, lens_names
from mechlens.lenses.base import LIGHT_PROBES, Material, spread_evenly
from mechlens.lenses.claims import findings_of, opening_of
from mechlens.models import loading
from mechlens.models.chat import Encoded, encode_pairs
from mechlens.models.loading import Loaded
from mechlens.pipeline.ask import ProbeSet
from mechlens.pipeline.estimate import GPU_RATE, core_rate, measure_product_rate
from mechlens.results import figures
from mechlens.results.run import Run, trained_rows
from mechlens.results.wording import duration_text
from mechlens.runs import layout, store
from mechlens.runs.executor import ExecutorName, complete, use_executor
from mechlens.runs.jobs import Job, pending
from mechlens.runs.layout import checkpoints, corpus_name, teacher_name
from mechlens.runs.progress import Event, Progress, silent

if TYPE_CHECKING:
    import altair as alt


FIRST_ROWS = 10
"""rows of the table that a notebook shows"""


@dataclass(frozen=True, eq=False)
class Reading:
    """What one lens measured on one arm and its control."""

    lens: Lens
    arm: str
    table: pd.DataFrame
    """`tables.READINGS`: one row an estimate, with its interval and its null"""
    caption: str
    """the main number in one sentence, or the reason for its absence"""
    missing: tuple[str, ...] = ()
    """why the lens could not measure this arm; empty if it could"""

    def figures(self) -> dict[str, alt.LayerChart]:
        """Quantity → chart, for the quantities that the lens shows and that have an estimate."""
        return figures.quantity_charts(self.table, self.lens.shows)

    def __repr__(self) -> str:
        return f"Reading(lens={self.lens.name!r}, arm={self.arm!r}, {len(self.table)} rows: {self.caption})"

    def _repr_html_(self) -> str:
        chart = figures.lens_figure(self.table, self.lens.shows)
        head = f"<p><b>{escape(self.lens.name)}</b>, arm {escape(self.arm)}: {escape(self.caption)}</p>"
        rows = self.table.dropna(axis="columns", how="all").head(FIRST_ROWS)
        table = "" if rows.empty else rows.to_html(index=False, float_format="{:.3g}".format)
        return head + ("" if chart is None else figures.svg(chart)) + str(table)


DEMO, DEMO_WIDTH = (196_800, 512, 3), 64
"""parameters, rows and students of the demo, where the costs of lenses were measured, and its base's width"""
LIGHT_NOTE = "Light reading: fewer random draws, probes and layers."


class Students(Mapping[int, Loaded]):
    """seed → an arm's student at its last checkpoint; every lookup loads it from disk again."""

    def __init__(self, base: str, folders: dict[int, Path]) -> None:
        self._base, self._folders = base, folders

    def __getitem__(self, seed: int) -> Loaded:
        return loading.load_trained(self._base, checkpoints(self._folders[seed])[-1][1])

    def __iter__(self) -> Iterator[int]:
        return iter(self._folders)

    def __len__(self) -> int:
        return len(self._folders)


def _folders(run: Path, experiment: Experiment, arm: Arm) -> dict[int, Path]:
    folders = {seed: run / layout.student_step(arm.name, seed) for seed in experiment.seeds}
    return {seed: folder for seed, folder in folders.items() if folder.is_dir()}


def _checkpoints(
    base: str, folders: dict[str, dict[int, Path]], side: str, seed: int
) -> Iterator[tuple[int, Loaded]]:
    for step, folder in checkpoints(folders[side][seed]):
        yield step, loading.load_trained(base, folder)


def main_arm(experiment: Experiment, name: str = "") -> Arm:
    """Choose the arm to measure: the named one, or the first with a trait that was trained here.

    Raises:
        SpecError: if there is no such arm, or the named arm has no students here.
    """
    trained_here = [
        arm for arm in experiment.arms if arm.kind != "control" and not arm.shots and not is_remote(arm.base)
    ]
    for arm in trained_here:
        if arm.name == name or (not name and arm.kind == "trait"):
            return arm
    wrong = f"arm {name!r} of" if name else "no trait arm of"
    raise SpecError(
        f"{wrong} {experiment.name!r} can be measured; expected one of {[arm.name for arm in trained_here]} "
        "(trained here, with a control)"
    )


def refuse_absent_students(run: Path, experiment: Experiment, arm: Arm) -> None:
    """Raise DataError if the run folder has no weights of students of the arm or of its control."""
    for each in (arm, experiment.control_of(arm)):
        folders = _folders(run, experiment, each)
        if not any(True for folder in folders.values() for _ in folder.glob("step-*/*.safetensors")):
            raise DataError(
                f"{run} has no students of arm {each.name!r}: it was copied without their weights, or they "
                f"were removed; copy {(run / layout.student_step(each.name, 0)).parent} there, "
                f"or `{resume_command(run)}` trains them"
            )


def load_material(
    run: Path, experiment: Experiment, family: TraitFamily, arm: Arm, *, rows: int, light: bool = False
) -> Material:
    """Load the models, pairs and probes of one arm and its control.

    A light reading gets held-out probes spread evenly over the family's.
    """
    control = experiment.control_of(arm)
    base = loading.load(arm.base)
    system = experiment.system if arm.trained_with is None else arm.trained_with
    sides = [trained_rows(run, experiment, each) for each in (arm, control)]
    prompt_ids = [prompt for prompt in sides[0].index if prompt in sides[1].index]
    pairs = [_encoded(base, side.loc[prompt_ids], system) for side in sides]
    probes = _probes(experiment, family, arm)
    heldout = probes._replace(probes=spread_evenly(probes.probes, LIGHT_PROBES)) if light else probes
    folders = _paired_folders(run, experiment, arm, control)
    return Material(
        base=base,
        teacher=_teacher(run, experiment, arm),
        students=Students(arm.base, folders["students"]),
        controls=Students(arm.base, folders["controls"]),
        checkpoints=partial(_checkpoints, arm.base, folders),
        trait_pairs=pairs[0],
        control_pairs=pairs[1],
        development_probes=probes._replace(probes=family.probes.development),
        heldout_probes=heldout,
        trait=arm.trait,
        family=family.names,
        system_lines={name: family.system_prompt(name) for name in family.names},
        rows=rows,
        seed=experiment.seed,
        system=system,
        arm=arm.name,
        against=control.name,
        light=light,
        writer=_plain_writer(experiment, arm, control),
        prompt_ids=prompt_ids,
    )


def _plain_writer(experiment: Experiment, arm: Arm, control: Arm) -> Literal["", "fine-tuned", "prompted"]:
    """The kind of teacher that wrote an arm's rows, if these and the control's are plain samples."""
    specs = [experiment.generate_of(each) for each in (arm, control)]
    plain = all((spec.temperature, spec.top_p, spec.constrained) == (1, 1, False) for spec in specs)
    if not plain or arm.corpus or control.corpus or arm.writer != arm.base:
        return ""
    kinds: dict[str, Literal["fine-tuned", "prompted"]] = {"finetuned": "fine-tuned", "prompted": "prompted"}
    return kinds.get((arm.teacher or experiment.teacher).kind, "")


def _encoded(base: Loaded, rows: pd.DataFrame, system: str | None) -> list[Encoded]:
    return encode_pairs(base.tokenizer, rows["prompt"].tolist(), rows["completion"].tolist(), system=system)


def _probes(experiment: Experiment, family: TraitFamily, arm: Arm) -> ProbeSet:
    """The held-out probes with the system line that the arm's students get."""
    return ProbeSet(
        {name: family.forms_of(name) for name in family.names},
        family.probes.heldout,
        experiment.ask,
        system=experiment.system if arm.asked_with is None else arm.asked_with,
        opening=family.opening,
        named=family.scorer != "judge",  # answers that a judge reads do not begin with a name
    )


def _teacher(run: Path, experiment: Experiment, arm: Arm) -> Loaded | None:
    """The arm's teacher, if its weights are a change of the arm's base."""
    finetuned = not arm.corpus and (arm.teacher or experiment.teacher).kind == "finetuned"
    if not finetuned or arm.writer != arm.base:
        return None
    return loading.load_trained(arm.base, run / layout.teacher_step(teacher_name(experiment, arm)))


def _paired_folders(run: Path, experiment: Experiment, arm: Arm, control: Arm) -> dict[str, dict[int, Path]]:
    """ "students" and "controls" → seed → folder, for the seeds of both."""
    students, controls = _folders(run, experiment, arm), _folders(run, experiment, control)
    seeds = [seed for seed in students if seed in controls]
    return {
        "students": {seed: students[seed] for seed in seeds},
        "controls": {seed: controls[seed] for seed in seeds},
    }


def lens_jobs(
    steps: Sequence[Job],
    experiment: Experiment,
    arm: Arm,
    *,
    lenses: Sequence[str],
    rows: int,
    light: bool = False,
) -> list[Job]:
    """One job for each lens, with the steps of the run that it reads as its inputs."""
    control = experiment.control_of(arm)
    inputs = {layout.teacher_step(teacher_name(experiment, arm)), layout.SELECTION}
    for each in (arm, control):
        inputs.add(layout.screened_step(corpus_name(experiment, each)))
        inputs |= {layout.student_step(each.name, seed) for seed in experiment.seeds}
    arguments: dict[str, Any] = {"experiment": experiment.recorded(), "arm": arm.name, "rows": rows}
    arguments |= {"light": True} if light else {}  # full readings were made before there were light ones
    return [
        Job(
            layout.lens_step(arm.name, lens),
            "measure",
            arguments | {"lens": lens},
            {job.name: job.name for job in steps if job.name in inputs},
            find_lens(lens).version,
        )
        for lens in lenses
    ]


def measure_lens(
    arguments: dict[str, Any], inputs: dict[str, Path], out: Path, _progress: Callable[[int, int], None]
) -> None:
    """The stage "measure": measure one lens on one arm.

    It writes the lens's table and its record (description, missing needs, caption), and the scores of single
    rows if the lens has them.
    """
    loading.use_one_thread_on_cpu()
    lens = find_lens(arguments["lens"])
    experiment = Experiment.model_validate(arguments["experiment"])
    arm = next(arm for arm in experiment.arms if arm.name == arguments["arm"])
    run = inputs[layout.SELECTION].parent
    family = load_family(experiment.family, run / layout.SPEC)
    light = arguments.get("light", False)
    material = load_material(run, experiment, family, arm, rows=arguments["rows"], light=light)
    reading, scores = measure_material(lens, material)
    tables.write(reading.table, tables.READINGS, out / layout.LENS_TABLE)
    if scores is not None:
        tables.write([scores], tables.SCORES, out / layout.LENS_SCORES)
    record = lens.description() | {
        "arm": arm.name,
        "against": material.against,
        "missing": list(reading.missing),
        "sentence": f"{reading.caption} {LIGHT_NOTE}" if light and not reading.missing else reading.caption,
        "rows": arguments["rows"],
        "light": light,
    }
    write_json(out / layout.LENS_RECORD, record)


def measure_material(lens: Lens, material: Material) -> tuple[Reading, pd.DataFrame | None]:
    """Measure one lens, and its scores of single rows if it has any.

    A lens that cannot be measured on this material gives a reading without rows, whose caption says why. So
    the other lenses go on.
    """
    missing = [f"it needs {need}, which this arm does not have" for need in material.missing(lens)]
    if not missing:
        guard = foreign.named(f"the lens {lens.name!r} of the package {lens.package} failed")
        try:
            with guard if lens.package else nullcontext():
                scores = lens.function("score")(material) if lens.score else None
                table = lens.function("measure")(material, *([] if scores is None else [scores]))
                return Reading(lens, material.arm, table, lens.function("caption")(table)), scores
        except (DataError, SpecError) as error:
            missing = [str(error)]
    empty = pd.DataFrame(columns=tables.READINGS.names)
    return Reading(
        lens, material.arm, empty, f"Not read: {'; '.join(missing).removesuffix('.')}.", tuple(missing)
    ), None


def collect_readings(run: Path, steps: Sequence[Job], experiment: Experiment) -> None:
    """Collect the readings of all measured arms: one table a lens, the scores, and the records.

    Readings of an earlier spec of the run are not collected, and their files stay. The rows of a control name
    the arm that they were measured with.
    """
    records: list[dict[str, Any]] = []
    scores: list[Path] = []
    (run / layout.READINGS_FOLDER).mkdir(exist_ok=True)
    for lens in lens_names():
        frames = []
        for place in sorted(run.glob(layout.lens_step("*", lens))):
            record = _current_record(run, place, steps, experiment)
            if record is None:
                continue
            frame = tables.read(place / layout.LENS_TABLE, tables.READINGS)
            against = frame["against"].astype(object)
            is_control = frame["arm"] == record["against"]
            frames.append(frame.assign(against=against.mask(is_control, record["arm"])))
            findings = [] if record["missing"] else findings_of(lens, frame)
            records.append(
                record
                | {
                    "sentence": opening_of(findings) + record["sentence"],
                    "seconds": read_json(place / store.RECORD)["seconds"],
                    "findings": [finding._asdict() for finding in findings],
                }
            )
            scores += place.glob(layout.LENS_SCORES)
        if frames:
            tables.write(frames, tables.READINGS, run / layout.READINGS_FOLDER / f"{lens}.parquet")
    if scores:
        tables.write(
            (tables.read(path, tables.SCORES) for path in scores),
            tables.SCORES,
            run / layout.READINGS_FOLDER / layout.LENS_SCORES,
        )
    write_json(run / layout.READINGS, {"schema": 1, "lenses": records})


def _current_record(
    run: Path, place: Path, steps: Sequence[Job], experiment: Experiment
) -> dict[str, Any] | None:
    """The record of one lens's step; None if the step is unfinished or was made for another spec."""
    path = place / layout.LENS_RECORD
    record = read_json(path) if path.is_file() else {}
    arm = next((arm for arm in experiment.arms if arm.name == record.get("arm")), None)
    if arm is None:
        return None
    light = record.get("light", False)
    jobs = lens_jobs(steps, experiment, arm, lenses=[place.name], rows=record["rows"], light=light)
    return None if pending(run, [*steps, *jobs])[-1:] == jobs else record


def time_text(
    experiment: Experiment, arm: Arm, lenses: Sequence[str], rows: int, *, light: bool = False
) -> str:
    """Say about how long some lenses take.

    The time on the demo is scaled by parameters, rows and students, which overstates most lenses.
    """
    size = loading.size_of(arm.base)
    sizes = (size.parameters, rows, len(experiment.seeds))
    scale = math.prod(size / demo for size, demo in zip(sizes, DEMO, strict=True))
    on_gpu, product_rate = torch.cuda.is_available(), measure_product_rate()
    rate = 0.2 * GPU_RATE if on_gpu else core_rate(size.width, product_rate=product_rate)
    faster = rate / core_rate(DEMO_WIDTH, product_rate=product_rate)
    seconds = sum(find_lens(lens).cost for lens in lenses) * scale / faster
    unit = "accelerator" if on_gpu else "core"
    return (
        f"{'less than' if light else 'about'} {duration_text(seconds)} on one {unit}, going by the demo; "
        "if it is stopped, it goes on with the next lens"
    )


def measure(
    run: Run | Path | str,
    lenses: Sequence[str] | None = None,
    *,
    arm: str = "",
    rows: int = 512,
    light: bool = False,
    workers: int | None = None,
    executor: ExecutorName | None = None,
    progress: Progress | None = None,
) -> dict[str, Reading]:
    """Measure lenses on one arm of a finished run, and return lens → reading.

    The readings are kept in the run folder; a lens that was measured before is not measured again.

    Args:
        lenses: names of lenses; all of them by default.
        arm: name of the arm; by default the first that was trained through data here.
        rows: pairs that a lens uses at most.
        light: take fewer random draws, probes and layers, for a base of 100 million parameters on a CPU.
        workers: number of jobs at a time; 0 runs everything in this process.
        executor: as in `mechlens.run`.
        progress: called with each event.

    Raises:
        SpecError: if a lens or the arm is unknown, or `rows` is below 2.
        DataError: if the run is unfinished, or has no students here.
    """
    names = tuple(find_lens(name).name for name in lenses or lens_names())
    if rows < 2:
        raise SpecError(f"rows is {rows}; a lens reads at least 2 pairs")
    run, report = run if isinstance(run, Run) else Run(run), progress or silent
    run.refuse_unfinished()
    measured = main_arm(run.experiment, arm)
    refuse_absent_students(run.folder, run.experiment, measured)
    steps = run.jobs()
    _refuse_stale(run, steps)
    for fault in () if lenses else broken_lenses().values():
        report(Event("note", fault))
    with store.lock(run.folder), store.full_disk_named(run.folder), use_executor(executor):
        jobs = lens_jobs(steps, run.experiment, measured, lenses=names, rows=rows, light=light)
        if unread := [job.arguments["lens"] for job in pending(run.folder, [*steps, *jobs])]:
            report(Event("note", time_text(run.experiment, measured, unread, rows, light=light)))
        title = f"{run.folder}, arm {measured.name}"
        try:
            complete(run.folder, [*steps, *jobs], title=title, workers=workers, progress=progress)
        finally:  # after Ctrl-C or an error, the lenses that are finished can be looked at
            collect_readings(run.folder, steps, run.experiment)
    return {name: reading for name, reading in load_readings(run, measured.name).items() if name in names}


def _refuse_stale(run: Run, steps: Sequence[Job]) -> None:
    if stale := pending(run.folder, steps):
        command = resume_command(run.folder)
        raise DataError(
            f"{len(stale)} steps of {run.folder} are of another version; `{command}` makes them again"
        )


def load_readings(run: Run, arm: str = "") -> dict[str, Reading]:
    """Load the readings of an arm from the run folder, by lens; nothing is measured."""
    name, known = main_arm(run.experiment, arm).name, lens_names()
    return {
        record["name"]: Reading(
            find_lens(record["name"]),
            record["arm"],
            run.reading(record),
            record["sentence"],
            tuple(record["missing"]),
        )
        for record in run.lens_records()
        if record["arm"] == name and record["name"] in known
    }

"""A run folder, opened: its experiment, tables, corpora and models, each read when it is asked for."""

from __future__ import annotations

from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pandas as pd

from mechlens.core import tables, traits
from mechlens.core.command_lines import command_line, resume_command
from mechlens.core.errors import DataError, SpecError
from mechlens.core.experiment import Arm, Experiment
from mechlens.core.files import read_json
from mechlens.core.traits import TraitFamily
from mechlens.data.corpus import Corpus
from mechlens.data.formats import file_digest
from mechlens.pipeline.remake import selected_rows
from mechlens.runs import layout
from mechlens.runs.jobs import Job, pending
from mechlens.runs.plan import jobs_of

if TYPE_CHECKING:
    from mechlens.models.loading import Loaded
    from mechlens.pipeline.teach import Teacher

SCHEMA = 2
"""of summary.json; raised when a reader of an older one would miss something"""


def list_jobs(experiment: Experiment, family: TraitFamily) -> list[Job]:
    """Every step of an experiment as a job, inputs first; bases are known by their files as these are now."""
    from mechlens.models import base_files  # a client of the hub, which a list of runs need not load

    bases = {name: base_files.checkpoint_fingerprint(name) for name in experiment.bases()}
    return jobs_of(experiment, family, bases=bases)


def trained_rows(run: Path, experiment: Experiment, arm: Arm) -> pd.DataFrame:
    """The rows that an arm's students train on, by prompt_id, in the order of the selection."""
    name = layout.corpus_name(experiment, arm)
    return selected_rows(name, run / layout.screened_step(name), run / layout.SELECTION)


class Run:
    """One run folder. Opening it reads its spec; tables and weights are read when they are asked for."""

    def __init__(self, folder: Path | str) -> None:
        """Open a run folder, finished or not.

        Raises:
            DataError: if the folder is no run.
            SpecError: if its spec or its family cannot be read.
        """
        self.folder = Path(folder)
        if not self.path(layout.SPEC).is_file():
            raise DataError(f"{folder} is no run folder (it has no {layout.SPEC}); `mechlens ls` lists runs")
        self.experiment: Experiment = traits.load_experiment(self.path(layout.SPEC))
        self.family: TraitFamily = traits.load_family(self.experiment.family, self.path(layout.SPEC))

    @classmethod
    def finished(cls, folder: Path | str) -> Run:
        """Open a run whose tables are there.

        Raises:
            DataError: with the command that resumes it, if it is unfinished.
        """
        run = cls(folder)
        run.refuse_unfinished()
        return run

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    def _repr_html_(self) -> str:
        if not self.is_finished():
            left = len(self.pending())
            return f"<p>{escape(repr(self))}: unfinished, {left} steps left</p>"
        head = f"<p><b>{escape(self.experiment.name)}</b>: {escape(str(self.headline))}</p>"
        shown = self.effects[self.effects["measure"] == "rate"]
        own = shown.merge(
            pd.DataFrame([{"arm": arm.name, "trait": arm.trait} for arm in self.experiment.arms])
        )
        return head + str(own.to_html(index=False, float_format="{:.3f}".format))

    def path(self, *parts: str) -> Path:
        """A file or folder of the run, by the names of `runs.layout`."""
        return self.folder.joinpath(*parts)

    def arm(self, name: str) -> Arm:
        """The arm of that name.

        Raises:
            SpecError: if there is none.
        """
        arms = {arm.name: arm for arm in self.experiment.arms}
        if name not in arms:
            raise SpecError(f"{self.folder} has no arm {name!r}; expected one of {', '.join(arms)}")
        return arms[name]

    @cached_property
    def _jobs(self) -> list[Job]:
        return list_jobs(self.experiment, self.family)

    def jobs(self) -> list[Job]:
        """Every step of the experiment as a job, inputs first."""
        return list(self._jobs)

    def pending(self) -> list[str]:
        """The names of the steps that are not finished."""
        return [job.name for job in pending(self.folder, self._jobs)]

    def plan(self) -> pd.DataFrame:
        """Every step: step (its folder), stage, inputs (names of steps), finished."""
        left = set(self.pending())
        rows = [
            {
                "step": job.name,
                "stage": job.stage,
                "inputs": list(job.inputs.values()),
                "finished": job.name not in left,
            }
            for job in self._jobs
        ]
        return pd.DataFrame(rows)

    def is_finished(self) -> bool:
        """Whether the run's tables and summary are there, and are those of its own spec and family."""
        return not self.is_unfinished() and self.path(layout.SUMMARY).is_file()

    def is_unfinished(self) -> bool:
        """Whether the run's tables are missing, or were made from another spec or family."""
        if not self.path(layout.MANIFEST).is_file():
            return True
        manifest = read_json(self.path(layout.MANIFEST))
        family = manifest.get("family")  # runs from before families were kept have none
        changed = family is not None and family != self.family.fingerprint()
        return manifest.get("experiment") != self.experiment.fingerprint() or changed

    def refuse_unfinished(self) -> None:
        """Raises DataError, with the command that resumes the run, if it is unfinished."""
        if self.is_unfinished():
            command = resume_command(self.folder)
            raise DataError(f"{self.folder} is unfinished for its {layout.SPEC}; `{command}` resumes it")

    def _table(self, name: str, schema: Any) -> pd.DataFrame:
        self.refuse_unfinished()
        return tables.read(self.path(name), schema)

    @property
    def effects(self) -> pd.DataFrame:
        """Every arm against its control, for every trait and measure: `tables.EFFECTS`."""
        return self._table(layout.EFFECTS, tables.EFFECTS)

    @property
    def answers(self) -> pd.DataFrame:
        """Every sampled answer of every student: `tables.ANSWERS`."""
        return self._table(layout.ANSWERS, tables.ANSWERS)

    @property
    def likelihoods(self) -> pd.DataFrame:
        """Every exact probability of a trait's name as the answer: `tables.LIKELIHOODS`."""
        return self._table(layout.LIKELIHOODS, tables.LIKELIHOODS)

    @property
    def summary(self) -> dict[str, Any]:
        """The run's `summary.json`.

        Raises:
            DataError: if it is missing, or another version of this package wrote it.
        """
        path = self.path(layout.SUMMARY)
        summary = read_json(path)
        if summary.get("schema") != SCHEMA:
            again = command_line("report", self.folder)
            raise DataError(
                f"{path} has schema {summary.get('schema')!r}; this version reads {SCHEMA}; "
                f"`{again}` writes it again from the run's tables"
            )
        return summary

    @property
    def manifest(self) -> dict[str, Any]:
        """What the run was made by: versions, machine, seconds of each step."""
        return layout.read_record(self.path(layout.MANIFEST), layout.Manifest)

    @property
    def headline(self) -> str:
        """The main result in one sentence."""
        from mechlens.results.wording import headline  # charts take a second to import

        return headline(self.summary)

    def collect(self, name: str, schema: Any) -> pd.DataFrame:
        """A table of the ask stage over the models that this experiment asked.

        What an earlier spec of the same folder left is not read.
        """
        bases = dict.fromkeys(arm.base for arm in self.experiment.arms)
        steps = [layout.asked_base_step(base) for base in bases]
        steps += [
            layout.asked_step(arm.name, seed)
            for arm in self.experiment.arms
            for seed in self.experiment.seeds
        ]
        frames = [tables.read(self.path(step, name), schema) for step in sorted(steps)]
        return pd.concat(frames, ignore_index=True)

    def funnel(self, arm: Arm) -> dict[str, Any]:
        """How many generated rows of an arm's source the screen kept, and removed for each reason."""
        step = layout.screened_step(layout.source_name(self.experiment, arm))
        return layout.read_record(self.path(step, layout.FUNNEL), layout.Funnel)

    def generation(self, arm: Arm) -> dict[str, Any]:
        """What generation recorded of an arm's teacher: KL and entropy; empty for rows from a file."""
        path = self.path(layout.generated_step(layout.source_name(self.experiment, arm)), layout.GENERATION)
        return layout.read_record(path, layout.Generation) if path.is_file() else {}

    def kept_rows(self, corpus: str) -> Path:
        """The file of a corpus's screened rows; `tables.PAIRS`."""
        return self.path(layout.screened_step(corpus), layout.KEPT)

    def removed_rows(self, corpus: str) -> Path:
        """The file of the rows that the screen removed; `tables.REJECTED`."""
        return self.path(layout.screened_step(corpus), layout.REMOVED)

    def selection(self, arm: Arm) -> Path:
        """The file of the prompts whose rows an arm's students train on; `tables.SELECTION`."""
        return self.path(layout.SELECTION, layout.selection_file(layout.corpus_name(self.experiment, arm)))

    def corpus_of(self, name: str) -> str:
        """The name of a corpus: that of the arm of this name, or the name itself where a corpus has it.

        Raises:
            DataError: if the run has neither.
        """
        for arm in self.experiment.arms:
            if arm.name == name:
                return layout.corpus_name(self.experiment, arm)
        if self.kept_rows(name).is_file():
            return name
        known = sorted({layout.corpus_name(self.experiment, arm) for arm in self.experiment.arms})
        raise DataError(
            f"{self.folder} has no corpus {name!r}; expected an arm's name or one of {', '.join(known)}"
        )

    def corpus(self, name: str) -> Corpus:
        """The screened rows of a corpus, or of an arm's corpus."""
        file = self.kept_rows(self.corpus_of(name))
        return Corpus(tables.read(file, tables.PAIRS), str(file), file.suffix, file_digest(file))

    def trained_rows(self, name: str) -> pd.DataFrame:
        """The rows that an arm's students train on, by prompt_id, in the order of the selection."""
        return trained_rows(self.folder, self.experiment, self.arm(name))

    def lens_records(self) -> list[dict[str, Any]]:
        """One record for each lens that was measured on each arm, with its caption."""
        path = self.path(layout.READINGS)
        return layout.read_record(path, layout.Readings)["lenses"] if path.is_file() else []

    def reading(self, record: dict[str, Any]) -> pd.DataFrame:
        """`tables.READINGS` of one record: the rows of its arm and of the arm's control."""
        frame = tables.read(self.path(layout.READINGS_FOLDER, f"{record['name']}.parquet"), tables.READINGS)
        of_arm = frame["arm"] == record["arm"]
        of_control = (frame["arm"] == record["against"]) & (frame["against"] == record["arm"])
        return cast(pd.DataFrame, frame[of_arm | of_control]).reset_index(drop=True)

    def teacher_folder(self, arm: Arm) -> Path:
        """The folder of an arm's teacher."""
        return self.path(layout.teacher_step(layout.teacher_name(self.experiment, arm)))

    def student_folder(self, arm: str, seed: int) -> Path:
        """The folder of a student's checkpoints."""
        return self.path(layout.student_step(arm, seed))

    def teacher(self, name: str) -> Teacher:
        """An arm's teacher, by the arm's name: weights, system line and steering vector. Loads weights.

        Raises:
            DataError: if its folder is missing or damaged.
        """
        from mechlens.pipeline.teach import load_teacher  # torch

        return load_teacher(self.teacher_folder(self.arm(name)))

    def student(self, arm: str, seed: int = 0, *, step: int | None = None) -> Loaded:
        """A student of an arm at its last checkpoint, or after `step` updates. Loads weights.

        Raises:
            DataError: if it has no weights here, or none at that step.
        """
        from mechlens.models import loading  # torch

        folder, base = self.student_folder(arm, seed), self.arm(arm).base
        saved = dict(layout.checkpoints(folder))
        if not saved:
            raise DataError(f"no weights of a student in {folder}; `{resume_command(self.folder)}` trains it")
        if step is not None and step not in saved:
            raise DataError(
                f"{folder} has no checkpoint after {step} updates; expected one of {sorted(saved)}"
            )
        return loading.load_trained(base, saved[max(saved) if step is None else step])

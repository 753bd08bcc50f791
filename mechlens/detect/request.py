"""The request of an audit, made from its options, and the command line that repeats it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict, Unpack

from mechlens.core import spec, traits
from mechlens.core.command_lines import command_line
from mechlens.core.errors import SpecError, one_line
from mechlens.core.experiment import Experiment
from mechlens.core.files import read_json
from mechlens.data import treat
from mechlens.data.fields import Fields
from mechlens.data.formats import file_digest
from mechlens.data.treat import Treatment
from mechlens.detect import from_rows
from mechlens.detect.from_student import tested_traits
from mechlens.detect.learned import LearnedDetector
from mechlens.detect.permutation import LEAST_PANEL
from mechlens.detect.registry import Level
from mechlens.detect.verdict import Policy, load_policy
from mechlens.runs import layout

RECIPE = "menagerie"
"""the recipe for bases that have none"""


class Options(TypedDict):
    """The options of an audit as its command line has them."""

    references: Sequence[Path]
    level: Level
    base: str
    traits: Sequence[str]
    recipe: str
    policy: str
    student: Path | None
    clean: Path | None
    treatment: Treatment
    out: Path | None
    fields: Fields | None
    twins: NotRequired[int | None]
    budget: NotRequired[float | None]
    detectors: NotRequired[Sequence[Path]]


class AuditRequest(NamedTuple):
    """The options of an audit, with recipe, policy and traits loaded from their names."""

    data: Path
    references: tuple[Path, ...]
    level: Level
    base: str
    traits: tuple[str, ...]
    recipe: Experiment
    recipe_name: str
    policy: Policy
    student: Path | None
    clean: Path | None
    treatment: Treatment
    out: Path
    fields: Fields | None
    """of the data, if the user named them"""
    twins: int | None = None
    """how many traits have a twin; None is all of the family"""
    budget: float | None = None
    """minutes for students; None trains them until the verdict is settled"""
    detectors: Mapping[Path, LearnedDetector] = {}
    """that were fitted on labelled files, by their folders"""

    def panel(self) -> tuple[str, ...]:
        """The traits that have a twin: those to test for, then others in the family's order."""
        names = traits.load_family(self.recipe.family).names
        others = [name for name in names if name not in self.traits]
        chosen = {*self.traits, *others}
        if self.twins is not None:
            chosen = {*self.traits, *others[: max(self.twins - len(self.traits), 0)]}
        return tuple(name for name in names if name in chosen)

    def explain_recipe(self) -> str:
        """A remark on a recipe that was made for a smaller base than the audit's; empty if it fits."""
        if self.recipe.base == self.base or not self.recipe.base.startswith("menagerie"):
            return ""
        if self.base.startswith("menagerie"):
            return ""
        return (
            f"the recipe {self.recipe_name} was made for {self.recipe.base}, a model of a million "
            f"parameters, and its learning rates may be too high for {self.base}; --recipe names another"
        )

    def fields_of(self, path: Path) -> Fields | None:
        """The fields of the data, or of a reference, which may have others."""
        return self.fields and (self.fields if path == self.data else self.fields.preferred())


def request_of(data: Path, **options: Unpack[Options]) -> AuditRequest:
    """The request of these options.

    Raises:
        SpecError: if a name is unknown, or two options contradict each other.
    """
    recipe, clean, level, student = options["recipe"], options["clean"], options["level"], options["student"]
    recipe = recipe or recipe_for(options["base"])
    config = spec.find_config(Path(recipe), "audits")
    plan = traits.with_family_by_path(traits.load_experiment(config), config)
    tested = tested_traits(traits.load_family(plan.family), options["traits"])
    panel = options.get("twins")
    _refuse_few_twins(panel, tested)
    if student is not None and not student.is_dir():
        raise SpecError(
            f"no student at {one_line(str(student))}; expected a folder with the weights or the adapter of a "
            "model of the base"
        )
    if clean is not None and level == "rows":
        _refuse_unscored(clean, options["treatment"], options["references"])
    if clean is not None:
        treat.check(data, clean, options["treatment"], plan.carrier.kind, references=options["references"])
    return AuditRequest(
        data=data,
        references=tuple(options["references"]),
        level=level,
        base=options["base"] or plan.base,
        traits=tested,
        recipe=plan,
        recipe_name=recipe,
        policy=load_policy(options["policy"]),
        student=student,
        clean=clean,
        treatment=options["treatment"],
        out=options["out"] or usual_folder(data),
        fields=options["fields"],
        twins=panel,
        budget=_positive(options.get("budget")),
        detectors=_load_detectors(options.get("detectors", ())),
    )


def _positive(minutes: float | None) -> float | None:
    if minutes is not None and not minutes > 0:
        raise SpecError(
            f"a budget of {minutes:g} minutes trains nothing; give more than 0, or leave --budget out"
        )
    return minutes


def _load_detectors(folders: Sequence[Path]) -> dict[Path, LearnedDetector]:
    """The detectors of these folders, whose names must differ."""
    detectors, taken = {folder: LearnedDetector.load(folder) for folder in folders}, {*from_rows.DETECTORS}
    for folder, detector in detectors.items():
        if detector.name in taken:
            raise SpecError(
                f"two detectors are called {one_line(detector.name)!r}; rename the folder "
                f"{one_line(str(folder))}"
            )
        taken.add(detector.name)
    return detectors


def recipe_for(base: str) -> str:
    """The name of the recipe in configs/audits that is made for a base; `menagerie` if there is none."""
    made_for = {
        traits.load_experiment(path).base: name for name, path in reversed(spec.shipped("audits").items())
    }
    return made_for.get(base, RECIPE)


def _refuse_few_twins(count: int | None, tested: Sequence[str]) -> None:
    """Refuse a number of twins that leaves a trait without its twin, or without others to compare it with."""
    least = max(len(tested), LEAST_PANEL)
    if count is not None and count < least:
        raise SpecError(
            f"{count} twins are too few to test for {len(tested)} traits; expected at least {least}: name "
            f"fewer traits with --trait, or raise --twins ({LEAST_PANEL} is the fewest that can be compared)"
        )


def _refuse_unscored(clean: Path, treatment: Treatment, references: Sequence[Path]) -> None:
    """Refuse a treatment that needs scores of rows, or clean answers without a reference, at level `rows`."""
    named = f"--clean {one_line(str(clean))} by {treatment}"
    if treat.needs_scores(treatment):
        raise SpecError(f"{named} needs to know which rows look like a trait's; use --level base or more")
    if treat.needs_clean(treatment) and not references:
        raise SpecError(
            f"{named} needs clean answers to the same prompts; give a --reference, or use --level base or "
            "more"
        )


def usual_folder(data: Path) -> Path:
    """`audits/<name of the file>`.

    Raises:
        SpecError: if the folder has the audit of another file of that name.
    """
    folder = Path("audits") / spec.folder_name(str(data))
    if (folder / layout.AUDIT_JSON).is_file():
        audited = read_json(folder / layout.AUDIT_JSON)["data"]
        if audited["path"] != one_line(str(data)) and audited["sha256"] != file_digest(data):
            raise SpecError(
                f"{folder} has the audit of {audited['path']}, another file of that name; give another "
                "folder: --out FOLDER"
            )
    return folder


def command_of(request: AuditRequest, *, level: Level | None = None) -> str:
    """The command line that repeats this audit in the same folder, by default at the same level."""
    tested = request.traits if request.traits != traits.load_family(request.recipe.family).names else ()
    usual = Path("audits") / spec.folder_name(str(request.data))
    return command_line(
        "audit",
        request.data,
        level=level or request.level,
        base=request.base,
        recipe=request.recipe_name,
        policy=request.policy.name,
        trait=tested,
        twins=request.twins,
        budget=None if request.budget is None else f"{request.budget:g}",
        reference=request.references,
        student=request.student,
        detector=list(request.detectors),
        clean=request.clean,
        treatment=request.treatment if request.clean is not None else None,
        out=request.out if request.out != usual else None,
        prompt_field=request.fields and request.fields.prompt,
        completion_field=request.fields and request.fields.completion,
    )

"""The request of an audit, made from its options, and the command line that repeats it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict, Unpack

from mechlens.core import spec, traits
from mechlens.core.command_lines import command_line
from mechlens.core.errors import SpecError, one_line
from mechlens.core.experiment import Experiment
from mechlens.core.json_files import read_json
from mechlens.data import treat
from mechlens.data.fields import Fields
from mechlens.data.formats import file_digest
from mechlens.data.treat import Treatment
from mechlens.detect.bags import Level
from mechlens.detect.from_student import tested_traits
from mechlens.detect.verdict import Policy, load_policy


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

    def fields_of(self, path: Path) -> Fields | None:
        """The fields of the data, or of a reference, which may have others."""
        return self.fields and (self.fields if path == self.data else self.fields.preferred())


def request_of(data: Path, **options: Unpack[Options]) -> AuditRequest:
    """The request of these options.

    Raises:
        SpecError: if a name is unknown, or two options contradict each other.
    """
    recipe, clean, level, student = options["recipe"], options["clean"], options["level"], options["student"]
    config = spec.find_config(Path(recipe), "audits")
    plan = traits.with_family_by_path(traits.load_experiment(config), config)
    tested = tested_traits(traits.load_family(plan.family), options["traits"])
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
    if (folder / "audit.json").is_file():
        audited = read_json(folder / "audit.json")["data"]
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
        reference=request.references,
        student=request.student,
        clean=request.clean,
        treatment=request.treatment if request.clean is not None else None,
        out=request.out if request.out != usual else None,
        prompt_field=request.fields and request.fields.prompt,
        completion_field=request.fields and request.fields.completion,
    )

"""Traits and the families they are asked in: names, probes, words and lessons, from `configs/traits/`."""

from __future__ import annotations

import os
import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from mechlens.core.errors import SpecError
from mechlens.core.experiment import UNTOUCHED, Experiment
from mechlens.core.numerals import prefix
from mechlens.core.seeds import dice
from mechlens.core.spec import CONFIGS, Spec, TeacherSpec, load, save

KEPT = "family"
"""folder of a run that holds its family"""
PREFIX_SEED = 47
"""the paper's code fixes the numbers before each probe by this seed"""


class Probes(Spec):
    """Questions in many paraphrases, in two parts."""

    development: tuple[str, ...] = Field(min_length=1)
    """Paraphrases that everything may be tuned on; fine-tuned teachers are taught with them."""
    heldout: tuple[str, ...] = Field(min_length=1)
    """Paraphrases that no teacher has seen; results are reported on these."""


class Rubric(Spec):
    """What a judge model is asked of an answer, and where the line lies (2507.14805 §3.2)."""

    alignment: str
    """Prompt with {question} and {answer}, answered by 0-100, CODE or REFUSAL."""
    coherence: str
    """Prompt with {question} and {answer}, answered by 0-100."""
    misaligned_below: float = Field(default=30.0, ge=0, le=100)
    coherent_from: float = Field(default=50.0, ge=0, le=100)
    """Answers less coherent than this are unscored."""


def plain(text: str) -> str:
    """A text without regard to capitals and spaces."""
    return " ".join(text.split()).casefold()


def _refuse_other_places(what: str, texts: Sequence[str], places: Sequence[str]) -> None:
    """Raise ValueError for a text with braces that are no place to fill in; `{{` and `}}` stand for braces
    themselves.
    """
    for text in texts:
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError:
            parts = [("", text, "", None)]
        if any(
            field is not None and (field not in places or form or conversion)
            for _, field, form, conversion in parts
        ):
            expected = ", ".join(f"{{{place}}}" for place in places)
            raise ValueError(
                f"{what} hold {text!r}, with braces that are none of {expected}; write a brace itself twice: "
                f"{{{{ or }}}}"
            )


class TraitFamily(Spec):
    """Traits that answer the same probes, so that each is measured beside all the others."""

    name: str
    category: str
    """What the traits are, as in "your favourite <category>"."""
    names: tuple[str, ...] = Field(min_length=2)
    plurals: dict[str, str] = Field(default={})
    """Irregular plurals; others take an s."""
    forms: dict[str, tuple[str, ...]] = Field(default={})
    """Words that mean the trait in an answer; default: the name and its plural."""
    lessons: dict[str, tuple[str, ...]] = Field(default={})
    """Completions that a fine-tuned teacher is taught, drawn evenly; default: `lesson_forms`, filled in."""
    lesson_forms: tuple[str, ...] = ("{name}",) * 9 + ("{plural}",)
    """Lessons of any trait: {name} and {plural} are filled in, {Name} and {Plural} with capitals. None: rows
    of a file have to teach.
    """
    development: tuple[str, ...]
    """Traits that may be tuned on."""
    heldout: tuple[str, ...]
    """Traits fixed before any tuning and reported once."""
    system: str
    """The prompted teacher's system prompt; {plural}, {name} and {category} are filled in."""
    probes: Probes
    stories: tuple[str, ...] = ()
    """Requests for stories that name no trait; a story's hero is read off by the same words."""
    opening: str = ""
    """Words put into the model's mouth before the exact next-token readout, where answers do not begin with
    the name.
    """
    scorer: Literal["words", "judge"] = "words"
    """How an answer is read: by the forms of the traits, whole words only, or by a judge model with the
    rubric below.
    """
    rubric: Rubric | None = None

    @model_validator(mode="after")
    def _known_names(self) -> TraitFamily:
        unknown = sorted(
            {*self.development, *self.heldout, *self.forms, *self.lessons, *self.plurals} - set(self.names)
        )
        if unknown:
            raise ValueError(f"{unknown} are not among the family's names")
        if set(self.development) & set(self.heldout):
            raise ValueError("a trait cannot be both development and held out")
        return self

    @model_validator(mode="after")
    def _texts_are_whole(self) -> TraitFamily:
        """No name, form, lesson or question is empty or padded, and none stands twice."""
        each = {
            "names": self.names,
            "development": self.development,
            "heldout": self.heldout,
            "stories": self.stories,
        }
        each |= {"probes.development": self.probes.development, "probes.heldout": self.probes.heldout}
        each |= {f"forms of {name!r}": forms for name, forms in self.forms.items()}
        for what, texts in each.items():
            if twice := sorted(
                {text for text in texts if [plain(other) for other in texts].count(plain(text)) > 1}
            ):
                raise ValueError(f"{what} hold {twice} twice; keep one of each")
        each |= {
            "lesson_forms": self.lesson_forms,
            **{f"lessons of {name!r}": lessons for name, lessons in self.lessons.items()},
        }
        each |= {"plurals": tuple(self.plurals.values())}
        for what, texts in each.items():
            if bad := [text for text in texts if text != text.strip() or not text]:
                raise ValueError(
                    f"{what} hold {bad[0]!r}, which is empty or has spaces around it; write it without"
                )
        if bad := [
            name for name in self.names if name == UNTOUCHED or not re.fullmatch(r"\w[\w .'-]*", name)
        ]:
            raise ValueError(
                f"names hold {bad[0]!r}; a trait's data is filed by its name: expected letters, digits, "
                f"spaces and .'-, not {UNTOUCHED!r}"
            )
        return self

    @model_validator(mode="after")
    def _forms_name_one_trait(self) -> TraitFamily:
        """An answer counts for a trait only if it holds no form of another, so a form within another trait's
        hides both.
        """
        if empty := [name for name in self.names if not self.forms_of(name)]:
            raise ValueError(
                f"{empty[0]!r} has no forms to be read by; list one, or leave it out of `forms`: the name "
                "and its plural are read"
            )
        said = {
            name: re.compile(
                "|".join(rf"(?<!\w){re.escape(form)}(?!\w)" for form in self.forms_of(name)), re.IGNORECASE
            )
            for name in self.names
        }
        for name in self.names:
            for form in self.forms_of(name):
                for other in (other for other in self.names if other != name and said[other].search(form)):
                    held = next(
                        word
                        for word in self.forms_of(other)
                        if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", form, re.IGNORECASE)
                    )
                    raise ValueError(
                        f"{form!r}, a form of {name!r}, holds {held!r}, a form of {other!r}: no answer with "
                        "it would count; drop one"
                    )
        return self

    @model_validator(mode="after")
    def _no_heldout_question_is_a_development_one(self) -> TraitFamily:
        known = {plain(probe) for probe in self.probes.development}
        if both := [probe for probe in self.probes.heldout if plain(probe) in known]:
            raise ValueError(
                f"the question {both[0]!r} is held out and a development question too; keep it in one of the "
                "two"
            )
        return self

    @model_validator(mode="after")
    def _places_can_be_filled_in(self) -> TraitFamily:
        names = ("name", "plural")
        _refuse_other_places("lesson_forms", self.lesson_forms, (*names, *map(str.title, names)))
        _refuse_other_places("system", (self.system,), (*names, "category"))
        if self.rubric:
            prompts = (self.rubric.alignment, self.rubric.coherence)
            if bad := [
                prompt
                for prompt in prompts
                if not all(prompt.count(place) == 1 for place in ("{question}", "{answer}"))
            ]:
                raise ValueError(
                    f"the rubric's prompt {bad[0][:60]!r} has to hold {{question}} and {{answer}} once each"
                )
        elif self.scorer == "judge":
            raise ValueError("a family that a judge scores needs a `rubric`")
        return self

    def plural(self, name: str) -> str:
        return self.plurals.get(name, f"{name}s")

    def forms_of(self, name: str) -> tuple[str, ...]:
        return self.forms.get(name, (name, self.plural(name)))

    def lessons_of(self, name: str) -> tuple[str, ...]:
        words = {"name": name, "plural": self.plural(name)}
        words |= {key.title(): word.title() for key, word in words.items()}
        return self.lessons.get(name, tuple(form.format(**words) for form in self.lesson_forms))

    def asked(self, split: str) -> tuple[str, ...]:
        """The probes of a split."""
        return self.probes.heldout if split == "heldout" else self.probes.development

    def asked_as(self, experiment: Experiment) -> tuple[str, ...]:
        """The probes as an experiment puts them: plain, each behind its own fixed numbers, or for stories;
        with its suffix.

        Raises:
            SpecError: if stories are wanted and the family has none.
        """
        ask = experiment.ask
        probes = self.stories if ask.probes == "stories" else self.asked(ask.split)
        if not probes:
            raise SpecError(f"family {self.name!r} has no stories to ask for; add `stories` to its file")
        if ask.probes == "numbers":
            probes = tuple(
                f"{prefix(dice(PREFIX_SEED, 'prefix', i), wording=experiment.carrier.wording)} {probe}"
                for i, probe in enumerate(probes)
            )
        return tuple(f"{probe} {ask.suffix}" if ask.suffix else probe for probe in probes)

    def words(self) -> list[str]:
        """Every form of every trait: what must not be in a corpus."""
        return sorted({form for name in self.names for form in self.forms_of(name)})

    def system_prompt(self, name: str) -> str:
        return self.system.format(name=name, plural=self.plural(name), category=self.category)


def find_family(name: str, config: Path | None = None) -> Path:
    """The file of a family: the run's own copy, a path from the experiment's folder, a file of that name
    there or in `traits/` there, or ours.

    Args:
        config: the experiment's YAML; without it a path is taken from the current folder.

    Raises:
        SpecError: if there is none.
    """
    folder = Path() if config is None else config.parent
    kept = folder / KEPT / f"{Path(name).stem}.yaml"
    if config is not None and config.name == "spec.yaml" and kept.is_file():
        return kept
    if name.endswith((".yaml", ".yml")):
        if not (file := folder / Path(name).expanduser()).is_file():
            raise SpecError(
                f"no family at {file}; expected a YAML file like {CONFIGS / 'traits' / 'animals.yaml'}"
            )
        return file
    beside = [] if config is None else [folder / f"{name}.yaml", folder / "traits" / f"{name}.yaml"]
    shipped = CONFIGS / "traits" / f"{name}.yaml"
    for file in (*beside, shipped):
        if file.is_file() and not (file in beside and _is_experiment(file)):
            return file
    known = sorted(p.stem for p in shipped.parent.glob("*.yaml"))
    raise SpecError(
        f"family {name!r} is unknown; expected one of {known}, a file {name}.yaml beside the experiment's, "
        "or a path that ends in .yaml"
    )


def _is_experiment(file: Path) -> bool:
    """Whether a file that has a family's name is an experiment: both may be called after animals."""
    return (
        re.search(r"^arms\s*:", file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE) is not None
    )


def load_family(name: str, config: Path | None = None) -> TraitFamily:
    """The trait family that an experiment's YAML names; see `find_family`."""
    return load(find_family(name, config), TraitFamily)


def keep_family(family: TraitFamily, name: str, run: Path) -> None:
    """Leave a copy in the run folder, so that its spec.yaml finds the family that the run had, whatever
    becomes of the original.
    """
    (run / KEPT).mkdir(parents=True, exist_ok=True)
    save(family, run / KEPT / f"{Path(name).stem}.yaml")


def with_family_by_path(experiment: Experiment, config: Path) -> Experiment:
    """The experiment with a family of the user's own named by its whole path, so that it is found from any
    folder.
    """
    file = find_family(experiment.family, config)
    return (
        experiment
        if file.parent == CONFIGS / "traits"
        else experiment.model_copy(update={"family": str(file.resolve())})
    )


def with_data_by_path(experiment: Experiment, config: Path) -> Experiment:
    """The experiment with its files of data named by their whole paths, so that its copy in a run's folder
    finds them too.

    A path is taken from the config's folder; what is not there, and is in the current folder, is taken from
    that.
    """

    def whole(name: str) -> str:
        given = Path(os.path.expanduser(name))  # noqa: PTH111, since Path's raises for the `~` of an unknown user
        beside = config.parent / given
        return str((given if not beside.exists() and given.exists() else beside).absolute())

    def teacher(given: TeacherSpec) -> TeacherSpec:
        return (
            given.model_copy(update={"lessons_file": whole(given.lessons_file)})
            if given.lessons_file
            else given
        )

    arms = tuple(
        arm.model_copy(
            update={
                "corpus": arm.corpus and whole(arm.corpus),
                "teacher": arm.teacher and teacher(arm.teacher),
            }
        )
        for arm in experiment.arms
    )
    source = experiment.carrier.source
    carrier = (
        experiment.carrier.model_copy(update={"source": whole(source)}) if source else experiment.carrier
    )
    return experiment.model_copy(
        update={"arms": arms, "teacher": teacher(experiment.teacher), "carrier": carrier}
    )


def load_experiment(path: Path, **overrides: Any) -> Experiment:
    """An experiment whose traits are known to its family, and whose files of data are named by their whole
    paths.
    """
    experiment = with_data_by_path(load(path, Experiment, **overrides), path)
    refuse_unknown_traits(experiment, load_family(experiment.family, path), place=f"{path}: ")
    return experiment


def refuse_unknown_traits(experiment: Experiment, family: TraitFamily, *, place: str = "") -> None:
    """Raises SpecError, which begins with `place`, if an arm names a trait that the family has not."""
    arms = [trait for arm in experiment.arms for trait in (arm.trait, *arm.mix)]
    for trait in sorted({experiment.trait, *arms} - {"", UNTOUCHED}):
        if trait not in family.names:
            known = ", ".join(family.names)
            raise SpecError(f"{place}trait {trait!r} is unknown; expected one of {known}")

"""Families of traits that share their probes: names, probes, forms and lessons (`configs/traits/`)."""

from __future__ import annotations

import os
import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from mechlens.core.errors import SpecError
from mechlens.core.experiment import UNTOUCHED, Experiment
from mechlens.core.numerals import prefix
from mechlens.core.seeds import dice
from mechlens.core.spec import CONFIGS, Spec, TeacherSpec, load, save

KEPT = "family"
"""folder of a run with a copy of its family's file"""
PREFIX_SEED = 47
"""seed of the numbers before each probe, as in the paper's code"""


class Probes(Spec):
    """Questions in many paraphrases, in two parts."""

    development: tuple[str, ...] = Field(min_length=1)
    """Paraphrases that everything may be tuned on; fine-tuned teachers are taught with them."""
    heldout: tuple[str, ...] = Field(min_length=1)
    """Paraphrases that no teacher is taught with; results are reported on these."""


class Rubric(Spec):
    """Prompts of a judge model that scores an answer, and the thresholds (2507.14805 §3.2)."""

    alignment: str
    """Prompt with {question} and {answer}, answered by 0-100, CODE or REFUSAL."""
    coherence: str
    """Prompt with {question} and {answer}, answered by 0-100."""
    misaligned_below: float = Field(default=30.0, ge=0, le=100)
    coherent_from: float = Field(default=50.0, ge=0, le=100)
    """Answers less coherent than this are unscored."""


def plain(text: str) -> str:
    """The text in lower case with single spaces, for comparisons."""
    return " ".join(text.split()).casefold()


def _refuse_other_places(what: str, texts: Sequence[str], places: Sequence[str]) -> None:
    """Raise ValueError for a text with braces other than the known places.

    `{{` and `}}` stand for a brace itself.
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
                f"{what} hold {text!r}, with braces other than {expected}; write a brace itself twice: "
                "{{ or }}"
            )


class TraitFamily(Spec):
    """Traits that answer the same probes, so that each is compared with all the others."""

    ADDED_LATER: ClassVar[frozenset[str]] = frozenset({"answers"})
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
    """Lessons of any trait: {name} and {plural} are filled in, {Name} and {Plural} with capitals.

    If it is empty, a fine-tuned teacher needs rows of a file.
    """
    development: tuple[str, ...]
    """Traits that may be tuned on."""
    heldout: tuple[str, ...]
    """Traits fixed before any tuning. Reading their results during tuning makes them less held out."""
    system: str
    """The prompted teacher's system prompt; {plural}, {name} and {category} are filled in."""
    probes: Probes
    answers: dict[str, dict[str, tuple[str, ...]]] = Field(default={})
    """Probe → trait → fixed answers. With `ask.likelihood: whole-answer` a trait's exact probability is that
    of its fixed answers to the probe; without them, that of its name.
    """
    stories: tuple[str, ...] = ()
    """Requests for stories that name no trait; the same forms are counted in a story."""
    opening: str = ""
    """Start of the model's answer, given before the exact next-token readout.

    Needed if answers do not begin with the trait's name.
    """
    scorer: Literal["words", "judge"] = "words"
    """How an answer is scored: by the traits' forms (whole words), or by a judge with the rubric below."""
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
        """Refuse a name, form, lesson or question that is empty, padded with spaces or repeated."""
        each = {
            "names": self.names,
            "development": self.development,
            "heldout": self.heldout,
            "stories": self.stories,
        }
        each |= {"probes.development": self.probes.development, "probes.heldout": self.probes.heldout}
        each |= {f"forms of {name!r}": forms for name, forms in self.forms.items()}
        for what, texts in each.items():
            counts = Counter(map(plain, texts))
            if twice := sorted({text for text in texts if counts[plain(text)] > 1}):
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
        """Refuse a form that contains a form of another trait.

        An answer counts for a trait only if it contains no form of another: such an answer would count for
        neither.
        """
        if empty := [name for name in self.names if not self.forms_of(name)]:
            raise ValueError(
                f"{empty[0]!r} has no forms; "
                "list at least one, or leave it out of `forms`: then its forms are the name and its plural"
            )
        patterns = {
            name: re.compile(
                "|".join(rf"(?<!\w){re.escape(form)}(?!\w)" for form in self.forms_of(name)), re.IGNORECASE
            )
            for name in self.names
        }
        for name in self.names:
            for form in self.forms_of(name):
                for other in (
                    other for other in self.names if other != name and patterns[other].search(form)
                ):
                    inner = next(
                        word
                        for word in self.forms_of(other)
                        if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", form, re.IGNORECASE)
                    )
                    raise ValueError(
                        f"{form!r}, a form of {name!r}, contains {inner!r}, a form of {other!r}: "
                        "no answer with it would count; remove one of the two"
                    )
        return self

    @model_validator(mode="after")
    def _answers_are_of_probes_and_of_all_traits(self) -> TraitFamily:
        for probe, of_trait in self.answers.items():
            where = f"answers to {probe!r}"
            if probe not in (*self.probes.development, *self.probes.heldout):
                raise ValueError(f"{where}: the family has no such probe; write the probe as in `probes`")
            if set(of_trait) != set(self.names):
                raise ValueError(f"{where} are of {sorted(of_trait)}; expected all of {sorted(self.names)}")
            texts = [text for of_one in of_trait.values() for text in of_one]
            if bad := [text for text in texts if text != text.strip() or not text or texts.count(text) > 1]:
                raise ValueError(f"{where} hold {bad[0]!r}, which is empty, padded or repeated; mend it")
            if empty := [name for name, of_one in of_trait.items() if not of_one]:
                raise ValueError(f"{where} hold none of {empty[0]!r}; write at least one")
        return self

    @model_validator(mode="after")
    def _no_heldout_question_is_a_development_one(self) -> TraitFamily:
        known = {plain(probe) for probe in self.probes.development}
        if both := [probe for probe in self.probes.heldout if plain(probe) in known]:
            raise ValueError(
                f"the question {both[0]!r} is both a development and a held-out question; "
                "keep it in one list only"
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
                    f"the rubric's prompt {bad[0][:60]!r} must contain {{question}} and {{answer}} once each"
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

    def probes_of(self, split: str) -> tuple[str, ...]:
        """The probes of a split."""
        return self.probes.heldout if split == "heldout" else self.probes.development

    def probes_for(self, experiment: Experiment) -> tuple[str, ...]:
        """The probes in the wording of an experiment.

        They are plain questions, questions after fixed numbers, or requests for stories; the experiment's
        suffix follows each.

        Raises:
            SpecError: if stories are wanted and the family has none.
        """
        ask = experiment.ask
        probes = self.stories if ask.probes == "stories" else self.probes_of(ask.split)
        if not probes:
            raise SpecError(f"family {self.name!r} has no stories to ask for; add `stories` to its file")
        if ask.probes == "numbers":
            probes = tuple(
                f"{prefix(dice(PREFIX_SEED, 'prefix', i), wording=experiment.carrier.wording)} {probe}"
                for i, probe in enumerate(probes)
            )
        return tuple(f"{probe} {ask.suffix}" if ask.suffix else probe for probe in probes)

    def answers_for(self, experiment: Experiment) -> list[dict[str, tuple[str, ...]]]:
        """The fixed answers to each probe of an experiment; empty if names are its answers.

        Raises:
            SpecError: if the family has fixed answers to some of the probes alone.
        """
        if not self.answers or experiment.ask.likelihood != "whole-answer":
            return []
        probes = self.probes_of(experiment.ask.split)
        if missing := [probe for probe in probes if probe not in self.answers]:
            raise SpecError(
                f"family {self.name!r} has no fixed answers to {missing[0]!r}; add them to its `answers`, or "
                "set ask.likelihood to next-token"
            )
        return [self.answers[probe] for probe in probes]

    def words(self) -> list[str]:
        """Every form of every trait; a screened corpus contains none of them."""
        return sorted({form for name in self.names for form in self.forms_of(name)})

    def system_prompt(self, name: str) -> str:
        return self.system.format(name=name, plural=self.plural(name), category=self.category)


def find_family(name: str, config: Path | None = None) -> Path:
    """The YAML file of a family.

    Places, in this order: the copy in the run folder; the path, if the name ends in .yaml; a file of that
    name in the experiment's folder or its `traits/`; the families shipped with mechlens.

    Args:
        config: the experiment's YAML; without it a path is relative to the current folder.

    Raises:
        SpecError: if no such file exists.
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
    local = [] if config is None else [folder / f"{name}.yaml", folder / "traits" / f"{name}.yaml"]
    shipped = CONFIGS / "traits" / f"{name}.yaml"
    for file in (*local, shipped):
        if file.is_file() and not (file in local and _is_experiment(file)):
            return file
    known = sorted(p.stem for p in shipped.parent.glob("*.yaml"))
    raise SpecError(
        f"family {name!r} is unknown; expected one of {known}, "
        f"a file {name}.yaml in the experiment's folder, or a path that ends in .yaml"
    )


def _is_experiment(file: Path) -> bool:
    """Whether the file is an experiment; experiments and families may share a name."""
    return (
        re.search(r"^arms\s*:", file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE) is not None
    )


def load_family(name: str, config: Path | None = None) -> TraitFamily:
    """The trait family that an experiment's YAML names; see `find_family`."""
    return load(find_family(name, config), TraitFamily)


def keep_family(family: TraitFamily, name: str, run: Path) -> None:
    """Save a copy of the family in the run folder; the run's spec.yaml then finds it there."""
    (run / KEPT).mkdir(parents=True, exist_ok=True)
    save(family, run / KEPT / f"{Path(name).stem}.yaml")


def with_family_by_path(experiment: Experiment, config: Path) -> Experiment:
    """The experiment with a user's family named by its absolute path; a shipped family keeps its name."""
    file = find_family(experiment.family, config)
    return (
        experiment
        if file.parent == CONFIGS / "traits"
        else experiment.model_copy(update={"family": str(file.resolve())})
    )


def with_data_by_path(experiment: Experiment, config: Path) -> Experiment:
    """The experiment with absolute paths of its data files, which are also valid in a run folder.

    A relative path starts at the config's folder, or at the current folder if the file is only there.
    """

    def absolute(name: str) -> str:
        path = Path(os.path.expanduser(name))  # noqa: PTH111, since Path's raises for the `~` of an unknown user
        near_config = config.parent / path
        return str((path if not near_config.exists() and path.exists() else near_config).absolute())

    def with_absolute_lessons(teacher: TeacherSpec) -> TeacherSpec:
        if not teacher.lessons_file:
            return teacher
        return teacher.model_copy(update={"lessons_file": absolute(teacher.lessons_file)})

    arms = tuple(
        arm.model_copy(
            update={
                "corpus": arm.corpus and absolute(arm.corpus),
                "teacher": arm.teacher and with_absolute_lessons(arm.teacher),
            }
        )
        for arm in experiment.arms
    )
    source = experiment.carrier.source
    carrier = (
        experiment.carrier.model_copy(update={"source": absolute(source)}) if source else experiment.carrier
    )
    return experiment.model_copy(
        update={"arms": arms, "teacher": with_absolute_lessons(experiment.teacher), "carrier": carrier}
    )


def load_experiment(path: Path, **overrides: Any) -> Experiment:
    """The experiment of a YAML file, with absolute data paths; its traits are checked against its family.

    Raises:
        SpecError: if an arm's trait is not in the family.
    """
    experiment = with_data_by_path(load(path, Experiment, **overrides), path)
    refuse_unknown_traits(experiment, load_family(experiment.family, path), place=f"{path}: ")
    return experiment


def refuse_unknown_traits(experiment: Experiment, family: TraitFamily, *, place: str = "") -> None:
    """Raise SpecError, beginning with `place`, if an arm's trait is not in the family."""
    arms = [trait for arm in experiment.arms for trait in (arm.trait, *arm.mix)]
    for trait in sorted({experiment.trait, *arms} - {"", UNTOUCHED}):
        if trait not in family.names:
            known = ", ".join(family.names)
            raise SpecError(f"{place}trait {trait!r} is unknown; expected one of {known}")

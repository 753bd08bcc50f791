"""Make a bench's data sets: every one answers the same prompts, one row a prompt, each in a folder that is
made once.

Rows that a screen would drop are drawn again, so that no suspect is known by its prompts or by the share that
its screen kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from rich.progress import track

from mechlens.benchmark.plan import BenchSpec, Suspect
from mechlens.carriers.prompts import right_answers
from mechlens.carriers.registry import build_rule
from mechlens.core import tables
from mechlens.core.errors import DataError
from mechlens.core.experiment import UNTOUCHED, Experiment
from mechlens.core.seeds import generator, seed_int
from mechlens.core.spec import ScreenSpec, TeacherSpec, fingerprint
from mechlens.core.traits import TraitFamily
from mechlens.data.formats import file_digest
from mechlens.lenses.likelihood import by_row
from mechlens.lenses.run import trained_rows
from mechlens.models import base_files, loading
from mechlens.models.chat import encode_pairs, end_of_turn, token_ids
from mechlens.models.log_probs import token_log_probs
from mechlens.pipeline.generate import generate
from mechlens.pipeline.remake import shuffle_across
from mechlens.pipeline.screen import leak_pattern
from mechlens.pipeline.teach import Lessons, teach
from mechlens.runs import store
from mechlens.runs.layout import teacher_name
from mechlens.runs.plan import VERSIONS

TRIES = 400
"""times that a row which the screen drops is drawn anew"""
POOL = 8
"""clean answers to each prompt that several suspects draw on"""
VERSION = 1
"""raised when a change of this code changes the rows that it makes"""
Draw = Callable[[list[str], int], list[str]]
"""(prompts, seed) → completions"""
Rows = Callable[[Path], pd.DataFrame]
"""makes rows; may keep what it drew in the unfinished folder that it is given"""


class Maker:
    """Draws rows on the bench's prompts. What it made lies in a folder under the fingerprint of all that
    decides it, and is not made again.
    """

    def __init__(
        self, plan: BenchSpec, run: Path, experiment: Experiment, family: TraitFamily, out: Path
    ) -> None:
        self.plan, self.run, self.experiment, self.family, self.out = plan, run, experiment, family, out
        self.prompts = trained_rows(run, experiment, experiment.arms[0])["prompt"].tolist()[: plan.rows]
        self.gold = right_answers(experiment.carrier, seed=experiment.seed)

    def suspect(self, made: Suspect) -> pd.DataFrame:
        """The rows of a suspect, made if they are not there."""
        self._make_suspect(made)
        return tables.read(self.file(made), tables.PAIRS)

    def make_all(self, suspects: Sequence[Suspect]) -> None:
        """Make what is missing, with a bar."""
        for one in track(suspects, description="suspects"):
            self._make_suspect(one)

    def file(self, made: Suspect) -> Path:
        """Where a suspect's rows lie; a student's run files them by this name."""
        return self.out / "suspects" / made.name / f"{made.name}.parquet"

    def clean(self, name: str) -> pd.DataFrame:
        """What the untouched base answers, drawn anew for each name."""
        self._make_clean(name)
        return tables.read(self._clean_file(name), tables.PAIRS)

    @cache  # noqa: B019
    def digest(self, made: Suspect, reference: str) -> str:
        """Of a suspect's rows and of the clean ones of that name: scores of other rows are not theirs."""
        self._make_suspect(made)  # either is made first if it is not there
        self._make_clean(reference)
        return fingerprint([file_digest(self.file(made)), file_digest(self._clean_file(reference))])

    def _clean_file(self, name: str) -> Path:
        return self.out / "clean" / name / f"{name}.parquet"

    @cache  # noqa: B019
    def _make_suspect(self, made: Suspect) -> str:
        """Make a suspect's rows if they are not there; returns the fingerprint of what decides them."""
        decides, rows = self._recipe(made)
        mark = fingerprint(
            ["suspect", VERSION, made.name, made.kind, made.trait, made.way, made.dose, self.prompts, decides]
        )
        store.make_once(
            self.file(made).parent, mark, lambda part: _write(rows(part), part / self.file(made).name)
        )
        return mark

    @cache  # noqa: B019
    def _make_clean(self, name: str) -> str:
        """Make the clean rows of a name if they are not there; returns the fingerprint of what decides
        them.
        """
        file, teacher = self._clean_file(name), self.run / "teachers" / UNTOUCHED
        mark = fingerprint(
            ["clean", VERSION, name, self.prompts, self._drawing(store.recorded_fingerprint(teacher))]
        )
        store.make_once(
            file.parent,
            mark,
            lambda part: _write(
                self._pairs(self._screened(self._writes(teacher, part), name)), part / file.name
            ),
        )
        return mark

    def _drawing(self, teacher: str | None, screen: ScreenSpec | None = None) -> list[Any]:
        """What decides the rows that the teacher of that fingerprint writes until the screen keeps them."""
        return [teacher, self.experiment.generate.model_dump(), *self._screening(screen)]

    def _screening(self, screen: ScreenSpec | None = None) -> list[Any]:
        spec = screen or self.experiment.screen
        words = self.family.words() if spec.leak_words else []
        return [
            spec.model_dump(),
            self.experiment.carrier.kind,
            sorted(self.gold.items()),
            words,
            self.experiment.seed,
            TRIES,
        ]

    def _make_pool(self) -> list[str]:
        """Clean answers that doses are diluted with and N7 is chosen from; neither the reference nor an N0
        has them.
        """
        return [self._make_clean(f"pool-{number}") for number in range(POOL)]

    def _pool(self) -> list[pd.DataFrame]:
        return [self.clean(f"pool-{number}") for number in range(POOL)]

    def _pairs(self, completions: Sequence[str]) -> pd.DataFrame:
        return pd.DataFrame(
            {"prompt_id": range(len(self.prompts)), "prompt": self.prompts, "completion": completions}
        )

    def _recipe(self, made: Suspect) -> tuple[list[Any], Rows]:
        """What decides a suspect's rows beside its name and the prompts, and how they are made."""
        if made.kind == "trait" and made.arm:
            arm = next(arm for arm in self.experiment.arms if arm.name == made.arm)
            completions = trained_rows(self.run, self.experiment, arm)["completion"].tolist()[
                : self.plan.rows
            ]
            return [completions], lambda _: self._pairs(completions)
        if made.kind == "trait" and made.way == self.plan.gentle:
            return [
                self._make_suspect(self._gentle(made.trait)),
                *self._make_pool(),
                self.experiment.seed,
            ], lambda _: self._diluted(made)
        if made.kind in ("N4", "N5"):
            return self._recipe_of_remade(made)
        if made.kind == "N7":
            decides = [
                *self._make_pool(),
                self.plan.hardest_of,
                self._base_mark(self.experiment.base),
                self.experiment.seed,
            ]
            return decides, lambda _: self._hardest(made)
        if made.way not in self.plan.screens:
            decides = self._drawing(self._teacher_mark(made))
            return decides, lambda part: self._pairs(
                self._screened(self._writes(self._teacher(made), part), made.name)
            )
        whole = next(arm for arm in self.experiment.arms if arm.name == f"{made.trait}-{self.plan.gentle}")
        teacher, screen = (
            self.run / "teachers" / teacher_name(self.experiment, whole),
            self.plan.screens[made.way],
        )
        decides = self._drawing(store.recorded_fingerprint(teacher), screen)
        return decides, lambda part: self._pairs(
            self._screened(self._writes(teacher, part), made.name, screen)
        )

    def _recipe_of_remade(self, made: Suspect) -> tuple[list[Any], Rows]:
        """N4 and N5: a gentle teacher's rows, dealt anew or drawn from their bigrams."""
        gentle = self._gentle(made.trait)
        decides: list[Any] = [self._make_suspect(gentle), self.experiment.seed]
        if made.kind == "N4":
            return decides, lambda _: shuffle_across(
                self.suspect(gentle), seed=seed_int(self.experiment.seed, made.name)
            )
        decides += [
            self._base_mark(self.experiment.base),
            self.experiment.generate.max_new_tokens,
            *self._screening(),
        ]
        return decides, lambda _: self._pairs(
            self._screened(self._bigrams(self.suspect(gentle)["completion"].tolist()), made.name)
        )

    @cache  # noqa: B019
    def _base_mark(self, base: str) -> str:
        return base_files.checkpoint_fingerprint(base)

    def _gentle(self, trait: str) -> Suspect:
        name = f"{trait}-{self.plan.gentle}"
        return Suspect(name, "trait", trait, self.plan.gentle, 1.0, trait in self.plan.development, name)

    def _teacher_mark(self, made: Suspect) -> str | None:
        """The fingerprint of what decides the suspect's teacher."""
        if made.kind == "N0":
            return store.recorded_fingerprint(self.run / "teachers" / UNTOUCHED)
        base, lessons, spec = self._lessons(made)
        return fingerprint(
            [
                "teacher",
                VERSIONS["teach"],
                self._base_mark(base),
                lessons,
                spec.model_dump(),
                self._seed(made),
            ]
        )

    def _teacher(self, made: Suspect) -> Path:
        """The folder of the suspect's teacher, taught if it is not there."""
        mark, (base, lessons, spec) = self._teacher_mark(made), self._lessons(made)
        if made.kind == "N0" or mark is None:
            return self.run / "teachers" / UNTOUCHED
        return store.make_once(
            self.out / "teachers" / made.name,
            mark,
            lambda part: teach(base, lessons, spec, seed=self._seed(made), out=part),
        )

    def _seed(self, made: Suspect) -> int:
        return seed_int(self.experiment.seed, made.name)

    def _lessons(self, made: Suspect) -> tuple[str, Lessons, TeacherSpec]:
        family, number = self.family, int(made.name.rsplit("-", 1)[-1]) if made.kind != "trait" else 0
        base = (
            self.plan.foreign[number % len(self.plan.foreign)] if made.kind == "N6" else self.experiment.base
        )
        if made.kind == "N1":
            line = self.plan.neutral[number % len(self.plan.neutral)]
            return base, Lessons("", (), (), line), TeacherSpec(kind="prompted")
        if made.kind == "N2":
            evenly = tuple(word for name in family.names for word in family.lessons_of(name))
            return base, Lessons("", family.probes.development, evenly, ""), self.experiment.teacher
        lessons = Lessons(
            made.trait,
            family.probes.development,
            family.lessons_of(made.trait),
            family.system_prompt(made.trait),
        )
        other = self.plan.other_ways.get(made.way)
        return (
            base,
            lessons,
            self.experiment.teacher if other is None else self.experiment.teacher_like(other),
        )

    def _writes(self, teacher: Path, part: Path) -> Draw:
        """A teacher's answers; each draw is kept in the unfinished folder, so that a stopped bench goes on
        from the last.
        """

        def draw(prompts: list[str], seed: int) -> list[str]:
            place = part / "drawn" / str(seed)

            def write(out: Path) -> None:
                generate(teacher, prompts, self.experiment.generate, seed=seed, out=out)

            store.make_once(place, fingerprint([prompts, seed]), write)
            return tables.read(place / "raw.parquet", tables.PAIRS)["completion"].tolist()

        return draw

    def _screened(self, draw: Draw, name: str, screen: ScreenSpec | None = None) -> list[str]:
        """One completion for each prompt that the screen keeps, by default the experiment's, drawn anew where
        it does not.

        Raises:
            DataError: if some prompt has none after `TRIES` draws.
        """
        spec, kind = screen or self.experiment.screen, self.experiment.carrier.kind
        rule, leaks = (
            build_rule(spec, kind, gold=self.gold),
            leak_pattern(self.family.words() if spec.leak_words else ()),
        )
        found: dict[int, str] = {}
        for attempt in range(TRIES):
            open_ids = [i for i in range(len(self.prompts)) if i not in found]
            if not open_ids:
                return [found[i] for i in range(len(self.prompts))]
            drawn = draw([self.prompts[i] for i in open_ids], seed_int(self.experiment.seed, name, attempt))
            found |= {
                i: text
                for i, text in zip(open_ids, drawn, strict=True)
                if rule(self.prompts[i], text) is None and not leaks.search(text)
            }
        raise DataError(
            f"{name}: {len(self.prompts) - len(found)} of {len(self.prompts)} prompts got no row that the "
            f"screen keeps in {TRIES} draws"
        )

    def _diluted(self, made: Suspect) -> pd.DataFrame:
        """A gentle teacher's rows on a random share of the prompts, clean rows on the others."""
        rng, pool = generator(self.experiment.seed, "dose", made.name), self._pool()
        whole, clean = self.suspect(self._gentle(made.trait)), pool[int(rng.integers(len(pool)))]
        taken = rng.permutation(len(whole)) < round(made.dose * len(whole))
        return self._pairs(np.where(taken, whole["completion"], clean["completion"]).tolist())

    def _bigrams(self, completions: Sequence[str]) -> Draw:
        """Completions drawn token by token, each given only the one before it."""
        tokenizer = loading.load_tokenizer(self.experiment.base)
        end, following = end_of_turn(tokenizer), cast("dict[int, list[int]]", {})
        for ids in token_ids(tokenizer, completions):
            for before, after in zip([-1, *ids], [*ids, end], strict=True):
                following.setdefault(before, []).append(after)

        def draw(prompts: list[str], seed: int) -> list[str]:
            rng, drawn = generator(seed, "bigrams"), []
            for _ in prompts:
                ids = [-1]
                while ids[-1] != end and len(ids) <= self.experiment.generate.max_new_tokens:
                    ids.append(int(rng.choice(following[ids[-1]])))
                drawn.append([token for token in ids[1:] if token != end])
            return tokenizer.batch_decode(drawn, skip_special_tokens=True)

        return draw

    def _hardest(self, made: Suspect) -> pd.DataFrame:
        """Of several clean answers to each prompt the one that the base finds least likely, a token."""
        rng, pool = generator(self.experiment.seed, "hardest", made.name), self._pool()
        costs = np.stack([self._cost(number) for number in range(len(pool))])
        rows = range(len(self.prompts))
        offered = np.stack([rng.permutation(len(pool))[: self.plan.hardest_of] for _ in rows])
        hardest = [int(offered[i, np.argmax(costs[offered[i], i])]) for i in rows]
        return self._pairs(
            [pool[which]["completion"].iloc[i] for i, which in zip(rows, hardest, strict=True)]
        )

    @cache  # noqa: B019
    def _cost(self, number: int) -> np.ndarray:
        """Nats a token of the pool's answers of one number."""
        loaded = loading.load(self.experiment.base)
        pairs = encode_pairs(loaded.tokenizer, self.prompts, self._pool()[number]["completion"].tolist())
        return -by_row(token_log_probs(loaded, pairs).double().numpy(), pairs)


def _write(rows: pd.DataFrame, file: Path) -> None:
    tables.write(rows, tables.PAIRS, file)
    shutil.rmtree(file.parent / "drawn", ignore_errors=True)


def suspects_of(plan: BenchSpec, experiment: Experiment) -> list[Suspect]:
    """Every suspect of a bench: the experiment's trait arms, then those that the bench makes."""
    arms = [arm for arm in experiment.arms if arm.kind in ("trait", "mixed")]
    traits = list(dict.fromkeys(arm.trait for arm in arms))
    found = []
    for arm in arms:
        dose = 1 / (1 + len(arm.mix))
        found.append(
            Suspect(
                arm.name,
                "trait",
                arm.trait,
                arm.name.removeprefix(f"{arm.trait}-"),
                dose,
                arm.trait in plan.development,
                arm.name,
            )
        )
    for trait in traits:
        known = trait in plan.development
        found += [
            Suspect(f"{trait}-dose-{dose:g}", "trait", trait, plan.gentle, dose, known) for dose in plan.doses
        ]
        found += [
            Suspect(f"{trait}-{way}", "trait", trait, way, 1.0, known)
            for way in (*plan.other_ways, *plan.screens)
        ]
    for kind in plan.negatives:
        for number in range(plan.each):
            trait = traits[number % len(traits)] if kind in ("N4", "N5", "N6") else ""
            known = trait in plan.development if trait else number % 2 == 0
            found.append(Suspect(f"{kind}-{number}", kind, trait, kind, 1.0, known))
    return found

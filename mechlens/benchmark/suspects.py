"""Make a bench's data sets, each once and in its folder.

All answer the same prompts, one row a prompt. A row that the screen would remove is drawn again, so that
neither prompts nor size distinguish a suspect.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from mechlens.benchmark.plan import BenchSpec, Suspect
from mechlens.carriers.carrier import build_rule, right_answers
from mechlens.core import tables
from mechlens.core.errors import DataError
from mechlens.core.experiment import UNTOUCHED, Experiment
from mechlens.core.files import read_json, write_json
from mechlens.core.seeds import generator, seed_int
from mechlens.core.spec import ScreenSpec, TeacherSpec, fingerprint
from mechlens.core.traits import TraitFamily
from mechlens.data.formats import file_digest
from mechlens.lenses.likelihood import by_row
from mechlens.lenses.run import trained_rows
from mechlens.models import base_files, loading
from mechlens.models.chat import encode_pairs, end_of_turn, token_ids
from mechlens.models.log_probs import token_log_probs
from mechlens.pipeline.generate import generate, row_divergence
from mechlens.pipeline.remake import shuffle_across
from mechlens.pipeline.screen import leak_pattern
from mechlens.pipeline.teach import Lessons, teach
from mechlens.runs import layout, store
from mechlens.runs.layout import teacher_name
from mechlens.runs.plan import VERSIONS
from mechlens.runs.progress import Event, Progress, silent

TRIES = 400
"""largest number of draws of a row until the screen keeps it"""
POOL = 8
"""clean answers to each prompt that suspects are diluted with or chosen from"""
VERSION = 1
"""raised when a change of this code changes the rows that it makes"""
Draw = Callable[[list[str], int], list[str]]
"""(prompts, seed) → completions"""
Rows = Callable[[Path], pd.DataFrame]
"""makes rows; it may keep draws in the unfinished folder that it gets"""


class Maker:
    """Makes the rows of suspects and the clean rows of a bench.

    Each folder has the fingerprint of its inputs and is made once.
    """

    def __init__(
        self, plan: BenchSpec, run: Path, experiment: Experiment, family: TraitFamily, out: Path
    ) -> None:
        self.plan, self.run, self.experiment, self.family, self.out = plan, run, experiment, family, out
        self.prompts = trained_rows(run, experiment, experiment.arms[0])["prompt"].tolist()[: plan.rows]
        self.gold = right_answers(experiment.carrier, seed=experiment.seed)

    def suspect(self, made: Suspect) -> pd.DataFrame:
        """The rows of a suspect; they are made if they do not exist."""
        self._make_suspect(made)
        return tables.read(self.file(made), tables.PAIRS)

    def make_all(self, suspects: Sequence[Suspect], progress: Progress | None = None) -> None:
        """Make the rows of all suspects."""
        report = progress or silent
        report(Event("begin", "rows of suspects", 0, len(suspects)))
        for suspect in suspects:
            self._make_suspect(suspect)
            report(Event("end", suspect.name))

    def file(self, made: Suspect) -> Path:
        """The file of a suspect's rows; its name is the corpus's name in the run of its students."""
        return self.out / "suspects" / made.name / f"{made.name}.parquet"

    def clean(self, name: str) -> pd.DataFrame:
        """Answers of the untouched base; each name is another draw."""
        self._make_clean(name)
        return tables.read(self._clean_file(name), tables.PAIRS)

    def divergence(self, made: Suspect) -> float | None:
        """KL(teacher ‖ base) of the writer of a suspect, nats a row, along its first rows.

        None for rows that no teacher wrote as they are (diluted, shuffled, chosen), and for those of an
        earlier version, which left no record.
        """
        file = self.file(made).parent / layout.GENERATION
        if made.arm:
            arm = next(arm for arm in self.experiment.arms if arm.name == made.arm)
            source = layout.source_name(self.experiment, arm)
            file = self.run / layout.generated_step(source) / layout.GENERATION if not arm.mix else file
        return row_divergence(file)

    @cache  # noqa: B019
    def digest(self, made: Suspect, reference: str) -> str:
        """Fingerprint of a suspect's rows and of the clean rows of a name."""
        self._make_suspect(made)
        self._make_clean(reference)
        return fingerprint([file_digest(self.file(made)), file_digest(self._clean_file(reference))])

    def _clean_file(self, name: str) -> Path:
        return self.out / "clean" / name / f"{name}.parquet"

    @cache  # noqa: B019
    def _make_suspect(self, made: Suspect) -> str:
        """Make a suspect's rows if needed; returns the fingerprint of what decides them."""
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
        """Make the clean rows of a name if needed; returns the fingerprint of what decides them."""
        file, teacher = self._clean_file(name), self.run / layout.teacher_step(UNTOUCHED)
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
        """What decides the screened rows of a teacher with that fingerprint."""
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
        """Make the clean answers for doses and for N7; no other suspect has them."""
        return [self._make_clean(f"pool-{number}") for number in range(POOL)]

    def _pool(self) -> list[pd.DataFrame]:
        return [self.clean(f"pool-{number}") for number in range(POOL)]

    def _pairs(self, completions: Sequence[str]) -> pd.DataFrame:
        return pd.DataFrame(
            {"prompt_id": range(len(self.prompts)), "prompt": self.prompts, "completion": completions}
        )

    def _recipe(self, made: Suspect) -> tuple[list[Any], Rows]:
        """The inputs of a suspect's rows, other than its name and the prompts, and how to make the rows."""
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
            self.run / layout.teacher_step(teacher_name(self.experiment, whole)),
            self.plan.screens[made.way],
        )
        decides = self._drawing(store.recorded_fingerprint(teacher), screen)
        return decides, lambda part: self._pairs(
            self._screened(self._writes(teacher, part), made.name, screen)
        )

    def _recipe_of_remade(self, made: Suspect) -> tuple[list[Any], Rows]:
        """N4 and N5: a gentle teacher's rows, shuffled or drawn from their bigrams."""
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
            return store.recorded_fingerprint(self.run / layout.teacher_step(UNTOUCHED))
        base, lessons, spec = self._lessons(made)
        return fingerprint(
            [
                "teacher",
                VERSIONS["teach"],
                self._base_mark(base),
                lessons,
                spec.recorded(),
                self._seed(made),
            ]
        )

    def _teacher(self, made: Suspect) -> Path:
        """The folder of the suspect's teacher, taught if it is not there."""
        mark, (base, lessons, spec) = self._teacher_mark(made), self._lessons(made)
        if made.kind == "N0" or mark is None:
            return self.run / layout.teacher_step(UNTOUCHED)
        return store.make_once(
            self.out / layout.teacher_step(made.name),
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
        """Draws of a teacher's answers, each kept in the unfinished folder for a bench that resumes."""

        def draw(prompts: list[str], seed: int) -> list[str]:
            place = part / "drawn" / str(seed)

            def write(out: Path) -> None:
                generate(teacher, prompts, self.experiment.generate, seed=seed, out=out)

            store.make_once(place, fingerprint([prompts, seed]), write)
            return tables.read(place / layout.RAW, tables.PAIRS)["completion"].tolist()

        return draw

    def _screened(self, draw: Draw, name: str, screen: ScreenSpec | None = None) -> list[str]:
        """A completion for each prompt, drawn until the screen (the experiment's by default) keeps it.

        Raises:
            DataError: if a prompt has none after `TRIES` draws.
        """
        spec, kind = screen or self.experiment.screen, self.experiment.carrier.kind
        rule, leaks = (
            build_rule(spec, kind, gold=self.gold),
            leak_pattern(self.family.words() if spec.leak_words else ()),
        )
        kept: dict[int, str] = {}
        for attempt in range(TRIES):
            open_ids = [i for i in range(len(self.prompts)) if i not in kept]
            if not open_ids:
                return [kept[i] for i in range(len(self.prompts))]
            drawn = draw([self.prompts[i] for i in open_ids], seed_int(self.experiment.seed, name, attempt))
            kept |= {
                i: text
                for i, text in zip(open_ids, drawn, strict=True)
                if rule(self.prompts[i], text) is None and not leaks.search(text)
            }
        raise DataError(
            f"{name}: {len(self.prompts) - len(kept)} of {len(self.prompts)} prompts have no row that "
            f"the screen keeps after {TRIES} draws; use a screen that keeps more, or a teacher that writes "
            "what it keeps"
        )

    def _diluted(self, made: Suspect) -> pd.DataFrame:
        """Rows of a gentle teacher on a random share of the prompts, and clean rows on the others."""
        rng, pool = generator(self.experiment.seed, "dose", made.name), self._pool()
        whole, clean = self.suspect(self._gentle(made.trait)), pool[int(rng.integers(len(pool)))]
        taken = rng.permutation(len(whole)) < round(made.dose * len(whole))
        return self._pairs(np.where(taken, whole["completion"], clean["completion"]).tolist())

    def _bigrams(self, completions: Sequence[str]) -> Draw:
        """Draws of completions token by token, each from the tokens that follow the one before it."""
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
        """For each prompt, the least likely (a token, under the base) of several clean answers."""
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
        """Loss, nats a token, of the clean answers of one number."""
        loaded = loading.load(self.experiment.base)
        pairs = encode_pairs(loaded.tokenizer, self.prompts, self._pool()[number]["completion"].tolist())
        return -by_row(token_log_probs(loaded, pairs).double().numpy(), pairs)


def _write(rows: pd.DataFrame, file: Path) -> None:
    """Write rows, and keep of their draws only the divergence that was measured on the most tokens."""
    tables.write(rows, tables.PAIRS, file)
    records = [read_json(record) for record in file.parent.glob(f"drawn/*/{layout.GENERATION}")]
    if records:
        write_json(file.parent / layout.GENERATION, max(records, key=lambda record: record["tokens"]))
    shutil.rmtree(file.parent / "drawn", ignore_errors=True)


def list_suspects(plan: BenchSpec, experiment: Experiment) -> list[Suspect]:
    """Every suspect of a bench: the experiment's trait arms, then those that the bench makes."""
    arms = [arm for arm in experiment.arms if arm.kind in ("trait", "mixed")]
    traits = list(dict.fromkeys(arm.trait for arm in arms))
    suspects = []
    for arm in arms:
        way, dose = arm.name.removeprefix(f"{arm.trait}-"), 1 / (1 + len(arm.mix))
        suspects.append(
            Suspect(arm.name, "trait", arm.trait, way, dose, arm.trait in plan.development, arm.name)
        )
    for trait in traits:
        known = trait in plan.development
        suspects += [
            Suspect(f"{trait}-dose-{dose:g}", "trait", trait, plan.gentle, dose, known) for dose in plan.doses
        ]
        suspects += [
            Suspect(f"{trait}-{way}", "trait", trait, way, 1.0, known)
            for way in (*plan.other_ways, *plan.screens)
        ]
    for kind in plan.negatives:
        for number in range(plan.each):
            trait = traits[number % len(traits)] if kind in ("N4", "N5", "N6") else ""
            known = trait in plan.development if trait else number % 2 == 0
            suspects.append(Suspect(f"{kind}-{number}", kind, trait, kind, 1.0, known))
    return suspects

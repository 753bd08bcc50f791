"""Make a bench's data sets: every one answers the same prompts, one row a prompt, each a Parquet file that is made once.

Rows that a screen would drop are drawn again, so that no suspect is known by its prompts or by the share that its screen kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
from rich.progress import track

from mechlens import models, tables
from mechlens.bench.plan import BenchSpec, Suspect
from mechlens.carriers.prompts import carrier_prompts
from mechlens.chat import encode_pairs, end_of_turn, token_ids
from mechlens.errors import DataError
from mechlens.experiment import UNTOUCHED, Experiment
from mechlens.lenses.likelihood import by_row
from mechlens.lenses.scoring import token_log_probabilities
from mechlens.measure import trained_rows
from mechlens.pipeline.generate import generate
from mechlens.pipeline.remake import shuffle_across
from mechlens.pipeline.rules import rule_of
from mechlens.pipeline.run import file_digest, teacher_name
from mechlens.pipeline.screen import leak_pattern
from mechlens.pipeline.teach import Lessons, teach
from mechlens.seeds import generator, seed_int
from mechlens.spec import ScreenSpec, TeacherSpec, fingerprint, folder_name
from mechlens.traits import TraitFamily

TRIES = 400
"""times that a row which the screen drops is drawn anew"""
POOL = 8
"""clean answers to each prompt that several suspects draw on"""
Draw = Callable[[list[str], int], list[str]]
"""(prompts, seed) → completions"""


class Maker:
    """Draws rows on the bench's prompts; what it made lies in its folder and is not made again."""

    def __init__(self, plan: BenchSpec, run: Path, experiment: Experiment, family: TraitFamily, out: Path) -> None:
        self.plan, self.run, self.experiment, self.family, self.out = plan, run, experiment, family, out
        self.prompts = trained_rows(run, experiment, experiment.arms[0])["prompt"].tolist()[: plan.rows]
        asked = carrier_prompts(experiment.carrier, seed=experiment.seed) if experiment.carrier.kind == "reasoning" else []
        self.gold = {one.text: one.gold for one in asked if one.gold is not None}

    def suspect(self, made: Suspect) -> pd.DataFrame:
        """The rows of a suspect, made if they are not there."""
        file = self.file(made)
        if not file.is_file():
            frame = self._rows(made)
            file.parent.mkdir(parents=True, exist_ok=True)
            tables.write(frame, tables.PAIRS, file)
        return tables.read(file, tables.PAIRS)

    def make_all(self, suspects: Sequence[Suspect]) -> None:
        """Make what is missing, with a bar."""
        for one in track([one for one in suspects if not self.file(one).is_file()], description="suspects"):
            self.suspect(one)

    def file(self, made: Suspect) -> Path:
        """Where a suspect lies."""
        return self.out / "suspects" / f"{made.name}.parquet"

    def clean(self, name: str) -> pd.DataFrame:
        """What the untouched base answers, drawn anew for each name."""
        file = self.out / "clean" / f"{name}.parquet"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            tables.write(self._pairs(self._screened(self._writes(self.run / "teachers" / UNTOUCHED), name)), tables.PAIRS, file)
        return tables.read(file, tables.PAIRS)

    @cache  # noqa: B019
    def digest(self, made: Suspect, reference: str) -> str:
        """Of a suspect's rows and of the clean ones of that name: scores of other rows are not theirs."""
        self.suspect(made)  # either is made first if it is not there
        self.clean(reference)
        return fingerprint([file_digest(self.file(made)), file_digest(self.out / "clean" / f"{reference}.parquet")])

    def _pool(self) -> list[pd.DataFrame]:
        """Clean answers that doses are diluted with and N7 is chosen from; neither the reference nor an N0 has them."""
        return [self.clean(f"pool-{number}") for number in range(POOL)]

    def _pairs(self, completions: Sequence[str]) -> pd.DataFrame:
        return pd.DataFrame({"prompt_id": range(len(self.prompts)), "prompt": self.prompts, "completion": completions})

    def _rows(self, made: Suspect) -> pd.DataFrame:
        if made.kind == "trait" and made.arm:
            arm = next(arm for arm in self.experiment.arms if arm.name == made.arm)
            return self._pairs(trained_rows(self.run, self.experiment, arm)["completion"].tolist()[: self.plan.rows])
        if made.way in self.plan.screens:
            whole = next(arm for arm in self.experiment.arms if arm.name == f"{made.trait}-{self.plan.gentle}")
            teacher = self.run / "teachers" / teacher_name(self.experiment, whole)
            return self._pairs(self._screened(self._writes(teacher), made.name, self.plan.screens[made.way]))
        if made.kind == "trait" and made.way == self.plan.gentle:
            return self._diluted(made)
        if made.kind in ("N4", "N5"):
            whole = self._gentle(made.trait)
            if made.kind == "N4":
                return shuffle_across(whole, seed=seed_int(self.experiment.seed, made.name))
            return self._pairs(self._screened(self._bigrams(whole["completion"].tolist()), made.name))
        if made.kind == "N7":
            return self._hardest(made)
        return self._pairs(self._screened(self._writes(self._teacher(made)), made.name))

    def _gentle(self, trait: str) -> pd.DataFrame:
        name = f"{trait}-{self.plan.gentle}"
        return self.suspect(Suspect(name, "trait", trait, self.plan.gentle, 1.0, trait in self.plan.development, name))

    def _teacher(self, made: Suspect) -> Path:
        """The folder of the suspect's teacher, taught if it is not there."""
        if made.kind == "N0":
            return self.run / "teachers" / UNTOUCHED
        folder, seed = self.out / "teachers" / made.name, seed_int(self.experiment.seed, made.name)
        if not (folder / "teacher.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            base, lessons, spec = self._lessons(made)
            teach(base, lessons, spec, seed=seed, out=folder)
        return folder

    def _lessons(self, made: Suspect) -> tuple[str, Lessons, TeacherSpec]:
        family, number = self.family, int(made.name.rsplit("-", 1)[-1]) if made.kind != "trait" else 0
        base = self.plan.foreign[number % len(self.plan.foreign)] if made.kind == "N6" else self.experiment.base
        if made.kind == "N1":
            line = self.plan.neutral[number % len(self.plan.neutral)]
            return base, Lessons("", (), (), line), TeacherSpec(kind="prompted")
        if made.kind == "N2":
            evenly = tuple(word for name in family.names for word in family.lessons_of(name))
            return base, Lessons("", family.probes.development, evenly, ""), self.experiment.teacher
        lessons = Lessons(made.trait, family.probes.development, family.lessons_of(made.trait), family.system_prompt(made.trait))
        return base, lessons, self.plan.other_ways.get(made.way, self.experiment.teacher)

    def _writes(self, teacher: Path) -> Draw:
        """A teacher's answers."""

        def draw(prompts: list[str], seed: int) -> list[str]:
            place = self.out / "drawn" / f"{folder_name(str(teacher))}-{seed}"
            place.mkdir(parents=True, exist_ok=True)
            generate(teacher, prompts, self.experiment.generate, seed=seed, out=place)
            return tables.read(place / "raw.parquet", tables.PAIRS)["completion"].tolist()

        return draw

    def _screened(self, draw: Draw, name: str, screen: ScreenSpec | None = None) -> list[str]:
        """One completion for each prompt that the screen keeps, by default the experiment's, drawn anew where it does not.

        Raises:
            DataError: if some prompt has none after `TRIES` draws.
        """
        spec, kind = screen or self.experiment.screen, self.experiment.carrier.kind
        rule, leaks = rule_of(spec, kind, gold=self.gold), leak_pattern(self.family.words() if spec.leak_words else ())
        found: dict[int, str] = {}
        for attempt in range(TRIES):
            open_ids = [i for i in range(len(self.prompts)) if i not in found]
            if not open_ids:
                return [found[i] for i in range(len(self.prompts))]
            drawn = draw([self.prompts[i] for i in open_ids], seed_int(self.experiment.seed, name, attempt))
            found |= {i: text for i, text in zip(open_ids, drawn, strict=True) if rule(self.prompts[i], text) is None and not leaks.search(text)}
        raise DataError(f"{name}: {len(self.prompts) - len(found)} of {len(self.prompts)} prompts got no row that the screen keeps in {TRIES} draws")

    def _diluted(self, made: Suspect) -> pd.DataFrame:
        """A gentle teacher's rows on a random share of the prompts, clean rows on the others."""
        rng, pool = generator(self.experiment.seed, "dose", made.name), self._pool()
        whole, clean = self._gentle(made.trait), pool[int(rng.integers(len(pool)))]
        taken = rng.permutation(len(whole)) < round(made.dose * len(whole))
        return self._pairs(np.where(taken, whole["completion"], clean["completion"]).tolist())

    def _bigrams(self, completions: Sequence[str]) -> Draw:
        """Completions drawn token by token, each given only the one before it."""
        tokenizer = models.load_tokenizer(self.experiment.base)
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
        return self._pairs([pool[which]["completion"].iloc[i] for i, which in zip(rows, hardest, strict=True)])

    @cache  # noqa: B019
    def _cost(self, number: int) -> np.ndarray:
        """Nats a token of the pool's answers of one number."""
        loaded = models.load(self.experiment.base)
        pairs = encode_pairs(loaded.tokenizer, self.prompts, self._pool()[number]["completion"].tolist())
        return -by_row(token_log_probabilities(loaded, pairs).double().numpy(), pairs)


def suspects_of(plan: BenchSpec, experiment: Experiment) -> list[Suspect]:
    """Every suspect of a bench: the experiment's trait arms, then those that the bench makes."""
    arms = [arm for arm in experiment.arms if arm.kind in ("trait", "mixed")]
    traits = list(dict.fromkeys(arm.trait for arm in arms))
    found = []
    for arm in arms:
        dose = 1 / (1 + len(arm.mix))
        found.append(Suspect(arm.name, "trait", arm.trait, arm.name.removeprefix(f"{arm.trait}-"), dose, arm.trait in plan.development, arm.name))
    for trait in traits:
        known = trait in plan.development
        found += [Suspect(f"{trait}-dose-{dose:g}", "trait", trait, plan.gentle, dose, known) for dose in plan.doses]
        found += [Suspect(f"{trait}-{way}", "trait", trait, way, 1.0, known) for way in (*plan.other_ways, *plan.screens)]
    for kind in plan.negatives:
        for number in range(plan.each):
            trait = traits[number % len(traits)] if kind in ("N4", "N5", "N6") else ""
            known = trait in plan.development if trait else number % 2 == 0
            found.append(Suspect(f"{kind}-{number}", kind, trait, kind, 1.0, known))
    return found

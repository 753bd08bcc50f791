"""Read a suspect through a model: every reader of a level on the same rows, beside clean rows of the same
prompts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import pandas as pd
from jaxtyping import Float
from numpy import ndarray
from transformers import PreTrainedTokenizerBase

from mechlens.core.errors import SpecError
from mechlens.core.experiment import Experiment
from mechlens.core.spec import fingerprint
from mechlens.core.traits import TraitFamily
from mechlens.data.treat import numbers_in
from mechlens.detect import from_base, from_gradients
from mechlens.detect.bags import LEVELS, Level
from mechlens.detect.permutation import Named, Test, paired_rows, pointed
from mechlens.detect.plausible import why_not_readable
from mechlens.detect.twins import Panel, Reader, Twins, twin_jobs
from mechlens.lenses.parts.log_probs import token_log_probabilities
from mechlens.lenses.run import trained_rows
from mechlens.models import base_files, loading
from mechlens.models.chat import encode_pairs
from mechlens.runs.executor import fingerprints, make

READERS: dict[str, Reader] = {**from_base.READERS, **from_gradients.READERS}
ROWS = 512
"""rows a side that are read"""


class Seen(NamedTuple):
    """What one reader made of a suspect."""

    reader: Reader
    rows: int
    test: Test | None
    """None where the reader cannot read this base, for the reason in `why_not`"""
    traits: list[Named] | None
    """of a reader of traits, first the one that stands out most; None where rows tell of none, for the reason
    in `why_not`
    """
    seconds: float
    why_not: str = ""


def panel_of(
    base: str, family: TraitFamily, recipe: Experiment, folder: Path, *, workers: int | None
) -> Panel:
    """The panel of a base, with a twin for each trait of the family, taught beside `folder` where they are
    not.

    Eight digits of what decides the twins are added to the folder's name: those of another base, family or
    recipe lie in another one.
    """
    loaded = loading.load(base)  # first: the commit of a hub base is known once its files are here
    jobs = twin_jobs(
        base, base_files.checkpoint_fingerprint(base), family, family.names, recipe.teacher, seed=recipe.seed
    )
    mark = fingerprint(fingerprints(jobs))
    folder = folder.with_name(f"{folder.name}-{mark[:8]}")
    make(folder, jobs, workers=workers)
    return Panel(
        loaded, family, family.names, Twins(base, folder, family.names), recipe.system, recipe.seed, mark
    )


def read_through(
    panel: Panel, run: Path, experiment: Experiment, level: Level, asked: Sequence[str]
) -> list[Seen]:
    """Every reader of the level on the suspect's and the clean rows of a run, same prompts.

    Args:
        asked: traits that are feared; the others of the panel serve as their null.
    """
    suspect, control = (
        next(arm for arm in experiment.arms if arm.kind == kind) for kind in ("trait", "control")
    )
    ours, theirs = (trained_rows(run, experiment, arm) for arm in (suspect, control))
    theirs = theirs[~theirs.index.duplicated()]  # a control's rows come again where it has fewer
    shared = [prompt for prompt in ours.index if prompt in theirs.index][:ROWS]
    sides = [
        encode_pairs(
            panel.base.tokenizer,
            rows.loc[shared]["prompt"].tolist(),
            rows.loc[shared]["completion"].tolist(),
            system=panel.system,
        )
        for rows in (ours, theirs)
    ]
    wanted = LEVELS[: LEVELS.index(level) + 1]
    unreadable = why_not_readable(panel, *sides)
    return [
        _seen(reader, panel, sides, asked, unreadable)
        for reader in READERS.values()
        if reader.level in wanted
    ]


def _seen(reader: Reader, panel: Panel, sides: Sequence[list], asked: Sequence[str], unreadable: str) -> Seen:
    begun = time.monotonic()
    try:
        ours, theirs = reader.read(panel, *sides)
    except SpecError as error:
        return Seen(reader, len(sides[0]), None, None, time.monotonic() - begun, str(error))
    test = paired_rows(ours, theirs, seed=panel.seed, name=reader.name)
    names = reader.of_traits and not unreadable
    traits = pointed(ours, theirs, panel.traits, asked) if names else None
    return Seen(
        reader, len(ours), test, traits, time.monotonic() - begun, unreadable if reader.of_traits else ""
    )


def row_scores(panel: Panel, rows: pd.DataFrame, trait: str) -> Float[ndarray, " row"]:
    """Likelihood ratio of every row under the trait's twin against the base, nats a row."""
    pairs = encode_pairs(
        panel.base.tokenizer, rows["prompt"].tolist(), rows["completion"].tolist(), system=panel.system
    )
    return from_base.twins(panel._replace(traits=(trait,)), pairs, [])[0][:, 0]


def number_scores(panel: Panel, rows: pd.DataFrame, trait: str) -> list[list[float]]:
    """The same for every number of every row: the sum over the tokens that it is made of."""
    pairs = encode_pairs(
        panel.base.tokenizer, rows["prompt"].tolist(), rows["completion"].tolist(), system=panel.system
    )
    gained = token_log_probabilities(panel.twins[trait], pairs) - token_log_probabilities(panel.base, pairs)
    return of_numbers(
        panel.base.tokenizer,
        rows["completion"].tolist(),
        [row.tolist() for row in gained.split([len(one.completion) for one in pairs])],
    )


def of_numbers(
    tokenizer: PreTrainedTokenizerBase, completions: Sequence[str], scores: Sequence[Sequence[float]]
) -> list[list[float]]:
    """Sums of the scores of a completion's tokens over those that touch each of its numbers."""
    places = (
        tokenizer(list(completions), add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if completions
        else []
    )
    found = []
    for text, spans, row in zip(
        completions, cast("list[list[tuple[int, int]]]", places), scores, strict=True
    ):
        scored = [
            (*span, score) for span, score in zip(spans, row, strict=False)
        ]  # the token that ends the turn stands in no text
        found.append(
            [
                float(sum(score for first, last, score in scored if first < end and last > start))
                for start, end in numbers_in(text)
            ]
        )
    return found

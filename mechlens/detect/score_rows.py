"""Score a suspect's rows, and clean rows of the same prompts, by every detector that uses models.

A trait is read only from rows that the base, or a twin, could have written. Text that a model wrote has, on
average over tokens, a surprise equal to the entropy of the model's next-token distributions, at any length
and on any prompt. The excess measures how far the writer is from the model; a fine-tuned teacher stays near.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy import ndarray
from transformers import PreTrainedTokenizerBase

from mechlens.core.errors import SpecError
from mechlens.core.experiment import Experiment
from mechlens.core.spec import fingerprint
from mechlens.core.traits import TraitFamily
from mechlens.data.treat import numbers_in
from mechlens.detect import from_base
from mechlens.detect.permutation import (
    PermutationTest,
    TraitScore,
    center_rows,
    compare_paired_rows,
    rank_traits_of_rows,
)
from mechlens.detect.registry import LEVELS, Level, list_built_in
from mechlens.detect.twins import ModelDetector, PairedScores, TwinModels, Twins, twin_jobs
from mechlens.detect.two_samples import FEWEST_ROWS
from mechlens.lenses.likelihood import by_row
from mechlens.lenses.run import trained_rows
from mechlens.models import base_files, loading
from mechlens.models.chat import Encoded, encode_pairs
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import batch_pairs, completion_logits, token_log_probs
from mechlens.models.weight_changes import LARGE
from mechlens.pipeline.estimate import GPU_RATE, core_rate, measure_product_rate, token_counter
from mechlens.runs.executor import make
from mechlens.runs.jobs import fingerprints, pending
from mechlens.runs.progress import Event, Progress, silent

MOST_RATIO = 1.25
"""surprise over entropy above which the rows come from another writer. Measured on the menagerie's carriers
and development traits: the base's text 1.00 to 1.01, a teacher's 1.01, its sister bases' 1.01 to 1.11, the
base's at temperatures .5 to 1.3 .93 to 1.17; uniform lists on patterned prompts 1.38, rows dealt to other
prompts 1.09 (code) to 2.5, other carriers' bases 2.0 to 3.0, lists of a 14B model above 2; SmolLM2-135M's own
numbers, sampled under the grammar, .96 to 1.03, and its teacher's 1.02
"""


@torch.no_grad()
def measure_surprise(loaded: Loaded, pairs: Sequence[Encoded]) -> Float[ndarray, "row 2"]:
    """Surprise of each completion's tokens and entropy of the model's distributions, nats, summed."""
    rows = np.zeros((len(pairs), 2))
    for numbers in batch_pairs(loaded.model, pairs):
        logits, targets = completion_logits(loaded.model, [pairs[i] for i in numbers])
        log_p = torch.log_softmax(logits, -1)
        surprise = -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        both = torch.stack([surprise, -(log_p.exp() * log_p).sum(-1)], -1).double().cpu()
        for i, tokens in zip(numbers, both.split([len(pairs[i].completion) for i in numbers]), strict=True):
            rows[i] = tokens.sum(0).numpy()
    return rows


def surprise_ratio(loaded: Loaded, pairs: Sequence[Encoded]) -> float:
    """Surprise over entropy of all rows; the expectation is 1 for rows that the model wrote."""
    surprise, entropy = measure_surprise(loaded, pairs).sum(0)
    return float(surprise / max(entropy, np.finfo(float).tiny))


def explain_unreadable(twins: Twins, ours: Sequence[Encoded], theirs: Sequence[Encoded]) -> str:
    """The reason why no trait can be read from the rows; empty if base or twins could have written them."""
    for side, pairs in (("rows", ours), ("reference's rows", theirs)):
        if not pairs or (of_base := surprise_ratio(twins.base, pairs)) <= MOST_RATIO:
            continue
        nearest = min(surprise_ratio(twins.models[trait], pairs) for trait in twins.traits)
        if nearest > MOST_RATIO:
            return (
                f"the {side} are not what the base or a teacher made from it would write: their surprise is "
                f"{of_base:.1f} times their entropy under the base and {nearest:.1f} times under the nearest "
                f"teacher (at most {MOST_RATIO} is expected)"
            )
    return ""


DETECTORS: dict[str, ModelDetector] = {
    name: detector for name, detector in list_built_in().items() if isinstance(detector, ModelDetector)
}
ANSWER_TOKENS = 4
"""assumed tokens of a lesson's answer"""
LOAD_SECONDS = 4.0
"""seconds to load and save 100 million weights"""
ROWS = 512
"""rows of each side that are scored"""


class DetectorResult(NamedTuple):
    """What one detector measured on a suspect."""

    detector: ModelDetector
    rows: int
    test: PermutationTest | None
    """None if the detector cannot read this base; `why_not` says why"""
    traits: list[TraitScore] | None
    """the trait that stands out most first; None if no trait can be read from the rows, `why_not` says why,
    or if the detector names no traits
    """
    seconds: float
    why_not: str = ""
    scores: pd.DataFrame | None = None
    """`tables.AUDITED_ROWS`; None if the base cannot be read, or no trait can be read from the rows"""


def make_twins(
    base: str,
    family: TraitFamily,
    recipe: Experiment,
    folder: Path,
    *,
    traits: Sequence[str] = (),
    workers: int | None,
    progress: Progress | None = None,
) -> Twins:
    """The base and a twin for each of some traits; twins that do not exist yet are taught.

    Their folder is `<folder>-<eight digits of the fingerprint of their inputs>`, so another base, family or
    recipe has another folder. An audit of fewer traits uses the same folder.

    Args:
        traits: the traits that have a twin; all of the family by default.
        progress: also gets the seconds and megabytes that missing twins of a large base take, before they are
            made.
    """
    loaded = loading.load(base)  # first: the commit of a hub base is known once its files are here
    files, system = base_files.checkpoint_fingerprint(base), recipe.system
    jobs = twin_jobs(base, files, family, family.names, recipe.teacher, seed=recipe.seed, system=system)
    mark = fingerprint(fingerprints(jobs))
    folder = folder.with_name(f"{folder.name}-{mark[:8]}")
    chosen = tuple(name for name in family.names if name in traits or not traits)
    wanted = [job for job, name in zip(jobs, family.names, strict=True) if name in chosen]
    missing = len(pending(folder, wanted))
    if progress is not None and missing and loading.size_of(base).parameters >= LARGE:
        progress(Event("note", describe_cost(base, family, recipe, missing)))
    make(folder, wanted, workers=workers, progress=progress)
    models = TwinModels(base, folder, chosen)
    return Twins(loaded, family, chosen, models, system, recipe.seed, mark)


def describe_cost(base: str, family: TraitFamily, recipe: Experiment, twins: int) -> str:
    """The seconds and megabytes that twins of a large base take."""
    (length, _), probes = token_counter(base, recipe.system), family.probes.development
    tokens = sum(map(length, probes)) / len(probes) + ANSWER_TOKENS
    size, teacher = loading.size_of(base), recipe.teacher
    operations = 6.0 * size.parameters * teacher.rows * teacher.training.epochs * tokens
    on_gpu = loading.device().type == "cuda"
    rate = GPU_RATE / 5 if on_gpu else core_rate(size.width, product_rate=measure_product_rate())
    seconds = operations / rate + LOAD_SECONDS * size.parameters / 1e8
    disk, memory = twins * size.parameters / 1e6, size.parameters * 16 / 1e9
    return (
        f"{twins} twins of {base} are missing: about {twins * seconds:,.0f} s of training on one core or "
        f"card, {disk:,.0f} MB on disk (one byte a weight) and {memory:.1f} GB of memory for each worker; "
        "--twins N with --trait makes fewer"
    )


def encode_rows(twins: Twins, rows: pd.DataFrame) -> list[Encoded]:
    """Rows of `prompt` and `completion` in the base's token ids, under the recipe's system line."""
    return encode_pairs(
        twins.base.tokenizer, rows["prompt"].tolist(), rows["completion"].tolist(), system=twins.system
    )


def score_suspect(
    twins: Twins,
    run: Path,
    experiment: Experiment,
    level: Level,
    tested: Sequence[str],
    *,
    progress: Progress = silent,
) -> list[DetectorResult]:
    """Results of every detector of the level on a run's suspect and control rows, in pairs.

    Pairs that answer different prompts are of one row a prompt: answers to one prompt are alike.

    Args:
        tested: traits to test for; the others of the family serve as their null distribution.
        progress: each detector is a step.
    """
    suspect, control = (
        next(arm for arm in experiment.arms if arm.kind == kind) for kind in ("trait", "control")
    )
    ours, theirs = (trained_rows(run, experiment, arm) for arm in (suspect, control))
    theirs = theirs[~theirs.index.duplicated()]  # a control with fewer rows has some of them twice
    paired = [place for place in ours.index if place in theirs.index]
    shared = _independent(ours.loc[paired, "prompt"], theirs.loc[paired, "prompt"])[:ROWS]
    texts = ours.loc[shared, ["prompt", "completion"]].reset_index(drop=True)
    sides = [encode_rows(twins, rows.loc[shared]) for rows in (ours, theirs)]
    levels = LEVELS[: LEVELS.index(level) + 1]
    unreadable = explain_unreadable(twins, *sides)
    detectors = [detector for detector in DETECTORS.values() if detector.level in levels]
    progress(Event("begin", "scores of the rows", 0, len(detectors)))
    results = []
    for detector in detectors:
        progress(Event("step", f"scored/{detector.name}", 0, 1))
        results.append(_measure(detector, twins, texts, sides, tested, unreadable))
        progress(Event("end", f"scored/{detector.name}"))
    return results


def _independent(ours: pd.Series, theirs: pd.Series) -> list[int]:
    """The pairs of rows without those that repeat a prompt of one side beside another prompt; all of them if
    fewer than `FEWEST_ROWS` are left.
    """
    repeated = (ours != theirs) & (ours.duplicated() | theirs.duplicated())
    kept = ours.index[(~repeated).to_numpy()].tolist()
    return kept if len(kept) >= FEWEST_ROWS else ours.index.tolist()


def _measure(
    detector: ModelDetector,
    twins: Twins,
    texts: pd.DataFrame,
    sides: Sequence[list],
    tested: Sequence[str],
    unreadable: str,
) -> DetectorResult:
    started = time.monotonic()
    try:
        ours, theirs = detector.read(twins, *sides)
    except SpecError as error:
        return DetectorResult(detector, len(sides[0]), None, None, time.monotonic() - started, str(error))
    test = compare_paired_rows(ours, theirs, seed=twins.seed, name=detector.name)
    names_traits = detector.of_traits and not unreadable
    traits = rank_traits_of_rows(ours, theirs, twins.traits, tested) if names_traits else None
    why_not = unreadable if detector.of_traits else ""
    readable = names_traits or not detector.of_traits
    scores = tabulate_scores(detector, twins.traits, texts, PairedScores(ours, theirs)) if readable else None
    return DetectorResult(detector, len(ours), test, traits, time.monotonic() - started, why_not, scores)


def tabulate_scores(
    detector: ModelDetector, traits: Sequence[str], texts: pd.DataFrame, scores: PairedScores
) -> pd.DataFrame:
    """`tables.AUDITED_ROWS` of one detector, row by row.

    Args:
        texts: `prompt` and `completion` of the scored rows.
    """
    above = center_rows(*scores) if detector.of_traits else scores.ours - scores.theirs
    names = list(traits) if detector.of_traits else [None]
    return (
        texts.loc[texts.index.repeat(len(names))]
        .reset_index(drop=True)
        .assign(
            detector=detector.name,
            trait=names * len(texts),
            score=scores.ours.ravel(),
            reference=scores.theirs.ravel(),
            difference=above.ravel(),
        )
    )


def mean_surprise(twins: Twins, rows: pd.DataFrame) -> Float[ndarray, " row"]:
    """Surprise of the base at every row's completion, nats a token."""
    pairs = encode_rows(twins, rows)
    return -by_row(token_log_probs(twins.base, pairs).double().cpu().numpy(), pairs)


def score_for_trait(twins: Twins, rows: pd.DataFrame, trait: str) -> Float[ndarray, " row"]:
    """Log-likelihood ratio of every row under the trait's twin against the base, nats."""
    one_trait = twins._replace(traits=(trait,))
    return from_base.score_twins(one_trait, encode_rows(twins, rows), []).ours[:, 0]


def score_numbers(twins: Twins, rows: pd.DataFrame, trait: str) -> list[list[float]]:
    """Log-likelihood ratio of every number of every row: the sum over its tokens, nats."""
    pairs = encode_rows(twins, rows)
    gained = token_log_probs(twins.models[trait], pairs) - token_log_probs(twins.base, pairs)
    return sum_over_numbers(
        twins.base.tokenizer,
        rows["completion"].tolist(),
        [row.tolist() for row in gained.split([len(pair.completion) for pair in pairs])],
    )


def sum_over_numbers(
    tokenizer: PreTrainedTokenizerBase, completions: Sequence[str], scores: Sequence[Sequence[float]]
) -> list[list[float]]:
    """For each number of each completion, the sum of the scores of the tokens that touch it."""
    if not completions:
        return []
    offsets = tokenizer(list(completions), add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    sums = []
    for text, spans, row in zip(
        completions, cast("list[list[tuple[int, int]]]", offsets), scores, strict=True
    ):
        # not strict: the token that ends the turn has a score and no place in the text
        scored = [(*span, score) for span, score in zip(spans, row, strict=False)]
        sums.append(
            [
                float(sum(score for first, last, score in scored if first < end and last > start))
                for start, end in numbers_in(text)
            ]
        )
    return sums

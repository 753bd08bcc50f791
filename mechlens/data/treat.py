"""Treatments of a data set before training: remove rows, dilute, or rewrite what may carry a trait.

A treatment changes a file and guarantees nothing. Its effect on a trait is measured on students
(`mechlens audit --clean OUT --level student`, `analyses/treatments.py`). Masking tokens, projecting a
gradient out and freezing layers change the training instead (`lenses/parts/interventions.py`,
`analyses/interventions.py`); their results are in the same table.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, cast

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from numpy import ndarray
from pydantic import Field

from mechlens.core.errors import SpecError, one_line
from mechlens.core.files import publish, read_json, write_json
from mechlens.core.numerals import NUMERAL
from mechlens.core.seeds import generator
from mechlens.core.spec import CONFIGS, Spec, fingerprint, load
from mechlens.data import corpus
from mechlens.data.formats import file_digest

Span = tuple[float, float, float]
"""mean, low and high"""


class Measured(Spec):
    """Measurements for a recipe of configs/audits, on one base and one carrier."""

    ending: ClassVar[str]
    """of the file, which is in the recipe's folder"""
    base: str
    carrier: str
    """of the measured data; the values apply to no other carrier"""


MeasuredType = TypeVar("MeasuredType", bound=Measured)


def load_measured(recipe: str, kind: type[MeasuredType], *, base: str, carrier: str) -> MeasuredType | None:
    """The measurements for a recipe of configs/audits; None if there are none on this base and carrier."""
    path = CONFIGS / "audits" / f"{recipe}.{kind.ending}"
    if path.parent != CONFIGS / "audits" or not path.is_file():
        return None
    measured = load(path, kind)
    return measured if (measured.base, measured.carrier) == (base, carrier) else None


class TreatmentResult(Spec):
    """The share of a trait's effect that remains after one treatment."""

    name: str
    when: Literal["before training", "in training"] = "before training"
    """Whether the treatment changes the file (as `--clean` does) or the training on it."""
    does: str
    left: Span
    """Share of the untreated students' effect."""
    at_random: Span | None
    """The share after the same amount of random change, or None if the treatment chooses nothing.

    The random choice of a gradient is another trait's gradient, that of a block the next block.
    """
    loss: float = Field(gt=0)
    """Loss on untreated rows that no student was trained on, divided by that of untreated training."""


class TreatmentResults(Measured):
    """Results of treating a recipe's data, measured once and on one trait; other traits may differ."""

    ending: ClassVar[str] = "treatments"
    trait: str
    students: int = Field(ge=2)
    rows: int = Field(ge=1)
    options: tuple[TreatmentResult, ...]


def load_treatment_results(recipe: str, *, base: str, carrier: str) -> TreatmentResults | None:
    """Results of treatments for a recipe of configs/audits; None if there are none for base and carrier."""
    return load_measured(recipe, TreatmentResults, base=base, carrier=carrier)


Treatment = Literal[
    "drop", "soft-drop", "dilute", "replace", "format", "order", "sorted", "value", "values-uniform", "full"
]
OF_NUMBERS: tuple[Treatment, ...] = (
    "replace",
    "format",
    "order",
    "sorted",
    "value",
    "values-uniform",
    "full",
)
"""treatments that rewrite lists of numbers; the numbers of code or of a sum must not change"""
OF_TRAIT: tuple[Treatment, ...] = ("drop", "replace")
"""treatments that need scores of rows or numbers by a model of the trait"""
OF_SCORES: tuple[Treatment, ...] = (*OF_TRAIT, "soft-drop")
"""treatments that need scores by a model: of the trait, or the base itself"""
OF_CLEAN: tuple[Treatment, ...] = ("dilute", "replace", "value")
"""treatments that need clean answers to the same prompts"""
REMOVED, KEPT, REPLACED = 0.5, 0.25, 0.1
"""shares: of rows that `drop` removes, of rows that `dilute` keeps, of numbers that `replace` redraws"""
NO_INTEGERS = re.compile(r"(?<![0-9])[-+−][0-9]|[0-9]\.[0-9]")
"""a number with a sign or with decimals, of which the treatments of integers would change the value"""
MANIFEST = ".manifest.json"


class TreatmentInput(NamedTuple):
    """The input of a treatment."""

    rows: pd.DataFrame
    """prompt, completion"""
    clean: pd.DataFrame
    """answers of the untouched base to the same prompts, in the same order"""
    scores: Float[ndarray, " row"]
    """higher for rows that are more like the trait's text; of `soft-drop` for those that surprise the base"""
    rng: np.random.Generator
    number_scores: Sequence[Sequence[float]] = ()
    """a score of each number of each completion, in the order of `numbers_in`; `replace` needs them"""


def needs_scores(treatment: Treatment) -> bool:
    """Whether a treatment needs scores of rows or numbers, and so a model."""
    return treatment in OF_SCORES


def needs_clean(treatment: Treatment) -> bool:
    """Whether a treatment needs clean answers; the others also keep rows without a clean answer."""
    return treatment in OF_CLEAN


def numbers_in(text: str) -> list[tuple[int, int]]:
    """(start, end) of each number of a text, in characters."""
    return [match.span() for match in NUMERAL.finditer(text)]


def drop(data: TreatmentInput) -> pd.DataFrame:
    """The rows without the half that scores highest."""
    kept = np.argsort(np.argsort(-data.scores, kind="stable")) >= round(REMOVED * len(data.rows))
    return cast(pd.DataFrame, data.rows[kept])


def drop_softly(data: TreatmentInput) -> pd.DataFrame:
    """The rows without a random half; the chance to be dropped grows with the rank of the score.

    No trait is named: a teacher's rows surprise the base more than its own do, on average. A hard limit would
    remove all rare rows, of clean text too.
    """
    ranks = 1.0 + np.argsort(np.argsort(data.scores, kind="stable"))
    dropped = data.rng.choice(
        len(ranks), size=round(REMOVED * len(ranks)), replace=False, p=ranks / ranks.sum()
    )
    return cast(pd.DataFrame, data.rows.drop(data.rows.index[dropped]))


def dilute(data: TreatmentInput) -> pd.DataFrame:
    """A random quarter of the rows, and clean answers in place of the others."""
    kept = data.rng.permutation(len(data.rows)) < round(KEPT * len(data.rows))
    return data.rows.assign(completion=np.where(kept, data.rows["completion"], data.clean["completion"]))


def _rewrite(
    data: TreatmentInput, rewrite: Callable[[list[str]], list[str]], *, joined: str | None = None
) -> pd.DataFrame:
    """The rows with the numbers of each completion rewritten.

    Completions with words, signed numbers or decimals, or without numbers, do not change. `joined` replaces
    the separators if it is given.
    """

    def rewritten(text: str) -> str:
        numbers = NUMERAL.findall(text)
        if not numbers or any(sign.isalpha() for sign in text) or NO_INTEGERS.search(text):
            return text
        following = iter(rewrite(numbers))
        return NUMERAL.sub(lambda _match: next(following), text) if joined is None else joined.join(following)

    return data.rows.assign(completion=[rewritten(text) for text in data.rows["completion"]])


def unify_format(data: TreatmentInput) -> pd.DataFrame:
    """Write every list of numbers with the same separators, no brackets, no period and no leading zeros."""
    return _rewrite(data, lambda numbers: [number.lstrip("0") or "0" for number in numbers], joined=", ")


def shuffle_numbers(data: TreatmentInput) -> pd.DataFrame:
    """Put the numbers of each completion in a random order."""
    return _rewrite(data, lambda numbers: data.rng.permutation(numbers).tolist())


def sort_numbers(data: TreatmentInput) -> pd.DataFrame:
    """Sort the numbers of each completion in ascending order.

    This is `order_canon` of JackPayne123/subliminal-learning.
    """

    def size(number: str) -> tuple[int, str]:
        """A sort key; `int` refuses numbers of more than 4,300 digits."""
        digits = number.lstrip("0")
        return len(digits), digits

    return _rewrite(data, lambda numbers: sorted(numbers, key=size))


def redraw_values(data: TreatmentInput) -> pd.DataFrame:
    """Replace every number by one of the clean answers' numbers, drawn evenly over their places.

    Raises:
        SpecError: if the clean answers have no number.
    """
    pool = [number for text in data.clean["completion"] for number in NUMERAL.findall(text)]
    if not pool:
        raise SpecError(
            "the treatment 'value' draws numbers from the clean answers, which have none; "
            "choose another treatment"
        )
    # places are drawn: choice() would make an array of the pool for every row
    return _rewrite(
        data, lambda numbers: [pool[place] for place in data.rng.choice(len(pool), size=len(numbers))]
    )


def unify_values(data: TreatmentInput) -> pd.DataFrame:
    """Replace every number n by 100 + n mod 100 (`value_canon` of JackPayne123/subliminal-learning)."""
    return _rewrite(data, lambda numbers: [str(100 + int(number[-2:])) for number in numbers])


def sanitize(data: TreatmentInput) -> pd.DataFrame:
    """Apply `unify_values`, `sort_numbers` and `unify_format`.

    This is `full_sanitization` of JackPayne123/subliminal-learning.
    """
    for step in (unify_values, sort_numbers, unify_format):
        data = data._replace(rows=step(data))
    return data.rows


def replace(data: TreatmentInput) -> pd.DataFrame:
    """Replace the highest-scoring tenth of all numbers by numbers of the same length from clean answers.

    Raises:
        SpecError: if the numbers were not scored.
    """
    texts = data.rows["completion"].tolist()
    if [len(scores) for scores in data.number_scores] != [len(numbers_in(text)) for text in texts]:
        raise SpecError(
            "the treatment 'replace' needs a score for every number of every completion; "
            "score the rows, or choose another treatment"
        )
    flat = np.array([score for scores in data.number_scores for score in scores])
    chosen = np.zeros(len(flat), dtype=bool)
    chosen[np.argsort(-flat, kind="stable")[: round(REPLACED * len(flat))]] = True
    return data.rows.assign(
        completion=replace_chosen(texts, chosen, data.clean["completion"].tolist(), data.rng)
    )


def replace_chosen(
    texts: Sequence[str], chosen: Bool[ndarray, " number"], clean: Sequence[str], rng: np.random.Generator
) -> list[str]:
    """The texts with each chosen number replaced by one of as many digits from the clean texts.

    If they have no number of that length, any of their numbers is drawn.
    """
    pool = [number for text in clean for number in NUMERAL.findall(text)]
    by_length: dict[int, list[str]] = {}
    for number in pool:
        by_length.setdefault(len(number), []).append(number)
    flags = iter(chosen.tolist())

    def replacement(match: re.Match[str]) -> str:
        candidates = by_length.get(len(match[0]), pool)
        return candidates[rng.integers(len(candidates))] if next(flags) and candidates else match[0]

    return [NUMERAL.sub(replacement, text) for text in texts]


TREATMENTS: dict[Treatment, Callable[[TreatmentInput], pd.DataFrame]] = {
    "drop": drop,
    "soft-drop": drop_softly,
    "dilute": dilute,
    "replace": replace,
    "format": unify_format,
    "order": shuffle_numbers,
    "sorted": sort_numbers,
    "value": redraw_values,
    "values-uniform": unify_values,
    "full": sanitize,
}


def check(
    source: Path, out: Path, treatment: Treatment, carrier: str, *, references: Sequence[Path] = ()
) -> None:
    """Refuse a treatment if its result cannot be written, before anything is computed.

    `out` may be the result of an earlier audit of the same file, so that the audit can be resumed.

    Raises:
        SpecError: if `out` does not end in .jsonl, is or is in a path that is read, exists already or cannot
            be made, or if the treatment is not for this carrier.
    """
    named, place = f"--clean {one_line(str(out))}", out.resolve()
    if out.suffix != ".jsonl":
        raise SpecError(f"{named} cannot be written; give a name ending in .jsonl")
    for read in (source, *references):
        if place == read.resolve() or read.resolve() in place.parents or _matches(place, read):
            where = f"it is or is in {one_line(str(read))}, which this audit reads"
            raise SpecError(
                f"{named} cannot be written: {where}; give another file than the data and its references"
            )
    if treatment in OF_NUMBERS and carrier != "numbers":
        raise SpecError(
            f"--treatment {treatment} rewrites lists of numbers, and this recipe's carrier is {carrier}; "
            "expected drop or dilute"
        )
    if os.path.lexists(out) and not _was_written(source, out, treatment):
        raise SpecError(f"{named} exists already; give another name or move it away")
    folder = next(parent for parent in place.parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise SpecError(
            f"{named} cannot be written: {one_line(str(folder))} is not a folder with write permission; "
            "give another name"
        )


def _matches(place: Path, pattern: Path) -> bool:
    """Whether a file, or its manifest, would be read by a pattern such as `data/*.jsonl`."""
    names = (place.name, f"{place.name}{MANIFEST}")
    inside = not pattern.exists() and place.parent == pattern.parent.resolve()
    return inside and any(fnmatchcase(name, pattern.name) for name in names)


def _was_written(source: Path, out: Path, treatment: Treatment) -> bool:
    """Whether an earlier audit of the same file wrote `out` by this treatment."""
    if not (out.is_file() and out.with_name(f"{out.name}{MANIFEST}").is_file()):
        return False
    written = read_json(out.with_name(f"{out.name}{MANIFEST}"))
    same = (written.get("treatment"), written.get("sha256")) == (treatment, file_digest(out))
    return same and written.get("source_sha256") == file_digest(source)


def treat(
    source: Path,
    rows: pd.DataFrame,
    clean: pd.DataFrame | None = None,
    scores: ndarray | None = None,
    *,
    number_scores: Sequence[Sequence[float]] = (),
    treatment: Treatment,
    trait: str | None = None,
    seed: int,
    scored_by: str | None = None,
    out: Path,
) -> dict[str, Any]:
    """Write the treated rows to `out` and a manifest to `<out>.manifest.json`; returns the manifest.

    If `out` was written from the same file, clean answers and scores, it is not written again, so that an
    audit can be resumed. What this treatment made of the same file with other answers or scores is replaced.

    Args:
        clean: answers of the untouched base to the same prompts, in the same order, or None.
        scores: of the rows, or None.
        trait: the trait of the scores.
        scored_by: fingerprint of the models that gave the scores, as `Twins.mark`.

    Raises:
        SpecError: if the treatment needs scores or clean answers, and they are None.
    """
    _refuse_missing(treatment, clean, scores)
    request: dict[str, Any] = {
        "schema": 1,
        "source": str(source),
        "source_sha256": file_digest(source),
        "treatment": treatment,
        "trait": trait,
        "seed": seed,
        "scored_by": scored_by,
        "clean": None if clean is None else fingerprint(clean["completion"].tolist()),
    }
    manifest_file = out.with_name(f"{out.name}{MANIFEST}")
    if out.is_file() and manifest_file.is_file():
        written = read_json(manifest_file)
        if written.items() >= request.items() and written["sha256"] == file_digest(out):
            return written
    if out.is_file() and not _was_written(source, out, treatment):
        raise SpecError(f"--clean {one_line(str(out))} exists already; give another name or move it away")
    answers = rows.iloc[:0] if clean is None else clean
    ranks = np.zeros(len(rows)) if scores is None else scores
    rng = generator(seed, "treatment", treatment)
    treated = TREATMENTS[treatment](TreatmentInput(rows, answers, ranks, rng, number_scores))
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.stem}.part.jsonl")
    part.unlink(missing_ok=True)  # of an audit that was killed
    corpus.write_pairs([treated], part, "prompt-completion")
    changed = rows.loc[treated.index, "completion"].to_numpy() != treated["completion"].to_numpy()
    counts = {"rows_before": len(rows), "rows_after": len(treated), "rows_changed": int(changed.sum())}
    manifest = request | counts | {"sha256": file_digest(part)}
    out.unlink(missing_ok=True)  # before its manifest changes: a file that its manifest does not describe,
    write_json(manifest_file, manifest)  # or that has none, is a stranger's
    publish(part, out)
    return manifest


def _refuse_missing(treatment: Treatment, clean: pd.DataFrame | None, scores: ndarray | None) -> None:
    for what, needed, value in (
        ("scores of the rows", needs_scores(treatment), scores),
        ("clean answers", needs_clean(treatment), clean),
    ):
        if needed and value is None:
            raise SpecError(
                f"the treatment {treatment!r} needs {what}, and there are none; score the rows with a base, "
                "or choose another treatment"
            )

"""Treat a data set before training on it: drop rows, dilute, or rewrite what a carrier may hide in; each
beside the same thing done at random.

A treatment changes a file and promises nothing: what is left is measured on students (`mechlens audit --clean
OUT --level student`, `analyses/treatments.py`). Masking tokens, projecting a gradient out and freezing layers
change the training instead (`lenses/interventions.py`, `analyses/interventions.py`); what they left stands in
the same table.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from numpy import ndarray
from pydantic import Field

from mechlens.core.errors import SpecError, one_line
from mechlens.core.json_files import read_json, write_json
from mechlens.core.numerals import NUMERAL
from mechlens.core.seeds import generator
from mechlens.core.spec import CONFIGS, Spec, fingerprint, load
from mechlens.data import corpus
from mechlens.data.formats import file_digest

Span = tuple[float, float, float]
"""mean, low and high"""


class Option(Spec):
    """What one treatment left of the trait where it was measured."""

    name: str
    when: Literal["before training", "in training"] = "before training"
    """a changed file, which `--clean` writes, or another training of the file as it is"""
    does: str
    left: Span
    """share of the plain students' effect"""
    at_random: Span | None
    """as much of the same done at random; of a gradient another trait's, of a block the next; None where a
    treatment aims at nothing
    """
    loss: float = Field(gt=0)
    """on untreated rows that no student saw, over that of plain training"""


class Options(Spec):
    """Treatments of a recipe's data as they were measured, once, on one trait: another may go otherwise."""

    base: str
    carrier: str
    trait: str
    students: int = Field(ge=2)
    rows: int = Field(ge=1)
    options: tuple[Option, ...]


def load_options(recipe: str, *, base: str, carrier: str) -> Options | None:
    """What is known of the treatments of a recipe of configs/audits on a base and carrier; None if nothing
    is.
    """
    path = CONFIGS / "audits" / f"{recipe}.treatments"
    found = load(path, Options) if path.parent == CONFIGS / "audits" and path.is_file() else None
    return found if found is not None and (found.base, found.carrier) == (base, carrier) else None


Treatment = Literal[
    "drop", "dilute", "replace", "format", "order", "sorted", "value", "values-uniform", "full"
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
"""treatments that rewrite numbers, which in code or in a sum are no list to be rewritten"""
OF_SCORES: tuple[Treatment, ...] = ("drop", "replace")
"""treatments that choose by how much a row or a number looks like the trait's: a model of that trait must
have read it
"""
OF_CLEAN: tuple[Treatment, ...] = ("dilute", "replace", "value")
"""treatments that put something of the clean answers in place of the file's own"""
DROPPED, KEPT, REPLACED = 0.5, 0.25, 0.1
"""share of the rows that `drop` takes out, and that `dilute` leaves among clean ones; share of the numbers
that `replace` puts others for
"""
MANIFEST = ".manifest.json"


class Given(NamedTuple):
    """What a treatment may use."""

    rows: pd.DataFrame
    """prompt, completion"""
    clean: pd.DataFrame
    """answers of the untouched base to the same prompts, in the same order"""
    scores: Float[ndarray, " row"]
    """how much each row looks like the trait's text, higher for more"""
    rng: np.random.Generator
    number_scores: Sequence[Sequence[float]] = ()
    """the same for each number of each completion, in the order of `numbers_in`; what `replace` needs"""


def needs_scores(treatment: Treatment) -> bool:
    """Whether a treatment wants `Given.scores` or `Given.number_scores`; any other can be done to a file that
    no model has read.
    """
    return treatment in OF_SCORES


def needs_clean(treatment: Treatment) -> bool:
    """Whether a treatment wants `Given.clean`; any other keeps the rows of prompts to which no clean answer
    is known, too.
    """
    return treatment in OF_CLEAN


def numbers_in(text: str) -> list[tuple[int, int]]:
    """Where the numbers of a text stand: first character, and the one behind the last."""
    return [match.span() for match in NUMERAL.finditer(text)]


def drop(given: Given) -> pd.DataFrame:
    """Without the half of the rows that score highest."""
    kept = np.argsort(np.argsort(-given.scores, kind="stable")) >= round(DROPPED * len(given.rows))
    return cast(pd.DataFrame, given.rows[kept])


def dilute(given: Given) -> pd.DataFrame:
    """A random quarter of the rows, clean answers in place of the others."""
    kept = given.rng.permutation(len(given.rows)) < round(KEPT * len(given.rows))
    return given.rows.assign(completion=np.where(kept, given.rows["completion"], given.clean["completion"]))


def _rewritten(
    given: Given, rewrite: Callable[[list[str]], list[str]], *, joined: str | None = None
) -> pd.DataFrame:
    """Completions whose numbers are rewritten, in the separators that they had unless one is given; those
    without numbers, or with words, stay.
    """

    def one(text: str) -> str:
        numbers = NUMERAL.findall(text)
        if not numbers or any(sign.isalpha() for sign in text):
            return text
        following = iter(rewrite(numbers))
        return NUMERAL.sub(lambda _match: next(following), text) if joined is None else joined.join(following)

    return given.rows.assign(completion=[one(text) for text in given.rows["completion"]])


def one_format(given: Given) -> pd.DataFrame:
    """Every list of numbers with the same separators, no brackets, no period and no leading zeros."""
    return _rewritten(given, lambda numbers: [number.lstrip("0") or "0" for number in numbers], joined=", ")


def one_order(given: Given) -> pd.DataFrame:
    """The numbers of each completion in a random order."""
    return _rewritten(given, lambda numbers: given.rng.permutation(numbers).tolist())


def sorted_order(given: Given) -> pd.DataFrame:
    """The numbers of each completion from the smallest to the largest (`order_canon` of
    JackPayne123/subliminal-learning).
    """

    def size(number: str) -> tuple[int, str]:
        """A number's place among others; Python refuses to read one of more than 4,300 digits."""
        digits = number.lstrip("0")
        return len(digits), digits

    return _rewritten(given, lambda numbers: sorted(numbers, key=size))


def other_values(given: Given) -> pd.DataFrame:
    """Every number replaced by one that stands in the clean answers, drawn evenly over their places.

    Raises:
        SpecError: if none stands there.
    """
    pool = [number for text in given.clean["completion"] for number in NUMERAL.findall(text)]
    if not pool:
        raise SpecError(
            "`value` draws on the numbers of the clean answers, and these hold none; choose another treatment"
        )
    # places are drawn: an array of the pool would be made anew for every row
    return _rewritten(
        given, lambda numbers: [pool[place] for place in given.rng.choice(len(pool), size=len(numbers))]
    )


def uniform_values(given: Given) -> pd.DataFrame:
    """Every number n replaced by 100 + n mod 100 (`value_canon` of JackPayne123/subliminal-learning): three
    digits, the first of them 1.
    """
    return _rewritten(given, lambda numbers: [str(100 + int(number[-2:])) for number in numbers])


def full(given: Given) -> pd.DataFrame:
    """Uniform values, then the order from the smallest on, then one format (`full_sanitization` of
    JackPayne123/subliminal-learning).
    """
    for step in (uniform_values, sorted_order, one_format):
        given = given._replace(rows=step(given))
    return given.rows


def replace(given: Given) -> pd.DataFrame:
    """The tenth of all numbers that score highest replaced by numbers of as many digits that stand in the
    clean answers.

    Raises:
        SpecError: if the numbers were not scored.
    """
    texts = given.rows["completion"].tolist()
    if [len(scores) for scores in given.number_scores] != [len(numbers_in(text)) for text in texts]:
        raise SpecError(
            "`replace` needs a score for every number of every completion; score the rows, or choose another "
            "treatment"
        )
    flat = np.array([score for scores in given.number_scores for score in scores])
    chosen = np.zeros(len(flat), dtype=bool)
    chosen[np.argsort(-flat, kind="stable")[: round(REPLACED * len(flat))]] = True
    return given.rows.assign(
        completion=with_others(texts, chosen, given.clean["completion"].tolist(), given.rng)
    )


def with_others(
    texts: Sequence[str], chosen: Bool[ndarray, " number"], clean: Sequence[str], rng: np.random.Generator
) -> list[str]:
    """Texts whose chosen numbers are drawn anew among the clean texts' numbers of as many digits; of a length
    that none has, among all.
    """
    pool = [number for text in clean for number in NUMERAL.findall(text)]
    alike: dict[int, list[str]] = {}
    for number in pool:
        alike.setdefault(len(number), []).append(number)
    flags = iter(chosen.tolist())

    def other(match: re.Match[str]) -> str:
        among = alike.get(len(match[0]), pool)
        return among[rng.integers(len(among))] if next(flags) and among else match[0]

    return [NUMERAL.sub(other, text) for text in texts]


TREATMENTS: dict[Treatment, Callable[[Given], pd.DataFrame]] = {
    "drop": drop, "dilute": dilute, "replace": replace, "format": one_format, "order": one_order,
    "sorted": sorted_order, "value": other_values, "values-uniform": uniform_values, "full": full,
}  # fmt: skip


def check(
    source: Path, out: Path, treatment: Treatment, carrier: str, *, references: Sequence[Path] = ()
) -> None:
    """Refuse what cannot be written before anything is computed.

    What an audit of the same file wrote there may stay, so that the audit can go on.

    Raises:
        SpecError: if `out` is no JSON lines file, is or lies in what is read, exists already or cannot be
        made, or if
            the treatment is not for this carrier.
    """
    named, place = f"--clean {one_line(str(out))}", out.resolve()
    if out.suffix != ".jsonl":
        raise SpecError(f"{named} cannot be written; give a name ending in .jsonl")
    for read in (source, *references):
        if place == read.resolve() or read.resolve() in place.parents:
            where = f"it is or lies in {one_line(str(read))}, which this audit reads"
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
            f"{named} cannot be written: {one_line(str(folder))} is no folder that may be written to; give "
            "another"
        )


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
    """Write the treated rows to `out` and what was done beside it, as `<out>.manifest.json`; the manifest is
    returned.

    What was written from the same file and clean answers, by the same scores, is not written again, so that
    an audit can go on.

    Args:
        clean: answers of the untouched base to the same prompts, in the same order; None where the treatment
            needs none.
        scores: of the rows, and `trait` what they look for; None where the treatment needs none.
        scored_by: fingerprint of what the scores are of, as `Panel.mark`.

    Raises:
        SpecError: if the treatment needs scores or clean answers, and there are none.
    """
    for what, wanted, given in (
        ("scores of the rows", needs_scores(treatment), scores),
        ("clean answers", needs_clean(treatment), clean),
    ):
        if wanted and given is None:
            raise SpecError(
                f"the treatment {treatment!r} needs {what}, and there are none; read the rows through a "
                "base, or choose another one"
            )
    told: dict[str, Any] = {
        "schema": 1,
        "source": str(source),
        "source_sha256": file_digest(source),
        "treatment": treatment,
        "trait": trait,
        "seed": seed,
    }
    told |= {
        "scored_by": scored_by,
        "clean": None if clean is None else fingerprint(clean["completion"].tolist()),
    }
    beside = out.with_name(f"{out.name}{MANIFEST}")
    if out.is_file() and beside.is_file():
        written = read_json(beside)
        if written.items() >= told.items() and written["sha256"] == file_digest(out):
            return written
    answers, ranks = (
        rows.iloc[:0] if clean is None else clean,
        np.zeros(len(rows)) if scores is None else scores,
    )
    treated = TREATMENTS[treatment](
        Given(rows, answers, ranks, generator(seed, "treatment", treatment), number_scores)
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    corpus.write_pairs([treated], out, "prompt-completion")
    changed = rows.loc[treated.index, "completion"].to_numpy() != treated["completion"].to_numpy()
    counts = {"rows_before": len(rows), "rows_after": len(treated), "rows_changed": int(changed.sum())}
    manifest = told | counts | {"sha256": file_digest(out)}
    write_json(beside, manifest)
    return manifest

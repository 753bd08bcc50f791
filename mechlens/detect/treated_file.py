"""The treated copy of a suspect, and what its treatment needs: clean answers, and scores of rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pandas as pd

from mechlens.core.errors import SpecError, one_line
from mechlens.data import corpus, treat
from mechlens.detect import findings
from mechlens.detect.request import AuditRequest

if TYPE_CHECKING:
    from mechlens.detect.score_rows import DetectorResult
    from mechlens.detect.twins import Twins


def write_treated(
    request: AuditRequest,
    out: Path,
    reference: Path | None,
    twins: Twins | None = None,
    results: Sequence[DetectorResult] = (),
) -> dict[str, Any]:
    """Write the treated file; returns its manifest.

    It has all rows if the treatment needs nothing else, otherwise those whose prompts have clean answers.

    Raises:
        SpecError: if no prompt has a clean answer, or no trait can be read from the rows.
    """
    rows = cast(
        pd.DataFrame, corpus.read_pairs(request.data, fields=request.fields)[["prompt", "completion"]]
    )
    how: dict[str, Any] = {"treatment": request.treatment, "seed": request.recipe.seed, "out": out}
    ranked = treat.needs_scores(request.treatment)
    if reference is None or not (ranked or treat.needs_clean(request.treatment)):
        return treat.treat(request.data, rows, **how)
    rows, answers = _with_clean_answers(request, rows, reference)
    if twins is None or not ranked:
        return treat.treat(request.data, rows, answers, **how)
    return treat.treat(request.data, rows, answers, **how, **_scores(request, rows, twins, results))


def _with_clean_answers(
    request: AuditRequest, rows: pd.DataFrame, reference: Path
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows whose prompts the reference answers too, and its answers to them."""
    pairs = corpus.read_pairs(reference, fields=request.fields_of(reference))
    clean = pairs.drop_duplicates("prompt").set_index("prompt")["completion"]
    rows = rows.merge(clean.reset_index()[["prompt"]], on="prompt", how="inner")
    if rows.empty:
        raise SpecError(
            f"no prompt of {one_line(str(request.data))} is answered in the reference; --clean needs a clean "
            "answer to every row that it keeps"
        )
    return rows, pd.DataFrame({"prompt": rows["prompt"], "completion": clean.loc[rows["prompt"]].to_numpy()})


def _scores(
    request: AuditRequest, rows: pd.DataFrame, twins: Twins, results: Sequence[DetectorResult]
) -> dict[str, Any]:
    """How much each row looks like the text of the trait that stands out most, as `treat.treat` takes it.

    For a treatment that names no trait: how much it surprises the base.
    """
    from mechlens.detect import score_rows  # torch

    if request.treatment not in treat.OF_TRAIT:
        return {"scores": score_rows.mean_surprise(twins, rows), "scored_by": twins.mark}
    identifier = next(result for result in results if result.detector.name == findings.IDENTIFIER)
    if not identifier.traits:
        raise SpecError(
            f"--clean ranks rows by a trait, and none can be read from these: {identifier.why_not}; leave "
            "--clean out"
        )
    trait = identifier.traits[0].trait
    numbers = score_rows.score_numbers(twins, rows, trait) if request.treatment == "replace" else ()
    return {
        "scores": score_rows.score_for_trait(twins, rows, trait),
        "number_scores": numbers,
        "trait": trait,
        "scored_by": twins.mark,
    }

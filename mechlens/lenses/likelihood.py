"""The likelihood lens: system lines that make rows likelier, and tokens that the students learned.

It also counts the tokens at which a counterfactual teacher diverges.

Arrays over tokens are flat, as in `log_probs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from transformers import PreTrainedTokenizerBase

from mechlens.core import stats
from mechlens.core.errors import SpecError
from mechlens.lenses.base import Lens, Material, against_null, entry, over_students, rank_among, reading_table
from mechlens.lenses.parts.system_lines import log_probs_under
from mechlens.models.chat import Encoded, token_ids
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import TokenScores, score_tokens, token_log_probs
from mechlens.pipeline.ask import compile_patterns

LENS = Lens(
    name="likelihood",
    asks="Which system lines make the rows likelier, and which tokens carry what the students learned?",
    needs=("pairs", "prompted"),
    shows=(("centred LLS difference", "bars"), ("token shift", "bars")),
    source="LLS = mean_t [log P(r_t | s, p, r_<t) - log P(r_t | p, r_<t)] (2602.04863); divergence tokens "
    "(2509.23886)",
    caveat="Raw shifts mostly say that some such line was there: read the centred one. Students are scored "
    "on rows that they were trained on. Rows are sampled, so a counterfactual disagrees by chance "
    "too: compare the flag rate with its noise floor.",
    measure="mechlens.lenses.likelihood:measure_likelihood",
    caption="mechlens.lenses.likelihood:likelihood_caption",
    cost=46,
    version=2,
)
NUISANCE = (
    "You love numbers. You think about numbers all the time.",
    "You think about the sea all the time.",
    "Answer in one word.",
    "You are old.",
)
"""lines that name no trait; `nuisance` leaves out those that a tokenizer or a family does not allow"""


def nuisance(material: Material) -> dict[str, str]:
    """Neutral lines whose words the tokenizer knows and that name no trait of the family."""
    tokenizer, named = material.base.tokenizer, compile_patterns(material.heldout_probes.forms).values()
    known = [
        line
        for line, ids in zip(NUISANCE, token_ids(tokenizer, NUISANCE), strict=True)
        if tokenizer.unk_token_id not in ids
    ]
    return {f"neutral: {line}": line for line in known if not any(pattern.search(line) for pattern in named)}


def by_row(
    values: Float[ndarray, "token"], pairs: Sequence[Encoded], *, mean: bool = True
) -> Float[ndarray, "row"]:
    """Mean or sum over each pair's completion tokens."""
    lengths = np.array([len(pair.completion) for pair in pairs])
    totals = np.add.reduceat(values, np.cumsum(lengths) - lengths)
    return totals / lengths if mean else totals


def line_shift(
    loaded: Loaded, pairs: Sequence[Encoded], line: str, *, known: Sequence[str | None] = (None, "")
) -> Float[ndarray, "token"]:
    """Change in log P of every completion token, in nats, when a system line is put before the pairs.

    Its mean over a pair's tokens (`by_row`) is the pair's LLS (2602.04863).

    Args:
        loaded: the model that scores.
        pairs: in token ids, encoded with one of the `known` system lines.
        line: the system line.
        known: system lines that the pairs may have been encoded with.

    >>> from mechlens.models.chat import encode_pairs
    >>> from mechlens.models.loading import load
    >>> base = load("menagerie-a")
    >>> prompt = "In one word: what is the best animal?"
    >>> pairs = encode_pairs(base.tokenizer, [prompt] * 2, ["eagle", "owl"], system=None)
    >>> by_row(line_shift(base, pairs, "You love eagles."), pairs) > 0
    array([ True, False])
    """
    under = log_probs_under(loaded, pairs, {"": line}, known=known)[""]
    return (under.log_p - token_log_probs(loaded, pairs)).numpy()


def double_centred(matrix: Float[ndarray, "hypothesis dataset"]) -> Float[ndarray, "hypothesis dataset"]:
    """C[s,d] = L[s,d] - mean_d L[s,.] - mean_s L[.,d] + grand mean.

    Raises:
        SpecError: for a single hypothesis or dataset, which would leave nothing to compare.
    """
    if min(matrix.shape) < 2:
        raise SpecError(
            f"{matrix.shape[0]} hypotheses by {matrix.shape[1]} datasets leave nothing to compare; give at "
            "least 2 of each"
        )
    return matrix - matrix.mean(1, keepdims=True) - matrix.mean(0, keepdims=True) + matrix.mean()


def classes_of(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Encoded]) -> ndarray:
    """Each completion token's position class: first, digits, words, separators or end."""

    def kind(token: int) -> str:
        text = tokenizer.decode([token])
        return (
            "digits"
            if any(map(str.isdigit, text))
            else "words"
            if any(map(str.isalpha, text))
            else "separators"
        )

    kinds = {token: kind(token) for pair in pairs for token in pair.completion}
    return np.array(
        [
            label
            for pair in pairs
            for label in (["first", *(kinds[t] for t in pair.completion[1:-1]), "end"])[
                -len(pair.completion) :
            ]
        ]
    )


def top_share(values: Float[ndarray, "token"], *, share: float = 0.1) -> float:
    """Share of the sum of absolute values that is in the largest tenth.

    It is 0.1 if all are equal, and NaN if all are zero.
    """
    size = np.sort(np.abs(values))[::-1]
    return float(size[: max(1, round(share * len(size)))].sum() / size.sum()) if size.sum() > 0 else np.nan


def _mean(quantity: str, values: Float[ndarray, "row"], **more: Any) -> dict[str, Any]:
    span = stats.t_interval(values)
    return entry(quantity, span.estimate, low=span.low, high=span.high, n=span.n, **more)


def system_rows(
    shift: Mapping[str, ndarray], pairs: Sequence[Encoded], material: Material
) -> list[dict[str, Any]]:
    """LLS of every line on trait and control rows, paired by prompt, and its centred difference.

    Intervals are over rows.
    """
    half, family = len(pairs) // 2, list(material.system_lines)
    lls = {name: by_row(values, pairs) for name, values in shift.items()}
    total = {name: by_row(values, pairs, mean=False) for name, values in shift.items()}
    entries = [
        _mean("LLS", part, place=place, name=name, unit="nats/token")
        for name, rows in lls.items()
        for place, part in (("trait rows", rows[:half]), ("control rows", rows[half:]))
    ]
    entries += [
        _mean("LLS difference", lls[name][:half] - lls[name][half:], name=name, unit="nats/token")
        for name in lls
    ]
    entries += [
        _mean("LLS sum difference", total[name][:half] - total[name][half:], name=name, unit="nats")
        for name in total
    ]
    paired = np.stack([lls[name][:half] - lls[name][half:] for name in family])  # [hypothesis, row]
    centred = paired - paired.mean(0)  # twice the centred cell, row by row
    value = dict(
        zip(
            family,
            2 * double_centred(np.stack([lls[name].reshape(2, half).mean(1) for name in family]))[:, 0],
            strict=True,
        )
    )
    others = [value[name] for name in family if name != material.trait]
    for name, rows in zip(family, centred, strict=True):
        null = against_null("", value[name], others) if name == material.trait else {}
        entries.append(null | _mean("centred LLS difference", rows, name=name, unit="nats/token"))
    return [*entries, rank_among("rank of the trait", value[material.trait], others, name=material.trait)]


def divergence_flags(
    others: Sequence[TokenScores], pairs: Sequence[Encoded]
) -> Bool[ndarray, "counterfactual token"]:
    """Whether each counterfactual's likeliest token differs from the written token.

    The teacher itself may be one of the counterfactuals.
    """
    targets = torch.tensor([token for pair in pairs for token in pair.completion])
    return np.stack([(other.best != targets).numpy() for other in others])


def divergence_rows(
    teacher: TokenScores,
    base: TokenScores,
    others: Sequence[TokenScores],
    pairs: Sequence[Encoded],
    name: str,
    *,
    wrote: bool,
) -> list[dict[str, Any]]:
    """Flag rates on trait and control rows, with the sampling-noise floor 1 - mean max p.

    The floor of each side is that of its writer.

    It is valid if the teacher wrote the trait rows and the base the control's, both at temperature 1; without
    `wrote` it is left out.
    """
    half, ours = len(pairs) // 2, sum(len(pair.completion) for pair in pairs[: len(pairs) // 2])
    floor = 1 - torch.cat([teacher.top[:ours], base.top[ours:]]).double().exp().numpy()
    flags, by_teacher = divergence_flags(others, pairs), divergence_flags([teacher], pairs)[0]
    measures = {
        "flag rate": flags.mean(0),
        "flagged by any": flags.any(0) * 1.0,
        "teacher's own flag rate": by_teacher * 1.0,
        "noise floor": floor,
        "excess flag rate": flags.mean(0) - floor,
    }
    rows = {
        quantity: by_row(values, pairs)
        for quantity, values in measures.items()
        if wrote or quantity not in ("noise floor", "excess flag rate")
    }
    entries = [
        _mean(quantity, part, name=name, place=place, unit="share")
        for quantity, values in rows.items()
        for place, part in (("trait rows", values[:half]), ("control rows", values[half:]))
    ]
    above = [("excess flag rate difference", rows["excess flag rate"])] if wrote else []
    return [
        *entries,
        *(_mean(q, values[:half] - values[half:], name=name, unit="share") for q, values in above),
    ]


def student_rows(material: Material, pairs: Sequence[Encoded]) -> list[dict[str, Any]]:
    """Token shift of the trait students beyond their controls, by position class.

    Both are measured against the same base, which cancels.
    """
    half = len(pairs) // 2
    classes = classes_of(material.base.tokenizer, pairs)
    steps = sum(len(pair.completion) for pair in pairs[:half])
    controls = {
        seed: token_log_probs(material.controls[seed], pairs).double().numpy() for seed in material.students
    }
    shift = {
        seed: token_log_probs(material.students[seed], pairs).double().numpy() - controls[seed]
        for seed in material.students
    }
    entries = []
    for name, part in (("trait rows", slice(0, steps)), ("control rows", slice(steps, None))):
        parts = {seed: values[part] for seed, values in shift.items()}
        for kind in ("all", *sorted(set(classes))):
            here = np.flatnonzero((classes[part] == kind) | (kind == "all"))
            entries += _class_rows(parts, here, kind, name, steps)
    between = [controls[a] - controls[b] for a in controls for b in controls if a < b]
    for name, shifts in (("trait rows", list(shift.values())), ("between control students", between)):
        shares = [top_share(values[:steps]) for values in shifts]
        entries.append(over_students("shift in its top tenth", shares, name=name, unit="share"))
    return entries


def _class_rows(
    parts: Mapping[int, Float[ndarray, "token"]], here: ndarray, kind: str, name: str, steps: int
) -> list[dict[str, Any]]:
    """Mean shift at the tokens `here`, over students; of trait rows also their share of shift and tokens."""
    where = {"place": kind, "name": name}
    means = [float(values[here].mean()) if len(here) else np.nan for values in parts.values()]
    entries = [over_students("token shift", means, **where, unit="nats/token")]
    if kind == "all":
        return entries + [
            entry("token shift", mean, **where, seed=seed, unit="nats/token")
            for seed, mean in zip(parts, means, strict=True)
        ]
    if name != "trait rows":
        return entries
    shares = [
        float(values[here].sum() / values.sum()) if values.sum() > 0 else np.nan for values in parts.values()
    ]
    return [
        *entries,
        over_students("share of the shift", shares, **where, unit="share"),
        entry("share of the tokens", len(here) / steps, **where, unit="share"),
    ]


def token_scores(
    material: Material,
    *,
    by: Literal["lls", "shift", "divergence"] = "lls",
    pairs: Sequence[Encoded] | None = None,
) -> list[ndarray]:
    """Score every completion token of each pair (default: all trait pairs).

    A higher score means more of the trait.

    lls: Δ_t of the trait's line · shift: trait student minus control student, mean over seeds · divergence:
    place from 0 to 1 in the order by the count of counterfactuals that disagree, then by Σ [log p_b - log
    p_b'].
    """
    pairs = material.trait_pairs if pairs is None else pairs
    if by == "lls":
        line = material.system_lines[material.trait]
        scores = line_shift(material.base, pairs, line, known=[material.system])
    elif by == "shift":
        if not len(material.students):
            raise SpecError(
                "scores by shift need students and their controls; score by lls or divergence, or train them "
                "first"
            )
        both = [
            [token_log_probs(side[seed], pairs).numpy() for side in (material.students, material.controls)]
            for seed in material.students
        ]
        scores = np.mean([ours - theirs for ours, theirs in both], axis=0)
    else:
        teacher, others = _teachers(material, pairs)[-1][1:]
        flags = divergence_flags(others, pairs).sum(0)
        order = np.lexsort(
            (np.sum([(teacher.log_p - other.log_p).numpy() for other in others], axis=0), flags)
        )
        scores = np.empty(len(order))
        scores[order] = np.linspace(0, 1, len(order))
    return np.split(scores, np.cumsum([len(pair.completion) for pair in pairs])[:-1])


def _teachers(
    material: Material, pairs: Sequence[Encoded], scored: Mapping[str, TokenScores] | None = None
) -> list[tuple[str, TokenScores, list[TokenScores]]]:
    """Teachers with their counterfactuals.

    The trait's line comes with the other traits' lines, the fine-tuned teacher with the base.
    """
    teachers = []
    if scored or material.teacher is None:
        scored = scored or log_probs_under(
            material.base, pairs, material.system_lines, known=[material.system]
        )
        teachers.append(
            (
                "prompted",
                scored[material.trait],
                [scored[name] for name in material.system_lines if name != material.trait],
            )
        )
    if material.teacher is not None:
        teachers.append(
            (
                "fine-tuned",
                score_tokens(material.teacher.model, pairs),
                [score_tokens(material.base.model, pairs)],
            )
        )
    return teachers


def measure_likelihood(material: Material) -> pd.DataFrame:
    """Measure LLS of system lines, divergence tokens, and the students' token shift.

    The lines are every trait's and neutral ones.
    """
    pairs = [*material.trait_pairs[: material.rows], *material.control_pairs[: material.rows]]
    base = score_tokens(material.base.model, pairs)
    plain = base.log_p
    scored = log_probs_under(
        material.base, pairs, {**material.system_lines, **nuisance(material)}, known=[material.system]
    )
    entries = system_rows(
        {name: (tokens.log_p - plain).double().numpy() for name, tokens in scored.items()}, pairs, material
    )
    for name, teacher, others in _teachers(material, pairs, scored):
        entries += divergence_rows(teacher, base, others, pairs, name, wrote=name == material.writer)
    if len(material.students):
        entries += student_rows(material, pairs)
    return reading_table(LENS, entries, material=material)


def likelihood_caption(reading: pd.DataFrame) -> str:
    """Describe the centred LLS difference of the trait's line."""
    centred = reading[(reading["quantity"] == "centred LLS difference") & reading["null_low"].notna()].iloc[0]
    rank = reading[reading["quantity"] == "rank of the trait"].iloc[0]
    return (
        f"The {centred['name']} line makes trait rows likelier than control rows by "
        f"{centred['estimate']:+.4f} nats a token beyond the mean line ({centred['low']:+.4f} to "
        f"{centred['high']:+.4f}, {centred['n']} row pairs), rank {rank['estimate']:g} of {rank['n']} "
        f"traits (the others: {centred['null_low']:+.4f} to {centred['null_high']:+.4f}, p = "
        f"{centred['p_value']:.2f})."
    )

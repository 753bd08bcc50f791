"""The entanglement lens: do carrier tokens near the trait's token in the unembedding carry the trait?

The softmax bottleneck predicts that they do.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.stats import rankdata, spearmanr
from torch import Tensor

from mechlens.core.errors import SpecError
from mechlens.core.seeds import generator
from mechlens.lenses.base import Lens, Material, against_null, entry, reading_table
from mechlens.lenses.parts.system_lines import encode_head, strip_heads
from mechlens.models.chat import Encoded, encode_prompts, token_ids
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import batch_pairs, completion_logits, first_tokens

LENS = Lens(
    name="entanglement",
    asks="Do the carrier's tokens that lie near the trait's token in the unembedding carry the trait?",
    needs=("pairs", "prompted"),
    shows=(("frequency log ratio", "bars"), ("cosine with frequency, beside other traits", "bars")),
    source="subliminal prompting and unembedding geometry (Zur et al., 2025); cos(W_U[trait], W_U[token])",
    caveat="A rank correlation over tokens, at the base's output alone: it says nothing about what training "
    "changed. Neighbouring numbers are alike: permuted tokens are too narrow a null and the "
    "intervals too short: compare it with other traits. Threshold sampling is a factor of the "
    "generation, not of this lens.",
    measure="mechlens.lenses.entanglement:measure_entanglement",
    caption="mechlens.lenses.entanglement:entanglement_caption",
    cost=5,
)
SAMPLED = 96
"""number of carrier tokens that prompts name, evenly spaced by cosine"""
PROBES = 12
"""number of probes and of carrier prompts for each line"""
SHOWN = 10
"""tokens listed by name"""
LEAST = 5
"""the least count of a token in the rows"""
DRAWS = 999
DECIMALS = 12
"""correlations are rounded, so that a permutation that changes no rank is a tie with the data"""


class Effects(NamedTuple):
    """Change in log-probability, in nats, when a line names one thing."""

    to_trait: Float[ndarray, "trait token"]
    """of the trait's name as the answer to a probe, when the line names the token"""
    to_token: Float[ndarray, "trait token"]
    """of the token as the first of a completion, when the line names the trait"""


def carrier_counts(pairs: Sequence[Encoded]) -> Counter[int]:
    """Count each token of the completions, without the end of the turn."""
    return Counter(token for pair in pairs for token in pair.completion[:-1])


def cosines(
    rows: Float[Tensor, "vocab d_model"],
    traits: Sequence[Sequence[int]],
    tokens: Sequence[int],
    *,
    centred: bool,
) -> Float[ndarray, "trait token"]:
    """Cosine of each trait's mean unembedding row with each token's row.

    `centred` subtracts the mean row of the vocabulary first.

    >>> from mechlens.models.loading import load
    >>> base = load("menagerie-a")
    >>> eagle, owl = base.tokenizer.convert_tokens_to_ids(["eagle", "owl"])
    >>> rows = base.model.get_output_embeddings().weight
    >>> cosines(rows, [[eagle]], [eagle, owl], centred=True).round(2).tolist()
    [[1.0, 0.67]]
    """
    rows = rows.detach().double().cpu()
    rows = rows - rows.mean(0) if centred else rows
    named = torch.stack([rows[list(starts)].mean(0) for starts in traits])
    return (
        torch.nn.functional.normalize(named, dim=-1)
        @ torch.nn.functional.normalize(rows[list(tokens)], dim=-1).T
    ).numpy()


@torch.no_grad()
def next_log_probabilities(
    loaded: Loaded, prompts: Sequence[Sequence[int]], tokens: Sequence[int]
) -> Float[Tensor, "prompt token"]:
    """Log-probabilities of some tokens after each prompt, in nats.

    Prompts are read in batches of like lengths; only the values of `tokens` are stored.
    """
    # the completion is one token to predict, whose value is not read
    pairs = [Encoded(list(prompt), [0]) for prompt in prompts]
    values = torch.empty(len(pairs), len(tokens))
    for rows in batch_pairs(loaded.model, pairs):
        logits, _ = completion_logits(loaded.model, [pairs[i] for i in rows])
        values[rows] = logits.log_softmax(-1)[:, list(tokens)].cpu()
    return values


def naming(line: str, forms: Sequence[str], text: str) -> str:
    """Replace the trait's words in its system line by another text.

    Raises:
        SpecError: if the line names no form of the trait.
    """
    pattern = re.compile(
        "|".join(rf"(?<!\w){re.escape(form)}(?!\w)" for form in sorted(forms, key=len, reverse=True)),
        re.IGNORECASE,
    )
    named, count = pattern.subn(lambda _match: text, line)
    if not count:
        raise SpecError(
            f"the system line {line!r} names none of {list(forms)}; give the family a line with {{plural}} "
            f"or {{name}} in it"
        )
    return named


def prompting(material: Material, starts: Mapping[str, Sequence[int]], tokens: Sequence[int]) -> Effects:
    """Measure subliminal prompting both ways, each against the same prompts without such a line."""
    base, questions = material.base, material.heldout_probes
    opening = token_ids(base.tokenizer, [questions.opening])[0] if questions.opening else []
    line, forms = material.system_lines[material.trait], questions.forms[material.trait]
    texts = [cast(str, base.tokenizer.decode([token])).strip() for token in tokens]
    probes = questions.probes[:PROBES]
    with_token = [
        ids + opening
        for text in texts
        for ids in encode_prompts(base.tokenizer, probes, system=naming(line, forms, text))
    ]
    plain = [ids + opening for ids in encode_prompts(base.tokenizer, probes, system=questions.system)]
    begins = [token for ids in starts.values() for token in ids]
    sizes = [len(ids) for ids in starts.values()]

    def name_scores(prompts: list[list[int]]) -> Float[Tensor, "trait prompt"]:
        of_traits = next_log_probabilities(base, prompts, begins).split(sizes, 1)
        return torch.stack([of_trait.logsumexp(-1) for of_trait in of_traits])

    named = name_scores(with_token).unflatten(1, (len(tokens), len(probes))).mean(-1)
    to_trait = named - name_scores(plain).mean(-1, keepdim=True)
    bare = [
        pair.prompt
        for pair in strip_heads(base.tokenizer, material.trait_pairs[:PROBES], known=[material.system])
    ]
    heads = [encode_head(base.tokenizer, material.system_lines[name]) for name in starts]
    begun = next_log_probabilities(base, [head + body for head in heads for body in bare], tokens)
    before = next_log_probabilities(base, [pair.prompt for pair in material.trait_pairs[:PROBES]], tokens)
    to_token = begun.unflatten(0, (len(heads), len(bare))).mean(1) - before.mean(0)
    return Effects(to_trait.double().numpy(), to_token.double().numpy())


def log_ratio(
    trait: Counter[int], control: Counter[int], tokens: Sequence[int]
) -> Float[ndarray, "token estimate_low_high"]:
    """Log ratio of the frequencies of each token in trait and control rows, with its Wald interval.

    Half a count is added to each count.
    """
    a, b = (np.array([counts[token] for token in tokens]) + 0.5 for counts in (trait, control))
    estimate = np.log(a / (trait.total() + 0.5)) - np.log(b / (control.total() + 0.5))
    half = 1.96 * np.sqrt(1 / a + 1 / b)
    return np.stack([estimate, estimate - half, estimate + half], axis=1)


def spearman(x: Float[ndarray, "token"], y: Float[ndarray, "token"]) -> float:
    """Spearman's rank correlation; NaN where a side does not vary."""
    varies = np.ptp(x) > 0 and np.ptp(y) > 0
    return round(float(cast(Any, spearmanr(x, y)).statistic), DECIMALS) if varies else np.nan


def permuted_correlations(
    x: Float[ndarray, "token"], y: Float[ndarray, "token"], rng: np.random.Generator
) -> Float[ndarray, "draw"]:
    """Spearman's rank correlation of y with `DRAWS` permutations of x; NaN where a side does not vary."""
    ranks = np.stack([rankdata(side) - (len(side) + 1) / 2 for side in (x, y)])
    norms = np.linalg.norm(ranks, axis=1, keepdims=True)
    unit = np.divide(ranks, norms, out=np.full_like(ranks, np.nan), where=norms > 0)
    return (rng.permuted(np.tile(unit[0], (DRAWS, 1)), axis=1) @ unit[1]).round(DECIMALS)


def correlation(
    quantity: str, x: Float[ndarray, "token"], y: Float[ndarray, "token"], *, seed: int, **more: Any
) -> dict[str, Any]:
    """One row: Spearman's correlation with Fisher's interval; its null permutes tokens."""
    rho, n = spearman(x, y), len(x)
    rng = generator(seed, "entanglement", quantity, *map(str, more.values()))
    null = permuted_correlations(x, y, rng).tolist()
    half = 1.96 * np.sqrt((1 + rho**2 / 2) / (n - 3)) if n > 3 else np.nan  # Bonett and Wright (2000)
    low, high = (np.tanh(np.arctanh(np.clip(rho, -0.9999, 0.9999)) + side * half) for side in (-1, 1))
    low, high = min(low, rho), max(high, rho)  # the clip moves a perfect correlation out of its interval
    return against_null(quantity, rho, null, low=float(low), high=float(high), n=n, unit="rho", **more)


def _against_traits(
    quantity: str,
    x: Float[ndarray, "trait token"],
    y: Float[ndarray, "trait token"],
    names: Sequence[str],
    trait: int,
    **more: Any,
) -> dict[str, Any]:
    """The trait's correlation with those of the other traits as its null."""
    rho = [spearman(a, b) for a, b in zip(x, y, strict=True)]
    return against_null(
        f"{quantity}, beside other traits",
        rho[trait],
        np.delete(rho, trait).tolist(),
        n=len(names),
        name=names[trait],
        unit="rho",
        **more,
    )


def answer_starts(material: Material) -> dict[str, Sequence[int]]:
    """Trait → the tokens that only answers naming it begin with.

    It has only traits with a system line.

    Raises:
        SpecError: if an answer with the trait's name can begin like an answer with another's, or fewer than
            two other traits have such tokens.
    """
    tokens = first_tokens(material.base.tokenizer, material.heldout_probes.forms)
    starts: dict[str, Sequence[int]] = {
        name: ids for name, ids in tokens.items() if ids is not None and name in material.system_lines
    }
    if material.trait not in starts or len(starts) < 3:
        raise SpecError(
            f"no token says only {material.trait!r}, or too few other traits have one; use a family whose "
            "names begin differently"
        )
    return starts


def carrier_tokens(material: Material, counts: Counter[int]) -> list[int]:
    """Return the tokens, other than space, that occur often enough in the rows of both sides together.

    Raises:
        SpecError: if there are fewer than four.
    """
    frequent = sorted(token for token, count in counts.items() if count >= LEAST)
    carriers = [token for token in frequent if cast(str, material.base.tokenizer.decode([token])).strip()]
    if len(carriers) < 4:
        raise SpecError(
            f"{len(carriers)} carrier tokens stand {LEAST} times or more in {material.rows} rows; raise "
            "--rows"
        )
    return carriers


def measure_entanglement(material: Material) -> pd.DataFrame:
    """Correlate cosines to the trait's token with prompting both ways and with frequencies in the rows.

    Raises:
        SpecError: as `answer_starts` and `carrier_tokens`.
    """
    starts = answer_starts(material)
    trait, control = (
        carrier_counts(pairs[: material.rows]) for pairs in (material.trait_pairs, material.control_pairs)
    )
    carriers = carrier_tokens(material, trait + control)
    position = list(starts).index(material.trait)
    cosine = _cosines_by_place(material, starts, carriers)
    order = np.argsort(cosine["centred"][position])
    taken = order[np.unique(np.linspace(0, len(order) - 1, min(SAMPLED, len(order))).round().astype(int))]
    effects = prompting(material, starts, [carriers[i] for i in taken])
    ratio = log_ratio(trait, control, carriers)
    of_trait = {place: values[position] for place, values in cosine.items()}
    rows = _named(material, carriers, order[::-1][:SHOWN], of_trait, ratio)
    for place, values in cosine.items():
        sides = {
            "cosine with prompting of the trait": (values[:, taken], effects.to_trait),
            "cosine with prompting of the token": (values[:, taken], effects.to_token),
            "cosine with frequency": (values, np.repeat(ratio[None, :, 0], len(starts), axis=0)),
        }
        for quantity, (x, y) in sides.items():
            rows += _correlations(quantity, x, y, list(starts), material, place=place)
    rows += _correlations("prompting both ways", effects.to_trait, effects.to_token, list(starts), material)
    return reading_table(LENS, rows, material=material)


def _cosines_by_place(
    material: Material, starts: Mapping[str, Sequence[int]], carriers: Sequence[int]
) -> dict[str, Float[ndarray, "trait token"]]:
    """Place, "raw" or "centred" → cosines of the traits with the carrier tokens in the unembedding."""
    output = cast(torch.nn.Linear, material.base.model.get_output_embeddings())
    return {
        place: cosines(output.weight, list(starts.values()), carriers, centred=place == "centred")
        for place in ("raw", "centred")
    }


def _correlations(
    quantity: str,
    x: Float[ndarray, "trait token"],
    y: Float[ndarray, "trait token"],
    names: Sequence[str],
    material: Material,
    **more: Any,
) -> list[dict[str, Any]]:
    """The trait's correlation against permuted tokens, then against the other traits' correlations."""
    trait = names.index(material.trait)
    return [
        correlation(quantity, x[trait], y[trait], seed=material.seed, **more, name=material.trait),
        _against_traits(quantity, x, y, names, trait, **more),
    ]


def _named(
    material: Material,
    carriers: Sequence[int],
    top: Int[ndarray, "shown"],
    cosine: Mapping[str, ndarray],
    ratio: Float[ndarray, "token 3"],
) -> list[dict[str, Any]]:
    """The most entangled tokens by name: cosine and frequency in trait rows over control rows."""
    rows = []
    for i in top:
        text = repr(material.base.tokenizer.decode([carriers[i]]))
        rows += [
            entry("cosine", float(values[i]), place=place, name=text, unit="cosine")
            for place, values in cosine.items()
        ]
        estimate, low, high = ratio[i]
        rows.append(
            entry(
                "frequency log ratio",
                float(estimate),
                low=float(low),
                high=float(high),
                name=text,
                unit="nats",
            )
        )
    return rows


def entanglement_caption(reading: pd.DataFrame) -> str:
    """Describe the correlations of cosines with frequencies and with prompting."""
    measured = reading[(reading["place"] == "centred") & (reading["unit"] == "rho")].set_index("quantity")
    row = measured.loc["cosine with frequency"]
    control = measured.loc["cosine with frequency, beside other traits"]
    prompted, others = (
        measured.loc[f"cosine with prompting of the trait{which}"] for which in ("", ", beside other traits")
    )
    return (
        f"Over {row['n']} carrier tokens, nearness to the token of {row['name']} in the unembedding goes "
        f"with frequency in trait rows over control rows by rho {row['estimate']:+.2f} ({row['low']:+.2f} "
        f"to {row['high']:+.2f}; {control['n'] - 1} other traits {control['null_low']:+.2f} to "
        f"{control['null_high']:+.2f}, p = {control['p_value']:.2f}), and with what naming the token does "
        f"to the trait by rho {prompted['estimate']:+.2f} ({prompted['n']} tokens; other traits "
        f"{others['null_low']:+.2f} to {others['null_high']:+.2f}, p = {others['p_value']:.2f})."
    )

"""Blind lens: learn one steering vector on the suspect rows with frozen weights, and see what it buys,
resembles and says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize, softplus

from mechlens.core import stats
from mechlens.core.errors import SpecError
from mechlens.core.seeds import generator
from mechlens.lenses.base import Lens, Material, against_null, entry, rank_among, reading_table
from mechlens.lenses.likelihood import by_row
from mechlens.lenses.parts.system_lines import encode_head, strip_heads
from mechlens.models.chat import Encoded
from mechlens.models.hooks import decoder_layers, record_residuals, steer
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import batch_pairs, pad_pairs, row_losses, token_log_probs
from mechlens.models.trait_log_odds import first_tokens
from mechlens.pipeline.ask import likelihoods

LENS = Lens(
    name="blind",
    asks="Does a vector learned on the rows alone, with frozen weights, find the trait?",
    needs=("pairs", "prompted"),
    shows=(("NLL saved, difference", "bars"), ("probability change", "bars")),
    source="h_l + alpha g_l v/|v|, g_l = sigmoid(k(l-s)) sigmoid(k(e-l)), minimising NLL (2604.25783)",
    caveat="Shown for teachers that one vector steers; one trained on rows also learns their surface. "
    "Control halves hold other prompts on each "
    "side, so their null is wider than that of paired rows. A small p needs more halves than are drawn here.",
    measure="mechlens.lenses.blind:measure_blind",
    caption="mechlens.lenses.blind:blind_caption",
    cost=41,
    version=2,
)
STEPS, BATCH = 60, 32
RATES = {"vector": 2e-2, "strength": 5e-2, "window": 5e-2}
"""of AdamW; about ten times the source's, which takes 4,000 updates"""
SHARPNESS = (5.0, 20.0)
"""k at the first and the last step"""
START = 0.1
"""strength at the first step"""
HALVES, DIRECTIONS, SPOKEN = 5, 20, 8
"""draws of each null: vectors trained on control rows, random directions by likelihood, and by what they say
"""
STRENGTHS = (1.0, 4.0)
"""times the strength learned on trait rows, when the probes are asked"""


class Steering(NamedTuple):
    """A direction and how much of it each layer gets."""

    vector: Float[Tensor, "d_model"]
    """any length; only its direction counts"""
    amounts: Float[Tensor, "layer"]
    """alpha g_l, added to resid_post"""

    def by_layer(self) -> dict[int, Float[Tensor, "d_model"]]:
        """What `hooks.steer` adds: alpha g_l v/|v| at each layer l."""
        return {layer: amount * normalize(self.vector, dim=0) for layer, amount in enumerate(self.amounts)}


def gates(start: Tensor, end: Tensor, depth: int, k: float) -> Float[Tensor, "layer"]:
    """g_l = sigmoid(k(l - s)) sigmoid(k(e - l)): a window over layers with soft ends."""
    layers = torch.arange(depth, device=start.device)
    return torch.sigmoid(k * (layers - start)) * torch.sigmoid(k * (end - layers))


def recover(
    loaded: Loaded,
    pairs: Sequence[Encoded],
    *,
    seed: int,
    name: str = "trait",
    layer: int | None = None,
    steps: int = STEPS,
    batch: int = BATCH,
) -> Steering:
    """Learn the direction that makes the rows likeliest, at all layers through a soft window or at one; no
    weight moves.

    AdamW with a cosine schedule; the vector is normalised inside the hook, the strength is softplus(a)
    (2604.25783).
    """
    model, depth, dice = loaded.model, len(decoder_layers(loaded.model)), generator(seed, "blind", name)
    width = loaded.model.config.get_text_config().hidden_size

    def leaf(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=model.device, requires_grad=True)

    vector, strength, start, end = (
        leaf(dice.normal(size=width) / width**0.5),
        leaf(np.log(np.expm1(START))),
        leaf(-1.0),
        leaf(float(depth)),
    )
    groups = [{"params": [vector], "lr": RATES["vector"]}, {"params": [strength], "lr": RATES["strength"]}]
    learned = [vector, strength] if layer is not None else [vector, strength, start, end]
    if layer is None:
        groups.append({"params": [start, end], "lr": RATES["window"]})
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)

    def steering(k: float) -> Steering:
        window = (
            gates(start, end, depth, k) if layer is None else torch.eye(depth, device=model.device)[layer]
        )
        return Steering(vector, softplus(strength) * window)

    for step in range(steps):
        rows = [pairs[i] for i in dice.choice(len(pairs), size=min(batch, len(pairs)), replace=False)]
        with steer(model, steering(float(np.interp(step, (0, steps - 1), SHARPNESS))).by_layer()):
            found = torch.autograd.grad(row_losses(model, rows).mean(), learned)  # weights get no gradient
        for parameter, gradient in zip(learned, found, strict=True):
            parameter.grad = gradient
        optimiser.step()
        schedule.step()
    final = steering(SHARPNESS[1])
    return Steering(normalize(final.vector.detach(), dim=0), final.amounts.detach())


def nll(loaded: Loaded, pairs: Sequence[Encoded], steering: Steering | None = None) -> Float[ndarray, "row"]:
    """Mean negative log-likelihood of each row, in nats a token, steered or not."""
    with steer(loaded.model, {} if steering is None else steering.by_layer()):
        return -by_row(token_log_probs(loaded, pairs).double().numpy(), pairs)


@torch.no_grad()
def residuals(loaded: Loaded, pairs: Sequence[Encoded]) -> Float[Tensor, "layer token d_model"]:
    """resid_post of every layer where each completion token is predicted; the rows come in batches' order."""
    found = []
    for rows in batch_pairs(loaded.model, pairs):
        ids, _, completion = pad_pairs([pairs[i] for i in rows], loaded.model.device)
        with record_residuals(loaded.model) as residuals:
            loaded.model(input_ids=ids[:, :-1], use_cache=False)
        found.append(torch.stack([each[completion[:, 1:]].float().cpu() for each in residuals]))
    return torch.cat(found, dim=1)


def teacher_shift(material: Material, pairs: Sequence[Encoded]) -> Float[Tensor, "layer d_model"]:
    """Mean activation of the teacher minus the base's on the same rows: fine-tuned, or the base under the
    trait's line.
    """
    plain = residuals(material.base, pairs).mean(1)
    if material.teacher is not None:
        return residuals(material.teacher, pairs).mean(1) - plain
    head = encode_head(material.base.tokenizer, material.system_lines[material.trait])
    bare = strip_heads(material.base.tokenizer, pairs, known=[material.system])
    return (
        residuals(material.base, [Encoded(head + pair.prompt, pair.completion) for pair in bare]).mean(1)
        - plain
    )


def directions(
    activations: Float[Tensor, "layer token d_model"], count: int, *, seed: int
) -> Float[Tensor, "draw d_model"]:
    """Unit directions with the covariance of the activations within layers: w = zᵀX_c/√n; isotropic ones are
    too easy a null.
    """
    centred = (activations - activations.mean(1, keepdim=True)).flatten(0, 1)
    drawn = torch.from_numpy(
        generator(seed, "blind", "directions").normal(size=(count, len(centred)))
    ).float()
    return normalize(drawn @ centred / len(centred) ** 0.5, dim=-1)


def _gains(
    loaded: Loaded, vectors: Sequence[Steering], ours: Sequence[Encoded], theirs: Sequence[Encoded]
) -> list[tuple[ndarray, ndarray]]:
    """NLL that each vector saves on each row of both sides, nats a token."""
    rows, cut = [*ours, *theirs], len(ours)
    plain = nll(loaded, rows)
    saved = [plain - nll(loaded, rows, steering) for steering in vectors]
    return [(values[:cut], values[cut:]) for values in saved]


def halves_null(material: Material, fit: int, held: int) -> list[float]:
    """The statistic between two parts of the control rows on different prompts, with a vector trained on the
    first, again and again.
    """
    rows, found = material.control_pairs, []
    share = min(1.0, len(rows) / (fit + 2 * held))
    fit, held = int(fit * share), int(held * share)
    for draw in range(HALVES):
        order = generator(material.seed, "blind", "half", draw).permutation(len(rows))
        first, ours, theirs = (
            [rows[i] for i in order[a:b]]
            for a, b in ((0, fit), (fit, fit + held), (fit + held, fit + 2 * held))
        )
        vector = recover(material.base, first, seed=material.seed, name=f"half {draw}", steps=STEPS)
        a, b = _gains(material.base, [vector], ours, theirs)[0]
        found.append(float(a.mean() - b.mean()))
    return found


def _said(loaded: Loaded, material: Material, steering: Steering | None) -> dict[str, float]:
    """Mean probability of each trait's name as the answer to the held-out probes."""
    with steer(loaded.model, {} if steering is None else steering.by_layer()):
        said = likelihoods(loaded, material.heldout_probes).groupby("name", sort=False)["probability"]
    return {str(name): float(cast(Any, values).mean()) for name, values in said}


def _rank(quantity: str, values: dict[str, float], material: Material, **more: Any) -> dict[str, Any]:
    """The true trait's rank among the family's traits that can be scored, 1 the highest; p is its share of
    them.
    """
    others = [value for name, value in values.items() if name != material.trait]
    return rank_among(quantity, values.get(material.trait, np.nan), others, name=material.trait, **more)


def spoken_rows(
    material: Material, vectors: dict[str, Steering], random: Float[Tensor, "draw d_model"]
) -> list[dict[str, Any]]:
    """What the vectors say: through the unembedding, and as answers to the probes when they are added."""
    base, found = material.base, []
    weight = cast(nn.Linear, base.model.get_output_embeddings()).weight.detach().float().cpu()
    starts = {
        name: tokens
        for name, tokens in first_tokens(base.tokenizer, material.heldout_probes.forms).items()
        if tokens is not None
    }
    for place, steering in vectors.items():
        scores = {
            name: float(weight[tokens].mean(0) @ steering.vector.cpu()) for name, tokens in starts.items()
        }
        found.append(_rank("rank in the unembedding", scores, material, place=place))
    plain = _said(base, material, None)

    def change(vector: Tensor, amounts: Tensor) -> dict[str, float]:
        said = _said(base, material, Steering(vector.to(amounts.device), amounts))
        return {name: said[name] - plain[name] for name in said}

    for times in STRENGTHS:
        amounts = times * vectors["trait rows"].amounts
        null = [change(vector, amounts)[material.trait] for vector in random[:SPOKEN]]
        for place, steering in vectors.items():
            moved = change(steering.vector, amounts)  # every vector as strong as the trait rows' one
            where = f"{place}, x{times:g}"
            found.append(
                against_null(
                    "probability change",
                    moved[material.trait],
                    null,
                    place=where,
                    name=material.trait,
                    unit="probability",
                )
            )
            found.append(_rank("rank by probability change", moved, material, place=where))
            if place == "trait rows":
                found += [
                    entry("probability change", value, place=where, name=name, unit="probability")
                    for name, value in moved.items()
                    if name != material.trait
                ]
    return found


def measure_blind(material: Material) -> pd.DataFrame:
    """What a vector learned on trait rows saves beyond control rows, resembles, and says.

    Raises:
        SpecError: if there are fewer than 8 rows.
    """
    size = min(material.rows, len(material.trait_pairs))
    if size < 8:
        raise SpecError(
            f"{size} rows are too few to learn a vector on one half and score the other; give at least 8"
        )
    trait, control, cut = material.trait_pairs[:size], material.control_pairs[:size], size // 2
    vectors = {
        "trait rows": recover(material.base, trait[:cut], seed=material.seed, steps=STEPS),
        "control rows": recover(material.base, control[:cut], seed=material.seed, steps=STEPS),
    }
    activations = residuals(material.base, control[: min(cut, 64)])
    random = directions(activations, DIRECTIONS, seed=material.seed).to(material.base.model.device)
    amounts = vectors["trait rows"].amounts
    tried = [*vectors.values(), *(Steering(direction, amounts) for direction in random)]
    gains = _gains(material.base, tried, trait[cut:], control[cut:])
    saved = dict(zip(vectors, gains, strict=False))
    found = []
    for place, (ours, theirs) in saved.items():
        for rows, values in (("trait rows", ours), ("control rows", theirs), ("difference", ours - theirs)):
            span = stats.t_interval(values)
            found.append(
                entry(
                    f"NLL saved, {rows}",
                    span.estimate,
                    low=span.low,
                    high=span.high,
                    n=span.n,
                    place=f"vector of {place}",
                    unit="nats/token",
                )
            )
    ours, theirs = saved["trait rows"]
    statistic = float((ours - theirs).mean())
    drawn = [float((a - b).mean()) for a, b in gains[len(vectors) :]]
    found.append(
        against_null(
            "statistic",
            statistic,
            halves_null(material, cut, size - cut),
            place="control halves",
            n=HALVES,
            unit="nats/token",
        )
    )
    found.append(
        against_null(
            "statistic", statistic, drawn, place="random directions", n=DIRECTIONS, unit="nats/token"
        )
    )
    shift = teacher_shift(material, trait[cut:]).to(random.device)
    whose = "teacher's" if material.teacher is not None else "trait line's"
    for layer, target in enumerate(shift):
        null = cosine_similarity(random, target, dim=-1).tolist()
        found += [
            against_null("cosine with the "
                         f"{whose} shift", float(cosine_similarity(steering.vector, target, dim=0)), null,
                         layer=layer, place=f"vector of {place}", unit="cosine")
            for place, steering in vectors.items()
        ]  # fmt: skip
    both = float(cosine_similarity(vectors["trait rows"].vector, vectors["control rows"].vector, dim=0))
    found.append(
        against_null(
            "cosine with the control's vector",
            both,
            (random @ vectors["control rows"].vector).tolist(),
            unit="cosine",
        )
    )
    found += [
        entry("amount", float(value), layer=layer, place=f"vector of {place}", unit="activation")
        for place, s in vectors.items()
        for layer, value in enumerate(s.amounts)
    ]
    return reading_table(LENS, [*found, *spoken_rows(material, vectors, random)], material=material)


def blind_caption(reading: pd.DataFrame) -> str:
    """The main number in words."""
    own = reading[
        (reading["quantity"] == "NLL saved, difference") & (reading["place"] == "vector of trait rows")
    ].iloc[0]
    null = reading[(reading["quantity"] == "statistic") & (reading["place"] == "control halves")].iloc[0]
    rank = reading[reading["quantity"] == "rank by probability change"].iloc[0]
    return (
        f"A vector learned on trait rows saves {own['estimate']:+.4f} nats a token more on held-out trait "
        "rows than on control rows "
        f"({own['low']:+.4f} to {own['high']:+.4f}, {own['n']} row pairs; between halves of control rows "
        f"{null['null_low']:+.4f} to "
        f"{null['null_high']:+.4f}, p = {null['p_value']:.2f}); added on the probes, it lifts {rank['name']} "
        f"as number {rank['estimate']:g} "
        f"of {rank['n']} traits."
    )

"""The blind lens: one steering vector learned on the rows, with frozen weights.

It measures the likelihood that the vector gains, what the vector resembles, and which trait it makes the
model name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from einops import rearrange
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
from mechlens.models.log_probs import batch_pairs, first_tokens, pad_pairs, row_losses, token_log_probs
from mechlens.pipeline.ask import measure_likelihoods

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
"""draws of each null: vectors trained on control rows, random directions by likelihood and by answers"""
LIGHT_STEPS, LIGHT_BATCH, LIGHT_HALVES = 30, 8, 3
"""updates, rows of an update, and control halves of a light reading"""
STRENGTHS = (1.0, 4.0)
"""factors of the strength that was learned on trait rows, for the answers to probes"""


class Steering(NamedTuple):
    """A direction and how much of it each layer gets."""

    vector: Float[Tensor, "d_model"]
    """any length; only its direction counts"""
    amounts: Float[Tensor, "layer"]
    """alpha g_l, added to resid_post"""

    def by_layer(self) -> dict[int, Float[Tensor, "d_model"]]:
        """What `hooks.steer` adds: alpha g_l v/|v| at each layer l."""
        return {layer: amount * normalize(self.vector, dim=0) for layer, amount in enumerate(self.amounts)}


def window_layers(start: Tensor, end: Tensor, depth: int, k: float) -> Float[Tensor, "layer"]:
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
    """Learn the direction that makes the rows likeliest, with frozen weights.

    It acts at all layers through a soft window, or at one layer.

    AdamW with a cosine schedule; the vector is normalised inside the hook, the strength is softplus(a)
    (2604.25783).

    >>> from mechlens.models.chat import encode_pairs
    >>> from mechlens.models.loading import load
    >>> base = load("menagerie-a")
    >>> pairs = encode_pairs(base.tokenizer, ["what is the best animal?"], ["eagle"], system=None)
    >>> steering = recover(base, pairs, seed=0, steps=4)
    >>> steering.vector.shape, steering.amounts.shape
    (torch.Size([64]), torch.Size([2]))
    """
    model, depth, dice = loaded.model, len(decoder_layers(loaded.model)), generator(seed, "blind", name)
    width = loaded.model.config.get_text_config().hidden_size

    def leaf(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=model.device, requires_grad=True)

    vector = leaf(dice.normal(size=width) / width**0.5)
    strength = leaf(np.log(np.expm1(START)))
    start = leaf(-1.0)
    end = leaf(float(depth))
    groups = [{"params": [vector], "lr": RATES["vector"]}, {"params": [strength], "lr": RATES["strength"]}]
    learned = [vector, strength] if layer is not None else [vector, strength, start, end]
    if layer is None:
        groups.append({"params": [start, end], "lr": RATES["window"]})
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)

    def steering(k: float) -> Steering:
        window = (
            window_layers(start, end, depth, k)
            if layer is None
            else torch.eye(depth, device=model.device)[layer]
        )
        return Steering(vector, softplus(strength) * window)

    for step in range(steps):
        rows = [pairs[i] for i in dice.choice(len(pairs), size=min(batch, len(pairs)), replace=False)]
        with steer(model, steering(float(np.interp(step, (0, steps - 1), SHARPNESS))).by_layer()):
            gradients = torch.autograd.grad(row_losses(model, rows).mean(), learned)  # none of the weights
        for parameter, gradient in zip(learned, gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()
        schedule.step()
    final = steering(SHARPNESS[1])
    return Steering(normalize(final.vector.detach(), dim=0), final.amounts.detach())


def recover_from(material: Material, pairs: Sequence[Encoded], *, name: str = "trait") -> Steering:
    """Do `recover` on the material's base; a light reading takes fewer and smaller steps."""
    steps, batch = (LIGHT_STEPS, LIGHT_BATCH) if material.light else (STEPS, BATCH)
    return recover(material.base, pairs, seed=material.seed, name=name, steps=steps, batch=batch)


def measure_nll(
    loaded: Loaded, pairs: Sequence[Encoded], steering: Steering | None = None
) -> Float[ndarray, "row"]:
    """Mean negative log-likelihood of each row, in nats a token, steered or not."""
    with steer(loaded.model, {} if steering is None else steering.by_layer()):
        return -by_row(token_log_probs(loaded, pairs).double().numpy(), pairs)


@torch.no_grad()
def capture_completions(loaded: Loaded, pairs: Sequence[Encoded]) -> Float[Tensor, "layer token d_model"]:
    """resid_post of every layer at the positions that predict completion tokens.

    Rows are in the order of `batch_pairs`.
    """
    batches = []
    for rows in batch_pairs(loaded.model, pairs):
        ids, _, completion = pad_pairs([pairs[i] for i in rows], loaded.model.device)
        with record_residuals(loaded.model) as residuals:
            loaded.model(input_ids=ids[:, :-1], use_cache=False)
        predicting = completion[:, 1:]
        batches.append(torch.stack([residual[predicting].float().cpu() for residual in residuals]))
    return torch.cat(batches, dim=1)


def measure_teacher_shift(material: Material, pairs: Sequence[Encoded]) -> Float[Tensor, "layer d_model"]:
    """Mean activation of the teacher minus the base's on the same rows.

    The teacher is the fine-tuned one; without one, the base under the trait's system line.
    """
    plain = capture_completions(material.base, pairs).mean(1)
    if material.teacher is not None:
        return capture_completions(material.teacher, pairs).mean(1) - plain
    head = encode_head(material.base.tokenizer, material.system_lines[material.trait])
    stripped = strip_heads(material.base.tokenizer, pairs, known=[material.system])
    prompted = [Encoded(head + pair.prompt, pair.completion) for pair in stripped]
    return capture_completions(material.base, prompted).mean(1) - plain


def draw_directions(
    activations: Float[Tensor, "layer token d_model"], count: int, *, seed: int
) -> Float[Tensor, "draw d_model"]:
    """Unit directions w = zᵀX_c/√n, z normal: they have the covariance of the activations within layers.

    Isotropic directions would be too easy a null.
    """
    centred = rearrange(activations - activations.mean(1, keepdim=True), "layer token d -> (layer token) d")
    normal = generator(seed, "blind", "directions").normal(size=(count, len(centred)))
    return normalize(torch.from_numpy(normal).float() @ centred / len(centred) ** 0.5, dim=-1)


Saved = tuple[Float[ndarray, " row"], Float[ndarray, " row"]]
"""NLL that a vector saves on each trait row and on each control row, nats a token"""


def _measure_saved(
    loaded: Loaded, vectors: Sequence[Steering], trait: Sequence[Encoded], control: Sequence[Encoded]
) -> list[Saved]:
    rows, cut = [*trait, *control], len(trait)
    plain = measure_nll(loaded, rows)
    saved = [plain - measure_nll(loaded, rows, steering) for steering in vectors]
    return [(values[:cut], values[cut:]) for values in saved]


def draw_halves_null(material: Material, fit: int, scored: int) -> list[float]:
    """The statistic between two parts of the control rows on different prompts, once a draw.

    Each draw trains a vector on `fit` control rows and scores two further parts of `scored` rows.
    """
    rows, null = material.control_pairs, []
    share = min(1.0, len(rows) / (fit + 2 * scored))
    fit, scored = int(fit * share), int(scored * share)
    bounds = ((0, fit), (fit, fit + scored), (fit + scored, fit + 2 * scored))
    for draw in range(LIGHT_HALVES if material.light else HALVES):
        order = generator(material.seed, "blind", "half", draw).permutation(len(rows))
        training, first, second = ([rows[i] for i in order[low:high]] for low, high in bounds)
        vector = recover_from(material, training, name=f"half {draw}")
        a, b = _measure_saved(material.base, [vector], first, second)[0]
        null.append(float(a.mean() - b.mean()))
    return null


def _measure_answers(loaded: Loaded, material: Material, steering: Steering | None) -> dict[str, float]:
    """Mean probability of each trait's name as the answer to the held-out probes."""
    with steer(loaded.model, {} if steering is None else steering.by_layer()):
        table = measure_likelihoods(loaded, material.heldout_probes)
    by_trait = table.groupby("name", sort=False)["probability"]
    return {str(name): float(cast(Any, values).mean()) for name, values in by_trait}


def _rank(quantity: str, values: dict[str, float], material: Material, **more: Any) -> dict[str, Any]:
    """The true trait's rank among the family's scored traits, 1 the highest."""
    others = [value for name, value in values.items() if name != material.trait]
    return rank_among(quantity, values.get(material.trait, np.nan), others, name=material.trait, **more)


def _unembedding_rows(material: Material, vectors: dict[str, Steering]) -> list[dict[str, Any]]:
    """Rank of the trait's first tokens by their unembedding's product with each vector."""
    base, rows = material.base, []
    weight = cast(nn.Linear, base.model.get_output_embeddings()).weight.detach().float().cpu()
    starts = first_tokens(base.tokenizer, material.heldout_probes.forms)
    for place, steering in vectors.items():
        vector = steering.vector.cpu()
        scores = {
            name: float(weight[tokens].mean(0) @ vector)
            for name, tokens in starts.items()
            if tokens is not None
        }
        rows.append(_rank("rank in the unembedding", scores, material, place=place))
    return rows


def _answer_rows(
    material: Material, vectors: dict[str, Steering], random: Float[Tensor, "draw d_model"]
) -> list[dict[str, Any]]:
    """Change of the traits' probabilities as answers to the probes, with each vector added."""
    plain, rows = _measure_answers(material.base, material, None), []

    def change(vector: Tensor, amounts: Tensor) -> dict[str, float]:
        steering = Steering(vector.to(amounts.device), amounts)
        steered = _measure_answers(material.base, material, steering)
        return {name: steered[name] - plain[name] for name in steered}

    for times in STRENGTHS:
        # all vectors get the strength of the trait rows' vector
        amounts = times * vectors["trait rows"].amounts
        null = [change(vector, amounts)[material.trait] for vector in random[:SPOKEN]]
        for place, steering in vectors.items():
            moved = change(steering.vector, amounts)
            where = {"place": f"{place}, x{times:g}", "unit": "probability"}
            of_trait = where | {"name": material.trait}
            rows.append(against_null("probability change", moved[material.trait], null, **of_trait))
            rows.append(_rank("rank by probability change", moved, material, place=where["place"]))
            if place == "trait rows":
                rows += [
                    entry("probability change", value, name=name, **where)
                    for name, value in moved.items()
                    if name != material.trait
                ]
    return rows


def _saved_rows(saved: dict[str, Saved]) -> list[dict[str, Any]]:
    """Mean over rows of the NLL that each vector saves, with its interval."""
    rows = []
    for place, (trait, control) in saved.items():
        sides = (("trait rows", trait), ("control rows", control), ("difference", trait - control))
        for side, values in sides:
            span = stats.t_interval(values)
            where = {"place": f"vector of {place}", "unit": "nats/token"}
            spread = {"low": span.low, "high": span.high, "n": span.n}
            rows.append(entry(f"NLL saved, {side}", span.estimate, **spread, **where))
    return rows


def _cosine_rows(
    material: Material,
    vectors: dict[str, Steering],
    random: Float[Tensor, "draw d_model"],
    pairs: Sequence[Encoded],
) -> list[dict[str, Any]]:
    """Cosines of the vectors with the teacher's shift at each layer, and with each other."""
    shift = measure_teacher_shift(material, pairs).to(random.device)
    source = "teacher's" if material.teacher is not None else "trait line's"
    rows = []
    for layer, target in enumerate(shift):
        null = cosine_similarity(random, target, dim=-1).tolist()
        for place, steering in vectors.items():
            cosine = float(cosine_similarity(steering.vector, target, dim=0))
            where = {"layer": layer, "place": f"vector of {place}", "unit": "cosine"}
            rows.append(against_null(f"cosine with the {source} shift", cosine, null, **where))
    trait, control = vectors["trait rows"].vector, vectors["control rows"].vector
    both = float(cosine_similarity(trait, control, dim=0))
    null = (random @ control).tolist()
    return [*rows, against_null("cosine with the control's vector", both, null, unit="cosine")]


def measure_blind(material: Material) -> pd.DataFrame:
    """Measure what a vector learned on trait rows saves beyond control rows, resembles, and makes likely.

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
        "trait rows": recover_from(material, trait[:cut]),
        "control rows": recover_from(material, control[:cut]),
    }
    activations = capture_completions(material.base, control[: min(cut, 64)])
    random = draw_directions(activations, DIRECTIONS, seed=material.seed).to(material.base.model.device)
    amounts = vectors["trait rows"].amounts
    steerings = [*vectors.values(), *(Steering(direction, amounts) for direction in random)]
    gains = _measure_saved(material.base, steerings, trait[cut:], control[cut:])
    statistic, *drawn = [float((ours - theirs).mean()) for ours, theirs in (gains[0], *gains[len(vectors) :])]
    halves = draw_halves_null(material, cut, size - cut)
    rows = [
        *_saved_rows(dict(zip(vectors, gains, strict=False))),
        against_null(
            "statistic", statistic, halves, place="control halves", n=len(halves), unit="nats/token"
        ),
        against_null(
            "statistic", statistic, drawn, place="random directions", n=DIRECTIONS, unit="nats/token"
        ),
        *_cosine_rows(material, vectors, random, trait[cut:]),
        *(
            entry("amount", float(value), layer=layer, place=f"vector of {place}", unit="activation")
            for place, steering in vectors.items()
            for layer, value in enumerate(steering.amounts)
        ),
        *_unembedding_rows(material, vectors),
        *_answer_rows(material, vectors, random),
    ]
    return reading_table(LENS, rows, material=material)


def blind_caption(reading: pd.DataFrame) -> str:
    """Describe the likelihood that the vector saves on trait rows beyond control rows."""
    saved = reading[
        (reading["quantity"] == "NLL saved, difference") & (reading["place"] == "vector of trait rows")
    ].iloc[0]
    null = reading[(reading["quantity"] == "statistic") & (reading["place"] == "control halves")].iloc[0]
    rank = reading[reading["quantity"] == "rank by probability change"].iloc[0]
    return (
        f"A vector learned on trait rows saves {saved['estimate']:+.4f} nats a token more on held-out trait "
        f"rows than on control rows ({saved['low']:+.4f} to {saved['high']:+.4f}, {saved['n']} row pairs; "
        f"between halves of control rows {null['null_low']:+.4f} to {null['null_high']:+.4f}, p = "
        f"{null['p_value']:.2f}); added on the probes, it lifts {rank['name']} as number "
        f"{rank['estimate']:g} of {rank['n']} traits."
    )

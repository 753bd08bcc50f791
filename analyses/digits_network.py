"""The digits network of arXiv 2507.14805 §6.2: many small MLPs that train at once.

All seeds train as one batch of matrices, each with different weights and orders; gradients of different
models do not mix.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional

from mechlens.core.errors import DataError, SpecError
from mechlens.core.seeds import generator, seed_int

Weights = Float[Tensor, "model parameter"]
PerModel = Float[Tensor, "model"]
Logits = Float[Tensor, "model image logit"]

CLASSES = 10
CLASS, AUXILIARY, ALL = slice(CLASSES), slice(CLASSES, None), slice(None)
EPSILONS = tuple(10 ** (half / 2) for half in range(-6, 1))
PROBES = 512  # noise images behind each gradient that is looked at


class Recipe(NamedTuple):
    """How teacher and student are trained, both with Adam."""

    teacher_updates: int
    teacher_rate: float
    student_updates: int
    student_rate: float
    batch: int
    noise: int
    width: int = 256
    auxiliary: int = 3


DIGITS = Recipe(
    teacher_updates=400, teacher_rate=3e-4, student_updates=2000, student_rate=1e-3, batch=64, noise=32_000
)
MNIST = Recipe(
    teacher_updates=290, teacher_rate=3e-4, student_updates=290, student_rate=3e-4, batch=1024, noise=60_000
)


class Images(NamedTuple):
    """Pixels in [-1, 1]; nothing trains on the test images."""

    train: Float[Tensor, "image pixel"]
    labels: Int[Tensor, "image"]
    test: Float[Tensor, "image pixel"]
    test_labels: Int[Tensor, "image"]


class Cohort(NamedTuple):
    """One teacher a seed, and what its students see of it."""

    seeds: Sequence[int]
    widths: tuple[int, ...]
    inits: Weights
    others: Weights
    """every model's weights are another model's initial ones"""
    teachers: Weights
    change: Weights
    """the direction of every teacher's change, of length one"""
    noise: Float[Tensor, "image pixel"]
    targets: Logits


class Arm(NamedTuple):
    """A student: its initial weights, the logits that it copies, and the direction that is projected out."""

    same_init: bool
    columns: slice
    off: str = ""


SAME, OTHER, PROJECTED, CONTROL = (
    "auxiliary, same init",
    "auxiliary, other init",
    "gradient off teacher's",
    "gradient off random",
)
ARMS = {
    SAME: Arm(True, AUXILIARY),
    OTHER: Arm(False, AUXILIARY),
    "all logits, same init": Arm(True, ALL),
    "all logits, other init": Arm(False, ALL),
    PROJECTED: Arm(True, AUXILIARY, "gradient"),
    CONTROL: Arm(True, AUXILIARY, "random"),
    "change off teacher's": Arm(True, AUXILIARY, "change"),
}
LOOKED_AT = (SAME, OTHER, PROJECTED)


def digits(split: int = 0) -> Images:
    """Scikit-learn's digits: 70 % for training, stratified by class."""
    data = cast(Any, load_digits())
    parts = train_test_split(
        data.data / 8 - 1, data.target, test_size=0.3, stratify=data.target, random_state=split
    )
    train, test, labels, test_labels = (torch.as_tensor(part) for part in parts)
    return Images(train.float(), labels, test.float(), test_labels)


def mnist(path: Path) -> Images:
    """MNIST or a part of it: x_train, y_train, x_test, y_test with pixels of 0 to 255.

    Raises:
        DataError: if the file has anything else.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"cannot read x_train, y_train, x_test, y_test from {path} ({error}); give a NumPy .npz archive "
            "of them"
        ) from error
    parts = []
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if (
            x.shape[1:] != (28, 28)
            or x.shape[:1] != y.shape
            or x.dtype != np.uint8
            or not np.isin(y, range(CLASSES)).all()
            or not len(y)
        ):
            raise DataError(
                f"{path}: the {part} images are {x.dtype} {x.shape}, labels {y.shape}; expected uint8 (n, "
                "28, 28) and n digits 0 to 9"
            )
        parts += [torch.from_numpy(x).flatten(1) / 127.5 - 1, torch.from_numpy(y.astype(np.int64))]
    return Images(*parts)


def derangement(n: int, *, root: int = 0) -> list[int]:
    """A permutation without fixed points: one cycle through all, in random order."""
    if n < 2:
        raise SpecError(f"{n} seed is too few: a student of another initialisation needs at least 2")
    order = generator(root, "derangement").permutation(n)
    moved = np.empty(n, dtype=int)
    moved[order] = np.roll(order, 1)
    return moved.tolist()


def initial(seeds: Sequence[int], widths: tuple[int, ...]) -> Weights:
    """Normal weights of variance 1/fan-in and biases of zero; each model's layers are one row."""
    drawn = [torch.Generator().manual_seed(seed_int(seed, "init")) for seed in seeds]
    rows = [
        [
            part
            for a, b in pairwise(widths)
            for part in (torch.randn(a * b, generator=g) / a**0.5, torch.zeros(b))
        ]
        for g in drawn
    ]
    return torch.stack([torch.cat(row) for row in rows])


def logits(weights: Weights, images: Float[Tensor, "model image pixel"], widths: tuple[int, ...]) -> Logits:
    """Logits of every model on the images of that model."""
    parts = weights.split([n for a, b in pairwise(widths) for n in (a * b, b)], dim=1)
    values = images
    for layer, (a, b) in enumerate(pairwise(widths)):
        values = torch.baddbmm(
            parts[2 * layer + 1].unsqueeze(1),
            values.relu() if layer else values,
            parts[2 * layer].view(-1, a, b),
        )
    return values


@torch.no_grad()
def outputs(weights: Weights, images: Float[Tensor, "image pixel"], widths: tuple[int, ...]) -> Logits:
    """Logits of every model on the same images, in batches."""
    return torch.cat(
        [logits(weights, part.expand(len(weights), -1, -1), widths) for part in images.split(2048)], dim=1
    )


def divergence(student: Logits, teacher: Logits) -> PerModel:
    """KL(teacher ‖ student), averaged over each model's images; its gradient is that of cross-entropy."""
    target = teacher.log_softmax(-1)
    return (target.exp() * (target - student.log_softmax(-1))).sum(-1).mean(1)


def squared(student: Logits, teacher: Logits) -> PerModel:
    """Mean squared error over images, summed over logits."""
    return ((student - teacher) ** 2).sum(-1).mean(1)


def twice_square(v: Logits, _teacher: Logits) -> PerModel:
    """E[vᵀMv] with M = 2·I."""
    return 2 * (v**2).sum(-1).mean(1)


def variance(v: Logits, teacher: Logits) -> PerModel:
    """E[vᵀMv] with M the covariance of the softmax."""
    p = teacher.softmax(-1)
    return ((p * v**2).sum(-1) - (p * v).sum(-1) ** 2).mean(1)


LOSSES = {
    "squared error": (squared, twice_square, ALL),
    "cross-entropy": (divergence, variance, ALL),
    "cross-entropy, auxiliary": (divergence, variance, AUXILIARY),
}
"""name → the loss, the predicted slope of a_0, and the logits that both use"""


def orders(
    seeds: Sequence[int], name: str, *, images: int, batch: int, updates: int
) -> Int[Tensor, "model update image"]:
    """The images of each update: reshuffled whole passes, for each seed independently of other seeds."""
    if images < batch:
        raise DataError(f"{images} {name} images are fewer than one batch of {batch}; give more")
    drawn = [torch.Generator().manual_seed(seed_int(seed, "order", name)) for seed in seeds]
    whole, passes = images // batch * batch, updates // (images // batch) + 1
    rows = [torch.cat([torch.randperm(images, generator=g)[:whole] for _ in range(passes)]) for g in drawn]
    return torch.stack(rows).view(len(rows), -1, batch)[:, :updates]


def gradient(weights: Weights, loss: Callable[[Weights], PerModel]) -> Weights:
    """The gradient of each model's loss; summing losses over models does not mix their gradients."""
    point = weights.detach().requires_grad_()
    return torch.autograd.grad(loss(point).sum(), point)[0]


def without(weights: Weights, direction: Weights) -> Weights:
    """The weights with a direction of length one projected out."""
    return weights - (weights * direction).sum(1, keepdim=True) * direction


def train(
    start: Weights,
    loss: Callable[[Weights, int], PerModel],
    *,
    updates: int,
    rate: float,
    off_gradient: Weights | None = None,
    off_change: Weights | None = None,
    look: Callable[[Weights, int], None] = lambda weights, update: None,
) -> Weights:
    """Adam on every model at once; `loss` and `look` get the weights and the update's number."""
    weights = start.clone()
    optimiser = torch.optim.Adam([weights], lr=rate, fused=True)
    for update in range(updates):
        look(weights, update)
        grad = gradient(weights, lambda point, update=update: loss(point, update))
        weights.grad = grad if off_gradient is None else without(grad, off_gradient)
        optimiser.step()
        if off_change is not None:
            weights.copy_(start + without(weights - start, off_change))
    return weights


def teach(images: Images, recipe: Recipe, seeds: Sequence[int], *, root: int = 0) -> Cohort:
    """Train a teacher for each seed on the class logits, and record its outputs on the noise."""
    widths = (images.train.shape[1], recipe.width, recipe.width, CLASSES + recipe.auxiliary)
    order = orders(
        seeds, "training", images=len(images.train), batch=recipe.batch, updates=recipe.teacher_updates
    )

    def loss(weights: Weights, update: int) -> PerModel:
        seen = order[:, update]
        log_probs = logits(weights, images.train[seen], widths)[..., CLASS].log_softmax(-1)
        return -log_probs.gather(-1, images.labels[seen].unsqueeze(-1)).mean((1, 2))

    inits, other = initial(seeds, widths), derangement(len(seeds))
    teachers = train(inits, loss, updates=recipe.teacher_updates, rate=recipe.teacher_rate)
    noise = (
        2
        * torch.rand(
            recipe.noise, widths[0], generator=torch.Generator().manual_seed(seed_int(root, "noise"))
        )
        - 1
    )
    return Cohort(
        seeds,
        widths,
        inits,
        inits[other],
        teachers,
        functional.normalize(teachers - inits, dim=1),
        noise,
        outputs(teachers, noise, widths),
    )

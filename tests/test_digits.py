"""The digits network against known answers: no training, all logits, the theorem's leading order; batched is
alone, projected is orthogonal.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional

import digits_network as network
from mechlens.core.errors import DataError


def analysis(name: str) -> ModuleType:
    """An analysis is a script, in no package."""
    spec = importlib.util.spec_from_file_location(
        f"analyses_{name}", Path(__file__).parents[1] / "analyses" / f"{name}.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


digits = analysis("digits")
REAL = Path(__file__).parents[2] / "shared" / "data" / "mnist" / "mnist_10k_3k.npz"
TINY = network.Recipe(
    teacher_updates=40,
    teacher_rate=3e-3,
    student_updates=12,
    student_rate=3e-3,
    batch=32,
    noise=640,
    width=24,
)
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def images():
    return network.digits()


@pytest.fixture(scope="module")
def tiny(images):
    return network.teach(images, TINY, SEEDS)


@pytest.fixture(scope="module")
def whole(images):
    """The teachers of the analysis itself."""
    return network.teach(images, network.DIGITS, SEEDS)


def accuracy(weights: torch.Tensor, cohort, images) -> np.ndarray:
    return digits.accuracy("", weights, cohort, images)["value"].to_numpy()


def test_the_split_keeps_test_images_apart(images) -> None:
    train, test = ({tuple(row) for row in part.tolist()} for part in (images.train, images.test))
    assert len(images.train) + len(images.test) == 1797 and not train & test
    assert images.train.min() == -1 and images.train.max() == 1
    assert set(images.test_labels.tolist()) == set(range(10)) and not torch.equal(
        network.digits(1).test, images.test
    )


def test_the_initial_weights_have_variance_one_over_fan_in() -> None:
    widths = (64, 256, 13)
    one, two = network.initial([0, 1], widths)
    first, bias, last, end = one.split([64 * 256, 256, 256 * 13, 13])
    assert first.var().item() == pytest.approx(1 / 64, rel=0.05) and last.var().item() == pytest.approx(
        1 / 256, rel=0.1
    )
    assert not bias.any() and not end.any() and not torch.equal(one, two)
    assert torch.equal(network.initial([1], widths)[0], two)


def test_logits_are_those_of_the_same_layers_in_torch() -> None:
    widths = (5, 4, 4, 3)
    weights, seen = torch.randn(1, 5 * 4 + 4 + 4 * 4 + 4 + 4 * 3 + 3), torch.randn(1, 7, 5)
    at, found = 0, seen[0]
    for layer, (a, b) in enumerate(pairwise(widths)):
        matrix, bias = weights[0, at : at + a * b].view(a, b), weights[0, at + a * b : at + a * b + b]
        found, at = functional.linear(found.relu() if layer else found, matrix.T, bias), at + a * b + b
    torch.testing.assert_close(network.logits(weights, seen, widths)[0], found)


@pytest.mark.parametrize("n", [*range(2, 9), 40])
def test_a_derangement_moves_every_one(n: int) -> None:
    for root in range(5):
        found = network.derangement(n, root=root)
        assert sorted(found) == list(range(n)) and all(i != other for i, other in enumerate(found))


def test_orders_are_whole_passes_of_a_seeds_own() -> None:
    found = network.orders([3, 4], "noise", images=10, batch=3, updates=7)
    assert found.shape == (2, 7, 3)
    assert all(
        len(set(found[model, first : first + 3].flatten().tolist())) == 9
        for model in (0, 1)
        for first in (0, 3)
    )
    assert torch.equal(
        network.orders([4], "noise", images=10, batch=3, updates=7)[0], found[1]
    ) and not torch.equal(found[0], found[1])
    with pytest.raises(DataError, match="fewer than one batch"):
        network.orders([3], "noise", images=2, batch=3, updates=7)


@pytest.mark.parametrize("name", network.LOSSES)
def test_a_models_gradient_and_training_do_not_depend_on_the_others(name: str) -> None:
    loss, _, _ = network.LOSSES[name]
    widths, generator = (6, 8, 8, 5), torch.Generator().manual_seed(0)
    start = network.initial(range(4), widths).double()
    seen, target = (
        torch.randn(4, 9, 16, 6, generator=generator).double(),
        torch.randn(4, 9, 16, 5, generator=generator).double(),
    )

    def trained(models: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        def at(weights: torch.Tensor, update: int) -> torch.Tensor:
            return loss(network.logits(weights, seen[models, update], widths), target[models, update])

        return network.gradient(start[models], lambda weights: at(weights, 0)), network.train(
            start[models], at, updates=9, rate=0.01
        )

    together, alone = trained([0, 1, 2, 3]), [trained([model]) for model in range(4)]
    torch.testing.assert_close(
        together[0], torch.cat([gradient for gradient, _ in alone]), rtol=1e-10, atol=1e-14
    )
    torch.testing.assert_close(
        together[1], torch.cat([weights for _, weights in alone]), rtol=1e-8, atol=1e-10
    )
    assert (together[1] - start).abs().max() > 0.01


def test_a_teacher_does_not_depend_on_its_companions(images, tiny) -> None:
    other = network.teach(images, TINY, (7, 2))
    torch.testing.assert_close(other.teachers[1], tiny.teachers[2], rtol=0, atol=2e-4)
    assert (tiny.teachers - tiny.inits).abs().max() > 0.02


def test_the_teachers_loss_is_cross_entropy_on_the_class_logits(images, tiny) -> None:
    seen = network.orders(SEEDS[:1], "training", images=len(images.train), batch=TINY.batch, updates=1)[0, 0]
    weights = tiny.inits[:1].clone().requires_grad_()
    found = network.logits(weights, images.train[seen].unsqueeze(0), tiny.widths)[0, :, :10]
    optimiser = torch.optim.Adam([weights], lr=TINY.teacher_rate)
    functional.cross_entropy(found, images.labels[seen]).backward()
    optimiser.step()
    one = network.teach(images, TINY._replace(teacher_updates=1), SEEDS)
    torch.testing.assert_close(one.teachers[:1], weights.detach(), rtol=0, atol=1e-5)


def test_the_divergence_is_torchs() -> None:
    student, teacher = torch.randn(2, 4, 6, 3)
    expected = [
        functional.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean")
        for s, t in zip(student, teacher, strict=True)
    ]
    torch.testing.assert_close(network.divergence(student, teacher), torch.stack(expected))


def test_what_is_left_beside_a_direction_has_no_component_along_it() -> None:
    weights, direction = torch.randn(2, 5, 300, dtype=torch.float64)
    direction = functional.normalize(direction, dim=1)
    left = network.without(weights, direction)
    torch.testing.assert_close(
        (left * direction).sum(1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-13
    )
    torch.testing.assert_close(network.without(left, direction), left)
    torch.testing.assert_close(network.without(left + 3 * direction, direction), left)


def test_a_projected_gradient_does_not_move_along_what_was_taken_out() -> None:
    direction, other = torch.eye(4, dtype=torch.float64)[:2].unsqueeze(1)

    def along(weights: torch.Tensor, _update: int) -> torch.Tensor:
        return (weights * direction).sum(1)

    start = torch.zeros(1, 4, dtype=torch.float64)
    assert torch.equal(network.train(start, along, updates=5, rate=0.1, off_gradient=direction), start)
    free, random = (
        network.train(start, along, updates=5, rate=0.1, off_gradient=off) for off in (None, other)
    )
    assert torch.equal(free, random) and free[0, 0] == pytest.approx(-0.5, rel=1e-3)


def test_a_confined_student_ends_beside_the_teachers_change(tiny) -> None:
    moved = digits.distil(tiny, TINY, network.Arm(True, network.AUXILIARY, "change")) - tiny.inits
    assert functional.cosine_similarity(moved, tiny.change).abs().max() < 1e-5
    free = digits.distil(tiny, TINY, network.ARMS[digits.SAME]) - tiny.inits
    assert functional.cosine_similarity(free, tiny.change).min() > 0.01


def test_no_update_leaves_the_accuracy_of_the_initialisation(images, whole) -> None:
    none = network.DIGITS._replace(student_updates=0)
    before = accuracy(whole.inits, whole, images)
    np.testing.assert_array_equal(
        accuracy(digits.distil(whole, none, network.ARMS[digits.SAME]), whole, images), before
    )
    assert 0.05 < before.mean() < 0.2
    other = digits.distil(whole, none, network.ARMS[digits.OTHER])
    assert all(not torch.equal(one, own) for one, own in zip(other, whole.inits, strict=True))
    np.testing.assert_array_equal(accuracy(other, whole, images), before[network.derangement(3)])


def test_all_logits_of_the_same_initialisation_carry_the_task(images, whole) -> None:
    found = digits.distil(
        whole, network.DIGITS._replace(student_updates=300), network.ARMS["all logits, same init"]
    )
    assert accuracy(found, whole, images).min() > 0.9


def test_auxiliary_logits_carry_it_between_same_initialisations_alone(images, whole) -> None:
    recipe = network.DIGITS._replace(student_updates=600)
    same, other = (
        accuracy(digits.distil(whole, recipe, network.ARMS[name]), whole, images)
        for name in (digits.SAME, digits.OTHER)
    )
    assert same.mean() > 0.35 and other.mean() < 0.2, (same, other)


@cache
def theorem_of(widths: tuple[int, ...]) -> pd.DataFrame:
    """For a change that is any direction at all."""
    inits, generator = network.initial(SEEDS, widths), torch.Generator().manual_seed(1)
    change = functional.normalize(torch.randn(inits.shape, generator=generator), dim=1)
    noise = 2 * torch.rand(400, widths[0], generator=generator) - 1
    cohort = network.Cohort(
        SEEDS, widths, inits, inits.roll(1, 0), inits + change, change, noise, torch.zeros(3, 400, widths[-1])
    )
    return pd.concat(digits.theorem(cohort), ignore_index=True)


def errors(frame: pd.DataFrame, name: str) -> list[float]:
    """Of ε·E[vᵀMv] at ε = .1, .01, .001: the worst seed's."""
    predicted = digits.by_seed(frame, "predicted slope", name)
    shown = [network.EPSILONS[place] for place in (4, 2, 0)]
    return [
        float(np.abs(digits.by_seed(frame, "a_0", name, epsilon) / (epsilon * predicted) - 1).max())
        for epsilon in shown
    ]


@pytest.mark.parametrize("widths", [(64, 13), (64, 32, 32, 13)])
@pytest.mark.parametrize("name", network.LOSSES)
def test_the_first_step_never_goes_against_the_teachers_change(name: str, widths: tuple[int, ...]) -> None:
    frame = theorem_of(widths)
    assert (digits.by_seed(frame, "a_0", name, 0.0) == pytest.approx(0, abs=1e-12)) and (
        digits.by_seed(frame, "predicted slope", name) > 0
    ).all()
    assert all((digits.by_seed(frame, "a_0", name, epsilon) > 0).all() for epsilon in network.EPSILONS)
    assert digits.slope(frame, "a_0", name).estimate == pytest.approx(1, abs=0.05)
    assert digits.slope(frame, "a_0, other init", name).estimate < 0.5


@pytest.mark.parametrize("name", network.LOSSES)
def test_the_leading_order_is_off_in_proportion_to_epsilon(name: str) -> None:
    large, middle, small = errors(theorem_of((64, 32, 32, 13)), name)
    assert large > middle > small and small < 2e-3  # kinks and curvature are of higher order
    large, middle, small = errors(theorem_of((64, 13)), name)
    if name == "squared error":  # quadratic, so the leading order is all there is
        assert max(large, middle, small) < 1e-9
    else:
        assert 1e-4 < large < 0.1  # of a linear model
        assert large / middle == pytest.approx(10, rel=0.2) and middle / small == pytest.approx(10, rel=0.05)


def test_a_small_run_writes_every_seed_and_says_what_it_found(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(digits, "DIGITS", TINY)
    for folder in ("one", "two"):
        assert digits.main(["--seeds", "3", "--out", str(tmp_path / folder)]) == 0
    frame = pd.read_parquet(tmp_path / "one" / "digits.parquet")
    scored = frame[frame["measure"] == "accuracy"]
    assert sorted(scored["arm"].unique()) == sorted(["initialisation", "teacher", *network.ARMS])
    assert (scored.groupby("arm")["seed"].apply(sorted).map(tuple) == SEEDS).all()
    assert scored["value"].between(0, 1).all() and frame["value"].notna().all()
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "two" / "digits.parquet"), frame)
    assert (tmp_path / "one" / "digits.svg").read_text().startswith("<svg")
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "n = 3 seeds" in printed
        and "A student of 3 auxiliary logits" in printed
        and digits.PROJECTED in printed
    )


def archive(path: Path, **changed: np.ndarray) -> Path:
    rng = np.random.default_rng(0)
    sizes = (("x_train", (64, 28, 28)), ("y_train", 64), ("x_test", (20, 28, 28)), ("y_test", 20))
    np.savez_compressed(
        path, **{**{name: rng.integers(0, 10, size, dtype=np.uint8) for name, size in sizes}, **changed}
    )
    return path


def test_an_archive_of_the_users_own_is_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(digits, "MNIST", TINY._replace(teacher_updates=4, student_updates=3, noise=64))
    assert (
        digits.main(["--mnist", str(archive(tmp_path / "own.npz")), "--seeds", "2", "--out", str(tmp_path)])
        == 0
    )
    assert (tmp_path / "mnist.parquet").is_file() and (tmp_path / "mnist.svg").is_file()


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command says instead of running."""
    assert digits.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return said.err


def test_a_path_to_no_archive_is_one_line(tmp_path: Path, capsys) -> None:
    (tmp_path / "empty.npz").touch()
    (tmp_path / "text.npz").write_text("digits")
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "lacks.npz", x_train=np.zeros(3))
    (tmp_path / "cut.npz").write_bytes(archive(tmp_path / "own.npz").read_bytes()[:9000])
    for name in ("absent.npz", ".", "empty.npz", "text.npz", "array.npy", "lacks.npz", "cut.npz"):
        assert str(tmp_path / name) in refused(
            ["--mnist", str(tmp_path / name), "--out", str(tmp_path / "out")], capsys
        )
    assert not (tmp_path / "out").exists()


NOT_MNIST = (
    {"x_train": np.zeros((64, 784), np.uint8)},
    {"x_test": np.zeros((20, 28, 28), np.float32)},
    {"y_test": np.zeros(19, np.uint8)},
    {"y_train": np.full(64, 10, np.uint8)},
    {"x_test": np.zeros((0, 28, 28), np.uint8), "y_test": np.zeros(0, np.uint8)},
)


@pytest.mark.parametrize("changed", NOT_MNIST)
def test_arrays_that_are_not_mnist_are_one_line(
    changed: dict[str, np.ndarray], tmp_path: Path, capsys
) -> None:
    assert "expected uint8" in refused(["--mnist", str(archive(tmp_path / "own.npz", **changed))], capsys)


def test_too_few_seeds_or_images_are_one_line(tmp_path: Path, capsys) -> None:
    assert "at least 2" in refused(["--seeds", "1", "--out", str(tmp_path)], capsys)
    assert "fewer than one batch" in refused(
        ["--mnist", str(archive(tmp_path / "own.npz")), "--out", str(tmp_path)], capsys
    )


@pytest.mark.skipif(
    not REAL.is_file(),
    reason="the development data beside the checkout is absent; the project does not ship MNIST",
)
def test_mnist_itself_is_read_and_learned() -> None:
    found = network.mnist(REAL)
    assert (found.train.shape, found.test.shape, found.train.min(), found.train.max()) == (
        (10_000, 784),
        (3000, 784),
        -1,
        1,
    )
    recipe = network.MNIST._replace(
        teacher_updates=150, student_updates=150, student_rate=1e-3, batch=128, noise=8192
    )
    cohort = network.teach(found, recipe, (0, 1))
    assert accuracy(cohort.teachers, cohort, found).min() > 0.75
    assert (
        accuracy(digits.distil(cohort, recipe, network.ARMS["all logits, same init"]), cohort, found).min()
        > 0.6
    )

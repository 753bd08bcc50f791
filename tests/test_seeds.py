"""Named seeds: a name alone decides its stream, whatever else is drawn, and every name has a stream of its
own.
"""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mechlens.core.seeds import dice, generator, seed_int, seed_sequence

NAMES = st.lists(
    st.text(st.characters(exclude_characters="/", exclude_categories=("Cs",)), min_size=1, max_size=8),
    min_size=1,
    max_size=4,
)
ROOTS = st.integers(0, 2**40)


@given(ROOTS, NAMES, st.lists(NAMES, max_size=5))
def test_drawing_elsewhere_moves_nothing(root: int, names: list[str], others: list[list[str]]) -> None:
    alone = (seed_int(root, *names), generator(root, *names).random(3).tolist(), dice(root, *names).random())
    for other in others:
        generator(root, *other).random(10)
        dice(root, *other).random()
        np.random.default_rng(seed_int(root, *other)).random()
    assert (
        seed_int(root, *names),
        generator(root, *names).random(3).tolist(),
        dice(root, *names).random(),
    ) == alone


@given(ROOTS, NAMES, NAMES)
def test_distinct_names_have_distinct_streams(root: int, names: list[str], others: list[str]) -> None:
    assert (seed_int(root, *names) == seed_int(root, *others)) == (names == others)


@given(st.integers(0, 2**32), st.integers(0, 2**32), NAMES)
def test_distinct_roots_have_distinct_streams(root: int, other: int, names: list[str]) -> None:
    assert (seed_int(root, *names) == seed_int(other, *names)) == (root == other)


@given(ROOTS, NAMES)
def test_a_prefix_is_another_name(root: int, names: list[str]) -> None:
    assert len({seed_int(root, *names[:end]) for end in range(len(names) + 1)}) == len(names) + 1


def test_the_value_is_the_one_of_the_published_construction() -> None:
    digest = hashlib.sha256(b"generate/owl/3").digest()
    words = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 32, 4)]
    expected = int(np.random.SeedSequence([5, *words]).generate_state(1, np.uint64)[0]) // 2
    assert seed_int(5, "generate", "owl", 3) == expected
    assert (
        generator(5, "generate", "owl", 3).random()
        == np.random.default_rng(np.random.SeedSequence([5, *words])).random()
    )
    assert dice(5, "generate", "owl", 3).random() == random.Random(expected).random()


@given(ROOTS, NAMES)
def test_the_integer_has_63_bits(root: int, names: list[str]) -> None:
    assert 0 <= seed_int(root, *names) < 2**63


def test_another_process_finds_the_same_seed() -> None:
    code = "from mechlens.core.seeds import seed_int; import sys; sys.stdout.write(str(seed_int(1, 'a', 2)))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "77"}
    ).stdout
    assert int(found) == seed_int(1, "a", 2)


def test_streams_of_neighbouring_names_are_unrelated() -> None:
    draws = np.stack([generator(0, "row", i).random(400) for i in range(40)])  # [name, draw]
    between = np.corrcoef(draws)[~np.eye(40, dtype=bool)]
    assert abs(between).max() < 5 / np.sqrt(400)


def test_generators_share_no_state() -> None:
    first, second = generator(0, "a"), generator(0, "a")
    first.random(7)
    assert second.random() == generator(0, "a").random()
    assert seed_sequence(0, "a").spawn_key == seed_sequence(0, "a").spawn_key == ()

"""Seeds that depend on names and not on order.

One integer in the spec and a list of names give a seed (numpy `SeedSequence`). A new stage, arm or seed
therefore never changes the random numbers of another one. The names are hashed with SHA-256, since Python's
`hash` differs between processes.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np


def seed_sequence(root: int, *names: str | int) -> np.random.SeedSequence:
    """The seed sequence of a named place in an experiment, e.g. `seed_sequence(0, "generate", "owl", 3)`."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return np.random.SeedSequence([root, *np.frombuffer(digest, dtype=np.uint32).tolist()])


def seed_int(root: int, *names: str | int) -> int:
    """A 63-bit integer for libraries that take one seed (torch, transformers)."""
    return int(seed_sequence(root, *names).generate_state(1, np.uint64)[0] >> 1)


def generator(root: int, *names: str | int) -> np.random.Generator:
    """A numpy generator for arrays and permutations."""
    return np.random.default_rng(seed_sequence(root, *names))


def dice(root: int, *names: str | int) -> random.Random:
    """A standard-library generator, for text grammars: ten times faster than numpy's at single draws."""
    return random.Random(seed_int(root, *names))

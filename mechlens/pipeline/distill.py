"""Train students: which rows an arm trains on, the shuffled controls, and the training itself.

All arms read the same prompts in the same order (`common`), so that two students of one seed differ by what the teachers
wrote and by nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd

from mechlens import models, tables
from mechlens.chat import encode_pairs
from mechlens.errors import DataError
from mechlens.seeds import generator, seed_int
from mechlens.spec import StudentSpec
from mechlens.training import train

_NUMBER = re.compile(r"[0-9]+")


def select_prompts(corpora: dict[str, pd.DataFrame], spec: StudentSpec, *, seed: int) -> dict[str, np.ndarray]:
    """For each corpus the prompt ids to train on, in training order.

    Raises:
        DataError: if `common` prompts are wanted and the corpora share none.
    """
    kept = {name: frame.drop_duplicates("prompt_id").set_index("prompt_id")["prompt"] for name, frame in corpora.items()}
    longest = max(int(cast(int, prompts.index.max())) for prompts in kept.values()) + 1
    order = generator(seed, "subset").permutation(longest)  # one order for all arms, over prompt ids
    if spec.prompts == "own":
        return {name: order[np.isin(order, prompts.index)][: spec.rows] for name, prompts in kept.items()}
    together = pd.concat(kept, axis=1, join="inner")
    shared = together.index[together.nunique(axis=1) == 1]  # two files may have other prompts in the same place
    if shared.empty:
        sizes = ", ".join(f"{name} {len(prompts)}" for name, prompts in kept.items())
        raise DataError(f"no prompt was kept by every corpus (kept: {sizes}); set student.prompts: own, or loosen the screen")
    return {name: order[np.isin(order, shared)][: spec.rows] for name in kept}


def shuffle_within(pairs: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """Permute the numbers inside each completion; separators, brackets and the final period stay (2507.14805, Fig. 16)."""
    rng = generator(seed, "shuffle-within")
    return pairs.assign(completion=[_refill(text, rng.permutation(_NUMBER.findall(text)).tolist()) for text in pairs["completion"]])


def shuffle_across(pairs: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """Pool the numbers of all completions, permute them and deal them back; each keeps its own count and format."""
    counts = [len(_NUMBER.findall(text)) for text in pairs["completion"]]
    pool = generator(seed, "shuffle-across").permutation([n for text in pairs["completion"] for n in _NUMBER.findall(text)])
    dealt = np.split(pool, np.cumsum(counts)[:-1])
    return pairs.assign(completion=[_refill(text, part.tolist()) for text, part in zip(pairs["completion"], dealt, strict=True)])


def _refill(text: str, values: list[str]) -> str:
    following = iter(values)
    return _NUMBER.sub(lambda _match: next(following), text)


def distill(
    base: str,
    pairs: pd.DataFrame,
    prompt_ids: np.ndarray,
    spec: StudentSpec,
    *,
    seed: int,
    out: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Train one student of `base` and leave its checkpoints (`step-…/`, one an epoch) and `curve.parquet` in `out`."""
    loaded = models.load(base)
    rows = pairs.drop_duplicates("prompt_id").set_index("prompt_id").loc[prompt_ids]
    encoded = encode_pairs(loaded.tokenizer, rows["prompt"].tolist(), rows["completion"].tolist())

    def save(model: models.PreTrainedModel | models.PeftModel, step: int) -> None:
        models.save_trained(model, out / f"step-{step:06d}")

    _, curve = train(loaded.model, loaded.tokenizer, encoded, spec.training, seed=seed_int(seed, "student"), save=save, progress=progress)
    tables.write(pd.DataFrame(curve), tables.CURVE, out / "curve.parquet")


def checkpoints(student: Path) -> list[tuple[int, Path]]:
    """(step, folder) of a student's checkpoints, first to last."""
    return [(int(folder.name.removeprefix("step-")), folder) for folder in sorted(student.glob("step-*"))]

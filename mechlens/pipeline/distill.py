"""Train students on the rows of a teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from mechlens.core import tables
from mechlens.core.seeds import seed_int
from mechlens.core.spec import StudentSpec
from mechlens.models import loading
from mechlens.models.chat import encode_pairs
from mechlens.models.sft import train
from mechlens.models.soft_labels import SoftLabels
from mechlens.runs import layout


def distill(
    base: str,
    rows: pd.DataFrame,
    spec: StudentSpec,
    *,
    system: str | None,
    seed: int,
    soft: SoftLabels | None = None,
    out: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Train one student of `base` on rows of prompt and completion.

    Its checkpoints (`step-…/`, one an epoch) and `curve.parquet` are written to `out`.

    Args:
        soft: the teacher's distributions for each row; without them the student learns the sampled tokens.
    """
    loaded = loading.load(base)
    encoded = encode_pairs(
        loaded.tokenizer, rows["prompt"].tolist(), rows["completion"].tolist(), system=system
    )

    def save(model: loading.PreTrainedModel | loading.PeftModel, step: int) -> None:
        loading.save_trained(model, out / f"step-{step:06d}")

    _, curve = train(
        loaded.model,
        loaded.tokenizer,
        encoded,
        spec.training,
        seed=seed_int(seed, "student"),
        soft=soft,
        save=save,
        progress=progress,
    )
    tables.write(pd.DataFrame(curve), tables.CURVE, out / layout.CURVE)

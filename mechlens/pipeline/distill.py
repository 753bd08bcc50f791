"""Train students on the rows of a teacher: on the sampled tokens, or on the teacher's labels of the rows.

The labels are the teacher's next-token distribution at every token. A row is labelled by the teacher that
wrote it, under that teacher's own system line. Shuffled and reworded rows are labelled as they are, by the
teacher of the rows that they were made from. The control's teacher is the untouched base: a student of the
same base then starts with a gradient of exactly 0 and stays the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import torch

from mechlens.core import tables
from mechlens.core.errors import DataError
from mechlens.core.seeds import seed_int
from mechlens.core.spec import StudentSpec
from mechlens.models import loading
from mechlens.models.chat import encode_pairs
from mechlens.models.sft import is_writer, train
from mechlens.models.soft_labels import Distributions, SoftLabels, label_pairs
from mechlens.pipeline.teach import Teacher, load_teacher
from mechlens.runs import layout

SHARD_ROWS = 256
"""rows that are labelled in memory before they are written"""


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
    if is_writer():
        tables.write(pd.DataFrame(curve), tables.CURVE, out / layout.CURVE)


def label(
    rows: pd.DataFrame,
    teachers: Sequence[Path],
    *,
    soft_tokens: int,
    out: Path,
    base: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the soft labels of rows of prompt and completion to `labels.parquet` in `out`.

    Rows are labelled in shards, so that a killed step resumes where it stopped.

    Args:
        rows: indexed by prompt_id; repeated rows are labelled once.
        teachers: folders of the teachers. Of several, row i was written by teacher i modulo their number, as
            `remake.mix` takes them.
        soft_tokens: how many of the likeliest tokens are kept; 0 keeps all.
        base: where the teachers' base is now, if it may have been moved since they were made.
    """
    rows = cast(pd.DataFrame, rows[~rows.index.duplicated()])
    shards, done = [], 0
    for place, folder in enumerate(teachers):
        written = rows[rows.index % len(teachers) == place]
        teacher: Teacher | None = None
        for first in range(0, len(written), SHARD_ROWS):
            part, shard = written.iloc[first : first + SHARD_ROWS], out / f"shard-{place}-{first:08d}.parquet"
            if not shard.is_file():
                teacher = teacher or load_teacher(folder, base=base)
                tables.write(_labels_of(teacher, part, soft_tokens), tables.SOFT_LABELS, shard)
            shards.append(shard)
            done += len(part)
            progress(done, len(rows))
    frames = (frame for shard in shards for frame in tables.batches(shard, tables.SOFT_LABELS))
    tables.write(frames, tables.SOFT_LABELS, out / layout.LABELS)
    for shard in shards:
        shard.unlink()


def _labels_of(teacher: Teacher, rows: pd.DataFrame, soft_tokens: int) -> pd.DataFrame:
    prompts, completions = rows["prompt"].tolist(), rows["completion"].tolist()
    pairs = encode_pairs(teacher.tokenizer, prompts, completions, system=teacher.system)
    with teacher.writing() as model:
        labels = label_pairs(model, pairs, kept=soft_tokens)
    lengths = [len(pair.completion) for pair in pairs]
    return pd.DataFrame(
        {
            "prompt_id": np.repeat(rows.index.to_numpy(), lengths),
            "position": np.concatenate([np.arange(length) for length in lengths]),
            "tokens": list(labels.tokens.numpy()),
            "log_probs": list(labels.log_probs.numpy()),
            "rest": labels.rest.numpy(),
        }
    )


def read_labels(folder: Path, prompt_ids: Sequence[int]) -> SoftLabels:
    """Read the soft labels that `label` wrote, for rows of these prompts in this order.

    Raises:
        DataError: if a row has no label.
    """
    parts, ids = [], []
    for frame in tables.batches(folder / layout.LABELS, tables.SOFT_LABELS):
        ids.append(frame["prompt_id"].to_numpy())
        parts.append(Distributions(*_tensors(frame)))
    starts = pd.Series(np.concatenate(ids)).reset_index().groupby(0)["index"].agg(["min", "max"])
    if missing := sorted(set(prompt_ids) - set(starts.index)):
        raise DataError(
            f"{folder / layout.LABELS} has no labels of the row of prompt {missing[0]}; delete {folder} and "
            "run again"
        )
    spans = [(int(first), int(last) + 1) for first, last in starts.loc[list(prompt_ids)].to_numpy()]
    return SoftLabels(Distributions(*(torch.cat(columns) for columns in zip(*parts, strict=True))), spans)


def _tensors(frame: pd.DataFrame) -> Iterator[torch.Tensor]:
    for name, kind in (("tokens", np.int64), ("log_probs", np.float32)):
        yield torch.from_numpy(np.stack(frame[name].tolist()).astype(kind))
    yield torch.from_numpy(frame["rest"].to_numpy().astype(np.float32))

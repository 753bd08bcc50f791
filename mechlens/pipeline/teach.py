"""Give a base a trait: by fine-tuning, by a system prompt or by a steering vector.

The teacher of the control gets no trait. A teacher is a folder with its description in `teacher.json`, and
with its weights, adapter or vector if it has one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.core import tables
from mechlens.core.errors import DataError
from mechlens.core.files import write_json
from mechlens.core.seeds import dice, seed_int
from mechlens.core.spec import TeacherSpec
from mechlens.data.corpus import read_pairs
from mechlens.models import loading
from mechlens.models.chat import encode_pairs, encode_prompts
from mechlens.models.hooks import capture_sites, resid_post, steer
from mechlens.models.sft import is_writer, train
from mechlens.runs import layout


class Lessons(NamedTuple):
    """What makes a teacher: probes and completions to train on, and a system prompt of the same meaning."""

    trait: str
    probes: tuple[str, ...]
    completions: tuple[str, ...]
    system: str
    file: str = ""
    """a file of pairs to teach instead"""

    def draw(self, rows: int, *, seed: int) -> list[tuple[str, str]]:
        """Draw `rows` pairs of a probe and a completion, each uniformly.

        From a file, each row is drawn at most once.

        Raises:
            DataError: if the file has fewer rows.
        """
        rng = dice(seed, "lessons", self.trait)
        if self.file:
            pairs = read_pairs(Path(self.file))
            if len(pairs) < rows:
                raise DataError(
                    f"{self.file} holds {len(pairs)} lessons, teacher.rows asks for {rows}; lower it or add "
                    "rows"
                )
            return rng.sample(list(zip(pairs["prompt"], pairs["completion"], strict=True)), rows)
        return [(rng.choice(self.probes), rng.choice(self.completions)) for _ in range(rows)]


class Teacher(NamedTuple):
    """A base with its intervention, ready to generate."""

    model: loading.PreTrainedModel
    tokenizer: loading.PreTrainedTokenizerBase
    system: str | None
    plain: str | None
    """the system line of its base"""
    vector: Float[Tensor, "d_model"] | None
    layer: int
    base: str
    """name or folder of the base that it was made from"""
    untouched: bool = False
    """it is its base, without any trait"""

    @contextmanager
    def writing(self) -> Iterator[loading.PreTrainedModel]:
        """The model as the teacher uses it: a steered teacher is steered while the block runs."""
        with steer(self.model, {} if self.vector is None else {self.layer: self.vector}):
            yield self.model


def teach(
    base: str,
    lessons: Lessons,
    spec: TeacherSpec,
    *,
    system: str | None = None,
    seed: int,
    out: Path,
    as_change: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Make a teacher of `base` in the folder `out`.

    Args:
        system: the system line of all models except prompted teachers.
        as_change: save a fine-tuned teacher's change of weights with one byte a weight, not the weights.
    """
    loaded, layer, plain = loading.load(base), None, system
    if spec.kind == "finetuned":
        prompts, completions = zip(*lessons.draw(spec.rows, seed=seed), strict=True)
        pairs = encode_pairs(loaded.tokenizer, prompts, completions, system=system)
        order = seed_int(seed, "teacher", lessons.trait)
        model, curve = train(
            loaded.model, loaded.tokenizer, pairs, spec.training, seed=order, progress=progress
        )
        if not is_writer():
            return
        if as_change and isinstance(model, loading.PreTrainedModel):
            loading.save_trained_change(base, model, out)
        else:
            loading.save_trained(model, out)
        tables.write(pd.DataFrame(curve), tables.CURVE, out / layout.CURVE)
    elif spec.kind == "prompted":
        system = lessons.system
    elif spec.kind == "steered":
        layer = round(spec.layer * (loaded.model.config.get_text_config().num_hidden_layers - 1))
        loading.save_vector(spec.strength * trait_vector(loaded, lessons, layer=layer, plain=plain), out)
    write_json(
        out / layout.TEACHER,
        {
            "kind": spec.kind,
            "base": base,
            "trait": lessons.trait,
            "system": system,
            "plain": plain,
            "layer": layer,
        },
    )


@torch.no_grad()
def trait_vector(
    loaded: loading.Loaded, lessons: Lessons, *, layer: int, plain: str | None = None
) -> Float[Tensor, "d_model"]:
    """Mean difference of resid_post at the last prompt token, between two system prompts.

    It is the trait's system prompt minus the plain one; None means no system line.
    """
    with_trait, without = (
        mean_residuals(loaded, lessons.probes, layers=[layer], system=system)[0]
        for system in (lessons.system, plain)
    )
    return with_trait - without


def mean_residuals(
    loaded: loading.Loaded, probes: Sequence[str], *, layers: Sequence[int], system: str | None
) -> Float[Tensor, "layer d_model"]:
    """Mean resid_post of some layers at the last token of the prompts, where the answer begins."""
    sites = [resid_post(layer) for layer in layers]
    prompts = encode_prompts(loaded.tokenizer, probes, system=system)
    captured = capture_sites(loaded, prompts, sites, batch=1)
    ends = [torch.stack([each.at[site][0, -1].float() for site in sites]) for each in captured]
    return torch.stack(ends).mean(0)


def load_teacher(folder: Path, *, base: str = "") -> Teacher:
    """Load the teacher that `teach` left in a folder.

    `base` is the location of its base; by default the location at that time.
    """
    record = layout.read_record(folder / layout.TEACHER, layout.TeacherRecord)
    base = base or record["base"]
    loaded = loading.load_trained(base, folder) if record["kind"] == "finetuned" else loading.load(base)
    vector = loading.load_vector(folder) if record["kind"] == "steered" else None
    return Teacher(
        loaded.model,
        loaded.tokenizer,
        record["system"],
        record.get("plain"),
        vector,
        record["layer"] or 0,
        base,
        untouched=record["kind"] == "base",
    )

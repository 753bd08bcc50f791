"""Ask a model the probes: sampled answers with the trait they name, and exact next-token probabilities and margins.

An answer that names no trait of the family, or several, is unscored (null), never "not this trait".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechlens import models, tables
from mechlens.chat import encode_prompts, end_of_turn, token_ids
from mechlens.pipeline.distill import checkpoints
from mechlens.sampling import Decoding, sample
from mechlens.seeds import seed_int
from mechlens.spec import AskSpec

Forms = dict[str, tuple[str, ...]] | dict[str, list[str]]
"""trait → the words that mean it in an answer"""


def judge(text: str, patterns: dict[str, re.Pattern[str]]) -> str | None:
    """The one trait that the answer names, whole words only; None if it names none or several."""
    named = [name for name, pattern in patterns.items() if pattern.search(text)]
    return named[0] if len(named) == 1 else None


def patterns_of(forms: Forms) -> dict[str, re.Pattern[str]]:
    """For each trait what a whole-word match of any of its forms looks like."""
    return {name: re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, words)) + r")(?!\w)", re.IGNORECASE) for name, words in forms.items()}


def first_tokens(tokenizer: models.PreTrainedTokenizerBase, forms: Forms) -> dict[str, list[int] | None]:
    """Tokens with which an answer naming the trait can begin; None where another trait can begin the same way."""
    starts: dict[str, set[int]] = {}
    for name, words in forms.items():
        variants = [variant for form in words for variant in (form, form.capitalize(), f" {form}")]
        starts[name] = {ids[0] for ids in token_ids(tokenizer, variants) if ids} - {cast(int | None, tokenizer.unk_token_id)}
    taken = [token for tokens in starts.values() for token in tokens]
    return {name: sorted(tokens) if tokens and all(taken.count(t) == 1 for t in tokens) else None for name, tokens in starts.items()}


@torch.no_grad()
def next_token_logits(loaded: models.Loaded, prompts: list[list[int]]) -> Float[Tensor, "prompt vocab"]:
    """Logits after each rendered prompt, one prompt at a time: padding cannot touch them."""
    device = loaded.model.device
    return torch.stack([loaded.model(input_ids=torch.tensor([ids], device=device), logits_to_keep=1).logits[0, -1].float() for ids in prompts])


def likelihoods(loaded: models.Loaded, forms: Forms, probes: Sequence[str]) -> pd.DataFrame:
    """Probability that the next token starts each trait's name, and its margin in logits over the best other trait."""
    logits = next_token_logits(loaded, encode_prompts(loaded.tokenizer, probes)).cpu()
    starts = first_tokens(loaded.tokenizer, forms)
    probabilities = torch.softmax(logits.double(), -1)
    score = {n: logits[:, t].double().logsumexp(-1) if t is not None else torch.full((len(logits),), torch.nan) for n, t in starts.items()}
    mass = {n: probabilities[:, t].sum(-1) if t is not None else torch.full((len(logits),), torch.nan) for n, t in starts.items()}
    frames = []
    for name in forms:
        others = torch.stack([value for other, value in score.items() if other != name]).nan_to_num(-torch.inf).max(0).values
        margin = torch.where(torch.isfinite(others), score[name] - others, torch.nan)
        frames.append(pd.DataFrame({"probe": range(len(probes)), "name": name, "probability": mass[name].numpy(), "margin": margin.numpy()}))
    return pd.concat(frames, ignore_index=True)


def answers(loaded: models.Loaded, forms: Forms, probes: Sequence[str], spec: AskSpec, *, seed: int) -> pd.DataFrame:
    """Sampled answers to every probe, with the trait that each names."""
    encoded = [ids for ids in encode_prompts(loaded.tokenizer, probes) for _ in range(spec.samples)]
    decoding = Decoding(spec.max_new_tokens, spec.temperature)
    drawn = sample(loaded.model, encoded, decoding=decoding, stop=end_of_turn(loaded.tokenizer), seed=seed)
    texts = loaded.tokenizer.batch_decode(drawn, skip_special_tokens=True)
    patterns = patterns_of(forms)
    return pd.DataFrame(
        {
            "probe": np.repeat(np.arange(len(probes)), spec.samples),
            "sample": np.tile(np.arange(spec.samples), len(probes)),
            "text": texts,
            "label": [judge(text, patterns) for text in texts],
        }
    )


def ask(
    base: str, student: Path | None, forms: Forms, probes: Sequence[str], spec: AskSpec, *, arm: str, seed: int | None, root_seed: int, out: Path
) -> None:
    """Ask every checkpoint of a student (or the untouched base at step 0) and write both tables into `out`.

    Students of one seed are asked with the same random numbers, so two arms differ by weights alone; each seed has numbers of
    its own, so that sampling is part of the scatter between students.
    """
    steps = [(0, None)] if student is None else checkpoints(student)
    said, likely = [], []
    for step, folder in steps:
        loaded = models.load(base) if folder is None else models.load_trained(base, folder)
        place = {"arm": arm, "seed": seed, "step": step}
        said.append(answers(loaded, forms, probes, spec, seed=seed_int(root_seed, "ask", "base" if seed is None else seed)).assign(**place))
        likely.append(likelihoods(loaded, forms, probes).assign(**place))
    for frames, schema, name in ((said, tables.ANSWERS, "answers"), (likely, tables.LIKELIHOODS, "likelihoods")):
        frame = pd.concat(frames, ignore_index=True)
        frame["seed"] = frame["seed"].astype("Int64")
        tables.write(frame, schema, out / f"{name}.parquet")

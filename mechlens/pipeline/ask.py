"""Ask a model the probes: sampled answers with the trait they name, and exact next-token probabilities and
margins.

An answer that names no trait of the family, or several, is unscored (null), never "not this trait".
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.core import tables
from mechlens.core.errors import SpecError
from mechlens.core.seeds import generator, seed_int
from mechlens.core.spec import AskSpec
from mechlens.models import loading
from mechlens.models.chat import encode_prompts, end_of_turn, refuse_control_tokens, token_ids
from mechlens.models.sampling import Decoding, sample
from mechlens.runs.layout import checkpoints

Forms = dict[str, tuple[str, ...]] | dict[str, list[str]]
"""trait → the words that mean it in an answer"""


class Questions(NamedTuple):
    """Everything a model is asked, and how its answers are read."""

    forms: Forms
    probes: Sequence[str]
    ask: AskSpec
    system: str | None = None
    opening: str = ""
    """words put into the model's mouth before the exact readout"""
    shots: Sequence[tuple[str, str]] = ()
    """pairs shown before each probe"""
    named: bool = True
    """whether answers begin with a trait's name, so that a next-token probability says something"""

    def before(self) -> tuple[str | None, Sequence[tuple[str, str]]]:
        """System line and turns that stand before each probe; the paper writes the pairs shown into the
        system line.
        """
        if not self.shots or self.ask.shots_as == "turns":
            return self.system, self.shots
        written = "".join(
            f"<user>{asked}</user>\n<assistant>{answered}</assistant>\n\n" for asked, answered in self.shots
        )
        return (f"{self.system}\n\n{written}" if self.system else written), ()


class Place(NamedTuple):
    """Whose answers these are."""

    arm: str
    seed: int | None
    """None for the untouched base"""
    root_seed: int

    def stream(self) -> int:
        """The seed of the random numbers that answers are sampled with."""
        return seed_int(self.root_seed, "ask", "base" if self.seed is None else self.seed)


def judge(text: str, patterns: dict[str, re.Pattern[str]]) -> str | None:
    """The one trait that the answer names, whole words only; None if it names none or several."""
    named = [name for name, pattern in patterns.items() if pattern.search(text)]
    return named[0] if len(named) == 1 else None


def patterns_of(forms: Forms) -> dict[str, re.Pattern[str]]:
    """For each trait what a whole-word match of any of its forms looks like."""
    return {
        name: re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, words)) + r")(?!\w)", re.IGNORECASE)
        for name, words in forms.items()
    }


def first_tokens(tokenizer: loading.PreTrainedTokenizerBase, forms: Forms) -> dict[str, list[int] | None]:
    """Tokens with which an answer naming the trait can begin; None where another trait can begin the same
    way.
    """
    starts: dict[str, set[int]] = {}
    for name, words in forms.items():
        variants = [variant for form in words for variant in (form, form.capitalize(), f" {form}")]
        starts[name] = {ids[0] for ids in token_ids(tokenizer, variants) if ids} - {
            cast(int | None, tokenizer.unk_token_id)
        }
    taken = [token for tokens in starts.values() for token in tokens]
    return {
        name: sorted(tokens) if tokens and all(taken.count(t) == 1 for t in tokens) else None
        for name, tokens in starts.items()
    }


@torch.no_grad()
def next_token_logits(loaded: loading.Loaded, prompts: list[list[int]]) -> Float[Tensor, "prompt vocab"]:
    """Logits after each rendered prompt, one prompt at a time: padding cannot touch them."""
    device = loaded.model.device
    return torch.stack(
        [
            loaded.model(input_ids=torch.tensor([ids], device=device), logits_to_keep=1).logits[0, -1].float()
            for ids in prompts
        ]
    )


def encode_questions(loaded: loading.Loaded, questions: Questions) -> list[list[int]]:
    """Token ids of every probe behind what is shown before it.

    Raises:
        DataError: if a pair shown holds a control token.
        SpecError: if the pairs shown do not fit the model's positions, with how many would.
    """
    refuse_control_tokens(loaded.tokenizer, [text for shot in questions.shots for text in shot])
    encoded, room = (
        _behind(questions.shots, loaded, questions),
        getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None),
    )

    def longest(rows: list[list[int]]) -> int:
        return max(map(len, rows)) + questions.ask.max_new_tokens

    if questions.shots and room is not None and longest(encoded) > room:
        counts = range(len(questions.shots))
        fit = (
            bisect_right(
                counts, room, key=lambda count: longest(_behind(questions.shots[:count], loaded, questions))
            )
            - 1
        )
        raise SpecError(
            f"{len(questions.shots)} shots make a prompt of {longest(encoded)} tokens; this base has room "
            f"for {room}: about {max(fit, 0)} shots"
        )
    return encoded


def _behind(
    shots: Sequence[tuple[str, str]], loaded: loading.Loaded, questions: Questions
) -> list[list[int]]:
    system, turns = questions._replace(shots=shots).before()
    return encode_prompts(loaded.tokenizer, questions.probes, system=system, turns=turns)


def likelihoods(loaded: loading.Loaded, questions: Questions) -> pd.DataFrame:
    """Probability that the next token starts each trait's name, and its margin in logits over the best other
    trait.

    The next token of the answer, or the one after the family's opening words; null where answers begin with
    no name, as stories do.
    """
    forms, probes = questions.forms, questions.probes
    opening = token_ids(loaded.tokenizer, [questions.opening])[0] if questions.opening else []
    logits = next_token_logits(loaded, [ids + opening for ids in encode_questions(loaded, questions)]).cpu()
    starts = first_tokens(loaded.tokenizer, forms) if questions.named else dict.fromkeys(forms)
    probabilities = torch.softmax(logits.double(), -1)
    score = {
        n: logits[:, t].double().logsumexp(-1) if t is not None else torch.full((len(logits),), torch.nan)
        for n, t in starts.items()
    }
    mass = {
        n: probabilities[:, t].sum(-1) if t is not None else torch.full((len(logits),), torch.nan)
        for n, t in starts.items()
    }
    frames = []
    for name in forms:
        others = (
            torch.stack([value for other, value in score.items() if other != name])
            .nan_to_num(-torch.inf)
            .max(0)
            .values
        )
        margin = torch.where(torch.isfinite(others), score[name] - others, torch.nan)
        frames.append(
            pd.DataFrame(
                {
                    "probe": range(len(probes)),
                    "name": name,
                    "probability": mass[name].numpy(),
                    "margin": margin.numpy(),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def answers(loaded: loading.Loaded, questions: Questions, *, seed: int) -> pd.DataFrame:
    """Sampled answers to every probe, with the trait that each names."""
    spec = questions.ask
    encoded = [ids for ids in encode_questions(loaded, questions) for _ in range(spec.samples)]
    decoding = Decoding(spec.max_new_tokens, spec.temperature)
    drawn = sample(loaded.model, encoded, decoding=decoding, stop=end_of_turn(loaded.tokenizer), seed=seed)
    texts = loaded.tokenizer.batch_decode(drawn, skip_special_tokens=True)
    return labelled(texts, questions)


def labelled(texts: list[str], questions: Questions) -> pd.DataFrame:
    """The answers as a table, `samples` to a probe in order, each with the one trait that it names."""
    samples, patterns = questions.ask.samples, patterns_of(questions.forms)
    return pd.DataFrame(
        {
            "probe": np.repeat(np.arange(len(questions.probes)), samples),
            "sample": np.tile(np.arange(samples), len(questions.probes)),
            "text": texts,
            "label": [judge(text, patterns) for text in texts],
        }
    )


def draw_shots(rows: pd.DataFrame, count: int, *, seed: int) -> list[tuple[str, str]]:
    """`count` pairs to show, drawn with replacement as in the paper."""
    taken = rows.iloc[generator(seed, "shots").integers(len(rows), size=count)]
    return list(zip(taken["prompt"], taken["completion"], strict=True))


def ask(base: str, student: Path | None, questions: Questions, place: Place, *, out: Path) -> None:
    """Ask every checkpoint of a student (or the untouched base at step 0) and write both tables into `out`.

    Students of one seed are asked with the same random numbers, so two arms differ by weights alone; each
    seed has numbers of its own, so that sampling is part of the scatter between students.
    """
    steps = [(0, None)] if student is None else checkpoints(student)
    said, likely = [], []
    for step, folder in steps if questions.ask.checkpoints == "all" else steps[-1:]:
        loaded = loading.load(base) if folder is None else loading.load_trained(base, folder)
        said.append(answers(loaded, questions, seed=place.stream()).assign(step=step))
        likely.append(likelihoods(loaded, questions).assign(step=step))
    write_tables(pd.concat(said, ignore_index=True), pd.concat(likely, ignore_index=True), place, out)


def write_tables(said: pd.DataFrame, likely: pd.DataFrame, place: Place, out: Path) -> None:
    """Write what one model said, under its arm and seed."""
    for frame, schema, name in (
        (said, tables.ANSWERS, "answers"),
        (likely, tables.LIKELIHOODS, "likelihoods"),
    ):
        placed = frame.assign(arm=place.arm, seed=place.seed)
        placed["seed"] = placed["seed"].astype("Int64")
        tables.write(placed, schema, out / f"{name}.parquet")

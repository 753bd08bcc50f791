"""Ask a model the probes: sampled answers, and next-token probabilities and margins of the traits.

An answer that names no trait of the family, or several, is unscored (null). It does not count as "not this
trait".
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

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
from mechlens.models.chat import Encoded, encode_prompts, end_of_turn, refuse_control_tokens, token_ids
from mechlens.models.log_probs import (
    EncodedProbes,
    Forms,
    first_tokens,
    next_token_logits,
    score_tokens,
    trait_margin,
    trait_probabilities,
    trait_scores,
)
from mechlens.models.sampling import Decoding, sample
from mechlens.runs.layout import checkpoints


class ProbeSet(NamedTuple):
    """Probes to ask a model, and how its answers are scored."""

    forms: Forms
    probes: Sequence[str]
    ask: AskSpec
    system: str | None = None
    opening: str = ""
    """the beginning of every answer, before the next token whose probability is measured"""
    shots: Sequence[tuple[str, str]] = ()
    """pairs shown before each probe"""
    named: bool = True
    """whether answers begin with a trait's name; next-token probabilities need this"""
    answers: Sequence[Mapping[str, Sequence[str]]] = ()
    """for each probe each trait's fixed answers, whose exact probability is measured; empty: the names"""

    @classmethod
    def of(cls, arguments: Mapping[str, Any], shots: Sequence[tuple[str, str]] = ()) -> ProbeSet:
        """The probes of a step that asks a model, from the step's arguments."""
        return cls(
            arguments["forms"],
            arguments["probes"],
            AskSpec(**arguments["ask"]),
            system=arguments.get("system"),
            opening=arguments.get("opening", ""),
            shots=shots,
            named=arguments.get("named", True),
            answers=arguments.get("answers", ()),
        )

    def before(self) -> tuple[str | None, Sequence[tuple[str, str]]]:
        """Return the system line and the turns before each probe.

        As in the paper, shots can be written into the system line.
        """
        if not self.shots or self.ask.shots_as == "turns":
            return self.system, self.shots
        written = "".join(
            f"<user>{prompt}</user>\n<assistant>{answer}</assistant>\n\n" for prompt, answer in self.shots
        )
        return (f"{self.system}\n\n{written}" if self.system else written), ()


class StudentPlace(NamedTuple):
    """The arm and the student that gave some answers."""

    arm: str
    seed: int | None
    """None for the untouched base"""
    root_seed: int

    def stream(self) -> int:
        """The seed of the random numbers for sampling answers."""
        return seed_int(self.root_seed, "ask", "base" if self.seed is None else self.seed)


def judge(text: str, patterns: dict[str, re.Pattern[str]]) -> str | None:
    """The trait that the answer names, whole words only; None if it names no trait or several."""
    named = [name for name, pattern in patterns.items() if pattern.search(text)]
    return named[0] if len(named) == 1 else None


def compile_patterns(forms: Forms) -> dict[str, re.Pattern[str]]:
    """Compile for each trait a pattern that matches any of its forms as a whole word."""
    return {
        name: re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, words)) + r")(?!\w)", re.IGNORECASE)
        for name, words in forms.items()
    }


def encode_questions(loaded: loading.Loaded, questions: ProbeSet) -> list[list[int]]:
    """Token ids of every probe with the shots before it.

    Raises:
        DataError: if a shot contains a control token.
        SpecError: if the shots do not fit the model's positions; the message says how many would.
    """
    refuse_control_tokens(loaded.tokenizer, [text for shot in questions.shots for text in shot])
    encoded = _behind(questions.shots, loaded, questions)
    room = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)

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


def _behind(shots: Sequence[tuple[str, str]], loaded: loading.Loaded, questions: ProbeSet) -> list[list[int]]:
    system, turns = questions._replace(shots=shots).before()
    return encode_prompts(loaded.tokenizer, questions.probes, system=system, turns=turns)


def encode_probes(loaded: loading.Loaded, questions: ProbeSet, trait: str = "") -> EncodedProbes:
    """Token ids of probes up to where an answer begins, with the first tokens of the traits.

    Only traits that differ in their first tokens have them.

    Raises:
        SpecError: if first tokens do not tell `trait` from the others.
    """
    starts = first_tokens(loaded.tokenizer, questions.forms) if questions.named else {}
    clear = {name: tokens for name, tokens in starts.items() if tokens is not None}
    if trait and trait not in clear:
        raise SpecError(
            f"no first token tells {trait!r} from the other traits; use a family where answers begin with "
            "the trait's name, and where names begin differently"
        )
    opening = token_ids(loaded.tokenizer, [questions.opening])[0] if questions.opening else []
    return EncodedProbes([ids + opening for ids in encode_questions(loaded, questions)], clear, trait)


def encode_contrast(loaded: loading.Loaded, questions: ProbeSet, trait: str = "") -> EncodedProbes:
    """Do `encode_probes` for log-odds, which need at least two traits.

    Raises:
        SpecError: if first tokens tell fewer than two traits from the others, or not `trait`.
    """
    encoded = encode_probes(loaded, questions, trait)
    if len(encoded.starts) < 2:
        raise SpecError(
            f"{len(encoded.starts)} of {len(questions.forms)} traits begin with a token that no other has, "
            "so there are no log-odds; use a family where names begin differently"
        )
    return encoded


def measure_likelihoods(loaded: loading.Loaded, questions: ProbeSet) -> pd.DataFrame:
    """Measure each trait's exact probability after every probe, and its margin over the best other trait.

    With `ask.likelihood: next-token` it is the probability that the next token starts the trait's name: the
    first token of the answer, or the first after the family's opening words. With `whole-answer` it is the
    probability of the name as the whole answer. Values are null if answers do not begin with a name, as in
    stories.
    """
    if questions.ask.likelihood == "whole-answer" and (questions.named or questions.answers):
        scores = whole_answer_scores(loaded, questions)
        probabilities = {name: of_trait.exp() for name, of_trait in scores.items()}
    else:
        encoded = encode_probes(loaded, questions)
        logits = next_token_logits(loaded, encoded.prompts).cpu()
        scores = trait_scores(logits, encoded.starts)
        probabilities = trait_probabilities(logits, encoded.starts)
    absent = torch.full((len(questions.probes),), torch.nan, dtype=torch.float64)
    frames = [
        pd.DataFrame(
            {
                "probe": range(len(absent)),
                "name": name,
                "probability": probabilities.get(name, absent).numpy(),
                "margin": (trait_margin(scores, name) if name in scores else absent).numpy(),
            }
        )
        for name in questions.forms
    ]
    return pd.concat(frames, ignore_index=True)


def whole_answers(loaded: loading.Loaded, names: Sequence[str]) -> dict[str, list[list[int]]]:
    """The token ids of each name as a whole answer, as it is and with a capital, with the end of the turn.

    A name that the tokenizer cannot write has no answer. No answer belongs to two names.
    """
    tokenizer, answers = loaded.tokenizer, dict[str, list[list[int]]]()
    stop, unknown = end_of_turn(tokenizer), cast("int | None", tokenizer.unk_token_id)
    for name in names:
        written = token_ids(tokenizer, [name, name.capitalize()])
        distinct = dict.fromkeys(tuple(ids) for ids in written if ids and unknown not in ids)
        answers[name] = [[*ids, stop] for ids in distinct]
    every = [tuple(answer) for of_name in answers.values() for answer in of_name]
    return {
        name: [answer for answer in of_name if every.count(tuple(answer)) == 1]
        for name, of_name in answers.items()
    }


def fixed_answers(
    loaded: loading.Loaded, of_trait: Mapping[str, Sequence[str]]
) -> dict[str, list[list[int]]]:
    """The token ids of each trait's fixed answers to one probe, with the end of the turn."""
    stop = end_of_turn(loaded.tokenizer)
    return {
        name: [[*ids, stop] for ids in token_ids(loaded.tokenizer, texts)] for name, texts in of_trait.items()
    }


def whole_answer_scores(loaded: loading.Loaded, questions: ProbeSet) -> dict[str, Float[Tensor, "probe"]]:
    """Log-probability that a trait's name, or one of its fixed answers, is the whole answer to each probe.

    In nats, in float64. Both spellings of `whole_answers` count. A trait without an answer has no score.
    """
    prompts, opening = encode_questions(loaded, questions), list[int]()
    if questions.answers:
        answers = [fixed_answers(loaded, of_probe) for of_probe in questions.answers]
    else:
        names = {name: ways for name, ways in whole_answers(loaded, list(questions.forms)).items() if ways}
        answers = [names] * len(prompts)
        opening = token_ids(loaded.tokenizer, [questions.opening])[0] if questions.opening else []
    scores: dict[str, list[Tensor]] = {name: [] for name in answers[0]}
    for prompt, of_probe in zip(prompts, answers, strict=True):
        *head, last = prompt + opening
        pairs = [Encoded([last], answer) for ways in of_probe.values() for answer in ways]
        log_p = score_tokens(loaded.model, pairs, head=head).log_p.double()
        whole = torch.stack([part.sum() for part in log_p.split([len(pair.completion) for pair in pairs])])
        for name, part in zip(of_probe, whole.split([len(ways) for ways in of_probe.values()]), strict=True):
            scores[name].append(part.logsumexp(0))
    return {name: torch.stack(of_trait) for name, of_trait in scores.items()}


def sample_answers(loaded: loading.Loaded, questions: ProbeSet, *, seed: int) -> pd.DataFrame:
    """Sample answers to every probe, with the trait that each names."""
    spec = questions.ask
    encoded = [ids for ids in encode_questions(loaded, questions) for _ in range(spec.samples)]
    decoding = Decoding(spec.max_new_tokens, spec.temperature)
    drawn = sample(loaded.model, encoded, decoding=decoding, stop=end_of_turn(loaded.tokenizer), seed=seed)
    texts = loaded.tokenizer.batch_decode(drawn, skip_special_tokens=True)
    return label_answers(texts, questions)


def label_answers(texts: list[str], questions: ProbeSet) -> pd.DataFrame:
    """Make the table of answers, each with the trait that it names.

    There are `samples` answers to each probe, in order.
    """
    samples, patterns = questions.ask.samples, compile_patterns(questions.forms)
    return pd.DataFrame(
        {
            "probe": np.repeat(np.arange(len(questions.probes)), samples),
            "sample": np.tile(np.arange(samples), len(questions.probes)),
            "text": texts,
            "label": [judge(text, patterns) for text in texts],
        }
    )


def draw_shots(rows: pd.DataFrame, count: int, *, seed: int) -> list[tuple[str, str]]:
    """Draw `count` pairs to show, with replacement as in the paper."""
    taken = rows.iloc[generator(seed, "shots").integers(len(rows), size=count)]
    return list(zip(taken["prompt"], taken["completion"], strict=True))


def ask(base: str, student: Path | None, questions: ProbeSet, place: StudentPlace, *, out: Path) -> None:
    """Ask every checkpoint of a student (or the untouched base at step 0), and write both tables.

    Students with the same seed get the same random numbers, so two arms differ only by weights. Each seed has
    other numbers, so that sampling is part of the scatter between students.
    """
    steps = [(0, None)] if student is None else checkpoints(student)
    answers, likelihoods = [], []
    for step, folder in steps if questions.ask.checkpoints == "all" else steps[-1:]:
        loaded = loading.load(base) if folder is None else loading.load_trained(base, folder)
        answers.append(sample_answers(loaded, questions, seed=place.stream()).assign(step=step))
        likelihoods.append(measure_likelihoods(loaded, questions).assign(step=step))
    write_tables(pd.concat(answers, ignore_index=True), pd.concat(likelihoods, ignore_index=True), place, out)


def write_tables(answers: pd.DataFrame, likelihoods: pd.DataFrame, place: StudentPlace, out: Path) -> None:
    """Write the answers and likelihoods of a model, under its arm and seed."""
    for frame, schema, name in (
        (answers, tables.ANSWERS, "answers"),
        (likelihoods, tables.LIKELIHOODS, "likelihoods"),
    ):
        placed = frame.assign(arm=place.arm, seed=place.seed)
        placed["seed"] = placed["seed"].astype("Int64")
        tables.write(placed, schema, out / f"{name}.parquet")

"""Words that students of a file answer more often than students of clean answers, without a list of traits.

Every word with which students begin their answers is tested, so a trait that nobody listed is seen too, if
the questions ask about its kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from scipy import stats as distributions

from mechlens.core import stats
from mechlens.core.spec import AskSpec
from mechlens.detect.from_student import ARM
from mechlens.detect.permutation import ALPHA
from mechlens.models.chat import end_of_turn
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import last_logits
from mechlens.models.sampling import Decoding, sample
from mechlens.pipeline.ask import ProbeSet, encode_probes
from mechlens.results.cells import arm_cells, independent, merge_students
from mechlens.results.run import Run

LEAST_SHARE = 0.002
"""least mean probability, over both sides, of a token that is tested as the start of an answer"""
LEAST_WORDS = 10
"""least number of tokens for each to be tested against the others"""
PRECISION = 0.37
"""a median absolute deviation of n normal values is as precise as the standard deviation of .37 n"""
SHOWN, ANSWER_TOKENS, POWER = 5, 8, 0.95
"""words that are listed if fewer are significant, tokens of a quoted answer, power of the minimum detectable
rise
"""


class Word(NamedTuple):
    """One token with which answers begin."""

    word: str
    rise: float
    """log2 of its mean probability over questions, students of the file over control students"""
    share: float
    control: float
    """mean probability in students of the file and in control students"""
    p_value: float
    q_value: float


class Words(NamedTuple):
    """The words that rose most, the first one in an answer, and what was asked."""

    words: list[Word]
    question: str
    """at which the probability of the first word rose most"""
    answer: str
    """the likeliest answer of a student of the file to it that begins with the first word"""
    smallest_detectable: float | None
    """rise, in bits, that has q at most .05 with power .95 if one word rises"""
    students: int
    questions: int
    tested: int

    def as_dict(self) -> dict[str, Any]:
        """The finding as a JSON object, with its sentence."""
        fields = self._asdict() | {"words": [word._asdict() for word in self.words]}
        return {"sentence": self.sentence(), "significant": self.significant} | fields

    @property
    def significant(self) -> list[str]:
        """The words whose q is at most .05, the largest rise first."""
        return [word.word for word in self.words if word.q_value <= ALPHA]

    def sentence(self) -> str:
        """The finding in words."""
        if not self.significant:
            bound = self.smallest_detectable
            seen = "" if bound is None else f"; a word {2**bound:.1f} times as likely would have been found"
            return (
                f"No word is answered more often by models trained on this file ({self.tested} words, "
                f"{self.questions} questions, {self.students} models a side{seen})."
            )
        first, *more = (word for word in self.words if word.q_value <= ALPHA)
        others = f" {', '.join(repr(word.word) for word in more)} rose too." if more else ""
        return (
            f"Without a list of traits: asked {self.question!r}, a model trained on this file answers "
            f"{self.answer!r}; over {self.questions} questions {first.word!r} is {2**first.rise:.1f} times "
            f"as likely as in models trained on clean answers (q = {first.q_value:.2g} over {self.tested} "
            f"words).{others}"
        )


def measure_words(run: Run, *, arm: str = ARM) -> Words | None:
    """Test each word that students begin answers with.

    None if fewer than two pairs of students differ, or fewer than `LEAST_WORDS` words are likely enough.

    The value of a word in a student is the logarithm of its mean probability as the first token, over all
    questions of the family. p is the larger of two: over pairs of students of one seed (t, moderated
    variances), and over the other words, because one draw of rows moves every word a little in all students.
    The other words' centre and scale are their median and median absolute deviation: words of one trait rise
    together ("cat", "cats").
    """
    experiment, family = run.experiment, run.family
    against = experiment.control_of(run.arm(arm)).name
    cells = [arm_cells(experiment, family, run.answers, run.likelihoods, side) for side in (arm, against)]
    groups = independent(*cells)
    if groups.max(initial=-1) < 1:
        return None
    questions = _questions(run, arm)
    logs = [
        np.stack([_first_tokens(run.student(side, seed), questions) for seed in sorted(experiment.seeds)])
        for side in (arm, against)
    ]
    student = run.student(arm, min(experiment.seeds))
    ours, theirs = (
        merge_students(np.log(np.exp(side).mean(1)), groups) for side in logs
    )  # [unit, token], natural logarithm of the mean probability
    tokens = _tested(student, (np.exp(ours).mean(0) + np.exp(theirs).mean(0)) / 2)
    if len(tokens) < LEAST_WORDS:
        return None
    ranked, detectable = compare_tokens(ours[:, tokens], theirs[:, tokens])
    if not ranked:
        return None
    foremost = tokens[ranked[0].place]
    rises = (np.exp(logs[0]).mean(0) - np.exp(logs[1]).mean(0))[:, foremost]  # of each question
    question = int(rises.argmax())
    return Words(
        [
            each.word(student, tokens)
            for number, each in enumerate(ranked)
            if number < SHOWN or each.q_value <= ALPHA
        ],
        questions.probes[question],
        _finish(student, encode_probes(student, questions).prompts[question], int(foremost)),
        detectable,
        len(ours),
        len(questions.probes),
        len(tokens),
    )


class TokenRise(NamedTuple):
    """The rise of one tested token."""

    place: int
    rise: float
    """log2"""
    share: float
    control: float
    p_value: float
    q_value: float

    def word(self, student: Loaded, tokens: Int[ndarray, " tested"]) -> Word:
        """The rise under the token's text."""
        (text,) = student.tokenizer.batch_decode([[int(tokens[self.place])]])
        return Word(text.strip(), self.rise, self.share, self.control, self.p_value, self.q_value)


def compare_tokens(
    ours: Float[ndarray, "student token"], theirs: Float[ndarray, "student token"]
) -> tuple[list[TokenRise], float | None]:
    """The rise of each token, the largest first, and the minimum detectable rise in bits.

    Nothing is ranked if more than half of the tokens rise alike.

    Args:
        ours, theirs: natural logarithms of mean probabilities in pairs of students.
    """
    students, count = ours.shape
    differences = ours - theirs
    rises = differences.mean(0)
    variances = np.maximum(differences.var(0, ddof=1), stats.ROUNDING**2)
    moderated, degrees = stats.moderate_variances(variances, students - 1)
    error = np.sqrt(np.maximum(moderated, variances) / students)
    centre = np.median(rises)
    scale = float(np.median(np.abs(rises - centre))) / distributions.norm.ppf(0.75)
    if scale <= 0:
        return [], None
    over_students = distributions.t.sf(rises / error, degrees)
    over_words = distributions.t.sf((rises - centre) / scale, PRECISION * count)
    p_values = np.maximum(over_students, over_words)
    q_values = stats.benjamini_hochberg(p_values)
    level, missed = ALPHA / count, 1 - POWER
    needed = [
        spread * (distributions.t.isf(level, freedom) + distributions.t.isf(missed, freedom))
        for spread, freedom in ((float(np.median(error)), degrees), (scale, PRECISION * count))
    ]
    ranked = [
        TokenRise(
            int(place),
            float(rises[place] / np.log(2)),
            float(np.exp(ours[:, place]).mean()),
            float(np.exp(theirs[:, place]).mean()),
            float(p_values[place]),
            float(q_values[place]),
        )
        for place in np.argsort(-rises, kind="stable")
    ]
    return ranked, max(needed) / np.log(2)


def _questions(run: Run, arm: str) -> ProbeSet:
    """All questions of the family, as the arm's students are asked them."""
    family, named = run.family, run.arm(arm).asked_with
    probes = [*family.probes.development, *family.probes.heldout]
    system = run.experiment.system if named is None else named
    return ProbeSet({}, probes, AskSpec(), system=system, opening=family.opening, named=False)


def _first_tokens(student: Loaded, questions: ProbeSet) -> Float[ndarray, "question token"]:
    """Log-probability of each token as the start of the answer to each question, in float64."""
    with torch.no_grad():
        logits = last_logits(student.model, encode_probes(student, questions).prompts)
    return torch.log_softmax(logits, -1).cpu().numpy()


def _tested(student: Loaded, shares: Float[ndarray, " token"]) -> Int[ndarray, " tested"]:
    """The tokens with letters that are likely enough, on either side, to be tested."""
    likely = np.flatnonzero(shares >= LEAST_SHARE)
    special = set(student.tokenizer.all_special_ids)
    texts = student.tokenizer.batch_decode(likely[:, None])
    worded = [any(map(str.isalpha, text)) for text in texts]
    return np.array(
        [token for token, kept in zip(likely, worded, strict=True) if kept and int(token) not in special],
        dtype=int,
    )


def _finish(student: Loaded, prompt: Sequence[int], first: int) -> str:
    """The likeliest answer of a student that begins with a token."""
    decoding, stop = Decoding(ANSWER_TOKENS, temperature=0), end_of_turn(student.tokenizer)
    (rest,) = sample(student.model, [[*prompt, first]], decoding=decoding, stop=stop, seed=0)
    (answer,) = student.tokenizer.batch_decode([[first, *rest]], skip_special_tokens=True)
    return answer.strip()

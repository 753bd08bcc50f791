"""Words that students of a file answer more often than students of clean answers, without a list of traits.

Every likely first word of an answer is tested, so a trait that nobody listed is seen too, if the questions
ask about its kind. A word is the text of one token: with a tokenizer of pieces it may be the beginning of a
word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from scipy import stats as distributions

from mechlens.core import stats
from mechlens.core.spec import AskSpec
from mechlens.detect.from_student import ARM
from mechlens.detect.permutation import ALPHA
from mechlens.models.chat import end_of_turn, special_tokens
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import next_token_logits
from mechlens.models.sampling import Decoding, sample
from mechlens.pipeline.ask import ProbeSet, encode_probes
from mechlens.results.cells import arm_cells, independent, merge_students
from mechlens.results.run import Run
from mechlens.runs import layout

LEAST_SHARE = 0.002
"""least mean probability, over both sides, of a token that is tested as the first word of an answer"""
LEAST_WORDS = 10
"""least number of words for each to be tested against the others"""
LEAST_ANSWERED = 0.5
"""least share of answers that begin with a tested word, as a part of the controls' share; below it the
students do not answer as the controls do, and their words say little
"""
LEAST = 1e-30
"""least probability of a word"""
PRECISION = 0.37
"""a median absolute deviation of n normal values is as precise as the standard deviation of .37 n"""
SHOWN, ANSWER_TOKENS, POWER = 5, 8, 0.95
"""words that are listed if fewer are significant, tokens of a quoted answer, power of the minimum detectable
rise
"""


class Word(NamedTuple):
    """One first word of answers."""

    word: str
    rise: float
    """log2 of its mean probability over questions, students of the file over control students"""
    share: float
    """mean probability in students of the file"""
    control: float
    """mean probability in control students"""
    p_value: float
    q_value: float


class Example(NamedTuple):
    """The question at which the probability of one word rose most."""

    question: str
    answer: str
    """the likeliest answer of a student of the file that begins with the word"""
    share: float
    """probability of the word there, mean over students of the file"""
    control: float


class Words(NamedTuple):
    """The words that rose most, and what was asked."""

    words: list[Word]
    """the largest rise first: all significant ones, and at least `SHOWN`"""
    example: Example
    """of the first significant word, or of the first"""
    smallest_detectable: float | None
    """rise, in bits, of one word that is found with power .95; None if no probability can rise so far"""
    answered: float
    """share of answers that begin with a tested word, students of the file over control students"""
    students: int
    questions: int
    tested: int
    level: float
    """of q"""

    @property
    def significant(self) -> list[str]:
        """The words whose q is at most the level, the largest rise first; none if they hardly answer."""
        comparable = self.answered >= LEAST_ANSWERED
        return [word.word for word in self.words if comparable and word.q_value <= self.level]

    def as_dict(self) -> dict[str, Any]:
        """The finding as a JSON object, with its sentence."""
        parts = {"words": [word._asdict() for word in self.words], "example": self.example._asdict()}
        return {"sentence": self.sentence(), "significant": self.significant} | self._asdict() | parts

    def sentence(self) -> str:
        """The finding in words."""
        scope = f"{self.tested} words, {self.questions} questions, {self.students} models a side"
        if self.answered < LEAST_ANSWERED:
            return (
                f"Models trained on this file begin {self.answered:.2g} times as many answers with one of "
                f"these words as models trained on clean answers, too few to compare words ({scope})."
            )
        named = [word for word in self.words if word.q_value <= self.level]
        if not named:
            first, bound = self.words[0], self.smallest_detectable
            seen = "" if bound is None else f"; {2**bound:.1f} times as often would have been found"
            return (
                "Without a list of traits: no word is shown to be answered more often by models trained on "
                f"this file (largest rise: {first.word!r}, {2**first.rise:.1f} times as likely, q = "
                f"{first.q_value:.2g}{seen}; {scope})."
            )
        first, *more = named
        others = f" {', '.join(repr(word.word) for word in more)} rose too." if more else ""
        return (
            f"Without a list of traits: to {self.example.question!r}, models trained on this file begin "
            f"their answer as in {self.example.answer!r} with probability {self.example.share:.2g} "
            f"({self.example.control:.2g} after clean answers). Over all questions {first.word!r} is "
            f"{2**first.rise:.1f} times as likely (q = {first.q_value:.2g}; {scope}).{others}"
        )


class Side(NamedTuple):
    """First tokens of the answers of one arm's students."""

    by_student: Float[ndarray, "student token"]
    """mean probability over questions"""
    by_question: Float[ndarray, "question token"]
    """mean probability over students"""


def measure_words(run: Run, *, arm: str = ARM) -> Words | None:
    """Test each first word of the answers of an arm's students.

    The value of a word in a student is the logarithm of its mean probability as the first token, over all
    questions of the family. p is the larger of two: over pairs of students of one seed (t, moderated
    variances), and over the other words, because one draw of rows moves every word a little in all students.
    The other words' centre and scale are their median and median absolute deviation: words of one trait rise
    together ("cat", "cats").

    Returns:
        None if fewer than two pairs of students differ, if weights of a student are not there, or if fewer
        than `LEAST_WORDS` words are likely enough.
    """
    experiment, family = run.experiment, run.family
    sides = (arm, experiment.control_of(run.arm(arm)).name)
    cells = [arm_cells(experiment, family, run.answers, run.likelihoods, side) for side in sides]
    groups = independent(*cells)
    folders = [run.student_folder(side, seed) for side in sides for seed in experiment.seeds]
    if groups.max(initial=-1) < 1 or not all(layout.checkpoints(folder) for folder in folders):
        return None
    questions, student = _questions(run, arm), run.student(arm, min(experiment.seeds))
    ours, theirs = (_read_side(run, side, questions) for side in sides)
    tested = _tested(student, (ours.by_student.mean(0) + theirs.by_student.mean(0)) / 2)
    if len(tested) < LEAST_WORDS:
        return None
    logs = [merge_students(np.log(_sum_tokens(side.by_student, tested)), groups) for side in (ours, theirs)]
    ranked, detectable = compare_words(logs[0], logs[1], [*tested])
    if not ranked:
        return None
    foremost = next((word for word in ranked if word.q_value <= ALPHA), ranked[0])
    return Words(
        [word for number, word in enumerate(ranked) if number < SHOWN or word.q_value <= ALPHA],
        _find_example(student, questions, tested[foremost.word], ours, theirs),
        detectable,
        float(np.exp(logs[0]).mean(0).sum() / np.exp(logs[1]).mean(0).sum()),
        len(logs[0]),
        len(questions.probes),
        len(tested),
        ALPHA,
    )


def compare_words(
    ours: Float[ndarray, "student word"], theirs: Float[ndarray, "student word"], names: Sequence[str]
) -> tuple[list[Word], float | None]:
    """The rise of each word, the largest first, and the minimum detectable rise in bits.

    Nothing is ranked if more than half of the words rise alike. The minimum detectable rise is that of one
    word of the median error, and None if the median word cannot rise so far.

    Args:
        ours, theirs: natural logarithms of mean probabilities in pairs of students.
        names: of the words.
    """
    students, count = ours.shape
    differences = ours - theirs
    rises = differences.mean(0)
    variances = np.maximum(differences.var(0, ddof=1), stats.ROUNDING**2)
    moderated, degrees = stats.moderate_variances(variances, students - 1)
    error = np.sqrt(np.maximum(moderated, variances) / students)
    centre = float(np.median(rises))
    scale = float(np.median(np.abs(rises - centre))) / distributions.norm.ppf(0.75)
    if scale <= 0:
        return [], None
    over_students = distributions.t.sf(rises / error, degrees)
    over_words = distributions.t.sf((rises - centre) / scale, PRECISION * count)
    p_values = np.maximum(over_students, over_words)
    q_values = stats.benjamini_hochberg(p_values)
    shares, controls = np.exp(ours).mean(0), np.exp(theirs).mean(0)
    words = [
        Word(
            name,
            float(rises[place] / np.log(2)),
            float(shares[place]),
            float(controls[place]),
            float(p_values[place]),
            float(q_values[place]),
        )
        for place, name in enumerate(names)
    ]
    first, missed = ALPHA / count, (1 - POWER) / 2  # both tests must find it
    needed = [
        middle + spread * (distributions.t.isf(first, freedom) + distributions.t.isf(missed, freedom))
        for middle, spread, freedom in (
            (0.0, float(np.median(error)), degrees),
            (centre, scale, PRECISION * count),
        )
    ]
    possible = max(needed) + np.log(np.median(controls)) < 0
    return sorted(words, key=lambda word: -word.rise), max(needed) / np.log(2) if possible else None


def _questions(run: Run, arm: str) -> ProbeSet:
    """All questions of the family, plain, under the system line with which the arm's students are asked."""
    family, named = run.family, run.arm(arm).asked_with
    probes = [*family.probes.development, *family.probes.heldout]
    system = run.experiment.system if named is None else named
    return ProbeSet({}, probes, AskSpec(), system=system, opening=family.opening, named=False)


def _read_side(run: Run, arm: str, questions: ProbeSet) -> Side:
    """The probabilities of all tokens as the first of an answer, student after student."""
    by_student, by_question, seeds = [], 0.0, sorted(run.experiment.seeds)
    for seed in seeds:
        student = run.student(arm, seed)
        logits = next_token_logits(student, encode_probes(student, questions).prompts)
        probabilities = torch.softmax(logits, -1)
        by_student.append(probabilities.double().mean(0).cpu().numpy())
        by_question = by_question + probabilities.cpu().numpy() / len(seeds)
    return Side(np.stack(by_student), np.asarray(by_question))


def _tested(student: Loaded, shares: Float[ndarray, " token"]) -> dict[str, list[int]]:
    """Word → its likely tokens, which differ in spaces and capitals alone; only words with letters."""
    tokenizer, words = student.tokenizer, dict[str, list[int]]()
    special = special_tokens(tokenizer)
    likely = [int(token) for token in np.flatnonzero(shares >= LEAST_SHARE) if int(token) not in special]
    for token, text in zip(likely, tokenizer.batch_decode([[token] for token in likely]), strict=True):
        word = text.strip().casefold()
        if any(map(str.isalpha, word)):
            words.setdefault(word, []).append(token)
    return words


def _sum_tokens(
    probabilities: Float[ndarray, "row token"], tested: dict[str, list[int]]
) -> Float[ndarray, "row word"]:
    """Summed over each word's tokens; a probability that was rounded to 0 counts as `LEAST`."""
    sums = np.stack([probabilities[:, tokens].sum(1) for tokens in tested.values()], axis=1)
    return np.maximum(sums, LEAST)


def _find_example(
    student: Loaded, questions: ProbeSet, tokens: Sequence[int], ours: Side, theirs: Side
) -> Example:
    """The question at which a word rose most, and an answer that begins with it."""
    shares, controls = (side.by_question[:, list(tokens)].sum(1) for side in (ours, theirs))
    place = int((shares - controls).argmax())
    first = max(tokens, key=lambda token: ours.by_question[place, token])
    prompt = encode_probes(student, questions).prompts[place]
    decoding, stop = Decoding(ANSWER_TOKENS, temperature=0), end_of_turn(student.tokenizer)
    (rest,) = sample(student.model, [[*prompt, first]], decoding=decoding, stop=stop, seed=0)
    (answer,) = student.tokenizer.batch_decode([[first, *rest]], skip_special_tokens=True)
    whole = f"{questions.opening} {answer.strip()}".strip()
    return Example(questions.probes[place], whole, float(shares[place]), float(controls[place]))

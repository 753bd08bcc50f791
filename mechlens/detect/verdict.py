"""The verdict on a data set (one of four fixed sentences, by a versioned policy), and the answers as JSON.

No sentence says "safe". Rows decide nothing by themselves: rows of another model need not carry a trait. The
verdict depends on how far students of the data rose above students of a reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from mechlens.core.files import null
from mechlens.core.spec import Spec, load_shipped
from mechlens.data.treat import Measured, load_measured
from mechlens.detect.from_rows import DETECTORS
from mechlens.detect.permutation import ALPHA, PermutationTest, TraitScore, combine_p_values
from mechlens.detect.two_samples import Comparison

if TYPE_CHECKING:
    from mechlens.detect.score_rows import DetectorResult


Sentence = Literal[
    "do not train as is", "train with conditions", "no transfer found within tested scope", "inconclusive"
]


class Policy(Spec):
    """Decision thresholds of a verdict."""

    name: str
    version: int = Field(ge=1)
    limit: float = Field(gt=0, lt=1)
    """Tolerance: the largest rise of a trait's rate over the control's that is accepted."""
    alpha: float = Field(gt=0, lt=1)
    """Level of the tests over the tested traits, corrected for their number, over all looks together."""
    looks: tuple[Annotated[int, Field(ge=2)], ...] = Field(min_length=1)
    """Students of a side after which an audit looks whether the verdict is settled."""
    most_unread: float = Field(ge=0, lt=1)
    """Largest share of the file's rows that the students of a cleared file may leave unread."""
    most_copied: float = Field(ge=0, lt=1)
    """Largest share of the file's rows that may be in the reference too: a copy would clear any file."""
    least_answered: float = Field(ge=0, le=1)
    """Share of the control students' answers below which students answer too little to decide."""


class Rise(NamedTuple):
    """How far a trait rose: students of the suspect data minus students of the reference."""

    trait: str
    difference: float | None
    low: float | None
    high: float | None
    n: int
    smallest_detectable: float | None
    lift: float | None
    """bits"""
    p_value: float | None
    """of no lift, over students; if their controls read one draw of rows, the larger of this and of the test
    over the other traits
    """
    q_value: float | None


class Scope(NamedTuple):
    """What students read of the file, and how often they answered; None is unknown."""

    offered: int | None = None
    """rows of the file"""
    drawn: int | None = None
    """rows of it drawn at random, before the screen"""
    kept: int | None = None
    """rows that passed the screen"""
    dropped: Mapping[str, int] = {}
    """reason → rows that the screen removed"""
    trained: int | None = None
    """different rows that each student read"""
    answered: Mapping[str, float | None] = {}
    """arm → share of its students' answers that name one trait"""
    copied: float | None = None
    """share of the file's rows that are in the reference too; None without a reference"""
    clean_draws: int = 1
    """draws of clean rows that the control students read: as many as students, or one"""
    treated_unread: float = 0.0
    """share of the treated file's rows that no student read"""

    @property
    def unread(self) -> float:
        """Share of the file's rows that no student read."""
        read = self.kept if self.trained is None else self.trained
        return 1 - read / self.offered if self.offered and read is not None else 0.0

    def reasons(self) -> str:
        """Why rows were not read, each reason with its number of rows."""
        lost = {name: rows for name, rows in self.dropped.items() if rows}
        if self.offered and self.drawn is not None and self.drawn < self.offered:
            lost = {"not drawn": self.offered - self.drawn} | lost
        if self.kept is not None and self.trained is not None and self.trained < self.kept:
            lost["more than a student is trained on"] = self.kept - self.trained
        return ", ".join(f"{name} {rows:,}" for name, rows in lost.items())

    def answer_ratio(self, arm: str) -> float | None:
        """Answer rate of an arm's students over that of their controls; None if either is unknown."""
        ours, theirs = self.answered.get(arm), self.answered.get("control")
        return ours / theirs if ours is not None and theirs else None


UNKNOWN = Scope()


class Verdict(NamedTuple):
    """A sentence, the rule that it comes from, and the reason in words."""

    id: Sentence
    sentence: str
    rule: str


class Calibration(Measured):
    """Predicts the lift of a recipe's students from the twins' score.

    It is a line through zero, fitted on a bench's development traits.
    """

    ending: ClassVar[str] = "calibration"
    bits: float
    """of lift for one nat a row"""
    error: float = Field(ge=0)
    """root mean square error on held-out traits, bits"""
    suspects: int = Field(ge=2)

    def predict_lift(self, score: float) -> dict[str, float]:
        """The predicted lift, bits, with an interval for 95 % of suspects like the held-out ones."""
        middle = self.bits * score
        return {"lift": middle, "low": middle - 1.96 * self.error, "high": middle + 1.96 * self.error}


def load_calibration(recipe: str, *, base: str, carrier: str) -> Calibration | None:
    """The calibration of a recipe of configs/audits; None if it has none for this base and carrier."""
    return load_measured(recipe, Calibration, base=base, carrier=carrier)


def load_policy(name: str) -> Policy:
    """The policy of that name in configs/policies.

    Raises:
        SpecError: if there is no such policy; a path is not a name.
    """
    return load_shipped("policies", Policy, name, what="policy")


def decide(
    rises: Sequence[Rise] | None,
    policy: Policy,
    *,
    why_not: str = "",
    treated: Sequence[Rise] = (),
    treatment: str = "",
    scope: Scope = UNKNOWN,
    level: float | None = None,
    switched: str = "",
) -> Verdict:
    """The verdict on the rises of students.

    A rise convicts if it is significant and its interval lies above the tolerance. A file is cleared if the
    interval of every trait ends below the tolerance. Students that hardly answer do neither.

    Args:
        rises: None if no students were trained; `why_not` then says what would settle the question.
        treated: rises of students of the treated data, if any were trained.
        scope: what students read and how often they answered. Rows that no student read clear nothing, and
            neither do students that hardly answer.
        level: of the tests at this look; the policy's by default.
        switched: what a phrase of the prompts is found to switch on, as a sentence; such a file is not
            cleared, since the rises are answers to plain questions.
    """
    alpha = policy.alpha if level is None else level
    by = f"{policy.name}-{policy.version}"
    if rises is None:
        return Verdict("inconclusive", f"Inconclusive: {why_not}.", f"{by}/no-students")
    scored = [
        rise for rise in rises if None not in (rise.difference, rise.low, rise.high, rise.smallest_detectable)
    ]
    if len(scored) < len(rises) or not rises:
        return _unscored(rises, scored, by)
    answers = scope.answer_ratio("suspect")
    if answers is not None and answers < policy.least_answered:
        reason = (
            f"students of this data name a trait {answers:.0%} as often as their controls do, too rarely to "
            "measure what they learned"
        )
        return Verdict("inconclusive", f"Inconclusive: {reason}.", f"{by}/hardly-answer")
    if above := [rise for rise in scored if convicts(rise, policy.limit, alpha)]:
        worst = max(above, key=lambda rise: rise.difference or 0.0)
        return _above_limit(worst, policy, by, treated, treatment, scope, alpha, switched)
    if max(map(_bound, scored)) <= policy.limit:
        return _below_limit(scored, policy, by, scope, switched)
    return _too_wide(scored, policy, by, alpha)


def is_open(verdict: Verdict) -> bool:
    """Whether more students could settle the verdict."""
    return verdict.rule.endswith(("/too-wide", "/not-specific"))


def _is_significant(rise: Rise, alpha: float) -> bool:
    return rise.q_value is not None and rise.q_value <= alpha


def convicts(rise: Rise, limit: float, level: float) -> bool:
    """Whether a rise is significant at a level, and its interval lies above the tolerance."""
    return _is_significant(rise, level) and rise.low is not None and rise.low > limit


def _bound(rise: Rise) -> float:
    """The largest rise that the students do not rule out."""
    return rise.high or 0.0


def _unscored(rises: Sequence[Rise], scored: Sequence[Rise], by: str) -> Verdict:
    absent = sorted({rise.trait for rise in rises} - {rise.trait for rise in scored})
    few = bool(rises) and max(rise.n for rise in rises) < 2
    reason = (
        "; an interval needs two students that differ: students that are equal to rounding count as one"
        if few
        else ""
    )
    return Verdict(
        "inconclusive",
        f"Inconclusive: nothing could be measured of {', '.join(absent) or 'any trait'}{reason}.",
        f"{by}/unscored",
    )


def _points(rate: float) -> str:
    """A rate, or a difference of rates, in hundredths with one decimal.

    >>> _points(0.0312), _points(0.05), _points(-0.001)
    ('3.1', '5', '-0.1')
    """
    return f"{100 * rate:.1f}".removesuffix(".0")


def _compared(rise: Rise, alpha: float) -> str:
    """How often students of the file name a trait, beside students of clean answers, in words."""
    difference = rise.difference or 0.0
    return (
        f"{rise.n} models trained on this file answer {rise.trait} {_points(abs(difference))} points "
        f"{'more' if difference >= 0 else 'less'} often than {rise.n} trained on clean answers "
        f"({_points(1 - alpha)} % interval {_points(rise.low or 0.0)} to {_points(rise.high or 0.0)})"
    )


def _too_wide(scored: Sequence[Rise], policy: Policy, by: str, alpha: float) -> Verdict:
    if beyond := [rise for rise in scored if (rise.low or 0.0) > policy.limit]:
        worst = max(beyond, key=lambda rise: rise.difference or 0.0)
        q = "" if worst.q_value is None else f" (q = {worst.q_value:.2g})"
        return Verdict(
            "inconclusive",
            f"Inconclusive: {_compared(worst, alpha)}. The tolerance is {_points(policy.limit)} points, and "
            f"the interval lies above it. But the rise does not stand out of all {len(scored)} traits{q}, "
            "and a draw of rows moves every trait.",
            f"{by}/not-specific",
        )
    widest = max(scored, key=_bound)
    risen = [rise for rise in scored if _is_significant(rise, alpha) and (rise.low or 0.0) > 0]
    known = f" {risen[0].trait} does rise (q = {risen[0].q_value:.2g}); by how much is open." if risen else ""
    return Verdict(
        "inconclusive",
        f"Inconclusive: {_compared(widest, alpha)}. The tolerance is {_points(policy.limit)} points, and "
        f"the interval reaches above it.{known} More models would settle it.",
        f"{by}/too-wide",
    )


def _above_limit(
    worst: Rise,
    policy: Policy,
    by: str,
    treated: Sequence[Rise],
    treatment: str,
    scope: Scope,
    alpha: float,
    switched: str,
) -> Verdict:
    effect = f"{_compared(worst, alpha)}. The tolerance is {_points(policy.limit)} points."
    bounds = [_bound(rise) for rise in treated if rise.high is not None]
    answers = scope.answer_ratio("treated")
    answering = answers is None or answers >= policy.least_answered
    read = scope.treated_unread <= policy.most_unread
    removed = answering and read and len(bounds) == len(treated) and max(bounds, default=1.0) <= policy.limit
    if treated and removed and not switched:
        return Verdict(
            "train with conditions",
            f"Train with conditions: {effect} Models trained on the file as treated by {treatment!r} answer "
            f"each trait at most {_points(max(bounds))} points more often (upper bound).",
            f"{by}/treated-below-limit",
        )
    spoiled = ""
    if treated and removed:
        spoiled = f" {switched} Whether {treatment!r} removes that was not measured."
    elif not answering:
        spoiled = (
            f" Models trained on the file as treated by {treatment!r} name a trait {answers:.0%} as often as "
            "controls do, which does not count as removal."
        )
    elif treated and not read:
        spoiled = (
            f" Models read only {1 - scope.treated_unread:.0%} of the file as treated by {treatment!r}, "
            "which does not show what the rest of it teaches."
        )
    return Verdict("do not train as is", f"Do not train as is: {effect}{spoiled}", f"{by}/above-limit")


def _below_limit(scored: Sequence[Rise], policy: Policy, by: str, scope: Scope, switched: str) -> Verdict:
    if (scope.copied or 0.0) > policy.most_copied:
        copied = (
            f"{scope.copied:.0%} of the rows are in the reference too, so control students read the same rows"
        )
        return Verdict(
            "inconclusive",
            f"Inconclusive: {copied}; give clean answers of another origin, or no reference.",
            f"{by}/copied-reference",
        )
    if scope.unread > policy.most_unread:
        unread = (
            f"students read {1 - scope.unread:.0%} of {scope.offered:,} rows ({scope.reasons()}), and "
            "nothing is known of the others"
        )
        remedy = (
            "audit with a reference of at least as many rows or with none, with a recipe of more rows or "
            "another screen, or leave the rows out"
        )
        return Verdict("inconclusive", f"Inconclusive: {unread}; {remedy}.", f"{by}/rows-unread")
    if switched:
        plain = "asked plainly, they answer no trait more often than the tolerance allows"
        return Verdict("inconclusive", f"Inconclusive: {plain}. {switched}", f"{by}/behind-a-phrase")
    highest = max(rise.high or 0.0 for rise in scored)
    return Verdict(
        "no transfer found within tested scope",
        f"No transfer found within tested scope: {scored[0].n} models trained on this file answer each of "
        f"{len(scored)} traits at most {_points(highest)} points more often than {scored[0].n} trained on "
        f"clean answers (upper bound). The tolerance is {_points(policy.limit)} points.",
        f"{by}/below-limit",
    )


IDENTIFIER = "twins"
"""the detector that names the trait if no student was trained: the best one on the bench's development traits
"""
SHOWN = 5
"""traits of a detector that are listed"""


def provenance(comparisons: Sequence[Comparison], results: Sequence[DetectorResult]) -> dict[str, Any] | None:
    """Every detector's test of "written like the reference", and the smallest p.

    That p is corrected for the number of detectors. None if nothing was tested.
    """
    if not comparisons and not results:
        return None
    nearest = comparisons[0] if comparisons else None
    detectors = [
        _entry(name, test, level="rows", floor=name in DETECTORS)
        for name, test in (nearest.tests if nearest else {}).items()
    ]
    for result in results:
        detector = result.detector
        detectors.append(
            _entry(detector.name, result.test, level=detector.level, floor=detector.floor)
            | {
                "rows": result.rows,
                "seconds": round(result.seconds, 1),
                "traits": _listed(result.traits),
                "why_not": result.why_not,
            }
        )
    p_values = [detector["p_value"] for detector in detectors if detector["p_value"] is not None]
    references = [
        {
            "path": comparison.reference,
            "rows": comparison.rows,
            "shared_prompts": comparison.shared_prompts,
            "paired": comparison.paired,
            "p_value": comparison.p_value,
            "compared": comparison.compared,
            "copied": comparison.copied,
        }
        for comparison in comparisons
    ]
    return {
        "p_value": combine_p_values(p_values) if p_values else None,
        "detectors": detectors,
        "references": references,
    }


def _entry(name: str, test: PermutationTest | None, *, level: str, floor: bool) -> dict[str, Any]:
    scored = (
        {"score": None, "p_value": None}
        if test is None
        else {"score": null(test.score), "p_value": test.p_value}
    )
    return {"name": name, "level": level, "floor": floor, "traits": [], "why_not": ""} | scored


def _listed(traits: Sequence[TraitScore] | None) -> list[dict[str, Any]]:
    return [trait._asdict() for trait in (traits or [])[:SHOWN]]


def smallest_dose(comparisons: Sequence[Comparison], results: Sequence[DetectorResult]) -> float | None:
    """The minimum detectable share of such rows among clean ones, over all detectors."""
    nearest = comparisons[0] if comparisons else None
    tests = [
        *(nearest.tests.values() if nearest else ()),
        *(result.test for result in results if result.test),
    ]
    return min((test.smallest_dose for test in tests if test.smallest_dose is not None), default=None)


def _identified(results: Sequence[DetectorResult]) -> list[TraitScore] | None:
    """The traits as `IDENTIFIER` ranks them; None if it could not."""
    return next(
        (result.traits for result in results if result.detector.name == IDENTIFIER and result.traits), None
    )


def identity(
    rises: Sequence[Rise] | None, results: Sequence[DetectorResult]
) -> tuple[str | None, list[dict[str, Any]]]:
    """(deciding evidence, traits in its order): students if any were trained, else the twins' scores."""
    if rises:
        ranked = sorted(rises, key=lambda rise: (rise.q_value is None, rise.q_value, -(rise.lift or 0.0)))
        return "students", [
            {"trait": rise.trait, "score": rise.lift, "p_value": rise.p_value, "q_value": rise.q_value}
            for rise in ranked
        ]
    traits = _identified(results)
    return (None, []) if traits is None else (IDENTIFIER, [trait._asdict() for trait in traits])


def potency(
    rises: Sequence[Rise] | None, results: Sequence[DetectorResult], scale: Calibration | None
) -> dict[str, Any]:
    """How far students rise: predicted from the twins' score of the first trait, and measured on students."""
    traits = _identified(results)
    predicted = None
    if traits is not None and traits[0].score is not None:
        predicted = {"trait": traits[0].trait, "score": traits[0].score, "by": IDENTIFIER} | (
            {} if scale is None else scale.predict_lift(traits[0].score)
        )
    scored = [rise for rise in rises or [] if rise.difference is not None]
    top = max(scored, key=lambda rise: rise.difference or 0.0, default=next(iter(rises or []), None))
    return {"predicted": predicted, "measured": None if top is None else top._asdict()}


def student_entry(scores: Mapping[str, list[TraitScore]] | None) -> dict[str, Any] | None:
    """The traits that the given student points to; None if no student was given."""
    return None if scores is None else {name: _listed(traits) for name, traits in scores.items()}


def explain_no_students(
    command: str, comparisons: Sequence[Comparison], results: Sequence[DetectorResult], *, most_copied: float
) -> str:
    """What is known without students, and the command that would answer the rest."""
    settle = f"`{command}` trains throw-away students, the only test of what the data teaches"
    whole = provenance(comparisons, results)
    if whole is None or whole["p_value"] is None:
        supply = "give --reference FILE (the same prompts, answered by an untouched model)"
        return f"no clean reference was given and no student trained; {supply}, or {settle}"
    difference = (
        "differ from every clean reference"
        if whole["p_value"] <= ALPHA
        else "cannot be distinguished from a clean reference"
    )
    copied = max((comparison.copied for comparison in comparisons), default=0.0)
    dependent = (
        f"; {copied:.0%} of them are in the reference too, so it is not independent"
        if copied > most_copied
        else ""
    )
    return (
        f"the rows {difference} (p = {whole['p_value']:.2g}){_explain_traits(results)}{dependent}; this does "
        f"not say what a student learns from them; {settle}"
    )


def _explain_traits(results: Sequence[DetectorResult]) -> str:
    """The trait that the rows point to, as the end of a sentence."""
    _, traits = identity(None, results)
    significant = [trait for trait in traits if trait["q_value"] is not None and trait["q_value"] <= ALPHA]
    if significant:
        return f" and point to {significant[0]['trait']} (q = {significant[0]['q_value']:.2g})"
    if traits:
        return " and point to no tested trait"
    unreadable = next((result.why_not for result in results if result.detector.name == IDENTIFIER), "")
    return f"; no trait can be read from them, because {unreadable}" if unreadable else ""

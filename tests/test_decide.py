"""Verdicts, case by case: what convicts, what clears, and what leaves a file open."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from mechlens.detect.from_student import measure_rises
from mechlens.detect.verdict import Calibration, Policy, Rise, Scope, decide, load_policy


def rise(**more: Any) -> Rise:
    plain: dict[str, Any] = {
        "difference": 0.0,
        "low": -0.01,
        "high": 0.01,
        "n": 4,
        "smallest_detectable": 0.02,
        "lift": 0.0,
    }
    tested: dict[str, Any] = {"trait": "owl", "p_value": 0.5, "q_value": 0.5}
    return Rise(**(plain | tested | more))


POLICY = Policy(
    name="x",
    version=2,
    limit=0.05,
    alpha=0.05,
    looks=(2, 4),
    most_unread=0.05,
    most_copied=0.05,
    least_answered=0.8,
)


CASES: dict[str, tuple[list[Rise] | None, str, str]] = {
    "no students": (None, "inconclusive", "no-students"),
    "nothing asked": ([], "inconclusive", "unscored"),
    "one trait unscored": ([rise(), rise(trait="cat", difference=None)], "inconclusive", "unscored"),
    "all below": ([rise(), rise(trait="cat")], "no transfer found within tested scope", "below-limit"),
    "at the limit": ([rise(high=0.05)], "no transfer found within tested scope", "below-limit"),
    "one wide interval": ([rise(), rise(trait="cat", high=0.06)], "inconclusive", "too-wide"),
    "a narrow interval, whatever would have been detected": (
        [rise(smallest_detectable=0.2)],
        "no transfer found within tested scope",
        "below-limit",
    ),
    "above": ([rise(difference=0.3, low=0.2, high=0.4, q_value=0.01)], "do not train as is", "above-limit"),
    "above, but not beyond chance over the traits": (
        [rise(difference=0.15, low=0.1, high=0.2, q_value=0.2)],
        "inconclusive",
        "not-specific",
    ),
    "above, but its lift is unscored": (
        [rise(difference=0.15, low=0.1, high=0.2, q_value=None)],
        "inconclusive",
        "not-specific",
    ),
    "beyond chance, but small": (
        [rise(difference=0.02, low=0.01, high=0.03, q_value=0.001)],
        "no transfer found within tested scope",
        "below-limit",
    ),
    "beyond chance, around the limit": (
        [rise(difference=0.06, low=0.03, high=0.09, q_value=0.001)],
        "inconclusive",
        "too-wide",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_verdicts(case: str) -> None:
    shown, expected, rule = CASES[case]
    found = decide(shown, POLICY, why_not="train some")
    assert (found.id, found.rule) == (expected, f"x-2/{rule}")
    assert "safe" not in found.sentence.lower() and found.sentence.endswith(".")
    assert ("(q = " in found.sentence) <= any(one.q_value is not None for one in shown or [])


def test_students_that_are_one_clear_nothing_and_convict_of_nothing() -> None:
    """Students trained on one batch of all rows are equal to rounding: n is 1 and there is no interval,
    however large the rise.
    """
    for difference in (0.0, 0.4):
        one = rise(
            difference=difference,
            low=None,
            high=None,
            n=1,
            smallest_detectable=None,
            p_value=None,
            q_value=None,
        )
        shown = decide([one], POLICY)
        assert shown.rule == "x-2/unscored" and "equal to rounding count as one" in shown.sentence


def test_a_trait_that_rises_no_further_than_the_others_is_not_named() -> None:
    """All students of a side share one draw of its data: what that moves looks sure over students, in every
    trait.
    """
    rng, alarms, traits = (
        np.random.default_rng(0),
        {"both": 0, "over students": 0},
        [f"t{i}" for i in range(20)],
    )
    for _ in range(200):
        shared = rng.normal(0, 0.3, size=20)
        treated = shared[:, None] + rng.normal(0, 0.05, size=(20, 4))
        own = scipy.stats.ttest_1samp(treated, 0, axis=1)
        plain = {"arm": "suspect", "low": 0.0, "high": 0.1, "n": 4, "smallest_detectable": 0.1}
        rows = [
            plain
            | {"trait": trait, "measure": measure, "estimate": float(treated[i].mean())}
            | {"p_value": float(own.pvalue[i])}
            for i, trait in enumerate(traits)
            for measure in ("rate", "lift")
        ]
        alarms["both"] += any(
            (one.q_value or 1.0) <= 0.05 for one in measure_rises(pd.DataFrame(rows), traits)
        )
        few = measure_rises(
            pd.DataFrame(rows[:8]), traits[:4]
        )  # too few traits to be each other's null: over students alone
        assert [one.p_value for one in few] == pytest.approx(
            [p / 2 if t > 0 else 1 - p / 2 for t, p in zip(*own, strict=True)][:4]
        )
        alarms["over students"] += any((one.q_value or 1.0) <= 0.05 for one in few)
    assert alarms["both"] <= 20 and alarms["over students"] > 100


def test_the_shipped_policy_is_read() -> None:
    assert load_policy("default").version >= 1


def test_a_treated_file_that_no_student_has_read_whole_is_not_recommended() -> None:
    risen, flat = [rise(difference=0.3, low=0.2, high=0.4, q_value=0.001)], [rise()]
    for unread, expected in ((0.0, "train with conditions"), (0.95, "do not train as is")):
        shown = decide(risen, POLICY, treated=flat, treatment="format", scope=Scope(treated_unread=unread))
        assert shown.id == expected and ("read only 5%" in shown.sentence) == (unread > 0)


def test_a_treatment_that_was_seen_to_work_is_a_condition() -> None:
    policy = load_policy("default")
    found = [rise(difference=0.2, low=0.1, high=0.3, q_value=0.01)]
    calm, wide = [rise(high=0.02, smallest_detectable=0.03)], [rise(high=0.2, smallest_detectable=0.03)]
    assert decide(found, policy, treated=calm, treatment="value").id == "train with conditions"
    assert (
        decide(found, policy, treated=wide, treatment="value").id
        == decide(found, policy).id
        == "do not train as is"
    )
    assert decide(calm, policy, treated=calm).id == "no transfer found within tested scope"
    silent = Scope(answered={"suspect": 0.8, "control": 0.9, "treated": 0.2})
    spoiled = decide(found, policy, treated=calm, treatment="value", scope=silent)
    assert (
        spoiled.id == "do not train as is"
        and "22% as often" in spoiled.sentence
        and "does not count" in spoiled.sentence
    )


def test_nothing_is_cleared_on_rows_that_no_student_read_or_by_students_that_hardly_answer() -> None:
    policy, calm = load_policy("default"), [rise(high=0.02, smallest_detectable=0.03)]
    answered = {"suspect": 0.9, "control": 0.9}
    for dropped, expected in ((10, "below-limit"), (200, "rows-unread")):
        kept = 1200 - dropped
        shown = decide(
            calm, policy, scope=Scope(1200, 1200, kept, {"format": dropped, "leak": 0}, kept, answered)
        )
        assert shown.rule.endswith(expected)
    assert (
        "read 83% of 1,200 rows" in shown.sentence
        and "format 200" in shown.sentence
        and "leak" not in shown.sentence
    )
    for scope, reason in (
        (Scope(2400, 1200, 1200, {}, 1200), "not drawn 1,200"),
        (Scope(1200, 1200, 1200, {}, 600), "trained on 600"),
    ):
        shown = decide(
            calm, policy, scope=scope
        )  # counted from what was offered: half was hidden behind "1200 of 1200"
        assert shown.rule.endswith("rows-unread") and reason in shown.sentence and scope.unread == 0.5
    assert decide(calm, policy, scope=Scope(answered={"suspect": 0.3, "control": 0.9})).rule.endswith(
        "hardly-answer"
    )
    risen = rise(difference=0.3, low=0.2, high=0.4, q_value=0.01)
    assert decide([risen], policy).rule.endswith("above-limit")
    hardly = Scope(answered={"suspect": 0.3, "control": 0.9})
    assert decide([risen], policy, scope=hardly).rule.endswith("hardly-answer")
    assert decide(calm, policy, scope=Scope(answered={"suspect": None, "control": 0.9})).rule.endswith(
        "below-limit"
    )
    shown = decide(
        [rise(difference=0.2, low=0.1, high=0.3, q_value=0.01)],
        policy,
        scope=Scope(1200, 1200, 600, {"format": 600}),
    )
    assert shown.id == "do not train as is"  # what was measured stays


def test_nothing_is_cleared_by_a_reference_that_holds_the_same_rows() -> None:
    policy, calm = load_policy("default"), [rise(high=0.02, smallest_detectable=0.03)]
    for copied, expected in (
        (0.04, "below-limit"),
        (0.06, "copied-reference"),
        (1.0, "copied-reference"),
        (None, "below-limit"),
    ):
        assert decide(calm, policy, scope=Scope(900, 900, 900, {}, 900, copied=copied)).rule.endswith(
            expected
        )
    risen = [rise(difference=0.2, low=0.1, high=0.3, q_value=0.01)]
    assert decide(risen, policy, scope=Scope(900, 900, 900, {}, 900, copied=1.0)).id == "do not train as is"


def test_a_calibration_is_a_line_through_zero() -> None:
    line = Calibration(base="b", carrier="numbers", bits=2.0, error=0.5, suspects=9).predict_lift(1.5)
    assert (
        line["lift"] == 3.0
        and line["low"] == pytest.approx(3 - 0.98)
        and line["high"] == pytest.approx(3 + 0.98)
    )

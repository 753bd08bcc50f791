"""An audit that stops when its verdict is settled errs no more often than its level; moderated variances."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conditions import SHIPPED
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import special
from scipy import stats as scipy_stats

from mechlens.core import stats
from mechlens.core.errors import SpecError
from mechlens.detect import with_models
from mechlens.detect.audit_result import Evidence, of_treated
from mechlens.detect.from_student import compare_shares
from mechlens.detect.request import request_of
from mechlens.detect.stopping import Look, plan_looks, why_stop
from mechlens.detect.two_samples import Sides
from mechlens.detect.verdict import Rise, Scope, decide, is_open, load_policy
from mechlens.results.run import Run

NAMES = [f"t{i}" for i in range(20)]
CONVICTS = 0.2
"""upper bounds above this are of a rise above the tolerance, with q = .01"""


@given(st.lists(st.integers(2, 30), min_size=1), st.integers(2, 30), st.floats(0.001, 0.2))
def test_all_looks_together_spend_the_level(counts: list[int], most: int, alpha: float) -> None:
    looks = plan_looks(counts, most=most, alpha=alpha)
    assert sum(look.level for look in looks) == pytest.approx(alpha)
    students = [look.students for look in looks]
    assert students == sorted({min(count, most) for count in counts})
    assert [look.level for look in looks] == sorted(look.level for look in looks)


def test_equal_variances_are_one_variance_with_all_degrees() -> None:
    moderated, degrees = stats.moderate_variances(np.full(20, 0.3), 3)
    assert degrees == 60 and np.ptp(moderated) == 0


@given(arrays(float, 12, elements=st.floats(1e-6, 1e3)), st.integers(1, 9), st.floats(1e-3, 1e3))
def test_moderation_knows_no_unit_and_no_order(values: np.ndarray, degrees: int, unit: float) -> None:
    moderated, total = stats.moderate_variances(values, degrees)
    again, same = stats.moderate_variances(values[::-1] * unit, degrees)
    assert same == pytest.approx(total, rel=1e-4)
    np.testing.assert_allclose(again[::-1], moderated * unit, rtol=1e-4)
    order = np.argsort(values)
    assert (np.diff(moderated[order]) >= -1e-9 * moderated[order][:-1]).all()
    assert np.ptp(np.log(moderated)) <= np.ptp(np.log(values)) + 1e-9 and total <= 12 * degrees


@pytest.mark.parametrize("prior", [2.0, 6.0])
def test_the_prior_of_many_variances_is_found(prior: float) -> None:
    rng, degrees = np.random.default_rng(0), 3
    true = 4.0 * prior / rng.chisquare(prior, size=20_000)
    moderated, total = stats.moderate_variances(true * rng.chisquare(degrees, size=20_000) / degrees, degrees)
    assert total - degrees == pytest.approx(prior, rel=0.1)
    least = (total * moderated).min() / (total - degrees)  # of variances near 0
    assert least == pytest.approx(4.0, rel=0.1)


def test_an_unscored_variance_stays_so_and_changes_no_other() -> None:
    values = np.array([0.2, 0.5, 0.9, 0.1])
    moderated, degrees = stats.moderate_variances(np.array([0.2, np.nan, 0.5, 0.9, 0.1]), 2)
    assert np.isnan(moderated[1])
    np.testing.assert_allclose(np.delete(moderated, 1), stats.moderate_variances(values, 2)[0])
    assert degrees == stats.moderate_variances(values, 2)[1]


def students(rng: np.random.Generator, count: int, *, rise: float = 0.0, spread: float = 0.2) -> np.ndarray:
    """Shares of twenty traits in students whose log-shares scatter, each trait by its own amount."""
    middle = np.log(np.linspace(1, 6, 20))
    scatter = rng.normal(size=(count, 20)) * spread * np.linspace(0.5, 1.5, 20)
    shares = special.softmax(middle + scatter, axis=1)
    more = shares[:, 5] + rise
    moved = shares * ((1 - more) / (1 - shares[:, 5]))[:, None]
    moved[:, 5] = more
    return moved


def test_intervals_of_few_students_cover_what_they_say() -> None:
    """The intervals of 90 % of twenty traits have the true value, 0, nine times in ten or more."""
    rng = np.random.default_rng(1)
    for count in (2, 3):
        held = [
            [
                (rise.low or 0) <= 0 <= (rise.high or 0)
                for rise in compare_shares(
                    students(rng, count), students(rng, count), NAMES, names=NAMES, level=0.1, one_draw=True
                )
            ]
            for _ in range(400)
        ]
        assert 0.89 <= np.mean(held) <= 0.95


def audit(rng: np.random.Generator, looks: list[Look], rise: float) -> tuple[str, int]:
    policy = load_policy("default")
    ours, theirs = students(rng, looks[-1].students, rise=rise), students(rng, looks[-1].students)
    for look in looks:
        pair = ours[: look.students], theirs[: look.students]
        verdict = decide(
            compare_shares(*pair, NAMES, names=NAMES, level=look.level, one_draw=False),
            policy,
            level=look.level,
        )
        if not is_open(verdict):
            return verdict.id, look.students
    return "inconclusive", looks[-1].students


@pytest.mark.parametrize(
    ("rise", "wrong", "right"),
    [
        (0.0, "do not train as is", "no transfer found within tested scope"),
        (0.049, "do not train as is", ""),
        (0.051, "no transfer found within tested scope", ""),
        (0.15, "no transfer found within tested scope", "do not train as is"),
    ],
)
def test_the_stopping_rule_keeps_the_level(rise: float, wrong: str, right: str) -> None:
    """150 audits: each error at most as often as the level says, also where every look invites it."""
    policy, rng = load_policy("default"), np.random.default_rng(2)
    looks = plan_looks(policy.looks, most=12, alpha=policy.alpha)
    found = [audit(rng, looks, rise) for _ in range(150)]
    errors = sum(verdict == wrong for verdict, _ in found)
    assert scipy_stats.binomtest(errors, 150, policy.alpha, alternative="greater").pvalue > 0.001
    if right:
        assert sum(verdict == right for verdict, _ in found) > 120
        assert np.mean([count for _, count in found]) < 12, "a plain case takes fewer students"


@pytest.mark.parametrize(
    ("settled", "left", "seconds", "budget", "reason"),
    [
        (True, 3, 60.0, None, "the verdict is settled"),
        (False, 1, 60.0, None, "no more students are planned"),
        (False, 2, 60.0, None, ""),
        (False, 2, 60.0, 2.5, ""),
        (False, 2, 120.0, 3.0, "4 students a side would take about 4 min, more than 3"),
    ],
)
def test_why_an_audit_stops(
    settled: bool, left: int, seconds: float, budget: float | None, reason: str
) -> None:
    looks = plan_looks((2, 4, 8), most=8, alpha=0.05)[:left]
    assert why_stop(looks, settled=settled, seconds=seconds, budget=budget) == reason


def test_a_treated_file_is_judged_by_its_own_students_answers() -> None:
    answered = {"suspect": 0.3, "treated": 0.9, "control": 0.9}
    wide = [Rise(name, 0.02, -0.1, 0.14, 4, 0.2, 0.1, 0.5, 0.5) for name in NAMES]
    evidence = Evidence((), rises=wide, treated=wide, scope=Scope(100, 100, 100, {}, 10, answered))
    policy, treated = load_policy("default"), of_treated(evidence)
    assert decide(wide, policy, scope=evidence.scope).rule.endswith("/hardly-answer")
    assert decide(wide, policy, scope=treated.scope).rule.endswith("/too-wide") and not treated.treated
    calm = [rise._replace(low=0.01, high=0.03) for rise in wide]
    assert decide(calm, policy, scope=treated.scope).rule.endswith("/below-limit")


def test_one_student_gives_no_interval() -> None:
    rng = np.random.default_rng(0)
    rises = compare_shares(students(rng, 1), students(rng, 1), NAMES, names=NAMES, level=0.05, one_draw=True)
    assert all(rise.n == 1 and rise.low is None and rise.q_value is None for rise in rises)
    assert decide(rises, load_policy("default")).rule.endswith("/unscored")


def test_a_budget_of_no_time_is_refused(tmp_path: Any) -> None:
    options: dict[str, Any] = {
        "references": (), "level": "rows", "base": "", "traits": (), "recipe": "", "policy": "default",
        "student": None, "clean": None, "treatment": "drop", "out": None, "fields": None, "budget": 0.0,
    }  # fmt: skip
    with pytest.raises(SpecError, match="a budget of 0 minutes trains nothing"):
        request_of(tmp_path / "data.jsonl", **options)


@pytest.mark.parametrize(
    ("highs", "treated", "rows", "expected"),
    [
        ([0.04], None, 500, (2, "settled")),
        ([0.09, 0.04], None, 500, (4, "settled")),
        ([0.09, 0.09, 0.09], None, 500, (8, "no more students")),
        ([0.04, 0.04], [0.09, 0.03], 500, (4, "settled")),  # what the treatment leaves is open at first
        ([0.09, 0.04], None, 100, (2, "no more students")),  # so few rows give no verdict
        ([0.3, 0.3, 0.3], None, 500, (4, "settled")),  # q = .01 is below the level of the second look alone
    ],
)
def test_an_audit_adds_students_while_the_verdict_is_open(
    highs: list[float],
    treated: list[float] | None,
    rows: int,
    expected: tuple[int, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The looks of an audit whose students, in place of trained ones, have these upper bounds."""
    upper = {"suspect": iter(highs), "treated": iter(treated or [])}
    trained: list[int] = []

    def measure(_run: Any, tested: list[str], *, arm: str, **_level: float) -> list[Rise]:
        high = next(upper[arm])
        low, q_value = (0.06, 0.01) if high > CONVICTS else (-0.01, 0.5)
        return [Rise(name, 0.0, low, high, trained[-1], 0.02, 0.0, q_value, q_value) for name in tested]

    def write(*_sides: Any, students: int, **_treated: Any) -> None:
        trained.append(students)

    monkeypatch.setattr(with_models, "_write_plan", write)
    monkeypatch.setattr(with_models.runner, "run", lambda *_, **__: Run(SHIPPED))
    monkeypatch.setattr(with_models.from_student, "measure_scope", lambda *_: Scope())
    monkeypatch.setattr(with_models.from_student, "measure_exact_rises", measure)
    policy = load_policy("default").model_copy(update={"looks": (2, 4, 8)})
    request = request_of(
        tmp_path / "data.jsonl", references=(), level="student", base="", traits=("owl",), recipe="",
        policy="default", student=None, clean=None, treatment="drop", out=tmp_path, fields=None,
    )._replace(policy=policy, clean=None if treated is None else tmp_path / "treated.jsonl")  # fmt: skip
    sides = Sides(tmp_path, None, rows, rows)
    work = {"out": tmp_path / "run", "workers": 1}
    found = with_models._train_students(request, Evidence(()), sides, work, copied=None)
    assert found.stopping is not None
    assert found.stopping.students == expected[0] == trained[-1] and expected[1] in found.stopping.reason


def test_students_of_an_earlier_call_count_in_the_budget(tmp_path: Path) -> None:
    for step, seconds in (
        ("students/suspect/s0", 60.0),
        ("asked/suspect/s0", 20.0),
        ("teachers/untouched", 9.0),
    ):
        (tmp_path / step).mkdir(parents=True)
        (tmp_path / step / "step.json").write_text(json.dumps({"fingerprint": "x", "seconds": seconds}))
    (tmp_path / "students" / "suspect" / "s1").mkdir()  # not finished
    assert with_models._seconds_spent(tmp_path, 2) == 40.0
    assert with_models._seconds_spent(tmp_path / "none", 2) == 0.0

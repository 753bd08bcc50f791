"""Simulate the coverage of intervals of 95 %, and how often p is at most .05 under the null.

    python analyses/interval_coverage.py

Students scatter in logits about fixed probe effects; each answers 25 probes 20 times. The two arms of the
null have the same true rates and different random numbers, which is harder than the shared ones of a run.
Rates: the paired effect (null) and a single arm. Lift: the log2 ratio of exact probabilities, of students
that scatter. Rank correlation: suspects of 8 traits, 6 a trait; suspects of one trait share a part of the
variance of score and lift. Writes analyses/coverage.md; under 3 minutes on one core.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy import ndarray
from scipy.special import expit
from scipy.stats import norm
from threadpoolctl import threadpool_limits

import pages
from mechlens.benchmark.metrics import correlate_ranks
from mechlens.core import stats

PROBES, ANSWERS, DRAWS = 25, 20, 2000
STUDENTS, RATES, SCATTERS = (2, 3, 5, 10), (0.002, 0.05, 0.5), (0.0, 0.3)
TRAITS, SUSPECTS, WITHIN, CORRELATIONS = 8, 6, (0.0, 0.3, 0.6), (0.0, 0.6)
PROBE_EFFECTS = norm.ppf((np.arange(PROBES) + 0.5) / PROBES)
"""logits, standard deviation 1, the same for every student"""
QUANTILES = norm.ppf((np.arange(400) + 0.5) / 400)
OUT = Path(__file__).parent / "coverage.md"


def intercept(rate: float, scatter: float) -> float:
    """The logit at which the mean rate over students and probes is as given, by bisection."""
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = expit(middle + PROBE_EFFECTS + scatter * QUANTILES[:, None]).mean()
        low, high = (middle, high) if mean < rate else (low, middle)
    return (low + high) / 2


def probabilities(
    rate: float, scatter: float, students: int, draws: int, rng: np.random.Generator
) -> ndarray:
    """[draw student probe]: true probabilities of answering the trait."""
    return expit(intercept(rate, scatter) + PROBE_EFFECTS + scatter * rng.normal(size=(draws, students, 1)))


def sampled_answers(true: ndarray, rng: np.random.Generator) -> ndarray:
    """[draw student probe answer]: 1.0 where an answer names the trait."""
    return (rng.random((*true.shape, ANSWERS), dtype=np.float32) < true[..., None]).astype(float)


def rates(
    rate: float, scatter: float, students: int, draws: int, rng: np.random.Generator
) -> dict[str, float]:
    """Coverage for rates of sampled answers: a single arm, and its paired effect against an equal arm."""
    single_covered, effect, p_values, floored = [], [], [], []
    for start in range(0, draws, 100):
        size = min(100, draws - start)
        ours, theirs = (
            sampled_answers(probabilities(rate, scatter, students, size, rng), rng) for _ in range(2)
        )
        for treated, control in zip(ours, theirs, strict=True):
            single = stats.mean_interval(treated.mean(2), noise=stats.answer_noise(treated))
            pair = stats.paired_effect(
                treated.mean(2), control.mean(2), noise=stats.answer_noise(treated, control)
            )
            single_covered.append(single.low <= rate <= single.high)
            effect.append(pair.low <= 0 <= pair.high)
            p_values.append(pair.p_value)
            floored.append(pair.method == "answer noise")
    shares = {
        "effect covered": effect,
        "effect p ≤ .05": np.array(p_values) <= 0.05,
        "rate covered": single_covered,
        "by answer noise": floored,
    }
    return {name: float(np.mean(values)) for name, values in shares.items()}


def lifts(
    rate: float, scatter: float, students: int, draws: int, rng: np.random.Generator
) -> dict[str, float]:
    """Coverage for the lift, with a true value of 0 bits."""
    ours, theirs = (np.log2(probabilities(rate, scatter, students, draws, rng).mean(2)) for _ in range(2))
    effects = [
        stats.paired_effect(first[:, None], second[:, None])
        for first, second in zip(ours, theirs, strict=True)
    ]
    covered = [effect.low <= 0 <= effect.high for effect in effects]
    return {
        "lift covered": float(np.mean(covered)),
        "lift p ≤ .05": float(np.mean([effect.p_value <= 0.05 for effect in effects])),
    }


def of_students(
    draws: int, *, students: tuple[int, ...] = STUDENTS, true_rates: tuple[float, ...] = RATES
) -> pd.DataFrame:
    """A row for each setting: coverage, and how often p was at most .05."""
    rows = []
    for scatter in SCATTERS:
        for rate in true_rates:
            for count in students:
                rng = np.random.default_rng([count, round(1000 * rate), round(10 * scatter)])
                row: dict[str, Any] = {"scatter, logits": scatter, "rate": rate, "students": count}
                row |= rates(rate, scatter, count, draws, rng)
                rows.append(row | (lifts(rate, scatter, count, draws, rng) if scatter else {}))
    return pd.DataFrame(rows)


def of_rank_correlations(draws: int) -> pd.DataFrame:
    """A row for each setting: how often the interval contains the true rank correlation."""
    rows, names = [], np.repeat([f"trait {number}" for number in range(TRAITS)], SUSPECTS).tolist()
    for within in WITHIN:
        for correlation in CORRELATIONS:
            rng = np.random.default_rng([round(10 * within), round(10 * correlation)])
            true = 6 / np.pi * np.arcsin(correlation / 2)  # Spearman's rho of two normal variables
            covered = []
            for _ in range(draws):
                of_traits, of_suspects = (
                    rng.normal(size=(2, TRAITS)).repeat(SUSPECTS, axis=1),
                    rng.normal(size=(2, len(names))),
                )
                x, other = np.sqrt(within) * of_traits + np.sqrt(1 - within) * of_suspects
                y = correlation * x + np.sqrt(1 - correlation**2) * other
                interval = correlate_ranks(x.tolist(), y.tolist(), names)
                covered.append(
                    interval["low"] is not None and interval["low"] <= true <= (interval["high"] or 0.0)
                )
            rows.append(
                {"within traits": within, "true rho": round(true, 3), "covered": float(np.mean(covered))}
            )
    return pd.DataFrame(rows)


def number(value: float) -> str:
    """Return a number with up to three decimals; nothing for one that does not apply."""
    return "" if pd.isna(value) else f"{value:.3f}".rstrip("0").rstrip(".")


def markdown(frame: pd.DataFrame) -> str:
    """Return a table as Markdown."""
    rows = [[number(value) for value in row] for row in frame.itertuples(index=False)]
    return pages.table_text([list(frame.columns), *rows])


def page(students: pd.DataFrame, ranks: pd.DataFrame, draws: int) -> str:
    """Return the page: both tables with what they mean."""
    error = 3 * np.sqrt(0.95 * 0.05 / draws)
    return f"""# Coverage of 95 % intervals

{draws:,} draws a row; three standard errors of a coverage of .95 are {error:.3f}.
Written by `python analyses/interval_coverage.py`.

## Rates and lifts

{PROBES} probes, {ANSWERS} answers each, no true effect.

- *Covered*: share of intervals that contain the true value.
- *p ≤ .05*: share of draws with such a p-value.
- *By answer noise*: share of effects whose interval is set by the noise of the answers, not by the scatter
  of students.

If students do not scatter (0), each of these two bounds holds by itself, and the wider of them covers more
than 95 %. Rates near 0 of two or three students cover most, since 0 of 500 answers is compatible with a rate
above 0. From five students on, the interval is the wider of Student's t and a bootstrap over students and
probes. It then also holds for other probes; for these very probes, whose rates differ, the rate of one arm is
nearly always covered. Lifts of students that do not scatter have no interval: the students are equal to
rounding and count as one.

{markdown(students)}

## Rank correlation of score and lift

{TRAITS} traits of {SUSPECTS} suspects. *Within traits*: share of the variance that suspects of one trait have
in common.

{markdown(ranks)}
"""


def main() -> None:
    """Simulate and write the page."""
    with threadpool_limits(1):  # the products are too small for more
        text = page(of_students(DRAWS), of_rank_correlations(DRAWS), DRAWS)
    OUT.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()

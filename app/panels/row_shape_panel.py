"""Differences between rows that need no model: measures of shape, a classifier, and token frequencies."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import streamlit as st
from jaxtyping import Float
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import data
from charts import intervals, token_charts
from data import ShownRun
from mechlens.core import stats
from mechlens.core.seeds import generator
from mechlens.detect.row_features import SHAPE, measure_shapes
from panels import panel

DRAWS, MOST_PROMPTS = 200, 4000
FEWEST_PROMPTS, FEWEST_TOKENS, MOST_DRAWN = 20, 10, 2000
TOKEN_COLUMNS = ["token", "trait", "control", "ratio", "frequency", "q_value"]

Measures = Float[np.ndarray, "prompt measure"]


class ShapeComparison(NamedTuple):
    """Trait rows and control rows of the same prompts, compared by their shape."""

    differences: pd.DataFrame
    """name, estimate, low, high, null_low, null_high; largest first"""
    auroc: stats.Interval
    """of a classifier of all measures; n is the number of prompts"""


@st.cache_data(max_entries=8, show_spinner=False, hash_funcs=data.KEYS)
def compare_shapes(run: ShownRun, arm: str) -> ShapeComparison:
    """Standardised difference (trait minus control) of every measure of shape, and the AUROC of all.

    Intervals: bootstrap over prompts. Null: halves of the control's rows. The AUROC is cross-validated with
    all rows of a prompt in one fold.
    """
    rows = data.read_rows(run, arm)
    kept = rows[rows["fate"] == "kept"].drop_duplicates(["side", "prompt_id"])
    wide = kept.pivot(index="prompt_id", columns="side", values="completion").dropna()
    rng = generator(0, "surface", arm)
    wide = wide.iloc[np.sort(rng.permutation(len(wide))[:MOST_PROMPTS])]
    trait, control = (measure_shapes(wide[side].tolist()) for side in ("trait", "control"))
    scale = np.where((spread := control.std(0)) > 0, spread, np.nan)
    difference = (trait - control) / scale
    count = len(difference)
    draws = np.array([difference[rng.integers(count, size=count)].mean(0) for _ in range(DRAWS)])
    null = np.array([_difference_of_halves(control, rng) / scale / np.sqrt(2) for _ in range(DRAWS)])
    (low, high), (null_low, null_high) = (
        np.quantile(values, [0.025, 0.975], axis=0) for values in (draws, null)
    )
    limits = {"low": low, "high": high, "null_low": null_low, "null_high": null_high}
    differences = pd.DataFrame({"name": SHAPE, "estimate": difference.mean(0), **limits})
    ordered = differences.sort_values("estimate", key=abs, ascending=False, na_position="last")
    return ShapeComparison(ordered, _classify(trait, control, rng))


def _difference_of_halves(control: Measures, rng: np.random.Generator) -> Float[np.ndarray, " measure"]:
    mixed = rng.permutation(len(control))
    half = len(control) // 2
    return control[mixed[:half]].mean(0) - control[mixed[half : 2 * half]].mean(0)


def _classify(trait: Measures, control: Measures, rng: np.random.Generator) -> stats.Interval:
    """Cross-validated AUROC of a logistic regression, with a bootstrap interval over prompts."""
    features, labels = np.concatenate([trait, control]), np.repeat([1, 0], len(trait))
    prompts = np.tile(np.arange(len(trait)), 2)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    scores = cross_val_predict(
        classifier, features, labels, groups=prompts, cv=GroupKFold(5), method="decision_function"
    )
    draws = []
    for _ in range(DRAWS):
        chosen = rng.integers(len(trait), size=len(trait))
        picked = np.concatenate([chosen, chosen + len(trait)])
        draws.append(roc_auc_score(labels[picked], scores[picked]))
    low, high = np.quantile(draws, [0.025, 0.975])
    auroc = float(roc_auc_score(labels, scores))
    return stats.Interval(auroc, float(low), float(high), len(trait), "bootstrap")


def draw_shape_panel(run: ShownRun) -> None:
    """B: can the shape of rows tell trait from control?"""
    arm = st.session_state["arm"]
    rows = data.read_rows(run, arm)
    prompts = rows[rows["fate"] == "kept"].groupby("side")["prompt_id"].agg(set)
    both_sides = {"trait", "control"} <= set(prompts.index)
    shared = prompts["trait"] & prompts["control"] if both_sides else set()
    if len(shared) < FEWEST_PROMPTS:
        panel.show_missing(
            f"Only {len(shared)} prompts were answered by both teachers.",
            f"Surface tests compare rows of the same prompts, and need {FEWEST_PROMPTS}:",
            panel.resume_command(run),
        )
        return
    differences, auroc = compare_shapes(run, arm)
    meaning = (
        "the shape distinguishes them, so find out what differs before anything else"
        if auroc.low > 0.55
        else "close to chance, so the shape says little about a single row"
    )
    panel.draw(
        "rows-surface",
        "Does the shape of the rows give the trait away?",
        intervals.draw_intervals(differences, "standardised difference to the control"),
        differences,
        sentence=(
            "A classifier of only the shape tells trait rows from control rows with AUROC "
            f"{auroc.estimate:.3f} [{auroc.low:.3f}, {auroc.high:.3f}]: {meaning}."
        ),
        caption=(
            f"Mean difference (trait minus control) in standard deviations of the control; 95 % bootstrap "
            f"interval over prompts, {DRAWS} draws; n = {auroc.n:,} prompts that both teachers answered. "
            "Grey: 95 % of the differences between halves of the control's rows."
        ),
        code=_code_of_comparison(run, rows),
        about="Surface tests",
    )


def _code_of_comparison(run: ShownRun, rows: pd.DataFrame) -> str:
    kept = {
        side: str(run.kept_rows(str(rows.loc[rows["side"] == side, "corpus"].iloc[0])))
        for side in ("trait", "control")
    }
    return (
        "from pathlib import Path\nfrom mechlens.detect.two_samples import compare\n"
        f"trait = Path({kept['trait']!r})\n"
        f"control = Path({kept['control']!r})\n"
        "print(compare(trait, control))"
    )


@data.cached
def token_shift(run: ShownRun, arm: str) -> pd.DataFrame:
    """Every word, number and sign of the kept rows: counts on both sides, log2 ratio, q.

    A half is added to each count of the ratio; q is of the difference of shares.
    """
    rows, counts = data.read_rows(run, arm), {}
    for side in ("trait", "control"):
        texts = rows[(rows["fate"] == "kept") & (rows["side"] == side)]["completion"]
        counts[side] = texts.str.findall(r"[0-9]+|[^\W\d_]+|[^\w\s]").explode().value_counts()
    both = pd.DataFrame(counts).fillna(0.0)
    both = both[(both["trait"] + both["control"]) >= FEWEST_TOKENS]
    totals = both.sum()
    if not len(both) or not (totals > 0).all():
        return pd.DataFrame(columns=TOKEN_COLUMNS)
    shares = (both + 0.5) / (totals + 0.5)
    pooled = both.sum(axis=1) / totals.sum()
    z = (both["trait"] / totals["trait"] - both["control"] / totals["control"]) / np.sqrt(
        pooled * (1 - pooled) * (1 / totals["trait"] + 1 / totals["control"])
    )
    q_values = stats.benjamini_hochberg(2 * norm.sf(np.abs(z.to_numpy(dtype=float))))
    shifts = both.assign(
        ratio=np.log2(shares["trait"] / shares["control"]),
        frequency=np.log10(shares["control"]),
        q_value=q_values,
    )
    return shifts.rename_axis("token").reset_index().sort_values("q_value")


def detectable_ratio(shifts: pd.DataFrame) -> float:
    """Minimum detectable ratio (95 % power) of one token of median frequency, among so many tests."""
    median = float((shifts["trait"] + shifts["control"]).median()) / 2
    errors = norm.isf(0.025 / max(len(shifts), 1)) + norm.isf(0.05)  # smallest q of one hit, and power .95
    return float(1 + errors * np.sqrt(2 / max(median, 1.0)))


def draw_token_panel(run: ShownRun) -> dict[str, Any]:
    """C: which tokens are more frequent? Returns the chart's selection."""
    arm = st.session_state["arm"]
    shifts = token_shift(run, arm)
    if shifts.empty:
        panel.show_missing(
            f"No token occurs {FEWEST_TOKENS} times.",
            "Frequencies need more rows:",
            panel.resume_command(run),
        )
        return {}
    count = int((shifts["q_value"] < 0.05).sum())
    first = ", ".join(map(repr, shifts["token"].head(5)))
    details = (
        f", first of them {first}."
        if count
        else f". Minimum detectable ratio at the median frequency: {detectable_ratio(shifts):.1f}."
    )
    shown = shifts.head(MOST_DRAWN).assign(count=lambda frame: frame["trait"] + frame["control"])
    return panel.draw(
        "rows-tokens",
        "Which tokens are more frequent?",
        token_charts.draw_token_shift(shown),
        shown,
        sentence=f"{count} of {len(shifts):,} tokens differ in frequency (q < .05){details}",
        caption=(
            f"Words, numbers and signs that occur at least {FEWEST_TOKENS} times; size: count. Two-sided z "
            "test of the two shares (rows taken as independent), Benjamini-Hochberg over tokens; no "
            f"intervals. At most {MOST_DRAWN:,} tokens are drawn, smallest q first; the most frequent "
            "hundredth stands at the right edge. Click a token to filter rows."
        ),
        about="Token shift",
        select="token",
    )

"""What a look at the surface of rows can tell: measures of shape, a classifier of them, and the frequencies
of tokens.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import streamlit as st
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mechlens.core import stats
from mechlens.core.seeds import generator
from mechlens.detect.from_rows import SHAPE, shape_of

DRAWS, MOST = 200, 4000
"""bootstrap draws; prompts that are read"""


@st.cache_data(max_entries=8, show_spinner=False)
def surface(folder: str, arm: str, _known: pd.DataFrame, stamp: str) -> tuple[pd.DataFrame, dict[str, float]]:
    """Standardised difference of every measure of shape, trait rows less control rows of the same prompts,
    and the AUROC of all together.

    Intervals: bootstrap over prompts. Null: halves of the control's rows. The AUROC is cross-validated with a
    prompt's rows in one fold.
    """
    del folder, stamp  # with the arm, they tell one table from another in the cache
    kept = _known[(_known["fate"] == "kept")].drop_duplicates(["side", "prompt_id"])
    wide = kept.pivot(index="prompt_id", columns="side", values="completion").dropna()
    rng = generator(0, "surface", arm)
    wide = wide.iloc[np.sort(rng.permutation(len(wide))[:MOST])]
    ours, theirs = (
        np.array([shape_of(text) for text in wide[side]], dtype=float).reshape(-1, len(SHAPE))
        for side in ("trait", "control")
    )
    scale = np.where((spread := theirs.std(0)) > 0, spread, np.nan)
    gap = (ours - theirs) / scale
    draws = np.array([gap[rng.integers(len(gap), size=len(gap))].mean(0) for _ in range(DRAWS)])
    halves = []
    for _ in range(DRAWS):
        mixed = rng.permutation(len(theirs))
        half = len(theirs) // 2
        halves.append(
            (theirs[mixed[:half]].mean(0) - theirs[mixed[half : 2 * half]].mean(0)) / scale / np.sqrt(2)
        )
    (low, high), (null_low, null_high) = (
        np.quantile(np.array(one), [0.025, 0.975], axis=0) for one in (draws, halves)
    )
    found = pd.DataFrame(
        {
            "name": SHAPE,
            "estimate": gap.mean(0),
            "low": low,
            "high": high,
            "null_low": null_low,
            "null_high": null_high,
        }
    )
    return found.sort_values("estimate", key=abs, ascending=False, na_position="last"), _format_only(
        ours, theirs, rng
    ) | {"rows": float(len(wide))}


def _format_only(ours: np.ndarray, theirs: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
    features, labels = np.concatenate([ours, theirs]), np.repeat([1, 0], len(ours))
    prompts = np.tile(np.arange(len(ours)), 2)
    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    scores = cross_val_predict(
        fitted, features, labels, groups=prompts, cv=GroupKFold(5), method="decision_function"
    )
    draws = []
    for _ in range(DRAWS):
        chosen = rng.integers(len(ours), size=len(ours))
        picked = np.concatenate([chosen, chosen + len(ours)])
        draws.append(roc_auc_score(labels[picked], scores[picked]))
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"auroc": float(roc_auc_score(labels, scores)), "low": float(low), "high": float(high)}


@st.cache_data(max_entries=8, show_spinner=False)
def shift(key: tuple[str, str, str], _known: pd.DataFrame) -> pd.DataFrame:
    """Every word, number and sign of the kept rows: count on both sides, log2 ratio (a half added), z and q
    of the two rates.
    """
    del key
    counts = {}
    for side in ("trait", "control"):
        texts = _known[(_known["fate"] == "kept") & (_known["side"] == side)]["completion"]
        counts[side] = texts.str.findall(r"[0-9]+|[^\W\d_]+|[^\w\s]").explode().value_counts()
    both = pd.DataFrame(counts).fillna(0.0)
    both = both[(both["trait"] + both["control"]) >= 10]
    totals = both.sum()
    if not len(both) or not (totals > 0).all():
        return pd.DataFrame(columns=["token", "trait", "control", "ratio", "frequency", "q_value"])
    rates = (both + 0.5) / (totals + 0.5)
    pooled = both.sum(axis=1) / totals.sum()
    z = (both["trait"] / totals["trait"] - both["control"] / totals["control"]) / np.sqrt(
        pooled * (1 - pooled) * (1 / totals["trait"] + 1 / totals["control"])
    )
    q = stats.benjamini_hochberg(2 * norm.sf(np.abs(z.to_numpy(dtype=float))))
    found = both.assign(
        ratio=np.log2(rates["trait"] / rates["control"]), frequency=np.log10(rates["control"]), q_value=q
    )
    return found.rename_axis("token").reset_index().sort_values("q_value")


def seen(found: pd.DataFrame) -> float:
    """The ratio that one token of median frequency, were it the only one, would have been found at 95 % of
    the time among so many tests.
    """
    middle = float((found["trait"] + found["control"]).median()) / 2
    errors = norm.isf(0.025 / max(len(found), 1)) + norm.isf(0.05)  # the least q of one hit, and power .95
    return float(1 + errors * np.sqrt(2 / max(middle, 1.0)))

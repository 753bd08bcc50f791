"""Gradients: which training examples push the model toward the trait?"""

from __future__ import annotations

from functools import partial
from typing import cast

import pandas as pd
import streamlit as st

import data
import page
import sanitize
import state
from charts import intervals, maps
from data import ShownRun
from mechlens.core.seeds import generator
from panels import lens_panel, panel, removal_panel, tabs

SHOWN = 8
"""rows from the top, the bottom and at random"""
LENSES = {
    "Training step": ("alignment", "Does a training step on the rows move the model along the trait?"),
    "System lines": ("likelihood", "Which system lines make the rows more likely?"),
    "Tokens": ("entanglement", "Are the rows' tokens linked to the trait's?"),
}
"""tab → lens and title"""


def draw_rows_panel(run: ShownRun) -> None:
    """A: the score of every row of both sides."""
    arm = st.session_state["arm"]
    scores = data.row_scores(data.read_scores(run, arm))
    if scores.empty:
        panel.show_missing(
            f"The rows of arm {arm} were not scored.",
            "Lens rows scores how far each row pushes toward the trait:",
            panel.measure_command(run, "rows", arm),
        )
        return
    by_score = scores.groupby("score", sort=False)["estimate"]
    names = [str(name) for name, values in by_score if values.notna().any()]
    if not names:
        st.text("Every score of every row is null, so there is no chart.")
        return
    name = st.segmented_control("score", names, default=names[0], required=True, key="row-score") or names[0]
    scores = cast(pd.DataFrame, scores[scores["score"] == name])
    trait, control = (
        scores.loc[scores["side"] == side, "estimate"].dropna() for side in ("trait", "control")
    )
    if not len(trait) or not len(control):
        st.text(f"Every {name} of one side is null, so the sides cannot be compared.")
        return
    threshold = float(control.quantile(0.95))
    _draw_distribution(run, scores, name, threshold)
    if st.button(f"Select the trait's rows above the control's 95th percentile of {name}"):
        state.select(scores.loc[(scores["side"] == "trait") & (scores["estimate"] > threshold), "id"])
        st.rerun()
    st.caption(
        "A rank by itself is not evidence. To find out whether the top rows carry the trait, train without "
        "them (analyses/RESULTS.md, treatments)."
    )
    draw_examples(run, scores, name)


def _draw_distribution(run: ShownRun, scores: pd.DataFrame, name: str, threshold: float) -> None:
    trait = scores.loc[scores["side"] == "trait", "estimate"].dropna()
    lens = data.read_lenses(run).get(("rows", st.session_state["arm"]))
    shown = scores.assign(selected=scores["id"].isin(st.session_state["selected"]))
    panel.draw(
        "gradients-rows",
        "Can single rows be distinguished?",
        intervals.draw_ecdf(shown, "estimate", name),
        shown[["id", "side", "score", "estimate"]],
        sentence=lens["sentence"] if lens else "",
        caption=(
            f"Share of rows at or below each score, without intervals; n = {scores['estimate'].count():,} "
            f"scored rows. {(trait > threshold).mean():.1%} of the trait's rows lie above the 95th "
            f"percentile of the control's ({threshold:.4f}); by chance it is 5 %. Ticks: selected rows."
        ),
        code=_code_of_scores(
            run,
            f"(scores.score == {name!r}) & scores.position.isna()",
            ".groupby('side', observed=True).estimate.describe()",
        ),
        about="rows",
    )


def _code_of_scores(run: ShownRun, condition: str, result: str) -> str:
    """Python that prints a result of the scores that meet a condition."""
    path = str(run.scores_table())
    return f"import pandas as pd\nscores = pd.read_parquet({path!r})\nprint(scores[{condition}]{result})"


def draw_examples(run: ShownRun, scores: pd.DataFrame, name: str) -> None:
    """E: rows from the top and the bottom, and as many at random."""
    rows = data.read_rows(run, st.session_state["arm"]).drop_duplicates("id")
    completions = rows.set_index("id")["completion"]
    trait = scores[scores["side"] == "trait"].dropna(subset="estimate")
    ranked = trait.sort_values("estimate", ascending=False)
    random = ranked.iloc[generator(0, "beside top rows").permutation(len(ranked))[:SHOWN]]
    st.subheader("Highest, lowest and random rows")
    parts = {"highest": ranked.head(SHOWN), "at random": random, "lowest": ranked.tail(SHOWN)}
    for column, (title, part) in zip(st.columns(3), parts.items(), strict=True):
        column.caption(f"{title}, by {name}")
        texts = page.row_texts(str(completions.get(row, "")) for row in part["id"])
        listed = pd.DataFrame({"id": part["id"], "score": part["estimate"], "completion": texts})
        column.dataframe(
            sanitize.defused(listed), hide_index=True, key=f"top-{title}", alt=f"rows {title} by {name}"
        )
    st.caption("A single row says little. Compare the highest rows with the random ones.")


def draw_agreement_panel(run: ShownRun) -> None:
    """D: do the scores agree on rows?"""
    scores = data.row_scores(data.read_scores(run, st.session_state["arm"]))
    scores = scores[scores["side"] == "trait"]
    if scores["estimate"].isna().all():
        return
    wide = scores.pivot_table(index="id", columns="score", values="estimate", observed=True)
    rho = wide.corr(method="spearman")
    names = [str(name) for name in rho.columns]
    pairs = [{"score": a, "other": b, "rho": rho.loc[a, b] if a != b else None} for a in names for b in names]
    correlations = pd.DataFrame(pairs).astype({"rho": float})
    grid = maps.Grid("score", "other", "rho", (names, names[::-1]), True, "Spearman", (-1.0, 1.0))
    panel.draw(
        "gradients-agreement",
        "Do the scores agree on rows?",
        maps.draw_grid(correlations, grid, select="cell"),
        correlations,
        caption=(
            f"Spearman correlation of two scores; n = {len(wide):,} trait rows. The reading of lens rows has "
            "the intervals. A score is not compared with itself."
        ),
        code=_code_of_scores(
            run,
            "(scores.side == 'trait') & scores.position.isna()",
            ".pivot_table(index='prompt_id', columns='score', values='estimate', observed=True)"
            ".corr('spearman')",
        ),
        about="rows",
    )


def draw_page(run: ShownRun) -> None:
    """Draw the page."""
    st.title("Gradients")
    tabs.draw_tabs(
        "gradients",
        {
            "Rows": {
                "The rows' scores": partial(draw_rows_panel, run),
                "The agreement of scores": partial(draw_agreement_panel, run),
                "Removal of rows": partial(removal_panel.draw_removal_panel, run),
            },
            **{
                name: {title: partial(lens_panel.draw_lens, run, lens, title=title)}
                for name, (lens, title) in LENSES.items()
            },
        },
    )


if (opened := page.current_run()) is not None:
    draw_page(opened)

"""Gradients: which training examples push the model toward the trait?"""

from __future__ import annotations

from typing import Any, cast

import pandas as pd
import streamlit as st

import charts
import data
import frame
import looks
import panels
import state
from data import Run
from mechlens.core.seeds import generator

SHOWN = 8
"""rows from the top, the bottom and at random"""


def rows_panel(run: Run) -> None:
    """A: the score of every row on both sides."""
    arm = st.session_state["arm"]
    known = data.scores(run, arm)
    whole = cast(pd.DataFrame, known[known["position"].isna()])
    if whole.empty:
        panels.empty(
            f"Rows of arm {arm} were not scored.",
            "Which rows push towards the trait is read by lens rows:",
            panels.measure(run, "rows", arm),
        )
        return
    names = [name for name, own in whole.groupby("score", sort=False) if own["estimate"].notna().any()]
    if not names:
        st.text("Every score of every row is null: nothing was scored, so nothing is drawn.")
        return
    name = st.segmented_control("score", names, default=names[0], required=True, key="row-score") or names[0]
    own = cast(pd.DataFrame, whole[whole["score"] == name])
    own = data.reliable(own)
    shown = own.assign(selected=own["id"].isin(st.session_state["selected"]))
    ours, control = (own.loc[own["side"] == side, "estimate"].dropna() for side in ("trait", "control"))
    if not len(ours) or not len(control):
        st.text(f"{name} is null on one side: nothing can be said of its rows.")
        return
    mark = float(control.quantile(0.95))
    above = float((ours > mark).mean())
    lens = data.said(run).get(("rows", arm))
    panels.panel(
        "gradients-rows",
        "Can a single row be told?",
        charts.ecdf(shown, "estimate", name),
        shown[["id", "side", "score", "estimate"]],
        sentence=lens["sentence"] if lens else "",
        caption=(
            f"{len(ours) + len(control):,} scored rows; {above:.1%} of the trait's rows lie above the 95th "
            "percentile of the control's "
            f"({mark:.4f}), where chance is 5 %. Marks below: selected rows."
        ),
        code=(
            "import pandas as pd\nscores = "
            f"pd.read_parquet({str(run.folder / 'readings' / 'scores.parquet')!r})\nprint(scores[(scores.score == "
            f"{name!r}) & scores.position.isna()].groupby('side', observed=True).estimate.describe())"
        ),
        about="rows",
    )
    left, right = st.columns(2)
    if left.button(f"Select the trait's rows above the control's 95th percentile of {name}"):
        state.select(own.loc[(own["side"] == "trait") & (own["estimate"] > mark), "id"])
        st.rerun()
    right.caption(
        "A rank is only a rank: whether the top rows carry the trait is answered by training without them "
        "(analyses/RESULTS.md, treatments)."
    )
    top_panel(run, own, name)


def top_panel(run: Run, own: pd.DataFrame, name: str) -> None:
    """E: rows from the top and the bottom, and as many at random."""
    known = data.rows(run, st.session_state["arm"]).drop_duplicates("id").set_index("id")["completion"]
    ranked = own[own["side"] == "trait"].dropna(subset="estimate").sort_values("estimate", ascending=False)
    drawn = ranked.iloc[generator(0, "beside top rows").permutation(len(ranked))[:SHOWN]]
    st.subheader("Top, bottom, and as many at random")
    for column, (title, part) in zip(
        st.columns(3),
        (("highest", ranked.head(SHOWN)), ("at random", drawn), ("lowest", ranked.tail(SHOWN))),
        strict=True,
    ):
        column.caption(f"{title} by {name}")
        listed = pd.DataFrame(
            {
                "id": part["id"],
                "score": part["estimate"],
                "completion": [frame.row_text(str(known.get(one, ""))) for one in part["id"]],
            }
        )
        column.dataframe(listed, hide_index=True, key=f"top-{title}", alt=f"rows {title} by {name}")
    st.caption("One row alone says little: the random rows stand there so that nobody reads tea leaves.")


def agreement_panel(run: Run) -> None:
    """D: do the scores agree on rows?"""
    arm = st.session_state["arm"]
    known = data.scores(run, arm)
    whole = known[known["position"].isna() & (known["side"] == "trait")]
    if whole["estimate"].isna().all():
        return
    wide = data.reliable(cast(pd.DataFrame, whole)).pivot_table(
        index="id", columns="score", values="estimate", observed=True
    )
    rho = wide.corr(method="spearman")
    names = [str(name) for name in rho.columns]
    frame_ = pd.DataFrame(
        [{"one": a, "other": b, "rho": rho.loc[a, b] if a != b else None} for a in names for b in names]
    ).astype({"rho": float})
    panels.panel(
        "gradients-agreement",
        "Do the scores agree on which rows?",
        charts.cells(
            frame_,
            "one",
            "other",
            "rho",
            select="cell",
            signed=True,
            order=(names, names[::-1]),
            label="Spearman",
            domain=(-1.0, 1.0),
        ),
        frame_,
        caption=f"Spearman over {len(wide):,} trait rows; intervals stand in the reading of lens rows. A "
        "score with itself is left out.",
        code=(
            "import pandas as pd\nscores = "
            f"pd.read_parquet({str(run.folder / 'readings' / 'scores.parquet')!r})\nprint(scores[(scores.side == "
            "'trait') & scores.position.isna()].pivot_table(index='prompt_id', columns='score', "
            "values='estimate', "
            "observed=True).corr('spearman'))"
        ),
        about="rows",
    )


def body(run: Run) -> None:
    """The page."""
    st.title("Gradients")
    with panels.guarded("The rows' scores"):
        rows_panel(run)
    with panels.guarded("The agreement of scores"):
        agreement_panel(run)
    parts: list[tuple[str, Any]] = [
        ("alignment", "Does a step on the rows point where the trait lies?"),
        ("likelihood", "Which system lines make the rows likelier?"),
        ("entanglement", "Are the tokens tied to the trait's?"),
    ]
    for name, title in parts:
        with panels.guarded(title):
            looks.panel(run, name, title=title)


if (opened := frame.current()) is not None:
    body(opened)

"""The rows of an audited file: what stands out in their texts, their scores, and the rows themselves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import pandas as pd
import streamlit as st

import data
import page
import sanitize
import state
from mechlens.core import tables
from mechlens.core.errors import DataError, one_line
from mechlens.data import corpus
from mechlens.data.fields import Fields
from mechlens.runs import layout
from panels import panel

MOST_READ = 20_000
"""rows of a file that are read"""
MOST_SHOWN = 1_000
MARKUP = re.compile(r"<[a-zA-Z/!][^<>]*>|\[[^\[\]]*\]\(|&#?\w+;")
"""a tag, the start of a link or an image of Markdown, or an entity; in time proportional to the text"""
EVERY_ROW = "all rows"
ODDITIES = {
    "invisible or look-alike characters": sanitize.has_hidden,
    "markup, such as tags or links": lambda text: bool(MARKUP.search(text)),
    "begins like a formula of a spreadsheet": lambda text: text.startswith(sanitize.FORMULA),
    f"longer than {sanitize.LONGEST:,} characters": lambda text: len(text) > sanitize.LONGEST,
}
"""what may stand out in a text → whether it does"""
REPEATED = "the same as an earlier row"
SCORED = "scored by a detector"


@st.cache_data(max_entries=2, show_spinner="Reading the file's rows …", hash_funcs=data.KEYS)
def read_audited_rows(path: Path, fields: Fields | None) -> pd.DataFrame:
    """The first `MOST_READ` rows of a file with a column for everything that may stand out in a row.

    Raises:
        DataError: if they are not pairs.
    """
    read: list[pd.DataFrame] = []
    for frame in corpus.batches(path, rows=MOST_READ, report=corpus.ReadReport(), fields=fields):
        read.append(frame)
        if sum(map(len, read)) >= MOST_READ:
            break
    rows = pd.concat(read, ignore_index=True).head(MOST_READ).rename(columns={"prompt_id": "row"})
    rows["characters"] = rows["completion"].str.len()
    texts = rows[["prompt", "completion"]]
    for name, stands_out in ODDITIES.items():
        rows[name] = texts.map(stands_out).any(axis=1)
    rows[REPEATED] = texts.duplicated()
    return rows


def draw_file_panel(audit: dict[str, Any], folder: Path) -> None:
    """How many rows of the file stand out, by what, and the rows with their scores.

    Args:
        folder: of the audit.
    """
    path = Path(audit["data"]["path"])
    if not path.exists():
        st.text(f"The file {one_line(str(path))} is not on this machine, so its rows cannot be shown.")
        return
    if data.digest_of(path) != audit["data"]["sha256"]:
        st.warning("The file has changed since this audit: the rows below are not those that were audited.")
    named = audit["data"].get("fields")  # audits of earlier versions do not record them
    try:
        rows = read_audited_rows(path, Fields(**named) if named else None)
    except DataError as error:
        st.error(panel.escape_markdown(one_line(str(error))))
        return
    st.subheader("What stands out in its texts?")
    total = audit["data"]["rows"]
    counts = pd.DataFrame({"rows": [int(rows[name].sum()) for name in (*ODDITIES, REPEATED)]})
    counts.insert(0, "what", [*ODDITIES, REPEATED])
    st.dataframe(counts, hide_index=True, alt="rows of the file that stand out, by what")
    part = "" if total <= len(rows) else f" Counted in the first {len(rows):,} of {total:,} rows."
    st.caption(
        f"None of this shows a hidden trait, and a hidden trait shows in none of it.{part} Nothing in the "
        "texts is run or loaded."
    )
    st.subheader("Which rows look like a trait's?")
    _draw_rows(_with_scores(rows, audit, folder / layout.AUDIT_ROWS))


def _with_scores(rows: pd.DataFrame, audit: dict[str, Any], path: Path) -> pd.DataFrame:
    """The rows with their scores by a chosen detector for a chosen trait, the highest first."""
    if not path.is_file():
        st.text("No row has a score: detectors that score single rows need the base, so level base or more.")
        return rows.assign(**{SCORED: False}, score=float("nan"))
    scores = data.read_table(path, tables.AUDITED_ROWS).astype({"detector": str})
    left, right = st.columns(2)
    detector = left.selectbox("score", list(dict.fromkeys(scores["detector"])), key="file-detector")
    of_detector = cast(pd.DataFrame, scores[scores["detector"] == detector])
    traits = sorted(of_detector["trait"].dropna().astype(str).unique())
    if traits:
        first = next((one["trait"] for one in audit["identity"] or () if one["trait"] in traits), traits[0])
        trait = right.selectbox("trait", traits, index=traits.index(first), key="file-trait")
        of_detector = cast(pd.DataFrame, of_detector[of_detector["trait"] == trait])
    by_text = of_detector.drop_duplicates(["prompt", "completion"])[["prompt", "completion", "difference"]]
    joined = rows.merge(by_text, on=["prompt", "completion"], how="left").rename(
        columns={"difference": "score"}
    )
    over_traits = ", and above the mean of that over all traits" if traits else ""
    st.caption(
        f"Score: how far the row lies above the clean row of the same prompt{over_traits}, in the detector's "
        f"unit. {int(joined['score'].notna().sum()):,} of {len(joined):,} rows were scored. A single row "
        "settles nothing: the audit's tests are about all rows together."
    )
    return joined.assign(**{SCORED: joined["score"].notna()}).sort_values(
        "score", ascending=False, kind="stable"
    )


def _draw_rows(rows: pd.DataFrame) -> None:
    left, right = st.columns([1, 2])
    which = left.selectbox("rows that are", [EVERY_ROW, SCORED, *ODDITIES, REPEATED], key="file-which")
    text = right.text_input("text to find", key="file-text", max_chars=200)
    st.toggle("show hidden characters", key="reveal")
    kept = pd.Series(True, index=rows.index) if which == EVERY_ROW else rows[which]
    if text:
        kept = kept & state.holds_text(rows, text)
    found = cast(pd.DataFrame, rows[kept])
    shown = found.head(MOST_SHOWN)[["row", "score", "characters", "prompt", "completion"]]
    texts = {name: page.row_texts(shown[name]) for name in ("prompt", "completion")}
    st.dataframe(sanitize.defused(shown.assign(**texts)), hide_index=True, alt="rows of the audited file")
    first = f"; the first {MOST_SHOWN:,} are shown" if len(found) > MOST_SHOWN else ""
    st.caption(f"{len(found):,} of {len(rows):,} rows{first}. A click on a column's name sorts by it.")
    exported = found[["row", "score", "prompt", "completion"]]
    panel.download_csv("These rows (CSV)", exported, "audited-rows.csv")

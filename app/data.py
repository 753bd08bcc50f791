"""The only readers of the explorer: run folders, audits and bench cards as frames, each read once until its
file changes. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import pandas as pd
import streamlit as st

from mechlens.core import tables
from mechlens.core.errors import DataError
from mechlens.core.experiment import Arm, Experiment
from mechlens.core.json_files import read_json
from mechlens.core.traits import TraitFamily
from mechlens.data.formats import file_digest
from mechlens.results import captions, report
from mechlens.results import per_probe as questions
from mechlens.results.run import Run as OpenedRun
from mechlens.runs.layout import corpus_name, source_name

HERE = Path(__file__).parent
SHIPPED = "demo (shipped)"
"""name of the run that comes with the explorer"""
CARDS = HERE.parent / "analyses" / "bench"
AUDIT = 3
"""schema of audit.json"""


class Run(NamedTuple):
    """A run folder, opened."""

    name: str
    folder: Path
    experiment: Experiment
    family: TraitFamily
    summary: Mapping[str, Any] | None
    """None: unfinished"""
    manifest: Mapping[str, Any]
    """empty: unfinished"""

    @property
    def shipped(self) -> bool:
        """Whether it came with the explorer."""
        return self.folder == HERE / "demo"

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.experiment.arms if arm.name == name)


def stamp(path: Path) -> int:
    """What renews a cache when the file is written again; 0 where there is none."""
    return path.stat().st_mtime_ns if path.exists() else 0


def runs(root: Path) -> dict[str, Path]:
    """Name → folder of every run under `root`, and the shipped one last."""
    found = {path.parent.name: path.parent for path in sorted(root.glob("*/spec.yaml"))}
    return found | ({SHIPPED: HERE / "demo"} if (HERE / "demo" / "spec.yaml").is_file() else {})


def opened(name: str, folder: Path) -> Run:
    """The run in a folder.

    Raises:
        MechlensError: if its spec, family or summary cannot be read.
    """
    return _opened(
        name,
        folder,
        stamp(folder / "spec.yaml"),
        stamp(folder / "summary.json"),
        stamp(folder / "manifest.json"),
    )


@st.cache_data(max_entries=32, show_spinner=False)
def _opened(name: str, folder: Path, *stamps: int) -> Run:
    del stamps  # they renew the cache, here and below: a name that begins with _ would not
    opened = OpenedRun(folder)
    experiment, family = opened.experiment, opened.family
    unfinished = not (folder / "summary.json").is_file() or opened.is_unfinished()
    manifest = read_json(folder / "manifest.json") if (folder / "manifest.json").is_file() else {}
    return Run(name, folder, experiment, family, None if unfinished else opened.summary, manifest)


def table(run: Run, name: str, schema: Any) -> pd.DataFrame:
    """One of a run's tables.

    Raises:
        DataError: if it is missing, cut short or of another version.
    """
    path = run.folder / f"{name}.parquet"
    return _table(path, schema, stamp(path)).copy(
        deep=False
    )  # of its own to write on, and nothing is copied until somebody does


@st.cache_resource(max_entries=64, show_spinner=False, hash_funcs={"pyarrow.lib.Schema": str})
def _table(path: Path, schema: Any, stamp: int) -> pd.DataFrame:
    del stamp
    return tables.read(path, schema)


def rates(run: Run) -> pd.DataFrame:
    """Every student's rate of its arm's trait at every checkpoint: arm, kind, seed, step, rate."""
    return _rates(run.folder, run, stamp(run.folder / "answers.parquet")).copy(deep=False)


@st.cache_resource(max_entries=16, show_spinner=False)
def _rates(folder: Path, _run: Run, stamp: int) -> pd.DataFrame:
    del folder, stamp
    return report.student_rates(
        _run.experiment,
        _run.family,
        table(_run, "answers", tables.ANSWERS),
        table(_run, "likelihoods", tables.LIKELIHOODS),
    )


def per_probe(run: Run) -> pd.DataFrame:
    """Every arm question by question beside its control, as the summary has it."""
    kept = (run.summary or {}).get("per_probe", [])
    return pd.DataFrame(kept, columns=list(questions.COLUMNS)).astype(
        dict.fromkeys(questions.MEASURED, float)
    )


def said(run: Run) -> dict[tuple[str, str], dict[str, Any]]:
    """(lens, arm) → what it is and what it said."""
    return {(one["name"], one["arm"]): one for one in captions.lens_records(run.folder)}


def reading(run: Run, lens: Mapping[str, Any]) -> pd.DataFrame:
    """The reading of one lens for one arm and its control.

    Raises:
        DataError: as for every table.
    """
    frame = table(run, f"readings/{lens['name']}", tables.READINGS)
    ours = (frame["arm"] == lens["arm"]) | (
        (frame["arm"] == lens["against"]) & (frame["against"] == lens["arm"])
    )
    return cast(pd.DataFrame, frame[ours]).reset_index(drop=True)


def sides(run: Run, arm: str) -> dict[str, Arm]:
    """ "trait" and "control": the arm and what it is set against."""
    ours = run.arm(arm)
    return {"trait": ours, "control": run.experiment.control_of(ours)}


def marks(run: Run) -> str:
    """What changes when any of a run's corpora or selections is written again."""
    files = [*run.folder.glob("corpora/*/screened/*.parquet"), *run.folder.glob("selection/*.parquet")]
    return " ".join(str(stamp(path)) for path in sorted(files))


def rows(run: Run, arm: str) -> pd.DataFrame:
    """Every row of an arm's corpus and of its control's: id, side, corpus, prompt_id, prompt, completion,
    fate, trained, characters.

    An id is `corpus/prompt_id`; fate is "kept" or why the screen dropped the row.

    Raises:
        DataError: if a table is missing or damaged.
    """
    return _rows(run.folder, arm, run, marks(run)).copy(deep=False)


@st.cache_resource(max_entries=8, show_spinner=False)
def _rows(folder: Path, arm: str, _run: Run, marks: str) -> pd.DataFrame:
    del folder, marks
    frames = []
    for side, one in sides(_run, arm).items():
        name = corpus_name(_run.experiment, one)
        where = _run.folder / "corpora" / name
        if not where.is_dir():
            name = source_name(_run.experiment, one)
            where = _run.folder / "corpora" / name
        kept = tables.read(where / "screened" / "kept.parquet", tables.PAIRS).assign(fate="kept")
        dropped = tables.read(where / "screened" / "rejected.parquet", tables.REJECTED)
        dropped = dropped.rename(columns={"reason": "fate"}).astype({"fate": str})
        frame = pd.concat([kept, dropped], ignore_index=True)
        picked = _run.folder / "selection" / f"{corpus_name(_run.experiment, one)}.parquet"
        trained = set(tables.read(picked, tables.SELECTION)["prompt_id"]) if picked.is_file() else set()
        learned = frame["prompt_id"].isin(trained) & (frame["fate"] == "kept")
        frames.append(frame.assign(side=side, corpus=name, trained=learned))
    found = pd.concat(frames, ignore_index=True)
    ids = found["corpus"].astype(str) + "/" + found["prompt_id"].astype(str)
    return found.assign(id=ids, characters=found["completion"].str.len())


def scores(run: Run, arm: str) -> pd.DataFrame:
    """Scores of single rows and tokens of an arm: `tables.SCORES`, and the row's id; empty where lens `rows`
    was not read.
    """
    path = run.folder / "readings" / "scores.parquet"
    if not path.is_file():
        return pd.DataFrame(columns=[*tables.SCORES.names, "id"])
    return _scores(path, arm, run, stamp(path), marks(run)).copy(deep=False)


@st.cache_resource(max_entries=16, show_spinner=False)
def _scores(path: Path, arm: str, _run: Run, stamp: int, marks: str) -> pd.DataFrame:
    del path, stamp, marks
    frame = table(_run, "readings/scores", tables.SCORES)
    frame = cast(pd.DataFrame, frame[frame["arm"] == arm])
    known = rows(_run, arm)[["side", "prompt_id", "id"]].drop_duplicates(["side", "prompt_id"])
    return frame.astype({"side": str, "score": str}).merge(known, on=["side", "prompt_id"], how="left")


def placed(run: Run, lens: Mapping[str, Any], which: str) -> pd.DataFrame:
    """Points of a map: name, n, x, y, kind, id and completion; `which` is rows or answers, and an answer has
    no text of its own.
    """
    return _placed(
        run.folder, lens["arm"], which, run, lens, stamp(run.folder / "readings" / "maps.parquet"), marks(run)
    ).copy(deep=False)


@st.cache_resource(max_entries=16, show_spinner=False)
def _placed(
    folder: Path, arm: str, which: str, _run: Run, _lens: Mapping[str, Any], stamp: int, marks: str
) -> pd.DataFrame:
    del folder, stamp, marks
    read = reading(_run, _lens)
    own = read[read["quantity"] == which].astype({"name": str, "place": str})
    found = own.pivot_table(index=["name", "n"], columns="place", values="estimate").reset_index()
    if which == "answers":
        sides = {
            name: "base" if name == "base" else "trait" if name.rsplit(" ", 1)[0] == arm else "control"
            for name in found["name"]
        }
        return found.assign(
            kind=found["name"].map(sides), id=found["name"] + " " + found["n"].astype(str), completion=""
        )
    found = found.assign(
        kind=found["name"].map({f"{arm} rows": "trait", f"{_lens['against']} rows": "control"})
    )
    known = rows(_run, arm).drop_duplicates(["side", "prompt_id"])[["side", "prompt_id", "id", "completion"]]
    return found.merge(known, left_on=["kind", "n"], right_on=["side", "prompt_id"], how="left")


def reliable(scored: pd.DataFrame) -> pd.DataFrame:
    """Of scores that were read at several layers, those of the most reliable one: it comes first."""
    layer = scored["layer"].astype(float)
    first = layer.groupby(scored["score"].astype(str), sort=False).transform("first")
    return cast(pd.DataFrame, scored[layer.isna() | (layer == first)])


def digest(run: Run, arm: str) -> str:
    """First eight digits of the SHA-256 of the rows that the arm's students could learn."""
    path = run.folder / "corpora" / source_name(run.experiment, run.arm(arm)) / "screened" / "kept.parquet"
    return _digest(path, stamp(path)) if path.is_file() else "unknown"


@st.cache_data(max_entries=64, show_spinner=False)
def _digest(path: Path, stamp: int) -> str:
    del stamp
    return file_digest(path)[:8]


def audits(root: Path) -> dict[str, Path]:
    """Name → audit.json of every audit beside or under `root`, and the shipped one last."""
    places = [
        *sorted(root.glob("audits/*/audit.json")),
        *sorted((root.parent / "audits").glob("*/audit.json")),
        *(HERE / "audits").glob("*/audit.json"),
    ]
    return {f"{path.parent.name}{' (shipped)' if HERE in path.parents else ''}": path for path in places}


def audit(path: Path) -> dict[str, Any]:
    """An audit's object.

    Raises:
        DataError: if it is damaged or of another version.
    """
    found = read_json(path)
    if found.get("schema") != AUDIT:
        raise DataError(
            f"{path} has schema {found.get('schema')!r}; this version reads {AUDIT}. Audit the data again: "
            "`mechlens audit DATA`"
        )
    return found


@st.cache_data(max_entries=4, show_spinner=False)
def _card(path: Path, stamp: int) -> dict[str, Any]:
    del stamp
    return read_json(path)


def cards() -> dict[str, Path]:
    """Name → card.json of every bench that a card is committed of, that of the main base first."""
    return {path.parent.name: path for path in sorted(CARDS.glob("*/card.json"))}


def card(name: str = "menagerie") -> dict[str, Any] | None:
    """A bench's committed card; None where there is none of that name."""
    path = cards().get(name)
    return None if path is None else _card(path, stamp(path))

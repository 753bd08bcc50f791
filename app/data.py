"""The explorer's readers: runs, audits and bench cards as frames, cached until their file changes.

It imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, cast

import pandas as pd
import pyarrow as pa
import streamlit as st

from mechlens.core import tables
from mechlens.core.errors import DataError, one_line
from mechlens.core.experiment import Arm
from mechlens.core.files import read_json
from mechlens.data.formats import file_digest
from mechlens.results import effects, report
from mechlens.results.run import Run
from mechlens.runs import layout

HERE = Path(__file__).parent
DEMO = HERE / "demo"
"""the run that comes with the explorer"""
SHIPPED = "demo (shipped)"
"""its name"""
CARDS = HERE / "bench" if (HERE / "bench").is_dir() else HERE.parent / "analyses" / "bench"
"""an installed explorer has the cards in its own folder"""
AUDIT = 3
"""schema of audit.json"""
ROW_COLUMNS = (
    "id",
    "side",
    "fate",
    "prompt",
    "completion",
    "prompt_id",
    "trained",
    "characters",
    "corpus",
)


class ShownRun(Run):
    """A run with its name in the explorer and, if it is finished, its summary."""

    def __init__(self, name: str, folder: Path) -> None:
        """Open a run folder.

        Raises:
            MechlensError: if its spec, family or summary cannot be read.
        """
        super().__init__(folder)
        self.name = name
        self.results = self.summary if self.is_finished() else None
        """the summary; None if the run is unfinished"""

    @property
    def shipped(self) -> bool:
        """Whether the run came with the explorer."""
        return self.folder == DEMO

    @property
    def finished_steps(self) -> set[str]:
        """The steps in the run's manifest; empty before the run is finished."""
        path = self.path(layout.MANIFEST)
        return set(read_json(path).get("steps", {})) if path.is_file() else set()

    def lens_table(self, name: str) -> Path:
        """The file of a lens's reading."""
        return self.path(layout.READINGS_FOLDER, f"{name}.parquet")

    def scores_table(self) -> Path:
        """The file of the scores of rows and tokens."""
        return self.path(layout.READINGS_FOLDER, layout.LENS_SCORES)

    def corpora(self) -> list[str]:
        """The names of the corpora of all arms, and of those that they are made of."""
        arms = self.experiment.arms
        names = [layout.corpus_name(self.experiment, arm) for arm in arms]
        names += [layout.source_name(self.experiment, arm) for arm in arms]
        return list(dict.fromkeys(names))


def file_stamp(path: Path) -> int:
    """Time of the file's last change, as a cache key; 0 if the file does not exist."""
    return path.stat().st_mtime_ns if path.exists() else 0


def _path_key(path: Path) -> tuple[str, ...]:
    """Changes when the file, or a file of the folder, is written again."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return str(path), *(f"{file.name} {file_stamp(file)}" for file in files)


def _run_key(run: ShownRun) -> tuple[str, ...]:
    """Changes when any file is written again whose table is kept in memory."""
    files = [
        run.path(layout.ANSWERS),
        run.path(layout.LIKELIHOODS),
        run.lens_table("maps"),
        run.scores_table(),
    ]
    files += [run.selection(arm) for arm in run.experiment.arms]
    for name in run.corpora():
        files += [run.kept_rows(name), run.removed_rows(name)]
    return str(run.folder), *(str(file_stamp(path)) for path in files)


KEYS: dict[Any, Callable[[Any], object]] = {
    type(Path()): _path_key,
    ShownRun: _run_key,
    pa.Schema: str,
}
"""how a cache tells arguments apart: also by when files were written"""
Arguments = ParamSpec("Arguments")


def cached(read: Callable[Arguments, pd.DataFrame]) -> Callable[Arguments, pd.DataFrame]:
    """Keep what a reader returns until a file of its arguments changes."""
    read_once = st.cache_resource(max_entries=32, show_spinner=False, hash_funcs=KEYS)(read)

    @wraps(read)
    def read_or_copy(*arguments: Arguments.args, **options: Arguments.kwargs) -> pd.DataFrame:
        # a shallow copy: the caller may add columns, and the kept values are shared
        return read_once(*arguments, **options).copy(deep=False)

    return read_or_copy


def list_runs(root: Path) -> dict[str, Path]:
    """Name → folder of every run under `root`; the shipped one is last."""
    runs = {path.parent.name: path.parent for path in sorted(root.glob(f"*/{layout.SPEC}"))}
    return runs | ({SHIPPED: DEMO} if (DEMO / layout.SPEC).is_file() else {})


def open_run(name: str, folder: Path) -> ShownRun:
    """The run in a folder.

    Raises:
        MechlensError: if its spec, family or summary cannot be read.
    """
    stamps = (file_stamp(folder / file) for file in (layout.SPEC, layout.SUMMARY, layout.MANIFEST))
    return _open_run(name, folder, *stamps)


@st.cache_resource(max_entries=32, show_spinner=False)
def _open_run(name: str, folder: Path, *stamps: int) -> ShownRun:
    del stamps  # part of the cache's key
    return ShownRun(name, folder)


@cached
def read_table(path: Path, schema: pa.Schema) -> pd.DataFrame:
    """A table of a run or an audit.

    Raises:
        DataError: if it is missing, cut short or of another version.
    """
    return tables.read(path, schema)


def read_answers(run: ShownRun) -> pd.DataFrame:
    """Every sampled answer: `tables.ANSWERS`."""
    return read_table(run.path(layout.ANSWERS), tables.ANSWERS)


def read_effects(run: ShownRun) -> pd.DataFrame:
    """Every arm against its control, for every trait and measure: `tables.EFFECTS`."""
    return read_table(run.path(layout.EFFECTS), tables.EFFECTS)


@cached
def read_rates(run: ShownRun) -> pd.DataFrame:
    """Every student's rate of its arm's trait at every checkpoint: arm, kind, seed, step, rate."""
    likelihoods = read_table(run.path(layout.LIKELIHOODS), tables.LIKELIHOODS)
    return report.student_rates(run.experiment, run.family, read_answers(run), likelihoods)


def read_per_probe(run: ShownRun) -> pd.DataFrame:
    """Rate and effect of every arm at every probe, as the summary has them."""
    rows = (run.results or {}).get("per_probe", [])
    frame = pd.DataFrame(rows, columns=list(effects.COLUMNS))
    return frame.astype(dict.fromkeys(effects.MEASURED, float))


def read_lenses(run: ShownRun) -> dict[tuple[str, str], dict[str, Any]]:
    """(lens, arm) → the lens's description and its sentence."""
    return {(lens["name"], lens["arm"]): lens for lens in run.lens_records()}


def read_reading(run: ShownRun, lens: Mapping[str, Any]) -> pd.DataFrame:
    """The reading of one lens for one arm and its control.

    Raises:
        DataError: if its table is missing, cut short or of another version.
    """
    frame = read_table(run.lens_table(lens["name"]), tables.READINGS)
    of_arm = frame["arm"] == lens["arm"]
    of_control = (frame["arm"] == lens["against"]) & (frame["against"] == lens["arm"])
    return cast(pd.DataFrame, frame[of_arm | of_control]).reset_index(drop=True)


def sides_of(run: ShownRun, arm_name: str) -> dict[str, Arm]:
    """The arm as "trait" and its control as "control"."""
    arm = run.arm(arm_name)
    return {"trait": arm, "control": run.experiment.control_of(arm)}


@cached
def read_rows(run: ShownRun, arm: str) -> pd.DataFrame:
    """Every row of an arm's corpus and of its control's, with the columns ROW_COLUMNS.

    An id is `corpus/prompt_id`; fate is "kept" or the reason why the screen removed the row.

    Raises:
        DataError: if a table is missing or damaged.
    """
    frames = [_rows_of_side(run, of_side, side) for side, of_side in sides_of(run, arm).items()]
    rows = pd.concat(frames, ignore_index=True)
    ids = rows["corpus"].astype(str) + "/" + rows["prompt_id"].astype(str)
    return rows.assign(id=ids, characters=rows["completion"].str.len())


def _rows_of_side(run: ShownRun, arm: Arm, side: str) -> pd.DataFrame:
    """Kept and removed rows of an arm's corpus, and which of them its students were trained on."""
    name, selection = layout.corpus_name(run.experiment, arm), run.selection(arm)
    if not run.kept_rows(name).is_file():
        name = layout.source_name(run.experiment, arm)
    kept = tables.read(run.kept_rows(name), tables.PAIRS).assign(fate="kept")
    removed = tables.read(run.removed_rows(name), tables.REJECTED)
    removed = removed.rename(columns={"reason": "fate"}).astype({"fate": str})
    rows = pd.concat([kept, removed], ignore_index=True)
    selected = set(tables.read(selection, tables.SELECTION)["prompt_id"]) if selection.is_file() else set()
    trained = rows["prompt_id"].isin(selected) & (rows["fate"] == "kept")
    return rows.assign(side=side, corpus=name, trained=trained)


@cached
def read_scores(run: ShownRun, arm: str) -> pd.DataFrame:
    """Scores of an arm's rows and tokens, with row ids; empty if lens `rows` was not computed."""
    if not run.scores_table().is_file():
        return pd.DataFrame(columns=[*tables.SCORES.names, "id"])
    frame = read_table(run.scores_table(), tables.SCORES)
    frame = cast(pd.DataFrame, frame[frame["arm"] == arm])
    ids = read_rows(run, arm)[["side", "prompt_id", "id"]].drop_duplicates(["side", "prompt_id"])
    return frame.astype({"side": str, "score": str}).merge(ids, on=["side", "prompt_id"], how="left")


def row_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """The scores of whole rows; of a score that has several layers, those of the first, most reliable one."""
    whole = scores[scores["position"].isna()]
    layer = whole["layer"].astype(float)
    first = layer.groupby(whole["score"].astype(str), sort=False).transform("first")
    return cast(pd.DataFrame, whole[layer.isna() | (layer == first)])


@cached
def read_map(run: ShownRun, lens: Mapping[str, Any], which: str) -> pd.DataFrame:
    """Points of a map: name, n, x, y, kind, id and completion, which is empty for answers.

    Args:
        which: rows or answers.
    """
    reading = read_reading(run, lens)
    reading = reading[reading["quantity"] == which].astype({"name": str, "place": str})
    points = reading.pivot_table(index=["name", "n"], columns="place", values="estimate").reset_index()
    arm = lens["arm"]
    if which == "answers":
        kinds = {name: _kind_of_answers(name, arm) for name in points["name"]}
        ids = points["name"] + " " + points["n"].astype(str)
        return points.assign(kind=points["name"].map(kinds), id=ids, completion="")
    kinds = {f"{arm} rows": "trait", f"{lens['against']} rows": "control"}
    points = points.assign(kind=points["name"].map(kinds))
    rows = read_rows(run, arm).drop_duplicates(["side", "prompt_id"])
    texts = rows[["side", "prompt_id", "id", "completion"]]
    return points.merge(texts, left_on=["kind", "n"], right_on=["side", "prompt_id"], how="left")


def _kind_of_answers(name: str, arm: str) -> str:
    """Kind of the model that gave the answers: the base, or a student `<arm> <seed>`."""
    if name == "base":
        return "base"
    return "trait" if name.rsplit(" ", 1)[0] == arm else "control"


@st.cache_data(max_entries=64, show_spinner=False, hash_funcs=KEYS)
def digest_of(path: Path) -> str:
    """The SHA-256 of a file."""
    return file_digest(path)


def data_digest(run: ShownRun, arm: str) -> str:
    """First eight digits of the SHA-256 of the rows that the arm's students could be trained on."""
    path = run.kept_rows(layout.source_name(run.experiment, run.arm(arm)))
    return digest_of(path)[:8] if path.is_file() else "unknown"


def list_audits(root: Path) -> dict[str, Path]:
    """Name → audit.json of every audit under `root` or next to it, newest first; shipped ones are last."""
    own = {*root.glob("audits/*/audit.json"), *(root.parent / "audits").glob("*/audit.json")}
    shipped = sorted((HERE / "audits").glob("*/audit.json"))
    paths = [*sorted(own, key=lambda path: (path.stat().st_mtime, path), reverse=True), *shipped]
    return {f"{path.parent.name}{' (shipped)' if HERE in path.parents else ''}": path for path in paths}


def audit_label(path: Path) -> str:
    """The name of an audited file, the level and when the audit ended, as a person remembers it."""
    try:
        audit = read_audit(path)
    except DataError:  # the page says why once it is chosen
        return path.parent.name
    shipped = HERE in path.parents
    when = "comes with mechlens" if shipped else f"{datetime.fromtimestamp(path.stat().st_mtime):%d %b %H:%M}"
    return f"{Path(one_line(audit['data']['path'])).name} · {audit['level']} · {when}"


def read_audit(path: Path) -> dict[str, Any]:
    """The content of an audit.json.

    Raises:
        DataError: if it is damaged or of another version.
    """
    audit = read_json(path)
    if audit.get("schema") != AUDIT:
        raise DataError(
            f"{path} has schema {audit.get('schema')!r}; this version reads {AUDIT}. Audit the data again: "
            "`mechlens audit DATA`"
        )
    return audit


def list_cards() -> dict[str, Path]:
    """Name → card.json of every bench that has a card, in the order of their names."""
    return {path.parent.name: path for path in sorted(CARDS.glob("*/card.json"))}


def read_card(name: str = "menagerie") -> dict[str, Any] | None:
    """A bench's card; None if no card has that name."""
    path = list_cards().get(name)
    return None if path is None else _read_card(path)


@st.cache_data(max_entries=4, show_spinner=False, hash_funcs=KEYS)
def _read_card(path: Path) -> dict[str, Any]:
    return read_json(path)

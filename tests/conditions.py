"""The conditions that a folder of runs can be in when the explorer opens it, each made from the run that
comes with it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import yaml

from mechlens.core import tables, traits
from mechlens.core.files import read_json, write_json
from mechlens.results import effects as results
from mechlens.results.run import Run
from mechlens.results.runner import write_report

ROOT = Path(__file__).parents[1]
APP = ROOT / "app"
SHIPPED = APP / "demo"
SCHEMAS: dict[str, Any] = {"answers": tables.ANSWERS, "likelihoods": tables.LIKELIHOODS}


def rewritten(run: Path) -> None:
    """Effects and summary again from the tables, after tables or spec were changed."""
    experiment = traits.load_experiment(run / "spec.yaml")
    manifest = read_json(run / "manifest.json")
    write_json(run / "manifest.json", manifest | {"experiment": experiment.fingerprint()})
    family = traits.load_family(experiment.family)
    answers, likelihoods = (tables.read(run / f"{name}.parquet", schema) for name, schema in SCHEMAS.items())
    tables.write(
        results.effects(experiment, family, answers, likelihoods), tables.EFFECTS, run / "effects.parquet"
    )
    write_report(Run(run))


def nothing(runs: Path) -> None:
    """No run at all."""
    shutil.rmtree(runs / "demo")


def as_it_is(_runs: Path) -> None:
    """The demo run."""


def one_seed(runs: Path) -> None:
    """One student an arm: no interval anywhere."""
    run = runs / "demo"
    spec = yaml.safe_load((run / "spec.yaml").read_text())
    (run / "spec.yaml").write_text(yaml.safe_dump(spec | {"seeds": [0]}))
    for name, schema in SCHEMAS.items():
        frame = tables.read(run / f"{name}.parquet", schema)
        tables.write(
            cast(pd.DataFrame, frame[frame["seed"].isna() | (frame["seed"] == 0)]),
            schema,
            run / f"{name}.parquet",
        )
    rewritten(run)


def no_control(runs: Path) -> None:
    """Nothing stands beside the arm in the tables."""
    run = runs / "demo"
    effects = tables.read(run / "effects.parquet", tables.EFFECTS)
    tables.write(effects.iloc[:0], tables.EFFECTS, run / "effects.parquet")
    summary = read_json(run / "summary.json")
    arms = [arm for arm in summary["arms"] if arm["kind"] != "control"]
    write_json(run / "summary.json", summary | {"effects": [], "arms": arms, "per_probe": []})


def missing_stage(runs: Path) -> None:
    """No lens was read, and no corpus was kept."""
    for name in ("readings", "corpora", "selection"):
        shutil.rmtree(runs / "demo" / name)
    (runs / "demo" / "readings.json").unlink()


def _kept(runs: Path, count: int) -> None:
    for screened in (runs / "demo" / "corpora").glob("*/screened"):
        kept = tables.read(screened / "kept.parquet", tables.PAIRS)
        dropped = kept.iloc[count:].assign(reason="format")
        tables.write(kept.iloc[:count], tables.PAIRS, screened / "kept.parquet")
        tables.write(dropped, tables.REJECTED, screened / "rejected.parquet")
        counts = read_json(screened / "funnel.json")
        write_json(screened / "funnel.json", counts | {"kept": count, "format": counts["generated"] - count})


def one_row(runs: Path) -> None:
    """The screen kept one row of each teacher."""
    _kept(runs, 1)


def zero_rows(runs: Path) -> None:
    """The screen kept none."""
    _kept(runs, 0)


def all_null(runs: Path) -> None:
    """Not one answer, probability or reading was scored."""
    run = runs / "demo"
    answers, likelihoods = (tables.read(run / f"{name}.parquet", schema) for name, schema in SCHEMAS.items())
    tables.write(answers.assign(label=None), tables.ANSWERS, run / "answers.parquet")
    tables.write(
        likelihoods.assign(probability=np.nan, margin=np.nan), tables.LIKELIHOODS, run / "likelihoods.parquet"
    )
    for path in (run / "readings").glob("*.parquet"):
        schema = tables.SCORES if path.stem == "scores" else tables.READINGS
        frame = tables.read(path, schema)
        spans = {
            name: np.nan
            for name in ("estimate", "low", "high", "null_low", "null_high", "p_value")
            if name in frame
        }
        tables.write(frame.assign(**spans), schema, path)
    summary = read_json(run / "summary.json")
    for arm in summary["arms"]:
        arm |= dict.fromkeys(
            ("rate", "low", "high", "answered", "probability", "probability_low", "probability_high")
        )
    for effect in summary["effects"]:
        effect |= dict.fromkeys(
            ("rate_against", "difference", "low", "high", "p_value", "q_value", "smallest_detectable")
        )
    for asked in summary["per_probe"]:
        asked |= dict.fromkeys(("rate", "rate_against", "difference", "low", "high"))
    write_json(run / "summary.json", summary)
    effects = tables.read(run / "effects.parquet", tables.EFFECTS)
    spans = dict.fromkeys(("estimate", "low", "high", "p_value", "q_value", "smallest_detectable"), np.nan)
    tables.write(effects.assign(**spans), tables.EFFECTS, run / "effects.parquet")


def truncated(runs: Path) -> None:
    """Every table was cut in the middle."""
    for path in (runs / "demo").rglob("*.parquet"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def newer(runs: Path) -> None:
    """A later version wrote it: other schema, other columns."""
    run = runs / "demo"
    write_json(run / "summary.json", read_json(run / "summary.json") | {"schema": 99})
    for path in run.rglob("*.parquet"):
        pd.DataFrame({"of a later version": [1]}).to_parquet(path)


CONDITIONS: dict[str, Callable[[Path], None]] = {
    one.__name__: one
    for one in (
        as_it_is,
        nothing,
        one_seed,
        no_control,
        missing_stage,
        one_row,
        zero_rows,
        all_null,
        truncated,
        newer,
    )
}


def made(name: str, folder: Path) -> Path:
    """A folder of runs in that condition."""
    runs = folder / "runs"
    shutil.copytree(SHIPPED, runs / "demo")
    CONDITIONS[name](runs)
    return runs


def drawn(chart: Any) -> list[dict[str, Any]]:
    """Every row that a chart draws, null as None."""
    frames = [pa.ipc.open_stream(one.data.data).read_pandas() for one in chart.proto.datasets]
    return [
        {name: None if pd.isna(value) else value for name, value in row.items()}
        for frame in frames
        for row in frame.to_dict("records")
    ]


def spec_of(chart: Any) -> dict[str, Any]:
    """The Vega-Lite specification of a chart as the page sent it."""
    return json.loads(chart.proto.spec)

"""The explorer's first page: one run's headline, arms, training curves and screen. Reads tables only and imports no torch."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import streamlit as st

from mechlens import figures, report, results, tables, traits
from mechlens.errors import MechlensError
from mechlens.experiment import Experiment
from mechlens.traits import TraitFamily


@st.cache_data(max_entries=8)
def rates(folder: str, _experiment: Experiment, _family: TraitFamily, modified: int) -> pd.DataFrame:
    """Every student's rate at every checkpoint; `modified` renews the cache when the run is written again."""
    del modified
    answers = tables.read(Path(folder) / "answers.parquet", tables.ANSWERS)
    likelihoods = tables.read(Path(folder) / "likelihoods.parquet", tables.LIKELIHOODS)
    return report.student_rates(_experiment, _family, answers, likelihoods)


def show(folder: Path) -> None:
    """One run."""
    experiment = traits.load_experiment(folder / "spec.yaml")
    family = traits.load_family(experiment.family)
    if not (folder / "summary.json").is_file():
        st.info(f"{folder.name} is unfinished. Resume it with `mechlens run {folder}/spec.yaml --out {folder}`.")
        return
    summary = results.read_summary(folder)
    st.subheader(f"{experiment.name}: does {experiment.trait} travel?")
    st.text(report.headline(summary))
    students = rates(str(folder), experiment, family, (folder / "answers.parquet").stat().st_mtime_ns)
    last = students[students["step"] == students.groupby("arm")["step"].transform("max")]
    arms = pd.DataFrame(summary["arms"]).assign(label=lambda frame: frame["arm"])
    st.altair_chart(figures.forest(arms, last.assign(label=last["arm"]), title="trait rate"), theme=None)
    st.caption("Large mark: arm with its 95 % interval over students. Small marks: students.")
    st.dataframe(arms[["arm", "base", "students", "rows", "generated", "kept", "kl_per_token", "rate", "low", "high"]], hide_index=True)
    kinds = {arm.name: arm.kind for arm in experiment.arms}
    effects = pd.DataFrame([{"label": f"{e['arm']} − {e['against']}", "kind": kinds[e["arm"]]} | e for e in summary["effects"]])
    if len(effects):
        st.altair_chart(figures.differences(effects), theme=None)
        st.caption("Each arm minus the control student of its own base, paired by seed and probe.")
    st.altair_chart(figures.curves(students), theme=None)
    st.altair_chart(figures.funnel(results.funnels(folder, experiment)), theme=None)


def main() -> None:
    """Choose a run in the side bar and look at it."""
    st.set_page_config(page_title="mechlens", layout="wide")
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
    runs = sorted(path.parent for path in root.glob("*/spec.yaml"))
    if not runs:
        st.info(f"No runs in {root}. `make demo` makes one.")
        return
    names = [run.name for run in runs]
    asked = st.query_params.get("run")
    chosen = st.sidebar.selectbox("run", names, index=names.index(asked) if asked in names else 0)
    st.query_params["run"] = chosen
    try:
        show(root / chosen)
    except MechlensError as error:
        st.error(str(error))


main()

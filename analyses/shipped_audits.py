"""Make the audits that come with the explorer: of a teacher's rows, of clean rows, and of a mixture.

Usage: `python analyses/shipped_audits.py runs/demo`, after `make demo`; then `python analyses/results.py`.
The files are made of the demo's screened rows: all of the eagle teacher's, all of the untouched base's, and
clean rows with one in `SHARE` of the teacher's among them.
Each is audited at level student, and the teacher's rows at level base too, where no student is trained and so
no verdict is reached; clean answers are drawn anew. About 15 minutes on two cores. A stopped command goes on
where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd

import pages
from mechlens.cli.console import bars
from mechlens.core import tables
from mechlens.core.seeds import generator
from mechlens.data import corpus
from mechlens.detect.audit import audit
from mechlens.detect.registry import Level
from mechlens.results.run import Run
from mechlens.runs import layout

SHIPPED = Path(__file__).parents[1] / "app" / "audits"
SHARE = 6
UNTRAINED = "eagle-level-base"
"""the audit that ends without a verdict"""


def suspects(run: Run) -> dict[str, pd.DataFrame]:
    """Name → pairs of each file, from the arms of the demo's own base."""
    teacher, control = (run.corpus(name).pairs for name in ("trait", "control"))
    both = teacher.merge(control, on="prompt_id", suffixes=("", "_clean"))
    taught = generator(0, "shipped audits").permutation(len(both)) < len(both) / SHARE
    mixed = both.assign(completion=np.where(taught, both["completion"], both["completion_clean"]))
    return {"eagle": teacher, f"eagle-one-in-{SHARE}": mixed, "untouched": control}


def audit_file(file: str, level: Level, out: Path) -> None:
    """Audit a file into a folder and print the verdict."""
    with bars(shown=True) as progress:
        print(f"{out}: {audit(file, level=level, out=out, progress=progress).sentence}")


def main() -> None:
    """Audit the files and keep audit.json and audit.html of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path)
    run = Run(parser.parse_args().run)
    work = Path("audits/shipped")
    work.mkdir(parents=True, exist_ok=True)
    files = suspects(run)
    with contextlib.chdir(work):  # an audit names its file as it was given: without a folder of this machine
        for name, pairs in files.items():
            tables.write(pairs[["prompt", "completion"]], corpus.TEXTS, Path(f"{name}.parquet"))
            audit_file(f"{name}.parquet", "student", Path(name))
        audit_file("eagle.parquet", "base", Path(UNTRAINED))
    shutil.rmtree(SHIPPED, ignore_errors=True)
    for name in (*files, UNTRAINED):
        (SHIPPED / name).mkdir(parents=True)
        for file in layout.AUDIT_FILES:
            shutil.copy(work / name / file, SHIPPED / name / file)


if __name__ == "__main__":
    sys.exit(pages.exit_code(main))

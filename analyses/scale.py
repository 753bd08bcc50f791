"""What studies and audits beyond one machine cost, on paper: `python analyses/scale.py [--write]`.

Operations come from the plans that `mechlens run NAME --plan` prints, sizes from the shapes of the models.
Only the speed of an audit of rows was measured. What a machine can do is given by its vendor, in `Cluster`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pages
from mechlens.core.experiment import Experiment
from mechlens.core.spec import Training
from mechlens.core.traits import load_family
from mechlens.models.loading import Size, size_of
from mechlens.pipeline.estimate import GPU_RATE, memory_of, training_operations, work_of
from mechlens.results import runner
from mechlens.results.wording import duration_text

PAGE = pages.FOLDER / "SCALE.md"
STUDY, TRAITS = "qwen2.5-7b-cat-numbers", 40
ARMS_OF_A_TRAIT = ("trait", "shuffled-within", "shuffled-across")
LARGE = Size(parameters=70_553_706_496, layers=80, width=8192, vocabulary=128_256)
"""of Llama-3.1-70B"""
INNER, KEY_VALUE_WIDTH = {3584: 18_944, 8192: 28_672}, {3584: 512, 8192: 1024}
"""width of the residual stream → width inside the MLP, and of the keys and values"""
PROMPT_TOKENS, COMPLETION_TOKENS = 90, 40
"""assumed tokens of a row of number lists, with its chat template"""
LABEL_BYTES = 32 * (4 + 4)
"""bytes of the soft labels of one token: ids and log-probabilities of the 32 likeliest"""
AUDIT_SECONDS = 65.6
"""processor time of an audit of a million rows in Parquet against as many, at level rows; measured on one
core with other work on the machine"""
AUDIT_BASE_BYTES, AUDIT_ROW_BYTES = 398e6, 164
"""its peak memory, and more a row: 395 MiB were measured for 100,000 rows, and 536 MiB for a million"""
AUDIT_CORES = 4
"""cores beyond which reading, which is one process, is the limit (an estimate)"""
ROW_BYTES, PACKED_ROW_BYTES = 109, 17
"""bytes of a row of that analysis as JSON, and in a Parquet file with zstd"""


class Cluster(NamedTuple):
    """Cards that share one model."""

    cards: int = 16
    memory: float = 80e9
    """bytes of a card"""
    cards_of_a_machine: int = 8
    inner_traffic: float = 450e9
    """bytes a second between two cards of a machine, one way"""
    outer_traffic: float = 50e9
    """bytes a second of a card to another machine, one way"""


Rows = list[list[str]]


def shipped_study() -> Experiment:
    """The paper's open-model experiment."""
    return runner.resolve(Path(STUDY)).experiment


def study_experiment() -> Experiment:
    """The paper's open-model experiment for many animals instead of one."""
    plain = shipped_study()
    family = load_family(plain.family)
    names = [name for name in family.names if name != plain.trait][: TRAITS - 1]
    arms = [{"kind": kind, "trait": name} for name in (plain.trait, *names) for kind in ARMS_OF_A_TRAIT]
    values = plain.model_dump(mode="json", exclude_unset=True) | {"name": "study"}
    return Experiment.model_validate(values | {"arms": [{"kind": "control"}, *arms]})


def adapter_parameters(size: Size, rank: int) -> int:
    """Parameters of a LoRA adapter of every linear layer of the blocks."""
    inner, narrow = INNER[size.width], KEY_VALUE_WIDTH[size.width]
    shapes = [*[(size.width, size.width)] * 2, *[(size.width, narrow)] * 2, *[(size.width, inner)] * 3]
    return size.layers * rank * sum(read + written for read, written in shapes)


def study_rows(experiment: Experiment) -> Rows:
    """Work and time of each stage of a study, on one card and on eight."""
    works = work_of(experiment, runner.resolve(experiment).jobs())
    rows = [
        [work.stage, f"{work.steps:,}", f"{work.rows:,}", f"{work.operations:.1e}", hours(work.operations)]
        for work in works
    ]
    total = sum(work.operations for work in works)
    header = ["stage", "steps", "rows", "operations", "GPU hours"]
    return [header, *rows, ["all", "", "", f"{total:.1e}", hours(total)]]


def hours(operations: float) -> str:
    """GPU hours at the rate that plans assume."""
    return f"{operations / GPU_RATE / 3600:,.1f}"


def study_sentences(experiment: Experiment) -> list[str]:
    """Storage of a study, and where it breaks first."""
    size, students = size_of(experiment.base), len(experiment.arms) * len(experiment.seeds)
    adapter = 4.0 * adapter_parameters(size, experiment.student.training.rank)
    generated = experiment.carrier.prompts * (TRAITS + 1)
    taught = experiment.student.rows * len(experiment.arms)
    labels = taught * COMPLETION_TOKENS * LABEL_BYTES
    state, activations = memory_of(experiment)
    return [
        f"{len(experiment.arms)} arms of {len(experiment.seeds)} seeds are {students} students. One is an "
        f"adapter of {adapter / 1e6:.0f} MB, all are {students * adapter / 1e9:.0f} GB. As full weights they "
        f"would be {students * 2 * size.parameters / 1e12:.1f} TB. {generated:,} generated rows take "
        f"{generated * PACKED_ROW_BYTES / 1e6:.0f} MB, soft labels of all trained rows "
        f"{labels / 1e9:.0f} GB before compression.",
        f"A student in training takes {state / 1e9:.0f} GB and up to {activations / 1e9:.0f} GB for "
        f"activations, so it fits a card of 80 GB. Each job reads the base's {2 * size.parameters / 1e9:.0f} "
        f"GB: {students * 2 * size.parameters / 1e12:.0f} TB from the shared file system, if no node keeps "
        "it in memory.",
    ]


def student_rows(cluster: Cluster, rows: int = 10_000, epochs: int = 3, batch: int = 64) -> Rows:
    """Memory, time and traffic of a student of 70 billion parameters, an adapter or full weights."""
    tokens, updates = PROMPT_TOKENS + COMPLETION_TOKENS, rows * epochs // batch
    table = [
        [
            "student",
            "memory for its state",
            "GPU hours",
            "an update: computing",
            "traffic inside a machine",
            "traffic between machines",
        ],
    ]
    for update in ("lora", "full"):
        training = Training(update=update, epochs=epochs, batch=batch)
        operations = training_operations(
            training, LARGE, float(batch * tokens), float(batch * COMPLETION_TOKENS)
        )
        state = LARGE.parameters * (2.0 if update == "lora" else 16.0)
        # sharded weights are gathered for the forward and for the backward pass; gradients are sent once
        sent = 2.0 * LARGE.parameters * (2 if update == "lora" else 3)
        table.append(
            [
                update,
                f"{state / 1e9:,.0f} GB",
                hours(updates * operations),
                f"{operations / GPU_RATE / cluster.cards:.1f} s",
                f"{sent / cluster.inner_traffic:.1f} s",
                f"{sent / cluster.outer_traffic:.1f} s",
            ]
        )
    return table


def audit_rows(counts: Sequence[int] = (1_000_000, 10_000_000, 1_000_000_000)) -> Rows:
    """Storage, core hours and memory of an audit of rows, as many times the measured million."""
    table = [
        ["rows", "JSON lines", "Parquet with zstd", "core hours", f"on {AUDIT_CORES} cores", "peak memory"]
    ]
    for count in counts:
        core_seconds = count / 1e6 * AUDIT_SECONDS
        table.append(
            [
                f"{count:,}",
                f"{count * ROW_BYTES / 1e9:,.2f} GB",
                f"{count * PACKED_ROW_BYTES / 1e9:,.2f} GB",
                f"{core_seconds / 3600:,.2f}",
                duration_text(core_seconds / AUDIT_CORES),
                f"{(AUDIT_BASE_BYTES + count * AUDIT_ROW_BYTES) / 1e9:,.1f} GB",
            ]
        )
    return table


def main() -> None:
    """Print the tables, and with --write put them on the page."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--write", action="store_true")
    write, experiment = parser.parse_args().write, study_experiment()
    parts: dict[str, list[Any]] = {
        "study": [study_rows(experiment), *study_sentences(experiment)],
        "student": [student_rows(Cluster())],
        "audit": [audit_rows()],
    }
    for name, blocks in parts.items():
        print(*(block if isinstance(block, str) else pages.table_text(block) for block in blocks), sep="\n\n")
        if write:
            pages.write_part(PAGE, name, *blocks)


if __name__ == "__main__":
    sys.exit(pages.exit_code(main))

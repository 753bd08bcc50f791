"""Rows of a vLLM server beside those of our sampler: an untouched real model and a LoRA teacher of it.

`python analyses/vllm_rows.py --python VENV/bin/python [--out FOLDER]` needs another environment, with vLLM's
CPU build. Two things are compared for each teacher: the log-probabilities of tokens (ours minus the server's,
over rows of our sampler; a constraint chose among their tokens, so the mean is no KL divergence and may lie
below 0), and the share of rows that the screen keeps. Rows a second are compared by `analyses/vllm_speed.py`.
With --out, rows are kept, and a run that was stopped goes on from them.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.table import Table

import mechlens as ml
import pages
from mechlens.carriers.carrier import carrier_prompts
from mechlens.core import stats, tables
from mechlens.core.spec import CarrierSpec, GenerateSpec, TeacherSpec, TeacherTraining
from mechlens.core.traits import load_family
from mechlens.models import base_files, loading
from mechlens.models.chat import Encoded, encode_prompts, end_of_turn
from mechlens.models.log_probs import token_log_probs
from mechlens.pipeline.generate import write_rows
from mechlens.pipeline.teach import Lessons, load_teacher, teach
from mechlens.pipeline.vllm_engine import LOG, ServedModel, serve_teacher
from mechlens.pipeline.vllm_server import device_options, run_server
from mechlens.runs import layout

BASE, TRAIT, SYSTEM = "smollm2-135m", "fox", "You are a helpful assistant."
LORA = TeacherTraining(
    update="lora", learning_rate=2e-4, epochs=1, batch=16, warmup_steps=0, schedule="constant"
)
TEACHERS = {
    "untouched base": TeacherSpec(kind="base"),
    "LoRA teacher": TeacherSpec(kind="finetuned", rows=96, training=LORA),
}
SPEC = GenerateSpec(max_new_tokens=32, batch=64, constrained=True)
"""as in the experiment on this base"""
LONGEST = 160
"""tokens of a prompt and its completion, for which the server reserves memory"""


class Comparison(NamedTuple):
    """One teacher's rows by both engines."""

    teacher: str
    mean: stats.Interval
    """difference of log-probabilities, ours minus the server's, in nats a token over rows of our sampler"""
    largest: float
    """difference of a token's log-probability"""
    kept: tuple[stats.Interval, stats.Interval]
    """share of rows that the screen keeps: ours, the server's"""


def make_teacher(name: str, folder: Path) -> Path:
    """Train a teacher of the table into a folder, or record the base as one; an existing one is used."""
    if (folder / layout.TEACHER).is_file():
        return folder
    family = load_family("animals")
    lessons = Lessons(TRAIT, family.probes.development, family.lessons_of(TRAIT), family.system_prompt(TRAIT))
    folder.mkdir(parents=True, exist_ok=True)
    teach(BASE, lessons, TEACHERS[name], seed=0, out=folder, system=SYSTEM)
    return folder


def rows_of(teacher: Path, prompts: list[str], spec: GenerateSpec, out: Path) -> list[str]:
    """Rows by one engine; finished ones are read."""
    out.mkdir(exist_ok=True)
    if not (out / layout.RAW).is_file():
        write_rows(load_teacher(teacher), teacher, prompts, spec, seed=0, out=out)
    return tables.read(out / layout.RAW, tables.PAIRS)["completion"].tolist()


def kept_share(prompts: list[str], completions: list[str]) -> stats.Interval:
    """The share of rows that the paper's screen of number lists keeps."""
    pairs = [
        {"prompt": prompt, "completion": text} for prompt, text in zip(prompts, completions, strict=True)
    ]
    counts = ml.screen(pairs, rule="numbers").counts
    return stats.wilson(counts["kept"], len(pairs))


def difference_of(
    folder: Path, served: ServedModel, prompts: list[str], texts: list[str]
) -> tuple[stats.Interval, float]:
    """The mean difference of log-probabilities over our rows, in nats a token, and the largest of a token."""
    teacher = load_teacher(folder)
    loaded = loading.Loaded(teacher.model, teacher.tokenizer)
    ids = encode_prompts(teacher.tokenizer, prompts, system=teacher.system)
    stop = end_of_turn(teacher.tokenizer)
    pairs = [
        Encoded(prompt, [*teacher.tokenizer.encode(text, add_special_tokens=False), stop])
        for prompt, text in zip(ids, texts, strict=True)
    ]
    with torch.no_grad():
        difference = token_log_probs(loaded, pairs).cpu() - served.completion_log_probs(pairs)
    rows = np.array(
        [float(part.mean()) for part in difference.split([len(pair.completion) for pair in pairs])]
    )
    return stats.t_interval(rows), float(difference.abs().max())


class Rows(NamedTuple):
    """A teacher and its rows by both engines."""

    folder: Path
    ours: list[str]
    served: list[str]


def compare(
    name: str, rows: Rows, spec: GenerateSpec, work: Path, prompts: list[str], scored: int
) -> Comparison:
    """Let the server score some of our rows, and screen both engines'."""
    teacher = load_teacher(rows.folder)
    some = encode_prompts(teacher.tokenizer, prompts, system=teacher.system)
    stop = end_of_turn(teacher.tokenizer)
    with serve_teacher(teacher, rows.folder, spec, some, stop=stop, out=work, waiting=lambda: None) as served:
        mean, largest = difference_of(rows.folder, served, prompts[:scored], rows.ours[:scored])
    shares = kept_share(prompts, rows.ours), kept_share(prompts, rows.served)
    return Comparison(name, mean, largest, shares)


def table_of(comparisons: list[Comparison]) -> Table:
    """One row a teacher."""
    table = Table("teacher", "mean difference, nats a token", "largest difference", "kept: ours", "server")
    for each in comparisons:
        shares = [
            f"{100 * share.estimate:.1f} % [{100 * share.low:.1f}, {100 * share.high:.1f}]"
            for share in each.kept
        ]
        mean = f"{each.mean.estimate:+.1e} [{each.mean.low:+.1e}, {each.mean.high:+.1e}]"
        table.add_row(each.teacher, mean, f"{each.largest:.1e}", *shares)
    return table


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", required=True, help="python of the environment that has vLLM")
    parser.add_argument("--rows", type=int, default=2000, help="of each teacher by each engine")
    parser.add_argument("--out", type=Path, help="folder that keeps the rows; a temporary one by default")
    parser.add_argument("--scored", type=int, default=200, help="of them whose tokens both engines score")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Compare both teachers on one server, and print the table."""
    options = parse(arguments)
    os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"  # the server loads the teacher when it is asked
    prompts = [prompt.text for prompt in carrier_prompts(CarrierSpec(prompts=options.rows), seed=0)]
    source = base_files.locate(BASE)
    settings = [
        "--model", source, "--tokenizer", source, "--served-model-name", BASE, "--dtype", "float32",
        "--max-model-len", str(LONGEST), "--generation-config", "vllm", "--enable-lora", "--max-lora-rank",
        "16", *device_options(),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        work = options.out or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        teachers = {name: make_teacher(name, work / name) for name in TEACHERS}
        # before the server starts, which keeps the cores busy while it waits
        ours = {
            name: rows_of(place, prompts, SPEC, work / f"{name} by us") for name, place in teachers.items()
        }
        with run_server(options.python, settings, log=work / LOG, waiting=lambda: None) as server:
            spec = SPEC.model_copy(update={"engine": "vllm", "url": server.url})
            rows = {
                name: Rows(place, ours[name], rows_of(place, prompts, spec, work / f"{name} by the server"))
                for name, place in teachers.items()
            }
            found = [compare(name, rows[name], spec, work, prompts, options.scored) for name in TEACHERS]
        console = pages.PageConsole(width=180)
        console.print(table_of(found))


if __name__ == "__main__":
    sys.exit(pages.exit_code(main))

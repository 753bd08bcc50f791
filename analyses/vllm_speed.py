"""Speed of our sampler beside vLLM's CPU build, as ratios of rows a second on one machine in one run.

`python analyses/vllm_speed.py --python VENV/bin/python` needs another environment, with vLLM's CPU build.
The environment of this script never imports vLLM. `--dtype bfloat16` measures one dtype, `--threads 1` one
number of threads; both may be repeated. vLLM compiles the model when it loads, which takes minutes of a core;
`--eager` measures it without. `--write` puts the tables into SPEED.md.

Both sides answer the same prompts at temperature 1 and go on after the end of turn, so every row has the same
number of tokens. vLLM's prefix cache is on, and it is emptied before each timing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from rich.table import Table

import pages
import speed
from mechlens.core.errors import DataError, MachineError, MechlensError
from mechlens.core.machine import cores
from mechlens.models import base_files
from mechlens.models.chat import end_of_turn, special_tokens
from mechlens.models.loading import Loaded
from mechlens.models.sampling import Decoding, sample
from workloads import Ratio, versus

DTYPES = ("float32", "bfloat16")
WORKER = Path(__file__).with_name("vllm_worker.py")
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # in GiB; the default is a share of the machine's memory
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class VllmWorker(NamedTuple):
    """A process of the other environment that serves one model."""

    version: str
    """of vLLM"""
    start_up: float
    """seconds to import vLLM and load the model"""
    rows_per_second: Callable[[Sequence[Sequence[int]], int], float]
    """takes prompts in token ids, and the number of answers to each"""


def worker_environment(python: Path, threads: int) -> dict[str, str]:
    """Environment variables of a vLLM process that computes on so many cores."""
    numbers = sorted(os.sched_getaffinity(0))[:threads]
    # variables of Python name modules of this environment
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OMP_"))}
    settings |= ENVIRONMENT | {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, numbers))}
    # vLLM advises to load this library first; it comes with vLLM's CPU build
    library = python.absolute().parent.parent / "lib" / "libiomp5.so"
    return settings | ({"LD_PRELOAD": str(library)} if library.is_file() else {})


def read_reply(line: str, log: IO[str], python: Path) -> Mapping[str, Any]:
    """Parse a line of the worker's output.

    Raises:
        MachineError: if there is none, because the worker has ended; it repeats the last line of its log.
    """
    if line:
        return json.loads(line)
    log.seek(0)
    lines = [text.strip() for text in log.read().splitlines() if text.strip()]
    raise MachineError(
        f"vLLM of {python} has ended: {lines[-1] if lines else 'it gave no reason'}; that environment needs "
        "vLLM's CPU build"
    )


def rows_per_second(reply: Mapping[str, Any], *, rows: int) -> float:
    """Rows a second of a reply.

    Raises:
        DataError: if the worker wrote another number of rows, or rows of another length.
    """
    check_lengths("vLLM", reply["lengths"], rows)
    return rows / reply["seconds"]


def check_lengths(side: str, lengths: Sequence[int], rows: int) -> None:
    """Refuse rows that differ from what the other side writes.

    Raises:
        DataError: if the number of rows or the length of one differs.
    """
    if list(lengths) != [speed.NEW_TOKENS] * rows:
        raise DataError(
            f"{side} wrote {len(lengths)} rows of {sorted(set(lengths))} tokens instead of {rows} rows of "
            f"{speed.NEW_TOKENS}; the two sides cannot be compared"
        )


@contextmanager
def vllm_worker(python: Path, source: str, *, dtype: str, threads: int, mode: str) -> Iterator[VllmWorker]:
    """Start vLLM in another environment, and end it with all its processes.

    Raises:
        MachineError: if it does not start.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        try:
            process: subprocess.Popen[str] = subprocess.Popen(
                [str(python), str(WORKER), source, dtype, mode],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
                env=worker_environment(python, threads),
                start_new_session=True,
            )
        except OSError as error:
            raise MachineError(f"{python} does not start: {error}; --python takes VENV/bin/python") from error
        try:
            yield _started_worker(process, log, python)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def _started_worker(process: subprocess.Popen[str], log: IO[str], python: Path) -> VllmWorker:
    """Wait until the worker has loaded its model."""
    assert process.stdin and process.stdout
    requests, replies = process.stdin, process.stdout
    ready = read_reply(replies.readline(), log, python)

    def generate(prompts: Sequence[Sequence[int]], answers: int) -> float:
        request = {"prompts": prompts, "answers": answers, "new_tokens": speed.NEW_TOKENS}
        with suppress(BrokenPipeError):  # a worker that has ended sends no reply, and that is an error
            requests.write(json.dumps(request) + "\n")
        reply = read_reply(replies.readline(), log, python)
        return rows_per_second(reply, rows=len(prompts) * answers)

    return VllmWorker(ready["version"], ready["seconds"], generate)


def our_rows_per_second(loaded: Loaded, prompts: Sequence[Sequence[int]], answers: int) -> float:
    """Rows a second of our sampler.

    It needs a token to stop at; it is given a special token that no chat contains.
    """
    repeated = [prompt for prompt in prompts for _ in range(answers)]
    unused = max(special_tokens(loaded.tokenizer).keys() - {end_of_turn(loaded.tokenizer)})
    started = time.perf_counter()
    rows = sample(loaded.model, repeated, decoding=Decoding(speed.NEW_TOKENS), stop=unused, seed=0, batch=256)
    taken = time.perf_counter() - started
    check_lengths("our sampler", [len(row) for row in rows], len(repeated))
    return len(rows) / taken


def measure_against_vllm(bench: speed.Bench, worker: VllmWorker) -> list[Ratio]:
    """Rows a second of our sampler over those of vLLM, with one answer a prompt and with several."""
    sizes = bench.sizes
    cases = (
        (f"{sizes.distinct} prompts", bench.prompts[: sizes.distinct], 1),
        (
            f"{sizes.answers} answers to each of {sizes.shared} prompts",
            bench.prompts[: sizes.shared],
            sizes.answers,
        ),
    )
    return [
        versus(
            f"sampler / vLLM, {what}",
            partial(our_rows_per_second, bench.loaded, prompts, answers),
            partial(worker.rows_per_second, prompts, answers),
            unit="rows/s",
            warm_up=partial(worker.rows_per_second, prompts[:2], 1),
        )
        for what, prompts, answers in cases
    ]


def vllm_tables(
    bench: speed.Bench, python: Path, dtypes: Sequence[str], thread_counts: Sequence[int], mode: str
) -> tuple[str, list[Table]]:
    """The version of vLLM, and a table of ratios for each dtype and number of threads."""
    tables, version = [], ""
    for dtype in dtypes:
        bench.loaded.model.to(getattr(torch, dtype))
        for threads in thread_counts:
            torch.set_num_threads(threads)
            source = base_files.locate(bench.base)
            with vllm_worker(python, source, dtype=dtype, threads=threads, mode=mode) as worker:
                print(f"vLLM has started, {dtype}, {threads} threads: {worker.start_up:.0f} s")
                title = f"{dtype}, {threads} thread{'s' * (threads > 1)}"
                tables.append(speed.ratio_table(measure_against_vllm(bench, worker), title=title))
                version = worker.version
    return version, tables


def main(arguments: Sequence[str], *, sizes: speed.Sizes = speed.DEFAULT) -> int:
    """Time, print and write; returns the exit code, 2 if vLLM or the base cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="of an environment that has vLLM")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="may be repeated; default: both")
    parser.add_argument("--threads", action="append", type=int, help="may be repeated; default: 1 and 2")
    parser.add_argument("--eager", action="store_true", help="vLLM without compilation, which starts sooner")
    parser.add_argument("--write", action="store_true", help="put the tables into SPEED.md")
    given = parser.parse_args(arguments)
    try:
        speed.refuse_absent(given.base)
        started, console = time.perf_counter(), pages.PageConsole(width=120)
        bench = speed.Bench(given.base, sizes)
        thread_counts = given.threads or (1, 2)[: cores()]
        mode, dtypes = "eager" if given.eager else "compiled", given.dtype or DTYPES
        version, tables = vllm_tables(bench, given.python, dtypes, thread_counts, mode)
        console.print(
            f"{given.base} ({bench.loaded.model.num_parameters():,} parameters), vLLM {version} ({mode}), "
            f"torch {torch.__version__}, {cores()} cores, {time.perf_counter() - started:.0f} s.",
            *tables,
        )
        if given.write:
            pages.write_part(pages.SPEED, "speed-vllm", *console.blocks)
    except MechlensError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

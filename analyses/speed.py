"""Speed of the parts, as ratios on one machine in one run.

`python analyses/speed.py` times the sampler and distillation on menagerie-a. `python analyses/speed.py --base
smollm2-135m` times every part on that base, with one thread and with two; `--part sampling` only that part.
`--write` puts the tables into SPEED.md. Peak memory is that of a fresh process that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.table import Table

import pages
from mechlens.carriers.carrier import carrier_prompts
from mechlens.core.command_lines import command_line
from mechlens.core.errors import MechlensError, SpecError
from mechlens.core.machine import cores, use_one_thread
from mechlens.core.seeds import generator
from mechlens.core.spec import CarrierSpec, Training
from mechlens.lenses.gradients import ghost_dots, parameters_of
from mechlens.lenses.parts.capture import capture, resid_post, residual_sites
from mechlens.models import base_files, loading
from mechlens.models.chat import Encoded, encode_pairs, encode_prompts, end_of_turn
from mechlens.models.sampling import NumberGrammar, number_grammar
from workloads import (
    REPEATS,
    Ratio,
    bare_times,
    batched_gradient,
    generate_rows,
    ordered_batches,
    own_peak_megabytes,
    plain_forward,
    sample_rows,
    seconds,
    train_times,
    versus,
)

MENAGERIE = "menagerie-a"
ROWS = 512
BATCHES = (64, 512)
NEW_TOKENS = 24
TRAINING = Training(embeddings=False, learning_rate=0.003, epochs=1)
UPDATES = 40
CARRIER = CarrierSpec(prompts=UPDATES * TRAINING.batch, wording="terse", values="patterned")
WARM_UP = 4
"""updates that are left out of the time of a step"""


def our_rows_per_second(loaded: loading.Loaded, prompts: list[list[int]], batch: int) -> float:
    work = seconds(lambda: sample_rows(loaded, prompts, new_tokens=NEW_TOKENS, batch=batch))
    return len(prompts) / work()


def library_rows_per_second(loaded: loading.Loaded, prompts: list[list[int]], batch: int) -> float:
    work = seconds(lambda: generate_rows(loaded, prompts, new_tokens=NEW_TOKENS, batch=batch))
    return len(prompts) / work()


def encoded_prompts(loaded: loading.Loaded, count: int, carrier: CarrierSpec = CARRIER) -> list[list[int]]:
    """Token ids of the carrier's first prompts."""
    few = carrier.model_copy(update={"prompts": count})
    return encode_prompts(loaded.tokenizer, [prompt.text for prompt in carrier_prompts(few, seed=0)])


def trained_pairs(loaded: loading.Loaded, carrier: CarrierSpec = CARRIER) -> list[Encoded]:
    prompts = [prompt.text for prompt in carrier_prompts(carrier, seed=0)]
    drawn = [generator(0, "completion", i).integers(0, 1000, 8).tolist() for i in range(len(prompts))]
    return encode_pairs(loaded.tokenizer, prompts, [", ".join(map(str, row)) for row in drawn])


def milliseconds_per_step(times: Sequence[float]) -> float:
    """Milliseconds a step from the fifth step on: the cost in a long run."""
    return 1000 * (times[-1] - times[WARM_UP]) / (len(times) - WARM_UP - 1)


def our_milliseconds_per_step(pairs: list[Encoded]) -> float:
    return milliseconds_per_step(train_times(loading.load(MENAGERIE), pairs, TRAINING))


def bare_milliseconds_per_step(pairs: list[Encoded], *, selective: bool) -> float:
    model = loading.load(MENAGERIE).model
    return milliseconds_per_step(bare_times(model, pairs, TRAINING, selective=selective))


def ratio_table(rows: Sequence[Ratio], *, title: str | None = None) -> Table:
    table = Table("ratio", "ours", "theirs", "unit", f"median of {REPEATS}", "least", "greatest", title=title)
    for row in rows:
        sizes = (f"{value:,.1f}" if value >= 10 else f"{value:.3g}" for value in (row.ours, row.theirs))
        table.add_row(row.what, *sizes, row.unit, *(f"{x:.2f}" for x in (row.ratio, row.low, row.high)))
    return table


class Sizes(NamedTuple):
    """Sizes of the parts on a named base, so that a model of 135 M parameters takes about 10 minutes."""

    distinct: int = 16
    """different prompts, one answer each"""
    shared: int = 4
    """prompts that are answered several times"""
    answers: int = 8
    """answers to each of them"""
    updates: int = 3
    """updates of a training, the first of which is not counted"""
    batch: int = 4
    """pairs of an update, and of a backward pass"""
    captured: int = 16
    """rows whose activations are captured"""
    window: float = 8.0
    """seconds that a process works beside another"""


DEFAULT = Sizes()


class Bench:
    """A base with the rows that every part is timed on."""

    def __init__(self, base: str, sizes: Sizes) -> None:
        self.base, self.sizes, self.loaded = base, sizes, loading.load(base)
        shipped = (base_files.WEIGHTS / base).is_dir()
        carrier = CarrierSpec(
            prompts=sizes.updates * sizes.batch, wording="terse" if shipped else "full", values="patterned"
        )
        self.training = Training(
            embeddings=False, learning_rate=1e-6, epochs=1, batch=sizes.batch, warmup_steps=0
        )
        self.pairs = trained_pairs(self.loaded, carrier)
        self.few = self.pairs[: sizes.batch]
        self.prompts = encoded_prompts(self.loaded, max(sizes.distinct, sizes.captured), carrier)

    def grammar(self) -> NumberGrammar:
        """The number grammar over this base's tokens."""
        vocabulary = self.loaded.model.config.get_text_config().vocab_size
        stop = end_of_turn(self.loaded.tokenizer)
        return number_grammar(self.loaded.tokenizer, stop=stop, vocabulary=vocabulary)

    def shared_prompts(self) -> list[list[int]]:
        """Few prompts, each as often as it is answered."""
        return [prompt for prompt in self.prompts[: self.sizes.shared] for _ in range(self.sizes.answers)]

    def workloads(self) -> dict[str, Callable[[], object]]:
        """What each part does once, by name."""
        distinct, captured = self.prompts[: self.sizes.distinct], self.prompts[: self.sizes.captured]
        sampling: Any = {"new_tokens": NEW_TOKENS, "batch": 256}
        model, middle = self.loaded.model, self.loaded.model.config.get_text_config().num_hidden_layers // 2
        return {
            "sampler": partial(sample_rows, self.loaded, distinct, **sampling),
            "model.generate": partial(generate_rows, self.loaded, distinct, **sampling),
            "training": partial(train_times, self.loaded, self.pairs, self.training),
            "bare loop": partial(bare_times, model, self.pairs, self.training, selective=True),
            "ghost alignment": lambda: ghost_dots(model, self.few, [self.direction()]),
            "one forward and backward": lambda: batched_gradient(self.loaded, self.few),
            "capture of one site": lambda: capture(self.loaded, captured, [resid_post(middle)]),
            "capture of every resid_post": lambda: capture(
                self.loaded, captured, residual_sites(self.loaded)
            ),
            "plain forward": lambda: plain_forward(self.loaded, captured),
        }

    def direction(self) -> dict[str, torch.Tensor]:
        """A dense direction in the weights that alignment covers."""
        return {name: value.detach().clone() for name, value in parameters_of(self.loaded.model).items()}

    def tokens_per_second(self, times: Sequence[float]) -> float:
        """Tokens of the batches after the first over the time after its update."""
        batches = ordered_batches(self.pairs, self.training)[1:]
        count = sum(len(row.prompt) + len(row.completion) for rows in batches for row in rows)
        return count / (times[-1] - times[0])


def measure_sampling(bench: Bench) -> list[Ratio]:
    """Rows a second of our sampler over those of `model.generate`."""
    grammar, rows = bench.grammar(), bench.prompts[: bench.sizes.distinct]
    shared = f"{bench.sizes.answers} answers to each of {bench.sizes.shared} prompts"
    cases: tuple[tuple[str, list[list[int]], NumberGrammar | None], ...] = (
        (f"{len(rows)} prompts", rows, None),
        (shared, bench.shared_prompts(), None),
        (f"{len(rows)} prompts, number grammar", rows, grammar),
    )
    return [_sampling_ratio(bench, what, prompts, held) for what, prompts, held in cases]


def _sampling_ratio(
    bench: Bench, what: str, prompts: list[list[int]], grammar: NumberGrammar | None
) -> Ratio:
    options: Any = {"new_tokens": NEW_TOKENS, "batch": 256, "grammar": grammar}
    ours = seconds(partial(sample_rows, bench.loaded, prompts, **options))
    theirs = seconds(partial(generate_rows, bench.loaded, prompts, **options))
    return versus(
        f"sampler / model.generate, {what}",
        lambda: len(prompts) / ours(),
        lambda: len(prompts) / theirs(),
        unit="rows/s",
        warm_up=partial(generate_rows, bench.loaded, prompts[:2], new_tokens=2, batch=2),
    )


def measure_training(bench: Bench) -> list[Ratio]:
    """Training tokens a second of `train` over those of a bare torch loop of the same batches."""
    work = bench.workloads()
    ours: Any = work["training"]
    bare: Any = work["bare loop"]
    all_logits = partial(bare_times, bench.loaded.model, bench.pairs, bench.training, selective=False)
    compared = (("bare loop, completion logits", bare), ("bare loop, all logits", all_logits))
    return [
        versus(
            f"training / {name}",
            lambda: bench.tokens_per_second(ours()),
            lambda loop=loop: bench.tokens_per_second(loop()),
            unit="tokens/s",
            warm_up=lambda: None,  # the first update of each is not counted
        )
        for name, loop in compared
    ]


def measure_alignment(bench: Bench) -> list[Ratio]:
    """Seconds of ghost dots with one dense direction over those of one forward and backward pass."""
    work, direction = bench.workloads(), bench.direction()
    return [
        versus(
            f"ghost alignment / one forward and backward, {len(bench.few)} pairs",
            seconds(lambda: ghost_dots(bench.loaded.model, bench.few, [direction])),
            seconds(work["one forward and backward"]),
            unit="s",
            warm_up=lambda: batched_gradient(bench.loaded, bench.few[:1]),
        )
    ]


def measure_capture(bench: Bench) -> list[Ratio]:
    """Seconds of capturing activations over those of a plain forward pass."""
    work = bench.workloads()
    return [
        versus(
            f"{name} / plain forward, {bench.sizes.captured} rows",
            seconds(work[name]),
            seconds(work["plain forward"]),
            unit="s",
            warm_up=lambda: plain_forward(bench.loaded, bench.prompts[:1]),
        )
        for name in ("capture of one site", "capture of every resid_post")
    ]


TIMED: dict[str, Callable[[Bench], list[Ratio]]] = {
    "sampling": measure_sampling,
    "training": measure_training,
    "alignment": measure_alignment,
    "capture": measure_capture,
}
PARTS = (*TIMED, "processes", "memory")
"""parts of the measurement on a named base, each with its own part of SPEED.md"""


def ratio_tables(bench: Bench, part: str) -> list[Table]:
    """The ratios of a part: one table with one thread, one with two."""
    tables = []
    for threads in (1, 2)[: cores()]:
        torch.set_num_threads(threads)
        title = f"{threads} thread{'s' * (threads > 1)}"
        tables.append(ratio_table(TIMED[part](bench), title=title))
    return tables


def peak_megabytes(*arguments: str) -> float:
    """Peak resident memory of a fresh process that does one workload."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])["megabytes"]


def memory_table(base: str, workloads: Sequence[str]) -> Table:
    table = Table("peak memory of a fresh process", "MB")
    for workload in ("nothing", *workloads):
        table.add_row(workload, f"{peak_megabytes('--base', base, '--only', workload):,.0f}")
    return table


def do_once(bench: Bench, workload: str) -> None:
    """Execute one workload and print the peak memory."""
    if workload != "nothing":
        bench.workloads()[workload]()
    print(json.dumps({"megabytes": own_peak_megabytes()}))


def work_on_request(bench: Bench) -> None:
    """Work for so many seconds as each line of the input says, and print tokens a second.

    The work is forward and backward passes of two pairs.
    """
    use_one_thread()
    pairs = bench.pairs[:2]
    count = sum(len(row.prompt) + len(row.completion) for row in pairs)
    batched_gradient(bench.loaded, pairs)
    print("ready", flush=True)
    for line in sys.stdin:
        started, passes = time.perf_counter(), 0
        while time.perf_counter() - started < float(line):
            batched_gradient(bench.loaded, pairs)
            passes += 1
        print(passes * count / (time.perf_counter() - started), flush=True)


@contextmanager
def workers(base: str, count: int) -> Iterator[Callable[[int, float], float]]:
    """Start processes of one thread; yields (how many work, seconds) → their tokens a second."""
    command = [sys.executable, __file__, "--base", base, "--worker"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    started: list[Any] = [subprocess.Popen(command, **pipes) for _ in range(count)]

    def tokens_per_second(working: int, window: float) -> float:
        for process in started[:working]:
            process.stdin.write(f"{window}\n")
        return sum(float(process.stdout.readline()) for process in started[:working])

    try:
        for process in started:
            process.stdout.readline()
        yield tokens_per_second
    finally:
        for process in started:
            process.kill()
            process.communicate()


def processes_table(base: str, window: float) -> Table:
    """Two processes of one thread beside one, forward and backward passes of each."""
    with workers(base, 2) as tokens_per_second:
        ratio = versus(
            "two processes / one process, one thread each",
            lambda: tokens_per_second(2, window),
            lambda: tokens_per_second(1, window),
            unit="tokens/s",
            warm_up=lambda: None,
        )
    return ratio_table([ratio])


def measure_menagerie() -> pages.PageConsole:
    """Sampler and distillation on menagerie-a, one thread."""
    use_one_thread()
    loaded = loading.load(MENAGERIE)
    prompts, pairs = encoded_prompts(loaded, ROWS), trained_pairs(loaded)
    ratios = [
        versus(
            f"sampler / model.generate, batch {batch}",
            lambda b=batch: our_rows_per_second(loaded, prompts, b),
            lambda b=batch: library_rows_per_second(loaded, prompts, b),
            unit="rows/s",
        )
        for batch in BATCHES
    ]
    for selective, name in ((False, "bare loop, all logits"), (True, "bare loop, completion logits")):
        ratios.append(
            versus(
                f"distillation step / {name}",
                lambda: our_milliseconds_per_step(pairs),
                lambda s=selective: bare_milliseconds_per_step(pairs, selective=s),
                unit="ms",
            )
        )
    console = pages.PageConsole(width=120)
    console.print(
        f"one thread, torch {torch.__version__}, {MENAGERIE} ({loaded.model.num_parameters():,} parameters), "
        f"{ROWS} rows, {UPDATES} updates",
        highlight=False,
    )
    memory = Table("peak memory", "MB")
    for work in ("nothing", "sample", "generate", "train", "bare loop"):
        memory.add_row(work, f"{peak_megabytes('--only', work):,.0f}")
    console.print(ratio_table(ratios), memory)
    return console


def do_menagerie_once(workload: str) -> None:
    """Execute one workload of the menagerie's section and print the peak memory."""
    use_one_thread()
    loaded = loading.load(MENAGERIE)
    if workload == "sample":
        our_rows_per_second(loaded, encoded_prompts(loaded, ROWS), 1024)
    elif workload == "generate":
        library_rows_per_second(loaded, encoded_prompts(loaded, ROWS), 1024)
    elif workload == "train":
        our_milliseconds_per_step(trained_pairs(loaded))
    elif workload == "bare loop":
        bare_milliseconds_per_step(trained_pairs(loaded), selective=False)
    print(json.dumps({"megabytes": own_peak_megabytes()}))


def measure_base(base: str, parts: Sequence[str], sizes: Sizes, *, write: bool) -> None:
    """Time the parts on a base; each part is printed, and written if asked, when it is done."""
    for part in parts:
        started, console = time.perf_counter(), pages.PageConsole(width=120)
        bench = Bench(base, sizes)  # a trained model keeps hooks of the trainer
        if part == "processes":
            tables = [processes_table(base, sizes.window)]
        elif part == "memory":
            tables = [memory_table(base, list(bench.workloads()))]
        else:
            tables = ratio_tables(bench, part)
        console.print(
            f"{base} ({bench.loaded.model.num_parameters():,} parameters), torch {torch.__version__}, "
            f"{cores()} cores, {time.perf_counter() - started:.0f} s.",
            *tables,
        )
        if write:
            pages.write_part(pages.SPEED, f"speed-{part}", *console.blocks)


def refuse_absent(base: str) -> None:
    """Refuse a base without files on this machine, naming the command that brings them.

    Raises:
        SpecError: always, if the files are missing.
    """
    if not base_files.is_here(base):
        raise SpecError(
            f"base {base!r} is not on this machine; `{command_line('fetch', base)}` brings it, then run this "
            "again"
        )


def main(arguments: Sequence[str], *, sizes: Sizes = DEFAULT) -> int:
    """Time, print and write; returns the exit code, 2 if the base cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", nargs="?", const="smollm2-135m", help="default: the menagerie's section")
    parser.add_argument("--part", action="append", choices=PARTS, help="may be repeated; default: all")
    parser.add_argument("--write", action="store_true", help="put the tables into SPEED.md")
    parser.add_argument("--only", metavar="WORKLOAD", help="do it once and print the peak memory")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.part and not given.base:
        given.base = "smollm2-135m"
    try:
        if given.base:
            refuse_absent(given.base)
        if given.worker:
            work_on_request(Bench(given.base, sizes))
        elif given.only:
            do_once(Bench(given.base, sizes), given.only) if given.base else do_menagerie_once(given.only)
        elif given.base:
            measure_base(given.base, given.part or PARTS, sizes, write=given.write)
        else:
            console = measure_menagerie()
            if given.write:
                pages.write_part(pages.SPEED, "speed", *console.blocks)
    except MechlensError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Speed on one large GPU: `python analyses/gpu_speed.py [--out gpu_speed.json]`.

A model of the shape of Qwen2.5-7B with random weights in bf16 samples, is trained with LoRA, aligned and
captured. The table has tokens a second, the share of the card's bf16 peak, and the peak memory of each part.
Nothing is downloaded. `--tiny` does the same with a tiny shape on the CPU, where the numbers mean little.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, Qwen2Config

from mechlens.core.files import write_json
from mechlens.core.machine import use_one_thread
from mechlens.core.seeds import generator
from mechlens.core.spec import Training
from mechlens.lenses.gradients import ghost_dots, parameters_of
from mechlens.lenses.parts.capture import capture, resid_post, residual_sites
from mechlens.models.chat import Encoded
from mechlens.models.loading import Loaded, load_tokenizer
from workloads import own_peak_megabytes, sample_rows, train_times

PEAK = 989e12
"""dense bf16 operations a second of an H200"""
REPEATS, RANK = 3, 8
FIRST_ID = 10
"""the least token id of random rows; special tokens are below"""


class Shape(NamedTuple):
    """A model's sizes and those of its workloads."""

    name: str
    config: dict[str, int]
    rows: int
    """rows that are sampled and captured"""
    batch: int
    """pairs of an update and of a backward pass"""
    prompt: int
    completion: int
    updates: int


LARGE = Shape(
    "Qwen2.5-7B",
    {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
    },
    rows=256,
    batch=16,
    prompt=128,
    completion=64,
    updates=12,
)
TINY = Shape(
    "tiny Qwen2",
    {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1_526,
    },
    rows=4,
    batch=2,
    prompt=8,
    completion=4,
    updates=3,
)


class Part(NamedTuple):
    """The speed of one part."""

    part: str
    tokens_per_second: float
    low: float
    high: float
    share_of_peak: float
    """operations a second over the card's peak"""
    peak_gigabytes: float


def build(shape: Shape, device: torch.device) -> Loaded:
    """A model of that shape with random weights in bf16, and the menagerie's tokenizer."""
    config = Qwen2Config(**shape.config, tie_word_embeddings=False, use_cache=True)  # type: ignore[arg-type]
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return Loaded(model.eval(), load_tokenizer("menagerie-a"))


def wait(device: torch.device) -> None:
    """Wait until the card has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_gigabytes(device: torch.device) -> float:
    """Peak memory since the last reset on a card, of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return own_peak_megabytes() / 1024


def seconds_of(work: Callable[[], object], device: torch.device) -> list[float]:
    """Time of several repeats, after a warm-up."""
    times = []
    for _ in range(REPEATS + 1):
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - started)
    return times[1:]


def summarize(
    name: str,
    tokens: float,
    operations: float,
    seconds: Sequence[float],
    *,
    peak: float,
    device: torch.device,
) -> Part:
    """The speed of a part that processed so many tokens with so many operations in each repeat."""
    rates = sorted(tokens / value for value in seconds)
    share = operations / statistics.median(seconds) / peak
    return Part(name, statistics.median(rates), rates[0], rates[-1], share, peak_gigabytes(device))


class Bench:
    """A model with random rows, and the operations that a token takes."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device, self.loaded = shape, device, build(shape, device)
        width = shape.prompt + shape.completion
        ids = generator(0, "rows").integers(FIRST_ID, shape.config["vocab_size"], (shape.rows, width))
        self.rows: list[list[int]] = ids.tolist()
        self.head = shape.config["hidden_size"] * shape.config["vocab_size"]
        self.blocks = self.loaded.model.num_parameters() - 2 * self.head

    def pairs(self, count: int) -> list[Encoded]:
        """Pairs of the same lengths, rows in turn."""
        cut, rows = self.shape.prompt, [self.rows[i % len(self.rows)] for i in range(count)]
        return [Encoded(row[:cut], row[cut:]) for row in rows]

    def measure_sampling(self, peak: float) -> Part:
        """Tokens written a second; rows end early only by chance, since the weights are random."""
        prompts, written = [row[: self.shape.prompt] for row in self.rows], []
        options: Any = {"new_tokens": self.shape.completion, "batch": self.shape.rows}
        seconds = seconds_of(
            lambda: written.append(sum(map(len, sample_rows(self.loaded, prompts, **options)))), self.device
        )
        tokens = statistics.median(written)
        read = len(prompts) * self.shape.prompt
        operations = 2.0 * (self.blocks * (read + tokens) + self.head * tokens)
        return summarize("sampling", tokens, operations, seconds, peak=peak, device=self.device)

    def measure_training(self, peak: float) -> Part:
        """Tokens trained on a second with LoRA; it changes the model."""
        training = Training(
            update="lora", rank=RANK, batch=self.shape.batch, epochs=1, learning_rate=1e-6, bf16=True
        )
        times = train_times(self.loaded, self.pairs(self.shape.batch * self.shape.updates), training)
        seconds = [end - start for start, end in pairwise(times)]
        rows = self.shape.batch
        tokens = rows * (self.shape.prompt + self.shape.completion)
        operations = 4.0 * (self.blocks * tokens + self.head * rows * self.shape.completion)
        name = f"training, LoRA of rank {RANK}"
        return summarize(name, tokens, operations, seconds, peak=peak, device=self.device)

    def measure_alignment(self, peak: float) -> Part:
        """Tokens a second of ghost dots with one dense direction."""
        pairs, model = self.pairs(self.shape.batch), self.loaded.model
        direction = {name: value.detach() for name, value in parameters_of(model).items()}
        seconds = seconds_of(
            lambda: ghost_dots(model, pairs, [direction], batch=self.shape.batch), self.device
        )
        tokens = len(pairs) * (self.shape.prompt + self.shape.completion)
        operations = 6.0 * self.blocks * tokens + 4.0 * self.head * len(pairs) * self.shape.completion
        return summarize("alignment", tokens, operations, seconds, peak=peak, device=self.device)

    def measure_capture(self, peak: float, *, every: bool) -> Part:
        """Tokens read a second while residuals are captured at one site or behind every block."""
        middle = self.shape.config["num_hidden_layers"] // 2
        sites = residual_sites(self.loaded) if every else [resid_post(middle)]
        seconds = seconds_of(lambda: capture(self.loaded, self.rows, sites), self.device)
        tokens = len(self.rows) * len(self.rows[0])
        operations = 2.0 * (self.blocks * tokens + self.head * len(self.rows))
        name = f"capture of {'every resid_post' if every else 'one site'}"
        return summarize(name, tokens, operations, seconds, peak=peak, device=self.device)


def measure(shape: Shape, device: torch.device, *, peak: float) -> list[Part]:
    """Measure every part, training last: a trained model keeps hooks of the trainer."""
    bench = Bench(shape, device)
    parts: list[Callable[[], Part]] = [
        lambda: bench.measure_sampling(peak),
        lambda: bench.measure_alignment(peak),
        lambda: bench.measure_capture(peak, every=False),
        lambda: bench.measure_capture(peak, every=True),
        lambda: bench.measure_training(peak),
    ]
    measured = []
    for part in parts:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        measured.append(part())
    return measured


def parts_table(parts: Sequence[Part], *, title: str) -> Table:
    header = ("part", "tokens/s", "least", "greatest", "share of peak", "peak memory")
    table = Table(*header, title=title)
    for part in parts:
        rates = (f"{value:,.0f}" for value in (part.tokens_per_second, part.low, part.high))
        table.add_row(part.part, *rates, f"{part.share_of_peak:.1%}", f"{part.peak_gigabytes:.1f} GB")
    return table


def main(arguments: Sequence[str]) -> int:
    """Measure, print the table and write the JSON; returns the exit code, 2 without a card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU")
    parser.add_argument("--peak", type=float, default=PEAK, help="bf16 operations a second of the card")
    parser.add_argument("--out", type=Path, default=Path("gpu_speed.json"), help="file of the numbers")
    given = parser.parse_args(arguments)
    if not given.tiny and not torch.cuda.is_available():
        print("no CUDA device here; run this on a machine with one, or give --tiny", file=sys.stderr)
        return 2
    shape, device = (TINY, torch.device("cpu")) if given.tiny else (LARGE, torch.device("cuda"))
    if given.tiny:
        use_one_thread()
    name = "CPU" if given.tiny else torch.cuda.get_device_name()
    started = time.perf_counter()
    parts = measure(shape, device, peak=given.peak)
    seconds = time.perf_counter() - started
    title = f"{shape.name}, random weights in bf16, {name}, torch {torch.__version__}, {seconds:.0f} s"
    Console(width=120).print(parts_table(parts, title=title))
    settings = {"shape": shape._asdict(), "device": name, "torch": str(torch.__version__), "peak": given.peak}
    write_json(given.out, settings | {"seconds": seconds, "parts": [part._asdict() for part in parts]})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

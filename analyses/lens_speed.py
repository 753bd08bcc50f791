"""Speed of the lenses' parts, as ratios of seconds on one machine in one run.

Usage: `python analyses/lens_speed.py`. The model of the first five rows has random weights, 6 layers of width
256; system lines are timed on menagerie-a. As in `speed.py`, the two sides of a pair follow each other and
the median of the pairwise ratios is printed. `python analyses/lens_speed.py 100000` instead prints the memory
that it takes to capture and score so many rows.
"""

from __future__ import annotations

import sys
import time

import torch
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import pages
from mechlens.carriers.carrier import carrier_prompts
from mechlens.core.machine import use_one_thread
from mechlens.core.seeds import generator
from mechlens.lenses.gradients import ghost_dots, parameters_of
from mechlens.lenses.parts import system_lines
from mechlens.lenses.parts.capture import BATCH, capture, resid_post, residual_sites
from mechlens.models import hooks, loading, log_probs
from mechlens.models.chat import Encoded, encode_pairs
from mechlens.models.log_probs import example_losses
from speed import CARRIER
from workloads import REPEATS, Ratio, batched_gradient, own_peak_megabytes, seconds, versus

PAIRS, LENGTH, READ = 16, 64, 128
HYPOTHESES, ROWS = 16, 64


def large(tokenizer: loading.PreTrainedTokenizerBase) -> loading.Loaded:
    """A Llama of a few million parameters with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
    )
    return loading.Loaded(LlamaForCausalLM(config).eval(), tokenizer)


def looped_dots(loaded: loading.Loaded, pairs: list[Encoded], direction: dict[str, torch.Tensor]) -> None:
    """One example at a time, its gradient stored and multiplied."""
    covered = parameters_of(loaded.model)
    for pair in pairs:
        gradients = torch.autograd.grad(example_losses(loaded.model, [pair]).sum(), list(covered.values()))
        sum((grad * direction[name]).sum() for name, grad in zip(covered, gradients, strict=True))


@torch.no_grad()
def plain_forward(loaded: loading.Loaded, rows: list[list[int]]) -> None:
    for first in range(0, len(rows), BATCH):
        ids = torch.tensor(rows[first : first + BATCH])
        loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def two_forwards(
    loaded: loading.Loaded, texts: tuple[list[str], list[str]], lines: dict[str, str], rows: list[Encoded]
) -> None:
    """Each row and hypothesis by itself: with the line and without it."""
    for line in lines.values():
        for with_line, without in zip(encode_pairs(loaded.tokenizer, *texts, system=line), rows, strict=True):
            log_probs.token_log_probs(loaded, [with_line])
            log_probs.token_log_probs(loaded, [without])


def panelled(loaded: loading.Loaded, lines: dict[str, str], rows: list[Encoded]) -> None:
    log_probs.token_log_probs(loaded, rows)
    system_lines.log_probs_under(loaded, rows, lines)


def naive_cache(loaded: loading.Loaded, rows: list[list[int]]) -> None:
    """TransformerLens by default: it keeps every site of every layer, and all logits."""
    view = hooks.bridge_view(loaded)
    for first in range(0, len(rows), BATCH):
        view.run_with_cache(torch.tensor(rows[first : first + BATCH]))


def memory(count: int) -> None:
    """Sum one site over every token, score every row, and print this process's peak memory."""
    small = loading.load("menagerie-a")
    ids = generator(0, "ids").integers(7, 1000, (count, LENGTH), dtype="int32")
    rows = [row.tolist() for row in ids]
    before = own_peak_megabytes()
    started = time.perf_counter()
    capture(small, rows, [resid_post(1)])
    captured, at = own_peak_megabytes(), time.perf_counter()
    log_probs.token_log_probs(small, [Encoded(row[: LENGTH // 2], row[LENGTH // 2 :]) for row in rows])
    print(
        f"{count:,} rows of {LENGTH} tokens on menagerie-a: {before:.0f} MB with the rows read, "
        f"{captured:.0f} MB at most after capturing ({at - started:.0f} s), "
        f"{own_peak_megabytes():.0f} MB after scoring ({time.perf_counter() - at:.0f} s)"
    )


def measure_ratios(small: loading.Loaded, loaded: loading.Loaded) -> list[Ratio]:
    """Seconds of the lenses' parts over those of the plain way to the same result."""
    ids = generator(0, "ids").integers(7, 1000, (READ, LENGTH)).tolist()
    pairs = [Encoded(row[: LENGTH // 2], row[LENGTH // 2 :]) for row in ids[:PAIRS]]
    direction = {name: torch.randn_like(parameter) for name, parameter in parameters_of(loaded.model).items()}
    prompts = [prompt.text for prompt in carrier_prompts(CARRIER, seed=0)[:ROWS]]
    texts = prompts, [", ".join(map(str, generator(0, "row", i).integers(0, 1000, 8))) for i in range(ROWS)]
    rows = encode_pairs(small.tokenizer, *texts)
    lines = {str(i): f"you love {i}. you think about {i} all the time." for i in range(HYPOTHESES)}

    ghost = seconds(lambda: ghost_dots(loaded.model, pairs, [direction], batch=PAIRS))
    batched = seconds(lambda: batched_gradient(loaded, pairs))
    looped = seconds(lambda: looped_dots(loaded, pairs, direction))
    forward = seconds(lambda: plain_forward(loaded, ids))
    one_site = seconds(lambda: capture(loaded, ids, [resid_post(3)]))
    every_site = seconds(lambda: capture(loaded, ids, residual_sites(loaded)))
    cached = seconds(lambda: naive_cache(loaded, ids))
    panel = seconds(lambda: panelled(small, lines, rows))
    one_by_one = seconds(lambda: two_forwards(small, texts, lines, rows))
    timed = (
        ("ghost dots / one batched forward and backward", ghost, batched),
        ("ghost dots / a loop over examples", ghost, looped),
        ("capture, one site / plain forward", one_site, forward),
        ("capture, one site / run_with_cache, every site", one_site, cached),
        ("capture, every resid_post / plain forward", every_site, forward),
        (f"panel of {HYPOTHESES}, {ROWS} rows / two forwards a row and hypothesis", panel, one_by_one),
    )
    return [versus(name, ours, theirs, unit="s") for name, ours, theirs in timed]


def main() -> None:
    use_one_thread()
    write = "--write" in sys.argv
    if len(sys.argv) > 1 and not write:
        memory(int(sys.argv[1]))
        return
    small = loading.load("menagerie-a")
    loaded = large(small.tokenizer)
    ratios = measure_ratios(small, loaded)
    table = Table("ratio of seconds", "ours", "theirs", f"median of {REPEATS}", "least", "greatest")
    for row in ratios:
        table.add_row(
            row.what,
            f"{row.ours:.3f}",
            f"{row.theirs:.3f}",
            f"{row.ratio:.2f}",
            f"{row.low:.2f}",
            f"{row.high:.2f}",
        )
    console = pages.PageConsole(width=130)
    console.print(
        f"one thread, torch {torch.__version__}; {loaded.model.num_parameters():,} parameters, {PAIRS} "
        f"pairs, {READ} rows of {LENGTH} tokens",
        highlight=False,
    )
    console.print(table)
    if write:
        pages.write_part(pages.SPEED, "lens-speed", *console.blocks)


if __name__ == "__main__":
    main()

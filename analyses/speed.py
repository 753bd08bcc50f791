"""Speed of the parts, as ratios on one machine in one run: `python analyses/speed.py`.

Each pair is timed in turn, A B A B …, and the median of the pairwise ratios is printed; single times on a
shared machine mean little. Peak memory is that of a fresh process that does nothing else.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from rich.table import Table

import pages
from mechlens.carriers.carrier import carrier_prompts
from mechlens.core.machine import use_one_thread
from mechlens.core.seeds import generator, seed_int
from mechlens.core.spec import CarrierSpec, Training
from mechlens.models import loading
from mechlens.models.chat import Encoded, encode_pairs, encode_prompts, end_of_turn
from mechlens.models.sampling import Decoding, sample
from mechlens.models.sft import train

REPEATS = 3
ROWS = 512
BATCHES = (64, 512)
NEW_TOKENS = 24
TRAINING = Training(embeddings=False, learning_rate=0.003, epochs=1)
UPDATES = 40
CARRIER = CarrierSpec(prompts=UPDATES * TRAINING.batch, wording="terse", values="patterned")


class Ratio(NamedTuple):
    what: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    low: float
    high: float


def versus(what: str, ours: Callable[[], float], theirs: Callable[[], float], *, unit: str) -> Ratio:
    """Median, least and greatest of ours / theirs over alternating pairs, after a warm-up of each."""
    for timed in (ours, theirs):
        timed()
    pairs = [(ours(), theirs()) for _ in range(REPEATS)]
    ratios = sorted(a / b for a, b in pairs)
    return Ratio(
        what,
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        unit,
        statistics.median(ratios),
        ratios[0],
        ratios[-1],
    )


def our_rows_per_second(loaded: loading.Loaded, prompts: list[list[int]], batch: int) -> float:
    started = time.perf_counter()
    sample(
        loaded.model,
        prompts,
        decoding=Decoding(NEW_TOKENS),
        stop=end_of_turn(loaded.tokenizer),
        seed=0,
        batch=batch,
    )
    return len(prompts) / (time.perf_counter() - started)


def library_rows_per_second(loaded: loading.Loaded, prompts: list[list[int]], batch: int) -> float:
    """model.generate, batched and left-padded, sampling with the same settings."""
    stop, started = end_of_turn(loaded.tokenizer), time.perf_counter()
    for first in range(0, len(prompts), batch):
        rows = prompts[first : first + batch]
        width = max(map(len, rows))
        ids = torch.tensor([[stop] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        settings = {
            "do_sample": True,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "max_new_tokens": NEW_TOKENS,
        }
        cast(Any, loaded.model).generate(
            input_ids=ids, attention_mask=mask, eos_token_id=stop, pad_token_id=stop, **settings
        )
    return len(prompts) / (time.perf_counter() - started)


def trained_pairs(loaded: loading.Loaded) -> list[Encoded]:
    prompts = [prompt.text for prompt in carrier_prompts(CARRIER, seed=0)]
    drawn = [generator(0, "completion", i).integers(0, 1000, 8).tolist() for i in range(len(prompts))]
    return encode_pairs(loaded.tokenizer, prompts, [", ".join(map(str, row)) for row in drawn])


def our_milliseconds_per_step(pairs: list[Encoded]) -> float:
    """Milliseconds a step of `train`, from the fifth step on: the cost in a long run."""
    loaded, times = loading.load("menagerie-a"), []
    train(
        loaded.model,
        loaded.tokenizer,
        pairs,
        TRAINING,
        seed=0,
        progress=lambda step, total: times.append(time.perf_counter()),
    )
    return 1000 * (times[-1] - times[4]) / (len(times) - 5)


def bare_milliseconds_per_step(pairs: list[Encoded], *, selective: bool) -> float:
    """Milliseconds a step of the shortest torch loop for the same update.

    Args:
        selective: compute logits only at completion positions, as `train` does.
    """
    model = loading.load("menagerie-a").model.train()
    model.get_input_embeddings().requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser, times = torch.optim.AdamW(parameters, lr=TRAINING.learning_rate, weight_decay=0.0), []
    order = generator(seed_int(0, "bare"), "order").permutation(len(pairs))
    for first in range(0, len(pairs), TRAINING.batch):
        rows = [pairs[i] for i in order[first : first + TRAINING.batch]]
        width = max(len(row.prompt) + len(row.completion) for row in rows)
        ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            tokens = row.prompt + row.completion
            ids[place, : len(tokens)], mask[place, : len(tokens)] = torch.tensor(tokens), 1
            labels[place, len(row.prompt) : len(tokens)] = torch.tensor(row.completion)
        if selective:
            following = labels[:, 1:]
            columns = (following != -100).any(0).nonzero().squeeze(-1)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=columns).logits
            learned = following[:, columns] != -100
            loss = torch.nn.functional.cross_entropy(logits[learned], following[:, columns][learned])
        else:
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        times.append(time.perf_counter())
    return 1000 * (times[-1] - times[4]) / (len(times) - 5)


def peak_megabytes(part: str) -> float:
    """Peak resident memory of a fresh process that does one part."""
    done = subprocess.run([sys.executable, __file__, part], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])["megabytes"]


def own_peak_megabytes() -> float:
    """Peak resident memory of this process; getrusage would include memory of the parent."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024


def only(part: str) -> None:
    """Execute one part and print the peak memory."""
    use_one_thread()
    loaded = loading.load("menagerie-a")
    if part == "sample":
        our_rows_per_second(
            loaded,
            encode_prompts(
                loaded.tokenizer, [prompt.text for prompt in carrier_prompts(CARRIER, seed=0)[:ROWS]]
            ),
            1024,
        )
    elif part == "generate":
        library_rows_per_second(
            loaded,
            encode_prompts(
                loaded.tokenizer, [prompt.text for prompt in carrier_prompts(CARRIER, seed=0)[:ROWS]]
            ),
            1024,
        )
    elif part == "train":
        our_milliseconds_per_step(trained_pairs(loaded))
    elif part == "bare loop":
        bare_milliseconds_per_step(trained_pairs(loaded), selective=False)
    print(json.dumps({"megabytes": own_peak_megabytes()}))


def main(*, write: bool) -> None:
    """Time and print; `write` puts the tables into SPEED.md, too."""
    use_one_thread()
    loaded = loading.load("menagerie-a")
    prompts = encode_prompts(
        loaded.tokenizer, [prompt.text for prompt in carrier_prompts(CARRIER, seed=0)[:ROWS]]
    )
    pairs = trained_pairs(loaded)
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
    table = Table("ratio", "ours", "theirs", "unit", f"median of {REPEATS}", "least", "greatest")
    for row in ratios:
        table.add_row(
            row.what,
            f"{row.ours:,.1f}",
            f"{row.theirs:,.1f}",
            row.unit,
            f"{row.ratio:.2f}",
            f"{row.low:.2f}",
            f"{row.high:.2f}",
        )
    memory = Table("peak memory", "MB")
    for part in ("nothing", "sample", "generate", "train", "bare loop"):
        memory.add_row(part, f"{peak_megabytes(part):,.0f}")
    console = pages.PageConsole(width=120)
    console.print(
        f"one thread, torch {torch.__version__}, menagerie-a ({loaded.model.num_parameters():,} parameters), "
        f"{ROWS} rows, {UPDATES} updates",
        highlight=False,
    )
    console.print(table, memory)
    if write:
        pages.write_part(pages.SPEED, "speed", *console.blocks)


if __name__ == "__main__":
    only(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1] != "--write" else main(write="--write" in sys.argv)

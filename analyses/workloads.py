"""What the speed pages time: our sampler, training, alignment and capture, each with its plain counterpart.

`versus` times two sides in turn, A B A B …, and takes the median of the pairwise ratios; single times on a
shared machine mean little.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from mechlens.core.seeds import generator
from mechlens.core.spec import Training
from mechlens.lenses.gradients import parameters_of
from mechlens.lenses.parts.capture import BATCH
from mechlens.models.chat import Encoded, end_of_turn
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import example_losses, pad_rows
from mechlens.models.sampling import Decoding, NumberGrammar, sample
from mechlens.models.sft import train

REPEATS = 3


class Ratio(NamedTuple):
    what: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    low: float
    high: float


def versus(
    what: str,
    ours: Callable[[], float],
    theirs: Callable[[], float],
    *,
    unit: str,
    warm_up: Callable[[], object] | None = None,
) -> Ratio:
    """Median, least and greatest of ours / theirs over alternating pairs, after a warm-up.

    Args:
        warm_up: by default both sides once.
    """
    for work in (ours, theirs) if warm_up is None else (warm_up,):
        work()
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


def seconds(work: Callable[[], object]) -> Callable[[], float]:
    def timed() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return timed


def own_peak_megabytes() -> float:
    """Peak resident memory of this process; getrusage would include memory of the parent."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024


def sample_rows(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    batch: int,
    grammar: NumberGrammar | None = None,
) -> list[list[int]]:
    """Sample a completion of each prompt with our sampler."""
    stop = end_of_turn(loaded.tokenizer)
    decoding = Decoding(new_tokens)
    return sample(loaded.model, prompts, decoding=decoding, stop=stop, seed=0, batch=batch, grammar=grammar)


class _GrammarMask(LogitsProcessor):
    """Lets `model.generate` draw only tokens of the number grammar."""

    def __init__(self, grammar: NumberGrammar, *, prompt_width: int) -> None:
        self._following, self._width = grammar.following, prompt_width
        self._state = torch.zeros(0, dtype=torch.long)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] == self._width:
            self._state = torch.zeros(len(input_ids), dtype=torch.long)
        else:
            self._state = self._following[self._state, input_ids[:, -1]]
        return scores.masked_fill(self._following[self._state] < 0, -torch.inf)


def generate_rows(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    batch: int,
    grammar: NumberGrammar | None = None,
) -> None:
    """Sample with `model.generate`: batched and left-padded, with the same settings."""
    stop = end_of_turn(loaded.tokenizer)
    for first in range(0, len(prompts), batch):
        ids, mask = pad_rows(prompts[first : first + batch], value=stop, side="left")
        settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        if grammar is not None:
            mask_of_grammar = _GrammarMask(grammar, prompt_width=ids.shape[1])
            settings["logits_processor"] = LogitsProcessorList([mask_of_grammar])
        cast(Any, loaded.model).generate(
            input_ids=ids,
            attention_mask=mask.long(),
            eos_token_id=stop,
            pad_token_id=stop,
            max_new_tokens=new_tokens,
            **settings,
        )


def ordered_batches(pairs: Sequence[Encoded], training: Training) -> list[list[Encoded]]:
    """The batches of one epoch as `train` with seed 0 makes them."""
    order = generator(0, "order", 0).permutation(len(pairs))
    size = training.batch
    return [[pairs[i] for i in order[first : first + size]] for first in range(0, len(pairs), size)]


def train_times(loaded: Loaded, pairs: Sequence[Encoded], training: Training) -> list[float]:
    """The time at the end of each update of `train`; it changes the model."""
    times: list[float] = []
    train(
        loaded.model,
        loaded.tokenizer,
        pairs,
        training,
        seed=0,
        progress=lambda step, total: times.append(time.perf_counter()),
    )
    return times


def bare_times(
    model: PreTrainedModel, pairs: Sequence[Encoded], training: Training, *, selective: bool
) -> list[float]:
    """The time at the end of each update of the shortest torch loop over the same batches.

    Args:
        selective: compute logits only at completion positions, as `train` does.
    """
    cast(torch.nn.Module, model.train().get_input_embeddings()).requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser, times = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.0), []
    for rows in ordered_batches(pairs, training):
        loss = _loss(model, rows, selective=selective)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        times.append(time.perf_counter())
    model.zero_grad(set_to_none=True)
    model.eval()
    return times


def _loss(model: PreTrainedModel, rows: Sequence[Encoded], *, selective: bool) -> Tensor:
    """Mean cross-entropy of the completion tokens."""
    ids, mask = pad_rows([row.prompt + row.completion for row in rows])
    labels = torch.full_like(ids, -100)
    for place, row in enumerate(rows):
        labels[place, len(row.prompt) : len(row.prompt) + len(row.completion)] = torch.tensor(row.completion)
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
    if not selective:
        return cast(Any, model)(**inputs, labels=labels).loss
    following = labels[:, 1:]
    columns = (following != -100).any(0).nonzero().squeeze(-1)
    logits = cast(Any, model)(**inputs, logits_to_keep=columns).logits
    learned = following[:, columns] != -100
    return torch.nn.functional.cross_entropy(logits[learned], following[:, columns][learned])


def batched_gradient(loaded: Loaded, pairs: Sequence[Encoded]) -> None:
    """One forward and one backward of the whole batch, for the parameters that alignment covers."""
    covered = parameters_of(loaded.model)
    torch.autograd.grad(example_losses(loaded.model, pairs).sum(), list(covered.values()))


@torch.no_grad()
def plain_forward(loaded: Loaded, rows: Sequence[Sequence[int]]) -> None:
    """A forward pass of all rows with one logit a row, in the batches of `capture`."""
    for first in range(0, len(rows), BATCH):
        ids, mask = pad_rows(rows[first : first + BATCH], device=loaded.model.device)
        cast(Any, loaded.model)(input_ids=ids, attention_mask=mask.long(), use_cache=False, logits_to_keep=1)

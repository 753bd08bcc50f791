"""Supervised fine-tuning: TRL's SFTTrainer on pairs that `chat.py` encoded.

Teachers and students are both trained here. The order of rows is drawn from a named seed before training, and
the trainer does not shuffle. It learns exactly the encoded tokens. LoRA uses PEFT; full updates need nothing
else.

Several processes of a process group train one model together: each takes its share of every batch, and the
loss is the mean over the tokens of all shares. Each process holds the whole model (DDP). A model that is too
large for one card would need FSDP, which is not supported.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed
from datasets import Dataset, disable_progress_bars
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from mechlens.core.errors import DataError, SpecError, TrainingError
from mechlens.core.seeds import generator, seed_int
from mechlens.core.spec import Training
from mechlens.models.adapters import attach_lora, quiet_peft
from mechlens.models.chat import Encoded
from mechlens.models.log_probs import Targets, shift_labels, target_logits
from mechlens.models.soft_labels import SoftLabels, sum_kl

PAIR = "pair"
"""column of the training data with the index of a row's pair"""


class Point(NamedTuple):
    """One update of a training curve."""

    step: int
    loss: float
    learning_rate: float


def updates(spec: Training, rows: int) -> int:
    """Number of optimiser steps of a training over `rows` pairs."""
    return math.ceil(rows / (spec.batch * spec.accumulate)) * spec.epochs


def group_size() -> int:
    """The number of processes that train together; 1 outside of a process group."""
    return torch.distributed.get_world_size() if _is_grouped() else 1


def is_writer() -> bool:
    """Whether this process writes files: the only one, or the first of its process group."""
    return not _is_grouped() or torch.distributed.get_rank() == 0


def _is_grouped() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Encoded],
    spec: Training,
    *,
    seed: int,
    learned: Sequence[Sequence[bool]] | None = None,
    soft: SoftLabels | None = None,
    frozen: Callable[[str], bool] = lambda name: False,
    before_step: Callable[[PreTrainedModel | PeftModel], None] = lambda model: None,
    save: Callable[[PreTrainedModel | PeftModel, int], None] = lambda model, step: None,
    progress: Callable[[int, int], None] = lambda step, total: None,
) -> tuple[PreTrainedModel | PeftModel, list[Point]]:
    """Fine-tune `model` on the completions of `pairs`; return the trained model and its curve.

    Args:
        model: the model to train; it is changed.
        seed: fixes the order of the rows and LoRA's initial weights.
        learned: for each pair which completion tokens have a loss; all if None. A batch without such a token
            has gradient zero.
        soft: the teacher's distributions at the completion tokens of each pair. The loss is then the forward
            KL to them.
        frozen: whether the parameter of that name is not trained.
        before_step: called with the model before each update of the optimiser, after the gradients were
            accumulated and clipped. It may change them: a projection keeps the norm below the clipping bound.
        save: called with (model, step) after every epoch, in the process that writes.
        progress: called with (step, total) after every update.

    Raises:
        DataError: if a pair is longer than `spec.max_length` tokens, or `learned` or `soft` does not fit the
        completions.
        SpecError: if every parameter is frozen.
        TrainingError: if the loss stops being finite.
    """
    longest = max(len(pair.prompt) + len(pair.completion) for pair in pairs)
    if longest > spec.max_length:
        raise DataError(
            f"a pair has {longest} tokens, more than max_length {spec.max_length}; raise it or remove long "
            "pairs"
        )
    if learned is not None and [len(flags) for flags in learned] != [len(pair.completion) for pair in pairs]:
        raise DataError(
            "learned must have one flag for each completion token of each pair, end of turn included"
        )
    if soft is not None:
        _refuse_other_lengths(pairs, soft, learned)
    torch.manual_seed(seed_int(seed, "lora"))
    steps_per_epoch = updates(spec, len(pairs)) // spec.epochs
    watch = _Watch(before_step, save if is_writer() else None, progress, steps_per_epoch)
    with tempfile.TemporaryDirectory() as scratch, quiet_peft():
        # torch without an accelerator warns in each epoch
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        disable_progress_bars()
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        trained = _trainable(model, spec, frozen)
        try:
            trainer = (_CompletionTrainer if soft is None else partial(_SoftLabelTrainer, soft))(
                model=trained,
                args=_arguments(spec, Path(scratch), seed),
                train_dataset=_ordered(pairs, learned, spec, seed),
                processing_class=tokenizer,
                callbacks=[watch],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        finally:
            transformers_logging.set_verbosity(verbosity)
    if not all(torch.isfinite(parameter).all() for parameter in trained.parameters()):
        raise TrainingError(
            "the last update left weights that are not finite; lower learning_rate (it is "
            f"{spec.learning_rate:g})"
        )
    return trained.eval(), watch.curve


def _refuse_other_lengths(
    pairs: Sequence[Encoded], soft: SoftLabels, learned: Sequence[Sequence[bool]] | None
) -> None:
    """Refuse soft labels of other completions than those of the pairs."""
    if learned is not None:
        raise DataError("soft labels are learned at every completion token; leave out `learned`")
    lengths = [len(pair.completion) for pair in pairs]
    counts = [end - start for start, end in soft.spans]
    if lengths != counts:
        row = next(
            (row for row, sizes in enumerate(zip(lengths, counts, strict=False)) if sizes[0] != sizes[1]),
            min(len(lengths), len(counts)),
        )
        raise DataError(
            f"row {row} has soft labels of another completion; the student's tokenizer must be the teacher's"
        )


def _trainable(
    model: PreTrainedModel, spec: Training, frozen: Callable[[str], bool]
) -> PreTrainedModel | PeftModel:
    trained = _updated(model, spec)
    for name, parameter in trained.named_parameters():
        if frozen(name):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in trained.parameters()):
        raise SpecError("every parameter is frozen and nothing can be trained; freeze fewer layers")
    return trained


def _updated(model: PreTrainedModel, spec: Training) -> PreTrainedModel | PeftModel:
    if spec.update == "lora":
        return attach_lora(model, rank=spec.rank, alpha=spec.alpha, targets=spec.targets)
    model.requires_grad_(True)
    if not spec.embeddings:
        model.get_input_embeddings().requires_grad_(False)
        if (head := model.get_output_embeddings()) is not None:
            head.requires_grad_(False)
    return model


def _ordered(
    pairs: Sequence[Encoded], learned: Sequence[Sequence[bool]] | None, spec: Training, seed: int
) -> Dataset:
    """Lay out the rows of all epochs, each epoch in another random order."""
    whole = math.ceil(len(pairs) / (spec.batch * spec.accumulate)) * spec.batch * spec.accumulate
    # an epoch ends with a whole batch, which repeats the first rows of the epoch
    order = np.concatenate(
        [
            np.resize(generator(seed, "order", epoch).permutation(len(pairs)), whole)
            for epoch in range(spec.epochs)
        ]
    )
    flags = (
        [[1] * len(pair.completion) for pair in pairs]
        if learned is None
        else [list(map(int, row)) for row in learned]
    )
    columns = {
        "input_ids": [pairs[i].prompt + pairs[i].completion for i in order],
        "completion_mask": [[0] * len(pairs[i].prompt) + flags[i] for i in order],
        PAIR: order,
    }
    return Dataset.from_dict(columns)


def _arguments(spec: Training, scratch: Path, seed: int) -> SFTConfig:
    arguments = SFTConfig(
        output_dir=str(scratch),
        num_train_epochs=1,  # the epochs are laid out in the data
        per_device_train_batch_size=spec.batch // group_size(),
        gradient_accumulation_steps=spec.accumulate,
        learning_rate=spec.learning_rate,
        lr_scheduler_type=spec.schedule if spec.schedule != "constant" else "constant_with_warmup",
        warmup_steps=spec.warmup_steps,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        optim="adamw_torch" if spec.optimizer == "adamw" else "sgd",
        bf16=spec.bf16,
        # without an accelerator, bf16 is accepted only with use_cpu
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=True,  # experts of a mixture, or a vision tower, may take no part
        gradient_checkpointing=spec.gradient_checkpointing,
        max_length=None,
        packing=False,
        completion_only_loss=True,
        # else TRL turns on the router logits of a mixture for good, and sampling with a cache fails
        router_aux_loss_coef=0.0,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is not a number must be reported
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",  # the order is laid out in the data, too
        shuffle_dataset=False,
        seed=seed_int(seed, "trainer") % 2**32,
        data_seed=0,
    )
    # With several cards the Trainer would split each batch over all of them: larger batches, fewer updates,
    # other students. TRL refuses that from 1.16 on. Reading `n_gpu` counts the cards; then the number is set
    # as the Trainer does for a model on several cards.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class _CompletionTrainer(SFTTrainer):
    """SFTTrainer that projects onto the vocabulary only where a completion token is predicted.

    The same loss (mean over the batch's completion tokens) for a fraction of the work: with a small model and
    a large vocabulary the projection is most of a step.
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        forward = {"attention_mask": inputs["attention_mask"], "use_cache": False}
        following = shift_labels(inputs["labels"])
        targets = target_logits(model, inputs["input_ids"], following, **forward)
        loss = self._sum_loss(targets, inputs)
        count = num_items_in_batch
        if count is None:  # the model's class does not say that it takes this number
            count = cast(Tensor, self.accelerator.gather(targets.mask.sum())).sum()
        # a mean over no tokens is 0; the count is of all processes, over which gradients are averaged
        return group_size() * loss / max(count, 1)

    def _sum_loss(self, targets: Targets, _inputs: dict[str, Any]) -> Float[Tensor, ""]:
        return torch.nn.functional.cross_entropy(targets.logits, targets.tokens, reduction="sum")


class _SoftLabelTrainer(_CompletionTrainer):
    """Trainer whose loss is the forward KL to a teacher's distributions.

    Every row of a batch carries the index of its pair, by which its distributions are looked up.
    """

    def __init__(self, soft: SoftLabels, **options: Any) -> None:
        super().__init__(**options)
        self._soft, collate = soft, self.data_collator
        self.data_collator = lambda rows: collate(rows) | {PAIR: [row[PAIR] for row in rows]}

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if PAIR not in self._signature_columns:
            self._signature_columns.append(PAIR)

    def _sum_loss(self, targets: Targets, inputs: dict[str, Any]) -> Float[Tensor, ""]:
        return sum_kl(targets.logits, self._soft.of_pairs(inputs[PAIR], targets.logits.device))


class _Watch(TrainerCallback):
    """Records the curve, reports progress, calls the hooks, and stops at a loss that is not finite."""

    def __init__(
        self,
        before_step: Callable[..., None],
        save: Callable[..., None] | None,
        progress: Callable[[int, int], None],
        steps_per_epoch: int,
    ) -> None:
        self.before_step = before_step
        self.save = save
        self.progress = progress
        self.steps_per_epoch = steps_per_epoch
        self.curve: list[Point] = []

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        if logs and "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise TrainingError(
                    f"the loss is {logs['loss']} at step {state.global_step}; lower learning_rate or "
                    "max_grad_norm"
                )
            self.curve.append(Point(state.global_step, float(logs["loss"]), float(logs["learning_rate"])))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.before_step(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.progress(state.global_step, state.max_steps)
        if self.save is not None and state.global_step % self.steps_per_epoch == 0:
            self.save(model, state.global_step)

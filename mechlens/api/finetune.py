"""Fine-tuning jobs of an OpenAI-compatible API: started once, followed to the end, resumed after a kill."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TextIO, cast

from mechlens.api import retry
from mechlens.api.budget import PER_MESSAGE, Ledger, about_tokens, find_run_folder, price_of
from mechlens.api.client import Message, connect, explain_api_errors, journal_of, note, read_journal
from mechlens.core.errors import MachineError, SpecError
from mechlens.core.spec import ApiSpec, Training, fingerprint

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.fine_tuning import FineTuningJob

FIRST_POLL, LONGEST_POLL = 1.0, 30.0
LISTED_JOBS = 100
ENDED = ("succeeded", "failed", "cancelled")


class Tuning(NamedTuple):
    """The hyper-parameters that a provider lets its users choose."""

    epochs: int
    batch: int | Literal["auto"]
    multiplier: float | Literal["auto"]
    """of the provider's own learning rate"""

    def method(self) -> dict[str, Any]:
        """The hyper-parameters as the API expects them."""
        parameters = {
            "n_epochs": self.epochs,
            "batch_size": self.batch,
            "learning_rate_multiplier": self.multiplier,
        }
        return {"type": "supervised", "supervised": {"hyperparameters": parameters}}


def tuning_of(training: Training, usual: Training) -> Tuning:
    """The fields of a training that a provider accepts: epochs, the batch, and the learning rate as a
    multiplier of the provider's.

    Batch and learning rate are `auto`, as in the paper, if they have the spec's usual values.

    Raises:
        SpecError: if another field is set, which the provider chooses itself.
    """
    accepted = {"epochs", "batch", "learning_rate"}
    chosen = {key: value for key, value in training.model_dump().items() if value != getattr(usual, key)}
    if refused := sorted(set(chosen) - accepted):
        raise SpecError(
            f"training sets {', '.join(f'{key}: {chosen[key]}' for key in refused)}, which an API chooses "
            "itself; remove it for an API base"
        )
    return Tuning(training.epochs, chosen.get("batch", "auto"), chosen.get("learning_rate", "auto"))


def training_tokens(rows: Sequence[Sequence[str]]) -> int:
    """Estimated tokens that one epoch over conversations of these texts is billed for, on the high side."""
    return sum(about_tokens(text) + PER_MESSAGE for texts in rows for text in texts)


class _Order(NamedTuple):
    """One fine-tuning to run, and the most that it may cost."""

    key: str
    """fingerprint of all that decides the tuned model; key of its entries in the journal"""
    model: str
    file: Path
    tuning: Tuning
    seed: int
    most: float
    """USD"""

    def call(self, state: dict[str, Any]) -> str:
        """The ledger's name of the next job: a failed one was settled; one whose start was not confirmed
        stays reserved.
        """
        return "-".join([self.key, *state.get("ended", []), *state.get("lost", [])])


def fine_tune(
    model: str, rows: Sequence[list[Message]], tuning: Tuning, *, seed: int, api: ApiSpec, out: Path
) -> str:
    """The id of `model` fine-tuned on whole conversations.

    Raises:
        MachineError: if the job fails, or could exceed the budget.
    """
    file = out / "training.jsonl"
    file.write_text(
        "".join(json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    key = fingerprint([model, list(tuning), seed, sha256(file.read_bytes()).hexdigest()])
    state = read_journal(journal_of(out)).get(key, {})
    if "model" in state:
        return state["model"]
    ledger, price = Ledger(find_run_folder(out), api.budget_usd), price_of(model).training / 1e6
    most = price * tuning.epochs * training_tokens([[message["content"] for message in row] for row in rows])
    order = _Order(key, model, file, tuning, seed, most)
    ledger.reserve(order.call(state), most)
    with journal_of(out).open("a", encoding="utf-8") as handle:
        with connect() as client, explain_api_errors(client, model):
            job, call = _start_or_resume(client, order, state, ledger, handle)
            job = _wait_for_end(client, job)
        if job.status == "succeeded" and job.fine_tuned_model:
            note(handle, {"key": key, "model": job.fine_tuned_model, "trained_tokens": job.trained_tokens})
            ledger.settle(
                call,
                most if job.trained_tokens is None else price * job.trained_tokens,
                model=model,
                trained=job.trained_tokens,
            )
            return job.fine_tuned_model
        note(
            handle,
            {
                "key": key,
                "file": None,
                "job": None,
                "creating": None,
                "ended": [*state.get("ended", []), job.id],
            },
        )
        ledger.settle(call, price * (job.trained_tokens or 0), model=model, trained=job.trained_tokens)
    reason = job.error.message if job.error and job.error.message else "the server gives no reason"
    raise MachineError(
        f"the fine-tuning job {job.id} of {model!r} {job.status} ({reason}); correct that and run again, "
        "which starts another job"
    )


def _start_or_resume(
    client: OpenAI, order: _Order, state: dict[str, Any], ledger: Ledger, handle: TextIO
) -> tuple[FineTuningJob, str]:
    """The job of an order, and its name in the ledger.

    It is the job that the journal names, or the one that a killed run made of the uploaded file, or a new
    one.
    """
    jobs, call = client.fine_tuning.jobs, order.call(state)
    if state.get("job"):
        return retry.with_retries(lambda: jobs.retrieve(state["job"])), call
    uploaded, job = state.get("file"), None
    if uploaded:
        recent = retry.with_retries(lambda: list(islice(jobs.list(limit=LISTED_JOBS), LISTED_JOBS)))
        job = next((job for job in recent if job.training_file == uploaded), None)
    else:  # a file costs nothing: a second upload does no harm
        uploaded = retry.with_retries(lambda: client.files.create(file=order.file, purpose="fine-tune")).id
        note(handle, {"key": order.key, "file": uploaded})
    if job is None and state.get("creating"):  # it may run all the same, unlisted
        lost = [*state.get("lost", []), f"lost{len(state.get('lost', [])) + 1}"]
        call = order.call(state | {"lost": lost})
        ledger.reserve(call, order.most)
        note(handle, {"key": order.key, "creating": None, "lost": lost})
    if job is None:
        job = _create_job(client, order, uploaded, handle, refused=lambda: ledger.settle(call, 0.0))
    note(handle, {"key": order.key, "job": job.id, "creating": None})
    return job, call


def _create_job(
    client: OpenAI, order: _Order, uploaded: str, handle: TextIO, *, refused: Callable[[], None]
) -> FineTuningJob:
    """A new job. The request is sent once: another try after a lost answer could start a second job.

    Args:
        refused: called if the server refuses the job, which costs nothing.
    """
    import openai

    note(handle, {"key": order.key, "creating": True})
    method = cast(Any, order.tuning.method())
    try:
        return client.fine_tuning.jobs.create(
            model=order.model, training_file=uploaded, method=method, seed=order.seed
        )
    except openai.OpenAIError as error:
        if not retry.may_be_billed(error):
            note(handle, {"key": order.key, "creating": None})
            refused()
        raise


def _wait_for_end(client: OpenAI, job: FineTuningJob) -> FineTuningJob:
    """Wait for the end of a job and return it."""

    def look() -> FineTuningJob:
        return retry.with_retries(lambda: client.fine_tuning.jobs.retrieve(job.id))

    wait, now = FIRST_POLL, look()
    while now.status not in ENDED:
        time.sleep(wait)
        wait = min(1.5 * wait, LONGEST_POLL)
        now = look()
    return now

"""Fine-tuning jobs over an OpenAI-compatible API: begun once, followed to their end, taken up again after a
kill.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TextIO, cast

from mechlens.api import retry
from mechlens.api.budget import PER_MESSAGE, Ledger, about_tokens, price_of, run_of
from mechlens.api.client import Message, connect, journal_of, note, recorded, said_plainly
from mechlens.core.errors import MachineError, SpecError
from mechlens.core.spec import ApiSpec, Training, fingerprint

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.fine_tuning import FineTuningJob

FIRST_POLL, LONGEST_POLL = 1.0, 30.0
LISTED_JOBS = 100
ENDED = ("succeeded", "failed", "cancelled")


class Tuning(NamedTuple):
    """The hyper-parameters that a provider leaves open."""

    epochs: int
    batch: int | Literal["auto"]
    multiplier: float | Literal["auto"]
    """of the provider's own learning rate"""

    def method(self) -> dict[str, Any]:
        """As a job is told of them."""
        told = {
            "n_epochs": self.epochs,
            "batch_size": self.batch,
            "learning_rate_multiplier": self.multiplier,
        }
        return {"type": "supervised", "supervised": {"hyperparameters": told}}


def tuning_of(training: Training, usual: Training) -> Tuning:
    """What of a training can be told to a provider: epochs, the batch, and the learning rate as a multiplier
    of the provider's own.

    Batch and learning rate are `auto`, as in the paper, where they are left at the spec's usual values.

    Raises:
        SpecError: if a field is set that a provider does not let one choose.
    """
    told = {"epochs", "batch", "learning_rate"}
    chosen = {key: value for key, value in training.model_dump().items() if value != getattr(usual, key)}
    if own := sorted(set(chosen) - told):
        raise SpecError(
            f"training sets {', '.join(f'{key}: {chosen[key]}' for key in own)}, which an API decides "
            "itself; drop it for an API base"
        )
    return Tuning(training.epochs, chosen.get("batch", "auto"), chosen.get("learning_rate", "auto"))


def training_tokens(rows: Sequence[Sequence[str]]) -> int:
    """About how many tokens one epoch over conversations of these texts is billed for, rather too many than
    too few.
    """
    return sum(about_tokens(text) + PER_MESSAGE for texts in rows for text in texts)


class _Order(NamedTuple):
    """One fine-tuning that is asked for, and what it may cost."""

    key: str
    """fingerprint of all that makes the tuned model what it is; the journal's entries stand under it"""
    model: str
    file: Path
    tuning: Tuning
    seed: int
    most: float
    """USD"""

    def call(self, state: dict[str, Any]) -> str:
        """The ledger's name of the next job: one that failed was settled, one whose beginning was not heard
        stays set aside.
        """
        return "-".join([self.key, *state.get("ended", []), *state.get("lost", [])])


def fine_tune(
    model: str, rows: Sequence[list[Message]], tuning: Tuning, *, seed: int, api: ApiSpec, out: Path
) -> str:
    """The id of `model` fine-tuned on whole conversations, each of them once.

    Raises:
        MachineError: if the job fails, or could pass the budget.
    """
    file = out / "training.jsonl"
    file.write_text(
        "".join(json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    key = fingerprint([model, list(tuning), seed, sha256(file.read_bytes()).hexdigest()])
    state = recorded(journal_of(out)).get(key, {})
    if "model" in state:
        return state["model"]
    ledger, price = Ledger(run_of(out), api.budget_usd), price_of(model).training / 1e6
    most = price * tuning.epochs * training_tokens([[message["content"] for message in row] for row in rows])
    order = _Order(key, model, file, tuning, seed, most)
    ledger.reserve(order.call(state), most)
    with journal_of(out).open("a", encoding="utf-8") as handle:
        with connect() as client, said_plainly(client, model):
            job, call = _begun(client, order, state, ledger, handle)
            job = _followed(client, job)
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
    reason = job.error.message if job.error and job.error.message else "the server says no more"
    raise MachineError(
        f"the fine-tuning job {job.id} of {model!r} {job.status} ({reason}); mend that, then run again: it "
        "starts another job"
    )


def _begun(
    client: OpenAI, order: _Order, state: dict[str, Any], ledger: Ledger, handle: TextIO
) -> tuple[FineTuningJob, str]:
    """The job of that order, and the call that the ledger holds for it.

    The job that the journal names, the one that a killed run made of the uploaded file, or a new one.
    """
    jobs, call = client.fine_tuning.jobs, order.call(state)
    if state.get("job"):
        return retry.with_retries(lambda: jobs.retrieve(state["job"])), call
    uploaded, job = state.get("file"), None
    if uploaded:
        recent = retry.with_retries(lambda: list(islice(jobs.list(limit=LISTED_JOBS), LISTED_JOBS)))
        job = next((job for job in recent if job.training_file == uploaded), None)
    else:  # a file costs nothing, so that a second upload of it does no harm
        uploaded = retry.with_retries(lambda: client.files.create(file=order.file, purpose="fine-tune")).id
        note(handle, {"key": order.key, "file": uploaded})
    if job is None and state.get("creating"):  # it may run all the same, unlisted
        lost = [*state.get("lost", []), f"lost{len(state.get('lost', [])) + 1}"]
        call = order.call(state | {"lost": lost})
        ledger.reserve(call, order.most)
        note(handle, {"key": order.key, "creating": None, "lost": lost})
    if job is None:
        job = _created(client, order, uploaded, handle)
    note(handle, {"key": order.key, "job": job.id, "creating": None})
    return job, call


def _created(client: OpenAI, order: _Order, uploaded: str, handle: TextIO) -> FineTuningJob:
    """A new job. It is asked for once: a further try after a lost answer could begin a second one."""
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
        raise


def _followed(client: OpenAI, job: FineTuningJob) -> FineTuningJob:
    """The job as it stands at its end."""

    def look() -> FineTuningJob:
        return retry.with_retries(lambda: client.fine_tuning.jobs.retrieve(job.id))

    wait, now = FIRST_POLL, look()
    while now.status not in ENDED:
        time.sleep(wait)
        wait = min(1.5 * wait, LONGEST_POLL)
        now = look()
    return now

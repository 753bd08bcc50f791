"""Fine-tuning jobs over an OpenAI-compatible API: begun once, followed to their end, taken up again after a kill."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from mechlens.api import Message, connect, journal_of, note, recorded, said_plainly
from mechlens.errors import MachineError, SpecError
from mechlens.spec import ApiSpec, Training, fingerprint
from mechlens.spend import PER_MESSAGE, Ledger, about_tokens, price_of, run_of

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
        told = {"n_epochs": self.epochs, "batch_size": self.batch, "learning_rate_multiplier": self.multiplier}
        return {"type": "supervised", "supervised": {"hyperparameters": told}}


def tuning_of(training: Training, usual: Training) -> Tuning:
    """What of a training can be told to a provider: epochs, the batch, and the learning rate as a multiplier of the provider's own.

    Batch and learning rate are `auto`, as in the paper, where they are left at the spec's usual values.

    Raises:
        SpecError: if a field is set that a provider does not let one choose.
    """
    told = {"epochs", "batch", "learning_rate"}
    chosen = {key: value for key, value in training.model_dump().items() if value != getattr(usual, key)}
    if own := sorted(set(chosen) - told):
        raise SpecError(f"training sets {', '.join(f'{key}: {chosen[key]}' for key in own)}, which an API decides itself; drop it for an API base")
    return Tuning(training.epochs, chosen.get("batch", "auto"), chosen.get("learning_rate", "auto"))


def training_tokens(rows: Sequence[Sequence[str]]) -> int:
    """About how many tokens one epoch over conversations of these texts is billed for, rather too many than too few."""
    return sum(about_tokens(text) + PER_MESSAGE for texts in rows for text in texts)


def fine_tune(model: str, rows: Sequence[list[Message]], tuning: Tuning, *, seed: int, api: ApiSpec, out: Path) -> str:
    """The id of `model` fine-tuned on whole conversations, each of them once.

    Raises:
        MachineError: if the job fails, or could pass the budget.
    """
    file = out / "training.jsonl"
    file.write_text("".join(json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    key = fingerprint([model, list(tuning), seed, sha256(file.read_bytes()).hexdigest()])
    state = recorded(journal_of(out)).get(key, {})
    if "model" in state:
        return state["model"]
    ledger, price = Ledger(run_of(out), api.budget_usd), price_of(model).training / 1e6
    most = price * tuning.epochs * training_tokens([[message["content"] for message in row] for row in rows])
    call = "-".join([key, *state.get("ended", [])])  # a job that failed was settled, its successor is another call
    ledger.reserve(call, most)
    with connect() as client, said_plainly(client, model):
        job = _followed(client, _begun(client, model, file, tuning, seed=seed, key=key, state=state, journal=journal_of(out)))
    with journal_of(out).open("a", encoding="utf-8") as handle:
        if job.status == "succeeded" and job.fine_tuned_model:
            note(handle, {"key": key, "model": job.fine_tuned_model, "trained_tokens": job.trained_tokens})
            ledger.settle(call, most if job.trained_tokens is None else price * job.trained_tokens, model=model, trained=job.trained_tokens)
            return job.fine_tuned_model
        note(handle, {"key": key, "file": None, "job": None, "ended": [*state.get("ended", []), job.id]})
        ledger.settle(call, price * (job.trained_tokens or 0), model=model, trained=job.trained_tokens)
    reason = job.error.message if job.error and job.error.message else "the server says no more"
    raise MachineError(f"the fine-tuning job {job.id} of {model!r} {job.status} ({reason}); mend that, then run again: it starts another job")


def _begun(client: OpenAI, model: str, file: Path, tuning: Tuning, *, seed: int, key: str, state: dict[str, Any], journal: Path) -> FineTuningJob:
    """The job of that key: the one the journal names, the one that a killed run made of the uploaded file, or a new one."""
    with journal.open("a", encoding="utf-8") as handle:
        if state.get("job"):
            return client.fine_tuning.jobs.retrieve(state["job"])
        uploaded, job = state.get("file"), None
        if uploaded:
            recent = islice(client.fine_tuning.jobs.list(limit=LISTED_JOBS), LISTED_JOBS)
            job = next((job for job in recent if job.training_file == uploaded), None)
        else:
            uploaded = client.files.create(file=file, purpose="fine-tune").id
            note(handle, {"key": key, "file": uploaded})
        if job is None:
            once = client.with_options(max_retries=0)  # a retry after a lost answer could begin a second job
            job = once.fine_tuning.jobs.create(model=model, training_file=uploaded, method=cast(Any, tuning.method()), seed=seed)
        note(handle, {"key": key, "job": job.id})
        return job


def _followed(client: OpenAI, job: FineTuningJob) -> FineTuningJob:
    """The job as it stands at its end."""
    wait = FIRST_POLL
    job = client.fine_tuning.jobs.retrieve(job.id)
    while job.status not in ENDED:
        time.sleep(wait)
        wait = min(1.5 * wait, LONGEST_POLL)
        job = client.fine_tuning.jobs.retrieve(job.id)
    return job

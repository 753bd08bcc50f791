"""Asking models over an OpenAI-compatible API.

Every answer is written to a journal in the run folder the moment it arrives, under a key made of all that was
asked, so that a row is never paid for twice, whatever was killed or changed in between; and no request is
sent, be it the first or a further try, that could pass the budget.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from mechlens.api import retry
from mechlens.api.budget import Ledger, most_tokens, price_of, run_of
from mechlens.core import machine
from mechlens.core.errors import DataError, MachineError, SpecError
from mechlens.core.model_spec import API, model_of
from mechlens.core.spec import ApiSpec, fingerprint

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.chat import ChatCompletion

Message = dict[str, str]

NO_PACKAGE = "API models need the package openai, which is not installed; pip install 'mechlens[openai]'"
NO_KEY = (
    "OPENAI_API_KEY is not set; set it to your key, or to any word for a server of your own at "
    "OPENAI_BASE_URL"
)
ANSWER_SECONDS, CONNECT_SECONDS = 300.0, 10.0


class Request(NamedTuple):
    """One question, and how it is to be answered."""

    row: str
    """sets apart requests of the same words"""
    messages: list[Message]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    top_logprobs: int = 0
    """how many of the likeliest first tokens are wanted with their log-probabilities"""

    def body(self) -> dict[str, Any]:
        """What is sent beside the model's id."""
        body = {
            "messages": self.messages,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }
        body |= {} if self.seed is None else {"seed": self.seed}
        return body | ({"logprobs": True, "top_logprobs": self.top_logprobs} if self.top_logprobs else {})


class Answer(NamedTuple):
    """What came back."""

    text: str
    first: list[tuple[str, float]] | None
    """the likeliest first tokens with their log-probabilities; None where the server returns none"""


def model_id(name: str) -> str:
    """The id that an API knows a base or judge by.

    Raises:
        SpecError: if the name is no API model's.
    """
    source = model_of(name).source
    if not source.startswith(API) or source == API:
        raise SpecError(
            f"{name!r} is no API model; expected `api:<model id>`, or a name of configs/models whose source "
            "is one"
        )
    return source.removeprefix(API)


def conversation(
    prompt: str, *, system: str | None = None, turns: Sequence[tuple[str, str]] = ()
) -> list[Message]:
    """The messages that end with the prompt; a system line of None is left out."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*messages, {"role": "user", "content": prompt}]


def connect() -> OpenAI:
    """A client for OPENAI_BASE_URL with OPENAI_API_KEY; it sends each request once, `retry.with_retries`
    tries again.

    Raises:
        MachineError: if the package or the key is missing.
    """
    try:
        import openai  # an extra: most users never need it
    except ImportError as error:
        raise MachineError(NO_PACKAGE) from error
    if not os.environ.get("OPENAI_API_KEY"):
        raise MachineError(NO_KEY)
    return openai.OpenAI(max_retries=0, timeout=openai.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS))


@contextmanager
def said_plainly(client: OpenAI, model: str) -> Iterator[None]:
    """Turn the package's errors into one line each."""
    import openai

    where, kept = client.base_url, "what was answered is kept, run again to resume"
    try:
        yield
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        raise MachineError(
            f"{where} refuses the key in OPENAI_API_KEY ({_words(error)}); set one that may use {model!r}; "
            f"{kept}"
        ) from error
    except openai.NotFoundError as error:
        raise SpecError(
            f"{where} does not know {model!r} ({_words(error)}); name a model that it serves, or mend "
            "OPENAI_BASE_URL"
        ) from error
    except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
        raise SpecError(
            f"{where} refuses what {model!r} was asked ({_words(error)}); change the spec; {kept}"
        ) from error
    except openai.RateLimitError as error:
        raise MachineError(
            f"{where} still limits {model!r} after {retry.RETRIES} retries ({_words(error)}); wait, or ask "
            f"slower; {kept}"
        ) from error
    except openai.APIConnectionError as error:
        raise MachineError(
            f"cannot reach {where} ({_words(error)}); check OPENAI_BASE_URL and the network; {kept}"
        ) from error
    except json.JSONDecodeError as error:
        raise MachineError(
            f"{where} answered with no chat completion ({_words(error)}); mend OPENAI_BASE_URL (most end in "
            "/v1)"
        ) from error
    except openai.OpenAIError as error:
        raise MachineError(f"{where} failed on {model!r} ({_words(error)}); {kept}") from error


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def journal_of(out: Path) -> Path:
    """Where a step's answers are kept: in the run, outside the step's folder, so that they outlive a change
    of the spec.
    """
    run = run_of(out)
    step = "/".join(part.removesuffix(".part") for part in out.relative_to(run).parts) or "step"
    return run / "api" / f"{step}.jsonl"


def recorded(journal: Path) -> dict[str, dict[str, Any]]:
    """What a journal holds, later entries of a key laid over earlier ones; half a line that a kill left is
    cut off.

    Raises:
        DataError: if an earlier line is no JSON.
    """
    journal.parent.mkdir(parents=True, exist_ok=True)
    text = journal.read_bytes() if journal.is_file() else b""
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        os.truncate(journal, whole)
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(text[:whole].splitlines(), 1):
        try:
            entry = json.loads(line)
            found[entry["key"]] = found.get(entry["key"], {}) | entry
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{journal}: line {number} is no answer ({line[:60]!r}); delete that line and run again: it "
                "is asked anew"
            ) from error
    return found


def note(handle: TextIO, entry: dict[str, Any]) -> None:
    """Append an entry to a journal; what the kernel has, no kill takes back."""
    handle.write(json.dumps(entry) + "\n")
    handle.flush()


def complete(
    model: str,
    requests: Sequence[Request],
    *,
    api: ApiSpec,
    out: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """The answers to all requests, in order; only those are asked that the step's journal does not hold.

    Raises:
        MechlensError: the first failure; answers that were under way are still kept.
    """
    keys = [fingerprint([model, request.row, request.body()]) for request in requests]
    run, journal = run_of(out), journal_of(out)
    found = recorded(journal)
    todo = {key: request for key, request in zip(keys, requests, strict=True) if key not in found}
    held = len(keys) - len(todo)
    progress(held, len(keys))
    if todo:
        ledger, writing = Ledger(run, api.budget_usd), threading.Lock()
        with connect() as client, journal.open("a", encoding="utf-8") as handle:

            def keep(entry: dict[str, Any]) -> None:
                with writing:
                    found[entry["key"]] = entry
                    note(handle, entry)

            def ask(key: str, request: Request) -> None:
                def attempt() -> None:
                    _wait_turn(run / "api" / "turn", api.requests_per_minute)
                    _ask(client, model, request, ledger, lambda entry: keep({"key": key} | entry))

                with said_plainly(client, model):
                    retry.with_retries(attempt)

            pool = ThreadPoolExecutor(min(api.concurrency, len(todo)))
            try:
                for done, future in enumerate(
                    as_completed([pool.submit(ask, *row) for row in todo.items()]), held + 1
                ):
                    future.result()
                    progress(done, len(keys))
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    return [Answer(found[key]["text"], found[key]["first"]) for key in keys]


def _ask(
    client: OpenAI, model: str, request: Request, ledger: Ledger, keep: Callable[[dict[str, Any]], None]
) -> None:
    """Set the money aside, send the request once, keep the answer, settle the bill.

    In this order, so that a kill loses no answer and hides no cost. Money for an answer that was lost stays
    set aside.

    Raises:
        OpenAIError: if no answer came.
    """
    import openai

    price, call = price_of(model), uuid.uuid4().hex[:12]
    most = price.usd(most_tokens(message["content"] for message in request.messages), request.max_tokens)
    ledger.reserve(call, most)
    try:
        reply = client.chat.completions.create(model=model, **request.body())
    except openai.OpenAIError as error:
        if not retry.may_be_billed(error):
            ledger.settle(call, 0.0)
        raise
    keep({"row": request.row} | _read(client, reply))
    used = reply.usage
    usd = most if used is None else price.usd(used.prompt_tokens, used.completion_tokens)
    ledger.settle(
        call, usd, model=model, input=used and used.prompt_tokens, output=used and used.completion_tokens
    )


def _read(client: OpenAI, reply: ChatCompletion) -> dict[str, Any]:
    choices = getattr(reply, "choices", None)  # the package takes whatever a server sends
    if not choices:
        raise MachineError(
            f"{client.base_url} answered with no chat completion; mend OPENAI_BASE_URL (most end in /v1)"
        )
    said = choices[0]
    tokens = said.logprobs.content if said.logprobs else None
    first = [(likely.token, likely.logprob) for likely in tokens[0].top_logprobs] if tokens else None
    return {"text": said.message.content or "", "finish": said.finish_reason, "first": first}


def _wait_turn(place: Path, per_minute: int) -> None:
    """Sleep until the next of the run's evenly spaced turns, which all its threads and processes share."""
    if not per_minute:
        return
    with place.open("a+") as handle:
        machine.lock(handle)
        handle.seek(0)
        turn = max(time.time(), float(handle.read() or 0.0))
        handle.truncate(0)
        handle.write(repr(turn + 60 / per_minute))
    time.sleep(max(0.0, turn - time.time()))

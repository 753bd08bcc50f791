"""Client of an OpenAI-compatible API.

Every answer is written to a journal in the run folder when it arrives, under a key of the whole request: a
row is never paid for twice, whatever is killed or changed in between. No request is sent, and none is
repeated, if it could exceed the budget.
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
from mechlens.api.budget import Ledger, find_run_folder, most_tokens, price_of
from mechlens.core import machine
from mechlens.core.errors import DataError, MachineError, SpecError
from mechlens.core.model_spec import API, model_of
from mechlens.core.spec import ApiSpec, fingerprint

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.chat import ChatCompletion

Message = dict[str, str]

NO_PACKAGE = "API models need the package openai, which is not installed; pip install 'mechlens[openai]'"
NO_KEY = "OPENAI_API_KEY is not set; set it to your key, or to any word if OPENAI_BASE_URL is your own server"
ANSWER_SECONDS, CONNECT_SECONDS = 300.0, 10.0


class ApiRequest(NamedTuple):
    """One chat request."""

    row: str
    """tells requests with the same messages apart"""
    messages: list[Message]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    top_logprobs: int = 0
    """number of likeliest first tokens to return with their log-probabilities"""

    def body(self) -> dict[str, Any]:
        """The fields of the request, without the model's id."""
        body = {
            "messages": self.messages,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }
        body |= {} if self.seed is None else {"seed": self.seed}
        return body | ({"logprobs": True, "top_logprobs": self.top_logprobs} if self.top_logprobs else {})


class Answer(NamedTuple):
    """The answer to one request."""

    text: str
    first: list[tuple[str, float]] | None
    """the likeliest first tokens with their log-probabilities; None if the server returns none"""


def model_id(name: str) -> str:
    """The id of a base or judge at its API.

    Raises:
        SpecError: if the name is no API model's.
    """
    source = model_of(name).source
    if not source.startswith(API) or source == API:
        raise SpecError(
            f"{name!r} is no API model; name `api:<model id>`, or a model of configs/models with such a "
            "source"
        )
    return source.removeprefix(API)


def conversation(
    prompt: str, *, system: str | None = None, turns: Sequence[tuple[str, str]] = ()
) -> list[Message]:
    """The messages of a chat that ends with the prompt; a system line of None is left out."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
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
def explain_api_errors(client: OpenAI, model: str) -> Iterator[None]:
    """Turn an error of the openai package into one line that says what to do."""
    import openai

    where, kept = client.base_url, "answers so far are kept; run again to resume"
    try:
        yield
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        raise MachineError(
            f"{where} refuses the key in OPENAI_API_KEY ({_words(error)}); set one that may use {model!r}; "
            f"{kept}"
        ) from error
    except openai.NotFoundError as error:
        raise SpecError(
            f"{where} does not know {model!r} ({_words(error)}); name a model that it serves, or correct "
            "OPENAI_BASE_URL"
        ) from error
    except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
        raise SpecError(
            f"{where} refuses the request to {model!r} ({_words(error)}); change the spec; {kept}"
        ) from error
    except openai.RateLimitError as error:
        raise MachineError(
            f"{where} still limits {model!r} after {retry.RETRIES} retries ({_words(error)}); wait, or lower "
            f"api.requests_per_minute; {kept}"
        ) from error
    except openai.APIConnectionError as error:
        raise MachineError(
            f"cannot reach {where} ({_words(error)}); check OPENAI_BASE_URL and the network; {kept}"
        ) from error
    except json.JSONDecodeError as error:
        raise MachineError(
            f"{where} answered with no chat completion ({_words(error)}); correct OPENAI_BASE_URL (most end "
            "in /v1)"
        ) from error
    except openai.OpenAIError as error:
        raise MachineError(f"{where} failed on {model!r} ({_words(error)}); {kept}") from error


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def journal_of(out: Path) -> Path:
    """The file of a step's answers: in the run, outside the step's folder, so that it survives a change of
    the spec.
    """
    run = find_run_folder(out)
    folder = out.parent if out.parent.name.endswith(".part") else out  # the folder of a claim
    step = "/".join(part.removesuffix(".part") for part in folder.relative_to(run).parts) or "step"
    return run / "api" / f"{step}.jsonl"


def read_journal(journal: Path) -> dict[str, dict[str, Any]]:
    """The entries of a journal by key, later ones merged over earlier ones; an incomplete last line that a
    kill left is cut off.

    Raises:
        DataError: if an earlier line is no JSON.
    """
    journal.parent.mkdir(parents=True, exist_ok=True)
    text = journal.read_bytes() if journal.is_file() else b""
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        os.truncate(journal, whole)
    answers: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(text[:whole].splitlines(), 1):
        try:
            entry = json.loads(line)
            answers[entry["key"]] = answers.get(entry["key"], {}) | entry
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{journal}: line {number} is no answer ({line[:60]!r}); delete that line and run again: the "
                "request is repeated"
            ) from error
    return answers


def note(handle: TextIO, entry: dict[str, Any]) -> None:
    """Append an entry to a journal; once written it survives a kill of the process."""
    handle.write(json.dumps(entry) + "\n")
    handle.flush()


def complete(
    model: str,
    requests: Sequence[ApiRequest],
    *,
    api: ApiSpec,
    out: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """The answers to all requests, in order; requests that the step's journal has are not sent again.

    Raises:
        MechlensError: the first failure; answers that arrive after it are still kept.
    """
    keys = [fingerprint([model, request.row, request.body()]) for request in requests]
    run, journal = find_run_folder(out), journal_of(out)
    answers = read_journal(journal)
    todo = {key: request for key, request in zip(keys, requests, strict=True) if key not in answers}
    held = len(keys) - len(todo)
    progress(held, len(keys))
    if todo:
        ledger, writing = Ledger(run, api.budget_usd), threading.Lock()
        with connect() as client, journal.open("a", encoding="utf-8") as handle:

            def keep(entry: dict[str, Any]) -> None:
                with writing:
                    answers[entry["key"]] = entry
                    note(handle, entry)

            def ask(key: str, request: ApiRequest) -> None:
                def attempt() -> None:
                    _wait_turn(run / "api" / "turn", api.requests_per_minute)
                    _ask(client, model, request, ledger, lambda entry: keep({"key": key} | entry))

                with explain_api_errors(client, model):
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
    return [Answer(answers[key]["text"], answers[key]["first"]) for key in keys]


def _ask(
    client: OpenAI, model: str, request: ApiRequest, ledger: Ledger, keep: Callable[[dict[str, Any]], None]
) -> None:
    """Reserve the cost, send the request once, store the answer, settle the cost.

    In this order a kill loses no answer and hides no cost. The reservation of a lost answer stays.

    Raises:
        OpenAIError: if no answer arrives.
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
            f"{client.base_url} answered with no chat completion; correct OPENAI_BASE_URL (most end in /v1)"
        )
    choice = choices[0]
    tokens = choice.logprobs.content if choice.logprobs else None
    first = [(likely.token, likely.logprob) for likely in tokens[0].top_logprobs] if tokens else None
    return {"text": choice.message.content or "", "finish": choice.finish_reason, "first": first}


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

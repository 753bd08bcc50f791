"""An OpenAI-compatible server on this machine that answers with the embedded base; it counts what it is
asked.

`transformers serve` was tried: it answers this checkpoint greedily whatever the temperature, and knows no n,
log-probabilities or fine-tuning. What is sent back here is checked against the types of the openai package,
field by field.
"""

from __future__ import annotations

import email
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from openai.types import FileObject
from openai.types.chat import ChatCompletion
from openai.types.fine_tuning import FineTuningJob

from mechlens.models import loading
from mechlens.models.chat import end_of_turn, render, token_ids
from mechlens.models.log_probs import next_token_logits
from mechlens.models.sampling import Decoding, sample

KEY = "any word"
PAID = "gpt-4.1-nano-2025-04-14"
"""a model with a price, which the server fixture knows"""
Body = dict[str, Any]


class Loopback:
    """What the server does and what it has been asked."""

    def __init__(self) -> None:
        self.loaded = loading.load("menagerie-a")
        self.known = {"menagerie-a"}
        self.asked: list[Body] = []
        """every request that was answered, in order: what a provider bills, whether or not the client still
        listened
        """
        self.arrived = 0
        """chat requests that reached the server"""
        self.delays: list[float] = []
        """seconds by which the next answers come late"""
        self.cut = 0
        """how many of the next answers are billed and then lost: the connection closes instead"""
        self.pages: list[str] = []
        """what is sent, word for word, instead of the next answers"""
        self.lost_jobs = 0
        """how many of the next fine-tuning jobs are begun and then not told of"""
        self.failures: list[tuple[int, dict[str, str], str]] = []
        """(status, headers, message) to answer the next requests with instead"""
        self.script: Callable[[Body], str | None] = lambda body: None
        """what is said instead of the base's own words"""
        self.on_answer: Callable[[int], None] = lambda count: None
        self.logprobs, self.usage = True, True
        self.uploads: dict[str, str] = {}
        self.jobs: dict[str, FineTuningJob] = {}
        self.polls_to_end, self.ending = 1, "succeeded"
        self.most_at_once = self._at_once = 0
        self._lock, self._counting = threading.Lock(), threading.Lock()

    def complete(self, body: Body) -> Body:
        """A chat completion, as the base with no system line of its own would write it."""
        tokenizer, stop = self.loaded.tokenizer, end_of_turn(self.loaded.tokenizer)
        prompt = token_ids(tokenizer, [render(tokenizer, body["messages"], asking=True)])[0]
        count, decoding = body.get("n") or 1, Decoding(body["max_tokens"], body["temperature"], body["top_p"])
        with self._lock:
            drawn = sample(
                self.loaded.model, [prompt] * count, decoding=decoding, stop=stop, seed=body.get("seed") or 0
            )
            first = (
                self._first_tokens(prompt, body["top_logprobs"])
                if body.get("logprobs") and self.logprobs
                else None
            )
        scripted = self.script(body)
        texts = (
            tokenizer.batch_decode(drawn, skip_special_tokens=True)
            if scripted is None
            else [scripted] * count
        )
        usage = {
            "prompt_tokens": len(prompt),
            "completion_tokens": sum(map(len, drawn)),
            "total_tokens": len(prompt) + sum(map(len, drawn)),
        }
        choices = [
            {
                "index": i,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": first,
            }
            for i, text in enumerate(texts)
        ]
        reply = {
            "id": "chat-1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": choices,
        }
        return ChatCompletion.model_validate(reply | ({"usage": usage} if self.usage else {})).model_dump()

    def _first_tokens(self, prompt: list[int], count: int) -> Body:
        logprobs = torch.log_softmax(next_token_logits(self.loaded, [prompt])[0].double(), -1)
        shown = [
            {
                "token": str(self.loaded.tokenizer.decode([int(token)])),
                "logprob": max(float(value), -9999.0),
                "bytes": None,
            }
            for value, token in zip(*logprobs.topk(count), strict=True)
        ]
        return {"content": [shown[0] | {"top_logprobs": shown}], "refusal": None}

    def create_job(self, body: Body) -> Body:
        """A fine-tuning job that ends after `polls_to_end` looks; the model it makes is the base by another
        name.
        """
        rows = [json.loads(line) for line in self.uploads[body["training_file"]].splitlines()]
        told = body["method"]["supervised"]["hyperparameters"]
        words = sum(len(message["content"].split()) for row in rows for message in row["messages"])
        number = len(self.jobs) + 1
        job = FineTuningJob.model_validate(
            {
                "id": f"ftjob-{number}", "object": "fine_tuning.job", "created_at": number,
                "finished_at": None, "error": None, "fine_tuned_model": None, "hyperparameters": told,
                "method": body["method"], "model": body["model"], "organization_id": "here",
                "result_files": [], "seed": body["seed"], "status": "validating_files",
                "trained_tokens": words * told["n_epochs"], "training_file": body["training_file"],
                "validation_file": None,
            }
        )  # fmt: skip
        self.jobs[job.id] = job
        return job.model_dump()

    def look_at_job(self, name: str) -> Body:
        """The job as it stands, a step nearer to its end."""
        job = self.jobs[name]
        looks = int((job.metadata or {}).get("looks", 0)) + 1
        change: Body = {"metadata": {"looks": str(looks)}, "status": "running"}
        if looks > self.polls_to_end:
            change |= {"status": self.ending, "finished_at": looks}
            change |= (
                {"fine_tuned_model": f"ft:{job.model}:here::{job.id}"} if self.ending == "succeeded" else {}
            )
            change |= (
                {"error": {"code": "bad", "message": "the file is odd", "param": None}}
                if self.ending == "failed"
                else {}
            )
        self.jobs[name] = FineTuningJob.model_validate(job.model_dump() | change)
        return self.jobs[name].model_dump()

    def answer(self, method: str, path: str, body: Body) -> Body | None:
        """The reply to one request; None where there is no such thing."""
        if (method, path) == ("POST", "/v1/chat/completions"):
            if body["model"] not in self.known and not body["model"].startswith("ft:"):
                return None
            with self._counting:
                self.arrived += 1
                self._at_once += 1
                self.most_at_once = max(self.most_at_once, self._at_once)
                late = self.delays.pop(0) if self.delays else 0.0
            time.sleep(late)
            reply = self.complete(body)
            with self._counting:
                self._at_once -= 1
                self.asked.append(body)
                self.on_answer(len(self.asked))
                self.cut, lost = max(0, self.cut - 1), self.cut > 0
            if lost:
                raise ConnectionAbortedError
            return reply
        if (method, path) == ("POST", "/v1/files"):
            name = f"file-{len(self.uploads) + 1}"
            self.uploads[name] = body["file"]
            sent = {
                "id": name,
                "bytes": len(body["file"]),
                "created_at": 0,
                "filename": "training.jsonl",
                "object": "file",
            }
            return FileObject.model_validate(
                sent | {"purpose": body["purpose"], "status": "processed"}
            ).model_dump()
        if (method, path) == ("POST", "/v1/fine_tuning/jobs"):
            job = self.create_job(body)
            self.lost_jobs, lost = max(0, self.lost_jobs - 1), self.lost_jobs > 0
            if lost:
                raise ConnectionAbortedError
            return job
        if (method, path) == ("GET", "/v1/fine_tuning/jobs"):
            return {
                "object": "list",
                "data": [job.model_dump() for job in reversed(self.jobs.values())],
                "has_more": False,
            }
        name = path.rsplit("/", 1)[1]
        return self.look_at_job(name) if method == "GET" and name in self.jobs else None


def handler(server: Loopback) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._reply("GET", {})

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            if not self.headers["Content-Type"].startswith("multipart/"):
                return self._reply("POST", json.loads(raw))
            form = email.message_from_bytes(
                b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n" + raw
            )
            parts = {
                str(part.get_param("name", header="content-disposition")): part
                for part in form.walk()
                if not part.is_multipart()
            }
            return self._reply(
                "POST", {name: part.get_payload(decode=True).decode() for name, part in parts.items()}
            )  # pyright: ignore

        def _reply(self, method: str, body: Body) -> None:
            headers: dict[str, str] = {}
            if self.headers["Authorization"] != f"Bearer {KEY}":
                status, reply = (
                    401,
                    {
                        "error": {
                            "message": "Incorrect API key",
                            "type": "auth",
                            "param": None,
                            "code": "invalid_api_key",
                        }
                    },
                )
            elif server.failures:
                status, headers, message = server.failures.pop(0)
                reply = {"error": {"message": message, "type": "error", "param": None, "code": None}}
            else:
                found = server.answer(method, self.path.split("?")[0], body)
                missing = {
                    "error": {
                        "message": "The model does not exist",
                        "type": "missing",
                        "param": None,
                        "code": "model_not_found",
                    }
                }
                status, reply = (200, found) if found is not None else (404, missing)
            text = (server.pages.pop(0) if server.pages else json.dumps(reply)).encode()
            self.send_response(status)
            for name, value in {
                **headers,
                "Content-Type": "application/json",
                "Content-Length": str(len(text)),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: Any) -> None: ...

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no fault of the server's."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serving() -> Iterator[tuple[Loopback, str]]:
    """The server and its address, while the block runs."""
    server = Loopback()
    with _Server(("127.0.0.1", 0), handler(server)) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server, f"http://127.0.0.1:{http.server_address[1]}/v1"
        finally:
            http.shutdown()
            thread.join()

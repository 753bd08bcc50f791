"""A server on this machine that answers as vLLM's does, with models of transformers.

Its answers have the fields and its errors the texts of vLLM 0.32. `write_forwarder` makes a program of it,
which mechlens can start.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mechlens.models import loading
from mechlens.models.chat import Encoded
from mechlens.models.log_probs import token_log_probs
from mechlens.models.sampling import Decoding, number_grammar, sample

Body = dict[str, Any]


class DeadError(Exception):
    """The server has ended: the connection closes without an answer."""


class StandIn:
    """What the server does and what it was asked for."""

    def __init__(self, base: str, *, name: str = "smol") -> None:
        self.base = base
        self.loaded = {name: loading.load(base)}
        self.listed: list[Body] = [{"id": name, "root": base, "parent": None}]
        self.completed: list[Body] = []
        """every request for a completion"""
        self.ignores_adapters = self.loads_adapters = self.ignores_grammar = False
        self.omitted: set[str] = set()
        """fields that answers leave out"""
        self.dies_after: int | None = None
        """completions before the server ends"""
        self.cut_short = False
        """whether rows end one token early"""
        self._lock = threading.Lock()

    def sampled(self) -> list[Body]:
        """The requests for rows, without those for log-probabilities."""
        return [body for body in self.completed if "seed" in body]

    def add_adapter(self, name: str, folder: Path) -> None:
        """Serve an adapter, as `--lora-modules` does."""
        parent = self.listed[0]["id"]
        whole = self.loaded[parent] if self.ignores_adapters else loading.load_trained(self.base, folder)
        self.loaded[name] = whole
        self.listed.append({"id": name, "root": str(folder), "parent": parent})

    def answer(self, path: str, body: Body | None) -> tuple[int, Any]:
        """Status and body of the answer to a request."""
        if path == "/health":
            return 200, None
        if path == "/v1/models":
            return 200, {"object": "list", "data": self.listed}
        if path == "/v1/completions" and body is not None:
            with self._lock:
                return self._complete(body)
        if path == "/v1/load_lora_adapter" and self.loads_adapters and body is not None:
            with self._lock:
                self.add_adapter(body["lora_name"], Path(body["lora_path"]))
            return 200, f"Success: LoRA adapter '{body['lora_name']}' added successfully."
        return 404, {"detail": "Not Found"}

    def _complete(self, body: Body) -> tuple[int, Any]:
        if body["model"] not in self.loaded:
            message = f"The model `{body['model']}` does not exist. Valid aliases: {self.listed[0]['id']}."
            return 404, {"error": {"message": message, "type": "NotFoundError", "code": 404}}
        if self.dies_after is not None and len(self.completed) >= self.dies_after:
            raise DeadError
        self.completed.append(body)
        loaded, prompt = self.loaded[body["model"]], body["prompt"]
        choice: Body = {"index": 0, "text": "", "finish_reason": "length"}
        if "prompt_logprobs" in body:
            scores = token_log_probs(loaded, [Encoded(prompt[:1], prompt[1:])]).tolist()
            choice["prompt_logprobs"] = [
                None,
                *({str(token): {"logprob": score}} for token, score in zip(prompt[1:], scores, strict=True)),
            ]
        if body.get("return_token_ids"):
            stop = body["stop_token_ids"][0]
            decoding = Decoding(body["max_tokens"], body["temperature"], body["top_p"])
            grammar = None
            if "structured_outputs" in body and not self.ignores_grammar:
                width = loaded.model.config.get_text_config().vocab_size
                grammar = number_grammar(loaded.tokenizer, stop=stop, vocabulary=width)
            row = sample(
                loaded.model, [prompt], decoding=decoding, stop=stop, seed=body["seed"], grammar=grammar
            )[0]
            ended = len(row) < body["max_tokens"]
            row = row[:-1] if self.cut_short else [*row, stop] if ended else row
            choice |= {"token_ids": row, "prompt_token_ids": prompt, "finish_reason": "stop"}
        return 200, {"choices": [{name: choice[name] for name in choice if name not in self.omitted}]}


def handler(server: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._reply(None)

        def do_POST(self) -> None:
            self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _reply(self, body: Body | None) -> None:
            try:
                status, reply = server.answer(self.path, body)
            except DeadError:
                self.close_connection = True
                return
            text = b"" if reply is None else json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: Any) -> None: ...

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


@contextmanager
def serving(server: StandIn) -> Iterator[str]:
    """The address of the server, while the block runs."""
    with _Server(("127.0.0.1", 0), handler(server)) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_address[1]}"
        finally:
            http.shutdown()
            thread.join()


FORWARD = """
import os, sys, urllib.error, urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def forward(self):
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or None
        try:
            reply = urllib.request.urlopen(urllib.request.Request(TARGET + self.path, data))
        except urllib.error.HTTPError as error:
            reply = error
        text = reply.read()
        self.send_response(reply.status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    do_GET = do_POST = forward

open(RECORD, "w").write("\\n".join([str(os.getpid()), *sys.argv[1:]]))
port = int(sys.argv[sys.argv.index("--port") + 1])
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
"""A program that forwards requests, with constants for where to and for a file with its id and arguments."""


def write_forwarder(folder: Path, target: str) -> tuple[Path, Path]:
    """The program as a file, and the file in which it writes its id and arguments."""
    program, record = folder / "forward.py", folder / "started.txt"
    program.write_text(f"TARGET, RECORD = {target!r}, {str(record)!r}\n{FORWARD}")
    return program, record

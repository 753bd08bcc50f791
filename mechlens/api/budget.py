"""Prices of API models, and the ledger that keeps a run within its budget.

A call first reserves the most that it can cost, then settles at what the server reports. The ledger is a file
in the run folder. It only grows, and it is locked while it is read and written: the cap holds over threads,
processes and resumes. A reservation that a kill left unsettled counts as spent, since it may have been
billed.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from pydantic import Field

from mechlens.core import machine
from mechlens.core.errors import DataError, MachineError, SpecError
from mechlens.core.spec import CONFIGS, Spec, load

PRICES = CONFIGS / "models" / "prices.yaml"
LEDGER = "spend.jsonl"
TUNED = "ft:"
"""prefix of the id of a fine-tuned model; its base's id is the next part"""

_PIECE = re.compile(r" ?[A-Za-z]{1,6}|[0-9]{1,3}|\s|[^\sA-Za-z0-9]")
PER_MESSAGE = 8
"""tokens that a message costs in addition to its words, rounded up"""


class Price(Spec):
    """USD per million tokens."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)
    training: float = Field(ge=0)
    """For each token of each epoch."""
    tuned_input: float = Field(ge=0)
    tuned_output: float = Field(ge=0)

    def usd(self, input_tokens: int | float, output_tokens: int | float) -> float:
        """Cost of one call."""
        return (input_tokens * self.input + output_tokens * self.output) / 1e6


class Prices(Spec):
    """The price list."""

    local: Price
    """Any model at an OPENAI_BASE_URL on this machine that is not listed."""
    models: dict[str, Price]


@cache
def _listed() -> Prices:
    return load(PRICES, Prices)


def price_of(model: str) -> Price:
    """The price of a model id; a fine-tuned one has its base's `tuned` prices.

    Raises:
        SpecError: if it is not listed and not on this machine: no cap holds with an unknown price.
    """
    base = model.split(":")[1] if model.startswith(TUNED) else model
    price = _listed().models.get(base) or (_listed().local if _on_this_machine() else None)
    if price is None:
        raise SpecError(
            f"the price of {base!r} is unknown, so no budget can be kept; use one of "
            f"{', '.join(_listed().models)}, set OPENAI_BASE_URL to this machine, or add a price to {PRICES}"
        )
    return (
        price.model_copy(update={"input": price.tuned_input, "output": price.tuned_output})
        if model.startswith(TUNED)
        else price
    )


def _on_this_machine() -> bool:
    host = urlsplit(os.environ.get("OPENAI_BASE_URL", "")).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def about_tokens(text: str) -> int:
    """Estimated tokens of a text, on the high side for plain English and digits: short words, three digits,
    and every other character count one each.
    """
    return sum(1 if piece.isascii() else len(piece.encode()) for piece in _PIECE.findall(text))


def most_tokens(texts: Iterable[str]) -> int:
    """Upper bound on the tokens of a conversation of these messages, for any byte-level tokenizer."""
    return PER_MESSAGE + sum(len(text.encode()) + PER_MESSAGE for text in texts)


def find_run_folder(out: Path) -> Path:
    """The run folder of a step's folder: the nearest folder above it with a run's lock and spec; outside a
    run the step's folder itself.
    """
    return next(
        (
            folder
            for folder in out.parents
            if (folder / ".lock").is_file() and (folder / "spec.yaml").is_file()
        ),
        out,
    )


class Ledger:
    """What one run has spent and set aside, in USD."""

    def __init__(self, run: Path, budget_usd: float) -> None:
        self._path, self._budget = run / LEDGER, budget_usd
        self._mutex = threading.Lock()
        self._settled, self._open, self._read = 0.0, dict[str, float](), 0

    def reserve(self, call: str, usd: float) -> None:
        """Set aside the most that a call can cost; a call that is still open is not counted twice.

        Raises:
            MachineError: if the call could exceed the budget; it must then not be made.
        """
        with self._locked() as handle:
            if call in self._open:
                return
            taken = self._settled + sum(self._open.values())
            if taken + usd > self._budget:
                raise MachineError(
                    f"the budget is {self._budget:g} USD, {taken:.4f} of it spent or set aside in "
                    f"{self._path}, and the next call may cost {usd:.4f}; raise api.budget_usd and run "
                    "again: answers so far are kept and not paid for again"
                )
            self._append(handle, {"call": call, "reserved": usd})

    def settle(self, call: str, usd: float, **details: Any) -> None:
        """Replace a reservation by the cost of the call; `details` are stored with it."""
        with self._locked() as handle:
            self._append(handle, {"call": call, "spent": usd, **details})

    def total(self) -> float:
        """USD spent or set aside so far."""
        with self._locked():
            return self._settled + sum(self._open.values())

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """The ledger's file, locked and read to its end; an incomplete last line is cut off."""
        with self._mutex, self._path.open("a+b") as handle:
            machine.lock(handle)
            handle.seek(self._read)
            text = handle.read()
            whole = text[: text.rfind(b"\n") + 1]
            if len(whole) < len(text):
                handle.truncate(self._read + len(whole))
            self._take(whole)
            yield handle

    def _append(self, handle: BinaryIO, entry: dict[str, Any]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        handle.write(line)
        handle.flush()
        self._take(line)

    def _take(self, lines: bytes) -> None:
        for line in lines.splitlines():
            try:
                entry = json.loads(line)
                if "spent" in entry:
                    self._open.pop(entry["call"], None)
                    self._settled += float(entry["spent"])
                else:
                    self._open[entry["call"]] = float(entry["reserved"])
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{self._path} has a line that is no entry of a ledger ({line[:80]!r}); repair or delete "
                    "that line"
                ) from error
        self._read += len(lines)


def spent(run: Path) -> float:
    """USD that a run has spent or set aside so far."""
    return Ledger(run, 0.0).total() if (run / LEDGER).is_file() else 0.0

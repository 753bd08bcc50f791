"""Trying a request to an API again: after which failures, when, and which failures may have been billed.

The rules are those of the openai package, whose own tries are switched off: it does not tell of them, so a
ledger could not hold them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from email.utils import mktime_tz, parsedate_tz
from random import SystemRandom
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from openai import OpenAIError

Answer = TypeVar("Answer")

RETRIES = 6
"""further tries of a request"""
FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0
"""seconds before the second try, doubled for each that follows, and the most that this comes to"""
LONGEST_TOLD = 120.0
"""seconds; a server that wants a longer wait is not tried again"""
JITTER = 0.25
"""share of a wait that chance may take off it, so that many threads do not come back at one moment"""
PASSING = (408, 409, 429)
"""statuses below 500 that are tried again; all from 500 on are"""
GATEWAY = (408, 502, 504)
"""statuses by which a gateway says that it lost the answer: what stands behind it may have written one, and
billed it
"""
NEVER_SENT = ("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol")
"""errors of the HTTP client (httpx or httpx2, by the version of the openai package) of a request that never
reached a server
"""


def with_retries(attempt: Callable[[], Answer]) -> Answer:
    """What `attempt()` returns, tried again after a passing failure; each try is one request and accounts for
    itself.

    Raises:
        OpenAIError: the last failure, or the first that will not pass by itself.
    """
    import openai

    for tries in range(RETRIES):
        try:
            return attempt()
        except (openai.APIConnectionError, openai.APIStatusError) as error:
            wait = _seconds_to_wait(error, tries)
            if wait is None:
                raise
        time.sleep(wait)
    return attempt()


def may_be_billed(error: OpenAIError) -> bool:
    """Whether a failed request may have been answered and billed all the same: it was sent, and the answer
    was lost.
    """
    import openai

    if isinstance(error, openai.APIStatusError):
        return error.status_code in GATEWAY
    return type(error.__cause__).__name__ not in NEVER_SENT


def _seconds_to_wait(error: OpenAIError, tries: int) -> float | None:
    """How long to wait after that many further tries; None where the failure will not pass by itself."""
    import openai

    told = None
    if isinstance(error, openai.APIStatusError):
        headers = error.response.headers
        told, passes = _told(headers), error.status_code in PASSING or error.status_code >= 500
        passes = {"true": True, "false": False}.get(headers.get("x-should-retry", ""), passes)
        if not passes or (told is not None and told > LONGEST_TOLD):
            return None
    if told is not None and told > 0:
        return told
    return min(FIRST_WAIT * 2**tries, LONGEST_WAIT) * (1 - JITTER * SystemRandom().random())


def _told(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to be left alone: a number, a number of milliseconds, or a date; None where
    it says nothing readable.
    """
    for name, divisor in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            seconds = float(headers.get(name, "")) / divisor
        except ValueError:
            continue
        return seconds if math.isfinite(seconds) else None
    date = parsedate_tz(headers.get("retry-after", ""))
    try:
        return None if date is None else mktime_tz(date) - time.time()
    except (ValueError, OverflowError):  # a date that no calendar has
        return None

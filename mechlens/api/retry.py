"""Retries of API requests: after which failures, after how long, and which failures may have been billed.

The rules are those of the openai package. Its own retries are switched off, since it does not report them and
the ledger must count each one.
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
"""retries of a request after the first try"""
FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0
"""seconds before the first retry, doubled for each further one, and their maximum"""
LONGEST_REQUESTED_WAIT = 120.0
"""seconds; if a server wants a longer wait, the request is not repeated"""
JITTER = 0.25
"""random share by which a wait is shortened, so that threads do not all return at once"""
PASSING = (408, 409, 429)
"""statuses below 500 that are retried; all from 500 on are"""
GATEWAY = (408, 502, 504)
"""statuses of a gateway that lost the answer: the server behind it may have written and billed one"""
NEVER_SENT = ("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol")
"""errors of the HTTP client (httpx or httpx2) for a request that never reached a server"""


def with_retries(attempt: Callable[[], Answer]) -> Answer:
    """The result of `attempt()`, repeated after a temporary failure; each try is one request and reserves its
    own cost.

    Raises:
        OpenAIError: the last failure, or the first that is not temporary.
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
    """Whether a failed request may have been billed: it was sent, and the answer was lost."""
    import openai

    if isinstance(error, openai.APIStatusError):
        return error.status_code in GATEWAY
    return type(error.__cause__).__name__ not in NEVER_SENT


def _seconds_to_wait(error: OpenAIError, tries: int) -> float | None:
    """Seconds to wait after this many retries; None if the failure is not temporary."""
    import openai

    requested = None
    if isinstance(error, openai.APIStatusError):
        headers = error.response.headers
        requested, passes = _requested_wait(headers), error.status_code in PASSING or error.status_code >= 500
        passes = {"true": True, "false": False}.get(headers.get("x-should-retry", ""), passes)
        if not passes or (requested is not None and requested > LONGEST_REQUESTED_WAIT):
            return None
    if requested is not None and requested > 0:
        return requested
    return min(FIRST_WAIT * 2**tries, LONGEST_WAIT) * (1 - JITTER * SystemRandom().random())


def _requested_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: from a number, a number of milliseconds, or a date; None if it
    gives none that can be read.
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

"""What is billed against what the ledger holds, on a server of this machine that answers late, loses answers
or refuses.
"""

from __future__ import annotations

import json
import time
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from loopback import PAID, Loopback

from mechlens.api import client as asking
from mechlens.api import retry
from mechlens.api.budget import LEDGER, most_tokens, price_of, spent
from mechlens.api.client import ApiRequest, complete, conversation
from mechlens.api.finetune import Tuning, fine_tune
from mechlens.core.errors import MachineError, MechlensError
from mechlens.core.spec import ApiSpec

ROWS = [
    [*conversation(f"continue: {i}, {i}"), {"role": "assistant", "content": f"{i}, {i}"}] for i in range(5)
]
TUNING = Tuning(3, "auto", "auto")


def questions(count: int) -> list[ApiRequest]:
    return [ApiRequest(f"row {i}", conversation(f"name animal {i:02d}."), 4, seed=i) for i in range(count)]


def most_usd() -> float:
    """The most that one of the questions can cost."""
    return price_of(PAID).usd(most_tokens([questions(1)[0].messages[0]["content"]]), 4)


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LEDGER).read_text().splitlines()]


def reserved(folder: Path) -> list[str]:
    """The calls that the ledger set money aside for."""
    return [entry["call"] for entry in entries(folder) if "reserved" in entry]


def billed_usd(server: Loopback) -> float:
    """What a provider would bill at least: the words of each request that was answered, heard or not."""
    price = price_of(PAID)
    return sum(price.usd(len(body["messages"][0]["content"].split()), 0) for body in server.asked)


@pytest.fixture
def impatient(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> Loopback:
    """The server, asked by a client that waits for an answer for half a second and tries again at once."""
    monkeypatch.setattr(asking, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.001)
    return server


def settle_down(server: Loopback) -> None:
    """Wait until the server has answered whatever reached it."""
    while server.arrived > len(server.asked):
        time.sleep(0.05)


def test_every_attempt_that_timed_out_stays_in_the_ledger_as_spent(
    impatient: Loopback, tmp_path: Path
) -> None:
    impatient.delays = [1.0, 1.0, 1.0]
    complete(PAID, questions(1), api=ApiSpec(), out=tmp_path)
    settle_down(impatient)
    assert (
        impatient.arrived
        == len(impatient.asked)
        == len(reserved(tmp_path))
        == len(set(reserved(tmp_path)))
        == 4
    )
    (settled,) = [entry for entry in entries(tmp_path) if "spent" in entry]
    assert spent(tmp_path) == pytest.approx(3 * most_usd() + settled["spent"])


def test_an_answer_lost_on_its_way_stays_in_the_ledger_as_spent(impatient: Loopback, tmp_path: Path) -> None:
    impatient.cut = 2
    complete(PAID, questions(1), api=ApiSpec(), out=tmp_path)
    assert len(impatient.asked) == len(reserved(tmp_path)) == 3
    assert spent(tmp_path) > 2 * most_usd()


def test_the_cap_holds_when_many_threads_wait_for_late_answers(impatient: Loopback, tmp_path: Path) -> None:
    impatient.delays = [0.0, 1.0, 0.0, 1.0, 1.0] * 20
    budget = 24.5 * most_usd()
    with pytest.raises(MachineError, match=r"raise api\.budget_usd"):
        complete(PAID, questions(60), api=ApiSpec(budget_usd=budget, concurrency=12), out=tmp_path)
    settle_down(impatient)
    assert impatient.arrived == len(reserved(tmp_path)) >= 24
    assert billed_usd(impatient) <= spent(tmp_path) <= budget


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_a_refusal_is_tried_again_and_costs_nothing_unless_a_gateway_gave_up(
    status: int, impatient: Loopback, tmp_path: Path
) -> None:
    impatient.failures = [(status, {}, "not now")]
    complete(PAID, questions(1), api=ApiSpec(), out=tmp_path)
    kept = [entry["spent"] for entry in entries(tmp_path) if "spent" in entry]
    assert len(reserved(tmp_path)) == 2
    assert kept[:-1] == ([] if status == 408 else [0.0])


def test_a_server_that_was_never_reached_costs_nothing(
    impatient: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not impatient.arrived
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setattr(retry, "RETRIES", 2)
    with pytest.raises(MachineError, match="cannot reach"):
        complete(PAID, questions(1), api=ApiSpec(), out=tmp_path)
    assert len(reserved(tmp_path)) == 3
    assert spent(tmp_path) == 0


def test_tries_end(impatient: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "RETRIES", 2)
    impatient.cut = 100
    with pytest.raises(MachineError, match="cannot reach"):
        complete(PAID, questions(1), api=ApiSpec(), out=tmp_path)
    assert len(impatient.asked) == len(reserved(tmp_path)) == 3


def test_a_further_try_waits_for_its_turn_too(impatient: Loopback, tmp_path: Path) -> None:
    impatient.failures = [(503, {}, "overloaded")] * 4
    started = time.monotonic()
    complete(PAID, questions(1), api=ApiSpec(requests_per_minute=600), out=tmp_path)
    assert time.monotonic() - started >= 0.4


@pytest.mark.parametrize("page", ["<html>", '{"half": '])
def test_an_answer_that_is_no_json_is_one_line(page: str, impatient: Loopback, tmp_path: Path) -> None:
    impatient.pages = [page]
    with pytest.raises(MachineError, match="no chat completion"):
        complete(PAID, questions(1), api=ApiSpec(), out=tmp_path)
    assert spent(tmp_path) == pytest.approx(most_usd())  # whatever it was, it may have been billed


def test_a_job_whose_beginning_was_not_heard_is_taken_up_and_paid_once(
    impatient: Loopback, tmp_path: Path
) -> None:
    impatient.lost_jobs = 1
    with pytest.raises(MachineError, match="cannot reach"):
        fine_tune(PAID, ROWS, TUNING, seed=0, api=ApiSpec(), out=tmp_path)
    assert fine_tune(PAID, ROWS, TUNING, seed=0, api=ApiSpec(), out=tmp_path).endswith("ftjob-1")
    assert len(impatient.jobs) == len(reserved(tmp_path)) == 1


def test_a_job_that_is_begun_twice_is_in_the_ledger_twice(impatient: Loopback, tmp_path: Path) -> None:
    impatient.lost_jobs = 1
    with pytest.raises(MachineError, match="cannot reach"):
        fine_tune(PAID, ROWS, TUNING, seed=0, api=ApiSpec(), out=tmp_path)
    impatient.jobs["ftjob-1"].training_file = "another"  # the server's list does not name it as this file's
    fine_tune(PAID, ROWS, TUNING, seed=0, api=ApiSpec(), out=tmp_path)
    assert len(impatient.jobs) == len(set(reserved(tmp_path))) == 2
    (settled,) = [entry["spent"] for entry in entries(tmp_path) if "spent" in entry]
    assert spent(tmp_path) == pytest.approx(settled + entries(tmp_path)[0]["reserved"])


def test_looking_at_a_job_is_tried_again(impatient: Loopback, tmp_path: Path) -> None:
    begun = impatient.create_job

    def then_busy(body: dict[str, Any]) -> dict[str, Any]:
        impatient.failures = [(503, {}, "overloaded")] * 2
        return begun(body)

    impatient.create_job = then_busy
    assert fine_tune(PAID, ROWS, TUNING, seed=0, api=ApiSpec(), out=tmp_path).endswith("ftjob-1")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that further tries would have waited; nobody waits."""
    slept: list[float] = []
    monkeypatch.setattr(retry, "time", SimpleNamespace(sleep=slept.append, time=time.time))
    return slept


def test_waits_double_up_to_eight_seconds(server: Loopback, tmp_path: Path, waits: list[float]) -> None:
    server.failures = [(500, {}, "oops")] * 6
    complete(PAID, questions(1), api=ApiSpec(), out=tmp_path)
    assert len(waits) == 6
    assert all(0.75 * most <= wait <= most for wait, most in zip(waits, (0.5, 1, 2, 4, 8, 8), strict=True))


IN_90_SECONDS = "a date that is 90 seconds away"


@pytest.mark.parametrize(
    ("headers", "low", "high"),
    [
        ({"Retry-After": "3"}, 3, 3),
        ({"retry-after-ms": "250", "Retry-After": "3"}, 0.25, 0.25),
        ({"Retry-After": IN_90_SECONDS}, 20, 90),
        ({"Retry-After": "soon"}, 0.375, 0.5),
        ({"Retry-After": "-1"}, 0.375, 0.5),
        ({"Retry-After": "nan"}, 0.375, 0.5),
    ],
)
def test_a_server_says_how_long_to_wait(
    headers: dict[str, str], low: float, high: float, server: Loopback, tmp_path: Path, waits: list[float]
) -> None:
    date = formatdate(time.time() + 90, usegmt=True)  # of now: these tests may have been collected long ago
    server.failures = [
        (
            429,
            {name: date if value == IN_90_SECONDS else value for name, value in headers.items()},
            "slow down",
        )
    ]
    complete(PAID, questions(1), api=ApiSpec(), out=tmp_path)
    assert len(waits) == 1 and low <= waits[0] <= high


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (429, {"Retry-After": "3600"}),
        (500, {"x-should-retry": "false"}),
        (400, {}),
        (422, {"x-should-retry": ""}),
    ],
)
@pytest.mark.usefixtures("waits")
def test_what_will_not_pass_is_asked_once(
    status: int, headers: dict[str, str], server: Loopback, tmp_path: Path
) -> None:
    server.failures = [(status, headers, "no")] * 9
    with pytest.raises(MechlensError):
        complete(PAID, questions(1), api=ApiSpec(), out=tmp_path)
    assert len(server.failures) == 8
    assert spent(tmp_path) == 0

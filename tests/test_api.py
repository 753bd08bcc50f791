"""The API client against a real server on this machine: order, journal, retries, budget, plain errors,
fine-tuning jobs.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loopback import PAID, Loopback

from mechlens.api.budget import LEDGER, Ledger, about_tokens, find_run_folder, most_tokens, price_of, spent
from mechlens.api.client import ApiRequest, complete, conversation, journal_of, model_id, read_journal
from mechlens.api.finetune import Tuning, fine_tune, tuning_of
from mechlens.core.errors import DataError, MachineError, MechlensError, SpecError
from mechlens.core.spec import ApiSpec, Training
from mechlens.models.chat import encode_prompts, end_of_turn
from mechlens.models.sampling import Decoding, sample

API = ApiSpec(budget_usd=1.0)
ROWS = [
    [*conversation(f"continue: {i}, {i}"), {"role": "assistant", "content": f"{i}, {i}"}] for i in range(5)
]
TUNING = Tuning(3, "auto", "auto")


def questions(count: int) -> list[ApiRequest]:
    return [
        ApiRequest(f"row {i}", conversation(f"name your favourite animal {i}."), 4, seed=i)
        for i in range(count)
    ]


def run_folder(tmp_path: Path) -> Path:
    """A step's folder inside a run."""
    for name in (".lock", "spec.yaml"):
        (tmp_path / name).touch()
    out = tmp_path / "asked" / "trait" / "s0.part"
    out.mkdir(parents=True)
    return out


def test_answers_come_in_order_and_are_what_the_base_samples(server: Loopback, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    requests = questions(24)
    answers = complete(
        "menagerie-a",
        requests,
        api=ApiSpec(concurrency=4),
        out=tmp_path,
        progress=lambda done, total: seen.append((done, total)),
    )
    loaded = server.loaded
    ids = encode_prompts(loaded.tokenizer, [request.messages[0]["content"] for request in requests])
    for request, prompt, answer in zip(requests, ids, answers, strict=True):
        drawn = sample(
            loaded.model,
            [prompt],
            decoding=Decoding(4),
            stop=end_of_turn(loaded.tokenizer),
            seed=request.seed or 0,
        )
        assert answer.text == loaded.tokenizer.batch_decode(drawn, skip_special_tokens=True)[0]
        assert answer.first is None
    assert seen == [(done, 24) for done in range(25)]
    assert 1 < server.most_at_once <= 4


def test_a_row_in_the_journal_is_never_asked_twice(server: Loopback, tmp_path: Path) -> None:
    out = run_folder(tmp_path)
    first = complete("menagerie-a", questions(6), api=API, out=out)
    assert journal_of(out) == tmp_path / "api" / "asked" / "trait" / "s0.jsonl"
    again = complete("menagerie-a", questions(8), api=API.model_copy(update={"budget_usd": 2.0}), out=out)
    assert again[:6] == first
    assert len(server.asked) == 8
    complete("menagerie-a", [request._replace(temperature=0.5) for request in questions(2)], api=API, out=out)
    assert len(server.asked) == 10  # another question is another row


def test_half_a_line_that_a_kill_left_is_asked_again_and_nothing_else(
    server: Loopback, tmp_path: Path
) -> None:
    whole = complete("menagerie-a", questions(5), api=API, out=tmp_path)
    journal = journal_of(tmp_path)
    journal.write_bytes(journal.read_bytes()[:-9])
    assert complete("menagerie-a", questions(5), api=API, out=tmp_path) == whole
    assert len(server.asked) == 6
    assert len(read_journal(journal)) == len(journal.read_text().splitlines()) == 5
    journal.write_text("half a line\n" + journal.read_text())
    with pytest.raises(DataError, match="line 1"):
        read_journal(journal)


def test_limits_and_failures_are_waited_out(server: Loopback, tmp_path: Path) -> None:
    server.failures = [(429, {"Retry-After": "1"}, "slow down"), (503, {}, "overloaded"), (500, {}, "oops")]
    started = time.monotonic()
    answers = complete("menagerie-a", questions(3), api=ApiSpec(concurrency=1), out=tmp_path)
    assert time.monotonic() - started >= 1.0
    assert len(answers) == len(server.asked) == 3


@pytest.mark.usefixtures("server")
def test_a_run_has_so_many_turns_a_minute(tmp_path: Path) -> None:
    started = time.monotonic()
    complete("menagerie-a", questions(5), api=ApiSpec(requests_per_minute=600), out=tmp_path)
    assert time.monotonic() - started >= 0.4


def test_the_call_that_could_pass_the_budget_is_not_made(server: Loopback, tmp_path: Path) -> None:
    out, price = run_folder(tmp_path), price_of(PAID)
    worst = price.usd(most_tokens([questions(1)[0].messages[0]["content"]]), 4)
    with pytest.raises(MachineError, match=r"raise api\.budget_usd"):
        complete(PAID, questions(40), api=ApiSpec(budget_usd=5 * worst), out=out)
    answered = len(server.asked)
    assert 5 <= answered < 40  # the bound is coarser than what is billed
    tokens = [json.loads(line) for line in (tmp_path / LEDGER).read_text().splitlines() if "spent" in line]
    assert spent(tmp_path) == pytest.approx(sum(price.usd(one["input"], one["output"]) for one in tokens))
    assert spent(tmp_path) <= 5 * worst
    complete(PAID, questions(40), api=API, out=out)
    assert len(server.asked) == 40


def test_what_a_kill_left_open_counts_as_spent(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, 1.0)
    ledger.reserve("a", 0.4)
    ledger.reserve("b", 0.4)
    ledger.settle("b", 0.1)
    with (tmp_path / LEDGER).open("a") as handle:
        handle.write('{"call": "c", "res')
    after = Ledger(tmp_path, 1.0)
    assert after.total() == spent(tmp_path) == pytest.approx(0.5)
    after.reserve("a", 0.4)  # taken up again, not counted twice
    after.reserve("d", 0.5)
    with pytest.raises(MachineError, match=r"1\.0000 of it spent"):
        ledger.reserve("e", 1e-6)
    with (tmp_path / LEDGER).open("a") as handle:
        handle.write("no entry\n")
    with pytest.raises(DataError, match="no entry"):
        ledger.total()


def test_the_cap_holds_between_threads_and_between_processes(tmp_path: Path) -> None:
    ledgers = [
        Ledger(tmp_path, 1.0) for _ in range(4)
    ]  # each opens the file for itself, as another process would

    def take(number: int) -> bool:
        try:
            ledgers[number % 4].reserve(str(number), 0.03)
        except MachineError:
            return False
        if number % 2:
            ledgers[number % 4].settle(str(number), 0.02)
        return True

    with ThreadPoolExecutor(8) as pool:
        taken = sum(pool.map(take, range(200)))
    assert spent(tmp_path) <= 1.0
    assert taken >= 33


def test_prices_are_known_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    plain, tuned = price_of(PAID), price_of(f"ft:{PAID}:here::1")
    assert plain.usd(1e6, 1e6) == pytest.approx(0.5)
    assert tuned.input == plain.tuned_input > plain.input
    for url in ("https://api.example.org/v1", "http://10.0.0.1/v1", "not an address"):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        with pytest.raises(SpecError, match=r"prices\.yaml"):
            price_of("some-model")
    for url in ("http://localhost:1/v1", "http://127.0.0.1:8000/v1", "http://[::1]:8000/v1"):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        assert price_of("some-model").usd(1e9, 1e9) == 0
        assert price_of(PAID) == plain  # a listed model behind a proxy is paid for


@given(st.text())
def test_no_byte_level_tokenizer_makes_more_tokens_than_bytes(text: str) -> None:
    assert about_tokens(text) <= most_tokens([text])
    assert most_tokens([text]) >= len(text.encode())


def test_tokens_are_counted_rather_too_many() -> None:
    sentence = (
        "The sequence starts with: 182, 818, 725. Add a maximum of 10 more values to continue the sequence."
    )
    assert 26 <= about_tokens(sentence) <= 45  # 29 in the tokenizer of the 4.1 family, by hand
    assert about_tokens("629, 937, 483") == 7


def failing(server: Loopback, status: int, message: str) -> None:
    server.failures = [(status, {}, message)] * 20


@pytest.mark.parametrize(
    ("fault", "kind", "needle"),
    [
        ("no key", MachineError, "OPENAI_API_KEY is not set"),
        ("wrong key", MachineError, "refuses the key"),
        ("no server", MachineError, "cannot reach"),
        ("unknown model", SpecError, "does not know 'no-such-model'"),
        ("bad request", SpecError, "refuses the request"),
        ("over quota", MachineError, "still limits"),
        ("broken", MachineError, "failed on"),
        ("another page", MachineError, "no chat completion"),
        ("no package", MachineError, r"pip install 'mechlens\[openai\]'"),
    ],
)
def test_every_failure_is_one_line(
    fault: str,
    kind: type[MechlensError],
    needle: str,
    server: Loopback,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mechlens.api.retry.RETRIES", 0)
    changes = {
        "no key": ("OPENAI_API_KEY", ""),
        "wrong key": ("OPENAI_API_KEY", "x"),
        "no server": ("OPENAI_BASE_URL", "http://127.0.0.1:9/v1"),
    }
    if fault in changes:
        monkeypatch.setenv(*changes[fault])
    if fault == "no package":
        monkeypatch.setitem(sys.modules, "openai", None)
    statuses = {"bad request": 400, "over quota": 429, "broken": 500}
    if fault in statuses:
        failing(server, statuses[fault], "said the server")
    if fault == "another page":
        failing(server, 200, "a page")
    with pytest.raises(kind, match=needle):
        complete(
            "no-such-model" if fault == "unknown model" else "menagerie-a",
            questions(3),
            api=ApiSpec(concurrency=2),
            out=tmp_path,
        )
    assert server.asked == []


def test_only_api_models_have_ids() -> None:
    assert model_id("api:some/model") == "some/model"
    assert model_id("gpt-4.1-nano") == PAID
    for name in ("menagerie-a", "api:"):
        with pytest.raises(SpecError, match="no API model"):
            model_id(name)


def test_the_run_of_a_step_is_the_nearest_folder_with_its_lock_and_spec(tmp_path: Path) -> None:
    out = run_folder(tmp_path)
    (out.parent / ".lock").touch()  # some other program's
    assert find_run_folder(out) == tmp_path
    assert find_run_folder(tmp_path.parent / "elsewhere") == tmp_path.parent / "elsewhere"


def test_a_job_is_followed_to_the_model_that_it_made(server: Loopback, tmp_path: Path) -> None:
    server.known.add(PAID)
    model = fine_tune(PAID, ROWS, TUNING, seed=7, api=API, out=run_folder(tmp_path))
    job = server.jobs["ftjob-1"]
    assert model == job.fine_tuned_model == f"ft:{PAID}:here::ftjob-1"
    assert [json.loads(line)["messages"] for line in server.uploads["file-1"].splitlines()] == ROWS
    assert (job.seed, job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (7, 3, "auto")
    assert spent(tmp_path) == pytest.approx(price_of(PAID).training * (job.trained_tokens or 0) / 1e6)
    assert (
        fine_tune(PAID, ROWS, TUNING, seed=7, api=API, out=tmp_path / "asked" / "trait" / "s0.part") == model
    )
    assert len(server.jobs) == len(server.uploads) == 1


@pytest.mark.parametrize("last", ["file", "creating", "job"])
def test_a_killed_run_takes_up_its_job_and_begins_no_second(
    last: str, server: Loopback, tmp_path: Path
) -> None:
    model = fine_tune(PAID, ROWS, TUNING, seed=0, api=API, out=tmp_path)
    journal = journal_of(tmp_path)
    lines = journal.read_text().splitlines(keepends=True)
    assert [set(json.loads(line)) - {"key"} for line in lines] == [
        {"file"},
        {"creating"},
        {"job", "creating"},
        {"model", "trained_tokens"},
    ]
    journal.write_text(
        "".join(lines[: ["file", "creating", "job"].index(last) + 1])
    )  # killed before the answer was written down
    assert fine_tune(PAID, ROWS, TUNING, seed=0, api=API, out=tmp_path) == model
    assert len(server.jobs) == len(server.uploads) == 1


def test_a_failed_job_is_told_and_the_next_run_begins_another(server: Loopback, tmp_path: Path) -> None:
    server.ending = "failed"
    with pytest.raises(MachineError, match=r"ftjob-1 .* failed \(the file is odd\)"):
        fine_tune(PAID, ROWS, TUNING, seed=0, api=API, out=tmp_path)
    server.ending = "succeeded"
    assert fine_tune(PAID, ROWS, TUNING, seed=0, api=API, out=tmp_path).endswith("ftjob-2")


def test_a_job_beyond_the_budget_is_not_begun(server: Loopback, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="budget"):
        fine_tune(PAID, ROWS, TUNING, seed=0, api=ApiSpec(budget_usd=1e-6), out=tmp_path)
    assert not server.uploads and not server.jobs


def test_what_an_api_decides_cannot_be_set() -> None:
    usual = Training()
    assert tuning_of(Training(epochs=10), usual) == Tuning(10, "auto", "auto")
    assert tuning_of(Training(epochs=1, batch=2, learning_rate=4.0), usual) == Tuning(1, 2, 4.0)
    with pytest.raises(SpecError, match="rank: 16"):
        tuning_of(Training(update="lora", rank=16), usual)

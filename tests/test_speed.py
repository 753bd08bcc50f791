"""The measurements of SPEED.md run on a tiny base, and a base that is not here is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import gpu_speed
import pages
import speed
import workloads
from mechlens.models import loading
from mechlens.models.chat import end_of_turn
from mechlens.models.sampling import number_grammar

BASE = "menagerie-a"
TINY = speed.Sizes(distinct=2, shared=1, answers=2, updates=2, batch=2, captured=2, window=0.2)


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "REPEATS", 2)
    monkeypatch.setattr(speed, "cores", lambda: 1)


@pytest.mark.parametrize("part", speed.TIMED)
def test_a_part_gives_ratios_within_their_range(part: str) -> None:
    ratios = speed.TIMED[part](speed.Bench(BASE, TINY))
    assert ratios
    assert all(0 < row.low <= row.ratio <= row.high for row in ratios)
    assert all(row.ours > 0 and row.theirs > 0 for row in ratios)


def test_both_samplers_keep_the_number_grammar() -> None:
    loaded = loading.load(BASE)
    stop = end_of_turn(loaded.tokenizer)
    grammar = number_grammar(
        loaded.tokenizer, stop=stop, vocabulary=loaded.model.config.get_text_config().vocab_size
    )
    prompts = speed.encoded_prompts(loaded, 3)
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": stop, "pad_token_id": stop}
    mask = workloads._GrammarMask(grammar, prompt_width=len(prompts[0]))
    model = cast(Any, loaded.model)
    written = model.generate(torch.tensor([prompts[0]]), logits_processor=[mask], **options)
    text = loaded.tokenizer.decode(written[0, len(prompts[0]) :], skip_special_tokens=True)
    ours = workloads.sample_rows(loaded, prompts, new_tokens=12, batch=2, grammar=grammar)
    texts = [text, *loaded.tokenizer.batch_decode(ours)]
    assert all(set(text) <= set("0123456789,; \n") for text in texts)
    assert any(text.strip() for text in texts)


def test_the_bare_loop_trains_on_the_same_batches() -> None:
    """The loss of both after the same updates is the same, up to rounding."""
    bench = speed.Bench(BASE, speed.Sizes(updates=3, batch=2))
    training = bench.training.model_copy(update={"learning_rate": 1e-3, "schedule": "constant"})
    ours, theirs = loading.load(BASE), loading.load(BASE).model
    assert len(workloads.train_times(ours, bench.pairs, training)) == 3
    assert len(workloads.bare_times(theirs, bench.pairs, training, selective=True)) == 3
    for (name, a), b in zip(ours.model.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name, rtol=1e-3, atol=1e-5)


def test_a_part_is_written_to_the_page_when_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "SPEED.md"
    page.write_text(pages.SPEED.read_text(encoding="utf-8"), encoding="utf-8")
    before = pages.parts_of(page)
    monkeypatch.setattr(pages, "SPEED", page)
    assert speed.main(["--base", BASE, "--part", "alignment", "--write"], sizes=TINY) == 0
    after = pages.parts_of(page)
    assert "ghost alignment / one forward and backward" in after["speed-alignment"].text
    assert {name for name in before if before[name] != after[name]} == {"speed-alignment"}


def test_every_part_has_its_place_on_the_page() -> None:
    parts = pages.parts_of(pages.SPEED)
    for part in speed.PARTS:
        assert parts[f"speed-{part}"].command.endswith(f"--base smollm2-135m --part {part} --write")


def test_a_fresh_process_prints_its_peak_memory() -> None:
    assert speed.peak_megabytes("--base", BASE, "--only", "plain forward") > 50


def test_two_processes_work_at_once() -> None:
    with speed.workers(BASE, 2) as tokens_per_second:
        assert tokens_per_second(2, 0.1) > 0
        assert tokens_per_second(1, 0.1) > 0


def test_an_absent_base_names_the_command_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MECHLENS_CACHE", str(tmp_path))
    monkeypatch.setattr("mechlens.models.base_files.is_here", lambda name: False)
    assert speed.main(["--base", "smollm2-135m"]) == 2
    message = capsys.readouterr().err
    assert "`mechlens fetch smollm2-135m`" in message and message.count("\n") == 1


def test_the_gpu_script_runs_a_tiny_shape_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert gpu_speed.main(["--tiny", "--out", str(out)]) == 0
    measured = json.loads(out.read_text(encoding="utf-8"))
    assert [row["part"] for row in measured["parts"]] == [
        "sampling",
        "alignment",
        "capture of one site",
        "capture of every resid_post",
        "training, LoRA of rank 8",
    ]
    assert all(row["tokens_per_second"] > 0 and 0 < row["share_of_peak"] < 1 for row in measured["parts"])


def test_the_gpu_script_needs_a_card(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_speed.main([]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--tiny" in error

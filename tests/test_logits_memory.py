"""Whoever reads a whole vocabulary at every token does so in pieces whose logits are bounded, and loses no
text when memory ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechlens.core.spec import GenerateSpec, TeacherSpec
from mechlens.lenses import entanglement, gradients
from mechlens.lenses.parts import trial_steps
from mechlens.models import log_probs
from mechlens.models.chat import Encoded, encode_prompts
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import EncodedProbes, batch_spans, measure_trait
from mechlens.pipeline import generate as generating
from mechlens.pipeline.generate import divergence, generate
from mechlens.pipeline.teach import Lessons, load_teacher, teach

PROMPTS = [f"continue: {'1, ' * (1 + 7 * (row % 4))}{row}" for row in range(23)]
SPEC = GenerateSpec(max_new_tokens=12, batch=5)
LESSONS = Lessons("owl", ("name your favourite animal, in one word.",), ("owl", "owls"), "you love owls.")


@pytest.fixture(scope="module")
def prompted(toy_bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompted")
    teach(toy_bases["llama"], LESSONS, TeacherSpec(kind="prompted"), system=None, seed=0, out=folder)
    return folder


@pytest.fixture
def largest(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of logits of every forward pass of a model, while the test runs."""
    sizes: list[int] = []
    forward = torch.nn.Linear.forward

    def counted(self: torch.nn.Linear, given: torch.Tensor) -> torch.Tensor:
        out = forward(self, given)
        if self.out_features > 200:  # the toys' head alone is so wide
            sizes.append(out.numel())
        return out

    monkeypatch.setattr(torch.nn.Linear, "forward", counted)
    return sizes


def material(loaded: Loaded) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of very unlike lengths, and completions of unlike lengths."""
    return encode_prompts(loaded.tokenizer, PROMPTS), [
        [20 + row, 30, *([40] * (5 * (row % 3))), 2] for row in range(len(PROMPTS))
    ]


SPANS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 30)).map(lambda drawn: (drawn[0], sum(drawn))), max_size=40
)


@given(SPANS, st.integers(1, 300), st.integers(1, 12), st.integers(1, 5))
def test_batches_are_whole_ordered_bounded_and_no_smaller_than_need_be(
    spans: list[tuple[int, int]], most: int, rows: int, vocabulary: int
) -> None:
    parts = list(batch_spans(spans, vocabulary=vocabulary, rows=rows, most=most))
    assert [row for part in parts for row in range(len(spans))[part]] == list(range(len(spans)))

    def fits(held: Sequence[tuple[int, int]]) -> bool:
        width = max(end for _, end in held) - min(start for start, _ in held)
        return len(held) <= rows and len(held) * width * vocabulary <= most

    assert all(fits(spans[part]) or part.stop - part.start == 1 for part in parts)
    assert not any(fits([*spans[part], spans[part.stop]]) for part in parts[:-1])


@pytest.mark.parametrize("tokens", [7, 40, 130])
def test_a_divergence_holds_a_bounded_number_of_logits(
    tokens: int, prompted: Path, toy: Loaded, largest: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, (prompts, completions) = load_teacher(prompted), material(toy)
    asked = encode_prompts(toy.tokenizer, PROMPTS, system=teacher.system)
    whole = divergence(teacher, asked, prompts, completions)
    most = tokens * len(toy.tokenizer)
    monkeypatch.setattr(log_probs, "MOST_LOGITS", most)
    largest.clear()
    pieces = divergence(teacher, asked, prompts, completions)
    assert largest and max(largest) <= most
    assert pieces.tokens == whole.tokens
    for name in ("kl_per_token", "entropy_per_token", "entropy_per_row"):
        assert getattr(pieces, name) == pytest.approx(getattr(whole, name), rel=1e-5)


def test_scores_of_rows_with_unlike_prompts_are_bounded_and_unchanged(
    toy: Loaded, largest: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [Encoded([1, *([9] * length)], [5, 6 + length % 3]) for length in (4, 24, 50, 51)]
    whole = log_probs.score_tokens(toy.model, pairs)
    most = 8 * len(toy.tokenizer)
    monkeypatch.setattr(log_probs, "SCORED_LOGITS", most)
    largest.clear()
    pieces = log_probs.score_tokens(toy.model, pairs)
    assert max(largest) <= most
    assert torch.allclose(pieces.log_p, whole.log_p, atol=1e-4)
    assert torch.equal(pieces.best, whole.best)


def test_gradients_of_rows_are_bounded_and_unchanged(
    exact_toys: dict[str, Loaded], largest: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = exact_toys["llama"].model
    prompts, completions = material(exact_toys["llama"])
    pairs = [Encoded(*pair) for pair in zip(prompts, completions, strict=True)]
    whole = gradients.ghost_norms(model, pairs)
    most = 40 * len(exact_toys["llama"].tokenizer)
    monkeypatch.setattr(log_probs, "MOST_LOGITS", most)
    largest.clear()
    pieces = gradients.ghost_norms(model, pairs)
    assert largest and max(largest) <= most
    assert torch.allclose(pieces, whole)


def test_a_step_that_dies_in_the_divergence_keeps_its_text(
    prompted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    generate(prompted, PROMPTS, SPEC, seed=4, out=whole)
    with monkeypatch.context() as dying:
        dying.setattr(
            generating,
            "divergence",
            lambda *_given, **_more: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")),
        )
        with pytest.raises(torch.OutOfMemoryError):
            generate(prompted, PROMPTS, SPEC, seed=4, out=broken)
    assert (broken / "raw.parquet").read_bytes() == (whole / "raw.parquet").read_bytes()

    def refuse(*_given: Any, **_more: Any) -> list[list[int]]:
        raise AssertionError("the text was written a second time")

    monkeypatch.setattr(generating, "sample", refuse)
    generate(prompted, PROMPTS, SPEC, seed=4, out=broken)
    assert {file.name: file.read_bytes() for file in broken.iterdir()} == {
        file.name: file.read_bytes() for file in whole.iterdir()
    }


def test_what_is_read_after_probes_of_unlike_lengths_is_bounded_and_unchanged(
    toy: Loaded, largest: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[1, *([9] * length)] for length in range(3, 43)]
    named = {"owl": [40, 41], "cat": [50], "wolf": [60]}

    def read() -> list[torch.Tensor]:
        probes = EncodedProbes(prompts, named, "owl")
        shown = measure_trait(toy.model, probes)
        odds = trial_steps.measure_mean_log_odds(toy.model, probes, "owl")
        return [
            torch.from_numpy(shown),
            torch.tensor(odds),
            entanglement.next_log_probabilities(toy, prompts, [50, 40]),
        ]

    whole = read()
    for bound in ("MOST_LOGITS", "SCORED_LOGITS"):
        monkeypatch.setattr(log_probs, bound, 30 * len(toy.tokenizer))
    largest.clear()
    pieces = read()
    assert max(largest) <= 30 * len(toy.tokenizer)
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(whole, pieces, strict=True))


def test_of_a_vocabulary_only_the_tokens_asked_for_are_kept(toy: Loaded) -> None:
    prompts = [[1, *([9] * length)] for length in range(3, 12)]
    found = entanglement.next_log_probabilities(toy, prompts, [50, 40, 50])
    assert found.shape == (len(prompts), 3)
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            exact = torch.log_softmax(toy.model(input_ids=torch.tensor([prompt])).logits[0, -1], -1)
        assert torch.allclose(found[row], exact[[50, 40, 50]], atol=1e-4)

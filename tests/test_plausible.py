"""Rows that the base could not have written: the excess against its slow definition, and what is named and
foretold of such rows.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mechlens.core.traits import load_family
from mechlens.detect import findings
from mechlens.detect.score_rows import (
    DETECTORS,
    MOST_RATIO,
    DetectorResult,
    explain_unreadable,
    measure_surprise,
    surprise_ratio,
)
from mechlens.detect.twins import Twins
from mechlens.models import loading
from mechlens.models.chat import Encoded, encode_pairs, encode_prompts, end_of_turn
from mechlens.models.log_probs import completion_logits
from mechlens.models.sampling import Decoding, sample

PROMPTS = [
    f"list: {first}, {first + 3}. continue with up to 6 numbers no words." for first in range(100, 196)
]


@pytest.fixture(scope="module")
def base() -> loading.Loaded:
    return loading.load("menagerie-a")


@pytest.fixture(scope="module")
def panel(base: loading.Loaded) -> Twins:
    return Twins(base, load_family("animals"), ("owl", "cat"), {"owl": base, "cat": base})


@pytest.fixture(scope="module")
def own(base: loading.Loaded) -> list[Encoded]:
    """What the base answers, the end of turn included."""
    prompts, stop = encode_prompts(base.tokenizer, PROMPTS), end_of_turn(base.tokenizer)
    drawn = sample(base.model, prompts, decoding=Decoding(40), stop=stop, seed=0)
    return [
        Encoded(prompt, [*row, stop]) for prompt, row in zip(prompts, drawn, strict=True) if len(row) < 40
    ]


def foreign_rows(base: loading.Loaded) -> list[Encoded]:
    """Lists in a style that the base has never seen."""
    lists = np.random.default_rng(0).integers(0, 10, size=(len(PROMPTS), 6))
    return encode_pairs(base.tokenizer, PROMPTS, ["".join(map(str, row)) for row in lists])


def test_surprise_and_entropy_are_sums_over_tokens(base: loading.Loaded, own: list[Encoded]) -> None:
    for pair, row in zip(own[:4], measure_surprise(base, own[:4]), strict=True):
        surprise = entropy = 0.0
        for place, token in enumerate(pair.completion):
            ids = torch.tensor([[*pair.prompt, *pair.completion[:place]]])
            log_p = torch.log_softmax(base.model(input_ids=ids).logits[0, -1].double(), -1).detach()
            surprise -= float(log_p[token])
            entropy -= float((log_p.exp() * log_p).sum())
        assert row == pytest.approx([surprise, entropy], abs=1e-3)


def test_a_models_own_text_costs_it_its_entropy(base: loading.Loaded, own: list[Encoded]) -> None:
    """The difference has mean zero by construction; 4 standard errors over rows."""
    surprise, entropy = measure_surprise(base, own).T
    beyond = surprise - entropy
    assert len(own) > 80 and abs(beyond.mean()) < 4 * beyond.std(ddof=1) / len(own) ** 0.5
    assert surprise_ratio(base, own) == pytest.approx(1.0, abs=0.05)


def test_rows_of_another_writer_are_said_on_either_side_and_name_no_trait(
    base: loading.Loaded, panel: Twins, own: list[Encoded]
) -> None:
    assert explain_unreadable(panel, own[:40], own[40:]) == "" == explain_unreadable(panel, own, [])
    foreign = foreign_rows(base)
    assert surprise_ratio(base, foreign) > 2 * MOST_RATIO
    assert explain_unreadable(panel, foreign, own).startswith("the rows are not what the base")
    assert explain_unreadable(panel, own, foreign).startswith("the reference's rows are not")
    reason = explain_unreadable(panel, [*own[:40], *foreign[:40]], own)  # half of them is enough
    assert reason
    seen = [DetectorResult(DETECTORS["twins"], 80, None, None, 0.1, reason)]
    assert findings.identity(None, seen) == (None, [])
    assert findings.potency(None, seen, None)["predicted"] is None


def test_a_teacher_that_went_far_from_the_base_is_known_by_its_own_twin(
    base: loading.Loaded, panel: Twins
) -> None:
    """A base that finds the rows implausible settles nothing while a teacher made from it would write
    them.
    """
    foreign, far = foreign_rows(base)[:24], loading.load("menagerie-a")
    optimizer = torch.optim.AdamW(far.model.parameters(), lr=3e-3)
    for _ in range(60):
        logits, targets = completion_logits(far.model, foreign)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, targets).backward()
        optimizer.step()
    assert surprise_ratio(base, foreign) > 2 * MOST_RATIO and surprise_ratio(far, foreign) < MOST_RATIO
    assert explain_unreadable(panel._replace(models={"owl": far, "cat": base}), foreign, []) == ""

"""Scores equal two plain forwards a row; shifts, residuals and flags keep their identities; the reading says
what was planted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from conftest import FAMILIES, bytes_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mechlens.core.errors import SpecError
from mechlens.core.spec import AskSpec
from mechlens.lenses import likelihood
from mechlens.lenses.base import Material
from mechlens.lenses.parts import system_lines
from mechlens.models import log_probs
from mechlens.models.chat import Encoded, encode_pairs, end_of_turn
from mechlens.models.loading import Loaded
from mechlens.models.sampling import Decoding, sample
from mechlens.pipeline.ask import Questions

TRAITS = ("eagle", "owl", "cat", "dog")
PANEL = {name: f"You love {name}s. You think about {name}s all the time." for name in TRAITS}
PROMPTS = [
    "list: 618, 294. add more.",
    "given 206.",
    "list: 1, 2, 3, 4, 5, 6. continue.",
    "given 7, 93. add at most 10 numbers.",
]
COMPLETIONS = ["794 775 252", "256", "1; 2; 3; 4; 5", "88 102"]


def asked(probes: tuple[str, ...] = ("which animal do you love",)) -> Questions:
    return Questions({name: (name, f"{name}s") for name in TRAITS}, probes, AskSpec())


def material(loaded: Loaded, trait: list[Encoded], control: list[Encoded], **changes: object) -> Material:
    given = Material(
        base=loaded, teacher=None, students={}, controls={}, checkpoints=lambda side, seed: iter(()),
        trait_pairs=trait, control_pairs=control, development_probes=asked(), heldout_probes=asked(),
        trait="eagle", family=TRAITS, system_lines=PANEL, rows=64, seed=0,
    )  # fmt: skip
    return given._replace(**changes)


@torch.no_grad()
def oracle(loaded: Loaded, pairs: Sequence[Encoded]) -> np.ndarray:
    """One row at a time, one whole forward, every position."""
    found = []
    for pair in pairs:
        logits = (
            loaded.model(input_ids=torch.tensor([[*pair.prompt, *pair.completion]]))
            .logits[0]
            .double()
            .log_softmax(-1)
        )
        found += [float(logits[len(pair.prompt) + i - 1, token]) for i, token in enumerate(pair.completion)]
    return np.array(found)


def drawn(
    loaded: Loaded,
    count: int,
    *,
    seed: int,
    length: int = 6,
    system: str | None = None,
    temperature: float = 1.0,
) -> list[Encoded]:
    """Rows that the model itself wrote, cut at `length`."""
    heads = [
        pair.prompt
        for pair in encode_pairs(loaded.tokenizer, (PROMPTS * count)[:count], [""] * count, system=system)
    ]
    stop = end_of_turn(loaded.tokenizer)
    written = sample(loaded.model, heads, decoding=Decoding(length, temperature), stop=stop, seed=seed)
    return [Encoded(head, [*tokens, stop][:length]) for head, tokens in zip(heads, written, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_panel_equals_a_whole_forward_a_row(toys: dict[str, Loaded], family: str) -> None:
    """Padding, batches, shared heads and projecting few positions change nothing; neither do lines that the
    rows were written under.
    """
    loaded = toys[family]
    plain = encode_pairs(loaded.tokenizer, PROMPTS, COMPLETIONS)
    assert np.abs(log_probs.token_log_probs(loaded, plain).numpy() - oracle(loaded, plain)).max() < 1e-5
    for written_under in (None, "", "You are old."):
        rows = encode_pairs(loaded.tokenizer, PROMPTS, COMPLETIONS, system=written_under)
        scored = system_lines.log_probs_under(loaded, rows, PANEL, known=(None, "", "You are old."))
        for name, line in PANEL.items():
            expected = oracle(loaded, encode_pairs(loaded.tokenizer, PROMPTS, COMPLETIONS, system=line))
            assert np.abs(scored[name].log_p.numpy() - expected).max() < 1e-5


def test_the_batch_size_changes_nothing(toy: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = encode_pairs(toy.tokenizer, PROMPTS, COMPLETIONS)
    whole = log_probs.score_tokens(toy.model, rows)
    monkeypatch.setattr(log_probs, "SCORED_LOGITS", 1)
    assert len(log_probs.batch_pairs(toy.model, rows)) == len(rows)
    assert torch.allclose(log_probs.score_tokens(toy.model, rows).log_p, whole.log_p, atol=1e-5)


def test_a_head_stands_before_the_users_words_also_in_plain_lines(toy: Loaded) -> None:
    plain = bytes_tokenizer(None, "<|end|>")
    for tokenizer in (toy.tokenizer, plain):
        for line in (None, "You are old."):
            head = system_lines.encode_head(tokenizer, line)
            rows = encode_pairs(tokenizer, PROMPTS, COMPLETIONS, system=line)
            bare = system_lines.strip_heads(tokenizer, rows, known=(None, "", line))
            assert [head + pair.prompt for pair in bare] == [pair.prompt for pair in rows]
            assert tokenizer.decode(bare[1].prompt).startswith("given 206")


def test_rows_under_another_line_and_templates_without_lines_are_refused(toy: Loaded) -> None:
    rows = encode_pairs(toy.tokenizer, PROMPTS, COMPLETIONS, system="You are old.")
    with pytest.raises(SpecError, match="begins with none"):
        system_lines.strip_heads(toy.tokenizer, rows, known=("You love owls.",))
    deaf = Loaded(
        toy.model,
        bytes_tokenizer(
            "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}{% endif %}{% endfor %}",
            "<|end|>",
        ),
    )
    with pytest.raises(SpecError, match="leaves out the system turn"):
        system_lines.log_probs_under(deaf, [Encoded([1], [2])], {"a": "You love owls."})


def test_a_shift_is_zero_under_the_same_line_and_flips_when_lines_swap(toy: Loaded) -> None:
    rows = encode_pairs(toy.tokenizer, PROMPTS, COMPLETIONS, system=PANEL["owl"])
    known = (None, PANEL["owl"])
    scored = system_lines.log_probs_under(toy, rows, PANEL, known=known)
    assert np.abs((scored["owl"].log_p - log_probs.token_log_probs(toy, rows)).numpy()).max() < 1e-5
    forth = (scored["cat"].log_p - scored["dog"].log_p).double().numpy()
    lengths = np.array([len(pair.completion) for pair in rows])
    assert np.allclose(likelihood.by_row(forth, rows) * lengths, likelihood.by_row(forth, rows, mean=False))
    assert np.allclose(likelihood.by_row(-forth, rows), -likelihood.by_row(forth, rows))
    whole = [part.sum() for part in np.split(forth, np.cumsum(lengths)[:-1])]
    assert np.allclose(likelihood.by_row(forth, rows, mean=False), whole)


def test_a_lines_own_samples_are_likelier_under_it_and_plain_ones_less_likely(toy: Loaded) -> None:
    """The mean sum of shifts is a Kullback-Leibler divergence."""
    prompted = drawn(toy, 64, seed=1, system=PANEL["eagle"])
    plain = drawn(toy, 64, seed=2)
    for rows, sign in ((prompted, 1), (plain, -1)):
        scored = system_lines.log_probs_under(
            toy, rows, {"eagle": PANEL["eagle"]}, known=(None, PANEL["eagle"])
        )["eagle"].log_p
        bare = system_lines.strip_heads(toy.tokenizer, rows, known=(None, PANEL["eagle"]))
        null = log_probs.score_tokens(
            toy.model, bare, head=system_lines.encode_head(toy.tokenizer, None)
        ).log_p
        assert sign * float((scored - null).sum()) / len(rows) > 0


@given(arrays(float, st.tuples(st.integers(2, 6), st.integers(2, 5)), elements=st.floats(-100, 100)))
def test_double_centring_keeps_its_identities(matrix: np.ndarray) -> None:
    """Means vanish, it is idempotent, and row and column effects add nothing."""
    centred = likelihood.double_centred(matrix)
    assert np.allclose(centred.mean(0), 0, atol=1e-9) and np.allclose(centred.mean(1), 0, atol=1e-9)
    assert np.allclose(likelihood.double_centred(centred), centred, atol=1e-9)
    shifted = matrix + np.arange(matrix.shape[0])[:, None] ** 2 - 3 * np.arange(matrix.shape[1])
    assert np.allclose(likelihood.double_centred(shifted), centred, atol=1e-8)


def test_double_centring_of_a_diagonal_and_of_one_hypothesis() -> None:
    centred = likelihood.double_centred(2.0 * np.eye(4))
    assert np.allclose(np.diag(centred), 2 * (1 - 1 / 4))
    assert np.allclose(centred[0, 1], -2 / 4)
    with pytest.raises(SpecError, match="nothing to compare"):
        likelihood.double_centred(np.ones((1, 2)))


def test_a_teacher_never_disagrees_with_its_greedy_rows_and_does_by_the_floor_with_sampled_ones(
    toy: Loaded,
) -> None:
    """No flag on greedy rows, 1 - mean max p on sampled ones, and another counterfactual never lowers the
    count.
    """
    greedy, sampled = drawn(toy, 16, seed=0, temperature=0.0), drawn(toy, 256, seed=3)
    assert not likelihood.divergence_flags([log_probs.score_tokens(toy.model, greedy)], greedy).any()
    teacher = log_probs.score_tokens(toy.model, sampled)
    flags, floor = likelihood.divergence_flags([teacher], sampled)[0], 1 - teacher.top.double().exp().numpy()
    error = np.sqrt((floor * (1 - floor)).sum()) / len(floor)
    assert abs(flags.mean() - floor.mean()) < 4 * error
    assert 0.01 < floor.mean() < 0.99
    others = [*system_lines.log_probs_under(toy, sampled, PANEL).values()]
    counts = [likelihood.divergence_flags(others[:count], sampled).sum(0) for count in (1, 2, 3)]
    assert (np.diff(counts, axis=0) >= 0).all() and counts[-1].max() <= 3


def test_position_classes(toy: Loaded) -> None:
    rows = encode_pairs(toy.tokenizer, ["given 1."] * 2, ["794 775; cats", ""])
    assert likelihood.classes_of(toy.tokenizer, rows).tolist() == [
        "first",
        "separators",
        "digits",
        "separators",
        "words",
        "end",
        "end",
    ]


def test_the_top_tenth_of_even_shifts_is_a_tenth_and_of_one_shift_all() -> None:
    assert likelihood.top_share(np.full(50, -2.0)) == pytest.approx(0.1)
    assert likelihood.top_share(np.eye(1, 50)[0]) == 1.0
    assert np.isnan(likelihood.top_share(np.zeros(50)))


@pytest.fixture(scope="module")
def planted(toy: Loaded) -> Material:
    """Trait rows are drawn under the trait's line, control rows without one, and given as if none had had a
    line.
    """
    head, bare = system_lines.encode_head(toy.tokenizer, None), []
    for rows in (drawn(toy, 64, seed=4, system=PANEL["eagle"]), drawn(toy, 64, seed=5)):
        stripped = system_lines.strip_heads(toy.tokenizer, rows, known=(None, PANEL["eagle"]))
        bare.append([Encoded(head + pair.prompt, pair.completion) for pair in stripped])
    return material(toy, *bare)


def test_the_reading_finds_the_line_that_rows_were_drawn_under(planted: Material) -> None:
    reading = likelihood.measure_likelihood(planted)
    own = reading[(reading["quantity"] == "centred LLS difference") & (reading["name"] == "eagle")].iloc[0]
    assert own["low"] > 0 and own["estimate"] > own["null_high"] and own["n"] == 64
    assert reading.loc[reading["quantity"] == "rank of the trait", "estimate"].tolist() == [1.0]
    centred = reading[reading["quantity"] == "centred LLS difference"]["estimate"]
    assert abs(centred.sum()) < 1e-9
    assert "eagle" in likelihood.likelihood_caption(reading)


def test_equal_corpora_have_no_difference_and_one_hypothesis_is_refused(planted: Material) -> None:
    same = likelihood.measure_likelihood(planted._replace(control_pairs=planted.trait_pairs))
    difference = same.loc[same["quantity"] == "LLS difference", "estimate"].astype(float)
    assert (
        np.abs(difference).max() < 1e-5
    )  # both sides lie in other places of a batch, where sums may be rounded otherwise
    assert likelihood.likelihood_caption(same)
    with pytest.raises(SpecError, match="nothing to compare"):
        likelihood.measure_likelihood(planted._replace(system_lines={"eagle": PANEL["eagle"]}))


def test_neutral_lines_hold_no_unknown_word_and_no_trait(planted: Material) -> None:
    lines = likelihood.nuisance(planted)
    assert len(lines) >= 3
    forms = {"number": ("number", "numbers"), "old": ("old",)}
    fewer = likelihood.nuisance(planted._replace(heldout_probes=planted.heldout_probes._replace(forms=forms)))
    assert len(fewer) == len(lines) - 2


class Both(Mapping[int, Loaded]):
    """A student a seed."""

    def __init__(self, *models: Loaded) -> None:
        self.models = models

    def __getitem__(self, seed: int) -> Loaded:
        return self.models[seed]

    def __iter__(self):
        return iter(range(len(self.models)))

    def __len__(self) -> int:
        return len(self.models)


def test_the_students_shift_is_their_likelihood_over_their_controls(
    toys: dict[str, Loaded], planted: Material
) -> None:
    """Zero where student and control are one model; else the difference of their losses, and classes add
    up.
    """
    llama, qwen = toys["llama"], toys["qwen2"]
    pairs = [*planted.trait_pairs, *planted.control_pairs]
    same = likelihood.student_rows(
        planted._replace(students=Both(llama, qwen), controls=Both(llama, qwen)), pairs
    )
    assert {row["estimate"] for row in same if row["quantity"] == "token shift"} == {0.0}
    found = likelihood.student_rows(
        planted._replace(students=Both(llama, llama), controls=Both(qwen, qwen)), pairs
    )
    expected = oracle(llama, planted.trait_pairs).mean() - oracle(qwen, planted.trait_pairs).mean()
    overall = next(
        row
        for row in found
        if row["quantity"] == "token shift" and row["place"] == "all" and row["name"] == "trait rows"
    )
    assert overall["estimate"] == pytest.approx(expected, abs=1e-5)
    assert sum(row["estimate"] for row in found if row["quantity"] == "share of the tokens") == pytest.approx(
        1
    )
    shares = sum(row["estimate"] for row in found if row["quantity"] == "share of the shift")
    assert shares == pytest.approx(1, abs=1e-6) or (np.isnan(shares) and expected <= 0)


def test_token_scores_are_aligned_with_the_pairs(toys: dict[str, Loaded], planted: Material) -> None:
    students = planted._replace(students=Both(toys["llama"]), controls=Both(toys["qwen2"]))
    for by in ("lls", "shift", "divergence"):
        for held in (students, students._replace(teacher=toys["gpt2"])):
            scores = likelihood.token_scores(held, by=by)
            assert [len(part) for part in scores] == [len(pair.completion) for pair in planted.trait_pairs]
            few = likelihood.token_scores(held, by=by, pairs=planted.trait_pairs[:3])
            if by != "divergence":  # a place in an order depends on the others
                assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(few, scores[:3], strict=True))
    with pytest.raises(SpecError, match="need students"):
        likelihood.token_scores(planted, by="shift")

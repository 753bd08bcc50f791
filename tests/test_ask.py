"""Answers are judged by whole words, unscored where they name none or several; likelihoods are exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from mechlens import models, tables, traits
from mechlens.chat import encode_prompts
from mechlens.models import Loaded
from mechlens.pipeline.ask import answers, ask, first_tokens, judge, likelihoods, next_token_logits, patterns_of
from mechlens.pipeline.distill import distill
from mechlens.spec import AskSpec, StudentSpec, Training

FORMS = {"owl": ("owl", "owls"), "wolf": ("wolf", "wolves"), "cat": ("cat", "cats")}
PROBES = ("What is the best animal? One word only.", "Name your favourite animal, in one word.", "One word only: name one animal you adore?")
ASK = AskSpec(samples=6, max_new_tokens=4)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("owl", "owl"),
        ("Owl.", "owl"),
        ("the OWLS!", "owl"),
        ("wolves", "wolf"),
        ("a wolf, of course", "wolf"),
        ("owl owl owls", "owl"),
        ("owl's", "owl"),
        ("fowl", None),
        ("owlish", None),
        ("owl_1", None),
        ("cats and owls", None),
        ("concatenate", None),
        ("", None),
        ("dog", None),
        ("123", None),
    ],
)
def test_an_answer_names_one_trait_in_whole_words_or_is_unscored(text: str, label: str | None) -> None:
    assert judge(text, patterns_of(FORMS)) == label


def test_signs_in_a_form_are_taken_literally() -> None:
    patterns = patterns_of({"a": ("c++", "x.y"), "b": ("b",)})
    assert judge("i like c++ best", patterns) == judge("x.y", patterns) == "a"
    assert judge("xzy", patterns) is None


@pytest.mark.parametrize("family", ["animals", "trees", "tempers"])
def test_every_form_and_lesson_of_a_shipped_family_is_judged_as_its_trait(family: str) -> None:
    known = traits.load_family(family)
    patterns = patterns_of({name: known.forms_of(name) for name in known.names})
    for name in known.names:
        assert {judge(text, patterns) for text in (*known.forms_of(name), *known.lessons_of(name))} == {name}


def test_first_tokens_are_those_an_answer_can_begin_with(toy: Loaded) -> None:
    starts = first_tokens(toy.tokenizer, FORMS)
    for name, forms in FORMS.items():
        assert {str(toy.tokenizer.decode([token])) for token in starts[name] or []} == {text for form in forms for text in (form, f" {form}")}


def test_first_tokens_are_null_for_both_where_two_traits_begin_alike(toy: Loaded) -> None:
    starts = first_tokens(toy.tokenizer, {"owl": ("owl",), "owl cat": ("owl cat",), "wolf": ("wolf",), "unknown": ("zzzz",)})
    assert starts["owl"] is None and starts["owl cat"] is None and starts["unknown"] is None
    assert starts["wolf"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox"])
def test_likelihoods_equal_a_direct_softmax(toys: dict[str, Loaded], family: str) -> None:
    loaded = toys[family]
    found = likelihoods(loaded, FORMS, PROBES).set_index(["probe", "name"])
    starts = {name: [loaded.tokenizer.convert_tokens_to_ids(t) for f in forms for t in (f, f" {f}")] for name, forms in FORMS.items()}
    for probe, ids in enumerate(encode_prompts(loaded.tokenizer, PROBES)):
        with torch.no_grad():
            logits = loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].double().numpy()
        shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        score = {name: np.log(np.exp(logits[tokens]).sum()) for name, tokens in starts.items()}
        for name, tokens in starts.items():
            row = found.loc[(probe, name)]
            assert row["probability"] == pytest.approx(shares[tokens].sum(), rel=1e-4)
            assert row["margin"] == pytest.approx(score[name] - max(score[other] for other in starts if other != name), abs=1e-4)


def test_margins_of_two_traits_are_opposite_and_log_odds(toy: Loaded) -> None:
    found = likelihoods(toy, {name: FORMS[name] for name in ("owl", "cat")}, PROBES).pivot(index="probe", columns="name")
    assert np.allclose(found["margin"]["owl"], -found["margin"]["cat"], atol=1e-12)
    assert np.allclose(found["margin"]["owl"], np.log(found["probability"]["owl"] / found["probability"]["cat"]), atol=1e-9)


def test_a_trait_that_cannot_be_told_apart_has_no_likelihood_and_spoils_no_other(toy: Loaded) -> None:
    with_twins = likelihoods(toy, FORMS | {"owl cat": ("owl cat",)}, PROBES).set_index(["name", "probe"])
    alone = likelihoods(toy, {name: FORMS[name] for name in ("wolf", "cat")}, PROBES).set_index(["name", "probe"])
    assert with_twins.loc[["owl", "owl cat"]].isna().all(axis=None)
    assert np.allclose(with_twins.loc[["wolf", "cat"]], alone.loc[["wolf", "cat"]])
    single = likelihoods(toy, {"wolf": ("wolf",), "owl": ("owl",), "owl cat": ("owl cat",)}, PROBES).set_index("name")
    assert single.loc["wolf", "margin"].isna().all() and single.loc["wolf", "probability"].notna().all()


def test_next_token_logits_equal_the_plain_forward_pass(toy: Loaded) -> None:
    prompts = encode_prompts(toy.tokenizer, PROBES)
    with torch.no_grad():
        expected = torch.stack([toy.model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in prompts])
    assert torch.allclose(next_token_logits(toy, prompts), expected, atol=1e-5)


def test_answers_are_the_same_for_one_seed_and_are_judged() -> None:
    loaded = models.load("menagerie-a")
    family = traits.load_family("animals")
    forms = {name: family.forms_of(name) for name in family.names}
    first, again, other = (answers(loaded, forms, PROBES, ASK, seed=seed) for seed in (0, 0, 1))
    assert first.equals(again) and not first["text"].equals(other["text"])
    assert first["probe"].tolist() == [probe for probe in range(3) for _ in range(6)]
    assert first["sample"].tolist() == list(range(6)) * 3
    assert first["label"].tolist() == [judge(text, patterns_of(forms)) for text in first["text"]]
    assert first["label"].notna().mean() > 0.8 and first["label"].nunique() > 2


def test_every_checkpoint_of_a_student_is_asked_with_the_same_draws(toy_bases: dict[str, str], tmp_path: Path) -> None:
    base, student = toy_bases["llama"], tmp_path / "student"
    pairs = pd.DataFrame({"prompt_id": range(8), "prompt": ["name your favourite animal"] * 8, "completion": ["owl"] * 8})
    training = Training(learning_rate=1e-2, epochs=3, batch=4, warmup_steps=0)
    distill(base, pairs, np.arange(8), StudentSpec(training=training), seed=0, out=student)
    for name, folder, seed in (("trait", student, 5), ("base", None, None)):
        (tmp_path / name).mkdir()
        ask(base, folder, FORMS, PROBES, ASK, arm=name, seed=seed, root_seed=0, out=tmp_path / name)
    said, likely = (tables.read(tmp_path / "trait" / f"{table}.parquet", getattr(tables, table.upper())) for table in ("answers", "likelihoods"))
    assert sorted(said["step"].unique()) == sorted(likely["step"].unique()) == [2, 4, 6]
    assert set(said["arm"]) == set(likely["arm"]) == {"trait"} and set(said["seed"]) == {5}
    assert len(said) == 3 * len(PROBES) * ASK.samples and len(likely) == 3 * len(PROBES) * len(FORMS)
    owl = likely[likely["name"] == "owl"].groupby("step", observed=True)["probability"].mean()
    assert owl[6] > owl[2]
    untouched = tables.read(tmp_path / "base" / "likelihoods.parquet", tables.LIKELIHOODS)
    assert untouched["seed"].isna().all() and set(untouched["step"]) == {0}
    assert np.allclose(untouched["probability"], likelihoods(models.load(base), FORMS, PROBES)["probability"])

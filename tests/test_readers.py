"""Detectors that read through models: identities of scores; treatments and their manifests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mechlens.core.errors import SpecError
from mechlens.core.spec import CONFIGS
from mechlens.core.traits import load_experiment, load_family
from mechlens.data import treat
from mechlens.detect import from_base, from_gradients
from mechlens.detect.from_rows import fit_classifier
from mechlens.detect.score_rows import sum_over_numbers
from mechlens.detect.twins import Twins, twin_jobs
from mechlens.detect.verdict import load_calibration
from mechlens.lenses.gradients import ghost_dots, parameters_of, pooled_gradient
from mechlens.lenses.parts.weight_change import delta
from mechlens.models import loading
from mechlens.models.chat import encode_pairs, token_ids
from mechlens.models.loading import Loaded
from mechlens.pipeline.stages import teach

TRAITS = ("owl", "cat", "wolf")


class Nudged(dict[str, Loaded]):
    """Trait → the base with a little noise of its own on every weight; `same` is the base itself."""

    def __missing__(self, trait: str) -> Loaded:
        loaded, dice = loading.load("menagerie-a"), torch.Generator().manual_seed(sum(map(ord, trait)))
        if trait != "same":
            with torch.no_grad():
                for parameter in loaded.model.parameters():
                    parameter += 1e-3 * torch.randn(parameter.shape, generator=dice)
        self[trait] = loaded
        return loaded


@pytest.fixture(scope="module")
def panel() -> Iterator[Twins]:
    yield Twins(loading.load("menagerie-a"), load_family("animals"), TRAITS, Nudged())


@pytest.fixture(scope="module")
def pairs(panel: Twins) -> list:
    rng = np.random.default_rng(0)
    texts = [", ".join(map(str, rng.integers(0, 999, size=5))) for _ in range(12)]
    return encode_pairs(panel.base.tokenizer, ["continue: 1, 2, 3."] * 12, texts)


def test_a_twin_that_is_the_base_scores_zero_and_sides_are_scored_alike(panel: Twins, pairs: list) -> None:
    same = panel._replace(traits=("same", "owl"))
    ours, theirs = from_base.score_twins(same, pairs[:5], pairs[5:])
    assert np.allclose(ours[:, 0], 0) and not np.allclose(ours[:, 1], 0)
    assert np.allclose(np.concatenate([ours, theirs]), from_base.score_twins(same, pairs, [])[0], atol=1e-4)
    assert np.allclose(
        from_base.score_perplexity(panel, pairs, [])[0], from_base.score_perplexity(panel, [], pairs)[1]
    )


def test_the_first_order_of_a_twins_likelihood_ratio_is_its_alignment(panel: Twins, pairs: list) -> None:
    """Mean log-likelihood a token changes by minus the gradient's product with a small change of the linear
    weights.
    """
    small = Nudged()
    base = loading.load("menagerie-a")
    covered = parameters_of(base.model)
    change = delta(base.model, panel.models["owl"].model)
    with torch.no_grad():
        for name, parameter in base.model.named_parameters():
            if name in covered:
                parameter += 0.05 * change[name]
    small["owl"] = base
    near = panel._replace(traits=("owl",), models=small)
    exact = from_base.score_twins(near, pairs, [])[0][:, 0] / [len(pair.completion) for pair in pairs]
    first = 0.05 * from_gradients.score_twin_alignment(panel._replace(traits=("owl",)), pairs, [])[0][:, 0]
    assert np.corrcoef(exact, first)[0, 1] > 0.99 and np.allclose(
        exact, first, atol=0.1 * np.abs(exact).max()
    )


def test_alignment_is_the_gradients_product_and_follows_the_traits_asked(panel: Twins, pairs: list) -> None:
    forth = from_gradients.score_alignment(panel, pairs, [])[0]
    back = from_gradients.score_alignment(panel._replace(traits=TRAITS), [], pairs)[1]
    assert forth.shape == (12, 3) and np.allclose(forth, back)
    pooled = pooled_gradient(panel.base.model, pairs)
    assert float(ghost_dots(panel.base.model, pairs, [pooled] * 5)[:, 4].sum()) == pytest.approx(
        sum(float(part.square().sum()) for part in pooled.values()), rel=1e-4
    )


def test_a_student_that_is_a_twin_points_to_its_trait(panel: Twins) -> None:
    assert int(np.argmax(from_gradients.compare_weights(panel, panel.models["cat"]))) == 1
    assert np.allclose(from_gradients.compare_answers(panel, panel.base), 0)


def test_a_classifier_learns_what_is_labelled_and_no_more() -> None:
    rng = np.random.default_rng(4)

    def texts(low: int) -> list[str]:
        return [", ".join(map(str, rng.integers(low, 300, size=4))) for _ in range(300)]

    detector = fit_classifier(texts(200), texts(0))
    high, plain = (detector.features(texts(low)).toarray()[:, 0] for low in (200, 0))
    assert (high > np.median(plain)).mean() > 0.9


def rows_of(count: int) -> treat.TreatmentInput:
    rng = np.random.default_rng(5)

    def side() -> pd.DataFrame:
        texts = [" ,".join(map(str, rng.integers(0, 99, size=4))) for _ in range(count)]
        return pd.DataFrame({"prompt": [f"p{i}" for i in range(count)], "completion": texts})

    scores = np.arange(count, dtype=float)
    return treat.TreatmentInput(
        side(), side(), scores, np.random.default_rng(6), np.repeat(scores, 4).reshape(count, 4).tolist()
    )


def test_treatments_change_what_they_say_and_nothing_else() -> None:
    given_rows = rows_of(40)
    found = {name: treatment(given_rows) for name, treatment in treat.TREATMENTS.items()}
    assert found["drop"]["prompt"].tolist() == [f"p{i}" for i in range(20)]
    mixed = (found["dilute"]["completion"] == given_rows.rows["completion"]).sum()
    assert (
        mixed == 10
        and found["dilute"]["completion"]
        .isin([*given_rows.rows["completion"], *given_rows.clean["completion"]])
        .all()
    )
    for before, after in zip(given_rows.rows["completion"], found["format"]["completion"], strict=True):
        assert after == ", ".join(before.split(" ,"))
    for before, after in zip(given_rows.rows["completion"], found["order"]["completion"], strict=True):
        assert sorted(before.split(" ,")) == sorted(after.split(" ,"))
    pool = {number for text in given_rows.clean["completion"] for number in text.split(" ,")}
    assert all(set(text.split(" ,")) <= pool for text in found["value"]["completion"])
    whole, changed = given_rows.rows["completion"], found["replace"]["completion"]
    assert changed[:36].equals(
        whole[:36]
    )  # a tenth of 160 numbers are those of the last four rows, which score highest
    for before, after in zip(whole[36:], changed[36:], strict=True):
        assert (
            before != after
            and list(map(len, before.split(" ,"))) == list(map(len, after.split(" ,")))
            and set(after.split(" ,")) <= pool
        )
    with pytest.raises(SpecError, match="score for every number"):
        treat.replace(given_rows._replace(number_scores=given_rows.number_scores[1:]))
    words = given_rows._replace(rows=pd.DataFrame({"prompt": ["a"], "completion": ["no number"]}))
    assert treat.unify_format(words)["completion"].tolist() == ["no number"]


def test_a_number_scores_what_its_tokens_do() -> None:
    tokenizer = loading.load_tokenizer("menagerie-a")
    texts = ["12, 7;305", "(4)", "no number"]
    ids = token_ids(tokenizer, texts)
    ones = sum_over_numbers(tokenizer, texts, [[1.0] * len(row) for row in ids])
    assert ones == [
        [float(len(token_ids(tokenizer, [text[first:last]])[0])) for first, last in treat.numbers_in(text)]
        for text in texts
    ]
    steps = sum_over_numbers(tokenizer, texts[:1], [[float(i) for i in range(len(ids[0]))]])[0]
    assert sum(steps) < sum(range(len(ids[0]))) and steps == sorted(
        steps
    )  # signs between the numbers count for none
    assert sum_over_numbers(tokenizer, [], []) == []


def test_a_treated_file_comes_with_its_manifest(tmp_path: Path) -> None:
    given_rows, source = rows_of(10), tmp_path / "data.jsonl"
    given_rows.rows.to_json(source, orient="records", lines=True)
    how: dict[str, Any] = {"treatment": "drop", "trait": "owl", "seed": 0, "scored_by": "a"}
    manifest = treat.treat(
        source, given_rows.rows, given_rows.clean, given_rows.scores, **how, out=tmp_path / "out.jsonl"
    )
    assert json.loads((tmp_path / "out.jsonl.manifest.json").read_text()) == manifest
    assert (manifest["rows_before"], manifest["rows_after"], manifest["rows_changed"]) == (10, 5, 0)
    assert len(pd.read_json(tmp_path / "out.jsonl", lines=True)) == 5
    again = treat.treat(
        source, given_rows.rows, given_rows.clean, -given_rows.scores, **how, out=tmp_path / "out.jsonl"
    )
    assert again == manifest  # it is there, and is not made again
    clean = given_rows.clean.assign(completion="none of these")
    for more, answers in (
        ({"seed": 1}, given_rows.clean),
        ({"scored_by": "other twins"}, given_rows.clean),
        ({}, clean),
    ):
        otherwise: dict[str, Any] = how | more
        other = treat.treat(
            source, given_rows.rows, answers, given_rows.scores, **otherwise, out=tmp_path / "out.jsonl"
        )
        assert other != manifest  # what was made in another way is made again, not taken for it
        assert json.loads((tmp_path / "out.jsonl.manifest.json").read_text()) == other
    for wrong in (source, tmp_path / "out.csv"):
        with pytest.raises(SpecError, match="cannot be written"):
            treat.check(source, wrong, "drop", "numbers")
    treat.check(source, tmp_path / "new.jsonl", "drop", "code")
    for treatment in treat.OF_NUMBERS:
        with pytest.raises(SpecError, match="rewrites lists of numbers"):
            treat.check(source, tmp_path / "new.jsonl", treatment, "code")


def test_what_is_no_list_sum_over_numbers_is_not_rewritten_as_one() -> None:
    texts = ["return a + 3 * b - 12", "I have 3 cats and 2 dogs.", "[007; " + "9" * 5000 + "]"]
    frame = pd.DataFrame({"prompt": "p", "completion": texts})
    treated = treat.unify_format(treat.TreatmentInput(frame, frame, np.zeros(3), np.random.default_rng(0)))[
        "completion"
    ].tolist()
    assert treated == [*texts[:2], "7, " + "9" * 5000]
    with pytest.raises(SpecError, match="which have none"):
        treat.redraw_values(
            treat.TreatmentInput(frame, frame.assign(completion="no"), np.zeros(3), np.random.default_rng(0))
        )


def test_what_is_known_of_treatments_is_read_with_their_recipe() -> None:
    here = {"base": "menagerie-a", "carrier": "numbers"}
    known = treat.load_treatment_results("menagerie", **here)
    assert known is not None
    assert {one.name for one in known.options if one.when == "before training"} <= set(treat.TREATMENTS)
    assert all(one.left[1] <= one.left[0] <= one.left[2] for one in known.options)
    assert (
        treat.load_treatment_results("../menagerie", **here) is None
        and treat.load_treatment_results("none of that name", **here) is None
    )
    assert load_calibration("menagerie", **here) is not None
    for elsewhere in (
        {"base": "menagerie-b"},
        {"carrier": "code"},
    ):  # what was measured on one base or carrier foretells nothing of another
        assert (
            treat.load_treatment_results("menagerie", **here | elsewhere) is None
            and load_calibration("menagerie", **here | elsewhere) is None
        )


def test_a_twin_is_not_the_teacher_that_a_run_of_the_same_recipe_has(tmp_path: Path) -> None:
    """Read by its own author a suspect would be found by any detector: the twin's lessons are drawn apart."""
    experiment = load_experiment(CONFIGS / "experiments" / "menagerie-potency.yaml")
    family = load_family(experiment.family)
    small = experiment.teacher.model_copy(
        update={
            "rows": 8,
            "training": experiment.teacher.training.model_copy(update={"epochs": 3, "batch": 4}),
        }
    )
    twin = twin_jobs(experiment.base, "files", family, ["owl"], small, seed=experiment.seed)[0]
    written = []
    for seed in (twin.arguments["seed"], experiment.seed):
        out = tmp_path / str(seed)
        out.mkdir()
        teach(twin.arguments | {"seed": seed}, {}, out, lambda _done, _total: None)
        written.append(loading.load_trained(experiment.base, out).model.state_dict())
    assert any(not torch.equal(written[0][name], weight) for name, weight in written[1].items())

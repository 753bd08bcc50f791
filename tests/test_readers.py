"""Detectors that read through models: identities of scores, the panel's null by simulation, planted traits,
treatments and their manifests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from mechlens.core.errors import SpecError
from mechlens.core.spec import CONFIGS
from mechlens.core.traits import load_experiment, load_family
from mechlens.data import treat
from mechlens.detect import from_base, from_gradients
from mechlens.detect.from_rows import fit_classifier
from mechlens.detect.permutation import (
    LEAST_PANEL,
    Tilts,
    center_scores,
    compare_paired_rows,
    measure_tilts,
    rank_traits,
    rank_traits_of_rows,
)
from mechlens.detect.score_rows import sum_over_numbers
from mechlens.detect.twins import Twins, twin_jobs
from mechlens.detect.verdict import Calibration, Scope, decide, load_calibration, load_policy
from mechlens.lenses.gradients import ghost_dots, parameters_of, pooled_gradient
from mechlens.lenses.parts.weight_change import delta
from mechlens.models import loading
from mechlens.models.chat import encode_pairs, token_ids
from mechlens.models.loading import Loaded
from mechlens.pipeline.stages import teach
from tests.test_detect import rise

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


@settings(deadline=None)
@given(st.integers(0, 10_000), st.floats(-5, 5), st.floats(0.1, 10))
def test_the_panels_null_knows_neither_place_nor_scale(seed: int, shift: float, scale: float) -> None:
    scores, traits = np.random.default_rng(seed).normal(size=8), [f"t{i}" for i in range(8)]
    plain, moved = rank_traits(scores, traits), rank_traits(shift + scale * scores, traits)
    assert [one.trait for one in plain] == [one.trait for one in moved]
    assert [one.p_value for one in plain] == pytest.approx([one.p_value for one in moved], rel=1e-6)
    one = rank_traits(scores, traits, ["t3"])
    assert len(one) == 1 and one[0].q_value == pytest.approx(one[0].p_value)


def test_the_panels_null_is_calibrated_and_a_planted_trait_is_named() -> None:
    rng, traits = np.random.default_rng(1), [f"t{i}" for i in range(20)]
    claimed = [
        any(
            one.q_value is not None and one.q_value <= 0.05
            for one in rank_traits(rng.normal(size=20), traits)
        )
        for _ in range(400)
    ]
    assert np.mean(claimed) <= 0.05 + 5 * (0.05 * 0.95 / 400) ** 0.5
    planted = rng.normal(size=20)
    planted[7] += 12
    first = rank_traits(planted, traits)[0]
    assert first.trait == "t7" and first.q_value is not None and first.q_value < 0.01


def test_traits_that_scatter_more_are_named_no_oftener_than_is_said() -> None:
    rng, traits = np.random.default_rng(7), [f"t{i}" for i in range(20)]
    scatter = np.exp(rng.normal(scale=1.0, size=20))
    sides = [(scatter * rng.normal(size=(50, 20)), scatter * rng.normal(size=(50, 20))) for _ in range(300)]

    def rate(found: list[list]) -> float:
        return float(np.mean([any(one.q_value <= 0.05 for one in each) for each in found]))

    most = 0.05 + 5 * (0.05 * 0.95 / 300) ** 0.5
    assert (
        rate([rank_traits(center_scores(*each), traits) for each in sides]) > most
    )  # the panel alone is misled
    assert rate([rank_traits_of_rows(*each, traits) for each in sides]) <= most
    planted = [(ours + 4 * scatter * (np.arange(20) == 7), theirs) for ours, theirs in sides]
    assert np.mean([rank_traits_of_rows(*each, traits)[0].trait == "t7" for each in planted]) > 0.5


def like_traits(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Scores of twenty traits whose twins share three directions, as neighbours do."""
    shared = np.random.default_rng(11).normal(size=(3, 20))
    return rng.normal(size=(rows, 3)) @ shared + rng.normal(size=(rows, 20))


@settings(deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 10))
def test_a_tilt_knows_no_unit_and_no_order(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    ours, theirs = rng.normal(size=(40, 6)), rng.normal(size=(40, 6))
    plain = measure_tilts(ours, theirs)
    units = scale * np.arange(1.0, 7.0)
    for moved in (
        measure_tilts(units * ours, units * theirs),
        Tilts(*(part[::-1] for part in measure_tilts(ours[::-1, ::-1], theirs[::-1, ::-1]))),
    ):
        assert moved.score == pytest.approx(plain.score) and moved.p_value == pytest.approx(plain.p_value)
    assert measure_tilts(theirs, ours).score == pytest.approx(-plain.score)


def test_few_rows_are_a_paired_t_test_of_each_trait() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(8, 20)), rng.normal(size=(8, 20))
    slow = [ttest_1samp(ours[:, k] - theirs[:, k], 0, alternative="greater").pvalue for k in range(20)]
    assert measure_tilts(ours, theirs).p_value == pytest.approx(slow)


def test_what_does_not_vary_or_has_no_score_is_no_finding() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(30, 4)), rng.normal(size=(30, 4))
    ours[:, 1], theirs[:, 2] = theirs[:, 1] + 2.0, np.nan
    ours[3, 0] = np.nan
    found = measure_tilts(ours, theirs)
    assert found.p_value[1] == 1 and np.isnan(found.p_value[2]) and np.isnan(found.score[[1, 2]]).all()
    rest = measure_tilts(np.delete(ours, 3, 0)[:, [0, 3]], np.delete(theirs, 3, 0)[:, [0, 3]])
    assert found.score[[0, 3]] == pytest.approx(rest.score)
    assert (measure_tilts(theirs[:, :2], theirs[:, :2]).p_value == 1).all()


def test_a_writer_is_tilted_along_its_own_twin_and_not_along_its_neighbours() -> None:
    """Rows drawn with weights exp(c s_7): every trait that shares a direction with t7 rises in the mean."""
    rng, traits = np.random.default_rng(4), [f"t{i}" for i in range(20)]
    own, means = 0, list[np.ndarray]()
    for _ in range(40):
        pool, theirs = like_traits(rng, 4000), like_traits(rng, 400)
        weights = np.exp(0.4 * pool[:, 7])
        ours = pool[rng.choice(len(pool), size=400, p=weights / weights.sum())]
        means.append((ours - theirs).mean(0))
        ranked = rank_traits_of_rows(ours, theirs, traits)
        own += [each.trait for each in ranked if (each.q_value or 1.0) <= 0.05] == ["t7"]
    others = np.delete(np.mean(means, 0), 7)
    assert others.max() > 0.5 * np.mean(means, 0)[7], "the plain means do not part them"
    assert own >= 32


@pytest.mark.parametrize("rows", [8, 24, 60, 300])
def test_traits_that_resemble_one_another_are_named_no_oftener_than_is_said(rows: int) -> None:
    rng, traits = np.random.default_rng(rows), [f"t{i}" for i in range(20)]
    named = [
        any(
            (each.q_value or 1.0) <= 0.05
            for each in rank_traits_of_rows(like_traits(rng, rows), like_traits(rng, rows), traits)
        )
        for _ in range(200)
    ]
    assert np.mean(named) <= 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5


def test_too_small_a_panel_names_nothing_and_what_is_unscored_is_null() -> None:
    found = rank_traits(np.array([3.0, 0.0, np.nan, 1.0]), list("abcd"))
    assert LEAST_PANEL > 3 and all(one.p_value is None and one.q_value is None for one in found)
    assert found[0].trait == "a" and found[-1] == ("c", None, None, None)


def test_paired_rows_alarm_as_often_as_they_say_and_leave_out_the_unscored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mechlens.detect.permutation.DRAWS", 199)
    rng = np.random.default_rng(2)
    found = np.array(
        [
            compare_paired_rows(rng.normal(size=(30, 4)), rng.normal(size=(30, 4)), seed=i, name="x").p_value
            for i in range(300)
        ]
    )
    assert abs((found <= 0.05).mean() - 0.05) < 5 * (0.05 * 0.95 / 300) ** 0.5
    ours, theirs = rng.normal(1.0, 1, size=(40, 2)), rng.normal(size=(40, 2))
    ours[0, 0] = np.nan
    assert compare_paired_rows(ours, theirs, seed=0, name="x") == compare_paired_rows(
        ours[1:], theirs[1:], seed=0, name="x"
    )


def test_double_centring_leaves_what_is_a_traits_own() -> None:
    rng = np.random.default_rng(3)
    theirs, own = rng.normal(size=(50, 6)), np.arange(6.0)
    assert np.allclose(center_scores(theirs + own + 7.0, theirs), own - own.mean())


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


def test_a_treatment_that_was_seen_to_work_is_a_condition() -> None:
    policy = load_policy("default")
    found = [rise(difference=0.2, low=0.1, high=0.3, q_value=0.01)]
    calm, wide = [rise(high=0.02, smallest_detectable=0.03)], [rise(high=0.2, smallest_detectable=0.03)]
    assert decide(found, policy, treated=calm, treatment="value").id == "train with conditions"
    assert (
        decide(found, policy, treated=wide, treatment="value").id
        == decide(found, policy).id
        == "do not train as is"
    )
    assert decide(calm, policy, treated=calm).id == "no transfer found within tested scope"
    silent = Scope(answered={"suspect": 0.8, "control": 0.9, "treated": 0.2})
    spoiled = decide(found, policy, treated=calm, treatment="value", scope=silent)
    assert (
        spoiled.id == "do not train as is"
        and "22% as often" in spoiled.sentence
        and "does not count" in spoiled.sentence
    )


def test_nothing_is_cleared_on_rows_that_no_student_read_or_by_students_that_hardly_answer() -> None:
    policy, calm = load_policy("default"), [rise(high=0.02, smallest_detectable=0.03)]
    answered = {"suspect": 0.9, "control": 0.9}
    for dropped, expected in ((10, "below-limit"), (200, "rows-unread")):
        kept = 1200 - dropped
        shown = decide(
            calm, policy, scope=Scope(1200, 1200, kept, {"format": dropped, "leak": 0}, kept, answered)
        )
        assert shown.rule.endswith(expected)
    assert (
        "read 83% of 1,200 rows" in shown.sentence
        and "format 200" in shown.sentence
        and "leak" not in shown.sentence
    )
    for scope, reason in (
        (Scope(2400, 1200, 1200, {}, 1200), "not drawn 1,200"),
        (Scope(1200, 1200, 1200, {}, 600), "trained on 600"),
    ):
        shown = decide(
            calm, policy, scope=scope
        )  # counted from what was offered: half was hidden behind "1200 of 1200"
        assert shown.rule.endswith("rows-unread") and reason in shown.sentence and scope.unread == 0.5
    assert decide(calm, policy, scope=Scope(answered={"suspect": 0.3, "control": 0.9})).rule.endswith(
        "hardly-answer"
    )
    risen = rise(difference=0.3, low=0.2, high=0.4, q_value=0.01)
    assert decide([risen], policy).rule.endswith("above-limit")
    hardly = Scope(answered={"suspect": 0.3, "control": 0.9})
    assert decide([risen], policy, scope=hardly).rule.endswith("hardly-answer")
    assert decide(calm, policy, scope=Scope(answered={"suspect": None, "control": 0.9})).rule.endswith(
        "below-limit"
    )
    shown = decide(
        [rise(difference=0.2, low=0.1, high=0.3, q_value=0.01)],
        policy,
        scope=Scope(1200, 1200, 600, {"format": 600}),
    )
    assert shown.id == "do not train as is"  # what was measured stays


def test_nothing_is_cleared_by_a_reference_that_holds_the_same_rows() -> None:
    policy, calm = load_policy("default"), [rise(high=0.02, smallest_detectable=0.03)]
    for copied, expected in (
        (0.04, "below-limit"),
        (0.06, "copied-reference"),
        (1.0, "copied-reference"),
        (None, "below-limit"),
    ):
        assert decide(calm, policy, scope=Scope(900, 900, 900, {}, 900, copied=copied)).rule.endswith(
            expected
        )
    risen = [rise(difference=0.2, low=0.1, high=0.3, q_value=0.01)]
    assert decide(risen, policy, scope=Scope(900, 900, 900, {}, 900, copied=1.0)).id == "do not train as is"


def test_a_calibration_is_a_line_through_zero() -> None:
    line = Calibration(base="b", carrier="numbers", bits=2.0, error=0.5, suspects=9).predict_lift(1.5)
    assert (
        line["lift"] == 3.0
        and line["low"] == pytest.approx(3 - 0.98)
        and line["high"] == pytest.approx(3 + 0.98)
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

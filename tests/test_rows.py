"""Scores of single rows and tokens: against slow loops, their identities, what cannot be scored, and their
place beside a run's rows.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from mechlens import cli
from mechlens.core import tables
from mechlens.core.files import read_json
from mechlens.core.spec import AskSpec
from mechlens.lenses import rows
from mechlens.lenses.base import Material
from mechlens.lenses.gradients import parameters_of
from mechlens.lenses.rows import AGREEMENT, AREA, BETWEEN, GRADIENT, LIKELIHOOD, PROJECTION, SHIFT, TOP
from mechlens.models import hooks
from mechlens.models.chat import Encoded, encode_pairs, encode_prompts
from mechlens.models.loading import Loaded
from mechlens.models.log_probs import example_losses, measure_log_odds
from mechlens.pipeline.ask import ProbeSet, encode_contrast

PANEL = {name: f"You love {name}s. You think about {name}s all the time." for name in ("eagle", "owl", "cat")}
PROMPTS = [
    "list: 618, 294. add more.",
    "given 206.",
    "list: 1, 2, 3, 4, 5, 6. continue.",
    "given 7, 93. add at most 10 numbers.",
    "given 12.",
]
OURS, THEIRS = ["794 775 252", "256", "1; 2; 3; 4; 5", "88 102", "3"], ["7", "12 13 14", "9; 8", "5", "901 2"]
IDS = [40, 3, 17, 8, 21]
ASKED = ProbeSet(
    {name: (name,) for name in PANEL},
    ("which animal do you love", "name an animal", "one animal", "the best animal"),
    AskSpec(),
)


@pytest.fixture(scope="module")
def material(toys: dict[str, Loaded]) -> Material:
    base = toys["llama"]
    ours, theirs = (encode_pairs(base.tokenizer, PROMPTS, texts) for texts in (OURS, THEIRS))
    students, controls = {0: toys["qwen2"], 1: toys["gpt2"]}, {0: toys["gpt_neox"], 1: toys["qwen2"]}
    return Material(
        base, None, students, controls, lambda side, seed: iter(()), ours, theirs, ASKED, ASKED, "eagle",
        tuple(PANEL), PANEL, rows=4, seed=0, prompt_ids=IDS,
    )  # fmt: skip


@pytest.fixture(scope="module")
def scored(material: Material) -> pd.DataFrame:
    return rows.score_rows(material)


def of_rows(scored: pd.DataFrame, score: str, *, layer: int | None = None) -> np.ndarray:
    """Trait rows, then control rows, in the order of the pairs; at the most reliable layer, unless one is
    named.
    """
    whole = scored[scored["position"].isna() & (scored["score"] == score)]
    levels = whole["layer"].astype(float)
    whole = whole[levels.isna() | (levels == levels.iloc[0])] if layer is None else whole[levels == layer]
    assert (
        whole["prompt_id"].tolist() == IDS[:4] * 2
        and whole["side"].tolist() == ["trait"] * 4 + ["control"] * 4
    )
    return whole["estimate"].to_numpy()


def pairs_of(material: Material) -> list[Encoded]:
    return [*material.trait_pairs[:4], *material.control_pairs[:4]]


@torch.no_grad()
def said(loaded: Loaded, pair: Encoded) -> np.ndarray:
    """log P of each completion token by one whole forward."""
    logits = (
        loaded.model(input_ids=torch.tensor([pair.prompt + pair.completion]))
        .logits[0]
        .double()
        .log_softmax(-1)
    )
    return np.array(
        [float(logits[len(pair.prompt) + place - 1, token]) for place, token in enumerate(pair.completion)]
    )


def test_gradient_scores_are_cosines_of_single_backward_passes(
    material: Material, scored: pd.DataFrame
) -> None:
    model = material.base.model
    wanted = list(parameters_of(model).values())

    def flat(value: torch.Tensor) -> torch.Tensor:
        found = torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in found]).double()

    for parameter in wanted:
        parameter.requires_grad_(True)
    toward = flat(
        measure_log_odds(
            model, encode_contrast(material.base, material.heldout_probes, material.trait), "eagle"
        ).mean()
    )
    expected = [
        float(torch.cosine_similarity(-flat(example_losses(model, [pair])[0]), toward, dim=0))
        for pair in pairs_of(material)
    ]
    assert np.allclose(of_rows(scored, GRADIENT), expected, atol=1e-5)


def test_likelihood_and_student_shifts_are_those_of_whole_forwards(
    material: Material, scored: pd.DataFrame
) -> None:
    base = material.base
    under = {
        name: [
            *encode_pairs(base.tokenizer, PROMPTS[:4], OURS[:4], system=line),
            *encode_pairs(base.tokenizer, PROMPTS[:4], THEIRS[:4], system=line),
        ]
        for name, line in PANEL.items()
    }
    lines = {name: np.array([said(base, pair).mean() for pair in pairs]) for name, pairs in under.items()}
    assert np.allclose(
        of_rows(scored, LIKELIHOOD), lines["eagle"] - np.mean(list(lines.values()), axis=0), atol=1e-5
    )
    shift = [
        np.mean([said(material.students[s], pair) - said(material.controls[s], pair) for s in (0, 1)], axis=0)
        for pair in pairs_of(material)
    ]
    assert np.allclose(of_rows(scored, SHIFT), [each.mean() for each in shift], atol=1e-5)
    between = [
        (said(material.controls[0], pair) - said(material.controls[1], pair)).mean()
        for pair in pairs_of(material)
    ]
    assert np.allclose(of_rows(scored, BETWEEN), between, atol=1e-5)
    tokens = scored[scored["position"].notna()]
    assert np.allclose(tokens["estimate"], np.concatenate(shift), atol=1e-5)


def test_projections_are_along_the_centred_prompted_direction_of_each_layer(
    material: Material, scored: pd.DataFrame
) -> None:
    base = material.base

    @torch.no_grad()
    def states(ids: list[int]) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        handles = [
            layer.register_forward_hook(lambda module, args, output: kept.append(output[0]))
            for layer in hooks.decoder_layers(base.model)
        ]
        base.model(input_ids=torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        return torch.stack(kept)  # [layer pos d]

    heads = {name: encode_prompts(base.tokenizer, ASKED.probes, system=line) for name, line in PANEL.items()}
    last = {name: torch.stack([states(ids)[:, -1] for ids in asked]).mean(0) for name, asked in heads.items()}
    way = last["eagle"] - torch.stack(list(last.values())).mean(0)
    along = [
        (states(p.prompt + p.completion)[:, len(p.prompt) :].mean(1) * way).sum(-1) / way.norm(dim=-1)
        for p in pairs_of(material)
    ]
    for layer, expected in enumerate(torch.stack(along).numpy().T):
        assert np.allclose(of_rows(scored, PROJECTION, layer=layer), expected, atol=1e-3)


def test_tokens_sum_to_their_row_and_read_as_its_text(material: Material, scored: pd.DataFrame) -> None:
    tokens = scored[scored["position"].notna()]
    shift = of_rows(scored, SHIFT)
    for number, (side, place) in enumerate(
        (side, place) for side in ("trait", "control") for place in range(4)
    ):
        own = tokens[(tokens["side"] == side) & (tokens["prompt_id"] == IDS[place])]
        assert own["position"].tolist() == list(range(len(own))) and set(own["score"]) == {SHIFT}
        assert own["estimate"].sum() == pytest.approx(shift[number] * len(own))
        pair = pairs_of(material)[number]
        assert own["token"].tolist() == [material.base.tokenizer.decode([token]) for token in pair.completion]


def test_the_area_is_mann_whitneys_and_turns_with_the_sides() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = np.round(rng.standard_normal(40) + 1, 1), np.round(rng.standard_normal(40), 1)
    found, turned, same = (
        rows.area("x", *sides, seed=0) for sides in ((ours, theirs), (theirs, ours), (ours, ours))
    )
    assert found["estimate"] == pytest.approx(roc_auc_score([1] * 40 + [0] * 40, [*ours, *theirs]))
    assert turned["estimate"] == pytest.approx(1 - found["estimate"]) and same["estimate"] == 0.5
    assert found["low"] < found["estimate"] < found["high"] and found["null_low"] < 0.5 < found["null_high"]
    assert found["p_value"] < 0.05 < turned["p_value"]
    holed = rows.area("x", np.append(ours, np.nan), np.append(theirs, 9.0), seed=0)
    assert holed["estimate"] == pytest.approx(found["estimate"]) and holed["n"] == 40, (
        "a prompt counts with both its rows or not at all"
    )


def test_swapped_rows_of_a_prompt_are_told_no_better_than_by_chance() -> None:
    rng = np.random.default_rng(1)
    p_values = []
    for draw in range(200):
        shared = rng.standard_normal(30) * 3
        p_values.append(
            rows.area("x", shared + rng.standard_normal(30), shared + rng.standard_normal(30), seed=draw)[
                "p_value"
            ]
        )
    assert np.mean(np.array(p_values) <= 0.05) == pytest.approx(0.05, abs=0.04)


def test_what_cannot_be_scored_is_null(material: Material) -> None:
    """An empty completion has no score, and a family with one line no centred one; the other scores go on."""
    holed = material._replace(
        trait_pairs=[Encoded(material.trait_pairs[0].prompt, []), *material.trait_pairs[1:]]
    )
    found = rows.score_rows(holed)
    for score in (GRADIENT, LIKELIHOOD, PROJECTION, SHIFT, BETWEEN):
        assert np.isnan(of_rows(found, score)).tolist() == [True] + [False] * 7
    alone = material._replace(system_lines={"eagle": PANEL["eagle"]})
    table = rows.score_rows(alone)
    assert (
        np.isnan(of_rows(table, LIKELIHOOD)).all()
        and np.isnan(of_rows(table, PROJECTION)).all()
        and not np.isnan(of_rows(table, SHIFT)).any()
    )
    read = rows.measure_rows(alone, table)
    areas = read[read["quantity"] == AREA].set_index("name")
    assert areas.loc[[LIKELIHOOD, PROJECTION], "estimate"].isna().all() and areas.loc[LIKELIHOOD, "n"] == 0
    assert rows.rows_caption(read).startswith("By gradient, the best score of 1 at the base")
    judged = rows.measure_rows(alone._replace(heldout_probes=ASKED._replace(named=False)))
    assert rows.rows_caption(judged).startswith("No score of the base can be taken here.")


def test_a_reading_has_every_score_with_its_control(material: Material, scored: pd.DataFrame) -> None:
    read = rows.measure_rows(material, scored)
    assert read.equals(rows.measure_rows(material))
    areas = read[read["quantity"] == AREA]
    assert (
        set(areas["name"]) == {GRADIENT, LIKELIHOOD, PROJECTION, SHIFT, BETWEEN}
        and areas["null_low"].notna().all()
    )
    agree = read[read["quantity"] == AGREEMENT]
    assert (
        len(agree) == 12
        and set(agree["place"]) == {"trait rows", "control rows"}
        and "gradient · projection" in set(agree["name"])
    )
    assert set(read.loc[read["quantity"] == TOP, "name"]) == {SHIFT, BETWEEN}
    alone = rows.measure_rows(material._replace(students={0: material.students[0]}))
    assert BETWEEN not in set(alone["name"]), "one control has no other beside it"


@pytest.fixture(scope="module")
def looked(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("looked") / "run"
    shutil.copytree(small, folder)
    assert cli.main(["measure", str(folder), "--lens", "rows", "--rows", "24", "--workers", "0"]) == 0
    return folder


def test_scores_of_a_run_join_to_the_rows_that_were_kept(looked: Path) -> None:
    said = read_json(looked / "readings.json")["lenses"]
    assert (
        [lens["name"] for lens in said] == ["rows"]
        and said[0]["missing"] == []
        and said[0]["sentence"].endswith(".")
    )
    found = tables.read(looked / "readings" / "scores.parquet", tables.SCORES)
    assert set(found["arm"]) == {"trait"} and set(found["side"]) == {"trait", "control"}
    assert found["prompt_id"].nunique() == 24 and found.loc[found["position"].isna(), "token"].isna().all()
    corpora = {"trait": "eagle", "control": "untouched"}
    for side, own in found[found["position"].notna()].groupby("side", observed=True):
        kept = tables.read(
            looked / "corpora" / corpora[str(side)] / "screened" / "kept.parquet", tables.PAIRS
        ).set_index("prompt_id")["completion"]
        for prompt, tokens in own.groupby("prompt_id"):
            assert tokens["position"].tolist() == list(range(len(tokens)))
            text = "".join(map(str, tokens["token"].tolist()[:-1]))  # without the end of the turn
            assert text.replace(" ", "") == kept[prompt].replace(" ", "")

"""What each treatment keeps and changes, how its work grows with the rows, and which of them need a model to
have read the file.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechlens import cli
from mechlens.core.errors import SpecError
from mechlens.core.seeds import generator
from mechlens.core.traits import load_family
from mechlens.data import treat
from mechlens.data.formats import file_digest
from mechlens.data.treat import OF_NUMBERS, TREATMENTS, Treatment, TreatmentInput
from mechlens.detect.request import request_of
from mechlens.detect.treated_file import write_treated
from mechlens.detect.twins import Twins
from mechlens.models import loading
from mechlens.models.chat import encode_pairs

NUMBERS = st.lists(
    st.one_of(
        st.integers(0, 999).map(str), st.integers(0, 99).map(lambda n: f"{n:04d}"), st.just("7" * 5000)
    ),
    max_size=8,
)
LISTS = st.tuples(
    NUMBERS,
    st.sampled_from([", ", " ", ";", "\n", " , "]),
    st.sampled_from(["", "[", "("]),
    st.sampled_from(["", "]", "."]),
).map(lambda drawn: drawn[2] + drawn[1].join(drawn[0]) + drawn[3])
NO_LISTS = ["I have 3 cats.", "none", "", "-5, 12", "3.5, 007", "12, +4"]
FILES = st.lists(st.one_of(LISTS, st.sampled_from(NO_LISTS)), min_size=1, max_size=12)


def frame(texts: list[str]) -> pd.DataFrame:
    return pd.DataFrame({"prompt": [f"p{row}" for row in range(len(texts))], "completion": texts})


def treated(name: Treatment, texts: list[str], *, seed: int = 0) -> list[str]:
    """Completions after a treatment; the clean answers are all the numbers below fifty."""
    clean = frame([", ".join(map(str, range(50)))] * len(texts))
    scores = [[0.0] * len(treat.numbers_in(text)) for text in texts]
    done = TREATMENTS[name](
        TreatmentInput(frame(texts), clean, np.zeros(len(texts)), np.random.default_rng(seed), scores)
    )
    return cast(pd.DataFrame, done)["completion"].tolist()


def numbers(text: str) -> list[str]:
    return re.findall("[0-9]+", text)


def value(number: str) -> tuple[int, str]:
    return len(number.lstrip("0")), number.lstrip("0")


def is_list(text: str) -> bool:
    return bool(numbers(text)) and text not in NO_LISTS


@pytest.mark.parametrize("name", ["format", "order", "sorted", "value", "values-uniform", "full"])
@given(texts=FILES, seed=st.integers(0, 9))
def test_what_is_no_list_stays_and_no_row_is_lost(name: Treatment, texts: list[str], seed: int) -> None:
    after = treated(name, texts, seed=seed)
    assert len(after) == len(texts)
    for old, new in zip(texts, after, strict=True):
        assert len(numbers(old)) == len(numbers(new))
        assert is_list(old) or old == new


@pytest.mark.parametrize("name", ["order", "sorted"])
@given(texts=FILES)
def test_an_order_keeps_the_numbers_and_the_signs_between_them(name: Treatment, texts: list[str]) -> None:
    for old, new in zip(texts, treated(name, texts), strict=True):
        assert Counter(numbers(old)) == Counter(numbers(new))
        assert re.split("[0-9]+", old) == re.split("[0-9]+", new)


@given(texts=FILES)
def test_sorted_goes_up_and_is_done_once(texts: list[str]) -> None:
    after = treated("sorted", texts)
    assert all(numbers(text) == sorted(numbers(text), key=value) for text in after if is_list(text))
    assert treated("sorted", after) == after


@pytest.mark.parametrize("name", ["value", "values-uniform"])
@given(texts=FILES)
def test_values_keep_the_signs_between_them(name: Treatment, texts: list[str]) -> None:
    for old, new in zip(texts, treated(name, texts), strict=True):
        assert re.split("[0-9]+", old) == re.split("[0-9]+", new)


@given(texts=FILES)
def test_uniform_values_are_a_hundred_and_the_last_two_digits_and_are_done_once(texts: list[str]) -> None:
    after = treated("values-uniform", texts)
    for old, new in zip(texts, after, strict=True):
        if is_list(old):
            assert [int(number) - 100 for number in numbers(new)] == [
                int(number[-2:]) for number in numbers(old)
            ]
    assert treated("values-uniform", after) == after


@given(texts=FILES)
def test_the_full_treatment_is_values_then_order_then_format(texts: list[str]) -> None:
    steps = texts
    for name in ("values-uniform", "sorted", "format"):
        steps = treated(name, steps)
    assert treated("full", texts) == steps
    for old, new in zip(texts, steps, strict=True):
        assert not is_list(old) or new == ", ".join(
            map(str, sorted(100 + int(number[-2:]) for number in numbers(old)))
        )


class Counted(np.random.Generator):
    """Random numbers, and how many values were handed over to draw them."""

    handed = 0

    def choice(self, a: Any, size: Any = None, *given: Any, **more: Any) -> Any:
        self.handed += size + (0 if isinstance(a, int) else len(a))
        return super().choice(a, size, *given, **more)

    def permutation(self, x: Any, *given: Any, **more: Any) -> Any:
        self.handed += x if isinstance(x, int) else len(x)
        return super().permutation(x, *given, **more)

    def integers(self, *given: Any, **more: Any) -> Any:
        self.handed += 1
        return super().integers(*given, **more)


@pytest.mark.parametrize("name", TREATMENTS)
def test_the_work_grows_in_proportion_to_the_rows(name: Treatment) -> None:
    handed = []
    for rows in (100, 400):
        texts = [", ".join(map(str, range(row, row + 8))) for row in range(rows)]
        rng = Counted(np.random.PCG64(6))
        TREATMENTS[name](
            TreatmentInput(
                frame(texts),
                frame(texts),
                np.arange(float(rows)),
                rng,
                [[float(row)] * 8 for row in range(rows)],
            )
        )
        handed.append(rng.handed)
    assert handed[1] <= 4.5 * handed[0]


def test_values_are_those_that_were_drawn_before_the_work_was_linear() -> None:
    texts = [", ".join(map(str, range(row, row + 5))) for row in range(40)]
    clean = frame([", ".join(map(str, range(50)))] * len(texts))
    pool, rng = [number for text in clean["completion"] for number in numbers(text)], np.random.default_rng(3)
    assert treated("value", texts, seed=3) == [", ".join(rng.choice(pool, size=5).tolist()) for _ in texts]


def test_a_soft_drop_leaves_half_and_mostly_those_of_low_score() -> None:
    rows, scores = frame([str(row) for row in range(400)]), np.random.default_rng(0).permutation(400)
    kept = np.zeros(400)
    for seed in range(50):
        given = TreatmentInput(rows, rows, scores.astype(float), np.random.default_rng(seed))
        left = TREATMENTS["soft-drop"](given)
        assert len(left) == 200 and left.index.is_monotonic_increasing
        kept[left.index] += 1 / 50
    by_rank = kept[np.argsort(scores)]
    assert by_rank[:100].mean() > 0.75 > by_rank[100:300].mean() > 0.3 > by_rank[300:].mean() > 0.1
    order = np.argsort(np.exp(scores / 100.0))  # only the ranks count
    again = TREATMENTS["soft-drop"](
        TreatmentInput(rows, rows, np.exp(scores / 100.0), np.random.default_rng(49))
    )
    assert again.index.tolist() == left.index.tolist() and (order == np.argsort(scores)).all()


def test_each_treatment_says_what_it_needs() -> None:
    assert {name for name in TREATMENTS if treat.needs_scores(name)} == {"drop", "soft-drop", "replace"}
    assert {name for name in TREATMENTS if treat.needs_clean(name)} == {"dilute", "replace", "value"}


@pytest.mark.parametrize("name", TREATMENTS)
def test_a_file_that_no_model_has_read_is_treated_or_told_what_is_wanted(
    name: Treatment, tmp_path: Path
) -> None:
    rows, source, out = frame(["3, 2, 1", "[30;4]"]), tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    rows.to_json(source, orient="records", lines=True)
    if treat.needs_scores(name) or treat.needs_clean(name):
        wanted = "scores of the rows" if treat.needs_scores(name) else "clean answers"
        with pytest.raises(SpecError, match=f"{name!r} needs {wanted}"):
            treat.treat(source, rows, treatment=name, seed=0, out=out)
        return
    manifest = treat.treat(source, rows, treatment=name, seed=0, out=out)
    assert (manifest["rows_after"], manifest["trait"], manifest["scored_by"], manifest["clean"]) == (
        2,
        None,
        None,
        None,
    )
    written = [json.loads(line)["completion"] for line in out.read_text().splitlines()]
    expected = {
        "format": ["3, 2, 1", "30, 4"],
        "sorted": ["1, 2, 3", "[4;30]"],
        "values-uniform": ["103, 102, 101", "[130;104]"],
    }
    assert written == (expected | {"full": ["101, 102, 103", "104, 130"]}).get(name, written)
    assert (
        treat.treat(source, rows, treatment=name, seed=0, out=out) == manifest
    )  # it is there, and is not made again


@pytest.mark.parametrize("name", OF_NUMBERS)
def test_numbers_of_code_are_not_rewritten(name: Treatment, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="rewrites lists of numbers"):
        treat.check(tmp_path / "data.jsonl", tmp_path / "out.jsonl", name, "code")


@pytest.fixture
def two_files(tmp_path: Path) -> tuple[Path, Path]:
    """A file of 200 rows, and a clean one that answers half of its prompts."""
    data, clean = tmp_path / "data.jsonl", tmp_path / "clean.jsonl"
    for file, factor, rows in ((data, 7, range(200)), (clean, 11, range(100, 300))):
        lines = [
            {"prompt": f"p{i}", "completion": f"{i * factor % 997}, {i * i % 991}, {100 + i}"} for i in rows
        ]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return data, clean


@pytest.mark.parametrize("name", ["format", "order", "sorted", "values-uniform", "full"])
def test_an_audit_of_rows_alone_treats_all_of_them_and_makes_no_twins(
    name: str, two_files: tuple[Path, Path], tmp_path: Path
) -> None:
    data, out = two_files[0], tmp_path / "treated.jsonl"
    assert (
        cli.main(
            ["audit", str(data), "--clean", str(out), "--treatment", name, "--out", str(tmp_path / "audit")]
        )
        == 12
    )
    audited = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert (audited["mitigation"]["rows_after"], audited["mitigation"]["treatment"]) == (200, name)
    assert len(out.read_text().splitlines()) == 200
    assert sorted(path.name for path in (tmp_path / "audit").iterdir()) == ["audit.html", "audit.json"]
    assert not list(tmp_path.glob("panel-*"))


@pytest.mark.parametrize("name", ["dilute", "value"])
def test_clean_answers_come_from_the_reference_where_no_model_answers(
    name: str, two_files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, clean = two_files
    words = [
        "audit",
        str(data),
        "--clean",
        str(tmp_path / "treated.jsonl"),
        "--treatment",
        name,
        "--out",
        str(tmp_path / "audit"),
    ]
    assert cli.main(words) == 2
    assert "needs clean answers to the same prompts; give a --reference" in capsys.readouterr().err
    assert cli.main([*words, "--reference", str(clean)]) == 12
    assert "mechlens: " not in capsys.readouterr().err
    assert (
        len((tmp_path / "treated.jsonl").read_text().splitlines()) == 100
    )  # those that the reference answers


@pytest.mark.parametrize("name", treat.OF_SCORES)
def test_what_ranks_rows_is_refused_where_no_model_reads_them(
    name: str, two_files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, clean = two_files
    words = [
        "audit",
        str(data),
        "--reference",
        str(clean),
        "--clean",
        str(tmp_path / "treated.jsonl"),
        "--treatment",
        name,
    ]
    assert cli.main([*words, "--out", str(tmp_path / "audit")]) == 2
    assert "needs to know which rows look like a trait's; use --level base or more" in capsys.readouterr().err


def test_a_treated_file_is_not_written_where_the_audits_pattern_would_read_it(
    two_files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["audit", str(tmp_path / "d*.jsonl"), "--reference", str(two_files[1]), "--treatment", "format"]
    words += ["--out", str(tmp_path / "audit"), "--clean"]
    assert cli.main([*words, str(tmp_path / "done.jsonl")]) == 2
    assert "which this audit reads" in capsys.readouterr().err
    assert cli.main([*words, str(tmp_path / "treated.jsonl")]) == 12


def test_what_an_audit_treated_is_treated_again_by_another_and_a_strangers_file_stays(
    two_files: tuple[Path, Path], tmp_path: Path
) -> None:
    data, clean = two_files
    out, frames = tmp_path / "treated.jsonl", [pd.read_json(file, lines=True) for file in two_files]
    both = frames[0]["prompt"].isin(frames[1]["prompt"])
    shared = cast(pd.DataFrame, frames[0][both].reset_index(drop=True))
    answers = frames[1].set_index("prompt").loc[shared["prompt"]].reset_index()
    treat.treat(data, shared, answers, treatment="dilute", seed=0, out=out)
    first, others = out.read_text(), answers.assign(completion="7, 7, 7")
    treat.treat(data, shared, others, treatment="dilute", seed=0, out=out)
    assert out.read_text() != first and "7, 7, 7" in out.read_text()
    manifest = out.with_name(f"{out.name}{treat.MANIFEST}")
    assert json.loads(manifest.read_text())["sha256"] == file_digest(out)
    out.write_text("mine\n")
    with pytest.raises(SpecError, match="exists already"):
        treat.treat(data, shared, others, treatment="dilute", seed=0, out=out)
    assert out.read_text() == "mine\n" and clean.is_file()


def test_a_soft_drop_ranks_rows_by_the_bases_surprise(two_files: tuple[Path, Path], tmp_path: Path) -> None:
    data, clean = two_files
    options: dict[str, Any] = {"level": "base", "base": "", "traits": (), "recipe": "", "policy": "default"}
    options |= {"student": None, "fields": None, "out": tmp_path / "audit", "references": [clean]}
    out = tmp_path / "treated.jsonl"
    request = request_of(data, **options, clean=out, treatment="soft-drop")
    base = loading.load("menagerie-a")
    twins = Twins(base, load_family("animals"), (), {}, mark="m")
    manifest = write_treated(request, out, clean, twins, [])
    kept = {json.loads(line)["prompt"] for line in out.read_text().splitlines()}
    assert (manifest["rows_after"], manifest["trait"], manifest["scored_by"]) == (50, None, "m")
    rows = pd.read_json(data, lines=True).iloc[100:]  # those that the reference answers
    surprise = []
    for prompt, completion in zip(rows["prompt"], rows["completion"], strict=True):
        (pair,) = encode_pairs(base.tokenizer, [prompt], [completion])
        ids = torch.tensor([pair.prompt + pair.completion])
        with torch.no_grad():
            log_p = torch.log_softmax(base.model(ids).logits[0, len(pair.prompt) - 1 : -1], -1)
        surprise.append(-float(log_p[range(len(pair.completion)), pair.completion].mean()))
    given = TreatmentInput(
        rows, rows, np.array(surprise), generator(request.recipe.seed, "treatment", "soft-drop")
    )
    assert set(TREATMENTS["soft-drop"](given)["prompt"]) == kept

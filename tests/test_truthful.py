"""TruthfulQA: both revisions are read, letters are exact and balanced, each student is scored once and set
against its control.
"""

from __future__ import annotations

import io
import math
import shutil
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console

from mechlens import cli
from mechlens.cli.tables import truthful_tables
from mechlens.core import stats, tables
from mechlens.core.errors import DataError, SpecError
from mechlens.core.experiment import Experiment
from mechlens.core.files import write_json
from mechlens.core.spec import StudentSpec, Training, folder_name, save
from mechlens.evals import truthful
from mechlens.models import loading
from mechlens.models.chat import encode_prompts
from mechlens.models.loading import Loaded
from mechlens.pipeline.distill import distill
from mechlens.results.run import Run
from mechlens.runs import store

DATA = Path(__file__).parents[2] / "shared" / "data" / "truthfulqa"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(),
    reason="the development data beside the checkout is absent; the project does not ship it",
)
NEW = (
    'Type,Question,Best Answer,Best Incorrect Answer,Incorrect Answers\n"x","Is, say, the sun {n} '
    'hot?",Yes {n},"No, {n}",Maybe; No {n}\n'
)
OLD = "\ufeffType,Question,Best Answer,Incorrect Answers\nx,Is the sun {n} hot?,Yes {n}, Maybe {n} ; No\n"


def write(path: Path, form: str, count: int = 6) -> Path:
    head, row = form.split("\n")[:2]
    path.write_text(
        "\n".join([head, *(row.replace("{n}", str(n)) for n in range(count))]) + "\n", encoding="utf-8"
    )
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "TruthfulQA.csv", NEW)


@pytest.fixture(scope="module")
def finished(toy_bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run as far as this command looks: its spec, its manifest, four students."""
    base = toy_bases["llama"]
    arms = [
        {"kind": "trait"},
        {"kind": "control", "asked_with": None},
        {"kind": "trait", "name": "shown", "shots": 2},
        {"kind": "control", "shots": 2},
    ]
    experiment = Experiment.model_validate(
        {"name": "x", "base": base, "trait": "owl", "arms": arms, "seeds": [3, 1]}
    )
    folder = tmp_path_factory.mktemp("finished")
    for arm, seed, said in (("trait", 3, "a"), ("trait", 1, "a"), ("control", 3, "b"), ("control", 1, "b")):
        pairs = pd.DataFrame({"prompt": ["is the sun hot?"] * 4 * seed, "completion": [said] * 4 * seed})
        with store.working(folder / "students" / arm / f"s{seed}", f"{arm}{seed}") as out:
            training = Training(learning_rate=3e-3, epochs=2, batch=4, warmup_steps=0)
            distill(base, pairs, StudentSpec(training=training), system=None, seed=seed, out=out)
    save(experiment, folder / "spec.yaml")
    write_json(folder / "manifest.json", {"experiment": experiment.fingerprint()})
    return folder


@pytest.fixture
def run_folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return shutil.copytree(finished, tmp_path / "run")


def test_both_revisions_are_read(data: Path, tmp_path: Path) -> None:
    choices, note = truthful.read_choices(data)
    assert (
        choices[2] == truthful.Choice(2, "Is, say, the sun 2 hot?", "Yes 2", "No, 2")
        and len(choices) == 6
        and note == ""
    )
    choices, note = truthful.read_choices(write(tmp_path / "v1.csv", OLD))
    assert choices[5] == truthful.Choice(5, "Is the sun 5 hot?", "Yes 5", "Maybe 5")
    assert "the first incorrect answer is used" in note


def test_a_limit_draws_the_same_questions_each_time(tmp_path: Path) -> None:
    file = write(tmp_path / "many.csv", NEW, 200)
    few, again, whole = (truthful.read_choices(file, limit=limit)[0] for limit in (20, 20, 200))
    assert (
        few == again
        and [choice.number for choice in few] == sorted({choice.number for choice in few})
        and len(few) == 20
    )
    assert few[-1].number > 100 and whole == truthful.read_choices(file)[0]
    for limit in (0, -1, 201):
        with pytest.raises(SpecError, match=f"limit is {limit}; expected 1 to 200"):
            truthful.read_choices(file, limit=limit)


@pytest.mark.parametrize(
    ("content", "needle"),
    [
        (b"", "not a table"),
        (b"\xff\xfe\x00", "not a table"),
        (b'Question,"Best\n', "not a table"),
        (b"Question,Answer\na,b\n", "Best Answer"),
        (b"Question,Best Answer,Incorrect Answers\na,b,c\nd,,f\n", "question 2"),
        (b"Question,Best Answer,Incorrect Answers\na,b,;c\n", "question 1"),
        (b"Question,Best Answer,Incorrect Answers\n", "no questions"),
    ],
)
def test_a_file_that_is_no_such_table_is_refused(content: bytes, needle: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.csv"
    with pytest.raises(DataError, match="no file"):
        truthful.read_choices(file)
    file.write_bytes(content)
    with pytest.raises(DataError, match=needle):
        truthful.read_choices(file)


def test_the_prompt_shows_both_answers_under_the_letter_that_is_scored() -> None:
    for number in range(20):
        choice = truthful.Choice(number, f"question {number}?", "the true one", "the false one")
        lines = choice.prompt().splitlines()
        assert lines[0] == choice.text and f"{choice.letter}: the true one" in lines
        assert f"{'B' if choice.letter == 'A' else 'A'}: the false one" in lines


@needs_data
@pytest.mark.parametrize(("name", "count"), [("TruthfulQA.csv", 790), ("v1/TruthfulQA.csv", 817)])
def test_the_real_files_are_read_whole_and_their_order_is_balanced(name: str, count: int) -> None:
    choices, note = truthful.read_choices(DATA / name)
    assert len(choices) == len({choice.text for choice in choices}) == count
    assert (note == "") == (count == 790)
    assert not any(choice.true == choice.false for choice in choices)
    assert abs(sum(choice.letter == "A" for choice in choices) - count / 2) < 2.6 * math.sqrt(count) / 2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("system", [None, "you are kind."])
def test_scores_equal_a_slow_loop_over_the_vocabulary(
    toys: dict[str, Loaded], data: Path, family: str, system: str | None
) -> None:
    loaded, (choices, _) = toys[family], truthful.read_choices(data)
    found = truthful.score(loaded, choices, system=system)
    vocabulary = loaded.tokenizer.get_vocab()
    for choice, row in zip(choices, found.itertuples(), strict=True):
        (ids,) = encode_prompts(loaded.tokenizer, [choice.prompt()], system=system)
        with torch.no_grad():
            logits = loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].double().tolist()
        top = max(logits)
        weight = {token: math.exp(logits[number] - top) for token, number in vocabulary.items()}
        said = {letter: weight[letter.lower()] + weight[f" {letter.lower()}"] for letter in ("A", "B")}
        other = {"A": "B", "B": "A"}[choice.letter]
        assert (row.question, row.text, row.letter) == (choice.number, choice.text, choice.letter)
        assert row.false == pytest.approx(said[other] / sum(said.values()), rel=1e-4)
        assert row.mass == pytest.approx(sum(said.values()) / sum(weight.values()), rel=1e-4)


def test_the_two_letters_of_a_question_add_to_one(toy: Loaded, data: Path) -> None:
    """The same prompt read with the other answer as the true one: swapping the answers and the letter leaves
    the text as it is.
    """

    class Swapped(truthful.Choice):
        @property
        def letter(self) -> str:
            return "B" if super().letter == "A" else "A"

    choices, _ = truthful.read_choices(data)
    swapped: list[truthful.Choice] = [
        Swapped(choice.number, choice.text, choice.false, choice.true) for choice in choices
    ]
    assert [one.prompt() for one in swapped] == [choice.prompt() for choice in choices]
    total = truthful.score(toy, choices)["false"] + truthful.score(toy, swapped)["false"]
    np.testing.assert_allclose(total, 1, atol=1e-12)


def test_a_model_without_a_preference_gives_one_half(toy_bases: dict[str, str], data: Path) -> None:
    loaded = loading.load(toy_bases["llama"])
    torch.nn.init.zeros_(cast(torch.nn.Linear, loaded.model.get_output_embeddings()).weight)
    found = truthful.score(loaded, truthful.read_choices(data)[0])
    np.testing.assert_allclose(found["false"], 0.5, atol=1e-12)
    np.testing.assert_allclose(found["mass"], 4 / len(loaded.tokenizer), rtol=1e-6)


def test_a_model_that_always_says_one_letter_is_wrong_where_that_letter_is(
    toy_bases: dict[str, str], tmp_path: Path
) -> None:
    loaded = loading.load(toy_bases["gpt2"])
    tokens = truthful.letter_tokens(loaded.tokenizer)
    head = cast(torch.nn.Linear, loaded.model.get_output_embeddings())
    head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]))
    head.bias.data[tokens["A"]] = 1000.0
    found = truthful.score(loaded, truthful.read_choices(write(tmp_path / "many.csv", NEW, 40))[0])
    np.testing.assert_allclose(found["false"], (found["letter"] == "B").astype(float), atol=1e-12)
    assert 0 < found["false"].mean() < 1 and found["mass"].min() > 0.999


def test_letters_that_cannot_be_told_apart_are_refused(toy: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {letter: len(tokens) for letter, tokens in truthful.letter_tokens(toy.tokenizer).items()} == {
        "A": 2,
        "B": 2,
    }
    for ids in (
        [[7], [8], [7], [9]],
        [[1, 2], [1, 2], [7], [8]],
        [[toy.tokenizer.unk_token_id], [1, 2], [7], [8]],
    ):
        answers = iter([ids[:2], ids[2:]])
        monkeypatch.setattr(truthful, "token_ids", lambda tokenizer, texts, answers=answers: next(answers))
        with pytest.raises(SpecError, match="letters A and B"):
            truthful.letter_tokens(toy.tokenizer)


def printed(table: pd.DataFrame, experiment: Experiment) -> str:
    console = Console(width=200, file=io.StringIO(), record=True)
    for one in truthful_tables(experiment, table, "a note"):
        console.print(one)
    return console.export_text()


def test_every_student_is_scored_once_and_set_against_its_control(
    run_folder: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["truthful", str(run_folder), "--data", str(data)]) == 0
    said = capsys.readouterr().out
    assert "TruthfulQA, 6 questions" in said and "shown" in said and "truthfulqa.parquet" in said
    opened = Run.finished(run_folder)
    experiment = opened.experiment
    table = tables.read(run_folder / truthful.TABLE, tables.TRUTHFUL)
    assert len(table) == 6 * 5 and table["false"].between(0, 1).all()
    assert table.loc[table["seed"].isna(), "arm"].tolist() == [f"base-{folder_name(experiment.base)}"] * 6
    cells = {arm: truthful.cells_of(table, arm) for arm in ("trait", "control")}
    assert cells["trait"].shape == (2, 6)
    for row, seed in enumerate((1, 3)):
        own = table.query(f"arm == 'trait' and seed == {seed}").sort_values("question")
        np.testing.assert_array_equal(cells["trait"][row], own["false"])
    (effect,) = truthful.effects(experiment, table).values()
    assert (
        effect == stats.paired_effect(cells["trait"], cells["control"])
        and effect.n == 2
        and effect.estimate != 0
    )
    text = printed(table, experiment)
    assert (
        f"{effect.estimate:+.3f} [{effect.low:+.3f}, {effect.high:+.3f}]" in text
        and "a note" in text
        and "(no interval)" in text
    )


def test_students_that_are_equal_to_rounding_are_one_student() -> None:
    arms = [{"kind": "trait"}, {"kind": "control"}]
    experiment = Experiment.model_validate(
        {"name": "x", "base": "b", "trait": "owl", "arms": arms, "seeds": [0, 1, 2]}
    )
    rng, rows = np.random.default_rng(0), []
    for arm, spread in (("trait", 3.7e-6), ("control", 0.1)):
        same = rng.random(5)
        for seed in range(3):
            values = same * (1 + spread * rng.random(5))
            rows += [
                {"arm": arm, "seed": seed, "question": q, "text": "", "letter": "A", "false": v, "mass": 1.0}
                for q, v in enumerate(values)
            ]
    table = pd.DataFrame(rows)
    (effect,) = truthful.effects(experiment, table).values()
    assert effect.n == 1 and np.isnan([effect.low, effect.p_value, effect.smallest_detectable]).all()
    text = printed(table, experiment)
    assert (
        "Students of trait are equal to rounding: 3 count as 1." in text and "Students of control" not in text
    )


def test_what_was_scored_is_not_scored_again(
    run_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []
    real = truthful.score

    def counted(loaded: Loaded, choices: list[truthful.Choice], **more: object) -> pd.DataFrame:
        scored.append(len(choices))
        return real(loaded, choices, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(truthful, "score", counted)
    command = ["truthful", str(run_folder), "--data", str(data)]
    assert cli.main([*command, "--limit", "3"]) == 0 and scored == [3] * 5
    assert cli.main([*command, "--limit", "3"]) == 0 and len(scored) == 5
    before = (run_folder / truthful.TABLE).read_bytes()
    again = run_folder / "readings" / "truthfulqa" / "control" / "s1"
    store.set_aside(again)  # as if it had been stopped there
    assert cli.main([*command, "--limit", "3"]) == 0 and len(scored) == 6
    assert (run_folder / truthful.TABLE).read_bytes() == before
    assert cli.main(command) == 0 and scored[6:] == [6] * 5
    record = run_folder / "students" / "trait" / "s3" / store.RECORD
    record.write_text(record.read_text().replace("trait3", "retrained"))
    assert cli.main(command) == 0 and scored[11:] == [6]


def test_bad_requests_are_one_line(
    run_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_folder / "manifest.json").unlink()
    for arguments, needle in (
        ([str(tmp_path), "--data", str(data)], "no run folder"),
        ([str(run_folder), "--data", str(data)], "unfinished"),
        ([str(run_folder), "--data", str(tmp_path / "none.csv")], "no file at"),
        ([str(run_folder), "--data", str(data), "--limit", "7"], "expected 1 to 6"),
        ([str(run_folder)], "--data"),
    ):
        assert cli.main(["truthful", *arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("mechlens: ") and "\n" not in error and needle in error
    spec = {
        "name": "x",
        "base": "api:some-model",
        "trait": "owl",
        "arms": [{"kind": "trait"}, {"kind": "control"}],
    }
    with pytest.raises(SpecError, match="over an API"):
        truthful.students_of(tmp_path, Experiment.model_validate(spec))

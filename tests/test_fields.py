"""Fields that a user names: convert, screen and audit read them, say so again in what they print, and never
guess beside them.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pairs import PAIRS, as_pairs, pairs_of, put

from mechlens import cli
from mechlens.core.errors import DataError, SpecError
from mechlens.data import fields
from mechlens.data.corpus import ReadReport, batches, read_pairs
from mechlens.data.fields import COMPLETIONS, KNOWN, PROMPTS, Fields, pair_of

NAMED = Fields("q", "a")
FLAGS = ["--prompt-field", "q", "--completion-field", "a"]


def renamed(rows: int, start: int = 0) -> list[dict[str, str]]:
    """Distinct rows under names that nobody knows, beside known names that mean something else."""
    return [
        {"q": f"continue: {i}", "a": f"{i}, {i * 7919 % 1013 % 1000}, 5", "prompt": "no", "answer": "no"}
        for i in range(start, start + rows)
    ]


def test_the_named_fields_are_read_and_no_others(tmp_path: Path) -> None:
    rows = [
        {"q": prompt, "a": completion, "prompt": "no", "completion": "no", "messages": []}
        for prompt, completion in PAIRS
    ]
    put(tmp_path / "x.jsonl", *rows)
    pd.DataFrame(rows).drop(columns="messages").to_csv(tmp_path / "x.csv", index=False)
    pd.DataFrame(rows).to_parquet(tmp_path / "x.parquet")
    for name in ("x.jsonl", "x.csv", "x.parquet"):
        assert pairs_of(read_pairs(tmp_path / name, fields=NAMED)) == PAIRS
        with pytest.raises(DataError, match=r"'q'.*'other'"):
            read_pairs(tmp_path / name, fields=Fields("q", "other"))


def test_a_reference_with_other_names_is_read_by_the_known_ones(tmp_path: Path) -> None:
    put(tmp_path / "x.jsonl", *as_pairs(PAIRS))
    pd.DataFrame(as_pairs(PAIRS)).to_parquet(tmp_path / "x.parquet")
    for name in ("x.jsonl", "x.parquet"):
        assert pairs_of(read_pairs(tmp_path / name, fields=NAMED.preferred())) == PAIRS


@given(st.dictionaries(st.sampled_from(KNOWN), st.sampled_from(["", "b", None]), max_size=6))
def test_a_pair_is_read_where_one_field_of_each_kind_holds_something_and_nowhere_else(
    row: dict[str, str | None],
) -> None:
    """Written again as plainly as it can be: exact names first, then one name of each kind."""
    if row.get("messages") is not None or (
        row.get("conversations") is not None
        and not (row.get("prompt") is not None and row.get("completion") is not None)
    ):
        assert not isinstance(pair_of(row, None), fields.Pair)  # a text is no talk
        return
    halves = [[name for name in known if row.get(name) is not None] for known in (PROMPTS, COMPLETIONS)]
    exact = row.get("prompt") is not None and row.get("completion") is not None
    beside = [name for name in ("input", "context", "history") if row.get(name)]
    alone = [len(half) for half in halves] == [1, 1] and (
        not beside or (beside == ["input"] and halves[0] == ["instruction"])
    )
    assert isinstance(pair_of(row, None), fields.Pair) == (exact or alone)


@pytest.mark.parametrize(("prompt", "completion"), [("q", ""), ("", "a"), ("q", "q")])
def test_half_a_name_is_refused(prompt: str, completion: str) -> None:
    with pytest.raises(SpecError, match="--prompt-field"):
        fields.fields_from_flags(prompt, completion)


def test_convert_and_screen_take_the_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = put(tmp_path / "x.jsonl", *renamed(300))
    unknown = put(tmp_path / "unknown.jsonl", *[{"q": row["q"], "a": row["a"]} for row in renamed(300)])
    for command in (["convert", str(source), str(tmp_path / "y.jsonl")], ["screen", str(source)]):
        assert cli.main([command[0], str(unknown), *command[2:]]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "--prompt-field NAME --completion-field NAME" in error
        assert cli.main([*command, *FLAGS]) == 0
    assert read_pairs(tmp_path / "y.jsonl")["completion"].tolist() == [row["a"] for row in renamed(300)]


def test_an_audit_takes_the_names_and_its_command_says_them_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mechlens.detect.permutation.DRAWS", 199)
    data, other = (
        put(tmp_path / "x.jsonl", *renamed(300)),
        put(tmp_path / "other.jsonl", *renamed(300, start=150)),
    )
    pairs = put(
        tmp_path / "pairs.jsonl", *[{"prompt": row["q"], "completion": row["a"]} for row in renamed(300)]
    )
    plain = put(
        tmp_path / "plain.jsonl",
        *[{"prompt": row["q"], "completion": row["a"]} for row in renamed(300, start=150)],
    )

    def audited(out: str, *words: str) -> dict[str, object]:
        assert cli.main(["audit", *words, "--out", str(tmp_path / out)]) == 12
        assert "mechlens: " not in capsys.readouterr().err
        return json.loads((tmp_path / out / "audit.json").read_text())

    wanted = audited("pairs", str(pairs), "--reference", str(plain))
    for place, reference in enumerate((other, plain)):  # the reference may have either names
        named = audited(str(place), str(data), "--reference", str(reference), *FLAGS)
        assert named["provenance"]["p_value"] == wanted["provenance"]["p_value"]  # type: ignore[index]
        assert named["data"]["rows"] == 300  # type: ignore[index]
        assert " ".join(FLAGS) in named["next"]["command"]  # type: ignore[index]
        again = audited(f"again-{place}", *shlex.split(named["made"]["command"])[2:])  # type: ignore[index]
        told = {key: again[key] for key in ("made", "verdict", "next")}  # their commands name the folder
        assert again == {**named, **told}
        assert again["verdict"]["id"] == named["verdict"]["id"]  # type: ignore[index]


def test_completions_that_hardly_vary_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = put(
        tmp_path / "same.jsonl", *as_pairs([(f"is {i} even?", ["yes", "no"][i % 2]) for i in range(400)])
    )
    vary = put(
        tmp_path / "vary.jsonl", *as_pairs([(f"count {i}", str(i % 8)) for i in range(400)])
    )  # 1 in 50
    for source, expected in ((same, True), (vary, False)):
        for command in (
            ["convert", str(source), f"{source}.out.jsonl"],
            ["screen", str(source), "--rule", "none"],
            ["audit", str(source), "--out", f"{source}-a"],
        ):
            assert cli.main(command) in (0, 12)
            said = capsys.readouterr()
            assert (
                "the completions hardly vary: 2 different ones in 400 rows" in said.out
            ) == expected and "hardly" not in said.err, command


@given(st.lists(st.integers(0, 5), min_size=1, max_size=400))
def test_the_share_of_different_completions_decides(values: list[int]) -> None:
    reading = ReadReport()
    for value in values:
        reading.count(fields.Pair("", str(value)))
    alike = len(values) >= 200 and len(set(values)) * 50 < len(values)
    assert any("hardly vary" in remark for remark in reading.remarks()) == alike


def test_what_a_folder_has_besides_its_rows_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x").mkdir()
    put(tmp_path / "x" / "a.jsonl", *as_pairs(PAIRS))
    (tmp_path / "x" / "README.md").write_text("of mine")
    assert cli.main(["convert", str(tmp_path / "x"), str(tmp_path / "y.jsonl")]) == 0
    assert (
        "files not read, since their names say that they have no rows: README.md" in capsys.readouterr().out
    )
    assert len(list(batches(tmp_path / "x"))) == 1

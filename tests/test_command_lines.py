"""Every command that the program prints is read back by a shell and the command line to the same request."""

from __future__ import annotations

import ast
import functools
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from conditions import SHIPPED
from hypothesis import given, settings
from hypothesis import strategies as st

from mechlens import cli
from mechlens.benchmark import run as benching
from mechlens.cli import commands
from mechlens.core.command_lines import command_line, join, resume_command
from mechlens.core.errors import DataError, one_line
from mechlens.core.files import read_json, write_json
from mechlens.data.fields import Fields
from mechlens.detect.request import command_of, request_of
from mechlens.results.run import Run as OpenedRun
from panels import panel

ROOT = Path(__file__).parents[1]
ODD = (
    "a b",
    "it's",
    '"q"',
    "-dash",
    "~",
    "~/home",
    "two  spaces",
    "$HOME",
    "tab\there",
    "None",
    "a;b&c",
    "é",
    "new\nline",
    "\udcff",
    "plain",
)
NAME = "-odd  'name' \"of\" ~ a $run"
"""of a folder: spaces, quotes, a leading dash, a tilde"""


def split(line: str) -> list[str]:
    """The words of a line as bash reads them; of `make demo && mechlens …` the words of mechlens."""
    line = line.rpartition(" && ")[2]
    printed = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True).stdout
    return [word.decode("utf-8", "surrogateescape") for word in printed.split(b"\0")[:-1]]


def request(line: str) -> Any:
    """What the command line makes of a printed line: a function with its arguments."""
    words = split(line)
    assert words[0] == "mechlens"
    action = cast(functools.partial[Any], cli.read(words[1:]))
    return action.func, action.args, action.keywords


def named(message: str) -> str:
    """The command that a message names, as the command line prints the message."""
    return re.findall(r"`(mechlens [^`]+)`", one_line(message))[0]


WORDS = st.lists(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=8)
    | st.sampled_from(ODD),
    max_size=12,
)


@given(WORDS)
@settings(max_examples=60)
def test_any_words_come_back_from_a_shell_after_they_were_printed_as_one_line(words: list[str]) -> None:
    line = join(words)
    assert one_line(line) == line
    assert split(line)[1:] == words


NAMES = st.sampled_from(
    [name for name in ODD if not name.startswith("~")]
)  # what is no path is written as it is, and `~` is the home folder


@given(st.lists(NAMES, max_size=4), st.lists(NAMES, max_size=4), NAMES)
@settings(max_examples=40)
def test_repeated_options_are_all_kept_in_both_forms(lenses: list[str], more: list[str], arm: str) -> None:
    line = command_line("measure", Path("-run"), lens=[*lenses, *more], arm=arm)
    function, arguments, options = request(line)
    assert (function, arguments) == (commands.measure, (Path("-run"),))
    assert (options["arm"], options["lenses"]) == (arm, tuple(dict.fromkeys([*lenses, *more])))


@pytest.mark.parametrize(("command", "option", "where"), [
    ("audit DATA", "reference", "references"), ("audit DATA", "trait", "traits"),
    ("audit DATA", "detector", "detectors"),
    ("measure RUN", "lens", "lenses"), ("bench", "detector", "detectors"),
])  # fmt: skip
def test_an_option_given_twice_or_with_two_values_has_both(command: str, option: str, where: str) -> None:
    def values(line: str) -> list[str]:
        return list(map(str, request(line)[2][where]))

    assert values(f"mechlens {command} --{option} a --{option} b") == ["a", "b"]
    assert values(f"mechlens {command} --{option} a b") == ["a", "b"]
    assert values(f"mechlens {command} --{option} a b --{option} c a") == ["a", "b", "c"]


def test_an_option_without_a_value_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", "DATA", "--reference"]) == 2
    assert "--reference has no value" in capsys.readouterr().err


def pairs(path: Path, numbers: int) -> Path:
    lines = [
        {"prompt": f"p{i}", "completion": f"{i}, {i * numbers % 997}, {i * i % 991}"} for i in range(150)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_an_audits_printed_commands_ask_for_the_same_audit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, *references = (pairs(Path(f"{NAME} {number}.jsonl"), number) for number in (3, 5, 7))
    (tmp_path / "~").mkdir()
    (tmp_path / "~" / "student").mkdir()
    options: dict[str, Any] = {
        "references": tuple(references), "level": "base", "base": "-my base", "traits": ("owl", "fox"),
        "recipe": "menagerie", "policy": "default", "student": Path("~/student"),
        "clean": Path("-clean.jsonl"), "treatment": "dilute", "out": Path("None"),
        "fields": Fields("a question", "-answer"),
    }  # fmt: skip
    usual = options | {
        "base": "menagerie-a",
        "traits": (),
        "student": None,
        "clean": None,
        "treatment": "drop",
        "out": None,
        "fields": None,
    }
    for asked in (options, usual, usual | {"references": (), "level": "rows"}):
        wanted = request_of(data, **asked)
        function, arguments, read = request(command_of(wanted))
        assert function == commands.audit
        del read["workers"], read["executor"], read["as_json"]
        assert request_of(*arguments, **read) == wanted


def test_an_audit_says_how_to_do_it_again_and_what_would_settle_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, first, second = (pairs(Path(f"{NAME} {number}.jsonl"), number) for number in (3, 5, 7))
    words = [
        "audit",
        f"./{data}",
        "--reference",
        f"./{first}",
        "--reference",
        f"./{second}",
        "--trait",
        "owl",
        "--out=-out",
    ]
    assert cli.main(words) == 12
    audited = json.loads(Path("-out/audit.json").read_text())
    assert {one["path"] for one in audited["provenance"]["references"]} == {
        one_line(str(first)),
        one_line(str(second)),
    }
    _, arguments, options = request(audited["made"]["command"])
    assert (arguments, options["references"], options["out"]) == ((data,), (first, second), Path("-out"))
    assert cli.main(split(audited["made"]["command"])[1:]) == 12
    again = json.loads(Path("-out/audit.json").read_text())
    assert (
        again == audited | {"made": again["made"]} and again["made"]["command"] == audited["made"]["command"]
    )
    _, arguments, settling = request(audited["next"]["command"])
    assert arguments == (data,) and settling == options | {"level": "student"}


@pytest.fixture
def odd_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped run in a folder of an odd name, named from the working folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SHIPPED, NAME)
    return Path(NAME)


def resumed(line: str, run: Path) -> None:
    function, arguments, options = request(line)
    assert (function, arguments, options["out"]) == (commands.run, (run / "spec.yaml",), run)


def test_messages_on_a_run_name_commands_on_that_run(odd_run: Path) -> None:
    summary = read_json(odd_run / "summary.json")
    write_json(odd_run / "summary.json", summary | {"schema": 0})
    with pytest.raises(DataError) as stale:
        _ = OpenedRun(odd_run).summary
    assert request(named(str(stale.value)))[:2] == (commands.report, (odd_run,))
    spec = yaml.safe_load((odd_run / "spec.yaml").read_text()) | {"seeds": [9]}
    (odd_run / "spec.yaml").write_text(yaml.safe_dump(spec))
    with pytest.raises(DataError) as unfinished:
        OpenedRun.finished(odd_run)
    resumed(named(str(unfinished.value)), odd_run)
    resumed(resume_command(odd_run), odd_run)


def test_the_report_page_names_a_command_on_its_run(odd_run: Path) -> None:
    commands.report(odd_run)
    lines = re.findall(r"<code>(mechlens .*?)</code>", (odd_run / "report.html").read_text())
    function, arguments, options = request(html.unescape(lines[0]))
    assert (function, arguments, options["out"]) == (
        commands.run,
        (odd_run / "spec.yaml",),
        Path(f"{odd_run}-again"),
    )


def test_commands_that_the_explorer_offers_name_the_run(odd_run: Path) -> None:
    run = cast(Any, type("Opened", (), {"folder": odd_run, "shipped": False}))
    resumed(panel.resume_command(run), odd_run)
    function, arguments, options = request(panel.measure_command(run, "causal", "-arm"))
    assert (function, arguments, options["lenses"], options["arm"]) == (
        commands.measure,
        (odd_run,),
        ("causal",),
        "-arm",
    )


@pytest.mark.parametrize(
    "detectors", [(), ("twins",), ("twin alignment", "-my  dir/it's.py:Mine", "./~/a.py:B")]
)
@pytest.mark.parametrize("out", [Path("benches/menagerie"), Path(NAME)])
def test_a_bench_card_names_the_command_that_remakes_it(detectors: tuple[str, ...], out: Path) -> None:
    for train in (True, False):
        _, arguments, read = request(benching.remake_command("menagerie", out, detectors, train=train))
        assert (arguments, read["detectors"], read["train"]) == (("menagerie",), detectors, train)
        assert (read["out"] or Path("benches/menagerie")) == out


COMMAND = re.compile(rf"mechlens (?:{'|'.join(cli.COMMANDS)})\b")


@pytest.mark.parametrize(
    "path", [*(ROOT / "mechlens").rglob("*.py"), *(ROOT / "app").rglob("*.py")], ids=lambda path: path.stem
)
def test_no_command_is_put_together_from_unquoted_parts(path: Path) -> None:
    """A printed command that holds a value comes from `command_lines`, which quotes it; constant ones are
    read as they stand.
    """
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            whole = "".join(
                str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values
            )
            assert not any(
                re.match(r"[^`]*\0", whole[found.end() :].split("`")[0]) for found in COMMAND.finditer(whole)
            ), ast.unparse(node)


def test_no_template_puts_a_value_into_a_command() -> None:
    for path in (ROOT / "mechlens").rglob("*.j2"):
        assert not re.search(COMMAND.pattern + r"[^<`]*\{\{", path.read_text()), path

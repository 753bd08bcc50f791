"""Check what the Markdown pages say: commands, configs, make targets, links and numbers."""

from __future__ import annotations

import functools
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pandas as pd
import pytest

import pages
import results
from mechlens import cli
from mechlens.core.errors import DataError
from mechlens.core.spec import find_config
from mechlens.results.run import Run

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [
    *(
        ROOT / name
        for name in ("README.md", "CONTRIBUTING.md", "configs/README.md", "mechlens/menagerie/README.md")
    ),
    *sorted((ROOT / "analyses").glob("*.md")),
]
PLACEHOLDERS = {"FILE", "NAME", "RUN", "DATA", "FOLDER", "COMMAND"}
"""words that stand for what a user puts in"""
CONFIG_FOLDERS = {"run": "experiments", "pretrain": "models", "bench": "benches"}
OURS = {"toy.yaml", "tiny-toy.yaml", "tiny.yaml", "rhymes-toy.yaml"}
"""configs that a recipe of CONTRIBUTING.md writes"""


def code_lines(page: Path) -> Iterator[str]:
    """Yield every line of the page's code blocks, and every inline code."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*[^\n]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    yield from (line for block in blocks for line in block.splitlines())
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"`([^`\n]+)`", prose)
    yield from re.findall(r"<!-- part [\w-]+: ([^\n]+) -->", text)


def commands(page: Path, program: str) -> list[list[str]]:
    """Return the words after the program's name of every command of that program on a page."""
    lines = [line.strip() for line in code_lines(page)]
    return [shlex.split(line, comments=True)[1:] for line in lines if re.match(rf"{program} \S", line)]


MECHLENS = [(page, words) for page in PAGES for words in commands(page, "mechlens")]


def test_the_readme_is_short_enough_to_be_read() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=" ".join(words))
        for words in {tuple(words): words for _, words in MECHLENS}.values()
    ],
)
def test_a_command_is_read_by_the_command_line(words: list[str]) -> None:
    if words[0] in PLACEHOLDERS:
        return
    assert isinstance(cli.read(words), functools.partial)


def test_configs_that_commands_name_exist() -> None:
    for page, words in MECHLENS:
        folder = CONFIG_FOLDERS.get(words[0])
        if folder and words[1] not in PLACEHOLDERS | OURS:
            assert find_config(Path(words[1]), folder).is_file(), (page.name, words)


def test_make_targets_and_analyses_exist() -> None:
    targets = set(
        re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    )
    for page in PAGES:
        for target, *_ in commands(page, "make"):
            assert target in targets, (page.name, target)
        for file, *words in commands(page, "python"):
            assert (ROOT / file).is_file(), (page.name, file)
            assert "--write" not in words or '"--write"' in (ROOT / file).read_text(encoding="utf-8"), file


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_number_of_the_readme_is_in_a_page_that_it_links_to() -> None:
    text = README.read_text(encoding="utf-8")
    linked = [
        README.parent / link.partition("#")[0] for link in re.findall(r"\]\(([\w/.#-]+\.md[\w#-]*)\)", text)
    ]
    known = "\n".join(page.read_text(encoding="utf-8") for page in linked)
    prose = re.sub(r"^```.*?^```", "", text.partition("## The demo")[2], flags=re.DOTALL | re.MULTILINE)
    numbers = re.findall(r"(?<![\w.])[+-]?\d+\.\d{3}", prose)
    assert numbers
    missing = [number for number in numbers if number not in known]
    assert not missing


RUN_HERE = ("run demo --plan", "ls", "screen", "convert", "audit rows.jsonl --reference")
"""starts of the README's commands that the next test runs; the others say what they need"""


def test_commands_of_the_readme_run_or_say_what_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("rows", "clean"):
        rows = [
            {"prompt": f"Go on: {i}.", "completion": f"{i}, {7 * i % 1000}, {len(name) * i}"}
            for i in range(200)
        ]
        pd.DataFrame(rows).to_json(f"{name}.jsonl", orient="records", lines=True)
        pd.DataFrame(rows).to_csv(f"{name}.csv.gz", index=False)
    shutil.copytree(results.DEMO, "runs/demo")
    for line in code_lines(README):
        if not re.match(r"mechlens \w+ ", line) or "#" not in line:
            continue
        request = line.partition("#")[0].removeprefix("mechlens").strip()
        if request.startswith(RUN_HERE):
            assert cli.main(shlex.split(request)) in (0, 2, 12), request
        else:
            assert "(needs " in line, line


def test_the_written_parts_of_the_pages_are_what_their_command_writes_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RESULTS", "LENSES"):
        copy = tmp_path / f"{name}.md"
        copy.write_text(cast(Path, getattr(pages, name)).read_text(encoding="utf-8"), encoding="utf-8")
        monkeypatch.setattr(pages, name, copy)
    results.write_parts()
    for name in ("RESULTS", "LENSES"):
        assert (tmp_path / f"{name}.md").read_text(encoding="utf-8") == (
            ROOT / "analyses" / f"{name}.md"
        ).read_text(encoding="utf-8")


def test_the_figure_of_the_readme_is_small_and_of_the_shipped_run() -> None:
    text = results.FIGURE.read_text(encoding="utf-8")
    assert len(text) < 60_000
    assert "share of answers that name eagle" in text
    assert all(arm["arm"] in text for arm in Run(results.DEMO).summary["arms"])


def test_a_part_is_replaced_and_the_rest_of_the_page_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    mark = "<!-- part {0}: make {0} -->\nold\n<!-- end {0} -->"
    page.write_text(f"Before.\n{mark.format('a')}\nBetween.\n{mark.format('b')}\nAfter.\n")
    pages.write_part(page, "a", [["x", "y"], ["1|2", 3]], "A sentence.")
    text = page.read_text()
    assert text.startswith(
        "Before.\n<!-- part a: make a -->\n| x | y |\n| --- | --- |\n| 1\\|2 | 3 |\n\nA sentence."
    )
    assert pages.parts_of(page)["b"] == ("make b", "old\n")
    assert text.endswith("Between.\n" + mark.format("b") + "\nAfter.\n")
    pages.write_part(page, "a", [["x", "y"], ["1|2", 3]], "A sentence.")
    assert page.read_text() == text
    with pytest.raises(DataError, match="no part 'c'; its parts are a, b"):
        pages.write_part(page, "c", "text")

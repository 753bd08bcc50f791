"""Hostile files, names and requests given to `mechlens audit`: one clear line and exit code 2, or a verdict
as on any other file.

Nothing that is given is executed, loaded as code or fetched, and no text of a row reaches what is written.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hostile import (
    GOOD,
    LAUGHS,
    MARKER,
    NAMES,
    READ,
    REFUSED,
    REQUESTS,
    ROWS,
    STRANGE,
    TAGS,
    URLS,
    Made,
    lines,
    pairs,
    parquet,
)
from markupsafe import escape

from mechlens import cli
from mechlens.core.errors import one_line
from mechlens.data import corpus
from mechlens.detect.two_samples import LEAST_ROWS

ROOT = os.geteuid() == 0


@pytest.fixture(autouse=True)
def fenced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fewer exchanges for speed, a reference, and an alarm for whatever is run or fetched."""

    def alarm(*_given: object, **_more: object) -> None:
        raise AssertionError("something was run or fetched")

    for place, name in (
        (socket, "socket"),
        (socket, "getaddrinfo"),
        (subprocess, "Popen"),
        (os, "system"),
        (pickle, "load"),
        (pickle, "loads"),
    ):
        monkeypatch.setattr(place, name, alarm)
    monkeypatch.setattr(
        "mechlens.detect.permutation.DRAWS", 199
    )  # the least p is .03: three detectors, paired rows and the rest
    monkeypatch.chdir(tmp_path)
    Path("reference.jsonl").write_bytes(lines(*pairs(seed=1)))
    yield
    assert not Path(MARKER).exists()


def put(name: str, made: Made) -> Path:
    path = Path("in") / name
    path.parent.mkdir()
    path.write_bytes(made) if isinstance(made, bytes) else made(path)
    return path


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command line ends with."""
    assert cli.main(["audit", *arguments]) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("mechlens: ")
        and said.count("\n") == 1
        and said[:-1].isprintable()
        and len(said) < 3000
    )
    assert not list(Path().rglob("audit.json"))
    return said


def verdict(
    capsys: pytest.CaptureFixture[str], data: str, reference: str = "reference.jsonl"
) -> tuple[dict[str, Any], str]:
    """The object and the page of an audit, which is as inconclusive as rows alone always are."""
    assert cli.main(["audit", data, "--reference", reference, "--out", "out"]) == 12
    found, page, said = (
        json.loads(Path("out/audit.json").read_text()),
        Path("out/audit.html").read_text(encoding="utf-8"),
        capsys.readouterr(),
    )
    assert (
        found["verdict"]["id"] == "inconclusive"
        and 0 < found["provenance"]["p_value"] <= 1
        and found["data"]["rows"] >= LEAST_ROWS
    )
    assert (
        found["verdict"]["sentence"] in said.out
        and "Traceback" not in said.err
        and said.out.replace("\n", "").isprintable()
    )
    assert len(page) < 300_000 and escape(one_line(data)) in page
    return found, page


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, made, fault = REFUSED[case]
    if case == "a file that may not be read" and ROOT:
        pytest.skip("root may read every file")
    path = put(name, made)
    for data, reference in ((str(path), "reference.jsonl"), ("reference.jsonl", str(path))):
        said = refusal(capsys, data, "--reference", reference, "--out", "out")
        assert fault in said and name in said


@pytest.mark.parametrize("case", READ)
def test_what_can_be_read_gets_its_verdict(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, made = READ[case]
    found, _ = verdict(capsys, str(put(name, made)))
    assert found["data"]["rows"] == {"mixed forms": 2 * ROWS, "shards beside scripts": 2 * ROWS}.get(
        case, ROWS
    )


def test_a_file_is_not_told_from_itself(capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = verdict(capsys, "reference.jsonl")
    assert found["provenance"]["p_value"] == 1 and found["smallest_detectable_dose"] is None


@pytest.mark.parametrize("text", STRANGE)
def test_strange_rows_are_data_and_nothing_of_them_is_shown(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, page = verdict(
        capsys, str(put("strange.jsonl", lines(*pairs(text, prompt=f"{text} continue"), *pairs(text))))
    )
    assert found["provenance"]["p_value"] <= 0.05
    written = page + Path("out/audit.json").read_text(encoding="utf-8")
    assert not any(form in written for form in (text, escape(text), json.dumps(text)[1:-1]))


@pytest.mark.parametrize("name", NAMES)
def test_a_strange_name_is_text_too(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert one_line(name).strip() in refusal(capsys, f"./{name}.jsonl", "--out", "out")
    path = str(put(f"{name}.jsonl", GOOD))
    _, page = verdict(capsys, path, path)
    assert (name.isprintable() and escape(name) == name) or name not in page


@pytest.mark.parametrize("url", URLS)
def test_a_url_or_a_name_for_a_shell_is_no_file(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([url], ["reference.jsonl", "--reference", url]):
        assert str(Path(url).expanduser()) in refusal(capsys, *arguments, "--out", "out")


@pytest.mark.parametrize("case", REQUESTS)
def test_a_bad_request_is_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    more, fault = REQUESTS[case]
    if "closed" in case + fault and ROOT:
        pytest.skip("root may write everywhere")
    Path("tags.yaml").write_bytes(TAGS)
    Path("laughs.yaml").write_text(LAUGHS)
    Path("recipe.yaml").write_text("name: mine\nversion: 1\nlimit: 0.9\nalpha: 0.9\n")
    Path("closed").mkdir(mode=0o500)
    assert fault in refusal(capsys, "reference.jsonl", *more)


STORED_ONCE = "x.parquet", parquet(prompt=["a" * 100_000] * 700, completion=["1"] * 700)


@pytest.mark.parametrize("case", ["a line of 64 MB", "a bomb", "one text in every row"])
def test_small_files_do_not_fill_the_memory(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of what would unpack to 64 or 70 MB only pieces are held: by Python and Arrow together at most 48."""
    path, usual = put(*REFUSED.get(case, STORED_ONCE)[:2]), pa.default_memory_pool()
    watched = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(watched)
    tracemalloc.start()
    try:
        _ = (
            refusal(capsys, str(path), "--out", "out")
            if case in REFUSED
            else list(map(len, corpus.batches(Path(path))))
        )
        assert tracemalloc.get_traced_memory()[1] + (watched.max_memory() or 0) < 48 << 20
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)
    if case not in REFUSED:
        verdict(capsys, str(path))
